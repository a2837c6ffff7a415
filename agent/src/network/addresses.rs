//! Addresses of interfaces.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rustix::io::Errno;

use super::NetworkError;
use super::description::{Address, LOOPBACK, ip};
use super::links::Placed;
use super::netlink::{Attributes, CREATE, Message, NetlinkError, Received, Socket};

/// Attributes of an address (`linux/if_addr.h`).
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;

/// Flags: no duplicate address detection; not one that ends.
const NODAD: u32 = 2;
const PERMANENT: u32 = 0x80;

/// An address that is there.
struct Present {
    index: u32,
    address: Address,
    /// As the kernel gave it, to be removed by.
    permanent: bool,
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().into(),
        IpAddr::V6(ip) => ip.octets().into(),
    }
}

/// The family as the kernel counts them.
pub fn family(ip: IpAddr) -> u8 {
    (if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

/// An address as a message (`struct ifaddrmsg`).
fn message(index: u32, address: &Address, flags: u32) -> Message {
    let mut fixed = vec![family(address.ip), address.prefix_length, 0, address.scope];
    fixed.extend(index.to_ne_bytes());
    Message::new(fixed)
        .with(IFA_LOCAL, octets(address.ip))
        .with(IFA_ADDRESS, octets(address.peer.unwrap_or(address.ip)))
        .with_some(IFA_BROADCAST, address.broadcast.map(|ip| ip.octets()))
        .with_number(IFA_FLAGS, flags)
}

fn read(received: &Received<'_>) -> Result<Option<Present>, NetlinkError> {
    let (fixed, attributes) = received.split::<8>()?;
    if received.kind != libc::RTM_NEWADDR {
        return Ok(None);
    }
    let get = |kind| attributes.get(kind).and_then(ip);
    // For IPv6 without a peer there is only the one.
    let (Some(address), local) = (get(IFA_ADDRESS).or_else(|| get(IFA_LOCAL)), get(IFA_LOCAL)) else { return Ok(None) };
    let own = local.unwrap_or(address);
    let flags = attributes.number(IFA_FLAGS).unwrap_or(fixed[2].into());
    let broadcast = get(IFA_BROADCAST).and_then(|ip| if let IpAddr::V4(ip) = ip { Some(ip) } else { None });
    Ok(Some(Present {
        index: u32::from_ne_bytes([fixed[4], fixed[5], fixed[6], fixed[7]]),
        address: Address { ip: own, prefix_length: fixed[1], broadcast, peer: Some(address), scope: fixed[3], flags }
            .normal(),
        permanent: flags & PERMANENT != 0,
    }))
}

fn all(socket: &Socket, family: libc::c_int) -> Result<Vec<Present>, NetlinkError> {
    let found = socket.dump(libc::RTM_GETADDR, &Message::new(vec![family as u8, 0, 0, 0, 0, 0, 0, 0]), read)?;
    // A kernel without the family answers with the others.
    Ok(found.into_iter().filter(|present| i32::from(self::family(present.address.ip)) == family).collect())
}

/// Whether an address is there of itself: IPv6's of the link, what routers announce, and the loopback's.
fn is_kernels(present: &Present, placed: &Placed<'_>) -> bool {
    let loopback = placed.interface.name == LOOPBACK;
    match present.address.ip {
        IpAddr::V4(ip) => loopback && ip == Ipv4Addr::LOCALHOST,
        IpAddr::V6(_) if is_of_the_link(present.address.ip) => true,
        IpAddr::V6(ip) => !present.permanent || loopback && ip == Ipv6Addr::LOCALHOST,
    }
}

/// Whether it is IPv6's of the link.
fn is_of_the_link(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// Removes addresses that are not described, and adds those that are missing.
pub fn apply(socket: &Socket, placed: &[Placed<'_>]) -> Result<(), NetworkError> {
    for family in [libc::AF_INET, libc::AF_INET6] {
        let list = || all(socket, family).map_err(NetworkError::step("list addresses"));
        let mut present = list()?;
        let mut changed = false;
        for placed in placed {
            for old in present.iter().filter(|present| present.index == placed.link.index) {
                if placed.interface.addresses.contains(&old.address) || is_kernels(old, placed) {
                    continue;
                }
                let failed = NetworkError::address(placed, old.address.ip, "remove it");
                match socket.request(libc::RTM_DELADDR, 0, &message(old.index, &old.address, 0)) {
                    // Gone with the first of its subnet.
                    Err(error) if error.errno() == Some(Errno::ADDRNOTAVAIL) => {}
                    other => other.map_err(failed)?,
                }
                changed = true;
            }
        }
        if changed {
            // More may have gone than were removed.
            present = list()?;
        }
        for placed in placed {
            for address in placed.interface.addresses.iter().filter(|a| i32::from(self::family(a.ip)) == family) {
                let there = |present: &&Present| present.index == placed.link.index;
                let known = present.iter().filter(there).any(|present| {
                    present.address == *address || present.address.ip == address.ip && is_kernels(present, placed)
                });
                if known {
                    continue;
                }
                let nodad = if address.ip.is_ipv6() { NODAD } else { 0 };
                let failed = NetworkError::address(placed, address.ip, "add it");
                match socket.request(
                    libc::RTM_NEWADDR,
                    CREATE,
                    &message(placed.link.index, address, address.flags | nodad),
                ) {
                    // The kernel was first: it makes that of the link by itself, when the interface comes up.
                    Err(error) if error.errno() == Some(Errno::EXIST) && is_of_the_link(address.ip) => {}
                    other => other.map_err(failed)?,
                }
            }
        }
    }
    Ok(())
}

/// The bytes of an address.
pub fn bytes(ip: IpAddr) -> Vec<u8> {
    octets(ip)
}

/// An attribute that is an address.
pub fn get(attributes: Attributes<'_>, kind: u16) -> Option<IpAddr> {
    attributes.get(kind).and_then(ip)
}
