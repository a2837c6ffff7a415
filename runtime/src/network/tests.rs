//! On interfaces that are made for it, each test in a network namespace of its own; that takes root.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::netlink::Messages;
use super::*;

const OUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 8];

/// Bytes before a frame on a tap.
const TAP_HEADER: usize = podhull_vmm::control::TAP_HEADER;

/// Runs a test in a new network namespace, and only with the right to make one.
fn apart(test: impl FnOnce(&Host) + Send + 'static) {
    let apart = move || {
        // SAFETY: it is about this thread's network alone.
        match unsafe { unshare_unsafe(UnshareFlags::NEWNET) } {
            Err(rustix::io::Errno::PERM) if !rustix::process::geteuid().is_root() => eprintln!("skipped: needs root"),
            unshared => {
                unshared.unwrap();
                test(&Host(Netlink::open(None).unwrap()));
            }
        }
    };
    std::thread::spawn(apart).join().unwrap();
}

/// The namespace of a test, and what is done to it.
struct Host(Netlink);

impl Host {
    fn namespace(&self) -> File {
        File::open("/proc/thread-self/ns/net").unwrap()
    }

    fn index(&self, name: &str) -> u32 {
        rustix::net::netdevice::name_to_index(&self.0, name).unwrap()
    }

    fn create() -> i32 {
        libc::NLM_F_CREATE | libc::NLM_F_EXCL
    }

    /// A pair of interfaces, both up.
    fn veth(&self, name: &str, peer: &str) {
        let mut messages = Messages::new();
        let mut attributes = messages.request(libc::RTM_NEWLINK, Self::create(), &[0; 16]);
        attributes.text(libc::IFLA_IFNAME, name).put(libc::IFLA_ADDRESS, &OUR_MAC);
        attributes.put(libc::IFLA_MTU, &1400u32.to_ne_bytes());
        let mut info = attributes.nest(libc::IFLA_LINKINFO);
        info.text(1, "veth");
        // VETH_INFO_PEER: a link message of its own.
        let mut data = info.nest(2);
        let mut other = data.nest(1);
        other.raw(&[0; 16]).text(libc::IFLA_IFNAME, peer).put(libc::IFLA_ADDRESS, &PEER_MAC);
        drop(other);
        drop(data);
        drop(info);
        drop(attributes);
        self.0.request(&messages).unwrap();
        self.up(name);
        self.up(peer);
    }

    fn up(&self, name: &str) {
        let mut link = [0; 16];
        link[4..8].copy_from_slice(&self.index(name).to_ne_bytes());
        link[8] = libc::IFF_UP as u8;
        link[12] = libc::IFF_UP as u8;
        let mut messages = Messages::new();
        messages.request(libc::RTM_NEWLINK, 0, &link);
        self.0.request(&messages).unwrap();
    }

    fn address(&self, name: &str, ip: &[u8], prefix: u8, peer: &[u8]) {
        let family = if ip.len() == 4 { libc::AF_INET } else { libc::AF_INET6 } as u8;
        let nodad = libc::IFA_F_NODAD as u8;
        let body = [&[family, prefix, nodad, 0][..], &self.index(name).to_ne_bytes()].concat();
        let mut messages = Messages::new();
        messages
            .request(libc::RTM_NEWADDR, Self::create(), &body)
            .put(libc::IFA_LOCAL, ip)
            .put(libc::IFA_ADDRESS, peer);
        self.0.request(&messages).unwrap();
    }

    fn route(&self, destination: &[u8], prefix: u8, gateway: &[u8], metric: u32) {
        let family = if gateway.len() == 4 { libc::AF_INET } else { libc::AF_INET6 } as u8;
        let main = libc::RT_TABLE_MAIN;
        let body = [family, prefix, 0, 0, main, libc::RTPROT_STATIC, 0, libc::RTN_UNICAST, 0, 0, 0, 0];
        let mut messages = Messages::new();
        let mut attributes = messages.request(libc::RTM_NEWROUTE, Self::create(), &body);
        if !destination.is_empty() {
            attributes.put(libc::RTA_DST, destination);
        }
        attributes.put(libc::RTA_GATEWAY, gateway).put(libc::RTA_PRIORITY, &metric.to_ne_bytes());
        drop(attributes);
        self.0.request(&messages).unwrap();
    }

