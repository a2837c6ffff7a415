//! The mounts of a container's specification.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, OFlags, PROC_SUPER_MAGIC};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen, open_tree,
};

use super::copy_up::{self, CopyUpError};
use super::mount_options::{Attributes, MountOptions, OptionError, attribute};
use super::rootfs::{Rootfs, RootfsError, set_attributes};
use crate::spec::Mount;

/// A mount that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("mounts: destination {0}: expected an absolute path")]
    Relative(PathBuf),
    #[error("mounts: {destination}: {source}")]
    Option { destination: PathBuf, source: OptionError },
    #[error("mounts: {destination}: uidMappings and gidMappings are not supported: id-mapped mounts are not supported")]
    IdMapped { destination: PathBuf },
    #[error("mounts: {destination}: option {option:?} has no meaning for a bind mount")]
    BindOption { destination: PathBuf, option: String },
    #[error("mounts: {destination}: option {option:?}: {kind} takes no such option or value: {source}")]
    FilesystemOption { destination: PathBuf, option: String, kind: String, source: Errno },
    #[error("mounts: {destination}: unknown file system type {kind:?}")]
    UnknownType { destination: PathBuf, kind: String },
    #[error("filesystem {kind:?} must be mounted on ordinary directory: {destination}")]
    NotDirectory { destination: PathBuf, kind: String },
    #[error("{destination} cannot be mounted because it is inside /proc")]
    InsideProc { destination: PathBuf },
    #[error("mounts: {destination}: bind source {source_path}: {source}")]
    Source { destination: PathBuf, source_path: PathBuf, source: Errno },
    #[error("error mounting {kind:?} to {destination:?}: {source}")]
    Mount { destination: PathBuf, kind: String, source: Errno },
    #[error("mounts: {destination}: attributes: {source}")]
    Attributes { destination: PathBuf, source: Errno },
    #[error("mounts: {destination}: propagation: {source}")]
    Propagation { destination: PathBuf, source: Errno },
    #[error("mounts: {destination}: {source}")]
    CopyUp { destination: PathBuf, source: CopyUpError },
    #[error("mounts: {destination}: {source}")]
    Rootfs { destination: PathBuf, source: RootfsError },
}

/// Files of procfs that may be covered, because container managers show a container's own view of the machine there (lxcfs), or
/// hide them.
const COVERABLE: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
    "/proc/net/dev",
];

impl MountError {
    /// Whether the specification is at fault, not the machine.
    pub fn is_invalid(&self) -> bool {
        matches!(
            self,
            Self::Relative(_)
                | Self::Option { .. }
                | Self::IdMapped { .. }
                | Self::BindOption { .. }
                | Self::FilesystemOption { .. }
                | Self::UnknownType { .. }
                | Self::NotDirectory { .. }
                | Self::InsideProc { .. }
        )
    }
}

/// A mount that can be written to until all of the container's files are there: other mounts and devices lie in it.
#[must_use]
pub struct Unfinished {
    mount: OwnedFd,
    destination: PathBuf,
}

impl Unfinished {
    /// Makes it read-only, as was asked for.
    pub fn finish(self) -> Result<(), MountError> {
        let readonly = Attributes { set: attribute::RDONLY, clear: 0 };
        set_attributes(&self.mount, readonly, None, false)
            .map_err(|source| MountError::Attributes { destination: self.destination, source })
    }
}

/// Makes one mount, and says if there is something left to do about it.
pub fn mount(root: &Rootfs, mount: &Mount) -> Result<Option<Unfinished>, MountError> {
    let destination = &mount.destination;
    if !destination.is_absolute() {
        return Err(MountError::Relative(destination.clone()));
    }
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return Err(MountError::IdMapped { destination: destination.clone() });
    }
    let mut options = MountOptions::parse(&mount.options)
        .map_err(|source| MountError::Option { destination: destination.clone(), source })?;
    let bind = options.bind.or((mount.kind == "bind").then_some(false));
    let late =
        bind.is_none() && !options.remount && mount.kind == "tmpfs" && options.attributes.set & attribute::RDONLY != 0;
    if late {
        options.attributes.set &= !attribute::RDONLY;
    }
    let one = One { root, destination, kind: &mount.kind, options: &options };
    if options.remount {
        return one.remount().map(|()| None);
    }
    let (tree, target) = match (bind, mount.kind.as_str()) {
        (Some(recursive), _) => one.bind(Path::new(&mount.source), recursive)?,
        (None, "cgroup" | "cgroup2") => one.cgroup()?,
        (None, podhull_protocol::OVER_SOCKET) => match one.over_socket(Path::new(&mount.source))? {
            Some(mount) => mount,
            None => return Ok(None),
        },
        (None, kind) => one.filesystem(kind, &mount.source)?,
    };
    let unfinished = if late { Some(one.unfinished(&tree)?) } else { None };
    root.attach(tree, &target).map_err(|source| one.failed(source))?;
    for (kind, recursive) in &options.propagation {
        root.open_raw(destination, OFlags::PATH)
            .and_then(|tree| set_attributes(tree, Attributes::default(), Some(*kind), *recursive))
            .map_err(|source| MountError::Propagation { destination: destination.clone(), source })?;
    }
    Ok(unfinished)
}

