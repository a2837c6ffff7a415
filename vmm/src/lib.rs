//! The virtual machine monitor of podhull: one machine per process, made of KVM vCPUs, private guest memory and virtio
//! devices on a PCI bus.
//!
//! It knows nothing of containers. The runtime starts the process, hands it open files over the [`control`] channel, and
//! speaks to the guest's agent through it.

pub mod control;
pub mod memory;
pub mod virtio;
