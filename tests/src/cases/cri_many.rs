//! Many pods: at once, and one after the other; and nothing grows with them.

use std::collections::HashMap;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use k8s_cri::v1 as api;

use super::cri::PATIENT;
use super::{long, oci};
use crate::cri::{Cri, container};
use crate::leaks::Totals;
use crate::run::DEADLINE;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq, processes};

pub const CASES: &[Case] = &[
    oci("cri_many::at_once", at_once),
    oci("cri_many::one_after_the_other", one_after_the_other),
    long(oci("cri_many::three_hundred", |scene| sequence(scene, 300))),
    oci("cri_many::executed_in_one", executed_in_one),
];

/// What is there of containerd and its shims: open files and KiB of resident memory, by process.
fn held() -> HashMap<i32, (usize, u64)> {
    let ours = processes::all()
        .into_iter()
        .filter(|process| process.command.contains("containerd") && !matches!(process.state, 'Z' | 'X'));
    ours.map(|process| (process.pid, held_of(process.pid))).collect()
}

/// Open files and KiB of resident memory of a process.
fn held_of(pid: i32) -> (usize, u64) {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let memory = memory.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or_default();
    (files, memory)
}

/// One with a container in it, from its beginning to its end.
fn one(cri: &Cri, name: &str) -> Outcome {
    let pod = cri.run(cri.pod_config(name)?)?;
    let id = cri.launch(&pod, container("main", PATIENT))?;
    ensure_eq!(cri.shell(&id, "echo here")?, "here\n", "what is executed in {name}");
    cri.remove_pod(&pod)
}

/// As many as an emulated host has room for, or the thirty that are asked for: all are there at the same time.
fn at_once(scene: &Scene) -> Outcome {
    let started = Cri::start(scene)?;
    let cri = &started;
    let count = if scene.is_soak() { 30 } else { 5 };
    for round in 0..if scene.is_soak() { 3 } else { 1 } {
        let configs = (0..count).map(|index| cri.pod_config(&format!("r{round}-{index}"))).collect::<Outcome<_>>()?;
        let pods = cri.run_all(configs)?;
        let ids = cri.launch_all(&pods, &container("main", PATIENT))?;
        for (pod, id) in pods.iter().zip(&ids) {
            ensure_eq!(cri.shell(id, "hostname")?, format!("{}\n", pod.config.hostname), "what is executed in a pod");
        }
        for (pod, id) in pods.iter().zip(&ids) {
            let states = (cri.pod_status(pod)?.state(), cri.status(id)?.state());
            let expected = (api::PodSandboxState::SandboxReady, api::ContainerState::ContainerRunning);
            ensure_eq!(states, expected, "states of {} and its container", pod.config.hostname);
        }
        let ended: Vec<Outcome> = thread::scope(|scope| {
            let threads: Vec<_> = pods.iter().map(|pod| scope.spawn(|| cri.remove_pod(pod))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err("it panicked".into()))).collect()
        });
        ended.into_iter().collect::<Outcome<Vec<()>>>()?;
        let pods = cri.call(async |mut client| client.list_pod_sandbox(api::ListPodSandboxRequest::default()).await)?;
        ensure_eq!(pods.items.len(), 0, "pods that are left");
    }
    started.end()
}

fn one_after_the_other(scene: &Scene) -> Outcome {
    // As many that there is room for what is kept for a moment.
    sequence(scene, scene.repeat.clamp(6, 10))
}

/// The first ones make what is made once.
fn sequence(scene: &Scene, count: usize) -> Outcome {
    let cri = Cri::start(scene)?;
    for number in 0..3 {
        one(&cri, &format!("first{number}"))?;
    }
    let (totals, before) = (Totals::now()?, held());
    for number in 0..count {
        one(&cri, &format!("n{number}")).map_err(|error| format!("pod {number}: {error}"))?;
    }
    let later = Totals::now()?;
    // Less than one for each pod; what was closed may be so a moment later.
    let (most, until) = (count / 2, Instant::now() + DEADLINE);
    let mut after = held();
    while after.iter().any(|(pid, (files, _))| before.get(pid).is_none_or(|(there, _)| *files > there + most))
        && Instant::now() < until
    {
        thread::sleep(Duration::from_millis(200));
        after = held();
    }
    for (pid, (files, memory)) in &after {
        let Some((files_before, memory_before)) = before.get(pid) else {
            return Err(format!("process {pid} was not there before").into());
        };
        ensure!(*files <= files_before + most, "{files} open files of containerd's, {files_before} before");
        // It is a program with a garbage collector.
        ensure!(*memory <= memory_before + (32 << 10), "{memory} KiB of containerd's, {memory_before} before");
    }
    ensure!(later.files <= totals.files + 200, "{} open files, {} before", later.files, totals.files);
    let lost = totals.available_kib - later.available_kib;
    ensure!(lost <= (96 << 10), "{lost} KiB of memory are gone");
    cri.end()
}

/// What a pod's processes on the host hold.
fn held_by(pod: &crate::cri::Pod, ids: &[String]) -> HashMap<i32, (String, usize, u64)> {
    let group = pod.config.linux.as_ref().map(|linux| linux.cgroup_parent.clone()).unwrap_or_default();
    let mut all = HashMap::new();
    for process in processes::all() {
        let of = fs::read_to_string(format!("/proc/{}/cgroup", process.pid)).unwrap_or_default();
        let named = [&pod.id].into_iter().chain(ids).any(|id| process.command.contains(id));
        if matches!(process.state, 'Z' | 'X') || !(of.contains(&group) || process.is_shim() && named) {
            continue;
        }
        let (files, memory) = held_of(process.pid);
        all.insert(process.pid, (process.command, files, memory));
    }
    all
}

/// Programs executed in a container, as probes are, leave nothing with its shim, its shadow and its machine.
fn executed_in_one(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("probed")?)?;
    let id = cri.launch(&pod, container("main", &["sleep", "100000"]))?;
    let ids = std::slice::from_ref(&id);
    let probe = |number: usize| -> Outcome {
        ensure_eq!(cri.shell(&id, "echo here")?, "here\n", "what is executed");
        if number.is_multiple_of(10) {
            let late = cri.exec(&id, &["sleep", "4321"], 1);
            ensure!(late.is_err(), "what took too long: {late:?}");
        }
        Ok(())
    };
    for number in 0..10 {
        probe(number)?;
    }
    let before = held_by(&pod, ids);
    ensure!(before.len() >= 2, "processes of the pod: {before:?}");
    let count = if scene.is_soak() { 3000 } else { 20 };
    for number in 0..count {
        probe(number)?;
    }
    // What ends does so a moment later.
    let until = Instant::now() + DEADLINE;
    let grown = |after: &HashMap<i32, (String, usize, u64)>| {
        after.iter().find_map(|(pid, (command, files, memory))| {
            let Some((_, files_before, memory_before)) = before.get(pid) else {
                return Some(format!("{command} was not there before"));
            };
            // A machine has the guest's memory in it, which caches fill; a program in Go its garbage.
            let room = if command.starts_with("podhull vmm") { 64 << 10 } else { (8 << 10) + count as u64 };
            let most = files_before + count / 4;
            let fits = *files <= most && *memory <= memory_before + room;
            (!fits).then(|| {
                format!("{command}: {files} files and {memory} KiB, {files_before} and {memory_before} before")
            })
        })
    };
    while let Some(what) = grown(&held_by(&pod, ids)) {
        ensure!(Instant::now() < until, "after {count} programs: {what}");
        thread::sleep(Duration::from_millis(200));
    }
    cri.remove_pod(&pod)?;
    cri.end()
}