struct One<'a> {
    root: &'a Rootfs,
    destination: &'a Path,
    kind: &'a str,
    options: &'a MountOptions,
}

impl One<'_> {
    fn failed(&self, source: Errno) -> MountError {
        MountError::Mount { destination: self.destination.into(), kind: self.kind.into(), source }
    }

    fn rootfs(&self, source: RootfsError) -> MountError {
        MountError::Rootfs { destination: self.destination.into(), source }
    }

    fn unfinished(&self, tree: &OwnedFd) -> Result<Unfinished, MountError> {
        let mount = rustix::io::fcntl_dupfd_cloexec(tree, 0).map_err(|source| self.failed(source))?;
        Ok(Unfinished { mount, destination: self.destination.into() })
    }

    fn directory(&self) -> Result<OwnedFd, MountError> {
        let target = self.root.directory(self.destination).map_err(|source| self.rootfs(source))?;
        self.check_target(&target, false)?;
        Ok(target)
    }

    /// Nothing may cover procfs, or a part of it, that the container's processes and its runtime read to learn the truth.
    fn check_target(&self, target: &OwnedFd, is_proc: bool) -> Result<(), MountError> {
        let inside = self
            .root
            .inside(target)
            .map_err(|source| self.rootfs(RootfsError::Resolve { path: self.destination.into(), source }))?;
        let kind = rustix::fs::fstatfs(target).map_err(|source| self.failed(source))?.f_type;
        let on_proc = inside.starts_with("/proc") || kind == PROC_SUPER_MAGIC;
        let allowed = COVERABLE.iter().any(|path| inside == Path::new(path)) || is_proc && inside == Path::new("/proc");
        if on_proc && !allowed {
            return Err(MountError::InsideProc { destination: self.destination.into() });
        }
        Ok(())
    }

    fn bind(&self, source_path: &Path, recursive: bool) -> Result<(OwnedFd, OwnedFd), MountError> {
        let source = |source| MountError::Source {
            destination: self.destination.into(),
            source_path: source_path.into(),
            source,
        };
        if let Some((key, value)) = self.options.data.first() {
            let option = value.as_ref().map_or(key.clone(), |value| format!("{key}={value}"));
            return Err(MountError::BindOption { destination: self.destination.into(), option });
        }
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        if recursive {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let tree = match crate::memory::open(source_path) {
            Some(opened) => opened.and_then(|opened| open_tree(&opened, "", flags | OpenTreeFlags::AT_EMPTY_PATH)),
            None => open_tree(CWD, source_path, flags),
        };
        let tree = tree.map_err(source)?;
        let is_directory =
            FileType::from_raw_mode(rustix::fs::fstat(&tree).map_err(source)?.st_mode) == FileType::Directory;
        let is_proc = is_directory && rustix::fs::fstatfs(&tree).map_err(source)?.f_type == PROC_SUPER_MAGIC;
        let target =
            if is_directory { self.root.directory(self.destination) } else { self.root.file(self.destination) }
                .map_err(|source| self.rootfs(source))?;
        self.check_target(&target, is_proc)?;
        self.set(&tree)?;
        Ok((tree, target))
    }

    /// A socket in the place of one that is there: who listened at that may have gone since it was found.
    fn over_socket(&self, source_path: &Path) -> Result<Option<(OwnedFd, OwnedFd)>, MountError> {
        let Ok(target) = self.root.open_raw(self.destination, OFlags::PATH | OFlags::NOFOLLOW) else { return Ok(None) };
        let mode = rustix::fs::fstat(&target).map_err(|source| self.failed(source))?.st_mode;
        if FileType::from_raw_mode(mode) != FileType::Socket {
            return Ok(None);
        }
        let tree = open_tree(CWD, source_path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
            .map_err(|source| MountError::Source {
                destination: self.destination.into(),
                source_path: source_path.into(),
                source,
            })?;
        Ok(Some((tree, target)))
    }

    fn set(&self, tree: &OwnedFd) -> Result<(), MountError> {
        let attributes = |source| MountError::Attributes { destination: self.destination.into(), source };
        if !self.options.attributes.is_empty() {
            set_attributes(tree, self.options.attributes, None, false).map_err(attributes)?;
        }
        if !self.options.recursive.is_empty() {
            set_attributes(tree, self.options.recursive, None, true).map_err(attributes)?;
        }
        Ok(())
    }

    fn remount(&self) -> Result<(), MountError> {
        if let Some((key, _)) = self.options.data.first() {
            return Err(MountError::BindOption { destination: self.destination.into(), option: key.clone() });
        }
        let target = self.root.open(self.destination, OFlags::PATH).map_err(|source| self.rootfs(source))?;
        self.set(&target)
    }

    /// The container's own view of its cgroups, where it has a cgroup namespace.
    fn cgroup(&self) -> Result<(OwnedFd, OwnedFd), MountError> {
        let target = self.directory()?;
        match self.instance("cgroup2", "cgroup", &[]) {
            // Owner of a user namespace but not of a cgroup namespace: what it may see is the guest's.
            Err(MountError::Mount { source: Errno::PERM | Errno::BUSY, .. }) => {
                let flags =
                    OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
                let tree = open_tree(CWD, "/sys/fs/cgroup", flags).map_err(|source| self.failed(source))?;
                self.set(&tree)?;
                Ok((tree, target))
            }
            other => {
                let tree = other?;
                self.set(&tree)?;
                Ok((tree, target))
            }
        }
    }

    fn filesystem(&self, kind: &str, source: &str) -> Result<(OwnedFd, OwnedFd), MountError> {
        let mut extra = Vec::new();
        let existing = if matches!(kind, "proc" | "sysfs") {
            // A link in their place would have the truth about the guest appear where nobody guards it.
            self.ordinary_directory()?
        } else {
            self.root.open_raw(self.destination, OFlags::PATH).ok()
        };
        if let Some(covered) = &existing
            && kind == "tmpfs"
            && !self.options.data.iter().any(|(key, _)| key == "mode")
        {
            let mode = rustix::fs::fstat(covered).map_err(|source| self.failed(source))?.st_mode & 0o7777;
            extra.push(("mode".to_owned(), format!("{mode:o}")));
        }
        let target = match existing {
            Some(existing) => existing,
            None => self.root.directory(self.destination).map_err(|source| self.rootfs(source))?,
        };
        self.check_target(&target, kind == "proc")?;
        let tree = self.instance(kind, source, &extra)?;
        if self.options.copy_up {
            if kind != "tmpfs" {
                let option = "tmpcopyup".into();
                return Err(MountError::BindOption { destination: self.destination.into(), option });
            }
            let copied = self
                .root
                .open_raw(self.destination, OFlags::RDONLY | OFlags::DIRECTORY)
                .map_err(|source| self.failed(source))?;
            copy_up::copy(copied.as_fd(), tree.as_fd())
                .map_err(|source| MountError::CopyUp { destination: self.destination.into(), source })?;
        }
        // Only now, so that what is read-only could be filled.
        self.set(&tree)?;
        Ok((tree, target))
    }

    /// The destination, if it is there, and is itself and not a link.
    fn ordinary_directory(&self) -> Result<Option<OwnedFd>, MountError> {
        let not_directory =
            || MountError::NotDirectory { destination: self.destination.into(), kind: self.kind.into() };
        let normal: PathBuf =
            self.destination.components().filter(|component| *component != Component::CurDir).collect();
        let fd = match self.root.open_raw(&normal, OFlags::PATH | OFlags::NOFOLLOW | OFlags::DIRECTORY) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(_) => return Err(not_directory()),
        };
        let inside = self.root.inside(&fd).map_err(|source| self.failed(source))?;
        if inside == normal { Ok(Some(fd)) } else { Err(not_directory()) }
    }

    /// A new, detached instance of a file system.
    fn instance(&self, kind: &str, source: &str, extra: &[(String, String)]) -> Result<OwnedFd, MountError> {
        let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|source| match source {
            Errno::NODEV => MountError::UnknownType { destination: self.destination.into(), kind: kind.into() },
            source => self.failed(source),
        })?;
        let refused = |option: String| {
            move |source| MountError::FilesystemOption {
                destination: self.destination.into(),
                option,
                kind: kind.into(),
                source,
            }
        };
        fsconfig_set_string(&context, "source", if source.is_empty() { "none" } else { source })
            .map_err(|source| self.failed(source))?;
        for flag in &self.options.superblock {
            fsconfig_set_flag(&context, *flag).map_err(refused((*flag).into()))?;
        }
        // Instances that others share take no part in this; those that lie on a device must not write to it.
        let shared = matches!(kind, "proc" | "sysfs" | "cgroup2" | "mqueue" | "tmpfs" | "devpts");
        if self.options.attributes.set & attribute::RDONLY != 0 && !shared {
            fsconfig_set_flag(&context, "ro").map_err(refused("ro".into()))?;
        }
        for (key, value) in extra {
            fsconfig_set_string(&context, key.as_str(), value.as_str()).map_err(refused(format!("{key}={value}")))?;
        }
        for (key, value) in &self.options.data {
            match value {
                Some(value) => fsconfig_set_string(&context, key.as_str(), value.as_str())
                    .map_err(refused(format!("{key}={value}")))?,
                None => fsconfig_set_flag(&context, key.as_str()).map_err(refused(key.clone()))?,
            }
        }
        fsconfig_create(&context).map_err(|source| self.failed(source))?;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).map_err(|source| self.failed(source))
    }
}
