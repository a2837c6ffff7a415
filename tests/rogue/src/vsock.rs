//! vsock sockets that wait, as files (`vsock(7)`).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

/// A listener on a port.
pub fn listen(port: u32) -> io::Result<File> {
    let file = socket()?;
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address is a whole sockaddr_vm and outlives the call.
    check(unsafe { libc::bind(file.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32) })?;
    // SAFETY: listen takes no pointers.
    check(unsafe { libc::listen(file.as_raw_fd(), 128) })?;
    Ok(file)
}

/// The next connection.
pub fn accept(listener: &File) -> io::Result<File> {
    // SAFETY: nobody wants to know the address.
    owned(unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) })
}

/// A connection to a port of the host.
pub fn connect(port: u32) -> io::Result<File> {
    let file = socket()?;
    let address = address(libc::VMADDR_CID_HOST, port);
    // SAFETY: the address is a whole sockaddr_vm and outlives the call.
    check(unsafe { libc::connect(file.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32) })?;
    Ok(file)
}

fn socket() -> io::Result<File> {
    // SAFETY: socket takes no pointers.
    owned(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) })
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: sockaddr_vm is plain numbers, for which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    (address.svm_cid, address.svm_port) = (cid, port);
    address
}

fn owned(fd: libc::c_int) -> io::Result<File> {
    check(fd)?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Ends both ways of a connection, whoever else has it.
pub fn end(connection: &File) {
    // SAFETY: shutdown takes no pointers.
    unsafe { libc::shutdown(connection.as_raw_fd(), libc::SHUT_RDWR) };
}
