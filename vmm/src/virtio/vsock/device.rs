//! The device up to its activation, and the handle by which the machine reaches it afterwards.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::muxer::{FIRST_LOCAL_PORT, LAST_LOCAL_PORT, Muxer};
use crate::jail::Kind;
use crate::virtio::{ActivateError, Activation, Device, DeviceState, Worker};

/// Chains each queue holds: with the pages that Linux offers, 1 MiB towards the guest.
const QUEUE_SIZE: u16 = 256;

/// Chains the event queue holds.
const EVENT_QUEUE_SIZE: u16 = 16;

/// What the device is made of.
pub struct Options {
    /// The guest's address. It is known to this machine only, so all machines may use the same.
    pub guest_cid: u64,
    /// Port of the host to which the agent connects when it listens.
    pub ready_port: u32,
    /// Written, once, when it has.
    pub ready: EventFd,
    /// Port of the guest to which the agent channel goes.
    pub agent_port: u32,
    /// The agent channel: a connected stream socket. See [`VsockHandle::connect_agent`].
    pub agent: Option<OwnedFd>,
    /// A listening Unix stream socket for clients of the host.
    pub listener: Option<OwnedFd>,
}

/// virtio-vsock.
pub struct Vsock {
    shared: Arc<Shared>,
}

impl Vsock {
    /// A device with these options.
    pub fn new(options: Options) -> io::Result<Self> {
        if let Some(listener) = &options.listener {
            rustix::io::ioctl_fionbio(listener, true)?;
        }
        Ok(Self {
            shared: Arc::new(Shared {
                guest_cid: options.guest_cid,
                ready_port: options.ready_port,
                ready: options.ready,
                agent_port: options.agent_port,
                listener: options.listener,
                is_ready: AtomicBool::new(false),
                next_port: AtomicU32::new(FIRST_LOCAL_PORT),
                wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
                orders: Mutex::new(Orders { agent: options.agent, ..Orders::default() }),
            }),
        })
    }

    /// A handle for the running machine.
    pub fn handle(&self) -> VsockHandle {
        VsockHandle { shared: self.shared.clone() }
    }
}

impl Device for Vsock {
    fn id(&self) -> u16 {
        virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK as u16
    }

    fn kind(&self) -> Kind {
        Kind::Vsock
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE, EVENT_QUEUE_SIZE]
    }

    /// 5.10.4: the guest's CID, 64 bits.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.shared.guest_cid.to_le_bytes();
        let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
        let count = rest.len().min(data.len());
        data[..count].copy_from_slice(&rest[..count]);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let [to_guest, from_guest, events] = [activation.queue(0)?, activation.queue(1)?, activation.queue(2)?];
        let muxer = Muxer::new(self.shared.clone(), to_guest, from_guest, events)
            .map_err(|e| ActivateError::Host("socket device", e))?;
        Ok(Box::new(muxer))
    }

    fn reset(&mut self) {
        self.shared.is_ready.store(false, Ordering::SeqCst);
    }

    /// JSON of [`State`]. Connections do not travel: whoever restores resets those the guest may have.
    fn save(&self) -> DeviceState {
        let state = State {
            ready: self.shared.is_ready.load(Ordering::SeqCst),
            next_port: self.shared.next_port.load(Ordering::SeqCst),
        };
        // A structure of two numbers always has a JSON form.
        DeviceState(serde_json::to_vec(&state).unwrap_or_default())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), ActivateError> {
        let state: State = serde_json::from_slice(&state.0).map_err(|e| ActivateError::State(e.to_string()))?;
        if !(FIRST_LOCAL_PORT..=LAST_LOCAL_PORT).contains(&state.next_port) {
            return Err(ActivateError::State(format!("port {} is not one of the host", state.next_port)));
        }
        self.shared.is_ready.store(state.ready, Ordering::SeqCst);
        self.shared.next_port.store(state.next_port, Ordering::SeqCst);
        Ok(())
    }
}

/// What travels into a snapshot.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// The agent has said that it listens.
    ready: bool,
    /// Next port of the host to use, so that a clone does not use one the guest still remembers.
    next_port: u32,
}

/// Reaches the device while the machine runs, and before: what is asked for waits until the driver is there.
#[derive(Clone)]
pub struct VsockHandle {
    shared: Arc<Shared>,
}

impl VsockHandle {
    /// Makes `socket`, a connected stream socket, a connection to `port` of the guest. If the guest refuses, or there are too
    /// many connections, it is shut down.
    pub fn connect(&self, socket: OwnedFd, port: u32) {
        self.order(|orders| orders.connections.push((socket, port)));
    }

    /// Makes `socket` the connection to the agent's port, as soon as the agent listens: at once if it has said so already
    /// (or had when the snapshot was taken). What is written to its peer before waits there.
    pub fn connect_agent(&self, socket: OwnedFd) {
        self.order(|orders| orders.agent = Some(socket));
    }

    /// Tells the guest that its connections are gone (5.10.6.7.1) and shuts their sockets down. Connections asked for from
    /// now on reach the guest after it has taken note.
    pub fn reset_transport(&self) {
        self.order(|orders| {
            orders.transport_reset = true;
            orders.connections.clear();
        });
    }

    fn order(&self, write: impl FnOnce(&mut Orders)) {
        write(&mut self.shared.orders());
        // Fails only when the counter is about to overflow; the worker is then woken anyway.
        let _ = self.shared.wake.write(1);
    }
}

/// What the device, its worker and its handles know in common.
pub struct Shared {
    pub guest_cid: u64,
    pub ready_port: u32,
    pub ready: EventFd,
    pub agent_port: u32,
    pub listener: Option<OwnedFd>,
    pub is_ready: AtomicBool,
    pub next_port: AtomicU32,
    pub wake: EventFd,
    orders: Mutex<Orders>,
}

/// What the handles asked for. A transport reset comes before the connections.
#[derive(Default)]
pub struct Orders {
    pub transport_reset: bool,
    pub agent: Option<OwnedFd>,
    pub connections: Vec<(OwnedFd, u32)>,
}

impl Shared {
    /// Locked for lines only, and nothing in them panics.
    pub fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
