//! What is done to a container that is there: pause, resume, update, events, ps, exec.

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{oci, podhull};
use crate::container::Container;
use crate::leaks::Leaks;
use crate::run::{DEADLINE, Running};
use crate::runtime::Runtime;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("commands::paused_and_resumed", paused_and_resumed),
    oci("commands::a_paused_container_is_killed_or_deleted", a_paused_container_is_killed_or_deleted),
    oci("commands::paused_before_it_was_started", paused_before_it_was_started),
    oci("commands::update_changes_what_is_given", update_changes_what_is_given),
    podhull("commands::update_names_what_is_wrong", update_names_what_is_wrong),
    oci("commands::statistics_as_runc_has_them", statistics_as_runc_has_them),
    oci("commands::events_until_the_end", events_until_the_end),
];

/// Refused with a status, and words on standard error.
fn refused(scene: &Scene, words: &[&str], status: i32, what: &str) -> Outcome {
    let ended = scene.call(words)?;
    ensure!(
        ended.status == status && ended.stderr.contains(what),
        "{words:?}: status {}, stderr {:?} instead of {status}, {what:?}",
        ended.status,
        ended.stderr
    );
    Ok(())
}

/// The words that call the program under test.
fn words(scene: &Scene, arguments: &[&str]) -> Vec<std::ffi::OsString> {
    let program = scene.runtime.program().into();
    std::iter::once(program).chain(arguments.iter().map(Into::into)).collect()
}

/// Waits until the output stands still, and fails if it does not.
fn expect_silence(container: &Container<'_>) -> Outcome {
    let began = Instant::now();
    loop {
        let before = container.output()?.len();
        thread::sleep(Duration::from_secs(1));
        if container.output()?.len() == before {
            return Ok(());
        }
        ensure!(began.elapsed() < Duration::from_secs(10), "a paused container still writes");
    }
}

