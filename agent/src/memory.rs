//! Memory that containers of a pod share as files: tmpfs of the guest, where the host binds one of its own into several of them.
//! Behind two binds virtio-fs has two files, whose pages are not the same.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use podhull_protocol::{MemoryDirectory, SharedMemory};
use rustix::fs::{CWD, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use crate::pod::{PodError, is_valid_id};

/// How what is in it is found.
const INSIDE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// All of it.
pub struct Memory {
    directory: PathBuf,
    made: Mutex<HashSet<String>>,
}

impl Memory {
    /// None yet; what is made is below `directory`.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory, made: Mutex::default() }
    }

    /// Makes one, and directories in it, as far as they are not there.
    pub fn make(&self, memory: &SharedMemory) -> Result<(), PodError> {
        let name = &memory.name;
        if !is_valid_id(name) {
            return Err(PodError::Id(name.clone()));
        }
        let failed = |source| PodError::Memory { name: name.clone(), source };
        let path = self.directory.join(name);
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if !made.contains(name) {
            self.mount(memory, &path).map_err(failed)?;
            made.insert(name.clone());
        }
        drop(made);
        make_directories(&path, &memory.directories).map_err(failed)
    }

    fn mount(&self, memory: &SharedMemory, path: &Path) -> Result<(), Errno> {
        for directory in [&self.directory, path] {
            // A container in a user namespace goes through it.
            match rustix::fs::mkdirat(CWD, directory, Mode::from_raw_mode(0o711)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno),
            }
        }
        let SharedMemory { bytes, mode, uid, gid, flags, .. } = memory;
        let size = if *bytes == 0 { String::new() } else { format!("size={bytes},") };
        let options = format!("{size}mode={:o},uid={uid},gid={gid}", mode & 0o7777);
        let allowed = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        let flags = MountFlags::from_bits_truncate(u32::try_from(*flags).unwrap_or(0)) & allowed;
        let options = std::ffi::CString::new(options).map_err(|_| Errno::INVAL)?;
        mount("tmpfs", path, "tmpfs", flags, &*options)
    }
}

/// Makes one directory in the other. Containers that have the memory may do with it what they like meanwhile: what is in the way is
/// no directory of another file system, and no link is followed.
fn make_directories(root: &Path, directories: &[MemoryDirectory]) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut parent = rustix::fs::openat(CWD, root, flags, Mode::empty())?;
    for (index, MemoryDirectory { name, mode, uid, gid, .. }) in directories.iter().enumerate() {
        if name.contains('/') || matches!(name.as_str(), "" | "." | "..") {
            return Err(Errno::INVAL);
        }
        let open = || rustix::fs::openat2(&parent, name, flags, Mode::empty(), INSIDE);
        parent = match rustix::fs::mkdirat(&parent, name, Mode::RWXU) {
            Ok(()) => {
                let made = open()?;
                rustix::fs::fchown(&made, Some(Uid::from_raw(*uid)), Some(Gid::from_raw(*gid)))?;
                rustix::fs::fchmod(&made, Mode::from_raw_mode(mode & 0o7777))?;
                made
            }
            Err(Errno::EXIST) => match open() {
                // A container has made a file of it, which is to be bound then.
                Err(Errno::NOTDIR) if index + 1 == directories.len() => break,
                opened => opened?,
            },
            Err(errno) => return Err(errno),
        };
    }
    Ok(())
}

/// What a mount of the specification binds, if it is in such memory: where containers may have put links, which nobody follows.
pub fn open(source: &Path) -> Option<Result<OwnedFd, Errno>> {
    let path = source.strip_prefix(podhull_protocol::MEMORY_DIR).ok()?;
    let open = || {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let directory =
            rustix::fs::openat(CWD, podhull_protocol::MEMORY_DIR, flags | OFlags::DIRECTORY, Mode::empty())?;
        rustix::fs::openat2(&directory, path, flags, Mode::empty(), INSIDE)
    };
    Some(open())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    fn directory(name: &str) -> MemoryDirectory {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        MemoryDirectory { name: name.into(), mode: 0o2751, uid, gid, ..Default::default() }
    }

    #[test]
    fn directories_are_made_inside_and_no_link_is_followed() {
        let base = std::env::temp_dir().join(format!("podhull-memory-{}", std::process::id()));
        let root = base.join("memory");
        fs::create_dir_all(&root).unwrap();
        let make =
            |names: &[&str]| make_directories(&root, &names.iter().map(|name| directory(name)).collect::<Vec<_>>());
        make(&["a", "b"]).unwrap();
        assert_eq!(fs::metadata(root.join("a/b")).unwrap().mode() & 0o7777, 0o2751);
        fs::set_permissions(root.join("a"), fs::Permissions::from_mode(0o700)).unwrap();
        make(&["a", "c"]).unwrap();
        assert_eq!(fs::metadata(root.join("a")).unwrap().mode() & 0o7777, 0o700);
        fs::write(root.join("file"), "").unwrap();
        assert_eq!(make(&["file"]), Ok(()));
        assert_eq!(make(&["file", "x"]), Err(Errno::NOTDIR));
        std::os::unix::fs::symlink("..", root.join("link")).unwrap();
        assert_eq!(make(&["link", "x"]), Err(Errno::NOTDIR));
        for name in ["..", ".", "", "a/b"] {
            assert_eq!(make(&[name]), Err(Errno::INVAL));
        }
        assert_eq!(fs::read_dir(&base).unwrap().count(), 1);
        fs::remove_dir_all(&base).unwrap();
    }
}
