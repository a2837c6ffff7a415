//! Commands on what is not as it should be: no container, a state that cannot be read, a machine that is gone or stands still.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use super::config::Configuration;
use super::podhull;
use crate::container::Container;
use crate::leaks::Leaks;
use crate::run::{DEADLINE, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq, processes};

pub const CASES: &[Case] = &[
    podhull("broken::an_unknown_id", an_unknown_id),
    podhull("broken::a_state_that_cannot_be_read", a_state_that_cannot_be_read),
    podhull("broken::a_machine_that_is_gone", a_machine_that_is_gone),
    podhull("broken::a_machine_that_stands_still", a_machine_that_stands_still),
];

/// Every command that takes the id of a container; it goes in the place of `ID`.
pub const COMMANDS: [&[&str]; 13] = [
    &["state", "ID"],
    &["start", "ID"],
    &["kill", "ID", "TERM"],
    &["kill", "--all", "ID", "KILL"],
    &["exec", "ID", "true"],
    &["exec", "--detach", "ID", "true"],
    &["ps", "ID"],
    &["pause", "ID"],
    &["resume", "ID"],
    &["update", "--pids-limit", "5", "ID"],
    &["events", "--stats", "ID"],
    &["events", "ID"],
    &["delete", "ID"],
];

/// Every command that looks at a pod.
pub const LOOKS: [&[&str]; 6] = [
    &["pods", "ID"],
    &["metrics", "ID"],
    &["trace", "ID"],
    &["logs", "--guest", "ID"],
    &["logs", "--guest", "--format", "json", "--bytes", "1000", "ID"],
    &["debug", "ID", "-c", "true"],
];

pub fn words(command: &[&str], id: &str) -> Vec<String> {
    command.iter().map(|word| if *word == "ID" { id } else { word }.to_owned()).collect()
}

fn call(scene: &Scene, words: &[String]) -> Outcome<crate::run::Ended> {
    scene.call(&words.iter().map(String::as_str).collect::<Vec<_>>())
}

/// The command fails with one line that has all of these in it.
fn refused(scene: &Scene, words: &[String], names: &[&str]) -> Outcome {
    let ended = call(scene, words)?;
    ensure!(ended.status != 0 && ended.stdout.is_empty(), "{words:?}: status {}, {:?}", ended.status, ended.stdout);
    ensure_eq!(ended.stderr.lines().count(), 1, "{words:?}: lines of {:?}", ended.stderr);
    for name in names {
        ensure!(ended.stderr.contains(name), "{words:?}: no {name:?} in {:?}", ended.stderr);
    }
    Ok(())
}

fn an_unknown_id(scene: &Scene) -> Outcome {
    for command in COMMANDS {
        refused(scene, &words(command, "nobody"), &["\"nobody\" does not exist"])?;
        refused(scene, &words(command, "../etc"), &["../etc"])?;
    }
    scene.call(&["delete", "--force", "nobody"])?.output()?;
    let _host = with_debug_shell()?;
    for command in LOOKS {
        refused(scene, &words(command, "nobody"), &["\"nobody\""])?;
        refused(scene, &words(command, "../etc"), &["../etc"])?;
    }
    Ok(())
}

/// `podhull debug` is off on a host without this.
fn with_debug_shell() -> Outcome<Configuration> {
    let host = Configuration::new()?;
    host.write("config.toml", "[debug]\nshell = \"/bin/busybox\"\n")?;
    Ok(host)
}

