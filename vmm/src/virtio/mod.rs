//! virtio devices, unaware of their transport (Virtual I/O Device specification 1.3; section numbers below are its).
//!
//! A device is configured through [`Device`] until the driver sets `DRIVER_OK`; then it is handed its [`ActiveQueue`]s and
//! returns a [`Worker`], which owns them and runs on a thread of its own until the device is reset or the machine paused.
//! So nothing that the driver may write before activation can reach a queue that runs: it is not the same type.

pub mod balloon;
pub mod block;
pub mod buffers;
pub mod entropy;
pub mod fs;
pub mod mem;
pub mod net;
pub mod pci;
pub mod queue;
#[cfg(test)]
mod test_driver;
pub mod vsock;
pub mod worker;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

pub use buffers::Buffers;
pub use queue::{ActiveQueue, Broken, Chain};
pub use worker::{Poll, Worker};

use crate::jail::Kind;
use crate::memory::SharedMemory;
use crate::vcpu::lock;

/// `VIRTIO_F_VERSION_1` (6): offered and required for every device.
pub const F_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_INDIRECT_DESC` (2.7.5.3).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX` (2.7.10).
pub const F_EVENT_IDX: u64 = 1 << 29;

/// A virtio device up to its activation. The transport calls it from vCPU threads, one call at a time; none may block.
pub trait Device: Send {
    /// Device ID (5).
    fn id(&self) -> u16;

    /// What its worker's thread is confined to.
    fn kind(&self) -> Kind {
        Kind::Device
    }

    /// Device-specific feature bits offered; the transport adds [`F_VERSION_1`], [`F_INDIRECT_DESC`], [`F_EVENT_IDX`].
    fn features(&self) -> u64 {
        0
    }

    /// Largest size of each queue: powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the device configuration space; bytes beyond its end stay zero.
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    /// Writes the device configuration space; what is not writable is ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver has set `DRIVER_OK`. `activation.queues` are all queues in order, those that the driver left disabled
    /// as `None`. An error makes the transport set `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, ActivateError>;

    /// The driver has reset the device and its worker, if there was one, has been stopped and dropped. Back to the state
    /// before the driver came.
    fn reset(&mut self) {}

    /// What of the device beside its queues, features and configuration must travel into a snapshot.
    fn save(&self) -> DeviceState {
        DeviceState::default()
    }

    /// Puts back what [`Device::save`] gave, before activation.
    fn restore(&mut self, _state: &DeviceState) -> Result<(), ActivateError> {
        Ok(())
    }
}

/// Answers a read of the configuration space whose bytes are `config`; beyond its end there are zeros.
pub fn copy_config(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(rest) = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)) else { return };
    let count = rest.len().min(data.len());
    data[..count].copy_from_slice(&rest[..count]);
}

/// A device's own state as a plain value; each device says what its bytes are (JSON).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState(pub Vec<u8>);

/// What a device gets when the driver is ready.
pub struct Activation {
    /// Guest memory.
    pub memory: SharedMemory,
    /// Feature bits both sides agreed on.
    pub features: u64,
    /// The queues, in order.
    pub queues: Vec<Option<ActiveQueue>>,
    /// Tells the driver that the configuration space has changed.
    pub config_interrupt: Interrupt,
}

impl Activation {
    /// Takes queue `index`, which the device cannot work without.
    pub fn queue(&mut self, index: usize) -> Result<ActiveQueue, ActivateError> {
        self.queues.get_mut(index).and_then(Option::take).ok_or(ActivateError::QueueMissing(index))
    }
}

