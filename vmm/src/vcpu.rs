//! A virtual CPU on its thread.

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::arch::state::{StateContext, StateError, VcpuState, describe};
use crate::bus::Bus;
use crate::control::{End, Exits};
use crate::jail::{Confine, Kind};

/// What the machine tells a vCPU's thread.
enum Command {
    Run,
    Pause(SyncSender<()>),
    Save(SyncSender<Result<VcpuState, StateError>>),
    Restore(Box<VcpuState>, SyncSender<Result<(), StateError>>),
    Describe(SyncSender<String>),
    Leave,
}

/// How long a vCPU may take to come out of the guest and say where it was.
const DESCRIBE: Duration = Duration::from_secs(1);

/// A vCPU: paused when made, running after [`Vcpu::run`].
pub struct Vcpu {
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

/// Counts of [`Exits`].
#[derive(Default)]
pub struct Counts {
    port_reads: AtomicU64,
    port_writes: AtomicU64,
    mmio_reads: AtomicU64,
    mmio_writes: AtomicU64,
    others: AtomicU64,
}

impl Counts {
    fn count(&self, exit: &VcpuExit<'_>) {
        let counter = match exit {
            VcpuExit::IoIn(..) => &self.port_reads,
            VcpuExit::IoOut(..) => &self.port_writes,
            VcpuExit::MmioRead(..) => &self.mmio_reads,
            VcpuExit::MmioWrite(..) => &self.mmio_writes,
            _ => &self.others,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// What was counted so far.
    pub fn so_far(&self) -> Exits {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Exits {
            port_reads: of(&self.port_reads),
            port_writes: of(&self.port_writes),
            mmio_reads: of(&self.mmio_reads),
            mmio_writes: of(&self.mmio_writes),
            others: of(&self.others),
        }
    }
}

/// What all vCPUs of a machine share.
#[derive(Clone)]
pub struct Shared {
    /// Ports and memory-mapped devices.
    pub bus: Arc<Bus>,
    /// Exits to user space so far, of all vCPUs.
    pub exits: Arc<Counts>,
    /// Called when a vCPU cannot go on, or the guest asks for the end; from its thread.
    pub ended: Arc<dyn Fn(End) + Send + Sync>,
    /// What saving and restoring needs to know of the host.
    pub context: Arc<StateContext>,
    /// Called on each thread before it runs.
    pub confine: Confine,
}

extern "C" fn interrupt_only(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    IMMEDIATE_EXIT.with(|flag| {
        let flag = flag.get();
        if !flag.is_null() {
            // SAFETY: the pointer is to this thread's own kvm_run page, which outlives the thread's loop; one byte, volatile
            // because KVM reads it.
            unsafe { flag.write_volatile(1) };
        }
    });
}

thread_local! {
    /// `immediate_exit` of the vCPU that runs on this thread: set by the signal's handler, so that a signal that comes just
    /// before `KVM_RUN` is not lost.
    static IMMEDIATE_EXIT: std::cell::Cell<*mut u8> = const { std::cell::Cell::new(std::ptr::null_mut()) };
}

/// Installs the handler of the signal by which vCPU threads are called out of the guest. Once per process.
pub fn install_kick_handler() -> std::io::Result<()> {
    register_signal_handler(SIGRTMIN(), interrupt_only).map_err(|e| std::io::Error::from_raw_os_error(e.errno()))
}

impl Vcpu {
    /// Moves `fd` to a thread of its own, paused. One that cannot be confined ends the machine.
    pub fn spawn(index: u32, fd: VcpuFd, shared: Shared) -> std::io::Result<Self> {
        let (commands, receiver) = channel();
        let thread =
            std::thread::Builder::new().name(format!("vcpu{index}")).stack_size(128 * 1024).spawn(move || {
                match (shared.confine)(Kind::Vcpu) {
                    Ok(()) => Loop { fd, shared }.serve(&receiver),
                    Err(error) => (shared.ended)(End::Failure(format!("confinement of a vCPU's thread: {error}"))),
                }
            })?;
        Ok(Self { commands, thread: Some(thread) })
    }

    /// Lets it run.
    pub fn run(&self) {
        let _ = self.commands.send(Command::Run);
    }

    /// Returns when it does not run any more and has no I/O half done.
    pub fn pause(&self) {
        let (done, paused) = sync_channel(1);
        let _ = self.commands.send(Command::Pause(done));
        self.kick();
        let _ = paused.recv();
    }

    /// State of a paused vCPU; `None` if its thread has ended.
    pub fn save(&self) -> Option<Result<VcpuState, StateError>> {
        let (answer, state) = sync_channel(1);
        self.commands.send(Command::Save(answer)).ok()?;
        state.recv().ok()
    }

    /// Puts a state into a paused vCPU; `None` if its thread has ended.
    pub fn restore(&self, state: VcpuState) -> Option<Result<(), StateError>> {
        let (answer, done) = sync_channel(1);
        self.commands.send(Command::Restore(Box::new(state), answer)).ok()?;
        done.recv().ok()
    }

    /// What it is doing, in words; it goes on with it. `None` if its thread has ended, or does not answer in time.
    pub fn describe(&self) -> Option<String> {
        let (answer, said) = sync_channel(1);
        self.commands.send(Command::Describe(answer)).ok()?;
        self.kick();
        said.recv_timeout(DESCRIBE).ok()
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            // SAFETY: the thread has not been joined, so its handle is valid; the signal has a handler.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Leave);
        self.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Why `KVM_RUN` is not called again for now.
enum Stop {
    Interrupted,
    Ended,
}

struct Loop {
    fd: VcpuFd,
    shared: Shared,
}

impl Loop {
    fn serve(mut self, commands: &Receiver<Command>) {
        IMMEDIATE_EXIT.with(|flag| flag.set(&raw mut self.fd.get_kvm_run().immediate_exit));
        let mut running = false;
        loop {
            let command = if running {
                // Before it runs, too: a kick from before the flag was set is lost, but the command it was for is here.
                match commands.try_recv() {
                    Ok(command) => command,
                    Err(std::sync::mpsc::TryRecvError::Empty) => {
                        running = matches!(self.run(), Stop::Interrupted);
                        continue;
                    }
                    Err(std::sync::mpsc::TryRecvError::Disconnected) => break,
                }
            } else {
                match commands.recv() {
                    Ok(command) => command,
                    Err(_) => break,
                }
            };
            match command {
                Command::Run => running = true,
                Command::Pause(done) => {
                    if running {
                        self.complete_io();
                    }
                    running = false;
                    let _ = done.send(());
                }
                Command::Save(answer) => {
                    let _ = answer.send(VcpuState::save(&self.fd, &self.shared.context));
                }
                Command::Restore(state, answer) => {
                    let _ = answer.send(state.restore(&self.fd, &self.shared.context));
                }
                Command::Describe(answer) => {
                    let _ = answer.send(describe(&self.fd));
                }
                Command::Leave => break,
            }
        }
        IMMEDIATE_EXIT.with(|flag| flag.set(std::ptr::null_mut()));
    }

    /// An exit for I/O is complete only when `KVM_RUN` is entered again: enter it, and come straight back.
    fn complete_io(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
    }

    fn run(&mut self) -> Stop {
        let Shared { bus, exits, ended, .. } = &self.shared;
        loop {
            match self.fd.run() {
                Ok(exit) => {
                    exits.count(&exit);
                    match exit {
                        VcpuExit::IoOut(port, data) => {
                            // The data is in the run page, which the address ring's reader below also needs.
                            let mut copy = [0; 8];
                            let length = data.len().min(copy.len());
                            copy[..length].copy_from_slice(&data[..length]);
                            if let Some(end) = bus.write_port(&mut self.fd, port, &copy[..length]) {
                                ended(end);
                                return Stop::Ended;
                            }
                        }
                        VcpuExit::IoIn(port, data) => {
                            let length = data.len();
                            let data = data.as_mut_ptr();
                            let mut copy = [0xff; 8];
                            let count = length.min(copy.len());
                            bus.read_port(&mut self.fd, port, &mut copy[..count]);
                            // SAFETY: `data` points into the run page, which is mapped for as long as `self.fd` is and is
                            // not otherwise borrowed here; `count` is at most the length KVM gave.
                            unsafe { data.copy_from_nonoverlapping(copy.as_ptr(), count) };
                        }
                        VcpuExit::MmioRead(address, data) => bus.read_memory(address, data),
                        VcpuExit::MmioWrite(address, data) => bus.write_memory(address, data),
                        VcpuExit::Shutdown => {
                            ended(End::Crash(format!("triple fault; {}", self.location())));
                            return Stop::Ended;
                        }
                        VcpuExit::Intr => return Stop::Interrupted,
                        VcpuExit::InternalError => {
                            // SAFETY: this exit's reason says which member of the union is meant (KVM API, 5: `internal`).
                            let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
                            let length = internal.data.len().min(internal.ndata as usize);
                            let (kind, data) = (internal.suberror, &internal.data[..length]);
                            let what =
                                format!("KVM cannot go on: internal error {kind}, data {data:#x?}").replace('\n', "");
                            ended(End::Crash(format!("{what}; {}", self.location())));
                            return Stop::Ended;
                        }
                        other => {
                            let what = format!("unexpected exit {other:?}");
                            ended(End::Crash(format!("{what}; {}", self.location())));
                            return Stop::Ended;
                        }
                    }
                }
                Err(error) => match error.errno() {
                    libc::EINTR => {
                        self.fd.set_kvm_immediate_exit(0);
                        return Stop::Interrupted;
                    }
                    libc::EAGAIN => {}
                    errno => {
                        let error = std::io::Error::from_raw_os_error(errno);
                        ended(End::Crash(format!("KVM_RUN: {error}; {}", self.location())));
                        return Stop::Ended;
                    }
                },
            }
        }
    }

    fn location(&self) -> String {
        self.fd.get_regs().map_or_else(|e| format!("registers: {e}"), |regs| format!("rip {:#x}", regs.rip))
    }
}

/// A slot that is locked for a few lines at a time; a panic elsewhere does not make its content wrong.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
