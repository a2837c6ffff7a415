//! What a vCPU reaches by I/O ports and memory-mapped registers: the PCI bus, and the one register of a keyboard
//! controller by which a PC is reset; a serial port that only sends, if there is a console. Everything else reads as ones, as on a machine where nothing answers.

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex};

use kvm_ioctls::VcpuFd;

use crate::control::End;
use crate::pci;
use crate::vcpu::lock;

/// PCI configuration mechanism 1 (PCI Local Bus 3.0, 3.2.2.3.2).
const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const CONFIG_DATA_END: u16 = 0xcff;

/// Status (read) and command (write) port of the keyboard controller. A status of zero says that it is ready to be
/// commanded, so that the reset command comes at once.
const KEYBOARD_CONTROLLER: u16 = 0x64;
/// Pulses the reset line: what the kernel does with `reboot=k`.
const PULSE_RESET: u8 = 0xfe;

/// Transmit register of the first serial port, to which the kernel's early console writes.
const SERIAL_DATA: u16 = 0x3f8;
/// Its line status: always ready to transmit.
const SERIAL_STATUS: u16 = 0x3fd;
const SERIAL_READY: u8 = 0x60;

/// The machine's buses.
pub struct Bus {
    pci: Arc<pci::Bus>,
    config_address: Mutex<u32>,
    console: Option<Mutex<File>>,
}

impl Bus {
    /// With this PCI bus, and a console if it should have one.
    pub fn new(pci: Arc<pci::Bus>, console: Option<File>) -> Self {
        Self { pci, config_address: Mutex::new(0), console: console.map(Mutex::new) }
    }

    /// The PCI bus.
    pub fn pci(&self) -> &Arc<pci::Bus> {
        &self.pci
    }

    /// The configuration address register, for a snapshot.
    pub fn config_address(&self) -> u32 {
        *lock(&self.config_address)
    }

    /// Puts the configuration address register back.
    pub fn set_config_address(&self, address: u32) {
        *lock(&self.config_address) = address;
    }

    /// An `out` instruction; the end of the machine if it was that.
    pub fn write_port(&self, vcpu: &mut VcpuFd, port: u16, data: &[u8]) -> Option<End> {
        match port {
            CONFIG_ADDRESS => {
                // Only a machine without the coalescing zone comes here.
                if let Ok(address) = data.try_into() {
                    *lock(&self.config_address) = u32::from_le_bytes(address);
                }
            }
            CONFIG_DATA..=CONFIG_DATA_END => {
                let mut address = lock(&self.config_address);
                follow_writes(vcpu, &mut address);
                if let Some((slot, register)) = decode(*address, port) {
                    self.pci.write_config(slot, register, data);
                }
            }
            SERIAL_DATA => {
                if let Some(console) = &self.console {
                    // A full disk must not stop the guest; its messages are lost then.
                    let _ = lock(console).write_all(data);
                }
            }
            KEYBOARD_CONTROLLER if data == [PULSE_RESET] => return Some(End::Reset),
            _ => {}
        }
        None
    }

    /// An `in` instruction; `data` is all ones.
    pub fn read_port(&self, vcpu: &mut VcpuFd, port: u16, data: &mut [u8]) {
        match port {
            CONFIG_ADDRESS if data.len() == 4 => {
                let mut address = lock(&self.config_address);
                follow_writes(vcpu, &mut address);
                data.copy_from_slice(&address.to_le_bytes());
            }
            CONFIG_DATA..=CONFIG_DATA_END => {
                let mut address = lock(&self.config_address);
                follow_writes(vcpu, &mut address);
                if let Some((slot, register)) = decode(*address, port) {
                    self.pci.read_config(slot, register, data);
                }
            }
            KEYBOARD_CONTROLLER => data.fill(0),
            SERIAL_STATUS if self.console.is_some() => data.fill(SERIAL_READY),
            _ => {}
        }
    }

    /// A load from where there is no memory.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.pci.read_memory(address, data);
    }

    /// A store to where there is no memory.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        self.pci.write_memory(address, data);
    }
}

/// Writes to the address register are collected by KVM in a ring instead of coming here one by one (half of the exits of
/// a PCI scan); the last one counts. The lock on the register is also the ring's.
fn follow_writes(vcpu: &mut VcpuFd, address: &mut u32) {
    while let Ok(Some(entry)) = vcpu.coalesced_mmio_read() {
        if entry.phys_addr == u64::from(CONFIG_ADDRESS) && entry.len == 4 {
            *address = u32::from_le_bytes([entry.data[0], entry.data[1], entry.data[2], entry.data[3]]);
        }
    }
}

/// Slot on bus 0, function 0, and the byte of configuration space that a data port stands for; `None` where there can be
/// nothing.
fn decode(address: u32, port: u16) -> Option<(usize, usize)> {
    const ENABLE: u32 = 1 << 31;
    const BUS_AND_FUNCTION: u32 = 0x00ff_0700;
    if address & ENABLE == 0 || address & BUS_AND_FUNCTION != 0 {
        return None;
    }
    let slot = (address >> 11 & 0x1f) as usize;
    let register = (address & 0xfc) as usize + usize::from(port - CONFIG_DATA);
    Some((slot, register))
}
