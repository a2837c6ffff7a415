//! x86-64: entered in long mode (Linux boot protocol, `Documentation/arch/x86/boot.rst`, "64-bit boot protocol"), without
//! firmware. An MP table stands for ACPI; there is no interrupt controller but the local APICs.

pub mod boot;
pub mod cpuid;
pub mod layout;
pub mod mptable;
pub mod state;
