//! The virtual machine monitor of podhull: one machine per process, made of KVM vCPUs, private guest memory and virtio
//! devices on a PCI bus.
//!
//! It knows nothing of containers. The runtime starts the process, hands it open files over the [`control`] channel, and
//! speaks to the guest's agent through it.

pub mod arch;
pub mod bus;
pub mod control;
pub mod fault;
pub mod host;
pub mod jail;
pub mod kernel;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod process;
pub mod snapshot;
pub mod vcpu;
pub mod virtio;
