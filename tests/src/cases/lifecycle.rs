//! A container made by one command, started by another, and removed by a third.

use std::fs;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{oci, podhull};
use crate::container::Container;
use crate::leaks::Leaks;
use crate::run::Running;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("lifecycle::created_started_ended_deleted", created_started_ended_deleted),
    oci("lifecycle::a_run_in_the_background", a_run_in_the_background),
    oci("lifecycle::a_container_that_was_never_started", a_container_that_was_never_started),
    oci("lifecycle::signals", signals),
    oci("lifecycle::exec", exec),
    oci("lifecycle::commands_in_the_wrong_state", commands_in_the_wrong_state),
    podhull("lifecycle::errors_are_one_line_that_says_what_and_where", errors_are_one_line_that_says_what_and_where),
    podhull("lifecycle::a_killed_shadow_takes_the_machine_along", a_killed_shadow_takes_the_machine_along),
    podhull("lifecycle::two_starts_race", two_starts_race),
];

fn created_started_ended_deleted(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let bundle =
        scene.debian()?.set("/annotations", serde_json::json!({ "a.b/c": "d" })).sh("echo out; echo err >&2; exit 42");
    let container = Container::create(scene, &bundle)?;
    let state = container.state()?;
    for (key, expected) in [
        ("id", Value::from(container.id.as_str())),
        ("status", "created".into()),
        ("pid", container.pid.as_raw_nonzero().get().into()),
        ("bundle", bundle.directory.to_string_lossy().into()),
    ] {
        ensure_eq!(state[key], expected, "{key} of {state}");
    }
    ensure_eq!(state["annotations"]["a.b/c"], Value::from("d"), "annotations");
    ensure!(state["created"].as_str().is_some_and(|time| time.ends_with('Z')), "created of {state}");
    ensure_eq!(container.output()?, "", "output before start");
    let listed: Value = serde_json::from_str(&container.call(&["list", "--format", "json"])?.output()?)?;
    let ours = listed.as_array().and_then(|all| all.iter().find(|one| one["id"] == state["id"]));
    let mut expected = state.clone();
    expected["owner"] = "root".into();
    ensure_eq!(ours, Some(&expected), "its entry in the list");
    let pid = container.pid.as_raw_nonzero();
    let pids = container.call(&["ps", "-f", "json", &container.id])?.output()?;
    ensure_eq!(pids.trim(), format!("[{pid}]"), "pids");
    let table = container.call(&["ps", &container.id])?.output()?;
    ensure!(table.starts_with("UID ") && table.lines().count() == 2, "table {table:?}");
    let table = container.call(&["list"])?.output()?;
    ensure!(table.starts_with("ID ") && table.contains(&container.id), "table {table:?}");

    container.start()?;
    ensure_eq!(container.wait()?, 42, "exit status");
    ensure_eq!(container.output()?, "out\nerr\n", "output");
    let state = container.state()?;
    ensure_eq!((&state["status"], &state["pid"]), (&Value::from("stopped"), &Value::from(0)), "afterwards");
    container.delete()?;
    ensure!(!container.call(&["list", "-q"])?.output()?.contains(&container.id), "still in the list");
    before.check()
}

fn a_run_in_the_background(scene: &Scene) -> Outcome {
    let bundle = scene.debian()?.sh("echo ready; exec sleep 1000");
    let container = Container::make(scene, &bundle, &["run", "--detach"])?;
    container.expect_output("ready")?;
    ensure_eq!(container.status()?, "running", "status");
    container.call(&["kill", &container.id, "KILL"])?.output()?;
    ensure_eq!(container.wait()?, 137, "exit status");
    container.delete()
}

fn a_container_that_was_never_started(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let container = Container::create(scene, &scene.debian()?.sh("echo never"))?;
    container.delete()?;
    ensure!(container.wait()? != 0, "exit status 0");
    ensure_eq!(container.output()?, "", "output");
    before.check()
}

