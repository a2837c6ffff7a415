//! The device's thread: waits for queues, sockets, clients, orders and deadlines, and knows which connection each belongs
//! to.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::net::{SocketFlags, accept_with};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vmm_sys_util::epoll::EventSet;

use super::connection::Connection;
use super::device::Shared;
use super::host::{Client, Line};
use super::link::{Fate, Link, Origin};
use super::packet::Header;
use crate::virtio::{ActiveQueue, Broken, Poll, Worker};

/// Ports of the host's side of connections; also their tokens.
pub const FIRST_LOCAL_PORT: u32 = 1 << 30;
/// See [`FIRST_LOCAL_PORT`].
pub const LAST_LOCAL_PORT: u32 = (1 << 31) - 1;

/// Most connections; one more is refused.
const MAX_LINKS: usize = 1024;

/// Most clients that have not said yet where they want to go; the next ones wait in the listener's queue.
const MAX_CLIENTS: usize = 64;

/// How long a client may take to say it.
const CLIENT_DEADLINE: Duration = Duration::from_secs(15);

/// How long to leave the listener alone after the host has refused to accept, being out of descriptors or memory.
const LISTENER_REST: Duration = Duration::from_secs(1);

/// Bytes held for a connection at most, and for those that come when many are open.
const LARGE_ALLOC: u32 = 256 * 1024;
/// See [`LARGE_ALLOC`].
const SMALL_ALLOC: u32 = 32 * 1024;

/// Sum of what is held for connections, from which on they get little: 64 MiB in all with [`MAX_LINKS`].
const AMPLE: u64 = 32 << 20;

/// Most resets waiting for the driver to offer buffers; until it does, no more of its packets are taken.
pub const MAX_RESETS: usize = 256;

const TO_GUEST: u64 = 0;
const FROM_GUEST: u64 = 1;
const EVENTS: u64 = 2;
const ORDERS: u64 = 3;
const LISTENER: u64 = 4;
const TIMER: u64 = 5;
/// Tokens of clients begin above all ports.
const FIRST_CLIENT: u64 = 1 << 32;

/// See the module.
pub struct Muxer {
    pub shared: Arc<Shared>,
    pub to_guest: ActiveQueue,
    pub from_guest: ActiveQueue,
    events: ActiveQueue,

    pub links: HashMap<u32, Link>,
    /// Ports of the links that have something for the guest, in the order of their turns; each once.
    pub turns: VecDeque<u32>,
    /// Resets for the guest that belong to no link.
    pub resets: VecDeque<Header>,
    /// Sum of the links' allocs.
    promised: u64,

    clients: HashMap<u64, Client>,
    next_client: u64,
    listening: bool,
    listener_rests_until: Option<Instant>,

    /// The guest is to be told of a transport reset; it has been told, and nothing goes there until it has taken note.
    reset_due: bool,
    pub reset_unseen: bool,

    timer: OwnedFd,
    armed: Option<Instant>,
}

impl Muxer {
    /// Over the three queues of the device (5.10.2).
    pub fn new(
        shared: Arc<Shared>,
        to_guest: ActiveQueue,
        from_guest: ActiveQueue,
        events: ActiveQueue,
    ) -> io::Result<Self> {
        Ok(Self {
            shared,
            to_guest,
            from_guest,
            events,
            links: HashMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            promised: 0,
            clients: HashMap::new(),
            next_client: FIRST_CLIENT,
            listening: false,
            listener_rests_until: None,
            reset_due: false,
            reset_unseen: false,
            timer: timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?,
            armed: None,
        })
    }

    /// Opens a connection to a port of the guest; if there are too many already, the socket's peer sees its end.
    pub fn connect(&mut self, socket: OwnedFd, guest_port: u32, origin: Origin, poll: &Poll) {
        if self.links.len() >= MAX_LINKS {
            let _ = rustix::net::shutdown(&socket, rustix::net::Shutdown::Both);
            return;
        }
        let alloc = if self.promised < AMPLE { LARGE_ALLOC } else { SMALL_ALLOC };
        let port = self.free_port();
        let connection = Connection::new(self.shared.guest_cid, port, guest_port, alloc);
        self.promised += u64::from(alloc);
        self.links.insert(port, Link::new(connection, socket, origin));
        self.settle(port, poll);
    }

    /// A port of the host that was not used for as long as possible.
    fn free_port(&self) -> u32 {
        let mut port = self.shared.next_port.load(Ordering::SeqCst);
        let next = |port| if port == LAST_LOCAL_PORT { FIRST_LOCAL_PORT } else { port + 1 };
        while self.links.contains_key(&port) {
            port = next(port);
        }
        self.shared.next_port.store(next(port), Ordering::SeqCst);
        port
    }

    /// The agent listens.
    pub fn agent_ready(&mut self, poll: &Poll) {
        if !self.shared.is_ready.swap(true, Ordering::SeqCst) {
            // Fails only if it was written 2^64 times and never read.
            let _ = self.shared.ready.write(1);
        }
        self.connect_agent(poll);
    }

