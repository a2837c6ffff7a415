//! A guest for the tests: drives the device's queues in memory as a driver does, and on top of that keeps sockets as a
//! guest's kernel does, checking that the host keeps to its credit.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::packet::{HEADER_LENGTH, HOST_CID, Header, Op, Shutdown, TYPE_STREAM};
use super::{Options, Vsock, VsockHandle};
use crate::jail::{Kind, confine_in_test};
use crate::memory::{GuestMemory, SharedMemory};
use crate::virtio::worker::{Running, Thread};
use crate::virtio::{Activation, ActiveQueue, Device, Interrupt};

pub const GUEST_CID: u64 = 3;
pub const READY_PORT: u32 = 1024;
pub const AGENT_PORT: u32 = 1024;
const PATIENCE: Duration = Duration::from_secs(20);

/// Linux's, roughly: a page less its socket buffer's overhead.
const RX_BUFFER: u32 = 3776;
const TX_BUFFER: u32 = 64 * 1024 + HEADER_LENGTH as u32;
const QUEUE: u16 = 64;

static DRIVERS: AtomicU32 = AtomicU32::new(0);

struct Ring {
    base: u64,
    buffers: u64,
    next: u16,
    seen: u16,
    kick: EventFd,
    interrupt: EventFd,
}

impl Ring {
    const AVAIL: u64 = 16 * QUEUE as u64;
    const USED: u64 = 0x1000;

    fn queue(&self, event_idx: bool) -> Queue {
        let mut queue = Queue::new(256).unwrap();
        queue.set_size(QUEUE);
        queue.set_desc_table_address(Some(self.base as u32), None);
        queue.set_avail_ring_address(Some((self.base + Self::AVAIL) as u32), None);
        queue.set_used_ring_address(Some((self.base + Self::USED) as u32), None);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue
    }

    /// Makes a chain of one descriptor available, and kicks the device if it wants that.
    fn offer(&mut self, memory: &GuestMemory, event_idx: bool, index: u16, address: u64, length: u32, write: bool) {
        let descriptor = GuestAddress(self.base + 16 * u64::from(index));
        memory.write_obj(address, descriptor).unwrap();
        memory.write_obj(length, GuestAddress(descriptor.0 + 8)).unwrap();
        memory.write_obj(u32::from(write) << 1, GuestAddress(descriptor.0 + 12)).unwrap();
        let avail = self.base + Self::AVAIL;
        memory.write_obj(index, GuestAddress(avail + 4 + 2 * u64::from(self.next % QUEUE))).unwrap();
        self.next = self.next.wrapping_add(1);
        memory.store(self.next, GuestAddress(avail + 2), Ordering::Release).unwrap();
        fence(Ordering::SeqCst);
        let wanted = if event_idx {
            let event: u16 = memory.read_obj(GuestAddress(self.base + Self::USED + 4 + 8 * u64::from(QUEUE))).unwrap();
            event == self.next.wrapping_sub(1)
        } else {
            memory.read_obj::<u16>(GuestAddress(self.base + Self::USED)).unwrap() & 1 == 0
        };
        if wanted {
            self.kick.write(1).unwrap();
        }
    }

    /// The next chain that the device has given back: its descriptor, and how much was written.
    fn take(&mut self, memory: &GuestMemory) -> Option<(u16, u32)> {
        let used = self.base + Self::USED;
        if memory.load::<u16>(GuestAddress(used + 2), Ordering::Acquire).unwrap() == self.seen {
            return None;
        }
        let element = used + 4 + 8 * u64::from(self.seen % QUEUE);
        self.seen = self.seen.wrapping_add(1);
        let index: u32 = memory.read_obj(GuestAddress(element)).unwrap();
        Some((index as u16, memory.read_obj(GuestAddress(element + 4)).unwrap()))
    }

    /// Asks to be interrupted at the next chain given back.
    fn arm(&self, memory: &GuestMemory) {
        memory.write_obj(self.seen, GuestAddress(self.base + Self::AVAIL + 4 + 2 * u64::from(QUEUE))).unwrap();
        fence(Ordering::SeqCst);
    }
}

