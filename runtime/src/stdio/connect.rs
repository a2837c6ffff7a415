//! A stream into the guest: `CONNECT <port>` and `OK` on the pod's socket, then the token that names the stream.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use podhull_protocol::STDIO_PORT;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, recv};
use rustix::thread::UnshareFlags;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// How long the guest may take to accept a connection.
const DEADLINE: Duration = Duration::from_secs(30);

/// Longest answer: `OK` and a port.
const MAX_ANSWER: usize = 32;

/// Name of the pod's socket in the pod's directory.
pub const SOCKET: &str = "vsock.sock";

/// Connects, and names the stream by its token, as [`dial_in_this_thread`].
pub fn connect(pod: BorrowedFd<'_>, token: u64) -> io::Result<UnixStream> {
    name(dial_in_this_thread(pod, STDIO_PORT)?, token)
}

/// The same for a thread whose working directory is the pod's.
pub fn connect_here(token: u64) -> io::Result<UnixStream> {
    name(ask_for(connect_stream(SOCKET, DEADLINE)?, STDIO_PORT)?, token)
}

/// The same in the event loop of a process that has dropped what it could do as root, and whose threads use no relative paths: its
/// working directory is the pod's for a moment. A deadline is for who waits for it.
pub async fn connect_in_loop(pod: BorrowedFd<'_>, token: u64) -> io::Result<tokio::net::UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::process::fchdir(pod)?;
    let connected = rustix::net::connect(&socket, &SocketAddrUnix::new(SOCKET)?);
    rustix::process::chdir("/")?;
    connected?;
    let mut stream = ask_in_loop(tokio::net::UnixStream::from_std(socket.into())?, STDIO_PORT).await?;
    stream.write_all(&token.to_le_bytes()).await?;
    Ok(stream)
}

/// Connects to a port of the guest in the event loop of a process that sees the host's files. A deadline is for who waits for it.
pub async fn dial_in_loop(pod: BorrowedFd<'_>, port: u32) -> io::Result<tokio::net::UnixStream> {
    // By way of its directory's descriptor: paths of sockets are at most 107 bytes long.
    let path = format!("/proc/self/fd/{}/{SOCKET}", pod.as_raw_fd());
    ask_in_loop(tokio::net::UnixStream::connect(path).await?, port).await
}

async fn ask_in_loop(mut stream: tokio::net::UnixStream, port: u32) -> io::Result<tokio::net::UnixStream> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        if line.len() == MAX_ANSWER {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the machine's answer does not end"));
        }
        line.push(stream.read_u8().await?);
    }
    check(&String::from_utf8_lossy(&line))?;
    Ok(stream)
}

fn name(mut stream: UnixStream, token: u64) -> io::Result<UnixStream> {
    stream.set_write_timeout(Some(DEADLINE))?;
    stream.write_all(&token.to_le_bytes())?;
    stream.set_write_timeout(None)?;
    Ok(stream)
}

/// Connects to a port of the guest through the socket in the pod's directory.
pub fn dial(pod: BorrowedFd<'_>, port: u32) -> io::Result<UnixStream> {
    ask_for(in_directory(pod, || connect_stream(SOCKET, DEADLINE))?, port)
}

/// The same without a thread more, for one that uses no relative paths: its working directory is the pod's for a moment and `/` then,
/// and its own alone.
pub fn dial_in_this_thread(pod: BorrowedFd<'_>, port: u32) -> io::Result<UnixStream> {
    enter(pod)?;
    let connected = connect_stream(SOCKET, DEADLINE);
    rustix::process::chdir("/")?;
    ask_for(connected?, port)
}

/// Connects to a socket by a path; at most so long if its backlog is full. Nor does what is written to it wait for longer.
fn connect_stream(path: &str, deadline: Duration) -> io::Result<UnixStream> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(deadline))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?).map_err(|errno| match errno {
        Errno::AGAIN => late(),
        errno => errno.into(),
    })?;
    Ok(socket.into())
}

fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the guest did not answer in time")
}

/// On a stream whose writes have a deadline.
fn ask_for(mut stream: UnixStream, port: u32) -> io::Result<UnixStream> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    check(&line(&mut stream, DEADLINE)?)?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    Ok(stream)
}

