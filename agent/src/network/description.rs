//! What the host says the network should be: checked, and in the words of the kernel.

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use podhull_protocol::ConfigureNetworkRequest;

/// Bounds of a description.
const MAX_INTERFACES: usize = 32;
const MAX_ADDRESSES: usize = 256;
const MAX_ROUTES: usize = 4096;
const MAX_NEIGHBOURS: usize = 4096;
const MAX_SYSCTLS: usize = 1024;
const MAX_SYSCTL_KEY: usize = 256;
const MAX_SYSCTL_VALUE: usize = 4096;

/// Longest name of an interface (`IFNAMSIZ` without the zero).
const MAX_NAME: usize = 15;
/// MTUs that an interface can have.
const MTUS: std::ops::RangeInclusive<u32> = 68..=65_536;

/// Name of the loopback interface.
pub const LOOPBACK: &str = "lo";

/// Kinds of routes (`RTN_*`).
pub const UNICAST: u8 = 1;
const LOCAL: u8 = 2;
const BROADCAST: u8 = 3;
const BLACKHOLE: u8 = 6;
const THROW: u8 = 9;
/// `RTPROT_STATIC`.
const STATIC: u8 = 4;
/// What the kernel takes for an IPv6 metric of 0 (`IP6_RT_PRIO_USER`).
const IPV6_METRIC: u32 = 1024;
/// Metrics of a route: `RTAX_MAX`, and the one that is a name.
const MAX_METRIC: u32 = 17;
const CC_ALGO: u32 = 16;

/// Flags of an address that whoever adds it decides (`IFA_F_*`): no route for its prefix, groups joined by the kernel, and for
/// IPv6 temporary addresses beside it, home address.
const IPV4_FLAGS: u32 = 0x200 | 0x400;
const IPV6_FLAGS: u32 = IPV4_FLAGS | 0x10 | 0x100;

/// States of a neighbour that last (`NUD_*`).
const NUD_NOARP: u32 = 0x40;
const NUD_PERMANENT: u32 = 0x80;
/// `NTF_PROXY`.
const NTF_PROXY: u32 = 8;

/// A description that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum DescriptionError {
    #[error("{what}: {count}; at most {most} are possible")]
    TooMany { what: String, count: usize, most: usize },
    #[error("interface name {0:?}: expected 1 to {MAX_NAME} bytes without \"/\", \":\" and blanks")]
    Name(String),
    #[error("interface {0}: there are two of this name")]
    NameTwice(String),
    #[error("interface {name}: MAC address {mac:02x?}: expected 6 bytes that are the address of one station")]
    Mac { name: String, mac: Vec<u8> },
    #[error("interface {name}: {other} has the same MAC address")]
    MacTwice { name: String, other: String },
    #[error("interface {name}: an MTU of {mtu}; possible are {} to {}", MTUS.start(), MTUS.end())]
    Mtu { name: String, mtu: u32 },
    #[error("interface {name}: address {number}: {what}")]
    Address { name: String, number: usize, what: &'static str },
    #[error("route {number}: {what}")]
    Route { number: usize, what: &'static str },
    #[error("route {number}: no interface {name:?} is described")]
    RouteInterface { number: usize, name: String },
    #[error("neighbour {number}: {what}")]
    Neighbour { number: usize, what: &'static str },
    #[error("neighbour {number}: no interface {name:?} is described")]
    NeighbourInterface { number: usize, name: String },
    #[error("resolver {0:?}: expected an address of 4 bytes in 127.0.0.0/8")]
    Resolver(Vec<u8>),
    #[error("sysctl {0:?}: expected a path that begins with \"net/\", and a value of at most {MAX_SYSCTL_VALUE} bytes")]
    Sysctl(String),
}

/// A whole network.
#[derive(Debug, Default)]
pub struct Network {
    pub interfaces: Vec<Interface>,
    /// With the names of their interfaces.
    pub routes: Vec<(Option<String>, Route)>,
    pub neighbours: Vec<(String, Neighbour)>,
    /// Paths below `/proc/sys`, and values.
    pub sysctls: Vec<(String, String)>,
    /// Where a program on the host answers questions for names.
    pub resolver: Option<Ipv4Addr>,
}

#[derive(Debug)]
pub struct Interface {
    pub name: String,
    /// None: the loopback interface.
    pub mac: Option<[u8; 6]>,
    pub mtu: u32,
    pub up: bool,
    pub no_arp: bool,
    pub addresses: Vec<Address>,
}

/// An address of an interface, as far as two can differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    pub ip: IpAddr,
    pub prefix_length: u8,
    pub broadcast: Option<Ipv4Addr>,
    pub peer: Option<IpAddr>,
    /// 0 for IPv6, where the address says it.
    pub scope: u8,
    /// Of [`IPV4_FLAGS`] or [`IPV6_FLAGS`].
    pub flags: u32,
}

impl Address {
    /// As it is compared: without what is not the adder's to decide.
    pub fn normal(mut self) -> Self {
        match self.ip {
            IpAddr::V4(_) => self.flags &= IPV4_FLAGS,
            IpAddr::V6(_) => {
                self.flags &= IPV6_FLAGS;
                self.scope = 0;
            }
        }
        self.peer = self.peer.filter(|peer| *peer != self.ip);
        self
    }
}

/// A route of the main table, as far as two can differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// All zeros with a prefix of 0: the default.
    pub destination: IpAddr,
    pub prefix_length: u8,
    pub gateway: Option<IpAddr>,
    pub preferred_source: Option<IpAddr>,
    pub metric: u32,
    /// 0 for IPv6, which has none.
    pub scope: u8,
    pub protocol: u8,
    pub kind: u8,
    pub on_link: bool,
    pub tos: u8,
    /// `RTAX_*`.
    pub metrics: BTreeMap<u32, u32>,
}

