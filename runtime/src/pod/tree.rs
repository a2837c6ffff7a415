//! Files of the host as detached mounts: clones of what is mounted, with attributes and owners of their own, and overlays.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount, mount_change, move_mount, open_tree,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// A directory that every host has, to mount an overlay on in a mount namespace that only one thread sees.
const STAGE: &str = "/proc";

/// How a mount is cloned.
pub struct Tree<'a> {
    /// With the mounts below it.
    pub recursive: bool,
    /// It cannot be written.
    pub read_only: bool,
    /// Nor can those below it.
    pub all_read_only: bool,
    /// Whose files are whose in it.
    pub owners: Option<Owners<'a>>,
}

/// Owners of the files of an id-mapped mount (`MOUNT_ATTR_IDMAP`, mount_setattr(2)).
#[derive(Clone, Copy)]
pub struct Owners<'a> {
    /// The user namespace whose mappings count: a file of its user A is one of the host's user B.
    pub namespace: BorrowedFd<'a>,
    /// In the mounts below too.
    pub all: bool,
}

impl Tree<'_> {
    /// A detached clone of the mount that `source` is in, from there on.
    pub fn clone(&self, source: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
        let mut flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        if self.recursive {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let tree = open_tree(source, "", flags)?;
        // Private: what the host mounts or unmounts below later must not come and go in the machine's process.
        let mut all = attributes(if self.all_read_only { libc::MOUNT_ATTR_RDONLY } else { 0 });
        all.propagation = libc::MS_PRIVATE;
        set(tree.as_fd(), libc::AT_RECURSIVE, &all)?;
        if self.read_only {
            set(tree.as_fd(), 0, &attributes(libc::MOUNT_ATTR_RDONLY))?;
        }
        if let Some(owners) = &self.owners {
            let mut mapped = attributes(libc::MOUNT_ATTR_IDMAP);
            mapped.userns_fd = u64::from(owners.namespace.as_raw_fd().unsigned_abs());
            set(tree.as_fd(), if owners.all { libc::AT_RECURSIVE } else { 0 }, &mapped)?;
        }
        Ok(tree)
    }

    /// Twice a detached clone of a new overlay with these options of the file system (overlayfs.rst). Its paths are resolved
    /// as those of this process.
    pub fn overlay(&self, options: &str) -> Result<[OwnedFd; 2], Errno> {
        let make = || {
            // SAFETY: the mount namespace, root and working directory of this thread alone; no descriptor table is unshared.
            unsafe { unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS) }?;
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
            let options = std::ffi::CString::new(options).map_err(|_| Errno::INVAL)?;
            // By mount(2): fsconfig(2) takes 255 bytes, and the layers of one image are more.
            mount("overlay", STAGE, "overlay", MountFlags::empty(), Some(options.as_c_str()))?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let overlay = rustix::fs::openat(CWD, STAGE, flags, Mode::empty())?;
            Ok([self.clone(overlay.as_fd())?, self.clone(overlay.as_fd())?])
        };
        std::thread::scope(|scope| scope.spawn(make).join()).unwrap_or(Err(Errno::IO))
    }
}

/// A detached clone of a new overlay whose lower layers have other owners, the highest first; `options` are the others of the
/// file system. It is not visible where the layers are.
pub fn mapped_overlay(
    layers: &[&Path],
    owners: Owners<'_>,
    flags: MountFlags,
    options: &str,
) -> Result<OwnedFd, Errno> {
    let make = || {
        // SAFETY: the mount namespace, root and working directory of this thread alone; no descriptor table is unshared.
        unsafe { unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS) }?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        let sources = layers
            .iter()
            .map(|layer| rustix::fs::open(*layer, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()));
        let sources = sources.collect::<Result<Vec<_>, _>>()?;
        // A place for each: an overlay takes its layers by paths, and with their mounts' owners.
        mount("tmpfs", STAGE, "tmpfs", MountFlags::empty(), None)?;
        let mut options = format!("{options}{}lowerdir=", if options.is_empty() { "" } else { "," });
        for (index, source) in sources.iter().enumerate() {
            let tree = Tree { recursive: false, read_only: true, all_read_only: false, owners: Some(owners) };
            let (layer, path) = (tree.clone(source.as_fd())?, format!("{STAGE}/{index}"));
            rustix::fs::mkdir(&path, Mode::RWXU)?;
            move_mount(&layer, "", CWD, &path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
            options += if index > 0 { ":" } else { "" };
            options += &path;
        }
        let options = std::ffi::CString::new(options).map_err(|_| Errno::INVAL)?;
        let path = format!("{STAGE}/overlay");
        rustix::fs::mkdir(&path, Mode::RWXU)?;
        mount("overlay", &path, "overlay", flags, Some(options.as_c_str()))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let overlay = rustix::fs::open(&path, flags, Mode::empty())?;
        Tree { recursive: false, read_only: false, all_read_only: false, owners: None }.clone(overlay.as_fd())
    };
    std::thread::scope(|scope| scope.spawn(make).join()).unwrap_or(Err(Errno::IO))
}

