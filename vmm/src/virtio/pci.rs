//! virtio over PCI (4.1): modern only, one function per device, MSI-X, all registers in one BAR.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::worker::{Running, Thread};
use super::{
    ActivateError, Activation, ActiveQueue, Broken, Device, DeviceState, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1,
    Interrupt, Worker,
};
use crate::memory::SharedMemory;
use crate::pci::config::{ConfigSpace, ConfigState, Identity};
use crate::pci::msix::{self, Msix, MsixState};
use crate::pci::{self};

/// Red Hat's vendor ID, which virtio uses, and the base to which the virtio device ID is added (4.1.2).
const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
/// "Communication controller, other": no driver but virtio's claims it.
const CLASS: [u8; 3] = [0x00, 0x80, 0x07];

/// Layout of the BAR.
const BAR_SIZE: u32 = 0x8000;
const COMMON: u64 = 0x0;
const COMMON_LENGTH: u64 = 0x40;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const DEVICE_LENGTH: u64 = 0x1000;
const NOTIFY: u64 = 0x3000;
const NOTIFY_MULTIPLIER: u32 = 4;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x4800;

/// Vendor-specific capability and its types (4.1.4).
const CAPABILITY_VENDOR: u8 = 0x09;
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;

/// Device status bits (2.1).
mod status {
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 0x40;
}

/// No vector (4.1.4.3).
const NO_VECTOR: u16 = 0xffff;

/// What the driver has said of a queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct QueueSetup {
    size: u16,
    vector: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

/// What the driver has said, as long as it may change its mind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Setup {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    queue_select: u16,
    queues: Vec<QueueSetup>,
}

/// A device whose queues run, or would if the machine were not paused.
struct Active {
    running: Option<Running>,
    paused: Option<Box<dyn Worker>>,
    kicks: Vec<Option<EventFd>>,
    bar: u64,
}

/// Called when the driver of a device broke the rules.
pub type OnBroken = Arc<dyn Fn(&'static str, Broken) + Send + Sync>;

/// A virtio device in a PCI slot.
pub struct VirtioPci {
    name: &'static str,
    device: Box<dyn Device>,
    thread: Thread,
    memory: SharedMemory,
    vm: Arc<VmFd>,
    config: ConfigSpace,
    msix_capability: usize,
    msix: Msix,
    /// Shared with the worker's thread, which sets `NEEDS_RESET`.
    status: Arc<AtomicU8>,
    setup: Setup,
    /// There is no way from here to the queues but through reset: writes to `setup` are refused while it is `Some`.
    active: Option<Active>,
    on_broken: OnBroken,
}

/// A device in its slot as a plain value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioPciState {
    config: ConfigState,
    msix: MsixState,
    status: u8,
    setup: Setup,
    /// Positions in the rings, if the device was active.
    queues: Option<Vec<Option<RingPosition>>>,
    device: DeviceState,
}

/// How far a queue has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct RingPosition {
    next_avail: u16,
    next_used: u16,
}

