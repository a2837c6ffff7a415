//! Hooks: programs of the caller's on the host, at points of a container's life.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::oci;
use crate::bundle::Bundle;
use crate::container::Container;
use crate::leaks::Leaks;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("hooks::each_at_its_time_with_the_state", each_at_its_time_with_the_state),
    oci("hooks::one_that_fails_ends_the_container", one_that_fails_ends_the_container),
    oci("hooks::one_that_takes_too_long", one_that_takes_too_long),
    oci("hooks::files_go_both_ways", files_go_both_ways),
];

/// The lists whose hooks run on the host, in the order they run in.
const KINDS: [&str; 5] = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"];

/// One that appends its name, what its environment says, its namespaces, and the state it is told, to a file.
fn hook(kind: &str, log: &Path) -> Value {
    let script = format!(
        "echo \"{kind} $WORD $(pwd) $(readlink /proc/self/ns/net /proc/self/ns/uts | tr '\\n' ' ')$(cat)\" >> {}",
        log.display()
    );
    json!([{ "path": "/bin/sh", "args": ["hook", "-c", script], "env": ["WORD=said", "PATH=/usr/bin:/bin"] }])
}

fn with_hooks(scene: &Scene, log: &Path, script: &str) -> Outcome<Bundle> {
    let bundle = scene.debian()?.set("/annotations", json!({ "a.b": "c" })).sh(script);
    Ok(KINDS.iter().fold(bundle, |bundle, kind| bundle.set(&format!("/hooks/{kind}"), hook(kind, log))))
}

fn each_at_its_time_with_the_state(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let log = scene.directory.join("hooks.log");
    let bundle = with_hooks(scene, &log, "exec sleep 1000")?;
    let namespaces = |pid: &str| -> Outcome<[String; 2]> {
        let read = |kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
        Ok([read("net")?.to_string_lossy().into_owned(), read("uts")?.to_string_lossy().into_owned()])
    };
    let heard = || -> Outcome<Vec<String>> {
        Ok(fs::read_to_string(&log).unwrap_or_default().lines().map(str::to_owned).collect())
    };
    let container = Container::create(scene, &bundle)?;
    ensure_eq!(heard()?.len(), 3, "hooks after create: {:?}", heard()?);
    let pid = container.pid.as_raw_nonzero().to_string();
    let (host, inside) = (namespaces("self")?, namespaces(&pid)?);
    container.start()?;
    ensure_eq!(heard()?.len(), 4, "hooks after start: {:?}", heard()?);
    container.call(&["kill", &container.id, "KILL"])?.output()?;
    ensure_eq!(container.wait()?, 137, "exit status");
    ensure_eq!(heard()?.len(), 4, "hooks after the end");
    container.delete()?;
    let heard = heard()?;
    ensure_eq!(heard.len(), 5, "hooks after delete: {heard:?}");
    for (line, kind) in heard.iter().zip(KINDS) {
        let mut words = line.splitn(6, ' ');
        let mut next = || words.next().unwrap_or_default();
        ensure_eq!((next(), next()), (kind, "said"), "name and environment of {line:?}");
        ensure_eq!(Path::new(next()), bundle.directory, "directory of {line:?}");
        let expected = if kind == "createContainer" { &inside } else { &host };
        ensure_eq!([next().to_owned(), next().to_owned()], *expected, "namespaces of {kind}");
        let state: Value = serde_json::from_str(next())?;
        let status = match kind {
            "poststart" => "running",
            "poststop" => "stopped",
            _ => "creating",
        };
        ensure_eq!(state["status"], Value::from(status), "status of {line:?}");
        ensure_eq!(state["id"], Value::from(container.id.as_str()), "id of {line:?}");
        ensure_eq!(state["bundle"], Value::from(bundle.directory.to_string_lossy()), "bundle of {line:?}");
        ensure_eq!(state["annotations"]["a.b"], Value::from("c"), "annotations of {line:?}");
        if kind != "poststop" {
            ensure_eq!(state["pid"].to_string(), pid, "pid of {line:?}");
        }
    }
    before.check()?;

    // In the foreground all of them come with one command.
    fs::remove_file(&log)?;
    scene.run(&with_hooks(scene, &log, "exit 7")?)?.expect_status(7)?;
    let heard = fs::read_to_string(&log)?;
    let kinds: Vec<&str> = heard.lines().filter_map(|line| line.split(' ').next()).collect();
    ensure_eq!(kinds, KINDS, "hooks of a run");
    before.check()
}

fn one_that_fails_ends_the_container(scene: &Scene) -> Outcome {
    for kind in &KINDS[..4] {
        let before = Leaks::watch();
        let log = scene.directory.join(format!("{kind}.log"));
        let script = "echo said on stderr >&2; exit 5";
        let bundle = scene
            .debian()?
            .set(&format!("/hooks/{kind}"), json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }]))
            .set("/hooks/poststop", hook("poststop", &log))
            .sh("exec sleep 1000");
        let ended = scene.run(&bundle)?;
        ensure!(ended.status != 0, "{kind}: exit status 0");
        for what in ["hook #0", "said on stderr"] {
            ensure!(ended.stderr.contains(what), "{kind}: no {what:?} in {:?}", ended.stderr);
        }
        ensure!(fs::read_to_string(&log).is_ok_and(|log| log.starts_with("poststop")), "{kind}: no poststop");
        before.check()?;
    }
    // Nothing can be undone by then.
    let bundle = scene.debian()?.set("/hooks/poststop", json!([{ "path": "/bin/false" }])).sh("exit 3");
    scene.run(&bundle)?.expect_status(3).map(drop)
}

fn one_that_takes_too_long(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let hooks = json!([{ "path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1 }]);
    let ended = scene.run(&scene.debian()?.set("/hooks/createRuntime", hooks).sh("echo never"))?;
    ensure!(ended.status != 0 && ended.stdout.is_empty(), "{}: {:?}", ended.status, ended.stdout);
    ensure!(ended.stderr.contains("ran past specified timeout of 1"), "{:?}", ended.stderr);
    before.check()
}

fn files_go_both_ways(scene: &Scene) -> Outcome {
    let bundle = scene.busybox()?.writable();
    let root = bundle.directory.join("rootfs");
    let write = format!("echo from the hook > {}/etc/hook", root.display());
    let read = format!("cat {}/etc/container > {}/seen", root.display(), scene.directory.display());
    let bundle = bundle
        .set("/hooks/createRuntime", json!([{ "path": "/bin/sh", "args": ["sh", "-c", write] }]))
        .set("/hooks/poststop", json!([{ "path": "/bin/sh", "args": ["sh", "-c", read] }]))
        .sh("cat /etc/hook; echo from the container > /etc/container");
    ensure_eq!(scene.run(&bundle)?.output()?, "from the hook\n", "what the container reads");
    ensure_eq!(fs::read_to_string(scene.directory.join("seen"))?, "from the container\n", "what the hook reads");
    Ok(())
}
