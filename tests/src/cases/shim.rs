//! containerd with podhull's own shim, when something goes wrong, and often.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{
    ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty,
    KillRequest, Mount, ShutdownRequest, StartRequest, StartResponse, WaitRequest, WaitResponse,
};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, Extension};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::containerd::{status, stopped};
use super::podhull;
use super::systemd::property;
use crate::bundle::Bundle;
use crate::containerd::{Containerd, Shim, check};
use crate::leaks::Leaks;
use crate::run::{DEADLINE, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq, processes, shim};

pub const CASES: &[Case] = &[
    podhull("shim::removed_as_often_as_it_runs", removed_as_often_as_it_runs),
    podhull("shim::containerd_killed_meanwhile", containerd_killed_meanwhile),
    podhull("shim::killed", killed),
    podhull("shim::what_is_executed_is_stopped", what_is_executed_is_stopped),
    podhull("shim::a_class_has_a_configuration_of_its_own", a_class_has_a_configuration_of_its_own),
    podhull("shim::delete_of_any_wreck", delete_of_any_wreck),
    podhull("shim::what_it_says_of_itself", what_it_says_of_itself),
    podhull("shim::started_with_parameters", started_with_parameters),
    // With the others that need systemd.
    podhull("systemd::a_shim_is_told_by_options", told_of_systemd_by_options),
];

/// Runs until it is told to end, and then exits with 3.
const PATIENT: &str = "trap 'exit 3' TERM; touch /ready; while :; do sleep 0.1; done";

/// Starts a container that is [`PATIENT`].
fn start(containerd: &Containerd, id: &str) -> Outcome {
    containerd.run(&["-d"], id, &["sh", "-c", PATIENT])?.output()?;
    let ready = ["task", "exec", "--exec-id", "ready", id, "sh", "-c", "until [ -e /ready ]; do sleep 0.1; done"];
    containerd.call(&ready)?.output().map(drop)
}

/// Deletes a task that has ended, and its container; `code` is the exit status that containerd is to know.
fn delete(containerd: &Containerd, id: &str, code: u8) -> Outcome {
    let deleted = containerd.call(&["task", "delete", id])?;
    ensure!(deleted.stderr.contains(&format!("non-zero exit code {code}")), "{id}: {:?}", deleted.stderr);
    containerd.call(&["container", "delete", id])?.output().map(drop)
}

fn removed_as_often_as_it_runs(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let containerd = Containerd::start(scene, Shim::Podhull)?;
    for number in 0..scene.repeat.min(100) {
        let id = format!("c{number}");
        let text = format!("{number}\n");
        let ended = containerd.run(&["--rm"], &id, &["echo", &number.to_string()])?.expect_status(0)?;
        ensure_eq!(ended.stdout, text, "output");
    }
    ensure_eq!(containerd.call(&["container", "list", "-q"])?.output()?, "", "containers");
    containerd.end()?;
    check(&before)
}

/// What runs goes on, and what ended meanwhile is known.
fn containerd_killed_meanwhile(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let mut containerd = Containerd::start(scene, Shim::Podhull)?;
    start(&containerd, "stays")?;
    start(&containerd, "ends")?;
    containerd.kill_daemon()?;
    let shadow = || {
        processes::all()
            .into_iter()
            .find(|process| process.command.starts_with("podhull --shadow") && process.command.ends_with(" ends"))
    };
    let pid = shadow().and_then(|process| Pid::from_raw(process.pid)).ok_or("no shadow")?;
    kill_process(pid, Signal::TERM)?;
    let until = Instant::now() + DEADLINE;
    while shadow().is_some() {
        ensure!(Instant::now() < until, "its shadow does not end");
        thread::sleep(Duration::from_millis(100));
    }
    containerd.start_daemon()?;
    ensure_eq!(status(&containerd, "stays")?, "RUNNING", "status of what goes on");
    ensure_eq!(status(&containerd, "ends")?, "STOPPED", "status of what has ended");
    delete(&containerd, "ends", 3)?;
    let answer = containerd.call(&["task", "exec", "--exec-id", "e", "stays", "echo", "here"])?.output()?;
    ensure_eq!(answer, "here\n", "output of what was executed");
    containerd.call(&["task", "kill", "--signal", "SIGTERM", "stays"])?.output()?;
    stopped(&containerd, "stays")?;
    delete(&containerd, "stays", 3)?;
    containerd.end()?;
    check(&before)
}

