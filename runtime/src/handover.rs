//! A descriptor for a caller, over the Unix socket that it has named for it.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    connect, sendmsg, socket_with,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// How long a caller may take to have room for one more connection.
const PATIENCE: Duration = Duration::from_secs(10);

/// Sends a descriptor, with a name of what it is.
pub fn send(socket: &Path, fd: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    let address = SocketAddrUnix::new(socket)?;
    let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&stream, Timeout::Send, Some(PATIENCE))?;
    connect(&stream, &address)?;
    let stream = UnixStream::from(stream);
    let fds = [fd];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(&stream, &[IoSlice::new(name)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Sends what tells a process from all others, that there will ever be: a pidfd. `name` is what runc calls its kind.
pub fn send_process(socket: &Path, pid: i32, name: &str) -> io::Result<()> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    send(socket, pidfd.as_fd(), name.as_bytes())
}