    fn connect_agent(&mut self, poll: &Poll) {
        if self.shared.is_ready.load(Ordering::SeqCst) {
            let agent = self.shared.orders().agent.take();
            if let Some(socket) = agent {
                self.connect(socket, self.shared.agent_port, Origin::Machine, poll);
            }
        }
    }

    /// Draws the consequences of anything that has happened to a link.
    pub fn settle(&mut self, port: u32, poll: &Poll) {
        let Some(link) = self.links.get_mut(&port) else { return };
        let fate = match link.settle() {
            // Out of memory, or of epoll watches.
            Fate::Lives if link.watch(poll).is_err() => Fate::Resets,
            fate => fate,
        };
        if fate != Fate::Lives {
            return self.remove(port, fate, poll);
        }
        let deadline = link.deadline();
        if link.readable || link.connection.owes() {
            self.queue(port);
        }
        if let Some(deadline) = deadline {
            self.wake_at(deadline);
        }
    }

    /// Gives a link a turn.
    fn queue(&mut self, port: u32) {
        if let Some(link) = self.links.get_mut(&port)
            && !std::mem::replace(&mut link.queued, true)
        {
            self.turns.push_back(port);
        }
    }

    /// Ends a link.
    pub fn remove(&mut self, port: u32, fate: Fate, poll: &Poll) {
        let Some(mut link) = self.links.remove(&port) else { return };
        link.unwatch(poll);
        self.promised -= u64::from(link.connection.alloc());
        if link.queued {
            self.turns.retain(|queued| *queued != port);
        }
        if fate == Fate::Resets && link.connection.is_asked() {
            self.reset(link.connection.reset_packet());
        }
    }

    /// Has a reset sent. While the driver offers no buffers, its packets are held up ([`MAX_RESETS`]), but the host's own
    /// connections may still end: then the oldest resets are forgotten, and the guest learns by deadlines of its own.
    pub fn reset(&mut self, header: Header) {
        if self.resets.len() >= MAX_RESETS + MAX_LINKS {
            self.resets.pop_front();
        }
        self.resets.push_back(header);
    }

    fn take_orders(&mut self, poll: &Poll) -> Result<(), Broken> {
        let (transport_reset, connections) = {
            let mut orders = self.shared.orders();
            (std::mem::take(&mut orders.transport_reset), std::mem::take(&mut orders.connections))
        };
        if transport_reset {
            for port in self.links.keys().copied().collect::<Vec<_>>() {
                self.remove(port, Fate::Ends, poll);
            }
            self.resets.clear();
            self.reset_due = true;
            self.events.clear_kick();
        }
        self.announce_reset()?;
        self.connect_agent(poll);
        for (socket, port) in connections {
            self.connect(socket, port, Origin::Machine, poll);
        }
        Ok(())
    }

    /// Puts a transport reset (5.10.6.7) on the event queue when the driver has a buffer there. The driver acknowledges by
    /// giving a buffer back: to be notified of the next one, all that it has given are popped, and put back after.
    fn announce_reset(&mut self) -> Result<(), Broken> {
        const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();
        if !self.reset_due {
            return Ok(());
        }
        let memory = self.events.memory().clone();
        loop {
            let mut spare = 0;
            let first = self.events.pop()?;
            while first.is_some() && spare < self.events.state().size && self.events.pop()?.is_some() {
                spare += 1;
            }
            let again = self.events.enable_notification()?;
            for _ in 0..spare {
                self.events.unpop();
            }
            if let Some(chain) = first {
                if chain.writable(&memory).write(&TRANSPORT_RESET) != TRANSPORT_RESET.len() {
                    return Err(Broken::Request("event buffer too small"));
                }
                self.events.complete(&chain, TRANSPORT_RESET.len() as u32)?;
                self.reset_due = false;
                self.reset_unseen = true;
                return self.events.notify();
            }
            if !again {
                return Ok(());
            }
        }
    }

    fn accept(&mut self, poll: &Poll) -> Result<(), Broken> {
        let shared = self.shared.clone();
        let Some(listener) = &shared.listener else { return Ok(()) };
        for _ in 0..MAX_CLIENTS {
            if self.clients.len() >= MAX_CLIENTS {
                break;
            }
            match accept_with(listener, SocketFlags::CLOEXEC) {
                Ok(socket) => {
                    let deadline = Instant::now() + CLIENT_DEADLINE;
                    let token = self.next_client;
                    self.next_client += 1;
                    if poll.add(socket.as_raw_fd(), token, EventSet::IN).is_ok() {
                        self.clients.insert(token, Client::new(socket, deadline));
                        self.wake_at(deadline);
                    }
                }
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(_) => {
                    let until = Instant::now() + LISTENER_REST;
                    self.listener_rests_until = Some(until);
                    self.wake_at(until);
                    break;
                }
            }
        }
        self.listen(poll)
    }

