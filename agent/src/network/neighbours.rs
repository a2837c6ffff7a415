//! Permanent entries of the neighbour tables.

use super::NetworkError;
use super::addresses::{bytes, family, get};
use super::description::{LOOPBACK, Neighbour, Network};
use super::links::Placed;
use super::netlink::{Message, NetlinkError, REPLACE, Received, Socket};

/// Attributes of a neighbour (`linux/neighbour.h`).
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;

/// `NUD_NOARP`.
const NOARP: u16 = 0x40;

/// A neighbour as a message (`struct ndmsg`).
fn message(interface: u32, neighbour: &Neighbour) -> Message {
    let mut fixed = vec![family(neighbour.ip), 0, 0, 0];
    fixed.extend(interface.to_ne_bytes());
    fixed.extend(neighbour.state.to_ne_bytes());
    fixed.extend([neighbour.flags, 0]);
    let message = Message::new(fixed).with(NDA_DST, bytes(neighbour.ip));
    match neighbour.link_address.is_empty() {
        true => message,
        false => message.with(NDA_LLADDR, neighbour.link_address.clone()),
    }
}

fn read(received: &Received<'_>) -> Result<Option<(u32, Neighbour)>, NetlinkError> {
    let (fixed, attributes) = received.split::<12>()?;
    let [_, _, _, _, a, b, c, d, low, high, flags, _] = *fixed;
    let state = u16::from_ne_bytes([low, high]);
    let Some(ip) = get(attributes, NDA_DST) else { return Ok(None) };
    if received.kind != libc::RTM_NEWNEIGH || !Neighbour::lasts(state) {
        return Ok(None);
    }
    let link_address = attributes.get(NDA_LLADDR).unwrap_or_default().into();
    Ok(Some((u32::from_ne_bytes([a, b, c, d]), Neighbour { ip, link_address, state, flags })))
}

/// Removes entries that are not described, and adds those that are missing.
pub fn apply(socket: &Socket, network: &Network, placed: &[Placed<'_>]) -> Result<(), NetworkError> {
    let mut present = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut fixed = vec![0; 12];
        fixed[0] = family as u8;
        let found = socket.dump(libc::RTM_GETNEIGH, &Message::new(fixed), read);
        present.extend(found.map_err(NetworkError::step("list neighbours"))?);
    }
    for placed in placed.iter().filter(|placed| placed.interface.name != LOOPBACK) {
        let index = placed.link.index;
        let wanted = || network.neighbours.iter().filter(|(name, _)| *name == placed.interface.name);
        for (_, old) in present.iter().filter(|(at, _)| *at == index) {
            let kernels = old.state == NOARP && (placed.interface.no_arp || is_group(old));
            if !kernels && !wanted().any(|(_, neighbour)| neighbour.ip == old.ip) {
                let failed = NetworkError::neighbour(placed, old.ip, "remove it");
                match socket.request(libc::RTM_DELNEIGH, 0, &message(index, old)) {
                    Err(error) if error.errno() == Some(rustix::io::Errno::NOENT) => {}
                    other => other.map_err(failed)?,
                }
            }
        }
        for (_, neighbour) in wanted().filter(|(_, neighbour)| !present.contains(&(index, neighbour.clone()))) {
            socket
                .request(libc::RTM_NEWNEIGH, REPLACE, &message(index, neighbour))
                .map_err(NetworkError::neighbour(placed, neighbour.ip, "add it"))?;
        }
    }
    Ok(())
}

/// Whether an entry is for several stations: the kernel keeps these here too.
fn is_group(neighbour: &Neighbour) -> bool {
    neighbour.ip.is_multicast() || neighbour.link_address.first().is_some_and(|byte| byte & 1 != 0)
}
