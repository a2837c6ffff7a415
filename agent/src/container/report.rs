//! What a container's init tells the agent, and who is to blame for a failure.

/// Who is to blame; decides the code of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ErrorKind {
    /// The specification.
    Invalid = b'I',
    /// A program that is not there.
    NotFound = b'N',
    /// A program that may not be executed.
    PermissionDenied = b'P',
    /// The guest.
    Internal = b'X',
}

/// A packet from the init.
#[derive(Debug, PartialEq, Eq)]
pub enum Report {
    /// Only the program is missing. Carries the terminal's descriptor, if there is one.
    Created,
    Failed {
        kind: ErrorKind,
        message: String,
    },
}

impl Report {
    /// Longest packet.
    pub const MAX: usize = 8192;

    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Created => vec![b'C'],
            Self::Failed { kind, message } => {
                let mut packet = vec![b'F', *kind as u8];
                packet.extend(message.bytes().take(Self::MAX - 2));
                packet
            }
        }
    }

    pub fn decode(packet: &[u8]) -> Option<Self> {
        match packet {
            [b'C'] => Some(Self::Created),
            [b'F', kind, message @ ..] => {
                let kind = match kind {
                    b'I' => ErrorKind::Invalid,
                    b'N' => ErrorKind::NotFound,
                    b'P' => ErrorKind::PermissionDenied,
                    _ => ErrorKind::Internal,
                };
                Some(Self::Failed { kind, message: String::from_utf8_lossy(message).into_owned() })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_survives_its_way() {
        for kind in [ErrorKind::Invalid, ErrorKind::NotFound, ErrorKind::PermissionDenied, ErrorKind::Internal] {
            let report = Report::Failed { kind, message: "why: é".into() };
            assert_eq!(Report::decode(&report.encode()), Some(report));
        }
        assert_eq!(Report::decode(&Report::Created.encode()), Some(Report::Created));
        assert_eq!(Report::decode(b""), None);
        assert_eq!(Report::decode(b"?"), None);
    }
}