fn signals(scene: &Scene) -> Outcome {
    let script = "trap 'echo usr1' USR1; trap 'echo term; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let container = Container::make(scene, &scene.debian()?.sh(script), &["run", "-d"])?;
    container.expect_output("ready")?;
    container.call(&["kill", &container.id, "SIGUSR1"])?.output()?;
    container.expect_output("usr1")?;
    // To the process itself: that is how callers forward.
    kill_process(container.pid, Signal::USR1)?;
    container.expect_output("usr1\nusr1")?;
    container.call(&["kill", &container.id])?.output()?;
    ensure_eq!(container.wait()?, 3, "exit status");
    container.delete()
}

fn commands_in_the_wrong_state(scene: &Scene) -> Outcome {
    let container = Container::create(scene, &scene.debian()?.sh("exec sleep 1000"))?;
    container.start()?;
    let refused = |words: &[&str], what: &str| -> Outcome {
        let ended = container.call(words)?;
        ensure!(ended.status != 0 && ended.stderr.contains(what), "{words:?}: {} {:?}", ended.status, ended.stderr);
        Ok(())
    };
    refused(&["start", &container.id], "start")?;
    refused(&["delete", &container.id], "not stopped")?;
    container.call(&["kill", &container.id, "9"])?.output()?;
    ensure_eq!(container.wait()?, 137, "exit status");
    refused(&["kill", &container.id, "9"], "container not running")?;
    refused(&["start", &container.id], "stopped")?;
    container.delete()?;
    refused(&["delete", &container.id], "does not exist")?;
    refused(&["kill", &container.id], "does not exist")?;
    container.call(&["delete", "--force", &container.id])?.output().map(drop)
}

fn errors_are_one_line_that_says_what_and_where(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let running = Container::make(scene, &scene.debian()?.sh("exec sleep 1000"), &["run", "-d"])?;
    let bundle = scene.debian()?.args(&["/no/such/program"]);
    bundle.write()?;
    let (directory, id) = (bundle.directory.to_string_lossy().into_owned(), scene.id());
    for (words, what) in [
        (&["create", "-b", "/no/such", &id][..], "/no/such"),
        (&["create", "-b", &directory, &id], "/no/such/program"),
        (&["create", "-b", &directory, &running.id], "in use"),
        (&["create", "-b", &directory, "--console-socket", "/no/such.sock", &id], "console-socket"),
        (&["run", "-d", "-b", &directory, &id], "/no/such/program"),
        (&["kill", &running.id, "LEVITATE"], "LEVITATE"),
        (&["state", "../x"], "../x"),
        (&["start", "nobody"], "\"nobody\" does not exist"),
    ] {
        let ended = scene.call(words)?.expect_status(1)?;
        ensure!(ended.stderr.contains(what), "{words:?}: {:?} does not name {what}", ended.stderr);
        ensure_eq!(ended.stderr.lines().count(), 1, "{words:?}: lines of {:?}", ended.stderr);
    }
    running.call(&["delete", "--force", &running.id])?.output()?;
    ensure_eq!(running.wait()?, 137, "signal of the shadow");
    before.check()
}

fn a_killed_shadow_takes_the_machine_along(scene: &Scene) -> Outcome {
    for _ in 0..scene.repeat.min(100) {
        let before = Leaks::watch();
        let container = Container::make(scene, &scene.debian()?.sh("exec sleep 1000"), &["run", "-d"])?;
        kill_process(container.pid, Signal::KILL)?;
        ensure_eq!(container.wait()?, 137, "exit status");
        ensure_eq!(container.status()?, "stopped", "status");
        container.delete()?;
        before.check()?;
    }
    Ok(())
}

fn two_starts_race(scene: &Scene) -> Outcome {
    for _ in 0..scene.repeat.min(200) {
        let container = Container::create(scene, &scene.debian()?.sh("echo once; exit 5"))?;
        let words = || vec![scene.runtime.program().into(), "start".into(), container.id.clone().into()];
        let starts = [Running::start(&words(), &[])?, Running::start(&words(), &[])?];
        let mut succeeded = 0;
        for start in starts {
            succeeded += usize::from(start.wait()?.status == 0);
        }
        ensure_eq!(succeeded, 1, "starts that succeeded");
        ensure_eq!(container.wait()?, 5, "exit status");
        ensure_eq!(container.output()?, "once\n", "output");
        container.delete()?;
    }
    Ok(())
}

