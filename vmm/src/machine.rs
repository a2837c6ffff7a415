//! A machine: guest memory, vCPUs and a PCI bus, put together in the order that KVM likes best: memory, interrupt
//! controller, vCPU.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use kvm_bindings::{CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_MEM_READONLY, kvm_enable_cap, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use vm_memory::{GuestMemory as _, GuestMemoryRegion};

use crate::arch::boot::{self, Boot, BootError};
use crate::arch::cpuid;
use crate::arch::layout::{HUGE_PAGE, IMAGE, IMAGE_MAX, RAM_END_MAX};
use crate::arch::state::{StateContext, StateError};
use crate::bus::Bus;
use crate::control::{End, Exits, MachineConfig};
use crate::jail::Confine;
use crate::kernel::{self, KernelError};
use crate::memory::discard::FileBacked;
use crate::memory::{self, MemoryError, SharedMemory};
use crate::pci;
use crate::vcpu::{Shared, Vcpu, lock};
use crate::virtio::pci::{OnBroken, VirtioPci};
use crate::virtio::worker::Thread;
use crate::virtio::{ActivateError, Device};

/// Fewest bytes of RAM a machine boots with.
const RAM_MIN: u64 = 32 << 20;
/// Most CPUs: what the local APIC's and the kernel's tables are made for.
pub const CPUS_MAX: u32 = 64;

/// PCI configuration address register: writes to it need no answer, so KVM collects them.
const CONFIG_ADDRESS: IoEventAddress = IoEventAddress::Pio(0xcf8);

/// Kernel command line of every machine:
/// `reboot=k panic=-1` make a panic one write to port 0x64; `pci=noearly` leaves out the search for quirky chipsets (a fifth
/// of all exits to user space); `noreplace-smp` leaves the lock prefixes as they are; `maxcpus=1` leaves the other CPUs to the agent; what virtio-mem brings can be taken away again; the network that the pod's containers see begins without a
/// device that only stands for one.
const CMDLINE: &str = "reboot=k panic=-1 pci=noearly noreplace-smp maxcpus=1 memhp_default_state=online_movable \
    dummy.numdummies=0 \
    root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro init=/sbin/podhull-agent";

