//! The file system a machine's process lives in: a small read-only one of its own that holds the pod's share and nothing
//! else. The process makes it before it has a thread, and the host's file system is out of its reach from then on.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, StatVfsMountFlags, fstat, fstatvfs, mkdirat, openat2};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, mount_remount, move_mount,
    open_tree, unmount,
};
use rustix::process::{chdir, pivot_root};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use super::{JailError, step};

/// A directory that every host has; the new root is mounted on it, in our own mount namespace, for the moment before it
/// becomes the root.
const STAGE: &str = "/proc";

/// Bounds of the root itself: it holds mount points only, but the guest may ask for more.
const ROOT_SIZE: &str = "256k";
const ROOT_INODES: &str = "4096";

/// First character of names in the root of the share that mounts have which several share; no user's begins with it.
const SHARED: char = '@';

/// Directory of a user with one file for each shared mount that it uses, of the same name.
const USES: &str = "uses";

/// The process's root, and through it the pod's share.
#[derive(Debug)]
pub struct Jail {
    /// The root's file system, writable, for mount points; the guest sees the read-only mount.
    root: OwnedFd,
    /// `/proc/self/fd`, opened while there was a `/proc`.
    proc_self_fd: File,
}

impl Jail {
    /// Enters: no path of the host can be named afterwards, and its network, its host name and its System V objects cannot
    /// be reached. Call it while the process has one thread.
    pub fn enter() -> Result<Self, JailError> {
        let path = "/proc/self/fd";
        let proc_self_fd = step(path, rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()))?.into();
        let namespaces = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
        // SAFETY: the process has one thread; no descriptor table is unshared.
        step("unshare", unsafe { unshare_unsafe(namespaces) })?;
        // Nothing of what follows may reach the namespace we come from.
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        step("private mounts", mount_change("/", private))?;

