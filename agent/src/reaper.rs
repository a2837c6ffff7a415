//! Reaps every child: containers' inits for those who wait for them, orphans of the guest for nobody.
//!
//! There is one place that waits, so that a process id stays a container's until its exit has been taken.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Pid, WaitOptions, WaitStatus, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    Code(u32),
    Signal(u32),
}

impl std::fmt::Display for ExitStatus {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(formatter, "exited with {code}"),
            Self::Signal(signal) => write!(formatter, "was killed by signal {signal}"),
        }
    }
}

/// A handle to the one task that reaps.
#[derive(Clone, Default)]
pub struct Reaper {
    waiting: Arc<Mutex<HashMap<Pid, oneshot::Sender<ExitStatus>>>>,
}

impl Reaper {
    /// Starts reaping. To be called within the runtime, before the first child is made.
    pub fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let mut children = signal(SignalKind::child())?;
        let waiting = reaper.clone();
        tokio::spawn(async move {
            while children.recv().await.is_some() {
                waiting.reap();
            }
        });
        Ok(reaper)
    }

    /// The exit of a child. To be called in the same step that made the child: the agent has one thread, so nothing is
    /// reaped in between.
    pub fn exit_of(&self, pid: Pid) -> oneshot::Receiver<ExitStatus> {
        let (sender, receiver) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(pid, sender);
        receiver
    }

    fn reap(&self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let Some(waiting) = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid) else {
                continue;
            };
            // Nobody waits any more when the creation of a container was given up.
            let _ = waiting.send(exit_status(status));
        }
    }
}

fn exit_status(status: WaitStatus) -> ExitStatus {
    match status.terminating_signal() {
        Some(signal) => ExitStatus::Signal(signal.unsigned_abs()),
        None => ExitStatus::Code(status.exit_status().unwrap_or_default().unsigned_abs()),
    }
}
