//! What is said to Prometheus of pods. Names of families are for dashboards: they stay.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use podhull_protocol::{ContainerStatsResponse, PodStatsResponse};
use podhull_vmm::control::{Measured, Traffic};

use super::exposition::{Exposition, Family, Labels, Type};
use super::look::{Look, look_at_all};
use super::pods::{InspectError, Pod};
use crate::calls::BOUNDS;
use crate::pod::Phase;

const fn counter(name: &'static str, help: &'static str) -> Family {
    Family { name, kind: Type::Counter, help }
}

const fn gauge(name: &'static str, help: &'static str) -> Family {
    Family { name, kind: Type::Gauge, help }
}

const fn histogram(name: &'static str, help: &'static str) -> Family {
    Family { name, kind: Type::Histogram, help }
}

/// All of them.
pub const FAMILIES: &[Family] = &[
    gauge("podhull_pod_info", "A pod that runs; its names in Kubernetes, if it has any. Always 1."),
    gauge("podhull_pod_containers", "Containers of the pod that have not ended."),
    gauge("podhull_pod_start_time_seconds", "When the pod's virtual machine was started, since the epoch."),
    gauge("podhull_guest_up", "Whether the guest has answered; without, what is said of the guest is missing."),
    histogram("podhull_start_phase_duration_seconds", "Starts of the pod's containers, by phase."),
    histogram(
        "podhull_agent_request_duration_seconds",
        "Calls of the agent in the guest, by method, as the host saw them.",
    ),
    histogram(
        "podhull_shim_request_duration_seconds",
        "Requests to the pod's shim, by method; those that wait for an end are left out.",
    ),
    gauge("podhull_vm_cpus", "CPUs of the virtual machine."),
    gauge("podhull_vm_memory_bytes", "Memory of the virtual machine."),
    counter("podhull_vm_exits_total", "KVM exits of the virtual machine to user space, by reason."),
    counter(
        "podhull_share_requests_total",
        "Requests of the guest to the file server, which has roots and volumes, by what for.",
    ),
    counter("podhull_share_read_bytes_total", "Read by the guest from files of the file server."),
    counter("podhull_share_written_bytes_total", "Written by the guest to files of the file server."),
    gauge("podhull_processes", "Processes of the pod on the host, by what they are for."),
    counter(
        "podhull_process_cpu_seconds_total",
        "Processor time of processes on the host; that of vmm is the guest's too.",
    ),
    gauge("podhull_process_resident_memory_bytes", "Memory of processes on the host, that of vmm with the guest's."),
    gauge(
        "podhull_process_proportional_memory_bytes",
        "The same with each process's part only of what processes share (PSS).",
    ),
    gauge("podhull_process_open_fds", "Open files of processes on the host."),
    gauge("podhull_process_threads", "Threads of processes on the host."),
    gauge("podhull_guest_uptime_seconds", "Since the guest's kernel began."),
    gauge("podhull_guest_cpus_online", "CPUs that the guest uses."),
    counter("podhull_guest_cpu_seconds_total", "Processor time as the guest counts, by mode."),
    gauge("podhull_guest_memory_total_bytes", "Memory that the guest's kernel manages."),
    gauge("podhull_guest_memory_free_bytes", "Memory of the guest in which nothing is."),
    gauge("podhull_guest_memory_available_bytes", "Memory of the guest that programs could have."),
    gauge("podhull_guest_memory_cached_bytes", "Memory of the guest with contents of files."),
    gauge("podhull_guest_memory_slab_bytes", "Memory of the guest's kernel for its own objects."),
    counter("podhull_guest_network_receive_bytes_total", "Received by an interface of the pod."),
    counter("podhull_guest_network_receive_packets_total", "Received by an interface of the pod."),
    counter("podhull_guest_network_receive_errors_total", "Received damaged by an interface of the pod."),
    counter("podhull_guest_network_receive_dropped_total", "Received by an interface of the pod, and dropped."),
    counter("podhull_guest_network_transmit_bytes_total", "Sent by an interface of the pod."),
    counter("podhull_guest_network_transmit_packets_total", "Sent by an interface of the pod."),
    counter("podhull_guest_network_transmit_errors_total", "Not sent by an interface of the pod because of an error."),
    counter("podhull_guest_network_transmit_dropped_total", "Dropped by an interface of the pod, and not sent."),
    counter(
        "podhull_guest_disk_read_bytes_total",
        "Read from a disk of the virtual machine; files of the file server are on none.",
    ),
    counter("podhull_guest_disk_reads_total", "Reads from a disk of the virtual machine."),
    counter("podhull_guest_disk_written_bytes_total", "Written to a disk of the virtual machine."),
    counter("podhull_guest_disk_writes_total", "Writes to a disk of the virtual machine."),
    counter("podhull_container_cpu_usage_seconds_total", "Processor time of a container."),
    counter("podhull_container_cpu_user_seconds_total", "Of that, in user mode."),
    counter("podhull_container_cpu_system_seconds_total", "Of that, in the guest's kernel."),
    counter("podhull_container_cpu_throttled_seconds_total", "How long a container had to wait for its CPU quota."),
    gauge("podhull_container_memory_usage_bytes", "Memory of a container, with contents of files."),
    gauge(
        "podhull_container_memory_working_set_bytes",
        "The same without contents of files that were not used of late.",
    ),
    gauge("podhull_container_memory_limit_bytes", "What a container may have; missing without a limit."),
    counter("podhull_container_oom_kills_total", "Processes of a container that were killed for lack of memory."),
    gauge("podhull_container_processes", "Processes of a container, threads counted."),
    counter("podhull_container_disk_read_bytes_total", "Read from disks by a container."),
    counter("podhull_container_disk_written_bytes_total", "Written to disks by a container."),
];

