//! Sockets in directories that are bound into a container, which programs of the host listen at: those of agents and drivers, whose
//! directories are given to pods as often as the sockets themselves. In the guest they are files of the share at which nobody
//! listens, so each is stood for like one that is bound by itself, as it is when the container is made.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

/// How far below the directory that is bound.
const MAX_DEPTH: usize = 3;

/// Files of a container's directories that are looked at: a volume may have millions.
const MAX_FILES: usize = 4096;

/// Sockets of a container that are found this way.
const MAX_FOUND: usize = 32;

/// One of them.
pub struct Found {
    /// Its path below the directory.
    pub path: PathBuf,
    /// The socket itself.
    pub file: OwnedFd,
    /// What it is.
    pub stat: Stat,
}

/// A look at the directories of one container.
pub struct Search {
    files: usize,
    found: usize,
    /// There were more than can be stood for.
    pub more: bool,
}

impl Search {
    /// It has not begun.
    pub fn new() -> Self {
        Self { files: MAX_FILES, found: MAX_FOUND, more: false }
    }

    /// Those below a directory, the nearest first. What cannot be read is no error: nobody may be interested in it.
    pub fn below(&mut self, directory: BorrowedFd<'_>) -> Vec<Found> {
        let mut found = Vec::new();
        let mut directories = VecDeque::from([(PathBuf::from("."), 0)]);
        while let Some((path, depth)) = directories.pop_front() {
            let Ok(entries) = open(directory, &path, OFlags::RDONLY | OFlags::DIRECTORY).and_then(Dir::new) else {
                continue;
            };
            for entry in entries.filter_map(Result::ok) {
                let name = OsStr::from_bytes(entry.file_name().to_bytes());
                if name == "." || name == ".." {
                    continue;
                }
                if self.files == 0 {
                    return found;
                }
                self.files -= 1;
                match entry.file_type() {
                    FileType::Directory if depth < MAX_DEPTH => directories.push_back((path.join(name), depth + 1)),
                    FileType::Socket => found.extend(self.socket(directory, path.join(name))),
                    _ => {}
                }
            }
        }
        found
    }

    /// One, if somebody listens there.
    fn socket(&mut self, directory: BorrowedFd<'_>, path: PathBuf) -> Option<Found> {
        let file = open(directory, &path, OFlags::PATH).ok()?;
        let stat = rustix::fs::fstat(&file).ok()?;
        let listens = FileType::from_raw_mode(stat.st_mode) == FileType::Socket
            && matches!(super::probe(file.as_fd()), Ok(Ok(()) | Err(Errno::PROTOTYPE)));
        if !listens {
            return None;
        }
        if self.found == 0 {
            self.more = true;
            return None;
        }
        self.found -= 1;
        let path = path.strip_prefix(".").map(Into::into).unwrap_or(path);
        Some(Found { path, file, stat })
    }
}

/// What is mounted below is not looked at, and nothing that a link leads to.
fn open(directory: BorrowedFd<'_>, path: &std::path::Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(directory, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::{UnixDatagram, UnixListener};

    fn found(search: &mut Search, directory: &std::path::Path) -> Vec<String> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let directory = rustix::fs::open(directory, flags, Mode::empty()).unwrap();
        search.below(directory.as_fd()).into_iter().map(|found| found.path.display().to_string()).collect()
    }

    #[test]
    fn those_at_which_somebody_listens_are_found_and_nothing_is_asked_of_them() {
        let base = tempfile::tempdir().unwrap();
        fs::create_dir_all(base.path().join("a/b/c/d")).unwrap();
        let listen = |path: &str| UnixListener::bind(base.path().join(path)).unwrap();
        let listeners = ["near", "a/b/c/far", "a/b/c/d/too-far"].map(listen);
        drop(listen("nobody"));
        let _log = UnixDatagram::bind(base.path().join("a/log")).unwrap();
        fs::write(base.path().join("file"), "").unwrap();
        symlink("near", base.path().join("link")).unwrap();
        symlink("a", base.path().join("other")).unwrap();
        assert_eq!(found(&mut Search::new(), base.path()), ["near", "a/log", "a/b/c/far"]);
        for listener in listeners {
            listener.set_nonblocking(true).unwrap();
            assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn there_is_an_end_to_what_is_looked_at_and_to_what_is_found() {
        let base = tempfile::tempdir().unwrap();
        let many: Vec<_> =
            (0..=MAX_FOUND).map(|n| UnixListener::bind(base.path().join(n.to_string())).unwrap()).collect();
        let mut search = Search::new();
        assert_eq!(found(&mut search, base.path()).len(), MAX_FOUND);
        assert!(search.more);
        drop(many);
        let mut search = Search { files: 3, ..Search::new() };
        found(&mut search, base.path());
        assert!(search.files == 0 && !search.more);
    }
}
