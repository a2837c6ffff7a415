//! The MP table (Intel MultiProcessor Specification 1.4, chapter 4): which CPUs there may be.
//!
//! Each *possible* CPU is listed as enabled, so that it can be brought online later; the kernel is told `maxcpus=1`. There
//! is no I/O APIC and no local interrupt assignment: without either, and with an MP table, the kernel runs its timers from
//! the local APIC ("NULL legacy PIC"). Without a table it would run with none at all.

/// Entry sizes and types (table 4-3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_INTERRUPT: u8 = 3;

const HEADER_LENGTH: usize = 44;
const POINTER_LENGTH: usize = 16;

const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;
/// Version register of an integrated local APIC.
const APIC_VERSION: u8 = 0x14;
const LOCAL_APIC: u32 = 0xfee0_0000;

/// Floating pointer and table for `cpus` CPUs (1..=64), to be put at address `at`.
pub fn build(at: u32, cpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    for id in 0..cpus {
        let flags = CPU_ENABLED | if id == 0 { CPU_BOOTSTRAP } else { 0 };
        entries.extend([PROCESSOR, id, APIC_VERSION, flags]);
        // Signature and feature flags: the kernel asks CPUID instead. Then eight reserved bytes.
        entries.extend([0; 16]);
    }
    entries.extend([BUS, 0]);
    entries.extend(b"ISA   ");
    // One interrupt entry, for the eye of the kernel alone: it calls a table without any a BIOS bug.
    entries.extend([IO_INTERRUPT, 0, 0, 0, 0, 0, 0, 0]);

    let table = at + POINTER_LENGTH as u32;
    let mut header = Vec::with_capacity(HEADER_LENGTH);
    header.extend(b"PCMP");
    header.extend(((HEADER_LENGTH + entries.len()) as u16).to_le_bytes());
    header.extend([4, 0]); // revision 1.4, checksum to come
    header.extend(b"PODHULL "); // OEM
    header.extend(b"MICROVM     "); // product
    header.extend([0; 6]); // no OEM table
    header.extend((u16::from(cpus) + 2).to_le_bytes());
    header.extend(LOCAL_APIC.to_le_bytes());
    header.extend([0; 4]); // no extended table
    header[7] = checksum(header.iter().chain(&entries));

    let mut pointer = Vec::with_capacity(POINTER_LENGTH);
    pointer.extend(b"_MP_");
    pointer.extend(table.to_le_bytes());
    pointer.extend([1, 4, 0]); // 16 bytes, revision 1.4, checksum to come
    pointer.extend([0; 5]);
    pointer[10] = checksum(pointer.iter());

    [pointer, header, entries].concat()
}

/// The byte that makes the sum of all zero.
fn checksum<'a>(bytes: impl Iterator<Item = &'a u8>) -> u8 {
    bytes.fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_parts_sum_to_zero_and_the_length_counts_every_entry() {
        for cpus in [1, 2, 64] {
            let bytes = build(0, cpus);
            let (pointer, table) = bytes.split_at(POINTER_LENGTH);
            assert_eq!(checksum(pointer.iter()), 0);
            assert_eq!(checksum(table.iter()), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert_eq!(table.len(), HEADER_LENGTH + 20 * usize::from(cpus) + 16);
            assert!(bytes.len() as u64 <= super::super::layout::MP_TABLE_END);
        }
    }
}
