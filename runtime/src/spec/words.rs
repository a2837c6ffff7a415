//! The closed vocabularies of a specification that `oci-spec` leaves open: mount types, mount options, system calls,
//! devices.

use super::labels;

/// Options every mount takes: flags, propagation, and what runc added.
const MOUNT_OPTIONS: &[&str] = &[
    "acl",
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noacl",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "noiversion",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "remount",
    "rexec",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "tmpcopyup",
    "unbindable",
];

/// Options that bind mounts take beside, whose files have other owners.
const BIND_OPTIONS: &[&str] = &["idmap", "ridmap"];

/// A mount of directories of the host, one above the other.
pub const OVERLAY: &str = "overlay";

/// Its own options (before `=`).
const OVERLAY_OPTIONS: &[&str] = &[
    "index",
    "lowerdir",
    "metacopy",
    "nfs_export",
    "redirect_dir",
    "upperdir",
    "userxattr",
    "uuid",
    "verity",
    "volatile",
    "workdir",
    "xino",
];

/// Options that would let mounts travel between guest and host.
const SHARED_OPTIONS: &[&str] = &["shared", "rshared"];

/// File systems of the guest's kernel that need nothing of the host, and their own options (before `=`).
const FILE_SYSTEMS: &[(&str, &[&str])] = &[
    ("binfmt_misc", &[]),
    ("bpf", &["gid", "mode", "uid"]),
    ("cgroup", CGROUP),
    ("cgroup2", CGROUP),
    ("configfs", &[]),
    ("debugfs", &["gid", "mode", "uid"]),
    ("devpts", &["gid", "max", "mode", "newinstance", "ptmxmode", "uid"]),
    ("devtmpfs", &[]),
    ("fusectl", &[]),
    ("hugetlbfs", &["gid", "min_size", "mode", "nr_inodes", "pagesize", "size", "uid"]),
    ("mqueue", &[]),
    ("proc", &["gid", "hidepid", "subset"]),
    ("ramfs", &["mode"]),
    ("securityfs", &[]),
    ("sysfs", &[]),
    (
        "tmpfs",
        &["gid", "huge", "inode32", "inode64", "mode", "mpol", "noswap", "nr_blocks", "nr_inodes", "size", "uid"],
    ),
    ("tracefs", &["gid", "mode", "uid"]),
];

const CGROUP: &[&str] =
    &["favordynmods", "memory_hugetlb_accounting", "memory_localevents", "memory_recursiveprot", "nsdelegate"];

/// Linux 6.12's system calls on every architecture, and later ones; separated by white space.
const SYSCALLS: &str = include_str!("syscalls.txt");

/// Every option that a mount may have, whatever its file system, sorted.
pub fn mount_options() -> Vec<&'static str> {
    let mut all: Vec<_> = MOUNT_OPTIONS.iter().chain(BIND_OPTIONS).copied().collect();
    all.sort_unstable();
    all
}

/// What is wrong with a mount's type, if anything.
pub fn mount_type(kind: &str) -> Result<(), String> {
    match kind == OVERLAY || FILE_SYSTEMS.iter().any(|(name, _)| *name == kind) {
        true => Ok(()),
        false => Err(format!("unknown or unsupported mount type {kind:?}")),
    }
}

/// What is wrong with an option of a mount of this type (`bind` for bind mounts), if anything.
pub fn mount_option(kind: &str, option: &str) -> Result<(), String> {
    let name = option.split('=').next().unwrap_or_default();
    let own = match kind {
        "bind" => BIND_OPTIONS,
        OVERLAY => OVERLAY_OPTIONS,
        _ => FILE_SYSTEMS.iter().find(|(k, _)| *k == kind).map_or(&[][..], |(_, options)| options),
    };
    if MOUNT_OPTIONS.contains(&option) || own.contains(&name) || labels::is_option(option) {
        Ok(())
    } else if SHARED_OPTIONS.contains(&option) {
        Err(format!(
            "mount option {option:?}: mounts do not propagate between guest and host; use \"rslave\" or \"rprivate\""
        ))
    } else {
        Err(format!("unknown mount option {option:?}"))
    }
}

/// Whether an option is one of overlays.
pub fn is_overlay_option(option: &str) -> bool {
    OVERLAY_OPTIONS.contains(&option.split('=').next().unwrap_or_default())
}

/// Whether Linux has a system call of this name, on any architecture.
pub fn is_syscall(name: &str) -> bool {
    !name.is_empty() && SYSCALLS.split_ascii_whitespace().any(|known| known == name)
}

/// Whether a character device is one that the guest's kernel has: memory devices, terminals, FUSE, TUN.
pub fn is_guest_device(major: i64, minor: i64) -> bool {
    matches!((major, minor), (1, 3 | 5 | 7 | 8 | 9 | 11) | (5, 0..=2) | (10, 200 | 229) | (136..=143, _))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_those_a_specification_may_name() {
        for name in podhull_protocol::CAPABILITIES {
            let parsed: Result<oci_spec::runtime::Capability, _> = serde_json::from_value(name.into());
            assert!(parsed.is_ok(), "{name}");
        }
    }

    #[test]
    fn options_belong_to_their_file_system() {
        assert!(mount_option("tmpfs", "size=64k").is_ok());
        assert!(mount_option("proc", "size=64k").is_err());
        assert!(mount_option("bind", "size=64k").is_err());
        assert!(mount_option("bind", "rro").is_ok());
        assert!(mount_option("bind", "idmap").is_ok());
        assert!(mount_option("tmpfs", "idmap").is_err());
        assert!(mount_option("overlay", "lowerdir=/a:/b").is_ok());
        assert!(mount_option("overlay", "size=1").is_err());
        assert!(mount_option("bind", "rshared").unwrap_err().contains("rprivate"));
        assert!(mount_option("tmpfs", "nosuidd").is_err());
        assert!(mount_option("bind", "context=\"a:b,c\"").is_ok());
        assert!(mount_option("tmpfs", "context=").is_err());
    }

    #[test]
    fn system_calls_old_new_and_foreign_are_known() {
        for name in ["read", "_llseek", "clone3", "mseal", "s390_pci_mmio_read", "arm_fadvise64_64", "listmount"] {
            assert!(is_syscall(name), "{name}");
        }
        assert!(!is_syscall("opne"));
        assert!(!is_syscall(""));
    }
}
