//! The entropy device (5.4): fills what the driver offers with random bytes of the host.

use std::io;

use vmm_sys_util::epoll::EventSet;

use super::{ActivateError, Activation, ActiveQueue, Broken, Device, Poll, Worker};

/// Most bytes given for one request: what a driver asks for at a time, and the kernel's own bound for an uninterrupted
/// `getrandom`.
const MAX_REQUEST: usize = 256;

/// Token of the request queue.
const REQUESTS: u64 = 0;

/// virtio-rng.
#[derive(Debug, Default)]
pub struct Entropy;

impl Device for Entropy {
    fn id(&self) -> u16 {
        virtio_bindings::virtio_ids::VIRTIO_ID_RNG as u16
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        Ok(Box::new(Requests { queue: activation.queue(0)? }))
    }
}

struct Requests {
    queue: ActiveQueue,
}

impl Worker for Requests {
    fn start(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(self.queue.kick(), REQUESTS, EventSet::IN)?;
        self.queue.kick_self();
        Ok(())
    }

    fn handle(&mut self, _token: u64, _events: EventSet, _poll: &Poll) -> Result<(), Broken> {
        self.queue.serve(|memory, chain| {
            let mut buffers = chain.writable(memory);
            let mut random = [0; MAX_REQUEST];
            let random = &mut random[..buffers.len().min(MAX_REQUEST)];
            rustix::rand::getrandom(&mut *random, rustix::rand::GetRandomFlags::empty())
                .map_err(|e| Broken::Host("getrandom", e.into()))?;
            Ok(buffers.write(random) as u32)
        })
    }

    fn queues(&self) -> Vec<Option<&ActiveQueue>> {
        vec![Some(&self.queue)]
    }
}