/// The queues, without any idea of connections.
pub struct Driver {
    memory: SharedMemory,
    event_idx: bool,
    /// [`Driver::rx`], `tx` and `event` of the specification.
    rings: [Ring; 3],
    free: Vec<u16>,
    /// Buffers taken out of the receive queue while it is held.
    held: Vec<u16>,
    pub hold: bool,
    arrived: VecDeque<(Header, Vec<u8>)>,
    pub events: Vec<u32>,
    /// Event buffers are given back only by [`Driver::acknowledge`].
    unacknowledged: Vec<u16>,
    pub device: Vsock,
    /// Of the thread; each has its own.
    name: String,
    running: Option<Running>,
    broken: mpsc::Receiver<String>,
    told: mpsc::Sender<String>,
    pub ready: EventFd,
}

pub struct Given {
    pub event_idx: bool,
    pub agent: Option<OwnedFd>,
    pub listener: Option<OwnedFd>,
}

impl Default for Given {
    fn default() -> Self {
        Self { event_idx: true, agent: None, listener: None }
    }
}

impl Driver {
    pub fn start(given: Given) -> Self {
        let ready = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let device = Vsock::new(Options {
            guest_cid: GUEST_CID,
            ready_port: READY_PORT,
            ready: ready.try_clone().unwrap(),
            agent_port: AGENT_PORT,
            agent: given.agent,
            listener: given.listener,
        })
        .unwrap();
        Self::with(device, ready, given.event_idx)
    }

