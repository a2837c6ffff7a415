//! The memory device (5.15): memory that the guest plugs and unplugs in blocks as the host asks for.
//!
//! The region is one private anonymous mapping, part of guest memory from the start. A block that is not plugged can be
//! neither read nor written, by the guest or by anything here, so that a guest cannot use more than it was given; the driver
//! has to know that (`VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`).
//!
//! A block that is plugged is not yet the kernel's to use: the driver gives it to the kernel after the device has answered, and says
//! nothing then. But it does all in one work item: it reads the configuration, then plugs, then gives the kernel what it plugged. So
//! the device says once more that the configuration has changed when the last block is plugged, and the read which that makes comes
//! when the kernel has them all: they are *taken*.

mod region;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_memory::{Address, ByteValued, GuestAddress};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::{ActivateError, Activation, ActiveQueue, Broken, Device, DeviceState, Interrupt, Poll, Worker};
use crate::memory::SharedMemory;
use region::{Blocks, Region};

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
    taken: EventFd,
}

struct State {
    requested: u64,
    plugged: Blocks,
    progress: Progress,
    /// The driver was interrupted when all was plugged: once for each size. A driver whose kernel cannot take a block gives it back
    /// and waits before it asks again; by one interrupt more each time it would do both for ever.
    nudged: bool,
    /// While the device is active.
    config_interrupt: Option<Interrupt>,
}

/// How far the guest is with the memory it was last asked to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// Less is plugged.
    Plugging,
    /// It is plugged, or more; the driver may still have to give some of it to the kernel, or be about to unplug down to what was
    /// asked for before.
    Plugged,
    /// The kernel has it, or more.
    Taken,
}

impl Memory {
    /// The device of the guest memory region that starts at `start`, which must be a private anonymous mapping. Nothing of
    /// it is plugged. With `huge_pages` plugged blocks are to be backed by huge pages.
    pub fn new(memory: SharedMemory, start: GuestAddress, huge_pages: bool) -> Result<Self, MemoryError> {
        let region = Region::new(memory, start, huge_pages)?;
        region.protect(0, region.length, libc::PROT_NONE).map_err(MemoryError::Protect)?;
        let state = State {
            requested: 0,
            plugged: Blocks::new(region.length / BLOCK_SIZE),
            progress: Progress::Taken,
            nudged: false,
            config_interrupt: None,
        };
        let taken = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(MemoryError::Protect)?;
        Ok(Self { shared: Arc::new(Shared { region, state: Mutex::new(state), taken }) })
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
        let less = requested <= std::mem::replace(&mut state.requested, requested);
        state.nudged = false;
        state.progress = match state.progress {
            _ if state.plugged.bytes() < requested => Progress::Plugging,
            Progress::Taken if less => Progress::Taken,
            // Nothing needs no driver.
            _ if requested == 0 => self.shared.tell_taken(),
            // More than before, and there already: what was to go is still going.
            _ => Progress::Plugged,
        };
        if let Some(interrupt) = &state.config_interrupt {
            interrupt.trigger();
        }
        Ok(())
    }

    /// Bytes plugged now.
    pub fn plugged(&self) -> u64 {
        self.shared.lock().plugged.bytes()
    }

    /// Whether the guest's kernel has what was asked for last, or more. Memory that is less goes at the guest's pace.
    pub fn is_taken(&self) -> bool {
        self.shared.lock().progress == Progress::Taken
    }

    /// Signalled each time that [`Self::is_taken`] becomes true.
    pub fn taken(&self) -> &EventFd {
        &self.shared.taken
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
        let mut state = self.shared.lock();
        // A driver that is only beginning has given the kernel nothing.
        if state.progress == Progress::Plugged && state.config_interrupt.is_some() {
            state.progress = self.shared.tell_taken();
        }
        let config = Config {
            block_size: BLOCK_SIZE.to_le(),
            addr: self.shared.region.start.raw_value().to_le(),
            region_size: self.shared.region.length.to_le(),
            usable_region_size: self.shared.region.length.to_le(),
            plugged_size: state.plugged.bytes().to_le(),
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
        let mut state = self.shared.lock();
        state.config_interrupt = None;
        if state.progress == Progress::Taken && state.requested > 0 {
            state.progress = Progress::Plugged;
        }
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
        state.progress = if plugged.bytes() < saved.requested { Progress::Plugging } else { Progress::Taken };
        state.nudged = false;
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

    fn tell_taken(&self) -> Progress {
        // Fails only when it has been signalled 2^64 times without being read.
        let _ = self.taken.write(1);
        Progress::Taken
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
        if state.plugged.bytes() + count * BLOCK_SIZE > state.requested {
            return NACK;
        }
        if self.region.open(first * BLOCK_SIZE, count * BLOCK_SIZE).is_err() {
            // Some of it may be open by now; what is not plugged must not be.
            let _ = self.region.close(first * BLOCK_SIZE, count * BLOCK_SIZE);
            return BUSY;
        }
        state.plugged.set(first, count, true);
        if state.plugged.bytes() == state.requested {
            state.progress = Progress::Plugged;
            if let (Some(interrupt), false) = (&state.config_interrupt, state.nudged) {
                interrupt.trigger();
                state.nudged = true;
            }
        }
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
        state.unplugged();
        ACK
    }

    fn unplug_all(&self, state: &mut State) -> u16 {
        if self.region.close(0, self.region.length).is_err() {
            return BUSY;
        }
        state.plugged = Blocks::new(state.plugged.total());
        state.unplugged();
        ACK
    }
}

impl State {
    fn unplugged(&mut self) {
        if self.plugged.bytes() < self.requested {
            self.progress = Progress::Plugging;
        }
    }
}

#[cfg(test)]
mod tests;
