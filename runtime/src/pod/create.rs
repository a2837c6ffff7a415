//! Making a container, as the command does it that is asked to: it starts the machine's process and the shadow, does what
//! takes a look from outside (its hooks, its control group), and in the foreground stays until the end.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::link::{Begin, News};
use super::shadow::Shadow;
use super::size::{Size, SizeError};
use super::view::namespaces;
use crate::bundle::{Bundle, BundleError};
use crate::cgroup::{CgroupError, Manager, PATIENCE, Placement};
use crate::log::Log;
use crate::machine::{MachineError, PidNamespace, Process};
use crate::signals::{self, Waiting};
use crate::state::{self, Known, Process as Identity, StateError};
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
    /// Who makes its control group.
    pub cgroups: Manager,
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
    /// Its control group.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The host's memory limit is below what its shadow needs.
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
    /// Its end cannot be waited for.
    #[error("cannot wait for the container's process: {0}")]
    Wait(#[source] io::Error),
    /// The pid file cannot be written.
    #[error("cannot write the pid file {0}: {1}")]
    PidFile(PathBuf, #[source] io::Error),
}

/// A container in the making, or one in the foreground.
struct Pod<'a> {
    create: &'a Create<'a>,
    machine: Process,
    shadow: Shadow,
    groups: Option<Groups>,
}

/// The control groups of the two processes.
struct Groups {
    placement: Placement,
    shadow: Identity,
    machine: Identity,
}

impl Groups {
    /// Removes what there is of them; the processes have ended.
    fn remove(&self, log: &Log) {
        for group in [self.placement.container(self.shadow), self.placement.machine(self.machine)] {
            if let Err(error) = group.remove(PATIENCE) {
                log.warning(&error.to_string());
            }
        }
    }
}

/// Makes a container, which waits for `start`; it is its shadow's from then on.
pub fn create(create: &Create<'_>) -> Result<(), CreateError> {
    let (bundle, placement) = create.check()?;
    let pod = Pod::begin(create, &bundle, placement, Begin { kept: true, ..Begin::default() }, None)?;
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
    if let Err(error) = pod.made() {
        return Err(pod.end(error));
    }
    pod.machine.release();
    Ok(())
}

