//! The threads that serve requests. They exist, confined, from the making of the share to its end; while the device runs
//! they share its queues.
//!
//! Each waits for a kick, takes one request, serves it and completes it, so that a request which blocks holds up one thread
//! and nothing else. The kicks are edge-triggered: one kick wakes one thread. A thread that leaves more behind than it takes
//! kicks for the next.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::thread::UnshareFlags;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::super::{ActiveQueue, Broken};
use super::request::Requests;

/// Token of the event that tells the threads to leave a session; queues have their index.
const LEAVE: u64 = u64::MAX;

/// Longest wait for requests in flight when a session ends. Longer than a disk or a network file system takes that will
/// answer at all.
const LEAVE_DEADLINE: Duration = Duration::from_secs(30);

/// Serving is shallow; the largest things on the stack are path buffers of the C library.
const STACK_SIZE: usize = 256 * 1024;

/// The file server's threads.
pub struct Threads {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    session: Option<Arc<Session>>,
    /// Threads that are in a session.
    inside: usize,
    ending: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Threads {
    /// Starts them and waits until each is confined, or one failed.
    pub fn start(count: usize, confine: Arc<dyn Fn() -> io::Result<()> + Send + Sync>) -> io::Result<Self> {
        let mut threads = Self { shared: Arc::default(), handles: Vec::new() };
        let (ready, confined) = mpsc::channel();
        for index in 0..count.max(1) {
            let (shared, confine, ready) = (threads.shared.clone(), confine.clone(), ready.clone());
            let thread = std::thread::Builder::new().name(format!("fs{index}")).stack_size(STACK_SIZE);
            threads.handles.push(thread.spawn(move || {
                let result = own_file_system_context().and_then(|()| confine());
                let confined = result.is_ok();
                // The receiver waits until each has sent and dropped its end.
                let _ = ready.send(result);
                drop(ready);
                if confined {
                    run(&shared);
                }
            })?);
        }
        drop(ready);
        for result in confined {
            result?;
        }
        Ok(threads)
    }

    /// Lets them serve `session`.
    pub fn enter(&self, session: Arc<Session>) {
        self.shared.lock().session = Some(session);
        self.shared.changed.notify_all();
    }

    /// Makes them leave `session`, which takes as long as the requests in flight.
    pub fn leave(&self, session: &Session) -> Result<(), Broken> {
        let mut state = self.shared.lock();
        state.session = None;
        session.leave();
        let waited = self.shared.changed.wait_timeout_while(state, LEAVE_DEADLINE, |state| state.inside > 0);
        let (_state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            return Err(Broken::Host("file requests in flight", io::ErrorKind::TimedOut.into()));
        }
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.changed.notify_all();
        for handle in self.handles.drain(..) {
            let _ = handle.join();
        }
    }
}

/// Gives the calling thread a umask and a working directory of its own, both of which serving changes.
pub fn own_file_system_context() -> io::Result<()> {
    // SAFETY: the flag is `CLONE_FS`; nothing that Rust relies on is unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
    // The guest has applied the caller's umask, or sends it along.
    rustix::process::umask(rustix::fs::Mode::empty());
    Ok(())
}

/// A serving thread's life.
fn run(shared: &Shared) {
    let mut state = shared.lock();
    loop {
        if state.ending {
            return;
        }
        let Some(session) = state.session.clone() else {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        state.inside += 1;
        drop(state);
        session.serve();
        drop(session);
        state = shared.lock();
        state.inside -= 1;
        shared.changed.notify_all();
    }
}

/// The queues of a running device, between a start and a stop of its worker.
pub struct Session {
    requests: Arc<Requests>,
    queues: Vec<Mutex<ActiveQueue>>,
    epoll: Epoll,
    leave: EventFd,
    leaving: AtomicBool,
    failed: EventFd,
    failure: Mutex<Option<Broken>>,
}

impl Session {
    /// A session over these queues. Chains that are in them already are served too.
    pub fn new(queues: Vec<ActiveQueue>, requests: Arc<Requests>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let leave = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        epoll.ctl(ControlOperation::Add, leave.as_raw_fd(), EpollEvent::new(EventSet::IN, LEAVE))?;
        for (index, queue) in queues.iter().enumerate() {
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            epoll.ctl(ControlOperation::Add, queue.kick(), EpollEvent::new(events, index as u64))?;
            queue.kick_self();
        }
        Ok(Self {
            requests,
            queues: queues.into_iter().map(Mutex::new).collect(),
            epoll,
            leave,
            leaving: AtomicBool::new(false),
            failed: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            failure: Mutex::new(None),
        })
    }

    /// The queues, when no thread is in the session any more.
    pub fn into_queues(self) -> Vec<ActiveQueue> {
        self.queues.into_iter().map(|queue| queue.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()
    }

    /// Signalled when a rule was broken and the session stands still.
    pub fn failed(&self) -> RawFd {
        self.failed.as_raw_fd()
    }

    /// The rule that was broken.
    pub fn take_failure(&self) -> Option<Broken> {
        let _ = self.failed.read();
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn leave(&self) {
        self.leaving.store(true, Ordering::SeqCst);
        // Never read: it wakes each thread in turn.
        let _ = self.leave.write(1);
    }

    fn fail(&self, broken: Broken) {
        self.leaving.store(true, Ordering::SeqCst);
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(broken);
        let _ = self.failed.write(1);
    }

    fn serve(&self) {
        let mut event = [EpollEvent::default()];
        loop {
            match self.epoll.wait(-1, &mut event) {
                Ok(0) => continue,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return self.fail(Broken::Host("epoll_wait", error)),
            }
            if event[0].data() == LEAVE {
                return;
            }
            if let Some(queue) = self.queues.get(event[0].data() as usize)
                && let Err(broken) = self.serve_queue(queue)
            {
                self.fail(broken);
            }
        }
    }

    /// Serves until the queue is empty.
    fn serve_queue(&self, queue: &Mutex<ActiveQueue>) -> Result<(), Broken> {
        let lock = || queue.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.leaving.load(Ordering::SeqCst) {
            let mut active = lock();
            let next = active.pop_with_descriptors()?;
            let more = active.enable_notification()?;
            let Some((chain, descriptors)) = next else {
                if more {
                    continue;
                }
                return Ok(());
            };
            if more {
                active.kick_self();
            }
            let memory = active.memory().clone();
            drop(active);

            let written = self.requests.serve(&memory, &chain, descriptors);

            let mut active = lock();
            active.complete(&chain, written)?;
            let interrupt = active.interrupt_wanted()?;
            // The guest may have its next request in before this thread goes on, and the thread that takes it wants the queue.
            drop(active);
            if let Some(interrupt) = interrupt {
                interrupt.trigger();
            }
        }
        Ok(())
    }
}
