//! The header of a socket packet (5.10.6).

use crate::virtio::Buffers;

/// Bytes of a header.
pub const HEADER_LENGTH: usize = 44;

/// The CID of the host.
pub const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the only type that is offered.
pub const TYPE_STREAM: u16 = 1;

/// What a packet is for (5.10.6, `op`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Grants it.
    Response = 2,
    /// Refuses or ends it, at once.
    Reset = 3,
    /// The sender will no longer receive, or send; see [`Shutdown`].
    Shutdown = 4,
    /// Carries bytes of the stream.
    ReadWrite = 5,
    /// Carries only the credit that every header has.
    CreditUpdate = 6,
    /// Asks for a [`Op::CreditUpdate`].
    CreditRequest = 7,
}

impl Op {
    fn from_wire(value: u16) -> Option<Self> {
        Some(match value {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// What one side of a connection will no longer do: the flags of [`Op::Shutdown`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shutdown {
    /// It takes no more bytes.
    pub receive: bool,
    /// It sends no more bytes.
    pub send: bool,
}

impl Shutdown {
    /// Neither way.
    pub const BOTH: Self = Self { receive: true, send: true };

    /// From the flags of a header; unknown ones are ignored.
    pub fn from_flags(flags: u32) -> Self {
        Self { receive: flags & 1 != 0, send: flags & 2 != 0 }
    }

    /// As the flags of a header.
    pub fn flags(self) -> u32 {
        u32::from(self.receive) | u32::from(self.send) << 1
    }

    /// What either of them says.
    pub fn union(self, other: Self) -> Self {
        Self { receive: self.receive || other.receive, send: self.send || other.send }
    }
}

/// A header as it is on the wire, in the host's byte order. Nothing in it is checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// Who sent it.
    pub src_cid: u64,
    /// Who is to get it.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// Bytes of payload that follow.
    pub len: u32,
    /// Kind of socket.
    pub kind: u16,
    /// See [`Header::op`].
    pub op: u16,
    /// Depends on the operation.
    pub flags: u32,
    /// Bytes the sender is willing to hold for the connection.
    pub buf_alloc: u32,
    /// Bytes of the connection the sender has passed on, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Takes a header from the front of a packet; `None` if it is shorter. The bytes are copied out of guest memory once.
    pub fn read(packet: &mut Buffers) -> Option<Self> {
        let mut bytes = [0; HEADER_LENGTH];
        (packet.len() >= HEADER_LENGTH).then(|| {
            packet.read(&mut bytes);
            Self::from_bytes(&bytes)
        })
    }

    /// From the layout of 5.10.6: all little-endian, without padding.
    pub fn from_bytes(bytes: &[u8; HEADER_LENGTH]) -> Self {
        let mut rest = &bytes[..];
        let mut take = |count: usize| {
            let (field, after) = rest.split_at(count);
            rest = after;
            field.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        };
        Self {
            src_cid: take(8),
            dst_cid: take(8),
            src_port: take(4) as u32,
            dst_port: take(4) as u32,
            len: take(4) as u32,
            kind: take(2) as u16,
            op: take(2) as u16,
            flags: take(4) as u32,
            buf_alloc: take(4) as u32,
            fwd_cnt: take(4) as u32,
        }
    }

    /// The inverse of [`Header::from_bytes`].
    pub fn to_bytes(self) -> [u8; HEADER_LENGTH] {
        let mut bytes = [0; HEADER_LENGTH];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// What the packet is for; `None` if the specification does not know it.
    pub fn op(&self) -> Option<Op> {
        Op::from_wire(self.op)
    }

    /// The packet that refuses this one: a reset that comes from where this one was sent to.
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header {
        src_cid: 0x0807_0605_0403_0201,
        dst_cid: 0x100f_0e0d_0c0b_0a09,
        src_port: 0x1413_1211,
        dst_port: 0x1817_1615,
        len: 0x1c1b_1a19,
        kind: 0x1e1d,
        op: 0x201f,
        flags: 0x2423_2221,
        buf_alloc: 0x2827_2625,
        fwd_cnt: 0x2c2b_2a29,
    };

    #[test]
    fn a_header_is_44_bytes_little_endian_in_the_order_of_the_specification() {
        let bytes: [u8; HEADER_LENGTH] = std::array::from_fn(|i| i as u8 + 1);
        assert_eq!(Header::from_bytes(&bytes), HEADER);
        assert_eq!(HEADER.to_bytes(), bytes);
    }

    #[test]
    fn operations_have_the_numbers_of_the_specification() {
        let known = [
            (1, Op::Request),
            (2, Op::Response),
            (3, Op::Reset),
            (4, Op::Shutdown),
            (5, Op::ReadWrite),
            (6, Op::CreditUpdate),
            (7, Op::CreditRequest),
        ];
        for value in 0..=u16::MAX {
            let expected = known.iter().find(|(number, _)| *number == value).map(|(_, op)| *op);
            assert_eq!(Header { op: value, ..HEADER }.op(), expected, "{value}");
        }
        for (number, op) in known {
            assert_eq!(op as u16, number);
        }
    }

    #[test]
    fn shutdown_flags_are_receive_1_and_send_2_and_others_are_ignored() {
        for (flags, receive, send) in [(0, false, false), (1, true, false), (2, false, true), (3, true, true)] {
            let shutdown = Shutdown { receive, send };
            assert_eq!(Shutdown::from_flags(flags), shutdown);
            assert_eq!(Shutdown::from_flags(flags | 0xffff_fffc), shutdown);
            assert_eq!(shutdown.flags(), flags);
        }
    }

    #[test]
    fn a_reset_goes_back_the_way_the_packet_came_with_its_type() {
        let reset = HEADER.reset();
        assert_eq!((reset.src_cid, reset.src_port), (HEADER.dst_cid, HEADER.dst_port));
        assert_eq!((reset.dst_cid, reset.dst_port), (HEADER.src_cid, HEADER.src_port));
        assert_eq!((reset.kind, reset.op(), reset.len), (HEADER.kind, Some(Op::Reset), 0));
    }
}