/// Why a device could not be activated.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver did not enable a queue that the device needs.
    #[error("queue {0} was not enabled by the driver")]
    QueueMissing(usize),
    /// A queue's addresses or size are not usable.
    #[error("queue {0} is not valid: ring outside guest memory, unaligned, or of bad size")]
    QueueInvalid(usize),
    /// The driver has not given the device's registers an address.
    #[error("registers are not decoded")]
    NotDecoded,
    /// The driver did not accept a feature that the device cannot do without.
    #[error("driver without {0}")]
    FeatureMissing(&'static str),
    /// The host refused something.
    #[error("{0}: {1}")]
    Host(&'static str, #[source] std::io::Error),
    /// A saved state does not fit.
    #[error("saved state: {0}")]
    State(String),
}

/// One interrupt vector as a device sees it. Cloning shares it.
#[derive(Clone)]
pub struct Interrupt(Arc<Vector>);

struct Vector {
    delivery: Delivery,
    masked: AtomicBool,
    pending: AtomicBool,
    raised: AtomicU32,
}

enum Delivery {
    Eventfd(EventFd),
    Msi { vm: Arc<VmFd>, message: Mutex<(u64, u32)> },
}

impl Interrupt {
    /// An interrupt that writes an eventfd; masked until it is unmasked.
    pub fn new(eventfd: EventFd) -> Self {
        Self::with(Delivery::Eventfd(eventfd))
    }

    /// A message-signalled interrupt of `vm`; masked, and without a message. KVM is handed the message itself
    /// (`KVM_SIGNAL_MSI`): an irqfd would need a route in KVM's table for each vector, and each change of that table waits
    /// for a grace period during the guest's boot.
    pub fn msi(vm: Arc<VmFd>) -> Self {
        Self::with(Delivery::Msi { vm, message: Mutex::new((0, 0)) })
    }

    fn with(delivery: Delivery) -> Self {
        Self(Arc::new(Vector {
            delivery,
            masked: AtomicBool::new(true),
            pending: AtomicBool::new(false),
            raised: AtomicU32::new(0),
        }))
    }

    /// Sets address and data of the message.
    pub fn set_message(&self, address: u64, data: u32) {
        if let Delivery::Msi { message, .. } = &self.0.delivery {
            *lock(message) = (address, data);
        }
    }

    /// How often it was raised, masked or not.
    pub fn raised(&self) -> u32 {
        self.0.raised.load(Ordering::Relaxed)
    }

    /// Raises the interrupt, or notes it as pending while it is masked.
    pub fn trigger(&self) {
        let vector = &*self.0;
        vector.raised.fetch_add(1, Ordering::Relaxed);
        if vector.masked.load(Ordering::SeqCst) {
            vector.pending.store(true, Ordering::SeqCst);
            // An unmask between the two lines has not seen the bit: deliver it here.
            if vector.masked.load(Ordering::SeqCst) || !vector.pending.swap(false, Ordering::SeqCst) {
                return;
            }
        }
        self.deliver();
    }

    fn deliver(&self) {
        match &self.0.delivery {
            // A write fails only when the counter is about to overflow; the interrupt is then pending anyway.
            Delivery::Eventfd(eventfd) => drop(eventfd.write(1)),
            Delivery::Msi { vm, message } => {
                let (address, data) = *lock(message);
                let msi = kvm_msi {
                    address_lo: address as u32,
                    address_hi: (address >> 32) as u32,
                    data,
                    ..Default::default()
                };
                // KVM refuses a message to no CPU: the guest wrote it, and goes without the interrupt.
                let _ = vm.signal_msi(msi);
            }
        }
    }

    /// Masks or unmasks (PCI Local Bus 3.0, 6.8.2.9); an interrupt that was pending is delivered.
    pub fn set_masked(&self, masked: bool) {
        self.0.masked.store(masked, Ordering::SeqCst);
        if !masked && self.0.pending.swap(false, Ordering::SeqCst) {
            self.deliver();
        }
    }

    /// The pending bit.
    pub fn is_pending(&self) -> bool {
        self.0.pending.load(Ordering::SeqCst)
    }

    /// Sets the pending bit, when a snapshot is put back.
    pub fn set_pending(&self) {
        self.0.pending.store(true, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_masked_interrupt_is_pending_and_delivered_once_when_unmasked() {
        let eventfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(eventfd.try_clone().unwrap());
        interrupt.trigger();
        interrupt.trigger();
        assert!(interrupt.is_pending());
        assert!(eventfd.read().is_err());
        interrupt.set_masked(false);
        assert!(!interrupt.is_pending());
        assert_eq!(eventfd.read().unwrap(), 1);
        interrupt.trigger();
        assert_eq!(eventfd.read().unwrap(), 1);
    }
}
