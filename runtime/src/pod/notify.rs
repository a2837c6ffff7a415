//! `$NOTIFY_SOCKET` (`sd_notify(3)`): a service manager that waits for a container's program to say that it is ready.
//!
//! The container has a socket of its own, at runc's path, which its shadow makes. The service manager takes word of members of the
//! unit's control group alone, where the shadow is not: so it is passed on by the command that starts the program, which takes the
//! receiving end from the shadow.

use std::fs::Permissions;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, MountBuilder};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    connect, sendmsg, socket_with,
};
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

use crate::state::Known;

/// Where the container has its socket, as with runc.
const IN_CONTAINER: &str = "/run/notify/notify.sock";

/// Name of the socket in the container's directory.
pub const SOCKET: &str = "notify.sock";

/// What a program sends is short.
const MAX_MESSAGE: usize = 4096;

/// How long the service manager may take to look at what it was sent; after that it may not find out who sent it.
const BARRIER: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };

/// The socket of the service manager that waits for this process, if one does.
pub fn asked() -> Option<PathBuf> {
    std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()).map(PathBuf::from)
}

/// A container's socket, made; what its program is to be given to find it.
pub struct Notify {
    /// The receiving end.
    pub socket: UnixDatagram,
    /// Where it is in the container.
    pub mount: Mount,
    /// An entry of the program's environment.
    pub environment: String,
}

impl Notify {
    /// Makes it in the container's directory, for any user of the container.
    pub fn new(container: &Path) -> io::Result<Self> {
        // By way of the directory's descriptor: paths of sockets are at most 107 bytes long.
        let directory = std::fs::File::open(container)?;
        let path = format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd());
        let socket = UnixDatagram::bind(&path)?;
        std::fs::set_permissions(&path, Permissions::from_mode(0o777))?;
        let mount = MountBuilder::default()
            .destination(IN_CONTAINER)
            .typ("bind")
            .source(container.join(SOCKET))
            .options(["bind", "nosuid", "noexec", "nodev"].map(str::to_owned))
            .build()
            .map_err(io::Error::other)?;
        Ok(Self { socket, mount, environment: format!("NOTIFY_SOCKET={IN_CONTAINER}") })
    }
}

/// Who takes the word of a container that it is ready.
pub struct Waiting {
    /// Whom to tell, if anybody still asks.
    manager: Option<PathBuf>,
    container: UnixDatagram,
    /// The process that stands for the container.
    shadow: OwnedFd,
}

impl Waiting {
    /// To be called before the program is started; `None` if the container has no such socket.
    pub fn of(known: &Known) -> io::Result<Option<Self>> {
        let (Some(number), Some(shadow)) = (known.state.notify, known.process()) else { return Ok(None) };
        let container = pidfd_getfd(&shadow, number, PidfdGetfdFlags::empty())?.into();
        Ok(Some(Self { manager: asked(), container, shadow }))
    }

    /// Waits until the container says that it is ready, and passes that on, or until the process that stands for it ends. `main` is
    /// the process that the service manager is to take for the service's from then on. It is the service manager that says how long
    /// a start may take, and ends this otherwise.
    pub fn pass_on(&self, main: Option<i32>) -> io::Result<()> {
        let Some(manager) = &self.manager else { return self.container.shutdown(Shutdown::Read) };
        let ready = self.until_ready();
        // What comes later nobody takes. The shadow has this end too: who sends would wait for room in it.
        self.container.shutdown(Shutdown::Read)?;
        if !ready? {
            return Ok(());
        }
        let main = main.map_or(String::new(), |pid| format!("MAINPID={pid}\n"));
        tell(manager, &format!("READY=1\n{main}"))
    }

    /// Whether it is ready; else it has ended.
    fn until_ready(&self) -> io::Result<bool> {
        loop {
            let (message, over) = {
                let mut fds = [PollFd::new(&self.container, PollFlags::IN), PollFd::new(&self.shadow, PollFlags::IN)];
                retry_on_intr(|| poll(&mut fds, None))?;
                (!fds[0].revents().is_empty(), !fds[1].revents().is_empty())
            };
            if message && is_ready(&self.container)? {
                return Ok(true);
            }
            if over && !message {
                return Ok(false);
            }
        }
    }
}

/// Takes a message: whether it says so.
fn is_ready(container: &UnixDatagram) -> io::Result<bool> {
    let mut message = [0; MAX_MESSAGE];
    let length = container.recv(&mut message)?;
    Ok(message[..length].split(|byte| *byte == b'\n').any(|line| line == b"READY=1"))
}

/// Sends a message to a service manager, and waits until it has looked at it.
fn tell(manager: &Path, message: &str) -> io::Result<()> {
    let address = match manager.as_os_str().as_bytes().split_first() {
        Some((b'@', name)) => SocketAddrUnix::new_abstract_name(name)?,
        _ => SocketAddrUnix::new(manager)?,
    };
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    connect(&socket, &address)?;
    rustix::net::send(&socket, message.as_bytes(), SendFlags::NOSIGNAL)?;
    barrier(&socket)
}

/// `sd_notify_barrier(3)`: it closes the descriptor when it comes to this message.
fn barrier(socket: &OwnedFd) -> io::Result<()> {
    let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let fds = [theirs.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(socket, &[IoSlice::new(b"BARRIER=1")], &mut ancillary, SendFlags::NOSIGNAL)?;
    drop(theirs);
    // A manager that knows no barriers closes it as well; one that does not come to it was told all the same.
    retry_on_intr(|| poll(&mut [PollFd::new(&ours, PollFlags::empty())], Some(&BARRIER)))?;
    Ok(())
}
