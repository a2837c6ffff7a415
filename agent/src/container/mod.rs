//! A container: made, started, watched, removed.

pub mod capabilities;
mod copy_up;
mod devices;
mod hooks;
pub mod init;
mod launch;
mod limits;
mod mount_options;
mod mounts;
pub mod namespaces;
mod paths;
mod process;
pub mod report;
mod rootfs;
mod scheduling;
mod seccomp;
mod sysctl;
mod terminal;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use podhull_protocol::{Event, Exit, OutOfMemory, event};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::cgroup::{Cgroup, CgroupError, Hierarchy};
use crate::events::Events;
use crate::reaper::{ExitStatus, Reaper};
use crate::spec::Spec;
use crate::stdio::{Claim, ContainerEnds, Pumps, StdioError};
use launch::{LaunchError, Launched};
use limits::{LimitError, Limits};
use namespaces::{NamespaceError, Namespaces};
use process::ProcessError;
use report::{ErrorKind, Report};

/// First argument of the agent as a container's init.
pub const INIT_ARGUMENT: &str = "init";

/// How long an init may take to be ready for its program, and for `execve` without hooks.
const INIT_DEADLINE: Duration = Duration::from_secs(60);

/// How long the output of a deleted container may take to be gone.
const EXIT_DEADLINE: Duration = Duration::from_secs(10);

/// What cannot be done with a container.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    #[error("config.json: {0}")]
    Spec(serde_json::Error),
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Limit(#[from] LimitError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error("process.terminal is {spec}, but the call says {call}")]
    Terminal { spec: bool, call: bool },
    #[error("a container with a terminal needs a stdout token")]
    TerminalWithoutStream,
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// In the words of the step that failed.
    #[error("{message}")]
    Init { kind: ErrorKind, message: String },
    #[error("container init {0} before it was ready{hint}", hint = out_of_memory_hint(*.0))]
    InitDied(ExitStatus),
    #[error("container init took longer than {} s", .0.as_secs())]
    InitSlow(Duration),
    #[error("talk to the container's init: {0}")]
    InitSocket(io::Error),
    #[error("the terminal did not arrive")]
    NoTerminal,
    #[error("container is not created: it was started before, or has ended")]
    NotCreated,
    #[error("container not running")]
    NotRunning,
    #[error("container has no terminal")]
    NoTerminalToResize,
    #[error("set the window size: {0}")]
    Resize(Errno),
    #[error("signal {signal}: {source}")]
    Signal { signal: i32, source: Errno },
    #[error("unknown signal {0}")]
    UnknownSignal(i32),
}

fn out_of_memory_hint(status: ExitStatus) -> &'static str {
    if status == ExitStatus::Signal(9) { " (memory limit too low?)" } else { "" }
}

impl ContainerError {
    /// Who is to blame.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Spec(_) | Self::Namespace(_) | Self::Terminal { .. } | Self::TerminalWithoutStream => {
                ErrorKind::Invalid
            }
            Self::Process(_) | Self::UnknownSignal(_) | Self::Stdio(StdioError::TokenTwice(_)) => ErrorKind::Invalid,
            Self::Limit(LimitError::Set { source, .. }) if *source != Errno::INVAL => ErrorKind::Internal,
            Self::Limit(LimitError::WriteOomScore(_)) => ErrorKind::Internal,
            Self::Limit(_) => ErrorKind::Invalid,
            Self::Cgroup(error) if error.is_invalid() => ErrorKind::Invalid,
            Self::Init { kind, .. } => *kind,
            _ => ErrorKind::Internal,
        }
    }
}

/// The streams of a container, as the call announces them.
pub struct Streams {
    pub terminal: bool,
    pub stdin: Option<Claim>,
    pub stdout: Option<Claim>,
    pub stderr: Option<Claim>,
    pub rows: u16,
    pub columns: u16,
}

/// What a container is made of.
pub struct Request<'a> {
    pub id: String,
    pub spec: &'a [u8],
    pub rootfs: PathBuf,
    pub streams: Streams,
}

/// A container that was made.
pub struct Container {
    pub pid: Pid,
    pidfd: OwnedFd,
    cgroup: Arc<Cgroup>,
    /// To the init that waits for its start; taken by whoever starts it.
    gate: Mutex<Option<AsyncFd<OwnedFd>>>,
    start_deadline: Duration,
    /// The pumps hold the terminal; when they let go it hangs up.
    master: Option<Weak<OwnedFd>>,
    /// Whether the init has been reaped.
    ended: watch::Receiver<bool>,
    /// The task that reports the exit.
    reporter: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

/// What containers share.
pub struct Surroundings<'a> {
    pub cgroups: &'a Hierarchy,
    pub reaper: &'a Reaper,
    pub events: Arc<Events>,
}

