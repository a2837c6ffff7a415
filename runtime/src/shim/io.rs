//! Where the standard streams of a process go: named pipes, files, and programs that take logs, as containerd names them.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use super::fifo::{self, Input, Output};
use crate::stdio;

/// How long a program that takes logs may take to say that it is ready.
const READY: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// How long it may take to end when there will be no more logs, as containerd's shim for runc has it; and after it was told to.
const LAST: [Timespec; 2] = [Timespec { tv_sec: 12, tv_nsec: 0 }, Timespec { tv_sec: 3, tv_nsec: 0 }];

/// How long containerd may take to read what a process has written that has ended.
const DRAIN: Duration = Duration::from_secs(10);

/// How much is copied at once between a terminal and its pipes.
const CHUNK: usize = 32 * 1024;

/// Why there are no streams.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// A pipe or file.
    #[error("{0}: {1}")]
    Open(PathBuf, #[source] io::Error),
    /// A kind of place that is not known.
    #[error("{0:?}: output goes to a named pipe, file:// or binary://")]
    Scheme(String),
    /// The same for input.
    #[error("{0:?}: input comes from a named pipe")]
    Input(String),
    /// A terminal has one output.
    #[error("{0:?}: a terminal's output goes to a named pipe or binary://")]
    TerminalTo(String),
    /// The program that takes logs.
    #[error("{0}: {1}")]
    Logger(PathBuf, #[source] io::Error),
    /// No pipe, or terminal.
    #[error("cannot make the standard streams: {0}")]
    Make(#[source] io::Error),
}

/// Their places.
#[derive(Debug, Clone, Default)]
pub struct Names {
    /// Empty: there is none. The same for the others.
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    /// All three are a terminal.
    pub terminal: bool,
}

/// Whose they are, for programs that take logs.
#[derive(Clone)]
pub struct Owner {
    pub namespace: String,
    pub id: String,
}

/// Open streams: what the process gets, and what stays here.
pub struct Io {
    /// Standard input, output and error.
    pub streams: [OwnedFd; 3],
    /// The other side of the terminal.
    pub terminal: Option<OwnedFd>,
    /// What stays.
    pub ends: Ends,
}

/// What stays here while the process lives.
#[derive(Default)]
pub struct Ends {
    /// Until containerd closes the input.
    stdin: Mutex<Option<OwnedFd>>,
    /// Until the process has ended.
    held: Mutex<Vec<OwnedFd>>,
    master: Option<OwnedFd>,
    /// Ends after the last byte of the terminal.
    output: Mutex<Option<JoinHandle<()>>>,
    input: Option<JoinHandle<()>>,
    logger: Mutex<Option<Child>>,
}

/// A place for output.
enum Place<'a> {
    Null,
    Fifo(&'a Path),
    File(PathBuf),
    /// A program that takes logs, and its arguments.
    Logger(PathBuf, Vec<OsString>),
}

impl Io {
    /// Opens them.
    pub async fn open(names: &Names, owner: &Owner) -> Result<Self, IoError> {
        match names.terminal {
            true => Self::open_terminal(names, owner).await,
            false => Self::open_streams(names, owner).await,
        }
    }

    async fn open_streams(names: &Names, owner: &Owner) -> Result<Self, IoError> {
        let mut ends = Ends::default();
        let stdin = match &*names.stdin {
            "" => null()?,
            path => {
                let input = input(path)?;
                ends.stdin = Mutex::new(Some(input.writer));
                input.reader
            }
        };
        let (out, err) = (Place::of(&names.stdout)?, Place::of(&names.stderr)?);
        let [out, err] = match (out, err) {
            // One program takes both, whatever is said of the second.
            (Place::Logger(program, arguments), _) => {
                let (child, streams) = logger(program, arguments, owner).await?;
                ends.logger = Mutex::new(Some(child));
                streams
            }
            (out, err) => {
                let mut held = Vec::new();
                let streams = [out.open(&mut held).await?, err.open(&mut held).await?];
                ends.held = Mutex::new(held);
                streams
            }
        };
        Ok(Self { streams: [stdin, out, err], terminal: None, ends })
    }

    async fn open_terminal(names: &Names, owner: &Owner) -> Result<Self, IoError> {
        let (master, peer) = stdio::terminal_pair(None).map_err(|errno| IoError::Make(errno.into()))?;
        let copy = || master.try_clone().map_err(IoError::Make);
        let (to_output, to_input, streams) = (copy()?, copy()?, [null()?, null()?, null()?]);
        let mut ends = Ends::default();
        let input = match &*names.stdin {
            "" => None,
            path => Some(input(path)?),
        };
        // The last that can fail: nobody would wait for the end of a program that was started for nothing.
        let output = match Place::of(&names.stdout)? {
            Place::Null => None,
            Place::Fifo(path) => {
                let opened = Output::open(path).await.map_err(|e| IoError::Open(path.into(), e))?;
                ends.held = Mutex::new(vec![opened.reader]);
                Some(opened.writer)
            }
            Place::File(_) => return Err(IoError::TerminalTo(names.stdout.clone())),
            Place::Logger(program, arguments) => {
                let (child, [out, _]) = logger(program, arguments, owner).await?;
                ends.logger = Mutex::new(Some(child));
                Some(out)
            }
        };
        ends.output = Mutex::new(Some(tokio::spawn(copy_until_end(to_output, output))));
        if let Some(Input { reader, writer }) = input {
            ends.stdin = Mutex::new(Some(writer));
            ends.input = Some(tokio::spawn(copy_until_end(reader, Some(to_input))));
        }
        ends.master = Some(master);
        Ok(Self { streams, terminal: Some(peer), ends })
    }
}

impl Ends {
    /// There will be no more input from containerd's side.
    pub fn close_stdin(&self) {
        drop(take(&self.stdin));
    }

    /// Nobody but who reads the output holds it open any more: if nobody does, who writes it is told.
    pub fn let_go(&self) {
        self.held.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
    }

    /// Sets the size of the terminal; none if there is no terminal.
    pub fn resize(&self, rows: u16, columns: u16) -> Option<io::Result<()>> {
        let master = self.master.as_ref()?;
        Some(stdio::set_terminal_size(master.as_fd(), (rows, columns)).map_err(io::Error::from))
    }

    /// The process has ended, and all it wrote is in the pipes: who reads them is told of the end.
    pub async fn finish(&self) {
        self.close_stdin();
        let output = take(&self.output);
        if let Some(mut output) = output {
            // A reader that does not read is not waited for for ever.
            if tokio::time::timeout(DRAIN, &mut output).await.is_err() {
                output.abort();
            }
        }
        if let Some(input) = &self.input {
            input.abort();
        }
        self.let_go();
        let logger = take(&self.logger);
        if let Some(logger) = logger {
            let _ = tokio::task::spawn_blocking(move || end_logger(logger)).await;
        }
    }
}

fn take<T: Default>(slot: &Mutex<T>) -> T {
    std::mem::take(&mut *slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
}

fn input(name: &str) -> Result<Input, IoError> {
    match name.split_once("://") {
        Some(_) => Err(IoError::Input(name.into())),
        None => Input::open(Path::new(name)).map_err(|e| IoError::Open(name.into(), e)),
    }
}

impl<'a> Place<'a> {
    fn of(name: &'a str) -> Result<Self, IoError> {
        if name.is_empty() {
            return Ok(Self::Null);
        }
        let Some((scheme, rest)) = name.split_once("://") else { return Ok(Self::Fifo(Path::new(name))) };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        match scheme {
            "fifo" => Ok(Self::Fifo(Path::new(path))),
            "file" => Ok(Self::File(decode(path).into())),
            "binary" => {
                let words = query.split('&').filter(|pair| !pair.is_empty()).flat_map(|pair| {
                    let (key, value) = pair.split_once('=').map_or((pair, None), |(key, value)| (key, Some(value)));
                    [Some(key), value].into_iter().flatten().map(decode)
                });
                Ok(Self::Logger(decode(path).into(), words.collect()))
            }
            _ => Err(IoError::Scheme(name.into())),
        }
    }

    async fn open(self, held: &mut Vec<OwnedFd>) -> Result<OwnedFd, IoError> {
        match self {
            Self::Null => null(),
            Self::Fifo(path) => {
                let output = Output::open(path).await.map_err(|e| IoError::Open(path.into(), e))?;
                held.push(output.reader);
                Ok(output.writer)
            }
            Self::File(path) => fifo::append(&path).map(OwnedFd::from).map_err(|e| IoError::Open(path, e)),
            Self::Logger(program, _) => Err(IoError::Scheme(format!("binary://{}", program.display()))),
        }
    }
}

/// What `%` and `+` stand for in a URL's path and query.
fn decode(text: &str) -> OsString {
    use std::os::unix::ffi::OsStringExt;
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        bytes.push(match (first, after) {
            (b'+', _) => b' ',
            (b'%', [high, low, after @ ..]) => match (digit(*high), digit(*low)) {
                (Some(high), Some(low)) => {
                    rest = after;
                    (high * 16 + low).to_le_bytes()[0]
                }
                _ => b'%',
            },
            (byte, _) => *byte,
        });
    }
    OsString::from_vec(bytes)
}

fn null() -> Result<OwnedFd, IoError> {
    let file = std::fs::File::options().read(true).write(true).open("/dev/null");
    file.map(OwnedFd::from).map_err(|e| IoError::Open("/dev/null".into(), e))
}

async fn logger(program: PathBuf, arguments: Vec<OsString>, owner: &Owner) -> Result<(Child, [OwnedFd; 2]), IoError> {
    let owner = owner.clone();
    let started = tokio::task::spawn_blocking(move || start_logger(&program, &arguments, &owner)).await;
    started.unwrap_or_else(|error| Err(IoError::Make(io::Error::other(error))))
}

/// Starts a program that takes logs (containerd, `core/runtime/v2/README.md`, "Logging"): it reads standard output from
/// descriptor 3 and standard error from 4, and closes 5 when it is ready.
fn start_logger(program: &Path, arguments: &[OsString], owner: &Owner) -> Result<(Child, [OwnedFd; 2]), IoError> {
    let wrong = |error: io::Error| IoError::Logger(program.to_owned(), error);
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|errno| wrong(errno.into()));
    let ((out, our_out), (err, our_err), (our_ready, ready)) = (pipe()?, pipe()?, pipe()?);
    let mut command = Command::new(program);
    command.args(arguments);
    command.env("CONTAINER_ID", &owner.id).env("CONTAINER_NAMESPACE", &owner.namespace);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // Beyond the numbers they are to have, so that none is overwritten before it is used.
    let high = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 10).map_err(|errno| wrong(errno.into()));
    let given = [high(&out)?, high(&err)?, high(&ready)?];
    let numbers = [given[0].as_raw_fd(), given[1].as_raw_fd(), given[2].as_raw_fd()];
    // SAFETY: between fork and exec the closure only makes system calls, and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            for (number, fd) in (3..).zip(numbers) {
                // SAFETY: a plain system call on integers.
                if libc::dup2(fd, number) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let mut child = command.spawn().map_err(wrong)?;
    drop((given, out, err, ready));
    let mut fds = [PollFd::new(&our_ready, PollFlags::IN)];
    match retry_on_intr(|| poll(&mut fds, Some(&READY))) {
        Ok(1..) => Ok((child, [our_out, our_err])),
        other => {
            let _ = child.kill();
            let _ = child.wait();
            let error = other.map_or_else(io::Error::from, |_| io::ErrorKind::TimedOut.into());
            Err(wrong(error))
        }
    }
}

