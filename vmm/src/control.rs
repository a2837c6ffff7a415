//! The control channel: what the runtime and a machine's process say to each other.
//!
//! A `SOCK_SEQPACKET` socket pair; each message is one packet of JSON with the file descriptors it names attached
//! (`SCM_RIGHTS`), in the order in which it names them. The runtime sends [`Request`]s, and gets exactly one
//! [`Notice::Done`] or [`Notice::Failed`] for each, in order; the other notices come whenever their event does.
//!
//! The machine lives as long as the channel: when the last copy of the runtime's end is closed, the process ends, and
//! removes what it was told to ([`Resource::Remove`]).
//!
//! Others than who started the machine speak to it through its control socket ([`Resource::Control`]): the same requests
//! but [`Request::Start`] and [`Request::GiveUp`], and beside them [`Request::AwaitMemory`] and [`Request::Measure`], each with
//! its one answer, and no other notice. A connection that is closed ends nothing. Of [`MAX_CLIENTS`] connections the one that has been silent longest
//! makes room for a new one, one that waits for its answer only if all do, and a client that does not take its answers is
//! disconnected: who says nothing or does not listen holds up nobody.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longest message in bytes.
pub const MAX_MESSAGE: usize = 128 * 1024;

/// Most connections to a control socket at a time.
pub const MAX_CLIENTS: usize = 8;

/// Most file descriptors in one message (the kernel's own bound, `SCM_MAX_FD`, is 253).
pub const MAX_FDS: usize = 200;

/// What the runtime asks of a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Builds the machine and runs it. The first request, and only the first.
    Start(MachineConfig),
    /// Puts disks, taps and devices into the running machine, all of them or, if it fails, none. They appear on its PCI
    /// bus; the guest sees them after a rescan. Mounts and directories to remove are given at the start: by then the process
    /// has nothing left to mount with, or to reach other directories. Nor is it given its share later.
    Add {
        /// One for each attached file descriptor, in order.
        resources: Vec<Resource>,
        /// Devices that need no file descriptor.
        devices: Vec<Device>,
    },
    /// Creates vCPUs up to this many, the first included, or as many as the machine may have. The guest brings them online, and
    /// takes them offline, itself.
    SetCpus(u32),
    /// Sets how much memory the guest should have, in bytes; it plugs or unplugs at its own pace. Rounded up to the
    /// block size of the memory device; less than the memory the machine began with counts as that; at most its maximum. A
    /// machine without a memory device gets one, which the guest sees after a rescan.
    SetMemory(u64),
    /// Answered when the guest has, and its kernel counts, at least the memory last asked for ([`Request::SetMemory`]): at once
    /// if it has, or if there is no memory device. That may be never: who asks waits as long as it cares to, and what it asks
    /// meanwhile is answered after. Through a control socket only.
    AwaitMemory,
    /// Answered by [`Notice::Measured`]. Through a control socket only.
    Measure,
    /// Ends the machine, whose guest has not come up in time: the answer is [`End::Stuck`], with where the guest was. Not
    /// through a control socket.
    GiveUp,
}

/// A machine as it begins: what it is before any pod is in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Bytes of memory it boots with: a multiple of 2 MiB, at least 32 MiB.
    pub memory_bytes: u64,
    /// Bytes of memory it may grow to (virtio-mem); at least `memory_bytes`.
    pub memory_max_bytes: u64,
    /// CPUs it may have: 1..=64. It boots with one.
    pub cpus_max: u32,
    /// Appended to the kernel's command line; empty in ordinary use.
    pub extra_cmdline: String,
    /// What each attached file descriptor is, in order. `Kvm`, `Kernel`, `Image` and `Agent` must be there once.
    pub resources: Vec<Resource>,
    /// Devices the machine is given as soon as its agent is ready.
    pub devices: Vec<Device>,
}

