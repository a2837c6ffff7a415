//! Standard streams: pipes or a terminal on the container's side, streams from the host on the other.

use std::cell::RefCell;
use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, socketpair};
use rustix::pipe::PipeFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::readiness;

/// Streams that came before the call that announces them; more are turned away.
const MAX_UNCLAIMED: usize = 64;

/// How long a stream may wait for its call, a call for its stream, and a new stream for its token: as long as a guest may boot.
const MEETING_DEADLINE: Duration = Duration::from_secs(120);

/// How long what a program wrote to a socket may take to be passed on when it has ended: the other side may be slow, or may not read
/// any more.
const LINGER: Duration = Duration::from_secs(30);

/// What one turn of a copy moves at most, and the size of a container's pipe.
const TURN_BYTES: usize = 256 << 10;

/// What goes wrong with a container's standard streams.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    #[error("stdio token {0:#x} is announced twice")]
    TokenTwice(u64),
    #[error("make a pipe: {0}")]
    Pipe(Errno),
    #[error("make a socket: {0}")]
    Socket(Errno),
    #[error("give the pipe to user {uid}: {source}")]
    Owner { uid: u32, source: Errno },
    #[error("open /dev/null: {0}")]
    Null(Errno),
    #[error("watch a stream: {0}")]
    Watch(io::Error),
    #[error("a stream of the host did not come within {MEETING_DEADLINE:?}")]
    Absent,
}

/// Streams and calls that wait for one another, by token.
#[derive(Default)]
pub struct Streams {
    slots: Mutex<HashMap<u64, Slot>>,
}

enum Slot {
    /// With what keeps its deadline.
    Arrived(OwnedFd, oneshot::Sender<Infallible>),
    Awaited(oneshot::Sender<OwnedFd>),
    /// Any number of streams has this token.
    All(mpsc::Sender<OwnedFd>),
}

impl Streams {
    /// Takes streams from the listener, forever.
    pub async fn accept_from(self: &Arc<Self>, listener: AsyncFd<OwnedFd>) -> io::Result<Infallible> {
        loop {
            let mut ready = listener.readable().await?;
            let flags = rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK;
            match rustix::net::accept_with(&listener, flags) {
                Ok(stream) => {
                    let streams = self.clone();
                    tokio::spawn(async move {
                        // One that does not say its token in time, or in full, is closed.
                        if let Ok(Ok((token, stream))) =
                            tokio::time::timeout(MEETING_DEADLINE, read_token(stream)).await
                        {
                            streams.arrived(token, stream).await;
                        }
                    });
                }
                Err(Errno::AGAIN) => ready.clear_ready(),
                // The peer was gone before it was accepted.
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    async fn arrived(&self, token: u64, stream: OwnedFd) {
        let claimed = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            match slots.remove(&token) {
                Some(Slot::Awaited(call)) => {
                    // If the call was given up in this moment the stream is closed with it.
                    let _ = call.send(stream);
                    return;
                }
                Some(Slot::All(taker)) => {
                    // More than it wants are turned away, and so is one that comes when it is gone.
                    if !matches!(taker.try_send(stream), Err(mpsc::error::TrySendError::Closed(_))) {
                        slots.insert(token, Slot::All(taker));
                    }
                    return;
                }
                // Two streams of one token: neither can be trusted to be the right one.
                Some(Slot::Arrived(..)) => return,
                None if slots.values().filter(|slot| matches!(slot, Slot::Arrived(..))).count() >= MAX_UNCLAIMED => {
                    return;
                }
                None => {
                    let (sender, receiver) = oneshot::channel();
                    slots.insert(token, Slot::Arrived(stream, sender));
                    receiver
                }
            }
        };
        if tokio::time::timeout(MEETING_DEADLINE, claimed).await.is_err() {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            if matches!(slots.get(&token), Some(Slot::Arrived(..))) {
                slots.remove(&token);
            }
        }
    }

    /// The stream of this token, come or to come.
    pub fn claim(self: &Arc<Self>, token: u64) -> Result<Claim, StdioError> {
        let (sender, receiver) = oneshot::channel();
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        match slots.remove(&token) {
            Some(Slot::Arrived(stream, deadline)) => {
                drop(deadline);
                let _ = sender.send(stream);
            }
            Some(awaited) => {
                slots.insert(token, awaited);
                return Err(StdioError::TokenTwice(token));
            }
            None => {
                slots.insert(token, Slot::Awaited(sender));
            }
        }
        Ok(Claim { token, receiver, streams: self.clone() })
    }

    /// All streams of this token, from now on and for as long as they are received; of those that are not yet, at most so many.
    pub fn claim_all(&self, token: u64, most: usize) -> Result<mpsc::Receiver<OwnedFd>, StdioError> {
        let (sender, receiver) = mpsc::channel(most);
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.retain(|_, slot| !matches!(slot, Slot::All(taker) if taker.is_closed()));
        if slots.contains_key(&token) {
            return Err(StdioError::TokenTwice(token));
        }
        slots.insert(token, Slot::All(sender));
        Ok(receiver)
    }
}

async fn read_token(stream: OwnedFd) -> io::Result<(u64, OwnedFd)> {
    let stream = readiness::watch(stream, Interest::READABLE)?;
    let (mut token, mut filled) = ([0; 8], 0);
    while filled < token.len() {
        let count = stream.async_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut token[filled..])?)).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        filled += count;
    }
    Ok((u64::from_le_bytes(token), stream.into_inner()))
}

