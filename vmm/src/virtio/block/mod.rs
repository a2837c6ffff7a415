//! The block device (5.2): a raw image or a block device of the host as a disk. Requests are carried out in order, by the
//! device's thread, straight between the file and guest memory.

pub mod disk;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vm_memory::ByteValued;
use vmm_sys_util::epoll::EventSet;

use super::{ActivateError, Activation, ActiveQueue, Broken, Buffers, Chain, Device, Poll, Worker};
use crate::jail::Kind;
use crate::memory::GuestMemory;
use disk::{Disk, DiskError, SECTOR};

/// Feature bits (5.2.3).
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const QUEUE_SIZE: u16 = 256;

/// Bytes of a serial number (5.2.6).
const SERIAL_SIZE: usize = 20;

/// Most sectors and segments of one discard request: 2 GiB in all but the oddest case.
const MAX_DISCARD_SECTORS: u32 = 1 << 22;
const MAX_DISCARD_SEGMENTS: u32 = 16;
/// Most sectors and segments to zero at a time: 32 MiB, which may have to be written.
const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 16;
const MAX_WRITE_ZEROES_SEGMENTS: u32 = 1;

/// Token of the request queue.
const REQUESTS: u64 = 0;

/// virtio-blk.
pub struct Block {
    backing: Arc<Backing>,
}

struct Backing {
    disk: Disk,
    read_only: bool,
    serial: [u8; SERIAL_SIZE],
}

impl Block {
    /// A disk of the bytes of `fd`, which is open for reading if the disk is read-only, else for reading and writing.
    /// `serial` is at most 20 bytes of ASCII.
    pub fn new(fd: OwnedFd, read_only: bool, serial: &str) -> Result<Self, DiskError> {
        if serial.len() > SERIAL_SIZE || !serial.is_ascii() {
            return Err(DiskError::Serial(serial.into()));
        }
        let mut padded = [0; SERIAL_SIZE];
        padded[..serial.len()].copy_from_slice(serial.as_bytes());
        let disk = Disk::new(fd, read_only)?;
        Ok(Self { backing: Arc::new(Backing { disk, read_only, serial: padded }) })
    }
}

/// The configuration space (5.2.4) up to what is offered; numbers are little-endian.
#[repr(C, packed)]
#[derive(Clone, Copy, Default)]
struct Config {
    capacity: u64,
    size_max: u32,
    seg_max: u32,
    geometry: [u8; 4],
    blk_size: u32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: u16,
    opt_io_size: u32,
    writeback: u8,
    unused0: u8,
    num_queues: u16,
    max_discard_sectors: u32,
    max_discard_seg: u32,
    discard_sector_alignment: u32,
    max_write_zeroes_sectors: u32,
    max_write_zeroes_seg: u32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

// SAFETY: plain integers, packed.
unsafe impl ByteValued for Config {}

impl Device for Block {
    fn id(&self) -> u16 {
        virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK as u16
    }

    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn features(&self) -> u64 {
        let always = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_FLUSH;
        always | if self.backing.read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES }
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let disk = &self.backing.disk;
        let (logical, physical) = disk.block_sizes();
        let blocks = (physical / logical.max(1)).max(1);
        let config = Config {
            capacity: (disk.bytes() / SECTOR).to_le(),
            // The header and the status take a descriptor each.
            seg_max: u32::from(QUEUE_SIZE - 2).to_le(),
            blk_size: logical.to_le(),
            physical_block_exp: blocks.ilog2() as u8,
            min_io_size: (blocks as u16).to_le(),
            max_discard_sectors: MAX_DISCARD_SECTORS.to_le(),
            max_discard_seg: MAX_DISCARD_SEGMENTS.to_le(),
            discard_sector_alignment: (physical / SECTOR as u32).to_le(),
            max_write_zeroes_sectors: MAX_WRITE_ZEROES_SECTORS.to_le(),
            max_write_zeroes_seg: MAX_WRITE_ZEROES_SEGMENTS.to_le(),
            write_zeroes_may_unmap: 1,
            ..Config::default()
        };
        super::copy_config(config.as_slice(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        // A driver that does not know of flushes takes what was written for written (5.2.6.2).
        let write_through = activation.features & F_FLUSH == 0;
        Ok(Box::new(Requests { queue: activation.queue(0)?, backing: self.backing.clone(), write_through }))
    }
}

/// Header of a request (5.2.6).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

// SAFETY: plain integers without padding between them.
unsafe impl ByteValued for Header {}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// One range of a discard or write zeroes request.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Segment {
    sector: u64,
    num_sectors: u32,
    flags: u32,
}

// SAFETY: plain integers without padding between them.
unsafe impl ByteValued for Segment {}

/// Flag of a segment to zero: its space may be given back.
const UNMAP: u32 = 1;

/// `VIRTIO_BLK_S_OK`.
const STATUS_OK: u8 = 0;

/// Why a request was not carried out, as the status byte says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Failure {
    Io = 1,
    Unsupported = 2,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::Unsupported { Self::Unsupported } else { Self::Io }
    }
}

