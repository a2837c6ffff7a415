//! The driver's side of a device for tests: rings and buffers in a small guest memory, and a wait for the interrupt.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::worker::{Running, Thread};
use super::{Activation, ActiveQueue, Broken, Device, Interrupt, Worker};
use crate::jail::{Kind, confine_in_test};
use crate::memory::{GuestMemory, SharedMemory};

/// Longest a test waits for a device.
const DEADLINE: Duration = Duration::from_secs(20);

/// Bytes a ring and its buffers get.
const RING_SPACE: u64 = 16 << 20;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A buffer of a chain.
#[derive(Clone, Debug)]
pub enum Part {
    /// Written by the driver.
    Out(Vec<u8>),
    /// So many bytes for the device to write.
    In(usize),
}

/// A descriptor as it stands in the table.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
    pub next: u16,
}

/// One split ring as its driver sees it. Buffers are never reused: a test offers few.
pub struct Ring {
    memory: SharedMemory,
    size: u16,
    base: u64,
    free: u64,
    next_descriptor: u16,
    available: u16,
    used: u16,
    event_idx: bool,
    kick: EventFd,
    irq: EventFd,
    writable: Vec<(u16, Vec<(u64, usize)>)>,
}

impl Ring {
    fn new(memory: SharedMemory, base: u64, size: u16, event_idx: bool) -> Self {
        Self {
            memory,
            size,
            base,
            free: base + 0x2_0000,
            next_descriptor: 0,
            available: 0,
            used: 0,
            event_idx,
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            irq: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            writable: Vec::new(),
        }
    }

    fn available_ring(&self) -> u64 {
        self.base + 0x1_0000
    }

    fn used_ring(&self) -> u64 {
        self.base + 0x1_8000
    }

    /// The device's end.
    fn active(&self) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_size(self.size);
        queue.set_desc_table_address(Some(self.base as u32), Some((self.base >> 32) as u32));
        queue.set_avail_ring_address(Some(self.available_ring() as u32), None);
        queue.set_used_ring_address(Some(self.used_ring() as u32), None);
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        let interrupt = Interrupt::new(self.irq.try_clone().unwrap());
        interrupt.set_masked(false);
        ActiveQueue::new(queue, self.memory.clone(), self.kick.try_clone().unwrap(), interrupt)
    }

    /// Takes guest memory for a buffer.
    pub fn allocate(&mut self, length: usize) -> u64 {
        let address = self.free;
        self.free += (length as u64).next_multiple_of(16);
        assert!(self.free <= self.base + RING_SPACE, "test uses too much memory");
        address
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Puts descriptors into the table as they are, with `next` counted from the first, and makes the first available.
    pub fn offer_descriptors(&mut self, descriptors: &[Descriptor]) -> u16 {
        let first = self.next_descriptor;
        for (index, descriptor) in descriptors.iter().enumerate() {
            let slot = (first + index as u16) % self.size;
            self.memory
                .write_slice(
                    &raw(&Descriptor { next: (first.wrapping_add(descriptor.next)) % self.size, ..*descriptor }),
                    GuestAddress(self.base + u64::from(slot) * 16),
                )
                .unwrap();
        }
        self.next_descriptor = (first + descriptors.len() as u16) % self.size;
        self.make_available(first);
        first
    }

    pub fn make_available(&mut self, head: u16) {
        let slot = self.available_ring() + 4 + u64::from(self.available % self.size) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory
            .store(self.available, GuestAddress(self.available_ring() + 2), std::sync::atomic::Ordering::SeqCst)
            .unwrap();
    }

    /// Offers a chain of these buffers.
    pub fn offer(&mut self, parts: &[Part]) -> u16 {
        let mut descriptors = Vec::new();
        let mut writable = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            let (length, mut flags) = match part {
                Part::Out(bytes) => (bytes.len(), 0),
                Part::In(length) => (*length, WRITE),
            };
            let address = self.allocate(length);
            match part {
                Part::Out(bytes) => self.write(address, bytes),
                Part::In(_) => writable.push((address, length)),
            }
            if index + 1 < parts.len() {
                flags |= NEXT;
            }
            descriptors.push(Descriptor { address, length: length as u32, flags, next: index as u16 + 1 });
        }
        let head = self.offer_descriptors(&descriptors);
        self.writable.retain(|(known, _)| *known != head);
        self.writable.push((head, writable));
        head
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// The next chain that came back, with the length the device gave.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let index: u16 =
            self.memory.load(GuestAddress(self.used_ring() + 2), std::sync::atomic::Ordering::SeqCst).unwrap();
        if index == self.used {
            return None;
        }
        let slot = GuestAddress(self.used_ring() + 4 + u64::from(self.used % self.size) * 8);
        let entry: u64 = self.memory.read_obj(slot).unwrap();
        self.used = self.used.wrapping_add(1);
        Some((entry as u16, (entry >> 32) as u32))
    }

    /// Asks to be interrupted when so many more chains have come back, and one beyond (`used_event`).
    pub fn want_interrupt_after(&self, count: u16) {
        let used_event = GuestAddress(self.available_ring() + 4 + u64::from(self.size) * 2);
        let at = self.used.wrapping_add(count);
        self.memory.store(at, used_event, std::sync::atomic::Ordering::SeqCst).unwrap();
    }

    /// Whether an interrupt came since the last one was seen.
    pub fn interrupted(&self) -> bool {
        self.irq.read().is_ok()
    }

    /// Waits for an interrupt.
    pub fn wait_interrupt(&self) -> bool {
        readable(&self.irq, Instant::now() + DEADLINE) && self.interrupted()
    }

    /// Waits for the next chain to come back. With `VIRTIO_F_EVENT_IDX` it asks for the interrupt as a driver does.
    pub fn wait(&mut self) -> (u16, u32) {
        let until = Instant::now() + DEADLINE;
        loop {
            if self.event_idx {
                let used_event = GuestAddress(self.available_ring() + 4 + u64::from(self.size) * 2);
                self.memory.store(self.used, used_event, std::sync::atomic::Ordering::SeqCst).unwrap();
            }
            if let Some(used) = self.take_used() {
                return used;
            }
            assert!(readable(&self.irq, until), "the device did not answer");
            let _ = self.irq.read();
        }
    }

    /// What stands in the writable buffers of the chain last offered at `head`.
    pub fn written(&self, head: u16) -> Vec<u8> {
        let (_, buffers) = self.writable.iter().find(|(known, _)| *known == head).unwrap();
        buffers.iter().flat_map(|(address, length)| self.read(*address, *length)).collect()
    }

    /// Offers, kicks and waits; returns the length the device gave and the whole writable part.
    pub fn request(&mut self, parts: &[Part]) -> (u32, Vec<u8>) {
        let head = self.offer(parts);
        self.kick();
        let (used, length) = self.wait();
        assert_eq!(used, head);
        (length, self.written(head))
    }
}

