//! What the image requires of an agent: that the guest, which has no other file, can start it.
//!
//! Field offsets are those of the System V ABI (gABI chapter 4 "ELF header", chapter 5 "Program header") for 64-bit
//! little-endian objects.

/// ELF class 64, little-endian, ELF version 1.
const IDENT_64_LITTLE_ENDIAN: &[u8] = b"\x7fELF\x02\x01\x01";
/// `e_machine` of x86-64.
const EM_X86_64: u16 = 62;
/// A segment that names the dynamic linker.
const PT_INTERP: u32 = 3;

/// Why a file cannot be the agent.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// No ELF header of a 64-bit little-endian program.
    #[error("not a 64-bit ELF program")]
    NotElf,
    /// Another processor's program.
    #[error("a program for ELF machine {0}, not for x86-64 (machine {EM_X86_64})")]
    Machine(u16),
    /// The program headers lie outside the file.
    #[error("cut short: its program headers are missing")]
    Truncated,
    /// The program asks for a dynamic linker, which the image does not have.
    #[error("dynamically linked; build it with -C target-feature=+crt-static")]
    Dynamic,
}

/// Checks that `program` is an x86-64 executable that needs no dynamic linker.
pub fn check(program: &[u8]) -> Result<(), Unfit> {
    if !program.starts_with(IDENT_64_LITTLE_ENDIAN) {
        return Err(Unfit::NotElf);
    }
    let machine = u16_at(program, 18)?;
    if machine != EM_X86_64 {
        return Err(Unfit::Machine(machine));
    }
    let table = u64_at(program, 32)?;
    let entry_size = u64::from(u16_at(program, 54)?);
    let entries = u64::from(u16_at(program, 56)?);
    for index in 0..entries {
        let entry = table.checked_add(index * entry_size).ok_or(Unfit::Truncated)?;
        if u32_at(program, usize::try_from(entry).map_err(|_| Unfit::Truncated)?)? == PT_INTERP {
            return Err(Unfit::Dynamic);
        }
    }
    Ok(())
}

fn bytes_at<const N: usize>(program: &[u8], offset: usize) -> Result<[u8; N], Unfit> {
    program.get(offset..).and_then(|rest| rest.first_chunk()).copied().ok_or(Unfit::Truncated)
}

fn u16_at(program: &[u8], offset: usize) -> Result<u16, Unfit> {
    bytes_at(program, offset).map(u16::from_le_bytes)
}

fn u32_at(program: &[u8], offset: usize) -> Result<u32, Unfit> {
    bytes_at(program, offset).map(u32::from_le_bytes)
}

fn u64_at(program: &[u8], offset: usize) -> Result<u64, Unfit> {
    bytes_at(program, offset).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF header followed by one program header of type `segment`.
    fn program(machine: u16, segment: u32) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56];
        bytes[..7].copy_from_slice(IDENT_64_LITTLE_ENDIAN);
        bytes[18..20].copy_from_slice(&machine.to_le_bytes());
        bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
        bytes[54..56].copy_from_slice(&56u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&1u16.to_le_bytes());
        bytes[64..68].copy_from_slice(&segment.to_le_bytes());
        bytes
    }

    #[test]
    fn a_static_program_is_fit() {
        assert_eq!(check(&program(EM_X86_64, 1)), Ok(()));
    }

    #[test]
    fn a_program_with_a_dynamic_linker_is_refused() {
        assert_eq!(check(&program(EM_X86_64, PT_INTERP)), Err(Unfit::Dynamic));
    }

    #[test]
    fn a_program_of_another_processor_is_refused() {
        assert_eq!(check(&program(183, 1)), Err(Unfit::Machine(183)));
    }

    #[test]
    fn a_script_and_an_empty_file_are_not_programs() {
        assert_eq!(check(b"#!/bin/sh\n"), Err(Unfit::NotElf));
        assert_eq!(check(b""), Err(Unfit::NotElf));
    }

    #[test]
    fn every_prefix_of_a_program_is_refused() {
        let whole = program(EM_X86_64, 1);
        for length in 0..64 + 4 {
            assert!(check(&whole[..length]).is_err(), "{length} bytes were taken for a program");
        }
    }

    #[test]
    fn program_headers_beyond_the_end_of_memory_are_refused() {
        let mut bytes = program(EM_X86_64, 1);
        bytes[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(check(&bytes), Err(Unfit::Truncated));
    }
}