/// The right to one stream.
pub struct Claim {
    token: u64,
    receiver: oneshot::Receiver<OwnedFd>,
    streams: Arc<Streams>,
}

impl Claim {
    /// Waits for the stream; none if it does not come in time.
    pub async fn stream(mut self) -> Option<Arc<AsyncFd<OwnedFd>>> {
        let stream = tokio::time::timeout(MEETING_DEADLINE, &mut self.receiver).await.ok()?.ok()?;
        readiness::watch(stream, Interest::READABLE | Interest::WRITABLE).ok().map(Arc::new)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.receiver.close();
        let mut slots = self.streams.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(slots.get(&self.token), Some(Slot::Awaited(call)) if call.is_closed()) {
            slots.remove(&self.token);
        }
    }
}

/// The container's ends, to become its descriptors 0, 1 and 2, and those from 3 on.
pub struct ContainerEnds {
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
    pub further: Vec<OwnedFd>,
}

impl ContainerEnds {
    /// All three on `/dev/null`, as they are until a terminal takes their place.
    pub fn null() -> Result<Self, StdioError> {
        Ok(Self { stdin: null()?, stdout: null()?, stderr: null()?, further: Vec::new() })
    }
}

/// The copies that serve one container.
pub struct Pumps {
    ended: watch::Sender<bool>,
    tasks: JoinSet<()>,
    /// Streams that may not have come yet.
    awaited: Vec<oneshot::Receiver<()>>,
}

impl Pumps {
    /// None yet.
    pub fn new() -> Self {
        Self { ended: watch::Sender::new(false), tasks: JoinSet::new(), awaited: Vec::new() }
    }

    /// Waits until all streams have come: without one, what the program writes would be lost and nobody told.
    pub async fn connected(&mut self) -> Result<(), StdioError> {
        for stream in self.awaited.drain(..) {
            stream.await.map_err(|_| StdioError::Absent)?;
        }
        Ok(())
    }

    /// The stream of a claim; none if it does not come in time, which [`Self::connected`] says then.
    fn stream(&mut self, claim: Claim) -> impl Future<Output = Option<Arc<AsyncFd<OwnedFd>>>> + use<> {
        let (came, awaited) = oneshot::channel();
        self.awaited.push(awaited);
        async move {
            let stream = claim.stream().await?;
            // Nobody may wait for it any more.
            let _ = came.send(());
            Some(stream)
        }
    }

