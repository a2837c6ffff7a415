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

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    const ALLOC: u32 = 64 * 1024;
    const GUEST_ALLOC: u32 = 10_000;

    fn asked() -> Connection {
        let mut connection = Connection::new(3, 1 << 30, 1024, ALLOC);
        assert_eq!(connection.next_packet().unwrap().op(), Some(Op::Request));
        assert!(!connection.owes());
        connection
    }

    fn accepted() -> Connection {
        let mut connection = asked();
        assert_eq!(receive(&mut connection, Op::Response, 0, 0), Ok(Received::Accepted));
        connection
    }

    fn receive(connection: &mut Connection, op: Op, flags: u32, len: u32) -> Result<Received, Violation> {
        let header = Header { flags, len, buf_alloc: GUEST_ALLOC, op: op as u16, ..Header::default() };
        connection.receive(op, &header)
    }

    #[test]
    fn a_header_names_both_ends_and_carries_the_credit() {
        let mut connection = accepted();
        receive(&mut connection, Op::ReadWrite, 0, 300).unwrap();
        connection.forward(200);
        let header = Header {
            src_cid: 2,
            dst_cid: 3,
            src_port: 1 << 30,
            dst_port: 1024,
            len: 77,
            kind: 1,
            op: 5,
            flags: 0,
            buf_alloc: ALLOC,
            fwd_cnt: 200,
        };
        assert_eq!(connection.data_packet(77), header);
        assert_eq!(connection.reset_packet(), Header { op: 3, len: 0, ..header });
    }

    #[test]
    fn before_it_is_accepted_only_an_answer_to_the_request_is_allowed() {
        for op in [Op::Request, Op::Shutdown, Op::ReadWrite, Op::CreditUpdate, Op::CreditRequest] {
            assert_eq!(receive(&mut asked(), op, 0, 0), Err(Violation), "{op:?}");
        }
        let mut unasked = Connection::new(3, 1 << 30, 1024, ALLOC);
        assert_eq!(receive(&mut unasked, Op::Response, 0, 0), Err(Violation));
        let mut refused = asked();
        assert_eq!(receive(&mut refused, Op::Reset, 0, 0), Ok(Received::Noted));
        assert!(refused.is_reset() && !refused.owes());
        assert_eq!(asked().credit(), 0);
    }

    #[test]
    fn once_accepted_it_is_neither_asked_for_nor_accepted_again() {
        for op in [Op::Request, Op::Response] {
            assert_eq!(receive(&mut accepted(), op, 0, 0), Err(Violation), "{op:?}");
        }
    }

    #[test]
    fn the_guest_may_send_exactly_what_it_was_promised_room_for() {
        let mut connection = accepted();
        assert_eq!(receive(&mut connection, Op::ReadWrite, 0, ALLOC), Ok(Received::Data));
        assert_eq!(receive(&mut connection, Op::ReadWrite, 0, 0), Ok(Received::Data));
        assert_eq!(receive(&mut connection, Op::ReadWrite, 0, 1), Err(Violation));
        connection.forward(10);
        assert_eq!(receive(&mut connection, Op::ReadWrite, 0, 11), Err(Violation));
        assert_eq!(receive(&mut connection, Op::ReadWrite, 0, 10), Ok(Received::Data));
        assert_eq!(receive(&mut accepted(), Op::ReadWrite, 0, u32::MAX), Err(Violation));
    }

    #[test]
    fn the_guest_is_told_of_room_when_half_of_it_came_free_or_when_it_asks() {
        let mut connection = accepted();
        receive(&mut connection, Op::ReadWrite, 0, ALLOC).unwrap();
        connection.forward(ALLOC / 2 - 1);
        assert!(!connection.owes());
        connection.forward(1);
        let update = connection.next_packet().unwrap();
        assert_eq!((update.op(), update.fwd_cnt), (Some(Op::CreditUpdate), ALLOC / 2));
        assert!(!connection.owes());
        receive(&mut connection, Op::CreditRequest, 0, 0).unwrap();
        assert_eq!(connection.next_packet().unwrap().op(), Some(Op::CreditUpdate));
    }

    #[test]
    fn a_guest_without_room_is_asked_once_until_it_has_some() {
        let mut connection = accepted();
        connection.send(GUEST_ALLOC);
        assert_eq!(connection.next_packet().unwrap().op(), Some(Op::CreditRequest));
        receive(&mut connection, Op::CreditUpdate, 0, 0).unwrap();
        assert!(!connection.owes());
        let update = Header { buf_alloc: GUEST_ALLOC, fwd_cnt: 5, ..Header::default() };
        connection.receive(Op::CreditUpdate, &update).unwrap();
        assert_eq!(connection.credit(), 5);
        connection.send(5);
        assert_eq!(connection.next_packet().unwrap().op(), Some(Op::CreditRequest));
    }

    #[test]
    fn a_guest_that_shrinks_its_room_below_what_is_in_flight_gets_nothing() {
        let mut connection = accepted();
        connection.send(1000);
        let update = Header { buf_alloc: 10, ..Header::default() };
        connection.receive(Op::CreditUpdate, &update).unwrap();
        assert_eq!(connection.credit(), 0);
    }

    #[test]
    fn what_either_side_will_no_longer_do_adds_up_and_is_told_once() {
        let mut connection = accepted();
        connection.shut_down(Shutdown { send: true, receive: false });
        assert_eq!(connection.credit(), 0);
        assert_eq!(connection.next_packet().unwrap().flags, 2);
        connection.shut_down(Shutdown { send: true, receive: false });
        assert!(!connection.owes());
        connection.shut_down(Shutdown { send: false, receive: true });
        assert_eq!(connection.next_packet().unwrap().flags, 3);
        assert_eq!(receive(&mut connection, Op::ReadWrite, 0, 1), Ok(Received::Discarded));

        receive(&mut connection, Op::Shutdown, 2, 0).unwrap();
        assert_eq!(connection.guest_shutdown(), Shutdown { send: true, receive: false });
        assert_eq!(receive(&mut connection, Op::ReadWrite, 0, 1), Err(Violation));
        receive(&mut connection, Op::Shutdown, 1, 0).unwrap();
        assert_eq!(connection.guest_shutdown(), Shutdown::BOTH);
    }

    #[test]
    fn a_guest_that_no_longer_receives_is_sent_nothing() {
        let mut connection = accepted();
        assert_eq!(connection.credit(), GUEST_ALLOC as usize);
        receive(&mut connection, Op::Shutdown, 1, 0).unwrap();
        assert_eq!(connection.credit(), 0);
    }

    /// What a guest's kernel keeps, and the packets that are on their way.
    struct Model {
        connection: Connection,
        guest_sent: u32,
        guest_received: u32,
        guest_read: u32,
        host_alloc: u32,
        host_forwarded: u32,
        to_host: VecDeque<Header>,
        to_guest: VecDeque<Header>,
    }

    impl Model {
        /// All counters begin here, so that they wrap.
        fn new(start: u32) -> Self {
            let mut connection = accepted();
            connection.sent = start;
            connection.guest_forwarded = start;
            connection.received = start;
            connection.forwarded = start;
            connection.reported = start;
            Self {
                connection,
                guest_sent: start,
                guest_received: start,
                guest_read: start,
                host_alloc: ALLOC,
                host_forwarded: start,
                to_host: VecDeque::new(),
                to_guest: VecDeque::new(),
            }
        }

        fn guest_credit(&self) -> u32 {
            self.host_alloc - self.guest_sent.wrapping_sub(self.host_forwarded)
        }

        fn guest_sends(&mut self, op: Op, len: u32) {
            let header =
                Header { op: op as u16, len, buf_alloc: GUEST_ALLOC, fwd_cnt: self.guest_read, ..Header::default() };
            self.to_host.push_back(header);
        }

        fn held(&self) -> u32 {
            self.connection.received.wrapping_sub(self.connection.forwarded)
        }

        fn step(&mut self, action: u8, count: u32) {
            match action {
                0 => {
                    let len = count.min(self.guest_credit());
                    self.guest_sent = self.guest_sent.wrapping_add(len);
                    self.guest_sends(Op::ReadWrite, len);
                }
                1 => {
                    if let Some(header) = self.to_host.pop_front() {
                        self.connection.receive(header.op().unwrap(), &header).unwrap();
                        assert!(self.held() <= ALLOC);
                    }
                }
                2 => self.connection.forward(count.min(self.held())),
                3 => {
                    let len = count.min(self.connection.credit() as u32);
                    if len > 0 {
                        self.to_guest.push_back(self.connection.data_packet(len));
                        self.connection.send(len);
                    }
                }
                4 => self.to_guest.extend(self.connection.next_packet()),
                5 => {
                    if let Some(header) = self.to_guest.pop_front() {
                        (self.host_alloc, self.host_forwarded) = (header.buf_alloc, header.fwd_cnt);
                        self.guest_received = self.guest_received.wrapping_add(header.len);
                        assert!(self.guest_received.wrapping_sub(self.guest_read) <= GUEST_ALLOC);
                        if header.op() == Some(Op::CreditRequest) {
                            self.guest_sends(Op::CreditUpdate, 0);
                        }
                    }
                }
                6 => {
                    let unread = self.guest_received.wrapping_sub(self.guest_read);
                    self.guest_read = self.guest_read.wrapping_add(count.min(unread));
                    self.guest_sends(Op::CreditUpdate, 0);
                }
                // Another thread of the guest overtakes, with an older or newer idea of its buffers.
                _ => {
                    if let [.., one, two] = self.to_host.make_contiguous()
                        && (one.len == 0 || two.len == 0)
                    {
                        std::mem::swap(one, two);
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn neither_side_is_sent_more_than_it_has_room_for_and_none_starves(
            start in prop_oneof![Just(0u32), u32::MAX - 200_000..=u32::MAX, any::<u32>()],
            steps in prop::collection::vec((0u8..8, 0u32..=ALLOC), 0..400),
        ) {
            let mut model = Model::new(start);
            for (action, count) in steps {
                model.step(action, count);
            }
            // Everything arrives and is read: both sides may send again.
            for _ in 0..4 {
                while !model.to_host.is_empty() || !model.to_guest.is_empty() || model.connection.owes() {
                    for action in [1, 4, 5] {
                        model.step(action, 0);
                    }
                }
                model.step(2, u32::MAX);
                model.step(6, u32::MAX);
            }
            prop_assert!(model.guest_credit() > ALLOC / 2);
            prop_assert_eq!(model.connection.credit(), GUEST_ALLOC as usize);
            prop_assert_eq!(model.connection.received, model.guest_sent);
            prop_assert_eq!(model.guest_received, model.connection.sent);
        }
    }
}
