//! The balloon device (5.5): the guest gives memory back, unasked what is free (free page reporting), and on request what
//! it can spare. When it runs out of memory it takes that again.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_memory::{Address, GuestAddress};
use vmm_sys_util::epoll::EventSet;

use super::{ActivateError, Activation, ActiveQueue, Broken, Buffers, Device, DeviceState, Interrupt, Poll, Worker};
use crate::memory::GuestMemory;
use crate::memory::discard::{FileBacked, PAGE_SIZE, discard};

/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM` (5.5.3).
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_REPORTING`.
const F_REPORTING: u64 = 1 << 5;

/// Bytes of a page in the balloon (5.5.6).
const BALLOON_PAGE: u64 = 4096;

/// Most pages in one request. Linux sends 256.
const MAX_PAGES: usize = 4096;

/// Offset of `actual` in the configuration space.
const ACTUAL_OFFSET: u64 = 4;

/// Queues, and their tokens. The second is the deflate queue; with free page reporting and neither statistics nor hinting
/// the third is the reporting queue.
const INFLATE: u64 = 0;
const REPORT: u64 = 2;

/// virtio-balloon.
pub struct Balloon {
    file_backed: Arc<FileBacked>,
    state: Arc<Mutex<State>>,
}

/// Asks the guest for memory while the device runs. Cloning shares it.
#[derive(Clone)]
pub struct BalloonHandle {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// `num_pages` and `actual` of the configuration space (5.5.4).
    wanted: u32,
    actual: u32,
    config_interrupt: Option<Interrupt>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Balloon {
    /// An empty balloon. `file_backed` is what of guest memory maps a file.
    pub fn new(file_backed: Arc<FileBacked>) -> Self {
        Self { file_backed, state: Arc::default() }
    }

    /// What inflates it.
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle { state: self.state.clone() }
    }
}

impl BalloonHandle {
    /// Asks the guest to have this many bytes, in whole pages, in the balloon.
    pub fn inflate_to(&self, bytes: u64) {
        let mut state = lock(&self.state);
        state.wanted = u32::try_from(bytes / BALLOON_PAGE).unwrap_or(u32::MAX);
        if let Some(interrupt) = &state.config_interrupt {
            interrupt.trigger();
        }
    }

    /// Bytes that the guest says are in it.
    pub fn actual(&self) -> u64 {
        u64::from(lock(&self.state).actual) * BALLOON_PAGE
    }
}

/// [`DeviceState`] of a balloon: the configuration space.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedState {
    num_pages: u32,
    actual: u32,
}

impl Device for Balloon {
    fn id(&self) -> u16 {
        virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON as u16
    }

    fn features(&self) -> u64 {
        F_DEFLATE_ON_OOM | F_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 64, 64]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        let config = [state.wanted.to_le_bytes(), state.actual.to_le_bytes()].concat();
        super::copy_config(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL_OFFSET, Ok(actual)) = (offset, data.try_into()) {
            lock(&self.state).actual = u32::from_le_bytes(actual);
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let mut queues = vec![activation.queue(0)?, activation.queue(1)?];
        if activation.features & F_REPORTING != 0 {
            queues.push(activation.queue(2)?);
        }
        lock(&self.state).config_interrupt = Some(activation.config_interrupt);
        Ok(Box::new(Requests { queues, file_backed: self.file_backed.clone() }))
    }

    fn reset(&mut self) {
        let mut state = lock(&self.state);
        state.actual = 0;
        state.config_interrupt = None;
    }

    fn save(&self) -> DeviceState {
        let state = lock(&self.state);
        let saved = SavedState { num_pages: state.wanted, actual: state.actual };
        DeviceState(serde_json::to_vec(&saved).unwrap_or_default())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), ActivateError> {
        let saved: SavedState =
            serde_json::from_slice(&state.0).map_err(|e| ActivateError::State(format!("balloon: {e}")))?;
        let mut state = lock(&self.state);
        state.wanted = saved.num_pages;
        state.actual = saved.actual;
        Ok(())
    }
}

