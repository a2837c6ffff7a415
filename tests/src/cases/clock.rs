//! The wall clock: containers have the host's, as it is and as it is set.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use super::oci;
use crate::cri::{Cri, PATIENT, container};
use crate::run::DEADLINE;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure};

pub const CASES: &[Case] =
    &[oci("clock::is_the_hosts", is_the_hosts), oci("clock::is_the_hosts_in_a_pod", is_the_hosts_in_a_pod)];

/// By how much a container's clock may be another than the host's.
const MOST: Duration = Duration::from_millis(100);

/// Set where this machine's clock is the tests' to set: in an emulated host (`tests/host/job/init`).
const MINE: &str = "PODHULL_TEST_SETS_CLOCK";

/// What the host's clock is set to, from what it was: far ahead, back, and a little ahead, which is a step as well.
const STEPS: [(&str, Duration); 3] = [
    ("set forward by an hour and a half", Duration::from_secs(5400)),
    ("set back", Duration::ZERO),
    ("set forward a little", Duration::from_millis(400)),
];

/// The host's clock, which is right again when this goes, whatever time has passed.
struct Clock {
    /// What it is ahead of the time since boot.
    since: Duration,
}

impl Clock {
    /// Unless it is a real machine's.
    fn of_the_host() -> Option<Self> {
        std::env::var_os(MINE)?;
        let ahead = |clock| Duration::try_from(clock_gettime(clock)).unwrap_or_default();
        Some(Self { since: ahead(ClockId::Realtime).saturating_sub(ahead(ClockId::Monotonic)) })
    }

    fn set(&self, ahead: Duration) -> Outcome {
        let now = clock_gettime(ClockId::Monotonic);
        let time = Duration::try_from(now)? + self.since + ahead;
        Ok(clock_settime(ClockId::Realtime, Timespec::try_from(time)?)?)
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        // If it cannot be set now it could not be before.
        let _ = self.set(Duration::ZERO);
    }
}

/// Waits until what a container takes for the time is the time. It says between which two moments its clock is.
fn right(when: &str, mut ask: impl FnMut() -> Outcome<RangeInclusive<Duration>>) -> Outcome {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH);
    let until = Instant::now() + DEADLINE;
    loop {
        let before = now()?;
        let told = ask()?;
        let after = now()?;
        let wrong = before.saturating_sub(*told.end()).max(told.start().saturating_sub(after));
        if wrong <= MOST {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{when}: it is {told:?} in the container between {before:?} and {after:?}");
    }
}

/// A container's clock is right, and stays so while the host's is set.
fn follows(name: &str, mut ask: impl FnMut() -> Outcome<RangeInclusive<Duration>>) -> Outcome {
    right("at first", &mut ask)?;
    let Some(clock) = Clock::of_the_host() else {
        println!("     {name}: without {MINE} the clock is this machine's own: what sets it is left out");
        return Ok(());
    };
    for (when, ahead) in STEPS {
        clock.set(ahead)?;
        right(when, &mut ask)?;
    }
    drop(clock);
    right("set right", &mut ask)
}

fn is_the_hosts(scene: &Scene) -> Outcome {
    let bundle = scene.debian()?.sh("echo ready; while read -r _; do date +%s%N; done");
    let mut run = scene.start(&bundle)?;
    run.expect_line("ready")?;
    follows("clock::is_the_hosts", || {
        run.send(b"\n")?;
        let told = Duration::from_nanos(run.line()?.parse()?);
        Ok(told..=told)
    })?;
    run.wait()?.expect_status(0).map(drop)
}

/// A container that is not the one that the machine was made for.
fn is_the_hosts_in_a_pod(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("clock")?)?;
    let id = cri.launch(&pod, container("main", PATIENT))?;
    follows("clock::is_the_hosts_in_a_pod", || {
        // busybox knows of seconds alone.
        let told = Duration::from_secs(cri.shell(&id, "date +%s")?.trim().parse()?);
        Ok(told..=told + Duration::from_secs(1))
    })?;
    cri.remove_pod(&pod)?;
    cri.end()
}
