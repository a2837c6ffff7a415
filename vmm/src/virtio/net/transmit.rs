//! Packets from the guest.

use super::LONGEST_FRAME;
use super::tap::Tap;
use crate::control::TAP_HEADER;
use crate::memory::GuestMemory;
use crate::virtio::{ActiveQueue, Broken, Chain};

/// `VIRTIO_NET_HDR_GSO_NONE` (5.1.6).
const GSO_NONE: u8 = 0;

/// Bytes of the shortest frame: two addresses and a type.
const SHORTEST_FRAME: usize = 14;

/// The queue that the driver calls `tx`.
pub struct Transmit {
    pub queue: ActiveQueue,
    /// Bytes of a frame that nobody segments any more.
    longest: usize,
}

impl Transmit {
    pub fn new(queue: ActiveQueue, longest: usize) -> Self {
        Self { queue, longest }
    }

    /// Sends what there is, at most as many packets as the queue holds at a time. What the host does not take is lost, as on
    /// any network: the guest is not told, and cannot be held up by it.
    pub fn serve(&mut self, tap: &Tap) -> Result<(), Broken> {
        self.queue.clear_kick();
        self.queue.disable_notification()?;
        let memory = self.queue.memory().clone();
        for _ in 0..super::QUEUE_SIZE {
            match self.queue.pop()? {
                Some(chain) => {
                    self.send(tap, &memory, &chain);
                    self.queue.complete(&chain, 0)?;
                }
                None if self.queue.enable_notification()? => self.queue.disable_notification()?,
                None => return self.queue.notify(),
            }
        }
        self.queue.notify()?;
        self.queue.enable_notification()?;
        self.queue.kick_self();
        Ok(())
    }

    fn send(&self, tap: &Tap, memory: &GuestMemory, chain: &Chain) {
        let mut packet = chain.readable(memory);
        // What the header says is the business of the host's kernel, which reads it again and checks it; here it only decides
        // how long the packet may be.
        let mut header = [0; TAP_HEADER];
        packet.clone().read(&mut header);
        let longest = if header[1] == GSO_NONE { self.longest } else { LONGEST_FRAME };
        let frame = packet.len().saturating_sub(TAP_HEADER);
        // One system call takes a packet whole, or it would be two.
        let pieces = packet.slices().count();
        if (SHORTEST_FRAME..=longest).contains(&frame) && pieces <= libc::UIO_MAXIOV as usize {
            let _ = packet.drain_to(tap, None);
        }
    }
}