/// containerd is told that the container was killed, and nothing is left of it.
fn killed(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let containerd = Containerd::start(scene, Shim::Podhull)?;
    let mut events = containerd.events("default")?;
    for number in 0..scene.repeat.min(50) {
        let id = format!("c{number}");
        // What its client makes for streams, nobody but its client removes.
        containerd.run(&["-d", "--null-io"], &id, &["sh", "-c", PATIENT])?.output()?;
        let shims: Vec<_> = processes::all().into_iter().filter(processes::Process::is_shim).collect();
        let [shim] = &shims[..] else { return Err(format!("{} shims", shims.len()).into()) };
        kill_process(Pid::from_raw(shim.pid).ok_or("no pid")?, Signal::KILL)?;
        let until = Instant::now() + DEADLINE;
        // containerd forgets a task whose shim is gone, when it has had it removed.
        while containerd.call(&["task", "list", "-q"])?.output()?.contains(&id) {
            ensure!(Instant::now() < until, "containerd still has it");
        }
        containerd.call(&["container", "delete", &id])?.output()?;
        let exit = loop {
            let line = events.line()?;
            if line.contains("/tasks/exit") {
                break line;
            }
        };
        let told = exit.contains(&format!("\"container_id\":\"{id}\"")) && exit.contains("\"exit_status\":137");
        ensure!(told, "{id}: what containerd was told: {exit}");
    }
    events.signal(Signal::TERM)?;
    events.wait()?;
    containerd.end()?;
    check(&before)
}

/// By the signal that no process can take, so neither can what stands for one on the host.
fn what_is_executed_is_stopped(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let containerd = Containerd::start(scene, Shim::Podhull)?;
    start(&containerd, "c")?;
    let long = Running::start(&containerd.words(&["task", "exec", "--exec-id", "long", "c", "sleep", "1000"]), &[])?;
    let is = |number: &str, state: &str| -> Outcome {
        let script = format!("until ps -o stat,args | grep -q '^{state} *sleep 1000'; do sleep 0.1; done");
        containerd.call(&["task", "exec", "--exec-id", number, "c", "sh", "-c", &script])?.output().map(drop)
    };
    let signal =
        |name: &str| containerd.call(&["task", "kill", "--exec-id", "long", "--signal", name, "c"])?.output().map(drop);
    is("first", "S")?;
    signal("SIGSTOP")?;
    is("second", "T")?;
    signal("SIGCONT")?;
    is("third", "S")?;
    signal("SIGKILL")?;
    ensure_eq!(long.wait()?.status, 137, "status of what was executed");
    containerd.call(&["task", "kill", "--signal", "SIGTERM", "c"])?.output()?;
    stopped(&containerd, "c")?;
    delete(&containerd, "c", 3)?;
    containerd.end()?;
    check(&before)
}

/// A file that the runtime's options name says how large its pods are; one of Kata's is refused by its first key.
fn a_class_has_a_configuration_of_its_own(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let containerd = Containerd::start(scene, Shim::Podhull)?;
    let class = scene.make_directory("class")?.join("class.toml");
    let path = class.display().to_string();
    let run = |id: &str| {
        let look = "sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";
        containerd.run(&["--rm", "--runtime-config-path", &path], id, &["sh", "-c", look])
    };
    fs::write(&class, "[machine]\nmemory = 256\n")?;
    let memory: u64 = run("small")?.output()?.trim().parse()?;
    ensure!((128 << 10..=256 << 10).contains(&memory), "{memory} KiB of memory, with 256 MiB");
    let shown = scene.call(&["config", "show", "--class", &path])?.output()?;
    ensure!(shown.contains(&format!("{path}:2")), "what is in force: {shown}");
    fs::write(&class, "[hypervisor.qemu]\ndefault_memory = 2048\n")?;
    let expected = format!(
        "{path}: line 2: hypervisor.qemu.default_memory: is a key of Kata Containers; here it is machine.memory"
    );
    for (id, expected) in [("kata", expected), ("none", format!("{path}: cannot be read: No such file"))] {
        let refused = run(id)?;
        ensure!(refused.status != 0 && refused.stderr.contains(&expected), "{id}: {refused:?}");
        let _ = fs::remove_file(&class);
    }
    containerd.end()?;
    check(&before)
}

