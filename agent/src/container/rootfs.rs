//! The root filesystem of a container, and paths inside it.
//!
//! What is in it is the container's, and hostile: every path is resolved by the kernel with the root as its end
//! (`openat2` with `RESOLVE_IN_ROOT`), so that no symbolic link leads out, and what was resolved is used by its descriptor,
//! so that it cannot be swapped in between.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount, open_tree, unmount,
};

use super::mount_options::{Attributes, PropagationKind, attribute};

/// As the kernel counts (`MAXSYMLINKS`).
const MAX_SYMLINKS: u32 = 40;

/// What cannot be done with the root filesystem.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    #[error("root filesystem {path}: {source}")]
    Open { path: PathBuf, source: Errno },
    #[error(
        "linux.rootfsPropagation: expected private, shared, slave, unbindable, or one of them with an r before, not {0:?}"
    )]
    UnknownPropagation(String),
    #[error("propagation of the mounts: {0}")]
    Propagation(Errno),
    #[error("bind the root filesystem: {0}")]
    Bind(Errno),
    #[error("resolve {path} in the root filesystem: {source}")]
    Resolve { path: PathBuf, source: Errno },
    #[error("make {path} in the root filesystem: {source}")]
    Make { path: PathBuf, source: Errno },
    #[error("pivot into the root filesystem: {0}")]
    Pivot(Errno),
    #[error("leave the guest's root: {0}")]
    Detach(Errno),
    #[error("make the root read-only: {0}")]
    ReadOnly(Errno),
}

/// An open root filesystem.
pub struct Rootfs {
    fd: OwnedFd,
    /// Mounts made inside, where each is, in the order they were made. A path below one is walked from there: what leads to it
    /// is on the host, and each step of a path there is a question to the host and its answer.
    mounts: RefCell<Vec<(PathBuf, OwnedFd)>>,
    /// As the kernel names it, without symbolic links.
    path: PathBuf,
}

impl Rootfs {
    /// Opens the root filesystem and makes it a mount of its own, cut off from the guest's: nothing mounted in it from here on
    /// can be seen outside.
    pub fn prepare(path: &Path, propagation: &str) -> Result<Self, RootfsError> {
        let outer = match propagation {
            "" => PropagationKind::Slave,
            word => match PropagationKind::parse(word) {
                Some((PropagationKind::Private | PropagationKind::Unbindable, _)) => PropagationKind::Private,
                Some(_) => PropagationKind::Slave,
                None => return Err(RootfsError::UnknownPropagation(word.into())),
            },
        };
        mount_change("/", outer.flags() | MountPropagationFlags::REC).map_err(RootfsError::Propagation)?;
        let open = |source| RootfsError::Open { path: path.into(), source };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let below = rustix::fs::openat(CWD, path, flags | OFlags::NOFOLLOW, Mode::empty()).map_err(open)?;
        let tree = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::AT_EMPTY_PATH | OpenTreeFlags::AT_RECURSIVE;
        let fd = open_tree(&below, "", tree | OpenTreeFlags::OPEN_TREE_CLOEXEC).map_err(RootfsError::Bind)?;
        attach(&fd, &below).map_err(RootfsError::Bind)?;
        // pivot_root refuses a root whose mount is shared with its parent's.
        set_attributes(&fd, Attributes::default(), Some(PropagationKind::Private), false)
            .map_err(RootfsError::Propagation)?;
        let path = path_of(&fd).map_err(open)?;
        Ok(Self { fd, mounts: RefCell::default(), path })
    }

