//! From the agent to a process of a container: one `clone3` into the control group and into new namespaces or the pid namespace
//! that is there, one `execve` of the agent itself.

use std::ffi::CString;
use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use rustix::fs::{CWD, MemfdFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair,
};
use rustix::process::{Pid, PidfdFlags, getpid, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use super::init::{Config, Places};
use super::join::setns;
use super::namespaces::{self, NamespaceError, Namespaces};
use super::report::Report;
use crate::readiness;
use crate::reaper::{ExitStatus, Reaper};
use crate::spec::Spec;
use crate::stdio::ContainerEnds;

/// Why there is no init.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("pass the configuration to the container's init: {0}")]
    Config(io::Error),
    #[error("open the agent's own program: {0}")]
    OwnProgram(Errno),
    #[error("hand the program its descriptors: {0}")]
    Descriptors(Errno),
    #[error("make a socket for the container's init: {0}")]
    Socket(io::Error),
    #[error("make the container's init in its namespaces: {0}")]
    Clone(io::Error),
    #[error(transparent)]
    Mappings(#[from] NamespaceError),
    #[error("let the container's init go on: {0}")]
    Release(Errno),
    #[error("open a namespace of the container: {0}")]
    Namespace(Errno),
    #[error("enter the namespaces of another container: {0}")]
    Enter(Errno),
    #[error("make the container's init with the users of another container: {0}")]
    Helper(io::Error),
}

/// Where the process is to be.
pub enum Place<'a> {
    /// In new namespaces, as a container's init, but for those that are shared: of whom (a pidfd), and which, as flags.
    New { spec: &'a Spec, namespaces: Namespaces, shared: Vec<(&'a OwnedFd, u64)> },
    /// With the init of a container that is there: what of it is to be joined when.
    With { init: &'a OwnedFd, pid_namespace: bool, time_namespace: Option<OwnedFd> },
}

/// A process on its way.
pub struct Launched {
    pub pid: Pid,
    pub pidfd: OwnedFd,
    pub socket: AsyncFd<OwnedFd>,
    pub exit: oneshot::Receiver<ExitStatus>,
    /// It waits for [`Launched::release`].
    waits: bool,
}

impl Launched {
    /// Lets the process of a new user namespace go on, when all is done that is done from outside.
    pub fn release(&self) -> Result<(), LaunchError> {
        if self.waits {
            rustix::net::send(self.socket.get_ref(), b"mapped", SendFlags::NOSIGNAL).map_err(LaunchError::Release)?;
        }
        Ok(())
    }
}

/// Descriptors of the child, from the numbers they have here to the numbers they get there.
struct Handover {
    program: RawFd,
    standard: [RawFd; 3],
    /// Those of the program beyond, out of the way of all numbers that are given.
    further: Vec<RawFd>,
    places: Places,
    /// What is not given to anything has this number, or a higher one.
    first_free: RawFd,
    socket: RawFd,
    config: RawFd,
    /// What to join, from [`Places::join`] on; -1 is nothing.
    join: [RawFd; 2],
    waits_for_mappings: bool,
}

