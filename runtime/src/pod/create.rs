//! Making a container, as the command does it that is asked to: it starts the machine's process and the shadow, does what
//! takes a look from outside (its hooks, its control group), and in the foreground stays until the end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::ExitStatus;

use oci_spec::runtime::{Hooks, LinuxNamespaceType};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::announce::{Announce, AnnounceError, Stands};
use super::command::CommandError;
use super::descriptors::Inherited;
use super::foreground::{Foreground, ForegroundError, Next};
use super::hooks::{self, HookError, Point};
use super::join::{self, JoinError, Joined};
use super::link::{Begin, News};
use super::network::{self, WireError, Wiring};
use super::notify::{self, Waiting};
use super::shadow::{Launch, Shadow};
use super::size::{Demand, Size, SizeError};
use super::view::namespaces;
use super::{resize, score};
use crate::bundle::{Bundle, BundleError};
use crate::cgroup::{Cgroup, CgroupError, Manager, PATIENCE, Placement};
use crate::config::{self, ConfigError, Settings};
use crate::log::Log;
use crate::machine::{MachineError, PidNamespace, Process};
use crate::state::{self, Known, Machine, State, StateError};

/// What to make, and for whom.
pub struct Create<'a> {
    /// The container's id.
    pub id: &'a str,
    /// Directory of the bundle.
    pub bundle: &'a Path,
    /// Who is told which process stands for the container.
    pub announce: Announce<'a>,
    /// Whether somebody else is sent the terminal.
    pub console_socket: bool,
    /// Who makes its control group.
    pub cgroups: Manager,
    /// The file with the configuration of its runtime class, if that has one.
    pub class: Option<&'a Path>,
    /// What the host goes by when it has no memory left, if the specification does not say; `None`: as with this process.
    pub oom_score_adj: Option<i32>,
    /// When it was asked for; see [`super::Timeline`].
    pub began: u64,
    /// Whether it has no program, and holds its pod open for others. It is made in the background.
    pub holds_pod: bool,
    /// Root of all state.
    pub root: &'a Path,
    /// Where to say what happens.
    pub log: &'a Log,
}

