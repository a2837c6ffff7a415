//! What a network namespace has: interfaces with their addresses, routes, neighbours, as the agent is told.

use std::collections::HashMap;

use podhull_protocol::{Address, ConfigureNetworkRequest, Interface, Neighbour, Route};

use super::link::{Fate, Link};
use super::netlink::{Netlink, attributes, number};
use super::redirect::Beside;
use super::resolver::{self, RESOLVER};
use super::{NetworkError, tap};

// rtnetlink.h: what the libc crate has not.
const RTNH_F_ONLINK: u32 = 4;
const RTPROT_RA: u8 = 9;
const RTA_ENCAP: u16 = 22;

/// The name of an algorithm among a route's numbers (`RTAX_CC_ALGO`).
const RTAX_CC_ALGO: u16 = 16;

/// Bytes before the attributes: `struct ifinfomsg`, `ifaddrmsg`, `rtmsg`, `ndmsg`.
const LINK: usize = 16;
const ADDRESS: usize = 8;
const ROUTE: usize = 12;
const NEIGHBOUR: usize = 12;

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// As the guest is to have it.
    pub description: ConfigureNetworkRequest,
    /// The interfaces that are joined to the machine.
    pub links: Vec<Link>,
    /// What the guest does not get although it was there; one line each.
    pub warnings: Vec<String>,
}

/// Looks around in the namespace of a socket. If there is nothing but the loopback interface, and what every namespace has,
/// nothing further is asked.
pub fn scan(netlink: &Netlink) -> Result<Found, NetworkError> {
    let mut all = Vec::new();
    dump(netlink, "interfaces", libc::RTM_GETLINK, LINK, |body| match body {
        Some(body) => all.extend(Link::read(body)),
        None => all.clear(),
    })?;
    let mut found = Found::default();
    for link in all {
        match link.fate() {
            Fate::Join => found.add(link)?,
            Fate::Ignore => {}
            Fate::Refuse(why) => return Err(NetworkError::Unsuitable { name: link.name, why }),
        }
    }
    if found.links.is_empty() {
        return Ok(found);
    }
    let mut addresses = Vec::new();
    dump(netlink, "addresses", libc::RTM_GETADDR, ADDRESS, |body| match body {
        Some(body) => addresses.extend(address(body)),
        None => addresses.clear(),
    })?;
    for (index, address) in addresses {
        if let Some(at) = found.links.iter().position(|link| link.index == index) {
            found.description.interfaces[at].addresses.push(address);
        }
    }
    let names: HashMap<u32, &str> = found.links.iter().map(|link| (link.index, &*link.name)).collect();
    let (mut routes, mut warnings) = (Vec::new(), Vec::new());
    dump(netlink, "routes", libc::RTM_GETROUTE, ROUTE, |body| match body {
        Some(body) => routes.extend(route(body, &names, &mut warnings)),
        None => (routes.clear(), warnings.clear()).0,
    })?;
    let mut neighbours = Vec::new();
    dump(netlink, "neighbours", libc::RTM_GETNEIGH, NEIGHBOUR, |body| match body {
        Some(body) => neighbours.extend(neighbour(body, &names)),
        None => neighbours.clear(),
    })?;
    (found.description.routes, found.description.neighbours, found.warnings) = (routes, neighbours, warnings);
    Ok(found)
}

impl Found {
    /// Whether the container has a resolver in its namespace, which then keeps its part of what arrives there.
    pub fn look_for_a_resolver(&mut self) -> Result<Beside, NetworkError> {
        if !resolver::is_there().map_err(|error| NetworkError::Scan("sockets", error))? {
            return Ok(Beside::Nobody);
        }
        self.description.resolver = RESOLVER.octets().into();
        match resolver::keep_ports() {
            Ok(()) => Ok(Beside::Resolver),
            Err(error) => {
                self.warnings.push(format!("the container gets no names from outside its network: {error}"));
                Ok(Beside::Nobody)
            }
        }
    }

    fn add(&mut self, link: Link) -> Result<(), NetworkError> {
        // The guest knows its interfaces by their addresses.
        if let Some(other) = self.links.iter().find(|other| other.mac == link.mac) {
            return Err(NetworkError::SameAddress(link.name, other.name.clone()));
        }
        self.description.interfaces.push(Interface {
            name: link.name.clone(),
            mac: link.mac.into(),
            mtu: link.mtu.min(tap::MTU_MAX),
            up: true,
            no_arp: link.no_arp,
            ..Default::default()
        });
        self.links.push(link);
        Ok(())
    }
}

fn dump(
    netlink: &Netlink,
    what: &'static str,
    kind: u16,
    header: usize,
    each: impl FnMut(Option<&[u8]>),
) -> Result<(), NetworkError> {
    netlink.dump(kind, &vec![0; header], each).map_err(|error| NetworkError::Scan(what, error))
}

