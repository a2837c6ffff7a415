//! The host's files of a container, as detached mounts: nothing is ever mounted in the host's mount namespace. The
//! machine's process attaches them in its own.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use podhull_protocol::SharedMemory;
use podhull_vmm::control::Resource;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use super::sockets::Socket;
use super::view::Place;
use crate::bundle::Bundle;
use crate::spec::{has_option, is_bind};

/// Most bind mounts of a container: their descriptors travel in one message together with the machine's own.
const MAX_BINDS: usize = 180;

/// Why the host's files cannot be given to a pod.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The source cannot be opened.
    #[error("mounts[{index}].source {path:?}: {errno}")]
    Source {
        /// Place in `mounts`.
        index: usize,
        /// As written.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// The kernel refuses to clone the mount.
    #[error("cannot clone the mount of {path:?}: {errno}{}", remedy(*errno))]
    Clone {
        /// What was to be cloned.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// A mount point is missing in a root that will be read-only, and cannot be made.
    #[error("cannot make {path:?} in the root filesystem: {errno}")]
    MountPoint {
        /// Path in the container.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// procfs or sysfs where a link is, or a file. runc's words.
    #[error("filesystem {kind:?} must be mounted on ordinary directory: {path:?}")]
    NotDirectory {
        /// Type of the file system.
        kind: String,
        /// Path in the container.
        path: PathBuf,
    },
    /// A socket cannot be stood for.
    #[error("socket {0:?}: {1}")]
    Socket(PathBuf, #[source] std::io::Error),
    /// More than a message can carry.
    #[error("mounts: {0} bind mounts are more than {MAX_BINDS}")]
    TooMany(usize),
}

fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::PERM => "; podhull must run as root (CAP_SYS_ADMIN)",
        Errno::NOSYS => "; podhull needs Linux 5.12 or newer",
        _ => "",
    }
}

/// Path of the container's root filesystem below the share.
pub fn root_in_share(id: &str) -> String {
    format!("{id}/rootfs")
}

/// The host's files of a container, as detached mounts.
pub struct Prepared {
    /// For the machine.
    pub resources: Vec<(Resource, OwnedFd)>,
    /// For who looks at the container from the host.
    pub root: OwnedFd,
    /// Mount points of the container, in order, and what is seen there from the host.
    pub places: Vec<(PathBuf, Place)>,
    /// Memory of the guest in place of a tmpfs of the host.
    pub memory: Vec<SharedMemory>,
    /// Sockets of the host, in whose places the guest has its own.
    pub sockets: Vec<Socket>,
}

/// Clones the mounts of the root filesystem and of each bind mount, and writes into the specification where the guest
/// finds the latter.
pub fn prepare(id: &str, bundle: &mut Bundle) -> Result<Prepared, MountError> {
    let mut places: Vec<_> = bundle.config.mounts().iter().map(place).collect();
    let binds: Vec<_> = bundle.config.mounts().iter().enumerate().filter(|(_, mount)| is_bind(mount)).collect();
    if binds.len() > MAX_BINDS {
        return Err(MountError::TooMany(binds.len()));
    }
    let mut resources = Vec::with_capacity(binds.len() + 1);
    let mut sources = Vec::with_capacity(binds.len());
    let mut files = Vec::new();
    let mut memory = Vec::new();
    let mut host_sockets = Vec::new();
    for (index, mount) in binds {
        let path = mount.source().clone().unwrap_or_default();
        let fail = |errno| MountError::Source { index, path: path.clone(), errno };
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let source = rustix::fs::openat(&bundle.directory, &path, flags, Mode::empty()).map_err(fail)?;
        let stat = rustix::fs::fstat(&source).map_err(fail)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            files.push(index);
        }
        if let Some(shared) = shared_memory(mount.destination(), &source, &stat).map_err(fail)? {
            sources.push((index, format!("{}/{}", podhull_protocol::MEMORY_DIR, shared.name)));
            memory.push(shared);
            continue;
        }
        let options = mount.options().as_deref().unwrap_or_default();
        let last = |words: [&str; 2]| options.iter().rev().find(|o| words.contains(&o.as_str())).map(String::as_str);
        let tree = Tree {
            recursive: has_option(mount, "rbind"),
            read_only: last(["ro", "rw"]) == Some("ro"),
            all_read_only: last(["rro", "rrw"]) == Some("rro"),
        };
        let clone = || tree.clone(source.as_fd()).map_err(|errno| MountError::Clone { path: path.clone(), errno });
        if FileType::from_raw_mode(stat.st_mode) == FileType::Socket {
            let socket = Socket::new(clone()?, &stat).map_err(|error| MountError::Socket(path.clone(), error))?;
            places[index].1 = Place::Files(clone()?);
            sources.push((index, socket.path()));
            host_sockets.push(socket);
            continue;
        }
        resources.push((Resource::Mount { path: format!("{id}/mounts/{index}") }, clone()?));
        places[index].1 = Place::Files(clone()?);
        sources.push((index, format!("{}/{id}/mounts/{index}", podhull_protocol::SHARE_DIR)));
    }
    let read_only = bundle.config.root_readonly();
    if read_only {
        make_mount_points(bundle, &files)?;
    }
    let root = || {
        Tree { recursive: true, read_only, all_read_only: false }
            .clone(bundle.root.as_fd())
            .map_err(|errno| MountError::Clone { path: bundle.root_path.clone(), errno })
    };
    resources.push((Resource::Mount { path: root_in_share(id) }, root()?));
    let root = root()?;
    for (index, source) in sources {
        bundle.config.set_mount_source(index, &source);
    }
    Ok(Prepared { resources, root, places, memory, sockets: host_sockets })
}

