//! The guest kernel, an uncompressed ELF file, read into guest memory.
//!
//! Read, not mapped: the kernel rewrites three quarters of its text as it boots (mitigations are on), so that mapping the
//! file saves little memory, and costs a fault or more for each page of it. Read into huge pages it boots in 0.6 of the time.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestAddress, GuestMemory as _};

use crate::arch::layout::HIGH_MEMORY;
use crate::memory::GuestMemory;

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
    /// The file cannot be read.
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

/// Reads the kernel into `memory`, which is zero where it goes, and returns its entry point.
pub fn load(file: &File, memory: &GuestMemory) -> Result<u64, KernelError> {
    let length = file.metadata()?.len();
    let (entry, segments) = read_headers(file, length)?;
    for segment in &segments {
        read(file, segment, memory)?;
    }
    Ok(entry)
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

fn read(file: &File, segment: &Segment, memory: &GuestMemory) -> Result<(), KernelError> {
    let &Segment { mut offset, address, file_size, memory_size } = segment;
    let end = address.checked_add(memory_size).filter(|_| address >= HIGH_MEMORY);
    if end.is_none() || !memory.check_range(GuestAddress(address), memory_size as usize) {
        return Err(KernelError::OutsideMemory { start: address, size: memory_size });
    }
    for slice in memory.get_slices(GuestAddress(address), file_size as usize) {
        let mut rest = slice?;
        while !rest.is_empty() {
            let guard = rest.ptr_guard_mut();
            // SAFETY: the slice is mapped guest memory that no vCPU runs on yet; the kernel writes at most its length.
            let count =
                unsafe { libc::pread(file.as_raw_fd(), guard.as_ptr().cast(), guard.len(), offset as libc::off_t) };
            match usize::try_from(count) {
                Ok(0) => return Err(KernelError::Malformed("it was cut short while it was read")),
                Ok(count) => {
                    offset += count as u64;
                    rest = rest.offset(count).map_err(vm_memory::GuestMemoryError::from)?;
                }
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error.into()),
                },
            }
        }
    }
    Ok(())
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
