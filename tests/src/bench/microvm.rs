//! QEMU's microvm with the same kernel and guest image, up to the first instruction of user space.
//!
//! Both sides boot the same vmlinux with the same kernel arguments (but for the root device), one CPU and 256 MiB, from the
//! same tree of files as EROFS: podhull's is persistent memory behind no device, QEMU's a read-only virtio block device, its
//! leanest. QEMU's clock stops at the first instructions of PID 1, a program of 149 bytes put beside the agent in a copy of
//! the image that writes to a debug port. Podhull's stops later, when its agent has set the guest up, has brought up
//! the vsock device that QEMU's machine does not have, and has connected to the host.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use super::Bench;
use crate::run::Running;
use crate::{Outcome, ensure};

/// Where the program is in the image.
const INIT: &str = "sbin/first-instruction";

/// As in vmm/src/machine.rs, without its root device.
const KERNEL_ARGUMENTS: &str =
    "reboot=k panic=-1 pci=noearly noreplace-smp maxcpus=1 memhp_default_state=online_movable quiet";

/// `iopl(3)`, `"R\n"` to port 0xe9, then `pause()` for ever.
const CODE: [u8; 29] = [
    0xb8, 172, 0, 0, 0, // mov eax, SYS_iopl
    0xbf, 3, 0, 0, 0, // mov edi, 3
    0x0f, 0x05, // syscall
    0xb0, b'R', 0xe6, 0xe9, // mov al, 'R'; out 0xe9, al
    0xb0, b'\n', 0xe6, 0xe9, // mov al, '\n'; out 0xe9, al
    0xb8, 34, 0, 0, 0, // mov eax, SYS_pause
    0x0f, 0x05, // syscall
    0xeb, 0xf7, // jmp to the last mov
];

/// A machine that can be booted again and again.
pub struct Microvm {
    words: Vec<OsString>,
}

impl Microvm {
    /// Makes the copy of the image.
    pub fn prepare(bench: &Bench) -> Outcome<Self> {
        let (kernel, image) = (bench.library_file("vmlinux")?, bench.library_file("guest.img")?);
        let (tree, disk) = (bench.directory.join("image"), bench.directory.join("image.erofs"));
        run(Command::new("fsck.erofs").arg(prefixed("--extract=", &tree)).arg(image))?;
        let init = tree.join(INIT);
        fs::write(&init, program())?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
        run(Command::new("mkfs.erofs").arg(&disk).arg(&tree))?;

        let machine = "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off,x-option-roms=off";
        let arguments = format!("{KERNEL_ARGUMENTS} root=/dev/vda rootfstype=erofs ro init=/{INIT}");
        let mut words: Vec<OsString> = vec!["qemu-system-x86_64".into(), "-M".into(), machine.into()];
        words.extend(
            "-accel kvm -cpu host -m 256 -nodefaults -no-user-config -no-reboot -display none"
                .split(' ')
                .map(Into::into),
        );
        words.extend(["-kernel".into(), kernel.into(), "-append".into(), arguments.into()]);
        words.extend(["-drive".into(), prefixed("if=none,id=root,format=raw,readonly=on,file=", &disk)]);
        words.extend("-device virtio-blk-device,drive=root".split(' ').map(Into::into));
        words.extend(
            "-chardev stdio,id=first,signal=off -device isa-debugcon,iobase=0xe9,chardev=first"
                .split(' ')
                .map(Into::into),
        );
        Ok(Self { words })
    }

    /// Boots it; returns how long its first word took.
    pub fn boot(&self) -> Outcome<Duration> {
        let began = Instant::now();
        let mut running = Running::start(&self.words, &[])?;
        running.expect_line("R").map_err(|error| format!("QEMU microvm: {error}"))?;
        Ok(began.elapsed())
    }
}

fn prefixed(prefix: &str, path: &std::path::Path) -> OsString {
    let mut word = OsString::from(prefix);
    word.push(path);
    word
}

fn run(command: &mut Command) -> Outcome {
    let output =
        command.output().map_err(|error| format!("{}: {error}", PathBuf::from(command.get_program()).display()))?;
    ensure!(output.status.success(), "{:?}: {}", command, String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// An ELF file of one segment that is file and memory alike (System V ABI, chapters 4 and 5).
fn program() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let length = HEADERS + CODE.len() as u64;
    let mut file = Vec::from(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // Executable, x86-64, version 1; entry point; program headers follow, no section headers.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    [BASE + HEADERS, 64, 0].iter().for_each(|word| file.extend(word.to_le_bytes()));
    // No flags; sizes of the two headers; one program header.
    [0u16, 0, 64, 56, 1, 0, 0, 0].iter().for_each(|word| file.extend(word.to_le_bytes()));
    // To be loaded, readable and executable: from offset 0 to BASE, the whole file.
    file.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    [0, BASE, BASE, length, length, 0x1000].iter().for_each(|word| file.extend(word.to_le_bytes()));
    file.extend(CODE);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entry_point_is_the_first_byte_of_the_code() {
        let file = program();
        let word = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
        // e_entry, then p_offset and p_vaddr of the one segment at e_phoff.
        let (entry, segment) = (word(24), word(32));
        let (offset, address) = (word(segment + 8), word(segment + 16));
        assert_eq!(file[entry - address + offset..], CODE);
        assert_eq!(word(segment + 32), file.len(), "the whole file is in the segment");
    }
}
