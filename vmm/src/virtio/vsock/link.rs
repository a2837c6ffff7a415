//! A connection together with its socket on the host: passes bytes on, keeps what the socket does not take yet, and carries
//! the end of either direction across.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg, shutdown};
use vmm_sys_util::epoll::EventSet;

use super::connection::Connection;
use super::packet::Shutdown;
use super::{host, socket};
use crate::virtio::{Buffers, Poll};

/// How long the guest may take to answer the end of a connection that the host has left.
const END_DEADLINE: Duration = Duration::from_secs(10);

/// Most bytes dropped of a socket that is closed: more than one holds by default.
const MAX_UNWANTED: usize = 1 << 20;

/// Most buffers of the driver filled in one turn.
pub const MAX_BATCH: usize = 32;

/// Where the socket of a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A client of the pod's socket, which waits for its `OK`.
    Client,
    /// Handed over by the machine.
    Machine,
}

impl Origin {
    /// How long the guest may take to answer a request for a connection. A client gives up by itself, but its socket counts until
    /// then; what the machine depends on has as long as the whole boot.
    fn patience(self) -> Duration {
        match self {
            Self::Client => Duration::from_secs(30),
            Self::Machine => Duration::from_secs(120),
        }
    }
}

/// What becomes of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Lives,
    /// It is over on both sides.
    Ends,
    /// It is over here, and the guest must be told so.
    Resets,
}

/// See the module.
pub struct Link {
    /// Its rules.
    pub connection: Connection,
    /// The socket may have something to read, and waits for its turn.
    pub readable: bool,
    /// It is among those that wait for a turn.
    pub queued: bool,
    /// How many of the driver's buffers to offer to the next read.
    pub batch: usize,
    socket: OwnedFd,
    origin: Origin,
    /// From the guest, not taken by the socket yet; at most what the connection's credit allows.
    backlog: VecDeque<u8>,
    registered: Option<EventSet>,
    hung_up: bool,
    shut: Shutdown,
    deadline: Option<Instant>,
}

impl Link {
    /// A link that is still to be asked for.
    pub fn new(connection: Connection, socket: OwnedFd, origin: Origin) -> Self {
        Self {
            connection,
            readable: false,
            queued: false,
            batch: 1,
            socket,
            origin,
            backlog: VecDeque::new(),
            registered: None,
            hung_up: false,
            shut: Shutdown::default(),
            deadline: Some(Instant::now() + origin.patience()),
        }
    }

    /// When it must have got on.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The thread starts again after a pause: nothing is registered, and the guest has had no time to answer.
    pub fn restart(&mut self) {
        self.registered = None;
        if self.deadline.is_some() {
            let is_left = self.connection.host_shutdown() == Shutdown::BOTH;
            self.deadline = Some(Instant::now() + if is_left { END_DEADLINE } else { self.origin.patience() });
        }
    }

    /// The guest has accepted.
    pub fn accepted(&mut self) -> Fate {
        self.deadline = None;
        match self.origin {
            Origin::Client if host::accept(&self.socket, self.connection.local_port()).is_err() => Fate::Resets,
            _ => Fate::Lives,
        }
    }

    /// The socket has events. Reading is left to its turn.
    pub fn handle(&mut self, events: EventSet) {
        self.hung_up |= events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if events.contains(EventSet::OUT) || self.hung_up {
            self.drain();
        }
        if self.hung_up && self.reading_is_over() {
            self.connection.shut_down(Shutdown::BOTH);
        }
        let news = self.hung_up || events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        self.readable = self.may_read() && (self.readable || news);
    }

    /// Nothing of the socket will reach the guest any more.
    fn reading_is_over(&self) -> bool {
        self.connection.guest_shutdown().receive || self.connection.host_shutdown().send
    }

    /// There is a use in reading the socket.
    pub fn may_read(&self) -> bool {
        self.connection.credit() > 0
    }

