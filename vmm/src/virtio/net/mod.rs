//! The network device (5.1): one pair of queues in front of a tap. Packets go straight between the tap and guest memory,
//! each with its header, which the host's kernel reads and writes in the same form as the driver.

mod receive;
mod tap;
mod transmit;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;

use super::{ActivateError, Activation, ActiveQueue, Broken, Device, DeviceState, Interrupt, Poll, Worker};
use crate::control::MTU_MIN;
use crate::jail::Kind;
use receive::{Receive, Wait};
use tap::Tap;
use transmit::Transmit;

pub use tap::{TUNGETIFF, TUNGETVNETHDRSZ, TUNSETOFFLOAD};

/// Feature bits (5.1.3). `GUEST_` is what the guest takes from us, `HOST_` what we take from it.
const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;

/// `VIRTIO_NET_S_LINK_UP` (5.1.4).
const LINK_UP: u16 = 1;

/// Chains each queue holds.
const QUEUE_SIZE: u16 = 256;

/// Bytes of an Ethernet header with two VLAN tags.
const LINK_HEADER: usize = 14 + 2 * 4;

/// Longest packet that a sender may leave to be segmented: an IP packet of 64 KiB.
const LONGEST_FRAME: usize = u16::MAX as usize + LINK_HEADER;

/// Tokens of the worker.
const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const TAP: u64 = 2;

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// What was given is not a tap that was opened as the device needs it.
    #[error("network device: not a tap as it is needed: {0}")]
    Tap(&'static str),
    /// It cannot be asked.
    #[error("network device: {0}: {1}")]
    Ask(&'static str, #[source] io::Error),
    /// Not an address of one station.
    #[error("network device: {0:02x?} is no MAC address of an interface")]
    Mac([u8; 6]),
    /// Smaller than any.
    #[error("network device: an MTU of {0}; at least {MTU_MIN} is needed")]
    Mtu(u16),
}

/// virtio-net.
pub struct Net {
    tap: Arc<Tap>,
    mac: [u8; 6],
    mtu: u16,
    link: Arc<Link>,
}

/// Whether the tap is still there.
struct Link {
    up: AtomicBool,
}

/// [`DeviceState`] of a network device.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedState {
    link_up: bool,
}

impl Net {
    /// A device in front of a tap, with this address and MTU; see [`crate::control::Resource::Tap`].
    pub fn new(fd: OwnedFd, mac: [u8; 6], mtu: u16) -> Result<Self, NetError> {
        Self::with(Tap::new(fd)?, mac, mtu)
    }

    fn with(tap: Tap, mac: [u8; 6], mtu: u16) -> Result<Self, NetError> {
        // The lowest bit of the first byte says "a group of stations".
        if mac == [0; 6] || mac[0] & 1 != 0 {
            return Err(NetError::Mac(mac));
        }
        if mtu < MTU_MIN {
            return Err(NetError::Mtu(mtu));
        }
        Ok(Self { tap: Arc::new(tap), mac, mtu, link: Arc::new(Link { up: AtomicBool::new(true) }) })
    }
}