struct Requests {
    queue: ActiveQueue,
    backing: Arc<Backing>,
    write_through: bool,
}

impl Worker for Requests {
    fn start(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(self.queue.kick(), REQUESTS, EventSet::IN)?;
        self.queue.kick_self();
        Ok(())
    }

    fn handle(&mut self, _token: u64, _events: EventSet, _poll: &Poll) -> Result<(), Broken> {
        let Self { queue, backing, write_through } = self;
        queue.serve(|memory, chain| backing.carry_out(memory, chain, *write_through))
    }

    fn queues(&self) -> Vec<Option<&ActiveQueue>> {
        vec![Some(&self.queue)]
    }
}

impl Backing {
    /// Carries a request out and writes its status, which is the last byte of the writable part; returns how many bytes of
    /// it were written from the front on.
    fn carry_out(&self, memory: &GuestMemory, chain: &Chain, write_through: bool) -> Result<u32, Broken> {
        let mut readable = chain.readable(memory);
        let mut writable = chain.writable(memory);
        let room = writable.len().checked_sub(1).ok_or(Broken::Request("no room for a status"))?;
        let mut status = writable.split_off(room);
        let result = match readable.read_object::<Header>() {
            Some(header) => self.dispatch(header, &mut readable, &mut writable, write_through),
            None => Err(Failure::Io),
        };
        let written = room - writable.len();
        status.write(&[result.map_or_else(|failure| failure as u8, |()| STATUS_OK)]);
        // The length counts from the front, so the status is only in it if all before it is.
        Ok(if written == room { written + 1 } else { written } as u32)
    }

    fn dispatch(
        &self,
        header: Header,
        readable: &mut Buffers<'_>,
        writable: &mut Buffers<'_>,
        write_through: bool,
    ) -> Result<(), Failure> {
        let sector = u64::from_le(header.sector);
        let kind = u32::from_le(header.kind);
        match kind {
            IN => {
                let start = self.disk.range(sector, writable.len() as u64).ok_or(Failure::Io)?;
                self.disk.read(start, writable)?;
            }
            FLUSH => self.disk.flush()?,
            GET_ID => {
                writable.write(&self.serial);
            }
            // A driver that ignores VIRTIO_BLK_F_RO (5.2.6.2).
            OUT | DISCARD | WRITE_ZEROES if self.read_only => return Err(Failure::Io),
            OUT => {
                let start = self.disk.range(sector, readable.len() as u64).ok_or(Failure::Io)?;
                self.disk.write(start, readable)?;
            }
            DISCARD => {
                for (start, bytes, flags) in self.segments(readable, MAX_DISCARD_SEGMENTS, MAX_DISCARD_SECTORS)? {
                    if flags != 0 {
                        return Err(Failure::Unsupported);
                    }
                    self.disk.discard(start, bytes)?;
                }
            }
            WRITE_ZEROES => {
                for (start, bytes, flags) in
                    self.segments(readable, MAX_WRITE_ZEROES_SEGMENTS, MAX_WRITE_ZEROES_SECTORS)?
                {
                    if flags & !UNMAP != 0 {
                        return Err(Failure::Unsupported);
                    }
                    self.disk.write_zeroes(start, bytes, flags & UNMAP != 0)?;
                }
            }
            _ => return Err(Failure::Unsupported),
        }
        if write_through && matches!(kind, OUT | WRITE_ZEROES) {
            self.disk.flush()?;
        }
        Ok(())
    }

    /// The ranges of a request, as start, bytes and flags; all of them lie on the disk and are not empty.
    fn segments(
        &self,
        readable: &mut Buffers<'_>,
        most: u32,
        most_sectors: u32,
    ) -> Result<Vec<(u64, u64, u32)>, Failure> {
        let count = readable.len() / size_of::<Segment>();
        if count == 0 || count > most as usize || !readable.len().is_multiple_of(size_of::<Segment>()) {
            return Err(Failure::Io);
        }
        let mut segments = Vec::with_capacity(count);
        while let Some(segment) = readable.read_object::<Segment>() {
            let sectors = u32::from_le(segment.num_sectors);
            let bytes = u64::from(sectors) * SECTOR;
            let start = self.disk.range(u64::from_le(segment.sector), bytes).ok_or(Failure::Io)?;
            if sectors == 0 || sectors > most_sectors {
                return Err(Failure::Io);
            }
            segments.push((start, bytes, u32::from_le(segment.flags)));
        }
        Ok(segments)
    }
}

#[cfg(test)]
mod tests;
