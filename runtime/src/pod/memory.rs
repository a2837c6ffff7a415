//! File systems in the host's memory that a caller makes for a pod to share, and that nobody reads from the host: in the guest they
//! are memory of the guest's. What is in them counts in the container that touches it, as it does on the host, and so it is within
//! the limits that the size of the machine goes by.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use podhull_protocol::{MemoryDirectory, SharedMemory};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::mountinfo::Mounts;

/// `linux/magic.h`.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Directory in which kubelet has volumes of its kind, be they on a disk or in memory.
const EMPTY_DIR: &str = "kubernetes.io~empty-dir";

/// Most directories that kubelet makes in one, for parts of it that are bound by themselves.
const MAX_DIRECTORIES: usize = 1000;

/// What the guest is to make, and where in its memory a bind source is.
type InMemory = Option<(SharedMemory, String)>;

/// POSIX shared memory that Podman and others make on the host, an empty tmpfs for each pod, and bind to the same place in all
/// of its containers. The host's own is not meant by that.
pub fn posix(source: &OwnedFd, stat: &Stat) -> Result<InMemory, Errno> {
    let of_the_host = rustix::fs::stat("/dev/shm").is_ok_and(|own| own.st_dev == stat.st_dev);
    if of_the_host || !is_in_memory(source, stat)? || !has_only_directories(source, 0)? {
        return Ok(None);
    }
    let name = format!("{}-{}", device_name(stat), stat.st_ino);
    Ok(Some((described(name.clone(), source, stat)?, name)))
}

/// A volume of kubelet's, or a directory in one (`subPath`), which it makes on the host and binds elsewhere first.
pub fn volume(source: &OwnedFd, stat: &Stat, mounts: &Mounts) -> Result<InMemory, Errno> {
    if !is_in_memory(source, stat)? {
        return Ok(None);
    }
    let device = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let is_volume = |path: &Path| path.parent().and_then(Path::file_name).is_some_and(|name| name == EMPTY_DIR);
    let Some(volume) = mounts.whole(device).find(|mount| is_volume(&mount.point)) else { return Ok(None) };
    let path = super::path_of(source.as_fd())?;
    let Some(path) = mounts.of(source)?.and_then(|mount| mount.in_file_system(&path)) else { return Ok(None) };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(&volume.point, flags, Mode::empty())?;
    let root_stat = rustix::fs::fstat(&root)?;
    let alone = root_stat.st_dev == stat.st_dev && mounts.below(&volume.point).is_empty();
    if !alone || !has_only_directories(&root, MAX_DIRECTORIES)? {
        return Ok(None);
    }
    let name = device_name(stat);
    let mut memory = described(name.clone(), &root, &root_stat)?;
    let (mut at, mut in_memory, mut found) = (root, name, root_stat.st_ino);
    for component in path.components() {
        let Some(name) = component.as_os_str().to_str() else { return Ok(None) };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        at = match rustix::fs::openat2(&at, name, flags, Mode::empty(), resolve) {
            Ok(directory) => directory,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            Err(errno) => return Err(errno),
        };
        let stat = rustix::fs::fstat(&at)?;
        let (mode, uid, gid) = (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid);
        memory.directories.push(MemoryDirectory { name: name.into(), mode, uid, gid, ..Default::default() });
        in_memory = format!("{in_memory}/{name}");
        found = stat.st_ino;
    }
    // Swapped at this moment, or something else than it seems.
    Ok((found == stat.st_ino).then_some((memory, in_memory)))
}

fn device_name(stat: &Stat) -> String {
    format!("{}-{}", rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev))
}

fn is_in_memory(source: &OwnedFd, stat: &Stat) -> Result<bool, Errno> {
    let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    Ok(directory && rustix::fs::fstatfs(source)?.f_type == TMPFS_MAGIC)
}

