//! When what was reached of a container's start, as it is written down in its state: one phase ends where the next begins, so that
//! together they are the whole. Times are of the host's monotonic clock, which all processes that take part read.

use std::sync::OnceLock;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A part of a container's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The command checks what it is given, and starts the shadow and the machine's process.
    Launch,
    /// The shadow opens what is needed, and enters its namespaces.
    Prepare,
    /// The machine's process enters its jail and builds the machine.
    Machine,
    /// From the guest's first instruction to its agent's answer.
    Boot,
    /// What is left then of hooks, control groups and network on the host.
    Hooks,
    /// The container is made in the guest.
    Create,
    /// CPUs and memory that the guest did not boot with.
    Grow,
    /// The container waits for its start to be asked for.
    Wait,
    /// Its program is executed.
    Start,
}

impl Phase {
    /// As it is called in metrics and traces.
    pub fn name(self) -> &'static str {
        match self {
            Self::Launch => "launch",
            Self::Prepare => "prepare",
            Self::Machine => "machine",
            Self::Boot => "boot",
            Self::Hooks => "hooks",
            Self::Create => "create",
            Self::Grow => "grow",
            Self::Wait => "wait",
            Self::Start => "start",
        }
    }
}

/// When the guest reached what, by its own monotonic clock in nanoseconds. It may say anything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestTimes {
    /// Its agent was started.
    pub started: u64,
    /// The agent listened.
    pub ready: u64,
    /// The pod was asked for.
    pub called: u64,
    /// The container was made.
    pub made: u64,
}

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// When the command began that makes the container, in nanoseconds.
    pub began: u64,
    /// The end of each phase, in order.
    pub ends: Vec<(Phase, u64)>,
    /// Of a machine's first container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestTimes>,
}

/// A phase with its beginning and its length, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub phase: Phase,
    pub begin: u64,
    pub length: u64,
}

impl Timeline {
    /// Of what is asked for by a command that began then.
    pub fn since(began: u64) -> Self {
        Self { began, ..Self::default() }
    }

    /// Whether nobody has written anything down.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// A phase ends now.
    pub fn end(&mut self, phase: Phase) {
        self.ends.push((phase, now()));
    }

    /// Each phase; none of them ends before it began.
    pub fn spans(&self) -> impl Iterator<Item = Span> {
        self.ends.iter().scan(self.began, |begin, &(phase, end)| {
            let span = Span { phase, begin: *begin, length: end.saturating_sub(*begin) };
            *begin = end.max(*begin);
            Some(span)
        })
    }

    /// When a phase ended.
    pub fn end_of(&self, phase: Phase) -> Option<u64> {
        self.ends.iter().find(|(ended, _)| *ended == phase).map(|(_, end)| *end)
    }
}

/// The monotonic clock in nanoseconds.
pub fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// When this process, a command, began: the first call of this.
pub fn command_began() -> u64 {
    static BEGAN: OnceLock<u64> = OnceLock::new();
    *BEGAN.get_or_init(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_the_whole_whatever_the_clock_says() {
        let ends = vec![(Phase::Launch, 15), (Phase::Prepare, 12), (Phase::Machine, 40)];
        let timeline = Timeline { began: 10, ends, guest: None };
        let spans: Vec<_> = timeline.spans().map(|span| (span.begin, span.length)).collect();
        assert_eq!(spans, [(10, 5), (15, 0), (15, 25)]);
        assert_eq!(spans.iter().map(|(_, length)| length).sum::<u64>(), 40 - 10);
        assert_eq!(timeline.end_of(Phase::Machine), Some(40));
        let text = serde_json::to_string(&timeline).unwrap();
        assert_eq!(serde_json::from_str::<Timeline>(&text).unwrap(), timeline);
    }
}
