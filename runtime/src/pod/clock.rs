//! The wall clock of a pod's guest, which is to be the host's as if there were no machine. A guest counts by itself from what it was
//! told when the pod was made: it knows nothing of what NTP corrects on the host, nor of a host's clock that is set, by whomever, or
//! was asleep. So the process that holds the pod compares the two now and then, and when the host's was set, at once.

use std::mem;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime, timerfd_create,
    timerfd_settime,
};
use tokio::io::unix::AsyncFd;

use super::rest;
use super::session::Session;
use crate::agent::{Agent, AgentError};

/// How long the guest's clock is left alone. NTP corrects the clocks of most machines by less than 50 us in each second: that is 30 ms
/// by then, which the guest makes up for in a minute. Sooner would wake idle pods for less.
const INTERVAL: Duration = Duration::from_secs(600);

/// How often the guest is asked each time. The first answer of one that slept takes longer than the next.
const SAMPLES: usize = 3;

/// Less is left as it is: a program cannot tell it from having waited for the processor.
const LEAST: Duration = Duration::from_millis(1);

/// More is corrected at once: little by little it would take until the next time and longer.
const MOST_GRADUAL: Duration = Duration::from_millis(500);

/// The host's wall clock, in nanoseconds since the epoch.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

/// Keeps the guest's clock right for as long as it is polled. What fails is tried again the next time, and said once.
pub async fn keep(session: &Session<'_>) {
    let Session { id, agent, log, .. } = session;
    let mut said = Vec::new();
    let mut say = |kind: Option<mem::Discriminant<AgentError>>, why: &dyn std::fmt::Display| {
        if !said.contains(&kind) {
            said.push(kind);
            log.warning(&format!("container {id}: the clock of its virtual machine may be wrong: {why}"));
        }
    };
    let timer = match Timer::new() {
        Ok(timer) => timer,
        Err(error) => {
            say(None, &error);
            return rest::give_back();
        }
    };
    // What the guest was told at first is late by as much as that took; nobody has gone by it for long.
    let mut step = true;
    loop {
        // Before they are compared: what is set in the meantime is for the next time.
        match timer.start() {
            Ok(set) => step |= set,
            Err(errno) => say(None, &errno),
        }
        match correct(agent, step).await {
            Ok(corrected) => {
                step = false;
                if let Some(behind) = corrected {
                    log.debug(|| format!("{id}: clock of the guest corrected by {} us", behind / 1000));
                }
            }
            // With the machine.
            Err(AgentError::Gone(_)) => return,
            Err(error) => say(Some(mem::discriminant(&error)), &error),
        }
        rest::give_back();
        match timer.ended().await {
            Ok(set) => step |= set,
            Err(error) => return say(None, &error),
        }
    }
}

/// Compares the clocks, and corrects the guest's if it is wrong; returns by how many nanoseconds.
async fn correct(agent: &Agent, step: bool) -> Result<Option<i64>, AgentError> {
    let mut samples = Vec::with_capacity(SAMPLES);
    for _ in 0..SAMPLES {
        // In this order: what this process is kept waiting for in between is of the way, too.
        let (began, sent) = (Instant::now(), now());
        let told = agent.clock().await?;
        samples.push(Sample { sent, took: began.elapsed(), told });
    }
    let Some(behind) = correction(&samples) else { return Ok(None) };
    agent.adjust_clock(behind, step || behind.unsigned_abs() >= nanoseconds(MOST_GRADUAL)).await?;
    Ok(Some(behind))
}

/// An answer of the guest.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// The host's clock when it was asked for.
    sent: u64,
    /// How long it took to come.
    took: Duration,
    /// The guest's clock at some moment in between.
    told: u64,
}

impl Sample {
    /// By how much the guest is behind, if both ways take as long; it may be half of the time more or less.
    fn behind(&self) -> i64 {
        let middle = i128::from(self.sent) + i128::from(nanoseconds(self.took) / 2);
        let behind = middle - i128::from(self.told);
        i64::try_from(behind).unwrap_or(if behind < 0 { i64::MIN } else { i64::MAX })
    }
}

