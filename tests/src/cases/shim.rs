//! containerd with podhull's own shim, when something goes wrong, and often.

use std::time::Duration;

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
    let mut events = Running::start(&containerd.words(&["events"]), &[])?;
    // It listens when it has heard of something.
    let until = std::time::Instant::now() + DEADLINE;
    let mut heard = String::new();
    for number in 0.. {
        ensure!(std::time::Instant::now() < until, "no event");
        containerd.call(&["namespace", "label", "default", &format!("round={number}")])?.output()?;
        if let Ok(line) = events.line_within(Duration::from_millis(500)) {
            heard = line;
            break;
        }
    }
    ensure!(heard.contains("/namespaces/update"), "first event {heard:?}");
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
