//! A container: made, started, watched, removed.

mod affinity;
pub mod capabilities;
pub mod copy_up;
mod devices;
pub mod exec;
mod gate;
mod hold;
mod hooks;
pub mod init;
mod join;
mod keyring;
mod launch;
mod limits;
mod mount_options;
mod mounts;
pub mod namespaces;
mod out_of_memory;
mod paths;
mod process;
pub mod report;
mod rootfs;
mod scheduling;
mod seccomp;
mod sysctl;
mod terminal;
mod watched;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use podhull_protocol::{ContainerStatsResponse, Event};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};
use tokio::io::unix::AsyncFd;

use crate::cgroup::{Cgroup, CgroupError, Hierarchy};
use crate::descriptors::{DescriptorError, Wanted};
use crate::events::Events;
use crate::network::{Configure, NetworkError, PodNetwork};
use crate::reaper::{ExitStatus, Reaper};
use crate::shared::Users;
use crate::sockets::Sockets;
use crate::spec::{Process, Resources, Spec};
use crate::stdio::{Claim, ContainerEnds, Pumps, StdioError};
use crate::volumes::{Copies, VolumeError};
use affinity::AffinityError;
use exec::Executed;
pub use join::setns;
use launch::{LaunchError, Place};
use limits::{LimitError, Limits};
use namespaces::{NamespaceError, Namespaces};
use out_of_memory::Kills;
use process::ProcessError;
use report::ErrorKind;
pub use terminal::Window;
use watched::{READY_DEADLINE, Ready, Watched};

/// First argument of the agent as a container's init.
pub const INIT_ARGUMENT: &str = "init";

/// What cannot be done with a container.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    #[error("config.json: {0}")]
    Spec(serde_json::Error),
    #[error("process: {0}")]
    ProcessJson(serde_json::Error),
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Limit(#[from] LimitError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    #[error("process.terminal is {spec}, but the call says {call}")]
    Terminal { spec: bool, call: bool },
    #[error("a container with a terminal needs a stdout token")]
    TerminalWithoutStream,
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// In the words of the step that failed.
    #[error("{message}")]
    Init { kind: ErrorKind, message: String },
    #[error("container process {0} before it was ready{hint}", hint = out_of_memory_hint(*.0))]
    InitDied(ExitStatus),
    #[error("container process took longer than {} s", .0.as_secs())]
    InitSlow(Duration),
    #[error("talk to the container's process: {0}")]
    InitSocket(io::Error),
    #[error("the terminal did not arrive")]
    NoTerminal,
    #[error("container is not created: it was started before, or has ended")]
    NotCreated,
    #[error("container not running")]
    NotRunning,
    /// runc's words, as the next.
    #[error("cannot exec in a paused container")]
    ExecPaused,
    #[error("cannot exec in a stopped container: container not running")]
    ExecStopped,
    #[error("container not paused")]
    NotPaused,
    #[error("resources: {0}")]
    ResourcesJson(serde_json::Error),
    #[error("process {0:?} exists already")]
    ProcessExists(String),
    #[error("process {0:?} does not exist")]
    NoProcess(String),
    #[error("process not running")]
    ProcessNotRunning,
    #[error("the container has too many executed processes that were not deleted")]
    TooManyProcesses,
    #[error("cannot join a namespace of container {0:?}: container not running")]
    SharedEnded(String),
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
    /// Whether the container, or its process, is not in a state for the call.
    pub fn is_state(&self) -> bool {
        matches!(
            self,
            Self::NotCreated
                | Self::NotRunning
                | Self::NotPaused
                | Self::NoTerminalToResize
                | Self::SharedEnded(_)
                | Self::ExecPaused
                | Self::ExecStopped
                | Self::ProcessNotRunning
        )
    }

    /// Who is to blame.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Spec(_) | Self::ProcessJson(_) | Self::ResourcesJson(_) | Self::Namespace(_) => ErrorKind::Invalid,
            Self::Affinity(_) | Self::Terminal { .. } | Self::TerminalWithoutStream => ErrorKind::Invalid,
            Self::Process(_) | Self::UnknownSignal(_) | Self::Stdio(StdioError::TokenTwice(_)) => ErrorKind::Invalid,
            Self::Limit(LimitError::Set { source, .. }) if *source != Errno::INVAL => ErrorKind::Internal,
            Self::Limit(LimitError::WriteOomScore(_)) => ErrorKind::Internal,
            Self::Limit(_) => ErrorKind::Invalid,
            Self::Descriptor(error) if error.is_invalid() => ErrorKind::Invalid,
            Self::Cgroup(error) if error.is_invalid() => ErrorKind::Invalid,
            Self::Network(error) if error.is_invalid() => ErrorKind::Invalid,
            Self::NoProcess(_) => ErrorKind::NotFound,
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
    pub window: Window,
}

impl Streams {
    /// The terminal's beginning: its size is that of the call, else that of the specification.
    fn window(&self, process: &Process) -> Window {
        let size = process.console_size.as_ref();
        let or = |given, said| if given != 0 { given } else { said };
        Window {
            rows: or(self.window.rows, size.map_or(0, |size| size.height)),
            columns: or(self.window.columns, size.map_or(0, |size| size.width)),
            plain_newlines: self.window.plain_newlines,
        }
    }

