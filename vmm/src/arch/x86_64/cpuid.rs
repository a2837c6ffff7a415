//! What CPUID tells the guest: what KVM supports on this host, with the topology of the machine put in.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Kvm;

/// Leaf 1, ECX.
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the logical processor count in EBX is valid.
const HTT: u32 = 1 << 28;

/// What this host's KVM can give a guest.
pub fn supported(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
}

/// `supported` for the CPU with APIC ID `id` of a machine of `cpus` possible CPUs, all cores of one package.
pub fn for_cpu(supported: &CpuId, id: u8, cpus: u8) -> CpuId {
    let core_bits = u32::from(cpus).next_power_of_two().trailing_zeros();
    let mut cpuid = supported.clone();
    let mut has_extended_topology = 0;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x0 => entry.eax = entry.eax.max(0xb),
            0x1 => {
                entry.ebx = entry.ebx & 0xffff | u32::from(cpus) << 16 | u32::from(id) << 24;
                // KVM does not report the deadline timer (it cannot know whether its own APIC is used), but has it.
                entry.ecx |= X2APIC | TSC_DEADLINE | HYPERVISOR;
                entry.edx = if cpus > 1 { entry.edx | HTT } else { entry.edx & !HTT };
            }
            0xb => {
                has_extended_topology += 1;
                extended_topology(entry, id, cpus, core_bits);
            }
            // The newer form of leaf 0xb; the guest falls back to that one.
            0x1f => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            // Size identifiers (AMD): width of the core ID in the APIC ID, and the number of cores.
            0x8000_0008 => entry.ecx = core_bits << 12 | (u32::from(cpus) - 1),
            // Extended APIC ID (AMD): one thread a core, one node.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id.into(), id.into(), 0),
            _ => {}
        }
    }
    for index in has_extended_topology..2 {
        let mut entry = kvm_bindings::kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            ..Default::default()
        };
        extended_topology(&mut entry, id, cpus, core_bits);
        // The list has room: KVM reports far fewer entries than fit.
        let _ = cpuid.push(entry);
    }
    cpuid
}

/// Leaf 0xb: level 0 is threads (one a core), level 1 cores.
fn extended_topology(entry: &mut kvm_bindings::kvm_cpuid_entry2, id: u8, cpus: u8, core_bits: u32) {
    const THREADS: u32 = 1 << 8;
    const CORES: u32 = 2 << 8;
    (entry.eax, entry.ebx, entry.ecx) = match entry.index {
        0 => (0, 1, THREADS),
        1 => (core_bits, cpus.into(), CORES | 1),
        index => (0, 0, index),
    };
    entry.edx = id.into();
}
