use std::os::fd::AsFd;

use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes, GuestAddress};

use super::super::test_driver::{Descriptor, Driven, NEXT, Part, WRITE, drive, drive_with, memory};
use super::*;
use crate::control::TAP_HEADER;

const ADDRESS: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const MTU: u16 = 1500;
/// As Linux does, and as a driver that knows nothing.
const MERGEABLE: u64 = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_MRG_RXBUF;
const PLAIN: u64 = 0;

/// A device, and the other end of what it takes for a tap.
fn device() -> (Net, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    (Net::with(Tap::imitated(theirs), ADDRESS, MTU).unwrap(), ours)
}

/// A packet with its header, whose bytes tell where they belong.
fn packet(length: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; TAP_HEADER];
    bytes.extend((0..length).map(|index| (index as u8).wrapping_mul(7).wrapping_add(seed)));
    bytes
}

fn from_network(network: &OwnedFd, bytes: &[u8]) {
    assert_eq!(rustix::io::write(network, bytes).unwrap(), bytes.len());
}

/// What came out, after the device has nothing more to do: it answers a last packet behind it.
fn to_network(network: &OwnedFd) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 1 << 17];
    match rustix::io::read(network, &mut bytes[..]) {
        Ok(count) => {
            bytes.truncate(count);
            Some(bytes)
        }
        Err(rustix::io::Errno::AGAIN) => None,
        Err(errno) => panic!("{errno}"),
    }
}

/// The next packet that the guest gets, and over how many buffers.
fn received(driven: &mut Driven) -> (Vec<u8>, usize) {
    let ring = &mut driven.rings[0];
    let (head, length) = ring.wait();
    let mut bytes = ring.written(head);
    bytes.truncate(length as usize);
    let count = usize::from(u16::from_le_bytes([bytes[10], bytes[11]]));
    for _ in 1..count {
        // All of a packet is there at once.
        let (head, length) = ring.take_used().expect("a buffer is missing");
        bytes.extend(&ring.written(head)[..length as usize]);
    }
    (bytes, count)
}

fn same(received: &[u8], sent: &[u8]) -> bool {
    // Without the count of buffers.
    received.len() == sent.len() && received[..10] == sent[..10] && received[12..] == sent[12..]
}

#[test]
fn the_configuration_space_has_address_and_mtu_and_the_link_is_up() {
    let (device, _network) = device();
    let mut config = [0xff; 16];
    device.read_config(0, &mut config);
    assert_eq!(config, [0x52, 0x54, 0, 1, 2, 3, 1, 0, 1, 0, 0xdc, 0x05, 0, 0, 0, 0]);
    assert_ne!(device.features() & (F_MAC | F_MTU | F_STATUS | F_MRG_RXBUF | F_CSUM), 0);
}

#[test]
fn an_address_of_a_group_or_none_and_a_tiny_mtu_are_refused() {
    let make = |mac, mtu| {
        let (socket, _) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        Net::with(Tap::imitated(socket), mac, mtu).map(drop)
    };
    assert!(matches!(make([0; 6], MTU), Err(NetError::Mac(_))));
    assert!(matches!(make([0xff; 6], MTU), Err(NetError::Mac(_))));
    assert!(matches!(make([1, 0, 0, 0, 0, 1], MTU), Err(NetError::Mac(_))));
    assert!(matches!(make(ADDRESS, 67), Err(NetError::Mtu(67))));
    assert!(make(ADDRESS, 68).is_ok());
}

