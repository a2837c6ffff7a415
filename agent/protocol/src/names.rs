//! Questions for names, and their answers, on the stream between an agent and its host: each is a message of DNS (RFC 1035)
//! behind a [`Header`]. Which answer belongs to which question is said by a number that the guest chooses; the host answers as
//! often as it can and as it was asked, in any order.

/// Bytes of a header.
pub const HEADER_BYTES: usize = 7;

/// What stands before a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Of the question.
    pub number: u32,
    /// Whether it was asked over TCP, where answers are whole: over UDP they may be cut.
    pub whole: bool,
    /// Bytes of the message.
    pub length: u16,
}

impl Header {
    /// As it is on the stream: number and length in little-endian order.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&self.number.to_le_bytes());
        bytes[4] = self.whole.into();
        bytes[5..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// Takes it from there. There are no bytes that are not a header.
    pub fn from_bytes(bytes: [u8; HEADER_BYTES]) -> Self {
        let [a, b, c, d, whole, low, high] = bytes;
        Self { number: u32::from_le_bytes([a, b, c, d]), whole: whole != 0, length: u16::from_le_bytes([low, high]) }
    }
}

/// A header and its message; none if that is longer than any of DNS.
pub fn frame(number: u32, whole: bool, message: &[u8]) -> Option<Vec<u8>> {
    let header = Header { number, whole, length: u16::try_from(message.len()).ok()? };
    Some([&header.to_bytes(), message].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_what_it_was() {
        let header = Header { number: 0x0102_0304, whole: true, length: 0x0506 };
        assert_eq!(header.to_bytes(), [4, 3, 2, 1, 1, 6, 5]);
        assert_eq!(Header::from_bytes(header.to_bytes()), header);
        assert_eq!(frame(1, false, b"ab"), Some(vec![1, 0, 0, 0, 0, 2, 0, b'a', b'b']));
        assert_eq!(frame(1, false, &[0; 0x1_0000]), None);
    }
}
