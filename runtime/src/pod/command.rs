//! What is done with a container after it was made, by other processes than the one that holds it: they find it by its id,
//! and speak to the agent themselves.

use std::os::fd::AsFd;
use std::path::Path;

use super::hooks::{self, HookError, Point};
use crate::agent::{Agent, AgentError};
use crate::log::Log;
use crate::state::{self, Known, StateError, Status};

/// Why a command was not carried out. Callers match on some of the words.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// Its id, or what is written under the state root.
    #[error(transparent)]
    State(#[from] StateError),
    /// The agent, or what it says about the container.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// `start` of one that was started.
    #[error("cannot start an already running container: {0:?}")]
    Started(String),
    /// `start` of one that has ended.
    #[error("cannot start a container that has stopped: {0:?}")]
    Ended(String),
    /// A signal for one that has ended.
    #[error("container not running: {0:?} is stopped")]
    NotRunning(String),
    /// `delete` without `--force`.
    #[error("cannot delete container {id:?} that is not stopped: {status}; kill it first, or use --force")]
    NotStopped {
        /// Which.
        id: String,
        /// What it is instead.
        status: Status,
    },
    /// One of its hooks.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// No event loop.
    #[error("cannot set up event handling: {0}")]
    Events(#[source] std::io::Error),
}

/// Executes the program of a created container.
pub fn start(root: &Path, id: &str, log: &Log) -> Result<(), CommandError> {
    let mut known = Known::load(root, id)?;
    match known.status() {
        Status::Created => {}
        Status::Stopped => return Err(CommandError::Ended(id.into())),
        Status::Creating | Status::Running => return Err(CommandError::Started(id.into())),
    }
    ask(&known, async |agent| agent.start_container(id).await)?;
    log.debug(|| format!("{id}: container started"));
    known.note(Status::Running)?;
    let Some(hooks) = &known.state.hooks else { return Ok(()) };
    hooks::run(hooks, Point::Started, &known.state, None).map_err(|error| {
        // As runc does. It may have ended meanwhile.
        let _ = ask(&known, async |agent| agent.signal(id, libc::SIGKILL, false).await);
        error.into()
    })
}

/// Sends a signal to the container's first process, or to all of them.
pub fn kill(root: &Path, id: &str, signal: i32, all: bool) -> Result<(), CommandError> {
    let known = Known::load(root, id)?;
    if known.status() == Status::Stopped {
        // As with runc: to end all of what has ended is no error.
        return if all { Ok(()) } else { Err(CommandError::NotRunning(id.into())) };
    }
    match ask(&known, async |agent| agent.signal(id, signal, all).await) {
        // It ended on the way.
        Err(_) if known.status() == Status::Stopped => Err(CommandError::NotRunning(id.into())),
        other => other,
    }
}

/// Removes a container; with `force`, whatever it does, and if it is not there that is no error.
pub fn delete(root: &Path, id: &str, force: bool, log: &Log) -> Result<(), CommandError> {
    let known = match Known::load(root, id) {
        Ok(known) => known,
        Err(StateError::Missing(_)) if force => return Ok(()),
        Err(StateError::Unreadable(..)) if force => return Ok(state::remove(root, id)?),
        Err(error) => return Err(error.into()),
    };
    match known.status() {
        // Its program never ran: there is nothing to lose.
        Status::Stopped | Status::Created => {}
        _ if force => {}
        status => return Err(CommandError::NotStopped { id: id.into(), status }),
    }
    let state = known.state.clone();
    known.destroy()?;
    if let Some(hooks) = &state.hooks
        && let Err(error) = hooks::run(hooks, Point::Deleted, &state, None)
    {
        log.warning(&error.to_string());
    }
    Ok(())
}

/// Asks the agent of a container's pod one thing.
fn ask<T>(known: &Known, question: impl AsyncFnOnce(Agent) -> Result<T, AgentError>) -> Result<T, CommandError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(CommandError::Events)?;
    let pod = known.pod()?;
    runtime.block_on(async { Ok(question(Agent::dial(pod.as_fd())?).await?) })
}
