//! The terminal of a container: allocated in its own devpts, its controlling terminal, and its `/dev/console`.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, Uid, makedev};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::termios::{OptionalActions, OutputModes, tcgetattr, tcsetattr};
use serde::{Deserialize, Serialize};

use super::rootfs::{self, Rootfs, RootfsError, last_errno};

/// A terminal that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TerminalError {
    #[error("process.terminal: open /dev/pts/ptmx: {0}; a container with a terminal needs a devpts mount at /dev/pts")]
    Open(RootfsError),
    #[error("process.terminal: /dev/pts/ptmx is not that of a devpts mount")]
    NotPtmx,
    #[error("process.terminal: look at /dev/pts/ptmx: {0}")]
    Look(Errno),
    #[error("process.terminal: unlock: {0}")]
    Unlock(Errno),
    #[error("process.terminal: open the other side: {0}")]
    Peer(Errno),
    #[error("process.terminal: window size: {0}")]
    Size(Errno),
    #[error("process.terminal: give it to the container's user: {0}")]
    Owner(Errno),
    #[error("process.terminal: mount it on /dev/console: {0}")]
    Console(Errno),
    #[error("process.terminal: set its mode: {0}")]
    Mode(Errno),
    #[error("process.terminal: make /dev/console: {0}")]
    MakeConsole(RootfsError),
    #[error("process.terminal: make it the controlling terminal: {0}")]
    Control(Errno),
}

/// `DEVPTS_SUPER_MAGIC` of `linux/magic.h`.
const DEVPTS: rustix::fs::FsWord = 0x1cd1;

/// The device that a new terminal is opened from.
const PTMX: (u32, u32) = (5, 2);

/// How a terminal begins.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Window {
    /// Zero by zero is a size that nobody knows.
    pub rows: u16,
    pub columns: u16,
    /// No carriage return is put before a newline.
    pub plain_newlines: bool,
}

/// Both sides of a terminal.
pub struct Terminal {
    pub master: OwnedFd,
    slave: OwnedFd,
}

impl Terminal {
    /// Allocates one. The other side is opened from this one (`TIOCGPTPEER`), not by a name that the container could have
    /// pointed elsewhere.
    pub fn open(root: &Rootfs, window: &Window, uid: u32) -> Result<Self, TerminalError> {
        // A container that runs may have put anything there: it is not waited for, and used only if it is what it should be.
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK;
        let master = root.open(Path::new("/dev/pts/ptmx"), flags | OFlags::NOFOLLOW).map_err(TerminalError::Open)?;
        let stat = rustix::fs::fstat(&master).map_err(TerminalError::Look)?;
        let system = rustix::fs::fstatfs(&master).map_err(TerminalError::Look)?;
        if stat.st_rdev != makedev(PTMX.0, PTMX.1) || system.f_type != DEVPTS {
            return Err(TerminalError::NotPtmx);
        }
        rustix::pty::unlockpt(&master).map_err(TerminalError::Unlock)?;
        // SAFETY: the call takes flags, and no pointers.
        let slave = unsafe {
            libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC)
        };
        if slave < 0 {
            return Err(TerminalError::Peer(last_errno()));
        }
        // SAFETY: the kernel just made this descriptor for us.
        let slave = unsafe { OwnedFd::from_raw_fd(slave) };
        set_size(&master, window.rows, window.columns).map_err(TerminalError::Size)?;
        if window.plain_newlines {
            let mut mode = tcgetattr(&slave).map_err(TerminalError::Mode)?;
            mode.output_modes.remove(OutputModes::ONLCR);
            tcsetattr(&slave, OptionalActions::Now, &mode).map_err(TerminalError::Mode)?;
        }
        rustix::fs::fchown(&slave, Some(Uid::from_raw(uid)), None).map_err(TerminalError::Owner)?;
        Ok(Self { master, slave })
    }

    /// Shows it as `/dev/console`.
    pub fn mount_console(&self, root: &Rootfs) -> Result<(), TerminalError> {
        let (parent, name) = root.parent(Path::new("/dev/console")).map_err(TerminalError::MakeConsole)?;
        // One that is there may be a device of the image's choice: it is looked at, but not opened.
        let look = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let target = match rustix::fs::openat(&parent, name, look, Mode::empty()) {
            Err(Errno::NOENT) => {
                let make = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                rustix::fs::openat(&parent, name, make, Mode::from_raw_mode(0o600))
            }
            other => other,
        }
        .map_err(TerminalError::Console)?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = open_tree(&self.slave, "", flags).map_err(TerminalError::Console)?;
        rootfs::attach(&tree, &target).map_err(TerminalError::Console)
    }

    /// Makes it the standard streams and the controlling terminal of the calling process, which must lead a session.
    pub fn control(self) -> Result<(), TerminalError> {
        rustix::process::ioctl_tiocsctty(&self.slave).map_err(TerminalError::Control)?;
        rustix::stdio::dup2_stdin(&self.slave).map_err(TerminalError::Control)?;
        rustix::stdio::dup2_stdout(&self.slave).map_err(TerminalError::Control)?;
        rustix::stdio::dup2_stderr(&self.slave).map_err(TerminalError::Control)
    }
}

/// Sets the window size; zero by zero is one that nobody knows.
pub fn set_size(terminal: impl AsFd, rows: u16, columns: u16) -> Result<(), Errno> {
    let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(terminal, size)
}
