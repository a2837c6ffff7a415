//! From what the runtime names to devices.

use std::os::fd::OwnedFd;

use vm_memory::{GuestAddress, GuestMemory as _};

use super::Line;
use super::line;
use crate::arch::layout::HOTPLUG;
use crate::control::{Device, Resource};
use crate::machine::Machine;
use crate::virtio;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::entropy::Entropy;
use crate::virtio::mem::{Memory, MemoryHandle};
use crate::virtio::net::Net;

/// A device for the bus, and what its errors are called.
pub type Named = (&'static str, Box<dyn virtio::Device>);

/// A disk that a machine has.
pub struct Known {
    serial: String,
    read_only: bool,
}

/// Devices that are to be put on the bus together, and what reaches them then.
#[derive(Default)]
pub struct Batch {
    pub devices: Vec<Named>,
    pub memory: Option<MemoryHandle>,
    /// Those of the devices that are disks.
    pub disks: Vec<Known>,
}

impl Batch {
    /// Adds the device that a descriptor becomes. `known`: the disks that the machine has.
    pub fn resource(&mut self, resource: Resource, fd: OwnedFd, known: &[Known]) -> Result<(), Line> {
        match resource {
            Resource::Disk { read_only, serial } => {
                match known.iter().chain(&self.disks).find(|disk| disk.serial == serial) {
                    Some(disk) if disk.read_only && !read_only => {
                        return Err(format!("the machine has disk {serial:?} already, and only for reading"));
                    }
                    Some(_) => return Ok(()),
                    None => {}
                }
                self.devices.push(("blk", Box::new(Block::new(fd, read_only, &serial).map_err(line)?)));
                self.disks.push(Known { serial, read_only });
            }
            Resource::Tap { mac, mtu } => {
                self.devices.push(("net", Box::new(Net::new(fd, mac, mtu).map_err(line)?)));
            }
            other => return Err(format!("{other:?} is given at the start or not at all")),
        }
        Ok(())
    }

    /// Adds a device that needs no descriptor. `has_memory`: the machine has its memory device already, of which it can have
    /// one.
    pub fn device(&mut self, device: Device, machine: &Machine, has_memory: bool) -> Result<(), Line> {
        match device {
            Device::Entropy => self.devices.push(("rng", Box::new(Entropy))),
            Device::Balloon => {
                self.devices.push(("balloon", Box::new(Balloon::new(machine.file_backed().clone()))));
            }
            Device::Memory if machine.memory().num_regions() == 1 => {}
            Device::Memory if has_memory || self.memory.is_some() => {
                return Err("the machine has a memory device".into());
            }
            Device::Memory => {
                let device = Memory::new(machine.memory().clone(), GuestAddress(HOTPLUG), true).map_err(line)?;
                self.memory = Some(device.handle());
                self.devices.push(("mem", Box::new(device)));
            }
            Device::Share => return Err("a share is asked for at the start or not at all".into()),
        }
        Ok(())
    }
}
