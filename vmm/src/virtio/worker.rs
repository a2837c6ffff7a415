//! The thread of a device. It exists, confined, before its driver does: who activates a device is a vCPU's thread, and what
//! that may do a device's may not, and the other way round. While the device is active the thread runs an epoll loop that
//! hands events to a [`Worker`] until it is told to stop, and then gives the worker back, so that its queues can be saved or
//! dropped.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use rustix::event::{PollFd, PollFlags};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::{ActiveQueue, Broken};

/// Token of the loop's own stop event.
const STOP: u64 = u64::MAX;

/// The running half of a device: owns its queues and handles its events, on one thread.
pub trait Worker: Send {
    /// Registers what the worker waits for. Called on the thread, each time it starts (again after a pause); queues may
    /// hold chains already: look at them here, or `kick_self` them.
    fn start(&mut self, poll: &Poll) -> io::Result<()>;

    /// The file descriptor registered with `token` has `events`. Must not block longer than one request takes.
    fn handle(&mut self, token: u64, events: EventSet, poll: &Poll) -> Result<(), Broken>;

    /// The thread is about to end, because it was told to or because a rule was broken: finish what is in flight, so that
    /// nothing touches the queues or guest memory any more.
    fn stop(&mut self) -> Result<(), Broken> {
        Ok(())
    }

    /// The active queues by index, to save them while the worker is stopped.
    fn queues(&self) -> Vec<Option<&ActiveQueue>>;
}

/// The epoll instance of a worker's thread.
pub struct Poll {
    epoll: Epoll,
}

impl Poll {
    /// Waits for `events` on `fd` (level-triggered unless `EventSet::EDGE_TRIGGERED` is among them).
    pub fn add(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
    }

    /// Changes what is waited for.
    pub fn modify(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(events, token))
    }

    /// Stops waiting for it. Closing the last copy of a file descriptor does so too.
    pub fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default())
    }
}

/// A worker for a thread, and what the thread needs beside.
struct Order {
    worker: Box<dyn Worker>,
    poll: Poll,
    stop: EventFd,
    broken: Box<dyn FnOnce(Broken) + Send>,
    done: SyncSender<Box<dyn Worker>>,
}

/// The thread of a device, with a worker or waiting for one. Dropping it lets the thread end.
pub struct Thread {
    orders: Sender<Order>,
}

impl Thread {
    /// Starts a thread called `name` (at most 15 bytes are seen), which calls `confine` and then waits. If it cannot be
    /// confined it serves nothing: whoever starts a worker hears why.
    pub fn spawn(name: &str, confine: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<Self> {
        let (orders, received) = channel();
        let thread = std::thread::Builder::new().name(name.into()).stack_size(256 * 1024);
        thread.spawn(move || live(&received, confine()))?;
        Ok(Self { orders })
    }

    /// Lets `worker` run. `broken` is called on the thread, once, if the driver breaks the rules; the thread then waits for
    /// its stop without serving anything.
    pub fn start(&self, worker: Box<dyn Worker>, broken: impl FnOnce(Broken) + Send + 'static) -> io::Result<Running> {
        let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let poll = Poll { epoll: Epoll::new()? };
        poll.add(stop.as_raw_fd(), STOP, EventSet::IN)?;
        let (done, stopped) = sync_channel(1);
        let order = Order { worker, poll, stop: stop.try_clone()?, broken: Box::new(broken), done };
        self.orders.send(order).map_err(|_| io::Error::other("it has ended"))?;
        Ok(Running { stop, stopped })
    }
}

/// A worker on its thread. Dropping it stops the worker.
pub struct Running {
    stop: EventFd,
    stopped: Receiver<Box<dyn Worker>>,
}

impl Running {
    /// Stops the worker after the event it is at, and returns it; `None` if it panicked.
    pub fn stop(self) -> Option<Box<dyn Worker>> {
        self.take()
    }

    fn take(&self) -> Option<Box<dyn Worker>> {
        let _ = self.stop.write(1);
        self.stopped.recv().ok()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.take();
    }
}

/// A thread's life: one worker after the other.
fn live(orders: &Receiver<Order>, confined: io::Result<()>) {
    if let Err(error) = confined {
        if let Ok(order) = orders.recv() {
            order.finish(Err(Broken::Host("confinement of the device's thread", error)));
        }
        return;
    }
    for mut order in orders {
        let served = serve(&mut *order.worker, &order.poll);
        let stopping = order.worker.stop();
        order.finish(served.and(stopping));
    }
}

impl Order {
    /// Gives the worker back, if nothing was wrong; else not before that is asked for.
    fn finish(self, result: Result<(), Broken>) {
        if let Err(error) = result {
            (self.broken)(error);
            wait_for_stop(&self.stop);
        }
        // Nobody waits for it any more: fine.
        let _ = self.done.send(self.worker);
    }
}

fn serve(worker: &mut dyn Worker, poll: &Poll) -> Result<(), Broken> {
    worker.start(poll).map_err(|e| Broken::Host("start of the device's thread", e))?;
    let mut events = [EpollEvent::default(); 32];
    loop {
        let count = match poll.epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Broken::Host("epoll_wait", error)),
        };
        for event in &events[..count] {
            if event.data() == STOP {
                return Ok(());
            }
            worker.handle(event.data(), event.event_set(), poll)?;
        }
    }
}

/// After a rule was broken only the stop event counts; the others stay unread, so it is waited for alone.
fn wait_for_stop(stop: &EventFd) {
    // SAFETY: the descriptor is open for as long as the borrowed eventfd.
    let stop = unsafe { BorrowedFd::borrow_raw(stop.as_raw_fd()) };
    while rustix::event::poll(&mut [PollFd::new(&stop, PollFlags::IN)], None) == Err(rustix::io::Errno::INTR) {}
}