/// Waits for its end; its pipes have ended.
fn end_logger(mut logger: Child) {
    let pid = Pid::from_raw(logger.id().cast_signed());
    if let Some(pidfd) = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) {
        for (deadline, signal) in LAST.iter().zip([Signal::TERM, Signal::KILL]) {
            let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
            if retry_on_intr(|| poll(&mut fds, Some(deadline))).is_ok_and(|ready| ready > 0) {
                break;
            }
            let _ = pidfd_send_signal(&pidfd, signal);
        }
    }
    let _ = logger.wait();
}

/// Copies until there is nothing more to come; to nowhere, if there is nowhere, or nobody there to take it any more: what a terminal
/// holds that nobody reads would stop who writes.
async fn copy_until_end(from: OwnedFd, to: Option<OwnedFd>) {
    let _ = copy(from, to).await;
}

async fn copy(from: OwnedFd, to: Option<OwnedFd>) -> io::Result<()> {
    let (from, mut to) = (register(from)?, to.map(register).transpose()?);
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = loop {
            let mut ready = from.readable().await?;
            match rustix::io::read(from.get_ref(), &mut *buffer) {
                // The other side of a terminal was closed.
                Ok(0) | Err(Errno::IO) => return Ok(()),
                Ok(length) => break length,
                Err(Errno::WOULDBLOCK) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        };
        if let Some(taker) = &to
            && write_all(taker, &buffer[..length]).await.is_err()
        {
            to = None;
        }
    }
}

