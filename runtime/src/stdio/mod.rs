//! The container's standard streams: threads that move bytes between the caller's descriptors and the guest's streams.
//!
//! Threads, because the caller's descriptors are shared with other programs, so that they may not be made non-blocking,
//! and may be files, for which there is no readiness.

mod connect;
mod console;
mod proxy;
mod pump;
mod terminal;

use std::cell::RefCell;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::rand::GetRandomFlags;
use tokio::sync::{mpsc, oneshot};

use crate::confine::drop_privileges;
pub use connect::{
    SOCKET, connect_here, connect_in_loop, connect_packets, connect_packets_in_loop, dial, dial_in_loop,
    dial_in_this_thread,
};
use console::Console;
pub use console::{pair as terminal_pair, set_size as set_terminal_size};
pub use proxy::Proxy;
use pump::Progress;
pub use pump::STACK;

/// What can go wrong with standard streams.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// A container with a terminal was started by a program that has none.
    #[error(
        "process.terminal is true, but this process has no terminal ({0}): start it in one, pass --console-socket, or set it to false"
    )]
    NoTerminal(#[source] Errno),
    /// The terminal cannot be set.
    #[error("terminal: {0}")]
    Terminal(#[source] Errno),
    /// The terminal of the caller is not the container's in the background.
    #[error(
        "cannot allocate tty if podhull will detach without setting console socket: pass --console-socket, or set process.terminal to false"
    )]
    Detached,
    /// Nobody could use it.
    #[error("--console-socket is for a container with process.terminal")]
    ConsoleWithoutTerminal,
    /// The caller does not listen.
    #[error("--console-socket {0}: {1}")]
    ConsoleSocket(PathBuf, #[source] io::Error),
    /// There is no stream to the guest.
    #[error("cannot connect the container's {0}: {1}")]
    Connect(&'static str, #[source] io::Error),
    /// The process has too many files open.
    #[error("cannot duplicate a standard stream: {0}")]
    Duplicate(#[source] Errno),
    /// Threads are not to be had.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
    /// No random numbers.
    #[error("cannot get random numbers: {0}")]
    Random(#[source] Errno),
    /// The guest keeps streams open that it said it closed.
    #[error("the container has ended, but its output has not")]
    NeverEnds,
}

/// What threads report.
enum Report {
    Connected,
    /// The lease is.
    Leased(UnixStream),
    Failed(&'static str, io::Error),
    /// An output has ended and all of it was written.
    Drained,
    /// The same of a connected socket.
    Disconnected,
}

/// The caller's side of the streams.
enum Ends {
    /// Standard input, output and error: whether the container gets them, or `/dev/null`.
    Streams([bool; 3]),
    /// A new terminal whose other side the caller got, or the command that stays in the foreground.
    Console(Console),
}

/// Which way bytes go, seen from the container's program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// It reads them.
    In,
    /// It writes them.
    Out,
    /// Both, and each can end alone: a connected socket, or a terminal.
    Both,
}

/// A descriptor of the caller beside the standard streams whose bytes move.
pub struct Further {
    /// Names its stream.
    pub token: u64,
    /// The caller's; nobody else of ours holds it.
    pub fd: OwnedFd,
    /// Which way.
    pub way: Way,
}

/// Where the standard streams of a container go.
pub struct Stdio {
    ends: Ends,
    /// What moves beside them, until it does.
    further: RefCell<Vec<Further>>,
    /// Random numbers that name the streams: stdin, stdout, stderr.
    tokens: [u64; 3],
    /// The same for the lease; 0: there is none.
    lease: u64,
    /// The terminal of the caller is where the container's output comes to.
    foreground: bool,
}

impl Stdio {
    /// Decides where the streams go; nothing is connected yet. `size` is what the specification says about the terminal.
    /// `given` is one of the making of who asked for the container. With a terminal nothing of the caller's stays open.
    pub fn new(
        terminal: bool,
        console_socket: Option<&Path>,
        size: Option<(u16, u16)>,
        given: Option<OwnedFd>,
    ) -> Result<Self, StdioError> {
        let foreground = terminal && console_socket.is_none();
        let ends = match (terminal, console_socket, given) {
            (false, Some(_), _) => return Err(StdioError::ConsoleWithoutTerminal),
            (true, Some(socket), _) => Ends::Console(Console::open(socket, size)?),
            (true, None, Some(peer)) => Ends::Console(Console::of(peer)),
            (true, None, None) => return Err(StdioError::Detached),
            (false, None, _) => Ends::Streams(STANDARD.map(|fd| !is_null(fd()))),
        };
        if let Ends::Console(console) = &ends {
            // As a container's own process would have it. Callers read their ends of what we were started with to its end,
            // containerd's shim before it uses the terminal.
            let replace = [rustix::stdio::dup2_stdin, rustix::stdio::dup2_stdout, rustix::stdio::dup2_stderr];
            replace.into_iter().try_for_each(|replace| replace(console.peer())).map_err(StdioError::Duplicate)?;
        }
        pump::prepare().map_err(StdioError::Duplicate)?;
        let tokens = [token()?, token()?, token()?];
        Ok(Self { ends, further: RefCell::default(), tokens, lease: 0, foreground })
    }

    /// Whether who has made the terminal is a command that stays in the foreground ([`Proxy`]): then the output comes to another
    /// terminal.
    pub fn in_foreground(self, foreground: bool) -> Self {
        Self { foreground: self.foreground && foreground, ..self }
    }

    /// With a lease: what uses these streams ends in the guest when this process does, in whatever way.
    pub fn leased(self) -> Result<Self, StdioError> {
        Ok(Self { lease: token()?, ..self })
    }

    /// With other descriptors, of which the agent is told by who tells it of these streams.
    pub fn and(self, further: Vec<Further>) -> Self {
        Self { further: further.into(), ..self }
    }

    /// What the agent is told.
    pub fn announcement(&self) -> podhull_protocol::Stdio {
        let mut stdio = podhull_protocol::Stdio::new();
        let [stdin, stdout, stderr] = self.tokens;
        stdio.lease = self.lease;
        match &self.ends {
            Ends::Streams(given) => {
                let tokens = [&mut stdio.stdin, &mut stdio.stdout, &mut stdio.stderr];
                for ((field, token), given) in tokens.into_iter().zip([stdin, stdout, stderr]).zip(given) {
                    *field = if *given { token } else { 0 };
                }
            }
            Ends::Console(_) => {
                stdio.terminal = true;
                stdio.stdout = stdout;
                stdio.plain_newlines = self.foreground;
                if let Some((rows, columns)) = self.size() {
                    (stdio.rows, stdio.columns) = (u32::from(rows), u32::from(columns));
                }
            }
        }
        stdio
    }

    /// Rows and columns of the terminal, if there is one and it knows.
    pub fn size(&self) -> Option<(u16, u16)> {
        match &self.ends {
            Ends::Streams(_) => None,
            Ends::Console(console) => console.size(),
        }
    }

    /// Starts a thread for each direction of each stream; they connect to the socket in the pod's directory and move bytes.
    pub fn connect(&self, pod: BorrowedFd<'_>) -> Result<Flow, StdioError> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut flow =
            Flow { sender, receiver, progress: Arc::default(), connecting: 0, outputs: 0, sockets: 0, lease: None };
        let [stdin, stdout, stderr] = self.tokens;
        let pod = Arc::new(duplicate(pod).map_err(StdioError::Duplicate)?);
        if self.lease != 0 {
            flow.hold(&pod, self.lease)?;
        }
        match &self.ends {
            Ends::Streams(given) => {
                let copy = |index: usize| duplicate(STANDARD[index]()).map_err(StdioError::Duplicate);
                if given[1] {
                    flow.start("stdout", &pod, stdout, Direction::Output(copy(1)?))?;
                }
                if given[2] {
                    flow.start("stderr", &pod, stderr, Direction::Output(copy(2)?))?;
                }
                if given[0] {
                    flow.start("stdin", &pod, stdin, Direction::Stdin(copy(0)?))?;
                }
            }
            Ends::Console(console) => {
                let copy = || duplicate(console.peer()).map_err(StdioError::Duplicate);
                flow.start("terminal", &pod, stdout, Direction::Terminal(copy()?, copy()?))?;
            }
        }
        for Further { token, fd, way } in self.further.take() {
            let direction = match way {
                Way::In => Direction::Input(fd),
                Way::Out => Direction::Output(fd),
                Way::Both => Direction::Socket(fd),
            };
            flow.start("descriptor", &pod, token, direction)?;
        }
        Ok(flow)
    }
}

/// The threads of a container's streams.
pub struct Flow {
    sender: mpsc::UnboundedSender<Report>,
    receiver: mpsc::UnboundedReceiver<Report>,
    progress: Arc<Progress>,
    /// Streams whose connection was not reported yet.
    connecting: usize,
    /// Outputs that have not ended yet.
    outputs: usize,
    /// Connected sockets of which the same is true.
    sockets: usize,
    /// Closed when this is dropped.
    lease: Option<UnixStream>,
}

impl Flow {
    fn hold(&mut self, pod: &Arc<OwnedFd>, token: u64) -> Result<(), StdioError> {
        self.connecting += 1;
        let (pod, sender) = (pod.clone(), self.sender.clone());
        thread("lease", move || {
            let report = match connect::connect(pod.as_fd(), token) {
                Ok(stream) => Report::Leased(stream),
                Err(error) => Report::Failed("lease", error),
            };
            let _ = sender.send(report);
        })
        .map_err(StdioError::Thread)
    }

    fn start(
        &mut self,
        name: &'static str,
        pod: &Arc<OwnedFd>,
        token: u64,
        direction: Direction,
    ) -> Result<(), StdioError> {
        self.connecting += 1;
        match direction {
            Direction::Stdin(_) | Direction::Input(_) => {}
            Direction::Output(_) | Direction::Terminal(..) => self.outputs += 1,
            Direction::Socket(_) => self.sockets += 1,
        }
        let (pod, sender, progress) = (pod.clone(), self.sender.clone(), self.progress.clone());
        thread(name, move || match connect::connect(pod.as_fd(), token) {
            Ok(stream) => {
                if let Err(error) = direction.run(name, stream, &sender, &progress) {
                    let _ = sender.send(Report::Failed(name, error));
                }
            }
            Err(error) => {
                let _ = sender.send(Report::Failed(name, error));
            }
        })
        .map_err(StdioError::Thread)
    }

    /// Waits until every stream is connected.
    pub async fn connected(&mut self) -> Result<(), StdioError> {
        while self.connecting > 0 {
            self.report().await?;
        }
        Ok(())
    }

    /// Waits until every output has ended and was written. To be called when the container has ended: a guest that sends
    /// nothing more and closes nothing is given up, as is one that sends more than can be on its way, and who is connected to the
    /// container and does not read.
    pub async fn drained(&mut self) -> Result<(), StdioError> {
        let ended = self.progress.moved();
        while self.outputs > 0 || self.sockets > 0 {
            let before = self.progress.moved();
            match tokio::time::timeout(pump::PATIENCE, self.report()).await {
                Ok(report) => report?,
                Err(_) if self.progress.moved() - ended > pump::MOST_LEFT => return Err(StdioError::NeverEnds),
                // A slow reader of ours is not the guest's fault.
                Err(_) if self.progress.writing() || self.progress.moved() != before => {}
                Err(_) if self.outputs == 0 => return Ok(()),
                Err(_) => return Err(StdioError::NeverEnds),
            }
        }
        Ok(())
    }

    async fn report(&mut self) -> Result<(), StdioError> {
        match self.receiver.recv().await {
            Some(Report::Connected) => self.connecting -= 1,
            Some(Report::Leased(stream)) => {
                self.lease = Some(stream);
                self.connecting -= 1;
            }
            Some(Report::Drained) => self.outputs -= 1,
            Some(Report::Disconnected) => self.sockets -= 1,
            Some(Report::Failed(name, error)) => return Err(StdioError::Connect(name, error)),
            // Not while we hold a sender.
            None => (self.outputs, self.sockets) = (0, 0),
        }
        Ok(())
    }
}

/// What a thread does with its stream.
enum Direction {
    Stdin(OwnedFd),
    Input(OwnedFd),
    Output(OwnedFd),
    Socket(OwnedFd),
    /// Input and output on one stream, which ends with both.
    Terminal(OwnedFd, OwnedFd),
}

impl Direction {
    fn run(
        self,
        name: &'static str,
        stream: UnixStream,
        sender: &mpsc::UnboundedSender<Report>,
        progress: &Progress,
    ) -> io::Result<()> {
        let output = match self {
            Self::Stdin(fd) => {
                let _ = sender.send(Report::Connected);
                if !pump::input(fd, &stream, Shutdown::Write) {
                    pump::forget_stdin();
                }
                return Ok(());
            }
            Self::Input(fd) => {
                let _ = sender.send(Report::Connected);
                pump::input(fd, &stream, Shutdown::Write);
                return Ok(());
            }
            Self::Socket(fd) => {
                let (input, writer) = (duplicate(fd.as_fd())?, stream.try_clone()?);
                thread(name, move || pump::from_socket(&input, &writer))?;
                let _ = sender.send(Report::Connected);
                pump::to_socket(&stream, fd.as_fd(), progress);
                drop(fd);
                let _ = sender.send(Report::Disconnected);
                return Ok(());
            }
            Self::Output(fd) => fd,
            Self::Terminal(input, output) => {
                let writer = stream.try_clone()?;
                thread(name, move || {
                    if !pump::input(input, &writer, Shutdown::Both) {
                        pump::forget_stdin();
                    }
                })?;
                output
            }
        };
        // Only now: when all are connected no thread is started any more, which the container's group may forbid.
        let _ = sender.send(Report::Connected);
        pump::output(&stream, output.as_fd(), progress);
        let _ = sender.send(Report::Drained);
        Ok(())
    }
}

/// Begins to connect a stream of its own to the agent behind the socket in a pod's directory, by its token.
pub fn begin_connect(
    name: &'static str,
    pod: BorrowedFd<'_>,
    token: u64,
) -> Result<oneshot::Receiver<io::Result<UnixStream>>, StdioError> {
    let (sender, receiver) = oneshot::channel();
    let pod = duplicate(pod).map_err(StdioError::Duplicate)?;
    let connect = move || {
        // Who waits for it may have given up.
        let _ = sender.send(connect::connect(pod.as_fd(), token));
    };
    thread(name, connect).map_err(StdioError::Thread)?;
    Ok(receiver)
}

fn thread(name: &'static str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    spawn(name, run).map(drop)
}

/// A thread that moves bytes, and can do nothing else as root.
fn spawn(name: &'static str, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let confined = || {
        if drop_privileges().is_ok() {
            run();
        }
    };
    std::thread::Builder::new().name(name.into()).stack_size(pump::STACK).spawn(confined)
}

/// Standard input, output and error.
const STANDARD: [fn() -> BorrowedFd<'static>; 3] = [rustix::stdio::stdin, rustix::stdio::stdout, rustix::stdio::stderr];

/// Whether a descriptor is `/dev/null` (character device 1:3), of which the guest has its own, or closed.
fn is_null(fd: BorrowedFd<'_>) -> bool {
    rustix::fs::fstat(fd).map_or(true, |stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
            && (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)) == (1, 3)
    })
}

fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    rustix::io::fcntl_dupfd_cloexec(fd, 3)
}

/// A random number that is not zero.
pub fn token() -> Result<u64, StdioError> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty()).map_err(StdioError::Random)?;
    Ok(u64::from_ne_bytes(bytes) | 1)
}
