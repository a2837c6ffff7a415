//! Packets for the guest: the queue that the driver calls `rx`. Links take turns; each sends what it owes and reads its
//! socket once.

use std::sync::Arc;

use super::link::MAX_BATCH;
use super::muxer::{MAX_RESETS, Muxer};
use super::packet::{HEADER_LENGTH, Header};
use crate::memory::GuestMemory;
use crate::virtio::{Broken, Buffers, Chain, Poll};

/// What the guest is to get next.
enum Next {
    Reset,
    Owed(u32),
    Data(u32),
}

/// A buffer of the driver: where the header goes, and where the payload.
fn parts<'a>(chain: &Chain, memory: &'a GuestMemory) -> Result<(Buffers<'a>, Buffers<'a>), Broken> {
    let mut header = chain.writable(memory);
    let payload = header.split_off(HEADER_LENGTH);
    if payload.is_empty() {
        return Err(Broken::Request("receive buffer without room for a packet"));
    }
    Ok((header, payload))
}

impl Muxer {
    /// Sends what there is, as far as the driver has offered buffers, and interrupts it once.
    pub fn serve(&mut self, poll: &Poll) -> Result<(), Broken> {
        if self.reset_unseen {
            return Ok(());
        }
        let held_up = self.resets.len() >= MAX_RESETS;
        let mut sent = false;
        while let Some(next) = self.next() {
            let served = match next {
                Next::Reset => self.send_reset()?,
                Next::Owed(port) => self.send_owed(port)?,
                Next::Data(port) => self.send_data(port, poll)?,
            };
            sent |= served;
            // Without buffers, all wait for the driver's next notification, and sockets need not be watched.
            if !served && !self.to_guest.enable_notification()? {
                for index in 0..self.turns.len() {
                    if let Some(port) = self.turns.get(index).copied() {
                        self.settle(port, poll);
                    }
                }
                break;
            }
        }
        if held_up && self.resets.len() < MAX_RESETS {
            self.from_guest.kick_self();
        }
        if sent { self.to_guest.notify() } else { Ok(()) }
    }

    /// What is to be sent next. Turns that are over end here.
    fn next(&mut self) -> Option<Next> {
        if !self.resets.is_empty() {
            return Some(Next::Reset);
        }
        while let Some(port) = self.turns.front().copied() {
            if let Some(link) = self.links.get_mut(&port) {
                if link.connection.owes() {
                    return Some(Next::Owed(port));
                }
                link.readable &= link.may_read();
                if link.readable {
                    return Some(Next::Data(port));
                }
                link.queued = false;
            }
            self.turns.pop_front();
        }
        None
    }

    /// Sends a packet without payload; false if the driver offers no buffer.
    fn send_reset(&mut self) -> Result<bool, Broken> {
        let Some(chain) = self.to_guest.pop()? else { return Ok(false) };
        if let Some(header) = self.resets.pop_front() {
            self.put_header(chain, header)?;
        }
        Ok(true)
    }

    fn send_owed(&mut self, port: u32) -> Result<bool, Broken> {
        let Some(chain) = self.to_guest.pop()? else { return Ok(false) };
        match self.links.get_mut(&port).and_then(|link| link.connection.next_packet()) {
            Some(header) => self.put_header(chain, header)?,
            None => self.to_guest.unpop(),
        }
        Ok(true)
    }

    fn put_header(&mut self, chain: Chain, header: Header) -> Result<(), Broken> {
        let memory = Arc::clone(self.to_guest.memory());
        parts(&chain, &memory)?.0.write(&header.to_bytes());
        self.to_guest.complete(&chain, HEADER_LENGTH as u32)
    }

    /// Reads a link's socket once, into as many buffers as it filled lately and more if it fills them all.
    fn send_data(&mut self, port: u32, poll: &Poll) -> Result<bool, Broken> {
        let Some(link) = self.links.get_mut(&port) else { return Ok(true) };
        let memory = Arc::clone(self.to_guest.memory());
        let mut room = link.connection.credit();
        let (mut slots, mut payloads) = (Vec::with_capacity(link.batch), Vec::with_capacity(link.batch));
        while slots.len() < link.batch && room > 0 {
            let Some(chain) = self.to_guest.pop()? else { break };
            let (header, mut payload) = parts(&chain, &memory)?;
            if payload.len() > room {
                payload.split_off(room);
            }
            room -= payload.len();
            slots.push((chain, header, payload.len()));
            payloads.push(payload);
        }
        if slots.is_empty() {
            return Ok(false);
        }
        let mut left = link.read(&payloads).unwrap_or(0);
        link.readable = false;
        let mut used = 0;
        for (chain, header, length) in &mut slots {
            if left == 0 {
                break;
            }
            let count = left.min(*length);
            left -= count;
            used += 1;
            header.write(&link.connection.data_packet(count as u32).to_bytes());
            self.to_guest.complete(chain, (HEADER_LENGTH + count) as u32)?;
            link.connection.send(count as u32);
        }
        for _ in used..slots.len() {
            self.to_guest.unpop();
        }
        link.batch = if used == slots.len() { (2 * used).min(MAX_BATCH) } else { used.max(1) };
        self.settle(port, poll);
        Ok(true)
    }
}
