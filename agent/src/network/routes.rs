//! Routes of the main table.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rustix::io::Errno;

use super::NetworkError;
use super::addresses::{bytes, family, get};
use super::description::{Network, Route, ip};
use super::links::Placed;
use super::netlink::{APPEND, Attributes, Message, NetlinkError, Received, Socket};

/// Attributes of a route (`linux/rtnetlink.h`).
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
/// Attributes with others in them say so.
const NESTED: u16 = 0x8000;

/// The main table.
const MAIN: u32 = libc::RT_TABLE_MAIN as u32;
/// Who made a route: a redirect, the kernel, a router's announcement.
const PROTOCOL_REDIRECT: u8 = 1;
const PROTOCOL_KERNEL: u8 = 2;
const PROTOCOL_ANNOUNCEMENT: u8 = 9;
/// The gateway is on the link, whatever the routes say.
const ON_LINK: u32 = 4;
/// Not a route but an entry of a cache.
const CLONED: u32 = 0x200;

/// A route that is there.
struct Present {
    interface: Option<u32>,
    route: Route,
}

/// A route as a message (`struct rtmsg`).
fn message(interface: Option<u32>, route: &Route) -> Message {
    let mut fixed = vec![
        family(route.destination),
        route.prefix_length,
        0,
        route.tos,
        MAIN as u8,
        route.protocol,
        route.scope,
        route.kind,
    ];
    fixed.extend(if route.on_link { ON_LINK } else { 0 }.to_ne_bytes());
    let mut message = Message::new(fixed);
    if route.prefix_length > 0 {
        message = message.with(RTA_DST, bytes(route.destination));
    }
    if let Some(interface) = interface {
        message = message.with_number(RTA_OIF, interface);
    }
    if let Some(gateway) = route.gateway {
        message = if gateway.is_ipv4() == route.destination.is_ipv4() {
            message.with(RTA_GATEWAY, bytes(gateway))
        } else {
            message.with(RTA_VIA, [u16::from(family(gateway)).to_ne_bytes().to_vec(), bytes(gateway)].concat())
        };
    }
    if route.metric != 0 {
        message = message.with_number(RTA_PRIORITY, route.metric);
    }
    message = message.with_some(RTA_PREFSRC, route.preferred_source.map(bytes));
    if !route.metrics.is_empty() {
        let nested = route
            .metrics
            .iter()
            .fold(Message::default(), |nested, (metric, value)| nested.with_number(*metric as u16, *value));
        message = message.with(RTA_METRICS | NESTED, nested.nested());
    }
    message
}

fn read(received: &Received<'_>) -> Result<Option<Present>, NetlinkError> {
    let (fixed, attributes) = received.split::<12>()?;
    let [family, prefix_length, _, tos, table, protocol, scope, kind, flags @ ..] = *fixed;
    let flags = u32::from_ne_bytes(flags);
    let any = match i32::from(family) {
        libc::AF_INET => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        libc::AF_INET6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return Ok(None),
    };
    let table = attributes.number(RTA_TABLE).unwrap_or(table.into());
    if received.kind != libc::RTM_NEWROUTE || table != MAIN || flags & CLONED != 0 {
        return Ok(None);
    }
    let via = attributes.get(RTA_VIA).and_then(|via| ip(via.get(2..)?));
    let metrics = attributes.get(RTA_METRICS).map(metrics).unwrap_or_default();
    let route = Route {
        destination: get(attributes, RTA_DST).unwrap_or(any),
        prefix_length,
        gateway: get(attributes, RTA_GATEWAY).or(via),
        preferred_source: get(attributes, RTA_PREFSRC),
        metric: attributes.number(RTA_PRIORITY).unwrap_or(0),
        scope,
        protocol,
        kind,
        on_link: flags & ON_LINK != 0,
        tos,
        metrics,
    };
    Ok(Some(Present { interface: attributes.number(RTA_OIF), route: route.normal() }))
}

