//! A process of a container as the agent sees it, be it the init or one executed later: ready, started, watched, ended.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use podhull_protocol::{Event, Exit, event};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};
use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, watch};

use super::launch::{self, Launched};
use super::limits::Limits;
use super::out_of_memory::Kills;
use super::report::Report;
use super::{ContainerError, gate, terminal};
use crate::cgroup::Cgroup;
use crate::events::Events;
use crate::reaper::ExitStatus;
use crate::stdio::{Claim, Pumps};

/// How long a process may take to be ready for its program, and for `execve` without hooks.
pub const READY_DEADLINE: Duration = Duration::from_secs(60);

/// How long the output of a process that is forgotten may take to be gone.
pub const EXIT_DEADLINE: Duration = Duration::from_secs(10);

/// A process in front of its gate.
pub struct Ready {
    launched: Launched,
    pumps: Pumps,
    master: Option<Weak<OwnedFd>>,
}

impl Ready {
    /// Waits until only the program is missing, and sets the limits. A process that does not come so far is killed.
    pub async fn await_from(
        mut launched: Launched,
        limits: &Limits,
        terminal: Option<Claim>,
        mut pumps: Pumps,
    ) -> Result<Self, ContainerError> {
        match await_ready(&mut launched, limits, terminal, &mut pumps).await {
            Ok(master) => Ok(Self { launched, pumps, master }),
            Err(error) => {
                kill(&launched.pidfd);
                Err(error)
            }
        }
    }

    /// Gives the process up.
    pub fn kill(&self) {
        kill(&self.launched.pidfd);
    }

    /// Opens the gate at once. A process that does not become its program is killed.
    pub async fn pass(&self) -> Result<(), ContainerError> {
        let passed = pass(&self.launched.socket, READY_DEADLINE).await;
        if passed.is_err() {
            self.kill();
        }
        passed
    }

    /// Has its end reported as `event`, which says whose it is; until then, and before it, the kills of its container, if they are
    /// its to say. Returns the way to its gate, too.
    pub fn watched(
        self,
        mut event: Event,
        cgroup: Arc<Cgroup>,
        events: Arc<Events>,
        mut kills: Option<Kills>,
    ) -> (Watched, AsyncFd<OwnedFd>) {
        let Self { launched: Launched { pid, pidfd, socket, exit, .. }, pumps, master } = self;
        let (sender, ended) = watch::channel(false);
        let reporter = tokio::spawn(async move {
            let watch = async {
                match &mut kills {
                    Some(kills) => kills.watch().await,
                    None => std::future::pending().await,
                }
            };
            let status = tokio::select! {
                status = exit => status.unwrap_or(ExitStatus::Code(255)),
                never = watch => match never {},
            };
            sender.send_replace(true);
            pumps.finish().await;
            if let Some(kills) = &mut kills {
                kills.say();
            }
            let (code, signal) = match status {
                ExitStatus::Code(code) => (code, 0),
                ExitStatus::Signal(signal) => (0, signal),
            };
            let exit = Exit { code, signal, oom_killed: cgroup.oom_kills() > 0, ..Exit::default() };
            event.kind = Some(event::Kind::Exit(exit));
            events.push(event);
        });
        (Watched { pid, pidfd, master, ended, reporter: Mutex::new(Some(reporter)) }, socket)
    }
}

/// A process whose end will be reported.
pub struct Watched {
    pub pid: Pid,
    pub pidfd: OwnedFd,
    /// The pumps hold the terminal; when they let go it hangs up.
    master: Option<Weak<OwnedFd>>,
    /// Whether it has been reaped.
    ended: watch::Receiver<bool>,
    /// The task that reports the exit, until that is done.
    reporter: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

impl Watched {
    /// Whether the process has been reaped, as far as the agent has seen.
    pub fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }

    /// Whether the process runs in this very moment.
    pub fn is_alive(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let ended = rustix::event::poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&now));
        !self.has_ended() && ended == Ok(0)
    }

    /// Whether the process has ended or is about to: the kernel takes its namespaces from it before it says so.
    pub fn is_ending(&self) -> bool {
        /// `PF_EXITING` of `linux/sched.h`.
        const EXITING: u64 = 4;
        // Before: while it has not ended the number is its own.
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid.as_raw_nonzero())).unwrap_or_default();
        // Field 9 (proc_pid_stat(5)), counted from behind the name, which may contain anything.
        let flags = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(6));
        !self.is_alive() || flags.and_then(|flags| flags.parse().ok()).is_some_and(|flags: u64| flags & EXITING != 0)
    }

    /// Sends a signal; false if there is nobody to take it.
    pub fn signal(&self, signal: Signal) -> Result<bool, Errno> {
        if self.has_ended() {
            return Ok(false);
        }
        match rustix::process::pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    /// Sets the window size of the terminal.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<(), ContainerError> {
        let master = self.master.as_ref().ok_or(ContainerError::NoTerminalToResize)?;
        let master = master.upgrade().ok_or(ContainerError::NotRunning)?;
        terminal::set_size(master, rows, columns).map_err(ContainerError::Resize)
    }

    /// Waits until the exit of a killed process is reported, unless nobody takes the output. It is not reported afterwards, whoever
    /// else waits.
    pub async fn finish(&self) {
        let mut slot = self.reporter.lock().await;
        if let Some(reporter) = &mut *slot {
            if tokio::time::timeout(EXIT_DEADLINE, &mut *reporter).await.is_err() {
                reporter.abort();
                let _ = reporter.await;
            }
            *slot = None;
        }
    }
}

/// Tells a process to become its program, and waits until it has.
pub async fn pass(socket: &AsyncFd<OwnedFd>, deadline: Duration) -> Result<(), ContainerError> {
    launch::send(socket, gate::START).await.map_err(ContainerError::InitSocket)?;
    // The socket is closed by execve; a process that is killed before has an exit status, as any program.
    let answer = tokio::time::timeout(deadline, launch::receive(socket)).await;
    let (report, _) = answer.map_err(|_| ContainerError::InitSlow(deadline))?.map_err(ContainerError::InitSocket)?;
    match report {
        Some(Report::Failed { kind, message }) => Err(ContainerError::Init { kind, message }),
        Some(Report::Created) | None => Ok(()),
    }
}

async fn await_ready(
    launched: &mut Launched,
    limits: &Limits,
    terminal: Option<Claim>,
    pumps: &mut Pumps,
) -> Result<Option<Weak<OwnedFd>>, ContainerError> {
    let answer = tokio::time::timeout(READY_DEADLINE, launch::receive(&launched.socket)).await;
    let (report, master) =
        answer.map_err(|_| ContainerError::InitSlow(READY_DEADLINE))?.map_err(ContainerError::InitSocket)?;
    match report {
        Some(Report::Created) => {}
        Some(Report::Failed { kind, message }) => return Err(ContainerError::Init { kind, message }),
        None => {
            let status = tokio::time::timeout(EXIT_DEADLINE, &mut launched.exit).await;
            let status = status.ok().and_then(Result::ok).unwrap_or(ExitStatus::Code(1));
            return Err(ContainerError::InitDied(status));
        }
    }
    // Not before: our own steps are not to run into them.
    limits.set(launched.pid)?;
    let mut weak = None;
    if let Some(claim) = terminal {
        let master = Arc::new(master.ok_or(ContainerError::NoTerminal)?);
        weak = Some(Arc::downgrade(&master));
        pumps.terminal(master, claim)?;
    }
    pumps.connected().await?;
    Ok(weak)
}

fn kill(pidfd: &OwnedFd) {
    // It may have ended by itself; then there is nothing to kill.
    let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
}
