//! What is behind a block device: an open raw image or block device of the host.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{FallocateFlags, FileType, OFlags, SeekFrom};
use rustix::io::Errno;

use super::super::Buffers;

/// Bytes of a sector, the unit of the format whatever the block size (5.2.4).
pub const SECTOR: u64 = 512;

/// Bytes written at a time where the file cannot be zeroed otherwise.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Discards a range of a block device (`linux/fs.h`).
const BLKDISCARD: libc::c_ulong = 0x1277;
/// Logical block size in bytes.
const BLKSSZGET: libc::c_ulong = 0x1268;
/// Physical block size in bytes.
const BLKPBSZGET: libc::c_ulong = 0x127b;

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be examined.
    #[error("disk: {0}: {1}")]
    Host(&'static str, #[source] io::Error),
    /// A directory, a pipe or the like.
    #[error("disk: neither a regular file nor a block device")]
    Kind,
    /// Open for writing though the disk is read-only.
    #[error("disk: read-only, but its file is open for writing; open it read-only")]
    OpenForWriting,
    /// Not open for reading, or not for writing though the disk is writable.
    #[error("disk: its file is not open for reading and writing")]
    NotOpen,
    /// No sector, or part of one at the end.
    #[error("disk: {0} bytes are not whole sectors of 512 bytes, at least one")]
    Size(u64),
    /// The serial number is too long.
    #[error("disk: serial number {0:?} is longer than 20 bytes or not ASCII")]
    Serial(String),
}

/// The open file. Its size is what it was when opened.
#[derive(Debug)]
pub struct Disk {
    fd: OwnedFd,
    is_device: bool,
    bytes: u64,
    logical_block: u32,
    physical_block: u32,
}

impl Disk {
    /// The raw bytes of `fd` as a disk: no format is looked for in them.
    pub fn new(fd: OwnedFd, read_only: bool) -> Result<Self, DiskError> {
        let kind = rustix::fs::fstat(&fd).map_err(|e| DiskError::Host("stat", e.into()))?.st_mode;
        let is_device = match FileType::from_raw_mode(kind) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            _ => return Err(DiskError::Kind),
        };
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(|e| DiskError::Host("fcntl", e.into()))?;
        match (read_only, flags & OFlags::RWMODE) {
            (true, OFlags::RDONLY) | (false, OFlags::RDWR) if !flags.contains(OFlags::PATH) => {}
            (true, OFlags::RDWR | OFlags::WRONLY) => return Err(DiskError::OpenForWriting),
            _ => return Err(DiskError::NotOpen),
        }
        let bytes = rustix::fs::seek(&fd, SeekFrom::End(0)).map_err(|e| DiskError::Host("seek", e.into()))?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
            return Err(DiskError::Size(bytes));
        }
        let (logical_block, physical_block) =
            if is_device { (block_size(&fd, BLKSSZGET)?, block_size(&fd, BLKPBSZGET)?) } else { (SECTOR as u32, 4096) };
        Ok(Self { fd, is_device, bytes, logical_block, physical_block })
    }

    /// Bytes it has.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of the smallest unit of access, and of the smallest that needs no read before a write.
    pub fn block_sizes(&self) -> (u32, u32) {
        (self.logical_block, self.physical_block)
    }

    /// Where `bytes` bytes from a sector on begin, if they are whole sectors of the disk.
    pub fn range(&self, sector: u64, bytes: u64) -> Option<u64> {
        let start = sector.checked_mul(SECTOR)?;
        let end = start.checked_add(bytes)?;
        (bytes.is_multiple_of(SECTOR) && end <= self.bytes).then_some(start)
    }

    /// Reads until `data` is full; an error if the file has become shorter.
    pub fn read(&self, mut offset: u64, data: &mut Buffers<'_>) -> io::Result<()> {
        while !data.is_empty() {
            match data.fill_from(&self.fd, Some(offset))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => offset += count as u64,
            }
        }
        Ok(())
    }

    /// Writes all of `data`.
    pub fn write(&self, mut offset: u64, data: &mut Buffers<'_>) -> io::Result<()> {
        while !data.is_empty() {
            match data.drain_to(&self.fd, Some(offset))? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => offset += count as u64,
            }
        }
        Ok(())
    }

    /// Waits until what was written is on the medium.
    pub fn flush(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.fd)?)
    }

    /// Tells the host that the range is not needed; what it reads as is not said. `Unsupported` if the host does not care.
    pub fn discard(&self, start: u64, bytes: u64) -> io::Result<()> {
        if !self.is_device {
            return self.allocate(FallocateFlags::PUNCH_HOLE, start, bytes);
        }
        let range = [start, bytes];
        // SAFETY: BLKDISCARD reads two 64-bit numbers.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), BLKDISCARD as _, &range) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        Err(match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => io::ErrorKind::Unsupported.into(),
            _ => error,
        })
    }

    /// Makes the range read as zeros; with `unmap` its space may be given back.
    pub fn write_zeroes(&self, start: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        let flags = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match self.allocate(flags, start, bytes) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            result => return result,
        }
        let (mut offset, end) = (start, start + bytes);
        while offset < end {
            let count = (ZEROES.len() as u64).min(end - offset) as usize;
            match rustix::io::pwrite(&self.fd, &ZEROES[..count], offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => offset += count as u64,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn allocate(&self, flags: FallocateFlags, start: u64, bytes: u64) -> io::Result<()> {
        match rustix::fs::fallocate(&self.fd, flags | FallocateFlags::KEEP_SIZE, start, bytes) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => Err(io::ErrorKind::Unsupported.into()),
            Err(errno) => Err(errno.into()),
        }
    }
}

fn block_size(fd: &OwnedFd, request: libc::c_ulong) -> Result<u32, DiskError> {
    let mut size: libc::c_uint = 0;
    // SAFETY: both requests write one int.
    if unsafe { libc::ioctl(fd.as_raw_fd(), request as _, &mut size) } != 0 {
        return Err(DiskError::Host("block size", io::Error::last_os_error()));
    }
    Ok(size)
}
