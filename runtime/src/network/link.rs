//! One interface of a network namespace, and whether a machine can be joined to it.

use super::netlink::{attributes, number, text};
use super::tap;

// if_link.h: what the libc crate has not.
const IFLA_INFO_KIND: u16 = 1;

/// Bytes of `struct ifinfomsg`.
const HEADER: usize = 16;

/// An interface, as far as it matters here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Its number in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its address.
    pub mac: [u8; 6],
    /// Its MTU.
    pub mtu: u32,
    /// Whether nobody asks there for the addresses of neighbours (`IFF_NOARP`).
    pub no_arp: bool,
    /// Its kind by the name of its driver; empty for a device.
    kind: String,
    /// `ARPHRD_*`.
    layer: u16,
    up: bool,
    /// It is a port of another.
    is_port: bool,
}

/// What becomes of an interface.
#[derive(Debug, PartialEq, Eq)]
pub enum Fate {
    /// A machine is joined to it.
    Join,
    /// It carries nothing of the container's.
    Ignore,
    /// No machine can be joined to it, and why.
    Refuse(String),
}

impl Link {
    /// Reads the body of an `RTM_NEWLINK` message.
    pub fn read(body: &[u8]) -> Option<Self> {
        let flags = number(body.get(8..)?)?.cast_signed();
        let mut link = Self {
            layer: u16::from_ne_bytes(body.get(2..4)?.try_into().ok()?),
            index: number(body.get(4..)?)?,
            up: flags & libc::IFF_UP != 0,
            no_arp: flags & libc::IFF_NOARP != 0,
            ..Self::default()
        };
        for (kind, value) in attributes(body, HEADER) {
            match kind {
                libc::IFLA_IFNAME => link.name = text(value),
                libc::IFLA_ADDRESS => link.mac = value.try_into().unwrap_or_default(),
                libc::IFLA_MTU => link.mtu = number(value)?,
                libc::IFLA_MASTER => link.is_port = true,
                libc::IFLA_LINKINFO => {
                    let kind = attributes(value, 0).find(|(kind, _)| *kind == IFLA_INFO_KIND);
                    link.kind = kind.map(|(_, value)| text(value)).unwrap_or_default();
                }
                _ => {}
            }
        }
        Some(link)
    }

    /// What becomes of it.
    pub fn fate(&self) -> Fate {
        let ours = self.kind == "tun" && tap::is_ours(&self.name);
        // Of those that are down, many are there in every namespace: tunl0, sit0, gre0, erspan0 ...
        if self.layer == libc::ARPHRD_LOOPBACK || !self.up || self.is_port || ours {
            return Fate::Ignore;
        }
        let kind = match &*self.kind {
            "" => format!("of type {}", self.layer),
            kind => format!("of kind {kind}"),
        };
        let refuse = |why: &str| Fate::Refuse(format!("it is {kind}, {why}"));
        if self.layer != libc::ARPHRD_ETHER {
            return refuse("and carries no Ethernet frames; give the container one of kind veth or macvlan");
        }
        match &*self.kind {
            "vrf" => refuse("which only routes between others; give the container these without it"),
            "ipvlan" | "netkit" if self.no_arp => {
                refuse("and works on packets, not on Ethernet frames; use its mode l2, or one of kind veth or macvlan")
            }
            _ if self.mac == [0; 6] || self.mac[0] & 1 != 0 => refuse("and has no address of its own"),
            _ if self.mtu < podhull_vmm::control::MTU_MIN.into() => refuse("and its MTU is below 68"),
            _ => Fate::Join,
        }
    }
}