impl VirtioPci {
    /// Makes a slot's function of `device`, which runs on `thread`. `name` is what its errors are called.
    pub fn new(
        name: &'static str,
        device: Box<dyn Device>,
        thread: Thread,
        memory: SharedMemory,
        vm: Arc<VmFd>,
        on_broken: OnBroken,
    ) -> Self {
        let queues = device.queue_sizes().len();
        let identity = Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + device.id(),
            revision: 1,
            class: CLASS,
            subsystem: (VENDOR, DEVICE_BASE + device.id()),
        };
        let mut config = ConfigSpace::new(identity, BAR_SIZE);
        for (kind, offset, length) in
            [(TYPE_COMMON, COMMON, COMMON_LENGTH), (TYPE_ISR, ISR, 4), (TYPE_DEVICE, DEVICE, DEVICE_LENGTH)]
        {
            config.add_capability(CAPABILITY_VENDOR, &virtio_capability(kind, offset, length, &[]), &[]);
        }
        let length = u64::from(NOTIFY_MULTIPLIER) * queues as u64;
        let notify = virtio_capability(TYPE_NOTIFY, NOTIFY, length, &NOTIFY_MULTIPLIER.to_le_bytes());
        config.add_capability(CAPABILITY_VENDOR, &notify, &[]);
        // One vector per queue, one for configuration changes.
        let vectors = queues + 1;
        let mut body = Vec::new();
        body.extend((vectors as u16 - 1).to_le_bytes());
        body.extend((MSIX_TABLE as u32).to_le_bytes());
        body.extend((MSIX_PENDING as u32).to_le_bytes());
        let msix_capability = config.add_capability(msix::CAPABILITY, &body, &msix::CONTROL_WRITABLE);
        let msix = Msix::new((0..vectors).map(|_| Interrupt::msi(vm.clone())).collect());
        let setup = Setup::new(&*device);
        Self {
            name,
            device,
            thread,
            memory,
            vm,
            config,
            msix_capability,
            msix,
            status: Arc::new(AtomicU8::new(0)),
            setup,
            active: None,
            on_broken,
        }
    }

    /// Stops the worker after the request it is at. The queues stay where they are.
    pub fn pause(&mut self) {
        if let Some(active) = &mut self.active
            && let Some(running) = active.running.take()
        {
            active.paused = running.stop();
        }
    }

    /// Lets a paused worker go on.
    pub fn resume(&mut self) -> Result<(), ActivateError> {
        let Some(worker) = self.active.as_mut().and_then(|active| active.paused.take()) else { return Ok(()) };
        let running = self.run(worker)?;
        if let Some(active) = &mut self.active {
            active.running = Some(running);
        }
        Ok(())
    }

    /// State of a paused device.
    pub fn save(&self) -> VirtioPciState {
        let positions = |worker: &dyn Worker| {
            let position = |queue: &ActiveQueue| {
                let QueueState { next_avail, next_used, .. } = queue.state();
                RingPosition { next_avail, next_used }
            };
            worker.queues().into_iter().map(|queue| queue.map(position)).collect()
        };
        VirtioPciState {
            config: self.config.save(),
            msix: self.msix.save(),
            status: self.status.load(Ordering::SeqCst),
            setup: self.setup.clone(),
            queues: self.active.as_ref().and_then(|active| active.paused.as_deref()).map(positions),
            device: self.device.save(),
        }
    }

    /// Puts a state into a fresh device; it is paused then.
    pub fn restore(&mut self, state: &VirtioPciState) -> Result<(), ActivateError> {
        if state.setup.queues.len() != self.setup.queues.len() || !self.msix.restore(&state.msix) {
            return Err(ActivateError::State(format!("not that of a {} device", self.name)));
        }
        self.config.restore(&state.config);
        self.setup.clone_from(&state.setup);
        self.status.store(state.status, Ordering::SeqCst);
        self.device.restore(&state.device)?;
        if let Some(positions) = &state.queues {
            self.activate(Some(positions))?;
        }
        Ok(())
    }

    fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        let current = self.status.load(Ordering::SeqCst);
        let mut added = value & !current;
        if added & status::FEATURES_OK != 0 {
            let offered = offered_features(&*self.device);
            let accepted = self.setup.driver_features;
            if accepted & !offered != 0 || accepted & F_VERSION_1 == 0 {
                added &= !status::FEATURES_OK;
            }
        }
        let now = self.status.fetch_or(added & !status::NEEDS_RESET, Ordering::SeqCst) | added;
        let ready = status::FEATURES_OK | status::DRIVER_OK;
        if added & status::DRIVER_OK != 0
            && now & ready == ready
            && self.active.is_none()
            && let Err(error) = self.activate(None).and_then(|()| self.resume())
        {
            self.status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
            (self.on_broken)(self.name, Broken::Activate(error));
        }
    }

    /// Builds the queues of what the driver set up; the device is paused then.
    fn activate(&mut self, positions: Option<&[Option<RingPosition>]>) -> Result<(), ActivateError> {
        let (bar, _) = self.config.bar().ok_or(ActivateError::NotDecoded)?;
        let mut kicks = Vec::new();
        let mut queues = Vec::new();
        for (index, setup) in self.setup.queues.iter().enumerate() {
            if !setup.enabled {
                kicks.push(None);
                queues.push(None);
                continue;
            }
            let queue = self.build_queue(index, setup, positions)?;
            let host = |what| move |e: std::io::Error| ActivateError::Host(what, e);
            let kick = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host("eventfd"))?;
            let address = IoEventAddress::Mmio(notify_address(bar, index));
            self.vm
                .register_ioevent(&kick, &address, NoDatamatch)
                .map_err(|e| ActivateError::Host("KVM_IOEVENTFD", std::io::Error::from_raw_os_error(e.errno())))?;
            kicks.push(Some(kick.try_clone().map_err(host("dup"))?));
            let interrupt = self.vector(setup.vector);
            queues.push(Some(ActiveQueue::new(queue, self.memory.clone(), kick, interrupt)));
        }
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.setup.driver_features,
            queues,
            config_interrupt: self.vector(self.setup.config_vector),
        };
        let activated = self.device.activate(activation);
        let paused = match activated {
            Ok(worker) => Some(worker),
            Err(error) => {
                self.unregister(bar, &kicks);
                return Err(error);
            }
        };
        self.active = Some(Active { running: None, paused, kicks, bar });
        Ok(())
    }

    fn build_queue(
        &self,
        index: usize,
        setup: &QueueSetup,
        positions: Option<&[Option<RingPosition>]>,
    ) -> Result<Queue, ActivateError> {
        let invalid = |_| ActivateError::QueueInvalid(index);
        let mut queue = Queue::new(self.device.queue_sizes()[index]).map_err(invalid)?;
        queue.try_set_size(setup.size).map_err(invalid)?;
        queue.try_set_desc_table_address(GuestAddress(setup.descriptors)).map_err(invalid)?;
        queue.try_set_avail_ring_address(GuestAddress(setup.driver)).map_err(invalid)?;
        queue.try_set_used_ring_address(GuestAddress(setup.device)).map_err(invalid)?;
        queue.set_event_idx(self.setup.driver_features & F_EVENT_IDX != 0);
        queue.set_ready(true);
        if let Some(position) = positions.and_then(|all| all.get(index).copied().flatten()) {
            queue.set_next_avail(position.next_avail);
            queue.set_next_used(position.next_used);
        }
        if queue.is_valid(&*self.memory) { Ok(queue) } else { Err(ActivateError::QueueInvalid(index)) }
    }

    /// The interrupt of a vector; one that goes nowhere if the driver gave none.
    fn vector(&self, vector: u16) -> Interrupt {
        self.msix.vector(vector).cloned().unwrap_or_else(|| Interrupt::msi(self.vm.clone()))
    }

    fn run(&self, worker: Box<dyn Worker>) -> Result<Running, ActivateError> {
        let (name, status, on_broken) = (self.name, self.status.clone(), self.on_broken.clone());
        let interrupt = self.vector(self.setup.config_vector);
        let broken = move |error| {
            status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
            interrupt.trigger();
            on_broken(name, error);
        };
        self.thread.start(worker, broken).map_err(|e| ActivateError::Host("thread", e))
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            drop(active.running);
            self.unregister(active.bar, &active.kicks);
        }
        self.device.reset();
        self.setup = Setup::new(&*self.device);
        self.status.store(0, Ordering::SeqCst);
    }

    fn unregister(&self, bar: u64, kicks: &[Option<EventFd>]) {
        for (index, kick) in kicks.iter().enumerate() {
            if let Some(kick) = kick {
                let _ =
                    self.vm.unregister_ioevent(kick, &IoEventAddress::Mmio(notify_address(bar, index)), NoDatamatch);
            }
        }
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        let setup = &self.setup;
        let queue = setup.queues.get(usize::from(setup.queue_select));
        let of_queue = |value: fn(&QueueSetup) -> u64| queue.map_or(0, value);
        let half = |features: u64, select: u32| match select {
            0 => features & 0xffff_ffff,
            1 => features >> 32,
            _ => 0,
        };
        // Register widths and offsets of `struct virtio_pci_common_cfg` (4.1.4.3).
        let (value, width): (u64, usize) = match offset {
            0x00 => (setup.device_feature_select.into(), 4),
            0x04 => (half(offered_features(&*self.device), setup.device_feature_select), 4),
            0x08 => (setup.driver_feature_select.into(), 4),
            0x0c => (half(setup.driver_features, setup.driver_feature_select), 4),
            0x10 => (setup.config_vector.into(), 2),
            0x12 => (setup.queues.len() as u64, 2),
            0x14 => (self.status.load(Ordering::SeqCst).into(), 1),
            0x15 => (u64::from(self.vector(setup.config_vector).raised() & 0xff), 1),
            0x16 => (setup.queue_select.into(), 2),
            0x18 => (of_queue(|q| q.size.into()), 2),
            0x1a => (queue.map_or(NO_VECTOR.into(), |q| q.vector.into()), 2),
            0x1c => (of_queue(|q| q.enabled.into()), 2),
            0x1e => (setup.queue_select.into(), 2),
            0x20 => (of_queue(|q| q.descriptors), 8),
            0x24 => (of_queue(|q| q.descriptors >> 32), 4),
            0x28 => (of_queue(|q| q.driver), 8),
            0x2c => (of_queue(|q| q.driver >> 32), 4),
            0x30 => (of_queue(|q| q.device), 8),
            0x34 => (of_queue(|q| q.device >> 32), 4),
            _ => (0, 8),
        };
        let bytes = value.to_le_bytes();
        data.fill(0);
        let length = data.len().min(width);
        data[..length].copy_from_slice(&bytes[..length]);
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        bytes[..data.len().min(8)].copy_from_slice(&data[..data.len().min(8)]);
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            (0x14, 1) => self.set_status(value as u8),
            // Selectors are windows, not configuration.
            (0x00, 4) => self.setup.device_feature_select = value as u32,
            (0x08, 4) => self.setup.driver_feature_select = value as u32,
            (0x16, 2) => self.setup.queue_select = value as u16,
            // What runs is set up for good: the driver has to reset the device first.
            _ if self.active.is_some() => {}
            (0x0c, 4) if self.status.load(Ordering::SeqCst) & status::FEATURES_OK == 0 => {
                let features = &mut self.setup.driver_features;
                match self.setup.driver_feature_select {
                    0 => *features = *features & !0xffff_ffff | value,
                    1 => *features = *features & 0xffff_ffff | value << 32,
                    _ => {}
                }
            }
            (0x10, 2) => self.setup.config_vector = self.checked_vector(value as u16),
            (offset, length) => {
                let vector = self.checked_vector(value as u16);
                if let Some(queue) = self.setup.queues.get_mut(usize::from(self.setup.queue_select)) {
                    queue.write(offset, length, value, vector);
                }
            }
        }
    }

    fn checked_vector(&self, vector: u16) -> u16 {
        if self.msix.vector(vector).is_some() { vector } else { NO_VECTOR }
    }
}

