//! Guest memory: private to this process, so that nothing of a guest outlives it.

pub mod discard;

use std::io;
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap, MmapRegion};

use crate::arch::layout::{HOTPLUG, HUGE_PAGE};

/// The memory devices may reach: the RAM the machine began with and, if it can grow, the region of its memory device. The
/// guest image is not part of it: no device writes there or reads from there.
///
/// The bitmap type is the one of the file server's crate, so that it works on the same memory; it stays empty and costs
/// nothing until something replaces it.
pub type GuestMemory = GuestMemoryMmap<BitmapMmapRegion>;

/// One contiguous range of it.
pub type GuestRegion = GuestRegionMmap<BitmapMmapRegion>;

/// Shared by all device threads; the set of regions is fixed when the machine is built.
pub type SharedMemory = Arc<GuestMemory>;

/// Why guest memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host has no address space or memory left.
    #[error("{size} bytes of guest memory: {source}")]
    Map {
        /// Bytes asked for.
        size: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The mapping is not one a region can be made of.
    #[error("guest memory region: {0}")]
    Region(#[from] MmapRegionError),
    /// The regions do not fit together.
    #[error("guest memory regions: {0}")]
    Collection(#[from] GuestRegionCollectionError),
}

/// Memory for a machine: `ram` bytes from address 0, and `hotplug` bytes of inaccessible address space for its memory
/// device at [`HOTPLUG`]. Both are multiples of 2 MiB; both stay mapped for the life of the process.
pub fn build(ram: u64, hotplug: u64) -> Result<GuestMemory, MemoryError> {
    let mut regions = vec![region(0, ram, ProtFlags::READ | ProtFlags::WRITE)?];
    if hotplug > 0 {
        regions.push(region(HOTPLUG, hotplug, ProtFlags::empty())?);
    }
    Ok(GuestMemory::from_regions(regions)?)
}

fn region(start: u64, size: u64, protection: ProtFlags) -> Result<GuestRegion, MemoryError> {
    let map = |source: rustix::io::Errno| MemoryError::Map { size, source: source.into() };
    let length = usize::try_from(size).map_err(|_| map(rustix::io::Errno::NOMEM))?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // Huge pages need host and guest addresses congruent modulo their size: reserve one more than needed and start inside.
    let reserved = length.checked_add(HUGE_PAGE as usize).ok_or_else(|| map(rustix::io::Errno::NOMEM))?;
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
    let base = unsafe { mmap_anonymous(std::ptr::null_mut(), reserved, protection, flags) }.map_err(map)?;
    let offset = base.addr().next_multiple_of(HUGE_PAGE as usize) - base.addr();
    // SAFETY: `offset + length` is at most `reserved`.
    let aligned = unsafe { base.byte_add(offset) };
    // SAFETY: the range is inside the mapping just made; advice about huge pages changes no content. A host without them
    // refuses, and does not matter.
    let _ = unsafe { madvise(aligned, length, Advice::LinuxHugepage) };
    // SAFETY: the mapping has this length and protection and is never unmapped.
    let mapping =
        unsafe { MmapRegion::build_raw(aligned.cast(), length, protection.bits() as i32, flags.bits() as i32) }?;
    GuestRegion::new(mapping, GuestAddress(start)).ok_or_else(|| map(rustix::io::Errno::NOMEM))
}