/// Why there is no container, or no program in it.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The bundle is wrong.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// It asks for more than there is.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The configuration of this host, or what the container's annotations ask for.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its id, or what is written under the state root.
    #[error(transparent)]
    State(#[from] StateError),
    /// It cannot stay in the foreground.
    #[error(transparent)]
    Foreground(#[from] ForegroundError),
    /// Its control group.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The limit of its control group is below what its shadow needs. These are runc's words.
    #[error("container init was OOM-killed (memory limit too low?)")]
    OutOfMemory,
    /// Its shadow said it.
    #[error("{0}")]
    Failed(String),
    /// Its machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The shadow cannot be started.
    #[error("cannot start the container's process: {0}")]
    Spawn(#[source] io::Error),
    /// The shadow ended without a word.
    #[error("the container's process ended before its time: {0}")]
    Died(ExitStatus),
    /// The machine it is to be in.
    #[error("pod {0:?}: its virtual machine is gone")]
    PodGone(String),
    /// Its end cannot be waited for.
    #[error("cannot wait for the container's process: {0}")]
    Wait(#[source] io::Error),
    /// A namespace that it is to be in.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// One of its hooks.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// Its network.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The size of the machine it is to be in.
    #[error(transparent)]
    Resize(#[from] CommandError),
    /// The host goes by something else when it has no memory left.
    #[error("process.oomScoreAdj: {0}")]
    OomScore(#[source] io::Error),
    /// Who asked for it cannot be told.
    #[error(transparent)]
    Announce(#[from] AnnounceError),
}

/// A container in the making, or one in the foreground.
struct Pod<'a> {
    /// Its own.
    machine: Option<Process>,
    /// Whether its network is another's.
    shares_network: bool,
    /// Whether the command stays.
    foreground: bool,
    shadow: Shadow,
    made: Made<'a>,
}

/// What is made for a container on the host, and is left of it when its processes have ended.
struct Made<'a> {
    create: &'a Create<'a>,
    state: State,
    /// Where its control groups are to be.
    placement: Option<Placement>,
    hooks: Hooks,
    /// Whether there was anything that a hook could have seen.
    begun: bool,
}

/// The processes of a container that was made, children of this one.
pub struct Created {
    /// Stands for the container, and ends as it does.
    pub shadow: i32,
    /// Its machine's, unless it is in another's.
    pub machine: Option<i32>,
}

/// Makes a container, which waits for `start`; it is its shadow's from then on, and so is what its program is to inherit.
pub fn create(create: &Create<'_>, launch: Launch, handed: Handed) -> Result<Created, CreateError> {
    let (bundle, wanted) = create.check()?;
    let begin = Begin { kept: true, holds_pod: create.holds_pod, ..Begin::default() };
    let mut pod = Pod::begin(create, &bundle, wanted, begin, launch, handed)?;
    loop {
        match pod.shadow.news() {
            Ok(News::Entered) => {
                if let Err(error) = pod.entered() {
                    return Err(pod.end(error));
                }
            }
            Ok(News::Made) => break,
            Ok(News::Started | News::Warning(_)) => {}
            Ok(News::Failed(error)) => return Err(pod.failed(error)),
            Ok(News::MachineGone) => return Err(pod.machine_gone()),
            Err(_) => return Err(pod.died()),
        }
    }
    if let Err(error) = pod.made.settle() {
        return Err(pod.end(error));
    }
    let created = Created { shadow: pod.shadow.pid(), machine: pod.machine.as_ref().map(Process::pid) };
    if let Some(machine) = pod.machine {
        machine.release();
    }
    Ok(created)
}

/// Runs a container in the foreground, and calls `started` when its program runs; returns its exit status. Without `kept` nothing is
/// left of it then.
pub fn run(create: &Create<'_>, inherited: Inherited, kept: bool, started: impl Fn()) -> Result<u8, CreateError> {
    let (bundle, wanted) = create.check()?;
    let mut foreground = Foreground::new(&bundle.config, create.console_socket)?;
    let begin = Begin { kept, foreground: true, ..Begin::default() };
    let handed = Handed { terminal: foreground.take_peer(), inherited };
    let mut pod = Pod::begin(create, &bundle, wanted, begin, Launch::as_this_process(), handed)?;
    loop {
        match foreground.next(&pod.shadow) {
            Ok(Next::News(News::Entered)) => {
                if let Err(error) = pod.entered() {
                    return Err(pod.end(error));
                }
            }
            Ok(Next::News(News::Made)) => {
                if let Err(error) = pod.made.settle() {
                    return Err(pod.end(error));
                }
                if let Err(error) = foreground.begin() {
                    return Err(pod.end(error.into()));
                }
                pod.shadow.go_on();
            }
            Ok(Next::News(News::Started)) => {
                create.log.debug(|| format!("{}: container runs", create.id));
                started();
                if let Err(error) = pod.made.run_hooks(Point::Started, None) {
                    return Err(pod.end(error.into()));
                }
                pod.made.pass_on_readiness();
            }
            Ok(Next::News(News::Warning(text))) => create.log.warning(&text),
            Ok(Next::News(News::Failed(error))) => return Err(pod.failed(error)),
            Ok(Next::News(News::MachineGone)) => return Err(pod.machine_gone()),
            Ok(Next::Over) => return pod.wait(foreground, kept),
            Ok(Next::Interrupted(status)) => {
                pod.remove();
                return Ok(status);
            }
            Err(error) => return Err(pod.end(error.into())),
        }
    }
}

/// What a container's program is to have of the caller's, or of what this process has made for it.
#[derive(Default)]
pub struct Handed {
    /// The other side of a terminal.
    pub terminal: Option<OwnedFd>,
    /// Beyond the standard streams.
    pub inherited: Inherited,
}

/// Where a container is to be.
struct Wanted {
    joined: Joined,
    placement: Option<Placement>,
    /// What its machine is made with; nothing of it counts for one that runs.
    settings: Settings,
}

impl<'a> Pod<'a> {
    /// Starts both processes. What is handed to the container this process keeps nothing of.
    fn begin(
        create: &'a Create<'a>,
        bundle: &Bundle,
        wanted: Wanted,
        begin: Begin,
        launch: Launch,
        handed: Handed,
    ) -> Result<Self, CreateError> {
        let Handed { terminal, inherited: Inherited { fds: descriptors, listening } } = handed;
        let Wanted { joined: Joined { pod: member_of, shared, namespaces: joined, users }, placement, settings } =
            wanted;
        let (mut machine, mounts) = match &member_of {
            None => (Some(Process::spawn()?), None),
            Some(pod) => (None, Some(pod.mounts()?.ok_or_else(|| CreateError::PodGone(pod.pod.clone()))?)),
        };
        let shares_network = shared.iter().any(|shared| shared.kind == LinuxNamespaceType::Network);
        let (kinds, joined): (Vec<_>, Vec<_>) = joined.into_iter().unzip();
        let begin = Begin {
            began: create.began,
            machine: machine.as_ref().map(Process::pid),
            settings,
            terminal: terminal.is_some(),
            pod: member_of.clone(),
            shared,
            users,
            namespaces: kinds.clone(),
            descriptors: descriptors.len(),
            listening,
            notify: notify::asked().is_some(),
            ..begin
        };
        create.log.of_pod(begin.pod.as_ref().map_or(create.id, |pod| &pod.pod));
        let foreground = begin.foreground;
        let channel = machine.as_mut().and_then(Process::take_channel);
        let fds: Vec<_> = channel.into_iter().chain(terminal).chain(mounts).chain(joined).chain(descriptors).collect();
        let joined = &fds[fds.len() - begin.descriptors - kinds.len()..];
        let namespace = match kinds.iter().position(|kind| *kind == LinuxNamespaceType::Pid) {
            Some(index) => PidNamespace::Is(joined[index].as_fd()),
            None if namespaces(&bundle.config).pid => PidNamespace::New,
            None => PidNamespace::Same,
        };
        let shadow = Shadow::spawn(launch, namespace, begin, &fds).map_err(CreateError::Spawn)?;
        let spec = bundle.config.spec();
        let annotations = spec.annotations().clone();
        let mut state = State::new(create.id, shadow.pid(), &bundle.path, &bundle.root_path, annotations);
        state.machine = machine.as_ref().map(|machine| Machine::of(machine.pid()));
        state.member_of = member_of;
        state.place(placement.as_ref());
        state.demand = Demand::of(spec);
        let hooks = spec.hooks().clone().unwrap_or_default();
        let score = spec.process().as_ref().and_then(|process| process.oom_score_adj()).or(create.oom_score_adj);
        let made = Made { create, state, placement, hooks, begun: false };
        let pod = Self { machine, shares_network, foreground, shadow, made };
        // At once: what the machine uses before counts as ours. The shadow is as yet busy with itself.
        match score::begin(&pod.made.state, score).map_err(CreateError::OomScore).and_then(|()| pod.made.move_machine())
        {
            Ok(()) => Ok(pod),
            Err(error) => Err(pod.end(error)),
        }
    }

    /// The shadow is in its namespaces: what takes a look from outside is done, and the container made.
    fn entered(&mut self) -> Result<(), CreateError> {
        self.made.move_shadow()?;
        self.made.begun = true;
        let pid = Pid::from_raw(self.shadow.pid()).ok_or(CreateError::Wait(io::ErrorKind::NotFound.into()))?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| CreateError::Wait(errno.into()))?;
        self.made.run_hooks(Point::Made, Some(pidfd.as_fd()))?;
        // After the hooks: some of them make the network.
        match &self.made.state.member_of {
            None => {
                if let Some(wiring) = Wiring::of(&pidfd, crate::network::Joined::None, self.made.create.log)? {
                    self.shadow.give(wiring)?;
                }
            }
            Some(_) if self.shares_network => {}
            Some(pod) => network::refuse_own(&pidfd, &pod.pod)?,
        }
        if self.made.state.member_of.is_some() {
            resize::join(self.made.create.root, &self.made.state, self.made.create.log)?;
            score::join(self.made.create.root, &self.made.state)?;
        }
        // In the foreground nobody looks into the group when the container has ended.
        if !self.foreground
            && let Some(file) = self.made.state.cgroup.as_ref().and_then(Cgroup::memory_limit)
        {
            self.shadow.give_memory_limit(&file).map_err(CreateError::Spawn)?;
        }
        self.shadow.go_on();
        Ok(())
    }

    /// The container has ended, and its shadow is about to, with its status.
    fn wait(self, foreground: Foreground, kept: bool) -> Result<u8, CreateError> {
        let Self { machine, shadow, made, .. } = self;
        let status = shadow.wait().map_err(CreateError::Wait)?;
        foreground.end();
        drop(machine);
        match status.code() {
            Some(code) => {
                if !kept {
                    made.remove();
                }
                Ok(u8::try_from(code).unwrap_or(u8::MAX))
            }
            None => Err(made.killed(status)),
        }
    }

    /// The shadow has said why.
    fn failed(self, error: String) -> CreateError {
        let Self { machine, shadow, made, .. } = self;
        let _ = shadow.wait();
        drop(machine);
        made.remove_failed();
        CreateError::Failed(error)
    }

    /// The shadow cannot know why; the process is a child of ours.
    fn machine_gone(mut self) -> CreateError {
        let error = self.machine.as_mut().map_or(MachineError::Gone, Process::end);
        let _ = self.shadow.wait();
        self.made.remove_failed();
        error.into()
    }

    /// The shadow ended without a word.
    fn died(self) -> CreateError {
        let Self { machine, shadow, made, .. } = self;
        let status = shadow.wait();
        drop(machine);
        match status {
            Ok(status) => made.killed(status),
            Err(error) => {
                made.remove_failed();
                CreateError::Wait(error)
            }
        }
    }

    /// Ends it all for an error of ours.
    fn end(self, error: CreateError) -> CreateError {
        self.remove();
        error
    }

    fn remove(self) {
        let Self { machine, shadow, made, .. } = self;
        shadow.kill();
        drop(machine);
        made.remove_failed();
    }
}

impl Made<'_> {
    /// Moves the machine's process to its control group.
    fn move_machine(&self) -> Result<(), CreateError> {
        match (&self.placement, self.state.machine) {
            (Some(placement), Some(machine)) => Ok(placement.make_machine(machine.0)?),
            _ => Ok(()),
        }
    }

    /// Moves the shadow to the container's control group, which has no limits yet.
    fn move_shadow(&self) -> Result<(), CreateError> {
        let Some(placement) = &self.placement else { return Ok(()) };
        Ok(placement.make_container(self.state.process, self.state.machine.map(|machine| machine.0))?)
    }

    /// The container is made: it gets its limits, and who asked for it a pid.
    fn settle(&self) -> Result<(), CreateError> {
        if let Some(placement) = &self.placement {
            placement.limit(self.state.process, self.state.machine.map(|machine| machine.0))?;
        }
        Ok(self.create.announce.tell(self.state.process.pid, Stands::Container)?)
    }

    /// Tells the service manager that waits for it, beside everything else, when the program is ready.
    fn pass_on_readiness(&self) {
        let waiting = Known::load(self.create.root, self.create.id).map_err(|error| error.to_string());
        let waiting = waiting.and_then(|known| Waiting::of(&known).map_err(|error| error.to_string()));
        let waits = waiting.and_then(|waiting| {
            let Some(waiting) = waiting else { return Ok(()) };
            // It ends with this process at the latest. What keeps it from telling, the service manager says itself.
            let thread = std::thread::Builder::new().name("notify".into()).spawn(move || waiting.pass_on(None));
            thread.map(drop).map_err(|error| error.to_string())
        });
        if let Err(error) = waits {
            self.create.log.warning(&format!("NOTIFY_SOCKET: {error}"));
        }
    }

    fn run_hooks(&self, point: Point, shadow: Option<BorrowedFd<'_>>) -> Result<(), HookError> {
        hooks::run(&self.hooks, point, &self.state, shadow)
    }

    /// A shadow that was killed could not tidy up.
    fn killed(&self, status: ExitStatus) -> CreateError {
        let starved = self.state.cgroup.as_ref().is_some_and(|group| group.out_of_memory() > 0);
        self.remove_failed();
        if starved { CreateError::OutOfMemory } else { CreateError::Died(status) }
    }

    /// Removes all there is of a container that failed: it has no pid.
    fn remove_failed(&self) {
        self.create.announce.withdraw();
        self.remove();
    }

    /// Removes what there is of a container whose processes have ended. What cannot be removed now the next command sweeps.
    fn remove(&self) {
        let (log, id) = (self.create.log, self.create.id);
        if let Err(error) = self.state.remove_cgroups(PATIENCE) {
            log.warning(&error.to_string());
        }
        if let Ok(known) = Known::load(self.create.root, id)
            && known.state.process == self.state.process
        {
            let _ = known.destroy();
        }
        // What of its files cannot be taken out of the machine of its pod goes with that.
        if let Some(Err(error)) = self.state.member_of.as_ref().map(|pod| pod.leave(self.create.root, id)) {
            log.debug(|| format!("{id}: {error}"));
        }
        resize::leave(self.create.root, &self.state, log);
        // Nothing is left of it. That a hook fails then changes nothing.
        if self.begun
            && let Err(error) = self.run_hooks(Point::Deleted, None)
        {
            log.warning(&error.to_string());
        }
    }
}

impl Create<'_> {
    /// What can be said before anything is made, so that it is said first.
    fn check(&self) -> Result<(Bundle, Wanted), CreateError> {
        state::check_free(self.root, self.id)?;
        let bundle = Bundle::open(self.bundle)?;
        let joined = join::look_up(self.root, &bundle.config)?;
        let mut settings = self.settings(&bundle, &joined)?;
        Size::of(&settings.sizing, &[&Demand::of(bundle.config.spec())])?;
        let placement = Placement::new(self.cgroups, &bundle.config, self.id)?;
        settings.sizing.room = placement.as_ref().and_then(Placement::memory);
        Ok((bundle, Wanted { joined, placement, settings }))
    }

    /// What the container's machine is made with, or that of its pod was. What the configuration says now is not asked for one
    /// that runs.
    fn settings(&self, bundle: &Bundle, joined: &Joined) -> Result<Settings, CreateError> {
        let annotations = bundle.config.spec().annotations().clone().unwrap_or_default();
        let Some(pod) = &joined.pod else { return Ok(Settings::for_pod(&annotations, self.class)?) };
        let first = Known::load(self.root, &pod.pod)?.state;
        config::check_member(&annotations, &first.annotations.unwrap_or_default(), &pod.pod)?;
        Ok(Settings { sizing: first.sizing, ..Settings::default() })
    }
}