impl Setup {
    fn new(device: &dyn Device) -> Self {
        let queue =
            |&size: &u16| QueueSetup { size, vector: NO_VECTOR, enabled: false, descriptors: 0, driver: 0, device: 0 };
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            queues: device.queue_sizes().iter().map(queue).collect(),
        }
    }
}

impl QueueSetup {
    fn write(&mut self, offset: u64, length: usize, value: u64, vector: u16) {
        let low = |register: &mut u64| *register = *register & !0xffff_ffff | value;
        let high = |register: &mut u64| *register = *register & 0xffff_ffff | value << 32;
        match (offset, length) {
            (0x18, 2) => self.size = value as u16,
            (0x1a, 2) => self.vector = vector,
            // A driver may enable a queue and never disable it but by reset (4.1.4.3.2).
            (0x1c, 2) => self.enabled |= value == 1,
            (0x20, 8) => self.descriptors = value,
            (0x20, 4) => low(&mut self.descriptors),
            (0x24, 4) => high(&mut self.descriptors),
            (0x28, 8) => self.driver = value,
            (0x28, 4) => low(&mut self.driver),
            (0x2c, 4) => high(&mut self.driver),
            (0x30, 8) => self.device = value,
            (0x30, 4) => low(&mut self.device),
            (0x34, 4) => high(&mut self.device),
            _ => {}
        }
    }
}