impl Container {
    /// Makes a container up to the point where only its program is missing. What was made is removed if it fails.
    pub async fn create(request: Request<'_>, around: Surroundings<'_>) -> Result<Self, ContainerError> {
        let spec: Spec = serde_json::from_slice(request.spec).map_err(ContainerError::Spec)?;
        let namespaces = Namespaces::of(&spec)?;
        process::check(&spec.process)?;
        let limits = Limits::of(&spec.process)?;
        let cgroup = around.cgroups.create(&spec.linux.cgroups_path, &request.id, &spec.linux.resources)?;
        match Self::create_in(&cgroup, &spec, namespaces, &limits, request, &around).await {
            Ok(made) => Ok(made.watched(Arc::new(cgroup), &spec, &around)),
            Err(error) => {
                // The reason is the error to tell.
                let _ = cgroup.remove().await;
                Err(error)
            }
        }
    }

    async fn create_in(
        cgroup: &Cgroup,
        spec: &Spec,
        namespaces: Namespaces,
        limits: &Limits,
        request: Request<'_>,
        around: &Surroundings<'_>,
    ) -> Result<Made, ContainerError> {
        let Streams { terminal, stdin, stdout, stderr, rows, columns } = request.streams;
        if terminal != spec.process.terminal {
            return Err(ContainerError::Terminal { spec: spec.process.terminal, call: terminal });
        }
        let mut pumps = Pumps::new();
        let (uid, gid) = (spec.linux.guest_uid(spec.process.user.uid), spec.linux.guest_gid(spec.process.user.gid));
        let (ends, terminal) = if terminal {
            (ContainerEnds::null()?, Some(stdout.ok_or(ContainerError::TerminalWithoutStream)?))
        } else {
            (pumps.pipes([stdin, stdout, stderr], uid, gid)?, None)
        };
        let size = spec.process.console_size.as_ref();
        let config = init::Config {
            id: request.id,
            rootfs: request.rootfs,
            spec: serde_json::from_slice(request.spec).map_err(ContainerError::Spec)?,
            rows: if rows != 0 { rows } else { size.map_or(0, |size| size.height) },
            columns: if columns != 0 { columns } else { size.map_or(0, |size| size.width) },
        };
        let delegated = namespaces.user && namespaces.cgroup && mounts_cgroup_writable(spec);
        if delegated {
            cgroup.delegate(spec.linux.guest_uid(0))?;
        }
        let mut launched = launch::launch(&config, spec, namespaces, &cgroup.open()?, ends, around.reaper)?;
        let ready = Self::await_ready(&mut launched, limits, terminal, &mut pumps).await;
        match ready.and_then(|master| cgroup.set_limits(&spec.linux.resources).map_err(Into::into).map(|()| master)) {
            Ok(master) => Ok(Made { launched, pumps, master }),
            Err(error) => {
                // It may have ended by itself; then there is nothing to kill.
                let _ = rustix::process::pidfd_send_signal(&launched.pidfd, Signal::KILL);
                Err(error)
            }
        }
    }

    async fn await_ready(
        launched: &mut Launched,
        limits: &Limits,
        terminal: Option<Claim>,
        pumps: &mut Pumps,
    ) -> Result<Option<Weak<OwnedFd>>, ContainerError> {
        let answer = tokio::time::timeout(INIT_DEADLINE, launch::receive(&launched.socket)).await;
        let (report, master) =
            answer.map_err(|_| ContainerError::InitSlow(INIT_DEADLINE))?.map_err(ContainerError::InitSocket)?;
        match report {
            Some(Report::Created) => {}
            Some(Report::Failed { kind, message }) => return Err(ContainerError::Init { kind, message }),
            None => {
                let status = tokio::time::timeout(EXIT_DEADLINE, &mut launched.exit).await;
                let status = status.ok().and_then(Result::ok).unwrap_or(ExitStatus::Code(1));
                return Err(ContainerError::InitDied(status));
            }
        }
        // Not before: the init itself is not to run into them.
        limits.set(launched.pid)?;
        let Some(claim) = terminal else { return Ok(None) };
        let master = Arc::new(master.ok_or(ContainerError::NoTerminal)?);
        let weak = Arc::downgrade(&master);
        pumps.terminal(master, claim)?;
        Ok(Some(weak))
    }