    pub fn with(mut device: Vsock, ready: EventFd, event_idx: bool) -> Self {
        let memory: SharedMemory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap());
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let rings = [0u64, 1, 2].map(|i| Ring {
            base: 0x1_0000 + i * 0x2000,
            buffers: 0x10_0000 + i * 0x10_0000,
            next: 0,
            seen: 0,
            kick: event(),
            interrupt: event(),
        });
        let queue = |ring: &Ring| {
            let queue = ring.queue(event_idx);
            assert!(queue.is_valid(&*memory));
            let interrupt = Interrupt::new(ring.interrupt.try_clone().unwrap());
            interrupt.set_masked(false);
            Some(ActiveQueue::new(queue, memory.clone(), ring.kick.try_clone().unwrap(), interrupt))
        };
        let worker = device
            .activate(Activation {
                memory: memory.clone(),
                features: 0,
                queues: rings.iter().map(queue).collect(),
                config_interrupt: Interrupt::new(event()),
            })
            .unwrap();
        let (told, broken) = mpsc::channel();
        let mut driver = Self {
            memory,
            event_idx,
            rings,
            free: (0..QUEUE).collect(),
            held: Vec::new(),
            hold: false,
            arrived: VecDeque::new(),
            events: Vec::new(),
            unacknowledged: Vec::new(),
            device,
            name: format!("vsock-{}", DRIVERS.fetch_add(1, Ordering::Relaxed)),
            running: None,
            broken,
            told,
            ready,
        };
        driver.run(worker);
        for index in 0..QUEUE {
            driver.offer_rx(index);
            if index < 8 {
                driver.offer_event(index);
            }
        }
        driver
    }

    fn run(&mut self, worker: Box<dyn crate::virtio::Worker>) {
        let told = self.told.clone();
        let broken = move |error: crate::virtio::Broken| drop(told.send(error.to_string()));
        let thread = Thread::spawn(&self.name, || confine_in_test(Kind::Vsock)).unwrap();
        self.running = Some(thread.start(worker, broken).unwrap());
    }

    /// Stops the thread and starts it again, as a pause of the machine does.
    pub fn pause(&mut self, while_stopped: impl FnOnce()) {
        let worker = self.running.take().unwrap().stop().unwrap();
        while_stopped();
        self.run(worker);
    }

    pub fn handle(&self) -> VsockHandle {
        self.device.handle()
    }

    fn offer_rx(&mut self, index: u16) {
        if self.hold {
            return self.held.push(index);
        }
        let address = self.rings[0].buffers + 4096 * u64::from(index);
        self.rings[0].offer(&self.memory, self.event_idx, index, address, RX_BUFFER, true);
    }

    fn offer_event(&mut self, index: u16) {
        let address = self.rings[2].buffers + 4 * u64::from(index);
        self.rings[2].offer(&self.memory, self.event_idx, index, address, 4, true);
    }

    /// Gives the buffers of the events seen back.
    pub fn acknowledge(&mut self) {
        for index in std::mem::take(&mut self.unacknowledged) {
            self.offer_event(index);
        }
    }

    /// Offers receive buffers again.
    pub fn release(&mut self) {
        self.hold = false;
        for index in std::mem::take(&mut self.held) {
            self.offer_rx(index);
        }
    }

    /// Takes what the device gave back; false if there was nothing.
    fn collect(&mut self) -> bool {
        let before = self.arrived.len() + self.free.len() + self.events.len();
        while let Some((index, written)) = self.rings[0].take(&self.memory) {
            let mut bytes = vec![0; written as usize];
            let address = self.rings[0].buffers + 4096 * u64::from(index);
            self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            let header = Header::from_bytes(bytes[..HEADER_LENGTH].try_into().unwrap());
            let payload = bytes.split_off(HEADER_LENGTH);
            assert_eq!(payload.len(), header.len as usize);
            assert_eq!(
                (header.src_cid, header.dst_cid),
                if header.op() == Some(Op::Reset) { (header.src_cid, header.dst_cid) } else { (HOST_CID, GUEST_CID) }
            );
            self.arrived.push_back((header, payload));
            self.offer_rx(index);
        }
        while let Some((index, written)) = self.rings[1].take(&self.memory) {
            assert_eq!(written, 0);
            self.free.push(index);
        }
        while let Some((index, written)) = self.rings[2].take(&self.memory) {
            assert_eq!(written, 4);
            let address = self.rings[2].buffers + 4 * u64::from(index);
            self.events.push(self.memory.read_obj(GuestAddress(address)).unwrap());
            self.unacknowledged.push(index);
        }
        self.arrived.len() + self.free.len() + self.events.len() != before
    }

    /// Waits for the device to give anything back, at most so long; false if it did not.
    fn wait(&mut self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        loop {
            if self.collect() {
                return true;
            }
            for ring in &self.rings {
                ring.arm(&self.memory);
            }
            if self.collect() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            // SAFETY: the eventfds live as long as the driver.
            let fds = self.rings.each_ref().map(|r| unsafe { BorrowedFd::borrow_raw(r.interrupt.as_raw_fd()) });
            let mut fds = fds.each_ref().map(|fd| PollFd::new(fd, PollFlags::IN));
            if poll(&mut fds, Some(&timeout)).unwrap() == 0 {
                return self.collect();
            }
            for ring in &self.rings {
                let _ = ring.interrupt.read();
            }
        }
    }

    /// Sends bytes as one packet, whatever they are.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        while self.free.is_empty() {
            assert!(self.wait(PATIENCE), "the device takes no packets");
        }
        let index = self.free.pop().unwrap();
        let address = self.rings[1].buffers + u64::from(TX_BUFFER) * u64::from(index);
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        self.rings[1].offer(&self.memory, self.event_idx, index, address, bytes.len() as u32, false);
    }

    /// Sends as many of these as there are buffers for, without waiting; how many.
    pub fn send_at_once(&mut self, header: Header, count: usize) -> usize {
        let count = count.min(self.free.len());
        for _ in 0..count {
            self.send(header, &[]);
        }
        count
    }

    pub fn send(&mut self, header: Header, payload: &[u8]) {
        self.send_bytes(&[&header.to_bytes(), payload].concat());
    }

    /// The next packet of the device.
    pub fn receive(&mut self) -> (Header, Vec<u8>) {
        self.receive_within(PATIENCE).expect("a packet of the device")
    }

    pub fn receive_within(&mut self, time: Duration) -> Option<(Header, Vec<u8>)> {
        let deadline = Instant::now() + time;
        loop {
            if let Some(packet) = self.arrived.pop_front() {
                return Some(packet);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.wait(left) && self.arrived.is_empty() {
                return None;
            }
        }
    }

    /// Waits until there is an event.
    pub fn event(&mut self) -> u32 {
        while self.events.is_empty() {
            assert!(self.wait(PATIENCE), "an event of the device");
        }
        self.events.remove(0)
    }

    /// All packets have been taken by the device.
    pub fn flush(&mut self) {
        while self.free.len() < usize::from(QUEUE) {
            assert!(self.wait(PATIENCE), "the device takes no packets");
        }
    }

    /// Takes what fills the receive queue while its buffers are held.
    pub fn receive_all_held(&mut self) {
        while self.wait(Duration::from_millis(100)) {}
    }

    /// How many packets have come that were not received yet; they are dropped.
    pub fn take_arrived(&mut self) -> usize {
        self.arrived.drain(..).count()
    }

    /// Sends bytes as one packet, unless the device no longer takes any.
    pub fn try_send(&mut self, bytes: &[u8]) {
        self.collect();
        if !self.free.is_empty() {
            self.send_bytes(bytes);
        }
    }

    /// Waits until the device has taken all packets or is broken; true if it is.
    pub fn settle_down(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while self.free.len() < usize::from(QUEUE) {
            if self.broken.try_recv().is_ok() {
                return true;
            }
            self.wait(Duration::from_millis(1));
            assert!(Instant::now() < deadline, "the device takes no packets");
        }
        self.broken.try_recv().is_ok()
    }

    /// Processor time that the device's thread has used.
    pub fn processor_time(&self) -> Duration {
        for task in std::fs::read_dir("/proc/self/task").unwrap() {
            let task = task.unwrap().path();
            let name = std::fs::read_to_string(task.join("comm")).unwrap_or_default();
            if name.trim_end() == self.name {
                let times = std::fs::read_to_string(task.join("schedstat")).unwrap();
                return Duration::from_nanos(times.split(' ').next().unwrap().parse().unwrap());
            }
        }
        panic!("no thread {}", self.name)
    }

    /// Stops the thread.
    pub fn stop(&mut self) {
        assert!(self.running.take().unwrap().stop().is_some());
    }

    /// Why the device broke.
    pub fn broken(&self) -> String {
        self.broken.recv_timeout(PATIENCE).expect("a broken device")
    }

    pub fn is_broken(&self) -> bool {
        self.broken.try_recv().is_ok()
    }
}

