//! The text handshake of a client on the pod's socket: it writes `CONNECT <port>\n`, and reads `OK <port>\n` once the guest
//! has accepted.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

/// Longest line, its end included: `CONNECT 4294967295\r\n` is 20 bytes.
const MAX_LINE: usize = 32;

/// A client that has not said yet where it wants to go.
pub struct Client {
    socket: OwnedFd,
    line: Vec<u8>,
    /// When it must have said so.
    pub deadline: Instant,
}

/// How far a client has come.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// More is to come.
    Partial,
    /// It wants this port of the guest.
    Connect(u32),
    /// It hung up, or says something else.
    Refused,
}

impl Client {
    /// A client just accepted.
    pub fn new(socket: OwnedFd, deadline: Instant) -> Self {
        Self { socket, line: Vec::new(), deadline }
    }

    /// Its socket.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Gives its socket up.
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Reads on, up to the end of the line and not beyond: what follows is the guest's.
    pub fn read(&mut self) -> Line {
        let mut bytes = [0; MAX_LINE];
        loop {
            let room = &mut bytes[..MAX_LINE - self.line.len()];
            let peek = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            let seen = match rustix::net::recv(&self.socket, &mut *room, peek) {
                Ok((_, 0)) => return Line::Refused,
                Ok((_, count)) => count.min(room.len()),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Line::Partial,
                Err(_) => return Line::Refused,
            };
            let end = room[..seen].iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(seen, |end| end + 1);
            // What was seen is there, so this takes all of it at once.
            if rustix::net::recv(&self.socket, &mut room[..taken], RecvFlags::DONTWAIT) != Ok((taken, taken)) {
                return Line::Refused;
            }
            self.line.extend_from_slice(&room[..taken]);
            if end.is_some() {
                return parse(&self.line).map_or(Line::Refused, Line::Connect);
            }
            if self.line.len() == MAX_LINE {
                return Line::Refused;
            }
        }
    }
}

/// The port of `CONNECT <port>\n`.
fn parse(line: &[u8]) -> Option<u32> {
    let line = line.strip_suffix(b"\n")?;
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let digits = line.strip_prefix(b"CONNECT ")?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Tells a client that the guest has accepted. The socket is empty in this direction, so a short write means that the client
/// is gone, or has made its buffer smaller than a line.
pub fn accept(socket: impl AsFd, local_port: u32) -> Result<(), Errno> {
    let line = format!("OK {local_port}\n");
    match rustix::net::send(socket, line.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
        Ok(count) if count == line.len() => Ok(()),
        Ok(_) => Err(Errno::NOBUFS),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    fn client() -> (UnixStream, Client) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours, Client::new(theirs.into(), Instant::now() + Duration::from_secs(1)))
    }

    #[test]
    fn a_line_names_a_port_in_decimal() {
        for (line, port) in [
            ("CONNECT 1024\n", Some(1024)),
            ("CONNECT 1024\r\n", Some(1024)),
            ("CONNECT 0\n", Some(0)),
            ("CONNECT 4294967295\n", Some(u32::MAX)),
            ("CONNECT 4294967296\n", None),
            ("CONNECT \n", None),
            ("CONNECT +1\n", None),
            ("CONNECT -1\n", None),
            ("CONNECT 1 \n", None),
            ("CONNECT  1\n", None),
            ("connect 1\n", None),
            ("CONNECT 0x10\n", None),
            ("CONNECT 1", None),
            ("\n", None),
            ("", None),
        ] {
            assert_eq!(parse(line.as_bytes()), port, "{line:?}");
        }
    }

    #[test]
    fn a_line_that_comes_byte_by_byte_is_kept_and_what_follows_stays_in_the_socket() {
        let (mut ours, mut client) = client();
        for byte in b"CONNECT 77" {
            assert_eq!(client.read(), Line::Partial);
            ours.write_all(&[*byte]).unwrap();
        }
        ours.write_all(b"\nhello\n").unwrap();
        assert_eq!(client.read(), Line::Connect(77));
        let mut rest = [0; 6];
        UnixStream::from(client.into_socket()).read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello\n");
    }

    #[test]
    fn a_client_that_hangs_up_or_never_ends_its_line_is_refused() {
        let (ours, mut one) = client();
        drop(ours);
        assert_eq!(one.read(), Line::Refused);

        let (mut ours, mut two) = client();
        ours.write_all(&[b'x'; MAX_LINE - 1]).unwrap();
        assert_eq!(two.read(), Line::Partial);
        ours.write_all(b"x").unwrap();
        assert_eq!(two.read(), Line::Refused);
    }

    #[test]
    fn an_accepted_client_reads_the_port_of_the_host() {
        let (mut ours, client) = client();
        accept(client.socket(), 1 << 30).unwrap();
        drop(client);
        let mut line = String::new();
        ours.read_to_string(&mut line).unwrap();
        assert_eq!(line, "OK 1073741824\n");
    }
}
