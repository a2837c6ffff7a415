//! The control socket: connections of those who speak to a machine that somebody else started. They are served one packet at
//! a time, by the thread that waits for all of them at once; see [`crate::control`] for what a client may expect.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

use super::Line;
use crate::control::{self, ChannelError, MAX_CLIENTS, Measured, Notice, Request};

/// See the module.
#[derive(Default)]
pub struct Clients {
    /// None: the machine has no control socket (any more).
    listener: Option<OwnedFd>,
    /// The one that has been silent longest first.
    connections: VecDeque<Connection>,
}

struct Connection {
    socket: OwnedFd,
    /// Its last request is answered when the guest has taken its memory, and the next one is not read before.
    waits: bool,
}

/// When a request that did not fail is answered.
pub enum Answer {
    Now,
    /// With numbers.
    Measured(Measured),
    /// By [`Clients::memory_is_taken`].
    OnceMemoryIsTaken,
}

/// What is to be waited for, in order: the connections, then the listener.
pub type Ready = Vec<bool>;

impl Clients {
    /// Serves a listening socket of packets.
    pub fn new(listener: Option<OwnedFd>) -> Result<Self, Errno> {
        if let Some(listener) = &listener {
            rustix::io::ioctl_fionbio(listener, true)?;
        }
        Ok(Self { listener, connections: VecDeque::new() })
    }

    /// What is to be waited for, and with what; of a client that waits itself, its end.
    pub fn descriptors(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let connections = self.connections.iter().map(|connection| {
            let events = if connection.waits { PollFlags::empty() } else { PollFlags::IN };
            (connection.socket.as_fd(), events)
        });
        connections.chain(self.listener.iter().map(|listener| (listener.as_fd(), PollFlags::IN)))
    }

    /// Answers those of [`Clients::descriptors`] that have something, and takes a new one.
    pub fn serve(&mut self, ready: &[bool], mut carry_out: impl FnMut(Request, Vec<OwnedFd>) -> Result<Answer, Line>) {
        let mut spoken = Vec::new();
        let mut silent = VecDeque::new();
        let count = self.connections.len();
        for (connection, ready) in self.connections.drain(..).zip(ready) {
            match (ready, connection.waits) {
                (false, _) => silent.push_back(connection),
                (true, false) => spoken.extend(serve_one(connection.socket, &mut carry_out)),
                // It is gone.
                (true, true) => {}
            }
        }
        silent.extend(spoken);
        self.connections = silent;
        if ready.get(count) == Some(&true) {
            self.accept();
        }
    }

    /// Answers those that wait for it.
    pub fn memory_is_taken(&mut self) {
        self.connections.retain_mut(|connection| {
            !std::mem::take(&mut connection.waits) || control::send(&connection.socket, &Notice::Done, &[]).is_ok()
        });
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => {
                if self.connections.len() == MAX_CLIENTS {
                    let idle = self.connections.iter().position(|connection| !connection.waits);
                    self.connections.remove(idle.unwrap_or(0));
                }
                self.connections.push_back(Connection { socket, waits: false });
            }
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            // No descriptor or no memory is left. A connection less, or in the end no socket, is better than to be told of the
            // same client for ever.
            Err(_) if self.connections.pop_front().is_some() => {}
            Err(_) => self.listener = None,
        }
    }
}

