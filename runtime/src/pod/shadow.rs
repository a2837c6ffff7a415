//! The shadow, as who makes it sees it: the process that stands for a container, or for a program executed in one, on the
//! host. It is a child of the command, or of the shim, that makes it, and runs the command line that does so with [`FLAG`] in
//! front. When a command has ended its shadow is the child of whoever the caller chose for orphans.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};

use podhull_vmm::control::{self, ChannelError};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::link::{Begin, LINK_FD, LinkError, News, Order};
use super::network::{WireError, Wiring};
use crate::descriptors::inherit_only;
use crate::machine::{PidNamespace, spawn_in};

/// Name of its process.
pub const NAME: &str = "podhull-shadow";

/// The flag by which a command line is a shadow's.
pub const FLAG: &str = "--shadow";

/// What a shadow is started with beside what it is told.
pub struct Launch {
    /// The command line that makes what it stands for, without the name of the program.
    pub words: Vec<OsString>,
    /// Standard input, output and error; `None`: those of this process.
    pub streams: Option<[OwnedFd; 3]>,
}

impl Launch {
    /// As this process was started itself.
    pub fn as_this_process() -> Self {
        Self { words: std::env::args_os().skip(1).collect(), streams: None }
    }
}

/// A shadow, and what it says. Dropping it leaves the process alone: it sees that its creator is gone.
pub struct Shadow {
    child: Child,
    link: OwnedFd,
}

impl Shadow {
    /// Starts it. `begin` is completed with its pid, and says what the descriptors are.
    pub fn spawn(launch: Launch, namespace: PidNamespace<'_>, mut begin: Begin, fds: &[OwnedFd]) -> io::Result<Self> {
        let (link, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("podhull").arg(FLAG).args(launch.words);
        if let Some([stdin, stdout, stderr]) = launch.streams {
            command.stdin(stdin).stdout(stdout).stderr(stderr);
        }
        inherit_only(&mut command, theirs.as_raw_fd(), LINK_FD);
        let shadow = Self { child: spawn_in(namespace, || command.spawn())?, link };
        begin.pid = shadow.pid();
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        // One that ended at once is noticed by whoever waits for its news.
        match control::send(&shadow.link, &Order::Begin(Box::new(begin)), &fds) {
            Ok(()) | Err(ChannelError::Closed) => Ok(shadow),
            Err(error) => {
                shadow.kill();
                Err(io::Error::other(error))
            }
        }
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Waits for news; an error if there will be none any more. It has a deadline for each of its steps.
    pub fn news(&self) -> Result<News, LinkError> {
        Ok(control::receive(&self.link)?.0)
    }

    /// Where news come from, to wait for them with others.
    pub fn link(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }

    /// Lets it go on; it may have ended meanwhile, which the next news tell.
    pub fn go_on(&self) {
        let _ = control::send(&self.link, &Order::GoOn, &[]);
    }

    /// Gives it the pod's network, before it goes on.
    pub fn give(&self, wiring: Wiring) -> Result<(), WireError> {
        let file = wiring.file()?;
        let fds: Vec<BorrowedFd<'_>> = [file.as_fd()].into_iter().chain(wiring.fds.iter().map(AsFd::as_fd)).collect();
        match control::send(&self.link, &Order::Network(wiring.resources), &fds) {
            Ok(()) | Err(ChannelError::Closed) => Ok(()),
            Err(error) => Err(WireError::Hand(io::Error::other(error))),
        }
    }

    /// Gives it the file of the limit of memory of its control group, before it goes on.
    pub fn give_memory_limit(&self, file: &File) -> io::Result<()> {
        match control::send(&self.link, &Order::MemoryLimit, &[file.as_fd()]) {
            Ok(()) | Err(ChannelError::Closed) => Ok(()),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Sends it a signal; it may have ended meanwhile.
    pub fn signal(&self, signal: i32) {
        // SAFETY: a plain system call on integers; the child was not waited for, so the number is still its own.
        let _ = unsafe { libc::kill(self.pid(), signal) };
    }

    /// Waits for its end.
    pub fn wait(mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }

    /// Ends it, and waits for that.
    pub fn kill(mut self) {
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