    fn neighbour(&self, name: &str, ip: &[u8], mac: &[u8]) {
        let mut body = [0; 12];
        body[0] = libc::AF_INET as u8;
        body[4..8].copy_from_slice(&self.index(name).to_ne_bytes());
        body[8] = libc::NUD_PERMANENT as u8;
        let mut messages = Messages::new();
        let mut attributes = messages.request(libc::RTM_NEWNEIGH, Self::create(), &body);
        attributes.put(libc::NDA_DST, ip).put(libc::NDA_LLADDR, mac);
        drop(attributes);
        self.0.request(&messages).unwrap();
    }

    /// A socket that sends and receives frames on an interface.
    fn frames(&self, name: &str) -> File {
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: a new descriptor, checked, then owned; the address is what the call takes.
        unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, protocol.into());
            assert!(fd >= 0);
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            address.sll_ifindex = self.index(name).cast_signed();
            let size = size_of::<libc::sockaddr_ll>() as u32;
            assert_eq!(libc::bind(fd, (&raw const address).cast(), size), 0);
            File::from_raw_fd(fd)
        }
    }

    /// Names of all taps.
    fn taps(&self) -> Vec<String> {
        let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let names = text.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()));
        names.filter(|name| tap::is_ours(name)).collect()
    }
}

/// A frame of 64 bytes, and what it carries.
fn frame(to: [u8; 6], from: [u8; 6], what: u8) -> Vec<u8> {
    // The first of the two types that are free for experiments (IEEE 802).
    let mut frame = [&to[..], &from, &[0x88, 0xb5]].concat();
    frame.resize(64, what);
    frame
}

/// Sends a frame until one arrives for which `wanted` holds: interfaces that have just come up lose some.
fn cross(mut from: &File, sent: &[u8], to: &File, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
    (0..10).find_map(|_| {
        from.write_all(sent).unwrap();
        next(to, &wanted)
    })
}

/// The next frame for which `wanted` holds; `None` if there is none within some time.
fn next(mut from: &File, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
    loop {
        let patience = Timespec { tv_sec: 1, tv_nsec: 0 };
        if poll(&mut [PollFd::new(from, PollFlags::IN)], Some(&patience)).unwrap() == 0 {
            return None;
        }
        let mut buffer = vec![0; 70_000];
        let length = from.read(&mut buffer).unwrap();
        buffer.truncate(length);
        if wanted(&buffer) {
            return Some(buffer);
        }
    }
}

#[test]
fn a_namespace_with_nothing_but_loopback_has_no_network() {
    apart(|host| {
        assert!(connect(host.namespace(), Joined::None).unwrap().is_none());
        host.up("lo");
        assert!(connect(host.namespace(), Joined::Some).unwrap().is_none());
        assert!(host.taps().is_empty());
    });
}

