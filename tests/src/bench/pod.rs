//! A run of podhull that tells when what happened: its debug log.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::Bench;
use crate::bundle::Bundle;
use crate::run::{DEADLINE, Running};
use crate::{Outcome, ensure};

/// A line of the log.
struct Line {
    /// Since the epoch.
    time: Duration,
    /// Without the container's id.
    message: String,
}

/// Messages that mark the end of a phase, by their beginning, in their order (runtime/src/pod).
pub const RUN: &str = "run";
/// The virtual machine's process is about to be made.
pub const STARTING: &str = "starting its machine";
/// The virtual machine is made and its CPU in the kernel.
pub const RUNS: &str = "machine runs";
/// The agent has connected.
pub const READY: &str = "agent ready";
/// The container is there, its program not started.
pub const CREATED: &str = "container created";
/// Its program was started.
pub const STARTED: &str = "container started";
/// The end of its program is known.
pub const ENDED: &str = "container ended";
/// Nothing of it is left in the guest.
pub const DELETED: &str = "output written";

/// A podhull that runs a container.
pub struct Pod {
    /// Its process.
    pub running: Running,
    began: Duration,
    log: PathBuf,
}

/// What its log tells, once it has ended.
pub struct Log {
    began: Duration,
    lines: Vec<Line>,
}

impl Pod {
    /// Runs `bundle` as container `id`.
    pub fn start(bench: &Bench, bundle: &Bundle, id: &str) -> Outcome<Self> {
        let log = bench.directory.join(format!("{id}.log"));
        let mut words: Vec<OsString> = vec![bench.podhull.program().into()];
        words.extend(["--debug", "--log-format", "json", "--log"].map(OsString::from));
        words.push(log.clone().into());
        words.extend(bench.podhull.run_words(&bundle.directory, id).into_iter().skip(1));
        let began = now()?;
        Ok(Self { running: Running::start(&words, &[])?, began, log })
    }

    /// Waits for its end, which must be a success. Returns how long all took, and the log.
    pub fn end(self) -> Outcome<(Duration, Log)> {
        let took = self.running.wait()?.expect_status(0)?.took;
        let log = Log::read(&self.log, self.began)?;
        fs::remove_file(&self.log)?;
        Ok((took, log))
    }

    /// Waits until the log has a message that contains `text`.
    pub fn wait_for(&self, text: &str) -> Outcome {
        let until = Instant::now() + DEADLINE;
        while !fs::read_to_string(&self.log)?.contains(text) {
            ensure!(
                Instant::now() < until,
                "podhull's log says nothing of {text:?}: {}",
                fs::read_to_string(&self.log)?
            );
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Log {
    fn read(path: &Path, began: Duration) -> Outcome<Self> {
        let mut lines = Vec::new();
        for line in fs::read_to_string(path)?.lines() {
            let line: Value = serde_json::from_str(line)?;
            let time = line["time"].as_str().and_then(|text| since_epoch(text, began));
            let time = time.ok_or_else(|| format!("no time in {line}"))?;
            let message = line["msg"].as_str().ok_or("no message in a line of the log")?;
            let message = message.split_once(": ").map_or(message, |(_, message)| message).to_owned();
            lines.push(Line { time, message });
        }
        Ok(Self { began, lines })
    }

    /// When the message that begins with `start` was written, since the epoch.
    pub fn at(&self, start: &str) -> Outcome<Duration> {
        Ok(self.line(start)?.time)
    }

    /// The same since the command was started.
    pub fn since_start(&self, start: &str) -> Outcome<Duration> {
        Ok(self.at(start)?.saturating_sub(self.began))
    }

    /// The first number in the message that begins with `start`.
    pub fn number(&self, start: &str) -> Outcome<f64> {
        let message = &self.line(start)?.message;
        let number = message.split(' ').find_map(|word| word.parse().ok());
        Ok(number.ok_or_else(|| format!("no number in {message:?}"))?)
    }

    fn line(&self, start: &str) -> Outcome<&Line> {
        let line = self.lines.iter().find(|line| line.message.starts_with(start));
        Ok(line.ok_or_else(|| format!("podhull --debug says nothing of {start:?}"))?)
    }
}

/// The wall clock, as the log has it.
fn now() -> Outcome<Duration> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?)
}

/// A time of day as in `2026-01-31T12:00:00.123456789Z`, on the day of `began` or, if that was later in the day, the next.
fn since_epoch(text: &str, began: Duration) -> Option<Duration> {
    const DAY: u64 = 86_400;
    let (_, time) = text.strip_suffix('Z')?.split_once('T')?;
    let (time, fraction) = time.split_once('.')?;
    let mut seconds = 0;
    for part in time.split(':') {
        seconds = seconds * 60 + part.parse::<u64>().ok()?;
    }
    let nanoseconds = format!("{fraction:0<9}").parse().ok()?;
    let midnight = began.as_secs() / DAY * DAY;
    let time = Duration::new(midnight + seconds, nanoseconds);
    // Half a day, not less than `began`: clocks are read in two processes, and may step.
    Some(if time + Duration::from_secs(DAY / 2) < began { time + Duration::from_secs(DAY) } else { time })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_the_log_are_put_on_the_right_day() {
        let noon = Duration::new(1_767_225_599, 0);
        let at = |text| since_epoch(text, noon);
        assert_eq!(at("2025-12-31T23:59:59.5Z"), Some(Duration::new(1_767_225_599, 500_000_000)));
        assert_eq!(at("2026-01-01T00:00:01.000000007Z"), Some(Duration::new(1_767_225_601, 7)));
        assert_eq!(at("yesterday"), None);
    }
}