/// Runs a container in the foreground; returns its exit status. Without `kept` nothing is left of it then.
pub fn run(create: &Create<'_>, kept: bool) -> Result<u8, CreateError> {
    let (bundle, placement) = create.check()?;
    // From here on nothing ends this process between making something and removing it.
    signals::block();
    let signals = Waiting::new().map_err(CreateError::Wait)?;
    let mut proxy = match bundle.config.terminal() && !create.console_socket {
        true => Some(Proxy::open(bundle.config.console_size())?),
        false => None,
    };
    let begin = Begin { kept, foreground: true, ..Begin::default() };
    let pod = Pod::begin(create, &bundle, placement, begin, proxy.as_mut().and_then(Proxy::take_peer))?;
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
                    if let Err(error) = pod.made() {
                        return Err(pod.end(error));
                    }
                    if let Some(Err(error)) = proxy.as_mut().map(Proxy::start) {
                        return Err(pod.end(error.into()));
                    }
                    running = true;
                    pod.shadow.go_on();
                }
                Ok(News::Started) => create.log.debug(|| format!("{}: container runs", create.id)),
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
        placement: Option<Placement>,
        begin: Begin,
        terminal: Option<OwnedFd>,
    ) -> Result<Self, CreateError> {
        let mut machine = Process::spawn()?;
        let namespace = if namespaces(&bundle.config).pid { PidNamespace::New } else { PidNamespace::Same };
        let begin = Begin { machine: Some(machine.pid()), terminal: terminal.is_some(), ..begin };
        let fds = machine.take_channel().into_iter().chain(terminal).collect();
        let shadow = Shadow::spawn(namespace, begin, fds).map_err(CreateError::Spawn)?;
        let (own, its) = (Identity::of(shadow.pid()), Identity::of(machine.pid()));
        let groups = placement.map(|placement| Groups { placement, shadow: own, machine: its });
        let pod = Self { create, machine, shadow, groups };
        // At once: what it uses before counts as ours. The shadow is as yet busy with itself.
        match pod.groups.as_ref().map_or(Ok(()), |groups| groups.placement.make_machine(groups.machine)) {
            Ok(()) => Ok(pod),
            Err(error) => Err(pod.end(error.into())),
        }
    }

    /// The shadow is in its namespaces: what takes a look from outside is done, and the container made.
    fn entered(&self) -> Result<(), CreateError> {
        if let Some(groups) = &self.groups {
            groups.placement.make_container(groups.shadow, Some(groups.machine))?;
        }
        self.shadow.go_on();
        Ok(())
    }

    /// The container is made: it is given its limits, and its pid away.
    fn made(&self) -> Result<(), CreateError> {
        if let Some(groups) = &self.groups {
            groups.placement.limit_container(groups.shadow)?;
        }
        self.write_pid_file()
    }

    fn write_pid_file(&self) -> Result<(), CreateError> {
        let Some(path) = self.create.pid_file else { return Ok(()) };
        state::replace(path, self.shadow.pid().to_string().as_bytes())
            .map_err(|e| CreateError::PidFile(path.to_owned(), e))
    }

    /// The container has ended, and its shadow is about to, with its status.
    fn wait(self, proxy: Option<Proxy>, kept: bool) -> Result<u8, CreateError> {
        let Self { create, machine, shadow, groups } = self;
        let pid = shadow.pid();
        let status = shadow.wait().map_err(CreateError::Wait)?;
        if let Some(mut proxy) = proxy {
            proxy.drain();
        }
        drop(machine);
        match status.code() {
            Some(code) => {
                if !kept {
                    create.clear(pid, groups.as_ref());
                }
                Ok(u8::try_from(code).unwrap_or(u8::MAX))
            }
            // Killed: it could not tidy up.
            None => Err(create.killed(pid, groups.as_ref(), status)),
        }
    }

    /// The shadow has said why.
    fn failed(self, error: String) -> CreateError {
        let Self { create, machine, shadow, groups } = self;
        let pid = shadow.pid();
        let _ = shadow.wait();
        drop(machine);
        create.remove_pid_file();
        create.clear(pid, groups.as_ref());
        CreateError::Failed(error)
    }

    /// The shadow cannot know why; the process is a child of ours.
    fn machine_gone(mut self) -> CreateError {
        let error = self.machine.end();
        let pid = self.shadow.pid();
        let _ = self.shadow.wait();
        self.create.remove_pid_file();
        self.create.clear(pid, self.groups.as_ref());
        error.into()
    }

    /// The shadow ended without a word.
    fn died(self) -> CreateError {
        let Self { create, machine, shadow, groups } = self;
        let pid = shadow.pid();
        let status = shadow.wait();
        drop(machine);
        match status {
            Ok(status) => create.killed(pid, groups.as_ref(), status),
            Err(error) => CreateError::Wait(error),
        }
    }

    /// Ends it all for an error of ours.
    fn end(self, error: CreateError) -> CreateError {
        self.remove();
        error
    }

    fn remove(self) {
        let Self { create, machine, shadow, groups } = self;
        let pid = shadow.pid();
        shadow.kill();
        drop(machine);
        create.remove_pid_file();
        create.clear(pid, groups.as_ref());
    }
}

impl Create<'_> {
    /// What can be said before anything is made, so that it is said first.
    fn check(&self) -> Result<(Bundle, Option<Placement>), CreateError> {
        state::check_free(self.root, self.id)?;
        let bundle = Bundle::open(self.bundle)?;
        Size::for_container(bundle.config.spec())?;
        let placement = Placement::new(self.cgroups, &bundle.config, self.id)?;
        Ok((bundle, placement))
    }

    /// Removes all of a container whose processes have ended, but its pid file. What neither we nor a shadow have written down
    /// the next command sweeps.
    fn clear(&self, pid: i32, groups: Option<&Groups>) {
        if let Some(groups) = groups {
            groups.remove(self.log);
        }
        if let Ok(known) = Known::load(self.root, self.id)
            && known.state.process.pid == pid
        {
            let _ = known.destroy();
        }
    }

    /// Removes what a shadow left that was killed, and says so.
    fn killed(&self, pid: i32, groups: Option<&Groups>, status: ExitStatus) -> CreateError {
        let starved = groups.is_some_and(|groups| groups.placement.container(groups.shadow).out_of_memory() > 0);
        self.remove_pid_file();
        self.clear(pid, groups);
        if starved { CreateError::OutOfMemory } else { CreateError::Died(status) }
    }

    /// A container that failed has no pid; a file that somebody else made meanwhile is not told apart.
    fn remove_pid_file(&self) {
        if let Some(path) = self.pid_file {
            let _ = std::fs::remove_file(path);
        }
    }
}