    /// Waits for clients, or not, as there is room.
    fn listen(&mut self, poll: &Poll) -> Result<(), Broken> {
        let Some(listener) = &self.shared.listener else { return Ok(()) };
        let wanted = self.clients.len() < MAX_CLIENTS && self.listener_rests_until.is_none();
        if wanted != self.listening {
            self.listening = wanted;
            match wanted {
                true => poll.add(listener.as_raw_fd(), LISTENER, EventSet::IN),
                false => poll.remove(listener.as_raw_fd()),
            }
            .map_err(|e| Broken::Host("listener of the socket device", e))?;
        }
        Ok(())
    }

    fn hear(&mut self, token: u64, poll: &Poll) -> Result<(), Broken> {
        let Some(client) = self.clients.get_mut(&token) else { return Ok(()) };
        let line = client.read();
        if line == Line::Partial {
            return Ok(());
        }
        if let Some(client) = self.clients.remove(&token) {
            let _ = poll.remove(client.socket().as_raw_fd());
            if let Line::Connect(port) = line {
                self.connect(client.into_socket(), port, Origin::Client, poll);
            }
        }
        self.listen(poll)
    }

    /// Has the timer go off at `deadline`, if it would not before. A timer that goes off too early does no harm.
    fn wake_at(&mut self, deadline: Instant) {
        if self.armed.is_some_and(|armed| armed <= deadline) {
            return;
        }
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let value = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let once = Itimerspec { it_interval: zero, it_value: value };
        if timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_ok() {
            self.armed = Some(deadline);
        }
    }

    fn expire(&mut self, poll: &Poll) -> Result<(), Broken> {
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        self.armed = None;
        let now = Instant::now();
        let late: Vec<_> = self.clients.iter().filter(|(_, c)| c.deadline <= now).map(|(token, _)| *token).collect();
        for token in late {
            if let Some(client) = self.clients.remove(&token) {
                let _ = poll.remove(client.socket().as_raw_fd());
            }
        }
        let is_late = |link: &Link| link.deadline().is_some_and(|deadline| deadline <= now);
        let late: Vec<_> = self.links.iter().filter(|(_, link)| is_late(link)).map(|(port, _)| *port).collect();
        for port in late {
            self.remove(port, Fate::Resets, poll);
        }
        if self.listener_rests_until.is_some_and(|until| until <= now) {
            self.listener_rests_until = None;
        }
        self.arm();
        self.listen(poll)
    }

    /// Sets the timer for the next of all deadlines.
    fn arm(&mut self) {
        let clients = self.clients.values().map(|client| client.deadline);
        let links = self.links.values().filter_map(Link::deadline);
        if let Some(next) = clients.chain(links).chain(self.listener_rests_until).min() {
            self.wake_at(next);
        }
    }
}

impl Worker for Muxer {
    fn start(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(self.events.kick(), EVENTS, EventSet::IN)?;
        for (queue, token) in [(&self.to_guest, TO_GUEST), (&self.from_guest, FROM_GUEST)] {
            poll.add(queue.kick(), token, EventSet::IN)?;
            queue.kick_self();
        }
        poll.add(self.shared.wake.as_raw_fd(), ORDERS, EventSet::IN)?;
        let _ = self.shared.wake.write(1);
        poll.add(self.timer.as_raw_fd(), TIMER, EventSet::IN)?;
        for (token, client) in &mut self.clients {
            client.deadline = Instant::now() + CLIENT_DEADLINE;
            poll.add(client.socket().as_raw_fd(), *token, EventSet::IN)?;
        }
        for link in self.links.values_mut() {
            link.restart();
            link.watch(poll)?;
        }
        self.listening = false;
        self.listen(poll).map_err(io::Error::other)?;
        self.armed = None;
        self.arm();
        Ok(())
    }

    fn handle(&mut self, token: u64, events: EventSet, poll: &Poll) -> Result<(), Broken> {
        match token {
            TO_GUEST => {
                self.to_guest.clear_kick();
                self.to_guest.disable_notification()?;
            }
            FROM_GUEST => self.take_packets(poll)?,
            EVENTS => {
                self.events.clear_kick();
                self.reset_unseen = false;
                self.announce_reset()?;
            }
            ORDERS => {
                let _ = self.shared.wake.read();
                self.take_orders(poll)?;
            }
            LISTENER => self.accept(poll)?,
            TIMER => self.expire(poll)?,
            FIRST_CLIENT.. => self.hear(token, poll)?,
            port => {
                let port = port as u32;
                if let Some(link) = self.links.get_mut(&port) {
                    link.handle(events);
                    // What is only to be read is settled after its turn, so that it need not be unwatched meanwhile.
                    match link.readable && !events.contains(EventSet::OUT) {
                        true => self.queue(port),
                        false => self.settle(port, poll),
                    }
                }
            }
        }
        self.serve(poll)
    }

    fn queues(&self) -> Vec<Option<&ActiveQueue>> {
        vec![Some(&self.to_guest), Some(&self.from_guest), Some(&self.events)]
    }
}
