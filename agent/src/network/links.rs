//! Interfaces: found by their MAC addresses, named, switched on.

use std::collections::HashSet;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Instant;

use super::description::{Interface, Network};
use super::netlink::{Message, NetlinkError, Received, Socket};
use super::{NetworkError, Scope};

/// Attributes of an interface (`linux/if_link.h`).
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_PERM_ADDRESS: u16 = 54;
const IFLA_PARENT_DEV_BUS_NAME: u16 = 57;

/// Kinds of interfaces (`ARPHRD_*`).
const ETHERNET: u16 = 1;
const LOOPBACK_KIND: u16 = 772;

/// Flags of an interface.
const UP: u32 = libc::IFF_UP as u32;
const NOARP: u32 = libc::IFF_NOARP as u32;

/// An interface that is there.
#[derive(Debug, Clone)]
pub struct Link {
    pub index: u32,
    pub name: String,
    flags: u32,
    mtu: u32,
    pub loopback: bool,
    /// By which it is known: that of the device, whatever was set since.
    mac: Option<[u8; 6]>,
    /// It is a device of the machine, not one that a program made.
    virtio: bool,
}

/// Which interfaces are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Devices {
    /// Those of the machine: what containers make may have the address of another.
    Virtio,
    /// Any, where there is no machine.
    Any,
}

impl Devices {
    fn include(self, link: &Link) -> bool {
        link.virtio || self == Self::Any
    }
}

/// The structure of a link message (`struct ifinfomsg`).
fn message(index: u32, flags: u32, change: u32) -> Message {
    let mut fixed = vec![0; 4];
    fixed.extend(index.to_ne_bytes());
    fixed.extend(flags.to_ne_bytes());
    fixed.extend(change.to_ne_bytes());
    Message::new(fixed)
}

fn read(received: &Received<'_>) -> Result<Option<Link>, NetlinkError> {
    if received.kind != libc::RTM_NEWLINK {
        return Ok(None);
    }
    let (fixed, attributes) = received.split::<16>()?;
    let number = |at: usize| u32::from_ne_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
    let kind = u16::from_ne_bytes([fixed[2], fixed[3]]);
    if kind != ETHERNET && kind != LOOPBACK_KIND {
        return Ok(None);
    }
    let mac = |attribute| attributes.get(attribute).and_then(|bytes| <[u8; 6]>::try_from(bytes).ok());
    Ok(Some(Link {
        index: number(4),
        name: attributes.text(IFLA_IFNAME).ok_or(NetlinkError::Malformed)?.to_owned(),
        flags: number(8),
        mtu: attributes.number(IFLA_MTU).unwrap_or(0),
        loopback: kind == LOOPBACK_KIND,
        mac: mac(IFLA_PERM_ADDRESS).or_else(|| mac(IFLA_ADDRESS)),
        virtio: attributes.text(IFLA_PARENT_DEV_BUS_NAME) == Some("virtio"),
    }))
}

fn all(socket: &Socket) -> Result<Vec<Link>, NetlinkError> {
    socket.dump(libc::RTM_GETLINK, &message(0, 0, 0), read)
}

/// The link of an interface among others.
fn find<'a>(links: &'a [Link], interface: &Interface, devices: Devices) -> Option<&'a Link> {
    links.iter().find(|link| match interface.mac {
        None => link.loopback,
        Some(mac) => !link.loopback && link.mac == Some(mac) && devices.include(link),
    })
}

/// Waits until all interfaces are there. Those that are not in `here` are fetched from `home`, where devices appear; it is
/// the same unless the pod's network belongs to a user namespace.
pub fn gather(network: &Network, scope: &Scope<'_>, deadline: Instant) -> Result<Vec<Link>, NetworkError> {
    let ask = NetworkError::step("list interfaces");
    loop {
        let links = all(scope.here).map_err(&ask)?;
        let missing: Vec<_> =
            network.interfaces.iter().filter(|interface| find(&links, interface, scope.devices).is_none()).collect();
        let Some(first) = missing.first() else { return Ok(links) };
        let mut fetched = false;
        if let Some((home, here)) = &scope.home {
            let there = all(home).map_err(&ask)?;
            for interface in &missing {
                if let Some(link) = find(&there, interface, scope.devices) {
                    hand_over(home, link, *here).map_err(|source| NetworkError::Interface {
                        name: interface.name.clone(),
                        step: "move it to the container's network namespace",
                        source,
                    })?;
                    fetched = true;
                }
            }
        }
        // Events since the socket was opened count, so none is missed between the look and the wait.
        if !fetched && !scope.events.wait(deadline).map_err(&ask)? {
            let mac = first.mac.unwrap_or_default().map(|byte| format!("{byte:02x}")).join(":");
            return Err(NetworkError::Missing { name: first.name.clone(), mac });
        }
    }
}

