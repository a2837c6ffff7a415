//! Names that containers ask a resolver for which is on the host, at a loopback address of its own network namespace, as
//! Docker's is: here they are asked of the agent, which asks the host over a stream, and gives the answers back.
//!
//! The resolver's port is not taken: what is sent to it is translated ([`translate`]) to a port of the agent's, so that a server in
//! a container may have it on any other address, or on all.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use podhull_protocol::names::{HEADER_BYTES, Header, frame};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::{NetworkError, translate};

/// The port of DNS.
const PORT: u16 = 53;

/// Questions that wait for their answers; more are not asked.
const MAX_WAITING: usize = 256;

/// Connections over TCP; more wait to be taken.
const MAX_CONNECTIONS: usize = 64;

/// How long an answer is waited for, and how long a connection may be idle. Programs ask again after 5 seconds, a few times.
const PATIENCE: Duration = Duration::from_secs(30);

/// Ports that are tried until one is free for both.
const TRIES: u32 = 16;

/// A stream to the host.
pub type Stream = Arc<AsyncFd<OwnedFd>>;

/// Where questions arrive.
pub struct Sockets {
    udp: UdpSocket,
    tcp: TcpListener,
    /// What brings them there ends with it.
    _translation: OwnedFd,
}

impl Sockets {
    /// Takes what is asked at an address, in the network namespace of this thread.
    pub fn open(resolver: Ipv4Addr) -> Result<Self, NetworkError> {
        let (udp, tcp) = listen(resolver).map_err(|source| NetworkError::Listen { resolver, source })?;
        let port = udp.local_addr().map_err(|source| NetworkError::Listen { resolver, source })?.port();
        let translation =
            translate::redirect(resolver, PORT, port).map_err(NetworkError::step("translate the resolver's port"))?;
        Ok(Self { udp, tcp, _translation: translation })
    }
}

/// One port of both kinds.
fn listen(address: Ipv4Addr) -> io::Result<(UdpSocket, TcpListener)> {
    let mut taken = io::ErrorKind::AddrInUse.into();
    for _ in 0..TRIES {
        let udp = UdpSocket::bind(SocketAddrV4::new(address, 0))?;
        match TcpListener::bind(udp.local_addr()?) {
            Ok(tcp) => {
                udp.set_nonblocking(true)?;
                tcp.set_nonblocking(true)?;
                return Ok((udp, tcp));
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => taken = error,
            Err(error) => return Err(error),
        }
    }
    Err(taken)
}

/// Asks the host, until the stream to it breaks.
pub async fn serve(sockets: Sockets, stream: Stream) -> io::Result<()> {
    let (udp, tcp) = (tokio::net::UdpSocket::from_std(sockets.udp)?, tokio::net::TcpListener::from_std(sockets.tcp)?);
    let (sender, questions) = mpsc::channel(MAX_WAITING);
    let desk = Arc::new(Desk { waiting: Mutex::default(), questions: sender });
    tokio::select! {
        sent = send(&stream, questions) => sent,
        answered = answers(&stream, &desk, &udp) => answered,
        asked = datagrams(&udp, &desk) => asked,
        asked = connections(&tcp, &desk) => asked,
    }
}

/// Who asked.
enum Asker {
    Datagram(SocketAddr),
    Connection(oneshot::Sender<Vec<u8>>),
}

/// Where questions go out, and what is known of those that did.
struct Desk {
    waiting: Mutex<Waiting>,
    questions: mpsc::Sender<Vec<u8>>,
}

#[derive(Default)]
struct Waiting {
    last: u32,
    askers: HashMap<u32, (Asker, Instant)>,
}

impl Desk {
    /// Asks, unless too many do.
    fn ask(&self, asker: Asker, question: &[u8]) {
        let whole = matches!(asker, Asker::Connection(_));
        let number = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.askers.retain(|_, (asker, since)| {
                let gone = matches!(asker, Asker::Connection(to) if to.is_closed());
                !gone && since.elapsed() < PATIENCE
            });
            if waiting.askers.len() >= MAX_WAITING {
                return;
            }
            waiting.last = waiting.last.wrapping_add(1);
            let number = waiting.last;
            waiting.askers.insert(number, (asker, Instant::now()));
            number
        };
        if let Some(frame) = frame(number, whole, question) {
            // A host that does not take them is asked no more: who asked will ask again.
            let _ = self.questions.try_send(frame);
        }
    }

    /// Who asked a question, once.
    fn asker(&self, number: u32) -> Option<Asker> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.askers.remove(&number).map(|(asker, _)| asker)
    }
}

async fn datagrams(udp: &tokio::net::UdpSocket, desk: &Desk) -> io::Result<()> {
    let mut question = vec![0; usize::from(u16::MAX)];
    loop {
        match udp.recv_from(&mut question).await {
            Ok((length, from)) => desk.ask(Asker::Datagram(from), &question[..length]),
            // Somebody who asked did not wait for the answer.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error),
        }
    }
}

async fn connections(tcp: &tokio::net::TcpListener, desk: &Arc<Desk>) -> io::Result<()> {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = tcp.accept(), if connections.len() < MAX_CONNECTIONS => {
                // One that was gone before it was accepted is no reason to end.
                if let Ok((connection, _)) = accepted {
                    connections.spawn(connection_of(connection, desk.clone()));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Questions and answers with their lengths before them, one after the other (RFC 1035, 4.2.2).
async fn connection_of(mut connection: TcpStream, desk: Arc<Desk>) -> io::Result<()> {
    loop {
        let question = tokio::time::timeout(PATIENCE, async {
            let length = connection.read_u16().await?;
            let mut question = vec![0; usize::from(length)];
            connection.read_exact(&mut question).await?;
            io::Result::Ok(question)
        });
        let question = question.await??;
        let (sender, answer) = oneshot::channel();
        desk.ask(Asker::Connection(sender), &question);
        let Ok(Ok(answer)) = tokio::time::timeout(PATIENCE, answer).await else { return Ok(()) };
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        connection.write_all(&[&length.to_be_bytes(), &answer[..]].concat()).await?;
    }
}

async fn send(stream: &Stream, mut questions: mpsc::Receiver<Vec<u8>>) -> io::Result<()> {
    while let Some(question) = questions.recv().await {
        let mut rest = &question[..];
        while !rest.is_empty() {
            let written = stream.async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, rest)?)).await?;
            rest = &rest[written..];
        }
    }
    Ok(())
}

async fn answers(stream: &Stream, desk: &Desk, udp: &tokio::net::UdpSocket) -> io::Result<()> {
    loop {
        let mut header = [0; HEADER_BYTES];
        read(stream, &mut header).await?;
        let header = Header::from_bytes(header);
        let mut answer = vec![0; usize::from(header.length)];
        read(stream, &mut answer).await?;
        match desk.asker(header.number) {
            Some(Asker::Datagram(to)) => {
                // It may not be there any more.
                let _ = udp.send_to(&answer, to).await;
            }
            Some(Asker::Connection(to)) => {
                let _ = to.send(answer);
            }
            None => {}
        }
    }
}

/// Reads as many bytes as there is room for.
pub async fn read(stream: &AsyncFd<OwnedFd>, bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        let rest = &mut bytes[filled..];
        match stream.async_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut *rest)?)).await {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) if error.raw_os_error() == Some(Errno::INTR.raw_os_error()) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
