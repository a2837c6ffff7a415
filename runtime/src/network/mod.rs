//! The host's side of a pod's network (design D12): what a network namespace has, and the taps that carry it into the
//! machine.
//!
//! For each interface there is a tap in the same namespace, joined to it both ways; the guest's interface is at the tap's
//! other end and has the same address, MTU, IP addresses and routes. The interface itself stays as it is, with its addresses:
//! callers look at them, and at its counters. The namespace's own stack does not see a frame of it any more.
//!
//! A [`Connection`] is two descriptors, the tap and the rule that joins it. Both are held by the machine's process alone, and
//! when it ends, in whatever way, the kernel removes what they stand for: nothing has to be tidied up, also in a namespace
//! that belongs to somebody else.

mod link;
mod local;
mod netlink;
mod nftables;
mod redirect;
mod resolver;
mod scan;
mod tap;

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use podhull_protocol::ConfigureNetworkRequest;
use rustix::fs::{Mode, OFlags};
use rustix::thread::ThreadNameSpaceType;

use link::Link;
pub use local::{Local, Namespace};
use netlink::Netlink;
use redirect::{Beside, End};
pub use resolver::RESOLVER;
use tap::Tap;

/// Most interfaces of a pod.
const MAX_INTERFACES: usize = 32;

/// Why a pod cannot have its network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace cannot be entered, or left again.
    #[error("cannot enter the container's network namespace: {0}")]
    Enter(#[source] io::Error),
    /// The kernel does not say what is there.
    #[error("cannot list the {0} of the container's network namespace: {1}")]
    Scan(&'static str, #[source] io::Error),
    /// An interface that no machine can be joined to.
    #[error("cannot join the virtual machine to network interface {name}: {why}")]
    Unsuitable {
        /// Its name.
        name: String,
        /// Why not.
        why: String,
    },
    /// Two interfaces that a guest could not tell apart.
    #[error(
        "cannot join the virtual machine to network interface {0}: it has the same address as {1}; give each its own"
    )]
    SameAddress(String, String),
    /// It is another's.
    #[error("cannot join the virtual machine to network interface {0}: another container's machine is joined to it")]
    Taken(String),
    /// Too many interfaces.
    #[error("the container's network namespace has {0} interfaces, and a pod at most {MAX_INTERFACES}")]
    TooMany(usize),
    /// A tap cannot be made.
    #[error("cannot make a tap device for network interface {0}: {1}; does {file} work?", file = tap::CLONE)]
    Tap(String, #[source] io::Error),
    /// It cannot be joined.
    #[error(
        "cannot join a tap device to network interface {0}: {1}; is nftables with nft_fwd_netdev and nft_dup_netdev in the kernel?"
    )]
    Join(String, #[source] io::Error),
}

/// An interface of the namespace, joined to what a machine is given.
pub struct Connection {
    /// Address of the guest's interface.
    pub mac: [u8; 6],
    /// Its MTU.
    pub mtu: u16,
    /// The tap's queue.
    pub tap: OwnedFd,
    /// The rule, which is there as long as this is open.
    pub rule: OwnedFd,
}

/// What was found in a namespace.
pub struct Network {
    /// What the guest is told.
    pub description: ConfigureNetworkRequest,
    /// New connections.
    pub connections: Vec<Connection>,
    /// What the user should know; one line each.
    pub warnings: Vec<String>,
}

/// Whose interfaces these may be already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Joined {
    /// Nobody's.
    None,
    /// This pod's: only those that are new are connected.
    Some,
}

/// Connects the interfaces in a namespace (or that of a process, by its pidfd); `None` if there is none to connect.
pub fn connect(namespace: impl AsFd, joined: Joined) -> Result<Option<Network>, NetworkError> {
    within(namespace, || {
        let netlink = Netlink::open(None).map_err(|error| NetworkError::Scan("interfaces", error))?;
        let found = scan::scan(&netlink)?;
        if found.links.is_empty() {
            return Ok(None);
        }
        if found.links.len() > MAX_INTERFACES {
            return Err(NetworkError::TooMany(found.links.len()));
        }
        let mut found = found;
        let beside = found.look_for_a_resolver()?;
        let mut connections = Vec::new();
        for link in &found.links {
            let known = joined == Joined::Some
                && redirect::is_joined(link.index).map_err(|error| NetworkError::Join(link.name.clone(), error))?;
            if !known {
                connections.push(Connection::new(&netlink, link, beside)?);
            }
        }
        Ok(Some(Network { description: found.description, connections, warnings: found.warnings }))
    })
}

/// The name of an interface in a namespace that would be connected; `None` if there is none.
pub fn first(namespace: impl AsFd) -> Result<Option<String>, NetworkError> {
    within(namespace, || {
        let netlink = Netlink::open(None).map_err(|error| NetworkError::Scan("interfaces", error))?;
        Ok(scan::scan(&netlink)?.links.into_iter().next().map(|link| link.name))
    })
}

impl Connection {
    fn new(netlink: &Netlink, link: &Link, beside: Beside) -> Result<Self, NetworkError> {
        let mtu = link.mtu.min(tap::MTU_MAX);
        let tap = Tap::create(netlink, mtu).map_err(|error| NetworkError::Tap(link.name.clone(), error))?;
        let interface = End { index: link.index, name: &link.name };
        let joined = redirect::join(interface, End { index: tap.index, name: &tap.name }, beside);
        let rule = joined.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => NetworkError::Taken(link.name.clone()),
            _ => NetworkError::Join(link.name.clone(), error),
        })?;
        Ok(Self { mac: link.mac, mtu: u16::try_from(mtu).unwrap_or(u16::MAX), tap: tap.fd, rule })
    }
}

/// Does something in a network namespace. What is opened there stays there.
fn within<T>(namespace: impl AsFd, work: impl FnOnce() -> Result<T, NetworkError>) -> Result<T, NetworkError> {
    let enter = |errno: rustix::io::Errno| NetworkError::Enter(errno.into());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let ours = rustix::fs::open("/proc/thread-self/ns/net", flags, Mode::empty()).map_err(enter)?;
    let move_to = |namespace| rustix::thread::move_into_thread_name_spaces(namespace, ThreadNameSpaceType::NETWORK);
    move_to(namespace.as_fd()).map_err(enter)?;
    let done = work();
    // Whoever cannot go back must not go on.
    move_to(ours.as_fd()).map_err(enter)?;
    done
}

#[cfg(test)]
mod tests;