impl Device for Net {
    fn id(&self) -> u16 {
        virtio_bindings::virtio_ids::VIRTIO_ID_NET as u16
    }

    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn features(&self) -> u64 {
        let to_guest = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN | F_MRG_RXBUF;
        let from_guest = F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN;
        F_MAC | F_MTU | F_STATUS | to_guest | from_guest
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    /// 5.1.4; without more queues the number of their pairs is not read.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let status = if self.link.up.load(Ordering::SeqCst) { LINK_UP } else { 0 };
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        super::copy_config(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let (receive, transmit) = (activation.queue(0)?, activation.queue(1)?);
        let features = activation.features;
        let offloads = tap::offloads(features);
        let longest = if offloads == 0 { usize::from(self.mtu) + LINK_HEADER } else { LONGEST_FRAME };
        Ok(Box::new(Packets {
            receive: Receive::new(receive, features & F_MRG_RXBUF != 0, longest),
            transmit: Transmit::new(transmit, usize::from(self.mtu) + LINK_HEADER),
            offloads,
            tap: self.tap.clone(),
            wait: None,
            link: self.link.clone(),
            config_interrupt: activation.config_interrupt,
        }))
    }

    /// JSON of [`SavedState`]. Packets do not travel: networks lose some, and whoever sent them sends again.
    fn save(&self) -> DeviceState {
        let saved = SavedState { link_up: self.link.up.load(Ordering::SeqCst) };
        DeviceState(serde_json::to_vec(&saved).unwrap_or_default())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), ActivateError> {
        let saved: SavedState =
            serde_json::from_slice(&state.0).map_err(|e| ActivateError::State(format!("network: {e}")))?;
        self.link.up.store(saved.link_up, Ordering::SeqCst);
        Ok(())
    }
}

/// The device at work.
struct Packets {
    receive: Receive,
    transmit: Transmit,
    /// What the driver takes, in the words of the tap.
    offloads: libc::c_uint,
    tap: Arc<Tap>,
    /// What receiving waits for, as it is registered; none: the tap is not watched.
    wait: Option<Wait>,
    link: Arc<Link>,
    config_interrupt: Interrupt,
}

impl Worker for Packets {
    fn start(&mut self, poll: &Poll) -> io::Result<()> {
        self.tap.set_offloads(self.offloads)?;
        poll.add(self.receive.queue.kick(), RECEIVE, EventSet::IN)?;
        poll.add(self.transmit.queue.kick(), TRANSMIT, EventSet::IN)?;
        self.wait = None;
        if self.link.up.load(Ordering::SeqCst) {
            poll.add(self.tap.as_raw_fd(), TAP, EventSet::empty())?;
            self.wait = Some(Wait::Buffers);
        }
        self.receive.queue.kick_self();
        self.transmit.queue.kick_self();
        Ok(())
    }

    fn handle(&mut self, token: u64, events: EventSet, poll: &Poll) -> Result<(), Broken> {
        match token {
            TRANSMIT => self.transmit.serve(&self.tap),
            RECEIVE => {
                self.receive.queue.clear_kick();
                if self.wait == Some(Wait::Buffers) { self.receive(poll) } else { Ok(()) }
            }
            TAP if self.wait.is_none() => Ok(()),
            // Reported whether it is waited for or not: without this it would be, for ever.
            TAP if events.intersects(EventSet::ERROR | EventSet::HANG_UP) => self.lose_tap(poll),
            TAP => self.receive(poll),
            _ => Ok(()),
        }
    }

    fn stop(&mut self) -> Result<(), Broken> {
        self.receive.put_back();
        Ok(())
    }

    fn queues(&self) -> Vec<Option<&ActiveQueue>> {
        vec![Some(&self.receive.queue), Some(&self.transmit.queue)]
    }
}

impl Packets {
    /// Takes packets from the tap, and waits for what is missing to take more: packets, or buffers of the driver. While there
    /// are no buffers the tap keeps what comes, as long as its own queue is; it is not watched then.
    fn receive(&mut self, poll: &Poll) -> Result<(), Broken> {
        let wait = match self.receive.serve(&self.tap)? {
            Wait::Gone => return self.lose_tap(poll),
            wait => wait,
        };
        if self.wait != Some(wait) {
            let events = if wait == Wait::Packets { EventSet::IN } else { EventSet::empty() };
            poll.modify(self.tap.as_raw_fd(), TAP, events).map_err(|e| Broken::Host("epoll_ctl", e))?;
            self.wait = Some(wait);
        }
        Ok(())
    }

    /// The host has removed the tap: to the guest, the cable was pulled.
    fn lose_tap(&mut self, poll: &Poll) -> Result<(), Broken> {
        self.wait = None;
        self.link.up.store(false, Ordering::SeqCst);
        self.config_interrupt.trigger();
        poll.remove(self.tap.as_raw_fd()).map_err(|e| Broken::Host("epoll_ctl", e))
    }
}

#[cfg(test)]
mod tests;