        let context = step("fsopen", fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC))?;
        for (key, value) in [("size", ROOT_SIZE), ("nr_inodes", ROOT_INODES), ("mode", "0755")] {
            step("tmpfs option", fsconfig_set_string(context.as_fd(), key, value))?;
        }
        step("tmpfs", fsconfig_create(context.as_fd()))?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        let mount = step("fsmount", fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes))?;
        attach(&mount, rustix::fs::CWD, STAGE)?;
        let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let root = step("open_tree", open_tree(rustix::fs::CWD, STAGE, clone))?;
        let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
        step("read-only root", mount_remount(STAGE, flags, ""))?;

        // The old root is stacked on the new one, and taken off.
        step("chdir", chdir(STAGE))?;
        step("pivot_root", pivot_root(".", "."))?;
        step("umount of the old root", unmount(".", UnmountFlags::DETACH))?;
        step("chdir", chdir("/"))?;
        Ok(Self { root, proc_self_fd })
    }

    /// Attaches a detached mount at a relative path of the share.
    pub fn attach(&self, path: &str, mount: &OwnedFd) -> Result<(), JailError> {
        let refuse = |errno| step::<()>(&format!("mount point {path:?}"), Err(errno));
        let mut names = Vec::new();
        for component in Path::new(path).components() {
            match component {
                Component::Normal(name) => names.push(name),
                _ => return refuse(Errno::INVAL),
            }
        }
        let Some((last, parents)) = names.split_last() else { return refuse(Errno::INVAL) };
        let mut directory = step("dup", rustix::io::fcntl_dupfd_cloexec(&self.root, 0))?;
        for name in parents {
            directory = make_directory(directory.as_fd(), Path::new(name), path)?;
        }
        let is_directory =
            FileType::from_raw_mode(step("fstat of a mount", fstat(mount))?.st_mode) == FileType::Directory;
        if is_directory {
            make_directory(directory.as_fd(), Path::new(last), path)?;
        } else {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            match rustix::fs::openat(&directory, Path::new(last), flags, Mode::from_raw_mode(0o644)) {
                Ok(_) | Err(Errno::EXIST) => {}
                Err(errno) => return refuse(errno),
            }
        }
        attach(mount, rustix::fs::CWD, &format!("/{path}"))
    }

    /// Attaches a detached mount that `user` shares with others, at a name in the root of the share that says what it is. Where it is
    /// attached already it stays the one that it is; it can be written from then on if what is given can.
    pub fn attach_shared(&self, name: &str, user: &str, mount: &OwnedFd) -> Result<(), JailError> {
        let what = format!("shared mount {name:?}");
        if Path::new(name).components().count() != 1 || !name.starts_with(SHARED) {
            return step(&what, Err(Errno::INVAL));
        }
        // Before anything is there: whatever comes next, who takes the user away takes it away too.
        let mut uses = step("dup", rustix::io::fcntl_dupfd_cloexec(&self.root, 0))?;
        for directory in [user, USES] {
            uses = make_directory(uses.as_fd(), Path::new(directory), user)?;
        }
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        step(&what, rustix::fs::openat(&uses, name, flags, Mode::from_raw_mode(0o600)))?;
        let Some(attached) = step(&what, attached(name))? else {
            // A mount point of one who was killed before it had its mount may be there.
            step(&what, self.detach_entry(self.root.as_fd(), name, &format!("/{name}")))?;
            return self.attach(name, mount);
        };
        match step(&what, is_read_only(&attached))? && !step(&what, is_read_only(mount))? {
            true => step(&what, make_writable(&attached)),
            false => Ok(()),
        }
    }

    /// Calls `change` with the share of a machine that runs, given its mount namespace. Its own process has nothing left to
    /// mount with; this takes `CAP_SYS_ADMIN` and is for whoever started it.
    pub fn of_running<T: Send>(
        mount_namespace: BorrowedFd<'_>,
        change: impl FnOnce(&Self) -> Result<T, JailError> + Send,
    ) -> Result<T, JailError> {
        let enter = || {
            // A mount namespace cannot be entered with a root and a working directory that are somebody else's too.
            // SAFETY: they become those of this thread alone; no descriptor table is unshared.
            step("unshare", unsafe { unshare_unsafe(UnshareFlags::FS) })?;
            let path = "/proc/self/fd";
            let proc_self_fd =
                step(path, rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()))?.into();
            let mount = Some(LinkNameSpaceType::Mount);
            step("mount namespace of the machine", move_into_link_name_space(mount_namespace, mount))?;
            let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let root = step("open_tree", open_tree(rustix::fs::CWD, "/", clone))?;
            step("writable root", make_writable(&root))?;
            change(&Self { root, proc_self_fd })
        };
        std::thread::scope(|scope| match scope.spawn(enter).join() {
            Ok(changed) => changed,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    }

    /// Names in a directory of the share that holds mount points; none if it is not there.
    pub fn names(&self, directory: &str) -> Result<Vec<String>, JailError> {
        let what = format!("mount points in {directory:?}");
        let opened = match open_directory(self.root.as_fd(), Path::new(directory)) {
            Err(Errno::NOENT) => return Ok(Vec::new()),
            opened => step(&what, opened)?,
        };
        step(&what, names_in(&opened))
    }

    /// Detaches all mounts below a directory of the share, and removes it; if it is not there, that is fine. What it alone uses of
    /// shared mounts goes first, so that who is killed on the way leaves a directory that says what is left to do.
    pub fn detach(&self, name: &str) -> Result<(), JailError> {
        for shared in self.names(&format!("{name}/{USES}"))? {
            if !self.has_other_user(&shared, name)? {
                let what = format!("shared mount {shared:?}");
                step(&what, self.detach_entry(self.root.as_fd(), &shared, &format!("/{shared}")))?;
            }
        }
        step(&format!("mounts below {name:?}"), self.detach_entry(self.root.as_fd(), name, &format!("/{name}")))
    }

    fn has_other_user(&self, shared: &str, user: &str) -> Result<bool, JailError> {
        for other in self.names(".")?.iter().filter(|name| *name != user && !name.starts_with(SHARED)) {
            match rustix::fs::statat(&self.root, format!("{other}/{USES}/{shared}"), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(_) => return Ok(true),
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                Err(errno) => return step(&format!("shared mount {shared:?}"), Err(errno)),
            }
        }
        Ok(false)
    }

    /// Detaches what is mounted on an entry of a directory and below it, and removes it; what is not there is fine. `path` is the
    /// entry's, from the root. All is walked in the file system of the root alone, without what is mounted there.
    fn detach_entry(&self, parent: BorrowedFd<'_>, name: &str, path: &str) -> Result<(), Errno> {
        let kind = match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => FileType::from_raw_mode(stat.st_mode),
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(errno),
        };
        // More than one may be on top of another.
        loop {
            match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                Ok(()) => {}
                // Not a mount point.
                Err(Errno::INVAL) => break,
                Err(errno) => return Err(errno),
            }
        }
        if kind != FileType::Directory {
            return rustix::fs::unlinkat(parent, name, AtFlags::empty());
        }
        let directory = open_directory(parent, Path::new(name))?;
        for name in names_in(&directory)? {
            self.detach_entry(directory.as_fd(), &name, &format!("{path}/{name}"))?;
        }
        rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
    }

    /// `/proc/self/fd`, by which the file server reopens what it knows.
    pub fn proc_self_fd(&self) -> io::Result<File> {
        self.proc_self_fd.try_clone()
    }
}

