//! Making a container, as the command does it that is asked to: it starts the machine's process and the shadow, does what
//! takes a look from outside (its hooks, its control group), and in the foreground stays until the end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use oci_spec::runtime::{Hooks, LinuxNamespaceType};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::hooks::{self, HookError, Point};
use super::join::{self, JoinError, Joined};
use super::link::{Begin, News};
use super::network::{self, WireError, Wiring};
use super::shadow::Shadow;
use super::size::{Size, SizeError};
use super::view::namespaces;
use crate::bundle::{Bundle, BundleError};
use crate::log::Log;
use crate::machine::{MachineError, PidNamespace, Process};
use crate::signals::{self, Waiting};
use crate::state::{self, Known, Membership, State, StateError};
use crate::stdio::{Proxy, StdioError};

/// What to make, and for whom.
pub struct Create<'a> {
    /// The container's id.
    pub id: &'a str,
    /// Directory of the bundle.
    pub bundle: &'a Path,
    /// Where to write the pid that stands for the container.
    pub pid_file: Option<&'a Path>,
    /// Whether somebody else is sent the terminal.
    pub console_socket: bool,
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
    /// Its id, or what is written under the state root.
    #[error(transparent)]
    State(#[from] StateError),
    /// Its terminal.
    #[error(transparent)]
    Stdio(#[from] StdioError),
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
    /// The pid file cannot be written.
    #[error("cannot write the pid file {0}: {1}")]
    PidFile(PathBuf, #[source] io::Error),
}

/// A container in the making, or one in the foreground.
struct Pod<'a> {
    create: &'a Create<'a>,
    /// Its own.
    machine: Option<Process>,
    /// The pod whose machine it is in, if that is another's.
    member_of: Option<Membership>,
    /// Whether its network is another's.
    shares_network: bool,
    shadow: Shadow,
    hooks: Hooked,
}

/// The hooks of a container, and what they are told about it.
struct Hooked {
    hooks: Hooks,
    state: State,
    /// Whether there was anything that a hook could have seen.
    begun: bool,
}

/// Makes a container, which waits for `start`; it is its shadow's from then on.
pub fn create(create: &Create<'_>) -> Result<(), CreateError> {
    let (bundle, joined) = create.check()?;
    let mut pod = Pod::begin(create, &bundle, joined, Begin { kept: true, ..Begin::default() }, None)?;
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
    if let Err(error) = pod.write_pid_file() {
        return Err(pod.end(error));
    }
    if let Some(machine) = pod.machine {
        machine.release();
    }
    Ok(())
}

/// Runs a container in the foreground; returns its exit status. Without `kept` nothing is left of it then.
pub fn run(create: &Create<'_>, kept: bool) -> Result<u8, CreateError> {
    let (bundle, joined) = create.check()?;
    // From here on nothing ends this process between making something and removing it.
    signals::block();
    let signals = Waiting::new().map_err(CreateError::Wait)?;
    let mut proxy = match bundle.config.terminal() && !create.console_socket {
        true => Some(Proxy::open(bundle.config.console_size())?),
        false => None,
    };
    let begin = Begin { kept, foreground: true, ..Begin::default() };
    let mut pod = Pod::begin(create, &bundle, joined, begin, proxy.as_mut().and_then(Proxy::take_peer))?;
    let mut running = false;
    loop {
        let (signal, news) = {
            let link = pod.shadow.link();
            let mut fds = [PollFd::new(&signals, PollFlags::IN), PollFd::new(&link, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(pod.end(CreateError::Wait(errno.into()))),
            }
            (!fds[0].revents().is_empty(), !fds[1].revents().is_empty())
        };
        if news {
            match pod.shadow.news() {
                Ok(News::Entered) => {
                    if let Err(error) = pod.entered() {
                        return Err(pod.end(error));
                    }
                }
                Ok(News::Made) => {
                    if let Err(error) = pod.write_pid_file() {
                        return Err(pod.end(error));
                    }
                    if let Some(Err(error)) = proxy.as_mut().map(Proxy::start) {
                        return Err(pod.end(error.into()));
                    }
                    running = true;
                    pod.shadow.go_on();
                }
                Ok(News::Started) => {
                    create.log.debug(|| format!("{}: container runs", create.id));
                    if let Err(error) = pod.hooks.run(Point::Started, None) {
                        return Err(pod.end(error.into()));
                    }
                }
                Ok(News::Warning(text)) => create.log.warning(&text),
                Ok(News::Failed(error)) => return Err(pod.failed(error)),
                Ok(News::MachineGone) => return Err(pod.machine_gone()),
                Err(_) => break,
            }
        }
        if signal && let Some(signal) = signals.next() {
            match (signal, &proxy) {
                (libc::SIGWINCH, Some(proxy)) => proxy.resize(),
                // From outside: the key of the terminal goes to the container. The shell gets a sane terminal.
                (libc::SIGTSTP, Some(proxy)) => proxy.stop(),
                (libc::SIGCONT, Some(proxy)) if running => {
                    if let Err(error) = proxy.resume() {
                        return Err(pod.end(error.into()));
                    }
                }
                (signal, _) if signals::is_ours(signal) => {}
                (signal, _) if running => pod.shadow.signal(signal),
                (signal, _) if signals::ends_by_default(signal) => {
                    pod.remove();
                    return Ok(u8::try_from(128 + signal).unwrap_or(u8::MAX));
                }
                _ => {}
            }
        }
    }
    pod.wait(proxy, kept)
}

impl<'a> Pod<'a> {
    /// Starts both processes. `terminal` is one that the container is to have.
    fn begin(
        create: &'a Create<'a>,
        bundle: &Bundle,
        joined: Joined,
        begin: Begin,
        terminal: Option<OwnedFd>,
    ) -> Result<Self, CreateError> {
        let Joined { pod: member_of, shared, namespaces: joined } = joined;
        let (mut machine, mounts) = match &member_of {
            None => (Some(Process::spawn()?), None),
            Some(pod) => (None, Some(pod.mounts()?.ok_or_else(|| CreateError::PodGone(pod.pod.clone()))?)),
        };
        let shares_network = shared.iter().any(|shared| shared.kind == LinuxNamespaceType::Network);
        let (kinds, joined): (Vec<_>, Vec<_>) = joined.into_iter().unzip();
        let begin = Begin {
            machine: machine.as_ref().map(Process::pid),
            terminal: terminal.is_some(),
            pod: member_of.clone(),
            shared,
            namespaces: kinds.clone(),
            ..begin
        };
        let channel = machine.as_mut().and_then(Process::take_channel);
        let fds: Vec<_> = channel.into_iter().chain(terminal).chain(mounts).chain(joined).collect();
        let joined = &fds[fds.len() - kinds.len()..];
        let namespace = match kinds.iter().position(|kind| *kind == LinuxNamespaceType::Pid) {
            Some(index) => PidNamespace::Is(joined[index].as_fd()),
            None if namespaces(&bundle.config).pid => PidNamespace::New,
            None => PidNamespace::Same,
        };
        let shadow = Shadow::spawn(namespace, begin, &fds).map_err(CreateError::Spawn)?;
        let spec = bundle.config.spec();
        let annotations = spec.annotations().clone();
        let state = State::new(create.id, shadow.pid(), &bundle.path, &bundle.root_path, annotations);
        let hooks = Hooked { hooks: spec.hooks().clone().unwrap_or_default(), state, begun: false };
        Ok(Self { create, machine, member_of, shares_network, shadow, hooks })
    }

    /// The shadow is in its namespaces: what takes a look from outside is done, and the container made.
    fn entered(&mut self) -> Result<(), CreateError> {
        self.hooks.begun = true;
        let pid = Pid::from_raw(self.shadow.pid()).ok_or(CreateError::Wait(io::ErrorKind::NotFound.into()))?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| CreateError::Wait(errno.into()))?;
        self.hooks.run(Point::Made, Some(pidfd.as_fd()))?;
        // After the hooks: some of them make the network.
        match &self.member_of {
            None => {
                if let Some(wiring) = Wiring::of(&pidfd, crate::network::Joined::None, self.create.log)? {
                    self.shadow.give(wiring)?;
                }
            }
            Some(_) if self.shares_network => {}
            Some(pod) => network::refuse_own(&pidfd, &pod.pod)?,
        }
        self.shadow.go_on();
        Ok(())
    }

    fn write_pid_file(&self) -> Result<(), CreateError> {
        let Some(path) = self.create.pid_file else { return Ok(()) };
        state::replace(path, self.shadow.pid().to_string().as_bytes())
            .map_err(|e| CreateError::PidFile(path.to_owned(), e))
    }

    /// The container has ended, and its shadow is about to, with its status.
    fn wait(self, proxy: Option<Proxy>, kept: bool) -> Result<u8, CreateError> {
        let Self { create, machine, member_of, shadow, hooks, .. } = self;
        let pid = shadow.pid();
        let status = shadow.wait().map_err(CreateError::Wait)?;
        if let Some(mut proxy) = proxy {
            proxy.drain();
        }
        drop(machine);
        match status.code() {
            Some(code) => {
                if !kept {
                    create.leave(member_of.as_ref());
                    hooks.deleted(create.log);
                }
                Ok(u8::try_from(code).unwrap_or(u8::MAX))
            }
            // Killed: it could not tidy up.
            None => {
                create.sweep(pid);
                create.leave(member_of.as_ref());
                hooks.deleted(create.log);
                Err(CreateError::Died(status))
            }
        }
    }

    /// The shadow has said why, and removes what it made.
    fn failed(self, error: String) -> CreateError {
        let _ = self.shadow.wait();
        self.create.remove_pid_file();
        self.create.leave(self.member_of.as_ref());
        self.hooks.deleted(self.create.log);
        CreateError::Failed(error)
    }

    /// The shadow cannot know why; the process is a child of ours.
    fn machine_gone(mut self) -> CreateError {
        let error = self.machine.as_mut().map_or(MachineError::Gone, Process::end);
        let _ = self.shadow.wait();
        self.create.remove_pid_file();
        self.create.leave(self.member_of.as_ref());
        self.hooks.deleted(self.create.log);
        error.into()
    }

    /// The shadow ended without a word.
    fn died(self) -> CreateError {
        let Self { create, machine, member_of, shadow, hooks, .. } = self;
        let pid = shadow.pid();
        let status = shadow.wait();
        drop(machine);
        create.sweep(pid);
        create.leave(member_of.as_ref());
        hooks.deleted(create.log);
        status.map_or_else(CreateError::Wait, CreateError::Died)
    }

    /// Ends it all for an error of ours.
    fn end(self, error: CreateError) -> CreateError {
        self.remove();
        error
    }

    fn remove(self) {
        let Self { create, machine, member_of, shadow, hooks, .. } = self;
        let pid = shadow.pid();
        shadow.kill();
        drop(machine);
        create.sweep(pid);
        create.leave(member_of.as_ref());
        hooks.deleted(create.log);
    }
}

impl Hooked {
    fn run(&self, point: Point, shadow: Option<BorrowedFd<'_>>) -> Result<(), HookError> {
        hooks::run(&self.hooks, point, &self.state, shadow)
    }

    /// Nothing is left of the container. That a hook fails then changes nothing.
    fn deleted(&self, log: &Log) {
        if self.begun
            && let Err(error) = self.run(Point::Deleted, None)
        {
            log.warning(&error.to_string());
        }
    }
}

impl Create<'_> {
    /// What can be said before anything is made, so that it is said first.
    fn check(&self) -> Result<(Bundle, Joined), CreateError> {
        state::check_free(self.root, self.id)?;
        let bundle = Bundle::open(self.bundle)?;
        Size::for_container(bundle.config.spec())?;
        let joined = join::look_up(self.root, &bundle.config)?;
        Ok((bundle, joined))
    }

    /// Takes the container's files out of the machine of its pod. What cannot be taken out goes with the machine.
    fn leave(&self, pod: Option<&Membership>) {
        if let Some(Err(error)) = pod.map(|pod| pod.leave(self.id)) {
            self.log.debug(|| format!("{}: {error}", self.id));
        }
    }

    /// Removes what a shadow left that was killed. What it had not written down yet the next command sweeps.
    fn sweep(&self, pid: i32) {
        self.remove_pid_file();
        if let Ok(known) = Known::load(self.root, self.id)
            && known.state.process.pid == pid
        {
            let _ = known.destroy();
        }
    }

    /// A container that failed has no pid; a file that somebody else made meanwhile is not told apart.
    fn remove_pid_file(&self) {
        if let Some(path) = self.pid_file {
            let _ = std::fs::remove_file(path);
        }
    }
}