impl Route {
    /// As it is compared.
    pub fn normal(mut self) -> Self {
        if self.destination.is_ipv6() {
            self.scope = 0;
            if self.metric == 0 {
                self.metric = IPV6_METRIC;
            }
        }
        if !self.has_interface() {
            self.on_link = false;
            self.gateway = None;
        }
        self
    }

    /// Whether routes of its kind lead to an interface.
    pub fn has_interface(&self) -> bool {
        !(BLACKHOLE..=THROW).contains(&self.kind)
    }
}

/// A permanent entry of a neighbour table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    pub ip: IpAddr,
    pub link_address: Vec<u8>,
    pub state: u16,
    pub flags: u8,
}

impl Neighbour {
    /// Whether an entry in this state is one that was made to last.
    pub fn lasts(state: u16) -> bool {
        u32::from(state) & (NUD_PERMANENT | NUD_NOARP) != 0
    }
}

/// An address from its bytes.
pub fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(|octets| IpAddr::V4(octets.into())),
        16 => <[u8; 16]>::try_from(bytes).ok().map(|octets| IpAddr::V6(octets.into())),
        _ => None,
    }
}

/// The same, where none is one.
fn maybe_ip(bytes: &[u8]) -> Option<Option<IpAddr>> {
    if bytes.is_empty() { Some(None) } else { ip(bytes).map(Some) }
}

/// The bits of an address.
fn width(ip: IpAddr) -> u32 {
    if ip.is_ipv4() { 32 } else { 128 }
}

/// Whether nothing of an address is beyond its prefix.
fn is_network(ip: IpAddr, prefix_length: u32) -> bool {
    let bits = match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()) << 96,
        IpAddr::V6(ip) => ip.to_bits(),
    };
    bits.checked_shl(prefix_length).unwrap_or(0) == 0
}

