//! What pods and their containers may use, as kubelet says, and what follows when it is not enough.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use k8s_cri::v1 as api;
use rustix::process::{Pid, Signal};
use serde_json::Value;

use super::cgroups::{group_of, machines_beside};
use super::systemd::property;
use super::{oci, podhull};
use crate::cri::{Cri, PATIENT, Pod, container, resources};
use crate::run::{DEADLINE, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("cri_limits::killed_for_lack_of_memory", killed_for_lack_of_memory),
    oci("cri_limits::of_shared_memory", of_shared_memory),
    podhull("cri_limits::a_machine_changes_with_its_containers", a_machine_changes_with_its_containers),
    podhull("cri_limits::a_machine_begins_as_its_pod_says", a_machine_begins_as_its_pod_says),
    // With the others that need systemd.
    oci("systemd::pods_are_in_kubelet_s_slices", pods_are_in_kubelet_s_slices),
];

/// kubelet shows the reason, and whoever listens to containerd is told of the container.
fn killed_for_lack_of_memory(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let mut events = cri.client(&["events"])?;
    let pod = cri.run(cri.pod_config("starved")?)?;
    let mut config = container("main", &["tail", "/dev/zero"]);
    resources(&mut config).memory_limit_in_bytes = 32 << 20;
    let id = cri.launch(&pod, config)?;
    ensure_eq!(cri.ended(&id)?.exit_code, 137, "exit status");
    // The two are told one after the other.
    let until = Instant::now() + DEADLINE;
    while cri.status(&id)?.reason != "OOMKilled" {
        ensure!(Instant::now() < until, "the reason is {:?}", cri.status(&id)?);
        thread::sleep(Duration::from_millis(100));
    }
    loop {
        let line = events.line().map_err(|error| format!("no /tasks/oom: {error}"))?;
        // Whoever is told of the end looks for its reason then. runc's shim hears of the two in different ways.
        if scene.runtime.is_virtual()
            && let Some((_, event)) = line.split_once(" /tasks/exit ")
        {
            let event: Value = serde_json::from_str(event)?;
            ensure!(event["container_id"] != id || event["id"] != id, "the end is told before its reason: {line}");
        }
        let Some((_, event)) = line.split_once(" /tasks/oom ") else { continue };
        ensure_eq!(serde_json::from_str::<Value>(event)?["container_id"], id, "container of {line}");
        break;
    }
    events.signal(Signal::KILL)?;
    events.wait()?;
    cri.remove_pod(&pod)?;
    cri.end()
}

/// `/dev/shm` has 64 MiB for all containers of a pod, and no more.
fn of_shared_memory(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("shared")?)?;
    let one = cri.launch(&pod, container("one", PATIENT))?;
    let two = cri.launch(&pod, container("two", PATIENT))?;
    let size = "df -k /dev/shm | awk 'NR == 2 { print $2 }'";
    for id in [&one, &two] {
        ensure_eq!(cri.shell(id, size)?, "65536\n", "KiB of /dev/shm");
    }
    cri.shell(&one, "dd if=/dev/zero of=/dev/shm/one bs=1M count=40 2>/dev/null")?;
    let full = cri.exec(&two, &["dd", "if=/dev/zero", "of=/dev/shm/two", "bs=1M", "count=40"], 0)?;
    ensure!(full.status != 0 && full.stderr.contains("No space left"), "writing too much: {full:?}");
    ensure_eq!(cri.shell(&one, "stat -c %s /dev/shm/two")?, format!("{}\n", 24 << 20), "bytes of what had room");
    cri.remove_pod(&pod)?;
    cri.end()
}

/// MiB of memory and processors of a container's machine.
fn machine(cri: &Cri, id: &str) -> Outcome<(u64, u64)> {
    let text = cri.shell(id, "read name kib rest </proc/meminfo; echo $((kib / 1024)) $(nproc)")?;
    let (memory, cpus) = text.trim().split_once(' ').ok_or_else(|| format!("no two words but {text:?}"))?;
    Ok((memory.parse()?, cpus.parse()?))
}

fn limits(mebibytes: i64, cpus: i64) -> api::LinuxContainerResources {
    api::LinuxContainerResources {
        memory_limit_in_bytes: mebibytes << 20,
        cpu_period: 100_000,
        cpu_quota: 100_000 * cpus,
        ..Default::default()
    }
}

fn update(cri: &Cri, id: &str, linux: api::LinuxContainerResources) -> Outcome {
    let request =
        api::UpdateContainerResourcesRequest { container_id: id.to_owned(), linux: Some(linux), ..Default::default() };
    cri.call(async |mut client| client.update_container_resources(request).await).map(drop)
}