    /// Opens the root filesystem of a container that shares the guest's mounts.
    pub fn open_shared(path: &Path) -> Result<Self, RootfsError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = |source| RootfsError::Open { path: path.into(), source };
        let fd = rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(open)?;
        let path = path_of(&fd).map_err(open)?;
        Ok(Self { fd, mounts: RefCell::default(), path })
    }

    /// The root of the calling process, once it is in the container.
    pub fn current() -> Result<Self, RootfsError> {
        let path = Path::new("/");
        let fd = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|source| RootfsError::Open { path: path.into(), source })?;
        Ok(Self { fd, mounts: RefCell::default(), path: path.into() })
    }

    /// A path inside, as seen from there; nothing is created.
    pub fn open(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, RootfsError> {
        self.open_raw(path, flags).map_err(|source| RootfsError::Resolve { path: path.into(), source })
    }

    pub fn open_raw(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC;
        let open = |from: &OwnedFd, path: &Path, resolve| {
            let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
            rustix::fs::openat2(from, path, flags, Mode::empty(), resolve)
        };
        let clean = path.components().all(|part| !matches!(part, Component::ParentDir));
        let mounts = self.mounts.borrow();
        let near = mounts.iter().rev().filter(|_| clean).find_map(|(at, fd)| Some((fd, path.strip_prefix(at).ok()?)));
        if let Some((mount, below)) = near {
            match open(mount, below, ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS) {
                // A link leads out of the mount to elsewhere in the root, or the mount is a file.
                Err(Errno::XDEV | Errno::LOOP | Errno::NOTDIR) => {}
                other => return other,
            }
        }
        open(&self.fd, path.strip_prefix("/").unwrap_or(path), ResolveFlags::IN_ROOT)
    }

    /// Mounts a detached mount on a target inside.
    pub fn attach(&self, mount: OwnedFd, target: &OwnedFd) -> Result<(), Errno> {
        let at = self.inside(target)?;
        attach(&mount, target)?;
        let mut mounts = self.mounts.borrow_mut();
        // What it covers cannot be reached any more.
        mounts.retain(|(there, _)| !there.starts_with(&at));
        mounts.push((at, mount));
        Ok(())
    }

    /// A directory inside, made with its parents if it is not there.
    pub fn directory(&self, path: &Path) -> Result<OwnedFd, RootfsError> {
        self.open_or_make(path, 0, |parent, name| rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)))
    }

    /// A file inside, made empty, with its parents, if it is not there.
    pub fn file(&self, path: &Path) -> Result<OwnedFd, RootfsError> {
        self.open_or_make(path, 0, |parent, name| {
            rustix::fs::openat(
                parent,
                name,
                OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::WRONLY,
                Mode::from_raw_mode(0o644),
            )
            .map(drop)
        })
    }

    /// The directory a path lies in, made if it is not there, and its name in it.
    pub fn parent<'a>(&self, path: &'a Path) -> Result<(OwnedFd, &'a OsStr), RootfsError> {
        let make = |source| RootfsError::Make { path: path.into(), source };
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(make(Errno::INVAL)) };
        Ok((self.directory(parent)?, name))
    }

    fn open_or_make(
        &self,
        path: &Path,
        depth: u32,
        make_last: fn(BorrowedFd<'_>, &OsStr) -> Result<(), Errno>,
    ) -> Result<OwnedFd, RootfsError> {
        match self.open_raw(path, OFlags::PATH) {
            Ok(fd) => return Ok(fd),
            Err(Errno::NOENT) => {}
            Err(source) => return Err(RootfsError::Resolve { path: path.into(), source }),
        }
        let error = |source| RootfsError::Make { path: path.into(), source };
        if depth > MAX_SYMLINKS {
            return Err(error(Errno::LOOP));
        }
        let (parent, name) = match (path.parent(), path.components().next_back()) {
            (Some(parent), Some(Component::Normal(name))) => (parent, name),
            _ => return Err(error(Errno::NOENT)),
        };
        let parent_fd =
            self.open_or_make(parent, depth + 1, |fd, name| rustix::fs::mkdirat(fd, name, Mode::from_raw_mode(0o755)))?;
        match rustix::fs::readlinkat(&parent_fd, name, Vec::new()) {
            // A link to nowhere: what it points to, seen from inside, is what is to be made.
            Ok(target) => {
                let target = Path::new(OsStr::from_bytes(target.as_bytes()));
                return self.open_or_make(&self.inside(&parent_fd).map_err(error)?.join(target), depth + 1, make_last);
            }
            Err(Errno::INVAL | Errno::NOENT) => {}
            Err(errno) => return Err(error(errno)),
        }
        match make_last(parent_fd.as_fd(), name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(error(errno)),
        }
        rustix::fs::openat(&parent_fd, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            .map_err(error)
    }

    /// The path of something inside, as seen from there.
    pub fn inside(&self, fd: impl AsFd) -> Result<PathBuf, Errno> {
        let path = path_of(fd)?;
        path.strip_prefix(&self.path).map(|path| Path::new("/").join(path)).map_err(|_| Errno::XDEV)
    }

    /// Makes this the root of the process and lets go of the guest's.
    pub fn pivot(&self) -> Result<(), RootfsError> {
        let guest = rustix::fs::openat(CWD, "/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(RootfsError::Pivot)?;
        rustix::process::fchdir(&self.fd).map_err(RootfsError::Pivot)?;
        // With both arguments the same, the guest's root is stacked on top of the new one, and needs no directory in it.
        rustix::process::pivot_root(".", ".").map_err(RootfsError::Pivot)?;
        rustix::process::fchdir(&guest).map_err(RootfsError::Detach)?;
        // So that unmounting does not travel to where the guest's mounts came from.
        mount_change(".", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
            .map_err(RootfsError::Detach)?;
        unmount(".", UnmountFlags::DETACH).map_err(RootfsError::Detach)?;
        rustix::process::chdir("/").map_err(RootfsError::Detach)
    }

    /// Makes this the root of a process that shares the guest's mounts.
    pub fn change_root(&self) -> Result<(), RootfsError> {
        rustix::process::fchdir(&self.fd).map_err(RootfsError::Pivot)?;
        rustix::process::chroot(".").map_err(RootfsError::Pivot)
    }

    /// Sets the propagation that was asked for, and read-only if it was.
    pub fn finish(&self, propagation: &str, readonly: bool) -> Result<(), RootfsError> {
        if let Some((kind, recursive)) = PropagationKind::parse(propagation)
            && kind != PropagationKind::Private
        {
            set_attributes(&self.fd, Attributes::default(), Some(kind), recursive).map_err(RootfsError::Propagation)?;
        }
        if readonly {
            let attributes = Attributes { set: attribute::RDONLY, clear: 0 };
            set_attributes(&self.fd, attributes, None, false).map_err(RootfsError::ReadOnly)?;
        }
        Ok(())
    }
}

/// Mounts a detached mount on what a descriptor refers to.
pub fn attach(mount: impl AsFd, target: impl AsFd) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", target, "", flags)
}

/// `mount_setattr(2)` on the mount a descriptor is the root of.
pub fn set_attributes(
    mount: impl AsFd,
    attributes: Attributes,
    propagation: Option<PropagationKind>,
    recursive: bool,
) -> Result<(), Errno> {
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    let attr = MountAttr {
        set: attributes.set,
        clear: attributes.clear,
        propagation: propagation.map_or(0, |kind| u64::from(kind.flags().bits())),
        user_namespace: 0,
    };
    let mut flags = AtFlags::EMPTY_PATH.bits();
    if recursive {
        flags |= libc::AT_RECURSIVE as u32;
    }
    // SAFETY: the path is empty, and the attribute is of the given size and outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of_val(&attr),
        )
    };
    if result < 0 { Err(last_errno()) } else { Ok(()) }
}

/// The path of a descriptor, from the process's root. Wants `/proc`.
pub fn path_of(fd: impl AsFd) -> Result<PathBuf, Errno> {
    let link = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    let path = rustix::fs::readlink(link, Vec::new())?;
    Ok(PathBuf::from(OsStr::from_bytes(path.as_bytes())))
}

/// The error of a system call made through libc.
pub fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
