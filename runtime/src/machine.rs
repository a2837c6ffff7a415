//! The process of a machine, the channel to it, and its control socket ([`podhull_vmm::control`]).

mod dial;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use podhull_vmm::control::{self, ChannelError, Device, End, MachineConfig, Notice, Request, Resource};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags};
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType, UnshareFlags};
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use crate::descriptors::inherit_only;
#[allow(unused_imports, reason = "for the network, and for updates of a running pod")]
pub use dial::{CONTROL_SOCKET, Control};

/// Descriptor at which the machine's process finds its end of the channel.
pub const CHANNEL_FD: i32 = 3;

/// How much of what the process wrote to standard error is looked at, in bytes.
const MAX_STDERR: u64 = 16 * 1024;

/// Why there is no machine (any more).
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The process cannot be started.
    #[error("cannot start the virtual machine's process: {0}")]
    Spawn(#[source] io::Error),
    /// There is no event loop for it.
    #[error("cannot watch the virtual machine's process: {0}")]
    Watch(#[source] io::Error),
    /// Nobody answers at its control socket.
    #[error("cannot reach the virtual machine's process: {0}")]
    Dial(#[source] io::Error),
    /// It did not answer in time.
    #[error("the virtual machine's process did not answer within {} seconds", .0.as_secs())]
    Silent(Duration),
    /// The guest does not plug it, or its kernel does not.
    #[error("the guest has not taken the memory it was given within {} seconds", .0.as_secs())]
    MemoryNotTaken(Duration),
    /// The channel cannot be used.
    #[error("virtual machine: {0}")]
    Channel(#[from] ChannelError),
    /// It answered a request with an error.
    #[error("virtual machine: {0}")]
    Failed(String),
    /// The process closed the channel without a word.
    #[error("the virtual machine's process is gone")]
    Gone,
    /// The guest reset the machine.
    #[error("the guest's kernel panicked, or its agent died: the virtual machine was reset")]
    Reset,
    /// The guest cannot go on.
    #[error("the guest crashed: {0}")]
    Crash(String),
    /// The guest was given up.
    #[error("it was given up after {0}")]
    Stuck(String),
    /// The guest broke a rule.
    #[error("the guest misbehaved, and its virtual machine was ended: {0}")]
    Misbehaved(String),
    /// The process died by a signal.
    #[error("the virtual machine's process was killed by signal {0}")]
    Killed(i32),
    /// The process made a system call that is on no list of its jail's.
    #[error(
        "the virtual machine's process was killed for a system call that its seccomp filter forbids (signal 31, SIGSYS); \
         the kernel log names it, as type=1326"
    )]
    Forbidden,
    /// The process ended by itself without saying why on the channel.
    #[error("the virtual machine's process ended with status {status}{said}")]
    Exited {
        /// Its exit status.
        status: i32,
        /// The last line it wrote to standard error, after ": ".
        said: String,
    },
}

/// A machine's process; dropping it kills the process and waits for its end.
pub struct Process {
    child: Child,
    /// `None`: nobody reads its last words.
    stderr: Option<File>,
    channel: Option<OwnedFd>,
}

impl Process {
    /// Starts this program again as a machine, the first process of a pid namespace of its own. All signals are unblocked in
    /// it, and it inherits its end of the channel, `/dev/null` and a pipe for last words.
    pub fn spawn() -> Result<Self, MachineError> {
        let spawn = |e: Errno| MachineError::Spawn(e.into());
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(spawn)?;
        let (stderr, their_stderr) =
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(spawn)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("podhull").arg("vmm").env_clear();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(their_stderr);
        // SAFETY: between fork and exec it only makes system calls, and allocates nothing.
        unsafe {
            command.pre_exec(unblock_signals);
        }
        inherit_only(&mut command, theirs.as_raw_fd(), CHANNEL_FD);
        let child = spawn_in(PidNamespace::New, || command.spawn()).map_err(MachineError::Spawn)?;
        Ok(Self { child, stderr: Some(File::from(stderr)), channel: Some(ours) })
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Takes the runtime's end of the channel, to be made a [`Channel`] by whoever holds the machine. The machine ends with
    /// it.
    pub fn take_channel(&mut self) -> Option<OwnedFd> {
        self.channel.take()
    }

    /// Leaves the process to whoever holds its channel.
    pub fn release(mut self) {
        // What it has open is closed: this process may live on, and release others.
        (self.channel, self.stderr) = (None, None);
        std::mem::forget(self);
    }

    /// Why the process ended. To be called when the channel was closed by the other side: that is the last thing a process
    /// does, so one that still lives a second later is killed.
    pub fn end(&mut self) -> MachineError {
        use std::os::unix::process::ExitStatusExt;
        let dead = Pid::from_raw(self.child.id().cast_signed())
            .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok())
            .is_some_and(|pidfd| {
                let second = Timespec { tv_sec: 1, tv_nsec: 0 };
                let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
                rustix::io::retry_on_intr(|| poll(&mut fds, Some(&second))).is_ok_and(|ready| ready > 0)
            });
        if !dead {
            let _ = self.child.kill();
        }
        match self.child.wait() {
            Err(error) => MachineError::Spawn(error),
            Ok(status) => match (status.signal(), status.code()) {
                (Some(libc::SIGSYS), _) => MachineError::Forbidden,
                (Some(signal), _) => MachineError::Killed(signal),
                (None, code) => MachineError::Exited { status: code.unwrap_or(-1), said: self.last_words() },
            },
        }
    }

    fn last_words(&mut self) -> String {
        let Some(stderr) = &self.stderr else { return String::new() };
        let mut text = Vec::new();
        // The pipe does not block, so that a process that inherited its other end cannot hold us up.
        let _ = stderr.take(MAX_STDERR).read_to_end(&mut text);
        let text = String::from_utf8_lossy(&text);
        match text.lines().rfind(|line| !line.trim().is_empty()) {
            Some(line) => format!(": {}", line.trim().chars().take(300).collect::<String>()),
            None => String::new(),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.channel = None;
        // It may be gone already; then there is nothing to kill, and only the first wait gives its status.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Which pid namespace a child is to be in.
#[derive(Clone, Copy)]
pub enum PidNamespace<'a> {
    /// Ours.
    Same,
    /// A new one, as its first process.
    New,
    /// That of another process (a pidfd).
    Of(BorrowedFd<'a>),
    /// This one.
    Is(BorrowedFd<'a>),
}

/// Calls `spawn` so that the child it makes is in a pid namespace. Until this returns the thread can start no other.
pub fn spawn_in(namespace: PidNamespace<'_>, spawn: impl FnOnce() -> io::Result<Child>) -> io::Result<Child> {
    let ours = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    match namespace {
        PidNamespace::Same => return spawn(),
        // SAFETY: the flag decides about children to come, and nothing else.
        PidNamespace::New => unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }?,
        PidNamespace::Of(process) => {
            rustix::thread::move_into_thread_name_spaces(process, ThreadNameSpaceType::PROCESS_ID)?;
        }
        PidNamespace::Is(namespace) => {
            rustix::thread::move_into_link_name_space(namespace, Some(LinkNameSpaceType::ProcessID))?;
        }
    }
    let child = spawn();
    let back = rustix::thread::move_into_thread_name_spaces(ours.as_fd(), ThreadNameSpaceType::PROCESS_ID);
    match (child, back) {
        (Ok(mut child), Err(errno)) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(errno.into())
        }
        (child, _) => child,
    }
}

/// A machine calls its own threads by a signal, and a mask goes through execve.
fn unblock_signals() -> io::Result<()> {
    let check = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    let mut none = std::mem::MaybeUninit::uninit();
    // SAFETY: the second takes the set of signals that the first makes.
    unsafe {
        check(libc::sigemptyset(none.as_mut_ptr()))?;
        check(libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut()))
    }
}

/// The runtime's end of the channel.
pub struct Channel {
    socket: AsyncFd<OwnedFd>,
    /// One for each request that was not answered yet, oldest first.
    pending: RefCell<VecDeque<oneshot::Sender<Result<(), String>>>>,
    ready: RefCell<Option<oneshot::Sender<u64>>>,
}

impl Channel {
    /// Speaks on a socket that was a [`Process`]'s; needs an event loop.
    pub fn new(socket: OwnedFd) -> Result<Self, MachineError> {
        rustix::io::ioctl_fionbio(&socket, true).map_err(ChannelError::Io)?;
        // SAFETY: the descriptor is owned by the AsyncFd from here on, and never replaced.
        let socket = unsafe { AsyncFd::register(socket) }.map_err(|e| MachineError::Watch(e.into()))?;
        Ok(Self { socket, pending: RefCell::default(), ready: RefCell::default() })
    }

    /// Builds and runs the machine; returns when the request was carried out.
    pub async fn start(&self, config: MachineConfig, fds: &[OwnedFd]) -> Result<(), MachineError> {
        self.request(&Request::Start(config), fds).await
    }

    /// Puts what the descriptors are, and further devices, into the running machine: all of it or nothing.
    pub async fn add(
        &self,
        resources: Vec<Resource>,
        fds: &[OwnedFd],
        devices: Vec<Device>,
    ) -> Result<(), MachineError> {
        self.request(&Request::Add { resources, devices }, fds).await
    }

    /// Creates vCPUs.
    pub async fn set_cpus(&self, cpus: u32) -> Result<(), MachineError> {
        self.request(&Request::SetCpus(cpus), &[]).await
    }

    /// Sets how much memory the guest should have.
    pub async fn set_memory(&self, bytes: u64) -> Result<(), MachineError> {
        self.request(&Request::SetMemory(bytes), &[]).await
    }

    /// Gives up a machine whose guest has not come up: it ends, and [`Channel::drive`] says where the guest was.
    pub async fn give_up(&self) -> Result<(), MachineError> {
        Ok(send(&self.socket, &Request::GiveUp, &[]).await?)
    }

    /// Becomes ready when the agent listens, with the exits to user space up to then. [`Channel::drive`] must run.
    pub fn agent_ready(&self) -> oneshot::Receiver<u64> {
        let (sender, receiver) = oneshot::channel();
        *self.ready.borrow_mut() = Some(sender);
        receiver
    }

    async fn request(&self, request: &Request, fds: &[OwnedFd]) -> Result<(), MachineError> {
        let (sender, receiver) = oneshot::channel();
        send(&self.socket, request, fds).await?;
        self.pending.borrow_mut().push_back(sender);
        match receiver.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(message)) => Err(MachineError::Failed(message)),
            Err(_) => Err(ChannelError::Closed.into()),
        }
    }

    /// Receives notices until there is no machine any more; `None` if its process said nothing about why.
    pub async fn drive(&self) -> Option<MachineError> {
        loop {
            match receive(&self.socket).await {
                Ok(Notice::Done) => self.answer(Ok(())),
                Ok(Notice::Failed(message)) => self.answer(Err(message)),
                Ok(Notice::AgentReady { exits }) => {
                    if let Some(ready) = self.ready.borrow_mut().take() {
                        let _ = ready.send(exits);
                    }
                }
                Ok(Notice::Measured(_)) => {
                    return Some(ChannelError::Malformed("a notice that is not for the channel".into()).into());
                }
                Ok(Notice::Ended(end)) => {
                    return Some(match end {
                        End::Reset => MachineError::Reset,
                        End::Crash(what) => MachineError::Crash(what),
                        End::Misbehaved(what) => MachineError::Misbehaved(what),
                        End::Failure(what) => MachineError::Failed(what),
                        End::Stuck(what) => MachineError::Stuck(what),
                    });
                }
                Err(ChannelError::Closed) => return None,
                Err(error) => return Some(error.into()),
            }
        }
    }

    fn answer(&self, result: Result<(), String>) {
        if let Some(sender) = self.pending.borrow_mut().pop_front() {
            // Nobody waits for it any more: fine.
            let _ = sender.send(result);
        }
    }
}

/// Sends a request as soon as there is room for it.
async fn send(socket: &AsyncFd<OwnedFd>, request: &Request, fds: &[OwnedFd]) -> Result<(), ChannelError> {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    loop {
        match control::send(socket.get_ref(), request, &fds) {
            Err(ChannelError::Io(Errno::WOULDBLOCK)) => match socket.writable().await {
                Ok(mut guard) => guard.clear_ready(),
                Err(_) => return Err(ChannelError::Closed),
            },
            sent => return sent,
        }
    }
}

/// The next notice.
async fn receive(socket: &AsyncFd<OwnedFd>) -> Result<Notice, ChannelError> {
    loop {
        match control::receive(socket.get_ref()) {
            Ok((notice, _)) => return Ok(notice),
            Err(ChannelError::Io(Errno::WOULDBLOCK)) => match socket.readable().await {
                Ok(mut guard) => guard.clear_ready(),
                Err(_) => return Err(ChannelError::Closed),
            },
            Err(error) => return Err(error),
        }
    }
}