fn check(answer: &str) -> io::Result<()> {
    match answer.starts_with("OK ") {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::InvalidData, format!("the machine answered {answer:?}"))),
    }
}

/// Connects to a packet socket in a directory; at most so long if its backlog is full.
pub fn connect_packets(directory: BorrowedFd<'_>, name: &str, deadline: Duration) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(deadline))?;
    in_directory(directory, || Ok(rustix::net::connect(&socket, &SocketAddrUnix::new(name)?)?))?;
    Ok(socket)
}

/// The same in the event loop of a process that sees the host's files: nothing is waited for, neither here nor when it is used.
pub fn connect_packets_in_loop(directory: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    let path = format!("/proc/self/fd/{}/{name}", directory.as_raw_fd());
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Connects from a directory. There is no `connectat`, the path of a socket is at most 107 bytes long, and a shadow
/// has no `/proc` it could trust: so a thread goes there.
fn in_directory<T: Send>(directory: BorrowedFd<'_>, connect: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let go = || {
            enter(directory)?;
            connect()
        };
        let thread = std::thread::Builder::new().name("connect".into()).stack_size(super::pump::STACK);
        thread
            .spawn_scoped(scope, go)?
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the connecting thread panicked")))
    })
}

/// Makes a directory the working directory of this thread, and of no other.
fn enter(directory: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: root and working directory of this thread alone; no descriptor table is unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
    Ok(rustix::process::fchdir(directory)?)
}

/// One line, and not a byte more: what follows belongs to the guest's stream. All of it comes by the deadline.
fn line(stream: &mut UnixStream, deadline: Duration) -> io::Result<String> {
    let until = Instant::now() + deadline;
    let mut line = Vec::new();
    let mut seen = [0; MAX_ANSWER];
    while line.len() < MAX_ANSWER {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        stream.set_read_timeout(Some(left))?;
        let room = &mut seen[..MAX_ANSWER - line.len()];
        let length = match recv(&*stream, room, RecvFlags::PEEK) {
            Ok((0, _)) => {
                return Err(io::Error::new(io::ErrorKind::ConnectionRefused, "the guest refused the connection"));
            }
            Ok((length, _)) => length,
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => return Err(late()),
            Err(errno) => return Err(errno.into()),
        };
        let end = seen[..length].iter().position(|byte| *byte == b'\n');
        // What was seen is there.
        stream.read_exact(&mut seen[..end.map_or(length, |end| end + 1)])?;
        line.extend_from_slice(&seen[..end.unwrap_or(length)]);
        if end.is_some() {
            return Ok(String::from_utf8_lossy(&line).into_owned());
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the machine's answer does not end"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_stream_begins_with_port_and_token() {
        let directory = std::env::temp_dir().join(format!("podhull-connect-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let peer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            assert_eq!(line(&mut stream, DEADLINE).unwrap(), "CONNECT 1025");
            stream.write_all(b"OK 7\nhello").unwrap();
            let mut token = [0; 8];
            stream.read_exact(&mut token).unwrap();
            assert_eq!(token, [8, 7, 6, 5, 4, 3, 2, 1]);
            let (stream, _) = listener.accept().unwrap();
            drop(stream);
        });
        let pod = std::fs::File::open(&directory).unwrap();
        let mut stream = connect(pod.as_fd(), 0x0102_0304_0506_0708).unwrap();
        let mut text = [0; 5];
        stream.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello");
        assert!(connect(pod.as_fd(), 1).is_err());
        peer.join().unwrap();
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn who_accepts_nothing_or_answers_byte_by_byte_is_not_waited_for_longer() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.sock");
        let flags = SocketFlags::CLOEXEC;
        let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let (path, short) = (path.to_str().unwrap(), Duration::from_millis(200));
        let mut waiting = Vec::new();
        let refused = loop {
            match connect_stream(path, short) {
                Ok(stream) if waiting.len() < 100 => waiting.push(stream),
                other => break other,
            }
        };
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::TimedOut);

        let (mut stream, mut peer) = UnixStream::pair().unwrap();
        // Fewer bytes than the longest answer has, each within the deadline.
        let slow = std::thread::spawn(move || {
            while peer.write_all(b"O").is_ok() {
                std::thread::sleep(short / 4);
            }
        });
        let error = line(&mut stream, short).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(stream);
        slow.join().unwrap();
    }
}