/// POSIX shared memory that Podman and others make on the host, an empty tmpfs for each pod, and bind to the same place in all
/// of its containers. In the guest it is memory of the guest's: nobody reads it from the host, and two binds of virtio-fs have
/// no pages in common. The host's own is not meant by that.
fn shared_memory(destination: &Path, source: &OwnedFd, stat: &Stat) -> Result<Option<SharedMemory>, Errno> {
    /// `linux/magic.h`.
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    if destination != Path::new("/dev/shm") {
        return Ok(None);
    }
    let system = rustix::fs::fstatfs(source)?;
    if system.f_type != TMPFS_MAGIC || rustix::fs::stat("/dev/shm").is_ok_and(|own| own.st_dev == stat.st_dev) {
        return Ok(None);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(source, ".", flags, Mode::empty())?;
    let mut entries = rustix::fs::Dir::read_from(&directory)?;
    if entries.any(|entry| entry.is_ok_and(|entry| !matches!(entry.file_name().to_bytes(), b"." | b".."))) {
        return Ok(None);
    }
    let (major, minor) = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    Ok(Some(SharedMemory {
        name: format!("{major}-{minor}-{}", stat.st_ino),
        bytes: system.f_blocks.saturating_mul(system.f_bsize.unsigned_abs()),
        mode: stat.st_mode,
        ..Default::default()
    }))
}

/// What is seen from the host where a mount is that is not one of the host's files.
fn place(mount: &oci_spec::runtime::Mount) -> (PathBuf, Place) {
    let place = if mount.typ().as_deref() == Some("proc") { Place::Processes } else { Place::Hidden };
    (mount.destination().clone(), place)
}

/// How a mount is cloned.
struct Tree {
    /// With the mounts below it.
    recursive: bool,
    read_only: bool,
    /// Those below it too.
    all_read_only: bool,
}

impl Tree {
    fn clone(&self, source: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
        let mut flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        if self.recursive {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let tree = open_tree(source, "", flags)?;
        // Private: what the host mounts or unmounts below later must not come and go in the machine's process.
        let all = if self.all_read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
        set_attributes(tree.as_fd(), libc::AT_RECURSIVE, all, libc::MS_PRIVATE)?;
        if self.read_only {
            set_attributes(tree.as_fd(), 0, libc::MOUNT_ATTR_RDONLY, 0)?;
        }
        Ok(tree)
    }
}

/// `mount_setattr(2)` on the mount itself.
fn set_attributes(mount: BorrowedFd<'_>, flags: libc::c_int, set: u64, propagation: u64) -> Result<(), Errno> {
    let attributes = libc::mount_attr { attr_set: set, attr_clr: 0, propagation, userns_fd: 0 };
    // SAFETY: the path is an empty C string, the structure outlives the call and its size is given; the kernel only reads
    // both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            &attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Makes what is missing of the mount points and the working directory, as runc does: the guest cannot, in a root that is
/// read-only on the host. `files` are the places in `mounts` that bind something other than a directory.
fn make_mount_points(bundle: &Bundle, files: &[usize]) -> Result<(), MountError> {
    let mounts = bundle.config.mounts();
    let inside_another = |path: &Path, before: &[oci_spec::runtime::Mount]| {
        before.iter().any(|m| m.destination() != Path::new("/") && path.starts_with(m.destination()))
    };
    for (index, mount) in mounts.iter().enumerate() {
        if !inside_another(mount.destination(), &mounts[..index]) {
            if let Some(kind @ ("proc" | "sysfs")) = mount.typ().as_deref() {
                check_directory(bundle.root.as_fd(), mount.destination(), kind)?;
            }
            make_path(bundle.root.as_fd(), mount.destination(), files.contains(&index))?;
        }
    }
    match bundle.config.spec().process() {
        Some(process) if !inside_another(process.cwd(), mounts) => make_path(bundle.root.as_fd(), process.cwd(), false),
        _ => Ok(()),
    }
}

/// What a link stands for may not be covered by the kernel's files. The guest looks again; here it is before anything is made there.
fn check_directory(root: BorrowedFd<'_>, path: &Path, kind: &str) -> Result<(), MountError> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT);
    match found.and_then(rustix::fs::fstat) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Directory => {
            Err(MountError::NotDirectory { kind: kind.into(), path: path.into() })
        }
        // What is missing is made; what is wrong otherwise is seen then.
        _ => Ok(()),
    }
}

/// Every step is resolved as if the root filesystem were the root directory: its links cannot lead out of it.
fn make_path(root: BorrowedFd<'_>, path: &Path, file: bool) -> Result<(), MountError> {
    let fail = |errno| MountError::MountPoint { path: path.to_owned(), errno };
    let open =
        |at: &Path| rustix::fs::openat2(root, at, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT);
    match open(path) {
        Ok(_) => return Ok(()),
        Err(Errno::NOENT) => {}
        Err(errno) => return Err(fail(errno)),
    }
    let names: Vec<_> =
        path.components().filter_map(|c| if let Component::Normal(n) = c { Some(n) } else { None }).collect();
    let mut at = PathBuf::from("/");
    for (index, name) in names.iter().enumerate() {
        let parent = open(&at).map_err(fail)?;
        at.push(name);
        if open(&at).is_ok() {
            continue;
        }
        let name = CString::new(name.as_encoded_bytes()).map_err(|_| fail(Errno::INVAL))?;
        if file && index + 1 == names.len() {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(&parent, &name, flags, Mode::from_raw_mode(0o644)).map(drop).map_err(fail)?;
        } else {
            rustix::fs::mkdirat(&parent, &name, Mode::from_raw_mode(0o755)).map_err(fail)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn mount_points_are_made_inside_the_root_whatever_its_links_say() {
        let base = std::env::temp_dir().join(format!("podhull-mounts-{}", std::process::id()));
        let root = base.join("rootfs");
        fs::create_dir_all(&root).unwrap();
        fs::create_dir(base.join("outside")).unwrap();
        std::os::unix::fs::symlink("../outside", root.join("way")).unwrap();
        std::os::unix::fs::symlink("/real", root.join("link")).unwrap();
        fs::create_dir(root.join("real")).unwrap();
        let fd = rustix::fs::open(&root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        make_path(fd.as_fd(), Path::new("/link/deep/er"), false).unwrap();
        make_path(fd.as_fd(), Path::new("/link/file"), true).unwrap();
        assert!(root.join("real/deep/er").is_dir() && root.join("real/file").is_file());
        assert!(make_path(fd.as_fd(), Path::new("/way/in"), false).is_err());
        assert_eq!(fs::read_dir(base.join("outside")).unwrap().count(), 0);
        fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn proc_and_sys_are_refused_where_a_link_is() {
        let root = std::env::temp_dir().join(format!("podhull-links-{}", std::process::id()));
        fs::create_dir_all(root.join("sys")).unwrap();
        std::os::unix::fs::symlink("/missing", root.join("proc")).unwrap();
        let fd = rustix::fs::open(&root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let error = check_directory(fd.as_fd(), Path::new("/proc"), "proc").unwrap_err().to_string();
        assert_eq!(error, r#"filesystem "proc" must be mounted on ordinary directory: "/proc""#);
        check_directory(fd.as_fd(), Path::new("/sys"), "sysfs").unwrap();
        check_directory(fd.as_fd(), Path::new("/new"), "proc").unwrap();
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn a_read_only_clone_cannot_be_written_and_leaves_its_source_writable() {
        let base = std::env::temp_dir().join(format!("podhull-clone-{}", std::process::id()));
        fs::create_dir_all(&base).unwrap();
        let source = rustix::fs::open(&base, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let tree = Tree { recursive: true, read_only: true, all_read_only: false };
        let clone = match tree.clone(source.as_fd()) {
            Err(Errno::PERM) if !rustix::process::geteuid().is_root() => return,
            clone => clone.unwrap(),
        };
        let create = |at: &OwnedFd| rustix::fs::openat(at, "f", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).map(drop);
        assert_eq!(create(&clone), Err(Errno::ROFS));
        assert_eq!(create(&source), Ok(()));
        fs::remove_dir_all(&base).unwrap();
    }
}
