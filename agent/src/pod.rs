//! The pod: its containers, and the machine they share.

use std::borrow::Cow;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use podhull_protocol::{
    AdjustClockRequest, AdjustClockResponse, ConfigureNetworkRequest, ContainerStatsResponse, CreateContainerRequest,
    CreateContainerResponse, CreatePodRequest, CreatePodResponse, DEBUG_DIR, DebugProgram, Disk, ExecProcessRequest,
    ExecProcessResponse, GrowRequest, GrowResponse, MAX_DEBUG_PROGRAM, PodStatsResponse, Stdio, VERSION,
};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::sync::OnceCell;

use crate::boot;
use crate::cgroup::{CgroupError, Hierarchy};
use crate::container::report::ErrorKind;
use crate::container::{self, Container, ContainerError, Network};
use crate::descriptors::{DescriptorError, Wanted};
use crate::disks;
use crate::events::Events;
use crate::log;
use crate::machine::{Machine, MachineError};
use crate::memory::Memory;
use crate::network::{Configure, Description, MAX_FORWARDS, NetworkError, PodNetwork};
use crate::reaper::Reaper;
use crate::shared::Shared;
use crate::sockets::Sockets;
use crate::stats;
use crate::stdio::{self, StdioError, Streams};
use crate::volumes::{VolumeError, Volumes};

/// Longest name of a container.
const MAX_ID: usize = 1024;

