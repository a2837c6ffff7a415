//! vsock sockets, as bare file descriptors (`vsock(7)`).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Context id of the host.
pub const HOST: u32 = libc::VMADDR_CID_HOST;

/// A non-blocking listener on a port, for connections from anywhere.
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    let fd = socket()?;
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address is a whole sockaddr_vm and outlives the call.
    check(unsafe {
        libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as libc::socklen_t)
    })?;
    // SAFETY: listen takes no pointers.
    check(unsafe { libc::listen(fd.as_raw_fd(), 128) })?;
    Ok(fd)
}

/// Begins to connect; the socket becomes writable when the connection stands or is refused.
pub fn begin_connect(cid: u32, port: u32) -> io::Result<OwnedFd> {
    let fd = socket()?;
    let address = address(cid, port);
    // SAFETY: the address is a whole sockaddr_vm and outlives the call.
    let result =
        unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as libc::socklen_t) };
    match check(result) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(fd),
        other => other.map(|()| fd),
    }
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: socket takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0) };
    check(fd)?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: sockaddr_vm is plain numbers, for which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