    /// Pipes for the streams that have a token, `/dev/null` for the others. The pipes belong to the container's user, so that
    /// it can open them again as `/dev/stdout`.
    pub fn pipes(&mut self, claims: [Option<Claim>; 3], uid: u32, gid: u32) -> Result<ContainerEnds, StdioError> {
        let [stdin, stdout, stderr] = claims;
        Ok(ContainerEnds {
            stdin: self.input(stdin, uid, gid)?,
            stdout: self.output(stdout, uid, gid)?,
            stderr: self.output(stderr, uid, gid)?,
            further: Vec::new(),
        })
    }

    /// A pipe to read what a stream brings; without one, `/dev/null`.
    pub fn input(&mut self, claim: Option<Claim>, uid: u32, gid: u32) -> Result<OwnedFd, StdioError> {
        let Some(claim) = claim else { return null() };
        let (theirs, ours) = pipe(uid, gid)?;
        let ours = watched(ours, Interest::WRITABLE)?;
        let mut ended = self.ended.subscribe();
        let stream = self.stream(claim);
        self.tasks.spawn(async move {
            let copy = async {
                let Some(stream) = stream.await else { return };
                if copy(&stream, &ours, None).await.is_err() {
                    // The container reads no more; the host is to stop sending.
                    let _ = rustix::net::shutdown(stream.as_ref(), Shutdown::Read);
                }
            };
            tokio::select! {
                () = copy => {}
                _ = ended.wait_for(|ended| *ended) => {}
            }
        });
        Ok(theirs)
    }

    /// A pipe whose bytes a stream takes; without one, `/dev/null`.
    pub fn output(&mut self, claim: Option<Claim>, uid: u32, gid: u32) -> Result<OwnedFd, StdioError> {
        let Some(claim) = claim else { return null() };
        let (ours, theirs) = pipe(uid, gid)?;
        let ours = watched(ours, Interest::READABLE)?;
        let ended = self.ended.subscribe();
        let stream = self.stream(claim);
        self.tasks.spawn(async move {
            let Some(stream) = stream.await else { return };
            // A host that takes no more closes the pipe, as a reader of its own would.
            let _ = copy(&ours, &stream, Some(ended)).await;
            let _ = rustix::net::shutdown(stream.as_ref(), Shutdown::Write);
        });
        Ok(theirs)
    }

    /// A connected socket whose bytes go both ways over a stream.
    pub fn socket(&mut self, claim: Claim) -> Result<OwnedFd, StdioError> {
        let (theirs, ours) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(StdioError::Socket)?;
        let ours = watched(ours, Interest::READABLE | Interest::WRITABLE)?;
        let ended = self.ended.subscribe();
        let stream = self.stream(claim);
        self.tasks.spawn(async move {
            if let Some(stream) = stream.await {
                exchange(&ours, &stream, ended).await;
            }
        });
        Ok(theirs)
    }

    /// Copies between the master side of a terminal and its stream. The terminal hangs up when the host closes the stream.
    pub fn terminal(&mut self, master: Arc<OwnedFd>, claim: Claim) -> Result<(), StdioError> {
        rustix::fs::fcntl_setfl(&master, OFlags::RDWR | OFlags::NONBLOCK)
            .map_err(|errno| StdioError::Watch(errno.into()))?;
        let master = readiness::watch(master, Interest::READABLE | Interest::WRITABLE).map_err(StdioError::Watch)?;
        let ended = self.ended.subscribe();
        let stream = self.stream(claim);
        self.tasks.spawn(async move {
            let Some(stream) = stream.await else { return };
            let input = async {
                // At the end of input the terminal stays: only a stream closed both ways hangs up.
                let _ = copy(&stream, &master, None).await;
                closed(&stream).await;
            };
            tokio::select! {
                // EIO, when the last descriptor of the other side is closed, is a terminal's end of file.
                _ = copy(&master, &stream, Some(ended)) => {}
                () = input => {}
            }
            let _ = rustix::net::shutdown(stream.as_ref(), Shutdown::Write);
        });
        Ok(())
    }