/// A packet from a port of the guest to one of the host.
pub fn packet(op: Op, guest_port: u32, host_port: u32) -> Header {
    Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: TYPE_STREAM,
        op: op as u16,
        buf_alloc: Guest::ALLOC,
        ..Header::default()
    }
}

/// A socket of the guest.
#[derive(Debug, Default)]
pub struct Socket {
    /// Received and not read yet.
    pub received: Vec<u8>,
    /// What the host will no longer do.
    pub host: Shutdown,
    /// The host has reset it.
    pub reset: bool,
    sent: u32,
    host_alloc: u32,
    host_forwarded: u32,
    count: u32,
    read: u32,
    reported: u32,
}

/// The port of the guest and the port of the host.
pub type Ports = (u32, u32);

/// A guest with sockets.
pub struct Guest {
    pub driver: Driver,
    pub sockets: HashMap<Ports, Socket>,
    listening: HashSet<u32>,
    accepted: VecDeque<Ports>,
}

impl Guest {
    pub const ALLOC: u32 = 256 * 1024;

    pub fn new(driver: Driver, listening: &[u32]) -> Self {
        let listening = listening.iter().copied().collect();
        Self { driver, sockets: HashMap::new(), listening, accepted: VecDeque::new() }
    }

    fn send(&mut self, ports: Ports, op: Op, flags: u32, payload: &[u8]) {
        let socket = self.sockets.get_mut(&ports).unwrap();
        socket.reported = socket.read;
        let header = Header { len: payload.len() as u32, flags, fwd_cnt: socket.read, ..packet(op, ports.0, ports.1) };
        self.driver.send(header, payload);
    }