    /// Reads into buffers of the guest; `None` if there is nothing now. The end of the stream is 0, and noted.
    pub fn read(&mut self, buffers: &[Buffers]) -> Option<usize> {
        match socket::receive(&self.socket, buffers) {
            Ok(0) if self.hung_up => self.connection.shut_down(Shutdown::BOTH),
            Ok(0) => self.connection.shut_down(Shutdown { send: true, receive: false }),
            Ok(count) => return Some(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            Err(_) => self.connection.shut_down(Shutdown::BOTH),
        }
        Some(0)
    }

    /// Passes bytes of the guest on; what the socket does not take is kept.
    pub fn forward(&mut self, payload: &mut [Buffers]) {
        if self.connection.host_shutdown().receive {
            return;
        }
        let mut taken = 0;
        if self.backlog.is_empty() {
            match socket::send(&self.socket, payload) {
                Ok(count) => taken = count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return self.refuse(),
            }
            self.connection.forward(taken as u32);
        }
        for buffers in payload {
            let skip = taken.min(buffers.len());
            buffers.skip(skip);
            taken -= skip;
            let mut chunk = [0; 4096];
            while !buffers.is_empty() {
                let count = buffers.read(&mut chunk);
                self.backlog.extend(&chunk[..count]);
            }
        }
    }

    /// Writes what was kept.
    fn drain(&mut self) {
        while !self.backlog.is_empty() {
            let (front, back) = self.backlog.as_slices();
            let pieces = [IoSlice::new(front), IoSlice::new(back)];
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(&self.socket, &pieces, &mut SendAncillaryBuffer::default(), flags) {
                Ok(count) => {
                    self.backlog.drain(..count);
                    self.connection.forward(count as u32);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return,
                Err(_) => return self.refuse(),
            }
        }
        // Most connections never fall behind, or do so once: an empty one holds no memory.
        self.backlog = VecDeque::new();
    }

    /// The host takes no more: what it has not taken is lost, as with any closed stream.
    fn refuse(&mut self) {
        self.backlog = VecDeque::new();
        self.connection.shut_down(Shutdown { receive: true, send: false });
    }

    /// Carries out what the two sides have said, after anything has happened.
    pub fn settle(&mut self) -> Fate {
        let (guest, host) = (self.connection.guest_shutdown(), self.connection.host_shutdown());
        if host.receive {
            self.backlog = VecDeque::new();
        }
        if self.backlog.is_empty() {
            if self.connection.is_reset() {
                return Fate::Ends;
            }
            if guest == Shutdown::BOTH {
                return Fate::Resets;
            }
            if guest.send && !self.shut.send {
                self.shut.send = true;
                // A peer that is gone shows as a hang-up.
                let _ = shutdown(&self.socket, rustix::net::Shutdown::Write);
            }
        }
        if guest.receive && !self.shut.receive {
            self.shut.receive = true;
            let _ = shutdown(&self.socket, rustix::net::Shutdown::Read);
        }
        if host == Shutdown::BOTH {
            self.deadline.get_or_insert_with(|| Instant::now() + END_DEADLINE);
        }
        Fate::Lives
    }

    /// Waits for what there is a use in: readability while the guest has room and no turn is due, writability while there is
    /// a backlog; otherwise once for the peer to hang up.
    pub fn watch(&mut self, poll: &Poll) -> io::Result<()> {
        let mut events = EventSet::empty();
        if self.may_read() && !self.readable {
            events |= EventSet::IN | EventSet::READ_HANG_UP;
        }
        if !self.backlog.is_empty() {
            events |= EventSet::OUT;
        }
        if events.is_empty() {
            events = EventSet::EDGE_TRIGGERED;
        }
        if self.registered == Some(events) {
            return Ok(());
        }
        let (fd, token) = (self.socket.as_raw_fd(), u64::from(self.connection.local_port()));
        match self.registered.replace(events) {
            None => poll.add(fd, token, events),
            Some(_) => poll.modify(fd, token, events),
        }
    }

    /// Stops waiting. The socket may have other copies, so closing it would not do.
    pub fn unwatch(&mut self, poll: &Poll) {
        if self.registered.take().is_some() {
            let _ = poll.remove(self.socket.as_raw_fd());
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Its peer sees the end even if the socket has other copies; and sees it as the end, not as an error, which it would
        // be if bytes that the guest did not want were left unread (unix(7), `ECONNRESET`).
        let _ = shutdown(&self.socket, rustix::net::Shutdown::Both);
        let mut unwanted = [0; 4096];
        for _ in 0..MAX_UNWANTED / unwanted.len() {
            if !recv(&self.socket, &mut unwanted, RecvFlags::DONTWAIT).is_ok_and(|(_, count)| count > 0) {
                break;
            }
        }
    }
}