fn a_state_that_cannot_be_read(scene: &Scene) -> Outcome {
    let newer = |text: &str| text.replace("\"version\":1,", "\"version\":99,");
    let cut = |text: &str| text[..text.len() / 2].to_owned();
    let another_s = |text: &str| text.replace("\"id\":\"", "\"id\":\"x");
    let binary = |_: &str| "\0\u{1}".to_owned();
    let changes: [&dyn Fn(&str) -> String; 4] = [&newer, &cut, &binary, &another_s];
    for (change, what) in changes.into_iter().zip(["newer podhull", "EOF", "line 1", "it is that of"]) {
        let before = Leaks::watch();
        let container = Container::make(scene, &scene.debian()?.sh("exec sleep 1000"), &["run", "-d"])?;
        let file = PathBuf::from("/run/podhull").join(&container.id).join("state.json");
        let text = fs::read_to_string(&file)?;
        let changed = change(&text);
        ensure!(changed != text, "{what}: nothing was changed in {text}");
        fs::write(&file, changed)?;
        for command in COMMANDS {
            let names = [&*file.to_string_lossy(), what, "podhull delete --force"];
            refused(scene, &words(command, &container.id), &names)?;
        }
        // Others are not concerned.
        scene.call(&["list", "-q"])?.output()?;
        scene.call(&["delete", "--force", &container.id])?.output()?;
        ensure_eq!(container.wait()?, 137, "exit status");
        before.check().map_err(|error| format!("{what}: {error}"))?;
    }
    Ok(())
}

/// The process of the only machine there is.
fn machine() -> Outcome<Pid> {
    let all = processes::all();
    let machine = all.iter().find(|process| process.command.starts_with("podhull vmm"));
    Ok(machine.and_then(|process| Pid::from_raw(process.pid)).ok_or("no machine")?)
}

fn a_machine_that_is_gone(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    for created in [true, false] {
        let bundle = scene.debian()?.sh("exec sleep 1000");
        let container = Container::make(scene, &bundle, if created { &["create"] } else { &["run", "-d"] })?;
        kill_process(machine()?, Signal::KILL)?;
        ensure_eq!(container.wait()?, 137, "exit status of the shadow");
        ensure_eq!(container.status()?, "stopped", "status");
        for command in COMMANDS {
            let id = &container.id;
            match command {
                ["state", ..] | ["delete", ..] => continue,
                // As with runc: to end all of what has ended is no error, and it has no processes.
                ["kill", "--all", ..] | ["ps", ..] => drop(call(scene, &words(command, id))?.output()?),
                _ => refused(scene, &words(command, id), &[id])?,
            }
        }
        container.delete()?;
        before.check()?;
    }
    Ok(())
}

/// All commands end within their deadline, and one that ends the container needs nothing of the machine.
fn a_machine_that_stands_still(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let _host = with_debug_shell()?;
    let container = Container::make(scene, &scene.debian()?.sh("exec sleep 1000"), &["run", "-d"])?;
    kill_process(machine()?, Signal::STOP)?;
    let began = Instant::now();
    let mut running = Vec::new();
    for command in COMMANDS.iter().chain(&LOOKS) {
        // These ask nothing inside, or wait for events as long as there is a container.
        if matches!(command, ["state" | "start" | "delete" | "ps", ..] | ["events", "ID"]) {
            continue;
        }
        let words = words(command, &container.id);
        let mut all = vec![scene.runtime.program().into()];
        all.extend(words.iter().map(Into::into));
        running.push((words, Running::start(&all, &[])?));
    }
    ensure_eq!(container.status()?, "running", "status");
    for (words, running) in running {
        let ended = running.wait()?;
        // What the host has counted itself can be had all the same.
        if ["pods", "metrics", "trace"].contains(&&*words[0]) {
            ensure!(ended.status == 0 && !ended.stdout.is_empty(), "{words:?}: {ended:?}");
            continue;
        }
        ensure!(ended.status != 0, "{words:?} succeeded");
        ensure_eq!(ended.stderr.lines().count(), 1, "{words:?}: lines of {:?}", ended.stderr);
    }
    ensure!(began.elapsed() < DEADLINE, "it took {:?}", began.elapsed());
    scene.call(&["delete", "--force", &container.id])?.output()?;
    ensure_eq!(container.wait()?, 137, "exit status");
    before.check()
}