struct Requests {
    queues: Vec<ActiveQueue>,
    file_backed: Arc<FileBacked>,
}

impl Worker for Requests {
    fn start(&mut self, poll: &Poll) -> io::Result<()> {
        for (token, queue) in self.queues.iter().enumerate() {
            poll.add(queue.kick(), token as u64, EventSet::IN)?;
            queue.kick_self();
        }
        Ok(())
    }

    fn handle(&mut self, token: u64, _events: EventSet, _poll: &Poll) -> Result<(), Broken> {
        let Self { queues, file_backed } = self;
        let Some(queue) = queues.get_mut(token as usize) else { return Ok(()) };
        queue.serve(|memory, chain| {
            match token {
                INFLATE => {
                    for (start, length) in page_runs(chain.readable(memory))? {
                        give_back(memory, file_backed, start, length);
                    }
                }
                REPORT => {
                    for &(start, length) in chain.writable_ranges() {
                        give_back(memory, file_backed, start, length as u64);
                    }
                }
                // The deflate queue: pages taken from the balloon can be used as they are.
                _ => {}
            }
            Ok(0)
        })
    }

    fn queues(&self) -> Vec<Option<&ActiveQueue>> {
        let mut queues: Vec<_> = self.queues.iter().map(Some).collect();
        queues.resize(3, None);
        queues
    }
}

/// The page numbers of a request, 32 bits each, as runs of pages: guest address and bytes. A driver sends neighbours in
/// either order.
fn page_runs(mut request: Buffers<'_>) -> Result<Vec<(GuestAddress, u64)>, Broken> {
    if request.len() > MAX_PAGES * size_of::<u32>() {
        return Err(Broken::Request("more than 4096 pages at a time"));
    }
    let mut bytes = vec![0; request.len()];
    request.read(&mut bytes);
    let mut pages: Vec<_> =
        bytes.chunks_exact(4).map(|page| u64::from(u32::from_le_bytes([page[0], page[1], page[2], page[3]]))).collect();
    pages.sort_unstable();
    let mut runs: Vec<(GuestAddress, u64)> = Vec::new();
    for address in pages.into_iter().map(|page| page * BALLOON_PAGE) {
        match runs.last_mut() {
            Some((start, length)) if start.raw_value() + *length == address => *length += BALLOON_PAGE,
            Some((start, length)) if start.raw_value() + *length > address => {}
            _ => runs.push((GuestAddress(address), BALLOON_PAGE)),
        }
    }
    Ok(runs)
}

