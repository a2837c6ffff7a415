//! containerd with podhull's own shim, when something goes wrong, and often.

use std::fs;

use rustix::process::{Pid, Signal, kill_process};

use super::containerd::{status, stopped};
use super::podhull;
use crate::containerd::{Containerd, Shim, check};
use crate::leaks::Leaks;
use crate::processes;
use crate::run::{DEADLINE, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    podhull("shim::removed_as_often_as_it_runs", removed_as_often_as_it_runs),
    podhull("shim::containerd_killed_meanwhile", containerd_killed_meanwhile),
    podhull("shim::killed", killed),
    podhull("shim::what_is_executed_is_stopped", what_is_executed_is_stopped),
    podhull("shim::a_class_has_a_configuration_of_its_own", a_class_has_a_configuration_of_its_own),
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
    let until = std::time::Instant::now() + DEADLINE;
    while shadow().is_some() {
        ensure!(std::time::Instant::now() < until, "its shadow does not end");
        std::thread::sleep(std::time::Duration::from_millis(100));
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
        let until = std::time::Instant::now() + DEADLINE;
        // containerd forgets a task whose shim is gone, when it has had it removed.
        while containerd.call(&["task", "list", "-q"])?.output()?.contains(&id) {
            ensure!(std::time::Instant::now() < until, "containerd still has it");
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
