//! Connections that programs of the host make to a pod's own addresses. Each travels on a stream of its own: the host says first
//! where it is to go, and the agent answers with [`CONNECTED`] once it has got there, or closes the stream.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Bytes of a destination: the version of IP, 16 for the address, and the port in little-endian order.
pub const DESTINATION_BYTES: usize = 19;

/// What the agent answers.
pub const CONNECTED: u8 = 1;

/// A destination as it is on the stream.
pub fn to_bytes(destination: SocketAddr) -> [u8; DESTINATION_BYTES] {
    let mut bytes = [0; DESTINATION_BYTES];
    match destination.ip() {
        IpAddr::V4(ip) => {
            bytes[0] = 4;
            bytes[1..5].copy_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            bytes[0] = 6;
            bytes[1..17].copy_from_slice(&ip.octets());
        }
    }
    bytes[17..].copy_from_slice(&destination.port().to_le_bytes());
    bytes
}

/// Takes it from there; none if it is of another version.
pub fn from_bytes(bytes: [u8; DESTINATION_BYTES]) -> Option<SocketAddr> {
    let [version, address @ .., low, high] = bytes;
    let [a, b, c, d, ..] = address;
    let ip = match version {
        4 => Ipv4Addr::new(a, b, c, d).into(),
        6 => Ipv6Addr::from(address).into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_le_bytes([low, high])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_is_what_it_was() {
        for destination in ["127.0.0.1:8080", "[::1]:1", "10.1.2.3:65535", "[fd00::1234]:258"] {
            let destination: SocketAddr = destination.parse().unwrap();
            assert_eq!(from_bytes(to_bytes(destination)), Some(destination));
        }
        assert_eq!(to_bytes("1.2.3.4:258".parse().unwrap())[..5], [4, 1, 2, 3, 4]);
        assert_eq!(from_bytes([5; DESTINATION_BYTES]), None);
    }
}
