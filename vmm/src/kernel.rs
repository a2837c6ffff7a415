//! The guest kernel, an uncompressed ELF file, mapped into guest memory.
//!
//! Its segments are mapped privately over the RAM, not read: pages that the guest only executes stay those of the host's
//! page cache, shared by all machines, and what is never touched is never loaded.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::mm::{MapFlags, ProtFlags, mmap};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

use crate::arch::layout::HIGH_MEMORY;
use crate::memory::GuestMemory;

const PAGE: u64 = 4096;
const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const PT_LOAD: u32 = 1;
/// More program headers than any kernel has.
const MAX_PROGRAM_HEADERS: u16 = 64;

/// Why a file is not a kernel that can be started.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Not an ELF file for this processor, or a damaged one.
    #[error("guest kernel: {0}; install it again")]
    Malformed(&'static str),
    /// A segment does not fit.
    #[error("guest kernel: segment at {start:#x} of {size:#x} bytes lies outside the machine's memory")]
    OutsideMemory {
        /// Physical address.
        start: u64,
        /// Bytes in memory.
        size: u64,
    },
    /// The file cannot be read or mapped.
    #[error("guest kernel: {0}")]
    Io(#[from] io::Error),
    /// Guest memory refused.
    #[error("guest kernel: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// A loadable segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

/// A kernel in guest memory.
#[derive(Debug)]
pub struct Kernel {
    /// Where it is entered.
    pub entry: u64,
    /// What of guest memory maps its file: address and length.
    pub mapped: Vec<(GuestAddress, u64)>,
}

/// Maps the kernel into `memory`.
pub fn load(file: &File, memory: &GuestMemory) -> Result<Kernel, KernelError> {
    let length = file.metadata()?.len();
    let (entry, segments) = read_headers(file, length)?;
    let mut mapped = Vec::new();
    for segment in &segments {
        mapped.extend(map(file, segment, memory)?);
    }
    Ok(Kernel { entry, mapped })
}

fn read_headers(file: &File, length: u64) -> Result<(u64, Vec<Segment>), KernelError> {
    let mut header = [0; ELF_HEADER];
    if length < ELF_HEADER as u64 {
        return Err(KernelError::Malformed("too short for an ELF file"));
    }
    file.read_exact_at(&mut header, 0)?;
    // Magic, 64-bit, little-endian; executable; x86-64.
    if header[..6] != *b"\x7fELF\x02\x01" {
        return Err(KernelError::Malformed("not a 64-bit ELF file"));
    }
    if u16_at(&header, 16) != 2 || u16_at(&header, 18) != 62 {
        return Err(KernelError::Malformed("not an executable for x86-64"));
    }
    let (entry, table) = (u64_at(&header, 24), u64_at(&header, 32));
    let (size, count) = (u16_at(&header, 54), u16_at(&header, 56));
    if usize::from(size) != PROGRAM_HEADER || count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(KernelError::Malformed("program headers of a strange size or number"));
    }
    let mut headers = vec![0; PROGRAM_HEADER * usize::from(count)];
    if table.checked_add(headers.len() as u64).is_none_or(|end| end > length) {
        return Err(KernelError::Malformed("program headers beyond the end of the file"));
    }
    file.read_exact_at(&mut headers, table)?;
    let mut segments = Vec::new();
    for header in headers.chunks_exact(PROGRAM_HEADER).filter(|header| u32_at(header, 0) == PT_LOAD) {
        let segment = Segment {
            offset: u64_at(header, 8),
            address: u64_at(header, 24),
            file_size: u64_at(header, 32),
            memory_size: u64_at(header, 40),
        };
        if segment.file_size > segment.memory_size
            || segment.offset.checked_add(segment.file_size).is_none_or(|end| end > length)
        {
            return Err(KernelError::Malformed("a segment is cut off"));
        }
        segments.push(segment);
    }
    let inside = |s: &Segment| entry >= s.address && entry - s.address < s.memory_size;
    if !segments.iter().any(inside) {
        return Err(KernelError::Malformed("its entry point is in none of its segments"));
    }
    Ok((entry, segments))
}

/// Puts one segment into memory; returns the range that is a mapping of the file now, if any.
fn map(file: &File, segment: &Segment, memory: &GuestMemory) -> Result<Option<(GuestAddress, u64)>, KernelError> {
    let &Segment { offset, address, file_size, memory_size } = segment;
    let outside = KernelError::OutsideMemory { start: address, size: memory_size };
    let end = address.checked_add(memory_size).filter(|_| address >= HIGH_MEMORY);
    if end.is_none() || !memory.check_range(GuestAddress(address), memory_size as usize) {
        return Err(outside);
    }
    if file_size == 0 {
        return Ok(None);
    }
    if !address.is_multiple_of(PAGE) || !offset.is_multiple_of(PAGE) {
        // Copied, for want of a page boundary: correct, and unknown among the kernels we build.
        let mut bytes = vec![0; file_size as usize];
        file.read_exact_at(&mut bytes, offset)?;
        memory.write_slice(&bytes, GuestAddress(address))?;
        return Ok(None);
    }
    let mapped = file_size.next_multiple_of(PAGE);
    if !memory.check_range(GuestAddress(address), mapped as usize) {
        return Err(outside);
    }
    let host = memory.get_host_address(GuestAddress(address))?;
    // SAFETY: the range was checked to lie in one mapping of guest memory, which is ours alone and outlives the machine;
    // replacing part of it by a private mapping of the same length and protection leaves it readable and writable.
    unsafe {
        mmap(
            host.cast(),
            mapped as usize,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
            file.as_fd(),
            offset,
        )
    }
    .map_err(io::Error::from)?;
    // What follows the segment in its last page is another part of the file; in memory it is zero.
    memory.write_slice(&vec![0; (mapped - file_size) as usize], GuestAddress(address + file_size))?;
    Ok(Some((GuestAddress(address), mapped)))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