async fn write_all(to: &AsyncFd<OwnedFd>, mut rest: &[u8]) -> io::Result<()> {
    while !rest.is_empty() {
        let mut ready = to.writable().await?;
        match rustix::io::write(to.get_ref(), rest) {
            Ok(written) => rest = &rest[written..],
            Err(Errno::WOULDBLOCK) => ready.clear_ready(),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    // SAFETY: the descriptor is owned by the AsyncFd from here on, and never replaced.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, OFlags};

    #[test]
    fn places_are_named_as_containerd_names_them() {
        assert!(matches!(Place::of(""), Ok(Place::Null)));
        assert!(matches!(Place::of("/run/x"), Ok(Place::Fifo(path)) if path == Path::new("/run/x")));
        assert!(matches!(Place::of("file:///var/a%20b"), Ok(Place::File(path)) if path == Path::new("/var/a b")));
        let Ok(Place::Logger(program, words)) = Place::of("binary:///usr/bin/log?--to=%2Fvar+1&-v") else { panic!() };
        assert_eq!((program, words), ("/usr/bin/log".into(), vec!["--to".into(), "/var 1".into(), "-v".into()]));
        for unknown in ["npipe://x", "binary-v2:///usr/bin/log", "ttrpc+unix:///run/x?streaming_id=y"] {
            let error = Place::of(unknown).err().unwrap();
            assert!(error.to_string().contains(unknown) && matches!(error, IoError::Scheme(_)), "{error}");
            assert!(matches!(input(unknown).err(), Some(IoError::Input(name)) if name == unknown));
        }
        assert_eq!(decode("a%zz%4"), "a%zz%4");
    }

    async fn open(stdin: &str, stdout: &str, terminal: bool) -> Io {
        let names = Names { stdin: stdin.into(), stdout: stdout.into(), stderr: String::new(), terminal };
        let owner = Owner { namespace: "n".into(), id: "i".into() };
        Io::open(&names, &owner).await.unwrap()
    }

    #[tokio::test]
    async fn a_terminal_whose_output_nobody_wants_stops_nobody() {
        let Io { terminal, ends, .. } = open("", "", true).await;
        let peer = terminal.unwrap();
        // More than a terminal holds.
        let write = move || (0..64).try_for_each(|_| rustix::io::write(&peer, &[b'x'; 4096]).map(drop));
        let written = tokio::time::timeout(Duration::from_secs(30), tokio::task::spawn_blocking(write)).await;
        written.unwrap().unwrap().unwrap();
        ends.finish().await;
    }

    #[tokio::test]
    async fn output_that_is_given_up_stops_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        for terminal in [true, false] {
            let reader = rustix::fs::open(&path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
            let Io { terminal: peer, streams: [_, out, _], ends } = open("", path.to_str().unwrap(), terminal).await;
            drop(reader);
            // More than the pipe holds.
            let out = peer.unwrap_or(out);
            let write = move || (0..64).try_for_each(|_| rustix::io::write(&out, &[b'x'; 4096]).map(drop));
            let mut writing = tokio::task::spawn_blocking(write);
            assert!(tokio::time::timeout(Duration::from_millis(100), &mut writing).await.is_err(), "{terminal}");
            ends.let_go();
            let written = tokio::time::timeout(Duration::from_secs(30), writing).await.unwrap().unwrap();
            assert_eq!(written, if terminal { Ok(()) } else { Err(Errno::PIPE) });
            ends.finish().await;
        }
    }

    #[tokio::test]
    async fn what_is_written_to_a_terminal_is_read_before_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let read = {
            let path = path.clone();
            tokio::task::spawn_blocking(move || std::fs::read_to_string(path))
        };
        let Io { terminal, ends, .. } = open("", path.to_str().unwrap(), true).await;
        rustix::io::write(terminal.as_ref().unwrap(), b"last words").unwrap();
        drop(terminal);
        ends.finish().await;
        assert_eq!(read.await.unwrap().unwrap(), "last words");
        // Of what has ended the size may be set, too.
        ends.resize(1, 2).unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_pipe_that_only_containerd_s_side_has_left_is_no_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("in");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let Io { streams: [stdin, ..], ends, .. } = open(path.to_str().unwrap(), "", false).await;
        drop(std::fs::OpenOptions::new().write(true).open(&path).unwrap());
        rustix::io::ioctl_fionbio(&stdin, true).unwrap();
        assert_eq!(rustix::io::read(&stdin, &mut [0; 1]), Err(Errno::WOULDBLOCK));
        ends.close_stdin();
        assert_eq!(rustix::io::read(&stdin, &mut [0; 1]), Ok(0));
    }

    #[tokio::test]
    async fn a_file_that_is_a_pipe_without_a_reader_holds_nobody_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(fifo::append(&path).is_err());
    }
}
