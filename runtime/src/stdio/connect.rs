//! A stream into the guest: `CONNECT <port>` and `OK` on the pod's socket, then the token that names the stream.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use podhull_protocol::STDIO_PORT;

/// How long the guest may take to accept a connection.
const DEADLINE: Duration = Duration::from_secs(30);

/// Longest answer: `OK` and a port.
const MAX_ANSWER: usize = 32;

/// Connects, and names the stream by its token.
pub fn connect(socket: &Path, token: u64) -> io::Result<UnixStream> {
    let mut stream = dial(socket, STDIO_PORT)?;
    stream.set_write_timeout(Some(DEADLINE))?;
    stream.write_all(&token.to_le_bytes())?;
    stream.set_write_timeout(None)?;
    Ok(stream)
}

/// Connects to a port of the guest.
pub fn dial(socket: &Path, port: u32) -> io::Result<UnixStream> {
    // By way of its directory's descriptor: paths of sockets are at most 107 bytes long.
    let directory = File::open(socket.parent().unwrap_or(Path::new("/")))?;
    let name = socket.file_name().unwrap_or_default();
    let mut stream = UnixStream::connect(Path::new(&format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let answer = line(&mut stream)?;
    if !answer.starts_with("OK ") {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("the machine answered {answer:?}")));
    }
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    Ok(stream)
}

/// One line, byte by byte: what follows belongs to the guest's stream.
fn line(stream: &mut impl Read) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < MAX_ANSWER {
        match stream.read(&mut byte) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::ConnectionRefused, "the guest refused the connection")),
            Ok(_) if byte[0] == b'\n' => return Ok(String::from_utf8_lossy(&line).into_owned()),
            Ok(_) => line.push(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the guest did not answer in time"));
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the machine's answer does not end"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_stream_begins_with_port_and_token() {
        let directory = std::env::temp_dir().join(format!("podhull-connect-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let peer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            assert_eq!(line(&mut stream).unwrap(), "CONNECT 1025");
            stream.write_all(b"OK 7\nhello").unwrap();
            let mut token = [0; 8];
            stream.read_exact(&mut token).unwrap();
            assert_eq!(token, [8, 7, 6, 5, 4, 3, 2, 1]);
            let (stream, _) = listener.accept().unwrap();
            drop(stream);
        });
        let mut stream = connect(&path, 0x0102_0304_0506_0708).unwrap();
        let mut text = [0; 5];
        stream.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello");
        assert!(connect(&path, 1).is_err());
        peer.join().unwrap();
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