fn hand_over(home: &Socket, link: &Link, namespace: BorrowedFd<'_>) -> Result<(), NetlinkError> {
    let descriptor = namespace.as_raw_fd().cast_unsigned();
    home.request(libc::RTM_SETLINK, 0, &message(link.index, 0, 0).with_number(IFLA_NET_NS_FD, descriptor))
}

/// What becomes of the interfaces that are there: where each that is described is.
#[derive(Debug)]
pub struct Placed<'a> {
    pub interface: &'a Interface,
    pub link: Link,
}

/// Gives interfaces their names, and switches off the devices that are not described.
pub fn name<'a>(
    network: &'a Network,
    links: &[Link],
    socket: &Socket,
    devices: Devices,
) -> Result<Vec<Placed<'a>>, NetworkError> {
    let mut placed: Vec<_> = network
        .interfaces
        .iter()
        .filter_map(|interface| Some(Placed { interface, link: find(links, interface, devices)?.clone() }))
        .collect();
    let ours: HashSet<u32> = placed.iter().map(|placed| placed.link.index).collect();
    // A device that the description has no more.
    for link in links.iter().filter(|link| link.virtio && !link.loopback && !ours.contains(&link.index)) {
        let failed = |step| move |source| NetworkError::Interface { name: link.name.clone(), step, source };
        if link.flags & UP != 0 {
            socket.request(libc::RTM_SETLINK, 0, &message(link.index, 0, UP)).map_err(failed("switch it off"))?;
        }
        if placed.iter().any(|placed| placed.interface.name == link.name) {
            rename(socket, link, &passing(link.index)).map_err(failed("give its name away"))?;
        }
    }
    // Out of the way of each other first: two may have changed their names.
    let taken: HashSet<&str> = placed.iter().map(|placed| placed.interface.name.as_str()).collect();
    for placed in &placed {
        let Placed { interface, link } = placed;
        if link.name != interface.name && taken.contains(link.name.as_str()) {
            rename(socket, link, &passing(link.index)).map_err(placed.failed("give its name away"))?;
        }
    }
    for placed in &mut placed {
        if placed.link.name != placed.interface.name {
            rename(socket, &placed.link, &placed.interface.name).map_err(placed.failed("rename it"))?;
            placed.link.name.clone_from(&placed.interface.name);
        }
    }
    Ok(placed)
}

/// Switches the loopback interface on.
pub fn loopback_up(socket: &Socket, loopback: &Link) -> Result<(), NetworkError> {
    if loopback.flags & UP == 0 {
        let on = socket.request(libc::RTM_SETLINK, 0, &message(loopback.index, UP, UP));
        on.map_err(NetworkError::step("switch the loopback interface on"))?;
    }
    Ok(())
}

/// A name that nobody wants.
fn passing(index: u32) -> String {
    format!("podhull{index}")
}

fn rename(socket: &Socket, link: &Link, name: &str) -> Result<(), NetlinkError> {
    let name = [name.as_bytes(), b"\0"].concat();
    socket.request(libc::RTM_SETLINK, 0, &message(link.index, 0, 0).with(IFLA_IFNAME, name))
}

impl Placed<'_> {
    /// An error of a step with this interface.
    pub fn failed(&self, step: &'static str) -> impl Fn(NetlinkError) -> NetworkError + use<> {
        let name = self.interface.name.clone();
        move |source| NetworkError::Interface { name: name.clone(), step, source }
    }

    /// Sets MTU and flags.
    pub fn set(&self, socket: &Socket) -> Result<(), NetworkError> {
        let Self { interface, link } = self;
        // First, because what is up may not change it, and because small ones switch IPv6 off.
        if link.mtu != interface.mtu {
            let message = message(link.index, 0, 0).with_number(IFLA_MTU, interface.mtu);
            socket.request(libc::RTM_SETLINK, 0, &message).map_err(self.failed("set its MTU"))?;
        }
        if link.loopback {
            return Ok(());
        }
        let flags = if interface.up { UP } else { 0 } | if interface.no_arp { NOARP } else { 0 };
        if link.flags & (UP | NOARP) != flags {
            let step = if interface.up { "switch it on" } else { "switch it off" };
            let message = message(link.index, flags, UP | NOARP);
            socket.request(libc::RTM_SETLINK, 0, &message).map_err(self.failed(step))?;
        }
        Ok(())
    }
}
