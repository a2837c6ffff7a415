//! The same with scripts and packets that nobody thought of.

use std::io::{Read, Write};
use std::net::Shutdown as Half;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::super::driver::{Driver, Given, Guest, Ports, READY_PORT, packet};
use super::super::packet::{Header, Op, Shutdown};
use super::{MIB, PORT, connected, guest, pattern};

/// One thing that happens to one of the connections.
#[derive(Debug, Clone)]
enum Happens {
    HostWrites(usize),
    HostReads(usize),
    HostEnds,
    GuestWrites { count: usize, size: usize },
    GuestReads,
    GuestEnds,
    Hold,
    Release,
    Pause,
    Idle,
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        6 => (1usize..300_000).prop_map(Happens::HostWrites),
        4 => (1usize..300_000).prop_map(Happens::HostReads),
        1 => Just(Happens::HostEnds),
        6 => (1usize..300_000, prop_oneof![1usize..100, 1000usize..=65_536])
            .prop_map(|(count, size)| Happens::GuestWrites { count: count.min(60 * size), size }),
        4 => Just(Happens::GuestReads),
        1 => Just(Happens::GuestEnds),
        1 => Just(Happens::Hold),
        2 => Just(Happens::Release),
        1 => Just(Happens::Pause),
        3 => Just(Happens::Idle),
    ]
}

/// What went into and came out of both ends of a connection.
struct Ends {
    stream: UnixStream,
    ports: Ports,
    host_wrote: usize,
    host_ended: bool,
    host_read: Vec<u8>,
    guest_wrote: usize,
    guest_ended: bool,
    guest_read: Vec<u8>,
}

impl Ends {
    fn host_writes(&mut self, data: &[u8], count: usize) {
        let end = (self.host_wrote + count).min(data.len());
        while !self.host_ended && self.host_wrote < end {
            match self.stream.write(&data[self.host_wrote..end]) {
                Ok(count) => self.host_wrote += count,
                Err(error) => return assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
            }
        }
    }

