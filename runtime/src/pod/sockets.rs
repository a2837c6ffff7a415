//! Sockets of the host among a container's files. A socket belongs to the kernel that made it: the guest has one of its own in its
//! place, and for each of its clients a stream comes here, from which it goes on to the socket that is meant.
//!
//! A thread of the shadow's makes all connections. It keeps what that takes: to connect as who the client is, with a permission that
//! the guest's kernel has checked, at the same owner and mode. It is there before the container is, so that no limit on processes
//! holds it up; everything else happens in the event loop.

mod below;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use podhull_protocol::{HostSocket, MAX_DATAGRAM, MAX_GROUPS};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountPropagationFlags, MoveMountFlags, mount_change, move_mount};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Gid, Uid, fchdir};
use rustix::thread::{
    CapabilitySet, CapabilitySets, UnshareFlags, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    unshare_unsafe,
};
use tokio::io::{AsyncReadExt, copy_bidirectional};
use tokio::sync::{Notify, Semaphore, oneshot};
use tokio::task::JoinSet;

pub use below::Search;

use super::view::file_system;
use crate::stdio;

/// Streams in store for each socket: as many clients can come at once without waiting for us.
const IN_STORE: usize = 2;

/// Connections of one container at a time.
const MAX_CONNECTIONS: usize = 256;

/// How long a program of the host may take to accept a connection.
const DEADLINE: Duration = Duration::from_secs(10);

/// What the thread may do: to be any user, and to pass where the guest let the client pass.
const CAPABILITIES: CapabilitySet =
    CapabilitySet::SETUID.union(CapabilitySet::SETGID).union(CapabilitySet::DAC_OVERRIDE);

/// A socket of the host.
pub struct Socket {
    /// The socket itself, as a detached mount.
    mount: OwnedFd,
    /// What the guest is told.
    told: HostSocket,
}

impl Socket {
    /// A socket that is bound into a container, by itself and as a mount, which says whose it is there.
    pub fn new(socket: BorrowedFd<'_>, mount: OwnedFd) -> io::Result<Self> {
        let stat = rustix::fs::fstat(&mount)?;
        let told = HostSocket {
            datagrams: takes_datagrams(socket)?,
            token: stdio::token().map_err(io::Error::other)?,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mode: stat.st_mode & 0o7777,
            ..Default::default()
        };
        Ok(Self { mount, told })
    }

    /// What the guest is told of it.
    pub fn told(&self) -> HostSocket {
        self.told.clone()
    }

    /// Where the guest has its own.
    pub fn path(&self) -> String {
        format!("{}/{}", podhull_protocol::SOCKETS_DIR, podhull_protocol::socket_name(self.told.token))
    }
}

/// Whether a socket is one for datagrams. To connect to such a one is nothing that its server would see, and to another is not
/// possible this way; one that has no server any more is neither.
fn takes_datagrams(socket: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(probe(socket)?.is_ok())
}

/// What comes of it.
fn probe(socket: BorrowedFd<'_>) -> io::Result<Result<(), Errno>> {
    let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
    let probe = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    Ok(rustix::net::connect(&probe, &SocketAddrUnix::new(path)?))
}