#[test]
fn what_is_there_is_described() {
    apart(|host| {
        host.veth("eth0", "peer");
        host.up("lo");
        host.address("eth0", &[10, 0, 0, 2], 24, &[10, 0, 0, 2]);
        host.address("eth0", &[10, 9, 0, 1], 32, &[10, 9, 0, 2]);
        let six = |last| [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
        host.address("eth0", &six(2), 64, &six(2));
        host.address("peer", &[10, 0, 0, 3], 24, &[10, 0, 0, 3]);
        host.route(&[], 0, &[10, 0, 0, 1], 0);
        host.route(&[192, 168, 0, 0], 16, &[10, 0, 0, 9], 77);
        host.route(&[], 0, &six(1), 5);
        host.neighbour("eth0", &[10, 0, 0, 1], &PEER_MAC);

        let Network { description, connections, warnings } = connect(host.namespace(), Joined::None).unwrap().unwrap();
        assert!(warnings.is_empty(), "{warnings:?}");
        assert_eq!(connections.len(), 2);
        assert!(connections.iter().any(|connection| (connection.mac, connection.mtu) == (OUR_MAC, 1400)));
        let interface = description.interfaces.iter().find(|interface| interface.name == "eth0").unwrap();
        assert_eq!((&interface.mac[..], interface.mtu, interface.up), (&OUR_MAC[..], 1400, true));
        let find = |ip: &[u8]| interface.addresses.iter().find(|address| address.ip == ip).unwrap();
        assert_eq!((find(&[10, 0, 0, 2]).prefix_length, find(&[10, 0, 0, 2]).peer.len()), (24, 0));
        assert_eq!((find(&[10, 9, 0, 1]).prefix_length, &find(&[10, 9, 0, 1]).peer[..]), (32, &[10, 9, 0, 2][..]));
        assert_eq!(find(&six(2)).prefix_length, 64);
        let route = |destination: &[u8], gateway: &[u8]| {
            let mut routes = description.routes.iter();
            let route = routes.find(|route| route.destination == destination && route.gateway == gateway).unwrap();
            (route.interface.clone(), route.prefix_length, route.metric, route.kind)
        };
        let eth0 = "eth0".to_owned();
        assert_eq!(route(&[], &[10, 0, 0, 1]), (eth0.clone(), 0, 0, 1));
        assert_eq!(route(&[192, 168, 0, 0], &[10, 0, 0, 9]), (eth0.clone(), 16, 77, 1));
        assert_eq!(route(&[], &six(1)), (eth0.clone(), 0, 5, 1));
        assert_eq!(route(&[10, 0, 0, 0], &[]).0, "eth0");
        assert!(description.routes.iter().all(|route| !is_of_this_host(&route.destination)));
        assert_eq!(description.neighbours.len(), 1);
        assert_eq!(description.neighbours[0].link_address, PEER_MAC);
    });
}

fn is_of_this_host(destination: &[u8]) -> bool {
    destination.first() == Some(&127) || destination.first() == Some(&0xfe)
}

#[test]
fn frames_cross_both_ways_and_nobody_else_sees_them() {
    apart(|host| {
        host.veth("eth0", "peer");
        // The namespace's own stack would answer a question for it.
        host.address("eth0", &[10, 0, 0, 2], 24, &[10, 0, 0, 2]);
        // Only one end is the container's.
        let network = {
            let netlink = Netlink::open(None).unwrap();
            let link = scan::scan(&netlink).unwrap().links.into_iter().find(|link| link.name == "eth0").unwrap();
            Connection::new(&netlink, &link, Beside::Nobody).unwrap()
        };
        let (tap, peer) = (File::from(network.tap), host.frames("peer"));

        let question = {
            // ARP: Ethernet, IPv4; who has 10.0.0.2?
            let mut frame = [&[0xff; 6][..], &PEER_MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &PEER_MAC].concat();
            frame.extend([10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 2]);
            frame.resize(60, 0);
            frame
        };
        let is_question = |packet: &[u8]| packet.get(TAP_HEADER..).is_some_and(|frame| frame.starts_with(&question));
        assert!(cross(&peer, &question, &tap, is_question).is_some());

        let sent = frame(PEER_MAC, OUR_MAC, 5);
        assert!(cross(&tap, &[&[0; TAP_HEADER][..], &sent].concat(), &peer, |frame| frame == sent).is_some());
        let answer = |frame: &[u8]| frame.starts_with(&PEER_MAC) && frame[12..14] == [8, 6];
        assert!(next(&peer, answer).is_none(), "the namespace itself has answered");

        drop(network.rule);
        assert_eq!(host.taps().len(), 1);
        assert!(cross(&peer, &question, &peer, answer).is_some(), "the rule is still there");
        drop(tap);
        assert!(host.taps().is_empty());
    });
}

/// A datagram from 10.0.0.1 to 10.0.0.2, in its frame.
fn datagram(from: u16, to: u16, text: &[u8]) -> Vec<u8> {
    let udp = 8 + text.len() as u16;
    let mut ip =
        [&[0x45, 0][..], &(20 + udp).to_be_bytes(), &[0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]].concat();
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let ports = [from.to_be_bytes(), to.to_be_bytes(), udp.to_be_bytes(), [0, 0]].concat();
    [&OUR_MAC[..], &PEER_MAC, &[8, 0], &ip, &ports, text].concat()
}

#[test]
fn a_resolver_gets_the_answers_to_what_it_asks_and_no_more() {
    apart(|host| {
        host.veth("eth0", "peer");
        host.up("lo");
        host.address("eth0", &[10, 0, 0, 2], 24, &[10, 0, 0, 2]);
        let link = |netlink: &Netlink| scan::scan(netlink).unwrap().links.into_iter().find(|link| link.name == "eth0");
        let found = || scan::scan(&Netlink::open(None).unwrap()).unwrap().look_for_a_resolver().unwrap();
        assert_eq!(found(), Beside::Nobody);
        let _resolver = std::net::UdpSocket::bind((RESOLVER, 0)).unwrap();
        assert_eq!(found(), Beside::Resolver);
        let Network { description, .. } = connect(host.namespace(), Joined::None).unwrap().unwrap();
        assert_eq!(description.resolver, RESOLVER.octets());

        let netlink = Netlink::open(None).unwrap();
        let network = Connection::new(&netlink, &link(&netlink).unwrap(), Beside::Resolver).unwrap();
        let (tap, peer) = (File::from(network.tap), host.frames("peer"));
        // It does not choose its port.
        let asks = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        let port = asks.local_addr().unwrap().port();
        assert!((61000..=61999).contains(&port), "{port}");
        let is = |text: &'static [u8]| move |packet: &[u8]| packet.ends_with(text);
        assert!(cross(&peer, &datagram(53, 40000, b"the machine's"), &tap, is(b"the machine's")).is_some());
        assert!(cross(&peer, &datagram(54, port, b"no answer"), &tap, is(b"no answer")).is_some());
        // Interfaces are up by now.
        (&peer).write_all(&datagram(53, port, b"its own")).unwrap();
        let mut answer = [0; 64];
        asks.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
        assert_eq!(asks.recv(&mut answer).unwrap(), 7);
        assert_eq!(&answer[..7], b"its own");
        assert!(next(&tap, is(b"its own")).is_none(), "the machine has got it");
        // ARP: 10.0.0.1 is at the peer. Both are told.
        let mut told = [&OUR_MAC[..], &PEER_MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2], &PEER_MAC, &[10, 0, 0, 1]].concat();
        told.extend([&OUR_MAC[..], &[10, 0, 0, 2]].concat());
        // A question of the namespace's own brings it to listen.
        asks.send_to(b"question", "10.0.0.1:53").unwrap();
        let is_told = |packet: &[u8]| packet.get(TAP_HEADER..).is_some_and(|frame| frame.starts_with(&told));
        assert!(cross(&peer, &told, &tap, is_told).is_some());
        asks.send_to(b"another", "10.0.0.1:53").unwrap();
        assert!(next(&peer, is(b"another")).is_some(), "the namespace did not learn the address");
    });
}