    /// False at the end.
    fn host_reads(&mut self, count: usize) -> bool {
        let mut bytes = vec![0; count];
        match self.stream.read(&mut bytes) {
            Ok(count) => {
                self.host_read.extend(&bytes[..count]);
                count > 0
            }
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                true
            }
        }
    }

    fn host_ends(&mut self) {
        self.host_ended = true;
        self.stream.shutdown(Half::Write).unwrap();
    }

    fn guest_writes(&mut self, guest: &mut Guest, data: &[u8], count: usize, size: usize) {
        if !self.guest_ended {
            let end = (self.guest_wrote + count).min(data.len());
            self.guest_wrote += guest.write_some(self.ports, &data[self.guest_wrote..end], size);
        }
    }

    fn guest_ends(&mut self, guest: &mut Guest) {
        if !std::mem::replace(&mut self.guest_ended, true) {
            guest.shut_down(self.ports, Shutdown { send: true, receive: false });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_order_of_things_all_bytes_arrive_and_then_the_end(
        event_idx in any::<bool>(),
        script in prop::collection::vec((0usize..3, happens()), 1..80),
    ) {
        let mut guest = Guest::new(Driver::start(Given { event_idx, ..Given::default() }), &[PORT]);
        let data = pattern(MIB, 7);
        let mut all: Vec<_> = (0..3).map(|_| {
            let (stream, ports) = connected(&mut guest);
            stream.set_nonblocking(true).unwrap();
            Ends {
                stream,
                ports,
                host_wrote: 0,
                host_ended: false,
                host_read: Vec::new(),
                guest_wrote: 0,
                guest_ended: false,
                guest_read: Vec::new(),
            }
        }).collect();
        for (which, what) in script {
            let ends = &mut all[which];
            match what {
                Happens::HostWrites(count) => ends.host_writes(&data, count),
                Happens::HostReads(count) => drop(ends.host_reads(count)),
                Happens::HostEnds => ends.host_ends(),
                Happens::GuestWrites { count, size } => ends.guest_writes(&mut guest, &data, count, size),
                Happens::GuestReads => ends.guest_read.extend(guest.read(ends.ports)),
                Happens::GuestEnds => ends.guest_ends(&mut guest),
                Happens::Hold => guest.driver.hold = true,
                Happens::Release => guest.driver.release(),
                Happens::Pause => guest.driver.pause(|| {}),
                Happens::Idle => guest.idle(Duration::from_millis(1)),
            }
        }
        guest.driver.release();
        for ends in &mut all {
            ends.host_ends();
            ends.guest_ends(&mut guest);
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut open = vec![true; all.len()];
        while open.contains(&true) || all.iter().any(|ends| !guest.sockets[&ends.ports].host.send) {
            assert!(Instant::now() < deadline, "an end did not arrive");
            for (ends, open) in all.iter_mut().zip(&mut open) {
                *open = *open && ends.host_reads(MIB);
                ends.guest_read.extend(guest.read(ends.ports));
            }
            guest.idle(Duration::from_millis(1));
        }
        for ends in &mut all {
            ends.guest_read.extend(guest.read(ends.ports));
            prop_assert!(ends.guest_read == data[..ends.host_wrote]);
            prop_assert!(ends.host_read == data[..ends.guest_wrote]);
        }
        guest.driver.stop();
    }
}

/// A packet that is right in most of its fields.
fn nearly_right(port: u32) -> impl Strategy<Value = Vec<u8>> {
    let op = prop_oneof![8 => 1u16..=7, 1 => any::<u16>()];
    let kind = prop_oneof![20 => Just(1u16), 1 => any::<u16>()];
    let dst_port = prop_oneof![8 => Just(port), 2 => Just(READY_PORT), 1 => any::<u32>()];
    let cid = prop_oneof![20 => Just(2u64), 1 => any::<u64>()];
    let count = prop_oneof![4 => 0usize..64, 1 => 60_000usize..=65_536];
    let credit = (prop_oneof![Just(0u32), Just(1 << 18), any::<u32>()], any::<u32>());
    (op, kind, dst_port, cid, count, any::<u32>(), credit).prop_map(
        move |(op, kind, dst_port, dst_cid, count, flags, (buf_alloc, fwd_cnt))| {
            let header = Header {
                op,
                kind,
                dst_port,
                dst_cid,
                flags,
                buf_alloc,
                fwd_cnt,
                len: count as u32,
                ..packet(Op::Request, PORT, port)
            };
            [&header.to_bytes()[..], &vec![0xa5; count]].concat()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_break_the_device_or_leave_it_working(
        packets in prop::collection::vec(
            prop_oneof![9 => nearly_right(1 << 30), 1 => prop::collection::vec(any::<u8>(), 1..200)],
            1..40,
        )
    ) {
        let mut guest = guest();
        let (ours, _) = connected(&mut guest);
        ours.set_nonblocking(true).unwrap();
        (&ours).write_all(&[1; 10_000]).unwrap();
        for bytes in &packets {
            guest.driver.try_send(bytes);
            let _ = (&ours).read(&mut [0; 100]);
        }
        if !guest.driver.settle_down() {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            guest.driver.handle().connect(theirs.into(), PORT);
            let request = loop {
                let (header, _) = guest.driver.receive();
                if header.op() == Some(Op::Request) && header.src_port != 1 << 30 {
                    break header;
                }
            };
            guest.driver.send(packet(Op::Response, PORT, request.src_port), &[]);
            guest.driver.send(Header { len: 2, ..packet(Op::ReadWrite, PORT, request.src_port) }, b"ok");
            ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let mut bytes = [0; 2];
            ours.read_exact(&mut bytes).unwrap();
            prop_assert_eq!(&bytes, b"ok");
        }
        // A thread that panicked would not give its worker back.
        guest.driver.stop();
    }
}