/// Who has connected in the guest, or sent a datagram.
#[derive(Clone)]
struct Client {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

enum What {
    /// A stream into the guest, named by a token.
    Stream(u64),
    /// A connection to the socket with this number.
    Connection(usize, Client),
    /// A datagram to the socket with this number. The answer is a socket only if there is no room for it: it is to be asked when
    /// there is.
    Datagram(usize, Client, Arc<[u8]>),
}

struct Order {
    what: What,
    answer: oneshot::Sender<io::Result<Option<OwnedFd>>>,
}

/// The sockets of a container, and the thread that connects to them.
pub struct Sockets {
    /// By their tokens, and whether they are for datagrams.
    sockets: Vec<(u64, bool)>,
    orders: mpsc::Sender<Order>,
    begun: Notify,
    /// For streams in store and for connections.
    room: Arc<Semaphore>,
}

impl Sockets {
    /// Starts the thread, if there is something for it to do. The process must be in the mount namespace it stays in, and have
    /// its privileges yet. `pod` is the pod's directory.
    pub fn start(sockets: Vec<Socket>, pod: BorrowedFd<'_>) -> io::Result<Option<Arc<Self>>> {
        if sockets.is_empty() {
            return Ok(None);
        }
        let numbered: Vec<_> = sockets.iter().map(|socket| (socket.told.token, socket.told.datagrams)).collect();
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS + IN_STORE * numbered.len()));
        let pod = pod.try_clone_to_owned()?;
        let (orders, received) = mpsc::channel();
        let (sender, ready) = mpsc::channel();
        let run = move || {
            let place = match enter(sockets) {
                Ok(place) => place,
                Err(error) => return drop(sender.send(Err(error))),
            };
            let _ = sender.send(Ok(()));
            serve(&received, &pod, &place);
        };
        std::thread::Builder::new().name("sockets".into()).stack_size(stdio::STACK).spawn(run)?;
        ready.recv().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))?;
        Ok(Some(Arc::new(Self { sockets: numbered, orders, begun: Notify::new(), room })))
    }

    /// The container is made, and its sockets are there.
    pub fn begin(&self) {
        self.begun.notify_one();
    }

    /// Serves for as long as it is polled, unless the guest takes no more streams.
    pub async fn serve(self: Arc<Self>) {
        self.begun.notified().await;
        let mut stores = JoinSet::new();
        for (index, (token, datagrams)) in self.sockets.iter().enumerate() {
            if *datagrams {
                stores.spawn(self.clone().forward(index, *token));
                continue;
            }
            for _ in 0..IN_STORE {
                stores.spawn(self.clone().store(index, *token));
            }
        }
        while stores.join_next().await.is_some() {}
    }

    /// Keeps one stream in store, until there are none to be had.
    async fn store(self: Arc<Self>, index: usize, token: u64) {
        let mut connections = JoinSet::new();
        while let Ok(room) = self.room.clone().acquire_owned().await {
            while connections.try_join_next().is_some() {}
            let Ok(mut stream) = self.connect(What::Stream(token)).await else { break };
            let Ok(client) = Client::read(&mut stream).await else { break };
            let sockets = self.clone();
            connections.spawn(async move {
                let _room = room;
                // A client whose server is not there sees a connection that ends.
                if let Ok(mut server) = sockets.connect(What::Connection(index, client)).await {
                    let _ = copy_bidirectional(&mut stream, &mut server).await;
                }
            });
        }
        while connections.join_next().await.is_some() {}
    }

    /// Sends on what a stream brings. A datagram that cannot be sent is lost, as one is whose receiver goes away.
    async fn forward(self: Arc<Self>, index: usize, token: u64) {
        let Ok(mut stream) = self.connect(What::Stream(token)).await else { return };
        while let Ok((client, datagram)) = read_datagram(&mut stream).await {
            let _ = tokio::time::timeout(DEADLINE, self.send(index, client, datagram)).await;
        }
    }

    async fn send(&self, index: usize, client: Client, datagram: Arc<[u8]>) -> io::Result<()> {
        while let Some(full) = self.order(What::Datagram(index, client.clone(), datagram.clone())).await? {
            tokio::net::UnixDatagram::from_std(full.into())?.writable().await?;
        }
        Ok(())
    }

    async fn connect(&self, what: What) -> io::Result<tokio::net::UnixStream> {
        let stream = self.order(what).await?.ok_or(io::ErrorKind::NotConnected)?;
        let stream = UnixStream::from(stream);
        stream.set_nonblocking(true)?;
        tokio::net::UnixStream::from_std(stream)
    }

    async fn order(&self, what: What) -> io::Result<Option<OwnedFd>> {
        let (answer, answered) = oneshot::channel();
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        self.orders.send(Order { what, answer }).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

impl Client {
    /// What the guest says of it, before anything else.
    async fn read(stream: &mut tokio::net::UnixStream) -> io::Result<Self> {
        let (uid, gid) = (stream.read_u32_le().await?, stream.read_u32_le().await?);
        let count = stream.read_u32_le().await?;
        if count as usize > MAX_GROUPS {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut groups = Vec::new();
        for _ in 0..count {
            groups.push(stream.read_u32_le().await?);
        }
        // It is nobody's number, and would change nothing.
        let all = [uid, gid].into_iter().chain(groups.iter().copied());
        match { all }.any(|number| number == u32::MAX) {
            true => Err(io::ErrorKind::InvalidData.into()),
            false => Ok(Self { uid, gid, groups }),
        }
    }
}

async fn read_datagram(stream: &mut tokio::net::UnixStream) -> io::Result<(Client, Arc<[u8]>)> {
    let client = Client::read(stream).await?;
    let length = stream.read_u32_le().await? as usize;
    if length > MAX_DATAGRAM {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut datagram = vec![0; length];
    stream.read_exact(&mut datagram).await?;
    Ok((client, datagram.into()))
}

/// Puts the sockets where nobody else can put anything, and gives up what connecting does not take. The thread alone is there.
fn enter(sockets: Vec<Socket>) -> io::Result<OwnedFd> {
    // SAFETY: the mount namespace, root and working directory of this thread alone; no descriptor table is unshared.
    unsafe { unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS) }?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let flags =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let place = file_system("tmpfs", &[("size", "64k"), ("mode", "0755")], flags)?;
    let attach = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&place, "", CWD, "/", attach)?;
    for (index, socket) in sockets.iter().enumerate() {
        let name = index.to_string();
        rustix::fs::openat(&place, &name, OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::RUSR)?;
        move_mount(&socket.mount, "", &place, &name, attach)?;
    }
    rustix::thread::set_no_new_privs(true)?;
    set_effective(CAPABILITIES)?;
    Ok(place)
}

fn set_effective(effective: CapabilitySet) -> rustix::io::Result<()> {
    let inheritable = CapabilitySet::empty();
    rustix::thread::set_capabilities(None, CapabilitySets { effective, permitted: CAPABILITIES, inheritable })
}

/// Carries out what the event loop orders, until that is gone.
fn serve(orders: &mpsc::Receiver<Order>, pod: &OwnedFd, place: &OwnedFd) {
    for Order { what, answer } in orders {
        let result = match what {
            What::Stream(token) => fchdir(pod)
                .map_err(Into::into)
                .and_then(|()| stdio::connect_here(token))
                .map(|stream| Some(stream.into())),
            What::Connection(index, client) => {
                fchdir(place).map_err(Into::into).and_then(|()| as_client(&client, || connect(index).map(Some)))
            }
            What::Datagram(index, client, datagram) => {
                fchdir(place).map_err(Into::into).and_then(|()| as_client(&client, || send(index, &datagram)))
            }
        };
        // Who asked may be gone.
        let _ = answer.send(result);
    }
}

/// Does something as another user of the host, as which the thread may pass where it may itself. It never goes on as another:
/// coming back takes nothing that could be missing.
fn as_client<T>(client: &Client, action: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let become_client = || -> rustix::io::Result<()> {
        let groups: Vec<_> = client.groups.iter().map(|group| Gid::from_raw(*group)).collect();
        set_thread_groups(&groups)?;
        let (uid, gid) = (Uid::from_raw(client.uid), Gid::from_raw(client.gid));
        // A connection is the effective user's, a datagram the real one's. The saved one is the way back.
        set_thread_res_gid(Some(gid), Some(gid), None)?;
        set_thread_res_uid(Some(uid), Some(uid), None)?;
        // They went with the user.
        set_effective(CAPABILITIES)
    };
    let result = become_client().map_err(io::Error::from).and_then(|()| action());
    let come_back = || -> rustix::io::Result<()> {
        set_thread_res_uid(Some(Uid::ROOT), Some(Uid::ROOT), None)?;
        set_effective(CAPABILITIES)?;
        set_thread_res_gid(Some(Gid::ROOT), Some(Gid::ROOT), None)?;
        set_thread_groups(&[])
    };
    if come_back().is_err() {
        std::process::abort();
    }
    result
}

/// Sends a datagram to a socket in the working directory; returns ours if that has no room.
fn send(index: usize, datagram: &[u8]) -> io::Result<Option<OwnedFd>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(index.to_string())?)?;
    match rustix::net::send(&socket, datagram, SendFlags::NOSIGNAL) {
        Ok(_) => Ok(None),
        Err(Errno::AGAIN) => Ok(Some(socket)),
        Err(errno) => Err(errno.into()),
    }
}

/// Connects to a socket in the working directory.
fn connect(index: usize) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(DEADLINE))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(index.to_string())?)?;
    Ok(socket)
}
