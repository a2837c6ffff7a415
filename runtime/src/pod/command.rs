//! What is done with a container after it was made, by other processes than the one that holds it: they find it by its id,
//! and speak to the agent themselves.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use super::hooks::{self, HookError, Point};
use super::network::{self, WireError};
use super::notify::Waiting;
use super::resize;
use super::size::SizeError;
use super::timeline::Phase;
use crate::agent::{Agent, AgentError};
use crate::cgroup::CgroupError;
use crate::log::Log;
use crate::machine::MachineError;
use crate::state::{self, Known, State, StateError, Status};

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
    /// `start` of one that was paused before.
    #[error("cannot start a container in the paused state: {0:?}: resume it first")]
    StartPaused(String),
    /// `resume` of one that is not paused.
    #[error("container not paused: {0:?} is {1}")]
    NotPaused(String, Status),
    /// What only one can be done to that runs.
    #[error("container not running: {0:?} is {1}")]
    NotRunning(String, Status),
    /// `delete` without `--force`.
    #[error("cannot delete container {id:?} that is not stopped: {status}; kill it first, or use --force")]
    NotStopped {
        /// Which.
        id: String,
        /// What it is instead.
        status: Status,
    },
    /// `events` of one that has ended.
    #[error("container with id {0} is not running")]
    Over(String),
    /// What was seen cannot be passed on.
    #[error(transparent)]
    Output(std::io::Error),
    /// The machine's process.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A limit that this host cannot keep.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// One of its hooks.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// Its network.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Its control group.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A service manager waits for the container.
    #[error("cannot tell the service manager at NOTIFY_SOCKET that the container is ready: {0}")]
    Notify(#[source] std::io::Error),
    /// A guest that does not answer when a container has left it.
    #[error("the guest has not given back within {} s what the container had", .0.as_secs())]
    Kept(Duration),
    /// What the host goes by when it has no memory left.
    #[error("process.oomScoreAdj: cannot set that of the pod's machine: {0}")]
    OomScore(#[source] std::io::Error),
    /// No event loop.
    #[error("cannot set up event handling: {0}")]
    Events(#[source] std::io::Error),
}

/// Executes the program of a created container.
pub fn start(root: &Path, id: &str, log: &Log) -> Result<(), CommandError> {
    let mut known = Known::load_to_change(root, id)?;
    match known.status() {
        Status::Created => {}
        Status::Paused => return Err(CommandError::StartPaused(id.into())),
        Status::Stopped => return Err(CommandError::Ended(id.into())),
        Status::Creating | Status::Running => return Err(CommandError::Started(id.into())),
    }
    // Whatever is not found any more of one that is killed meanwhile, that is why.
    let in_time = |error: CommandError| match known.status() {
        Status::Stopped => CommandError::Ended(id.into()),
        _ => error,
    };
    network::renew(root, &known, log).map_err(|error| in_time(error.into()))?;
    // Before: the program may have said it, and ended, by the time this looks.
    let waiting = Waiting::of(&known).map_err(|error| in_time(CommandError::Notify(error)))?;
    let mut timeline = known.state.timeline.clone();
    timeline.end(Phase::Wait);
    let started = async |agent: Agent| match agent.start_container(id).await {
        // The answer went with the machine: the program has ended already, or was killed in the same moment.
        Err(AgentError::Gone(_)) if known.status() == Status::Stopped => Ok(()),
        answer => answer,
    };
    ask(&known, started).map_err(in_time)?;
    timeline.end(Phase::Start);
    known.state.timeline = timeline;
    log.debug(|| format!("{id}: container started"));
    known.state.status = Status::Running;
    match known.write() {
        Err(_) if known.status() == Status::Stopped => return Err(CommandError::Ended(id.into())),
        written => written?,
    }
    // A hook may be another command on the same container.
    known.release();
    if let Some(hooks) = &known.state.hooks {
        hooks::run(hooks, Point::Started, &known.state, None).map_err(|error| {
            // As runc does. It may have ended meanwhile.
            let _ = ask(&known, async |agent| agent.signal(id, libc::SIGKILL, false).await);
            CommandError::from(error)
        })?;
    }
    match waiting {
        Some(waiting) => waiting.pass_on(Some(known.state.process.pid)).map_err(CommandError::Notify),
        None => Ok(()),
    }
}

/// Sends a signal to the container's first process, or to all of them.
pub fn kill(root: &Path, id: &str, signal: i32, all: bool) -> Result<(), CommandError> {
    let known = Known::load(root, id)?;
    // As with runc: to end all of what has ended is no error.
    let over = || if all { Ok(()) } else { Err(CommandError::NotRunning(id.into(), Status::Stopped)) };
    if known.status() == Status::Stopped {
        return over();
    }
    match ask(&known, async |agent| agent.signal(id, signal, all).await) {
        // It ended on the way.
        Err(_) if known.status() == Status::Stopped => over(),
        // Its program has, and what it has written is still being read: the guest may have deleted it by then.
        Err(CommandError::Agent(AgentError::NotNow(_) | AgentError::Missing(_)))
            if known.state.status != Status::Creating =>
        {
            over()
        }
        other => other,
    }
}

/// Stops all processes of a container where they are.
pub fn pause(root: &Path, id: &str) -> Result<(), CommandError> {
    let mut known = Known::load_to_change(root, id)?;
    match known.status() {
        Status::Created | Status::Running => {}
        status => return Err(CommandError::NotRunning(id.into(), status)),
    }
    ask(&known, async |agent| agent.pause_container(id).await).map_err(|error| match error {
        CommandError::Agent(AgentError::NotNow(_) | AgentError::Missing(_)) => {
            CommandError::NotRunning(id.into(), Status::Stopped)
        }
        other => other,
    })?;
    known.state.paused = true;
    known.write().inspect_err(|_| {
        // What looks as if it ran should.
        let _ = ask(&known, async |agent| agent.resume_container(id).await);
    })?;
    Ok(())
}

/// Lets the processes of a paused container go on.
pub fn resume(root: &Path, id: &str) -> Result<(), CommandError> {
    let mut known = Known::load_to_change(root, id)?;
    let status = known.status();
    if matches!(status, Status::Creating | Status::Stopped) {
        return Err(CommandError::NotPaused(id.into(), status));
    }
    // Asked whatever is written down: who paused or resumed it may have been killed before that was.
    match ask(&known, async |agent| agent.resume_container(id).await) {
        Err(CommandError::Agent(AgentError::NotNow(_))) if status != Status::Paused => {
            return Err(CommandError::NotPaused(id.into(), known.status()));
        }
        Err(CommandError::Agent(AgentError::NotNow(_))) | Ok(()) => {}
        Err(error) => return Err(error),
    }
    known.state.paused = false;
    Ok(known.write()?)
}

/// Removes a container; with `force`, whatever it does, and if it is not there that is no error.
pub fn delete(root: &Path, id: &str, force: bool, log: &Log) -> Result<(), CommandError> {
    if let Some(state) = destroy(root, id, force, log)? {
        resize::leave(root, &state, log);
    }
    Ok(())
}

/// The same, without a word to its pod's guest, which keeps the container's room. Returns what there was.
pub fn destroy(root: &Path, id: &str, force: bool, log: &Log) -> Result<Option<State>, CommandError> {
    let known = match Known::load(root, id) {
        Ok(known) => known,
        Err(StateError::Missing(_)) if force => return Ok(None),
        Err(StateError::Unreadable(..)) if force => return Ok(state::remove(root, id).map(|()| None)?),
        Err(error) => return Err(error.into()),
    };
    match known.status() {
        // Its program never ran: there is nothing to lose.
        Status::Stopped | Status::Created => {}
        _ if force => {}
        status => return Err(CommandError::NotStopped { id: id.into(), status }),
    }
    let state = known.state.clone();
    if !known.destroy()? {
        return if force { Ok(None) } else { Err(StateError::Missing(id.into()).into()) };
    }
    tell_of_removal(&state, log);
    Ok(Some(state))
}

/// Runs the hooks of a container of which nothing is left. That one fails changes nothing.
pub fn tell_of_removal(state: &State, log: &Log) {
    if let Some(hooks) = &state.hooks
        && let Err(error) = hooks::run(hooks, Point::Deleted, state, None)
    {
        log.warning(&error.to_string());
    }
}

/// Asks the agent of a container's pod one thing.
pub fn ask<T>(known: &Known, question: impl AsyncFnOnce(Agent) -> Result<T, AgentError>) -> Result<T, CommandError> {
    let pod = known.pod()?;
    let answer = event_loop()?.block_on(async { question(Agent::dial(pod.as_fd())?).await });
    answer.map_err(|error| match error {
        // It ended on the way.
        AgentError::Connect(_) | AgentError::Gone(_) if known.status() == Status::Stopped => {
            CommandError::NotRunning(known.state.id.clone(), Status::Stopped)
        }
        error => error.into(),
    })
}

/// For what waits on more than one thing.
pub fn event_loop() -> Result<tokio::runtime::Runtime, CommandError> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_io().enable_time().build().map_err(CommandError::Events)
}

#[cfg(test)]
mod tests;