/// What can be named of a directory's entries: all that is made here can.
fn names_in(directory: &OwnedFd) -> Result<Vec<String>, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let entries = rustix::fs::openat(directory, ".", flags, Mode::empty())?;
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(&entries)? {
        match entry?.file_name().to_str() {
            Ok("." | "..") | Err(_) => {}
            Ok(name) => names.push(name.to_owned()),
        }
    }
    Ok(names)
}

/// What is mounted at a name in the root of the share, if anything is.
fn attached(name: &str) -> Result<Option<OwnedFd>, Errno> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = rustix::fs::open("/", flags | OFlags::DIRECTORY, Mode::empty())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    match openat2(&root, name, flags, Mode::empty(), resolve | ResolveFlags::NO_XDEV) {
        Ok(_) | Err(Errno::NOENT) => Ok(None),
        // The way leads into another mount.
        Err(Errno::XDEV) => openat2(&root, name, flags, Mode::empty(), resolve).map(Some),
        Err(errno) => Err(errno),
    }
}

fn is_read_only(mount: &OwnedFd) -> Result<bool, Errno> {
    Ok(fstatvfs(mount)?.f_flag.contains(StatVfsMountFlags::RDONLY))
}

fn make_directory(parent: BorrowedFd<'_>, name: &Path, path: &str) -> Result<OwnedFd, JailError> {
    let what = format!("mount point {path:?}");
    match mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return step(&what, Err(errno)),
    }
    step(&what, open_directory(parent, name))
}

fn open_directory(parent: BorrowedFd<'_>, name: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(parent, name, flags, Mode::empty(), resolve)
}

fn make_writable(mount: &OwnedFd) -> Result<(), Errno> {
    let attributes = libc::mount_attr { attr_set: 0, attr_clr: libc::MOUNT_ATTR_RDONLY, propagation: 0, userns_fd: 0 };
    set_attributes(mount, &attributes)
}

/// `mount_setattr(2)` on the mount itself, not on those below it.
fn set_attributes(mount: &OwnedFd, attributes: &libc::mount_attr) -> Result<(), Errno> {
    // SAFETY: the path is an empty C string, the structure outlives the call and its size is given; the kernel only reads
    // both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

fn attach(mount: &OwnedFd, directory: impl AsFd, path: &str) -> Result<(), JailError> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    step(&format!("move_mount to {path:?}"), move_mount(mount, "", directory, path, flags))
}

