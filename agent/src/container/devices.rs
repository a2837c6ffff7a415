//! `/dev` of a container.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, makedev};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use super::rootfs::{self, Rootfs, RootfsError};
use crate::spec::{Device, Spec};

/// A device that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("linux.devices: {path}: expected type b, c, u or p, not {kind:?}")]
    Kind { path: PathBuf, kind: String },
    #[error("linux.devices: {path}: expected numbers of a device, not {major}:{minor}")]
    Number { path: PathBuf, major: i64, minor: i64 },
    #[error("linux.devices: expected an absolute path, not {0}")]
    Relative(PathBuf),
    #[error("make the device {path}: {source}")]
    Make { path: PathBuf, source: Errno },
    #[error("bind the guest's {path}: {source}")]
    Bind { path: PathBuf, source: Errno },
    #[error("link {path}: {source}")]
    Link { path: PathBuf, source: Errno },
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
}

impl DeviceError {
    /// Whether the specification is at fault, not the machine.
    pub fn is_invalid(&self) -> bool {
        matches!(self, Self::Kind { .. } | Self::Number { .. } | Self::Relative(_))
    }
}

/// Devices that every container has (`config-linux.md`, Default Devices).
const DEFAULT: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// A container that binds a `/dev` of its choice has what is in there and no more.
pub fn wanted(spec: &Spec) -> bool {
    !spec.mounts.iter().any(|mount| {
        mount.destination.components().eq(Path::new("/dev").components())
            && (mount.kind == "bind" || mount.options.iter().any(|option| option == "bind" || option == "rbind"))
    })
}

/// Makes the default devices, those of the specification, and the links. Where nodes may not be made, in a user namespace, the
/// guest's are bound.
pub fn make(root: &Rootfs, spec: &Spec, in_user_namespace: bool) -> Result<(), DeviceError> {
    for (path, major, minor) in DEFAULT {
        // One that the specification lists itself is made as it says there.
        if !spec.linux.devices.iter().any(|device| device.path == Path::new(path)) {
            let node = Node {
                path: Path::new(path),
                kind: FileType::CharacterDevice,
                number: makedev(major, minor),
                mode: 0o666,
                owner: (0, 0),
            };
            node.make(root, in_user_namespace)?;
        }
    }
    for device in &spec.linux.devices {
        Node::of(device)?.make(root, in_user_namespace)?;
    }
    for (path, target) in LINKS {
        link(root, Path::new(path), target)?;
    }
    if rustix::fs::access("/proc/kcore", rustix::fs::Access::EXISTS).is_ok() {
        link(root, Path::new("/dev/core"), "/proc/kcore")?;
    }
    Ok(())
}

struct Node<'a> {
    path: &'a Path,
    kind: FileType,
    number: u64,
    mode: u32,
    owner: (u32, u32),
}

impl<'a> Node<'a> {
    fn of(device: &'a Device) -> Result<Self, DeviceError> {
        let path = device.path.as_path();
        if !path.is_absolute() {
            return Err(DeviceError::Relative(path.into()));
        }
        let kind = match device.kind.as_str() {
            "b" => FileType::BlockDevice,
            "c" | "u" => FileType::CharacterDevice,
            "p" => FileType::Fifo,
            other => return Err(DeviceError::Kind { path: path.into(), kind: other.into() }),
        };
        let number = match (kind, u32::try_from(device.major), u32::try_from(device.minor)) {
            (FileType::Fifo, ..) => 0,
            (_, Ok(major), Ok(minor)) => makedev(major, minor),
            _ => {
                return Err(DeviceError::Number { path: path.into(), major: device.major, minor: device.minor });
            }
        };
        let owner = (device.uid.unwrap_or_default(), device.gid.unwrap_or_default());
        Ok(Self { path, kind, number, mode: device.file_mode.unwrap_or(0o666) & 0o7777, owner })
    }

