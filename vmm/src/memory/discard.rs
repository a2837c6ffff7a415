//! Guest memory that the guest does not need goes back to the host.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, PoisonError};

use vm_memory::{Address, GuestAddress, GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};

use super::GuestMemory;

/// Bytes of a page of the host.
pub const PAGE_SIZE: u64 = 4096;

/// The unit in which memory that is a mapping of a file is given back. Each run of units becomes a mapping of its own, of
/// which a process may have some 65 000: a guest that gives back every other page must not use them up.
pub const FILE_DISCARD_UNIT: u64 = 64 << 10;

/// The ranges of guest memory that are private mappings of a file (the kernel's, or a template's), where dropping pages
/// would bring back what the file has. They shrink as the guest gives them back.
#[derive(Debug, Default)]
pub struct FileBacked {
    /// Start and end of each, neither adjoining nor overlapping.
    ranges: Mutex<BTreeMap<u64, u64>>,
}

impl FileBacked {
    /// These ranges, as guest address and length.
    pub fn new(ranges: impl IntoIterator<Item = (GuestAddress, u64)>) -> Self {
        let mut sorted: Vec<_> =
            ranges.into_iter().map(|(start, length)| (start.0, start.0.saturating_add(length))).collect();
        sorted.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (start, end) in sorted {
            match merged.last_mut() {
                Some((_, last)) if start <= *last => *last = end.max(*last),
                _ => merged.push((start, end)),
            }
        }
        Self { ranges: Mutex::new(merged.into_iter().collect()) }
    }

    /// The ranges that are left.
    pub fn ranges(&self) -> Vec<(GuestAddress, u64)> {
        let ranges = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        ranges.iter().map(|(start, end)| (GuestAddress(*start), end - start)).collect()
    }
}

/// Why memory could not be given back; it is as it was, or part of it is.
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    /// Not whole pages of guest memory.
    #[error("{length} bytes at {start:#x} are not whole pages of guest memory")]
    Range {
        /// Guest address.
        start: u64,
        /// Bytes.
        length: u64,
    },
    /// The host refused.
    #[error("giving back guest memory: {0}")]
    Host(#[source] io::Error),
}

/// Gives the memory of a range back to the host; it reads as zeros then, except that the ends of a file-backed range which
/// are no whole [`FILE_DISCARD_UNIT`] stay as they are.
pub fn discard(
    memory: &GuestMemory,
    file_backed: &FileBacked,
    start: GuestAddress,
    length: u64,
) -> Result<(), DiscardError> {
    let range = DiscardError::Range { start: start.0, length };
    let aligned = start.0.is_multiple_of(PAGE_SIZE) && length.is_multiple_of(PAGE_SIZE);
    let Some(end) = start.0.checked_add(length).filter(|_| aligned) else { return Err(range) };
    if length > 0 && !memory.check_range(start, length as usize) {
        return Err(range);
    }
    // Held to the end: two threads must not both replace a mapping.
    let mut files = file_backed.ranges.lock().unwrap_or_else(PoisonError::into_inner);
    let mut at = start.0;
    while at < end {
        // The range that contains `at`, or the next one.
        let found = files.range(..=at).next_back().filter(|(_, file_end)| **file_end > at);
        let found = found.or_else(|| files.range(at..end).next()).map(|(start, end)| (*start, *end));
        let Some((file_start, file_end)) = found else {
            drop_pages(memory, at, end)?;
            break;
        };
        if at < file_start {
            drop_pages(memory, at, file_start)?;
            at = file_start;
        }
        let until = end.min(file_end);
        let first = at.next_multiple_of(FILE_DISCARD_UNIT);
        let last = until - until % FILE_DISCARD_UNIT;
        if first < last {
            replace_mapping(memory, first, last)?;
            files.remove(&file_start);
            if file_start < first {
                files.insert(file_start, first);
            }
            if last < file_end {
                files.insert(last, file_end);
            }
        }
        at = until;
    }
    Ok(())
}

