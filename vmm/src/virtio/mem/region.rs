//! The region of guest memory that a memory device carries, and which of its blocks are plugged.

use std::io;
use std::ptr::NonNull;

use vm_memory::{Address, GuestAddress, GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};

use super::{BLOCK_SIZE, MemoryError};
use crate::memory::SharedMemory;

/// Guest memory from `start` on, of which the device decides what can be accessed.
pub struct Region {
    pub start: GuestAddress,
    /// Bytes.
    pub length: u64,
    host: NonNull<u8>,
    huge_pages: bool,
    /// Keeps the mapping.
    _memory: SharedMemory,
}

// SAFETY: the pointer is only handed to the kernel, and the mapping it points to lives as long as `_memory`.
unsafe impl Send for Region {}
// SAFETY: as above; calls of mprotect and madvise on one range by two threads are in some order.
unsafe impl Sync for Region {}

impl Region {
    pub fn new(memory: SharedMemory, start: GuestAddress, huge_pages: bool) -> Result<Self, MemoryError> {
        let not_there = || MemoryError::Region(start.raw_value());
        let region = memory.find_region(start).filter(|region| region.start_addr() == start).ok_or_else(not_there)?;
        let length = region.len();
        let host = region.get_host_address(MemoryRegionAddress(0)).ok().and_then(NonNull::new);
        let host = host.ok_or_else(not_there)?;
        let aligned = start.raw_value().is_multiple_of(BLOCK_SIZE) && length.is_multiple_of(BLOCK_SIZE);
        if !aligned || length == 0 {
            return Err(not_there());
        }
        Ok(Self { start, length, host, huge_pages, _memory: memory })
    }

    /// Makes a range accessible. It is zero.
    pub fn open(&self, offset: u64, length: u64) -> io::Result<()> {
        self.protect(offset, length, libc::PROT_READ | libc::PROT_WRITE)?;
        if self.huge_pages {
            // A kernel without them says no; the memory is as good.
            let _ = self.advise(offset, length, libc::MADV_HUGEPAGE);
        }
        Ok(())
    }

    /// Makes a range inaccessible, then gives back what was in it, so that nothing can come in between.
    pub fn close(&self, offset: u64, length: u64) -> io::Result<()> {
        self.protect(offset, length, libc::PROT_NONE)?;
        self.advise(offset, length, libc::MADV_DONTNEED)
    }

    pub fn protect(&self, offset: u64, length: u64, protection: libc::c_int) -> io::Result<()> {
        debug_assert!(offset + length <= self.length);
        // SAFETY: callers pass ranges inside the region, which is mapped; no Rust reference points into guest memory.
        let result =
            unsafe { libc::mprotect(self.host.as_ptr().add(offset as usize).cast(), length as usize, protection) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    pub fn advise(&self, offset: u64, length: u64, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: callers pass ranges inside the region, which is mapped; no Rust reference points into guest memory.
        let result = unsafe { libc::madvise(self.host.as_ptr().add(offset as usize).cast(), length as usize, advice) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Which blocks are plugged.
pub struct Blocks {
    plugged: Vec<bool>,
    /// How many are.
    pub count: u64,
}

impl Blocks {
    pub fn new(total: u64) -> Self {
        Self { plugged: vec![false; total as usize], count: 0 }
    }

    pub fn total(&self) -> u64 {
        self.plugged.len() as u64
    }

    pub fn bytes(&self) -> u64 {
        self.count * BLOCK_SIZE
    }

    pub fn plugged_among(&self, first: u64, count: u64) -> u64 {
        self.plugged[first as usize..(first + count) as usize].iter().filter(|plugged| **plugged).count() as u64
    }

    pub fn set(&mut self, first: u64, count: u64, plugged: bool) {
        let before = self.plugged_among(first, count);
        self.plugged[first as usize..(first + count) as usize].fill(plugged);
        self.count = self.count - before + if plugged { count } else { 0 };
    }

    pub fn runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for index in (0..self.total()).filter(|index| self.plugged[*index as usize]) {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == index => *count += 1,
                _ => runs.push((index, 1)),
            }
        }
        runs
    }
}
