//! What is killed in mid-run ends soon, says what happened, and leaves nothing.
//!
//! Each is done PODHULL_TEST_REPEAT times, at most 100. "Soon" is a second. It is the one absolute time in the suite, and
//! the emulated host with two slow processors is given [`LATEST`] for the slowest; the median has to keep the second.

use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::podhull;
use crate::leaks::Leaks;
use crate::processes;
use crate::run::{Ended, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    podhull("crashes::a_killed_machine", a_killed_machine),
    podhull("crashes::a_killed_run", a_killed_run),
    podhull("crashes::a_guest_kernel_panic", a_guest_kernel_panic),
    podhull("crashes::the_guest_console_has_the_panic", the_guest_console_has_the_panic),
    podhull("crashes::a_run_killed_while_it_starts", a_run_killed_while_it_starts),
];

/// The latest end after a kill that one of many may have.
const LATEST: Duration = Duration::from_secs(4);

fn repetitions(scene: &Scene) -> usize {
    scene.repeat.min(100)
}

/// A container that would run for long.
fn start(scene: &Scene) -> Outcome<Running> {
    let bundle = scene.debian()?.privileged().sh("echo ready; read line; echo c >/proc/sysrq-trigger; sleep 1000");
    let mut run = scene.start(&bundle)?;
    run.expect_line("ready")?;
    Ok(run)
}

/// The process that holds the virtual machine: the one with /dev/kvm open.
pub(super) fn machine(run: &Running) -> Outcome<Pid> {
    let opens_kvm = |pid: i32| {
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        descriptors
            .filter_map(|entry| std::fs::read_link(entry.path()).ok())
            .any(|path| path.to_string_lossy().contains("kvm-vm"))
    };
    let family = processes::descendants(run.pid());
    let machine = family.iter().find(|process| opens_kvm(process.pid));
    let machine = machine.ok_or_else(|| format!("no process with a virtual machine in {family:?}"))?;
    ensure!(machine.pid != run.pid(), "the machine is in the process of the run");
    Pid::from_raw(machine.pid).ok_or_else(|| "pid 0".into())
}

/// The times from kill to end of all repetitions.
fn check_times(mut times: Vec<Duration>) -> Outcome {
    times.sort();
    let (median, slowest) = (times[times.len() / 2], times[times.len() - 1]);
    ensure!(
        median <= Duration::from_secs(1) && slowest <= LATEST,
        "it took {median:?} in the median, {slowest:?} at most"
    );
    Ok(())
}

/// The run of a pod that broke: a status that says so, and one line that names what broke.
fn check_report(ended: &Ended, words: &[&str]) -> Outcome {
    ensure!(ended.status != 0 && ended.signal.is_none(), "exit status {}, stderr {:?}", ended.status, ended.stderr);
    let said = ended.stderr.to_lowercase();
    ensure!(words.iter().any(|word| said.contains(word)), "stderr {:?} names none of {words:?}", ended.stderr);
    ensure_eq!(ended.stderr.lines().count(), 1, "lines of {:?}", ended.stderr);
    Ok(())
}

fn a_killed_machine(scene: &Scene) -> Outcome {
    let mut times = Vec::new();
    for _ in 0..repetitions(scene) {
        let before = Leaks::watch();
        let mut run = start(scene)?;
        kill_process(machine(&run)?, Signal::KILL)?;
        let killed = Instant::now();
        let ended = run.wait_open(LATEST * 5)?;
        times.push(killed.elapsed());
        drop(run);
        check_report(&ended, &["virtual machine", "vmm", "machine"])?;
        ensure!(
            ended.stderr.contains("kill") || ended.stderr.contains('9'),
            "stderr {:?} does not say how",
            ended.stderr
        );
        before.check()?;
    }
    check_times(times)
}

fn a_killed_run(scene: &Scene) -> Outcome {
    let mut times = Vec::new();
    for _ in 0..repetitions(scene) {
        let before = Leaks::watch();
        let mut run = start(scene)?;
        run.signal(Signal::KILL)?;
        let killed = Instant::now();
        let ended = run.wait_open(LATEST * 5)?;
        ensure_eq!(ended.signal, Some(9), "signal of the run");
        while let [first, ..] = &processes::descendants(std::process::id().cast_signed())[..] {
            ensure!(killed.elapsed() < LATEST * 5, "{} {} still runs", first.pid, first.command);
            thread::sleep(Duration::from_millis(5));
        }
        times.push(killed.elapsed());
        drop(run);
        scene.sweep()?;
        before.check()?;
    }
    check_times(times)
}

fn a_guest_kernel_panic(scene: &Scene) -> Outcome {
    let mut times = Vec::new();
    for _ in 0..repetitions(scene) {
        let before = Leaks::watch();
        let mut run = start(scene)?;
        run.send(b"crash\n")?;
        let killed = Instant::now();
        let ended = run.wait_open(LATEST * 5)?;
        times.push(killed.elapsed());
        drop(run);
        check_report(&ended, &["panic"])?;
        before.check()?;
    }
    check_times(times)
}

fn the_guest_console_has_the_panic(scene: &Scene) -> Outcome {
    let console = scene.directory.join("console");
    let bundle = scene.debian()?.privileged().sh("echo c >/proc/sysrq-trigger; sleep 1000");
    bundle.write()?;
    let mut words = scene.runtime.run_words(&bundle.directory, &scene.id());
    words.splice(2..2, ["--guest-console".into(), console.clone().into()]);
    check_report(&Running::start(&words, &[])?.wait()?, &["panic"])?;
    let text = std::fs::read_to_string(&console)?;
    for line in ["Linux version", "sysrq: Trigger a crash", "Kernel panic"] {
        ensure!(text.contains(line), "no {line:?} among the {} lines of the console", text.lines().count());
    }
    Ok(())
}

/// Killed at moments spread over the whole of a start.
fn a_run_killed_while_it_starts(scene: &Scene) -> Outcome {
    let began = Instant::now();
    let before = Leaks::watch();
    let mut run = start(scene)?;
    let whole = began.elapsed();
    run.signal(Signal::KILL)?;
    run.wait_open(LATEST * 5)?;
    drop(run);
    scene.sweep()?;
    before.check()?;
    let steps = u32::try_from(repetitions(scene))?;
    for step in 0..steps {
        let before = Leaks::watch();
        let bundle = scene.debian()?.sh("sleep 1000");
        let mut run = scene.start(&bundle)?;
        thread::sleep(whole * step / steps);
        run.signal(Signal::KILL)?;
        run.wait_open(LATEST * 5)?;
        drop(run);
        scene.sweep()?;
        before.check().map_err(|error| format!("killed {:?} after its start: {error}", whole * step / steps))?;
    }
    Ok(())
}
