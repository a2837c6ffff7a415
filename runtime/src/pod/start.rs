//! A container's shadow: from a bundle to an exit status, and nothing left behind on any way out.

use std::cell::Cell;
use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use podhull_protocol::{CreatePodRequest, HostSocket, SharedMemory};
use podhull_vmm::control::{ChannelError, Device, MachineConfig, Resource, SHARE_TAG};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::rand::GetRandomFlags;

use super::boot::{BOOT, Boot};
use super::clock;
use super::descriptors::{self, DescriptorError};
use super::disks::{self, DiskError};
use super::forwards::Forwards;
use super::hooks;
use super::link::{Begin, Creator, Given, LinkError, News};
use super::member;
use super::mounts::{self, MountError};
use super::notify::Notify;
use super::resources::{self, ResourceError};
use super::session::{Outcome, Session, Step};
use super::size::{Demand, Size, SizeError, memory_limit};
use super::sockets::{Socket, Sockets};
use super::starve::starve;
use super::timeline::{Phase, Timeline};
use super::users::Users;
use super::view::{Entered, View, ViewError, namespaces};
use crate::agent::{self, Agent, AgentError, Exit};
use crate::bundle::{Bundle, BundleError};
use crate::cgroup::{CgroupError, Manager, Placement};
use crate::config::Settings;
use crate::confine::{confine_but_for_mounting, mount_and_confine};
use crate::log::Log;
use crate::machine::{CONTROL_SOCKET, Channel, MachineError};
use crate::signals::{self, Signals};
use crate::state::{self, Directory, State, StateError, Status};
use crate::stdio::{SOCKET, Stdio, StdioError};

/// Clients of the machine that may wait to be taken; it takes them at once.
const CONTROL_BACKLOG: i32 = 16;

/// Bytes of entropy a guest gets before anything else.
const ENTROPY: usize = 64;

/// What to run, and for whom.
pub struct Run<'a> {
    /// The container's id.
    pub id: &'a str,
    /// Directory of the bundle.
    pub bundle: &'a Path,
    /// Where to send the terminal.
    pub console_socket: Option<&'a Path>,
    /// Where to write what the guest kernel prints.
    pub guest_console: Option<&'a Path>,
    /// Who makes its control group.
    pub cgroups: Manager,
    /// Who asked for it.
    pub creator: &'a Creator,
    /// Root of all state.
    pub root: &'a Path,
    /// Where to say what happens.
    pub log: &'a Log,
}

