//! Connections that programs of the host make to the pod's own addresses, and `localhost` above all: each comes as a stream that
//! says where it is to go ([`podhull_protocol::forward`]), and goes on from here.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use podhull_protocol::forward::{CONNECTED, DESTINATION_BYTES, from_bytes};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::PodNetwork;
use crate::container::setns;
use crate::readiness;
use crate::stdio::{relay, write_all};

/// Connections at a time; more wait.
pub const MAX_FORWARDS: usize = 256;

/// How long it may take to know where a connection is to go, and to get there.
const DEADLINE: Duration = Duration::from_secs(30);

/// Takes streams until no more can come.
pub async fn serve(network: Arc<PodNetwork>, mut arriving: mpsc::Receiver<OwnedFd>) {
    let mut connections = JoinSet::new();
    while let Some(stream) = arriving.recv().await {
        while connections.try_join_next().is_some() {}
        if connections.len() >= MAX_FORWARDS {
            connections.join_next().await;
        }
        let network = network.clone();
        connections.spawn(async move {
            // The stream of one that fails is closed, which says so.
            let _ = forward(&network, stream).await;
        });
    }
}

async fn forward(network: &PodNetwork, stream: OwnedFd) -> io::Result<()> {
    let stream = readiness::watch(stream, Interest::READABLE | Interest::WRITABLE)?;
    let connect = async {
        let mut destination = [0; DESTINATION_BYTES];
        super::names::read(&stream, &mut destination).await?;
        let destination = from_bytes(destination).ok_or(io::ErrorKind::InvalidData)?;
        match connect(network, destination).await {
            // Who meant `localhost` would have tried the other one next, had it been refused: but here it was taken first.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => match other_localhost(destination) {
                Some(other) => connect(network, other).await,
                None => Err(error),
            },
            connected => connected,
        }
    };
    let server = tokio::time::timeout(DEADLINE, connect).await??;
    write_all(&stream, &[CONNECTED]).await?;
    relay(&stream, &server).await;
    Ok(())
}

async fn connect(network: &PodNetwork, destination: SocketAddr) -> io::Result<AsyncFd<OwnedFd>> {
    let family = if destination.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let open = move || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        // What goes through here was written as it is to be sent.
        sockopt::set_tcp_nodelay(&socket, true)?;
        Ok(socket)
    };
    let socket = match network.namespace().await {
        None => open()?,
        Some(namespace) => there(namespace, open).await?,
    };
    let begun = rustix::net::connect(&socket, &destination);
    let socket = readiness::watch(socket, Interest::READABLE | Interest::WRITABLE)?;
    match begun {
        Ok(()) => return Ok(socket),
        Err(Errno::INPROGRESS) => {}
        Err(errno) => return Err(errno.into()),
    }
    drop(socket.writable().await?);
    sockopt::socket_error(&socket)??;
    Ok(socket)
}

/// The same port of the other version of IP, if it is one of `localhost`.
fn other_localhost(destination: SocketAddr) -> Option<SocketAddr> {
    let ip: IpAddr = match destination.ip() {
        IpAddr::V4(Ipv4Addr::LOCALHOST) => Ipv6Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::LOCALHOST) => Ipv4Addr::LOCALHOST.into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, destination.port()))
}

/// Opens a socket in another network namespace, where it stays.
async fn there(
    namespace: Arc<OwnedFd>,
    open: impl FnOnce() -> io::Result<OwnedFd> + Send + 'static,
) -> io::Result<OwnedFd> {
    let (sender, opened) = tokio::sync::oneshot::channel();
    let work = move || {
        let result = setns(&namespace, libc::CLONE_NEWNET).map_err(Into::into).and_then(|()| open());
        // Who asked may have given up.
        let _ = sender.send(result);
    };
    std::thread::Builder::new().name("forward".into()).spawn(work)?;
    opened.await.map_err(io::Error::other)?
}
