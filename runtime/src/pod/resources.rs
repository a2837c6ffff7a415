//! The files a machine is made of: `/dev/kvm`, guest kernel, guest image.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use podhull_vmm::host;

/// File name of the guest kernel.
pub const KERNEL: &str = "vmlinux";

/// File name of the guest image.
pub const IMAGE: &str = "guest.img";

/// The image is mapped in pages of this size.
const IMAGE_ALIGNMENT: u64 = 2 << 20;

/// `e_ident` of a 64-bit little-endian ELF file (System V ABI, 4.1).
const ELF_64: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1];

/// `e_machine` of x86-64, little-endian, at offset 18.
const EM_X86_64: [u8; 2] = [62, 0];

/// Magic of an EROFS superblock, little-endian, at offset 1024 (linux/fs/erofs/erofs_fs.h).
const EROFS_MAGIC: [u8; 4] = [0xe2, 0xe1, 0xf5, 0xe0];
const EROFS_OFFSET: u64 = 1024;

/// Why the machine cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// No device.
    #[error(
        "/dev/kvm is not there: load kvm_intel or kvm_amd, or enable virtualization in the firmware; `podhull check` tells more"
    )]
    NoKvm,
    /// Not allowed.
    #[error("no permission on /dev/kvm: run as root or as a member of the group it belongs to")]
    KvmPermission,
    /// A device without a driver behind it, and all else.
    #[error("/dev/kvm cannot be opened: {0}; `podhull check` tells more")]
    Kvm(#[source] io::Error),
    /// Something else under its name.
    #[error("/dev/kvm is not KVM, or not its stable version: is it the character device 10:232?")]
    NotKvm,
    /// A KVM that runs no kernel.
    #[error("/dev/kvm cannot boot a kernel: {0}")]
    KvmCannotBoot(String),
    /// Not installed, or not readable.
    #[error(
        "{what} {path}: {error}; install podhull's files, or name it in the configuration or in PODHULL_LIBDIR: see `podhull config show`"
    )]
    File {
        /// "guest kernel" or "guest image".
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// Why it cannot be opened.
        error: io::Error,
    },
    /// Something else is in its place.
    #[error("{what} {path} is damaged: {problem}; install it again")]
    Damaged {
        /// "guest kernel" or "guest image".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// Opens `/dev/kvm`, and refuses one that is known to boot no kernel.
pub fn kvm() -> Result<File, ResourceError> {
    let file = File::options().read(true).write(true).open("/dev/kvm").map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => ResourceError::NoKvm,
        io::ErrorKind::PermissionDenied => ResourceError::KvmPermission,
        _ => ResourceError::Kvm(error),
    })?;
    match host::cannot_boot() {
        Some(reason) => Err(ResourceError::KvmCannotBoot(reason)),
        None if !host::is_kvm(&file) => Err(ResourceError::NotKvm),
        None => Ok(file),
    }
}

/// The environment variable that names the directory of what is not installed.
pub const LIBRARY: &str = "PODHULL_LIBDIR";

/// Where a file of ours is installed: `$PODHULL_LIBDIR`, else `../lib/podhull` beside the directory of this program, else
/// `/usr/lib/podhull`.
pub fn library_file(name: &str) -> PathBuf {
    if let Some(directory) = std::env::var_os(LIBRARY).filter(|directory| !directory.is_empty()) {
        return Path::new(&directory).join(name);
    }
    let beside =
        std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.parent()?.join("lib/podhull").join(name)));
    beside.filter(|path| path.exists()).unwrap_or_else(|| Path::new("/usr/lib/podhull").join(name))
}

/// Opens the guest kernel.
pub fn kernel(path: &Path) -> Result<File, ResourceError> {
    open("guest kernel", path, |file, _| {
        let mut head = [0; 20];
        match file.read_exact_at(&mut head, 0) {
            Err(_) => Some("too short for an ELF file"),
            Ok(()) if head[..6] != ELF_64 => Some("not a 64-bit ELF file"),
            Ok(()) if head[18..20] != EM_X86_64 => Some("not for x86-64"),
            Ok(()) => None,
        }
    })
}

/// Opens the guest image.
pub fn image(path: &Path) -> Result<File, ResourceError> {
    open("guest image", path, |file, length| {
        let mut magic = [0; 4];
        match file.read_exact_at(&mut magic, EROFS_OFFSET) {
            Err(_) => Some("too short for an EROFS file system"),
            Ok(()) if magic != EROFS_MAGIC => Some("not an EROFS file system"),
            Ok(()) if length % IMAGE_ALIGNMENT != 0 => Some("its length is not a multiple of 2 MiB"),
            Ok(()) => None,
        }
    })
}

fn open(
    what: &'static str,
    path: &Path,
    problem: impl Fn(&File, u64) -> Option<&'static str>,
) -> Result<File, ResourceError> {
    let opened = File::open(path).and_then(|file| file.metadata().map(|metadata| (file, metadata)));
    let (file, metadata) = opened.map_err(|error| ResourceError::File { what, path: path.to_owned(), error })?;
    let problem = if metadata.is_file() { problem(&file, metadata.len()) } else { Some("not a regular file") };
    problem.map_or(Ok(file), |problem| Err(ResourceError::Damaged { what, path: path.to_owned(), problem }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_kernel_and_what_is_no_image_is_said_so() {
        let path = std::env::temp_dir().join(format!("podhull-resources-{}", std::process::id()));
        let mut elf = vec![0; 4096];
        elf[..6].copy_from_slice(&ELF_64);
        let mut good = elf.clone();
        good[18..20].copy_from_slice(&EM_X86_64);
        let mut erofs = vec![0; 2 << 20];
        erofs[1024..1028].copy_from_slice(&EROFS_MAGIC);
        let short = erofs[..4096].to_vec();
        let check = |open: fn(&Path) -> Result<File, ResourceError>, content: &[u8]| {
            std::fs::write(&path, content).unwrap();
            open(&path).map(drop).map_err(|e| e.to_string()).err().unwrap_or_default()
        };
        assert_eq!(check(kernel, &good), "");
        assert!(check(kernel, &elf).contains("damaged: not for x86-64"));
        assert!(check(kernel, b"#!/bin/sh\necho no kernel here\n").contains("not a 64-bit ELF file"));
        assert!(check(kernel, b"").contains("too short"));
        assert_eq!(check(image, &erofs), "");
        assert!(check(image, &short).contains("2 MiB"));
        assert!(check(image, &good).contains("not an EROFS file system"));
        std::fs::remove_file(&path).unwrap();
        let error = kernel(&path).unwrap_err().to_string();
        assert!(error.contains(&path.display().to_string()) && error.contains("PODHULL_LIBDIR"), "{error}");
    }
}
