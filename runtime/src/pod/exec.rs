//! `podhull exec`: a further program in a running container, as a process of its own on the host.

use std::fmt::Write as _;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use podhull_protocol::ExecProcessRequest;
use rustix::io::Errno;
use rustix::rand::GetRandomFlags;

use super::link::{Begin, Creator, LinkError, News};
use super::shadow::Shadow;
use super::view::{self, ViewError};
use crate::agent::{Agent, AgentError, Exit};
use crate::bundle::BundleError;
use crate::cgroup::CgroupError;
use crate::confine::confine;
use crate::log::Log;
use crate::machine::PidNamespace;
use crate::signals::{self, Signals};
use crate::spec::Config;
use crate::state::{self, Known, StateError, Status};
use crate::stdio::{Stdio, StdioError};

/// Why a program was not executed, or its end not seen. Callers match on some of the words.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The container's id, or what is written under the state root.
    #[error(transparent)]
    State(#[from] StateError),
    /// There is nothing to execute it in.
    #[error("cannot exec in a stopped container: container not running: {0:?}")]
    NotRunning(String),
    /// It would not run before the container is resumed.
    #[error("cannot exec in a paused container (use --ignore-paused to override): {0:?}")]
    Paused(String),
    /// The process, or the bundle around it, is wrong.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// `--process`.
    #[error("{0}: {1}")]
    Process(PathBuf, String),
    /// Its standard streams.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// The agent said no, or nothing.
    #[error("exec failed: unable to start container process: {0}")]
    Agent(#[from] AgentError),
    /// Its shadow said it.
    #[error("{0}")]
    Failed(String),
    /// Its shadow cannot be started.
    #[error("cannot start the process's shadow: {0}")]
    Spawn(#[source] io::Error),
    /// Its shadow ended without a word.
    #[error("the process's shadow ended before the process was executed: {0}")]
    Died(ExitStatus),
    /// The namespaces of the container.
    #[error(transparent)]
    View(#[from] ViewError),
    /// It cannot give up what it could do.
    #[error("cannot give up privileges: {0}")]
    Privileges(#[source] io::Error),
    /// The container's control group.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The pid file cannot be written.
    #[error("cannot write the pid file {0}: {1}")]
    PidFile(PathBuf, #[source] io::Error),
    /// Who asked for it is gone.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// No event loop.
    #[error("cannot set up event handling: {0}")]
    Signals(#[source] io::Error),
    /// No random numbers.
    #[error("cannot get random numbers: {0}")]
    Random(#[source] Errno),
}

/// What to execute, and for whom.
pub struct Exec<'a> {
    /// The container.
    pub known: Known,
    /// Its configuration, with the `process` to execute.
    pub config: Config,
    /// Control group below the container's.
    pub cgroup: &'a str,
    /// Whether to wait until a paused container is resumed.
    pub ignore_paused: bool,
    /// Where to write the pid of this process, which stands for the program.
    pub pid_file: Option<&'a Path>,
    /// Where to send the terminal.
    pub console_socket: Option<&'a Path>,
    /// Who asked for it, if this is its shadow.
    pub creator: Option<&'a Creator>,
    /// Where to say what happens.
    pub log: &'a Log,
}

/// Finds a container that can be executed in.
pub fn running(root: &Path, id: &str, ignore_paused: bool) -> Result<Known, ExecError> {
    let known = Known::load(root, id)?;
    match known.status() {
        Status::Stopped => Err(ExecError::NotRunning(id.into())),
        Status::Paused if !ignore_paused => Err(ExecError::Paused(id.into())),
        _ => Ok(known),
    }
}

/// Executes the program with a shadow of its own; returns when the program runs.
pub fn exec_in_background(known: &Known, pid_file: Option<&Path>) -> Result<(), ExecError> {
    let id = &known.state.id;
    let container = known.process().ok_or_else(|| ExecError::NotRunning(id.into()))?;
    let begin = Begin { kept: true, container: true, ..Begin::default() };
    let copy = container.try_clone().map_err(ExecError::Spawn)?;
    let shadow = Shadow::spawn(PidNamespace::Of(container.as_fd()), begin, &[copy]).map_err(ExecError::Spawn)?;
    loop {
        match shadow.news() {
            Ok(News::Made) => break,
            Ok(News::Failed(error)) => {
                let _ = shadow.wait();
                return Err(ExecError::Failed(error));
            }
            Ok(_) => {}
            Err(_) => return Err(shadow.wait().map_or_else(ExecError::Spawn, ExecError::Died)),
        }
    }
    match settle(known, &shadow, pid_file) {
        Ok(()) => Ok(()),
        Err(error) => {
            shadow.kill();
            Err(error)
        }
    }
}

/// Puts a shadow where it belongs, and says who it is. It has all its threads, which the group may have no room for.
fn settle(known: &Known, shadow: &Shadow, pid_file: Option<&Path>) -> Result<(), ExecError> {
    if let Some(group) = &known.state.cgroup {
        group.add(shadow.pid())?;
    }
    let Some(path) = pid_file else { return Ok(()) };
    state::replace(path, shadow.pid().to_string().as_bytes()).map_err(|e| ExecError::PidFile(path.to_owned(), e))
}

/// Executes the program and lives as long as it; returns its exit status.
pub fn exec(exec: Exec<'_>) -> Result<u8, ExecError> {
    signals::block();
    execute(&exec).map_err(|error| match error {
        // It ended on the way.
        ExecError::Agent(AgentError::Connect(_) | AgentError::Gone(_)) | ExecError::Stdio(StdioError::Connect(..))
            if exec.known.status() == Status::Stopped =>
        {
            ExecError::NotRunning(exec.known.state.id.clone())
        }
        error => error,
    })
}

fn execute(exec: &Exec<'_>) -> Result<u8, ExecError> {
    let Exec { known, config, creator, log, .. } = exec;
    let id = known.state.id.as_str();
    let pod = known.pod()?;
    let stdio = Stdio::new(config.terminal(), exec.console_socket, config.console_size(), None, creator.is_some())?;
    let stdio = stdio.leased()?;
    let name = name()?;
    let request = ExecProcessRequest {
        container_id: id.into(),
        exec_id: name.clone(),
        process: config.process(),
        stdio: Some(stdio.announcement()).into(),
        cgroup: exec.cgroup.into(),
        ignore_paused: exec.ignore_paused,
        ..Default::default()
    };
    let agent = crate::stdio::dial(pod.as_fd(), podhull_protocol::AGENT_PORT).map_err(AgentError::Connect)?;
    if let Some(creator) = creator {
        let container = creator.begin()?.container.ok_or_else(|| ExecError::NotRunning(id.into()))?;
        view::join(container.as_fd())?;
        confine().map_err(ExecError::Privileges)?;
    }
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().map_err(ExecError::Signals)?;
    let outcome = runtime.block_on(async {
        let signals = Signals::new().map_err(ExecError::Signals)?;
        let agent = Agent::new(agent)?;
        let process = Process { agent: &agent, id, name: &name, stdio: &stdio, log };
        let mut events = agent.events(id, &name).await?;
        let streams = async {
            let mut flow = stdio.connect(pod.as_fd())?;
            flow.connected().await?;
            Ok::<_, ExecError>(flow)
        };
        let executed = async { Ok(agent.exec(&request).await?) };
        let (mut flow, ()) = tokio::try_join!(streams, executed)?;
        log.debug(|| format!("{id}: executed {name}"));
        match creator {
            Some(creator) => creator.tell(&News::Made)?,
            None => {
                if let Some(path) = exec.pid_file {
                    let pid = std::process::id().to_string();
                    state::replace(path, pid.as_bytes()).map_err(|e| ExecError::PidFile(path.to_owned(), e))?;
                }
                if let Some(terminal) = stdio.terminal() {
                    terminal.set_raw()?;
                }
            }
        }
        let exit = tokio::select! {
            biased;
            exit = events.exit_of(id, &name) => exit?,
            error = process.signals(&signals) => return Err(error),
        };
        let (drained, deleted) = tokio::join!(flow.drained(), agent.delete_exec(id, &name));
        if let Err(error) = deleted {
            log.debug(|| format!("{id}: {error}"));
        }
        drained?;
        Ok(exit)
    });
    // Threads that still wait for input must not hold up the end; they end with the process.
    runtime.shutdown_background();
    // The terminal is the caller's again before anything is said on it.
    drop(stdio);
    outcome.map(|Exit { status, .. }| status)
}

/// An executed program.
struct Process<'a> {
    agent: &'a Agent,
    id: &'a str,
    name: &'a str,
    stdio: &'a Stdio,
    log: &'a Log,
}

impl Process<'_> {
    /// Passes signals on; returns only when that is not possible any more.
    async fn signals(&self, signals: &Signals) -> ExecError {
        loop {
            let signal = match signals.next().await {
                Ok(signal) => signal,
                Err(error) => return ExecError::Signals(error),
            };
            let passed = match (signal, self.stdio.size()) {
                (libc::SIGWINCH, Some((rows, columns))) => {
                    self.agent.resize(self.id, self.name, rows.into(), columns.into()).await
                }
                (signal, _) if signals::is_ours(signal) => Ok(()),
                (signal, _) => self.agent.signal_exec(self.id, self.name, signal).await,
            };
            // It may have ended at this very moment.
            if let Err(error) = passed {
                self.log.debug(|| format!("{}: signal {signal}: {error}", self.id));
            }
        }
    }
}

/// A name that no other process of the container has.
fn name() -> Result<String, ExecError> {
    let mut bytes = [0; 16];
    // Up to 256 bytes are never cut short (random(4)).
    rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty()).map_err(ExecError::Random)?;
    Ok(bytes.iter().fold(String::new(), |mut name, byte| {
        let _ = write!(name, "{byte:02x}");
        name
    }))
}
