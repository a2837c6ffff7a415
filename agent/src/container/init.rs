//! A process of a container, from `execve` of the agent to `execve` of its program: the first one here, others in [`join`].
//!
//! It is in its namespaces and its control group from the start ([`super::launch`]); descriptors 0 to 2 are its standard
//! streams, those that the program is to have beyond them follow, and then what the process itself needs ([`Places`]). The
//! rest is one sequence of steps, each a few system calls with an error of its own; order matters and is said at each step.

use std::ffi::OsString;
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;

use podhull_protocol::MAX_DESCRIPTORS;
use rustix::io::Errno;
use rustix::net::SendFlags;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::affinity::AffinityError;
use super::capabilities::{Capabilities, CapabilityError};
use super::devices::DeviceError;
use super::gate::Gate;
use super::hooks::HookError;
use super::keyring::KeyringError;
use super::mounts::MountError;
use super::namespaces::{NamespaceError, Namespaces};
use super::paths::PathError;
use super::process::ProcessError;
use super::report::{ErrorKind, Report};
use super::rootfs::{Rootfs, RootfsError};
use super::scheduling::SchedulingError;
use super::seccomp::{Filter, SeccompError};
use super::sysctl::SysctlError;
use super::terminal::{Terminal, TerminalError, Window};
use super::{devices, hooks, join, keyring, mounts, namespaces, paths, process, sysctl};
use crate::spec::{Process, Spec};

/// Numbers of the descriptors that the process itself needs: they come after those of the program, which are where the program is
/// to find them.
#[derive(Debug, Clone, Copy)]
pub struct Places {
    /// The first that is not the program's.
    pub first: i32,
}

impl Places {
    /// After so many descriptors of the program beyond its standard streams.
    pub fn after(further: usize) -> Option<Self> {
        let further = i32::try_from(further).ok()?;
        usize::try_from(further).is_ok_and(|count| count <= MAX_DESCRIPTORS).then_some(Self { first: 3 + further })
    }

    /// The socket to the agent, packets in both directions.
    pub fn socket(self) -> i32 {
        self.first
    }

    /// The file with the [`Config`].
    pub fn config(self) -> i32 {
        self.first + 1
    }

    /// The first of those that lead to the namespaces of a container that is there: a pidfd of its init, then its time namespace
    /// if it has one.
    pub fn join(self) -> i32 {
        self.first + 2
    }
}

/// What the agent has its init do.
#[derive(Serialize, Deserialize)]
pub struct Config<'a> {
    pub id: String,
    /// Where the root filesystem is.
    pub rootfs: PathBuf,
    #[serde(borrow)]
    pub spec: &'a RawValue,
    /// The process to execute in the container that is there; none: the container is to be made.
    #[serde(borrow)]
    pub process: Option<&'a RawValue>,
    /// There is no program: this process stays, see [`super::hold`].
    pub holds_pod: bool,
    /// Namespaces of the specification that are another container's, as flags of `clone`.
    pub shared_flags: u64,
    pub window: Window,
}

