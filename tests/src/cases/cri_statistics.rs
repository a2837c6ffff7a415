//! What kubelet is told of the use of pods and containers, for metrics, autoscaling and eviction, after a load that is known.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use k8s_cri::v1 as api;

use super::oci;
use crate::cri::{Cri, Pod, container};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] =
    &[oci("cri_statistics::of_a_container", of_a_container), oci("cri_statistics::of_a_pod", of_a_pod)];

/// Uses three seconds of a processor in user mode, by the account that its kernel keeps of it, and prints what it came to.
const BURN: &str = "until [ \"${user%%.*}\" = 0m3 ]; do n=0; while [ $n -lt 2000 ]; do n=$((n + 1)); done; times >/tmp/times; \
    read user system </tmp/times; done; echo $user $system";

/// MiB of memory that are held.
const HELD: u64 = 40;

/// A pod with a container that does nothing by itself.
fn idle(cri: &Cri) -> Outcome<(Pod, String)> {
    let pod = cri.run(cri.pod_config("statistics")?)?;
    let mut config = container("main", &["sleep", "1000"]);
    config.labels.insert("of".into(), "the test".into());
    let id = cri.launch(&pod, config)?;
    Ok((pod, id))
}

/// Burns in a container; how many nanoseconds of a processor that was.
fn burn(cri: &Cri, id: &str) -> Outcome<u64> {
    let said = cri.shell(id, BURN)?;
    let mut sum = 0;
    for time in said.split_whitespace() {
        let (minutes, seconds) = time.trim_end_matches('s').split_once('m').ok_or_else(|| format!("times {said:?}"))?;
        sum += minutes.parse::<u64>()? * 60_000_000_000 + (seconds.parse::<f64>()? * 1e9) as u64;
    }
    ensure!(sum >= 3_000_000_000, "only {sum} ns of a processor were burnt");
    Ok(sum)
}

/// Writes into memory that stays, and looks that it is there.
fn hold(cri: &Cri, id: &str) -> Outcome {
    cri.shell(id, &format!("dd if=/dev/zero of=/dev/shm/held bs=1M count={HELD} 2>/dev/null"))?;
    let size = cri.shell(id, "stat -c %s /dev/shm/held")?;
    ensure_eq!(size.trim().parse::<u64>()?, HELD << 20, "bytes that are held");
    Ok(())
}

fn value(number: Option<api::UInt64Value>, what: &str) -> Outcome<u64> {
    Ok(number.ok_or_else(|| format!("no {what}"))?.value)
}

/// Nanoseconds of a processor, and bytes of memory.
fn used(cpu: Option<&api::CpuUsage>, memory: Option<&api::MemoryUsage>) -> Outcome<(u64, u64)> {
    let (cpu, memory) = (cpu.ok_or("no account of processors")?, memory.ok_or("no account of memory")?);
    Ok((
        value(cpu.usage_core_nano_seconds, "time of processors")?,
        value(memory.working_set_bytes, "memory that is worked with")?,
    ))
}

fn of_container(stats: &api::ContainerStats) -> Outcome<(u64, u64)> {
    used(stats.cpu.as_ref(), stats.memory.as_ref())
}

fn grown(before: u64, after: u64, what: &str) -> Outcome<u64> {
    Ok(after.checked_sub(before).ok_or_else(|| format!("{what} has shrunk from {before} to {after}"))?)
}

fn of_a_container(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let (pod, id) = idle(&cri)?;
    let stats = || {
        let request = api::ContainerStatsRequest { container_id: id.clone() };
        let answer = cri.call(async |mut client| client.container_stats(request).await)?;
        of_container(&answer.stats.ok_or("no statistics")?)
    };
    let before = stats()?;
    let burnt = burn(&cri, &id)?;
    let busy = stats()?;
    let cpu = grown(before.0, busy.0, "time of processors")?;
    ensure!(cpu * 20 > burnt * 19 && cpu * 20 < burnt * 21, "{cpu} ns of a processor are told of {burnt}");
    hold(&cri, &id)?;
    let memory = grown(busy.1, stats()?.1, "memory")?;
    let held = HELD << 20;
    ensure!(memory * 20 > held * 19 && memory * 20 < held * 21, "{memory} bytes of memory are told of {held}");

    // Of all at once, kubelet asks for those of a pod, or by labels; none of them are of another.
    let (other, _) = {
        let pod = cri.run(cri.pod_config("other")?)?;
        let id = cri.launch(&pod, container("main", &["sleep", "1000"]))?;
        (pod, id)
    };
    let labels = [("of".to_owned(), "the test".to_owned())].into();
    for (filter, count) in [
        (api::ContainerStatsFilter::default(), 2),
        (api::ContainerStatsFilter { id: id.clone(), ..Default::default() }, 1),
        (api::ContainerStatsFilter { pod_sandbox_id: pod.id.clone(), ..Default::default() }, 1),
        (api::ContainerStatsFilter { label_selector: labels, ..Default::default() }, 1),
    ] {
        let request = api::ListContainerStatsRequest { filter: Some(filter.clone()) };
        let listed = cri.call(async |mut client| client.list_container_stats(request).await)?.stats;
        ensure_eq!(listed.len(), count, "containers with {filter:?}");
        let of = |stats: &&api::ContainerStats| stats.attributes.as_ref().is_some_and(|of| of.id == id);
        let mine = listed.iter().find(of).ok_or_else(|| format!("not listed with {filter:?}"))?;
        let name = mine.attributes.as_ref().and_then(|of| of.metadata.as_ref()).map(|metadata| &*metadata.name);
        ensure_eq!(name, Some("main"), "its name");
        let (cpu, memory) = of_container(mine)?;
        ensure!(cpu >= busy.0 && memory >= busy.1 + held * 19 / 20, "{cpu} ns and {memory} bytes with {filter:?}");
    }
    cri.remove_pod(&other)?;
    cri.remove_pod(&pod)?;
    cri.end()
}