fn attributes(set: u64) -> libc::mount_attr {
    libc::mount_attr { attr_set: set, attr_clr: 0, propagation: 0, userns_fd: 0 }
}

/// `mount_setattr(2)` on the mount itself.
fn set(mount: BorrowedFd<'_>, flags: libc::c_int, attributes: &libc::mount_attr) -> Result<(), Errno> {
    // SAFETY: the path is an empty C string, the structure outlives the call and its size is given; the kernel only reads
    // both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)) }
}

#[cfg(test)]
mod tests {
    use super::super::user_namespace;
    use super::*;
    use oci_spec::runtime::LinuxIdMapping;
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    const PLAIN: Tree<'static> = Tree { recursive: true, read_only: false, all_read_only: false, owners: None };

    fn open(path: &Path) -> OwnedFd {
        rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    fn create(at: &OwnedFd, name: &str) -> Result<(), Errno> {
        rustix::fs::openat(at, name, OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).map(drop)
    }

    #[test]
    fn a_read_only_clone_cannot_be_written_and_leaves_its_source_writable() {
        let base = tempfile::tempdir().unwrap();
        let source = open(base.path());
        let clone = match (Tree { read_only: true, ..PLAIN }).clone(source.as_fd()) {
            Err(Errno::PERM) if !rustix::process::geteuid().is_root() => return,
            clone => clone.unwrap(),
        };
        assert_eq!(create(&clone, "f"), Err(Errno::ROFS));
        assert_eq!(create(&source, "f"), Ok(()));
    }

    #[test]
    fn files_have_other_owners_in_an_id_mapped_clone() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        // Of the target directory, whose file system is one of a disk: not every tmpfs can be id-mapped.
        let base = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        fs::write(base.path().join("file"), "").unwrap();
        let source = open(base.path());
        let mapping: Vec<LinuxIdMapping> =
            serde_json::from_value(serde_json::json!([{"containerID": 0, "hostID": 5000, "size": 10}])).unwrap();
        let namespace = user_namespace(&mapping, &mapping).unwrap();
        let owners = Some(Owners { namespace: namespace.as_fd(), all: false });
        let clone = (Tree { recursive: false, owners, ..PLAIN }).clone(source.as_fd()).unwrap();
        let stat = rustix::fs::statat(&clone, "file", rustix::fs::AtFlags::empty()).unwrap();
        assert_eq!((stat.st_uid, stat.st_gid), (5000, 5000));
        rustix::fs::chownat(&clone, "file", Some(rustix::fs::Uid::from_raw(5003)), None, rustix::fs::AtFlags::empty())
            .unwrap();
        assert_eq!(fs::metadata(base.path().join("file")).unwrap().uid(), 3);
        // Root of the host is nobody there.
        assert_eq!(create(&clone, "new"), Err(Errno::OVERFLOW));
    }

    #[test]
    fn an_overlay_is_mounted_nowhere_and_shows_its_layers() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let base = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for name in ["lower", "upper", "work"] {
            fs::create_dir(base.path().join(name)).unwrap();
        }
        fs::write(base.path().join("lower/file"), "below").unwrap();
        let at = |name| base.path().join(name).display().to_string();
        let options = format!("lowerdir={},upperdir={},workdir={}", at("lower"), at("upper"), at("work"));
        let before = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let [first, second] = match PLAIN.overlay(&options) {
            // The machine's own directory may be an overlay that cannot be an upper one.
            Err(Errno::INVAL) => return,
            made => made.unwrap(),
        };
        create(&first, "new").unwrap();
        for clone in [&first, &second] {
            for name in ["file", "new"] {
                rustix::fs::statat(clone, name, rustix::fs::AtFlags::empty()).unwrap();
            }
        }
        assert!(base.path().join("upper/new").exists() && !base.path().join("lower/new").exists());
        assert_eq!(fs::read_to_string("/proc/self/mountinfo").unwrap(), before);
        assert_eq!(PLAIN.overlay("lowerdir=/does/not/exist").unwrap_err(), Errno::NOENT);
    }
}