fn exec(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let bundle =
        scene.debian()?.set("/process/env", serde_json::json!(["PATH=/usr/bin:/bin", "A=1"])).sh("exec sleep 1000");
    let container = Container::make(scene, &bundle, &["run", "-d"])?;
    let id = container.id.as_str();
    let ended = scene.call(&["exec", id, "sh", "-c", "echo out; echo err >&2; exit 42"])?.expect_status(42)?;
    ensure_eq!((&*ended.stdout, &*ended.stderr), ("out\n", "err\n"), "outputs");
    scene.call(&["exec", id, "sh", "-c", "kill -9 $$"])?.expect_status(137)?;
    let seen =
        scene.call(&["exec", id, "sh", "-c", "cat /proc/1/cmdline | tr '\\0' ' '; hostname; cat /proc/self/cgroup"])?;
    let first = container.call(&["exec", id, "cat", "/proc/1/cgroup"])?.output()?;
    ensure!(
        seen.stdout.starts_with("sleep 1000 ") && seen.stdout.ends_with(&first),
        "another place: {:?}",
        seen.stdout
    );
    for (options, script, expected) in [
        (&["--cwd", "/usr"][..], "pwd", "/usr"),
        (&["-e", "B=2", "-e", "C=3"], "echo $A$B$C", "123"),
        (&["--user", "1000:2000"], "echo $(id -u):$(id -g)", "1000:2000"),
        (&["-u", "0:0", "-g", "7", "-g", "8"], "id -G", "0 7 8"),
        (&["--no-new-privs"], "grep NoNewPrivs /proc/self/status", "NoNewPrivs:\t1"),
        (&["--cap", "CAP_SYS_TIME"], "grep CapEff /proc/self/status", "CapEff:\t0000000022000420"),
    ] {
        let words = [&["exec"], options, &[id, "sh", "-c", script]].concat();
        let ended = scene.call(&words)?;
        ensure_eq!(ended.stdout.trim(), expected, "{options:?}: {:?}", ended.stderr);
    }
    let words = ["exec", id, "cat"].map(Into::into);
    let words: Vec<_> = std::iter::once(scene.runtime.program().into()).chain(words).collect();
    let mut cat = Running::start(&words, &[])?;
    cat.send(b"through\n")?;
    cat.expect_line("through")?;
    cat.wait()?.expect_status(0)?;
    let missing = scene.call(&["exec", id, "no-such-program"])?.expect_status(255)?;
    ensure!(missing.stderr.contains("executable file not found in $PATH"), "{:?}", missing.stderr);

    let pid_file = scene.directory.join("exec.pid");
    let words = ["exec", "-d", "--pid-file", &pid_file.to_string_lossy(), id, "sh", "-c", "exit 9"].map(str::to_owned);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let status = Command::new(scene.runtime.program())
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    ensure!(status.success(), "exec -d: {status}");
    let pid =
        fs::read_to_string(&pid_file)?.trim().parse().ok().and_then(Pid::from_raw).ok_or("no pid in the pid file")?;
    let executed = Container { scene, runtime: &scene.runtime, id: id.into(), output: container.output.clone(), pid };
    ensure_eq!(executed.wait()?, 9, "exit status of what was executed in the background");

    container.call(&["kill", id, "KILL"])?.output()?;
    ensure_eq!(container.wait()?, 137, "exit status");
    let stopped = scene.call(&["exec", id, "true"])?.expect_status(255)?;
    ensure!(
        stopped.stderr.contains("stopped container") || stopped.stderr.contains("not running"),
        "{:?}",
        stopped.stderr
    );
    container.delete()?;
    before.check()
}
