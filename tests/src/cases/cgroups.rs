//! Control groups on the host: where callers look for a container's shadow and its limits.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, waitpid};
use serde_json::{Value, json};

use super::{oci, podhull};
use crate::container::Container;
use crate::leaks::Leaks;
use crate::run::{DEADLINE, Running};
use crate::runtime::Runtime;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("cgroups::a_container_is_at_its_path", a_container_is_at_its_path),
    oci("cgroups::without_a_path_it_is_beside_its_creator", without_a_path_it_is_beside_its_creator),
    oci("cgroups::an_executed_program_is_with_its_container", an_executed_program_is_with_its_container),
    oci("cgroups::an_update_is_in_its_group", an_update_is_in_its_group),
    oci("cgroups::who_is_killed_for_memory_is_counted", who_is_killed_for_memory_is_counted),
    podhull("cgroups::the_machine_is_beside_its_container", the_machine_is_beside_its_container),
    podhull("cgroups::limits_are_written_as_runc_writes_them", limits_are_written_as_runc_writes_them),
    podhull("cgroups::the_smallest_limits_stop_only_the_container", the_smallest_limits_stop_only_the_container),
    podhull("cgroups::another_s_group_is_left_alone", another_s_group_is_left_alone),
    podhull("cgroups::nothing_is_left_whatever_is_killed", nothing_is_left_whatever_is_killed),
    podhull("cgroups::a_killed_creation_is_swept", a_killed_creation_is_swept),
    podhull("cgroups::without_systemd_it_is_not_asked", without_systemd_it_is_not_asked),
];

/// Where the groups are.
pub(super) const ROOT: &str = "/sys/fs/cgroup";

/// The group a process is in, as a path of the host.
pub(super) fn group_of(pid: Pid) -> Outcome<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{}/cgroup", pid.as_raw_nonzero()))?;
    let path = text.trim().strip_prefix("0::/").ok_or_else(|| format!("groups {text:?}"))?;
    Ok(Path::new(ROOT).join(path))
}

/// The processes directly in a group.
pub(super) fn processes_in(group: &Path) -> Outcome<Vec<i32>> {
    let text = fs::read_to_string(group.join("cgroup.procs")).map_err(|e| format!("{}: {e}", group.display()))?;
    Ok(text.lines().filter_map(|pid| pid.parse().ok()).collect())
}

/// The groups of machines beside a container's.
pub(super) fn machines_beside(group: &Path) -> Outcome<Vec<PathBuf>> {
    let parent = group.parent().ok_or("no parent")?;
    let entries = fs::read_dir(parent)?.flatten().map(|entry| entry.path());
    Ok(entries.filter(|path| path.to_string_lossy().contains("/podhull_vm-")).collect())
}

/// Executes a program in a container, in the background, and returns the process that stands for it.
pub(super) fn execute(container: &Container<'_>, command: &[&str]) -> Outcome<Pid> {
    let pid_file = container.scene.directory.join(format!("{}.exec.pid", container.id));
    let mut exec = Command::new(container.runtime.program());
    exec.args(["exec", "-d", "--pid-file"]).arg(&pid_file).arg(&container.id).args(command);
    let status = exec.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    ensure!(status.success(), "exec {command:?}: {status}");
    Ok(fs::read_to_string(&pid_file)?.trim().parse().ok().and_then(Pid::from_raw).ok_or("no pid in the pid file")?)
}

/// Takes notice of the end of an executed process, as its caller would: a container's first process does not end before that of
/// all others was noticed.
pub(super) fn reap(executed: Pid) -> JoinHandle<Result<(), String>> {
    std::thread::spawn(move || {
        let wait = || {
            let pidfd = pidfd_open(executed, PidfdFlags::empty())?;
            match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&Timespec::try_from(DEADLINE)?))? {
                0 => Err("it does not end".into()),
                _ => Ok::<_, crate::Failure>(waitpid(Some(executed), WaitOptions::empty())?),
            }
        };
        wait().map(drop).map_err(|error| format!("executed process {executed:?}: {error}"))
    })
}

