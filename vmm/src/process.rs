//! The process of a machine: takes its configuration and open files from the control channel, enters its jail, builds the
//! machine, and serves the channel until either side ends, and its control socket meanwhile.

mod clients;
mod devices;

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;

use crate::control::{self, ChannelError, Device, End, MachineConfig, Measured, Notice, Request, Resource, SHARE_TAG};
use crate::fault;
use crate::jail::{Jail, Kind, Leftover, raise_descriptor_limit};
use crate::machine::{Listeners, Machine, Parts};
use crate::vcpu::{install_kick_handler, lock};
use crate::virtio::fs::traffic::Counts;
use crate::virtio::fs::{Share, ShareConfig};
use crate::virtio::mem::MemoryHandle;
use crate::virtio::{Broken, vsock};
use clients::{Answer, Clients, Ready};
use devices::{Batch, Known};

/// The control channel is this descriptor of the process.
pub const CONTROL_FD: i32 = 3;

/// Port on which the agent of a machine listens, and host port by which it says so. `podhull-protocol` names the same.
const AGENT_PORT: u32 = 1024;
const READY_PORT: u32 = 1024;
/// File requests served at a time: one that waits for a disk does not hold up the others.
const SHARE_THREADS: usize = 4;
/// What every guest is called: the socket that leads into it tells machines apart, not this.
const GUEST_CID: u64 = 3;

/// Something that happened on another thread.
enum Event {
    Ended(End),
    Broken(&'static str, Broken),
}

/// Events for the main thread, and the eventfd that wakes it.
struct Events {
    queue: Mutex<VecDeque<Event>>,
    wake: OwnedFd,
}

impl Events {
    fn new() -> Result<Arc<Self>, Errno> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self { queue: Mutex::new(VecDeque::new()), wake }))
    }

    fn push(&self, event: Event) {
        lock(&self.queue).push_back(event);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn pop(&self) -> Option<Event> {
        lock(&self.queue).pop_front()
    }
}

/// A machine with what belongs to its process.
struct Process {
    machine: Machine,
    /// What the machine gets when its agent is ready: the share, taps, and devices without descriptors.
    share: Option<Share>,
    /// What is counted of the share.
    traffic: Option<Counts>,
    batch: Batch,
    disks: Vec<Known>,
    devices: Vec<Device>,
    memory_bytes: u64,
    memory: Option<MemoryHandle>,
    ready: EventFd,
    events: Arc<Events>,
    clients: Clients,
    /// What ends with this process.
    held: Vec<OwnedFd>,
}

/// Why the process stops serving.
enum Stop {
    /// The machine ended.
    Ended(End),
    /// The runtime is gone.
    Abandoned,
}

/// Runs a machine over the channel at [`CONTROL_FD`]; returns the process's exit status. Must be called by a process that
/// has one thread and nothing else open that it should not keep.
pub fn main() -> i32 {
    // One arena for all threads: memory of another's the C library gives back only after a look into /proc, which no thread may
    // open, and a guest can have it allocate and free as much as that takes.
    // SAFETY: nothing else runs yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    // SAFETY: whoever starts this process gives it the channel at this number, and nothing else here has it open.
    let channel = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    let (config, fds) = match control::receive(&channel) {
        Ok((Request::Start(config), fds)) => (config, fds),
        Ok(_) => return fail(&channel, "the first request must start the machine"),
        Err(error) => return fail(&channel, &error.to_string()),
    };
    if let Err(error) = fault::install_handlers(CONTROL_FD) {
        return fail(&channel, &format!("signal handlers: {error}"));
    }
    let mut leftovers = Vec::new();
    let started = Process::start(config, fds, &mut leftovers);
    let stop = match started {
        Ok(mut process) => {
            let stop = match control::send(&channel, &Notice::Done, &[]) {
                Ok(()) => process.serve(&channel),
                Err(_) => Stop::Abandoned,
            };
            // Threads may be in the middle of anything; the process ends with them, not after them.
            std::mem::forget(process);
            stop
        }
        Err(error) => {
            fail(&channel, &error);
            wait_for_hangup(&channel);
            Stop::Abandoned
        }
    };
    match stop {
        Stop::Ended(end) => {
            let _ = control::send(&channel, &Notice::Ended(end), &[]);
            1
        }
        Stop::Abandoned => {
            for leftover in leftovers {
                let _ = leftover.remove();
            }
            0
        }
    }
}

