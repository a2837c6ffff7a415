//! A copy of a directory that is written as kubelet's atomic writer does: each version of its files is a directory of its own, whose
//! name begins with two dots; the link `..data` leads to the present one, and is replaced by rename; the names that are seen
//! are links through that. The copy is changed in the same steps, in the same order.
//!
//! The host may write the next version at any time: then what was read of one is no whole, which the link tells afterwards.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::Errno;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::container::copy_up::copy_attributes;

/// Most of one version, in pages: 1 MiB is the most that Kubernetes keeps in one object, and a projected volume has several.
pub const MAX_PAGES: usize = 2048;

/// What room is counted in.
pub const PAGE: usize = 4096;

/// Deeper than what names its keys by paths.
const MAX_DEPTH: u32 = 32;

/// Versions that may come while one is read. Who writes even more of them says so again, and there is another try.
const ATTEMPTS: u32 = 8;

/// The link to the present version.
const DATA: &CStr = c"..data";

/// What becomes that.
const DATA_TMP: &CStr = c"..data_tmp";

/// Why there is no copy of what is there now.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error("it is not written as kubelet's are")]
    Layout,
    #[error("it is larger than {} MiB", (MAX_PAGES * PAGE) >> 20)]
    TooLarge,
    #[error("the copies of all volumes have no more room")]
    NoRoom,
    #[error("it changes all the time")]
    Changing,
    #[error("{name:?}: {source}")]
    Entry { name: CString, source: Errno },
}

/// A directory, its copy, and what that has now.
pub struct Copy {
    source: OwnedFd,
    copy: OwnedFd,
    room: Arc<Semaphore>,
    version: Option<Version>,
}

/// What was copied.
struct Version {
    /// Of its directory.
    name: CString,
    /// Names at its top.
    keys: BTreeSet<CString>,
    /// Whose owner and times the links have.
    link: Stat,
    /// Given back when it is removed.
    _room: OwnedSemaphorePermit,
}

impl Copy {
    /// Fills an empty directory. `room` is what copies may take in all, in pages.
    pub fn new(source: OwnedFd, copy: OwnedFd, room: Arc<Semaphore>) -> Result<Self, CopyError> {
        check_layout(source.as_fd())?;
        let mut made = Self { source, copy, room, version: None };
        made.update()?;
        Ok(made)
    }

    /// Makes it what is there now.
    pub fn update(&mut self) -> Result<(), CopyError> {
        for _ in 0..ATTEMPTS {
            let name = self.current()?;
            if self.version.as_ref().is_some_and(|version| version.name == name) {
                return Ok(());
            }
            let read = self.read(&name);
            let unchanged = self.current().is_ok_and(|now| now == name);
            match read {
                Ok(version) if unchanged => return self.show(version),
                Err(error) if unchanged => {
                    let _ = remove(self.copy.as_fd(), &name, 0);
                    return Err(error);
                }
                Ok(_) | Err(_) => {
                    let _ = remove(self.copy.as_fd(), &name, 0);
                }
            }
        }
        Err(CopyError::Changing)
    }

    /// Name of the directory that is the present version.
    fn current(&self) -> Result<CString, CopyError> {
        let target = rustix::fs::readlinkat(&self.source, DATA, Vec::new()).map_err(in_entry(DATA))?;
        let bytes = target.as_bytes();
        let own = bytes.len() > 2 && bytes.starts_with(b"..") && !bytes.contains(&b'/');
        if !own || *target == *DATA || *target == *DATA_TMP {
            return Err(CopyError::Layout);
        }
        Ok(target)
    }