/// A file of a group.
pub(super) fn value(group: &Path, file: &str) -> Outcome<String> {
    Ok(fs::read_to_string(group.join(file))
        .map_err(|e| format!("{}: {e}", group.join(file).display()))?
        .trim()
        .to_owned())
}

/// A group of the test's own for containers to be in, removed at its end.
struct Parent(PathBuf);

impl Parent {
    fn new(scene: &Scene) -> Self {
        Self(Path::new(ROOT).join(format!("{}.test", scene.id())))
    }

    /// `cgroupsPath` of a container in it.
    fn path(&self, name: &str) -> Value {
        json!(format!("/{}/{name}", self.0.file_name().unwrap_or_default().display()))
    }

    fn group(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Nothing of the containers is left in it.
    fn check(self) -> Outcome {
        fs::remove_dir(&self.0).map_err(|error| {
            let left = fs::read_dir(&self.0).into_iter().flatten().flatten().map(|entry| entry.file_name());
            format!("{}: {error}; left in it: {:?}", self.0.display(), left.collect::<Vec<_>>())
        })?;
        Ok(())
    }
}

fn an_update_is_in_its_group(scene: &Scene) -> Outcome {
    let parent = Parent::new(scene);
    let resources = json!({ "memory": { "limit": 64 << 20 }, "pids": { "limit": 50 } });
    let bundle = scene.debian()?.set("/linux/cgroupsPath", parent.path("one")).set("/linux/resources", resources);
    let container = Container::make(scene, &bundle.sh("exec sleep 1000"), &["run", "-d"])?;
    let limits = || -> Outcome<Vec<String>> {
        let files = ["memory.max", "pids.max", "cpu.max"].map(|file| value(&parent.group("one"), file));
        files.into_iter().collect()
    };
    ensure_eq!(limits()?, ["67108864", "50", "max 100000"], "limits as it was made");
    let words = ["update", "--memory", "134217728", "--memory-swap", "134217728", "--pids-limit", "77"];
    let words = [&words[..], &["--cpu-quota", "30000", "--cpu-period", "60000", &container.id]].concat();
    container.call(&words)?.output()?;
    ensure_eq!(limits()?, ["134217728", "77", "30000 60000"], "limits after the update");
    container.end()?;
    parent.check()
}

/// Callers look there for why a container has ended.
fn who_is_killed_for_memory_is_counted(scene: &Scene) -> Outcome {
    let parent = Parent::new(scene);
    let before = Leaks::watch();
    let limits = json!({ "memory": { "limit": 64 << 20, "swap": 64 << 20 } });
    let bundle = scene.debian()?.set("/linux/cgroupsPath", parent.path("one")).set("/linux/resources", limits);
    for (script, status, killed) in
        [("exec tail /dev/zero", 137, true), ("exec sleep 1000", 137, false), ("exit 3", 3, false)]
    {
        let container = Container::create(scene, &bundle.clone().sh(script))?;
        container.start()?;
        if script.contains("sleep") {
            container.call(&["kill", &container.id, "KILL"])?.output()?;
        }
        ensure_eq!(container.wait()?, status, "exit status of {script:?}");
        let events = value(&parent.group("one"), "memory.events")?;
        let count = events.lines().find_map(|line| line.strip_prefix("oom_kill ")).ok_or("no count")?;
        ensure_eq!(count != "0", killed, "{script:?}: {events}");
        ensure_eq!(container.status()?, "stopped", "status after {script:?}");
        container.delete()?;
    }
    parent.check()?;
    before.check()
}

fn a_container_is_at_its_path(scene: &Scene) -> Outcome {
    let parent = Parent::new(scene);
    // With and without a cgroup namespace of its own: from the host the path is the same.
    for namespaces in
        [&["pid", "mount", "network", "ipc", "uts"][..], &["pid", "mount", "network", "ipc", "uts", "cgroup"]]
    {
        let bundle = scene.debian()?.set("/linux/cgroupsPath", parent.path("one")).namespaces(namespaces);
        let container = Container::create(scene, &bundle.sh("exec sleep 1000"))?;
        ensure_eq!(group_of(container.pid)?, parent.group("one"), "group of a created container");
        ensure!(
            processes_in(&parent.group("one"))?.contains(&container.pid.as_raw_nonzero().get()),
            "not in its group"
        );
        container.start()?;
        ensure_eq!(group_of(container.pid)?, parent.group("one"), "group of a running container");
        container.end()?;
        ensure!(!parent.group("one").exists(), "the group is still there");
    }
    parent.check()
}

fn without_a_path_it_is_beside_its_creator(scene: &Scene) -> Outcome {
    let own = group_of(rustix::process::getpid())?;
    let parent = if own == Path::new(ROOT) { own } else { own.parent().ok_or("no parent")?.to_owned() };
    let container = Container::create(scene, &scene.debian()?.sh("exec sleep 1000"))?;
    ensure_eq!(group_of(container.pid)?, parent.join(&container.id), "group");
    container.end()?;
    Ok(())
}

fn an_executed_program_is_with_its_container(scene: &Scene) -> Outcome {
    let parent = Parent::new(scene);
    let bundle = scene.debian()?.set("/linux/cgroupsPath", parent.path("one")).sh("exec sleep 1000");
    let container = Container::make(scene, &bundle, &["run", "-d"])?;
    let executed = execute(&container, &["sleep", "1000"])?;
    ensure_eq!(group_of(executed)?, parent.group("one"), "group of the executed program");
    let pid_file = scene.directory.join("foreground.pid");
    let words = ["exec", "--pid-file", &pid_file.to_string_lossy(), &container.id, "sleep", "1000"].map(OsString::from);
    let words: Vec<OsString> = std::iter::once(scene.runtime.program().into()).chain(words).collect();
    let foreground = Running::start(&words, &[])?;
    let until = Instant::now() + DEADLINE;
    let stands = loop {
        let pid = fs::read_to_string(&pid_file).ok().and_then(|text| text.trim().parse().ok()).and_then(Pid::from_raw);
        match pid {
            Some(pid) => break pid,
            None => ensure!(Instant::now() < until, "no pid of what is executed in the foreground"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    ensure_eq!(group_of(stands)?, parent.group("one"), "group of what is executed in the foreground");
    let mut expected = [container.pid, executed, stands].map(|pid| pid.as_raw_nonzero().get());
    expected.sort_unstable();
    let mut listed: Vec<i32> =
        serde_json::from_str(&container.call(&["ps", "--format", "json", &container.id])?.output()?)?;
    listed.sort_unstable();
    ensure_eq!(listed, expected, "what ps lists");
    kill_process(stands, Signal::TERM)?;
    foreground.wait()?.expect_status(143)?;
    let reaper = reap(executed);
    container.end()?;
    reaper.join().map_err(|_| "panic")??;
    parent.check()
}

fn the_machine_is_beside_its_container(scene: &Scene) -> Outcome {
    let parent = Parent::new(scene);
    let bundle = scene
        .debian()?
        .set("/linux/cgroupsPath", parent.path("one"))
        .set("/linux/resources/memory", json!({ "limit": 64 << 20 }))
        .set("/linux/resources/cpu", json!({ "quota": 20_000, "period": 100_000, "shares": 512, "cpus": "0" }))
        .set("/linux/resources/pids", json!({ "limit": 5 }));
    let container = Container::create(scene, &bundle.sh("exec sleep 1000"))?;
    let [machine] = &machines_beside(&parent.group("one"))?[..] else { return Err("not one machine".into()) };
    let [pid] = processes_in(machine)?[..] else { return Err("not one process of the machine".into()) };
    ensure!(machine.ends_with(format!("podhull_vm-{pid}")), "{} has process {pid}", machine.display());
    ensure!(
        fs::read_dir(format!("/proc/{pid}/fd"))?
            .flatten()
            .any(|fd| { fs::read_link(fd.path()).is_ok_and(|path| path.to_string_lossy().contains("kvm-vm")) }),
        "process {pid} has no virtual machine"
    );
    // Only what is about shares and parts of the host.
    let weight = value(&parent.group("one"), "cpu.weight")?;
    ensure!(weight != "100", "no weight of the container");
    for (file, expected) in [
        ("memory.max", "max"),
        ("cpu.max", "max 100000"),
        ("pids.max", "max"),
        ("cpu.weight", &weight),
        ("cpuset.cpus", "0"),
    ] {
        ensure_eq!(value(machine, file)?, expected, "{file} of the machine");
    }
    // The guest's memory counts there, and not in the container's group.
    let used = |group: &Path| Ok::<u64, crate::Failure>(value(group, "memory.current")?.parse()?);
    let (shadow, machine_used) = (used(&parent.group("one"))?, used(machine)?);
    ensure!(shadow < 4 << 20, "{shadow} bytes in the container's group");
    ensure!(machine_used > 16 << 20, "{machine_used} bytes in the machine's group");
    container.end()?;
    parent.check()
}

/// The first disk of the host, `major:minor`, for limits of block devices.
fn disk() -> Outcome<(u32, u32)> {
    let device = fs::read_dir("/sys/block")?.flatten().find(|entry| !entry.path().join("loop").exists());
    let text = fs::read_to_string(device.ok_or("no block device")?.path().join("dev"))?;
    let (major, minor) = text.trim().split_once(':').ok_or("no numbers")?;
    Ok((major.parse()?, minor.parse()?))
}

/// What both runtimes are given, and the files to compare.
fn table() -> Outcome<Vec<(Value, &'static [&'static str])>> {
    let (major, minor) = disk()?;
    Ok(vec![
        (json!({ "cpu": { "shares": 2 } }), &["cpu.weight"]),
        (json!({ "cpu": { "shares": 512, "quota": 25_000, "period": 50_000 } }), &["cpu.weight", "cpu.max"]),
        (json!({ "cpu": { "shares": 262_144, "quota": 12_345 } }), &["cpu.weight", "cpu.max"]),
        (json!({ "cpu": { "quota": -1, "period": 20_000 } }), &["cpu.max"]),
        (json!({ "cpu": { "cpus": "0", "mems": "0" } }), &["cpuset.cpus", "cpuset.mems"]),
        (
            json!({ "memory": { "limit": 50_000_001, "reservation": 20 << 20, "swap": 80 << 20 } }),
            &["memory.max", "memory.low", "memory.swap.max"],
        ),
        (json!({ "memory": { "limit": 64 << 20, "swap": 64 << 20 } }), &["memory.max", "memory.swap.max"]),
        (json!({ "memory": { "limit": 64 << 20, "swap": -1 } }), &["memory.max", "memory.swap.max"]),
        (json!({ "memory": { "limit": -1 } }), &["memory.max", "memory.swap.max"]),
        (json!({ "pids": { "limit": 33 } }), &["pids.max"]),
        (json!({ "pids": { "limit": -1 } }), &["pids.max"]),
        (json!({ "blockIO": { "weight": 300 } }), &["io.weight"]),
        (
            json!({ "blockIO": {
                "throttleReadBpsDevice": [{ "major": major, "minor": minor, "rate": 1 << 20 }],
                "throttleWriteIOPSDevice": [{ "major": major, "minor": minor, "rate": 300 }],
            } }),
            &["io.max"],
        ),
        (
            json!({ "hugepageLimits": [{ "pageSize": "2MB", "limit": 4 << 20 }] }),
            &["hugetlb.2MB.max", "hugetlb.2MB.rsvd.max"],
        ),
        (
            json!({ "unified": { "memory.high": "90000000", "memory.min": "4096", "cgroup.max.depth": "7" } }),
            &["memory.high", "memory.min", "cgroup.max.depth"],
        ),
    ])
}

fn limits_are_written_as_runc_writes_them(scene: &Scene) -> Outcome {
    let runc = Runtime::runc()?;
    let mut different = Vec::new();
    for (resources, files) in table()? {
        let parent = Parent::new(scene);
        let read = |runtime: &Runtime| -> Outcome<Vec<String>> {
            let bundle = scene.debian()?.set("/linux/cgroupsPath", parent.path(runtime.name())).sh("exec sleep 1000");
            let bundle = bundle.set("/linux/resources", resources.clone());
            let container = Container::make_with(scene, runtime, &bundle, &["create"])?;
            let read = |file: &&str| value(&parent.group(runtime.name()), file).unwrap_or_else(|_| "not there".into());
            let found = files.iter().map(read).collect();
            // One after the other: runc does not wait for what `delete --force` kills, and cannot remove a group that it is in.
            container.call(&["kill", &container.id, "KILL"])?.output()?;
            container.wait()?;
            container.delete()?;
            Ok(found)
        };
        let found = [read(&scene.runtime), read(&runc)].map(|found| found.map_err(|error| error.to_string()));
        if found[0] != found[1] || found[1].is_err() {
            different.push(format!("{resources}: {files:?} are {:?}, runc's are {:?}", found[0], found[1]));
        }
        parent.check().map_err(|error| format!("{error}; {}", different.join("\n    ")))?;
    }
    ensure!(different.is_empty(), "{}", different.join("\n    "));
    Ok(())
}

fn the_smallest_limits_stop_only_the_container(scene: &Scene) -> Outcome {
    let parent = Parent::new(scene);
    // Docker allows no less memory. What goes through the shadow is more than it has.
    let script = "echo begin; while read line; do echo got $line; done; head -c 8000000 /dev/zero";
    let bundle = scene
        .busybox()?
        .set("/linux/cgroupsPath", parent.path("one"))
        .set("/linux/resources/memory", json!({ "limit": 6 << 20, "swap": 6 << 20 }));
    let bundle = bundle.set("/linux/resources/pids", json!({ "limit": 2 })).args(&["/bin/sh", "-c", script]);
    let mut run = scene.start(&bundle)?;
    run.expect_line("begin")?;
    for (file, expected) in [("memory.max", "6291456"), ("pids.max", "2")] {
        ensure_eq!(value(&parent.group("one"), file)?, expected, "{file}");
    }
    run.send(b"one\ntwo\n")?;
    run.expect_line("got one")?;
    run.expect_line("got two")?;
    let ended = run.wait()?.expect_status(0)?;
    ensure!(ended.stdout.len() > 8_000_000, "{} bytes of output", ended.stdout.len());
    // A single process: of the guest one, of the host as many as it takes.
    let bundle = scene
        .busybox()?
        .set("/linux/cgroupsPath", parent.path("one"))
        .set("/linux/resources/pids", json!({ "limit": 1 }))
        .args(&["/bin/cat"]);
    let mut run = scene.start(&bundle)?;
    run.send(b"alone\n")?;
    run.expect_line("alone")?;
    ensure_eq!(value(&parent.group("one"), "pids.max")?, "1", "pids.max");
    run.wait()?.expect_status(0)?;
    parent.check()
}

fn another_s_group_is_left_alone(scene: &Scene) -> Outcome {
    let parent = Parent::new(scene);
    let bundle =
        || Ok::<_, crate::Failure>(scene.debian()?.set("/linux/cgroupsPath", parent.path("one")).sh("exec sleep 1000"));
    let first = Container::create(scene, &bundle()?)?;
    let ended = scene.run(&bundle()?)?.expect_status(1)?;
    ensure!(ended.stderr.contains("container's cgroup is not empty: 1 process(es) found"), "stderr {:?}", ended.stderr);
    ensure_eq!(first.status()?, "created", "status of the first");
    ensure_eq!(group_of(first.pid)?, parent.group("one"), "group of the first");
    first.end()?;
    // One that is there already, and empty, is taken; one that is frozen is not.
    fs::create_dir(parent.group("one"))?;
    fs::write(parent.group("one").join("cgroup.freeze"), "1")?;
    let ended = scene.run(&bundle()?)?.expect_status(1)?;
    ensure!(ended.stderr.contains("container's cgroup unexpectedly frozen"), "stderr {:?}", ended.stderr);
    ensure!(parent.group("one").exists(), "somebody else's group was removed");
    fs::write(parent.group("one").join("cgroup.freeze"), "0")?;
    let container = Container::create(scene, &bundle()?)?;
    ensure_eq!(group_of(container.pid)?, parent.group("one"), "group that was there");
    container.end()?;
    parent.check()
}

/// Kills one process of a container in the background; `delete` removes the rest.
fn nothing_is_left_whatever_is_killed(scene: &Scene) -> Outcome {
    for _ in 0..scene.repeat.div_ceil(5).min(20) {
        for who in ["shadow", "machine", "executed program"] {
            let before = Leaks::watch();
            let parent = Parent::new(scene);
            let bundle = scene.debian()?.set("/linux/cgroupsPath", parent.path("one")).sh("exec sleep 1000");
            let container = Container::make(scene, &bundle, &["run", "-d"])?;
            let executed = execute(&container, &["sleep", "1000"])?;
            let victim = match who {
                "shadow" => container.pid,
                "machine" => {
                    let pid = processes_in(&machines_beside(&parent.group("one"))?[0])?[0];
                    Pid::from_raw(pid).ok_or("pid 0")?
                }
                _ => executed,
            };
            let reaper = reap(executed);
            kill_process(victim, Signal::KILL)?;
            container
                .call(&["delete", "--force", &container.id])?
                .output()
                .map_err(|e| format!("{who} killed: {e}"))?;
            reaper.join().map_err(|_| "panic")?.map_err(|e| format!("{who} killed: {e}"))?;
            parent.check().map_err(|e| format!("{who} killed: {e}"))?;
            before.check().map_err(|e| format!("{who} killed: {e}"))?;
        }
    }
    Ok(())
}

/// Who makes a container is killed, at moments spread over the whole of a start: the next command has it all removed.
fn a_killed_creation_is_swept(scene: &Scene) -> Outcome {
    let parent = Parent::new(scene);
    let bundle = scene.debian()?.set("/linux/cgroupsPath", parent.path("one")).sh("exec sleep 1000");
    bundle.write()?;
    let began = Instant::now();
    let container = Container::create(scene, &bundle)?;
    let whole = began.elapsed();
    container.end()?;
    let steps = u32::try_from(scene.repeat.min(50))?;
    for step in 0..steps {
        let before = Leaks::watch();
        let after: Duration = whole * step / steps;
        let id = scene.id();
        let mut words = scene.runtime.run_words(&bundle.directory, &id);
        words[1] = "create".into();
        let mut create = Running::start(&words, &[])?;
        std::thread::sleep(after);
        create.signal(Signal::KILL)?;
        // A run of anything sweeps what has ended; what has not yet is this container's own to delete. It may have been made
        // whole before.
        scene.call(&["delete", "--force", &id])?.output().map_err(|e| format!("killed after {after:?}: {e}"))?;
        create.wait_open(Duration::from_secs(20)).map_err(|e| format!("killed after {after:?}: {e}"))?;
        drop(create);
        scene.run(&scene.debian()?.sh("true"))?.output()?;
        before.check().map_err(|e| format!("killed after {after:?}: {e}"))?;
    }
    parent.check()
}

fn without_systemd_it_is_not_asked(scene: &Scene) -> Outcome {
    ensure!(!Path::new("/run/systemd/system").exists(), "this host was booted with systemd");
    let before = Leaks::watch();
    let error = Container::make(scene, &scene.debian()?.sh("true"), &["--systemd-cgroup", "create"]).err();
    let error = error.ok_or("it was asked")?.to_string();
    ensure!(error.contains("--systemd-cgroup: this host was not booted with systemd"), "{error}");
    before.check()
}