/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The configuration asks for what cannot be.
    #[error("machine configuration: {0}")]
    Config(String),
    /// KVM refused.
    #[error("{what}: {source}")]
    Kvm {
        /// Which request.
        what: &'static str,
        /// Its error.
        source: io::Error,
    },
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Not a kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The boot tables do not fit.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Not an image.
    #[error("guest image: {0}; install it again")]
    Image(String),
    /// vCPU state.
    #[error(transparent)]
    State(#[from] StateError),
    /// The PCI bus is full.
    #[error(transparent)]
    Bus(#[from] pci::Full),
    /// A device would not go on.
    #[error("device: {0}")]
    Device(#[from] ActivateError),
}

pub(crate) fn kvm<T>(what: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, BuildError> {
    result.map_err(|e| BuildError::Kvm { what, source: io::Error::from_raw_os_error(e.errno()) })
}

/// What a machine is built of.
#[derive(Debug)]
pub struct Parts {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// Guest kernel.
    pub kernel: File,
    /// Guest image.
    pub image: File,
    /// Gets what the kernel prints, if anything should.
    pub console: Option<File>,
}

/// Whom a machine calls from its threads.
pub struct Listeners {
    /// A vCPU cannot go on, or the guest asked for the end.
    pub ended: Arc<dyn Fn(End) + Send + Sync>,
    /// A device was stopped because its driver broke the rules.
    pub broken: OnBroken,
    /// Confines each thread of the machine before it does anything.
    pub confine: Confine,
}

/// A machine, paused until [`Machine::run`].
pub struct Machine {
    pub(crate) vm: Arc<VmFd>,
    memory: SharedMemory,
    file_backed: Arc<FileBacked>,
    cpuid: CpuId,
    cpus_max: u8,
    pub(crate) shared: Shared,
    broken: OnBroken,
    pub(crate) devices: Vec<Arc<Mutex<VirtioPci>>>,
    pub(crate) vcpus: Vec<Vcpu>,
    running: bool,
}

impl Machine {
    /// Builds a machine that will boot the kernel.
    pub fn boot(config: &MachineConfig, parts: Parts, listeners: Listeners) -> Result<Self, BuildError> {
        let (ram, hotplug, cpus) = check(config)?;
        let image_size = parts.image.metadata().map_err(|e| BuildError::Image(e.to_string()))?.len();
        let memory = memory::build(ram, hotplug)?;
        let entry = kernel::load(&parts.kernel, &memory)?;
        let cmdline = cmdline(config, parts.console.is_some());
        boot::write_tables(&memory, &Boot { ram, image: image_size, cpus, cmdline: &cmdline, entry })?;

        let mut machine = Self::assemble(parts.kvm, memory, FileBacked::default(), cpus, parts.console, listeners)?;
        machine.map_image(&parts.image, image_size)?;
        machine.prepare_vm()?;
        let first = machine.create_vcpu(0)?;
        let sregs = kvm("KVM_GET_SREGS", first.get_sregs())?;
        kvm("KVM_SET_SREGS", first.set_sregs(&boot::entry_special_registers(sregs)))?;
        kvm("KVM_SET_REGS", first.set_regs(&boot::entry_registers(entry)))?;
        machine.spawn_vcpu(0, first)?;
        Ok(machine)
    }

    /// The VM with its memory, without vCPUs.
    fn assemble(
        kvm_fd: OwnedFd,
        memory: memory::GuestMemory,
        file_backed: FileBacked,
        cpus_max: u8,
        console: Option<File>,
        listeners: Listeners,
    ) -> Result<Self, BuildError> {
        // SAFETY: the descriptor is owned and handed over; whether it is KVM's the next call tells.
        let kvm_handle = unsafe { Kvm::from_raw_fd(kvm_fd.into_raw_fd()) };
        let vm = kvm("KVM_CREATE_VM (is this /dev/kvm?)", kvm_handle.create_vm())?;
        for (slot, region) in memory.iter().enumerate() {
            let host = memory.get_host_address(region.start_addr()).map_err(BootError::from)?;
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: host as u64,
            };
            // SAFETY: the region is mapped for the life of the process, and nothing else of it lies there.
            kvm("KVM_SET_USER_MEMORY_REGION", unsafe { vm.set_user_memory_region(region) })?;
        }
        let cpuid = kvm("KVM_GET_SUPPORTED_CPUID", cpuid::supported(&kvm_handle))?;
        let context = StateContext::new(&kvm_handle, &vm)?;
        let bus = Arc::new(Bus::new(Arc::new(pci::Bus::default()), console));
        Ok(Self {
            vm: Arc::new(vm),
            memory: Arc::new(memory),
            file_backed: Arc::new(file_backed),
            cpuid,
            cpus_max,
            shared: Shared {
                bus,
                exits: Arc::default(),
                ended: listeners.ended,
                context: Arc::new(context),
                confine: listeners.confine,
            },
            broken: listeners.broken,
            devices: Vec::new(),
            vcpus: Vec::new(),
            running: false,
        })
    }

    /// Maps the image as memory the guest cannot write: the memory slot says so, not the guest's driver.
    fn map_image(&self, image: &File, size: u64) -> Result<(), BuildError> {
        if size == 0 || !size.is_multiple_of(HUGE_PAGE) || size > IMAGE_MAX {
            return Err(BuildError::Image(format!("{size} bytes are not a multiple of 2 MiB")));
        }
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a fresh read-only mapping at an address of the kernel's choice.
        let host = unsafe { mmap(std::ptr::null_mut(), size as usize, ProtFlags::READ, flags, image.as_fd(), 0) }
            .map_err(|e| BuildError::Image(io::Error::from(e).to_string()))?;
        let region = kvm_userspace_memory_region {
            slot: self.memory.num_regions() as u32,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: IMAGE,
            memory_size: size,
            userspace_addr: host as u64,
        };
        // SAFETY: the mapping is never unmapped, and KVM does not write a read-only slot.
        kvm("KVM_SET_USER_MEMORY_REGION of the guest image", unsafe { self.vm.set_user_memory_region(region) })
    }

    /// Everything of the VM that must be there before its first vCPU.
    fn prepare_vm(&self) -> Result<(), BuildError> {
        // No pins of an I/O APIC: all interrupts are messages, and no end of interrupt comes to user space.
        let split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: [0; 4], ..Default::default() };
        kvm("KVM_CAP_SPLIT_IRQCHIP", self.vm.enable_cap(&split))?;
        if self.vm.check_extension(Cap::CoalescedPio) {
            kvm("KVM_REGISTER_COALESCED_MMIO", self.vm.register_coalesced_mmio(CONFIG_ADDRESS, 4))?;
        }
        Ok(())
    }

    fn create_vcpu(&self, id: u8) -> Result<VcpuFd, BuildError> {
        let mut fd = kvm("KVM_CREATE_VCPU", self.vm.create_vcpu(id.into()))?;
        kvm("KVM_SET_CPUID2", fd.set_cpuid2(&cpuid::for_cpu(&self.cpuid, id, self.cpus_max)))?;
        kvm("ring of coalesced writes", fd.map_coalesced_mmio_ring())?;
        Ok(fd)
    }

    fn spawn_vcpu(&mut self, id: u8, fd: VcpuFd) -> Result<(), BuildError> {
        let vcpu = Vcpu::spawn(id.into(), fd, self.shared.clone())
            .map_err(|source| BuildError::Kvm { what: "thread of a vCPU", source })?;
        if self.running {
            vcpu.run();
        }
        self.vcpus.push(vcpu);
        Ok(())
    }

    /// Creates vCPUs until there are `count`, or as many as there may be; they wait for the guest to start them.
    pub fn set_cpus(&mut self, count: u32) -> Result<(), BuildError> {
        let count = count.min(self.cpus_max.into());
        while (self.vcpus.len() as u32) < count {
            let id = self.vcpus.len() as u8;
            let fd = self.create_vcpu(id)?;
            // KVM knows a vCPU that comes late only once an APIC's state changes; without this the guest's INIT is lost.
            let lapic = kvm("KVM_GET_LAPIC", fd.get_lapic())?;
            kvm("KVM_SET_LAPIC", fd.set_lapic(&lapic))?;
            self.spawn_vcpu(id, fd)?;
        }
        Ok(())
    }

    /// Puts devices into free slots of the bus, all of them or none; the guest sees them when it scans the bus. The name of
    /// each is what its errors are called.
    pub fn add_devices(&mut self, devices: Vec<(&'static str, Box<dyn Device>)>) -> Result<(), BuildError> {
        let mut functions = Vec::new();
        for (name, device) in devices {
            let (confine, kind) = (self.shared.confine.clone(), device.kind());
            let thread = Thread::spawn(name, move || confine(kind))
                .map_err(|source| BuildError::Kvm { what: "thread of a device", source })?;
            functions.push(Arc::new(Mutex::new(VirtioPci::new(
                name,
                device,
                thread,
                self.memory.clone(),
                self.vm.clone(),
                self.broken.clone(),
            ))));
        }
        let slots: Vec<pci::Slot> = functions.iter().map(|function| function.clone() as pci::Slot).collect();
        self.shared.bus.pci().add(&slots)?;
        self.devices.extend(functions);
        Ok(())
    }

    /// Puts a device into a free slot of the bus.
    pub fn add_device(&mut self, name: &'static str, device: Box<dyn Device>) -> Result<(), BuildError> {
        self.add_devices(vec![(name, device)])
    }

    /// Lets vCPUs and devices run.
    pub fn run(&mut self) -> Result<(), BuildError> {
        for device in &self.devices {
            lock(device).resume()?;
        }
        self.running = true;
        self.vcpus.iter().for_each(Vcpu::run);
        Ok(())
    }

    /// Stops vCPUs, then devices, with nothing half done.
    pub fn pause(&mut self) {
        self.running = false;
        self.vcpus.iter().for_each(Vcpu::pause);
        self.devices.iter().for_each(|device| lock(device).pause());
    }

    /// Guest memory.
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// Which of it comes from files.
    pub fn file_backed(&self) -> &Arc<FileBacked> {
        &self.file_backed
    }

    /// What the guest is doing, in words.
    pub fn describe(&self) -> String {
        let mut words = format!("{} exits to user space", self.exits().sum());
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let said = vcpu.describe();
            words += &format!("; CPU {index} {}", said.as_deref().unwrap_or("does not answer"));
        }
        words
    }

    /// Exits to user space so far.
    pub fn exits(&self) -> Exits {
        self.shared.exits.so_far()
    }

    /// vCPUs that there are.
    pub fn cpus(&self) -> u32 {
        self.vcpus.len() as u32
    }
}

/// RAM, memory for the memory device, and CPUs, or what is wrong with them.
fn check(config: &MachineConfig) -> Result<(u64, u64, u8), BuildError> {
    let refuse = |what: String| Err(BuildError::Config(what));
    let MachineConfig { memory_bytes: ram, memory_max_bytes: max, cpus_max: cpus, .. } = *config;
    if !ram.is_multiple_of(HUGE_PAGE) || !(RAM_MIN..=RAM_END_MAX).contains(&ram) {
        return refuse(format!("{ram} bytes of memory; needed is a multiple of 2 MiB from 32 MiB to 3 GiB"));
    }
    if max < ram || !max.is_multiple_of(HUGE_PAGE) {
        return refuse(format!("{max} bytes of memory at most; needed is a multiple of 2 MiB of at least {ram}"));
    }
    match u8::try_from(cpus) {
        Ok(cpus @ 1..) if u32::from(cpus) <= CPUS_MAX => Ok((ram, max - ram, cpus)),
        _ => refuse(format!("{cpus} CPUs; possible are 1 to {CPUS_MAX}")),
    }
}

fn cmdline(config: &MachineConfig, console: bool) -> String {
    // The kernel's own early console is all there is, from its first line to a panic's last.
    let mut line = format!("{CMDLINE} {}", if console { "earlyprintk=serial,ttyS0,115200,keep" } else { "quiet" });
    if !config.extra_cmdline.is_empty() {
        line.push(' ');
        line.push_str(&config.extra_cmdline);
    }
    line
}
