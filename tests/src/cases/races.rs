//! Commands on one id at the same time, and processes that are killed while they work: whatever comes of it, `delete --force`
//! leaves nothing.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use super::podhull;
use crate::container::Container;
use crate::leaks::{Leaks, Totals};
use crate::run::{DEADLINE, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, processes};

pub const CASES: &[Case] = &[
    podhull("races::two_commands_on_one_container", two_commands_on_one_container),
    podhull("races::a_creation_killed_at_any_system_call", a_creation_killed_at_any_system_call),
    podhull("races::any_process_is_killed_at_any_time", any_process_is_killed_at_any_time),
];

/// Commands that change a container, `ID` in the place of its id.
const COMMANDS: [&[&str]; 11] = [
    &["start", "ID"],
    &["kill", "ID", "KILL"],
    &["delete", "--force", "ID"],
    &["pause", "ID"],
    &["resume", "ID"],
    &["exec", "ID", "true"],
    &["update", "--pids-limit", "50", "ID"],
    &["delete", "ID"],
    &["state", "ID"],
    &["ps", "ID"],
    &["events", "--stats", "ID"],
];

/// What may be said of a container that another command changes meanwhile.
const EXPECTED: [&str; 13] = [
    "does not exist",
    "container not running",
    "container not paused",
    "that is not stopped",
    "cannot start",
    "is not running",
    "is paused",
    "paused container",
    "paused state",
    "has stopped",
    "is stopped",
    "ended",
    "gone",
];

fn line(scene: &Scene, command: &[&str], id: &str) -> Vec<OsString> {
    let words = command.iter().map(|word| OsString::from(if *word == "ID" { id } else { word }));
    [scene.runtime.program().into()].into_iter().chain(words).collect()
}

/// A number below `bound`, other at each call.
fn random(bound: usize) -> Outcome<usize> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok((u64::from_ne_bytes(bytes) % bound as u64) as usize)
}

fn two_commands_on_one_container(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    for _ in 0..scene.repeat.min(200) {
        let bundle = scene.debian()?.sh("exec sleep 1000");
        let container = Container::make(scene, &bundle, if random(2)? == 0 { &["create"] } else { &["run", "-d"] })?;
        let pair = [COMMANDS[random(COMMANDS.len())?], COMMANDS[random(COMMANDS.len())?]];
        let running = pair.map(|command| Running::start(&line(scene, command, &container.id), &[]));
        for (command, running) in pair.iter().zip(running) {
            let ended = running?.wait().map_err(|error| format!("{pair:?}: {command:?}: {error}"))?;
            let known = EXPECTED.iter().any(|words| ended.stderr.contains(words));
            ensure!(ended.status == 0 || known, "{pair:?}: {command:?}: status {}, {:?}", ended.status, ended.stderr);
        }
        container.end().map_err(|error| format!("{pair:?}: {error}"))?;
        before.check().map_err(|error| format!("{pair:?}: {error}"))?;
    }
    Ok(())
}

/// A command that leaves a container behind, which keeps its output open.
struct Creation {
    id: String,
    child: Child,
    output: PathBuf,
    /// Whether it succeeded.
    ended: Option<bool>,
}

impl Creation {
    /// `before` goes before the command line, `command` are the words of it up to the bundle.
    fn start(scene: &Scene, before: &[&str], command: &[&str], bundle: &Path) -> Outcome<Self> {
        let id = scene.id();
        let output = scene.directory.join(format!("{id}.out"));
        let file = File::create(&output)?;
        let program = scene.runtime.program();
        let mut words = before.iter().map(OsStr::new).chain([program.as_ref()]).chain(command.iter().map(OsStr::new));
        let mut child = Command::new(words.next().ok_or("no program")?);
        child.args(words).arg("-b").arg(bundle).arg(&id);
        let child = child.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0).spawn()?;
        Ok(Self { id, child, output, ended: None })
    }

    /// Waits for the command; returns whether it succeeded, and what it said.
    fn wait(&mut self) -> Outcome<(bool, String)> {
        if self.ended.is_none() {
            let pidfd = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())?;
            let ready = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&Timespec::try_from(DEADLINE)?))?;
            ensure!(ready == 1, "it did not end; it said {:?}", fs::read_to_string(&self.output)?);
            self.ended = Some(self.child.wait()?.success());
        }
        Ok((self.ended == Some(true), fs::read_to_string(&self.output)?))
    }

    /// Deletes what there is of it.
    fn end(mut self, scene: &Scene, what: &str) -> Outcome {
        let (_, said) = self.wait().map_err(|error| format!("{what}: {error}"))?;
        let deleted = scene.call(&["delete", "--force", &self.id])?;
        ensure!(deleted.status == 0, "{what}: {:?}; the command said {said:?}", deleted.stderr);
        Ok(scene.sweep().map_err(|error| format!("{what}: {error}"))?)
    }
}