/// The step that failed.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error("read the configuration of the container's init: {0}")]
    ReadConfig(std::io::Error),
    #[error("configuration of the container's init: {0}")]
    ParseConfig(serde_json::Error),
    #[error("config.json: {0}")]
    ParseSpec(serde_json::Error),
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error("cgroup namespace: {0}")]
    CgroupNamespace(Errno),
    #[error("time namespace: {0}")]
    TimeNamespace(Errno),
    #[error("linux.timeOffsets: {0}")]
    TimeOffsets(std::io::Error),
    #[error("new session: {0}")]
    Session(Errno),
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    #[error("process: {0}")]
    ParseProcess(serde_json::Error),
    #[error("hide from the container: {0}")]
    Hide(Errno),
    #[error("join the namespaces of the container: {0}")]
    Join(Errno),
    #[error("join the time namespace of the container: {0}")]
    JoinTime(Errno),
    #[error("become root of the container: {0}")]
    Root(Errno),
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    #[error("bring up the loopback interface: {0}")]
    Loopback(std::io::Error),
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Terminal(#[from] TerminalError),
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    #[error("hostname {name:?}: {source}")]
    Hostname { name: String, source: Errno },
    #[error("domainname {name:?}: {source}")]
    Domainname { name: String, source: Errno },
    #[error(transparent)]
    Path(#[from] PathError),
    #[error(transparent)]
    Scheduling(#[from] SchedulingError),
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    #[error("no_new_privs: {0}")]
    NoNewPrivileges(Errno),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("keep descriptors from the program: {0}")]
    CloseDescriptors(Errno),
    #[error("report to the agent: {0}")]
    Report(Errno),
    #[error("hold the pod open: {0}")]
    Hold(Errno),
    #[error("wait for the start: {0}")]
    Wait(Errno),
    #[error(transparent)]
    Hook(#[from] HookError),
}

impl InitError {
    fn kind(&self) -> ErrorKind {
        let invalid = match self {
            Self::ParseConfig(_) | Self::ParseSpec(_) | Self::ParseProcess(_) | Self::Namespace(_) => true,
            Self::Rootfs(RootfsError::UnknownPropagation(_)) => true,
            Self::Mount(error) => error.is_invalid(),
            Self::Device(error) => error.is_invalid(),
            Self::Sysctl(error) => error.is_invalid(),
            Self::Path(PathError::Relative { .. }) => true,
            Self::Scheduling(error) => error.is_invalid(),
            Self::Capability(CapabilityError::Unknown { .. }) => true,
            Self::Seccomp(error) => error.is_invalid(),
            Self::Affinity(error) => error.is_invalid(),
            Self::Process(error) => return process_kind(error),
            _ => false,
        };
        if invalid { ErrorKind::Invalid } else { ErrorKind::Internal }
    }
}

/// The codes by which callers tell a program that is missing from one that may not be executed.
fn process_kind(error: &ProcessError) -> ErrorKind {
    match error {
        ProcessError::NotInPath(_) => ErrorKind::NotFound,
        ProcessError::Stat { source, .. } | ProcessError::Exec { source, .. }
            if matches!(*source, Errno::NOENT | Errno::NOTDIR) =>
        {
            ErrorKind::NotFound
        }
        ProcessError::Stat { .. }
        | ProcessError::NotExecutable { .. }
        | ProcessError::Exec { .. }
        | ProcessError::RelativeInPath(_) => ErrorKind::PermissionDenied,
        ProcessError::NoArgs
        | ProcessError::RelativeCwd(_)
        | ProcessError::Nul { .. }
        | ProcessError::Env(_)
        | ProcessError::Umask(_) => ErrorKind::Invalid,
        _ => ErrorKind::Internal,
    }
}

/// Entry of `podhull-agent init N`, whose program is to have N descriptors beyond its standard streams. Returns only if the program
/// could not be executed.
pub fn main(mut arguments: impl Iterator<Item = OsString>) -> i32 {
    let further = arguments.next().and_then(|number| number.to_str()?.parse().ok());
    let Some(places) = further.and_then(Places::after) else { return 2 };
    for signal in 1..=libc::SIGRTMAX() {
        // Ignored signals would stay ignored in the program: a shell has its background jobs ignore the terminal's, and
        // whoever starts an agent without a machine may be one. Not all can be set; those are not ignored either.
        // SAFETY: restores a default; no handler is involved.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // A terminal or stream that goes with a failure must not kill who has to report it.
    for signal in [libc::SIGHUP, libc::SIGPIPE] {
        // SAFETY: ignores a signal; no handler is involved.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    // SAFETY: the agent starts us with this descriptor open, and nothing else uses it.
    let socket = unsafe { OwnedFd::from_raw_fd(places.socket()) };
    match run(&socket, places) {
        Ok(never) => match never {},
        Err(error) => {
            let report = Report::Failed { kind: error.kind(), message: error.to_string() };
            // Without the agent there is nobody to tell.
            let _ = rustix::net::send(&socket, &report.encode(), SendFlags::NOSIGNAL);
            1
        }
    }
}

fn run(socket: &OwnedFd, places: Places) -> Result<std::convert::Infallible, InitError> {
    let text = read_config(places).map_err(InitError::ReadConfig)?;
    let config: Config = serde_json::from_str(&text).map_err(InitError::ParseConfig)?;
    let spec: Spec = serde_json::from_str(config.spec.get()).map_err(InitError::ParseSpec)?;
    if let Some(process) = config.process {
        let process: Process = serde_json::from_str(process.get()).map_err(InitError::ParseProcess)?;
        return join::run(socket, places, &config, &spec, &process.within(&spec.process));
    }
    let namespaces = Namespaces { shared_flags: config.shared_flags, ..Namespaces::of(&spec)? };
    let capabilities = Capabilities::of(spec.process.capabilities.as_ref())?;
    let filter = spec.linux.seccomp.as_ref().map(Filter::compile).transpose()?;

    join_namespaces(&spec, namespaces)?;
    rustix::process::setsid().map_err(InitError::Session)?;
    if let Some(ring) = keyring::join(&config.id)? {
        keyring::let_search(ring)?;
    }
    // Files are made with the modes that are said.
    rustix::process::umask(rustix::fs::Mode::empty());
    // Through the guest's /proc, which is the one to trust.
    sysctl::write(&sysctl::check(&spec.linux.sysctl, namespaces)?)?;
    name_host(&spec)?;
    let terminal = enter_root(&config, &spec, namespaces)?;

    // Only now, because what is read-only to the container had to be written, and before the capabilities go.
    process::make_cwd(&spec.process.cwd)?;
    let gate = Gate {
        socket,
        places,
        process: &spec.process,
        env: process::environment(&spec.process)?,
        capabilities,
        filter: filter.as_ref(),
        personality: spec.linux.personality.as_ref(),
        terminal,
        holds_pod: config.holds_pod,
    };
    gate.pass(|| Ok(hooks::run(&spec, &config.id)?))
}

fn read_config(places: Places) -> std::io::Result<String> {
    // SAFETY: the agent starts us with this descriptor open, and nothing else uses it.
    let mut file = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(places.config()) });
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
}

/// The namespaces that a process makes for itself, and what is set up in new ones.
fn join_namespaces(spec: &Spec, namespaces: Namespaces) -> Result<(), InitError> {
    if namespaces.cgroup {
        unshare(libc::CLONE_NEWCGROUP).map_err(InitError::CgroupNamespace)?;
    }
    if namespaces.time {
        // The process itself moves in with execve.
        unshare(libc::CLONE_NEWTIME).map_err(InitError::TimeNamespace)?;
        let offsets: String = spec
            .linux
            .time_offsets
            .iter()
            .map(|(clock, offset)| format!("{clock} {} {}\n", offset.secs, offset.nanosecs))
            .collect();
        if !offsets.is_empty() {
            std::fs::write("/proc/self/timens_offsets", offsets).map_err(InitError::TimeOffsets)?;
        }
    }
    if namespaces.has_own_network() {
        namespaces::loopback_up().map_err(InitError::Loopback)?;
    }
    Ok(())
}

fn unshare(flag: libc::c_int) -> Result<(), Errno> {
    // SAFETY: the flags used are about namespaces of the process, not about memory or descriptors.
    if unsafe { libc::unshare(flag) } < 0 { Err(super::rootfs::last_errno()) } else { Ok(()) }
}

/// Makes everything below the container's root from outside of it, and goes in.
fn enter_root(config: &Config, spec: &Spec, namespaces: Namespaces) -> Result<Option<Terminal>, InitError> {
    if !spec.has_namespace("mount") {
        Rootfs::open_shared(&config.rootfs)?.change_root()?;
        return Ok(None);
    }
    let root = Rootfs::prepare(&config.rootfs, &spec.linux.rootfs_propagation)?;
    let mut unfinished = Vec::new();
    for mount in &spec.mounts {
        unfinished.extend(mounts::mount(&root, mount)?);
    }
    let own_dev = devices::wanted(spec);
    if own_dev {
        devices::make(&root, spec, namespaces.user)?;
        devices::reopen_null(&root)?;
    }
    let mut terminal = None;
    if spec.process.terminal {
        let opened = Terminal::open(&root, &config.window, spec.process.user.uid)?;
        if own_dev {
            opened.mount_console(&root)?;
        }
        terminal = Some(opened);
    }
    paths::make_readonly(&root, &spec.linux.readonly_paths)?;
    paths::mask(&root, &spec.linux.masked_paths)?;
    for mount in unfinished {
        mount.finish()?;
    }
    root.finish(&spec.linux.rootfs_propagation, spec.root.as_ref().is_some_and(|root| root.readonly))?;
    root.pivot()?;
    Ok(terminal)
}

fn name_host(spec: &Spec) -> Result<(), InitError> {
    if !spec.hostname.is_empty() {
        rustix::system::sethostname(spec.hostname.as_bytes())
            .map_err(|source| InitError::Hostname { name: spec.hostname.clone(), source })?;
    }
    if !spec.domainname.is_empty() {
        rustix::system::setdomainname(spec.domainname.as_bytes())
            .map_err(|source| InitError::Domainname { name: spec.domainname.clone(), source })?;
    }
    Ok(())
}