impl Network {
    /// Checks a description.
    pub fn new(request: &ConfigureNetworkRequest) -> Result<Self, DescriptionError> {
        bounded("interfaces", request.interfaces.len(), MAX_INTERFACES)?;
        bounded("routes", request.routes.len(), MAX_ROUTES)?;
        bounded("neighbours", request.neighbours.len(), MAX_NEIGHBOURS)?;
        bounded("sysctls", request.sysctl.len(), MAX_SYSCTLS)?;
        let mut network = Self::default();
        for interface in &request.interfaces {
            network.interfaces.push(check_interface(interface)?);
        }
        let mut names = HashSet::new();
        for (index, interface) in network.interfaces.iter().enumerate() {
            if !names.insert(interface.name.as_str()) {
                return Err(DescriptionError::NameTwice(interface.name.clone()));
            }
            if let Some(other) = network.interfaces[..index].iter().find(|other| other.mac == interface.mac) {
                return Err(DescriptionError::MacTwice { name: interface.name.clone(), other: other.name.clone() });
            }
        }
        // It is always there.
        names.insert(LOOPBACK);
        for (number, route) in request.routes.iter().enumerate() {
            let checked = check_route(route).map_err(|what| DescriptionError::Route { number, what })?;
            let interface = checked.has_interface().then(|| route.interface.clone());
            if let Some(name) = interface.as_ref().filter(|name| !names.contains(name.as_str())) {
                return Err(DescriptionError::RouteInterface { number, name: name.clone() });
            }
            network.routes.push((interface, checked));
        }
        for (number, neighbour) in request.neighbours.iter().enumerate() {
            let checked = check_neighbour(neighbour).map_err(|what| DescriptionError::Neighbour { number, what })?;
            let name = neighbour.interface.clone();
            if !names.contains(name.as_str()) {
                return Err(DescriptionError::NeighbourInterface { number, name });
            }
            network.neighbours.push((name, checked));
        }
        for (key, value) in &request.sysctl {
            let named = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
            let below = key.starts_with("net/") && key.split('/').all(named) && key.len() <= MAX_SYSCTL_KEY;
            if !below || value.len() > MAX_SYSCTL_VALUE {
                return Err(DescriptionError::Sysctl(key.chars().take(MAX_SYSCTL_KEY).collect()));
            }
            network.sysctls.push((key.clone(), value.clone()));
        }
        network.resolver = match maybe_ip(&request.resolver) {
            Some(None) => None,
            Some(Some(IpAddr::V4(resolver))) if resolver.is_loopback() => Some(resolver),
            _ => return Err(DescriptionError::Resolver(request.resolver.iter().take(16).copied().collect())),
        };
        // A map has no order, and some follow from others: "all" before the interfaces.
        network.sysctls.sort();
        Ok(network)
    }
}

fn bounded(what: impl Into<String>, count: usize, most: usize) -> Result<(), DescriptionError> {
    if count > most { Err(DescriptionError::TooMany { what: what.into(), count, most }) } else { Ok(()) }
}

fn check_interface(interface: &podhull_protocol::Interface) -> Result<Interface, DescriptionError> {
    let name = interface.name.clone();
    let forbidden = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    // The last two are directories of sysctls beside those of interfaces.
    let reserved = [".", "..", "all", "default"];
    if !(1..=MAX_NAME).contains(&name.len()) || name.contains(forbidden) || reserved.contains(&name.as_str()) {
        return Err(DescriptionError::Name(name.chars().take(100).collect()));
    }
    let mac = if name == LOOPBACK && interface.mac.is_empty() {
        None
    } else {
        match <[u8; 6]>::try_from(interface.mac.as_slice()) {
            Ok(mac) if mac != [0; 6] && mac[0] & 1 == 0 && name != LOOPBACK => Some(mac),
            _ => return Err(DescriptionError::Mac { name, mac: interface.mac.iter().take(16).copied().collect() }),
        }
    };
    if !MTUS.contains(&interface.mtu) {
        return Err(DescriptionError::Mtu { name, mtu: interface.mtu });
    }
    bounded(format!("addresses of interface {name}"), interface.addresses.len(), MAX_ADDRESSES)?;
    let mut addresses: Vec<Address> = Vec::new();
    for (number, address) in interface.addresses.iter().enumerate() {
        let refuse = |what| DescriptionError::Address { name: name.clone(), number, what };
        let address = check_address(address).map_err(refuse)?;
        let same = |other: &Address| {
            (other.ip, other.prefix_length, other.peer) == (address.ip, address.prefix_length, address.peer)
        };
        if addresses.iter().any(same) {
            return Err(refuse("it is there twice"));
        }
        addresses.push(address);
    }
    Ok(Interface { mac, mtu: interface.mtu, up: interface.up, no_arp: interface.no_arp, addresses, name })
}

fn check_address(address: &podhull_protocol::Address) -> Result<Address, &'static str> {
    let own = ip(&address.ip).ok_or("expected an address of 4 or 16 bytes")?;
    let peer = maybe_ip(&address.peer).ok_or("expected a peer of 4 or 16 bytes")?;
    let broadcast = match maybe_ip(&address.broadcast) {
        Some(None) => None,
        Some(Some(IpAddr::V4(broadcast))) if own.is_ipv4() => Some(broadcast),
        _ => return Err("expected a broadcast address of 4 bytes, and for IPv4 alone"),
    };
    if own.is_unspecified() || own.is_multicast() {
        return Err("expected the address of one station");
    }
    if peer.is_some_and(|peer| peer.is_ipv4() != own.is_ipv4()) {
        return Err("its peer is of the other family");
    }
    if address.prefix_length > width(own) {
        return Err("its prefix is longer than an address");
    }
    Ok(Address {
        ip: own,
        prefix_length: address.prefix_length as u8,
        broadcast,
        peer,
        scope: u8::try_from(address.scope).map_err(|_| "expected a scope of 0 to 255")?,
        flags: address.flags,
    }
    .normal())
}