#[test]
fn what_is_no_tap_is_refused() {
    let (socket, _other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    assert!(matches!(Net::new(socket, ADDRESS, MTU), Err(NetError::Ask(..))));
}

#[test]
fn packets_reach_the_guest_in_order_one_in_each_buffer() {
    for features in [PLAIN, MERGEABLE] {
        let (mut device, network) = device();
        let mut driven = drive_with(&mut device, features, false);
        for seed in 0..10 {
            from_network(&network, &packet(60 + usize::from(seed), seed));
            driven.rings[0].offer(&[Part::In(TAP_HEADER), Part::In(1600)]);
        }
        driven.rings[0].kick();
        for seed in 0..10 {
            let (bytes, buffers) = received(&mut driven);
            assert!(same(&bytes, &packet(60 + usize::from(seed), seed)), "{seed}");
            assert_eq!(buffers, 1);
        }
    }
}

#[test]
fn a_long_packet_is_spread_over_buffers_and_the_next_ones_need_no_copy() {
    let (mut device, network) = device();
    let mut driven = drive_with(&mut device, MERGEABLE, true);
    for length in [60, 65_000, 65_535, 3000, 14, LONGEST_FRAME] {
        let sent = packet(length, 3);
        for _ in 0..(length + TAP_HEADER).div_ceil(1500) {
            driven.rings[0].offer(&[Part::In(1500)]);
        }
        driven.rings[0].kick();
        from_network(&network, &sent);
        let (bytes, buffers) = received(&mut driven);
        assert!(same(&bytes, &sent), "{length}");
        assert_eq!(buffers, sent.len().div_ceil(1500));
    }
}

#[test]
fn a_packet_longer_than_there_are_buffers_waits_for_more_of_them() {
    let (mut device, network) = device();
    let mut driven = drive_with(&mut device, MERGEABLE, false);
    driven.rings[0].offer(&[Part::In(1000)]);
    driven.rings[0].kick();
    from_network(&network, &packet(9000, 1));
    from_network(&network, &packet(20, 2));
    for count in [3, 3, 4] {
        assert_eq!(driven.rings[0].take_used(), None);
        for _ in 0..count {
            driven.rings[0].offer(&[Part::In(1000)]);
        }
        driven.rings[0].kick();
    }
    let (bytes, buffers) = received(&mut driven);
    assert!(same(&bytes, &packet(9000, 1)));
    assert_eq!(buffers, 10);
    let (bytes, buffers) = received(&mut driven);
    assert!(same(&bytes, &packet(20, 2)));
    assert_eq!(buffers, 1);
}

#[test]
fn without_buffers_nothing_is_taken_and_nothing_is_watched() {
    let (network, tap) = {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    };
    from_network(&network, &packet(100, 0));
    let tap = Tap::imitated(tap);
    let memory = memory(1 << 20);
    let queue = super::super::test_driver::empty_queue(memory, 16);
    let mut receive = Receive::new(queue, true, LONGEST_FRAME);
    assert_eq!(receive.serve(&tap).unwrap(), Wait::Buffers);
    // The packet is still there.
    let mut bytes = [0; 200];
    assert_eq!(rustix::io::read(tap.as_fd(), &mut bytes).unwrap(), TAP_HEADER + 100);
}

#[test]
fn packets_that_are_too_long_or_have_no_buffer_of_their_size_are_dropped() {
    let (mut device, network) = device();
    let mut driven = drive_with(&mut device, PLAIN, false);
    for _ in 0..3 {
        driven.rings[0].offer(&[Part::In(800)]);
    }
    driven.rings[0].offer(&[Part::In(4000)]);
    driven.rings[0].kick();
    // Longer than its buffer; nothing but half a header; longer than a frame may be.
    for length in [1000, usize::from(MTU) + LINK_HEADER + 1] {
        from_network(&network, &packet(length, 1));
    }
    from_network(&network, &[0; 11]);
    for seed in 2..5 {
        from_network(&network, &packet(500, seed));
    }
    from_network(&network, &packet(usize::from(MTU) + LINK_HEADER + 1, 5));
    from_network(&network, &packet(usize::from(MTU) + LINK_HEADER, 6));
    for seed in 2..5 {
        assert!(same(&received(&mut driven).0, &packet(500, seed)), "{seed}");
    }
    assert!(same(&received(&mut driven).0, &packet(usize::from(MTU) + LINK_HEADER, 6)));
}

#[test]
fn packets_of_the_guest_leave_as_they_are_however_they_are_cut() {
    let (mut device, network) = device();
    let mut driven = drive(&mut device);
    let ring = &mut driven.rings[1];
    let whole = packet(1400, 9);
    for cut in [1, 5, 12, 13, 700] {
        let (head, tail) = whole.split_at(cut);
        assert_eq!(ring.request(&[Part::Out(head.into()), Part::Out(tail.into())]), (0, vec![]));
        assert_eq!(to_network(&network).unwrap(), whole);
    }
    // As long as one may be that is segmented on the way.
    let mut segments = packet(LONGEST_FRAME, 1);
    segments[1] = 1;
    ring.request(&[Part::Out(segments.clone())]);
    assert_eq!(to_network(&network).unwrap(), segments);
}

#[test]
fn packets_of_a_length_that_none_may_have_go_nowhere() {
    let (mut device, network) = device();
    let mut driven = drive(&mut device);
    let ring = &mut driven.rings[1];
    let mut long = packet(LONGEST_FRAME + 1, 1);
    long[1] = 4;
    for bad in [vec![], vec![0; 11], packet(0, 0), packet(13, 0), packet(usize::from(MTU) + LINK_HEADER + 1, 0), long] {
        ring.request(&[Part::Out(bad)]);
    }
    // What is to be written is none of ours.
    assert_eq!(ring.request(&[Part::In(100)]).0, 0);
    assert_eq!(to_network(&network), None);
    ring.request(&[Part::Out(packet(14, 0)), Part::In(4)]);
    assert_eq!(to_network(&network).unwrap(), packet(14, 0));
}

#[test]
fn a_network_that_takes_nothing_does_not_hold_the_guest_up() {
    let (mut device, network) = device();
    let mut driven = drive(&mut device);
    for _ in 0..600 {
        driven.rings[1].request(&[Part::Out(packet(1400, 0))]);
    }
    let mut taken = 0;
    while to_network(&network).is_some() {
        taken += 1;
    }
    assert!((1..600).contains(&taken), "{taken}");
}

#[test]
fn a_stopped_device_has_given_its_empty_buffers_back_and_goes_on() {
    let (mut device, network) = device();
    let mut driven = drive_with(&mut device, MERGEABLE, false);
    for _ in 0..8 {
        driven.rings[0].offer(&[Part::In(1000)]);
    }
    driven.rings[0].kick();
    from_network(&network, &packet(1500, 1));
    assert!(same(&received(&mut driven).0, &packet(1500, 1)));
    let worker = driven.stop();
    assert_eq!(worker.queues()[0].unwrap().state().next_avail, 2);
    assert_eq!(worker.queues()[0].unwrap().state().next_used, 2);
    from_network(&network, &packet(5000, 2));
    driven.run_on(worker);
    assert!(same(&received(&mut driven).0, &packet(5000, 2)));

    // One that waited for buffers is lost, its buffers are not.
    from_network(&network, &packet(60_000, 3));
    driven.rings[1].request(&[Part::Out(packet(14, 0))]);
    let worker = driven.stop();
    assert_eq!(worker.queues()[0].unwrap().state().next_avail, 8);
    driven.run_on(worker);
}

#[test]
fn a_tap_that_is_gone_is_a_pulled_cable() {
    let (mut device, network) = device();
    let mut driven = drive(&mut device);
    drop(network);
    driven.wait_config();
    let mut status = [0xff; 2];
    device.read_config(6, &mut status);
    assert_eq!(status, [0, 0]);
    // What is sent goes nowhere, and receiving is over.
    driven.rings[1].request(&[Part::Out(packet(100, 0))]);
    driven.rings[0].offer(&[Part::In(2000)]);
    driven.rings[0].kick();
    driven.rings[1].request(&[Part::Out(packet(100, 0))]);
    assert_eq!(driven.rings[0].take_used(), None);

    let state = device.save();
    assert_eq!(state.0, br#"{"link_up":false}"#);
    let (mut other, _network) = self::device();
    other.restore(&state).unwrap();
    assert_eq!(other.save(), state);
    assert!(other.restore(&DeviceState(b"{}".into())).is_err());
    let worker = driven.stop();
    driven.run_on(worker);
    driven.rings[1].request(&[Part::Out(packet(100, 0))]);
}

#[test]
fn a_receive_buffer_that_holds_no_header_breaks_a_rule() {
    for parts in [vec![Part::In(11)], vec![Part::Out(vec![0; 2000])]] {
        let (mut device, network) = device();
        let mut driven = drive_with(&mut device, MERGEABLE, false);
        driven.rings[0].offer(&parts);
        driven.rings[0].kick();
        from_network(&network, &packet(100, 0));
        assert!(matches!(driven.broken(), Broken::Request(_)));
    }
}

#[test]
fn the_driver_is_interrupted_only_as_often_as_it_asks() {
    let (mut device, network) = device();
    let mut driven = drive_with(&mut device, MERGEABLE, true);
    for _ in 0..8 {
        driven.rings[0].offer(&[Part::In(2000)]);
    }
    driven.rings[0].want_interrupt_after(3);
    driven.rings[0].kick();
    for seed in 0..3 {
        from_network(&network, &packet(100, seed));
        driven.rings[1].request(&[Part::Out(packet(14, 0))]);
        assert!(!driven.rings[0].interrupted(), "{seed}");
    }
    from_network(&network, &packet(100, 3));
    assert!(driven.rings[0].wait_interrupt());
    for seed in 0..4 {
        assert!(same(&received(&mut driven).0, &packet(100, seed)));
    }
}

#[test]
fn offloads_are_those_that_the_driver_takes() {
    assert_eq!(tap::offloads(0), 0);
    assert_eq!(tap::offloads(F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN), 0);
    assert_eq!(tap::offloads(F_GUEST_CSUM | F_GUEST_ECN), 1);
    assert_eq!(tap::offloads(F_GUEST_CSUM | F_GUEST_TSO4), 3);
    assert_eq!(tap::offloads(F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN), 15);
}

/// Of the host's kernel, in a network namespace of the test's own.
mod with_a_tap {
    use super::*;
    use rustix::fs::{Mode, OFlags, open};
    use std::os::fd::AsRawFd;

    /// The tap, opened as the runtime does; `None` where that may not be done.
    fn tap(flags: u16, header: libc::c_int, status: OFlags) -> Option<OwnedFd> {
        // SAFETY: of this thread alone, which ends with the test.
        let unshared = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
        let file = open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC | status, Mode::empty());
        let (Ok(()), Ok(file)) = (unshared, file) else {
            eprintln!("skipped: not root, or no /dev/net/tun");
            return None;
        };
        // SAFETY: ifreq is plain numbers, for which zero is a value; the kernel reads it, and a number.
        unsafe {
            let mut request: libc::ifreq = std::mem::zeroed();
            request.ifr_name[..4].copy_from_slice(&b"tap0".map(|byte| byte as libc::c_char));
            request.ifr_ifru.ifru_flags = flags as libc::c_short;
            assert_eq!(libc::ioctl(file.as_raw_fd(), 0x4004_54ca, &raw mut request), 0, "TUNSETIFF");
            if header != 0 {
                assert_eq!(libc::ioctl(file.as_raw_fd(), 0x4004_54d8, &raw const header), 0, "TUNSETVNETHDRSZ");
            }
        }
        Some(file)
    }

    const FLAGS: u16 = 0x5002;

    /// Sends and receives on the interface; it is up.
    fn network() -> OwnedFd {
        // SAFETY: plain system calls; the kernel reads the structures, which are of the given sizes and zero where not set.
        unsafe {
            let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
            assert!(socket >= 0);
            let socket = <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(socket);
            let mut request: libc::ifreq = std::mem::zeroed();
            request.ifr_name[..4].copy_from_slice(&b"tap0".map(|byte| byte as libc::c_char));
            request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
            assert_eq!(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request), 0);
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = 0x0300u16;
            address.sll_ifindex = libc::if_nametoindex(c"tap0".as_ptr()) as i32;
            let size = size_of_val(&address) as u32;
            assert_eq!(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size), 0);
            socket
        }
    }

    #[test]
    fn frames_go_both_ways_and_its_end_is_noticed() {
        let Some(fd) = tap(FLAGS, 12, OFlags::NONBLOCK) else { return };
        let network = network();
        let again = fd.try_clone().unwrap();
        let mut device = Net::new(fd, ADDRESS, MTU).unwrap();
        let features = device.features();
        let mut driven = drive_with(&mut device, features, true);
        for _ in 0..64 {
            driven.rings[0].offer(&[Part::In(1536)]);
        }
        driven.rings[0].kick();
        // To a station that is not the host's, of a type that nobody handles.
        let mut frame = vec![0x02; 12];
        frame.extend([0x88, 0xb5]);
        frame.resize(700, 0x5a);
        assert_eq!(rustix::io::write(&network, &frame).unwrap(), frame.len());
        let mut arrived = false;
        for _ in 0..20 {
            // Among what IPv6 says of itself.
            let (bytes, buffers) = received(&mut driven);
            arrived = bytes[TAP_HEADER..] == frame[..] && buffers == 1;
            if arrived {
                break;
            }
        }
        assert!(arrived);

        frame[0] = 0xff;
        frame.fill(0xff);
        frame[12..14].copy_from_slice(&[0x88, 0xb6]);
        driven.rings[1].request(&[Part::Out([vec![0; TAP_HEADER], frame.clone()].concat())]);
        let mut bytes = [0; 2000];
        let echoed = (0..20).any(|_| {
            let count = rustix::io::read(&network, &mut bytes[..]).unwrap();
            bytes[..count] == frame[..]
        });
        assert!(echoed);

        // SAFETY: the call takes a number.
        let removed = unsafe { libc::ioctl(again.as_raw_fd(), 0x4004_54cb, 0) };
        assert_eq!(removed, 0, "TUNSETPERSIST");
        remove_interface();
        driven.wait_config();
        driven.rings[1].request(&[Part::Out(packet(100, 0))]);
    }

    /// `RTM_DELLINK` of `tap0`.
    fn remove_interface() {
        // SAFETY: plain system calls on structures of the given sizes.
        unsafe {
            let socket = libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE);
            let mut message = [0u8; 32];
            message[0] = 32;
            message[4..6].copy_from_slice(&libc::RTM_DELLINK.to_ne_bytes());
            message[6..8].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
            message[20..24].copy_from_slice(&libc::if_nametoindex(c"tap0".as_ptr()).to_ne_bytes());
            assert_eq!(libc::send(socket, message.as_ptr().cast(), message.len(), 0), 32);
            libc::close(socket);
        }
    }

    #[test]
    fn one_that_was_opened_otherwise_is_refused() {
        for (flags, header, status) in
            [(0x5001, 12, OFlags::NONBLOCK), (FLAGS, 10, OFlags::NONBLOCK), (FLAGS, 12, OFlags::empty())]
        {
            let Some(fd) = tap(flags, header, status) else { return };
            assert!(matches!(Net::new(fd, ADDRESS, MTU), Err(NetError::Tap(_))), "{flags:x} {header} {status:?}");
        }
        let Some(fd) = tap(0x1002, 0, OFlags::NONBLOCK) else { return };
        assert!(matches!(Net::new(fd, ADDRESS, MTU), Err(NetError::Tap(_))));
    }
}

