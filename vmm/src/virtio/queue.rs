//! A virtqueue that runs: the split ring of section 2.7, after the driver has set it up for good.

use std::collections::VecDeque;
use std::num::Wrapping;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};
use vmm_sys_util::eventfd::EventFd;

use super::{Buffers, Interrupt};
use crate::memory::{GuestMemory, SharedMemory};

/// Bytes before the elements of either ring, and of an element of each (2.7.6, 2.7.8).
const AVAIL_HEADER: u64 = 4;
const AVAIL_ELEMENT: u64 = 2;
const USED_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (2.7.6).
const AVAIL_NO_INTERRUPT: u16 = 1;

/// The driver broke the rules of the ring; its device stops.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The available index is ahead by more than the queue holds, or the ring cannot be read.
    #[error("available ring: {0}")]
    Ring(virtio_queue::Error),
    /// A chain is longer than the queue, loops, or points outside memory.
    #[error("descriptor chain {head}: {what}")]
    Chain {
        /// Index of its first descriptor.
        head: u16,
        /// What is wrong.
        what: &'static str,
    },
    /// What the chain carries is not what the device understands.
    #[error("request: {0}")]
    Request(&'static str),
    /// The driver's setup cannot be used.
    #[error("{0}")]
    Activate(super::ActivateError),
    /// The host refused something that the device cannot go on without.
    #[error("{0}: {1}")]
    Host(&'static str, #[source] std::io::Error),
}

/// A queue between `DRIVER_OK` and reset. Nothing that the driver writes to registers reaches it any more.
pub struct ActiveQueue {
    queue: Queue,
    memory: SharedMemory,
    kick: EventFd,
    interrupt: Interrupt,
    /// How far the driver was interrupted for what was completed.
    notified: Wrapping<u16>,
}

impl ActiveQueue {
    /// Takes over a queue that [`QueueT::is_valid`] holds for. `kick` is signalled when the driver notifies.
    pub fn new(queue: Queue, memory: SharedMemory, kick: EventFd, interrupt: Interrupt) -> Self {
        let notified = Wrapping(queue.state().next_used);
        Self { queue, memory, kick, interrupt, notified }
    }

    /// Signalled when the driver has made chains available; non-blocking.
    pub fn kick(&self) -> RawFd {
        self.kick.as_raw_fd()
    }

    /// Clears the kick. Call it before looking for chains.
    pub fn clear_kick(&self) {
        let _ = self.kick.read();
    }

    /// Signals the queue's own kick, so that its worker looks at it (again).
    pub fn kick_self(&self) {
        let _ = self.kick.write(1);
    }

    /// Guest memory, to make a chain's buffers of.
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// The next chain, checked whole: it ends, is no longer than the queue, lies in guest memory, has its readable part
    /// before its writable one (2.7.4.2), and less than 4 GiB of each.
    pub fn pop(&mut self) -> Result<Option<Chain>, Broken> {
        let chain = match self.queue.iter(&*self.memory) {
            Ok(mut chains) => chains.next(),
            Err(error) => return Err(Broken::Ring(error)),
        };
        chain.map(|chain| Chain::check(chain, &self.memory)).transpose()
    }

    /// The driver has made chains available that were not popped yet.
    pub fn has_available(&self) -> bool {
        self.queue.avail_idx(&*self.memory, Ordering::Acquire).is_ok_and(|index| index.0 != self.queue.next_avail())
    }

    /// Puts the chain last popped back, so that it is the next one again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back, `written` bytes having been written to its writable part.
    pub fn complete(&mut self, chain: &Chain, written: u32) -> Result<(), Broken> {
        self.queue.add_used(&*self.memory, chain.head, written).map_err(Broken::Ring)
    }

    /// Gives chains back that belong together, so that the driver sees all of them or none: the index of the used ring moves
    /// once, after the last (2.7.8).
    pub fn complete_all(&mut self, chains: &[(Chain, u32)]) -> Result<(), Broken> {
        let Some(((last, written), others)) = chains.split_last() else { return Ok(()) };
        let QueueState { next_used, used_ring, size, .. } = self.queue.state();
        for (index, (chain, written)) in others.iter().enumerate() {
            let slot = next_used.wrapping_add(index as u16) % size;
            let element = (u64::from(chain.head) | u64::from(*written) << 32).to_le();
            let address = GuestAddress(used_ring + USED_HEADER + u64::from(slot) * USED_ELEMENT);
            self.memory.write_obj(element, address).map_err(|e| Broken::Ring(virtio_queue::Error::GuestMemory(e)))?;
        }
        self.queue.set_next_used(next_used.wrapping_add(others.len() as u16));
        self.complete(last, *written)
    }

    /// Interrupts the driver if it wants to know of what was completed since the last call (2.7.7, 2.7.10).
    pub fn notify(&mut self) -> Result<(), Broken> {
        if let Some(interrupt) = self.interrupt_wanted()? {
            interrupt.trigger();
        }
        Ok(())
    }

    /// The interrupt that is to be triggered if the driver wants to know of what was completed since the last call.
    pub fn interrupt_wanted(&mut self) -> Result<Option<Interrupt>, Broken> {
        let used = Wrapping(self.queue.next_used());
        let since = used - std::mem::replace(&mut self.notified, used);
        if since.0 == 0 {
            return Ok(None);
        }
        // The index of the used ring is written before the driver's wish is read.
        fence(Ordering::SeqCst);
        let QueueState { avail_ring, size, event_idx_enabled, .. } = self.queue.state();
        let read = |offset: u64| -> Result<u16, Broken> {
            let value = self.memory.load(GuestAddress(avail_ring + offset), Ordering::Relaxed);
            value.map(u16::from_le).map_err(|e| Broken::Ring(virtio_queue::Error::GuestMemory(e)))
        };
        let wanted = if event_idx_enabled {
            let event = Wrapping(read(AVAIL_HEADER + AVAIL_ELEMENT * u64::from(size))?);
            used - event - Wrapping(1) < since
        } else {
            read(0)? & AVAIL_NO_INTERRUPT == 0
        };
        Ok(wanted.then(|| self.interrupt.clone()))
    }

    /// Asks the driver to notify from now on; true if chains came in meanwhile, so that the caller must look again.
    pub fn enable_notification(&mut self) -> Result<bool, Broken> {
        self.queue.enable_notification(&*self.memory).map_err(Broken::Ring)
    }

    /// Tells the driver that it need not notify: the worker is looking anyway.
    pub fn disable_notification(&mut self) -> Result<(), Broken> {
        self.queue.disable_notification(&*self.memory).map_err(Broken::Ring)
    }

    /// Serves the chains that are available, after a kick, with `serve`, which returns how many bytes of the writable part
    /// it wrote. At most as many as the queue holds at a time, so that a driver which keeps on offering cannot keep the
    /// worker from being stopped; if there is more the queue kicks itself.
    pub fn serve(&mut self, mut serve: impl FnMut(&GuestMemory, &Chain) -> Result<u32, Broken>) -> Result<(), Broken> {
        self.clear_kick();
        self.disable_notification()?;
        let memory = self.memory.clone();
        for _ in 0..self.queue.size() {
            match self.pop()? {
                Some(chain) => {
                    let written = serve(&memory, &chain)?;
                    self.complete(&chain, written)?;
                    self.notify()?;
                }
                None if self.enable_notification()? => self.disable_notification()?,
                None => return Ok(()),
            }
        }
        self.enable_notification()?;
        self.kick_self();
        Ok(())
    }

    /// Ring addresses and positions, as a plain value.
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// The pop-and-check as [`ActiveQueue::pop`] does, keeping the descriptors too, for a consumer that walks them itself
    /// (the file server's crate). It reads them again: every access is checked again by it.
    pub fn pop_with_descriptors(&mut self) -> Result<Option<(Chain, DescriptorChain<SharedMemory>)>, Broken> {
        let memory = self.memory.clone();
        let chain = match self.queue.iter(memory) {
            Ok(mut chains) => chains.next(),
            Err(error) => return Err(Broken::Ring(error)),
        };
        let Some(descriptors) = chain else { return Ok(None) };
        Ok(Some((Chain::check(descriptors.clone(), &self.memory)?, descriptors)))
    }
}

/// A descriptor chain that was checked at the door: where its bytes are, copied out of the descriptors once.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    readable: Vec<(GuestAddress, usize)>,
    writable: Vec<(GuestAddress, usize)>,
}

