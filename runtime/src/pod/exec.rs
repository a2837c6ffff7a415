//! `podhull exec`: a further program in a running container, as a process of its own on the host.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Seek, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use podhull_protocol::{DebugProgram, ExecProcessRequest};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::rand::GetRandomFlags;
use serde_json::Value;

use super::announce::{Announce, AnnounceError, Stands};
use super::descriptors::{self, Attached, DescriptorError, Inherited};
use super::foreground::{Foreground, ForegroundError, Next};
use super::link::{Begin, Creator, Given, LinkError, News};
use super::shadow::{Launch, Shadow};
use super::view::{self, ViewError};
use crate::agent::{Agent, AgentError, Exit};
use crate::bundle::{self, BundleError};
use crate::cgroup::CgroupError;
use crate::confine::confine;
use crate::log::Log;
use crate::machine::PidNamespace;
use crate::oom;
use crate::signals::{self, Signals};
use crate::spec::Config;
use crate::state::{Known, Process, StateError, Status};
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
    /// `--cgroup`.
    #[error("invalid --cgroup argument: {0}: {1}")]
    SubCgroup(String, &'static str),
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
    /// It cannot stay in the foreground.
    #[error(transparent)]
    Foreground(#[from] ForegroundError),
    /// What it is to inherit.
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    /// The pod's machine could not be given the files of its descriptors.
    #[error("container {0:?}: {1}")]
    Share(String, #[source] podhull_vmm::jail::JailError),
    /// The namespaces of the container.
    #[error(transparent)]
    View(#[from] ViewError),
    /// It cannot give up what it could do.
    #[error("cannot give up privileges: {0}")]
    Privileges(#[source] io::Error),
    /// The container's control group.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The host goes by something else when it has no memory left.
    #[error("process.oomScoreAdj: {0}")]
    OomScore(#[source] io::Error),
    /// Who asked for it cannot be told.
    #[error(transparent)]
    Announce(#[from] AnnounceError),
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

/// What to execute, as the command sees it that is asked to.
pub struct Execution<'a> {
    /// The container.
    pub known: Known,
    /// Its configuration, with the `process` to execute.
    pub config: Config,
    /// Who is told of the process that stands for the program.
    pub announce: Announce<'a>,
    /// Whether somebody else is sent the terminal.
    pub console_socket: bool,
    /// What the program is to have beyond its standard streams.
    pub inherited: Inherited,
}

/// What to execute, as the program's shadow sees it.
pub struct Exec<'a> {
    /// The container.
    pub known: Known,
    /// A program of the host to be executed in the guest itself, by its name there.
    pub debug: Option<(String, Vec<u8>)>,
    /// Control group below the container's.
    pub cgroup: &'a str,
    /// Whether to wait until a paused container is resumed.
    pub ignore_paused: bool,
    /// Where to send the terminal.
    pub console_socket: Option<&'a Path>,
    /// Who asked for it.
    pub creator: &'a Creator,
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

/// Executes the program with a shadow of its own, a child of this process; returns its pid when the program runs.
pub fn exec_in_background(
    execution: Execution<'_>,
    launch: Launch,
    terminal: Option<OwnedFd>,
) -> Result<i32, ExecError> {
    let (execution, shadow) = execution.spawn(launch, terminal, false)?;
    loop {
        match shadow.news() {
            Ok(News::Made) => break,
            Ok(News::Failed(error)) => return Err(failed(shadow, error)),
            Ok(_) => {}
            Err(_) => return Err(died(shadow)),
        }
    }
    match execution.settle(&shadow) {
        Ok(()) => Ok(shadow.pid()),
        Err(error) => {
            shadow.kill();
            Err(error)
        }
    }
}

/// Executes the program with a shadow of its own, which lives no longer than this; returns the program's exit status.
pub fn exec_in_foreground(execution: Execution<'_>) -> Result<u8, ExecError> {
    let mut foreground = Foreground::new(&execution.config, execution.console_socket)?;
    let (execution, shadow) = execution.spawn(Launch::as_this_process(), foreground.take_peer(), true)?;
    let mut made = false;
    loop {
        match foreground.next(&shadow) {
            Ok(Next::News(News::Made)) => {
                made = true;
                let begun = execution.settle(&shadow);
                if let Err(error) = begun.and_then(|()| Ok(foreground.begin()?)) {
                    shadow.kill();
                    return Err(error);
                }
            }
            Ok(Next::News(News::Failed(error))) => return Err(failed(shadow, error)),
            Ok(Next::News(_)) => {}
            Ok(Next::Over) if made => break,
            Ok(Next::Over) => return Err(died(shadow)),
            Ok(Next::Interrupted(status)) => {
                shadow.kill();
                return Ok(status);
            }
            Err(error) => {
                shadow.kill();
                return Err(error.into());
            }
        }
    }
    let status = shadow.wait().map_err(ExecError::Spawn)?;
    foreground.end();
    // One that was killed takes the program along, for which it stands.
    let code = status.code().or(status.signal().map(|signal| 128 + signal));
    Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX))
}

/// The shadow has said why.
fn failed(shadow: Shadow, error: String) -> ExecError {
    let _ = shadow.wait();
    ExecError::Failed(error)
}

/// The shadow ended without a word.
fn died(shadow: Shadow) -> ExecError {
    shadow.wait().map_or_else(ExecError::Spawn, ExecError::Died)
}

impl Execution<'_> {
    /// Starts the shadow, which is given all that it cannot find out; `terminal` is to be the program's.
    fn spawn(
        mut self,
        launch: Launch,
        terminal: Option<OwnedFd>,
        foreground: bool,
    ) -> Result<(Self, Shadow), ExecError> {
        let container = self.known.process().ok_or_else(|| ExecError::NotRunning(self.known.state.id.clone()))?;
        let copy = container.try_clone().map_err(ExecError::Spawn)?;
        let process = || {
            let mut file = File::from(memfd_create("process", MemfdFlags::CLOEXEC)?);
            file.write_all(&self.config.process())?;
            file.rewind()?;
            Ok(OwnedFd::from(file))
        };
        let process = process().map_err(ExecError::Spawn)?;
        let descriptors = std::mem::take(&mut self.inherited.fds);
        let mounts = machine_for(&self.known, &descriptors)?;
        let begin = Begin {
            kept: true,
            foreground,
            terminal: terminal.is_some(),
            container: true,
            process: true,
            pod: mounts.as_ref().and_then(|_| self.known.state.pod()),
            descriptors: descriptors.len(),
            ..Begin::default()
        };
        let fds: Vec<_> = terminal.into_iter().chain([copy, process]).chain(mounts).chain(descriptors).collect();
        let shadow =
            Shadow::spawn(launch, PidNamespace::Of(container.as_fd()), begin, &fds).map_err(ExecError::Spawn)?;
        Ok((self, shadow))
    }

    /// Puts a shadow where it belongs, and says who it is. It has all its threads, which the group may have no room for.
    fn settle(&self, shadow: &Shadow) -> Result<(), ExecError> {
        let state = &self.known.state;
        let process = self.config.spec().process().as_ref();
        // As with the container, whatever this process has; one that is gone says so otherwise.
        let score = process.and_then(|process| process.oom_score_adj());
        if let Some(score) = score.or_else(|| oom::score(state.process.pid).ok()) {
            oom::set_score(shadow.pid(), score).map_err(ExecError::OomScore)?;
        }
        if let Some(group) = &state.cgroup {
            group.add(shadow.pid())?;
        }
        Ok(self.announce.tell(shadow.pid(), Stands::Executed)?)
    }
}

/// The mount namespace of a container's machine, if something is handed on, which may be a file.
fn machine_for(known: &Known, descriptors: &[OwnedFd]) -> Result<Option<OwnedFd>, ExecError> {
    if descriptors.is_empty() {
        return Ok(None);
    }
    let gone = || ExecError::NotRunning(known.state.id.clone());
    known.state.pod().ok_or_else(gone)?.mounts()?.ok_or_else(gone).map(Some)
}

/// Executes the program and lives as long as it; returns its exit status.
pub fn exec(exec: &Exec<'_>) -> Result<u8, ExecError> {
    signals::block();
    execute(exec, exec.creator.begin()?).map_err(|error| match error {
        // It ended on the way.
        ExecError::Agent(AgentError::Connect(_) | AgentError::Gone(_))
        | ExecError::Stdio(StdioError::Connect(..))
        | ExecError::View(_)
            if exec.known.status() == Status::Stopped =>
        {
            ExecError::NotRunning(exec.known.state.id.clone())
        }
        error => error,
    })
}

/// The container's configuration with the process that was attached.
fn configured(bundle: &Path, process: Option<File>) -> Result<Config, ExecError> {
    let read = || {
        let mut text = String::new();
        process.ok_or(io::ErrorKind::NotFound)?.read_to_string(&mut text)?;
        Ok(serde_json::from_str::<Value>(&text)?)
    };
    let process = read().map_err(ExecError::Spawn)?;
    Ok(bundle::with_process(bundle, |value| *value = process)?)
}

fn execute(exec: &Exec<'_>, given: Given) -> Result<u8, ExecError> {
    let Exec { known, creator, log, .. } = exec;
    let Given { begin, terminal, container, process, mounts: machine, descriptors, .. } = given;
    let host_process = Process::of(begin.pid);
    let config = configured(&known.state.bundle, process)?;
    let id = known.state.id.as_str();
    let pod = known.pod()?;
    let directory = descriptors::directory_of_executed(id, host_process);
    let descriptors = descriptors::prepare(descriptors, &directory)?;
    let stdio = Stdio::new(config.terminal(), exec.console_socket, config.console_size(), terminal)?;
    let stdio = stdio.in_foreground(begin.foreground).leased()?.and(descriptors.streams);
    let name = name()?;
    let request = ExecProcessRequest {
        container_id: id.into(),
        exec_id: name.clone(),
        process: config.process(),
        stdio: Some(stdio.announcement()).into(),
        cgroup: exec.cgroup.into(),
        ignore_paused: exec.ignore_paused,
        descriptors: descriptors.told,
        debug: exec.debug.clone().map(|(name, content)| DebugProgram { name, content, ..Default::default() }).into(),
        ..Default::default()
    };
    let mut files = match machine {
        Some(machine) if !descriptors.files.is_empty() => {
            let attached = Attached::new(machine, id, host_process, descriptors.files);
            Some(attached.map_err(|error| ExecError::Share(id.into(), error))?)
        }
        _ => None,
    };
    let container = container.ok_or_else(|| ExecError::NotRunning(id.into()))?;
    view::join(container.as_fd())?;
    drop(container);
    if let Some(files) = &mut files {
        files.leave();
    }
    confine().map_err(ExecError::Privileges)?;
    let agent = crate::stdio::dial_in_this_thread(pod.as_fd(), podhull_protocol::AGENT_PORT);
    let agent = agent.map_err(AgentError::Connect)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().map_err(ExecError::Signals)?;
    let outcome = runtime.block_on(async {
        let signals = Signals::new().map_err(ExecError::Signals)?;
        let orders = creator.orders().map_err(ExecError::Signals)?;
        let agent = Agent::new(agent)?.counted(pod.as_fd());
        let program = Program { agent: &agent, id, name: &name, stdio: &stdio, log };
        let mut events = agent.events(id, &name).await?;
        let streams = async {
            let mut flow = stdio.connect(pod.as_fd())?;
            flow.connected().await?;
            Ok::<_, ExecError>(flow)
        };
        let executed = async { Ok(agent.exec(&request).await?) };
        let (mut flow, ()) = tokio::try_join!(streams, executed)?;
        log.debug(|| format!("{id}: executed {name}"));
        creator.tell(&News::Made)?;
        let abandoned = async {
            // No order comes, but that there will be none.
            match begin.foreground {
                true => orders.go_on().await,
                false => std::future::pending().await,
            }
        };
        let exit = tokio::select! {
            biased;
            exit = events.exit_of(id, &name) => exit?,
            error = program.signals(&signals) => return Err(error),
            Err(gone) = abandoned => return Err(gone.into()),
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
struct Program<'a> {
    agent: &'a Agent,
    id: &'a str,
    name: &'a str,
    stdio: &'a Stdio,
    log: &'a Log,
}

impl Program<'_> {
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
