//! Requests to the kernel's network configuration (`rtnetlink(7)`): a header of fixed layout, and attributes.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Instant;

use netlink_packet_core::{DefaultNla, Emitable, NetlinkBuffer, NetlinkHeader, NlasIterator};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

/// What one answer may hold: the kernel fills at most 32 KiB.
const BUFFER: usize = 64 * 1024;

/// How often a list is asked for that changes while it is read.
const DUMPS: u32 = 10;

/// Flags of messages (`linux/netlink.h`).
const NLM_F_REQUEST: u16 = libc::NLM_F_REQUEST as u16;
pub const NLM_F_ACK: u16 = libc::NLM_F_ACK as u16;
const NLM_F_DUMP: u16 = libc::NLM_F_DUMP as u16;
const NLM_F_DUMP_INTR: u16 = libc::NLM_F_DUMP_INTR as u16;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
/// For a request that makes something new, and one that replaces what is there.
pub const CREATE: u16 = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
pub const REPLACE: u16 = (libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16;
/// One more of what there may be several of.
pub const APPEND: u16 = (libc::NLM_F_CREATE | libc::NLM_F_APPEND) as u16;

/// The attribute of a refusal that holds the reason (`NLMSGERR_ATTR_MSG`).
const REASON: u16 = 1;

/// What the kernel answered, or why it did not.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// A system call failed.
    #[error("netlink: {0}")]
    Io(#[from] Errno),
    /// The kernel refused, and may have said why.
    #[error("{errno}{}", .reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default())]
    Refused { errno: Errno, reason: Option<String> },
    /// Not a message as it should be.
    #[error("netlink: an answer that cannot be read")]
    Malformed,
    /// Others change it too fast.
    #[error("netlink: the list changed each of {DUMPS} times that it was read")]
    Unsteady,
}

impl NetlinkError {
    /// The number of the refusal.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

/// A message without its header: the structure of its kind, and attributes.
#[derive(Debug, Default)]
pub struct Message {
    pub fixed: Vec<u8>,
    attributes: Vec<DefaultNla>,
}

impl Message {
    pub fn new(fixed: Vec<u8>) -> Self {
        Self { fixed, attributes: Vec::new() }
    }

    /// Adds an attribute.
    pub fn with(mut self, kind: u16, value: impl Into<Vec<u8>>) -> Self {
        self.attributes.push(DefaultNla::new(kind, value.into()));
        self
    }

    /// Adds an attribute of 32 bits.
    pub fn with_number(self, kind: u16, value: u32) -> Self {
        self.with(kind, value.to_ne_bytes())
    }

    /// Adds an attribute if there is one.
    pub fn with_some(self, kind: u16, value: Option<impl Into<Vec<u8>>>) -> Self {
        match value {
            Some(value) => self.with(kind, value),
            None => self,
        }
    }

    /// The bytes of attributes, to be one of another message.
    pub fn nested(self) -> Vec<u8> {
        self.bytes()
    }

    fn bytes(&self) -> Vec<u8> {
        let attributes = self.attributes.as_slice();
        let mut bytes = self.fixed.clone();
        // Each structure is aligned to the four bytes that attributes are.
        bytes.resize(self.fixed.len() + attributes.buffer_len(), 0);
        attributes.emit(&mut bytes[self.fixed.len()..]);
        bytes
    }
}

/// A message that was received.
pub struct Received<'a> {
    /// `RTM_*`.
    pub kind: u16,
    payload: &'a [u8],
}

impl<'a> Received<'a> {
    /// The structure of `N` bytes, and what follows it.
    pub fn split<const N: usize>(&self) -> Result<(&'a [u8; N], Attributes<'a>), NetlinkError> {
        let (fixed, rest) = self.payload.split_first_chunk().ok_or(NetlinkError::Malformed)?;
        Ok((fixed, Attributes(rest)))
    }
}

/// The attributes of a message.
#[derive(Clone, Copy)]
pub struct Attributes<'a>(pub &'a [u8]);

impl<'a> Attributes<'a> {
    /// All of them: kind and bytes.
    pub fn all(self) -> impl Iterator<Item = (u16, &'a [u8])> {
        NlasIterator::new(self.0).map_while(Result::ok).map(|attribute| {
            // The iterator gives out pieces of our bytes, which outlive it.
            let length = attribute.value_length();
            (attribute.kind(), &attribute.into_inner()[4..4 + length])
        })
    }

