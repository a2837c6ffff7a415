//! The pod's network: what the host describes, made so by netlink.
//!
//! The network of a pod is the network namespace of the guest itself, in which devices appear and where nothing need be made.
//! A container with a user namespace is the exception: only in a network namespace of its own may its users configure
//! anything, or mount sysfs. If the pod's first container is such a one, the pod's network is its, and devices are moved there.

mod addresses;
mod description;
mod forwards;
mod links;
mod names;
mod neighbours;
mod netlink;
mod routes;
mod translate;

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use podhull_protocol::ConfigureNetworkRequest;
use tokio::sync::mpsc;

use crate::container::setns;
use crate::machine::{Machine, MachineError};
use crate::stdio::Claim;
use description::{DescriptionError, Network, Route};
pub use forwards::MAX_FORWARDS;
use links::{Devices, Placed};
use names::Sockets;
use netlink::{NetlinkError, Socket};

/// How long an interface may take to appear: its driver has bound when the scan of the bus returns.
const DEADLINE: Duration = Duration::from_secs(20);

/// The network is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("network: {0}")]
    Description(#[from] DescriptionError),
    #[error("network: interface {name}: no device with the MAC address {mac} appeared within {} s", DEADLINE.as_secs())]
    Missing { name: String, mac: String },
    #[error("network: interface {name}: {step}: {source}")]
    Interface { name: String, step: &'static str, source: NetlinkError },
    #[error("network: interface {name}: address {ip}: {step}: {source}")]
    Address { name: String, ip: IpAddr, step: &'static str, source: NetlinkError },
    #[error("network: route to {destination}/{prefix_length}: {step}: {source}")]
    Route { destination: IpAddr, prefix_length: u8, step: &'static str, source: NetlinkError },
    #[error("network: interface {name}: neighbour {ip}: {step}: {source}")]
    Neighbour { name: String, ip: IpAddr, step: &'static str, source: NetlinkError },
    #[error("network: {step}: {source}")]
    Netlink { step: &'static str, source: NetlinkError },
    #[error("network: take questions for the resolver at {resolver}: {source}")]
    Listen { resolver: Ipv4Addr, source: io::Error },
    #[error("network: there is no stream to ask the resolver at {0} over")]
    NoStream(Ipv4Addr),
    #[error("network: sysctl {key}: write {value:?}: {source}")]
    Sysctl { key: String, value: String, source: io::Error },
    #[error("network: {0}")]
    Machine(#[from] MachineError),
    #[error("network: thread: {0}")]
    Thread(io::Error),
    #[error("network: enter the container's network namespace: {0}")]
    Enter(rustix::io::Errno),
}

impl NetworkError {
    /// Whether the description is at fault.
    pub fn is_invalid(&self) -> bool {
        match self {
            Self::Description(_) => true,
            Self::Sysctl { source, .. } => {
                matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput)
            }
            _ => false,
        }
    }

    fn step(step: &'static str) -> impl Fn(NetlinkError) -> Self + Copy {
        move |source| Self::Netlink { step, source }
    }

    fn address(placed: &Placed<'_>, ip: IpAddr, step: &'static str) -> impl Fn(NetlinkError) -> Self + use<> {
        let name = placed.interface.name.clone();
        move |source| Self::Address { name: name.clone(), ip, step, source }
    }

    fn neighbour(placed: &Placed<'_>, ip: IpAddr, step: &'static str) -> impl Fn(NetlinkError) -> Self + use<> {
        let name = placed.interface.name.clone();
        move |source| Self::Neighbour { name: name.clone(), ip, step, source }
    }

    fn route(route: &Route, step: &'static str) -> impl Fn(NetlinkError) -> Self + use<> {
        let (destination, prefix_length) = (route.destination, route.prefix_length);
        move |source| Self::Route { destination, prefix_length, step, source }
    }
}

/// Where the pod's network is, and what it should be.
#[derive(Default)]
pub struct PodNetwork {
    /// Held while it is changed.
    place: tokio::sync::Mutex<Place>,
}

#[derive(Default)]
struct Place {
    /// If it is not the agent's own.
    namespace: Option<Arc<OwnedFd>>,
    /// Over which the host is asked for names, if it can be, until that is done.
    names: Option<Claim>,
    /// Whether it is.
    asks: bool,
}

/// Sockets of a change.
struct Scope<'a> {
    /// In the pod's network.
    here: &'a Socket,
    /// Where devices appear, and how the pod's network is reached from there, if it is another.
    home: Option<(Socket, BorrowedFd<'a>)>,
    /// Hears of devices that appear.
    events: &'a Socket,
    devices: Devices,
}

/// What is asked for, checked.
pub struct Description(Network);

impl Description {
    pub fn new(request: &ConfigureNetworkRequest) -> Result<Self, NetworkError> {
        Ok(Self(Network::new(request)?))
    }
}

/// What is to be done with a network.
#[derive(Default)]
pub struct Configure {
    /// None: not in a machine, where any interface will do.
    pub machine: Option<Machine>,
    /// The bus was scanned already.
    pub scanned: bool,
    /// None: nothing is known of the network yet.
    pub wanted: Option<Description>,
}

impl PodNetwork {
    /// Names can be asked for over this stream.
    pub async fn ask_over(&self, stream: Claim) {
        self.place.lock().await.names = Some(stream);
    }

    /// Connects streams to servers of the pod as they come.
    pub fn serve_forwards(self: &Arc<Self>, arriving: mpsc::Receiver<OwnedFd>) {
        tokio::spawn(forwards::serve(self.clone(), arriving));
    }

    /// The network namespace in which it is, if that is not the agent's own; once what is being changed there is done.
    async fn namespace(&self) -> Option<Arc<OwnedFd>> {
        self.place.lock().await.namespace.clone()
    }

    /// Makes the network what is described, wherever it is.
    pub async fn configure(&self, configure: Configure) -> Result<(), NetworkError> {
        let mut place = self.place.lock().await;
        let namespace = place.namespace.clone();
        place.apply(configure, namespace).await
    }

    /// Makes a container's network namespace the pod's, and there what is described.
    pub async fn settle_in(&self, namespace: OwnedFd, configure: Configure) -> Result<(), NetworkError> {
        let mut place = self.place.lock().await;
        let namespace = Arc::new(namespace);
        place.apply(configure, Some(namespace.clone())).await?;
        place.namespace = Some(namespace);
        Ok(())
    }

    /// What has come and gone through its interfaces, as `/proc/net/dev` has it; empty if that cannot be read.
    pub async fn traffic(&self) -> String {
        let namespace = self.place.lock().await.namespace.clone();
        let read = move || {
            if let Some(namespace) = namespace {
                setns(&namespace, libc::CLONE_NEWNET)?;
            }
            std::fs::read_to_string("/proc/thread-self/net/dev")
        };
        // On a thread of its own, which may enter another namespace.
        let (sender, read_there) = tokio::sync::oneshot::channel();
        let spawned = std::thread::Builder::new().name("traffic".into()).spawn(move || sender.send(read()));
        match spawned {
            Ok(_) => read_there.await.ok().and_then(Result::ok).unwrap_or_default(),
            Err(_) => String::new(),
        }
    }
}

impl Place {
    /// On a thread of its own, which may enter another namespace and wait.
    async fn apply(&mut self, configure: Configure, namespace: Option<Arc<OwnedFd>>) -> Result<(), NetworkError> {
        let Configure { machine, scanned, wanted: Some(wanted) } = configure else { return Ok(()) };
        let resolver = wanted.0.resolver.filter(|_| !self.asks);
        let (sender, done) = tokio::sync::oneshot::channel();
        let work = move || {
            let changed = change(machine, scanned, namespace.as_deref(), &wanted.0);
            let sockets = changed.and_then(|()| resolver.map(Sockets::open).transpose());
            // If nobody waits any more the work is done all the same.
            let _ = sender.send(sockets);
        };
        std::thread::Builder::new().name("network".into()).spawn(work).map_err(NetworkError::Thread)?;
        let sockets = done.await.map_err(|_| NetworkError::Thread(io::Error::other("it panicked")))??;
        if let (Some(sockets), Some(resolver)) = (sockets, resolver) {
            let none = NetworkError::NoStream(resolver);
            let Some(claim) = self.names.take() else { return Err(none) };
            let stream = claim.stream().await.ok_or(none)?;
            // It ends with the host's side; then nobody answers, as on the host.
            tokio::spawn(names::serve(sockets, stream));
            self.asks = true;
        }
        Ok(())
    }
}

/// In the namespace that this thread is in afterwards.
fn change(
    machine: Option<Machine>,
    scanned: bool,
    namespace: Option<&OwnedFd>,
    network: &Network,
) -> Result<(), NetworkError> {
    let open = NetworkError::step("open a socket");
    // Before the scan, so that nothing appears unheard.
    let events = Socket::of_link_events().map_err(open)?;
    let home = match namespace {
        Some(namespace) => {
            let home = Socket::open().map_err(open)?;
            setns(namespace, libc::CLONE_NEWNET).map_err(NetworkError::Enter)?;
            Some((home, namespace.as_fd()))
        }
        None => None,
    };
    if let Some(machine) = machine.filter(|_| !scanned) {
        machine.rescan()?;
    }
    let devices = if machine.is_some() { Devices::Virtio } else { Devices::Any };
    let socket = Socket::open().map_err(open)?;
    let scope = Scope { here: &socket, home, events: &events, devices };
    let links = links::gather(network, &scope, Instant::now() + DEADLINE)?;
    let placed = links::name(network, &links, &socket, devices)?;
    let loopback = links.iter().find(|link| link.loopback);
    if let Some(loopback) = loopback {
        links::loopback_up(&socket, loopback)?;
    }
    for placed in &placed {
        // At the other end there is nobody to have the same address: it was asked for on the host already.
        write_sysctl_if_there(&format!("net/ipv6/conf/{}/accept_dad", placed.interface.name), "0")?;
    }
    for (key, value) in &network.sysctls {
        write_sysctl(key, value)?;
    }
    for placed in &placed {
        placed.set(&socket)?;
    }
    addresses::apply(&socket, &placed)?;
    routes::apply(&socket, network, &placed, loopback.map(|link| link.index))?;
    neighbours::apply(&socket, network, &placed)
}

/// A file of sysctls shows the network of the thread that opens it.
fn write_sysctl(key: &str, value: &str) -> Result<(), NetworkError> {
    std::fs::write(format!("/proc/sys/{key}"), value).map_err(|source| NetworkError::Sysctl {
        key: key.into(),
        value: value.into(),
        source,
    })
}

/// One that a kernel without its protocol does not have.
fn write_sysctl_if_there(key: &str, value: &str) -> Result<(), NetworkError> {
    match write_sysctl(key, value) {
        Err(NetworkError::Sysctl { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
