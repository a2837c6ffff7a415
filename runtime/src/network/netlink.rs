//! Netlink, as much of it as is needed here: requests that are acknowledged, and dumps.
//!
//! The kernel works on a request while it is sent and has the answer ready when that returns, so nothing here ever waits.
//! What comes back is looked at attribute by attribute: one that a newer kernel adds, or means otherwise, is nobody's trouble.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send};

/// The request is for the kernel; it acknowledges it.
const REQUEST_ACK: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;

/// All there is of a kind.
const REQUEST_DUMP: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;

/// Bytes of a message's header: length, type, flags, sequence number, port.
const HEADER: usize = 16;

/// Bytes of an attribute's header: length, type.
const ATTRIBUTE: usize = 4;

/// The kernel fills as much as it is offered in a dump, up to 32 KiB.
const BUFFER: usize = 32 * 1024;

/// How often a dump is taken again because something changed under it.
const ATTEMPTS: usize = 16;

/// A netlink socket. It belongs to the network namespace it was opened in.
pub struct Netlink(OwnedFd);

impl Netlink {
    /// Opens a socket; `None` is rtnetlink.
    pub fn open(protocol: Option<Protocol>) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        Ok(Self(rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?))
    }

    /// Sends requests that belong together. Returns the first error among what becomes of each; all answers are taken.
    pub fn request(&self, messages: &Messages) -> io::Result<()> {
        self.send(messages)?;
        let (mut pending, mut result) = (messages.acknowledged, Ok(()));
        while pending > 0 {
            let received = match self.receive() {
                // One that stands for all of them: none of the others was looked at.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return result.and(Err(error)),
                received => received?,
            };
            for (_, _, body) in split(&received).filter(|(kind, ..)| i32::from(*kind) == libc::NLMSG_ERROR) {
                result = result.and(check(body));
                pending = pending.saturating_sub(1);
            }
        }
        result
    }

    /// Calls `each` with the body of each message of a dump; what it found before is to be forgotten when it is called with
    /// `None`, as it is at the beginning.
    pub fn dump(&self, kind: u16, body: &[u8], mut each: impl FnMut(Option<&[u8]>)) -> io::Result<()> {
        'again: for _ in 0..ATTEMPTS {
            let mut request = Messages::new();
            request.message(kind, REQUEST_DUMP, body);
            self.send(&request)?;
            each(None);
            let mut changed = false;
            loop {
                let received = self.receive()?;
                for (kind, flags, body) in split(&received) {
                    changed |= flags & libc::NLM_F_DUMP_INTR as u16 != 0;
                    match i32::from(kind) {
                        libc::NLMSG_ERROR => check(body)?,
                        libc::NLMSG_DONE if changed => continue 'again,
                        libc::NLMSG_DONE => return Ok(()),
                        _ => each(Some(body)),
                    }
                }
            }
        }
        Err(Errno::INTR.into())
    }

    fn send(&self, messages: &Messages) -> io::Result<()> {
        rustix::io::retry_on_intr(|| send(&self.0, &messages.bytes, SendFlags::empty()))?;
        Ok(())
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; BUFFER];
        let (length, whole) = rustix::io::retry_on_intr(|| recv(&self.0, &mut buffer[..], RecvFlags::TRUNC))?;
        if whole > length {
            return Err(Errno::MSGSIZE.into());
        }
        buffer.truncate(length);
        Ok(buffer)
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Netlink> for OwnedFd {
    fn from(netlink: Netlink) -> Self {
        netlink.0
    }
}

/// What an error message says; 0 is the acknowledgement.
fn check(body: &[u8]) -> io::Result<()> {
    match number(body).map(u32::cast_signed) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        None => Err(Errno::BADMSG.into()),
    }
}

/// Messages in the making, to be sent at once.
pub struct Messages {
    bytes: Vec<u8>,
    acknowledged: usize,
}

impl Messages {
    /// None yet.
    pub fn new() -> Self {
        Self { bytes: Vec::new(), acknowledged: 0 }
    }