    /// Copies a version to where nobody looks yet.
    fn read(&self, name: &CStr) -> Result<Version, CopyError> {
        let link = rustix::fs::statat(&self.source, DATA, AtFlags::SYMLINK_NOFOLLOW).map_err(in_entry(DATA))?;
        // What is left of a try that failed.
        remove(self.copy.as_fd(), name, 0).map_err(in_entry(name))?;
        let mut room = Room::new(&self.room)?;
        let keys = copy_directory(self.source.as_fd(), self.copy.as_fd(), name, &mut room, 0)?;
        if keys.iter().any(|key| key.as_bytes().starts_with(b"..")) {
            return Err(CopyError::Layout);
        }
        Ok(Version { name: name.into(), keys, link, _room: room.taken })
    }

    /// Makes a version the present one.
    fn show(&mut self, version: Version) -> Result<(), CopyError> {
        let copy = self.copy.as_fd();
        self.show_owner()?;
        let swap = || {
            match rustix::fs::unlinkat(copy, DATA_TMP, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno),
            }
            rustix::fs::symlinkat(&*version.name, copy, DATA_TMP)?;
            copy_attributes(copy, DATA_TMP, &version.link)?;
            rustix::fs::renameat(copy, DATA_TMP, copy, DATA)
        };
        swap().map_err(in_entry(DATA))?;
        let (owner, group) = (Uid::from_raw(version.link.st_uid), Gid::from_raw(version.link.st_gid));
        let old = self.version.replace(version);
        let new = self.version.as_ref().map(|version| &version.keys);
        let (none, old_keys) = (BTreeSet::new(), old.as_ref().map(|old| &old.keys));
        let (new, old_keys) = (new.unwrap_or(&none), old_keys.unwrap_or(&none));
        for key in new.difference(old_keys) {
            let target = [DATA.to_bytes(), b"/", key.as_bytes()].concat();
            rustix::fs::symlinkat(target, copy, key)
                .and_then(|()| rustix::fs::chownat(copy, key, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW))
                .map_err(in_entry(key))?;
        }
        for key in old_keys.difference(new) {
            rustix::fs::unlinkat(copy, key, AtFlags::empty()).map_err(in_entry(key))?;
        }
        match old {
            Some(old) => remove(copy, &old.name, 0).map_err(in_entry(&old.name)),
            None => Ok(()),
        }
    }

    /// Gives the directory itself the owner and mode of the host's; nobody is told if it has them.
    fn show_owner(&self) -> Result<(), CopyError> {
        let stat = |directory: &OwnedFd| rustix::fs::fstat(directory).map_err(in_entry(c"."));
        let (theirs, ours) = (stat(&self.source)?, stat(&self.copy)?);
        let told = |stat: &Stat| (stat.st_uid, stat.st_gid, stat.st_mode);
        match told(&theirs) == told(&ours) {
            true => Ok(()),
            false => copy_attributes(self.copy.as_fd(), c".", &theirs).map_err(in_entry(c".")),
        }
    }
}

/// What a version takes.
struct Room<'a> {
    all: &'a Arc<Semaphore>,
    taken: OwnedSemaphorePermit,
}

impl<'a> Room<'a> {
    fn new(all: &'a Arc<Semaphore>) -> Result<Self, CopyError> {
        Ok(Self { all, taken: all.clone().try_acquire_many_owned(0).map_err(|_| CopyError::NoRoom)? })
    }

    /// Takes what an entry of so many bytes needs: its pages, and one for what the kernel keeps of it.
    fn take(&mut self, bytes: u64) -> Result<(), CopyError> {
        let pages = bytes.div_ceil(PAGE as u64).saturating_add(1);
        if pages > (MAX_PAGES - self.taken.num_permits()) as u64 {
            return Err(CopyError::TooLarge);
        }
        let taken = self.all.clone().try_acquire_many_owned(pages as u32).map_err(|_| CopyError::NoRoom)?;
        self.taken.merge(taken);
        Ok(())
    }
}

fn in_entry(name: &CStr) -> impl Fn(Errno) -> CopyError + '_ {
    move |source| CopyError::Entry { name: name.into(), source }
}