/// What the guest's clock is to be corrected by, if that is known and worth it.
fn correction(samples: &[Sample]) -> Option<i64> {
    let best = samples.iter().min_by_key(|sample| sample.took)?;
    let behind = best.behind();
    (behind.unsigned_abs() > nanoseconds(LEAST.max(best.took / 2))).then_some(behind)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Ends when a comparison is due: after some time, or when the host's clock was set.
struct Timer(AsyncFd<OwnedFd>);

impl Timer {
    /// Needs a runtime.
    fn new() -> std::io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        // SAFETY: the descriptor is owned by the AsyncFd from here on, and never replaced.
        Ok(Self(unsafe { AsyncFd::register(timer) }?))
    }

    /// Starts it anew. Says whether the clock was set since it was started before, unless [`Self::ended`] has said so.
    fn start(&self) -> Result<bool, Errno> {
        let mut set = false;
        loop {
            let now = clock_gettime(ClockId::Realtime);
            let due = Timespec { tv_sec: now.tv_sec.saturating_add(INTERVAL.as_secs().cast_signed()), ..now };
            let never = Timespec { tv_sec: 0, tv_nsec: 0 };
            let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
            match timerfd_settime(&self.0, flags, &Itimerspec { it_interval: never, it_value: due }) {
                Ok(_) => return Ok(set),
                // It is started all the same, but when it is due was by the clock as it was.
                Err(Errno::CANCELED) => set = true,
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Waits for its end. Says whether that is because the clock was set.
    async fn ended(&self) -> std::io::Result<bool> {
        loop {
            let mut ready = self.0.readable().await?;
            match rustix::io::read(&self.0, &mut [0; 8]) {
                Ok(_) => return Ok(false),
                Err(Errno::CANCELED) => return Ok(true),
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const HOST: u64 = 1_800_000_000 * SECOND;
    const MS: u64 = 1_000_000;

    /// A guest that is so far ahead, asked over ways that take so many milliseconds each.
    fn sample(ahead: i64, there: u64, back: u64) -> Sample {
        let told = (HOST + there * MS).checked_add_signed(ahead).unwrap();
        Sample { sent: HOST, took: Duration::from_millis(there + back), told }
    }

    #[test]
    fn a_clock_is_known_up_to_half_of_the_way() {
        let minute = 60 * SECOND.cast_signed();
        for ahead in [0, minute, -minute, 7, -7] {
            for (there, back) in [(0, 0), (10, 10), (0, 20), (20, 0), (3, 400)] {
                let behind = sample(ahead, there, back).behind();
                let wrong = (behind + ahead).unsigned_abs();
                assert!(wrong <= (there + back) * MS / 2, "{ahead} {there} {back}: {behind}");
            }
            assert_eq!(sample(ahead, 10, 10).behind(), -ahead);
        }
    }

    #[test]
    fn the_quickest_answer_counts() {
        let (slow, quick) = (sample(0, 0, 900), sample(-(SECOND.cast_signed()), 2, 2));
        assert_eq!(correction(&[slow, quick, slow]), Some(SECOND.cast_signed()));
        assert_eq!(correction(&[]), None);
    }

    #[test]
    fn what_may_be_the_way_is_left_as_it_is() {
        let ms = MS.cast_signed();
        for (sample, expected) in [
            (sample(0, 0, 0), None),
            (sample(ms, 0, 0), None),
            (sample(-ms, 0, 0), None),
            (sample(ms + 1, 0, 0), Some(-ms - 1)),
            (sample(-2 * ms, 0, 0), Some(2 * ms)),
            // All of the time on one way.
            (sample(0, 0, 40), None),
            (sample(0, 40, 0), None),
            (sample(-ms, 0, 40), Some(21 * ms)),
            (sample(ms, 40, 0), Some(-21 * ms)),
            (sample(-ms, 20, 20), None),
        ] {
            assert_eq!(correction(&[sample]), expected, "{sample:?}");
        }
    }

    #[test]
    fn what_cannot_be_is_as_much_as_can_be_said() {
        let took = Duration::ZERO;
        let behind = |sent, told| Sample { sent, took, told }.behind();
        assert_eq!(behind(0, u64::MAX), i64::MIN);
        assert_eq!(behind(u64::MAX, 0), i64::MAX);
        assert_eq!(behind(HOST, 0), HOST.cast_signed());
        assert_eq!(behind(HOST, u64::MAX), i64::MIN);
        assert_eq!(Sample { sent: u64::MAX, took: Duration::MAX, told: u64::MAX }.behind(), i64::MAX);
        assert_eq!(correction(&[Sample { sent: HOST, took: Duration::MAX, told: 0 }]), None);
    }

    #[tokio::test]
    async fn a_timer_waits() {
        let timer = Timer::new().unwrap();
        // Nobody sets this machine's clock meanwhile.
        for _ in 0..2 {
            assert!(!timer.start().unwrap());
        }
        assert!(tokio::time::timeout(Duration::from_millis(20), timer.ended()).await.is_err());
        let left = rustix::time::timerfd_gettime(&timer.0).unwrap().it_value.tv_sec.unsigned_abs();
        assert!((1..=INTERVAL.as_secs()).contains(&left), "{left}");
    }
}
