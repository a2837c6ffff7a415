//! The device as a whole: its thread, real sockets, and a guest that keeps the rules or breaks them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown as Half;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use super::driver::{AGENT_PORT, Driver, Given, Guest, Ports, READY_PORT, packet};
use super::packet::{HEADER_LENGTH, Header, Op, Shutdown};
use crate::virtio::Device;

mod properties;

const PORT: u32 = 1025;
const MIB: usize = 1 << 20;

/// Bytes that say where they stand.
fn pattern(count: usize, seed: usize) -> Vec<u8> {
    (0..count).map(|i| ((i + seed).wrapping_mul(2_654_435_761) >> 11) as u8).collect()
}

fn guest() -> Guest {
    Guest::new(Driver::start(Given::default()), &[PORT])
}

/// A connection to the guest: the host's end, and the guest's ports.
fn connected(guest: &mut Guest) -> (UnixStream, Ports) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    guest.driver.handle().connect(theirs.into(), PORT);
    (ours, guest.accept())
}

/// A socket file that vanishes with the test.
struct Listening {
    path: std::path::PathBuf,
}

impl Listening {
    fn new(name: &str) -> (Self, UnixListener) {
        let path = std::env::temp_dir().join(format!("podhull-vsock-{}-{name}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        (Self { path }, listener)
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn assert_closed(mut stream: &UnixStream) {
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn the_guest_reads_its_address() {
    let driver = Driver::start(Given::default());
    let mut whole = [0xff; 10];
    driver.device.read_config(0, &mut whole);
    assert_eq!(whole, [3, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]);
    let mut high = [0xff; 4];
    driver.device.read_config(4, &mut high);
    assert_eq!(high, [0; 4]);
    driver.device.read_config(8, &mut high);
    driver.device.read_config(u64::MAX, &mut high);
    assert_eq!(driver.device.features(), 0);
}

#[test]
fn the_ready_port_refuses_signals_and_opens_the_agent_channel_with_what_was_written_before() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.write_all(b"early").unwrap();
    let driver = Driver::start(Given { agent: Some(theirs.into()), ..Given::default() });
    let mut guest = Guest::new(driver, &[AGENT_PORT]);
    guest.idle(Duration::from_millis(50));
    assert!(guest.sockets.is_empty());
    assert!(guest.driver.ready.read().is_err());

    guest.driver.send(packet(Op::Request, 5000, READY_PORT), &[]);
    let (answer, _) = guest.driver.receive();
    assert_eq!((answer.op(), answer.src_port, answer.dst_port), (Some(Op::Reset), READY_PORT, 5000));
    let ports = guest.accept();
    assert_eq!(ports.0, AGENT_PORT);
    assert_eq!(guest.driver.ready.read().unwrap(), 1);
    assert_eq!(guest.read_exact(ports, 5), b"early");
    guest.write(ports, b"answer", 64);
    let mut answer = [0; 6];
    ours.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");

    // Asking again is refused and changes nothing.
    guest.driver.send(packet(Op::Request, 5001, READY_PORT), &[]);
    assert_eq!(guest.driver.receive().0.op(), Some(Op::Reset));
    assert!(guest.driver.ready.read().is_err());
}

#[test]
fn a_client_is_told_ok_with_the_port_of_the_host_before_any_byte_of_the_guest() {
    let (path, listener) = Listening::new("ok");
    let driver = Driver::start(Given { listener: Some(listener.into()), ..Given::default() });
    let mut guest = Guest::new(driver, &[PORT]);
    let mut client = path.connect();
    // In pieces, and with bytes for the guest right behind.
    client.write_all(b"CONN").unwrap();
    guest.idle(Duration::from_millis(20));
    client.write_all(format!("ECT {PORT}\nhello").as_bytes()).unwrap();
    let ports = guest.accept();
    guest.write(ports, b"hi\n", 64);
    assert_eq!(guest.read_exact(ports, 5), b"hello");
    let mut lines = BufReader::new(client).lines();
    assert_eq!(lines.next().unwrap().unwrap(), format!("OK {}", ports.1));
    assert_eq!(lines.next().unwrap().unwrap(), "hi");
}

#[test]
fn a_client_that_the_guest_refuses_or_that_talks_nonsense_is_closed() {
    let (path, listener) = Listening::new("refused");
    let driver = Driver::start(Given { listener: Some(listener.into()), ..Given::default() });
    let mut guest = Guest::new(driver, &[PORT]);
    let (mut refused, mut nonsense) = (path.connect(), path.connect());
    nonsense.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    assert_closed(&nonsense);
    refused.write_all(b"CONNECT 9\n").unwrap();
    guest.idle(Duration::from_millis(200));
    assert_closed(&refused);
}

#[test]
fn silent_clients_are_bounded_and_end_at_their_deadline_so_that_others_get_on() {
    let (path, listener) = Listening::new("silent");
    let driver = Driver::start(Given { listener: Some(listener.into()), ..Given::default() });
    let mut guest = Guest::new(driver, &[PORT]);
    let silent: Vec<_> = (0..80).map(|_| path.connect()).collect();
    let mut client = path.connect();
    client.write_all(format!("CONNECT {PORT}\n").as_bytes()).unwrap();
    let began = Instant::now();
    guest.accept();
    assert!(began.elapsed() > Duration::from_secs(1), "it waited behind the silent ones");
    assert_closed(&silent[0]);
}

fn echo(event_idx: bool, size: usize) {
    let driver = Driver::start(Given { event_idx, ..Given::default() });
    let mut guest = Guest::new(driver, &[PORT]);
    let (ours, ports) = connected(&mut guest);
    let data = pattern(10 * MIB, 1);
    let (expected, mut writing) = (data.clone(), ours.try_clone().unwrap());
    let writer = thread::spawn(move || {
        writing.write_all(&data).unwrap();
        writing.shutdown(Half::Write).unwrap();
    });
    let reader = thread::spawn(move || {
        let mut back = Vec::new();
        (&ours).read_to_end(&mut back).unwrap();
        (back, ours)
    });
    let (mut pending, mut done) = (Vec::new(), 0);
    while done < 10 * MIB {
        guest.until("bytes or credit", |guest| {
            !guest.sockets[&ports].received.is_empty() || !pending.is_empty() && guest.credit(ports) > 0
        });
        if pending.len() < MIB {
            pending.extend(guest.read(ports));
        }
        let count = guest.write_some(ports, &pending, size);
        pending.drain(..count);
        done += count;
    }
    guest.until("the end", |guest| guest.sockets[&ports].host.send);
    guest.shut_down(ports, Shutdown { send: true, receive: false });
    let (back, ours) = reader.join().unwrap();
    writer.join().unwrap();
    assert!(back == expected, "{} bytes came back changed", back.len());
    drop(ours);
    guest.until("the host to leave", |guest| guest.sockets[&ports].host == Shutdown::BOTH);
}

#[test]
fn ten_mebibytes_come_back_as_they_went() {
    echo(true, 64 * 1024);
}

#[test]
fn ten_mebibytes_come_back_without_event_indices_and_in_small_packets() {
    echo(false, 1000);
}

#[test]
fn a_peer_that_closes_is_seen_by_the_guest_after_all_its_bytes() {
    let mut guest = guest();
    let (mut ours, ports) = connected(&mut guest);
    ours.write_all(b"last words").unwrap();
    drop(ours);
    guest.until("the end", |guest| guest.sockets[&ports].host == Shutdown::BOTH);
    assert_eq!(guest.read(ports), b"last words");
    // The guest answers with a reset, and the host has forgotten the connection.
    guest.driver.send(packet(Op::Reset, ports.0, ports.1), &[]);
    guest.driver.send(packet(Op::CreditRequest, ports.0, ports.1), &[]);
    assert_eq!(guest.driver.receive().0.op(), Some(Op::Reset));
}

#[test]
fn a_peer_that_closed_before_the_guest_accepted_still_delivers() {
    let mut guest = guest();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.write_all(b"fire and forget").unwrap();
    drop(ours);
    guest.driver.handle().connect(theirs.into(), PORT);
    let ports = guest.accept();
    guest.until("the end", |guest| guest.sockets[&ports].host == Shutdown::BOTH);
    assert_eq!(guest.read(ports), b"fire and forget");
}

#[test]
fn each_half_closes_alone_and_the_other_goes_on() {
    let mut guest = guest();
    let (mut ours, ports) = connected(&mut guest);
    ours.shutdown(Half::Write).unwrap();
    guest.until("the end", |guest| guest.sockets[&ports].host.send);
    assert!(!guest.sockets[&ports].host.receive);
    guest.write(ports, b"still here", 64);
    let mut bytes = [0; 10];
    ours.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"still here");

    let (mut ours, ports) = connected(&mut guest);
    guest.write(ports, b"bye", 64);
    guest.shut_down(ports, Shutdown { send: true, receive: false });
    let mut bytes = Vec::new();
    ours.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"bye");
    ours.write_all(b"one more thing").unwrap();
    assert_eq!(guest.read_exact(ports, 14), b"one more thing");

    let (mut ours, ports) = connected(&mut guest);
    guest.shut_down(ports, Shutdown { receive: true, send: false });
    guest.driver.flush();
    guest.idle(Duration::from_millis(50));
    assert_eq!(ours.write_all(b"unwanted").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    guest.write(ports, b"but hear this", 64);
    let mut bytes = [0; 13];
    ours.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"but hear this");
}

#[test]
fn a_peer_that_stops_reading_is_told_to_the_guest_while_it_still_sends() {
    let mut guest = guest();
    let (mut ours, ports) = connected(&mut guest);
    ours.shutdown(Half::Read).unwrap();
    guest.write(ports, b"unwanted", 64);
    guest.until("the end", |guest| guest.sockets[&ports].host.receive);
    assert!(!guest.sockets[&ports].host.send);
    ours.write_all(b"but hear this").unwrap();
    assert_eq!(guest.read_exact(ports, 13), b"but hear this");
}

#[test]
fn what_the_guest_sent_before_it_closed_reaches_a_slow_peer_whole_and_then_the_end() {
    for end in [Op::Shutdown, Op::Reset] {
        let mut guest = guest();
        let (mut ours, ports) = connected(&mut guest);
        // More than the guest takes stays unread; the peer must see an end and no error nonetheless.
        fill(&mut guest, &ours);
        ours.set_nonblocking(false).unwrap();
        let data = pattern(2 * MIB, 2);
        let sent = guest.write_some(ports, &data, 60_000);
        guest.idle(Duration::from_millis(100));
        let sent = sent + guest.write_some(ports, &data[sent..], 60_000);
        assert!(sent > 256 * 1024, "more than the socket took: {sent}");
        match end {
            Op::Reset => guest.driver.send(packet(Op::Reset, ports.0, ports.1), &[]),
            _ => guest.shut_down(ports, Shutdown::BOTH),
        }
        guest.driver.flush();
        guest.idle(Duration::from_millis(50));
        assert!(!guest.sockets[&ports].reset, "not before the bytes have gone");
        let mut received = Vec::new();
        ours.read_to_end(&mut received).unwrap();
        assert!(received == data[..sent]);
        if end == Op::Shutdown {
            guest.until("the reset", |guest| guest.sockets[&ports].reset);
        }
    }
}

#[test]
fn a_peer_that_does_not_read_stops_nobody_else() {
    let mut guest = guest();
    let (mut slow, slow_ports) = connected(&mut guest);
    let data = pattern(MIB, 3);
    let mut sent = 0;
    loop {
        let count = guest.write_some(slow_ports, &data[sent..], 60_000);
        sent += count;
        guest.idle(Duration::from_millis(30));
        if count == 0 {
            break;
        }
    }
    // And one whose guest end does not read.
    let (stuck, _) = connected(&mut guest);
    stuck.set_nonblocking(true).unwrap();
    let mut written = 0;
    while let Ok(count) = (&stuck).write(&data[written..]) {
        written += count;
        guest.idle(Duration::from_millis(10));
    }
    assert!(written > Guest::ALLOC as usize);

    let (mut ours, ports) = connected(&mut guest);
    for round in 0..10 {
        let data = pattern(100_000, round);
        guest.write(ports, &data, 60_000);
        let mut received = vec![0; data.len()];
        ours.read_exact(&mut received).unwrap();
        assert!(received == data);
        let mut copy = ours.try_clone().unwrap();
        let writer = thread::spawn(move || copy.write_all(&received).unwrap());
        assert!(guest.read_exact(ports, data.len()) == data);
        writer.join().unwrap();
    }

    // The slow one gets all of its bytes when it reads again.
    let mut received = vec![0; sent];
    slow.read_exact(&mut received).unwrap();
    assert!(received == data[..sent]);
    guest.until("credit", |guest| guest.credit(slow_ports) > 100_000);
}

#[test]
fn a_guest_that_ignores_its_credit_loses_that_connection_only() {
    let mut guest = guest();
    let (ours, ports) = connected(&mut guest);
    let (mut other, other_ports) = connected(&mut guest);
    let chunk = vec![0; 60_000];
    let header = Header { len: chunk.len() as u32, ..packet(Op::ReadWrite, ports.0, ports.1) };
    for _ in 0..20 {
        guest.driver.send(header, &chunk);
    }
    guest.until("the reset", |guest| guest.sockets[&ports].reset);
    let mut received = Vec::new();
    (&ours).read_to_end(&mut received).unwrap();
    assert!(received.len() < 20 * chunk.len());
    guest.write(other_ports, b"fine", 64);
    let mut bytes = [0; 4];
    other.read_exact(&mut bytes).unwrap();
}

#[test]
fn a_guest_whose_count_of_forwarded_bytes_goes_back_or_ahead_of_what_was_sent_gains_nothing() {
    let mut guest = guest();
    let (mut ours, ports) = connected(&mut guest);
    ours.write_all(&pattern(100_000, 4)).unwrap();
    guest.until("bytes", |guest| guest.sockets[&ports].received.len() == 100_000);
    for fwd_cnt in [100_001, u32::MAX, 1 << 31] {
        guest.driver.send(Header { fwd_cnt, ..packet(Op::CreditUpdate, ports.0, ports.1) }, &[]);
    }
    ours.set_nonblocking(true).unwrap();
    let data = pattern(MIB, 5);
    let mut written = 0;
    while let Ok(count) = ours.write(&data[written..]) {
        written += count;
        guest.idle(Duration::from_millis(20));
    }
    // `Guest` has checked that no more came than it has room for.
    assert_eq!(guest.sockets[&ports].received.len(), Guest::ALLOC as usize);
}

#[test]
fn a_hundred_connections_at_once_each_get_their_own_bytes() {
    let mut guest = guest();
    let mut all: Vec<_> = (0..100).map(|_| connected(&mut guest)).collect();
    for (index, (ours, _)) in all.iter_mut().enumerate() {
        ours.write_all(&pattern(20_000, index)).unwrap();
    }
    for (index, (ours, ports)) in all.iter_mut().enumerate() {
        let data = guest.read_exact(*ports, 20_000);
        assert!(data == pattern(20_000, index));
        guest.write(*ports, &data, 7_000);
        let mut back = vec![0; 20_000];
        ours.read_exact(&mut back).unwrap();
        assert!(back == data);
    }
}

#[test]
fn connections_beyond_the_bound_are_shut_down_and_those_that_end_make_room() {
    let mut guest = guest();
    let mut all: Vec<_> = (0..1024).map(|_| connected(&mut guest)).collect();
    let (ours, theirs) = UnixStream::pair().unwrap();
    guest.driver.handle().connect(theirs.into(), PORT);
    assert_closed(&ours);
    let (gone, ports) = all.pop().unwrap();
    drop(gone);
    guest.until("the end", |guest| guest.sockets[&ports].host == Shutdown::BOTH);
    guest.driver.send(packet(Op::Reset, ports.0, ports.1), &[]);
    guest.driver.flush();
    connected(&mut guest);
}

#[test]
fn packets_of_no_connection_are_answered_with_a_reset_and_resets_with_nothing() {
    let mut guest = guest();
    let (_ours, ports) = connected(&mut guest);
    let good = packet(Op::ReadWrite, ports.0, ports.1);
    for stray in [
        Header { dst_port: ports.1 + 1, ..good },
        Header { dst_port: 0, ..good },
        Header { src_port: 77, ..good },
        Header { dst_cid: 1, ..good },
        Header { dst_cid: u64::MAX, ..good },
        Header { src_cid: 4, ..good },
        Header { kind: 2, ..good },
        Header { kind: 0, op: Op::Request as u16, dst_port: READY_PORT, ..good },
        Header { op: 0, dst_port: 5, ..good },
        Header { op: Op::Request as u16, dst_port: 2000, ..good },
    ] {
        guest.driver.send(stray, &[]);
        assert_eq!(guest.driver.receive().0, stray.reset());
        guest.driver.send(Header { op: Op::Reset as u16, ..stray }, &[]);
    }
    assert!(guest.driver.ready.read().is_err());
    assert!(guest.driver.receive_within(Duration::from_millis(50)).is_none());
    assert!(!guest.driver.is_broken());
    guest.write(ports, b"unharmed", 64);
}

#[test]
fn a_packet_that_breaks_the_rules_of_its_connection_resets_it() {
    for op in [Op::Request as u16, Op::Response as u16, 0, 8, 0xffff] {
        let mut guest = guest();
        let (ours, ports) = connected(&mut guest);
        guest.driver.send(Header { op, ..packet(Op::Request, ports.0, ports.1) }, &[]);
        guest.until("the reset", |guest| guest.sockets[&ports].reset);
        assert_closed(&ours);
    }
    // Bytes after the guest said that it would send none.
    let mut guest = guest();
    let (ours, ports) = connected(&mut guest);
    guest.shut_down(ports, Shutdown { send: true, receive: false });
    guest.write(ports, b"more", 64);
    guest.until("the reset", |guest| guest.sockets[&ports].reset);
    assert_closed(&ours);
    // Bytes instead of an answer to the request.
    let (ours, theirs) = UnixStream::pair().unwrap();
    guest.driver.handle().connect(theirs.into(), 4000);
    let (request, _) = guest.driver.receive();
    guest.driver.send(Header { len: 1, ..packet(Op::ReadWrite, 4000, request.src_port) }, b"x");
    assert_eq!(guest.driver.receive().0.op(), Some(Op::Reset));
    assert_closed(&ours);
}

#[test]
fn broken_framing_breaks_the_device() {
    let whole = Header { len: 10, ..packet(Op::ReadWrite, 1, 2) }.to_bytes();
    for bytes in [&whole[..HEADER_LENGTH - 1], &whole[..1], &[&whole[..], &[0; 9]].concat()] {
        let mut driver = Driver::start(Given::default());
        driver.send_bytes(bytes);
        assert!(driver.broken().contains("shorter"), "{bytes:?}");
    }
    let mut driver = Driver::start(Given::default());
    driver.send(Header { len: u32::MAX, ..packet(Op::ReadWrite, 1, 2) }, &[0; 100]);
    assert!(driver.broken().contains("shorter"));
}

#[test]
fn replies_wait_for_buffers_of_the_driver_and_hold_its_packets_up_meanwhile() {
    let mut driver = Driver::start(Given::default());
    driver.hold = true;
    let stray = packet(Op::Request, 9, 9);
    let mut sent = 0;
    // The receive queue takes 64 of the replies, 256 are kept, and what else the transmit queue holds is not taken.
    while sent < 64 + 256 + 64 {
        let now = driver.send_at_once(stray, 64);
        sent += now;
        driver.receive_all_held();
        if now == 0 {
            break;
        }
    }
    assert!(driver.send_at_once(stray, 1) == 0, "the device takes packets without end");
    let before = driver.take_arrived();
    driver.release();
    let mut replies = before;
    while replies < sent {
        assert_eq!(driver.receive().0.op(), Some(Op::Reset));
        replies += 1;
    }
    driver.flush();
    driver.send(stray, &[]);
    assert_eq!(driver.receive().0.op(), Some(Op::Reset));
}

#[test]
fn bytes_wait_for_buffers_of_the_driver() {
    let mut guest = guest();
    let (mut ours, ports) = connected(&mut guest);
    let (mut other, other_ports) = connected(&mut guest);
    guest.driver.hold = true;
    let data = pattern(200_000, 6);
    let copy = data.clone();
    let writer = thread::spawn(move || {
        ours.write_all(&copy).unwrap();
        ours
    });
    other.write_all(b"also").unwrap();
    guest.idle(Duration::from_millis(200));
    guest.driver.release();
    assert!(guest.read_exact(ports, data.len()) == data);
    assert_eq!(guest.read_exact(other_ports, 4), b"also");
    writer.join().unwrap();
}

#[test]
fn connections_go_on_after_a_pause() {
    let mut guest = guest();
    let (mut ours, ports) = connected(&mut guest);
    guest.write(ports, b"before", 64);
    guest.driver.flush();
    let mut copy = ours.try_clone().unwrap();
    guest.driver.pause(|| copy.write_all(b"meanwhile").unwrap());
    assert_eq!(guest.read_exact(ports, 9), b"meanwhile");
    guest.write(ports, b" after", 64);
    let mut bytes = [0; 12];
    ours.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"before after");
}

#[test]
fn a_transport_reset_ends_all_connections_and_new_ones_wait_until_the_guest_has_taken_note() {
    let mut guest = guest();
    let (ours, _) = connected(&mut guest);
    guest.driver.handle().reset_transport();
    let (mut new, theirs) = UnixStream::pair().unwrap();
    guest.driver.handle().connect(theirs.into(), PORT);
    new.write_all(b"new").unwrap();
    assert_closed(&ours);
    assert_eq!(guest.driver.event(), 0);
    assert!(guest.driver.receive_within(Duration::from_millis(100)).is_none());
    guest.driver.acknowledge();
    let ports = guest.accept();
    assert_eq!(guest.read_exact(ports, 3), b"new");
}

#[test]
fn a_clone_knows_that_the_agent_listens_and_uses_other_ports_than_its_template_did() {
    let mut template = Guest::new(Driver::start(Given::default()), &[PORT]);
    template.driver.send(packet(Op::Request, 5000, READY_PORT), &[]);
    template.driver.receive();
    let (_ours, template_ports) = connected(&mut template);
    let state = template.driver.device.save();

    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut device = Driver::start(Given::default());
    device.device.restore(&state).unwrap();
    device.handle().connect_agent(theirs.into());
    let mut clone = Guest::new(device, &[AGENT_PORT]);
    let ports = clone.accept();
    assert_eq!(ports.0, AGENT_PORT);
    assert_ne!(ports.1, template_ports.1);
    ours.write_all(b"x").unwrap();
    clone.read_exact(ports, 1);
    assert!(clone.driver.ready.read().is_err(), "it was ready before");

    for bad in ["", "{}", r#"{"ready":true,"next_port":0}"#, r#"{"ready":true,"next_port":1073741824,"x":1}"#] {
        let state = crate::virtio::DeviceState(bad.into());
        assert!(clone.driver.device.restore(&state).is_err(), "{bad}");
    }
}

#[test]
fn a_guest_that_does_not_answer_loses_the_connection_at_its_deadline() {
    let (path, listener) = Listening::new("unanswered");
    let mut guest = Guest::new(Driver::start(Given { listener: Some(listener.into()), ..Given::default() }), &[PORT]);
    let mut unanswered = path.connect();
    unanswered.set_read_timeout(Some(Duration::from_secs(45))).unwrap();
    unanswered.write_all(b"CONNECT 4000\n").unwrap();
    let (request, _) = guest.driver.receive();
    assert_eq!(request.op(), Some(Op::Request));
    let (left, left_ports) = connected(&mut guest);
    let (mut lasting, ports) = connected(&mut guest);
    drop(left);
    guest.until("the end", |guest| guest.sockets[&left_ports].host == Shutdown::BOTH);
    let began = Instant::now();
    guest.until("the reset", |guest| guest.sockets[&left_ports].reset);
    assert!(began.elapsed() > Duration::from_secs(5));
    assert_closed(&unanswered);
    assert!(began.elapsed() > Duration::from_secs(15));
    lasting.write_all(b"x").unwrap();
    guest.read_exact(ports, 1);
}

/// Writes until neither the guest nor the socket takes any more.
fn fill(guest: &mut Guest, mut ours: &UnixStream) {
    ours.set_nonblocking(true).unwrap();
    while ours.write(&[0; 4096]).is_ok() {
        guest.idle(Duration::from_millis(2));
    }
}

/// The device's thread uses no processor while nothing happens.
fn assert_sleeps(guest: &mut Guest, state: &str) {
    guest.idle(Duration::from_millis(50));
    let before = guest.driver.processor_time();
    guest.idle(Duration::from_millis(200));
    let used = guest.driver.processor_time() - before;
    assert!(used < Duration::from_millis(20), "{state}: {used:?}");
}

#[test]
fn the_thread_sleeps_while_it_can_do_nothing() {
    let (path, listener) = Listening::new("sleep");
    let driver = Driver::start(Given { listener: Some(listener.into()), ..Given::default() });
    let mut guest = Guest::new(driver, &[PORT]);
    assert_sleeps(&mut guest, "idle");

    let (stuck, _) = connected(&mut guest);
    fill(&mut guest, &stuck);
    assert_sleeps(&mut guest, "bytes for a guest without room");
    drop(stuck);
    assert_sleeps(&mut guest, "bytes of a peer that closed for a guest without room");

    let (stuck, ports) = connected(&mut guest);
    while guest.write_some(ports, &[0; 60_000], 60_000) > 0 {
        guest.idle(Duration::from_millis(2));
    }
    assert_sleeps(&mut guest, "bytes for a peer that does not read");
    fill(&mut guest, &stuck);
    stuck.shutdown(Half::Write).unwrap();
    assert_sleeps(&mut guest, "the same, with a peer that half closed");
    guest.shut_down(ports, Shutdown { receive: true, send: false });
    assert_sleeps(&mut guest, "the same, and a guest that does not read either");
    guest.shut_down(ports, Shutdown::BOTH);
    assert_sleeps(&mut guest, "the same, and a guest that closed");

    let (half, _) = connected(&mut guest);
    half.shutdown(Half::Write).unwrap();
    assert_sleeps(&mut guest, "a peer that half closed");
    drop(half);
    assert_sleeps(&mut guest, "a peer that closed, and a guest that does not answer");

    let (half, ports) = connected(&mut guest);
    guest.shut_down(ports, Shutdown { send: true, receive: false });
    half.shutdown(Half::Write).unwrap();
    assert_sleeps(&mut guest, "both half closed");

    let _silent: Vec<_> = (0..70).map(|_| path.connect()).collect();
    assert_sleeps(&mut guest, "more silent clients than there is room for");

    let (mut unanswered, theirs) = UnixStream::pair().unwrap();
    unanswered.write_all(b"x").unwrap();
    guest.driver.hold = true;
    guest.driver.handle().connect(theirs.into(), PORT);
    let many: Vec<_> = (0..70).map(|_| connected_raw(&mut guest)).collect();
    assert_sleeps(&mut guest, "no buffers of the driver");
    drop((many, unanswered));
    assert_sleeps(&mut guest, "no buffers of the driver, and peers that closed");
}

/// A connection asked for, with bytes waiting.
fn connected_raw(guest: &mut Guest) -> UnixStream {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.write_all(&[0; 10_000]).unwrap();
    guest.driver.handle().connect(theirs.into(), PORT);
    ours
}
