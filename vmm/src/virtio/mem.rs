//! The memory device (5.15): memory that the guest plugs and unplugs in blocks as the host asks for.
//!
//! The region is one private anonymous mapping, part of guest memory from the start. A block that is not plugged can be
//! neither read nor written, by the guest or by anything here, so that a guest cannot use more than it was given; the driver
//! has to know that (`VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`).

use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_memory::{Address, ByteValued, GuestAddress, GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::{ActivateError, Activation, ActiveQueue, Broken, Device, DeviceState, Interrupt, Poll, Worker};
use crate::memory::SharedMemory;

/// Bytes of a block: what a huge page has, so that a plugged block can be one.
pub const BLOCK_SIZE: u64 = 2 << 20;

/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE` (5.15.3).
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Token of the request queue.
const REQUESTS: u64 = 0;

/// Why memory could not be made or resized.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// There is no region of guest memory at the address, or it is not made of whole, aligned blocks.
    #[error("memory device: no region of whole 2 MiB blocks at {0:#x}")]
    Region(u64),
    /// More asked for than the region has.
    #[error("memory device: {asked} bytes asked for, {most} at most")]
    TooMuch {
        /// Bytes asked for.
        asked: u64,
        /// Bytes of the region.
        most: u64,
    },
    /// The protection of the region could not be changed.
    #[error("memory device: mprotect: {0}")]
    Protect(#[source] io::Error),
}

/// virtio-mem.
pub struct Memory {
    shared: Arc<Shared>,
}

/// Resizes a memory device while it runs. Cloning shares it.
#[derive(Clone)]
pub struct MemoryHandle {
    shared: Arc<Shared>,
}

struct Shared {
    region: Region,
    state: Mutex<State>,
    settled: EventFd,
}

struct State {
    requested: u64,
    plugged: Blocks,
    /// While the device is active.
    config_interrupt: Option<Interrupt>,
}

impl Memory {
    /// The device of the guest memory region that starts at `start`, which must be a private anonymous mapping. Nothing of
    /// it is plugged. With `huge_pages` plugged blocks are to be backed by huge pages.
    pub fn new(memory: SharedMemory, start: GuestAddress, huge_pages: bool) -> Result<Self, MemoryError> {
        let region = Region::new(memory, start, huge_pages)?;
        region.protect(0, region.length, libc::PROT_NONE).map_err(MemoryError::Protect)?;
        let state = State { requested: 0, plugged: Blocks::new(region.length / BLOCK_SIZE), config_interrupt: None };
        let settled = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(MemoryError::Protect)?;
        Ok(Self { shared: Arc::new(Shared { region, state: Mutex::new(state), settled }) })
    }

    /// What resizes it.
    pub fn handle(&self) -> MemoryHandle {
        MemoryHandle { shared: self.shared.clone() }
    }
}

impl MemoryHandle {
    /// Asks the guest to have this many bytes of the region, rounded up to whole blocks. It is never given more.
    pub fn resize(&self, bytes: u64) -> Result<(), MemoryError> {
        let most = self.shared.region.length;
        let requested = bytes.checked_next_multiple_of(BLOCK_SIZE).filter(|bytes| *bytes <= most);
        let requested = requested.ok_or(MemoryError::TooMuch { asked: bytes, most })?;
        let mut state = self.shared.lock();
        state.requested = requested;
        if let Some(interrupt) = &state.config_interrupt {
            interrupt.trigger();
        }
        self.shared.tell_if_settled(&state);
        Ok(())
    }

    /// Bytes plugged now.
    pub fn plugged(&self) -> u64 {
        self.shared.lock().plugged.count * BLOCK_SIZE
    }

    /// Signalled each time that what is plugged has become what was asked for.
    pub fn settled(&self) -> &EventFd {
        &self.shared.settled
    }
}

/// The configuration space (5.15.4).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Config {
    block_size: u64,
    node_id: u16,
    padding: [u8; 6],
    addr: u64,
    region_size: u64,
    usable_region_size: u64,
    plugged_size: u64,
    requested_size: u64,
}

// SAFETY: plain integers without padding between them; the padding of the format is a field.
unsafe impl ByteValued for Config {}

impl Device for Memory {
    fn id(&self) -> u16 {
        virtio_bindings::virtio_ids::VIRTIO_ID_MEM as u16
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = self.shared.lock();
        let config = Config {
            block_size: BLOCK_SIZE.to_le(),
            addr: self.shared.region.start.raw_value().to_le(),
            region_size: self.shared.region.length.to_le(),
            usable_region_size: self.shared.region.length.to_le(),
            plugged_size: (state.plugged.count * BLOCK_SIZE).to_le(),
            requested_size: state.requested.to_le(),
            ..Config::default()
        };
        super::copy_config(config.as_slice(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        if activation.features & F_UNPLUGGED_INACCESSIBLE == 0 {
            return Err(ActivateError::FeatureMissing("VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE"));
        }
        let queue = activation.queue(0)?;
        self.shared.lock().config_interrupt = Some(activation.config_interrupt);
        Ok(Box::new(Requests { queue, shared: self.shared.clone() }))
    }

    /// The blocks stay as they are: what is in them belongs to the guest, driver or not (5.15.6).
    fn reset(&mut self) {
        self.shared.lock().config_interrupt = None;
    }

    fn save(&self) -> DeviceState {
        let state = self.shared.lock();
        let saved = SavedState { requested: state.requested, plugged: state.plugged.runs() };
        DeviceState(serde_json::to_vec(&saved).unwrap_or_default())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), ActivateError> {
        let saved: SavedState =
            serde_json::from_slice(&state.0).map_err(|e| ActivateError::State(format!("memory device: {e}")))?;
        let misfit = || ActivateError::State("memory device: does not fit its region".into());
        let region = &self.shared.region;
        if saved.requested > region.length || !saved.requested.is_multiple_of(BLOCK_SIZE) {
            return Err(misfit());
        }
        let mut plugged = Blocks::new(region.length / BLOCK_SIZE);
        for &(first, count) in &saved.plugged {
            let end = first.checked_add(count).filter(|end| *end <= plugged.total()).ok_or_else(misfit)?;
            plugged.set(first, end - first, true);
        }
        let host = |error| ActivateError::Host("mprotect of the memory device's region", error);
        region.protect(0, region.length, libc::PROT_NONE).map_err(host)?;
        for (first, count) in plugged.runs() {
            region.open(first * BLOCK_SIZE, count * BLOCK_SIZE).map_err(host)?;
        }
        let mut state = self.shared.lock();
        state.requested = saved.requested;
        state.plugged = plugged;
        Ok(())
    }
}

/// [`DeviceState`] of a memory device.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedState {
    /// Bytes asked for.
    requested: u64,
    /// Runs of plugged blocks: index of the first, and how many.
    plugged: Vec<(u64, u64)>,
}

/// A request (5.15.6.1): all kinds in one, those without a range leave it zero.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Request {
    kind: u16,
    padding: [u16; 3],
    addr: u64,
    nb_blocks: u16,
    padding2: [u16; 3],
}

// SAFETY: plain integers without padding between them.
unsafe impl ByteValued for Request {}

/// A response; the state is only there for a state request.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Response {
    kind: u16,
    padding: [u16; 3],
    state: u16,
}

// SAFETY: plain integers without padding between them.
unsafe impl ByteValued for Response {}

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

const STATE_PLUGGED: u16 = 0;
const STATE_UNPLUGGED: u16 = 1;
const STATE_MIXED: u16 = 2;

struct Requests {
    queue: ActiveQueue,
    shared: Arc<Shared>,
}

impl Worker for Requests {
    fn start(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(self.queue.kick(), REQUESTS, EventSet::IN)?;
        self.queue.kick_self();
        Ok(())
    }

    fn handle(&mut self, _token: u64, _events: EventSet, _poll: &Poll) -> Result<(), Broken> {
        let shared = &self.shared;
        self.queue.serve(|memory, chain| {
            let response = match chain.readable(memory).read_object::<Request>() {
                Some(request) => shared.carry_out(request),
                None => Response { kind: ERROR.to_le(), ..Response::default() },
            };
            chain.writable(memory).write_object(&response).ok_or(Broken::Request("no room for a response"))?;
            Ok(size_of::<Response>() as u32)
        })
    }

    fn queues(&self) -> Vec<Option<&ActiveQueue>> {
        vec![Some(&self.queue)]
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_if_settled(&self, state: &State) {
        if state.plugged.count * BLOCK_SIZE == state.requested {
            // Fails only when it has been signalled 2^64 times without being read.
            let _ = self.settled.write(1);
        }
    }

    fn carry_out(&self, request: Request) -> Response {
        let mut state = self.lock();
        let mut block_state = 0;
        let kind = match u16::from_le(request.kind) {
            PLUG => self.blocks(&request).map_or(ERROR, |(first, count)| self.plug(&mut state, first, count)),
            UNPLUG => self.blocks(&request).map_or(ERROR, |(first, count)| self.unplug(&mut state, first, count)),
            UNPLUG_ALL => self.unplug_all(&mut state),
            STATE => match self.blocks(&request) {
                Some((first, count)) => {
                    block_state = match state.plugged.plugged_among(first, count) {
                        0 => STATE_UNPLUGGED,
                        plugged if plugged == count => STATE_PLUGGED,
                        _ => STATE_MIXED,
                    };
                    ACK
                }
                None => ERROR,
            },
            _ => ERROR,
        };
        Response { kind: kind.to_le(), state: block_state.to_le(), ..Response::default() }
    }

    /// The blocks a request names, as index and count: at least one, all in the region.
    fn blocks(&self, request: &Request) -> Option<(u64, u64)> {
        let offset = u64::from_le(request.addr).checked_sub(self.region.start.raw_value())?;
        let count = u64::from(u16::from_le(request.nb_blocks));
        let first = offset / BLOCK_SIZE;
        let valid = offset.is_multiple_of(BLOCK_SIZE)
            && count > 0
            && first.checked_add(count).is_some_and(|end| end <= self.region.length / BLOCK_SIZE);
        valid.then_some((first, count))
    }

    fn plug(&self, state: &mut State, first: u64, count: u64) -> u16 {
        if state.plugged.plugged_among(first, count) > 0 {
            return ERROR;
        }
        // All three are bounded by the size of the region.
        if (state.plugged.count + count) * BLOCK_SIZE > state.requested {
            return NACK;
        }
        if self.region.open(first * BLOCK_SIZE, count * BLOCK_SIZE).is_err() {
            // Some of it may be open by now; what is not plugged must not be.
            let _ = self.region.close(first * BLOCK_SIZE, count * BLOCK_SIZE);
            return BUSY;
        }
        state.plugged.set(first, count, true);
        self.tell_if_settled(state);
        ACK
    }

    fn unplug(&self, state: &mut State, first: u64, count: u64) -> u16 {
        if state.plugged.plugged_among(first, count) < count {
            return ERROR;
        }
        if self.region.close(first * BLOCK_SIZE, count * BLOCK_SIZE).is_err() {
            return BUSY;
        }
        state.plugged.set(first, count, false);
        self.tell_if_settled(state);
        ACK
    }

    fn unplug_all(&self, state: &mut State) -> u16 {
        if self.region.close(0, self.region.length).is_err() {
            return BUSY;
        }
        state.plugged = Blocks::new(state.plugged.total());
        self.tell_if_settled(state);
        ACK
    }
}

/// Guest memory from `start` on, of which the device decides what can be accessed.
struct Region {
    start: GuestAddress,
    length: u64,
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
    fn new(memory: SharedMemory, start: GuestAddress, huge_pages: bool) -> Result<Self, MemoryError> {
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
    fn open(&self, offset: u64, length: u64) -> io::Result<()> {
        self.protect(offset, length, libc::PROT_READ | libc::PROT_WRITE)?;
        if self.huge_pages {
            // A kernel without them says no; the memory is as good.
            let _ = self.advise(offset, length, libc::MADV_HUGEPAGE);
        }
        Ok(())
    }

    /// Makes a range inaccessible, then gives back what was in it, so that nothing can come in between.
    fn close(&self, offset: u64, length: u64) -> io::Result<()> {
        self.protect(offset, length, libc::PROT_NONE)?;
        self.advise(offset, length, libc::MADV_DONTNEED)
    }

    fn protect(&self, offset: u64, length: u64, protection: libc::c_int) -> io::Result<()> {
        debug_assert!(offset + length <= self.length);
        // SAFETY: callers pass ranges inside the region, which is mapped; no Rust reference points into guest memory.
        let result =
            unsafe { libc::mprotect(self.host.as_ptr().add(offset as usize).cast(), length as usize, protection) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn advise(&self, offset: u64, length: u64, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: callers pass ranges inside the region, which is mapped; no Rust reference points into guest memory.
        let result = unsafe { libc::madvise(self.host.as_ptr().add(offset as usize).cast(), length as usize, advice) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Which blocks are plugged.
struct Blocks {
    plugged: Vec<bool>,
    count: u64,
}

impl Blocks {
    fn new(total: u64) -> Self {
        Self { plugged: vec![false; total as usize], count: 0 }
    }

    fn total(&self) -> u64 {
        self.plugged.len() as u64
    }

    fn plugged_among(&self, first: u64, count: u64) -> u64 {
        self.plugged[first as usize..(first + count) as usize].iter().filter(|plugged| **plugged).count() as u64
    }

    fn set(&mut self, first: u64, count: u64, plugged: bool) {
        let before = self.plugged_among(first, count);
        self.plugged[first as usize..(first + count) as usize].fill(plugged);
        self.count = self.count - before + if plugged { count } else { 0 };
    }

    fn runs(&self) -> Vec<(u64, u64)> {
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestMemoryRegion};

    use super::super::test_driver::{Driven, Part, drive_in, drive_with};
    use super::*;
    use crate::memory::GuestMemory;

    const START: u64 = 1 << 32;
    const BLOCKS: u64 = 16;

    /// 64 MiB for the rings, and the region of the device.
    fn memory() -> SharedMemory {
        let ranges = [(GuestAddress(0), 64 << 20), (GuestAddress(START), (BLOCKS * BLOCK_SIZE) as usize)];
        Arc::new(GuestMemory::from_ranges(&ranges).unwrap())
    }

    struct Guest {
        device: Memory,
        driven: Driven,
        memory: SharedMemory,
    }

    impl Guest {
        fn new() -> Self {
            let memory = memory();
            let mut device = Memory::new(memory.clone(), GuestAddress(START), true).unwrap();
            let driven = drive_in(&mut device, F_UNPLUGGED_INACCESSIBLE, true, memory.clone());
            Self { device, driven, memory }
        }

        fn ask(&mut self, kind: u16, addr: u64, nb_blocks: u16) -> (u16, u16) {
            let request = Request { kind, addr, nb_blocks, ..Request::default() };
            let (length, answer) =
                self.driven.rings[0].request(&[Part::Out(request.as_slice().into()), Part::In(size_of::<Response>())]);
            assert_eq!(length, 10);
            (u16::from_le_bytes([answer[0], answer[1]]), u16::from_le_bytes([answer[8], answer[9]]))
        }

        /// Whether the kernel can read the block for us; a fault here would end the test.
        fn accessible(&self, block: u64) -> bool {
            let region = self.memory.find_region(GuestAddress(START)).unwrap();
            let host = region.get_host_address(MemoryRegionAddress(block * BLOCK_SIZE)).unwrap();
            let (_reader, writer) = std::io::pipe().unwrap();
            // SAFETY: the kernel checks the access.
            let result = unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&writer), host.cast(), 1) };
            result == 1
        }
    }

    fn at(block: u64) -> u64 {
        START + block * BLOCK_SIZE
    }

    fn config(device: &Memory) -> Config {
        let mut bytes = [0; size_of::<Config>()];
        device.read_config(0, &mut bytes);
        *Config::from_slice(&bytes).unwrap()
    }

    #[test]
    fn what_was_asked_for_is_plugged_and_never_more() {
        let mut guest = Guest::new();
        assert_eq!(guest.ask(PLUG, at(0), 1).0, NACK);
        guest.device.handle().resize(2 * BLOCK_SIZE - 5).unwrap();
        guest.driven.wait_config();
        let seen = config(&guest.device);
        assert_eq!(
            (seen.requested_size, seen.plugged_size, seen.region_size),
            (2 * BLOCK_SIZE, 0, BLOCKS * BLOCK_SIZE)
        );
        assert_eq!((seen.addr, seen.block_size, seen.usable_region_size), (START, BLOCK_SIZE, BLOCKS * BLOCK_SIZE));
        assert_eq!(guest.ask(PLUG, at(3), 3).0, NACK);
        assert!(guest.device.handle().settled().read().is_err());
        assert_eq!(guest.ask(PLUG, at(3), 2).0, ACK);
        assert_eq!(guest.device.handle().settled().read().unwrap(), 1);
        assert_eq!(guest.ask(PLUG, at(5), 1).0, NACK);
        assert_eq!(guest.ask(PLUG, at(4), 1).0, ERROR);
        assert_eq!(guest.device.handle().plugged(), 2 * BLOCK_SIZE);
        let accessible: Vec<_> = (0..BLOCKS).filter(|block| guest.accessible(*block)).collect();
        assert_eq!(accessible, [3, 4]);
        assert_eq!(guest.ask(STATE, at(3), 2), (ACK, STATE_PLUGGED));
        assert_eq!(guest.ask(STATE, at(4), 2), (ACK, STATE_MIXED));
        assert_eq!(guest.ask(STATE, at(5), 2), (ACK, STATE_UNPLUGGED));
        assert!(matches!(guest.device.handle().resize(BLOCKS * BLOCK_SIZE + 1), Err(MemoryError::TooMuch { .. })));
        assert!(guest.device.handle().resize(u64::MAX).is_err());
    }

    #[test]
    fn an_unplugged_block_is_inaccessible_and_zero_when_plugged_again() {
        let mut guest = Guest::new();
        guest.device.handle().resize(4 * BLOCK_SIZE).unwrap();
        assert_eq!(guest.ask(PLUG, at(0), 4).0, ACK);
        guest.memory.write_obj(0xaau8, GuestAddress(at(1) + 77)).unwrap();
        guest.memory.write_obj(0xbbu8, GuestAddress(at(2) + 77)).unwrap();
        assert_eq!(guest.ask(UNPLUG, at(1), 1).0, ACK);
        assert!(!guest.accessible(1) && guest.accessible(2));
        assert_eq!(guest.ask(UNPLUG, at(0), 2).0, ERROR);
        assert_eq!(guest.ask(PLUG, at(1), 1).0, ACK);
        assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(at(1) + 77)).unwrap(), 0);
        assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(at(2) + 77)).unwrap(), 0xbb);
        assert_eq!(guest.ask(UNPLUG_ALL, 0, 0).0, ACK);
        assert!((0..BLOCKS).all(|block| !guest.accessible(block)));
        assert_eq!(config(&guest.device).plugged_size, 0);
    }

    #[test]
    fn ranges_that_are_no_blocks_of_the_region_are_refused() {
        let mut guest = Guest::new();
        guest.device.handle().resize(BLOCKS * BLOCK_SIZE).unwrap();
        for (addr, count) in [
            (at(0), 0),
            (at(0) + 4096, 1),
            (at(0) - BLOCK_SIZE, 1),
            (0, 1),
            (at(BLOCKS), 1),
            (at(BLOCKS - 1), 2),
            (at(0), u16::MAX),
            (u64::MAX - BLOCK_SIZE + 1, 1),
        ] {
            for kind in [PLUG, UNPLUG, STATE] {
                assert_eq!(guest.ask(kind, addr, count).0, ERROR, "{kind} {addr:#x} {count}");
            }
        }
        assert_eq!(guest.ask(4, at(0), 1).0, ERROR);
        let (length, answer) = guest.driven.rings[0].request(&[Part::Out(vec![0; 5]), Part::In(10)]);
        assert_eq!((length, answer[0]), (10, ERROR as u8));
        assert_eq!(guest.device.handle().plugged(), 0);
        let ring = &mut guest.driven.rings[0];
        ring.offer(&[Part::Out(vec![0; 24]), Part::In(9)]);
        ring.kick();
        assert!(matches!(guest.driven.broken(), Broken::Request(_)));
    }

    #[test]
    fn the_saved_state_puts_the_blocks_back() {
        let mut guest = Guest::new();
        guest.device.handle().resize(5 * BLOCK_SIZE).unwrap();
        assert_eq!(guest.ask(PLUG, at(1), 2).0, ACK);
        assert_eq!(guest.ask(PLUG, at(15), 1).0, ACK);
        let state = guest.device.save();
        assert_eq!(String::from_utf8_lossy(&state.0), r#"{"requested":10485760,"plugged":[[1,2],[15,1]]}"#);

        let mut other = Guest::new();
        other.device.restore(&state).unwrap();
        assert_eq!(other.device.save(), state);
        assert_eq!((0..BLOCKS).filter(|block| other.accessible(*block)).collect::<Vec<_>>(), [1, 2, 15]);
        assert_eq!(other.ask(PLUG, at(4), 2).0, ACK);
        for misfit in [
            "",
            "{}",
            r#"{"requested":1,"plugged":[]}"#,
            r#"{"requested":0,"plugged":[[16,1]]}"#,
            r#"{"requested":0,"plugged":[[18446744073709551615,2]]}"#,
        ] {
            assert!(other.device.restore(&DeviceState(misfit.into())).is_err(), "{misfit}");
        }
    }

    #[test]
    fn a_driver_that_may_touch_unplugged_memory_is_refused() {
        let memory = memory();
        let mut device = Memory::new(memory.clone(), GuestAddress(START), false).unwrap();
        let activation = Activation {
            memory,
            features: 0,
            queues: vec![None],
            config_interrupt: Interrupt::new(EventFd::new(0).unwrap()),
        };
        assert!(matches!(device.activate(activation), Err(ActivateError::FeatureMissing(_))));
    }

    #[test]
    fn a_region_must_be_whole_blocks() {
        assert!(Memory::new(memory(), GuestAddress(START + BLOCK_SIZE), false).is_err());
        assert!(Memory::new(memory(), GuestAddress(1 << 40), false).is_err());
        let odd = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), (BLOCK_SIZE + 4096) as usize)]).unwrap());
        assert!(Memory::new(odd, GuestAddress(0), false).is_err());
        // The features of the driver do not matter to a device without memory of its own.
        let memory = memory();
        let mut device = Memory::new(memory, GuestAddress(START), false).unwrap();
        drop(drive_with(&mut device, F_UNPLUGGED_INACCESSIBLE, false));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn whatever_the_guest_asks_for_accessible_is_what_is_plugged(
            requests in prop::collection::vec((0u16..4, 0u64..BLOCKS + 1, 0u16..5), 1..40),
            requested in 0..=BLOCKS,
        ) {
            let mut guest = Guest::new();
            guest.device.handle().resize(requested * BLOCK_SIZE).unwrap();
            for (kind, block, count) in requests {
                guest.ask(kind, at(block), count);
                prop_assert!(guest.device.handle().plugged() <= requested * BLOCK_SIZE);
            }
            let accessible = (0..BLOCKS).filter(|block| guest.accessible(*block)).count() as u64;
            prop_assert_eq!(accessible * BLOCK_SIZE, guest.device.handle().plugged());
        }
    }
}