/// A descriptor of a hostile driver: where, how long, which flags, what comes next.
fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        4 => 0x10_0000u64..0x11_0000,
        1 => Just(16 * (1 << 20) - 50),
        1 => Just(u64::MAX - 10),
        1 => Just(1 << 40),
    ];
    let length = prop_oneof![4 => 0u32..4000, 1 => 0u32..14, 1 => Just(u32::MAX), 1 => Just(1 << 20)];
    let flags =
        prop_oneof![3 => Just(WRITE), 2 => Just(WRITE | NEXT), 2 => Just(0u16), 1 => Just(NEXT), 1 => any::<u16>()];
    (address, length, flags, 0u16..4).prop_map(|(address, length, flags, next)| Descriptor {
        address,
        length,
        flags,
        next,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// The buffers lie between two guards, which nothing may touch; what leaves is no longer than a packet may be; and the
    /// device is still there, or has said which rule was broken.
    #[test]
    fn whatever_the_driver_offers_only_its_buffers_are_written(
        receive in prop::collection::vec(prop::collection::vec(descriptor(), 1..4), 0..12),
        transmit in prop::collection::vec(prop::collection::vec(descriptor(), 1..4), 0..12),
        packets in prop::collection::vec(0usize..9000, 0..12),
        mergeable in any::<bool>(),
        event_idx in any::<bool>(),
    ) {
        const GUARDS: [u64; 2] = [0xf_f000, 0x12_0000];
        let (mut device, network) = device();
        let mut driven = drive_with(&mut device, if mergeable { MERGEABLE } else { PLAIN }, event_idx);
        for guard in GUARDS {
            driven.memory.write_slice(&[0xa5; 0x1000], GuestAddress(guard)).unwrap();
        }
        for (ring, chains) in [(0, &receive), (1, &transmit)] {
            for chain in chains {
                // What goes beyond the guards is not meant here: rings lie there.
                let chain: Vec<_> = chain.iter().map(|d| Descriptor { length: if d.address < 0x12_0000 { d.length.min(0x8000) } else { d.length }, ..*d }).collect();
                driven.rings[ring].offer_descriptors(&chain);
            }
            driven.rings[ring].kick();
        }
        for (seed, length) in packets.iter().enumerate() {
            let _ = rustix::io::write(&network, &packet(*length, seed as u8));
        }
        let worker = driven.stop_after(std::time::Duration::from_millis(20));
        for guard in GUARDS {
            let mut bytes = [0; 0x1000];
            driven.memory.read_slice(&mut bytes, GuestAddress(guard)).unwrap();
            prop_assert!(bytes.iter().all(|byte| *byte == 0xa5));
        }
        while let Some(sent) = to_network(&network) {
            prop_assert!((TAP_HEADER + 14..=TAP_HEADER + LONGEST_FRAME).contains(&sent.len()));
        }
        if let Some(worker) = worker {
            // All that was not used is in the ring again.
            let state = worker.queues()[0].unwrap().state();
            prop_assert_eq!(state.next_avail, state.next_used);
        }
    }
}
