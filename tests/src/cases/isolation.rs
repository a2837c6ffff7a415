//! What the host sees of a container, and the container of the host.

use std::collections::HashMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitOptions, waitpid};
use serde_json::json;

use super::crashes::machine;
use super::{oci, podhull};
use crate::container::Container;
use crate::leaks::Leaks;
use crate::processes;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    podhull("isolation::the_kernel_is_the_guest_s", the_kernel_is_the_guest_s),
    podhull("isolation::the_host_sees_only_podhull", the_host_sees_only_podhull),
    oci("isolation::files_are_behind_the_pid", files_are_behind_the_pid),
    podhull("isolation::the_machine_is_confined", the_machine_is_confined),
    podhull("isolation::what_stands_for_a_container_is_confined", what_stands_for_a_container_is_confined),
    podhull("isolation::it_is_confined_before_the_guest_is_heard", it_is_confined_before_the_guest_is_heard),
];

fn the_kernel_is_the_guest_s(scene: &Scene) -> Outcome {
    let inside = scene.run(&scene.debian()?.args(&["uname", "-r"]))?.output()?;
    let host = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(inside.trim() != host.trim(), "the container runs on the host's kernel {}", host.trim());
    ensure!(inside.starts_with("6.12"), "guest kernel {inside:?}");
    Ok(())
}

/// All processes that come with a container are podhull's, and all mounts of it are under podhull's directory.
fn the_host_sees_only_podhull(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let network = fs::read_to_string("/proc/net/dev")?.lines().count();
    let volume = scene.make_directory("volume")?;
    let bundle = scene.debian()?.bind(&volume, "/mnt", &["rbind"]).sh("sleep 4242 & echo ready; read line");
    let mut run = scene.start(&bundle)?;
    run.expect_line("ready")?;
    let program = fs::canonicalize(scene.runtime.program())?;
    let mut ours = processes::descendants(run.pid());
    ours.extend(processes::all().into_iter().filter(|process| process.pid == run.pid()));
    ensure!(ours.len() >= 2, "the machine is not a process of its own: {ours:?}");
    for process in &ours {
        ensure_eq!(process.program.as_deref(), Some(program.as_path()), "program of {process:?}");
    }
    let stranger = processes::all().into_iter().find(|process| process.command.contains("sleep 4242"));
    ensure!(stranger.is_none(), "a process of the container is on the host: {stranger:?}");
    for thing in before.since() {
        if let Some(mount) = thing.strip_prefix("mount ") {
            // Other namespaces hold copies of the host's own mounts; what counts is whose root file system or volume it is.
            let host = fs::read_to_string("/proc/self/mountinfo")?;
            if host.lines().any(|line| line.starts_with(mount)) {
                let point = mount.split(' ').nth(4).unwrap_or_default();
                ensure!(point.starts_with("/run/podhull"), "mount of the container in the host's namespace: {mount}");
            }
        }
    }
    ensure_eq!(fs::read_to_string("/proc/net/dev")?.lines().count(), network, "network devices of the host");
    run.send(b"end\n")?;
    run.wait()?.expect_status(0)?;
    Ok(())
}

/// Where callers look for a container's files, those too that are mounted in a directory that is its owner's alone.
fn files_are_behind_the_pid(scene: &Scene) -> Outcome {
    let (outer, inner) = (scene.make_directory("outer")?, scene.make_directory("inner")?);
    fs::create_dir(outer.join("below"))?;
    chown(&outer, Some(1000), Some(1000))?;
    fs::set_permissions(&outer, Permissions::from_mode(0o700))?;
    fs::write(inner.join("word"), "of the host\n")?;
    let bundle = scene.debian()?.bind(&outer, "/mnt", &["rbind"]).bind(&inner, "/mnt/below", &["rbind"]);
    let container = Container::make(scene, &bundle.sh("echo ready; sleep 1000"), &["run", "-d"])?;
    container.expect_output("ready")?;
    let root = format!("/proc/{}/root", container.pid.as_raw_nonzero());
    ensure_eq!(fs::read_to_string(Path::new(&root).join("mnt/below/word"))?, "of the host\n", "file behind the pid");
    container.call(&["kill", &container.id, "KILL"])?.output()?;
    ensure_eq!(container.wait()?, 137, "exit status");
    container.delete()
}