/// Makes a process of a container, which goes on when it is released. On an error after the clone it ends by itself, because its socket is closed.
pub fn launch(
    config: &Config<'_>,
    place: &Place<'_>,
    cgroup: &OwnedFd,
    ends: &ContainerEnds,
    reaper: &Reaper,
) -> Result<Launched, LaunchError> {
    let program = rustix::fs::openat(CWD, "/proc/self/exe", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(LaunchError::OwnProgram)?;
    let file = config_file(config).map_err(LaunchError::Config)?;
    let places = Places::after(ends.further.len()).ok_or(LaunchError::Descriptors(Errno::MFILE))?;
    let first_free = places.join() + 2;
    let further = ends.further.iter().map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, first_free));
    let further = further.collect::<Result<Vec<_>, _>>().map_err(LaunchError::Descriptors)?;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(|errno| LaunchError::Socket(errno.into()))?;
    let handover = Handover {
        program: program.as_raw_fd(),
        standard: [ends.stdin.as_raw_fd(), ends.stdout.as_raw_fd(), ends.stderr.as_raw_fd()],
        further: further.iter().map(AsRawFd::as_raw_fd).collect(),
        places,
        first_free,
        socket: theirs.as_raw_fd(),
        config: file.as_raw_fd(),
        join: match place {
            Place::New { .. } => [-1, -1],
            Place::With { init, time_namespace, .. } => {
                [init.as_raw_fd(), time_namespace.as_ref().map_or(-1, AsRawFd::as_raw_fd)]
            }
        },
        waits_for_mappings: matches!(place, Place::New { namespaces, .. } if namespaces.user),
    };
    let (pid, pidfd) = match place {
        Place::New { namespaces, shared, .. } if namespaces.has_users_of_another() => {
            clone_among_users(shared, namespaces.clone_flags & !namespaces.shared_flags, cgroup, &handover)?
        }
        Place::New { namespaces, shared, .. } => {
            clone_within(shared, namespaces.clone_flags & !namespaces.shared_flags, cgroup, &handover)?
        }
        Place::With { init, pid_namespace: true, .. } => {
            clone_within(&[(*init, u64::from(libc::CLONE_NEWPID.unsigned_abs()))], 0, cgroup, &handover)?
        }
        Place::With { .. } => clone_within(&[], 0, cgroup, &handover)?,
    };
    let exit = reaper.exit_of(pid);
    if let Place::New { spec, namespaces, .. } = place
        && namespaces.user
        && !namespaces.has_users_of_another()
    {
        namespaces::write_mappings(pid, spec)?;
    }
    rustix::io::ioctl_fionbio(&ours, true).map_err(|errno| LaunchError::Socket(errno.into()))?;
    let socket = readiness::watch(ours, Interest::READABLE | Interest::WRITABLE).map_err(LaunchError::Socket)?;
    Ok(Launched { pid, pidfd, socket, exit, waits: handover.waits_for_mappings })
}