fn described(name: String, root: &OwnedFd, stat: &Stat) -> Result<SharedMemory, Errno> {
    let system = rustix::fs::fstatfs(root)?;
    let bytes = system.f_blocks.saturating_mul(system.f_bsize.unsigned_abs());
    let flags = rustix::fs::fstatvfs(root)?.f_flag.bits();
    Ok(SharedMemory {
        name,
        bytes,
        mode: stat.st_mode,
        uid: stat.st_uid,
        gid: stat.st_gid,
        // Those of mount(2) have the numbers of statvfs(2).
        flags: flags & (libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC),
        ..Default::default()
    })
}

/// Whether there is nothing in a directory but directories, and these no more than so many, at any depth.
fn has_only_directories(directory: &OwnedFd, most: usize) -> Result<bool, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut left = vec![rustix::fs::openat(directory, ".", flags, Mode::empty())?];
    let mut found = 0;
    while let Some(directory) = left.pop() {
        for entry in rustix::fs::Dir::read_from(&directory)? {
            let entry = entry?;
            if matches!(entry.file_name().to_bytes(), b"." | b"..") {
                continue;
            }
            found += 1;
            if entry.file_type() != FileType::Directory || found > most {
                return Ok(false);
            }
            left.push(rustix::fs::openat(&directory, entry.file_name(), flags, Mode::empty())?);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, chown};

    /// What a path stands for, and where in it the path is.
    fn of(path: &Path) -> InMemory {
        let source = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let stat = rustix::fs::fstat(&source).unwrap();
        volume(&source, &stat, &Mounts::read().unwrap()).unwrap()
    }

    fn look(base: &Path) {
        // SAFETY: a mount namespace for this thread alone; no descriptor table is unshared.
        unsafe { unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS) }.unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let make = |name: &str| {
            let path = base.join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let flags = MountFlags::NOEXEC | MountFlags::NODEV;
        let [cache, secret] = ["kubernetes.io~empty-dir/cache", "kubernetes.io~secret/word"].map(|name| {
            let path = make(name);
            mount("tmpfs", &path, "tmpfs", flags, Some(c"size=1m,mode=2770,gid=7")).unwrap();
            path
        });
        assert!(of(&secret).is_none() && of(&make("kubernetes.io~empty-dir/on-disk")).is_none());
        let (memory, path) = of(&cache).unwrap();
        assert_eq!((&memory.name, memory.bytes, memory.mode & 0o7777), (&path, 1 << 20, 0o2770));
        assert_eq!((memory.uid, memory.gid, memory.flags), (0, 7, libc::MS_NOEXEC | libc::MS_NODEV));

        let part = make("kubernetes.io~empty-dir/cache/a/b c");
        fs::set_permissions(&part, fs::Permissions::from_mode(0o751)).unwrap();
        chown(&part, Some(8), Some(9)).unwrap();
        let bound = make("volume-subpaths/cache/main/0");
        mount_bind(&part, &bound).unwrap();
        for place in [&part, &bound] {
            let (in_part, path) = of(place).unwrap();
            assert_eq!(path, format!("{}/a/b c", memory.name));
            let [_, part] = &in_part.directories[..] else { panic!("{in_part:?}") };
            assert_eq!((&*part.name, part.mode, part.uid, part.gid), ("b c", 0o751, 8, 9));
            assert_eq!((in_part.name, in_part.bytes), (memory.name.clone(), memory.bytes));
        }
        assert!(of(&cache).is_some_and(|(memory, _)| memory.directories.is_empty()));
        // What somebody has put there on the host is to be seen.
        fs::write(part.join("file"), "").unwrap();
        assert!(of(&cache).is_none() && of(&bound).is_none() && of(&bound.join("file")).is_none());
    }

    #[test]
    fn volumes_in_memory_and_their_parts_are_found() {
        if rustix::process::geteuid().is_root() {
            let base = tempfile::tempdir().unwrap();
            std::thread::scope(|scope| scope.spawn(|| look(base.path())).join().unwrap());
        }
    }
}