impl Chain {
    fn check<M>(mut descriptors: DescriptorChain<M>, memory: &GuestMemory) -> Result<Self, Broken>
    where
        M: std::ops::Deref<Target = GuestMemory>,
    {
        let head = descriptors.head_index();
        let broken = |what| Broken::Chain { head, what };
        let mut chain = Self { head, readable: Vec::new(), writable: Vec::new() };
        let (mut readable, mut writable) = (0u64, 0u64);
        let mut complete = false;
        for descriptor in descriptors.by_ref() {
            let (address, length) = (descriptor.addr(), descriptor.len() as usize);
            complete = !descriptor.has_next();
            if length > 0 && !memory.check_range(address, length) {
                return Err(broken("buffer outside guest memory"));
            }
            if descriptor.is_write_only() {
                writable += length as u64;
                chain.writable.push((address, length));
            } else {
                if !chain.writable.is_empty() {
                    return Err(broken("readable descriptor after a writable one"));
                }
                readable += length as u64;
                chain.readable.push((address, length));
            }
        }
        // The iterator ends early at a bad index, a bad table or a loop; the last descriptor it gave then has a successor.
        if !complete {
            return Err(broken("ends in a bad descriptor, or never"));
        }
        if readable > u64::from(u32::MAX) || writable > u64::from(u32::MAX) {
            return Err(broken("4 GiB or longer"));
        }
        Ok(chain)
    }

    /// Index of the first descriptor, by which the driver knows the chain.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the driver wrote for the device.
    pub fn readable<'a>(&self, memory: &'a GuestMemory) -> Buffers<'a> {
        buffers(&self.readable, memory)
    }

    /// Where the writable part lies, for a device that deals in memory itself.
    pub fn writable_ranges(&self) -> &[(GuestAddress, usize)] {
        &self.writable
    }

    /// Where the device may write.
    pub fn writable<'a>(&self, memory: &'a GuestMemory) -> Buffers<'a> {
        buffers(&self.writable, memory)
    }
}

fn buffers<'a>(pieces: &[(GuestAddress, usize)], memory: &'a GuestMemory) -> Buffers<'a> {
    let mut slices = VecDeque::with_capacity(pieces.len());
    for &(address, length) in pieces {
        // `check` has seen the range inside memory, whose regions never change; a range may span adjoining regions.
        slices.extend(memory.get_slices(address, length).flatten());
    }
    Buffers::new(slices)
}
