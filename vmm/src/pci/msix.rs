//! MSI-X (6.8.2): a table of messages in memory, one per vector, and the bits that mask them.

use serde::{Deserialize, Serialize};

use crate::virtio::Interrupt;

/// Capability ID.
pub const CAPABILITY: u8 = 0x11;
/// Bytes of a table entry.
pub const ENTRY: u64 = 16;

/// Message control: enabled, all masked.
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;

/// What the guest may write of message control, by its bytes.
pub const CONTROL_WRITABLE: [u8; 2] = (ENABLE | FUNCTION_MASK).to_le_bytes();

/// One message: where a write of what raises the interrupt, and whether it is held back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    masked: bool,
}

/// Table and pending bits of a function, driving one [`Interrupt`] per vector.
pub struct Msix {
    entries: Vec<Entry>,
    vectors: Vec<Interrupt>,
    /// Not enabled, or all masked.
    silent: bool,
}

/// As a plain value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    entries: Vec<Entry>,
    pending: Vec<bool>,
    silent: bool,
}

impl Msix {
    /// All entries masked, as after a reset.
    pub fn new(vectors: Vec<Interrupt>) -> Self {
        let entries = vec![Entry { address: 0, data: 0, masked: true }; vectors.len()];
        Self { entries, vectors, silent: true }
    }

    /// The interrupt of vector `index`.
    pub fn vector(&self, index: u16) -> Option<&Interrupt> {
        self.vectors.get(usize::from(index))
    }

    /// Message control was written.
    pub fn set_control(&mut self, control: u16) {
        let silent = control & (ENABLE | FUNCTION_MASK) != ENABLE;
        if silent != self.silent {
            self.silent = silent;
            (0..self.entries.len()).for_each(|index| self.apply(index));
        }
    }

    /// Reads the table; 4 or 8 aligned bytes.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        if !is_aligned(offset, data.len()) {
            return;
        }
        for (index, part) in data.chunks_mut(4).enumerate() {
            let at = offset + 4 * index as u64;
            if let Some(entry) = self.entries.get((at / ENTRY) as usize) {
                let word = match at % ENTRY {
                    0 => entry.address as u32,
                    4 => (entry.address >> 32) as u32,
                    8 => entry.data,
                    _ => u32::from(entry.masked),
                };
                part.copy_from_slice(&word.to_le_bytes());
            }
        }
    }

    /// Writes the table; 4 or 8 aligned bytes, anything else is ignored.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        if !is_aligned(offset, data.len()) {
            return;
        }
        for (index, part) in data.chunks(4).enumerate() {
            let at = offset + 4 * index as u64;
            let (Some(entry), Ok(bytes)) = (self.entries.get_mut((at / ENTRY) as usize), part.try_into()) else {
                return;
            };
            let word = u32::from_le_bytes(bytes);
            match at % ENTRY {
                0 => entry.address = entry.address & !0xffff_ffff | u64::from(word),
                4 => entry.address = entry.address & 0xffff_ffff | u64::from(word) << 32,
                8 => entry.data = word,
                _ => entry.masked = word & 1 != 0,
            }
            self.apply((at / ENTRY) as usize);
        }
    }

    /// Reads the pending bits: bytes from `offset`.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = 0;
            let first = (at * 8) as usize;
            for (bit, vector) in self.vectors.iter().skip(first).take(8).enumerate() {
                *byte |= u8::from(vector.is_pending()) << bit;
            }
        }
    }

    /// As a plain value.
    pub fn save(&self) -> MsixState {
        MsixState {
            entries: self.entries.clone(),
            pending: self.vectors.iter().map(Interrupt::is_pending).collect(),
            silent: self.silent,
        }
    }

    /// Puts a saved table back; false if it has another number of vectors.
    pub fn restore(&mut self, state: &MsixState) -> bool {
        if state.entries.len() != self.entries.len() || state.pending.len() != self.entries.len() {
            return false;
        }
        self.entries.clone_from(&state.entries);
        self.silent = state.silent;
        for (index, &pending) in state.pending.iter().enumerate() {
            if pending {
                self.vectors[index].set_pending();
            }
            self.apply(index);
        }
        true
    }

    fn apply(&self, index: usize) {
        let entry = self.entries[index];
        self.vectors[index].set_message(entry.address, entry.data);
        self.vectors[index].set_masked(entry.masked || self.silent);
    }
}

fn is_aligned(offset: u64, length: usize) -> bool {
    matches!(length, 4 | 8) && offset.is_multiple_of(length as u64)
}
