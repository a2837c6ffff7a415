//! Sockets of the host that containers find among their files. A socket belongs to one kernel, so the guest has one of its own in
//! its place; each client of it is joined to a stream from the host, whose other end connects to the socket that is meant.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use podhull_protocol::{HostSocket, MAX_DATAGRAM, MAX_GROUPS};
use rustix::fs::{AtFlags, CWD, Gid, Mode, Uid};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_passcred;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::pod::PodError;
use crate::readiness;
use crate::stdio::{Streams, relay};

/// Clients that may wait to be taken.
const BACKLOG: i32 = 128;

/// Clients of one socket at a time; more wait.
const MAX_CLIENTS: usize = 256;

/// Streams for clients to come.
const MAX_IN_STORE: usize = 8;

/// How long the host may take to bring a stream for a client.
const DEADLINE: Duration = Duration::from_secs(30);

/// The sockets of one container. They go with this.
pub struct Sockets {
    paths: Vec<PathBuf>,
    serving: JoinSet<()>,
}

impl Sockets {
    /// Makes them in a directory, named by their tokens.
    pub fn make(directory: &Path, sockets: &[HostSocket], streams: &Arc<Streams>) -> Result<Self, PodError> {
        let mut made = Self { paths: Vec::new(), serving: JoinSet::new() };
        for socket in sockets {
            let path = directory.join(podhull_protocol::socket_name(socket.token));
            let failed = |source: io::Error| PodError::Socket { path: path.clone(), source };
            // A container in a user namespace goes through it.
            match rustix::fs::mkdirat(CWD, directory, Mode::from_raw_mode(0o711)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let kind = if socket.datagrams { SocketType::DGRAM } else { SocketType::STREAM };
            let mut listen = || {
                let listener = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)?;
                rustix::net::bind(&listener, &SocketAddrUnix::new(&path)?)?;
                made.paths.push(path.clone());
                let (uid, gid) = (Uid::from_raw(socket.uid), Gid::from_raw(socket.gid));
                rustix::fs::chownat(CWD, &path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
                rustix::fs::chmodat(CWD, &path, Mode::from_raw_mode(socket.mode & 0o7777), AtFlags::empty())?;
                match socket.datagrams {
                    true => set_socket_passcred(&listener, true)?,
                    false => rustix::net::listen(&listener, BACKLOG)?,
                }
                Ok(listener)
            };
            let listener = listen().map_err(|errno: Errno| failed(errno.into()))?;
            let listener = readiness::watch(listener, Interest::READABLE).map_err(failed)?;
            let arriving = streams.claim_all(socket.token, MAX_IN_STORE)?;
            match socket.datagrams {
                true => made.serving.spawn(forward(listener, arriving)),
                false => made.serving.spawn(serve(listener, arriving)),
            };
        }
        Ok(made)
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        for path in &self.paths {
            let _ = rustix::fs::unlink(path);
        }
    }
}

/// Takes clients until nothing can be taken any more, and a stream for each.
async fn serve(listener: AsyncFd<OwnedFd>, mut arriving: mpsc::Receiver<OwnedFd>) {
    let mut clients = JoinSet::new();
    loop {
        while clients.try_join_next().is_some() {}
        if clients.len() >= MAX_CLIENTS {
            clients.join_next().await;
        }
        let Ok(mut ready) = listener.readable().await else { return };
        match rustix::net::accept_with(&listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(client) => {
                // A host that brings none has no more: its client sees a connection that ends.
                let Ok(Some(stream)) = tokio::time::timeout(DEADLINE, arriving.recv()).await else { continue };
                clients.spawn(async move {
                    let _ = join(client, stream).await;
                });
            }
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(Errno::CONNABORTED | Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

/// Sends datagrams to the host until none can be received any more. One that the host does not take waits, and with it who sends
/// the next.
async fn forward(socket: AsyncFd<OwnedFd>, mut arriving: mpsc::Receiver<OwnedFd>) {
    let mut buffer = vec![0; MAX_DATAGRAM];
    let mut host = None;
    loop {
        let Ok(mut ready) = socket.readable().await else { return };
        let message = match receive(&socket, &mut buffer) {
            Ok(Some(message)) => message,
            // Of nobody, or longer than can be sent on.
            Ok(None) | Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => {
                ready.clear_ready();
                continue;
            }
            Err(_) => return,
        };
        if host.is_none() {
            // A host that brings no stream has nobody to send to.
            let Ok(Some(stream)) = tokio::time::timeout(DEADLINE, arriving.recv()).await else { continue };
            host = readiness::watch(stream, Interest::READABLE | Interest::WRITABLE).ok();
        }
        if let Some(stream) = &host
            && crate::stdio::write_all(stream, &message).await.is_err()
        {
            host = None;
        }
    }
}

/// The next datagram as the host is told it (see `HostSocket` in agent.proto).
fn receive(socket: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> Result<Option<Vec<u8>>, Errno> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(buffer)],
        &mut ancillary,
        RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
    )?;
    let sender = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmCredentials(sender) => Some(sender),
        _ => None,
    });
    let Some(sender) = sender.filter(|_| !received.flags.contains(ReturnFlags::TRUNC)) else { return Ok(None) };
    let numbers = [sender.uid.as_raw(), sender.gid.as_raw(), 0, received.bytes as u32];
    let mut message: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    message.extend_from_slice(&buffer[..received.bytes]);
    Ok(Some(message))
}

/// Tells the host who the client is, and moves bytes until both sides have closed.
async fn join(client: OwnedFd, stream: OwnedFd) -> io::Result<()> {
    let who = who(&client)?;
    let both = Interest::READABLE | Interest::WRITABLE;
    let (client, stream) = (readiness::watch(client, both)?, readiness::watch(stream, both)?);
    crate::stdio::write_all(&stream, &who).await?;
    relay(&client, &stream).await;
    Ok(())
}

/// User, group and further groups of who has connected, as the host is told (see `HostSocket` in agent.proto).
fn who(client: &OwnedFd) -> io::Result<Vec<u8>> {
    let peer = rustix::net::sockopt::socket_peercred(client)?;
    let mut groups = [0_u32; MAX_GROUPS];
    let mut length = size_of_val(&groups) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to the array, and the number of those it wrote to `length`.
    let result = unsafe {
        libc::getsockopt(
            client.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    // Of one with more groups than can be told none are: it may do less then, not more.
    let count = if result == 0 { length as usize / size_of::<u32>() } else { 0 };
    let numbers = [peer.uid.as_raw(), peer.gid.as_raw(), count as u32];
    Ok(numbers.iter().chain(&groups[..count.min(MAX_GROUPS)]).flat_map(|number| number.to_le_bytes()).collect())
}