/// What a file descriptor in a message is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Resource {
    /// `/dev/kvm`, read-write.
    Kvm,
    /// The guest kernel, an uncompressed ELF file, read-only.
    Kernel,
    /// The guest image, EROFS, read-only; its length a multiple of 2 MiB.
    Image,
    /// A stream socket that becomes the first connection to the agent's port as soon as the agent listens. What is
    /// written to its other end before waits there.
    Agent,
    /// A listening Unix stream socket for connections into the guest: a client writes `CONNECT <port>\n` and reads
    /// `OK <port>\n`, after which the stream is the guest's.
    VsockListener,
    /// A file that gets what the guest kernel prints. The machine has a console only if this is there.
    Console,
    /// A detached mount (`open_tree`), attached at this path below the root of the machine's share: relative, without
    /// `..`; missing directories (for a mounted directory) or the file (for a mounted file) are made. At the start only.
    Mount {
        /// Relative path below the share.
        path: String,
    },
    /// The same, shared by several users: attached at a name in the root of the share that begins with `@`, unless it is there
    /// already. At the start only.
    SharedMount {
        /// Name in the root of the share.
        name: String,
        /// Directory of the share of who uses it. It is detached with the last of them.
        user: String,
    },
    /// A raw image or block device that becomes a virtio-blk disk. Given at the start it appears when the agent is ready. A
    /// machine that has one with the same serial number keeps that and gets no other: two would not see what is written to
    /// the other; it is an error if that is read-only and this is not.
    Disk {
        /// Read-only: enforced by the device.
        read_only: bool,
        /// Serial number the guest reads, at most 20 bytes of ASCII.
        serial: String,
    },
    /// One queue of a tap device, which becomes a virtio-net device: opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, with a
    /// header of [`TAP_HEADER`] bytes (`TUNSETVNETHDRSZ`), and non-blocking. Given at the start it appears when the agent is
    /// ready.
    Tap {
        /// Address of the guest's interface: that of one station, not all zeros.
        mac: [u8; 6],
        /// Its MTU, which the guest cannot raise: at least [`MTU_MIN`].
        mtu: u16,
    },
    /// Anything; held open until the machine ends, and not used. What is to go with the machine, however it ends, is
    /// something that the kernel removes when this is closed.
    Hold,
    /// A listening Unix socket of type `SOCK_SEQPACKET`: the machine's control socket. At the start only.
    Control,
    /// A directory; the entry `name` in it, with all below it, is removed when the machine ends because its channel was
    /// closed. At the start only.
    Remove {
        /// One path component.
        name: String,
    },
}

/// A device without a file descriptor of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// virtio-fs with tag [`SHARE_TAG`], serving the machine's share. In [`MachineConfig::devices`] only.
    Share,
    /// virtio-mem, carrying the memory between `memory_bytes` and `memory_max_bytes`; none if they are equal.
    Memory,
    /// virtio-rng.
    Entropy,
    /// virtio-balloon with free page reporting.
    Balloon,
}

/// Tag of the virtio-fs device that serves the share.
pub const SHARE_TAG: &str = "share";

/// Bytes of the header that goes before each packet of a tap (`struct virtio_net_hdr_v1`).
pub const TAP_HEADER: usize = 12;

/// Smallest MTU of an interface: what IPv4 asks of every link (RFC 791).
pub const MTU_MIN: u16 = 68;

/// What a machine tells the runtime.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Notice {
    /// The oldest unanswered request was carried out.
    Done,
    /// The oldest unanswered request failed; one line.
    Failed(String),
    /// The agent listens on its ports and the devices of [`MachineConfig::devices`] are on the bus.
    AgentReady {
        /// KVM exits so far that came to user space, for `make bench`.
        exits: u64,
    },
    /// What [`Request::Measure`] asked for.
    Measured(Measured),
    /// The machine has ended; the process is about to exit.
    Ended(End),
}

/// A running machine in numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    /// vCPUs that there are; the guest may not use all of them.
    pub cpus: u32,
    /// Bytes of memory that the guest has been given, and has not given back.
    pub memory_bytes: u64,
    /// KVM exits to user space so far, of all vCPUs.
    pub exits: Exits,
    /// What the guest has asked of its share so far. None of a machine without one, or of a version that did not count.
    pub share: Option<Traffic>,
}

/// KVM exits that came to user space, by what they were for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exits {
    /// Reads of ports.
    pub port_reads: u64,
    /// Writes of ports.
    pub port_writes: u64,
    /// Reads of devices' memory.
    pub mmio_reads: u64,
    /// Writes of devices' memory, but for those that KVM hands to a device's thread itself.
    pub mmio_writes: u64,
    /// All others: a vCPU was called out of the guest, or could not go on.
    pub others: u64,
}

impl Exits {
    /// All of them.
    pub fn sum(&self) -> u64 {
        self.port_reads + self.port_writes + self.mmio_reads + self.mmio_writes + self.others
    }
}