fn config_file(config: &Config<'_>) -> io::Result<OwnedFd> {
    let mut file = std::fs::File::from(rustix::fs::memfd_create("container", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(config)?)?;
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
    Ok(file.into())
}

/// A clone is in the namespaces that its parent has for its children. The agent changes its own for this one call, so that
/// the process is a child of the agent and not of a helper in between.
fn clone_within(
    shared: &[(&OwnedFd, u64)],
    flags: u64,
    cgroup: &OwnedFd,
    handover: &Handover,
) -> Result<(Pid, OwnedFd), LaunchError> {
    if shared.is_empty() {
        return clone(flags, cgroup, handover).map_err(LaunchError::Clone);
    }
    let own = pidfd_open(getpid(), PidfdFlags::empty()).map_err(LaunchError::Namespace)?;
    let all = shared.iter().fold(0, |all, (_, flags)| all | flags);
    let entered = shared.iter().try_for_each(|(init, flags)| setns(init, *flags as libc::c_int));
    let made =
        entered.map_err(LaunchError::Enter).and_then(|()| clone(flags, cgroup, handover).map_err(LaunchError::Clone));
    if setns(&own, all as libc::c_int).is_err() {
        // Every later child would be in another container: there is no going on.
        std::process::abort();
    }
    made
}

/// A namespace of a process, by the agent's own `/proc`.
pub fn open_namespace(process: &str, kind: &str) -> Result<OwnedFd, LaunchError> {
    let path = format!("/proc/{process}/ns/{kind}");
    rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(LaunchError::Namespace)
}

/// `struct clone_args` of `linux/sched.h`.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

impl CloneArgs {
    /// `clone3(2)`: the number of the child, 0 in it, or -1.
    ///
    /// # Safety
    ///
    /// What the child does until `execve` or its end is system calls alone: it does not matter then what other threads held when
    /// this process was copied. What the fields point at is there.
    unsafe fn clone(&self) -> libc::c_long {
        // SAFETY: the arguments are of the given size. Without CLONE_VM the child has a copy of this process and this stack.
        unsafe { libc::syscall(libc::SYS_clone3, std::ptr::from_ref(self), size_of::<Self>()) }
    }
}

/// The arguments that make the agent an init of this many further descriptors.
struct Arguments([CString; 3]);

impl Arguments {
    fn of(handover: &Handover) -> Self {
        let word = |word: &str| CString::new(word).unwrap_or_default();
        Self([word("podhull-agent"), word(super::INIT_ARGUMENT), word(&handover.further.len().to_string())])
    }

    fn pointers(&self) -> [*const libc::c_char; 4] {
        [self.0[0].as_ptr(), self.0[1].as_ptr(), self.0[2].as_ptr(), std::ptr::null()]
    }
}

const CLONE_PIDFD: u64 = 0x1000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

fn clone(flags: u64, cgroup: &OwnedFd, handover: &Handover) -> io::Result<(Pid, OwnedFd)> {
    let mut pidfd: RawFd = -1;
    let args = CloneArgs {
        flags: flags | CLONE_PIDFD | CLONE_INTO_CGROUP,
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        cgroup: cgroup.as_raw_fd() as u64,
        ..CloneArgs::default()
    };
    let arguments = Arguments::of(handover);
    let argv = arguments.pointers();
    // SAFETY: the child goes on in `become_init` alone; the pidfd outlives the call.
    let pid = unsafe { args.clone() };
    if pid == 0 {
        // SAFETY: this is the child; the descriptors are open, and the arguments outlive the call.
        unsafe { become_init(handover, argv.as_ptr()) }
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    let pid = Pid::from_raw(pid as i32).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    // SAFETY: with CLONE_PIDFD the kernel put a new descriptor there.
    Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// A clone in the user namespace of another container, which the namespaces that are made with it belong to. A process with threads
/// cannot enter one, and who is in one does not come back: so a helper does, whose clone is the agent's child as any other.
fn clone_among_users(
    shared: &[(&OwnedFd, u64)],
    flags: u64,
    cgroup: &OwnedFd,
    handover: &Handover,
) -> Result<(Pid, OwnedFd), LaunchError> {
    const ENTER: i32 = 1;
    const CLONE: i32 = 2;
    let users = u64::from(libc::CLONE_NEWUSER.unsigned_abs());
    // The users last: from then on the helper may enter what belongs to them, and nothing else.
    let (last, first): (Vec<_>, Vec<_>) = shared.iter().copied().partition(|(_, flags)| *flags == users);
    let entered: Vec<(RawFd, libc::c_int)> =
        first.into_iter().chain(last).map(|(init, flags)| (init.as_raw_fd(), flags as libc::c_int)).collect();
    let (said, says) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|errno| LaunchError::Helper(errno.into()))?;
    let helper = CloneArgs {
        flags: CLONE_INTO_CGROUP,
        exit_signal: libc::SIGCHLD as u64,
        cgroup: cgroup.as_raw_fd() as u64,
        ..CloneArgs::default()
    };
    // It is where the helper is.
    let init = CloneArgs { flags: flags | libc::CLONE_PARENT as u64, ..CloneArgs::default() };
    let arguments = Arguments::of(handover);
    let argv = arguments.pointers();
    // SAFETY: the child makes system calls alone, as below.
    let child = unsafe { helper.clone() };
    if child == 0 {
        // SAFETY: this is the child: plain system calls, whose pointers are to its stack and to what was made before; the
        // descriptors are open, and the arguments outlive the call.
        unsafe {
            let mut answer = [0, 0];
            for &(init, flags) in &entered {
                if libc::setns(init, flags) < 0 {
                    answer = [-ENTER, *libc::__errno_location()];
                    break;
                }
            }
            if answer[0] == 0 {
                match init.clone() {
                    0 => become_init(handover, argv.as_ptr()),
                    pid if pid < 0 => answer = [-CLONE, *libc::__errno_location()],
                    pid => answer[0] = pid as i32,
                }
            }
            libc::write(says.as_raw_fd(), answer.as_ptr().cast(), size_of_val(&answer));
            libc::_exit(0)
        }
    }
    if child < 0 {
        return Err(LaunchError::Clone(io::Error::last_os_error()));
    }
    drop(says);
    let mut answer = [0; 8];
    // It has nothing to wait for: this is its word, or its end.
    let length = rustix::io::retry_on_intr(|| rustix::io::read(&said, &mut answer))
        .map_err(|errno| LaunchError::Helper(errno.into()))?;
    let [what, why] = [0, 4].map(|at| i32::from_ne_bytes([answer[at], answer[at + 1], answer[at + 2], answer[at + 3]]));
    match (length == answer.len(), what) {
        (true, what) if what == -ENTER => Err(LaunchError::Enter(Errno::from_raw_os_error(why))),
        (true, what) if what == -CLONE => Err(LaunchError::Clone(io::Error::from_raw_os_error(why))),
        (true, pid) if pid > 0 => {
            let pid = Pid::from_raw(pid).ok_or_else(|| LaunchError::Helper(io::ErrorKind::InvalidData.into()))?;
            // A child of ours, which is not reaped before this step is over.
            Ok((pid, pidfd_open(pid, PidfdFlags::empty()).map_err(LaunchError::Namespace)?))
        }
        _ => Err(LaunchError::Helper(io::ErrorKind::UnexpectedEof.into())),
    }
}

/// The child between clone and execve: system calls alone.
///
/// # Safety
///
/// To be called only in a new process. `argv` is a list of strings, both ended by zero.
unsafe fn become_init(handover: &Handover, argv: *const *const libc::c_char) -> ! {
    // SAFETY: plain system calls; their pointers are to what the caller vouches for or to the stack.
    unsafe {
        if handover.waits_for_mappings {
            let mut word = [0u8; 8];
            if libc::recv(handover.socket, word.as_mut_ptr().cast(), word.len(), 0) <= 0 {
                libc::_exit(125);
            }
            // Root in the namespace: execve takes the capabilities of everybody else.
            if libc::syscall(libc::SYS_setresgid, 0, 0, 0) < 0 || libc::syscall(libc::SYS_setresuid, 0, 0, 0) < 0 {
                libc::_exit(126);
            }
        }
        // Out of the way of the numbers they are to get, first.
        let high = |fd| libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, handover.first_free);
        let [stdin, stdout, stderr] = handover.standard.map(high);
        let (socket, config, program) = (high(handover.socket), high(handover.config), high(handover.program));
        let [first, second] = handover.join.map(high);
        let (places, join) = (handover.places, handover.places.join());
        let mut next = join;
        let own = [(stdin, 0), (stdout, 1), (stderr, 2), (socket, places.socket()), (config, places.config())];
        for (from, to) in own.into_iter().chain(handover.further.iter().copied().zip(3..)) {
            if libc::dup2(from, to) < 0 {
                libc::_exit(126);
            }
        }
        for (given, from, to) in [(handover.join[0], first, join), (handover.join[1], second, join + 1)] {
            if given >= 0 {
                if libc::dup2(from, to) < 0 {
                    libc::_exit(126);
                }
                next = to + 1;
            }
        }
        // Descriptors are close-on-exec as a rule; a rule is not enough here.
        const CLOSE_RANGE_CLOEXEC: libc::c_int = 4;
        libc::syscall(libc::SYS_close_range, next, libc::c_uint::MAX, CLOSE_RANGE_CLOEXEC);
        let environment: [*const libc::c_char; 1] = [std::ptr::null()];
        libc::syscall(libc::SYS_execveat, program, c"".as_ptr(), argv, environment.as_ptr(), libc::AT_EMPTY_PATH);
        libc::_exit(127)
    }
}

/// The next packet of an init, with the descriptor it carries; none at the end.
pub async fn receive(socket: &AsyncFd<OwnedFd>) -> io::Result<(Option<Report>, Option<OwnedFd>)> {
    socket
        .async_io(Interest::READABLE, |socket| {
            let mut packet = [0; Report::MAX];
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let received = rustix::net::recvmsg(
                socket,
                &mut [IoSliceMut::new(&mut packet)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            )?;
            let descriptor = ancillary
                .drain()
                .filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
                    _ => None,
                })
                .next();
            Ok((Report::decode(&packet[..received.bytes.min(packet.len())]), descriptor))
        })
        .await
}

/// Sends a packet to an init.
pub async fn send(socket: &AsyncFd<OwnedFd>, packet: &[u8]) -> io::Result<()> {
    socket
        .async_io(Interest::WRITABLE, |socket| Ok(rustix::net::send(socket, packet, SendFlags::NOSIGNAL)?))
        .await
        .map(drop)
}
