//! Guest memory as the devices see it.

pub mod discard;

use std::sync::Arc;

use vhost_user_backend::bitmap::BitmapMmapRegion;
use vm_memory::{GuestMemoryMmap, GuestRegionMmap};

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