/// What containerd gives the program to delete what a shim has left.
const MOST_OF_A_DELETION: Duration = Duration::from_secs(5);

/// Options of containerd's shim for runc, as requests have them.
fn of_runc(options: &oci::Options) -> Outcome<Any> {
    Ok(Any { type_url: "containerd.runc.v1.Options".into(), value: options.write_to_bytes()?, ..Default::default() })
}

/// Makes a container by a shim, and starts it. Its root is mounted by the shim.
fn make(shim: &shim::Shim, service: &str, bundle: &Bundle, id: &str, options: Option<Any>) -> Outcome<u32> {
    let directory = bundle.directory.display().to_string();
    let rootfs = Mount {
        type_: "bind".into(),
        source: format!("{directory}/rootfs"),
        options: vec!["rbind".into(), "rw".into()],
        ..Default::default()
    };
    let create = CreateTaskRequest {
        id: id.into(),
        bundle: directory,
        rootfs: vec![rootfs],
        options: options.into(),
        ..CreateTaskRequest::default()
    };
    let created: CreateTaskResponse = shim.call(service, "Create", &create)?;
    let start = StartRequest { id: id.into(), ..Default::default() };
    ensure_eq!(shim.call::<StartResponse>(service, "Start", &start)?.pid, created.pid, "process");
    Ok(created.pid)
}

/// Kills a container with this process, and deletes it.
fn end(shim: &shim::Shim, service: &'static str, id: &str, pid: u32) -> Outcome {
    let wait: shim::Later<Result<WaitResponse, _>> =
        shim.call_beside(service, "Wait", WaitRequest { id: id.into(), ..Default::default() });
    shim.call::<Empty>(service, "Kill", &KillRequest { id: id.into(), signal: 9, ..Default::default() })?;
    ensure_eq!(wait.get()??.exit_status, 137, "exit status");
    let deleted: DeleteResponse =
        shim.call(service, "Delete", &DeleteRequest { id: id.into(), ..Default::default() })?;
    ensure_eq!((deleted.pid, deleted.exit_status), (pid, 137), "what {deleted:?} says");
    Ok(())
}

/// Has a shim without containers end.
fn dismiss(shim: &shim::Shim, service: &str, id: &str) -> Outcome {
    // The connection ends with it.
    let _ = shim.call::<Empty>(service, "Shutdown", &ShutdownRequest { id: id.into(), ..Default::default() });
    shim.gone()
}

/// The one process that this is true of.
fn the_one(what: &str, is_it: impl Fn(&processes::Process) -> bool) -> Outcome<Pid> {
    let found: Vec<_> = processes::all().into_iter().filter(is_it).collect();
    let [process] = &found[..] else { return Err(format!("{what}: {found:?}").into()) };
    Ok(Pid::from_raw(process.pid).ok_or("no pid")?)
}

/// The control group of a process.
fn group_of(pid: i32) -> Outcome<PathBuf> {
    let line = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = line.trim().strip_prefix("0::/").ok_or_else(|| format!("group of {pid}: {line}"))?;
    Ok(Path::new("/sys/fs/cgroup").join(path))
}