fn metrics(bytes: &[u8]) -> BTreeMap<u32, u32> {
    let number = |(kind, value): (u16, &[u8])| Some((kind.into(), u32::from_ne_bytes(value.try_into().ok()?)));
    Attributes(bytes).all().filter_map(number).collect()
}

/// Whether a route is there of itself, and is not described.
fn is_kernels(present: &Present, loopback: Option<u32>) -> bool {
    let route = &present.route;
    match route.protocol {
        PROTOCOL_REDIRECT | PROTOCOL_ANNOUNCEMENT => return true,
        // What IPv6 has for itself, and refusals, which it ties to the loopback interface.
        PROTOCOL_KERNEL if present.interface.is_some() && present.interface == loopback => return true,
        _ => {}
    }
    match route.destination {
        IpAddr::V4(_) => false,
        IpAddr::V6(destination) => {
            let link = destination.is_unicast_link_local() && route.protocol == PROTOCOL_KERNEL;
            link || destination.is_multicast()
        }
    }
}

/// Removes routes that are not described, and adds those that are missing.
pub fn apply(
    socket: &Socket,
    network: &Network,
    placed: &[Placed<'_>],
    loopback: Option<u32>,
) -> Result<(), NetworkError> {
    let index_of = |name: &str| {
        let described = placed.iter().find(|placed| placed.interface.name == name).map(|placed| placed.link.index);
        described.or(loopback)
    };
    let ours =
        |interface: u32| placed.iter().any(|placed| placed.link.index == interface) || Some(interface) == loopback;
    let mut wanted: Vec<(Option<u32>, &Route)> =
        network.routes.iter().map(|(name, route)| (name.as_deref().and_then(index_of), route)).collect();
    let mut present = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut fixed = vec![0; 12];
        fixed[0] = family as u8;
        let found = socket.dump(libc::RTM_GETROUTE, &Message::new(fixed), read);
        present.extend(found.map_err(NetworkError::step("list routes"))?);
    }
    for old in &present {
        // A refusal leads nowhere, but may be tied to the loopback interface.
        let interface = if old.route.has_interface() { old.interface } else { None };
        let same = |(at, route): &(Option<u32>, &Route)| *at == interface && **route == old.route;
        if let Some(position) = wanted.iter().position(same) {
            // In their order: of those to one destination the first is used.
            wanted.remove(position);
            continue;
        }
        if is_kernels(old, loopback) || interface.is_some_and(|interface| !ours(interface)) {
            continue;
        }
        match socket.request(libc::RTM_DELROUTE, 0, &message(interface, &old.route)) {
            // Gone with another.
            Err(error) if error.errno() == Some(Errno::SRCH) => {}
            other => other.map_err(NetworkError::route(&old.route, "remove it"))?,
        }
    }
    add(socket, wanted)
}

/// Adds routes: those to links first, because gateways are reached by them; then the others, again and again as long as one
/// more finds its gateway.
fn add(socket: &Socket, mut wanted: Vec<(Option<u32>, &Route)>) -> Result<(), NetworkError> {
    wanted.sort_by_key(|(_, route)| (route.gateway.is_some(), std::cmp::Reverse(route.prefix_length)));
    loop {
        let count = wanted.len();
        let mut unreachable = None;
        let mut left = Vec::new();
        for (interface, route) in wanted {
            // There may be several to one destination.
            match socket.request(libc::RTM_NEWROUTE, APPEND, &message(interface, route)) {
                Ok(()) => {}
                Err(error) if route.gateway.is_some() && is_unreachable(&error) => {
                    unreachable.get_or_insert((route, error));
                    left.push((interface, route));
                }
                Err(error) => return Err(NetworkError::route(route, "add it")(error)),
            }
        }
        match unreachable {
            None => return Ok(()),
            Some((route, error)) if left.len() == count => return Err(NetworkError::route(route, "add it")(error)),
            Some(_) => wanted = left,
        }
    }
}

/// What the kernel says of a gateway that no route leads to.
fn is_unreachable(error: &NetlinkError) -> bool {
    matches!(error.errno(), Some(Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::INVAL))
}