/// Requests to the file server of a share, by what they were for, and the contents of files that went along.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Requests to read from a file.
    pub reads: u64,
    /// Requests to write to one.
    pub writes: u64,
    /// All others.
    pub others: u64,
    /// Bytes that were read from files.
    pub read_bytes: u64,
    /// Bytes that were written to files.
    pub written_bytes: u64,
}

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// The guest asked for a reset: its kernel panicked, or its agent died.
    Reset,
    /// The guest could not go on (triple fault, KVM internal error); one line.
    Crash(String),
    /// The guest broke the rules of a device it cannot run without; one line.
    Misbehaved(String),
    /// The machine monitor itself failed; one line.
    Failure(String),
    /// The runtime gave the machine up; what its CPUs were doing, one line.
    Stuck(String),
}

/// Why a message did not travel.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other side is gone.
    #[error("the control channel is closed")]
    Closed,
    /// A system call failed; `WOULDBLOCK` on a non-blocking socket.
    #[error("control channel: {0}")]
    Io(#[source] rustix::io::Errno),
    /// Not a message, or one that breaks a bound.
    #[error("control channel: malformed message: {0}")]
    Malformed(String),
}

/// Sends one message with its file descriptors.
pub fn send<T: Serialize>(socket: impl AsFd, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
    let json = serde_json::to_vec(message).map_err(|e| ChannelError::Malformed(e.to_string()))?;
    if json.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        return Err(ChannelError::Malformed(format!(
            "{} bytes with {} descriptors is too much",
            json.len(),
            fds.len()
        )));
    }
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(ChannelError::Malformed("too many descriptors".into()));
    }
    match sendmsg(socket, &[IoSlice::new(&json)], &mut ancillary, SendFlags::NOSIGNAL) {
        Ok(_) => Ok(()),
        Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => Err(ChannelError::Closed),
        Err(errno) => Err(ChannelError::Io(errno)),
    }
}

/// Receives one message with its file descriptors, which are close-on-exec.
pub fn receive<T: DeserializeOwned>(socket: impl AsFd) -> Result<(T, Vec<OwnedFd>), ChannelError> {
    let mut json = vec![0; MAX_MESSAGE];
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut reset = false;
    let received = loop {
        match recvmsg(&socket, &mut [IoSliceMut::new(&mut json)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received,
            Err(rustix::io::Errno::INTR) => {}
            // The other side left something of ours unread. Reported once, and before what it had sent itself.
            Err(rustix::io::Errno::CONNRESET) if !reset => reset = true,
            Err(rustix::io::Errno::CONNRESET) => return Err(ChannelError::Closed),
            Err(errno) => return Err(ChannelError::Io(errno)),
        }
    };
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Err(ChannelError::Closed);
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(ChannelError::Malformed("longer than a message may be".into()));
    }
    let message =
        serde_json::from_slice(&json[..received.bytes]).map_err(|e| ChannelError::Malformed(e.to_string()))?;
    Ok((message, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::io::Write;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn a_message_arrives_with_its_descriptors_in_order() {
        let (a, b) = pair();
        let (reader, writer) = std::io::pipe().unwrap();
        let request = Request::Add {
            resources: vec![
                Resource::Remove { name: "x".into() },
                Resource::Disk { read_only: true, serial: "d".into() },
            ],
            devices: vec![Device::Share],
        };
        send(&a, &request, &[reader.as_fd(), writer.as_fd()]).unwrap();
        let (received, mut fds): (Request, _) = receive(&b).unwrap();
        assert_eq!(format!("{received:?}"), format!("{request:?}"));
        assert_eq!(fds.len(), 2);
        std::fs::File::from(fds.remove(1)).write_all(b"!").unwrap();
        let mut byte = [0];
        std::io::Read::read_exact(&mut std::fs::File::from(fds.remove(0)), &mut byte).unwrap();
        assert_eq!(&byte, b"!");
    }

    #[test]
    fn last_words_arrive_though_the_other_side_did_not_listen() {
        let (a, b) = pair();
        send(&b, &Request::SetCpus(1), &[]).unwrap();
        send(&a, &Notice::Failed("why".into()), &[]).unwrap();
        drop(a);
        assert_eq!(receive::<Notice>(&b).unwrap().0, Notice::Failed("why".into()));
        assert!(matches!(receive::<Notice>(&b), Err(ChannelError::Closed)));
    }

    #[test]
    fn a_closed_channel_and_an_unknown_field_are_told_apart() {
        let (a, b) = pair();
        rustix::io::write(&a, br#"{"set_cpus":1,"more":2}"#).unwrap();
        assert!(matches!(receive::<Request>(&b), Err(ChannelError::Malformed(_))));
        drop(a);
        assert!(matches!(receive::<Request>(&b), Err(ChannelError::Closed)));
        assert!(matches!(send(&b, &Request::SetCpus(1), &[]), Err(ChannelError::Closed)));
    }
}