    /// The process's ends, and the stream that waits for its terminal.
    fn ends(
        self,
        process: &Process,
        pumps: &mut Pumps,
        uid: u32,
        gid: u32,
    ) -> Result<(ContainerEnds, Option<Claim>), ContainerError> {
        if self.terminal != process.terminal {
            return Err(ContainerError::Terminal { spec: process.terminal, call: self.terminal });
        }
        if self.terminal {
            Ok((ContainerEnds::null()?, Some(self.stdout.ok_or(ContainerError::TerminalWithoutStream)?)))
        } else {
            Ok((pumps.pipes([self.stdin, self.stdout, self.stderr], uid, gid)?, None))
        }
    }
}

/// What a container is made of.
pub struct Request<'a> {
    pub id: String,
    pub spec: &'a [u8],
    pub rootfs: PathBuf,
    pub streams: Streams,
    pub descriptors: Wanted,
    pub shared: &'a [Shared],
    pub network: Network<'a>,
    /// Whether it has no program, and holds the pod open.
    pub holds_pod: bool,
}

/// The network of a container.
pub enum Network<'a> {
    /// What its specification says: one of its own, with nothing but the loopback interface, another container's, or that of
    /// the guest.
    Own,
    /// That of the pod, of which it is the first container, and what is to be done with it.
    Pod(&'a PodNetwork, Configure),
}

/// A namespace that is another container's.
pub struct Shared {
    /// Type in the words of the specification.
    pub kind: String,
    pub with: Arc<Container>,
}

/// A container that was made.
pub struct Container {
    id: String,
    /// As it came, for the processes executed later.
    spec: Box<[u8]>,
    rootfs: PathBuf,
    init: Watched,
    cgroup: Arc<Cgroup>,
    /// To the init that waits for its start; taken by whoever starts it.
    gate: Mutex<Option<AsyncFd<OwnedFd>>>,
    start_deadline: Duration,
    executed: Executed,
    deleted: AtomicBool,
    /// In place of sockets of the host, volumes, and directories that others have too, until it is deleted.
    kept: Mutex<Option<(Sockets, Copies, Users)>>,
}