/// Carries out one request; the connection is gone if its client is, or does not take the answer.
fn serve_one(
    socket: OwnedFd,
    carry_out: &mut impl FnMut(Request, Vec<OwnedFd>) -> Result<Answer, Line>,
) -> Option<Connection> {
    let result = match control::receive(&socket) {
        Ok((Request::Start(_), _)) => Err("a machine is started over its channel, not over its control socket".into()),
        Ok((request, fds)) => carry_out(request, fds),
        Err(ChannelError::Malformed(what)) => Err(what),
        Err(ChannelError::Io(Errno::AGAIN)) => return Some(Connection { socket, waits: false }),
        Err(ChannelError::Io(_) | ChannelError::Closed) => return None,
    };
    let notice = match result {
        Ok(Answer::OnceMemoryIsTaken) => return Some(Connection { socket, waits: true }),
        Ok(Answer::Now) => Notice::Done,
        Ok(Answer::Measured(measured)) => Notice::Measured(measured),
        Err(line) => Notice::Failed(line),
    };
    control::send(&socket, &notice, &[]).is_ok().then_some(Connection { socket, waits: false })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{receive, send};
    use rustix::event::{PollFd, poll};
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, connect, listen, socket_with};

    /// Clients, and the path to them.
    fn clients() -> (Clients, SocketAddrUnix) {
        let listener = new_socket();
        // Without a name: the kernel gives an abstract one.
        bind(&listener, &SocketAddrUnix::new_unnamed()).unwrap();
        listen(&listener, 16).unwrap();
        let address = SocketAddrUnix::try_from(rustix::net::getsockname(&listener).unwrap()).unwrap();
        (Clients::new(Some(listener)).unwrap(), address)
    }

    fn new_socket() -> OwnedFd {
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    fn client(address: &SocketAddrUnix) -> OwnedFd {
        let socket = new_socket();
        connect(&socket, address).unwrap();
        socket
    }

    /// Serves until nothing is left to be served; returns the counts of CPUs that were asked for.
    fn settle(clients: &mut Clients) -> Vec<u32> {
        let mut asked = Vec::new();
        loop {
            let ready: Ready = {
                let descriptors = clients.descriptors();
                let mut fds: Vec<_> = descriptors.map(|(fd, events)| PollFd::from_borrowed_fd(fd, events)).collect();
                let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
                if poll(&mut fds, Some(&none)).unwrap() == 0 {
                    return asked;
                }
                fds.iter().map(|fd| !fd.revents().is_empty()).collect()
            };
            clients.serve(&ready, |request, _| match request {
                Request::SetCpus(0) => Err("none".into()),
                Request::SetCpus(count) => {
                    asked.push(count);
                    Ok(Answer::Now)
                }
                Request::AwaitMemory => Ok(Answer::OnceMemoryIsTaken),
                Request::Measure => Ok(Answer::Measured(Measured { cpus: 3, ..Measured::default() })),
                _ => panic!("{request:?}"),
            });
        }
    }

    fn notice(client: &OwnedFd) -> Notice {
        receive(client).unwrap().0
    }

    #[test]
    fn requests_are_answered_in_order_and_a_client_that_leaves_ends_nothing() {
        let (mut clients, address) = clients();
        let (one, two) = (client(&address), client(&address));
        for count in [3, 0] {
            send(&one, &Request::SetCpus(count), &[]).unwrap();
        }
        send(&two, &Request::SetCpus(5), &[]).unwrap();
        drop(two);
        assert_eq!(settle(&mut clients), [3, 5]);
        assert_eq!((notice(&one), notice(&one)), (Notice::Done, Notice::Failed("none".into())));
        send(&one, &Request::SetCpus(4), &[]).unwrap();
        assert_eq!(settle(&mut clients), [4]);
        assert_eq!(clients.connections.len(), 1);
    }

    #[test]
    fn the_client_that_is_silent_longest_makes_room() {
        let (mut clients, address) = clients();
        let mut all: Vec<_> = (0..MAX_CLIENTS).map(|_| client(&address)).collect();
        settle(&mut clients);
        // The first has spoken last.
        send(&all[0], &Request::SetCpus(1), &[]).unwrap();
        assert_eq!(settle(&mut clients), [1]);
        assert_eq!(notice(&all[0]), Notice::Done);
        all.push(client(&address));
        settle(&mut clients);
        assert_eq!(clients.connections.len(), MAX_CLIENTS);
        assert!(matches!(receive::<Notice>(&all[1]), Err(ChannelError::Closed)));
        for (index, client) in all.iter().enumerate().filter(|(index, _)| *index != 1) {
            send(client, &Request::SetCpus(index as u32 + 1), &[]).unwrap();
        }
        assert_eq!(settle(&mut clients).len(), MAX_CLIENTS);
        assert_eq!(notice(&all[MAX_CLIENTS]), Notice::Done);
    }

    #[test]
    fn who_asks_for_numbers_is_answered_with_them() {
        let (mut clients, address) = clients();
        let one = client(&address);
        send(&one, &Request::Measure, &[]).unwrap();
        settle(&mut clients);
        assert_eq!(notice(&one), Notice::Measured(Measured { cpus: 3, ..Measured::default() }));
    }

    /// Whether there is no answer yet.
    fn waits(client: &OwnedFd) -> bool {
        rustix::io::ioctl_fionbio(client, true).unwrap();
        let answer = receive::<Notice>(client);
        rustix::io::ioctl_fionbio(client, false).unwrap();
        matches!(answer, Err(ChannelError::Io(Errno::AGAIN)))
    }

    #[test]
    fn who_waits_for_memory_is_answered_when_it_is_there_and_what_it_asks_meanwhile_after() {
        let (mut clients, address) = clients();
        let (waiting, other) = (client(&address), client(&address));
        for request in [Request::SetCpus(1), Request::AwaitMemory, Request::SetCpus(2), Request::AwaitMemory] {
            send(&waiting, &request, &[]).unwrap();
        }
        assert_eq!(settle(&mut clients), [1]);
        assert_eq!(notice(&waiting), Notice::Done);
        assert!(waits(&waiting));
        send(&other, &Request::SetCpus(3), &[]).unwrap();
        assert_eq!(settle(&mut clients), [3]);
        assert_eq!(notice(&other), Notice::Done);
        clients.memory_is_taken();
        assert_eq!(notice(&waiting), Notice::Done);
        assert!(waits(&waiting) && waits(&other));
        assert_eq!(settle(&mut clients), [2]);
        assert_eq!(notice(&waiting), Notice::Done);
        assert!(waits(&waiting));
        clients.memory_is_taken();
        assert_eq!(notice(&waiting), Notice::Done);
    }

    #[test]
    fn a_client_that_leaves_while_it_waits_ends_nothing() {
        let (mut clients, address) = clients();
        let (gone, there) = (client(&address), client(&address));
        for client in [&gone, &there] {
            send(client, &Request::AwaitMemory, &[]).unwrap();
        }
        settle(&mut clients);
        send(&gone, &Request::SetCpus(1), &[]).unwrap();
        drop(gone);
        assert!(settle(&mut clients).is_empty());
        assert_eq!(clients.connections.len(), 1);
        clients.memory_is_taken();
        assert_eq!(notice(&there), Notice::Done);
    }

    #[test]
    fn who_waits_makes_room_only_when_all_do() {
        let (mut clients, address) = clients();
        let mut all: Vec<_> = (0..MAX_CLIENTS).map(|_| client(&address)).collect();
        for client in &all[..MAX_CLIENTS - 1] {
            send(client, &Request::AwaitMemory, &[]).unwrap();
        }
        settle(&mut clients);
        all.push(client(&address));
        settle(&mut clients);
        assert!(matches!(receive::<Notice>(&all[MAX_CLIENTS - 1]), Err(ChannelError::Closed)));
        send(&all[MAX_CLIENTS], &Request::AwaitMemory, &[]).unwrap();
        settle(&mut clients);
        all.push(client(&address));
        settle(&mut clients);
        assert!(matches!(receive::<Notice>(&all[0]), Err(ChannelError::Closed)));
        assert_eq!(clients.connections.len(), MAX_CLIENTS);
        clients.memory_is_taken();
        for client in all[1..MAX_CLIENTS - 1].iter().chain([&all[MAX_CLIENTS]]) {
            assert_eq!(notice(client), Notice::Done);
        }
        assert!(waits(&all[MAX_CLIENTS + 1]));
    }

    #[test]
    fn a_client_that_does_not_take_its_answers_is_left() {
        let (mut clients, address) = clients();
        let deaf = client(&address);
        rustix::io::ioctl_fionbio(&deaf, true).unwrap();
        settle(&mut clients);
        let mut sent = 0;
        while clients.connections.len() == 1 {
            while send(&deaf, &Request::SetCpus(1), &[]).is_ok() {
                sent += 1;
            }
            settle(&mut clients);
            assert!(sent < 100_000, "its answers go somewhere");
        }
        let other = client(&address);
        send(&other, &Request::SetCpus(7), &[]).unwrap();
        assert_eq!(settle(&mut clients), [7]);
        assert_eq!(notice(&other), Notice::Done);
    }

    #[test]
    fn a_start_and_nonsense_are_refused() {
        let (mut clients, address) = clients();
        let one = client(&address);
        let config = crate::control::MachineConfig {
            memory_bytes: 0,
            memory_max_bytes: 0,
            cpus_max: 1,
            extra_cmdline: String::new(),
            resources: Vec::new(),
            devices: Vec::new(),
        };
        send(&one, &Request::Start(config), &[]).unwrap();
        rustix::io::write(&one, b"{}").unwrap();
        settle(&mut clients);
        assert!(matches!(notice(&one), Notice::Failed(why) if why.contains("control socket")));
        assert!(matches!(notice(&one), Notice::Failed(_)));
        send(&one, &Request::SetCpus(2), &[]).unwrap();
        assert_eq!(settle(&mut clients), [2]);
    }
}