/// As containerd has it deleted that finds the shim gone: without anybody who answers, whatever else is missing, and twice.
fn delete_of_any_wreck(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    for (number, lacks) in ["nothing", "its state", "config.json"].into_iter().enumerate() {
        let (id, bundle) = (format!("wreck-{number}"), scene.busybox()?.writable().sh(PATIENT));
        bundle.write()?;
        let shim = shim::Shim::start(&bundle.directory, &id)?;
        let pid = make(&shim, shim::TASK, &bundle, &id, None)?;
        let is_machine = |process: &processes::Process| process.command.starts_with("podhull vmm");
        let machine = the_one("machines", is_machine)?;
        // It answers nobody.
        kill_process(machine, Signal::STOP)?;
        kill_process(the_one("shims", |process| process.is_shim() && process.command.contains(&id))?, Signal::KILL)?;
        let state = Path::new("/run/containerd/podhull/default").join(&id);
        ensure!(state.is_dir(), "{lacks}: no state at {}", state.display());
        match lacks {
            "its state" => {
                // By its state alone is it known what runs, and in which groups.
                let groups = [machine.as_raw_nonzero().get(), pid.cast_signed()].map(group_of);
                kill_process(machine, Signal::KILL)?;
                let ended = |process: &processes::Process| {
                    process.pid == pid.cast_signed() && !matches!(process.state, 'Z' | 'X')
                };
                let until = Instant::now() + DEADLINE;
                while processes::all().iter().any(ended) {
                    ensure!(Instant::now() < until, "process {pid} does not end with its machine");
                    thread::sleep(Duration::from_millis(20));
                }
                fs::remove_dir_all(&state)?;
                for group in groups {
                    fs::remove_dir(group?)?;
                }
            }
            "config.json" => fs::remove_file(bundle.directory.join("config.json"))?,
            _ => {}
        }
        let directory = bundle.directory.display().to_string();
        let words = ["-namespace", "default", "-address", "", "-publish-binary", "/usr/bin/containerd"];
        let words = [&words[..], &["-id", &id, "-bundle", &directory, "delete"]].concat();
        for known in [if lacks == "its state" { 0 } else { pid }, 0] {
            let began = Instant::now();
            let said = shim::say("containerd-shim-podhull-v2", &bundle.directory, &words, &[])?;
            let took = began.elapsed();
            ensure!(took < MOST_OF_A_DELETION, "{lacks} is missing: deleted in {took:?}");
            let answer = DeleteResponse::parse_from_bytes(&said)?;
            let found = (answer.pid, answer.exit_status, answer.exited_at.is_some());
            ensure_eq!(found, (known, 137, true), "what is said where {lacks} is missing");
            ensure!(!fs::read_to_string("/proc/mounts")?.contains(&directory), "{lacks} is missing: mounts are left");
            ensure!(!state.exists(), "{lacks} is missing: its state is left");
        }
        let ended = |process: &processes::Process| is_machine(process) && !matches!(process.state, 'Z' | 'X');
        ensure!(!processes::all().iter().any(ended), "{lacks} is missing: its machine is left");
    }
    check(&before)
}

/// What containerd 2 asks each program for, and passes on to kubelet.
fn what_it_says_of_itself(scene: &Scene) -> Outcome {
    let asked = of_runc(&oci::Options { systemd_cgroup: true, ..Default::default() })?;
    for (name, options) in [("podhull", None), ("kata", Some(asked))] {
        let program = format!("containerd-shim-{name}-v2");
        let input = options.as_ref().map(Message::write_to_bytes).transpose()?.unwrap_or_default();
        let info = RuntimeInfo::parse_from_bytes(&shim::say(&program, &scene.directory, &["-info"], &input)?)?;
        ensure_eq!(info.name, format!("io.containerd.{name}.v2"), "name");
        let version = scene.call(&["--version"])?.output()?;
        ensure!(version.contains(&format!("podhull version {}\n", info.version.version)), "version: {info:?}");
        ensure_eq!(info.options.into_option(), options, "options");
        let kind = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
        ensure_eq!(info.features.type_url, kind, "type of features");
        let said: Value = serde_json::from_slice(&info.features.value)?;
        let expected: Value = serde_json::from_str(&scene.call(&["features"])?.output()?)?;
        ensure_eq!(said, expected, "features");
        let has = |list: &Value, word: &str| list.as_array().is_some_and(|list| list.iter().any(|item| item == word));
        ensure!(has(&said["linux"]["namespaces"], "user"), "no namespaces of users: {said}");
        ensure!(has(&said["mountOptions"], "rro"), "no mounts that are read-only with all below: {said}");
        for feature in ["/linux/seccomp", "/linux/mountExtensions/idmap"] {
            ensure_eq!(said.pointer(&format!("{feature}/enabled")), Some(&true.into()), "{feature} of {said}");
        }
        let said = String::from_utf8(shim::say(&program, &scene.directory, &["-v"], &[])?)?;
        ensure!(said.contains(&program) && said.contains(&info.version.version), "-v: {said}");
    }
    Ok(())
}

