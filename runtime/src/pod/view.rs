//! What callers find of a container on the host behind the shadow's pid: namespaces of its own, and as its root the
//! container's, so that who enters its mount namespace (`podman cp`) or goes through `/proc/<pid>/root` reaches the
//! container's files and not the host's.
//!
//! File systems that live in the guest (tmpfs and the like) are not there: in their places are empty ones that cannot be
//! written, so that nothing is put where the container would never see it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::LinuxNamespaceType;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, unmount,
};
use rustix::process::{chdir, fchdir, pivot_root};
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::network::Namespace;
use crate::spec::Config;

/// A directory that every host has; the container's root is mounted on it, in a mount namespace of ours, for the moment
/// before it becomes the root.
const STAGE: &str = "/proc";

/// Which namespaces of its own a container's shadow has on the host, beside the mount namespace.
pub struct Namespaces {
    /// It is the first process of a pid namespace.
    pub pid: bool,
    /// The others.
    pub others: UnshareFlags,
}

/// What the specification asks for. Those that have a path are not new.
pub fn namespaces(config: &Config) -> Namespaces {
    let asked = config.spec().linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let is_new = |path: &Option<PathBuf>| path.as_ref().is_none_or(|path| path.as_os_str().is_empty());
    let has = |kind| asked.is_some_and(|all| all.iter().any(|one| one.typ() == kind && is_new(one.path())));
    let mut others = UnshareFlags::empty();
    for (kind, flag) in [
        (LinuxNamespaceType::Network, UnshareFlags::NEWNET),
        (LinuxNamespaceType::Ipc, UnshareFlags::NEWIPC),
        (LinuxNamespaceType::Uts, UnshareFlags::NEWUTS),
        (LinuxNamespaceType::Cgroup, UnshareFlags::NEWCGROUP),
    ] {
        if has(kind) {
            others |= flag;
        }
    }
    Namespaces { pid: has(LinuxNamespaceType::Pid), others }
}

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot set the container's process apart: {step}: {errno}")]
pub struct ViewError {
    step: &'static str,
    errno: Errno,
}

fn step<T>(step: &'static str, result: Result<T, Errno>) -> Result<T, ViewError> {
    result.map_err(|errno| ViewError { step, errno })
}

/// What is found at a place of the container.
pub enum Place {
    /// The same files.
    Files(OwnedFd),
    /// The processes that stand for the container's.
    Processes,
    /// Something that lives in the guest.
    Hidden,
}

/// The namespaces of a container and what is found in them.
pub struct View {
    /// The container's root, a detached mount.
    pub root: OwnedFd,
    /// Mount points and what is there, in order.
    pub places: Vec<(PathBuf, Place)>,
    /// Namespaces that are its own; the mount namespace always is.
    pub namespaces: UnshareFlags,
    /// Those that are there already. Which pid namespace a process is in was decided before, and a user namespace is only held
    /// ([`users`](super::users)).
    pub joined: Vec<(LinuxNamespaceType, OwnedFd)>,
    /// Host name in its UTS namespace.
    pub hostname: Option<String>,
}

impl View {
    /// Whose network namespace it is; `None`: the host's own.
    pub fn network(&self) -> Option<Namespace> {
        let joined = self.joined.iter().any(|(kind, _)| *kind == LinuxNamespaceType::Network);
        match self.namespaces.contains(UnshareFlags::NEWNET) {
            true => Some(Namespace::New),
            false => joined.then_some(Namespace::Joined),
        }
    }