    /// The container's init has ended: passes on what lies in its pipes and closes the streams. Processes that outlive it may
    /// hold the other ends; what they write later is not waited for. A host that does not read holds this up, until it
    /// closes its stream or deletes the container.
    pub async fn finish(mut self) {
        self.ended.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Both ends, reading first.
fn pipe(uid: u32, gid: u32) -> Result<(OwnedFd, OwnedFd), StdioError> {
    let (reading, writing) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(StdioError::Pipe)?;
    // The default size does as well, where root may not have a larger one.
    let _ = rustix::pipe::fcntl_setpipe_size(&reading, TURN_BYTES);
    let (owner, group) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
    rustix::fs::fchown(&reading, Some(owner), Some(group)).map_err(|source| StdioError::Owner { uid, source })?;
    Ok((reading, writing))
}

fn null() -> Result<OwnedFd, StdioError> {
    rustix::fs::openat(CWD, "/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(StdioError::Null)
}

fn watched(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>, StdioError> {
    rustix::io::ioctl_fionbio(&fd, true).map_err(|errno| StdioError::Watch(errno.into()))?;
    readiness::watch(fd, interest).map_err(StdioError::Watch)
}

/// Returns when the stream's peer is gone altogether.
async fn closed(stream: &AsyncFd<OwnedFd>) {
    while let Ok(mut ready) = stream.writable().await {
        if ready.ready().is_write_closed() {
            return;
        }
        // Whoever writes tries first and waits then, so that clearing takes nothing from them.
        ready.clear_ready();
    }
}

/// Returns when nothing more comes on a stream on which nothing is said.
pub async fn ended(stream: &AsyncFd<OwnedFd>) {
    let mut said = [0; 64];
    while let Ok(mut ready) = stream.readable().await {
        match rustix::io::read(stream, &mut said[..]) {
            Ok(0) => return,
            Ok(_) => tokio::task::coop::consume_budget().await,
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

thread_local! {
    /// What is between a read and the write that follows it; one for all copies, because nothing runs in between.
    static TURN: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

enum Turn {
    Empty,
    EndOfFile,
    Moved,
    /// The receiver is full; this is left.
    Left(Vec<u8>),
}

fn turn(from: impl AsFd, to: impl AsFd) -> Result<Turn, Errno> {
    TURN.with_borrow_mut(|buffer| {
        if buffer.is_empty() {
            // Zeroed by the kernel, page by page as it is used.
            *buffer = vec![0; TURN_BYTES];
        }
        let count = match rustix::io::read(from, &mut buffer[..]) {
            Ok(0) => return Ok(Turn::EndOfFile),
            Ok(count) => count,
            Err(Errno::AGAIN) => return Ok(Turn::Empty),
            Err(Errno::INTR) => return Ok(Turn::Moved),
            Err(errno) => return Err(errno),
        };
        let mut written = 0;
        while written < count {
            match rustix::io::write(&to, &buffer[written..count]) {
                Ok(more) => written += more,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Turn::Left(buffer[written..count].to_vec())),
                Err(errno) => return Err(errno),
            }
        }
        Ok(Turn::Moved)
    })
}

/// Copies to the end of file; once `ended`, to the end of what is there.
async fn copy<A: AsFd + std::os::fd::AsRawFd, B: AsFd + std::os::fd::AsRawFd>(
    from: &AsyncFd<A>,
    to: &AsyncFd<B>,
    mut ended: Option<watch::Receiver<bool>>,
) -> io::Result<()> {
    loop {
        let draining = ended.as_ref().is_some_and(|ended| *ended.borrow());
        match turn(from.get_ref(), to.get_ref())? {
            Turn::EndOfFile => return Ok(()),
            Turn::Empty if draining => return Ok(()),
            Turn::Empty => wait_readable(from, ended.as_mut()).await?,
            Turn::Moved => tokio::task::coop::consume_budget().await,
            Turn::Left(left) => write_all(to, &left).await?,
        }
    }
}

/// Waits until there may be something to read, or the container has ended.
async fn wait_readable<A: std::os::fd::AsRawFd + AsFd>(
    from: &AsyncFd<A>,
    ended: Option<&mut watch::Receiver<bool>>,
) -> io::Result<()> {
    let readable = async {
        loop {
            let mut ready = from.readable().await?;
            // The readiness may be from before the read that found nothing.
            match rustix::event::poll(
                &mut [rustix::event::PollFd::new(from.get_ref(), rustix::event::PollFlags::IN)],
                Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }),
            ) {
                Ok(0) => ready.clear_ready(),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    };
    match ended {
        None => readable.await,
        Some(ended) => tokio::select! {
            result = readable => result,
            _ = ended.wait_for(|ended| *ended) => Ok(()),
        },
    }
}

/// Moves bytes between a stream and the other end of a program's socket. Either way may end alone. When the program has closed its
/// end altogether, or has ended and what it wrote is passed on, this returns, and the stream is to be closed.
pub async fn exchange(ours: &AsyncFd<OwnedFd>, stream: &AsyncFd<OwnedFd>, ended: watch::Receiver<bool>) {
    let input = async {
        if copy(stream, ours, None).await.is_err() {
            // The program reads no more.
            let _ = rustix::net::shutdown(stream, Shutdown::Read);
        }
        let _ = rustix::net::shutdown(ours, Shutdown::Write);
    };
    let output = async {
        let copied = copy(ours, stream, Some(ended.clone())).await;
        let half = copied.is_ok() && !*ended.borrow() && !is_closed(ours);
        if half {
            let _ = rustix::net::shutdown(stream, Shutdown::Write);
        }
        half
    };
    let mut over = ended.clone();
    let mut moved = pin!(async {
        tokio::pin!(input, output);
        let half = tokio::select! {
            half = &mut output => half,
            () = &mut input => {
                output.await;
                false
            }
        };
        if half {
            tokio::select! {
                () = input => {}
                _ = over.wait_for(|over| *over) => {}
            }
        }
    });
    let mut ended = ended.clone();
    let moved = tokio::select! {
        () = moved.as_mut() => return,
        // An error is an end too.
        _ = ended.wait_for(|ended| *ended) => moved,
    };
    let _ = tokio::time::timeout(LINGER, moved).await;
}

/// Whether a socket's other end is closed, and not only its way here.
fn is_closed(socket: &AsyncFd<OwnedFd>) -> bool {
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [rustix::event::PollFd::new(socket.get_ref(), rustix::event::PollFlags::empty())];
    rustix::event::poll(&mut fds, Some(&now)).is_ok()
        && fds[0].revents().intersects(rustix::event::PollFlags::HUP | rustix::event::PollFlags::ERR)
}

/// Moves bytes both ways, until both sides have said all they have to say or one is gone.
pub async fn relay(one: &AsyncFd<OwnedFd>, two: &AsyncFd<OwnedFd>) {
    let way = async |from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>| {
        if copy(from, to, None).await.is_err() {
            // Who takes no more is gone for good.
            let _ = rustix::net::shutdown(from, Shutdown::Read);
        }
        let _ = rustix::net::shutdown(to, Shutdown::Write);
    };
    tokio::join!(way(one, two), way(two, one));
}

/// Writes all of it.
pub async fn write_all<B: AsFd + std::os::fd::AsRawFd>(to: &AsyncFd<B>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = to.async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, bytes)?)).await?;
        bytes = &bytes[count..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread", start_paused = true)]
    async fn a_stream_that_does_not_come_is_missed() {
        let streams = Arc::new(Streams::default());
        let mut pumps = Pumps::new();
        let _ends = pumps.output(Some(streams.claim(7).unwrap()), 0, 0).unwrap();
        assert!(matches!(pumps.connected().await, Err(StdioError::Absent)));
        // The claim has let go of the token.
        streams.claim(7).unwrap();
    }
}