impl pci::Function for VirtioPci {
    fn read_config(&self, register: usize, data: &mut [u8]) {
        self.config.read(register, data);
    }

    fn write_config(&mut self, register: usize, data: &[u8]) {
        // The ioeventfds of an active device are where its BAR was: it stays there.
        if self.active.is_some() && ConfigSpace::is_bar(register, data.len()) {
            return;
        }
        self.config.write(register, data);
        if register + data.len() > self.msix_capability && register < self.msix_capability + 4 {
            self.msix.set_control(self.config.get16(self.msix_capability + 2));
        }
    }

    fn memory(&self) -> Option<(u64, u64)> {
        self.config.bar()
    }

    fn read_memory(&mut self, offset: u64, data: &mut [u8]) {
        match offset {
            COMMON..ISR => self.read_common(offset - COMMON, data),
            // Only legacy interrupts use it.
            ISR..DEVICE => data.fill(0),
            DEVICE..NOTIFY => {
                data.fill(0);
                self.device.read_config(offset - DEVICE, data);
            }
            MSIX_TABLE..MSIX_PENDING => self.msix.read_table(offset - MSIX_TABLE, data),
            MSIX_PENDING.. => self.msix.read_pending(offset - MSIX_PENDING, data),
            _ => {}
        }
    }

    fn write_memory(&mut self, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => self.write_common(offset - COMMON, data),
            DEVICE..NOTIFY => self.device.write_config(offset - DEVICE, data),
            // Comes here only if the queue is not enabled, or by a write KVM's ioeventfd does not match.
            NOTIFY..MSIX_TABLE => {
                let index = ((offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER)) as usize;
                if let Some(Some(kick)) = self.active.as_ref().and_then(|active| active.kicks.get(index)) {
                    let _ = kick.write(1);
                }
            }
            MSIX_TABLE..MSIX_PENDING => self.msix.write_table(offset - MSIX_TABLE, data),
            _ => {}
        }
    }
}

/// Body of a virtio capability, after its ID and next pointer (4.1.4).
fn virtio_capability(kind: u8, offset: u64, length: u64, extra: &[u8]) -> Vec<u8> {
    let mut body = vec![(16 + extra.len()) as u8, kind, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((length as u32).to_le_bytes());
    body.extend(extra);
    body
}

fn notify_address(bar: u64, queue: usize) -> u64 {
    bar + NOTIFY + u64::from(NOTIFY_MULTIPLIER) * queue as u64
}

fn offered_features(device: &dyn Device) -> u64 {
    device.features() | F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX
}