/// As containerd from 2.3 on starts it: with a message on standard input, which says where its socket is to be, and its control group.
fn started_with_parameters(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let (group, sockets) = ("/podhull-shims", Path::new("/run/podhull-sockets"));
    let place = Path::new("/sys/fs/cgroup/podhull-shims");
    fs::create_dir(place)?;
    let (id, bundle) = ("parameters".to_owned(), scene.busybox()?.writable().sh("touch /ready; exec sleep 1000"));
    bundle.write()?;
    let options = of_runc(&oci::Options { shim_cgroup: group.into(), ..Default::default() })?;
    let params = BootstrapParams {
        instance_id: id.clone(),
        namespace: "default".into(),
        containerd_version: "2.3.0".into(),
        containerd_grpc_address: "/run/containerd/containerd.sock".into(),
        containerd_binary: "/usr/bin/containerd".into(),
        extensions: vec![Extension { value: MessageField::some(options), ..Default::default() }],
        socket_dir: Some(sockets.display().to_string()),
        ..Default::default()
    };
    let words = ["-namespace", "default", "-address", "", "-publish-binary", "/usr/bin/containerd"];
    let words = [&words[..], &["-id", &id, "start"]].concat();
    let start = || -> Outcome<BootstrapResult> {
        let said = shim::say(shim::PROGRAM, &bundle.directory, &words, &params.write_to_bytes()?)?;
        Ok(BootstrapResult::parse_from_bytes(&said)?)
    };
    let started = start()?;
    ensure_eq!((started.version, &*started.protocol), (2, "ttrpc"), "what {started:?} says");
    let socket = started.address.strip_prefix("unix://").map(Path::new);
    ensure_eq!(socket.and_then(Path::parent), Some(sockets), "directory of {started:?}");
    ensure_eq!(start()?.address, started.address, "address when it is started again");
    let shim = shim::Shim::connect(&started.address)?;
    let service = shim::TASK_OF_2;
    let first = make(&shim, service, &bundle, &id, None)?;
    let connect = ConnectRequest { id: id.clone(), ..Default::default() };
    let connected: ConnectResponse = shim.call(service, "Connect", &connect)?;
    ensure_eq!(connected.task_pid, first, "process in what {connected:?} says");
    let in_group = fs::read_to_string(format!("/proc/{}/cgroup", connected.shim_pid))?;
    ensure_eq!(in_group, format!("0::{group}\n"), "group of the shim");
    let of_container = fs::read_to_string(format!("/proc/{first}/cgroup"))?;
    ensure!(!of_container.contains(group), "the container is in the shim's group: {of_container}");
    end(&shim, service, &id, first)?;
    dismiss(&shim, service, &id)?;
    let until = Instant::now() + DEADLINE;
    for empty in [place, sockets] {
        while let Err(error) = fs::remove_dir(empty) {
            ensure!(Instant::now() < until, "{}: {error}", empty.display());
            thread::sleep(Duration::from_millis(20));
        }
    }
    check(&before)
}

/// Where the options say that systemd makes control groups it does, whatever `linux.cgroupsPath` looks like: a path is refused, and
/// without one the container is a scope of the system's slice. Without the option the path is one.
fn told_of_systemd_by_options(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let (service, id) = (shim::TASK, "told");
    let options = || of_runc(&oci::Options { systemd_cgroup: true, ..Default::default() });
    let bundle = scene.busybox()?.writable().sh(PATIENT).set("/linux/cgroupsPath", "/told-by-options".into());
    bundle.write()?;
    let shim = shim::Shim::start(&bundle.directory, id)?;
    let error = make(&shim, service, &bundle, id, Some(options()?)).err().ok_or("a path is taken")?.to_string();
    ensure!(error.contains("expected cgroupsPath to be of format"), "a path with the option: {error}");

    let pid = make(&shim, service, &bundle, id, None)?;
    ensure_eq!(group_of(pid.cast_signed())?, Path::new("/sys/fs/cgroup/told-by-options"), "group without the option");
    end(&shim, service, id, pid)?;

    let bundle = bundle.set("/linux/cgroupsPath", "".into());
    bundle.write()?;
    let pid = make(&shim, service, &bundle, id, Some(options()?))?;
    let unit = format!("podhull-{id}.scope");
    let expected = Path::new("/sys/fs/cgroup/system.slice").join(&unit);
    ensure_eq!(group_of(pid.cast_signed())?, expected, "group with the option");
    ensure_eq!(property(&unit, "ActiveState")?, "active", "state of the scope");
    end(&shim, service, id, pid)?;
    ensure_eq!(property(&unit, "LoadState")?, "not-found", "state of the scope when its container is gone");
    dismiss(&shim, service, id)?;
    check(&before)
}