fn expect_growth(container: &Container<'_>) -> Outcome {
    let (began, before) = (Instant::now(), container.output()?.len());
    while container.output()?.len() == before {
        ensure!(began.elapsed() < DEADLINE, "a resumed container writes nothing");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

const COUNT: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";

fn paused_and_resumed(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let container = Container::make(scene, &scene.debian()?.sh(COUNT), &["run", "-d"])?;
    let id = container.id.as_str();
    container.expect_output("3\n")?;
    refused(scene, &["resume", id], 1, "container not paused")?;
    for _ in 0..3 {
        ensure_eq!(scene.call(&["pause", id])?.output()?, "", "output of pause");
        ensure_eq!(container.status()?, "paused", "status");
        expect_silence(&container)?;
        ensure_eq!(scene.call(&["resume", id])?.output()?, "", "output of resume");
        ensure_eq!(container.status()?, "running", "status");
        expect_growth(&container)?;
    }
    scene.call(&["pause", id])?.output()?;
    ensure!(scene.call(&["list"])?.output()?.lines().any(|line| line.contains(id) && line.contains("paused")), "list");
    refused(scene, &["pause", id], 1, "container not running")?;
    refused(scene, &["start", id], 1, "cannot start a container in the paused state")?;
    refused(scene, &["delete", id], 1, "that is not stopped: paused")?;
    refused(scene, &["exec", id, "true"], 255, "cannot exec in a paused container (use --ignore-paused to override)")?;
    // It waits in there for its time to come.
    let mut exec = Running::start(&words(scene, &["exec", "--ignore-paused", id, "echo", "further"]), &[])?;
    ensure!(exec.wait_open(Duration::from_secs(3)).is_err(), "something ran in a paused container");
    scene.call(&["resume", id])?.output()?;
    ensure_eq!(exec.wait()?.output()?, "further\n", "output of what was executed");
    scene.call(&["kill", id, "KILL"])?.output()?;
    ensure_eq!(container.wait()?, 137, "exit status");
    refused(scene, &["pause", id], 1, "container not running")?;
    refused(scene, &["resume", id], 1, "container not paused")?;
    container.delete()?;
    refused(scene, &["pause", id], 1, "does not exist")?;
    refused(scene, &["resume", id], 1, "does not exist")?;
    before.check()
}

fn a_paused_container_is_killed_or_deleted(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let container = Container::make(scene, &scene.debian()?.sh(COUNT), &["run", "-d"])?;
    container.expect_output("1\n")?;
    scene.call(&["pause", &container.id])?.output()?;
    scene.call(&["kill", &container.id, "KILL"])?.output()?;
    ensure_eq!(container.wait()?, 137, "exit status");
    ensure_eq!(container.status()?, "stopped", "status");
    container.delete()?;

    let container = Container::make(scene, &scene.debian()?.sh(COUNT), &["run", "-d"])?;
    scene.call(&["pause", &container.id])?.output()?;
    scene.call(&["delete", "--force", &container.id])?.output()?;
    ensure_eq!(container.wait()?, 137, "exit status");
    refused(scene, &["state", &container.id], 1, "does not exist")?;
    before.check()
}

fn paused_before_it_was_started(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let container = Container::create(scene, &scene.debian()?.sh("echo out; exit 3"))?;
    scene.call(&["pause", &container.id])?.output()?;
    ensure_eq!(container.status()?, "paused", "status");
    refused(scene, &["start", &container.id], 1, "cannot start a container in the paused state")?;
    scene.call(&["resume", &container.id])?.output()?;
    ensure_eq!(container.status()?, "created", "status");
    container.start()?;
    ensure_eq!(container.wait()?, 3, "exit status");
    ensure_eq!(container.output()?, "out\n", "output");
    container.delete()?;
    before.check()
}

/// Files of the container's control group, as it sees them itself.
fn limits(container: &Container<'_>) -> Outcome<String> {
    let script = "cd /sys/fs/cgroup; cat memory.max memory.low cpu.max cpu.weight pids.max";
    Ok(container.call(&["exec", &container.id, "sh", "-c", script])?.output()?.replace('\n', " "))
}

fn update_changes_what_is_given(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let resources = json!({ "memory": { "limit": 128 << 20 }, "pids": { "limit": 100 } });
    let bundle = scene.debian()?.set("/linux/resources", resources).sh("exec sleep 1000");
    let container = Container::make(scene, &bundle, &["run", "-d"])?;
    let id = container.id.as_str();
    ensure_eq!(limits(&container)?, "134217728 0 max 100000 100 100 ", "limits before");
    for (options, expected) in [
        (&["--memory", "96m"][..], "100663296 0 max 100000 100 100 "),
        (&["--memory-reservation", "33554432", "--pids-limit", "20"], "100663296 33554432 max 100000 100 20 "),
        (&["--cpu-quota", "30000", "--cpu-period", "60000"], "100663296 33554432 30000 60000 100 20 "),
        (&["--cpu-quota=-1"], "100663296 33554432 max 60000 100 20 "),
        (&["--pids-limit", "-1"], "100663296 33554432 max 60000 100 max "),
        (&["--kernel-memory", "5m"], "100663296 33554432 max 60000 100 max "),
    ] {
        let words = [&["update"], options, &[id]].concat();
        ensure_eq!(scene.call(&words)?.output()?, "", "output of {options:?}");
        ensure_eq!(limits(&container)?, expected, "limits after {options:?}");
    }
    // From a file, and from standard input; other options are ignored then.
    let file = scene.directory.join("resources.json");
    std::fs::write(&file, r#"{"pids": {"limit": 40}, "memory": {}, "cpu": {"cpus": ""}, "blockIO": {"weight": 0}}"#)?;
    scene.call(&["update", "-r", &file.to_string_lossy(), "--pids-limit", "7", id])?.output()?;
    ensure_eq!(limits(&container)?, "100663296 33554432 max 60000 100 40 ", "limits from a file");
    let mut update = Running::start(&words(scene, &["update", "--resources=-", id]), &[])?;
    update
        .send(br#"{"memory": {"limit": 83886080}, "cpu": {"quota": 20000, "period": 60000}, "pids": {"limit": 50}}"#)?;
    update.wait()?.output()?;
    ensure_eq!(limits(&container)?, "83886080 33554432 20000 60000 100 50 ", "limits from standard input");
    refused(scene, &["update", "--memory", "much", id], 1, "invalid value for")?;
    refused(scene, &["update", "--cpu-period", "-5", id], 1, "invalid value for")?;
    refused(scene, &["update", "-r", "/no/such", id], 1, "no such file or directory")
        .or_else(|_| refused(scene, &["update", "-r", "/no/such", id], 1, "No such file or directory"))?;
    ensure_eq!(limits(&container)?, "83886080 33554432 20000 60000 100 50 ", "limits after mistakes");
    scene.call(&["pause", id])?.output()?;
    scene.call(&["update", "--pids-limit", "60", id])?.output()?;
    scene.call(&["resume", id])?.output()?;
    ensure_eq!(limits(&container)?, "83886080 33554432 20000 60000 100 60 ", "limits set while it was paused");
    scene.call(&["kill", id, "KILL"])?.output()?;
    ensure_eq!(container.wait()?, 137, "exit status");
    refused(scene, &["update", "--pids-limit", "60", id], 1, "container not running")?;
    container.delete()?;
    refused(scene, &["update", "--pids-limit", "60", id], 1, "does not exist")?;
    before.check()
}

fn update_names_what_is_wrong(scene: &Scene) -> Outcome {
    let container = Container::make(scene, &scene.debian()?.sh("exec sleep 1000"), &["run", "-d"])?;
    let id = container.id.as_str();
    for (options, what) in [
        (&["--memory", "999t"][..], "--memory: "),
        (&["--cpu-rt-period", "1000"], "--cpu-rt-period: not supported: "),
        (&["--cpu-period", "5"], "--cpu-period: is not between 1000 and 1000000"),
        (&["--cpuset-cpus", "0-x"], "--cpuset-cpus: \"0-x\" is not a list"),
        (&["--cpuset-cpus", "63"], "--cpuset-cpus"),
        (&["--blkio-weight", "5"], "--blkio-weight: expected 10 to 1000"),
        (&["--memory-swap", "64m"], "--memory-swap: "),
        (&["--l3-cache-schema", "L3:0=f"], "--l3-cache-schema: not supported"),
        (&["--mem-bw-schema", "MB:0=20"], "--mem-bw-schema: not supported"),
    ] {
        let words = [&["update"], options, &[id]].concat();
        let ended = scene.call(&words)?.expect_status(1)?;
        ensure!(ended.stderr.contains(what), "{options:?}: {:?} does not say {what:?}", ended.stderr);
        ensure_eq!(ended.stderr.lines().count(), 1, "{options:?}: lines of {:?}", ended.stderr);
    }
    let file = scene.directory.join("resources.json");
    let path = file.to_string_lossy().into_owned();
    for (text, what) in [
        ("{", format!("{path}: EOF")),
        ("[]", format!("{path}: expected an object")),
        (r#"{"memory": {"kernel": 5}}"#, format!("{path}: memory.kernel: not supported")),
        (r#"{"pids": {"limit": "x"}}"#, format!("{path}: pids.limit: invalid type")),
    ] {
        std::fs::write(&file, text)?;
        refused(scene, &["update", "-r", &path, id], 1, &what)?;
    }
    scene.call(&["delete", "--force", id])?.output()?;
    container.wait().map(drop)
}

/// All keys of a document, by their paths; what a host has for itself, such as sizes of huge pages, is left out.
fn keys(path: &str, value: &Value, found: &mut BTreeSet<String>) {
    if let Value::Object(members) = value {
        for (key, member) in members {
            let path = format!("{path}/{key}");
            found.insert(path.clone());
            if !matches!(path.as_str(), "/data/memory/raw" | "/data/hugetlb" | "/data/blkio") {
                keys(&path, member, found);
            }
        }
    }
}

fn statistics_as_runc_has_them(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let resources = json!({ "memory": { "limit": 128 << 20 }, "pids": { "limit": 100 }, "cpu": { "quota": 10000, "period": 100_000 } });
    let bundle = scene.debian()?.set("/linux/resources", resources);
    let bundle = bundle.sh("timeout 3 sh -c 'while :; do :; done'; echo ready; exec sleep 1000");
    let container = Container::make(scene, &bundle, &["run", "-d"])?;
    container.expect_output("ready")?;
    let text = scene.call(&["events", "--stats", &container.id])?.output()?;
    ensure!(text.ends_with('\n') && text.lines().count() == 1, "lines of {text:?}");
    let line: Value = serde_json::from_str(&text)?;
    ensure_eq!((&line["type"], &line["id"]), (&json!("stats"), &json!(container.id)), "whose statistics");
    let data = &line["data"];
    let number = |pointer: &str| data.pointer(pointer).and_then(Value::as_u64).unwrap_or_default();
    ensure_eq!(number("/memory/usage/limit"), 128 << 20, "memory limit of {data}");
    ensure_eq!((number("/pids/current"), number("/pids/limit")), (1, 100), "pids of {data}");
    let usage = number("/memory/usage/usage");
    ensure!(usage > 0 && usage < 128 << 20, "memory usage {usage}");
    // A tenth of a processor for three seconds or more.
    let (total, parts) = (number("/cpu/usage/total"), number("/cpu/usage/user") + number("/cpu/usage/kernel"));
    ensure!(total > 100_000_000 && parts.abs_diff(total) <= total / 10, "processor time {total}, parts {parts}");
    ensure!(number("/cpu/throttling/throttledPeriods") > 0, "never throttled: {data}");
    scene.call(&["delete", "--force", &container.id])?.output()?;
    container.wait()?;
    before.check()?;
    if scene.runtime.name() == "runc" {
        return Ok(());
    }
    // The same container by runc: each key it has there we have too.
    let runc = Runtime::runc()?;
    let id = scene.id();
    let run = |arguments: &[&str]| {
        let words = std::iter::once(runc.program().into()).chain(arguments.iter().map(Into::into)).collect::<Vec<_>>();
        Running::start(&words, &[])?.wait()
    };
    let status = std::process::Command::new(runc.program())
        .args(["run", "-d", "-b"])
        .arg(&bundle.directory)
        .arg(&id)
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()?;
    ensure!(status.success(), "runc run: {status}");
    let theirs: Value = serde_json::from_str(&run(&["events", "--stats", &id])?.output()?)?;
    run(&["delete", "--force", &id])?.output()?;
    let (mut expected, mut found) = (BTreeSet::new(), BTreeSet::new());
    keys("", &theirs, &mut expected);
    keys("", &line, &mut found);
    let missing: Vec<_> = expected.difference(&found).collect();
    ensure!(missing.is_empty(), "keys that runc has and we lack: {missing:?}; ours: {line}");
    Ok(())
}

fn events_until_the_end(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let bundle = scene.debian()?.set("/linux/resources", json!({ "memory": { "limit": 96 << 20 } }));
    let container = Container::make(scene, &bundle.sh("echo ready; exec sleep 1000"), &["run", "-d"])?;
    container.expect_output("ready")?;
    let id = container.id.as_str();
    refused(scene, &["events", "--interval", "0s", id], 1, "must be greater than 0")?;
    let mut events = Running::start(&words(scene, &["events", "--interval", "300ms", id]), &[])?;
    let mut next = || -> Outcome<Value> { Ok(serde_json::from_str(&events.line()?)?) };
    for _ in 0..3 {
        let line = next()?;
        ensure_eq!((&line["type"], &line["id"]), (&json!("stats"), &json!(id)), "line");
        ensure!(line["data"]["cpu"]["usage"]["total"].is_u64(), "line {line}");
    }
    // Another one killed for lack of memory; the container lives on.
    scene.call(&["exec", id, "sh", "-c", "tail /dev/zero; true"])?;
    let began = Instant::now();
    loop {
        let line = next()?;
        if line["type"] == "oom" {
            ensure_eq!(line, json!({ "type": "oom", "id": id }), "line");
            break;
        }
        ensure!(began.elapsed() < DEADLINE, "no line about memory");
    }
    // Who watches takes nothing from the container's own process: it still hears of the end.
    scene.call(&["kill", id, "KILL"])?.output()?;
    ensure_eq!(container.wait()?, 137, "exit status");
    events.wait()?.expect_status(0)?;
    refused(scene, &["events", "--stats", id], 1, "is not running")?;
    refused(scene, &["events", id], 1, "is not running")?;
    container.delete()?;
    refused(scene, &["events", "--stats", id], 1, "does not exist")?;
    before.check()
}