/// After a failed start the runtime decides what becomes of the leftovers: it removes them, or it is gone.
fn wait_for_hangup(channel: &OwnedFd) {
    while let Ok((_, _)) = control::receive::<Request>(channel) {}
}

fn fail(channel: &OwnedFd, error: &str) -> i32 {
    let _ = control::send(channel, &Notice::Failed(error.into()), &[]);
    1
}

/// One line for the runtime.
type Line = String;

fn line(error: impl std::fmt::Display) -> Line {
    error.to_string()
}

/// Descriptors of a start request by what they are.
#[derive(Default)]
struct Start {
    kvm: Option<OwnedFd>,
    kernel: Option<File>,
    image: Option<File>,
    console: Option<File>,
    agent: Option<OwnedFd>,
    listener: Option<OwnedFd>,
    control: Option<OwnedFd>,
    batch: Batch,
    held: Vec<OwnedFd>,
    later: Vec<(Resource, OwnedFd)>,
}

impl Start {
    fn sort(resources: Vec<Resource>, fds: Vec<OwnedFd>) -> Result<Self, Line> {
        if resources.len() != fds.len() {
            return Err(format!("{} resources with {} descriptors", resources.len(), fds.len()));
        }
        let mut start = Self::default();
        for (resource, fd) in resources.into_iter().zip(fds) {
            let twice = match resource {
                Resource::Kvm => start.kvm.replace(fd).is_some(),
                Resource::Kernel => start.kernel.replace(fd.into()).is_some(),
                Resource::Image => start.image.replace(fd.into()).is_some(),
                Resource::Console => start.console.replace(fd.into()).is_some(),
                Resource::Agent => start.agent.replace(fd).is_some(),
                Resource::VsockListener => start.listener.replace(fd).is_some(),
                Resource::Control => start.control.replace(fd).is_some(),
                Resource::Hold => {
                    start.held.push(fd);
                    false
                }
                device @ (Resource::Tap { .. } | Resource::Disk { .. }) => {
                    start.batch.resource(device, fd, &[])?;
                    false
                }
                later => {
                    start.later.push((later, fd));
                    false
                }
            };
            if twice {
                return Err("a resource of which a machine has one was given twice".into());
            }
        }
        Ok(start)
    }
}

impl Process {
    fn start(config: MachineConfig, fds: Vec<OwnedFd>, leftovers: &mut Vec<Leftover>) -> Result<Self, Line> {
        let mut config = config;
        let start = Start::sort(std::mem::take(&mut config.resources), fds)?;
        let missing = |what: &str| format!("no {what} was given");
        let parts = Parts {
            kvm: start.kvm.ok_or_else(|| missing("/dev/kvm"))?,
            kernel: start.kernel.ok_or_else(|| missing("guest kernel"))?,
            image: start.image.ok_or_else(|| missing("guest image"))?,
            console: start.console,
        };
        let agent = start.agent.ok_or_else(|| missing("agent channel"))?;
        let clients = Clients::new(start.control).map_err(|e| format!("control socket: {e}"))?;
        let shared = config.devices.contains(&Device::Share);
        let share = enter_jail(start.later, shared, leftovers)?;
        install_kick_handler().map_err(|e| format!("signal handler: {e}"))?;
        let events = Events::new().map_err(|e| format!("eventfd: {e}"))?;
        let listeners = Listeners {
            ended: {
                let events = events.clone();
                Arc::new(move |end| events.push(Event::Ended(end)))
            },
            broken: {
                let events = events.clone();
                Arc::new(move |device, error| events.push(Event::Broken(device, error)))
            },
            confine: Arc::new(Kind::confine),
        };
        let mut machine = Machine::boot(&config, parts, listeners).map_err(line)?;
        let ready = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(|e| format!("eventfd: {e}"))?;
        let options = vsock::Options {
            guest_cid: GUEST_CID,
            agent: Some(agent),
            agent_port: AGENT_PORT,
            ready_port: READY_PORT,
            ready: ready.try_clone().map_err(|e| format!("eventfd: {e}"))?,
            listener: start.listener,
        };
        let device = vsock::Vsock::new(options).map_err(|e| format!("vsock: {e}"))?;
        machine.add_device("vsock", Box::new(device)).map_err(line)?;
        let mut process = Self {
            machine,
            traffic: share.as_ref().map(Share::traffic),
            share,
            batch: start.batch,
            disks: Vec::new(),
            devices: config.devices,
            memory_bytes: config.memory_bytes,
            memory: None,
            ready,
            events,
            clients,
            held: start.held,
        };
        // Before the first instruction of the guest.
        Kind::Main.confine().map_err(|e| format!("confinement: {e}"))?;
        process.machine.run().map_err(line)?;
        Ok(process)
    }

