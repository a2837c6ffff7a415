//! Tap devices: what one end of the machine's network is on the host.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use podhull_vmm::control::TAP_HEADER;

use super::netlink::{Messages, Netlink};

/// Where taps come from.
pub const CLONE: &str = "/dev/net/tun";

/// What all names of ours begin with; the kernel finds a free number.
const NAME: &str = "podhull";

/// Longest MTU of a tap: a frame is at most 65535 bytes long, 14 of which are its header.
pub const MTU_MAX: u32 = 65535 - 14;

/// `IFLA_AF_SPEC`, and in it `IFLA_INET6_ADDR_GEN_MODE` (if_link.h).
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// A tap device. It is there as long as its descriptor is open.
pub struct Tap {
    /// Its queue.
    pub fd: OwnedFd,
    /// Its name.
    pub name: String,
    /// Its number.
    pub index: u32,
}

impl Tap {
    /// Makes one in the network namespace of this thread, and takes it up. It has no address, so that the namespace's own
    /// stack has nothing to say there.
    pub fn create(netlink: &Netlink, mtu: u32) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(Path::new(CLONE))?;
        let name = claim(&file)?;
        let header = libc::c_int::try_from(TAP_HEADER).unwrap_or(libc::c_int::MAX);
        // SAFETY: the call takes a pointer to an integer, which lives through it.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) })?;
        rustix::io::ioctl_fionbio(&file, true)?;
        let index = rustix::net::netdevice::name_to_index(netlink, &name)?;
        let mut messages = Messages::new();
        let mut attributes = messages.request(libc::RTM_NEWLINK, 0, &link(index, 0));
        attributes.put(libc::IFLA_MTU, &mtu.to_ne_bytes());
        attributes
            .nest(libc::IFLA_AF_SPEC)
            .nest(libc::AF_INET6 as u16)
            .put(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
        drop(attributes);
        // Not in one: flags come first there.
        messages.request(libc::RTM_NEWLINK, 0, &link(index, libc::IFF_UP as u32));
        netlink.request(&messages)?;
        Ok(Self { fd: file.into(), name, index })
    }
}

/// Whether a name is one of ours.
pub fn is_ours(name: &str) -> bool {
    name.strip_prefix(NAME).is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

/// `struct ifinfomsg` that sets `flags`.
pub fn link(index: u32, flags: u32) -> [u8; 16] {
    let mut link = [0; 16];
    link[4..8].copy_from_slice(&index.to_ne_bytes());
    link[8..12].copy_from_slice(&flags.to_ne_bytes());
    link[12..16].copy_from_slice(&flags.to_ne_bytes());
    link
}

/// Makes the device; returns its name.
fn claim(file: &File) -> io::Result<String> {
    // SAFETY: a structure of numbers and bytes, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(format!("{NAME}%d").bytes()) {
        *place = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the structure is what this call takes, and lives through it.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    let name = request.ifr_name.iter().map(|byte| byte.cast_unsigned()).take_while(|byte| *byte != 0).collect();
    String::from_utf8(name).map_err(io::Error::other)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_names_are_told_from_others() {
        assert!(is_ours("podhull0") && is_ours("podhull123"));
        for name in ["podhull", "podhull-1", "eth0", "apodhull0", "podhull0x"] {
            assert!(!is_ours(name), "{name}");
        }
    }
}
