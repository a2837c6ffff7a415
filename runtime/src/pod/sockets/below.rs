//! Sockets in directories that are bound into a container, which programs of the host listen at: those of agents and drivers, whose
//! directories are given to pods as often as the sockets themselves. In the guest they are files of the share at which nobody
//! listens, so each is stood for like one that is bound by itself, as it is when the container is made.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

/// How far below the directory that is bound.
const MAX_DEPTH: usize = 3;

/// Files below a directory that are looked at: a volume may have millions.
const MAX_FILES: usize = 4096;

/// Sockets of a container that are found this way.
const MAX_FOUND: usize = 32;

/// How long the search in a container's directories may take, whose program waits for it.
const PATIENCE: Duration = Duration::from_secs(2);

/// One of them.
pub struct Found {
    /// Its path below the directory.
    pub path: PathBuf,
    /// The socket itself.
    pub file: OwnedFd,
}

/// A look at the directories of one container.
pub struct Search {
    files: usize,
    found: usize,
    until: Option<Instant>,
    /// There were more than can be stood for.
    pub more: bool,
    /// Not all was looked at.
    pub unseen: bool,
}

impl Search {
    /// It has not begun.
    pub fn new() -> Self {
        Self { files: MAX_FILES, found: MAX_FOUND, until: None, more: false, unseen: false }
    }

    /// Those below a directory, the nearest first. What cannot be read is no error: nobody may be interested in it.
    pub fn below(&mut self, directory: BorrowedFd<'_>) -> Vec<Found> {
        let until = *self.until.get_or_insert_with(|| Instant::now() + PATIENCE);
        let mut files = self.files;
        let mut found = Vec::new();
        let mut directories = VecDeque::from([(PathBuf::from("."), 0)]);
        while let Some((path, depth)) = directories.pop_front() {
            // Not by its name: where that is what is mounted when somebody comes, nobody has come for it.
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let itself = open(directory, &path).and_then(|it| rustix::fs::openat(it, ".", flags, Mode::empty()));
            let Ok(entries) = itself.and_then(Dir::new) else { continue };
            for entry in entries.filter_map(Result::ok) {
                let name = OsStr::from_bytes(entry.file_name().to_bytes());
                if name == "." || name == ".." {
                    continue;
                }
                if files == 0 || Instant::now() > until {
                    self.unseen = true;
                    return found;
                }
                files -= 1;
                let path = path.join(name);
                let kind = match entry.file_type() {
                    // Not every file system says it here.
                    FileType::Unknown => open(directory, &path).and_then(rustix::fs::fstat).map(|stat| kind_of(&stat)),
                    kind => Ok(kind),
                };
                match kind {
                    Ok(FileType::Directory) if depth < MAX_DEPTH => directories.push_back((path, depth + 1)),
                    Ok(FileType::Socket) => found.extend(self.socket(directory, path)),
                    _ => {}
                }
            }
        }
        found
    }

    /// One, if somebody listens there.
    fn socket(&mut self, directory: BorrowedFd<'_>, path: PathBuf) -> Option<Found> {
        let file = open(directory, &path).ok()?;
        let stat = rustix::fs::fstat(&file).ok()?;
        let listens = kind_of(&stat) == FileType::Socket
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
        Some(Found { path, file })
    }
}

fn kind_of(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// What is mounted below is not looked at, and nothing that a link leads to.
fn open(directory: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(directory, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::{UnixDatagram, UnixListener};

    fn found(search: &mut Search, directory: &Path) -> Vec<String> {
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
        let mut search = Search { files: MAX_FOUND + 1, ..Search::new() };
        assert!(found(&mut search, base.path()).is_empty() && !search.unseen && !search.more);
        // Of each directory as many.
        assert!(found(&mut search, base.path()).is_empty() && !search.unseen);
        search.files -= 1;
        found(&mut search, base.path());
        assert!(search.unseen && !search.more);
        let mut search = Search { until: Some(Instant::now()), ..Search::new() };
        found(&mut search, base.path());
        assert!(search.unseen);
    }
}