/// A process of the creation is killed when it enters a certain system call for a certain time; which, strace(1) found out in a
/// creation that nobody disturbed.
fn a_creation_killed_at_any_system_call(scene: &Scene) -> Outcome {
    let bundle = scene.debian()?.sh("exec sleep 1000");
    bundle.write()?;
    // The tracer is not to be waited for: it stays as long as anything that it traces.
    let create = |trace: &[&str]| {
        let before = [&["strace", "-D", "-f", "-qq"], trace].concat();
        Creation::start(scene, &before, &["create"], &bundle.directory)
    };
    let file = scene.directory.join("trace");
    let mut whole = create(&["-o", &file.to_string_lossy()])?;
    let (succeeded, said) = whole.wait()?;
    ensure!(succeeded, "{said}");
    whole.end(scene, "nothing")?;
    let steps = steps(&fs::read_to_string(&file)?);
    ensure!(steps.len() > 50, "only {} system calls were seen", steps.len());
    let count = scene.repeat.min(200);
    for number in 0..count {
        let before = Leaks::watch();
        let (call, nth) = &steps[(number * steps.len() + random(steps.len())?) / count];
        let what = format!("inject={call}:signal=KILL:when={nth}");
        let trace = ["--seccomp-bpf", "-o", "/dev/null", "-e", &format!("trace={call}"), "-e", &what];
        create(&trace)?.end(scene, &what)?;
        before.check().map_err(|error| format!("{what}: {error}"))?;
    }
    Ok(())
}

/// Names of system calls, and the how many-th of its name in its thread each was: of all threads, without repetition, in their
/// order.
fn steps(trace: &str) -> Vec<(String, usize)> {
    let mut seen = BTreeMap::<(&str, &str), usize>::new();
    let mut steps = Vec::new();
    for line in trace.lines() {
        let Some((thread, call)) = line.split_once(' ') else { continue };
        let Some((name, _)) = call.trim_start().split_once('(') else { continue };
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            continue;
        }
        let nth = seen.entry((thread, name)).or_default();
        *nth += 1;
        let step = (name.to_owned(), *nth);
        if !steps.contains(&step) {
            steps.push(step);
        }
    }
    steps
}

fn any_process_is_killed_at_any_time(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let bundle = scene.debian()?.sh("exec sleep 1000");
    bundle.write()?;
    let began = Instant::now();
    let container = Container::make(scene, &bundle, &["run", "-d"])?;
    container.end()?;
    let whole = began.elapsed();
    let mut first = None;
    for _ in 0..scene.repeat.clamp(10, 200) {
        let began = Instant::now();
        let run = Creation::start(scene, &[], &["run", "--detach"], &bundle.directory)?;
        let until = began + whole * u32::try_from(random(100)?)? / 100;
        thread::sleep(until.saturating_duration_since(Instant::now()));
        let family = processes::descendants(std::process::id().cast_signed());
        let ours: Vec<_> = family.iter().filter(|process| process.command.starts_with("podhull")).collect();
        let mut victim = "nobody".to_owned();
        if !ours.is_empty() {
            let process = ours[random(ours.len())?];
            victim.clone_from(&process.command);
            if let Some(pid) = Pid::from_raw(process.pid) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        run.end(scene, &format!("{victim} was killed"))?;
        before.check().map_err(|error| format!("{victim} was killed: {error}"))?;
        // After the first of it, which fills caches of the kernel's own.
        if first.is_none() {
            first = Some(Totals::now()?);
        }
    }
    let (first, last) = (first.ok_or("nothing was done")?, Totals::now()?);
    ensure!(last.files - first.files < 100, "{} open files at first, {} at last", first.files, last.files);
    Ok(())
}