fn raw(descriptor: &Descriptor) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&descriptor.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&descriptor.length.to_le_bytes());
    bytes[12..14].copy_from_slice(&descriptor.flags.to_le_bytes());
    bytes[14..].copy_from_slice(&descriptor.next.to_le_bytes());
    bytes
}

/// Bytes of an indirect table.
pub fn indirect_table(descriptors: &[Descriptor]) -> Vec<u8> {
    descriptors.iter().flat_map(raw).collect()
}

fn readable(fd: &EventFd, until: Instant) -> bool {
    // SAFETY: the descriptor is open for as long as the borrowed eventfd.
    let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
    let left = until.saturating_duration_since(Instant::now());
    let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
    rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() > 0
}

/// Guest memory of two adjoining regions, so that buffers may span them.
pub fn memory(bytes: u64) -> SharedMemory {
    let half = bytes / 2;
    Arc::new(
        GuestMemory::from_ranges(&[(GuestAddress(0), half as usize), (GuestAddress(half), (bytes - half) as usize)])
            .unwrap(),
    )
}

/// A queue without chains, whose driver does nothing.
pub fn empty_queue(memory: SharedMemory, size: u16) -> ActiveQueue {
    Ring::new(memory, 0, size, false).active()
}

/// An activated device on its thread, and its driver.
pub struct Driven {
    kind: Kind,
    pub rings: Vec<Ring>,
    pub memory: SharedMemory,
    pub config_irq: EventFd,
    running: Option<Running>,
    broken: mpsc::Receiver<Broken>,
}

/// Activates `device` with the features it offers.
pub fn drive(device: &mut dyn Device) -> Driven {
    let features = device.features();
    drive_with(device, features, false)
}

/// Activates `device` with these features.
pub fn drive_with(device: &mut dyn Device, features: u64, event_idx: bool) -> Driven {
    let sizes = device.queue_sizes().to_vec();
    let memory = memory(RING_SPACE * (sizes.len() as u64 + 1));
    drive_in(device, features, event_idx, memory)
}

/// Activates `device` in this memory, whose first [`RING_SPACE`] bytes per queue it takes for the rings.
pub fn drive_in(device: &mut dyn Device, features: u64, event_idx: bool, memory: SharedMemory) -> Driven {
    let sizes = device.queue_sizes().to_vec();
    let rings: Vec<_> = sizes
        .iter()
        .enumerate()
        .map(|(index, size)| Ring::new(memory.clone(), RING_SPACE * index as u64, *size, event_idx))
        .collect();
    let config_irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let config_interrupt = Interrupt::new(config_irq.try_clone().unwrap());
    config_interrupt.set_masked(false);
    let worker = device
        .activate(Activation {
            memory: memory.clone(),
            features,
            queues: rings.iter().map(|ring| Some(ring.active())).collect(),
            config_interrupt,
        })
        .unwrap();
    let kind = device.kind();
    let (running, broken) = run(kind, worker);
    Driven { kind, rings, memory, config_irq, running: Some(running), broken }
}

fn run(kind: Kind, worker: Box<dyn Worker>) -> (Running, mpsc::Receiver<Broken>) {
    let (sender, broken) = mpsc::channel();
    let thread = Thread::spawn("test", move || confine_in_test(kind)).unwrap();
    let running = thread.start(worker, move |error| sender.send(error).unwrap()).unwrap();
    (running, broken)
}

impl Driven {
    /// The rule that the device says was broken; waits for it.
    pub fn broken(&self) -> Broken {
        self.broken.recv_timeout(DEADLINE).expect("the device did not stop")
    }

    /// Waits for a configuration change interrupt.
    pub fn wait_config(&self) {
        assert!(readable(&self.config_irq, Instant::now() + DEADLINE), "no configuration change");
        let _ = self.config_irq.read();
    }

    /// Lets the device work for a moment, and stops it; its worker if it has not found a rule broken.
    pub fn stop_after(&mut self, moment: Duration) -> Option<Box<dyn Worker>> {
        let broken = self.broken.recv_timeout(moment);
        let worker = self.stop();
        // It may have taken longer, and have found it only now.
        (broken.is_err() && self.broken.try_recv().is_err()).then_some(worker)
    }

    /// Stops the device's thread and takes its worker.
    pub fn stop(&mut self) -> Box<dyn Worker> {
        self.running.take().unwrap().stop().unwrap()
    }

    /// Lets a stopped worker run on.
    pub fn run_on(&mut self, worker: Box<dyn Worker>) {
        let (running, broken) = run(self.kind, worker);
        self.running = Some(running);
        self.broken = broken;
    }
}