    fn take(&mut self, header: Header, payload: Vec<u8>) {
        let ports = (header.dst_port, header.src_port);
        let op = header.op().unwrap();
        if op == Op::Request {
            if !self.listening.contains(&ports.0) {
                return self.driver.send(header.reset(), &[]);
            }
            assert!(self.sockets.insert(ports, Socket::default()).is_none_or(|old| old.reset), "a port used twice");
            self.accepted.push_back(ports);
        }
        let Some(socket) = self.sockets.get_mut(&ports) else { return };
        socket.host_alloc = header.buf_alloc;
        socket.host_forwarded = header.fwd_cnt;
        match op {
            Op::Request => self.send(ports, Op::Response, 0, &[]),
            Op::ReadWrite => {
                assert!(!socket.host.send, "bytes after the end");
                socket.count += header.len;
                assert!(socket.count - socket.read <= Self::ALLOC, "beyond the guest's credit");
                socket.received.extend(payload);
            }
            Op::CreditRequest => self.send(ports, Op::CreditUpdate, 0, &[]),
            Op::CreditUpdate => {}
            Op::Shutdown => socket.host = socket.host.union(Shutdown::from_flags(header.flags)),
            Op::Reset => socket.reset = true,
            Op::Response => panic!("a response without request"),
        }
    }

    /// Takes packets until something holds.
    pub fn until(&mut self, what: &str, holds: impl Fn(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds(self) {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some((header, payload)) = self.driver.receive_within(left) else { panic!("waited in vain: {what}") };
            self.take(header, payload);
        }
    }

    /// Takes packets for so long.
    pub fn idle(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        while let Some((header, payload)) =
            self.driver.receive_within(deadline.saturating_duration_since(Instant::now()))
        {
            self.take(header, payload);
        }
    }

    pub fn accept(&mut self) -> Ports {
        self.until("a connection", |guest| !guest.accepted.is_empty());
        self.accepted.pop_front().unwrap()
    }

    /// Bytes that may be sent.
    pub fn credit(&self, ports: Ports) -> usize {
        let socket = &self.sockets[&ports];
        (socket.host_alloc - socket.sent.wrapping_sub(socket.host_forwarded)) as usize
    }

    /// Sends as much of it as there is credit for, in packets of this size; returns how much.
    pub fn write_some(&mut self, ports: Ports, data: &[u8], size: usize) -> usize {
        let mut done = 0;
        for chunk in data.chunks(size) {
            let chunk = &chunk[..chunk.len().min(self.credit(ports))];
            if chunk.is_empty() {
                break;
            }
            self.sockets.get_mut(&ports).unwrap().sent += chunk.len() as u32;
            self.send(ports, Op::ReadWrite, 0, chunk);
            done += chunk.len();
            if chunk.len() < size {
                break;
            }
        }
        done
    }

    pub fn write(&mut self, ports: Ports, mut data: &[u8], size: usize) {
        while !data.is_empty() {
            self.until("credit", |guest| guest.credit(ports) > 0);
            data = &data[self.write_some(ports, data, size)..];
        }
    }

    /// Reads what has come.
    pub fn read(&mut self, ports: Ports) -> Vec<u8> {
        let socket = self.sockets.get_mut(&ports).unwrap();
        let data = std::mem::take(&mut socket.received);
        socket.read += data.len() as u32;
        if socket.read - socket.reported > Self::ALLOC / 2 {
            self.send(ports, Op::CreditUpdate, 0, &[]);
        }
        data
    }

    /// Reads so many bytes.
    pub fn read_exact(&mut self, ports: Ports, count: usize) -> Vec<u8> {
        let mut data = Vec::new();
        while data.len() < count {
            self.until("bytes", |guest| !guest.sockets[&ports].received.is_empty());
            data.extend(self.read(ports));
        }
        data
    }

    pub fn shut_down(&mut self, ports: Ports, what: Shutdown) {
        self.send(ports, Op::Shutdown, what.flags(), &[]);
    }
}