/// Why a container did not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The bundle is wrong.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// It asks for more than there is.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// Its id, or what is written under the state root.
    #[error(transparent)]
    State(#[from] StateError),
    /// Its control group.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Its files.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// What its program is to inherit.
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    /// A block device of the host.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// What a machine is made of.
    #[error(transparent)]
    Resource(#[from] ResourceError),
    /// Its standard streams.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// The machine or its process.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The agent, or what it says about the container.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The machine ended before its agent listened.
    #[error("the guest did not come up: {0}; are {1} and {2} intact?")]
    Boot(#[source] MachineError, PathBuf, PathBuf),
    /// It did not end either; where it was.
    #[error(
        "the guest did not come up within {seconds} seconds ({0}); is the host that slow, or the guest kernel damaged?",
        seconds = BOOT.as_secs()
    )]
    Late(String),
    /// The pod's socket cannot be made.
    #[error("cannot make the pod's socket in {0}: {1}")]
    Socket(PathBuf, #[source] io::Error),
    /// Its namespaces.
    #[error(transparent)]
    View(#[from] ViewError),
    /// The file for the guest's console cannot be opened.
    #[error("cannot open {0} for the guest's console: {1}")]
    GuestConsole(PathBuf, #[source] io::Error),
    /// Who asked for the container is gone.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// Nobody could be told that it is ready.
    #[error("cannot make the socket for NOTIFY_SOCKET: {0}")]
    Notify(#[source] io::Error),
    /// Nobody can connect to sockets of the host.
    #[error("cannot serve the container's sockets: {0}")]
    Sockets(#[source] io::Error),
    /// The pod's machine could not be given the container's files.
    #[error("pod {0:?}: {1}")]
    Share(String, #[source] podhull_vmm::jail::JailError),
    /// There is a machine already.
    #[error(
        "--guest-console: the virtual machine of pod {0:?} runs already; give the flag to the pod's first container"
    )]
    ConsoleOfAnother(String),
    /// It was started by hand.
    #[error("a shadow without a machine")]
    NoMachine,
    /// No event loop.
    #[error("cannot set up event handling: {0}")]
    Signals(#[source] io::Error),
    /// No random numbers.
    #[error("cannot get random numbers: {0}")]
    Random(#[source] Errno),
    /// Too many files open.
    #[error("cannot duplicate a descriptor: {0}")]
    Directory(#[source] io::Error),
    /// They cannot be given up.
    #[error("cannot give up privileges: {0}")]
    Privileges(#[source] io::Error),
}

/// Runs a container; returns the status to exit with.
pub fn run(run: &Run<'_>) -> Result<u8, RunError> {
    run.log.debug(|| format!("{}: run", run.id));
    let given = run.creator.begin()?;
    let mut timeline = Timeline::since(given.begin.began);
    timeline.end(Phase::Launch);
    run.log.of_pod(given.begin.pod.as_ref().map_or(run.id, |pod| &pod.pod));
    if given.begin.pod.is_some() {
        return member::run(run, given, timeline);
    }
    let Given { begin, channel, terminal, namespaces: joined, descriptors, .. } = given;
    let channel = channel.ok_or(RunError::NoMachine)?;
    let mut bundle = run.open_bundle(&begin)?;
    bundle.config.add_environment(descriptors::environment(begin.listening));
    let descriptors = descriptors::prepare(descriptors, &descriptors::directory(run.id))?;
    let limit = memory_limit(bundle.config.spec());
    let size = Size::of(&begin.settings.sizing, &[&Demand::of(bundle.config.spec())])?;

    // From here on there is something to remove.
    signals::block();
    let mut made = run.make(&begin, &mut bundle)?;
    let directory = &made.directory;
    let Settings { kernel, image, kernel_params, guest_console, .. } = &begin.settings;
    let files = Files { kernel: kernel.clone(), image: image.clone() };
    let (kvm, kernel, image) = (resources::kvm()?, resources::kernel(kernel)?, resources::image(image)?);
    let console_size = bundle.config.console_size();
    let stdio = Stdio::new(bundle.config.terminal(), run.console_socket, console_size, terminal)?;
    let stdio = stdio.in_foreground(begin.foreground).and(descriptors.streams);

    let pod = directory.open_pod()?;
    let (agent, their_agent) = UnixStream::pair().map_err(|e| RunError::Socket(directory.pod(), e))?;
    let listener = listen(directory)?;
    let control = listen_for_control(directory)?;
    let mut machine = Vec::from([
        (Resource::Kvm, kvm.into()),
        (Resource::Kernel, kernel.into()),
        (Resource::Image, image.into()),
        (Resource::Agent, their_agent.into()),
        (Resource::VsockListener, listener.into()),
        (Resource::Control, control),
        (Resource::Remove { name: run.id.to_owned() }, duplicate(directory.pods())?),
    ]);
    if !begin.kept && made.state.cgroup.is_none() {
        machine.push((Resource::Remove { name: run.id.to_owned() }, duplicate(directory.root())?));
    }
    let kept = guest_console.as_ref().map(|directory| directory.join(format!("{}.log", run.id)));
    if let Some(path) = run.guest_console.map(Path::to_owned).or(kept) {
        let file = File::options().append(true).create(true).mode(0o600).open(&path);
        machine.push((Resource::Console, file.map_err(|e| RunError::GuestConsole(path, e))?.into()));
    }
    let mut mounts = mounts::prepare(run.id, &mut bundle)?;
    mounts.add_files(descriptors.files)?;
    machine.extend(mounts.resources);
    mounts.warnings.iter().for_each(|warning| run.log.warning(warning));
    let disks = disks::open(&bundle.config)?;
    machine.extend(disks.resources);
    let own = namespaces(&bundle.config).others;
    bundle.config.clear_namespace_paths();
    let told = mounts.sockets.iter().map(Socket::told).collect();
    let mut request = pod_request(run.id, &bundle, &stdio, mounts.memory, mounts.directories, told)?;
    request.debug = begin.settings.debug;
    let container = request.container.mut_or_insert_default();
    (container.disks, container.descriptors) = (disks.told, descriptors.told);
    container.volumes = mounts.volumes.told();
    container.holds_pod = begin.holds_pod;
    let view = View {
        root: mounts.root,
        places: mounts.places,
        namespaces: own,
        joined,
        hostname: bundle.config.spec().hostname().clone(),
    };
    drop(bundle);
    let network = view.network();
    // No path of the host from here on.
    made.entered = Some(view.enter()?);
    made.sockets = Sockets::start(mounts.sockets, pod.as_fd()).map_err(RunError::Sockets)?;
    if let Some((forwards, rule)) = network.and_then(|network| Forwards::open(network, pod.as_fd(), run.log)) {
        request.forwards = forwards.token();
        machine.extend(rule.map(|rule| (Resource::Hold, rule)));
        made.forwards = Some(forwards);
    }
    confine_but_for_mounting().map_err(RunError::Privileges)?;
    let (config, fds) = machine_config(size, kernel_params.clone(), machine);
    let connections = made.connections();
    run.creator.tell(&News::Entered)?;

    run.log.debug(|| format!("{}: starting its machine", run.id));
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().map_err(RunError::Signals)?;
    let outcome = runtime.block_on(async {
        let signals = Signals::new().map_err(RunError::Signals)?;
        let orders = run.creator.orders().map_err(RunError::Signals)?;
        let channel = Channel::new(channel)?;
        timeline.end(Phase::Prepare);
        let agent = Agent::new(agent)?.counted(pod.as_fd());
        let session = Session::new(run.id, agent, &stdio, pod.as_fd(), timeline, run.log);
        let boot = Boot { channel: &channel, size, booted: Cell::new(false), memory_limit: Cell::new(None) };
        let start = async {
            let sent = channel.start(config, &fds).await;
            drop(fds);
            sent
        };
        let make = boot.make(&session, start, request, &orders);
        let reached = |step, timeline: &Timeline| made.reached(step, timeline, run.creator, &begin);
        let volumes = mounts.volumes.serve(&session);
        let helpers = async {
            boot.add_helpers(&session).await?;
            clock::keep(&session).await;
            Ok(())
        };
        let meanwhile = async { tokio::try_join!(helpers, volumes).map(drop) };
        let live = session.live(make, meanwhile, &orders, begin.foreground, reached);
        let outcome = tokio::select! {
            biased;
            lived = supervise(&session, &boot, &signals, &files, live) => lived?,
            never = connections => match never {},
        };
        Ok::<_, RunError>((outcome, boot.memory_limit.take()))
    });
    // Threads that still wait for input must not hold up the end; they end with the process.
    runtime.shutdown_background();
    let (outcome, memory_limit) = outcome?;
    Ok(run.end(made, outcome, limit, memory_limit))
}

impl Run<'_> {
    /// Reads the bundle.
    pub fn open_bundle(&self, begin: &Begin) -> Result<Bundle, RunError> {
        state::check_id(self.id)?;
        let mut bundle = Bundle::open(self.bundle)?;
        if let Some(users) = &begin.users {
            // Callers that name a namespace may say anything of its mappings.
            bundle.config.set_mappings(&users.uid_mappings, &users.gid_mappings);
        }
        for remark in bundle.config.remarks() {
            self.log.debug(|| format!("config.json: {remark}"));
        }
        Ok(bundle)
    }

    /// Takes the container's id, and writes down what there is to say of it as it begins.
    pub fn make(&self, begin: &Begin, bundle: &mut Bundle) -> Result<Made, RunError> {
        let placement = Placement::new(self.cgroups, &bundle.config, self.id)?;
        let spec = bundle.config.spec();
        let annotations = spec.annotations().clone();
        let mut state = State::new(self.id, begin.pid, &bundle.path, &bundle.root_path, annotations);
        state.machine = begin.machine.map(state::Machine::of);
        state.member_of = begin.pod.clone();
        state.users = begin.users.clone().or_else(|| Users::of(&bundle.config));
        state.hooks = spec.hooks().as_ref().and_then(hooks::later);
        state.place(placement.as_ref());
        state.demand = Demand::of(spec);
        state.sizing = begin.settings.sizing.clone();
        let mut directory = Directory::create(self.root, self.id)?;
        let notify = match begin.notify {
            true => Some(Notify::new(&directory.container()).map_err(RunError::Notify)?),
            false => None,
        };
        let notify = notify.map(|Notify { socket, mount, environment }| {
            bundle.config.add_mount(mount);
            bundle.config.add_environment(vec![environment]);
            socket
        });
        state.notify = notify.as_ref().map(AsRawFd::as_raw_fd);
        directory.write(&state)?;
        directory.write_groups(&state)?;
        if state.cgroup.is_some() {
            // It says where the groups are: it goes after them, by who asked for the container or comes later.
            directory.keep();
        }
        Ok(Made { directory, state, entered: None, sockets: None, forwards: None, _notify: notify })
    }

    /// Removes what there is of the container; returns the status to exit with. If it was killed for lack of memory, this process
    /// ends the same way, if it can.
    pub fn end(&self, made: Made, outcome: Outcome, limit: Option<u64>, memory_limit: Option<OwnedFd>) -> u8 {
        drop(made);
        match outcome {
            Outcome::Exited(exit) => {
                report_out_of_memory(self, exit, limit);
                if let (true, true, Some(file)) = (exit.out_of_memory, exit.killed, memory_limit) {
                    starve(file);
                }
                exit.status
            }
            Outcome::Interrupted(signal) => u8::try_from(128 + signal).unwrap_or(u8::MAX),
        }
    }
}

/// What a container is on the host.
pub struct Made {
    pub directory: Directory,
    pub state: State,
    /// Its namespaces, once this process is in them.
    pub entered: Option<Entered>,
    /// Sockets of the host among its files.
    pub sockets: Option<Arc<Sockets>>,
    /// Connections to its own addresses.
    pub forwards: Option<Arc<Forwards>>,
    /// Where its program says that it is ready; see [`State::notify`].
    _notify: Option<UnixDatagram>,
}

impl Made {
    /// Serves what programs of the host and of the container connect to on the other side, for as long as it is polled.
    pub fn connections(&self) -> impl Future<Output = Infallible> + use<> {
        let (sockets, forwards) = (self.sockets.clone(), self.forwards.clone());
        async {
            let sockets = async {
                if let Some(sockets) = sockets {
                    sockets.serve().await;
                }
            };
            let forwards = async {
                if let Some(forwards) = forwards {
                    forwards.serve().await;
                }
            };
            tokio::join!(sockets, forwards);
            std::future::pending().await
        }
    }

    /// Writes down how far the container is, and tells who asked for it.
    pub fn reached(
        &mut self,
        step: Step,
        timeline: &Timeline,
        creator: &Creator,
        begin: &Begin,
    ) -> Result<(), RunError> {
        self.state.timeline = timeline.clone();
        match step {
            Step::Created => {
                let furnish = || self.entered.iter_mut().for_each(Entered::furnish);
                mount_and_confine(furnish).map_err(RunError::Privileges)?;
                (self.state.status, self.state.kept) = (Status::Created, begin.kept);
                self.directory.write(&self.state)?;
                if let Some(sockets) = &self.sockets {
                    sockets.begin();
                }
                if let Some(forwards) = &self.forwards {
                    forwards.begin();
                }
                creator.tell(&News::Made)?;
                if begin.kept {
                    self.directory.keep();
                }
                Ok(())
            }
            Step::Started => {
                self.state.status = Status::Running;
                self.directory.write(&self.state)?;
                Ok(creator.tell(&News::Started)?)
            }
        }
    }
}

/// The files of the machine, by the names they had on the host.
struct Files {
    kernel: PathBuf,
    image: PathBuf,
}

/// Lives through the session, unless a signal or the end of the machine is first; finds out why the machine ended.
async fn supervise(
    session: &Session<'_>,
    boot: &Boot<'_>,
    signals: &Signals,
    files: &Files,
    live: impl Future<Output = Result<Outcome, RunError>>,
) -> Result<Outcome, RunError> {
    let mut drive = std::pin::pin!(boot.channel.drive());
    let ended = tokio::select! {
        biased;
        lived = live => match lived {
            // The machine knows its files by what they are, not by their names.
            Err(RunError::Machine(MachineError::Failed(line))) if !boot.booted.get() => {
                return Err(MachineError::Failed(with_paths(line, files)).into());
            }
            // Connections to the agent and to the machine's control socket break when the machine does; the machine knows why.
            Err(
                RunError::Agent(AgentError::Gone(_))
                | RunError::Stdio(StdioError::Connect(..))
                | RunError::Machine(MachineError::Dial(_) | MachineError::Channel(ChannelError::Closed)),
            ) => {
                match tokio::time::timeout(GRACE, &mut drive).await {
                    Ok(ended) => ended,
                    Err(_) => return lived,
                }
            }
            lived => return lived,
        },
        signalled = session.signals(signals) => return signalled,
        ended = &mut drive => ended,
    };
    match ended.unwrap_or(MachineError::Gone) {
        error @ (MachineError::Reset | MachineError::Crash(_)) if !boot.booted.get() => {
            Err(RunError::Boot(error, files.kernel.clone(), files.image.clone()))
        }
        MachineError::Stuck(what) => Err(RunError::Late(what)),
        error => Err(error.into()),
    }
}

fn with_paths(line: String, files: &Files) -> String {
    [("guest kernel", &files.kernel), ("guest image", &files.image)]
        .iter()
        .fold(line, |line, (what, path)| line.replacen(what, &format!("{what} {}", path.display()), 1))
}

/// How long the end of a machine may come after the end of the connection to its agent.
const GRACE: std::time::Duration = std::time::Duration::from_secs(10);

fn machine_config(
    size: Size,
    kernel_params: String,
    machine: Vec<(Resource, OwnedFd)>,
) -> (MachineConfig, Vec<OwnedFd>) {
    let (resources, fds) = machine.into_iter().unzip();
    let mut devices = vec![Device::Share];
    if size.memory > size.memory_base {
        devices.push(Device::Memory);
    }
    let config = MachineConfig {
        memory_bytes: size.memory_base,
        memory_max_bytes: size.memory_max,
        cpus_max: size.cpus_max,
        extra_cmdline: kernel_params,
        resources,
        devices,
    };
    (config, fds)
}

fn pod_request(
    id: &str,
    bundle: &Bundle,
    stdio: &Stdio,
    memory: Vec<SharedMemory>,
    directories: Vec<String>,
    sockets: Vec<HostSocket>,
) -> Result<CreatePodRequest, RunError> {
    let mut entropy = vec![0; ENTROPY];
    // Up to 256 bytes are never cut short (random(4)).
    rustix::rand::getrandom(&mut entropy, GetRandomFlags::empty()).map_err(RunError::Random)?;
    let container = agent::container(
        id,
        bundle.config.document(),
        mounts::root_in_share(id),
        stdio.announcement(),
        memory,
        directories,
        sockets,
    );
    Ok(CreatePodRequest {
        protocol_version: podhull_protocol::VERSION,
        entropy,
        hostname: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        share_tag: SHARE_TAG.to_owned(),
        container: Some(container).into(),
        ..Default::default()
    })
}

/// Makes the socket by way of its directory's descriptor: paths of sockets are at most 107 bytes long.
fn listen(directory: &Directory) -> Result<UnixListener, RunError> {
    let pod = directory.pod();
    let listen = || {
        let fd = File::open(&pod)?;
        UnixListener::bind(format!("/proc/self/fd/{}/{SOCKET}", fd.as_raw_fd()))
    };
    listen().map_err(|e| RunError::Socket(pod.clone(), e))
}

/// The same for the machine's control socket.
fn listen_for_control(directory: &Directory) -> Result<OwnedFd, RunError> {
    let pod = directory.pod();
    let listen = || {
        let fd = File::open(&pod)?;
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let path = format!("/proc/self/fd/{}/{CONTROL_SOCKET}", fd.as_raw_fd());
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&socket, CONTROL_BACKLOG)?;
        Ok(socket)
    };
    listen().map_err(|e: io::Error| RunError::Socket(pod.clone(), e))
}

fn duplicate(directory: BorrowedFd<'_>) -> Result<OwnedFd, RunError> {
    directory.try_clone_to_owned().map_err(RunError::Directory)
}

fn report_out_of_memory(run: &Run<'_>, exit: Exit, limit: Option<u64>) {
    if exit.out_of_memory {
        let limit = limit.map_or(String::new(), |limit| format!(" (limit {limit} bytes)"));
        let who = if exit.killed { "killed" } else { "a process was killed" };
        let warning = format!("container {}: out of memory: {who}{limit}", run.id);
        // In the background nobody listens.
        if run.creator.tell_text(News::Warning, &warning).is_err() {
            run.log.warning(&warning);
        }
    }
}