    fn make(&self, root: &Rootfs, in_user_namespace: bool) -> Result<(), DeviceError> {
        if in_user_namespace && self.kind != FileType::Fifo {
            return self.bind(root);
        }
        let failed = |source| DeviceError::Make { path: self.path.into(), source };
        let (parent, name) = root.parent(self.path)?;
        match rustix::fs::mknodat(&parent, name, self.kind, Mode::from_raw_mode(self.mode), self.number) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                let there = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
                let same = FileType::from_raw_mode(there.st_mode) == self.kind && there.st_rdev == self.number;
                return if same { Ok(()) } else { Err(failed(Errno::EXIST)) };
            }
            Err(errno) => return Err(failed(errno)),
        }
        // The mode of mknod is under the umask.
        let node = rustix::fs::openat(&parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            .map_err(failed)?;
        let (owner, group) = (Uid::from_raw(self.owner.0), Gid::from_raw(self.owner.1));
        rustix::fs::chownat(&node, "", Some(owner), Some(group), AtFlags::EMPTY_PATH).map_err(failed)?;
        rustix::fs::chmodat(&parent, name, Mode::from_raw_mode(self.mode), AtFlags::empty()).map_err(failed)
    }

    /// Where the guest has a disk, whose name on the host is another.
    fn disk(&self) -> Result<PathBuf, Errno> {
        let (major, minor) = (rustix::fs::major(self.number), rustix::fs::minor(self.number));
        let shown = rustix::fs::readlinkat(CWD, format!("/sys/dev/block/{major}:{minor}"), Vec::new())?;
        let name = shown.to_bytes().rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        Ok(Path::new("/dev").join(OsStr::from_bytes(name)))
    }

    fn bind(&self, root: &Rootfs) -> Result<(), DeviceError> {
        let failed = |source| DeviceError::Bind { path: self.path.into(), source };
        let path = match self.kind {
            FileType::BlockDevice => self.disk().map_err(failed)?,
            _ => self.path.into(),
        };
        let node =
            open_tree(CWD, &path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC).map_err(failed)?;
        let stat = rustix::fs::fstat(&node).map_err(failed)?;
        if FileType::from_raw_mode(stat.st_mode) != self.kind || stat.st_rdev != self.number {
            return Err(failed(Errno::NODEV));
        }
        rootfs::attach(&node, root.file(self.path)?).map_err(failed)
    }
}

fn link(root: &Rootfs, path: &Path, target: &str) -> Result<(), DeviceError> {
    let failed = |source| DeviceError::Link { path: path.into(), source };
    let (parent, name) = root.parent(path)?;
    match rustix::fs::symlinkat(target, &parent, name) {
        Err(Errno::EXIST) => {
            let stat = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
            // Something of the image's own: /dev/ptmx alone is replaced, since a node there would be another devpts's.
            if path == Path::new("/dev/ptmx") && FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
                rustix::fs::unlinkat(&parent, name, AtFlags::empty()).map_err(failed)?;
                return rustix::fs::symlinkat(target, &parent, name).map_err(failed);
            }
            Ok(())
        }
        other => other.map_err(failed),
    }
}

/// Standard streams that are the guest's `/dev/null` are opened again as the container's, which it may look at.
pub fn reopen_null(root: &Rootfs) -> Result<(), DeviceError> {
    let failed = |source| DeviceError::Make { path: "/dev/null".into(), source };
    let null = |fd: &dyn AsFd| -> Result<bool, Errno> {
        let stat = rustix::fs::fstat(fd.as_fd())?;
        Ok(FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == makedev(1, 3))
    };
    let mut own: Option<OwnedFd> = None;
    for number in 0..3 {
        // SAFETY: the descriptors 0 to 2 are open as long as the process runs.
        let stream = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
        if !null(&stream).map_err(failed)? {
            continue;
        }
        let own = match &own {
            Some(own) => own,
            None => own.insert(root.open(Path::new("/dev/null"), OFlags::RDWR | OFlags::NOFOLLOW)?),
        };
        if !null(own).map_err(failed)? {
            return Err(failed(Errno::NODEV));
        }
        let replaced = match number {
            0 => rustix::stdio::dup2_stdin(own),
            1 => rustix::stdio::dup2_stdout(own),
            _ => rustix::stdio::dup2_stderr(own),
        };
        replaced.map_err(failed)?;
    }
    Ok(())
}