/// Gives the whole pages of a range back. What is not memory is passed over (5.5.6.1), and what the host refuses stays: no
/// harm to either side.
fn give_back(memory: &GuestMemory, file_backed: &FileBacked, start: GuestAddress, length: u64) {
    let Some(end) = start.raw_value().checked_add(length) else { return };
    let Some(first) = start.raw_value().checked_next_multiple_of(PAGE_SIZE) else { return };
    let last = end - end % PAGE_SIZE;
    if first < last {
        let _ = discard(memory, file_backed, GuestAddress(first), last - first);
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemory as _, GuestMemoryRegion};

    use super::super::test_driver::{Descriptor, Driven, NEXT, Part, WRITE, drive, drive_with};
    use super::*;

    /// Pages of memory the test has beside the rings.
    const FREE: u64 = 48 << 20;

    fn fill(driven: &Driven, pages: u64) {
        driven.memory.write_slice(&vec![7; (pages * PAGE_SIZE) as usize], GuestAddress(FREE)).unwrap();
    }

    /// Which of the pages were given back.
    fn zero(driven: &Driven, pages: u64) -> Vec<u64> {
        let byte = |page| driven.memory.read_obj::<u8>(GuestAddress(FREE + page * PAGE_SIZE)).unwrap();
        (0..pages).filter(|page| byte(*page) == 0).collect()
    }

    fn page_numbers(pages: impl IntoIterator<Item = u64>) -> Vec<u8> {
        pages.into_iter().flat_map(|page| ((FREE / BALLOON_PAGE + page) as u32).to_le_bytes()).collect()
    }

    #[test]
    fn inflating_gives_the_pages_back() {
        let mut device = Balloon::new(Arc::default());
        let mut driven = drive(&mut device);
        fill(&driven, 10);
        assert_eq!(driven.rings[0].request(&[Part::Out(page_numbers([5, 1, 2, 3, 3, 8]))]).0, 0);
        assert_eq!(zero(&driven, 10), [1, 2, 3, 5, 8]);
        driven.rings[1].request(&[Part::Out(page_numbers([5, 1]))]);
        assert_eq!(zero(&driven, 10), [1, 2, 3, 5, 8]);
    }

    #[test]
    fn reported_pages_are_given_back_whole() {
        let mut device = Balloon::new(Arc::default());
        let mut driven = drive(&mut device);
        fill(&driven, 10);
        let page = |page: u64| FREE + page * PAGE_SIZE;
        driven.rings[2].offer_descriptors(&[
            Descriptor { address: page(1), length: 8192, flags: WRITE | NEXT, next: 1 },
            // Not aligned: only page 5 is whole.
            Descriptor { address: page(4) + 1, length: 3 * 4096 - 2, flags: WRITE | NEXT, next: 2 },
            Descriptor { address: page(9) - 1, length: 2, flags: WRITE | NEXT, next: 3 },
            Descriptor { address: page(9), length: 0, flags: WRITE, next: 0 },
        ]);
        driven.rings[2].kick();
        driven.rings[2].wait();
        assert_eq!(zero(&driven, 10), [1, 2, 5]);
    }

    #[test]
    fn pages_that_are_no_memory_are_passed_over() {
        let mut device = Balloon::new(Arc::default());
        let mut driven = drive(&mut device);
        fill(&driven, 2);
        let mut request = page_numbers([1]);
        request.extend(u32::MAX.to_le_bytes());
        request.extend(((driven.memory.last_addr().0 + 1) / BALLOON_PAGE).to_le_bytes()[..4].iter());
        request.push(0);
        driven.rings[0].request(&[Part::Out(request)]);
        driven.rings[0].request(&[Part::In(4096)]);
        assert_eq!(zero(&driven, 2), [1]);
        assert!(driven.memory.find_region(GuestAddress(FREE)).unwrap().len() > 0);
    }

    #[test]
    fn too_many_pages_at_a_time_break_a_rule() {
        let mut device = Balloon::new(Arc::default());
        let mut driven = drive(&mut device);
        driven.rings[0].offer(&[Part::Out(vec![0; 4 * MAX_PAGES + 4])]);
        driven.rings[0].kick();
        assert!(matches!(driven.broken(), Broken::Request(_)));
    }

    #[test]
    fn the_guest_is_told_of_a_new_size_and_tells_the_actual_one() {
        let mut device = Balloon::new(Arc::default());
        let driven = drive_with(&mut device, 0, true);
        let handle = device.handle();
        handle.inflate_to(3 * BALLOON_PAGE + 1);
        driven.wait_config();
        let mut config = [0; 8];
        device.read_config(0, &mut config);
        assert_eq!(config, [3, 0, 0, 0, 0, 0, 0, 0]);
        device.write_config(4, &2u32.to_le_bytes());
        device.write_config(0, &9u32.to_le_bytes());
        device.write_config(4, &[1]);
        assert_eq!(handle.actual(), 2 * BALLOON_PAGE);

        let state = device.save();
        assert_eq!(state.0, br#"{"num_pages":3,"actual":2}"#);
        let mut other = Balloon::new(Arc::default());
        other.restore(&state).unwrap();
        assert_eq!(other.save(), state);
        assert!(other.restore(&DeviceState(b"{}".into())).is_err());
    }
}
