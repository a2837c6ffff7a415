//! `tmpcopyup`: fills a tmpfs with what it covers.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid};
use rustix::io::Errno;

/// Deeper trees than any system directory, and far fewer than descriptors.
const MAX_DEPTH: u32 = 128;

/// A tree that cannot be copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyUpError {
    #[error("copy {name:?} into the tmpfs: {source}")]
    Entry { name: String, source: Errno },
    #[error("copy into the tmpfs: directories nest deeper than {MAX_DEPTH}")]
    TooDeep,
}

/// Copies the content of one directory into another: directories, files, symbolic links and special files, with owner, mode
/// and times.
pub fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), CopyUpError> {
    copy_directory(from, to, 0)
}

fn copy_directory(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: u32) -> Result<(), CopyUpError> {
    if depth > MAX_DEPTH {
        return Err(CopyUpError::TooDeep);
    }
    let entries = Dir::read_from(from).map_err(|source| CopyUpError::Entry { name: ".".into(), source })?;
    for entry in entries {
        let entry = entry.map_err(|source| CopyUpError::Entry { name: ".".into(), source })?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let error = |source| CopyUpError::Entry { name: name.to_string_lossy().into_owned(), source };
        let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW).map_err(error)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let (below, copy) = directories(from, to, name).map_err(error)?;
                copy_directory(below.as_fd(), copy.as_fd(), depth + 1)?;
            }
            FileType::RegularFile => copy_file(from, to, name).map_err(error)?,
            FileType::Symlink => rustix::fs::readlinkat(from, name, Vec::new())
                .and_then(|target| rustix::fs::symlinkat(target, to, name))
                .map_err(error)?,
            kind => rustix::fs::mknodat(to, name, kind, Mode::empty(), stat.st_rdev).map_err(error)?,
        }
        copy_attributes(to, name, &stat).map_err(error)?;
    }
    Ok(())
}

fn directories(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr) -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::mkdirat(to, name, Mode::RWXU)?;
    Ok((rustix::fs::openat(from, name, flags, Mode::empty())?, rustix::fs::openat(to, name, flags, Mode::empty())?))
}

fn copy_file(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    let source = rustix::fs::openat(from, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let copy = rustix::fs::openat(to, name, flags, Mode::RUSR | Mode::WUSR)?;
    while rustix::fs::sendfile(&copy, &source, None, 1 << 20)? > 0 {}
    Ok(())
}

/// Gives an entry the owner, mode and times of another.
pub fn copy_attributes(to: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> Result<(), Errno> {
    let (owner, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::chownat(to, name, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        // After the owner, whose change takes set-user-id away.
        rustix::fs::chmodat(to, name, Mode::from_raw_mode(stat.st_mode & 0o7777), AtFlags::empty())?;
    }
    let time = |tv_sec, tv_nsec: u64| Timespec { tv_sec, tv_nsec: tv_nsec as i64 };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    };
    rustix::fs::utimensat(to, name, &times, AtFlags::SYMLINK_NOFOLLOW)
}