    /// Until the machine ends or the runtime does.
    fn serve(&mut self, channel: &OwnedFd) -> Stop {
        let ready = self.ready.try_clone();
        let events = self.events.clone();
        let Ok(ready) = ready else { return Stop::Ended(End::Failure("no descriptor left".into())) };
        loop {
            let memory = self.memory.clone();
            let (channel_ready, agent_ready, memory_taken, clients_ready) = {
                let mut fds = vec![
                    PollFd::new(channel, PollFlags::IN),
                    PollFd::new(&events.wake, PollFlags::IN),
                    PollFd::from_borrowed_fd(borrow(&ready), PollFlags::IN),
                ];
                fds.extend(memory.iter().map(|memory| PollFd::from_borrowed_fd(borrow(memory.taken()), PollFlags::IN)));
                fds.extend(self.clients.descriptors().map(|(fd, events)| PollFd::from_borrowed_fd(fd, events)));
                match poll(&mut fds, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => return Stop::Ended(End::Failure(format!("poll: {errno}"))),
                }
                let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
                let first = [ready.next(), ready.next(), ready.next()];
                let taken = memory.as_ref().and_then(|_| ready.next());
                (first[0] == Some(true), first[2] == Some(true), taken == Some(true), ready.collect::<Ready>())
            };
            let _ = rustix::io::read(&events.wake, &mut [0; 8]);
            while let Some(event) = events.pop() {
                match event {
                    Event::Ended(end) => return Stop::Ended(end),
                    Event::Broken("vsock", error) => return Stop::Ended(End::Misbehaved(format!("vsock: {error}"))),
                    // The guest has lost this device, and nothing else.
                    Event::Broken(..) => {}
                }
            }
            if agent_ready {
                let _ = ready.read();
                if let Err(error) = self.agent_ready(channel) {
                    return Stop::Ended(End::Failure(error));
                }
            }
            if channel_ready {
                let answer = match control::receive(channel) {
                    Ok((Request::GiveUp, _)) => return Stop::Ended(End::Stuck(self.machine.describe())),
                    Ok((Request::AwaitMemory | Request::Measure, _)) => {
                        Err("who waits for memory, or asks for numbers, does so at the control socket".into())
                    }
                    Ok((request, fds)) => self.carry_out(request, fds).map(drop),
                    Err(ChannelError::Malformed(what)) => Err(what),
                    Err(_) => return Stop::Abandoned,
                };
                let notice = answer.map_or_else(Notice::Failed, |()| Notice::Done);
                if control::send(channel, &notice, &[]).is_err() {
                    return Stop::Abandoned;
                }
            }
            let mut clients = std::mem::take(&mut self.clients);
            clients.serve(&clients_ready, |request, fds| self.carry_out(request, fds));
            if let (true, Some(memory)) = (memory_taken, memory) {
                let _ = memory.taken().read();
                // More may have been asked for since.
                if memory.is_taken() {
                    clients.memory_is_taken();
                }
            }
            self.clients = clients;
        }
    }

    fn agent_ready(&mut self, channel: &OwnedFd) -> Result<(), Line> {
        let exits = self.machine.exits().sum();
        let mut batch = std::mem::take(&mut self.batch);
        for device in std::mem::take(&mut self.devices) {
            match device {
                Device::Share => {
                    let share = self.share.take().ok_or("the share was asked for twice")?;
                    batch.devices.push(("fs", Box::new(share)));
                }
                other => batch.device(other, &self.machine, self.memory.is_some())?,
            }
        }
        self.add(batch)?;
        // A runtime that is gone is seen at the next poll.
        let _ = control::send(channel, &Notice::AgentReady { exits }, &[]);
        Ok(())
    }

