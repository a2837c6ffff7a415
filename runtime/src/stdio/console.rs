//! `--console-socket`: a new terminal, whose master the caller gets and whose other side carries the container's bytes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, Winsize, tcgetattr, tcsetattr, tcsetwinsize};

use super::{StdioError, terminal};
use crate::handover;

/// The container's side of the terminal.
pub struct Console {
    peer: OwnedFd,
}

impl Console {
    /// Makes the terminal and sends its master, with its name, to the socket.
    pub fn open(socket: &Path, size: Option<(u16, u16)>) -> Result<Self, StdioError> {
        let (master, peer) = pair(size).map_err(StdioError::Terminal)?;
        send(socket, &master).map_err(|e| StdioError::ConsoleSocket(socket.to_owned(), e))?;
        Ok(Self::of(peer))
    }

    /// The container's side of a terminal that somebody else has made.
    pub fn of(peer: OwnedFd) -> Self {
        // It becomes our controlling terminal so that the caller's changes of size reach us as SIGWINCH. A shadow leads a
        // session already. Another process that leads a group cannot have one; it learns the size it had when the
        // container started.
        let _ = rustix::process::setsid();
        let _ = rustix::process::ioctl_tiocsctty(&peer);
        Self { peer }
    }

    /// Rows and columns, if the caller has set them.
    pub fn size(&self) -> Option<(u16, u16)> {
        terminal::size(self.peer.as_fd())
    }

    /// Where the container's bytes are read and written.
    pub fn peer(&self) -> BorrowedFd<'_> {
        self.peer.as_fd()
    }
}

/// A new terminal: its master, and its other side, which passes every key through.
pub fn pair(size: Option<(u16, u16)>) -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    unlockpt(&master)?;
    // Not by its name: that may lead to another terminal in another mount namespace.
    let peer = ioctl_tiocgptpeer(&master, flags)?;
    let mut mode = tcgetattr(&peer)?;
    mode.make_raw();
    tcsetattr(&peer, OptionalActions::Now, &mode)?;
    if let Some(size) = size {
        set_size(peer.as_fd(), size)?;
    }
    Ok((master, peer))
}

/// Sets rows and columns of a terminal.
pub fn set_size(terminal: BorrowedFd<'_>, (rows, columns): (u16, u16)) -> Result<(), Errno> {
    tcsetwinsize(terminal, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })
}

fn send(socket: &Path, master: &OwnedFd) -> io::Result<()> {
    let name = ptsname(master, Vec::new())?;
    handover::send(socket, master.as_fd(), name.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    use std::io::IoSliceMut;
    use std::os::unix::net::UnixListener;

    #[test]
    fn the_caller_gets_one_master_with_its_name_in_raw_mode() {
        let path = std::env::temp_dir().join(format!("podhull-console-{}.sock", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let (master, peer) = pair(Some((25, 81))).unwrap();
        send(&path, &master).unwrap();
        drop(master);
        let (stream, _) = listener.accept().unwrap();
        let (mut name, mut space) = ([0; 64], [std::mem::MaybeUninit::uninit(); 64]);
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(&stream, &mut [IoSliceMut::new(&mut name)], &mut ancillary, RecvFlags::empty()).unwrap();
        assert!(name[..received.bytes].starts_with(b"/dev/pts/"));
        let Some(RecvAncillaryMessage::ScmRights(mut fds)) = ancillary.drain().next() else { panic!("no descriptor") };
        let master = fds.next().unwrap();
        assert_eq!(terminal::size(master.as_fd()), Some((25, 81)));
        rustix::io::write(&master, b"\x03\r").unwrap();
        let mut keys = [0; 4];
        assert_eq!(rustix::io::read(&peer, &mut keys).unwrap(), 2);
        assert_eq!(&keys[..2], b"\x03\r");
        std::fs::remove_file(&path).unwrap();
    }
}