/// The shadow of a container, and that of a program executed in it.
fn what_stands_for_a_container_is_confined(scene: &Scene) -> Outcome {
    let container = Container::make(scene, &scene.debian()?.sh("echo ready; sleep 1000"), &["run", "-d"])?;
    container.expect_output("ready")?;
    let file = scene.directory.join("executed");
    // It keeps the outputs open.
    let mut exec = Command::new(scene.runtime.program());
    exec.args(["exec", "-d", "--pid-file"]).arg(&file).args([&container.id, "sleep", "1000"]);
    let ended = exec.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    ensure!(ended.success(), "exec: {ended}");
    let executed = fs::read_to_string(file)?;
    let none = format!("{:016x}", 0);
    for process in [&container.pid.as_raw_nonzero().to_string(), executed.trim()] {
        let process = format!("/proc/{process}");
        for (id, name) in &threads(&process)? {
            let status = status(&format!("{process}/task/{id}/status"))?;
            for (field, value) in [("Seccomp", "2"), ("NoNewPrivs", "1"), ("CapEff", &none), ("CapPrm", &none)] {
                ensure_eq!(status.get(field).map(String::as_str), Some(value), "{field} of thread {name} of {process}");
            }
        }
    }
    container.call(&["kill", &container.id, "KILL"])?.output()?;
    // The container's own is the first process of a namespace, which ends when all others in it have been reaped.
    let executed = executed.trim().parse().ok().and_then(Pid::from_raw);
    waitpid(executed, WaitOptions::empty())?;
    ensure_eq!(container.wait()?, 137, "exit status");
    container.delete()
}

/// What a shadow keeps until it has attached what belongs into the container's root, and has in effect only then:
/// DAC_READ_SEARCH, SYS_ADMIN.
const MOUNTING: u64 = 1 << 2 | 1 << 21;

/// Neither the machine nor the container in it is there when hooks are run.
fn it_is_confined_before_the_guest_is_heard(scene: &Scene) -> Outcome {
    let seen = scene.directory.join("seen");
    let look =
        format!(r#"pid=$(grep -o '"pid":[0-9]*' | cut -d : -f 2); cat /proc/$pid/task/*/status > {}"#, seen.display());
    let hook = json!([{ "path": "/bin/sh", "args": ["sh", "-c", look] }]);
    let bundle = scene.debian()?.set("/hooks", json!({ "createRuntime": hook }));
    scene.run(&bundle.args(&["true"]))?.output()?;
    let seen = fs::read_to_string(seen)?;
    let fields: Vec<_> = seen.lines().filter_map(|line| line.split_once(":\t")).collect();
    let of =
        |name: &str| fields.iter().filter(|(field, _)| *field == name).map(|(_, value)| *value).collect::<Vec<_>>();
    ensure!(!of("Pid").is_empty(), "the hook has seen no thread: {seen}");
    let (none, kept) = (format!("{:016x}", 0), format!("{MOUNTING:016x}"));
    for (field, value) in
        [("Seccomp", "2"), ("NoNewPrivs", "1"), ("CapEff", &none), ("CapPrm", &kept), ("CapInh", &none)]
    {
        ensure!(of(field).iter().all(|found| *found == value), "{field} is not {value} of all threads: {seen}");
    }
    Ok(())
}

/// Capabilities of the threads that serve files: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP.
const FILE_SERVER: u64 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 27 | 1 << 31;

/// Longest until a machine that runs a container has all of its devices.
const GROWN: Duration = Duration::from_secs(20);

/// The fields of a `status` file of /proc.
fn status(path: &str) -> Outcome<HashMap<String, String>> {
    let text = fs::read_to_string(path)?;
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    Ok(fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect())
}

/// Threads of a process by id, with their names.
fn threads(process: &str) -> Outcome<Vec<(String, String)>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("{process}/task"))? {
        let id = entry?.file_name().to_string_lossy().into_owned();
        let name = fs::read_to_string(format!("{process}/task/{id}/comm"))?.trim().to_owned();
        threads.push((id, name));
    }
    Ok(threads)
}