/// `struct virtio_net_hdr_v1` and a TCP segment of 20 KB that is to be cut up and summed by whoever must.
fn large_packet() -> Vec<u8> {
    const LENGTH: u16 = 20_000;
    let (needs_checksum, tcp_4, headers, segment) = (1, 1, 14u16 + 20 + 20, 1340u16);
    let mut packet = vec![needs_checksum, tcp_4];
    for number in [headers, segment, 14 + 20, 16, 0] {
        packet.extend(number.to_le_bytes());
    }
    packet.extend([&PEER_MAC[..], &OUR_MAC, &[8, 0]].concat());
    let ip = LENGTH - 14;
    packet.extend([0x45, 0, (ip >> 8) as u8, ip as u8, 0, 0, 0x40, 0, 64, libc::IPPROTO_TCP as u8, 0, 0]);
    packet.extend([10, 0, 0, 2, 10, 0, 0, 1]);
    packet.extend([0x20, 0, 0x20, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    packet.resize(TAP_HEADER + usize::from(LENGTH), 0);
    packet
}

#[test]
fn large_packets_cross_in_one_piece() {
    apart(|host| {
        host.veth("eth0", "peer");
        let connections = connect(host.namespace(), Joined::None).unwrap().unwrap().connections;
        let [eth0, peer] = [OUR_MAC, PEER_MAC].map(|mac| {
            let connection = connections.iter().find(|connection| connection.mac == mac).unwrap();
            File::from(connection.tap.try_clone().unwrap())
        });
        let packet = large_packet();
        // The device does this when the guest's driver says that it takes them.
        let offloads = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
        // SAFETY: the call takes a number.
        assert_eq!(unsafe { libc::ioctl(peer.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) }, 0);
        let arrived = cross(&eth0, &packet, &peer, |arrived| arrived.len() == packet.len()).unwrap();
        assert_eq!(arrived[TAP_HEADER..], packet[TAP_HEADER..], "the frame");
        assert_eq!(arrived[..6], packet[..6], "that it is to be cut up and summed");
    });
}

#[test]
fn an_interface_is_joined_once_for_as_long_as_it_is_held() {
    apart(|host| {
        host.veth("eth0", "peer");
        let first = connect(host.namespace(), Joined::None).unwrap().unwrap();
        let Err(error) = connect(host.namespace(), Joined::None) else { panic!("joined twice") };
        assert!(matches!(&error, NetworkError::Taken(name) if name == "peer" || name == "eth0"), "{error}");
        assert_eq!(host.taps().len(), 2, "what was made in vain is gone");
        let again = connect(host.namespace(), Joined::Some).unwrap().unwrap();
        assert!(again.connections.is_empty());
        let names = |network: &Network| -> Vec<String> {
            network.description.interfaces.iter().map(|interface| interface.name.clone()).collect()
        };
        assert_eq!(names(&again), names(&first));
        host.veth("net1", "peer1");
        let Err(error) = connect(host.namespace(), Joined::Some) else { panic!("one address, two interfaces") };
        assert!(matches!(error, NetworkError::SameAddress(..)), "{error}");
        drop(first);
        assert!(host.taps().is_empty());
    });
}

#[test]
fn what_carries_no_frames_is_refused_by_name_unless_it_is_down() {
    apart(|host| {
        let file = File::options().read(true).write(true).open(tap::CLONE).unwrap();
        // SAFETY: a structure of numbers and bytes; the call takes it.
        unsafe {
            let mut request: libc::ifreq = std::mem::zeroed();
            request.ifr_name[..4].copy_from_slice(&b"tun7".map(u8::cast_signed));
            request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
            assert_eq!(libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request), 0);
        }
        assert!(connect(host.namespace(), Joined::None).unwrap().is_none());
        host.up("tun7");
        let error = connect(host.namespace(), Joined::None).err().unwrap().to_string();
        assert!(error.contains("interface tun7: it is of kind tun"), "{error}");
    });
}

#[test]
fn connections_to_addresses_that_nobody_listens_at_arrive_where_they_are_taken() {
    use std::net::{SocketAddr, TcpListener, TcpStream};

    fn taken(local: &Local, to: &str) {
        let to: SocketAddr = to.parse().unwrap();
        let stream = TcpStream::connect(to).unwrap();
        let (taken, from) = local.listeners[usize::from(to.is_ipv6())].accept().unwrap();
        assert_eq!((taken.local_addr().unwrap(), from), (to, stream.local_addr().unwrap()));
    }

    apart(|_| {
        // In a new namespace the loopback interface is taken up.
        let local = Local::open(Namespace::New).unwrap();
        assert!(local.rule.is_none());
        for to in ["127.0.0.1:80", "127.1.2.3:65535", "[::1]:80"] {
            taken(&local, to);
        }
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = server.local_addr().unwrap();
        let stream = TcpStream::connect(address).unwrap();
        assert_eq!(server.accept().unwrap().1, stream.local_addr().unwrap());
        drop(server);
        taken(&local, &address.to_string());
    });
    apart(|host| {
        host.up("lo");
        let local = Local::open(Namespace::Joined).unwrap();
        taken(&local, "127.0.0.1:80");
        drop(local.rule);
        assert!(TcpStream::connect("127.0.0.1:80").is_err(), "the rule is still there");
    });
}
