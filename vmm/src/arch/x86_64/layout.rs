//! Guest physical addresses. All sizes in bytes.

/// MP floating pointer and table. The kernel looks for it in the first KiB first (`mpparse.c`).
pub const MP_TABLE: u64 = 0x0;
/// Up to here the MP table may reach: 64 processors of 20 bytes and some.
pub const MP_TABLE_END: u64 = 0x6000;
/// Global descriptor table of the entry.
pub const GDT: u64 = 0x6800;
/// `struct boot_params`, the "zero page".
pub const BOOT_PARAMS: u64 = 0x7000;
/// Page tables of the entry: one page each, mapping the first GiB by 2 MiB pages.
pub const PML4: u64 = 0x9000;
/// Second level.
pub const PDPT: u64 = 0xa000;
/// Third level.
pub const PD: u64 = 0xb000;
/// Kernel command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line with its NUL (the kernel's own bound, `COMMAND_LINE_SIZE`).
pub const CMDLINE_MAX: usize = 2048;
/// `struct setup_data` nodes.
pub const SETUP_DATA: u64 = 0x2_1000;

/// End of low memory that the kernel may use; above it is what a PC keeps for its EBDA.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// End of conventional memory.
pub const CONVENTIONAL_END: u64 = 0xa_0000;
/// Memory above the legacy area. Between the two is RAM that the map does not mention: the kernel searches it for option
/// ROMs, and each read would be an exit if it were not backed.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// RAM ends here at the latest; above it, below 4 GiB, the guest puts the BARs.
pub const RAM_END_MAX: u64 = 0xc000_0000;
/// The guest image, given as persistent memory.
pub const IMAGE: u64 = 0x1_0000_0000;
/// Longest guest image.
pub const IMAGE_MAX: u64 = 0x1_0000_0000;
/// The region of the memory device.
pub const HOTPLUG: u64 = 0x2_0000_0000;

/// What everything that is mapped into the guest is aligned to: a huge page.
pub const HUGE_PAGE: u64 = 0x20_0000;