/// Bytes of memory that a group works with: what it has, without what is of files and was not used lately.
fn group_memory(group: &Path) -> Outcome<u64> {
    let stat = fs::read_to_string(group.join("memory.stat"))?;
    let inactive = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok());
    let current: u64 = fs::read_to_string(group.join("memory.current"))?.trim().parse()?;
    Ok(current.saturating_sub(inactive.ok_or("no files")?))
}

/// What the group of kubelet's for a pod has used.
fn group_used(group: &Path) -> Outcome<u64> {
    let stat = fs::read_to_string(group.join("cpu.stat"))?;
    let used = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse::<u64>().ok());
    Ok(used.ok_or("no usage")? * 1000)
}

/// It is what the pod's group on the node has used, whose processes the machine, the shadows and the kernel's work for them are; and in
/// it there is a group for each container, where cAdvisor looks for one.
fn of_a_pod(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let (pod, id) = idle(&cri)?;
    let group = PathBuf::from("/sys/fs/cgroup/kubepods/pod-statistics");
    let stats = || {
        let request = api::PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
        let answer = cri.call(async |mut client| client.pod_sandbox_stats(request).await)?;
        answer.stats.and_then(|stats| stats.linux).ok_or_else(|| crate::Failure::from("no statistics"))
    };
    let of = |stats: &api::LinuxPodSandboxStats| used(stats.cpu.as_ref(), stats.memory.as_ref());
    let before = of(&stats()?)?;
    let began = Instant::now();
    let burnt = burn(&cri, &id)?;
    hold(&cri, &id)?;
    let look = || Outcome::Ok((group_used(&group)?, group_memory(&group)?));
    let ((least, memory_before), told, (most, memory_after)) = (look()?, stats()?, look()?);
    let after = of(&told)?;
    ensure!(after.0 >= least && after.0 <= most, "{} ns of a processor are told of {least} to {most}", after.0);
    let cpu = grown(before.0, after.0, "time of processors")?;
    let processors = u64::try_from(std::thread::available_parallelism()?.get())?;
    let time = u64::try_from(began.elapsed().as_nanos())? * processors;
    ensure!(
        cpu * 20 > burnt * 19 && cpu * 20 < time * 21,
        "{cpu} ns of a processor for {burnt}, of {time} that there were"
    );
    // It shrinks, too; and a processor may have a few pages for later that nobody has yet.
    let room = 1 << 20;
    let (least, most) = (memory_before.min(memory_after) - room, memory_before.max(memory_after) + room);
    ensure!(after.1 >= least && after.1 <= most, "{} bytes of memory are told of {least} to {most}", after.1);
    let memory = grown(before.1, after.1, "memory")?;
    let held = HELD << 20;
    // Beside it tables of pages, and what the guest's kernel and programs came to have meanwhile.
    ensure!(memory * 20 > held * 19 && memory < 2 * held, "{memory} bytes of memory are told of {held}");

    let [container] = &told.containers[..] else { return Err(format!("{} containers", told.containers.len()).into()) };
    ensure!(container.attributes.as_ref().is_some_and(|of| of.id == id), "another container: {container:?}");
    ensure!(of_container(container)?.0 >= burnt, "the container has used {container:?}");
    let filter = api::PodSandboxStatsFilter { id: pod.id.clone(), ..Default::default() };
    let request = api::ListPodSandboxStatsRequest { filter: Some(filter) };
    let listed = cri.call(async |mut client| client.list_pod_sandbox_stats(request).await)?.stats;
    let [listed] = &listed[..] else { return Err(format!("{} pods", listed.len()).into()) };
    ensure!(listed.attributes.as_ref().is_some_and(|of| of.id == pod.id), "another pod: {listed:?}");
    ensure!(of(listed.linux.as_ref().ok_or("no statistics in the list")?)?.0 >= after.0, "less is listed: {listed:?}");

    // cAdvisor finds the id anywhere in the group's name, and asks containerd for that; kubelet takes what it finds there for the
    // container's only where the id is all of the name.
    let own = group.join(if scene.runtime.is_virtual() { format!("podhull_{id}") } else { id.clone() });
    let processes =
        fs::read_to_string(own.join("cgroup.procs")).map_err(|error| format!("{}: {error}", own.display()))?;
    let process = cri.process(&id)?.to_string();
    ensure!(processes.lines().any(|pid| pid == process), "process {process} of the container among {processes:?}");
    ensure!(group_used(&own)? > 0, "the container's group has used nothing");
    cri.remove_pod(&pod)?;
    cri.end()
}
