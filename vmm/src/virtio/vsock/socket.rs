//! Stream sockets of the host, read and written without blocking, straight from and to guest memory.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::virtio::Buffers;

/// Bytes of `buffers`, one after the other, to `socket`; returns how many it took. A closed peer is an error, not a signal.
pub fn send(socket: impl AsFd, buffers: &[Buffers]) -> io::Result<usize> {
    transfer(socket, buffers, |fd, message| {
        // SAFETY: the message's vectors point to mapped guest memory for the time of the call (see `transfer`), which the
        // kernel only reads.
        unsafe { libc::sendmsg(fd, message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) }
    })
}

/// Fills `buffers`, one after the other, from `socket`; returns how many bytes there were, 0 at the end of the stream.
pub fn receive(socket: impl AsFd, buffers: &[Buffers]) -> io::Result<usize> {
    transfer(socket, buffers, |fd, message| {
        // SAFETY: the message's vectors point to mapped guest memory for the time of the call (see `transfer`), and the
        // kernel bounds its writes by their lengths.
        unsafe { libc::recvmsg(fd, message, libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC) }
    })
}

/// Makes one I/O vector of `buffers` (their first `UIO_MAXIOV` pieces) and calls `call` with it until it is not interrupted.
fn transfer(
    socket: impl AsFd,
    buffers: &[Buffers],
    call: impl Fn(libc::c_int, *mut libc::msghdr) -> libc::ssize_t,
) -> io::Result<usize> {
    let fd = socket.as_fd().as_raw_fd();
    // The guards keep the pieces mapped; guest memory is never unmapped while a `Buffers` borrows it.
    let guards: Vec<_> =
        buffers.iter().flat_map(Buffers::slices).take(libc::UIO_MAXIOV as usize).map(|s| s.ptr_guard_mut()).collect();
    let mut vectors: Vec<_> =
        guards.iter().map(|g| libc::iovec { iov_base: g.as_ptr().cast(), iov_len: g.len() }).collect();
    // SAFETY: a message without name, ancillary data or flags is all zeroes.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len() as _;
    loop {
        let count = call(fd, &mut message);
        if count >= 0 {
            return Ok(count as usize);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
