//! The rules of one connection (5.10.6.3 to 5.10.6.6), without any I/O: who may still send, how much, and what the guest
//! has to be told.

use super::packet::{HOST_CID, Header, Op, Shutdown, TYPE_STREAM};

/// A guest broke the rules of this connection; it is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Violation;

/// What a packet of the guest means for the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// Nothing beyond what the connection notes itself.
    Noted,
    /// The guest accepted the connection.
    Accepted,
    /// The payload is to be passed on to the host.
    Data,
    /// The payload is to be dropped: the host no longer takes any, as the guest was told or is about to be.
    Discarded,
}

/// A connection that the host asked the guest for. All counters are modulo 2^32, as on the wire.
#[derive(Debug)]
pub struct Connection {
    guest_cid: u64,
    local_port: u32,
    guest_port: u32,
    accepted: bool,
    reset: bool,

    /// What each side said or found that it will no longer do, and how much of the host's the guest was told.
    guest: Shutdown,
    host: Shutdown,
    told: Shutdown,

    /// To the guest: bytes sent, and the guest's last word on how many it holds at most and has passed on.
    sent: u32,
    guest_alloc: u32,
    guest_forwarded: u32,

    /// From the guest: bytes received, passed on, and how many of these the guest knows of.
    alloc: u32,
    received: u32,
    forwarded: u32,
    reported: u32,

    owes_request: bool,
    owes_credit: bool,
    owes_question: bool,
    asked: bool,
}

impl Connection {
    /// A connection to `guest_port` that is still to be asked for, for which the host holds at most `alloc` bytes.
    pub fn new(guest_cid: u64, local_port: u32, guest_port: u32, alloc: u32) -> Self {
        Self {
            guest_cid,
            local_port,
            guest_port,
            accepted: false,
            reset: false,
            guest: Shutdown::default(),
            host: Shutdown::default(),
            told: Shutdown::default(),
            sent: 0,
            guest_alloc: 0,
            guest_forwarded: 0,
            alloc,
            received: 0,
            forwarded: 0,
            reported: 0,
            owes_request: true,
            owes_credit: false,
            owes_question: false,
            asked: false,
        }
    }

    /// The host's port.
    pub fn local_port(&self) -> u32 {
        self.local_port
    }

    /// The guest's port.
    pub fn guest_port(&self) -> u32 {
        self.guest_port
    }

    /// Bytes the host holds at most.
    pub fn alloc(&self) -> u32 {
        self.alloc
    }

    /// The guest has got the request, and may know of the connection.
    pub fn is_asked(&self) -> bool {
        !self.owes_request
    }

    /// The guest has reset it, and knows nothing of it any more.
    pub fn is_reset(&self) -> bool {
        self.reset
    }

    /// What the guest will no longer do.
    pub fn guest_shutdown(&self) -> Shutdown {
        self.guest
    }

    /// What the host will no longer do.
    pub fn host_shutdown(&self) -> Shutdown {
        self.host
    }

    /// Takes in a packet of the guest that was sent between the ports of this connection. Of [`Op::ReadWrite`] the payload
    /// counts as received.
    pub fn receive(&mut self, op: Op, header: &Header) -> Result<Received, Violation> {
        self.take_credit(header);
        match op {
            Op::Reset => {
                self.reset = true;
                self.guest = Shutdown::BOTH;
                Ok(Received::Noted)
            }
            Op::Response if !self.accepted && !self.owes_request => {
                self.accepted = true;
                Ok(Received::Accepted)
            }
            _ if !self.accepted => Err(Violation),
            Op::ReadWrite => {
                let held = self.received.wrapping_sub(self.forwarded);
                if self.guest.send || header.len > self.alloc.saturating_sub(held) {
                    return Err(Violation);
                }
                self.received = self.received.wrapping_add(header.len);
                Ok(if self.host.receive { Received::Discarded } else { Received::Data })
            }
            Op::Shutdown => {
                self.guest = self.guest.union(Shutdown::from_flags(header.flags));
                Ok(Received::Noted)
            }
            Op::CreditUpdate => Ok(Received::Noted),
            Op::CreditRequest => {
                self.owes_credit = true;
                Ok(Received::Noted)
            }
            Op::Request | Op::Response => Err(Violation),
        }
    }

    /// Every header says how the guest's buffers are. Its sender may have been overtaken by another thread of the guest, so
    /// a count that goes back, or ahead of what was ever sent, is not taken.
    fn take_credit(&mut self, header: &Header) {
        self.guest_alloc = header.buf_alloc;
        if self.sent.wrapping_sub(header.fwd_cnt) <= self.sent.wrapping_sub(self.guest_forwarded) {
            self.guest_forwarded = header.fwd_cnt;
        }
        if self.credit() > 0 {
            self.asked = false;
            self.owes_question = false;
        }
    }

    /// Bytes that may be sent to the guest now.
    pub fn credit(&self) -> usize {
        if !self.accepted || self.guest.receive || self.host.send {
            return 0;
        }
        let in_flight = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_alloc.saturating_sub(in_flight) as usize
    }

    /// `count` bytes, within [`Connection::credit`], are on their way to the guest. If nothing more may follow, the guest is
    /// asked once for its credit, in case an update of it was lost to [`Connection::take_credit`].
    pub fn send(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
        if self.credit() == 0 && !self.asked {
            self.asked = true;
            self.owes_question = true;
        }
    }

    /// `count` received bytes have been passed on to the host. The guest is told when it believes half of the room gone, so
    /// that it never runs dry while the other half is in flight.
    pub fn forward(&mut self, count: u32) {
        self.forwarded = self.forwarded.wrapping_add(count);
        if self.forwarded.wrapping_sub(self.reported) >= self.alloc / 2 && !self.guest.send {
            self.owes_credit = true;
        }
    }

    /// The host will no longer do this.
    pub fn shut_down(&mut self, host: Shutdown) {
        self.host = self.host.union(host);
    }

    /// There is a packet without payload to be sent.
    pub fn owes(&self) -> bool {
        !self.reset
            && (self.owes_request
                || self.accepted && (self.host != self.told || self.owes_credit || self.owes_question))
    }

    /// The next packet without payload that the guest is to get.
    pub fn next_packet(&mut self) -> Option<Header> {
        if !self.owes() {
            return None;
        }
        if self.owes_request {
            self.owes_request = false;
            return Some(self.header(Op::Request, 0, 0));
        }
        if self.host != self.told {
            self.told = self.host;
            return Some(self.header(Op::Shutdown, self.host.flags(), 0));
        }
        if self.owes_question {
            self.owes_question = false;
            return Some(self.header(Op::CreditRequest, 0, 0));
        }
        Some(self.header(Op::CreditUpdate, 0, 0))
    }

    /// The header of a packet with `len` bytes of payload.
    pub fn data_packet(&mut self, len: u32) -> Header {
        self.header(Op::ReadWrite, 0, len)
    }

    /// The packet that ends the connection.
    pub fn reset_packet(&mut self) -> Header {
        self.header(Op::Reset, 0, 0)
    }

    /// Every header carries the credit, so none is owed afterwards.
    fn header(&mut self, op: Op, flags: u32, len: u32) -> Header {
        self.reported = self.forwarded;
        self.owes_credit = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.local_port,
            dst_port: self.guest_port,
            len,
            kind: TYPE_STREAM,
            op: op as u16,
            flags,
            buf_alloc: self.alloc,
            fwd_cnt: self.forwarded,
        }
    }
}
