//! Packets for the guest.
//!
//! A packet is read straight into the driver's buffers, several of them if it takes them together (mergeable, 5.1.6.4). How
//! long it will be is not known before. So as many buffers are taken as the last packets were long, and behind them is room of
//! our own for the rest: only when packets become longer is something copied, once.

use std::collections::VecDeque;
use std::io;

use super::tap::Tap;
use crate::control::TAP_HEADER;
use crate::virtio::{ActiveQueue, Broken, Buffers, Chain};

/// Most packets at a time, so that the other direction has its turn.
const BATCH: usize = 64;

/// Bytes of buffers to take at least: what most packets need.
const LEAST_ROOM: usize = 2048;

/// Most pieces of buffers for one packet: one system call takes 1024, and a chain may bring twice the queue's size of them.
const MOST_PIECES: usize = 500;

/// Offset of `num_buffers` in the header (5.1.6).
const NUM_BUFFERS: usize = 10;

/// What there must be before more can be received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// The tap has no packet, or others have their turn first.
    Packets,
    /// The driver has offered no more buffers.
    Buffers,
    /// The tap is gone.
    Gone,
}

/// The queue that the driver calls `rx`.
pub struct Receive {
    pub queue: ActiveQueue,
    mergeable: bool,
    /// Bytes of the longest packet, header included.
    longest: usize,
    /// Buffers that were taken and are still empty, or hold the beginning of `held`; with their lengths.
    buffers: VecDeque<(Chain, usize)>,
    /// The sum of the lengths, and the count of pieces.
    room: usize,
    pieces: usize,
    /// Bytes that the last packets took.
    expected: usize,
    /// The end of a packet that was longer than there was room.
    overflow: Box<[u8]>,
    /// Such a packet waits for more buffers.
    held: Option<Held>,
}

/// A packet of which the first `direct` bytes are in the buffers that were there, and the rest is in `overflow`.
#[derive(Clone, Copy)]
struct Held {
    length: usize,
    direct: usize,
}

impl Receive {
    /// `longest` is the most bytes of a frame.
    pub fn new(queue: ActiveQueue, mergeable: bool, longest: usize) -> Self {
        let longest = longest + TAP_HEADER;
        Self {
            queue,
            mergeable,
            longest,
            buffers: VecDeque::new(),
            room: 0,
            pieces: 0,
            expected: LEAST_ROOM,
            // One byte more than a packet may have tells those that are longer.
            overflow: vec![0; longest + 1].into(),
            held: None,
        }
    }

    /// Receives packets until something is missing, and interrupts the driver once.
    pub fn serve(&mut self, tap: &Tap) -> Result<Wait, Broken> {
        self.queue.disable_notification()?;
        let mut wait = Wait::Packets;
        for _ in 0..BATCH {
            if let Some(missing) = self.receive(tap)? {
                wait = missing;
                // More may have come between the last look and the wish to be notified.
                if wait != Wait::Buffers || !self.queue.enable_notification()? {
                    break;
                }
                wait = Wait::Packets;
                self.queue.disable_notification()?;
            }
        }
        self.queue.notify()?;
        Ok(wait)
    }

    /// Gives the buffers that hold nothing back to the ring. A packet that waits for more of them is lost.
    pub fn put_back(&mut self) {
        self.held = None;
        for _ in self.buffers.drain(..) {
            self.queue.unpop();
        }
        (self.room, self.pieces) = (0, 0);
    }

    /// Receives one packet; or says what is missing.
    fn receive(&mut self, tap: &Tap) -> Result<Option<Wait>, Broken> {
        if let Some(held) = self.held {
            return self.release(held);
        }
        self.take_buffers(self.expected)?;
        if self.buffers.is_empty() {
            return Ok(Some(Wait::Buffers));
        }
        let direct = self.room;
        let beyond = (self.longest + 1).saturating_sub(direct);
        let memory = self.queue.memory().clone();
        let slices =
            self.buffers.iter().flat_map(|(chain, _)| chain.writable(&memory).slices().cloned().collect::<Vec<_>>());
        let read = Buffers::new(slices.collect()).fill_beyond(tap, &mut self.overflow[..beyond]);
        let length = match read {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Some(Wait::Packets)),
            // Memory that the guest has given back.
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                return Err(Broken::Request("receive buffer where there is no memory"));
            }
            Err(_) => return Ok(Some(Wait::Gone)),
        };
        if !(TAP_HEADER..=self.longest).contains(&length) {
            return Ok(None);
        }
        self.expected = length.max(self.expected / 2).max(LEAST_ROOM);
        if length <= direct {
            self.deliver(length)?;
            return Ok(None);
        }
        if !self.mergeable {
            // It fits into no buffer of its own.
            return Ok(None);
        }
        self.release(Held { length, direct })
    }

    /// Delivers a packet whose end is in `overflow`, if there are buffers for it.
    fn release(&mut self, held: Held) -> Result<Option<Wait>, Broken> {
        self.take_buffers(held.length)?;
        if self.room < held.length {
            if self.pieces >= MOST_PIECES {
                // The driver offers crumbs. It cannot have this packet.
                self.held = None;
                return Ok(None);
            }
            self.held = Some(held);
            return Ok(Some(Wait::Buffers));
        }
        self.held = None;
        let memory = self.queue.memory().clone();
        let mut rest = &self.overflow[..held.length - held.direct];
        let mut before = held.direct;
        for (chain, length) in &self.buffers {
            let mut buffers = chain.writable(&memory);
            buffers.skip(before);
            before = before.saturating_sub(*length);
            let written = buffers.write(rest);
            rest = &rest[written..];
        }
        self.deliver(held.length)?;
        Ok(None)
    }

    /// Takes buffers of the driver until there is room for so many bytes, as far as there are any; one alone if it does not
    /// take them together.
    fn take_buffers(&mut self, wanted: usize) -> Result<(), Broken> {
        while self.room < wanted && self.pieces < MOST_PIECES && (self.mergeable || self.buffers.is_empty()) {
            let Some(chain) = self.queue.pop()? else { return Ok(()) };
            let memory = self.queue.memory().clone();
            let buffers = chain.writable(&memory);
            let length = buffers.len();
            if length < TAP_HEADER {
                return Err(Broken::Request("receive buffer without room for a header"));
            }
            self.pieces += buffers.slices().count();
            self.room += length;
            self.buffers.push_back((chain, length));
        }
        Ok(())
    }

    /// Gives a packet that lies in the buffers, from the first on, to the driver.
    fn deliver(&mut self, length: usize) -> Result<(), Broken> {
        let memory = self.queue.memory().clone();
        let mut used = Vec::new();
        let mut left = length;
        while left > 0 {
            let Some((chain, room)) = self.buffers.pop_front() else { break };
            self.room -= room;
            self.pieces -= chain.writable(&memory).slices().count();
            let written = left.min(room);
            left -= written;
            used.push((chain, written as u32));
        }
        if let Some((first, _)) = used.first() {
            // The tap leaves these two bytes as they were.
            let mut header = first.writable(&memory);
            header.skip(NUM_BUFFERS);
            header.write(&(used.len() as u16).to_le_bytes());
        }
        self.queue.complete_all(&used)
    }
}
