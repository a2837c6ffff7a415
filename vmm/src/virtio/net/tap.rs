//! A queue of a tap device (`tun(4)`): each read is a packet, and each write, with a `struct virtio_net_hdr_v1` before it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::fs::OFlags;

use super::{F_GUEST_CSUM, F_GUEST_ECN, F_GUEST_TSO4, F_GUEST_TSO6, NetError};
use crate::control::TAP_HEADER;

/// Asks for the interface's name and flags (`linux/if_tun.h`).
pub const TUNGETIFF: u64 = 0x8004_54d2;
/// Asks for the size of the header.
pub const TUNGETVNETHDRSZ: u64 = 0x8004_54d7;
/// Says what may be left to the reader.
pub const TUNSETOFFLOAD: u64 = 0x4004_54d0;

/// Flags of the interface: packets of Ethernet, with virtio's header. That they come without one of the tap's own
/// (`IFF_NO_PI`) the kernel does not tell: it answers with another flag of the same value.
const IFF_TAP: u16 = 0x0002;
const IFF_VNET_HDR: u16 = 0x4000;
const FLAGS: u16 = IFF_TAP | IFF_VNET_HDR;

/// What the reader takes: packets whose checksum is missing, TCP segments of more than the MTU, such with congestion marks.
const TUN_F_CSUM: libc::c_uint = 1;
const TUN_F_TSO4: libc::c_uint = 2;
const TUN_F_TSO6: libc::c_uint = 4;
const TUN_F_TSO_ECN: libc::c_uint = 8;

/// What a driver with these features takes. Segments without their checksums are nothing a driver could ask for
/// (5.1.3.1).
pub fn offloads(features: u64) -> libc::c_uint {
    if features & F_GUEST_CSUM == 0 {
        return 0;
    }
    let takes = |feature, offload| if features & feature != 0 { offload } else { 0 };
    let segments = takes(F_GUEST_TSO4, TUN_F_TSO4) | takes(F_GUEST_TSO6, TUN_F_TSO6);
    let marks = if segments != 0 { takes(F_GUEST_ECN, TUN_F_TSO_ECN) } else { 0 };
    TUN_F_CSUM | segments | marks
}

/// See the module.
pub struct Tap {
    fd: OwnedFd,
    /// It is a socket of a test.
    #[cfg(test)]
    imitation: bool,
}

impl Tap {
    /// Takes a queue, if it is what it should be.
    pub fn new(fd: OwnedFd) -> Result<Self, NetError> {
        let ask = |what| move |e: io::Error| NetError::Ask(what, e);
        // SAFETY: ifreq is plain numbers, for which zero is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes a whole ifreq.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF as libc::Ioctl, &raw mut request) })
            .map_err(ask("TUNGETIFF (is it a tap?)"))?;
        // SAFETY: the kernel has written the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags } as u16;
        if flags & FLAGS != FLAGS {
            return Err(NetError::Tap("its flags must be IFF_TAP and IFF_VNET_HDR"));
        }
        let mut header: libc::c_int = 0;
        // SAFETY: the kernel writes a number.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETVNETHDRSZ as libc::Ioctl, &raw mut header) })
            .map_err(ask("TUNGETVNETHDRSZ"))?;
        if header != TAP_HEADER as libc::c_int {
            return Err(NetError::Tap("its header must be 12 bytes long (TUNSETVNETHDRSZ)"));
        }
        let status = rustix::fs::fcntl_getfl(&fd).map_err(|e| NetError::Ask("F_GETFL", e.into()))?;
        if !status.contains(OFlags::NONBLOCK) {
            return Err(NetError::Tap("it must not block (O_NONBLOCK)"));
        }
        Ok(Self {
            fd,
            #[cfg(test)]
            imitation: false,
        })
    }

    /// A packet socket that stands for one.
    #[cfg(test)]
    pub fn imitated(fd: OwnedFd) -> Self {
        Self { fd, imitation: true }
    }

    /// Says what may be left to the reader ([`offloads`]).
    pub fn set_offloads(&self, offloads: libc::c_uint) -> io::Result<()> {
        #[cfg(test)]
        if self.imitation {
            return Ok(());
        }
        // SAFETY: the argument is a number.
        match check(unsafe {
            libc::ioctl(self.fd.as_raw_fd(), TUNSETOFFLOAD as libc::Ioctl, libc::c_ulong::from(offloads))
        }) {
            // The interface is gone, which its next event says.
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => Ok(()),
            other => other,
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