impl Shared {
    /// Its init, as long as that lives, and the flag of the type. Nothing may be waited for between this and the use.
    fn flag(&self) -> Result<(&OwnedFd, u64), ContainerError> {
        if !self.with.init.is_alive() {
            return Err(ContainerError::SharedEnded(self.with.id.clone()));
        }
        Ok((&self.with.init.pidfd, namespaces::shared_flag(&self.kind)?))
    }
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
        let mut namespaces = Namespaces::of(&spec)?;
        for shared in request.shared {
            namespaces.share(&shared.kind)?;
        }
        process::check(&spec.process)?;
        if let Some(affinity) = &spec.process.exec_cpu_affinity {
            affinity::check(affinity)?;
        }
        let limits = Limits::of(&spec.process)?;
        let mut request = request;
        // With a user namespace the network is the container's, and made with it.
        if let Network::Pod(network, configure) = &mut request.network
            && !(namespaces.user && namespaces.has_own_network())
        {
            network.configure(std::mem::take(configure)).await?;
            if namespaces.has_own_network() {
                namespaces.share("network")?;
            }
            request.network = Network::Own;
        }
        let cgroup = around.cgroups.create(&spec.linux.cgroups_path, &request.id, &spec.linux.resources)?;
        let (id, rootfs, bytes) = (request.id.clone(), request.rootfs.clone(), request.spec);
        let ready = match Self::create_in(&cgroup, &spec, namespaces, &limits, request, &around).await {
            Ok(ready) => ready,
            Err(error) => {
                // The reason is the error to tell.
                let _ = cgroup.remove().await;
                return Err(error);
            }
        };
        let cgroup = Arc::new(cgroup);
        let event = Event { container_id: id.clone(), ..Event::default() };
        let kills = Kills::new(id.clone(), cgroup.clone(), around.events.clone());
        let (init, socket) = ready.watched(event, cgroup.clone(), around.events.clone(), Some(kills));
        Ok(Self {
            id,
            spec: bytes.into(),
            rootfs,
            init,
            cgroup,
            gate: Mutex::new(Some(socket)),
            start_deadline: hooks::timeouts(&spec).saturating_add(READY_DEADLINE),
            executed: Executed::default(),
            deleted: AtomicBool::new(false),
            kept: Mutex::default(),
        })
    }

    async fn create_in(
        cgroup: &Cgroup,
        spec: &Spec,
        namespaces: Namespaces,
        limits: &Limits,
        request: Request<'_>,
        around: &Surroundings<'_>,
    ) -> Result<Ready, ContainerError> {
        let mut pumps = Pumps::new();
        let (uid, gid) = (spec.linux.guest_uid(spec.process.user.uid), spec.linux.guest_gid(spec.process.user.gid));
        let window = request.streams.window(&spec.process);
        let (mut ends, terminal) = request.streams.ends(&spec.process, &mut pumps, uid, gid)?;
        ends.further = request.descriptors.make(&mut pumps, uid, gid).await?;
        let config = init::Config {
            id: request.id,
            rootfs: request.rootfs,
            spec: serde_json::from_slice(request.spec).map_err(ContainerError::Spec)?,
            process: None,
            holds_pod: request.holds_pod,
            shared_flags: namespaces.shared_flags,
            window,
        };
        let delegated = namespaces.user && namespaces.cgroup && mounts_cgroup_writable(spec);
        if delegated {
            cgroup.delegate(spec.linux.guest_uid(0))?;
        }
        let shared = request.shared.iter().map(Shared::flag).collect::<Result<_, _>>()?;
        let place = Place::New { spec, namespaces, shared };
        let launched = launch::launch(&config, &place, &cgroup.open()?, &ends, around.reaper)?;
        // Ours: the streams end when the process's own are closed.
        drop(ends);
        if let Network::Pod(network, configure) = request.network {
            let pid = launched.pid.as_raw_nonzero().to_string();
            network.settle_in(launch::open_namespace(&pid, "net")?, configure).await?;
        }
        launched.release()?;
        let ready = Ready::await_from(launched, limits, terminal, pumps).await?;
        match cgroup.set_limits(&spec.linux.resources) {
            Ok(()) => Ok(ready),
            Err(error) => {
                ready.kill();
                Err(error.into())
            }
        }
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Process id of the init in the guest.
    pub fn pid(&self) -> Pid {
        self.init.pid
    }

    /// Opens the gate. Returns when the program is executed.
    pub async fn start(&self) -> Result<(), ContainerError> {
        let gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner).take();
        let gate = gate.ok_or(ContainerError::NotCreated)?;
        if self.init.has_ended() {
            return Err(ContainerError::NotCreated);
        }
        watched::pass(&gate, self.start_deadline).await
    }

    fn is_started(&self) -> bool {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::Relaxed)
    }

    /// Sends a signal to the init, or to all processes.
    pub fn signal(&self, number: i32, all: bool) -> Result<(), ContainerError> {
        let signal = signal_of(number).ok_or(ContainerError::UnknownSignal(number))?;
        let failed = |source| ContainerError::Signal { signal: number, source };
        if !all {
            return match self.init.signal(signal) {
                Ok(true) => Ok(()),
                Ok(false) => Err(ContainerError::NotRunning),
                Err(source) => Err(failed(source)),
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

    /// Stops every process.
    pub async fn pause(&self) -> Result<(), ContainerError> {
        // As with runc, one that is paused does not run.
        if !self.init.is_alive() || self.cgroup.is_frozen() {
            return Err(ContainerError::NotRunning);
        }
        Ok(self.cgroup.freeze(true).await?)
    }

    /// Lets every process go on.
    pub async fn resume(&self) -> Result<(), ContainerError> {
        if !self.cgroup.is_frozen() {
            return Err(ContainerError::NotPaused);
        }
        Ok(self.cgroup.freeze(false).await?)
    }

    /// Changes the limits that are given.
    pub fn update(&self, resources: &[u8]) -> Result<(), ContainerError> {
        let limits: Resources = serde_json::from_slice(resources).map_err(ContainerError::ResourcesJson)?;
        if !self.init.is_alive() {
            return Err(ContainerError::NotRunning);
        }
        let spec: Spec = serde_json::from_slice(&self.spec).map_err(ContainerError::Spec)?;
        Ok(self.cgroup.update_limits(&limits, &spec.linux.resources.devices)?)
    }

    /// What it has used and may use.
    pub fn stats(&self) -> Result<ContainerStatsResponse, ContainerError> {
        Ok(self.cgroup.stats()?)
    }

    /// Sets the window size of the terminal of the init, or of an executed process.
    pub fn resize(&self, exec_id: &str, rows: u16, columns: u16) -> Result<(), ContainerError> {
        if exec_id.is_empty() {
            self.init.resize(rows, columns)
        } else {
            self.executed.get(exec_id)?.resize(rows, columns)
        }
    }

    /// Keeps what it has, instead of what it had.
    pub fn keep(&self, kept: Option<(Sockets, Copies, Users)>) {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = kept;
    }

    /// Makes the copy of a volume what the host has now.
    pub async fn update_volume(&self, name: &str) -> Result<(), VolumeError> {
        let update = match &*self.kept.lock().unwrap_or_else(PoisonError::into_inner) {
            Some((_, volumes, _)) => volumes.update(name),
            None => return Err(VolumeError::Missing(name.into())),
        };
        update.await
    }

    /// Kills what is left and removes the cgroup. The exits are reported before, unless nobody takes the output.
    pub async fn delete(&self) -> Result<(), ContainerError> {
        self.deleted.store(true, Ordering::Relaxed);
        self.keep(None);
        self.cgroup.remove().await?;
        let mut last = tokio::task::JoinSet::new();
        for process in self.executed.all() {
            // One in the guest itself is not in the group.
            let _ = process.signal(Signal::KILL);
            last.spawn(async move { process.finish().await });
        }
        self.init.finish().await;
        last.join_all().await;
        Ok(())
    }
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
