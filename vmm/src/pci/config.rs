//! The configuration space of a function: 256 bytes, of which a mask says what the guest may write (6.1, 6.2).

use serde::{Deserialize, Serialize};

const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const BAR0: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
/// First byte after the standard header.
const HEADER_END: usize = 0x40;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Class code: base class, subclass, interface.
const HOST_BRIDGE: [u8; 3] = [0x00, 0x00, 0x06];

/// Identity of a function.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Interface, subclass, base class, in register order.
    pub class: [u8; 3],
    /// Subsystem vendor and device.
    pub subsystem: (u16, u16),
}

/// Configuration space of a function with at most one 32-bit memory BAR.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; 256],
    writable: [u8; 256],
    bar_size: u32,
    last_capability: usize,
    end: usize,
}

/// What the guest has written: command and BAR, and whatever a capability lets it write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState(Vec<u8>);

impl ConfigSpace {
    /// A function with BAR 0 of `bar_size` bytes (a power of two of at least 16; 0 for none).
    pub fn new(identity: Identity, bar_size: u32) -> Self {
        let mut space = Self { bytes: [0; 256], writable: [0; 256], bar_size, last_capability: 0, end: HEADER_END };
        space.put16(VENDOR, identity.vendor);
        space.put16(DEVICE, identity.device);
        space.bytes[REVISION] = identity.revision;
        space.bytes[CLASS..CLASS + 3].copy_from_slice(&identity.class);
        space.put16(SUBSYSTEM_VENDOR, identity.subsystem.0);
        space.put16(SUBSYSTEM, identity.subsystem.1);
        let command = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE;
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&command.to_le_bytes());
        if bar_size > 0 {
            // Bits below the size stay zero: that is how the guest learns the size.
            space.writable[BAR0..BAR0 + 4].copy_from_slice(&(!(bar_size - 1)).to_le_bytes());
        }
        space
    }

    /// The bridge at slot 0, with the identity of nobody's product.
    pub fn host_bridge() -> Self {
        let identity = Identity { vendor: 0x1b36, device: 0x0008, revision: 0, class: HOST_BRIDGE, subsystem: (0, 0) };
        Self::new(identity, 0)
    }

    /// Appends a capability: its ID and the bytes after the pointer to the next one. `writable` masks those bytes. Returns
    /// where it begins.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.end;
        self.bytes[at] = id;
        self.bytes[at + 2..at + 2 + body.len()].copy_from_slice(body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        let pointer = if self.last_capability == 0 { CAPABILITIES } else { self.last_capability + 1 };
        self.bytes[pointer] = at as u8;
        self.last_capability = at;
        self.end = (at + 2 + body.len()).next_multiple_of(4);
        let status = self.get16(STATUS) | STATUS_CAPABILITIES;
        self.put16(STATUS, status);
        at
    }

    /// Reads bytes that do not cross a double word.
    pub fn read(&self, register: usize, data: &mut [u8]) {
        data.copy_from_slice(&self.bytes[register..register + data.len()]);
    }

    /// Writes bytes as far as they are writable.
    pub fn write(&mut self, register: usize, data: &[u8]) {
        for (index, &byte) in (register..).zip(data) {
            let mask = self.writable[index];
            self.bytes[index] = self.bytes[index] & !mask | byte & mask;
        }
    }

    /// Whether an access of `length` bytes at `register` touches BAR 0.
    pub fn is_bar(register: usize, length: usize) -> bool {
        register < BAR0 + 4 && register + length > BAR0
    }

    /// Where BAR 0 is decoded, if memory decoding is on and the guest gave it an address.
    pub fn bar(&self) -> Option<(u64, u64)> {
        let base = u32::from(self.get16(BAR0)) | u32::from(self.get16(BAR0 + 2)) << 16;
        let decoded = self.bar_size > 0 && self.get16(COMMAND) & COMMAND_MEMORY != 0 && base & !0xf != 0;
        decoded.then_some((u64::from(base & !0xf), self.bar_size.into()))
    }

    /// A 16-bit register.
    pub fn get16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn put16(&mut self, at: usize, value: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// As a plain value.
    pub fn save(&self) -> ConfigState {
        ConfigState(self.bytes.to_vec())
    }

    /// Puts back what the guest had written; what it cannot write stays this function's.
    pub fn restore(&mut self, state: &ConfigState) {
        for (index, &byte) in state.0.iter().enumerate().take(self.bytes.len()) {
            let mask = self.writable[index];
            self.bytes[index] = self.bytes[index] & !mask | byte & mask;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity =
            Identity { vendor: 0x1af4, device: 0x1053, revision: 1, class: [0, 0x80, 0x07], subsystem: (0x1af4, 1) };
        ConfigSpace::new(identity, 0x8000)
    }

    #[test]
    fn the_size_of_the_bar_can_be_probed_and_its_address_set() {
        let mut space = space();
        space.write(BAR0, &[0xff; 4]);
        let mut size = [0; 4];
        space.read(BAR0, &mut size);
        assert_eq!(u32::from_le_bytes(size), !0x7fff);
        space.write(BAR0, &0x1000_8000u32.to_le_bytes());
        assert_eq!(space.bar(), None);
        space.write(COMMAND, &[2, 0]);
        assert_eq!(space.bar(), Some((0x1000_8000, 0x8000)));
    }

    #[test]
    fn capabilities_form_a_list_and_identity_cannot_be_written() {
        let mut space = space();
        let first = space.add_capability(9, &[1, 2, 3], &[]);
        let second = space.add_capability(0x11, &[0; 10], &[0, 0xc0]);
        let mut bytes = [0; 1];
        space.read(CAPABILITIES, &mut bytes);
        assert_eq!(usize::from(bytes[0]), first);
        space.read(first + 1, &mut bytes);
        assert_eq!(usize::from(bytes[0]), second);
        space.write(second + 2, &[0xff, 0xff]);
        assert_eq!(space.get16(second + 2), 0xc000);
        space.write(VENDOR, &[0, 0, 0, 0]);
        assert_eq!(space.get16(VENDOR), 0x1af4);
    }
}