    /// Opens the gate. Returns when the program is executed.
    pub async fn start(&self) -> Result<(), ContainerError> {
        let gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner).take();
        let gate = gate.ok_or(ContainerError::NotCreated)?;
        if *self.ended.borrow() {
            return Err(ContainerError::NotCreated);
        }
        launch::send(&gate, init::START).await.map_err(ContainerError::InitSocket)?;
        // The socket is closed by execve; an init that is killed before has an exit status, as any program.
        let answer = tokio::time::timeout(self.start_deadline, launch::receive(&gate)).await;
        let (report, _) =
            answer.map_err(|_| ContainerError::InitSlow(self.start_deadline))?.map_err(ContainerError::InitSocket)?;
        match report {
            Some(Report::Failed { kind, message }) => Err(ContainerError::Init { kind, message }),
            Some(Report::Created) | None => Ok(()),
        }
    }

    /// Sends a signal to the init, or to all processes.
    pub fn signal(&self, number: i32, all: bool) -> Result<(), ContainerError> {
        let signal = signal_of(number).ok_or(ContainerError::UnknownSignal(number))?;
        let failed = |source| ContainerError::Signal { signal: number, source };
        if !all {
            if *self.ended.borrow() {
                return Err(ContainerError::NotRunning);
            }
            return match rustix::process::pidfd_send_signal(&self.pidfd, signal) {
                Err(Errno::SRCH) => Err(ContainerError::NotRunning),
                other => other.map_err(failed),
            };
        }
        if signal == Signal::KILL {
            return Ok(self.cgroup.kill()?);
        }
        for process in self.cgroup.processes()? {
            let Some(pid) = Pid::from_raw(process) else { continue };
            match rustix::process::kill_process(pid, signal) {
                // Gone in between.
                Ok(()) | Err(Errno::SRCH) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
        Ok(())
    }

    /// Sets the window size of the terminal.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<(), ContainerError> {
        let master = self.master.as_ref().ok_or(ContainerError::NoTerminalToResize)?;
        let master = master.upgrade().ok_or(ContainerError::NotRunning)?;
        terminal::set_size(master, rows, columns).map_err(ContainerError::Resize)
    }

    /// Kills what is left and removes the cgroup. The exit is reported before, unless nobody takes the output.
    pub async fn delete(&self) -> Result<(), ContainerError> {
        self.cgroup.remove().await?;
        let reporter = self.reporter.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut reporter) = reporter
            && tokio::time::timeout(EXIT_DEADLINE, &mut reporter).await.is_err()
        {
            reporter.abort();
        }
        Ok(())
    }
}

/// A container whose init waits, not watched yet.
struct Made {
    launched: Launched,
    pumps: Pumps,
    master: Option<Weak<OwnedFd>>,
}

impl Made {
    fn watched(self, cgroup: Arc<Cgroup>, spec: &Spec, around: &Surroundings<'_>) -> Container {
        let Self { launched, pumps, master } = self;
        let Launched { id, pid, pidfd, socket, exit } = launched;
        let (sender, ended) = watch::channel(false);
        let events = around.events.clone();
        let watched = cgroup.clone();
        let reporter = tokio::spawn(async move {
            let status = {
                let memory = report_out_of_memory(&id, &watched, &events);
                tokio::select! {
                    status = exit => status.unwrap_or(ExitStatus::Code(255)),
                    never = memory => match never {},
                }
            };
            sender.send_replace(true);
            pumps.finish().await;
            let kills = watched.oom_kills();
            let (code, signal) = match status {
                ExitStatus::Code(code) => (code, 0),
                ExitStatus::Signal(signal) => (0, signal),
            };
            let exit = Exit { code, signal, oom_killed: kills > 0, ..Exit::default() };
            events.push(Event { container_id: id, kind: Some(event::Kind::Exit(exit)), ..Event::default() });
        });
        let hooks: Duration = spec.hooks.start_container.iter().map(hooks::timeout).sum();
        Container {
            pid,
            pidfd,
            cgroup,
            gate: Mutex::new(Some(socket)),
            start_deadline: INIT_DEADLINE + hooks,
            master,
            ended,
            reporter: Mutex::new(Some(reporter)),
        }
    }
}

/// Reports kills for lack of memory as they happen, for as long as it is polled.
async fn report_out_of_memory(id: &str, cgroup: &Cgroup, events: &Events) -> std::convert::Infallible {
    let mut reported = 0;
    if let Ok(Some(mut watch)) = cgroup.watch_memory() {
        loop {
            let kills = cgroup.oom_kills();
            if kills > reported {
                reported = kills;
                let kind = event::Kind::OutOfMemory(OutOfMemory { kills, ..OutOfMemory::default() });
                events.push(Event { container_id: id.into(), kind: Some(kind), ..Event::default() });
            }
            if watch.changed().await.is_err() {
                break;
            }
        }
    }
    std::future::pending().await
}

fn mounts_cgroup_writable(spec: &Spec) -> bool {
    spec.mounts.iter().any(|mount| {
        matches!(mount.kind.as_str(), "cgroup" | "cgroup2") && !mount.options.iter().any(|option| option == "ro")
    })
}

fn signal_of(number: i32) -> Option<Signal> {
    // SAFETY: real-time signals are only passed on to processes, which is what rustix reserves them from handlers for.
    (1..=64).contains(&number).then(|| unsafe { Signal::from_raw_unchecked(number) })
}