/// An address and the number of its interface; `None` for one that the guest finds itself, from what routers announce.
fn address(body: &[u8]) -> Option<(u32, Address)> {
    let [family, prefix_length, flags, scope] = *body.first_chunk()?;
    let mut address =
        Address { prefix_length: prefix_length.into(), scope: scope.into(), flags: flags.into(), ..Default::default() };
    let mut far = Vec::new();
    for (kind, value) in attributes(body, ADDRESS) {
        match kind {
            libc::IFA_LOCAL => address.ip = value.into(),
            libc::IFA_ADDRESS => far = value.into(),
            libc::IFA_BROADCAST => address.broadcast = value.into(),
            libc::IFA_FLAGS => address.flags = number(value)?,
            _ => {}
        }
    }
    // IPv6 has the first only if there is another end. IPv4 has both, and they are the same if there is none.
    if address.ip.is_empty() {
        address.ip = far;
    } else if address.ip != far {
        address.peer = far;
    }
    let passing = i32::from(family) == libc::AF_INET6 && address.flags & libc::IFA_F_PERMANENT == 0;
    (!passing && !address.ip.is_empty()).then_some((number(&body[4..])?, address))
}

/// A route of the main table; `None` for others, and for those that the guest makes itself.
fn route(body: &[u8], names: &HashMap<u32, &str>, warnings: &mut Vec<String>) -> Option<Route> {
    let [family, prefix_length, source_length, tos, table, protocol, scope, kind] = *body.first_chunk()?;
    let flags = number(body.get(8..)?)?;
    let mut route = Route {
        family: family.into(),
        prefix_length: prefix_length.into(),
        tos: tos.into(),
        protocol: protocol.into(),
        scope: scope.into(),
        kind: kind.into(),
        on_link: flags & RTNH_F_ONLINK != 0,
        ..Default::default()
    };
    let (mut table, mut interface) = (u32::from(table), None);
    let mut beyond = (source_length > 0).then_some("it is for some sources only");
    for (kind, value) in attributes(body, ROUTE) {
        match kind {
            libc::RTA_TABLE => table = number(value)?,
            libc::RTA_DST => route.destination = value.into(),
            libc::RTA_GATEWAY => route.gateway = value.into(),
            // The family, and an address of it.
            libc::RTA_VIA => route.gateway = value.get(2..)?.into(),
            libc::RTA_PREFSRC => route.preferred_source = value.into(),
            libc::RTA_PRIORITY => route.metric = number(value)?,
            libc::RTA_OIF => interface = number(value),
            libc::RTA_METRICS => {
                let metrics = attributes(value, 0).filter(|(metric, _)| *metric != RTAX_CC_ALGO);
                route.metrics = metrics.filter_map(|(metric, value)| Some((metric.into(), number(value)?))).collect();
            }
            libc::RTA_MULTIPATH => beyond = Some("it has several next hops"),
            RTA_ENCAP => beyond = Some("it goes through a tunnel"),
            _ => {}
        }
    }
    let ours = table == u32::from(libc::RT_TABLE_MAIN)
        && [libc::AF_INET, libc::AF_INET6].contains(&i32::from(family))
        && flags & libc::RTM_F_CLONED == 0
        && ![libc::RTPROT_REDIRECT, RTPROT_RA].contains(&protocol)
        && kind != libc::RTN_MULTICAST
        && !is_of_the_link(&route.destination);
    if !ours {
        return None;
    }
    if let Some(why) = beyond {
        warnings.push(format!("the container does not get the route to {}: {why}", shown(&route)));
        return None;
    }
    let nowhere = [libc::RTN_BLACKHOLE, libc::RTN_UNREACHABLE, libc::RTN_PROHIBIT, libc::RTN_THROW].contains(&kind);
    if !nowhere {
        route.interface = (*names.get(&interface?)?).into();
    }
    Some(route)
}

/// IPv6 `fe80::/10` and `ff00::/8`.
fn is_of_the_link(destination: &[u8]) -> bool {
    destination.len() == 16 && (destination[0] == 0xff || (destination[0] == 0xfe && destination[1] & 0xc0 == 0x80))
}

fn shown(route: &Route) -> String {
    let address = match route.destination.len() {
        4 => route.destination.first_chunk::<4>().map(|bytes| std::net::IpAddr::from(*bytes)),
        _ => route.destination.first_chunk::<16>().map(|bytes| std::net::IpAddr::from(*bytes)),
    };
    address.map_or_else(|| "everywhere".into(), |address| format!("{address}/{}", route.prefix_length))
}

/// An entry that somebody made for good.
fn neighbour(body: &[u8], names: &HashMap<u32, &str>) -> Option<Neighbour> {
    let family = i32::from(*body.first()?);
    let interface = (*names.get(&number(body.get(4..)?)?)?).to_owned();
    let state = u16::from_ne_bytes(body.get(8..10)?.try_into().ok()?);
    let flags = *body.get(10)?;
    let permanent = state & libc::NUD_PERMANENT != 0 && flags & libc::NTF_PROXY == 0;
    if !permanent || ![libc::AF_INET, libc::AF_INET6].contains(&family) {
        return None;
    }
    let mut neighbour =
        Neighbour { interface, state: libc::NUD_PERMANENT.into(), flags: flags.into(), ..Default::default() };
    for (kind, value) in attributes(body, NEIGHBOUR) {
        match kind {
            libc::NDA_DST => neighbour.ip = value.into(),
            libc::NDA_LLADDR => neighbour.link_address = value.into(),
            _ => {}
        }
    }
    Some(neighbour)
}
