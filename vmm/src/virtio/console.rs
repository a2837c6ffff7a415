//! The console device (5.3), one port, output only: what the guest prints goes to a file of the host.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;

use super::{ActivateError, Activation, ActiveQueue, Broken, Buffers, Device, DeviceState, Poll, Worker};

/// Bytes of output a guest gets: a boot log and many a panic, but not a full disk.
const MAX_OUTPUT: u64 = 16 << 20;

/// Bytes written at a time: what a pipe that is ready takes without blocking (`PIPE_BUF`).
const CHUNK: usize = 4096;

/// Longest wait for a pipe or terminal whose reader has fallen behind; then output is dropped until there is room.
const READER_DEADLINE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Token of the transmit queue.
const TRANSMIT: u64 = 1;

/// virtio-console.
pub struct Console {
    output: Arc<Output>,
}

struct Output {
    file: OwnedFd,
    /// Bytes the guest may still print.
    left: AtomicU64,
    /// The reader was waited for in vain.
    stalled: AtomicBool,
}

impl Console {
    /// A console that prints to `file`, at most 16 MiB; the rest is dropped.
    pub fn new(file: OwnedFd) -> Self {
        Self { output: Arc::new(Output { file, left: AtomicU64::new(MAX_OUTPUT), stalled: AtomicBool::new(false) }) }
    }
}

/// [`DeviceState`] of a console.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedState {
    /// Bytes it may still print.
    left: u64,
}

impl Device for Console {
    fn id(&self) -> u16 {
        virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE as u16
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 64]
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let receive = activation.queue(0)?;
        Ok(Box::new(Port { receive, transmit: activation.queue(1)?, output: self.output.clone() }))
    }

    fn save(&self) -> DeviceState {
        let saved = SavedState { left: self.output.left.load(Ordering::Relaxed) };
        DeviceState(serde_json::to_vec(&saved).unwrap_or_default())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), ActivateError> {
        let saved: SavedState =
            serde_json::from_slice(&state.0).map_err(|e| ActivateError::State(format!("console: {e}")))?;
        self.output.left.store(saved.left.min(MAX_OUTPUT), Ordering::Relaxed);
        Ok(())
    }
}

struct Port {
    /// Nothing is ever typed; the driver's buffers stay in it.
    receive: ActiveQueue,
    transmit: ActiveQueue,
    output: Arc<Output>,
}

impl Worker for Port {
    fn start(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(self.transmit.kick(), TRANSMIT, EventSet::IN)?;
        self.transmit.kick_self();
        Ok(())
    }

    fn handle(&mut self, _token: u64, _events: EventSet, _poll: &Poll) -> Result<(), Broken> {
        let output = &self.output;
        self.transmit.serve(|memory, chain| {
            output.print(chain.readable(memory));
            Ok(0)
        })
    }

    fn queues(&self) -> Vec<Option<&ActiveQueue>> {
        vec![Some(&self.receive), Some(&self.transmit)]
    }
}

impl Output {
    /// Prints it, or as much as it may and the file takes: the guest does not wait for its log.
    fn print(&self, mut text: Buffers<'_>) {
        while !text.is_empty() {
            let left = self.left.load(Ordering::Relaxed);
            let mut chunk = text.clone();
            chunk.split_off(CHUNK.min(usize::try_from(left).unwrap_or(CHUNK)));
            if chunk.is_empty() || !self.ready() {
                return;
            }
            let Ok(count) = chunk.drain_to(&self.file, None) else { return };
            if count == 0 {
                return;
            }
            self.left.store(left.saturating_sub(count as u64), Ordering::Relaxed);
            text.skip(count);
        }
    }

    fn ready(&self) -> bool {
        let deadline = if self.stalled.load(Ordering::Relaxed) { Timespec::default() } else { READER_DEADLINE };
        let ready = loop {
            let mut fds = [PollFd::new(&self.file, PollFlags::OUT)];
            match rustix::event::poll(&mut fds, Some(&deadline)) {
                Err(Errno::INTR) => {}
                Ok(count) => break count > 0 && fds[0].revents().contains(PollFlags::OUT),
                Err(_) => break false,
            }
        };
        self.stalled.store(!ready, Ordering::Relaxed);
        ready
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::super::test_driver::{Part, drive};
    use super::*;

    fn file() -> std::fs::File {
        rustix::fs::memfd_create("console", rustix::fs::MemfdFlags::empty()).unwrap().into()
    }

    fn contents(mut file: std::fs::File) -> Vec<u8> {
        file.rewind().unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn what_is_transmitted_is_printed() {
        let file = file();
        let mut device = Console::new(file.try_clone().unwrap().into());
        let mut driven = drive(&mut device);
        driven.rings[0].offer(&[Part::In(100)]);
        driven.rings[0].kick();
        driven.rings[1].request(&[Part::Out(b"one ".to_vec()), Part::Out(vec![b'x'; 10_000])]);
        driven.rings[1].request(&[Part::Out(vec![])]);
        driven.rings[1].request(&[Part::In(10)]);
        driven.rings[1].request(&[Part::Out(b" two".to_vec()), Part::In(3)]);
        let printed = contents(file);
        assert_eq!(printed.len(), 10_008);
        assert!(printed.starts_with(b"one x") && printed.ends_with(b"x two"));
        assert_eq!(driven.rings[0].take_used(), None);
    }

    #[test]
    fn output_ends_at_the_limit_which_is_saved() {
        let file = file();
        let mut device = Console::new(file.try_clone().unwrap().into());
        device.restore(&DeviceState(br#"{"left":5000}"#.to_vec())).unwrap();
        let mut driven = drive(&mut device);
        driven.rings[1].request(&[Part::Out(vec![b'x'; 4999])]);
        assert_eq!(device.save().0, br#"{"left":1}"#);
        driven.rings[1].request(&[Part::Out(vec![b'y'; 4999])]);
        driven.rings[1].request(&[Part::Out(vec![b'z'; 4999])]);
        let printed = contents(file);
        assert_eq!((printed.len(), printed[4999]), (5000, b'y'));
        assert!(device.restore(&DeviceState(b"5".to_vec())).is_err());
    }

    #[test]
    fn a_pipe_that_nobody_reads_holds_the_guest_up_for_a_moment_only() {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut device = Console::new(writer.into());
        let mut driven = drive(&mut device);
        driven.rings[1].request(&[Part::Out(vec![b'x'; 1 << 20])]);
        drop(reader);
        driven.rings[1].request(&[Part::Out(vec![b'x'; 1 << 20])]);
    }
}