/// Most interfaces and disks of a guest that are passed on; its agent has the same bound, and is not believed.
const MOST: usize = 64;

/// Upper bounds for phases of a start, in seconds.
const PHASES: [f64; 12] = BOUNDS;

/// Looks at pods, and says what it sees.
pub fn text(pods: &[Pod]) -> Result<String, InspectError> {
    let looks = look_at_all(pods)?;
    let mut exposition = Exposition::new(FAMILIES);
    for (pod, look) in pods.iter().zip(&looks) {
        say(&mut exposition, pod, look);
    }
    Ok(exposition.text())
}

fn say(to: &mut Exposition, pod: &Pod, look: &Look) {
    let (namespace, name) = pod.name().unwrap_or_default();
    let root = pod.root.to_string_lossy();
    // Ids are those of a root: another may have the same.
    let own: Labels<'_> = &[("pod", pod.id()), ("root", &root)];
    to.add("podhull_pod_info", &with(own, &[("namespace", namespace), ("name", name)]), 1);
    to.add("podhull_pod_containers", own, pod.count());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    to.add("podhull_pod_start_time_seconds", own, now.saturating_sub(pod.uptime()).as_secs_f64());
    starts(to, own, pod);
    for calls in &look.calls {
        let labels = with(own, &[("method", calls.method)]);
        to.histogram("podhull_agent_request_duration_seconds", &labels, &BOUNDS, &calls.buckets, calls.seconds);
    }
    for requests in &look.requests {
        let labels = with(own, &[("method", requests.method)]);
        to.histogram("podhull_shim_request_duration_seconds", &labels, &BOUNDS, &requests.buckets, requests.seconds);
    }
    for (kind, numbers) in &look.processes {
        let labels = &with(own, &[("process", kind.name())]);
        to.add("podhull_processes", labels, numbers.processes);
        to.add("podhull_process_cpu_seconds_total", labels, numbers.cpu.as_secs_f64());
        to.add("podhull_process_resident_memory_bytes", labels, numbers.resident);
        to.add("podhull_process_proportional_memory_bytes", labels, numbers.proportional);
        to.add("podhull_process_open_fds", labels, numbers.files);
        to.add("podhull_process_threads", labels, numbers.threads);
    }
    if let Some(measured) = &look.machine {
        machine(to, own, measured);
    }
    to.add("podhull_guest_up", own, u8::from(look.guest.is_some()));
    let Some(stats) = &look.guest else { return };
    guest(to, own, stats);
    // Those that the host knows: of others a guest may tell what it likes.
    for known in pod.containers() {
        let container = &known.state.id;
        let of = stats.containers.iter().find(|named| named.id == *container);
        if let Some(stats) = of.and_then(|named| named.stats.as_ref()) {
            self::container(to, &with(own, &[("container", container)]), stats);
        }
    }
}

/// A pod's labels and others.
fn with<'a>(own: Labels<'a>, others: &[(&'static str, &'a str)]) -> Vec<(&'static str, &'a str)> {
    [own, others].concat()
}

/// What each phase took of each container's start. How long a container waits for `start` is not podhull's affair.
fn starts(to: &mut Exposition, own: Labels<'_>, pod: &Pod) {
    let mut phases: BTreeMap<Phase, ([u64; PHASES.len() + 1], f64)> = BTreeMap::new();
    let spans = pod.containers().flat_map(|known| known.state.timeline.spans());
    for span in spans.filter(|span| span.phase != Phase::Wait) {
        let seconds = Duration::from_nanos(span.length).as_secs_f64();
        let (buckets, sum) = phases.entry(span.phase).or_default();
        buckets[PHASES.iter().position(|bound| seconds <= *bound).unwrap_or(PHASES.len())] += 1;
        *sum += seconds;
    }
    for (phase, (buckets, sum)) in phases {
        let labels = with(own, &[("phase", phase.name())]);
        to.histogram("podhull_start_phase_duration_seconds", &labels, &PHASES, &buckets, sum);
    }
}

