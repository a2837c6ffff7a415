//! The file system device (5.11): serves a directory of the host with FUSE, the file server being a library in this
//! process (guest memory is private to it).
//!
//! What the guest sees is what the host has, at once: names and attributes of files are not cached in the guest, contents only
//! as long as the attributes show no change, and directories for a moment. The guest kernel decides on permissions by mode bits and ACLs; creation takes
//! place with the caller's user and groups, and is not checked again: the guest's kernel may have allowed it for a capability.
//!
//! - `directories`: which directories the guest may go by for that moment.
//! - [`files`]: the file system itself, over the library's.
//! - `keep`: which contents the guest may keep cached.
//! - [`request`]: one FUSE request.
//! - [`threads`]: the threads that serve, which exist before the device is active.
//! - [`traffic`]: what is counted of all that.
//! - `unnamed`: files without a name, which the library lacks.

mod directories;
pub mod files;
mod keep;
pub mod request;
pub mod threads;
pub mod traffic;
mod unnamed;

use std::fs::File;
use std::io;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::{ActivateError, Activation, ActiveQueue, Broken, Device, Poll, Worker};
use files::Files;
use request::Requests;
use threads::{Session, Threads};
use traffic::Counts;

/// Bytes of the tag in the configuration space (5.11.4).
const TAG_SIZE: usize = 36;

/// The high priority queue and one request queue. The latter holds a request of 1 MiB (256 pages and the headers) even when
/// its chain is not indirect.
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// Token of the event that a serving thread failed.
const FAILED: u64 = 0;

/// What a share is made of.
pub struct ShareConfig {
    /// The name the guest mounts it by: 1 to 36 bytes.
    pub tag: String,
    /// Absolute path of the directory served. Absolute paths and `..` that the guest sends end at the root of the process,
    /// so this should be `/` of a process that was pivoted into the share.
    pub root: String,
    /// `/proc/self/fd` of this process, opened with `O_PATH`: there may be no `/proc` left.
    pub proc_self_fd: File,
    /// Threads that serve, so many requests at a time.
    pub threads: usize,
    /// Called on each of these threads before it serves, to confine it. The threads inherit the capabilities of the one
    /// that calls [`Share::new`] and need `CHOWN`, `DAC_OVERRIDE`, `FOWNER`, `FSETID`, `MKNOD`, `SETFCAP`, `SETGID` and
    /// `SETUID`; the device's own thread needs none.
    pub confine: Box<dyn Fn() -> io::Result<()> + Send + Sync>,
}

/// Why a share could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The tag does not fit.
    #[error("share tag {0:?}: must be 1 to 36 bytes without NUL")]
    Tag(String),
    /// A thread could not be made or confined.
    #[error("file server thread: {0}")]
    Thread(#[source] io::Error),
    /// The file server could not be made.
    #[error("file server: {0}")]
    Files(#[source] io::Error),
}

/// virtio-fs.
pub struct Share {
    tag: String,
    requests: Arc<Requests>,
    threads: Arc<Threads>,
}

impl Share {
    /// A share of the directory, and its threads. Call it when the root and the working directory of the process are those
    /// it keeps, and its limit of open files is set: each file that the guest knows of takes one.
    pub fn new(config: ShareConfig) -> Result<Self, ShareError> {
        let tag = config.tag;
        if tag.is_empty() || tag.len() > TAG_SIZE || tag.contains('\0') {
            return Err(ShareError::Tag(tag));
        }
        let files = Files::new(config.root, config.proc_self_fd).map_err(ShareError::Files)?;
        let threads = Threads::start(config.threads, config.confine.into()).map_err(ShareError::Thread)?;
        Ok(Self { tag, requests: Arc::new(Requests::new(files)), threads: Arc::new(threads) })
    }

    /// What is counted of its requests, also when the machine has it.
    pub fn traffic(&self) -> Counts {
        self.requests.traffic().clone()
    }
}

impl Device for Share {
    fn id(&self) -> u16 {
        virtio_bindings::virtio_ids::VIRTIO_ID_FS as u16
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; TAG_SIZE + 4];
        config[..self.tag.len()].copy_from_slice(self.tag.as_bytes());
        let request_queues = QUEUE_SIZES.len() as u32 - 1;
        config[TAG_SIZE..].copy_from_slice(&request_queues.to_le_bytes());
        super::copy_config(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let queues = vec![activation.queue(0)?, activation.queue(1)?];
        Ok(Box::new(ShareWorker {
            queues,
            session: None,
            requests: self.requests.clone(),
            threads: self.threads.clone(),
        }))
    }

    fn reset(&mut self) {
        self.requests.forget_all();
    }
}

/// Lends the queues to the serving threads and takes them back.
struct ShareWorker {
    queues: Vec<ActiveQueue>,
    session: Option<Arc<Session>>,
    requests: Arc<Requests>,
    threads: Arc<Threads>,
}

impl Worker for ShareWorker {
    fn start(&mut self, poll: &Poll) -> io::Result<()> {
        let session = Session::new(std::mem::take(&mut self.queues), self.requests.clone())?;
        poll.add(session.failed(), FAILED, EventSet::IN)?;
        let session = Arc::new(session);
        self.session = Some(session.clone());
        self.threads.enter(session);
        Ok(())
    }

    fn handle(&mut self, _token: u64, _events: EventSet, _poll: &Poll) -> Result<(), Broken> {
        match self.session.as_ref().and_then(|session| session.take_failure()) {
            Some(broken) => Err(broken),
            None => Ok(()),
        }
    }

    fn stop(&mut self) -> Result<(), Broken> {
        let Some(session) = self.session.take() else { return Ok(()) };
        self.threads.leave(&session)?;
        // The threads have dropped their references before they counted themselves out.
        self.queues = Arc::into_inner(session).map(Session::into_queues).unwrap_or_default();
        Ok(())
    }

    fn queues(&self) -> Vec<Option<&ActiveQueue>> {
        self.queues.iter().map(Some).collect()
    }
}

impl Drop for ShareWorker {
    fn drop(&mut self) {
        // Only a worker that never got to run has something to do here; then nothing is in flight.
        let _ = self.stop();
    }
}

#[cfg(test)]
mod tests;