/// Drops the pages of private anonymous memory.
fn drop_pages(memory: &GuestMemory, start: u64, end: u64) -> Result<(), DiscardError> {
    in_host(memory, start, end, |host, length| {
        // SAFETY: the range is mapped guest memory, checked by the caller; no Rust reference points into it.
        let result = unsafe { libc::madvise(host.cast(), length, libc::MADV_DONTNEED) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    })
}

/// Maps fresh private anonymous memory over a range. KVM notices: the mapping of the memory slot stays the same addresses.
fn replace_mapping(memory: &GuestMemory, start: u64, end: u64) -> Result<(), DiscardError> {
    in_host(memory, start, end, |host, length| {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: the range is mapped guest memory, checked by the caller, and stays mapped; no Rust reference points into
        // it.
        let result = unsafe { libc::mmap(host.cast(), length, protection, flags, -1, 0) };
        if result == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    })
}

/// Calls `call` with where the range, which lies in guest memory, is in this process: in as many pieces as regions.
fn in_host(
    memory: &GuestMemory,
    start: u64,
    end: u64,
    call: impl Fn(*mut u8, usize) -> io::Result<()>,
) -> Result<(), DiscardError> {
    let outside = || DiscardError::Range { start, length: end - start };
    let mut at = start;
    while at < end {
        let region = memory.find_region(GuestAddress(at)).ok_or_else(outside)?;
        let offset = at - region.start_addr().raw_value();
        let length = (region.len() - offset).min(end - at);
        let host = region.get_host_address(MemoryRegionAddress(offset)).map_err(|_| outside())?;
        call(host, length as usize).map_err(DiscardError::Host)?;
        at += length;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;

    use vm_memory::{Bytes, MmapRegion};

    use super::super::GuestRegion;
    use super::*;

    const RANGE: u64 = 16 * FILE_DISCARD_UNIT;

    /// `RANGE` bytes of anonymous memory full of 1, then `RANGE` bytes of a file full of 2.
    fn half_file() -> (GuestMemory, FileBacked) {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), RANGE as usize)]).unwrap();
        let name = std::ffi::CString::new("test").unwrap();
        let mut file = std::fs::File::from(rustix::fs::memfd_create(&name, rustix::fs::MemfdFlags::empty()).unwrap());
        file.write_all(&vec![2; RANGE as usize]).unwrap();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping; it outlives the test.
        let host = unsafe {
            libc::mmap(std::ptr::null_mut(), RANGE as usize, protection, libc::MAP_PRIVATE, file.as_raw_fd(), 0)
        };
        assert_ne!(host, libc::MAP_FAILED);
        // SAFETY: the mapping just made.
        let region =
            unsafe { MmapRegion::build_raw(host.cast(), RANGE as usize, protection, libc::MAP_PRIVATE) }.unwrap();
        let region = std::sync::Arc::new(GuestRegion::new(region, GuestAddress(RANGE)).unwrap());
        let memory = memory.insert_region(region).unwrap();
        memory.write_slice(&vec![1; RANGE as usize], GuestAddress(0)).unwrap();
        (memory, FileBacked::new([(GuestAddress(RANGE), RANGE)]))
    }

    fn contents(memory: &GuestMemory) -> Vec<(u8, u64)> {
        let mut bytes = vec![0; 2 * RANGE as usize];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes.chunk_by(|a, b| a == b).map(|run| (run[0], run.len() as u64)).collect()
    }

    #[test]
    fn a_discarded_range_reads_as_zeros_whatever_was_mapped_there() {
        let (memory, files) = half_file();
        memory.write_slice(&[3; 100], GuestAddress(RANGE)).unwrap();
        discard(&memory, &files, GuestAddress(PAGE_SIZE), 2 * RANGE - 2 * PAGE_SIZE).unwrap();
        let zeros = 2 * RANGE - PAGE_SIZE - FILE_DISCARD_UNIT;
        assert_eq!(contents(&memory), [(1, PAGE_SIZE), (0, zeros), (2, FILE_DISCARD_UNIT)]);
        assert_eq!(files.ranges(), [(GuestAddress(2 * RANGE - FILE_DISCARD_UNIT), FILE_DISCARD_UNIT)]);
    }

    #[test]
    fn less_than_a_unit_of_a_file_stays() {
        let (memory, files) = half_file();
        discard(&memory, &files, GuestAddress(RANGE + PAGE_SIZE), FILE_DISCARD_UNIT).unwrap();
        assert_eq!(contents(&memory), [(1, RANGE), (2, RANGE)]);
        // From the middle: two ranges are left, and what was replaced is ordinary memory.
        let middle = GuestAddress(RANGE + 4 * FILE_DISCARD_UNIT);
        discard(&memory, &files, middle, FILE_DISCARD_UNIT).unwrap();
        let left = [
            (GuestAddress(RANGE), 4 * FILE_DISCARD_UNIT),
            (GuestAddress(RANGE + 5 * FILE_DISCARD_UNIT), RANGE - 5 * FILE_DISCARD_UNIT),
        ];
        assert_eq!(files.ranges(), left);
        memory.write_slice(&[9; PAGE_SIZE as usize], middle).unwrap();
        discard(&memory, &files, middle, PAGE_SIZE).unwrap();
        let after = RANGE - 5 * FILE_DISCARD_UNIT;
        assert_eq!(contents(&memory), [(1, RANGE), (2, 4 * FILE_DISCARD_UNIT), (0, FILE_DISCARD_UNIT), (2, after)]);
    }

    #[test]
    fn what_is_not_whole_pages_of_guest_memory_is_refused() {
        let (memory, files) = half_file();
        for (start, length) in
            [(1, PAGE_SIZE), (0, 1), (2 * RANGE, PAGE_SIZE), (RANGE, 2 * RANGE), (u64::MAX - PAGE_SIZE + 1, PAGE_SIZE)]
        {
            let result = discard(&memory, &files, GuestAddress(start), length);
            assert!(matches!(result, Err(DiscardError::Range { .. })), "{start:#x} {length:#x}");
        }
        assert_eq!(contents(&memory), [(1, RANGE), (2, RANGE)]);
        discard(&memory, &files, GuestAddress(0), 0).unwrap();
    }

    #[test]
    fn adjoining_file_ranges_are_one() {
        let files = FileBacked::new([(GuestAddress(8), 8), (GuestAddress(0), 8), (GuestAddress(32), 1)]);
        assert_eq!(files.ranges(), [(GuestAddress(0), 16), (GuestAddress(32), 1)]);
    }
}