    pub fn get(self, kind: u16) -> Option<&'a [u8]> {
        self.all().find(|(found, _)| *found == kind).map(|(_, value)| value)
    }

    pub fn number(self, kind: u16) -> Option<u32> {
        self.get(kind)?.try_into().ok().map(u32::from_ne_bytes)
    }

    /// A name that ends in a zero.
    pub fn text(self, kind: u16) -> Option<&'a str> {
        let bytes = self.get(kind)?;
        std::str::from_utf8(bytes.strip_suffix(b"\0").unwrap_or(bytes)).ok()
    }
}

/// What it stands for in the kernel ends with it.
impl From<Socket> for OwnedFd {
    fn from(socket: Socket) -> Self {
        socket.fd
    }
}

/// A socket in the network namespace of the thread that opened it.
pub struct Socket {
    fd: OwnedFd,
    sequence: Cell<u32>,
}

impl Socket {
    pub fn open() -> Result<Self, NetlinkError> {
        Self::open_with(0)
    }

    /// One that also hears of changes to interfaces (`RTMGRP_LINK`).
    pub fn of_link_events() -> Result<Self, NetlinkError> {
        Self::open_with(1)
    }

    /// One that speaks with nftables.
    pub fn of_netfilter() -> Result<Self, NetlinkError> {
        Self::open_as(Some(rustix::net::netlink::NETFILTER), 0)
    }

    fn open_with(groups: u32) -> Result<Self, NetlinkError> {
        // The first protocol, `NETLINK_ROUTE`.
        Self::open_as(None, groups)
    }