/// Removes the entry `name` of `directory` with all below it; what is not there is fine. Symbolic links are removed, not
/// followed.
pub fn remove_tree(directory: BorrowedFd<'_>, name: &std::ffi::CStr) -> Result<(), Errno> {
    let refused = match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        // The last of who may remove directories here and no files.
        Err(errno @ (Errno::ISDIR | Errno::PERM | Errno::ACCESS)) => errno,
        Err(errno) => return Err(errno),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let inner = match rustix::fs::openat(directory, name, flags, Mode::empty()) {
        Ok(inner) => inner,
        Err(Errno::NOTDIR | Errno::LOOP) => return Err(refused),
        Err(errno) => return Err(errno),
    };
    for entry in rustix::fs::Dir::read_from(&inner)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            remove_tree(inner.as_fd(), entry.file_name())?;
        }
    }
    rustix::fs::unlinkat(directory, name, AtFlags::REMOVEDIR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_removed_without_following_its_links() {
        let base = std::env::temp_dir().join(format!("podhull-remove-{}", std::process::id()));
        std::fs::create_dir_all(base.join("tree/a/b")).unwrap();
        std::fs::write(base.join("kept"), "x").unwrap();
        std::fs::write(base.join("tree/a/file"), "x").unwrap();
        std::os::unix::fs::symlink("../kept", base.join("tree/link")).unwrap();
        let directory = File::open(&base).unwrap();
        remove_tree(directory.as_fd(), c"tree").unwrap();
        remove_tree(directory.as_fd(), c"tree").unwrap();
        assert!(!base.join("tree").exists() && base.join("kept").exists());
        remove_tree(
            File::open(std::env::temp_dir()).unwrap().as_fd(),
            &std::ffi::CString::new(base.file_name().unwrap().as_encoded_bytes()).unwrap(),
        )
        .unwrap();
    }

    /// A detached clone of what is mounted at a path.
    fn detached(path: &Path, read_only: bool) -> OwnedFd {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(rustix::fs::CWD, path, flags).unwrap();
        let attributes =
            libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
        if read_only {
            set_attributes(&tree, &attributes).unwrap();
        }
        tree
    }

    #[test]
    fn a_mount_is_shared_until_its_last_user_is_gone() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let base = std::env::temp_dir().join(format!("podhull-shared-{}", std::process::id()));
        std::fs::create_dir_all(&base).unwrap();
        std::fs::write(base.join("file"), "x").unwrap();
        let test = || {
            let file = detached(&base.join("file"), false);
            let [first, second, writable] = [true, true, false].map(|read_only| detached(&base, read_only));
            let jail = Jail::enter().unwrap();
            let at = |name: &str| attached(name).unwrap().map(|fd| is_read_only(&fd).unwrap());
            let users = |name: &str| std::fs::read_dir(format!("/{name}/uses")).unwrap().count();

            jail.attach_shared("@1", "a", &first).unwrap();
            jail.attach_shared("@1", "b", &second).unwrap();
            assert_eq!(at("@1"), Some(true));
            jail.attach_shared("@1", "c", &writable).unwrap();
            assert_eq!(at("@1"), Some(false));
            // Who comes later and only reads takes nothing from the others.
            jail.attach_shared("@1", "d", &second).unwrap();
            assert_eq!(at("@1"), Some(false));
            std::fs::write("/@1/new", "").unwrap();
            jail.attach_shared("@2", "d", &file).unwrap();
            jail.attach_shared("@2", "d", &file).unwrap();
            assert_eq!((users("a"), users("d")), (1, 2));

            for user in ["a", "c", "nobody", "b"] {
                jail.detach(user).unwrap();
                assert_eq!((at("@1"), at("@2")), (Some(false), Some(false)));
            }
            // Of one that was killed before its mount was there.
            std::fs::write("/@3", "").unwrap_err();
            drop(make_directory(jail.root.as_fd(), Path::new("@3"), "@3").unwrap());
            jail.attach_shared("@3", "d", &second).unwrap();
            assert_eq!(at("@3"), Some(true));
            jail.detach("d").unwrap();
            assert_eq!((at("@1"), at("@2")), (None, None));
            assert_eq!(std::fs::read_dir("/").unwrap().count(), 0);
            for name in ["@1/x", "1", "../@1", "@1/../x", ""] {
                jail.attach_shared(name, "a", &first).unwrap_err();
            }
        };
        std::thread::scope(|scope| scope.spawn(test).join().unwrap());
        assert!(base.join("new").exists());
        std::fs::remove_dir_all(&base).unwrap();
    }
}