/// A call that cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    #[error(
        "the agent speaks version {VERSION} of the protocol, not {0}: install podhull and its guest image together"
    )]
    Version(u32),
    #[error("the pod exists already")]
    PodExists,
    #[error("the pod does not exist yet")]
    NoPod,
    #[error("invalid container id {0:?}: expected up to {MAX_ID} letters, digits and _+-., not \".\" or \"..\"")]
    Id(String),
    #[error("invalid exec id {0:?}: expected up to {MAX_ID} letters, digits and _+-., not \".\" or \"..\"")]
    ExecId(String),
    #[error("container with id {0:?} exists already")]
    Exists(String),
    #[error("container {0:?} does not exist")]
    NoContainer(String),
    #[error("root filesystem {0:?}: expected a relative path without \"..\"")]
    RootfsPath(String),
    #[error("socket {path}: {source}")]
    Socket { path: PathBuf, source: std::io::Error },
    #[error("shared memory {name:?}: {source}")]
    Memory { name: String, source: Errno },
    #[error("directory {0:?}: expected a relative path without \"..\"")]
    Shared(String),
    #[error("open {path}: {source}")]
    OpenShared { path: PathBuf, source: Errno },
    #[error("open the directories that containers share: took longer than 30 s")]
    SlowShared,
    #[error("open the directories that containers share: {0}")]
    SharedTask(tokio::task::JoinError),
    #[error("the lease of the container or process was not connected in time")]
    NoLease,
    #[error("window size {rows}x{columns}: expected at most 65535")]
    WindowSize { rows: u32, columns: u32 },
    #[error("this agent is not in a virtual machine")]
    NoMachine,
    #[error("the pod was not started with debug.shell in the configuration")]
    NoDebug,
    #[error("put the program {0:?} into the guest: {1}")]
    DebugProgram(String, std::io::Error),
    #[error("bring up CPUs: {0}")]
    CpuTask(tokio::task::JoinError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    Container(#[from] ContainerError),
}

impl PodError {
    /// The code of the answer.
    pub fn code(&self) -> ttrpc::Code {
        match self {
            Self::Version(_) | Self::PodExists | Self::NoPod | Self::NoMachine | Self::NoDebug => {
                ttrpc::Code::FAILED_PRECONDITION
            }
            Self::Id(_) | Self::ExecId(_) | Self::RootfsPath(_) | Self::Shared(_) | Self::WindowSize { .. } => {
                ttrpc::Code::INVALID_ARGUMENT
            }
            Self::Stdio(StdioError::TokenTwice(_)) => ttrpc::Code::INVALID_ARGUMENT,
            Self::Machine(MachineError::EntropyLength(_)) => ttrpc::Code::INVALID_ARGUMENT,
            Self::Network(NetworkError::Missing { .. }) => ttrpc::Code::NOT_FOUND,
            Self::Network(error) if error.is_invalid() => ttrpc::Code::INVALID_ARGUMENT,
            Self::Exists(_) => ttrpc::Code::ALREADY_EXISTS,
            Self::NoContainer(_) => ttrpc::Code::NOT_FOUND,
            Self::Container(ContainerError::ProcessExists(_)) => ttrpc::Code::ALREADY_EXISTS,
            Self::Container(ContainerError::TooManyProcesses) => ttrpc::Code::RESOURCE_EXHAUSTED,
            Self::Container(error) if error.is_state() => ttrpc::Code::FAILED_PRECONDITION,
            Self::Container(error) => match error.kind() {
                ErrorKind::Invalid => ttrpc::Code::INVALID_ARGUMENT,
                ErrorKind::NotFound => ttrpc::Code::NOT_FOUND,
                ErrorKind::PermissionDenied => ttrpc::Code::PERMISSION_DENIED,
                ErrorKind::Internal => ttrpc::Code::INTERNAL,
            },
            Self::Descriptor(error) if error.is_invalid() => ttrpc::Code::INVALID_ARGUMENT,
            Self::Volume(error) if error.is_invalid() => ttrpc::Code::INVALID_ARGUMENT,
            Self::Volume(VolumeError::Missing(_)) => ttrpc::Code::NOT_FOUND,
            Self::NoLease
            | Self::Descriptor(_)
            | Self::Memory { .. }
            | Self::OpenShared { .. }
            | Self::SlowShared
            | Self::SharedTask(_)
            | Self::Socket { .. }
            | Self::DebugProgram(..)
            | Self::CpuTask(_)
            | Self::Machine(_)
            | Self::Network(_)
            | Self::Cgroup(_)
            | Self::Volume(_)
            | Self::Stdio(_) => ttrpc::Code::INTERNAL,
        }
    }
}

/// A stream on which nothing is said.
type Lease = Arc<AsyncFd<OwnedFd>>;

/// A name that is taken, by a container that is there or one that is being made or removed.
enum Entry {
    Busy,
    There(Arc<Container>),
}

/// The one pod of a machine.
pub struct Pod {
    share: PathBuf,
    shared: Arc<Shared>,
    memory: Memory,
    /// Where sockets of the host are.
    sockets: PathBuf,
    volumes: Volumes,
    cgroups: Hierarchy,
    machine: Option<Machine>,
    reaper: Reaper,
    streams: Arc<Streams>,
    pub events: Arc<Events>,
    network: Arc<PodNetwork>,
    /// Set once, by the call that made the pod: whether the administrator may look into the guest.
    made: OnceCell<bool>,
    containers: Mutex<HashMap<String, Entry>>,
}

impl Pod {
    pub fn new(
        share: PathBuf,
        memory: PathBuf,
        cgroups: Hierarchy,
        machine: Option<Machine>,
        reaper: Reaper,
        streams: Arc<Streams>,
    ) -> Self {
        Self {
            share,
            shared: Arc::default(),
            sockets: memory.with_file_name(podhull_protocol::SOCKETS),
            volumes: Volumes::new(memory.with_file_name(podhull_protocol::VOLUMES)),
            memory: Memory::new(memory),
            cgroups,
            machine,
            reaper,
            streams,
            events: Arc::default(),
            network: Arc::default(),
            made: OnceCell::new(),
            containers: Mutex::default(),
        }
    }

    /// Sets the machine up, and makes the first container.
    pub async fn create(self: &Arc<Self>, request: CreatePodRequest) -> Result<CreatePodResponse, PodError> {
        let called_ns = boot::monotonic_ns();
        if request.protocol_version != VERSION {
            return Err(PodError::Version(request.protocol_version));
        }
        if self.made.initialized() {
            return Err(PodError::PodExists);
        }
        let wanted = request.network.as_ref().map(Description::new).transpose()?;
        // In this order: what runs later may look at the clock and draw random numbers.
        if let Some(machine) = self.machine {
            machine.set_clock(request.realtime_ns)?;
            machine.add_entropy(&request.entropy)?;
            if !request.hostname.is_empty() {
                machine.set_hostname(&request.hostname)?;
            }
            machine.rescan()?;
            if !request.share_tag.is_empty() {
                machine.mount_share(&request.share_tag)?;
            }
        }
        self.made.set(request.debug).map_err(|_| PodError::PodExists)?;
        let version = env!("CARGO_PKG_VERSION");
        log::pod(format_args!("version {version}, host name {:?}", request.hostname));
        if request.names != 0 {
            self.network.ask_over(self.streams.claim(request.names)?).await;
        }
        if request.forwards != 0 {
            self.network.serve_forwards(self.streams.claim_all(request.forwards, MAX_FORWARDS)?);
        }
        // Every device that there is has been found.
        let configure = Configure { machine: self.machine, scanned: true, wanted };
        let container = match request.container.into_option() {
            Some(container) => Some(self.make_container(container, Network::Pod(&self.network, configure)).await?),
            None => {
                self.network.configure(configure).await?;
                None
            }
        };
        let [started_ns, ready_ns] = boot::times();
        Ok(CreatePodResponse {
            agent_version: env!("CARGO_PKG_VERSION").into(),
            kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
            container: container.into(),
            started_ns,
            ready_ns,
            called_ns,
            made_ns: boot::monotonic_ns(),
            ..CreatePodResponse::default()
        })
    }

    pub async fn create_container(
        self: &Arc<Self>,
        request: CreateContainerRequest,
    ) -> Result<CreateContainerResponse, PodError> {
        self.made.get().ok_or(PodError::NoPod)?;
        self.make_container(request, Network::Own).await
    }

    async fn make_container(
        self: &Arc<Self>,
        request: CreateContainerRequest,
        network: Network<'_>,
    ) -> Result<CreateContainerResponse, PodError> {
        if !is_valid_id(&request.id) {
            return Err(PodError::Id(request.id));
        }
        let rootfs = relative(&request.rootfs).ok_or_else(|| PodError::RootfsPath(request.rootfs.clone()))?;
        let stdio = request.stdio.into_option().unwrap_or_default();
        for memory in &request.memory {
            self.memory.make(memory)?;
        }
        let directories = self.shared.mount(&self.share, request.directories).await?;
        let sockets = Sockets::make(&self.sockets, &request.sockets, &self.streams)?;
        let lease = self.lease(stdio.lease)?;
        let streams = self.streams_of(stdio)?;
        let descriptors = Wanted::of(request.descriptors, &self.share, &self.streams)?;
        let mut reservation = self.reserve(&request.id)?;
        let id = request.id.clone();
        let shared = request.shared.into_iter().map(|shared| {
            let with = self.container(&shared.container_id)?;
            Ok(container::Shared { kind: shared.type_, with })
        });
        let shared = shared.collect::<Result<Vec<_>, PodError>>()?;
        let rootfs = self.share.join(rootfs);
        let volumes = self.volumes.make(&id, request.volumes, &self.share).await?;
        let spec = self.with_disks(&request.spec, &request.disks).await?;
        let holds_pod = request.holds_pod;
        let asked =
            container::Request { id, spec: &spec, rootfs, streams, descriptors, shared: &shared, network, holds_pod };
        let (container, lease) = tokio::join!(Container::create(asked, self.surroundings()), lease);
        let container = Arc::new(container?);
        container.keep(Some((sockets, volumes, directories)));
        let pid = container.pid().as_raw_nonzero().get();
        reservation.becomes = Some(container.clone());
        drop(reservation);
        log::container(container.id(), format_args!("created as process {pid}"));
        if lease.is_err() {
            self.abandoned(&container).await;
        }
        if let Some(lease) = lease? {
            let pod = self.clone();
            tokio::spawn(async move {
                stdio::ended(&lease).await;
                pod.abandoned(&container).await;
            });
        }
        Ok(CreateContainerResponse { pid, ..CreateContainerResponse::default() })
    }

    /// A specification as the guest's kernel numbers the host's disks in it.
    async fn with_disks<'a>(&self, spec: &'a [u8], disks: &[Disk]) -> Result<Cow<'a, [u8]>, PodError> {
        let [first, ..] = disks else { return Ok(spec.into()) };
        let machine = self.machine.ok_or_else(|| MachineError::DiskMissing(first.serial.clone()))?;
        let given = disks::wait(machine, disks).await?;
        let mut document = serde_json::from_slice(spec).map_err(ContainerError::Spec)?;
        disks::renumber(&mut document, &given);
        Ok(document.to_string().into_bytes().into())
    }

    /// The stream that says by its end that whoever stood for a container or process is gone.
    fn lease(&self, token: u64) -> Result<impl Future<Output = Result<Option<Lease>, PodError>> + use<>, PodError> {
        let claim = if token == 0 { None } else { Some(self.streams.claim(token)?) };
        Ok(async {
            match claim {
                Some(claim) => claim.stream().await.map(Some).ok_or(PodError::NoLease),
                None => Ok(None),
            }
        })
    }

    /// Nobody stands for a container any more.
    async fn abandoned(&self, container: &Arc<Container>) {
        // Another may have its name by now.
        if self.container(container.id()).is_ok_and(|there| Arc::ptr_eq(&there, container)) {
            let _ = self.delete(container.id()).await;
            // It was what would have asked how it ended.
            self.events.forget_container(container.id());
        }
    }

    /// The same for a process that is executed in one.
    async fn abandoned_process(&self, container: &Container, exec_id: &str) {
        // Its name is a random number, and not another's by now. Mostly it was deleted before.
        let _ = container.delete_process(exec_id).await;
        self.events.forget(container.id(), exec_id);
    }

    fn streams_of(&self, stdio: Stdio) -> Result<container::Streams, PodError> {
        let claim = |token| if token == 0 { Ok(None) } else { self.streams.claim(token).map(Some) };
        let (rows, columns) = window_size(stdio.rows, stdio.columns)?;
        Ok(container::Streams {
            terminal: stdio.terminal,
            stdin: claim(if stdio.terminal { 0 } else { stdio.stdin })?,
            stdout: claim(stdio.stdout)?,
            stderr: claim(if stdio.terminal { 0 } else { stdio.stderr })?,
            window: container::Window { rows, columns, plain_newlines: stdio.plain_newlines },
        })
    }

    pub async fn start(&self, id: &str) -> Result<(), PodError> {
        self.container(id)?.start().await?;
        log::container(id, format_args!("started"));
        Ok(())
    }

    pub fn signal(&self, id: &str, signal: i32, all: bool) -> Result<(), PodError> {
        Ok(self.container(id)?.signal(signal, all)?)
    }

    pub fn resize(&self, id: &str, exec_id: &str, rows: u32, columns: u32) -> Result<(), PodError> {
        let (rows, columns) = window_size(rows, columns)?;
        Ok(self.container(id)?.resize(exec_id, rows, columns)?)
    }

    pub async fn exec(self: &Arc<Self>, request: ExecProcessRequest) -> Result<ExecProcessResponse, PodError> {
        let container = self.container(&request.container_id)?;
        if !is_valid_id(&request.exec_id) {
            return Err(PodError::ExecId(request.exec_id));
        }
        let in_guest = request.debug.is_some();
        if let Some(program) = request.debug.as_ref() {
            self.put(program)?;
        }
        let stdio = request.stdio.into_option().unwrap_or_default();
        let lease = self.lease(stdio.lease)?;
        let streams = self.streams_of(stdio)?;
        let descriptors = Wanted::of(request.descriptors, &self.share, &self.streams)?;
        let asked = container::exec::Request {
            id: request.exec_id.clone(),
            process: &request.process,
            streams,
            descriptors,
            cgroup: &request.cgroup,
            ignore_paused: request.ignore_paused,
            in_guest,
        };
        let (pid, lease) = tokio::join!(container.exec(asked, self.surroundings()), lease);
        let pid = pid?;
        if lease.is_err() {
            self.abandoned_process(&container, &request.exec_id).await;
        }
        if let Some(lease) = lease? {
            let pod = self.clone();
            tokio::spawn(async move {
                stdio::ended(&lease).await;
                pod.abandoned_process(&container, &request.exec_id).await;
            });
        }
        Ok(ExecProcessResponse { pid, ..ExecProcessResponse::default() })
    }

    /// Puts a program into the guest, if the host has said at the pod's start that there may be such.
    fn put(&self, program: &DebugProgram) -> Result<(), PodError> {
        let (Some(true), Some(_)) = (self.made.get(), self.machine) else { return Err(PodError::NoDebug) };
        let DebugProgram { name, content, .. } = program;
        if !is_valid_id(name) || content.len() > MAX_DEBUG_PROGRAM {
            return Err(PodError::ExecId(name.clone()));
        }
        let put = || {
            let (directory, path) = (Path::new(DEBUG_DIR), Path::new(DEBUG_DIR).join(name));
            std::fs::create_dir_all(directory)?;
            // Another one of it may run, whose file cannot be written.
            let new = path.with_extension("new");
            std::fs::write(&new, content)?;
            std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o700))?;
            std::fs::rename(&new, &path)
        };
        log::pod(format_args!("the host's administrator executes {name} in the guest"));
        put().map_err(|error| PodError::DebugProgram(name.clone(), error))
    }

    pub async fn pause(&self, id: &str) -> Result<(), PodError> {
        Ok(self.container(id)?.pause().await?)
    }

    pub async fn resume(&self, id: &str) -> Result<(), PodError> {
        Ok(self.container(id)?.resume().await?)
    }

    pub fn update(&self, id: &str, resources: &[u8]) -> Result<(), PodError> {
        Ok(self.container(id)?.update(resources)?)
    }

    pub async fn update_volume(&self, id: &str, name: &str) -> Result<(), PodError> {
        Ok(self.container(id)?.update_volume(name).await?)
    }

    pub fn stats(&self, id: &str) -> Result<ContainerStatsResponse, PodError> {
        Ok(self.container(id)?.stats()?)
    }

    /// What the guest has used, and each container.
    pub async fn stats_of_all(&self) -> PodStatsResponse {
        let traffic = self.network.traffic().await;
        let mut containers: Vec<_> = {
            let containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
            let there = containers.values().filter_map(|entry| match entry {
                Entry::There(container) => Some(container.clone()),
                Entry::Busy => None,
            });
            there.collect()
        };
        containers.sort_by(|one, other| one.id().cmp(other.id()));
        // One whose group is gone has ended.
        stats::together(
            &traffic,
            containers.iter().filter_map(|container| Some((container.id(), container.stats().ok()?))),
        )
    }

    pub fn signal_process(&self, id: &str, exec_id: &str, signal: i32) -> Result<(), PodError> {
        Ok(self.container(id)?.signal_process(exec_id, signal)?)
    }

    pub async fn delete_process(&self, id: &str, exec_id: &str) -> Result<(), PodError> {
        Ok(self.container(id)?.delete_process(exec_id).await?)
    }

    fn surroundings(&self) -> container::Surroundings<'_> {
        container::Surroundings { cgroups: &self.cgroups, reaper: &self.reaper, events: self.events.clone() }
    }

    pub async fn delete(&self, id: &str) -> Result<(), PodError> {
        let container = self.container(id)?;
        let mut reservation = Reservation { pod: self, id: id.into(), becomes: Some(container.clone()) };
        self.containers.lock().unwrap_or_else(PoisonError::into_inner).insert(id.into(), Entry::Busy);
        container.delete().await?;
        reservation.becomes = None;
        Ok(())
    }

    /// Makes the network what is described.
    pub async fn configure_network(&self, request: ConfigureNetworkRequest) -> Result<(), PodError> {
        self.made.get().ok_or(PodError::NoPod)?;
        let wanted = Some(Description::new(&request)?);
        Ok(self.network.configure(Configure { machine: self.machine, scanned: false, wanted }).await?)
    }

    /// Takes devices and CPUs that the machine was given.
    pub async fn grow(&self, request: GrowRequest) -> Result<GrowResponse, PodError> {
        let machine = self.machine.ok_or(PodError::NoMachine)?;
        self.made.get().ok_or(PodError::NoPod)?;
        // Both wait in the kernel, for milliseconds; the agent's thread has containers to serve.
        let grown = tokio::task::spawn_blocking(move || {
            if request.rescan {
                machine.rescan()?;
            }
            machine.online_cpus(request.cpus)
        });
        let cpus_online = grown.await.map_err(PodError::CpuTask)??;
        log::pod(format_args!("{cpus_online} CPUs online"));
        Ok(GrowResponse { cpus_online, ..GrowResponse::default() })
    }

    /// Says what the wall clock is, once it is corrected.
    pub fn adjust_clock(&self, request: AdjustClockRequest) -> Result<AdjustClockResponse, PodError> {
        let AdjustClockRequest { behind_ns, step, .. } = request;
        if behind_ns != 0 {
            self.machine.ok_or(PodError::NoMachine)?.adjust_clock(behind_ns, step)?;
            if step {
                log::pod(format_args!("clock set to the host's, which it was {} us behind", behind_ns / 1000));
            }
        }
        Ok(AdjustClockResponse { realtime_ns: boot::realtime_ns(), ..AdjustClockResponse::default() })
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, PodError> {
        match self.containers.lock().unwrap_or_else(PoisonError::into_inner).get(id) {
            Some(Entry::There(container)) => Ok(container.clone()),
            Some(Entry::Busy) | None => Err(PodError::NoContainer(id.into())),
        }
    }

    fn reserve(&self, id: &str) -> Result<Reservation<'_>, PodError> {
        let mut containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        if containers.contains_key(id) {
            return Err(PodError::Exists(id.into()));
        }
        containers.insert(id.into(), Entry::Busy);
        Ok(Reservation { pod: self, id: id.into(), becomes: None })
    }
}