fn check_route(route: &podhull_protocol::Route) -> Result<Route, &'static str> {
    let any = match route.family as libc::c_int {
        libc::AF_INET => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        libc::AF_INET6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return Err("expected family 2 (IPv4) or 10 (IPv6)"),
    };
    let destination = maybe_ip(&route.destination).ok_or("expected a destination of 4 or 16 bytes")?.unwrap_or(any);
    if destination.is_ipv4() != any.is_ipv4() {
        return Err("its destination is of the other family");
    }
    if route.prefix_length > width(destination) || !is_network(destination, route.prefix_length) {
        return Err("its destination is no network of its prefix");
    }
    let gateway = maybe_ip(&route.gateway).ok_or("expected a gateway of 4 or 16 bytes")?;
    if gateway.is_some_and(|gateway| gateway.is_unspecified() || gateway.is_multicast()) {
        return Err("expected a gateway that is one station");
    }
    let preferred_source = maybe_ip(&route.preferred_source).ok_or("expected a preferred source of 4 or 16 bytes")?;
    if preferred_source.is_some_and(|source| source.is_ipv4() != any.is_ipv4()) {
        return Err("its preferred source is of the other family");
    }
    let byte = |value: u32, what| u8::try_from(value).map_err(|_| what);
    let kind = match byte(route.kind, "its kind is unknown")? {
        0 => UNICAST,
        kind @ (UNICAST | LOCAL | BROADCAST | BLACKHOLE..=THROW) => kind,
        _ => return Err("its kind is unknown"),
    };
    if route.metrics.iter().any(|(metric, _)| !(1..=MAX_METRIC).contains(metric) || *metric == CC_ALGO) {
        return Err("one of its metrics is unknown");
    }
    Ok(Route {
        destination,
        prefix_length: route.prefix_length as u8,
        gateway,
        preferred_source,
        metric: route.metric,
        scope: byte(route.scope, "expected a scope of 0 to 255")?,
        protocol: match byte(route.protocol, "expected a protocol of 0 to 255")? {
            0 => STATIC,
            protocol => protocol,
        },
        kind,
        on_link: route.on_link,
        tos: byte(route.tos, "expected a type of service of 0 to 255")?,
        metrics: route.metrics.iter().map(|(metric, value)| (*metric, *value)).collect(),
    }
    .normal())
}