fn machine(to: &mut Exposition, own: Labels<'_>, measured: &Measured) {
    to.add("podhull_vm_cpus", own, measured.cpus);
    to.add("podhull_vm_memory_bytes", own, measured.memory_bytes);
    let exits = &measured.exits;
    for (reason, count) in [
        ("port_read", exits.port_reads),
        ("port_write", exits.port_writes),
        ("mmio_read", exits.mmio_reads),
        ("mmio_write", exits.mmio_writes),
        ("other", exits.others),
    ] {
        to.add("podhull_vm_exits_total", &with(own, &[("reason", reason)]), count);
    }
    if let Some(traffic) = &measured.share {
        share(to, own, traffic);
    }
}

fn share(to: &mut Exposition, own: Labels<'_>, traffic: &Traffic) {
    for (kind, count) in [("read", traffic.reads), ("write", traffic.writes), ("other", traffic.others)] {
        to.add("podhull_share_requests_total", &with(own, &[("kind", kind)]), count);
    }
    to.add("podhull_share_read_bytes_total", own, traffic.read_bytes);
    to.add("podhull_share_written_bytes_total", own, traffic.written_bytes);
}

fn guest(to: &mut Exposition, own: Labels<'_>, stats: &PodStatsResponse) {
    let seconds = |milliseconds: u64| Duration::from_millis(milliseconds).as_secs_f64();
    to.add("podhull_guest_uptime_seconds", own, seconds(stats.uptime_ms));
    if let Some(cpu) = stats.cpu.as_ref() {
        to.add("podhull_guest_cpus_online", own, cpu.online);
        for (mode, milliseconds) in [
            ("user", cpu.user_ms),
            ("nice", cpu.nice_ms),
            ("system", cpu.system_ms),
            ("idle", cpu.idle_ms),
            ("iowait", cpu.iowait_ms),
            ("irq", cpu.irq_ms),
            ("softirq", cpu.softirq_ms),
            ("steal", cpu.steal_ms),
        ] {
            to.add("podhull_guest_cpu_seconds_total", &with(own, &[("mode", mode)]), seconds(milliseconds));
        }
    }
    if let Some(memory) = stats.memory.as_ref() {
        to.add("podhull_guest_memory_total_bytes", own, memory.total);
        to.add("podhull_guest_memory_free_bytes", own, memory.free);
        to.add("podhull_guest_memory_available_bytes", own, memory.available);
        to.add("podhull_guest_memory_cached_bytes", own, memory.cached);
        to.add("podhull_guest_memory_slab_bytes", own, memory.slab);
    }
    let mut seen = Vec::new();
    // A name that comes twice would make all of it unreadable.
    let mut once = |name: &str| {
        let name = name.chars().filter(char::is_ascii_graphic).take(15).collect::<String>();
        let new = !seen.contains(&name);
        seen.push(name.clone());
        new.then_some(name)
    };
    for interface in stats.interfaces.iter().take(MOST) {
        let Some(name) = once(&interface.name) else { continue };
        let labels = &with(own, &[("interface", &name)]);
        to.add("podhull_guest_network_receive_bytes_total", labels, interface.received_bytes);
        to.add("podhull_guest_network_receive_packets_total", labels, interface.received_packets);
        to.add("podhull_guest_network_receive_errors_total", labels, interface.received_errors);
        to.add("podhull_guest_network_receive_dropped_total", labels, interface.received_dropped);
        to.add("podhull_guest_network_transmit_bytes_total", labels, interface.sent_bytes);
        to.add("podhull_guest_network_transmit_packets_total", labels, interface.sent_packets);
        to.add("podhull_guest_network_transmit_errors_total", labels, interface.sent_errors);
        to.add("podhull_guest_network_transmit_dropped_total", labels, interface.sent_dropped);
    }
    for disk in stats.disks.iter().take(MOST) {
        let Some(name) = once(&disk.name) else { continue };
        let labels = &with(own, &[("disk", &name)]);
        to.add("podhull_guest_disk_read_bytes_total", labels, disk.read_bytes);
        to.add("podhull_guest_disk_reads_total", labels, disk.reads);
        to.add("podhull_guest_disk_written_bytes_total", labels, disk.written_bytes);
        to.add("podhull_guest_disk_writes_total", labels, disk.writes);
    }
}

