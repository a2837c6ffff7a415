//! containerd calls the runtime through its shim for runc, by `BinaryName`, or podhull by its own shim.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use super::{oci, podhull};
use crate::containerd::{Containerd, Shim, check};
use crate::leaks::Leaks;
use crate::run::{DEADLINE, Running};
use crate::suite::{Case, Scene};
use crate::terminal::{Tmux, shell_line};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("containerd::tasks", |scene| tasks(scene, Shim::Runc)),
    podhull("containerd::tasks_of_our_own_shim", |scene| tasks(scene, Shim::Podhull)),
    podhull("containerd::tasks_by_kata_s_name", |scene| tasks(scene, Shim::Kata)),
    oci("containerd::logs_go_where_they_are_told", logs_go_where_they_are_told),
];

/// The status of a task, as `ctr task list` has it.
pub fn status(containerd: &Containerd, id: &str) -> Outcome<String> {
    let list = containerd.call(&["task", "list"])?.output()?;
    let line =
        list.lines().find(|line| line.split_whitespace().next() == Some(id)).ok_or(format!("no {id}: {list}"))?;
    Ok(line.split_whitespace().nth(2).unwrap_or_default().to_owned())
}

/// Waits for the end of a task.
pub fn stopped(containerd: &Containerd, id: &str) -> Outcome {
    stopped_within(containerd, id, DEADLINE)
}

/// The same for one that may take another time.
pub fn stopped_within(containerd: &Containerd, id: &str, deadline: Duration) -> Outcome {
    let until = Instant::now() + deadline;
    while status(containerd, id)? != "STOPPED" {
        ensure!(Instant::now() < until, "{id} does not stop");
    }
    Ok(())
}

fn tasks(scene: &Scene, shim: Shim) -> Outcome {
    let before = Leaks::watch();
    let containerd = Containerd::start(scene, shim)?;
    let ended =
        containerd.run(&["--rm"], "first", &["sh", "-c", "echo out; echo err >&2; exit 7"])?.expect_status(7)?;
    ensure_eq!((&*ended.stdout, ended.stderr.contains("err\n")), ("out\n", true), "outputs {:?}", ended.stderr);
    let missing = containerd.run(&["--rm"], "missing", &["no-such-program"])?.expect_status(1)?;
    let expected = "\"no-such-program\": executable file not found in $PATH";
    ensure!(missing.stderr.contains(expected), "stderr {:?}", missing.stderr);
    {
        let tmux = Tmux::start(&scene.directory, 100, 30)?;
        let run = containerd.run_words(&["--rm", "-t", "--env", "PS1=inside> "], "terminal", &["sh"]);
        tmux.type_line(&format!("clear; {}; echo status $?", shell_line(&run)))?;
        tmux.expect("inside> ")?;
        tmux.type_line("stty size; exit 5")?;
        tmux.expect("30 100\n")?;
        tmux.expect("\nstatus 5\n")?;
    }

    let mut events = containerd.events("default")?;
    let script = "trap 'exit 3' TERM; while :; do sleep 0.1; echo x >> /ticks; done";
    containerd.run(&["-d", "--memory-limit", "67108864"], "second", &["sh", "-c", script])?.output()?;
    ensure_eq!(status(&containerd, "second")?, "RUNNING", "status");
    let exec =
        |id: &str, command: &[&str]| containerd.call(&[&["task", "exec", "--exec-id", id, "second"], command].concat());
    let ended = exec("e1", &["sh", "-c", "ls /ticks; exit 4"])?.expect_status(4)?;
    ensure_eq!(ended.stdout, "/ticks\n", "output of what was executed");
    let metrics = containerd.call(&["task", "metrics", "second"])?.output()?;
    let metric = |name: &str| {
        let line = metrics.lines().find(|line| line.split_whitespace().next() == Some(name));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).ok_or(format!("no {name}: {metrics}"))
    };
    ensure!(metric("memory.usage")? > 0 && metric("pids.current")? > 0, "metrics {metrics}");
    ensure_eq!(metric("memory.usage_limit")?, 64 << 20, "limit in the metrics");
    processes(&containerd, "second")?;

    containerd.call(&["task", "pause", "second"])?.output()?;
    ensure_eq!(status(&containerd, "second")?, "PAUSED", "status after pause");
    containerd.call(&["task", "resume", "second"])?.output()?;
    ensure_eq!(status(&containerd, "second")?, "RUNNING", "status after resume");
    containerd.call(&["task", "kill", "--signal", "SIGTERM", "second"])?.output()?;
    stopped(&containerd, "second")?;
    let deleted = containerd.call(&["task", "delete", "second"])?;
    ensure!(deleted.stderr.contains("non-zero exit code 3"), "exit status: {:?}", deleted.stderr);
    containerd.call(&["container", "delete", "second"])?.output()?;
    let mut expected = vec![
        "create second",
        "start second",
        "exec-added e1",
        "exec-started e1",
        "exit e1",
        "exec-added long",
        "exec-started long",
        "exit long",
        "paused second",
        "resumed second",
        "exit second",
        "delete second",
    ];
    if matches!(shim, Shim::Runc) {
        // That shim may end before it has sent its last event.
        expected.pop();
    }
    ensure_eq!(told(&mut events, "second", expected.len())?, expected, "what containerd was told");
    events.signal(Signal::KILL)?;
    events.wait()?;
    // Who comes later speaks to it, too.
    containerd.run(&["-d"], "third", &["sh", "-c", "read line; echo got $line; exit 6"])?.output()?;
    let mut attached = Running::start(&containerd.words(&["task", "attach", "third"]), &[])?;
    attached.send(b"something\n")?;
    attached.expect_line("got something")?;
    // Which deletes the task, too.
    ensure_eq!(attached.wait_open(DEADLINE)?.status, 6, "exit status of who attached");
    containerd.call(&["container", "delete", "third"])?.output()?;
    ensure_eq!(containerd.call(&["container", "list", "-q"])?.output()?, "", "containers");
    containerd.end()?;
    check(&before)
}