/// Each thread of a machine that runs a container, those that came after the start too.
fn the_machine_is_confined(scene: &Scene) -> Outcome {
    let volume = scene.make_directory("volume")?;
    let cpus = json!({ "quota": 200_000, "period": 100_000 });
    let bundle = scene.debian()?.set("/linux/resources/cpu", cpus).bind(&volume, "/mnt", &["rbind"]);
    let mut run = scene.start(&bundle.sh("echo ready; read line"))?;
    run.expect_line("ready")?;
    let process = format!("/proc/{}", machine(&run)?.as_raw_nonzero());

    let began = Instant::now();
    // A pod has no more CPUs than the host.
    let several = thread::available_parallelism()?.get() > 1;
    let late = ["rng", "balloon", if several { "vcpu1" } else { "vcpu0" }];
    let threads = loop {
        let threads = threads(&process)?;
        if late.iter().all(|late| threads.iter().any(|(_, name)| name == late)) {
            break threads;
        }
        ensure!(began.elapsed() < GROWN, "no threads {late:?} among {threads:?}");
        thread::sleep(Duration::from_millis(20));
    };
    // They confine themselves, which takes a moment.
    thread::sleep(Duration::from_millis(200));
    for (id, name) in &threads {
        let status = status(&format!("{process}/task/{id}/status"))?;
        let serves_files = name.strip_prefix("fs").is_some_and(|number| number.parse::<u32>().is_ok());
        let capabilities = format!("{:016x}", if serves_files { FILE_SERVER } else { 0 });
        let none = format!("{:016x}", 0);
        let expected = [
            ("Seccomp", "2"),
            ("NoNewPrivs", "1"),
            ("CapEff", &capabilities),
            ("CapPrm", &capabilities),
            ("CapInh", &none),
            ("CapBnd", &none),
            ("CapAmb", &none),
        ];
        for (field, value) in expected {
            ensure_eq!(status.get(field).map(String::as_str), Some(value), "{field} of thread {name}");
        }
    }
    ensure!(threads.iter().any(|(_, name)| name == "fs0"), "no thread serves files: {threads:?}");

    for namespace in ["mnt", "pid", "net", "ipc", "uts"] {
        let of = |process: &str| fs::read_link(format!("{process}/ns/{namespace}"));
        ensure!(of(&process)? != of("/proc/self")?, "the machine is in the host's {namespace} namespace");
    }
    let status = status(&format!("{process}/status"))?;
    let pids = status.get("NSpid").cloned().unwrap_or_default();
    ensure_eq!(pids.split_whitespace().nth(1), Some("1"), "pid of the machine in its own namespace, of {pids:?}");
    let interfaces = fs::read_to_string(format!("{process}/net/dev"))?;
    ensure_eq!(interfaces.lines().count(), 3, "a header of two lines, and loopback, are all of {interfaces:?}");

    // Its root holds the share of its one container, and what that binds; nothing else is mounted in it.
    let entries = fs::read_dir(format!("{process}/root"))?.flatten();
    let mut entries: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    entries.sort();
    let [bound, id] = &entries[..] else { return Err(format!("root of the machine: {entries:?}").into()) };
    ensure!(bound.starts_with('@'), "root of the machine: {entries:?}");
    let (bound, id) = (format!("/{bound}"), format!("/{id}/"));
    let mounts = fs::read_to_string(format!("{process}/mountinfo"))?;
    for mount in mounts.lines() {
        let point = mount.split(' ').nth(4).unwrap_or_default();
        ensure!(point == "/" || point == bound || point.starts_with(&id), "mount of the machine: {mount}");
    }
    let limits = fs::read_to_string(format!("{process}/limits"))?;
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap_or_default();
    ensure_eq!(core.split_whitespace().nth(4), Some("0"), "limit of core files in {core:?}");
    run.send(b"end\n")?;
    run.wait()?.expect_status(0)?;
    Ok(())
}
