//! What the kernel finds in memory and registers at its entry.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::*;
use super::mptable;
use crate::memory::GuestMemory;

/// `struct boot_params` (`Documentation/arch/x86/zero-page.rst`) and the setup header in it (`boot.rst`): offsets.
mod boot_params {
    pub const E820_ENTRIES: usize = 0x1e8;
    pub const BOOT_FLAG: usize = 0x1fe;
    pub const HEADER: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const TYPE_OF_LOADER: usize = 0x210;
    pub const CMD_LINE_PTR: usize = 0x228;
    pub const CMDLINE_SIZE: usize = 0x238;
    pub const SETUP_DATA: usize = 0x250;
    pub const E820_TABLE: usize = 0x2d0;
    pub const SIZE: usize = 0x1000;
}

/// Types of the memory map.
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// Persistent memory without a label: the kernel makes `/dev/pmem0` of it without asking ACPI.
const E820_PRAM: u32 = 12;

/// A setup-data node whose payload seeds the kernel's random number generator.
const SETUP_RNG_SEED: u32 = 9;
/// Length of that seed.
const SEED_LENGTH: usize = 32;

/// Everything the entry depends on.
#[derive(Debug)]
pub struct Boot<'a> {
    /// Bytes of RAM from address 0.
    pub ram: u64,
    /// Bytes of the guest image at [`IMAGE`].
    pub image: u64,
    /// CPUs to list.
    pub cpus: u8,
    /// Kernel command line.
    pub cmdline: &'a str,
    /// Where the kernel is entered.
    pub entry: u64,
}

/// Why the tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Longer than the kernel takes.
    #[error("kernel command line of {0} bytes; at most {max} are possible", max = CMDLINE_MAX - 1)]
    CmdlineTooLong(usize),
    /// Guest memory is smaller than the layout.
    #[error("boot tables: {0}")]
    Memory(#[from] GuestMemoryError),
    /// No random bytes from the host.
    #[error("getrandom: {0}")]
    Random(rustix::io::Errno),
}

/// Writes MP table, boot parameters, command line, descriptor and page tables.
pub fn write_tables(memory: &GuestMemory, boot: &Boot<'_>) -> Result<(), BootError> {
    if boot.cmdline.len() >= CMDLINE_MAX {
        return Err(BootError::CmdlineTooLong(boot.cmdline.len()));
    }
    memory.write_slice(&mptable::build(MP_TABLE as u32, boot.cpus), GuestAddress(MP_TABLE))?;
    memory.write_slice(boot.cmdline.as_bytes(), GuestAddress(CMDLINE))?;
    memory.write_slice(&[0], GuestAddress(CMDLINE + boot.cmdline.len() as u64))?;
    memory.write_slice(&seed_node()?, GuestAddress(SETUP_DATA))?;
    memory.write_slice(&boot_parameters(boot), GuestAddress(BOOT_PARAMS))?;
    for (index, entry) in gdt().iter().enumerate() {
        memory.write_obj(*entry, GuestAddress(GDT + 8 * index as u64))?;
    }
    write_page_tables(memory)?;
    Ok(())
}

fn boot_parameters(boot: &Boot<'_>) -> Vec<u8> {
    let mut page = vec![0; boot_params::SIZE];
    let mut put = |offset: usize, bytes: &[u8]| page[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(boot_params::BOOT_FLAG, &0xaa55u16.to_le_bytes());
    put(boot_params::HEADER, b"HdrS");
    put(boot_params::VERSION, &0x20fu16.to_le_bytes());
    put(boot_params::TYPE_OF_LOADER, &[0xff]); // undefined
    put(boot_params::CMD_LINE_PTR, &(CMDLINE as u32).to_le_bytes());
    put(boot_params::CMDLINE_SIZE, &(boot.cmdline.len() as u32).to_le_bytes());
    put(boot_params::SETUP_DATA, &SETUP_DATA.to_le_bytes());
    let map = [
        (0, LOW_MEMORY_END, E820_RAM),
        (LOW_MEMORY_END, CONVENTIONAL_END - LOW_MEMORY_END, E820_RESERVED),
        (HIGH_MEMORY, boot.ram - HIGH_MEMORY, E820_RAM),
        (IMAGE, boot.image, E820_PRAM),
    ];
    for (index, (start, size, kind)) in map.iter().enumerate() {
        let at = boot_params::E820_TABLE + 20 * index;
        put(at, &start.to_le_bytes());
        put(at + 8, &size.to_le_bytes());
        put(at + 16, &kind.to_le_bytes());
    }
    put(boot_params::E820_ENTRIES, &[map.len() as u8]);
    page
}

/// `struct setup_data`: next, type, length, payload.
fn seed_node() -> Result<Vec<u8>, BootError> {
    let mut seed = [0; SEED_LENGTH];
    rustix::rand::getrandom(&mut seed[..], rustix::rand::GetRandomFlags::empty()).map_err(BootError::Random)?;
    let mut node = Vec::with_capacity(16 + SEED_LENGTH);
    node.extend(0u64.to_le_bytes());
    node.extend(SETUP_RNG_SEED.to_le_bytes());
    node.extend((SEED_LENGTH as u32).to_le_bytes());
    node.extend(seed);
    Ok(node)
}

/// Null, unused, 64-bit code (selector 0x10, `__BOOT_CS`), flat data (0x18, `__BOOT_DS`): what the protocol asks for.
fn gdt() -> [u64; 4] {
    [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]
}

/// Identity mapping of the first GiB, by 2 MiB pages.
fn write_page_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const HUGE: u64 = 1 << 7;
    memory.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    memory.write_obj(PD | PRESENT_WRITABLE, GuestAddress(PDPT))?;
    let mut table = Vec::with_capacity(0x1000);
    for index in 0..512u64 {
        table.extend(((index * HUGE_PAGE) | PRESENT_WRITABLE | HUGE).to_le_bytes());
    }
    memory.write_slice(&table, GuestAddress(PD))
}

/// General registers at the entry: `rsi` points to the boot parameters, interrupts are off.
pub fn entry_registers(entry: u64) -> kvm_regs {
    kvm_regs { rip: entry, rsi: BOOT_PARAMS, rflags: 0x2, ..Default::default() }
}

/// Control and segment registers at the entry: long mode with paging on, on top of what a reset vCPU has.
pub fn entry_special_registers(reset: kvm_sregs) -> kvm_sregs {
    const CR0: u64 = 0x8005_0033; // PG, AM, WP, NE, ET, MP, PE
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
    let code = segment(0x10, 11, true);
    let data = segment(0x18, 3, false);
    kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        gdt: kvm_dtable { base: GDT, limit: 8 * 4 - 1, ..Default::default() },
        idt: kvm_dtable::default(),
        cr0: CR0,
        cr3: PML4,
        cr4: CR4_PAE,
        efer: EFER_LME_LMA,
        ..reset
    }
}

fn segment(selector: u16, kind: u8, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}