/// The first process of a container, and one that is executed in it, by its id, are processes of this host that run.
fn processes(containerd: &Containerd, id: &str) -> Outcome {
    let words = ["task", "exec", "--exec-id", "long", id, "sh", "-c", "echo here; exec sleep 1000"];
    let mut long = Running::start(&containerd.words(&words), &[])?;
    long.expect_line("here")?;
    let list = containerd.call(&["task", "list"])?.output()?;
    let words = list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let first = words.filter(|words| words.first() == Some(&id)).find_map(|words| words.get(1)?.parse::<i32>().ok());
    let listed = containerd.call(&["task", "ps", id])?.output()?;
    let found: Vec<(i32, &str)> = listed
        .lines()
        .filter_map(|line| line.split_once(char::is_whitespace))
        .filter_map(|(pid, info)| Some((pid.parse().ok()?, info)))
        .collect();
    let executed = found.iter().find(|(_, info)| info.contains("long")).map(|(pid, _)| *pid);
    let (Some(first), Some(executed)) = (first, executed) else { return Err(format!("{list}: {listed}").into()) };
    ensure!(first != executed && found.iter().any(|(pid, _)| *pid == first), "process {first} is not in {listed}");
    for pid in [first, executed] {
        let run = |process: &crate::processes::Process| process.pid == pid && !matches!(process.state, 'Z' | 'X');
        ensure!(crate::processes::all().iter().any(run), "process {pid} of {listed} does not run");
    }
    containerd.call(&["task", "kill", "--exec-id", "long", "--signal", "SIGKILL", id])?.output()?;
    ensure_eq!(long.wait()?.status, 137, "status of what was executed");
    Ok(())
}

/// The first things that containerd was told of a container: topics, and the ids of processes.
fn told(events: &mut Running, container: &str, count: usize) -> Outcome<Vec<String>> {
    let mut told = Vec::new();
    while told.len() < count {
        let line = events.line().map_err(|error| format!("after {told:?}: {error}"))?;
        let Some((_, rest)) = line.split_once(" /tasks/") else { continue };
        let (topic, text) = rest.split_once(' ').ok_or_else(|| format!("no event: {line}"))?;
        let event: Value = serde_json::from_str(text)?;
        if event["container_id"] == container {
            let process = ["exec_id", "id"].iter().find_map(|key| event[key].as_str().filter(|id| !id.is_empty()));
            told.push(format!("{topic} {}", process.unwrap_or(container)));
        }
    }
    Ok(told)
}

/// Into a file, and to a program that takes them, which is told whose they are.
fn logs_go_where_they_are_told(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let shim = if scene.runtime.is_virtual() { Shim::Podhull } else { Shim::Runc };
    let containerd = Containerd::start(scene, shim)?;
    let say = ["sh", "-c", "echo out; echo err >&2; exit 5"];
    let run = |id: &str, log: &str| -> Outcome {
        containerd.run(&["-d", "--log-uri", log], id, &say)?.output()?;
        stopped(&containerd, id)?;
        let deleted = containerd.call(&["task", "delete", id])?;
        ensure!(deleted.stderr.contains("non-zero exit code 5"), "exit status: {:?}", deleted.stderr);
        containerd.call(&["container", "delete", id])?.output().map(drop)
    };
    let (file, taken, logger) =
        (scene.directory.join("file.log"), scene.directory.join("taken"), scene.directory.join("logger"));
    // Twice: what is there stays.
    for id in ["one", "two"] {
        run(id, &format!("file://{}", file.display()))?;
    }
    let mut lines: Vec<_> = fs::read_to_string(&file)?.lines().map(str::to_owned).collect();
    lines.sort();
    ensure_eq!(lines, ["err", "err", "out", "out"], "what is in the file");

    // Output is its descriptor 3, errors 4, and who has started it waits for 5. It is told to end when there is no more to come, and has
    // to read what is still there.
    let script = "#!/bin/sh\ntrap '' TERM\n{ echo \"$CONTAINER_NAMESPACE $CONTAINER_ID $*\"; exec 5>&-; sed 's/^/o /' <&3; sed 's/^/e /' <&4; } \
        >\"$2.part\"\nmv \"$2.part\" \"$2\"\n";
    fs::write(&logger, script)?;
    fs::set_permissions(&logger, fs::Permissions::from_mode(0o755))?;
    run("three", &format!("binary://{}?to={}", logger.display(), taken.display()))?;
    let until = Instant::now() + DEADLINE;
    while !taken.exists() {
        ensure!(Instant::now() < until, "the program has taken nothing");
        std::thread::sleep(Duration::from_millis(100));
    }
    let expected = format!("default three to {}\no out\ne err\n", taken.display());
    ensure_eq!(fs::read_to_string(&taken)?, expected, "what the program has taken");
    containerd.end()?;
    check(&before)
}
