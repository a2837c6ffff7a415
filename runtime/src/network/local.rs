//! Connections that programs make inside the network namespace to an address of its own: `localhost` above all, as those that
//! forward ports do. The servers are in the machine. What a program of the namespace itself listens for is its own; everything
//! else that arrives over the loopback interface is brought to listeners of ours, which see by their sockets' addresses what was
//! meant.
//!
//! It is a table of nftables that gives each such connection its listener before the kernel looks for one (`tproxy`), so that
//! nothing is translated and no connection is tracked.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::netlink::{Messages, Netlink};
use super::nftables::{
    Hook, Life, NFT_META_IIF, NFT_META_L4PROTO, NFT_META_NFPROTO, NFT_REG_1, NFT_REG_2, Table, open as open_nftables,
};
use super::tap;

// include/uapi/linux/netfilter/nf_tables.h: what the libc crate has not.
const NF_INET_PRE_ROUTING: u32 = 0;
const NFTA_SOCKET_KEY: u16 = 1;
const NFTA_SOCKET_DREG: u16 = 2;
const NFT_SOCKET_TRANSPARENT: u32 = 0;
const NFTA_TPROXY_FAMILY: u16 = 1;
const NFTA_TPROXY_REG_ADDR: u16 = 2;
const NFTA_TPROXY_REG_PORT: u16 = 3;

/// As that of what marks packets (`NF_IP_PRI_MANGLE`): before translations and filters.
const PRIORITY: i32 = -150;

/// The one chain.
const CHAIN: &str = "arriving";

/// Number of the loopback interface in every namespace.
const LOOPBACK: u32 = 1;

/// Connections of one family that may wait to be taken.
const BACKLOG: i32 = 128;

/// Whose a network namespace is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Namespace {
    /// Nobody has used it yet, and it goes with the container.
    New,
    /// Another's, to be left as it was.
    Joined,
}

/// Where connections to a namespace's own addresses arrive.
pub struct Local {
    /// One for each version of IP; their local addresses are those that were asked for.
    pub listeners: Vec<TcpListener>,
    /// What brings them there, which is to be held as long as that is wanted; `None` if it goes with the namespace.
    pub rule: Option<OwnedFd>,
}

impl Local {
    /// Takes them in the namespace of this thread. In a new one the loopback interface is taken up, as any runtime does.
    pub fn open(namespace: Namespace) -> io::Result<Self> {
        if namespace == Namespace::New {
            loopback_up()?;
        }
        let mut listeners = vec![listen(IpAddr::V4(Ipv4Addr::LOCALHOST))?];
        match listen(IpAddr::V6(Ipv6Addr::LOCALHOST)) {
            Ok(listener) => listeners.push(listener),
            // A host without IPv6.
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
            Err(error) => return Err(error),
        }
        let addresses = listeners.iter().map(TcpListener::local_addr).collect::<io::Result<Vec<_>>>()?;
        let rule = bring_to(&addresses, namespace)?;
        Ok(Self { listeners, rule })
    }
}

/// Brings connections to one of these listeners.
fn bring_to(listeners: &[SocketAddr], namespace: Namespace) -> io::Result<Option<OwnedFd>> {
    let netlink = open_nftables()?;
    // By a port, of which there is one: two machines may be in one namespace.
    let name = format!("podhull-local-{}", listeners.first().map_or(0, SocketAddr::port));
    let life = match namespace {
        // To remove a table takes the kernel a moment for which the container's end would wait.
        Namespace::New => Life::OfNamespace,
        Namespace::Joined => Life::OfSocket,
    };
    let mut table = Table::new(libc::NFPROTO_INET, &name, life);
    table.chain(CHAIN, &Hook { number: NF_INET_PRE_ROUTING, priority: PRIORITY, device: None });
    // There is a socket for it: an answer, or somebody who listens.
    table.rule(CHAIN, |rule| {
        rule.meta_is(NFT_META_IIF, &LOOPBACK.to_ne_bytes());
        rule.meta_is(NFT_META_L4PROTO, &[libc::IPPROTO_TCP as u8]);
        rule.expression("socket", |data| {
            data.put(NFTA_SOCKET_KEY, &NFT_SOCKET_TRANSPARENT.to_be_bytes());
            data.put(NFTA_SOCKET_DREG, &NFT_REG_1.to_be_bytes());
        });
        rule.accept();
    });
    for listener in listeners {
        let (family, address) = match listener.ip() {
            IpAddr::V4(ip) => (libc::NFPROTO_IPV4, ip.octets().to_vec()),
            IpAddr::V6(ip) => (libc::NFPROTO_IPV6, ip.octets().to_vec()),
        };
        table.rule(CHAIN, |rule| {
            rule.meta_is(NFT_META_IIF, &LOOPBACK.to_ne_bytes());
            rule.meta_is(NFT_META_NFPROTO, &[family as u8]);
            rule.meta_is(NFT_META_L4PROTO, &[libc::IPPROTO_TCP as u8]);
            rule.immediate(NFT_REG_1, &address);
            rule.immediate(NFT_REG_2, &listener.port().to_be_bytes());
            rule.expression("tproxy", |data| {
                data.put(NFTA_TPROXY_FAMILY, &(family as u32).to_be_bytes());
                data.put(NFTA_TPROXY_REG_ADDR, &NFT_REG_1.to_be_bytes());
                data.put(NFTA_TPROXY_REG_PORT, &NFT_REG_2.to_be_bytes());
            });
            rule.accept();
        });
    }
    table.make(&netlink)?;
    Ok((life == Life::OfSocket).then(|| netlink.into()))
}

/// A listener that also takes what was sent to other addresses than its own.
fn listen(address: IpAddr) -> io::Result<TcpListener> {
    let (family, level, option) = match address {
        IpAddr::V4(_) => (AddressFamily::INET, libc::SOL_IP, libc::IP_TRANSPARENT),
        IpAddr::V6(_) => (AddressFamily::INET6, libc::SOL_IPV6, libc::IPV6_TRANSPARENT),
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    let yes: libc::c_int = 1;
    // SAFETY: the kernel reads an integer, which lives through the call.
    let set = unsafe {
        let size = size_of_val(&yes) as libc::socklen_t;
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const yes).cast(), size)
    };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    rustix::net::bind(&socket, &SocketAddr::new(address, 0))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

fn loopback_up() -> io::Result<()> {
    let netlink = Netlink::open(None)?;
    let mut messages = Messages::new();
    messages.request(libc::RTM_NEWLINK, 0, &tap::link(LOOPBACK, libc::IFF_UP as u32));
    match netlink.request(&messages) {
        // Not there: a kernel may be without.
        Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => Ok(()),
        done => done,
    }
}