    /// Moves this process into new namespaces with the container's root. It must have one thread, and have opened what it
    /// needs of the host: no path of it can be named afterwards.
    pub fn enter(mut self) -> Result<Entered, ViewError> {
        let (users, joined): (Vec<_>, Vec<_>) =
            self.joined.into_iter().partition(|(kind, _)| *kind == LinuxNamespaceType::User);
        for (kind, namespace) in joined.iter().filter(|(kind, _)| *kind != LinuxNamespaceType::Pid) {
            step("setns", move_into_link_name_space(namespace.as_fd(), link_type(*kind)))?;
        }
        // SAFETY: the process has one thread; no descriptor table is unshared.
        step("unshare", unsafe { unshare_unsafe(self.namespaces | UnshareFlags::NEWNS) })?;
        // What the host unmounts is not held up here, and nothing of ours gets there.
        let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        step("mount propagation", mount_change("/", slave))?;
        if let Some(hostname) = self.hostname.take().filter(|_| self.namespaces.contains(UnshareFlags::NEWUTS)) {
            step("host name", rustix::system::sethostname(hostname.as_bytes()))?;
        }
        let mut places = Vec::with_capacity(self.places.len());
        for (path, place) in self.places {
            let flags = MountAttrFlags::MOUNT_ATTR_NOSUID
                | MountAttrFlags::MOUNT_ATTR_NODEV
                | MountAttrFlags::MOUNT_ATTR_NOEXEC;
            let mount = match place {
                Place::Files(mount) => mount,
                Place::Processes => step("proc", file_system("proc", &[], flags))?,
                Place::Hidden => {
                    let flags = flags | MountAttrFlags::MOUNT_ATTR_RDONLY;
                    step("tmpfs", file_system("tmpfs", &[("size", "4k"), ("mode", "0555")], flags))?
                }
            };
            places.push((path, mount));
        }
        step("the container's root", attach(&self.root, rustix::fs::CWD, Path::new(STAGE)))?;
        step("chdir", fchdir(&self.root))?;
        step("pivot_root", pivot_root(".", "."))?;
        step("umount of the host's root", unmount(".", UnmountFlags::DETACH))?;
        step("chdir", chdir("/"))?;
        Ok(Entered { places, _users: users })
    }
}

/// A process that is apart from the host, and may still change what is found behind it.
pub struct Entered {
    places: Vec<(PathBuf, OwnedFd)>,
    /// The user namespace that was named for the container.
    _users: Vec<(LinuxNamespaceType, OwnedFd)>,
}

impl Entered {
    /// Mounts what belongs into the container's root. To be called when the guest has made the mount points; what has none
    /// there, inside a file system of the guest's, cannot be reached from here anyway.
    pub fn furnish(&mut self) {
        for (path, mount) in self.places.drain(..) {
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
            let Ok(target) = rustix::fs::openat2(rustix::fs::CWD, &path, flags, Mode::empty(), resolve) else {
                continue;
            };
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
            // A file where a directory should be: the guest is the one to decide that, and has.
            let _ = move_mount(&mount, "", &target, "", flags);
        }
    }
}

fn link_type(kind: LinuxNamespaceType) -> Option<LinkNameSpaceType> {
    match kind {
        LinuxNamespaceType::Network => Some(LinkNameSpaceType::Network),
        LinuxNamespaceType::Ipc => Some(LinkNameSpaceType::InterProcessCommunication),
        LinuxNamespaceType::Uts => Some(LinkNameSpaceType::HostNameAndNISDomainName),
        // Of any type: no others are joined.
        _ => None,
    }
}

/// A new file system, not attached to anything.
pub fn file_system(name: &str, options: &[(&str, &str)], attributes: MountAttrFlags) -> Result<OwnedFd, Errno> {
    let context = fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        fsconfig_set_string(context.as_fd(), *key, *value)?;
    }
    fsconfig_create(context.as_fd())?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

fn attach(mount: &OwnedFd, directory: BorrowedFd<'_>, path: &Path) -> Result<(), Errno> {
    move_mount(mount, "", directory, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// Moves this process, which must have one thread, to where another shadow is, with its root.
pub fn join(shadow: BorrowedFd<'_>) -> Result<(), ViewError> {
    let all = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::NETWORK
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::CONTROL_GROUP;
    step("setns", rustix::thread::move_into_thread_name_spaces(shadow, all))
}