/// A pod of which is said in advance what its containers will ask for, and one of them.
fn sized(cri: &Cri, name: &str, all: api::LinuxContainerResources) -> Outcome<(Pod, String)> {
    let mut config = cri.pod_config(name)?;
    config.linux.get_or_insert_default().resources = Some(all);
    let pod = cri.run(config)?;
    let mut config = container("main", PATIENT);
    *resources(&mut config) = limits(128, 1);
    let id = cri.launch(&pod, config)?;
    Ok((pod, id))
}

/// Not only the limit in the machine: the machine has what the container may use, and gives back what it may not.
fn a_machine_changes_with_its_containers(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let processors = u64::try_from(thread::available_parallelism()?.get())?;
    let (pod, id) = sized(&cri, "changes", limits(128, 1))?;
    let (first, cpus) = machine(&cri, &id)?;
    ensure!((128..128 + 200).contains(&first), "{first} MiB of memory for a limit of 128");
    ensure_eq!(cpus, 1, "processors");
    for _ in 0..2 {
        update(&cri, &id, limits(600, 3))?;
        let (grown, cpus) = machine(&cri, &id)?;
        ensure!((600..600 + 200).contains(&grown), "{grown} MiB of memory for a limit of 600");
        ensure_eq!(cpus, processors.min(3), "processors for a quota of three");
        // The guest gives it back at its own pace.
        update(&cri, &id, limits(128, 1))?;
        let until = Instant::now() + DEADLINE;
        loop {
            let (shrunk, _) = machine(&cri, &id)?;
            if shrunk <= first + 50 {
                break;
            }
            ensure!(Instant::now() < until, "{shrunk} MiB of memory, {first} before");
            thread::sleep(Duration::from_millis(200));
        }
    }
    cri.remove_pod(&pod)?;
    cri.end()
}

/// By what kubelet says of its containers, or by annotations.
fn a_machine_begins_as_its_pod_says(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let (pod, id) = sized(&cri, "told", limits(500, 1))?;
    let (memory, cpus) = machine(&cri, &id)?;
    ensure!((500..500 + 200).contains(&memory), "{memory} MiB of memory for 500");
    ensure_eq!(cpus, 1, "processors");
    cri.remove_pod(&pod)?;
    for (number, key) in
        ["io.podhull.machine.memory", "io.katacontainers.config.hypervisor.default_memory"].into_iter().enumerate()
    {
        let mut config = cri.pod_config(&format!("annotated{number}"))?;
        config.annotations.insert(key.to_owned(), "400".to_owned());
        let pod = cri.run(config)?;
        let id = cri.launch(&pod, container("main", PATIENT))?;
        // Its kernel keeps some of it for itself.
        let (memory, _) = machine(&cri, &id)?;
        ensure!((300..=400).contains(&memory), "{memory} MiB of memory with {key} of 400");
        cri.remove_pod(&pod)?;
    }
    cri.end()
}

/// With systemd as kubelet's driver of control groups, containerd names a slice, and each container is a scope in it.
fn pods_are_in_kubelet_s_slices(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let mut config = cri.pod_config("sliced")?;
    fs::remove_dir("/sys/fs/cgroup/kubepods/pod-sliced")?;
    "/kubepods.slice/kubepods-podsliced.slice".clone_into(&mut config.linux.get_or_insert_default().cgroup_parent);
    let pod = cri.run(config)?;
    let mut config = container("main", PATIENT);
    *resources(&mut config) = limits(128, 1);
    let id = cri.launch(&pod, config)?;
    // Whose name says to kubelet that what its processes use is not what the container uses.
    let apart = if scene.runtime.is_virtual() { "podhull_" } else { "" };
    let unit = format!("cri-containerd-{apart}{id}.scope");
    let slice = group_of(Pid::from_raw(cri.process(&id)?).ok_or("no process")?)?;
    ensure!(slice.ends_with(format!("kubepods.slice/kubepods-podsliced.slice/{unit}")), "group {}", slice.display());
    ensure_eq!(property(&unit, "ActiveState")?, "active", "state of the scope");
    ensure_eq!(property(&unit, "MemoryMax")?, (128 << 20).to_string(), "memory of the scope");
    if scene.runtime.is_virtual() {
        let machines = machines_beside(&slice)?;
        ensure!(machines.len() == 1, "machines beside it: {machines:?}");
    }
    update(&cri, &id, limits(96, 1))?;
    ensure_eq!(property(&unit, "MemoryMax")?, (96 << 20).to_string(), "memory of the scope afterwards");
    ensure_eq!(cri.shell(&id, "cat /sys/fs/cgroup/memory.max")?, format!("{}\n", 96 << 20), "limit inside");
    cri.stop(&id, 30)?;
    ensure_eq!(cri.status(&id)?.exit_code, 3, "exit status");
    cri.take_down(&pod)?;
    ensure_eq!(property(&unit, "LoadState")?, "not-found", "state of the scope when its pod is gone");
    for slice in ["kubepods-podsliced.slice", "kubepods.slice"] {
        Running::start(&["systemctl", "stop", slice].map(Into::into), &[])?.wait()?.output()?;
    }
    cri.end()
}