/// A name that is busy, and what it becomes when the work on it ends, in whatever way.
struct Reservation<'a> {
    pod: &'a Pod,
    id: String,
    becomes: Option<Arc<Container>>,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut containers = self.pod.containers.lock().unwrap_or_else(PoisonError::into_inner);
        match self.becomes.take() {
            Some(container) => containers.insert(std::mem::take(&mut self.id), Entry::There(container)),
            None => containers.remove(&self.id),
        };
    }
}

fn window_size(rows: u32, columns: u32) -> Result<(u16, u16), PodError> {
    match (u16::try_from(rows), u16::try_from(columns)) {
        (Ok(rows), Ok(columns)) => Ok((rows, columns)),
        _ => Err(PodError::WindowSize { rows, columns }),
    }
}

/// Whether it is a name, and not a path.
pub fn is_valid_id(id: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
    (1..=MAX_ID).contains(&id.len()) && id.bytes().all(letter) && id != "." && id != ".."
}

/// A path that stays below the directory it is joined to.
pub fn relative(path: &str) -> Option<&Path> {
    let path = Path::new(path);
    let stays = path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    (stays && !path.as_os_str().is_empty()).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_and_not_paths() {
        for id in ["a", "A-b_c+d.e", "...", &"x".repeat(MAX_ID)] {
            assert!(is_valid_id(id), "{id}");
        }
        for id in ["", ".", "..", "a/b", "../a", "a b", "é", "a\0", &"x".repeat(MAX_ID + 1)] {
            assert!(!is_valid_id(id), "{id}");
        }
    }

    #[test]
    fn a_root_filesystem_is_below_the_share() {
        assert!(relative("id/rootfs").is_some());
        for path in ["", "/etc", "../x", "a/../../x"] {
            assert!(relative(path).is_none(), "{path}");
        }
    }
}