fn check_neighbour(neighbour: &podhull_protocol::Neighbour) -> Result<Neighbour, &'static str> {
    let ip = ip(&neighbour.ip).ok_or("expected an address of 4 or 16 bytes")?;
    if !matches!(neighbour.link_address.len(), 0 | 6) {
        return Err("expected a link address of 6 bytes");
    }
    if !matches!(neighbour.state, NUD_PERMANENT | NUD_NOARP) {
        return Err("expected a state that lasts: 0x80 (permanent) or 0x40 (no ARP)");
    }
    if neighbour.link_address.is_empty() && neighbour.state == NUD_PERMANENT {
        return Err("it has no link address");
    }
    match u8::try_from(neighbour.flags) {
        Ok(flags) if neighbour.flags & NTF_PROXY == 0 => {
            Ok(Neighbour { ip, link_address: neighbour.link_address.clone(), state: neighbour.state as u16, flags })
        }
        _ => Err("one of its flags is unknown, or that of a proxy"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use podhull_protocol as wire;

    fn interface(name: &str, mac: &[u8]) -> wire::Interface {
        wire::Interface { name: name.into(), mac: mac.into(), mtu: 1500, ..Default::default() }
    }

    fn of(change: impl FnOnce(&mut ConfigureNetworkRequest)) -> Result<Network, DescriptionError> {
        let mut request =
            ConfigureNetworkRequest { interfaces: vec![interface("eth0", &[2, 0, 0, 0, 0, 1])], ..Default::default() };
        change(&mut request);
        Network::new(&request)
    }

    #[test]
    fn interfaces_have_names_and_addresses_of_their_own() {
        assert_eq!(of(|_| {}).unwrap().interfaces.len(), 1);
        assert!(of(|r| r.interfaces.push(interface("lo", &[]))).is_ok());
        for name in ["", ".", "..", "all", "default", "a/b", "a b", "a:1", "sixteen-letters-", "a\n"] {
            assert!(matches!(of(|r| r.interfaces[0].name = name.into()), Err(DescriptionError::Name(_))), "{name:?}");
        }
        for mac in [&[][..], &[2; 5], &[2; 7], &[0; 6], &[0xff; 6], &[1, 0, 0, 0, 0, 1]] {
            assert!(matches!(of(|r| r.interfaces[0].mac = mac.into()), Err(DescriptionError::Mac { .. })), "{mac:?}");
        }
        assert!(matches!(of(|r| r.interfaces[0].name = "lo".into()), Err(DescriptionError::Mac { .. })));
        let twice = |name, mac: &[u8]| of(|r| r.interfaces.push(interface(name, mac)));
        assert!(matches!(twice("eth0", &[2, 0, 0, 0, 0, 2]), Err(DescriptionError::NameTwice(_))));
        assert!(matches!(twice("eth1", &[2, 0, 0, 0, 0, 1]), Err(DescriptionError::MacTwice { .. })));
        for mtu in [0, 67, 65_537, u32::MAX] {
            assert!(matches!(of(|r| r.interfaces[0].mtu = mtu), Err(DescriptionError::Mtu { .. })), "{mtu}");
        }
    }

    #[test]
    fn there_are_bounds() {
        let many = |count: usize| (0..count).map(|i| interface(&format!("e{i}"), &[2, 0, 0, 0, 1, i as u8])).collect();
        assert!(of(|r| r.interfaces = many(32)).is_ok());
        assert!(matches!(of(|r| r.interfaces = many(33)), Err(DescriptionError::TooMany { count: 33, .. })));
        assert!(matches!(
            of(|r| r.routes = vec![wire::Route::default(); MAX_ROUTES + 1]),
            Err(DescriptionError::TooMany { .. })
        ));
        assert!(matches!(
            of(|r| r.neighbours = vec![wire::Neighbour::default(); MAX_NEIGHBOURS + 1]),
            Err(DescriptionError::TooMany { .. })
        ));
        assert!(matches!(
            of(|r| r.interfaces[0].addresses = vec![wire::Address::default(); MAX_ADDRESSES + 1]),
            Err(DescriptionError::TooMany { .. })
        ));
    }

    #[test]
    fn addresses_are_those_of_stations() {
        let with = |address: wire::Address| of(|r| r.interfaces[0].addresses = vec![address]);
        let good = wire::Address { ip: vec![10, 0, 0, 5], prefix_length: 24, flags: 0xffff_ffff, ..Default::default() };
        let address = with(good.clone()).unwrap().interfaces[0].addresses[0].clone();
        assert_eq!((address.ip.to_string(), address.prefix_length, address.flags), ("10.0.0.5".into(), 24, IPV4_FLAGS));
        for bad in [
            wire::Address { ip: vec![1, 2, 3], ..good.clone() },
            wire::Address { ip: vec![0; 4], ..good.clone() },
            wire::Address { ip: vec![224, 0, 0, 1], ..good.clone() },
            wire::Address { prefix_length: 33, ..good.clone() },
            wire::Address { broadcast: vec![1], ..good.clone() },
            wire::Address { ip: vec![0x20; 16], broadcast: vec![10, 0, 0, 255], ..good.clone() },
            wire::Address { peer: vec![0x20; 16], ..good.clone() },
            wire::Address { scope: 256, ..good.clone() },
        ] {
            assert!(matches!(with(bad.clone()), Err(DescriptionError::Address { .. })), "{bad:?}");
        }
        let twice = of(|r| r.interfaces[0].addresses = vec![good.clone(), wire::Address { scope: 1, ..good }]);
        assert!(twice.unwrap_err().to_string().starts_with("interface eth0: address 1: "));
    }

    #[test]
    fn routes_lead_to_networks_by_interfaces_that_are_there() {
        let with = |route: wire::Route| of(|r| r.routes = vec![route]);
        let good = wire::Route { family: 2, interface: "eth0".into(), ..Default::default() };
        let (name, route) = with(good.clone()).unwrap().routes.remove(0);
        assert_eq!((name.as_deref(), route.kind, route.protocol, route.metric), (Some("eth0"), UNICAST, STATIC, 0));
        let (_, route) = with(wire::Route { family: 10, scope: 253, ..good.clone() }).unwrap().routes.remove(0);
        assert_eq!((route.metric, route.scope), (1024, 0));
        let (name, _) = with(wire::Route { kind: 7, ..good.clone() }).unwrap().routes.remove(0);
        assert_eq!(name, None);
        assert!(with(wire::Route { interface: "lo".into(), ..good.clone() }).is_ok());
        assert!(with(wire::Route { gateway: vec![0x20; 16], ..good.clone() }).is_ok());
        assert!(matches!(
            with(wire::Route { interface: "eth1".into(), ..good.clone() }),
            Err(DescriptionError::RouteInterface { .. })
        ));
        for bad in [
            wire::Route { family: 3, ..good.clone() },
            wire::Route { destination: vec![0x20; 16], prefix_length: 128, ..good.clone() },
            wire::Route { destination: vec![10, 0, 0, 1], prefix_length: 24, ..good.clone() },
            wire::Route { destination: vec![10, 0, 0, 1], prefix_length: 33, ..good.clone() },
            wire::Route { destination: vec![10, 0, 0], ..good.clone() },
            wire::Route { gateway: vec![0; 4], ..good.clone() },
            wire::Route { gateway: vec![1], ..good.clone() },
            wire::Route { preferred_source: vec![0x20; 16], ..good.clone() },
            wire::Route { kind: 5, ..good.clone() },
            wire::Route { kind: 300, ..good.clone() },
            wire::Route { tos: 256, ..good.clone() },
            wire::Route { metrics: [(16, 1)].into(), ..good.clone() },
            wire::Route { metrics: [(18, 1)].into(), ..good.clone() },
        ] {
            assert!(matches!(with(bad.clone()), Err(DescriptionError::Route { .. })), "{bad:?}");
        }
    }

    #[test]
    fn networks_are_told_from_stations() {
        for (ip, prefix, network) in [
            ("0.0.0.0", 0, true),
            ("10.1.0.0", 16, true),
            ("10.1.0.0", 15, false),
            ("10.1.0.1", 32, true),
            ("::", 0, true),
            ("2001:db8::", 32, true),
            ("2001:db8::1", 127, false),
            ("2001:db8::1", 128, true),
        ] {
            assert_eq!(is_network(ip.parse().unwrap(), prefix), network, "{ip}/{prefix}");
        }
    }

    #[test]
    fn neighbours_last_and_sysctls_and_resolvers_are_of_the_network() {
        let with = |neighbour: wire::Neighbour| of(|r| r.neighbours = vec![neighbour]);
        let good = wire::Neighbour {
            interface: "eth0".into(),
            ip: vec![10, 0, 0, 1],
            link_address: vec![2; 6],
            state: 0x80,
            ..Default::default()
        };
        assert!(with(good.clone()).is_ok());
        for bad in [
            wire::Neighbour { ip: vec![], ..good.clone() },
            wire::Neighbour { link_address: vec![2; 5], ..good.clone() },
            wire::Neighbour { link_address: vec![], ..good.clone() },
            wire::Neighbour { state: 2, ..good.clone() },
            wire::Neighbour { flags: 8, ..good.clone() },
            wire::Neighbour { flags: 256, ..good.clone() },
        ] {
            assert!(matches!(with(bad.clone()), Err(DescriptionError::Neighbour { .. })), "{bad:?}");
        }
        let resolver = |bytes: &[u8]| of(|r| r.resolver = bytes.into());
        assert_eq!(resolver(&[]).unwrap().resolver, None);
        assert_eq!(resolver(&[127, 0, 0, 11]).unwrap().resolver, Some(Ipv4Addr::new(127, 0, 0, 11)));
        for bad in [&[10, 0, 0, 1][..], &[127, 0, 0], &[0; 16]] {
            assert!(matches!(resolver(bad), Err(DescriptionError::Resolver(_))), "{bad:?}");
        }
        let sysctl = |key: &str| of(|r| drop(r.sysctl.insert(key.into(), "1".into())));
        assert!(sysctl("net/ipv4/conf/eth0/rp_filter").is_ok());
        for key in ["", "net", "net/", "kernel/panic", "net/../kernel/panic", "net//x", "net/ipv4/\0", "/net/ipv4/x"] {
            assert!(matches!(sysctl(key), Err(DescriptionError::Sysctl(_))), "{key:?}");
        }
    }
}
