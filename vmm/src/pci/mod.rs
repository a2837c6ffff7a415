//! A PCI bus: slots with one function each, found by configuration mechanism 1, with registers in memory (PCI Local Bus
//! Specification 3.0; section numbers below are its).

pub mod config;
pub mod msix;

use std::sync::{Arc, Mutex, RwLock};

pub use config::ConfigSpace;

use crate::vcpu::lock;

/// Slots of the bus.
pub const SLOTS: usize = 32;

/// A function in a slot, as the bus sees it.
pub trait Function: Send {
    /// Reads `data.len()` (1, 2 or 4) bytes of configuration space at `register`, which do not cross a double word.
    fn read_config(&self, register: usize, data: &mut [u8]);
    /// Writes configuration space likewise.
    fn write_config(&mut self, register: usize, data: &[u8]);
    /// Address and length of its registers in memory, if it decodes them now.
    fn memory(&self) -> Option<(u64, u64)>;
    /// Reads registers at `offset` into its memory; `data` is all ones.
    fn read_memory(&mut self, offset: u64, data: &mut [u8]);
    /// Writes registers.
    fn write_memory(&mut self, offset: u64, data: &[u8]);
}

/// The function in a slot, locked for one access at a time.
pub type Slot = Arc<Mutex<dyn Function>>;

/// The bus. Slot 0 is the host bridge.
pub struct Bus {
    slots: RwLock<[Option<Slot>; SLOTS]>,
}

/// The bus has no slot left.
#[derive(Debug, thiserror::Error)]
#[error("no free slot on the PCI bus; a machine has {SLOTS}", SLOTS = SLOTS - 1)]
pub struct Full;

impl Default for Bus {
    fn default() -> Self {
        let mut slots: [Option<Slot>; SLOTS] = Default::default();
        slots[0] = Some(Arc::new(Mutex::new(HostBridge(ConfigSpace::host_bridge()))));
        Self { slots: RwLock::new(slots) }
    }
}

impl Bus {
    /// Puts functions into free slots, all of them or none. The guest sees them when it scans the bus next.
    pub fn add(&self, functions: &[Slot]) -> Result<(), Full> {
        let mut slots = self.slots.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let free: Vec<_> = (0..SLOTS).filter(|slot| slots[*slot].is_none()).take(functions.len()).collect();
        if free.len() < functions.len() {
            return Err(Full);
        }
        for (slot, function) in free.into_iter().zip(functions) {
            slots[slot] = Some(function.clone());
        }
        Ok(())
    }

    fn slot(&self, index: usize) -> Option<Slot> {
        self.slots.read().unwrap_or_else(std::sync::PoisonError::into_inner).get(index)?.clone()
    }

    /// Reads configuration space; where nothing is, `data` stays all ones.
    pub fn read_config(&self, slot: usize, register: usize, data: &mut [u8]) {
        if register % 4 + data.len() <= 4
            && let Some(function) = self.slot(slot)
        {
            lock(&function).read_config(register, data);
        }
    }

    /// Writes configuration space.
    pub fn write_config(&self, slot: usize, register: usize, data: &[u8]) {
        if register % 4 + data.len() <= 4
            && let Some(function) = self.slot(slot)
        {
            lock(&function).write_config(register, data);
        }
    }

    /// Reads memory-mapped registers.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        if let Some((function, offset)) = self.find(address, data.len()) {
            lock(&function).read_memory(offset, data);
        }
    }

    /// Writes memory-mapped registers.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((function, offset)) = self.find(address, data.len()) {
            lock(&function).write_memory(offset, data);
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(Slot, u64)> {
        let slots = self.slots.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        slots.iter().flatten().find_map(|function| {
            let (start, size) = lock(function).memory()?;
            let offset = address.checked_sub(start)?;
            (offset < size && length as u64 <= size - offset).then(|| (function.clone(), offset))
        })
    }
}

/// Without a host bridge the kernel takes the bus for absent (it has no DMI to be told otherwise).
struct HostBridge(ConfigSpace);

impl Function for HostBridge {
    fn read_config(&self, register: usize, data: &mut [u8]) {
        self.0.read(register, data);
    }

    fn write_config(&mut self, register: usize, data: &[u8]) {
        self.0.write(register, data);
    }

    fn memory(&self) -> Option<(u64, u64)> {
        None
    }

    fn read_memory(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write_memory(&mut self, _offset: u64, _data: &[u8]) {}
}
