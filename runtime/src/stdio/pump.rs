//! Moving bytes between a descriptor of the caller and a stream of the guest.

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Bytes moved at once.
const CHUNK: usize = 128 * 1024;

/// Stack of a thread that moves bytes.
pub const STACK: usize = 64 * 1024;

/// How long a guest may take to end the output of a container that has ended, while nobody holds it up.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Most bytes that may still be on their way when a container has ended: more than all of its streams can have in buffers of
/// kernels and of the machine.
pub const MOST_LEFT: u64 = 64 << 20;

/// What the outputs of a container are doing, seen from outside their threads.
#[derive(Debug, Default)]
pub struct Progress {
    moved: AtomicU64,
    writing: AtomicUsize,
}

impl Progress {
    /// Bytes written so far.
    pub fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    /// Whether an output waits for its reader.
    pub fn writing(&self) -> bool {
        self.writing.load(Ordering::Relaxed) > 0
    }
}

/// Moves from the guest until it closes the stream, or until nobody reads any more: then the stream is closed, so that the
/// container's next write fails as it would on a broken pipe.
pub fn output(stream: &UnixStream, to: BorrowedFd<'_>, progress: &Progress) {
    let mut buffer = Vec::with_capacity(CHUNK);
    while let Ok(length @ 1..) = read(stream.as_fd(), &mut buffer) {
        progress.writing.fetch_add(1, Ordering::Relaxed);
        let written = write_all(to, &buffer);
        progress.moved.fetch_add(length as u64, Ordering::Relaxed);
        progress.writing.fetch_sub(1, Ordering::Relaxed);
        if written.is_err() {
            break;
        }
    }
    // The other side may have closed it already.
    let _ = stream.shutdown(Shutdown::Both);
}

/// Moves to the guest until the caller's end of file, or until the container has closed its input: then our copy of the
/// descriptor is closed too, so that whoever writes to it is told, and the answer is `false`. The end of file closes `end` of the
/// stream: its output goes on, but a terminal is hung up.
pub fn input(from: OwnedFd, stream: &UnixStream, end: Shutdown) -> bool {
    let mut buffer = Vec::with_capacity(CHUNK);
    loop {
        match read(from.as_fd(), &mut buffer) {
            // The other side of a terminal that is gone is reported as an I/O error.
            Ok(0) | Err(_) => break,
            Ok(_) => {
                if write_all(stream.as_fd(), &buffer).is_err() {
                    return false;
                }
            }
        }
    }
    // The other side may have closed it already.
    let _ = stream.shutdown(end);
    true
}

/// Moves from a socket of the caller's to the guest until the end of file, or until the guest has closed the stream.
pub fn from_socket(from: &OwnedFd, stream: &UnixStream) {
    let mut buffer = Vec::with_capacity(CHUNK);
    loop {
        let mut fds = [PollFd::new(from, PollFlags::IN), PollFd::new(stream, PollFlags::empty())];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(_) => return,
        }
        if !fds[1].revents().is_empty() {
            return;
        }
        buffer.clear();
        match rustix::io::read(from, spare_capacity(&mut buffer)) {
            // Others may have the socket too, and have been faster.
            Err(Errno::INTR | Errno::AGAIN) => {}
            Ok(0) | Err(_) => break,
            Ok(_) => {
                if write_all(stream.as_fd(), &buffer).is_err() {
                    return;
                }
            }
        }
    }
    // The other side may have closed it already.
    let _ = stream.shutdown(Shutdown::Write);
}

/// Moves from the guest to a socket of the caller's, until the guest closes the stream, or ends its way here: then so does the socket.
/// One that was closed in the guest stays open for others that have it.
pub fn to_socket(stream: &UnixStream, to: BorrowedFd<'_>, progress: &Progress) {
    let mut buffer = Vec::with_capacity(CHUNK);
    while let Ok(length @ 1..) = read(stream.as_fd(), &mut buffer) {
        let written = write_all(to, &buffer);
        progress.moved.fetch_add(length as u64, Ordering::Relaxed);
        if written.is_err() {
            // The other side may have closed it already.
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
    }
    if !hung_up(stream.as_fd()) {
        // Not that of a terminal.
        let _ = rustix::net::shutdown(to, rustix::net::Shutdown::Write);
    }
}

/// Whether a stream is closed both ways.
pub fn hung_up(stream: BorrowedFd<'_>) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::from_borrowed_fd(stream, PollFlags::empty())];
    poll(&mut fds, Some(&now)).is_ok() && !fds[0].revents().is_empty()
}

/// Moves from one to the other until there is nothing more, or nobody to take it.
pub fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) {
    let mut buffer = Vec::with_capacity(CHUNK);
    while let Ok(1..) = read(from, &mut buffer) {
        if write_all(to, &buffer).is_err() {
            break;
        }
    }
}

/// `/dev/null`, opened while that was the host's.
static NULL: OnceLock<OwnedFd> = OnceLock::new();

/// To be called before anything is moved, and before this process has another root.
pub fn prepare() -> Result<(), Errno> {
    use rustix::fs::{Mode, OFlags};
    let null = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    NULL.get_or_init(|| null);
    Ok(())
}

/// Puts `/dev/null` in place of standard input, so that the pipe behind it has no reader any more.
pub fn forget_stdin() {
    if let Some(null) = NULL.get() {
        let _ = rustix::stdio::dup2_stdin(null);
    }
}

/// The caller may have made its descriptors non-blocking; they are its own, so we wait instead of changing that.
fn wait(fd: BorrowedFd<'_>, flags: PollFlags) -> Result<(), Errno> {
    match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Puts what comes in place of what the buffer had, up to its capacity: memory that is not needed is never touched.
fn read(fd: BorrowedFd<'_>, buffer: &mut Vec<u8>) -> Result<usize, Errno> {
    loop {
        buffer.clear();
        match rustix::io::read(fd, spare_capacity(buffer)) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(fd, PollFlags::IN)?,
            result => return result,
        }
    }
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(fd, PollFlags::OUT)?,
            Err(errno) => return Err(errno),
            Ok(length) => bytes = &bytes[length..],
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::thread::spawn;

    #[test]
    fn everything_arrives_and_the_end_of_file_is_a_half_close() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let sender = spawn(move || input(reader.into(), &ours, Shutdown::Write));
        let text = vec![7; 3 * CHUNK + 5];
        let expected = text.len();
        let feeder = spawn(move || writer.write_all(&text).unwrap());
        let mut received = Vec::new();
        guest.read_to_end(&mut received).unwrap();
        assert_eq!(received.len(), expected);
        feeder.join().unwrap();
        sender.join().unwrap();
    }

    #[test]
    fn an_output_ends_with_its_stream_and_a_lost_reader_ends_the_stream() {
        let progress = Progress::default();
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        guest.write_all(b"abc").unwrap();
        guest.shutdown(Shutdown::Write).unwrap();
        output(&ours, writer.as_fd(), &progress);
        assert_eq!((progress.moved(), progress.writing()), (3, false));
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "abc");

        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        guest.write_all(b"abc").unwrap();
        output(&ours, writer.as_fd(), &progress);
        assert!(guest.write_all(b"more").is_err());
    }
}