    fn carry_out(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<Answer, Line> {
        match request {
            Request::Start(_) => return Err("the machine runs already".into()),
            Request::GiveUp => return Err("who has the machine's channel decides that".into()),
            Request::Add { resources, devices } => {
                if resources.len() != fds.len() {
                    return Err(format!("{} resources with {} descriptors", resources.len(), fds.len()));
                }
                let mut batch = Batch::default();
                let mut held = Vec::new();
                for (resource, fd) in resources.into_iter().zip(fds) {
                    match resource {
                        Resource::Hold => held.push(fd),
                        resource => batch.resource(resource, fd, &self.disks)?,
                    }
                }
                for device in devices {
                    batch.device(device, &self.machine, self.memory.is_some())?;
                }
                self.add(batch)?;
                self.held.append(&mut held);
            }
            Request::SetCpus(count) => self.machine.set_cpus(count).map_err(line)?,
            Request::SetMemory(bytes) => self.set_memory(bytes)?,
            Request::AwaitMemory if self.memory.as_ref().is_some_and(|memory| !memory.is_taken()) => {
                return Ok(Answer::OnceMemoryIsTaken);
            }
            Request::AwaitMemory => {}
            Request::Measure => {
                return Ok(Answer::Measured(Measured {
                    cpus: self.machine.cpus(),
                    memory_bytes: self.memory_bytes + self.memory.as_ref().map_or(0, MemoryHandle::plugged),
                    exits: self.machine.exits(),
                    share: self.traffic.as_ref().map(Counts::so_far),
                }));
            }
        }
        Ok(Answer::Now)
    }

    /// Puts all of it on the bus, or nothing.
    fn add(&mut self, batch: Batch) -> Result<(), Line> {
        self.machine.add_devices(batch.devices).map_err(line)?;
        if batch.memory.is_some() {
            self.memory = batch.memory;
        }
        self.disks.extend(batch.disks);
        Ok(())
    }

    fn set_memory(&mut self, bytes: u64) -> Result<(), Line> {
        let more = bytes.saturating_sub(self.memory_bytes);
        if self.memory.is_none() && more > 0 {
            let mut batch = Batch::default();
            batch.device(Device::Memory, &self.machine, false)?;
            self.add(batch)?;
        }
        match &self.memory {
            Some(memory) => memory.resize(more).map_err(line),
            None if more == 0 => Ok(()),
            None => Err(format!("{bytes} bytes of memory; this machine may have {}", self.memory_bytes)),
        }
    }
}

/// Takes from the process all that the machine and its devices do not need, and makes the share, whose threads keep what
/// serving files takes.
fn enter_jail(
    resources: Vec<(Resource, OwnedFd)>,
    shared: bool,
    leftovers: &mut Vec<Leftover>,
) -> Result<Option<Share>, Line> {
    raise_descriptor_limit();
    let jail = Jail::enter().map_err(line)?;
    for (resource, fd) in resources {
        match resource {
            Resource::Mount { path } => jail.attach(&path, &fd).map_err(line)?,
            Resource::SharedMount { name, user } => jail.attach_shared(&name, &user, &fd).map_err(line)?,
            Resource::Remove { name } => leftovers.push(Leftover::new(fd, name).map_err(line)?),
            other => return Err(format!("{other:?} was given twice")),
        }
    }
    let jail = jail.close(leftovers).map_err(line)?;
    let share = if shared {
        let proc_self_fd = jail.proc_self_fd().map_err(|e| format!("/proc/self/fd: {e}"))?;
        let share = Share::new(ShareConfig {
            tag: SHARE_TAG.into(),
            root: "/".into(),
            proc_self_fd,
            threads: SHARE_THREADS,
            confine: Box::new(|| Kind::Files.confine()),
        });
        Some(share.map_err(line)?)
    } else {
        None
    };
    jail.leave_files(leftovers).map_err(line)?;
    Ok(share)
}

fn borrow(eventfd: &EventFd) -> BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open for as long as the borrowed eventfd.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}