/// Whether nothing else is in a directory: what has no copy must not be hidden by one.
fn check_layout(source: BorrowedFd<'_>) -> Result<(), CopyError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let listed = rustix::fs::openat(source, c".", flags, Mode::empty()).map_err(in_entry(c"."))?;
    for (index, entry) in Dir::new(listed).map_err(in_entry(c"."))?.enumerate() {
        let entry = entry.map_err(in_entry(c"."))?;
        let name = entry.file_name();
        if index > MAX_PAGES {
            return Err(CopyError::TooLarge);
        }
        if name == c"." || name.to_bytes().starts_with(b"..") {
            continue;
        }
        match rustix::fs::readlinkat(source, name, Vec::new()) {
            Ok(target) if target.as_bytes() == [DATA.to_bytes(), b"/", name.to_bytes()].concat() => {}
            // It is gone since, as one is whose key has vanished.
            Err(Errno::NOENT) => {}
            _ => return Err(CopyError::Layout),
        }
    }
    Ok(())
}

/// Copies a directory into another, with all that is in it; returns the names of that.
fn copy_directory(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    name: &CStr,
    room: &mut Room<'_>,
    depth: u32,
) -> Result<BTreeSet<CString>, CopyError> {
    if depth > MAX_DEPTH {
        return Err(CopyError::TooLarge);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let error = in_entry(name);
    room.take(0)?;
    let source = rustix::fs::openat(from, name, flags, Mode::empty()).map_err(&error)?;
    rustix::fs::mkdirat(to, name, Mode::RWXU).map_err(&error)?;
    let copy = rustix::fs::openat(to, name, flags, Mode::empty()).map_err(&error)?;
    let mut names = BTreeSet::new();
    for entry in Dir::read_from(&source).map_err(&error)? {
        let entry = entry.map_err(&error)?;
        let below = entry.file_name();
        if below == c"." || below == c".." {
            continue;
        }
        let stat = rustix::fs::statat(&source, below, AtFlags::SYMLINK_NOFOLLOW).map_err(in_entry(below))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                copy_directory(source.as_fd(), copy.as_fd(), below, room, depth + 1)?;
            }
            FileType::RegularFile => copy_file(source.as_fd(), copy.as_fd(), below, room)?,
            _ => return Err(CopyError::Layout),
        }
        names.insert(below.into());
    }
    let stat = rustix::fs::fstat(&source).map_err(&error)?;
    copy_attributes(to, name, &stat).map_err(&error)?;
    Ok(names)
}

fn copy_file(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr, room: &mut Room<'_>) -> Result<(), CopyError> {
    let error = in_entry(name);
    // It may be another by now, and one that is waited for to be opened.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let source = rustix::fs::openat(from, name, flags, Mode::empty()).map_err(&error)?;
    let stat = rustix::fs::fstat(&source).map_err(&error)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(CopyError::Layout);
    }
    let size = stat.st_size.unsigned_abs();
    room.take(size)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let copy = rustix::fs::openat(to, name, flags, Mode::RUSR | Mode::WUSR).map_err(&error)?;
    let mut left = size as usize;
    while left > 0 {
        match rustix::fs::sendfile(&copy, &source, None, left).map_err(&error)? {
            0 => break,
            count => left -= count,
        }
    }
    drop(copy);
    copy_attributes(to, name, &stat).map_err(&error)
}

/// Removes a directory and all in it, if it is there.
fn remove(from: BorrowedFd<'_>, name: &CStr, depth: u32) -> Result<(), Errno> {
    if depth > MAX_DEPTH {
        return Err(Errno::LOOP);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = match rustix::fs::openat(from, name, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        opened => opened?,
    };
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        let below = entry.file_name();
        if below == c"." || below == c".." {
            continue;
        }
        match rustix::fs::unlinkat(&directory, below, AtFlags::empty()) {
            Err(Errno::ISDIR) => remove(directory.as_fd(), below, depth + 1)?,
            unlinked => unlinked?,
        }
    }
    rustix::fs::unlinkat(from, name, AtFlags::REMOVEDIR)
}
