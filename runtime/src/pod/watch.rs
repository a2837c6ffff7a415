//! What happens to a container and what it uses, seen from another process than its shadow.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use podhull_protocol::ContainerStatsResponse;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, MissedTickBehavior};

use super::command::{CommandError, ask, event_loop};
use crate::agent::{Agent, AgentError, Events, Happening};
use crate::state::{Known, Status};

/// How long the end of a container may come after its guest stopped answering, and its last event after its end.
const GRACE: Duration = Duration::from_secs(5);

/// What was seen.
pub enum Seen {
    /// A process was killed for lack of memory.
    OutOfMemory,
    /// What the container uses at this moment.
    Stats(Box<ContainerStatsResponse>),
}

/// What a container uses.
pub fn stats(root: &Path, id: &str) -> Result<ContainerStatsResponse, CommandError> {
    ask(&running(root, id)?, async |agent| agent.stats(id).await)
}

/// Watches a container until it ends: tells what happens to it, and in each interval what it uses.
pub fn watch(
    root: &Path,
    id: &str,
    interval: Duration,
    mut tell: impl FnMut(Seen) -> io::Result<()>,
) -> Result<(), CommandError> {
    let known = running(root, id)?;
    let pod = known.pod()?;
    let process = known.process().ok_or_else(|| CommandError::Over(id.into()))?;
    event_loop()?.block_on(async {
        // SAFETY: the descriptor is owned by the AsyncFd from here on, and never replaced.
        let process = unsafe { AsyncFd::register(process) }.map_err(|e| CommandError::Events(e.into()))?;
        let agent = match Agent::dial(pod.as_fd()) {
            Ok(agent) => agent,
            Err(error) => return unless_ended(&process, error).await,
        };
        let mut events = match agent.watch(id).await {
            Ok(events) => events,
            Err(error) => return unless_ended(&process, error).await,
        };
        let mut ticks = tokio::time::interval_at(Instant::now() + interval, interval);
        // A guest that is slow to answer is not asked twice at once for it.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let seen = tokio::select! {
                biased;
                happening = events.next(id) => match happening {
                    Ok(Happening::OutOfMemory) => Seen::OutOfMemory,
                    Ok(Happening::Ended) => return Ok(()),
                    Err(error) => return unless_ended(&process, error).await,
                },
                _ = process.readable() => return last_words(&mut events, id, tell).await,
                _ = ticks.tick() => match agent.stats(id).await {
                    Ok(stats) => Seen::Stats(Box::new(stats)),
                    Err(error) => return unless_ended(&process, error).await,
                },
            };
            tell(seen).map_err(CommandError::Output)?;
        }
    })
}

fn running(root: &Path, id: &str) -> Result<Known, CommandError> {
    let known = Known::load(root, id)?;
    match known.status() {
        Status::Creating | Status::Stopped => Err(CommandError::Over(id.into())),
        Status::Created | Status::Running | Status::Paused => Ok(known),
    }
}

/// A guest that does not answer is no error if its container is ending.
async fn unless_ended(process: &AsyncFd<OwnedFd>, error: AgentError) -> Result<(), CommandError> {
    match tokio::time::timeout(GRACE, process.readable()).await {
        Ok(_) => Ok(()),
        Err(_) => Err(error.into()),
    }
}

/// The container has ended: tells what was on its way.
async fn last_words(
    events: &mut Events,
    id: &str,
    mut tell: impl FnMut(Seen) -> io::Result<()>,
) -> Result<(), CommandError> {
    while let Ok(Ok(Happening::OutOfMemory)) = tokio::time::timeout(GRACE, events.next(id)).await {
        tell(Seen::OutOfMemory).map_err(CommandError::Output)?;
    }
    Ok(())
}