    fn open_as(protocol: Option<Protocol>, groups: u32) -> Result<Self, NetlinkError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
        // Refusals with their reasons, and without our own request.
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            let on: libc::c_int = 1;
            let size = size_of_val(&on) as libc::socklen_t;
            // SAFETY: the kernel reads a number. Without these there are only fewer words in an error.
            unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_NETLINK, option, (&raw const on).cast(), size) };
        }
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, groups))?;
        Ok(Self { fd, sequence: Cell::new(0) })
    }

    /// Has the kernel do something.
    pub fn request(&self, kind: u16, flags: u16, message: &Message) -> Result<(), NetlinkError> {
        let sequence = self.send(kind, flags | NLM_F_ACK, message)?;
        let mut buffer = vec![0; BUFFER];
        loop {
            // The kernel answers while the request is sent.
            let answer = self.receive(&mut buffer)?.ok_or(NetlinkError::Malformed)?;
            for (header, payload) in messages(answer) {
                if header.sequence_number == sequence && i32::from(header.message_type) == libc::NLMSG_ERROR {
                    return outcome(header, payload);
                }
            }
        }
    }

    /// Has the kernel do several things, of which it acknowledges those that are asked to be: all of them or none, if the first
    /// and the last say so (`NFNL_MSG_BATCH_BEGIN`).
    pub fn batch(&self, all: &[(u16, u16, Message)]) -> Result<(), NetlinkError> {
        let mut packet = Vec::new();
        for (kind, flags, message) in all {
            packet.extend(self.packet(*kind, *flags, message).1);
            packet.resize(packet.len().next_multiple_of(4), 0);
        }
        rustix::net::sendto(&self.fd, &packet, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        let mut pending = all.iter().filter(|(_, flags, _)| flags & NLM_F_ACK != 0).count();
        let (mut buffer, mut result) = (vec![0; BUFFER], Ok(()));
        while pending > 0 {
            let Some(answer) = self.receive(&mut buffer)? else {
                // One refusal for all of them: none of the others was looked at.
                return result.and(Err(NetlinkError::Malformed));
            };
            for (header, payload) in messages(answer) {
                if i32::from(header.message_type) == libc::NLMSG_ERROR {
                    result = result.and(outcome(header, payload));
                    pending = pending.saturating_sub(1);
                }
            }
        }
        result
    }

    /// All that there is of a kind; a message that `read` makes nothing of is left out.
    pub fn dump<T>(
        &self,
        kind: u16,
        message: &Message,
        mut read: impl FnMut(&Received<'_>) -> Result<Option<T>, NetlinkError>,
    ) -> Result<Vec<T>, NetlinkError> {
        let mut buffer = vec![0; BUFFER];
        'again: for _ in 0..DUMPS {
            let sequence = self.send(kind, NLM_F_DUMP, message)?;
            let mut found = Vec::new();
            let mut steady = true;
            loop {
                let answer = self.receive(&mut buffer)?.ok_or(NetlinkError::Malformed)?;
                for (header, payload) in messages(answer) {
                    if header.sequence_number != sequence {
                        continue;
                    }
                    steady &= header.flags & NLM_F_DUMP_INTR == 0;
                    match i32::from(header.message_type) {
                        libc::NLMSG_DONE if steady => return Ok(found),
                        libc::NLMSG_DONE => continue 'again,
                        libc::NLMSG_ERROR => outcome(header, payload)?,
                        _ => found.extend(read(&Received { kind: header.message_type, payload })?),
                    }
                }
            }
        }
        Err(NetlinkError::Unsteady)
    }

    /// Waits until there was an event of the group; false if none came in time. What they say does not matter, nor whether
    /// some got lost: who waits looks for himself.
    pub fn wait(&self, deadline: Instant) -> Result<bool, NetlinkError> {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        if rustix::io::retry_on_intr(|| poll(&mut fds, Some(&timeout)))? == 0 {
            return Ok(false);
        }
        let mut buffer = vec![0; BUFFER];
        loop {
            match rustix::net::recv(&self.fd, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(true),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn send(&self, kind: u16, flags: u16, message: &Message) -> Result<u32, NetlinkError> {
        let (sequence, packet) = self.packet(kind, flags, message);
        rustix::net::sendto(&self.fd, &packet, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        Ok(sequence)
    }

    fn packet(&self, kind: u16, flags: u16, message: &Message) -> (u32, Vec<u8>) {
        let sequence = self.sequence.get().wrapping_add(1);
        self.sequence.set(sequence);
        let body = message.bytes();
        let mut header = NetlinkHeader::default();
        let begin = header.buffer_len();
        header.length = (begin + body.len()) as u32;
        header.message_type = kind;
        header.flags = flags | NLM_F_REQUEST;
        header.sequence_number = sequence;
        let mut packet = vec![0; begin];
        header.emit(&mut packet);
        packet.extend(body);
        (sequence, packet)
    }

    /// The next packet of the kernel; none if there is none now.
    fn receive<'a>(&self, buffer: &'a mut [u8]) -> Result<Option<&'a [u8]>, NetlinkError> {
        loop {
            let (length, from) = match rustix::net::recvfrom(self.fd.as_fd(), &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((length, _, from)) => (length, from),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            };
            // Programs may send to each other too.
            let kernel =
                from.and_then(|from| SocketAddrNetlink::try_from(from).ok()).is_some_and(|from| from.pid() == 0);
            if kernel {
                return Ok(Some(&buffer[..length]));
            }
        }
    }
}

/// The messages of a packet.
fn messages(mut packet: &[u8]) -> impl Iterator<Item = (NetlinkHeader, &[u8])> {
    std::iter::from_fn(move || {
        let buffer = NetlinkBuffer::new_checked(packet).ok()?;
        let mut header = NetlinkHeader::default();
        header.length = buffer.length();
        header.message_type = buffer.message_type();
        header.flags = buffer.flags();
        header.sequence_number = buffer.sequence_number();
        let length = header.length as usize;
        let payload = packet.get(header.buffer_len()..length)?;
        packet = packet.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((header, payload))
    })
}

/// What the message of an error says: none, or which and why.
fn outcome(header: NetlinkHeader, payload: &[u8]) -> Result<(), NetlinkError> {
    let (number, rest) = payload.split_first_chunk().ok_or(NetlinkError::Malformed)?;
    let number = i32::from_ne_bytes(*number);
    if number == 0 {
        return Ok(());
    }
    let errno =
        Errno::from_io_error(&io::Error::from_raw_os_error(number.wrapping_neg())).ok_or(NetlinkError::Malformed)?;
    // Our own request comes first: its header alone, or all of it.
    let request = match NetlinkBuffer::new_checked(rest) {
        _ if header.flags & NLM_F_CAPPED != 0 => 16,
        Ok(request) => (request.length() as usize).next_multiple_of(4),
        Err(_) => rest.len(),
    };
    let reason = match rest.get(request..) {
        Some(attributes) if header.flags & NLM_F_ACK_TLVS != 0 => Attributes(attributes).text(REASON),
        _ => None,
    };
    Err(NetlinkError::Refused { errno, reason: reason.map(str::to_owned) })
}