    /// Appends a request that is acknowledged; `flags` beside that, `body` without attributes.
    pub fn request(&mut self, kind: u16, flags: i32, body: &[u8]) -> Attributes<'_> {
        self.acknowledged += 1;
        self.message(kind, REQUEST_ACK | flags as u16, body)
    }

    /// Appends a message; its attributes are added to what this returns.
    pub fn message(&mut self, kind: u16, flags: u16, body: &[u8]) -> Attributes<'_> {
        let start = self.bytes.len();
        self.bytes.extend(0u32.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend([0; 8]);
        self.bytes.extend(body);
        Attributes { bytes: &mut self.bytes, start, length: 4 }
    }
}

/// Attributes in the making, of a message or of another attribute. The length in front of them is written when they are
/// dropped.
pub struct Attributes<'a> {
    bytes: &'a mut Vec<u8>,
    start: usize,
    /// Bytes of the length.
    length: usize,
}

impl Attributes<'_> {
    /// Appends one.
    pub fn put(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.begin(kind).bytes.extend(value);
        self
    }

    /// Appends one that is a text.
    pub fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        self.put(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// Appends what stands before attributes.
    #[cfg(test)]
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend(bytes);
        self
    }

    /// Appends one that is made of others.
    pub fn nest(&mut self, kind: u16) -> Attributes<'_> {
        self.begin(kind | libc::NLA_F_NESTED as u16)
    }

    fn begin(&mut self, kind: u16) -> Attributes<'_> {
        let start = self.bytes.len();
        self.bytes.extend([0; 2]);
        self.bytes.extend(kind.to_ne_bytes());
        Attributes { bytes: self.bytes, start, length: 2 }
    }
}

impl Drop for Attributes<'_> {
    fn drop(&mut self) {
        let length = self.bytes.len() - self.start;
        // Ours are short: names and numbers.
        debug_assert!(length <= usize::from(u16::MAX));
        self.bytes[self.start..self.start + self.length].copy_from_slice(&(length as u32).to_ne_bytes()[..self.length]);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// Type, flags and body of each message in what was received.
fn split(mut bytes: &[u8]) -> impl Iterator<Item = (u16, u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = number(bytes)? as usize;
        let (message, kind, flags) = (bytes.get(HEADER..length)?, half(bytes, 4)?, half(bytes, 6)?);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, flags, message))
    })
}

/// Type and value of each attribute that follows the `header` bytes of a message's body.
pub fn attributes(body: &[u8], header: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut bytes = body.get(header..).unwrap_or_default();
    std::iter::from_fn(move || {
        let length = usize::from(half(bytes, 0)?);
        // The two highest bits of the type are flags.
        let (kind, value) = (half(bytes, 2)? & 0x3fff, bytes.get(ATTRIBUTE..length)?);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// The number at the beginning of some bytes.
pub fn number(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

/// The text of an attribute, without the zero byte at its end.
pub fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_taken_apart_as_they_were_put_together() {
        let mut messages = Messages::new();
        let mut first = messages.request(20, 0, &[1, 2, 3, 4]);
        first.put(1, &[9]).text(2, "name");
        first.nest(3).put(4, &7u32.to_ne_bytes());
        drop(first);
        messages.message(21, 0, &[]);
        let found: Vec<_> = split(&messages.bytes).collect();
        assert_eq!(found.len(), 2);
        let (kind, flags, body) = found[0];
        assert_eq!((kind, flags), (20, REQUEST_ACK));
        let attributes: Vec<_> = attributes(body, 4).collect();
        assert_eq!(attributes[0], (1, &[9][..]));
        assert_eq!((attributes[1].0, text(attributes[1].1)), (2, "name".to_owned()));
        let inner: Vec<_> = super::attributes(attributes[2].1, 0).collect();
        assert_eq!((inner[0].0, number(inner[0].1)), (4, Some(7)));
        assert_eq!((found[1].0, found[1].2.len()), (21, 0));
    }

    #[test]
    fn bytes_that_are_no_message_end_the_search() {
        for bytes in [&[][..], &[0; 3], &[0; 16], &[255; 20], &[15, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]] {
            assert_eq!(split(bytes).count(), 0, "{bytes:?}");
        }
        for bytes in [&[][..], &[0; 3], &[3, 0, 0, 0], &[9, 0, 0, 0, 1]] {
            assert_eq!(attributes(bytes, 0).count(), 0, "{bytes:?}");
        }
        assert_eq!(attributes(&[1], 4).count(), 0);
    }
}