fn container(to: &mut Exposition, labels: Labels<'_>, stats: &ContainerStatsResponse) {
    let seconds = |microseconds: u64| Duration::from_micros(microseconds).as_secs_f64();
    if let Some(cpu) = stats.cpu.as_ref() {
        to.add("podhull_container_cpu_usage_seconds_total", labels, seconds(cpu.usage_usec));
        to.add("podhull_container_cpu_user_seconds_total", labels, seconds(cpu.user_usec));
        to.add("podhull_container_cpu_system_seconds_total", labels, seconds(cpu.system_usec));
        to.add("podhull_container_cpu_throttled_seconds_total", labels, seconds(cpu.throttled_usec));
    }
    if let Some(memory) = stats.memory.as_ref() {
        let idle = memory.stat.get("inactive_file").copied().unwrap_or_default();
        to.add("podhull_container_memory_usage_bytes", labels, memory.usage);
        to.add("podhull_container_memory_working_set_bytes", labels, memory.usage.saturating_sub(idle));
        if memory.limit != u64::MAX {
            to.add("podhull_container_memory_limit_bytes", labels, memory.limit);
        }
        let kills = memory.events.as_ref().map_or(0, |events| events.oom_kill);
        to.add("podhull_container_oom_kills_total", labels, kills);
    }
    if let Some(pids) = stats.pids.as_ref() {
        to.add("podhull_container_processes", labels, pids.current);
    }
    if let Some(io) = stats.io.as_ref() {
        let sum =
            |of: fn(&podhull_protocol::IoDeviceStats) -> u64| io.devices.iter().map(of).fold(0, u64::saturating_add);
        to.add("podhull_container_disk_read_bytes_total", labels, sum(|device| device.read_bytes));
        to.add("podhull_container_disk_written_bytes_total", labels, sum(|device| device.written_bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use podhull_protocol::{DiskStats, InterfaceStats, MemoryStats};

    #[test]
    fn names_are_as_prometheus_wants_them_and_all_are_explained() {
        let page = include_str!("../../../docs/operations.md");
        for family in FAMILIES {
            let Family { name, kind, help } = family;
            assert!(name.starts_with("podhull_") && name.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{name}");
            assert_eq!(name.ends_with("_total"), *kind == Type::Counter, "{name}");
            assert!(help.ends_with('.') && !help.contains(['\n', '\\']), "{help}");
            assert_eq!(FAMILIES.iter().filter(|other| other.name == *name).count(), 1, "{name}");
            assert!(page.contains(&format!("`{name}`")), "docs/operations.md does not have {name}");
        }
    }

    /// Every name that is used is in the table.
    #[test]
    fn what_is_said_is_in_the_table() {
        let source = include_str!("metrics.rs");
        let used = source.split("to.").skip(1).filter_map(|part| {
            let (call, rest) = part.split_once('(')?;
            ["add", "histogram"].contains(&call).then(|| rest.trim_start().strip_prefix('"')?.split('"').next())?
        });
        let mut count = 0;
        for name in used {
            assert!(FAMILIES.iter().any(|family| family.name == name), "{name}");
            count += 1;
        }
        assert_eq!(count, FAMILIES.len());
    }

    #[test]
    fn a_guest_cannot_say_what_it_likes() {
        let interface = |name: &str| InterfaceStats { name: name.into(), received_bytes: 5, ..Default::default() };
        let many = (0..100).map(|number| interface(&format!("e{number}")));
        let stats = PodStatsResponse {
            interfaces: [interface("a\n\"\u{e9}"), interface("a\""), interface(&"x".repeat(99))]
                .into_iter()
                .chain(many)
                .collect(),
            disks: vec![DiskStats { name: "vda".into(), read_bytes: 7, ..Default::default() }],
            ..Default::default()
        };
        let mut exposition = Exposition::new(FAMILIES);
        guest(&mut exposition, &[("pod", "p")], &stats);
        let text = exposition.text();
        assert_eq!(text.matches("podhull_guest_network_receive_bytes_total{").count(), MOST - 1, "{text}");
        assert!(text.contains(r#"{pod="p",interface="a\""} 5"#), "{text}");
        assert!(
            text.contains(&format!("interface=\"{}\"", "x".repeat(15))) && text.contains(r#"disk="vda"} 7"#),
            "{text}"
        );
        let memory = MemoryStats { usage: 5, limit: u64::MAX, ..Default::default() };
        let unlimited = ContainerStatsResponse { memory: Some(memory).into(), ..Default::default() };
        let mut exposition = Exposition::new(FAMILIES);
        container(&mut exposition, &[("pod", "p")], &unlimited);
        let text = exposition.text();
        assert!(text.contains("memory_usage_bytes{pod=\"p\"} 5\n") && !text.contains("limit"), "{text}");
    }
}
