//! Docker's resolver: it answers the names of a user-defined network inside the network namespace of each container, at an
//! address of the loopback interface. The machine is at the other side of the namespace's interfaces and cannot reach it, so
//! what the machine asks comes by way of the shadow. And what the resolver asks others on behalf of a container, it asks from
//! the namespace: those answers must not be taken for the machine's.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

/// Where it answers: Docker has no other.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

/// Ports from which it asks others, once [`keep_ports`] was called. Kernels take none of them for a program that does not choose
/// by itself (their own range ends at 60999), so that the machine's programs rarely ask from there too.
pub const PORTS: RangeInclusive<u16> = 61000..=61999;

/// UDP sockets of the namespace of this thread.
const SOCKETS: &str = "/proc/thread-self/net/udp";

/// Ports that sockets of the namespace of this thread get which do not choose.
const PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// Whether it answers in the namespace of this thread.
pub fn is_there() -> io::Result<bool> {
    Ok(has_socket(&fs::read_to_string(SOCKETS)?))
}

/// Has whoever asks from the namespace of this thread do so from [`PORTS`].
pub fn keep_ports() -> io::Result<()> {
    fs::write(PORT_RANGE, format!("{} {}", PORTS.start(), PORTS.end()))
}

/// The second field of a line is the socket's own address, as the processor has its four bytes, and its port.
fn has_socket(table: &str) -> bool {
    let address = format!("{:08X}:", u32::from_ne_bytes(RESOLVER.octets()));
    table.lines().filter_map(|line| line.split_whitespace().nth(1)).any(|own| own.starts_with(&address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_known_by_its_address() {
        let table =
            "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";
        let line =
            |own: &str| format!("{table}  321: {own} 00000000:0000 07 00000000:00000000 00:00000000 00000000 0 0 1\n");
        assert!(!has_socket(table));
        assert!(!has_socket(&line("0100007F:0035")));
        assert!(!has_socket(&line("00000000:0035")));
        assert!(has_socket(&line("0B00007F:A5E1")));
    }
}
