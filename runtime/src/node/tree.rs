//! The files of a node, below a directory that need not be `/`: an installer in a container has them at `/host`. What is a link
//! there is followed as the node would follow it, and never out of the directory.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::NodeError;

/// Longest file that is read whole.
const MAX_FILE: u64 = 1 << 20;

/// What a file is called while it is written.
const UNFINISHED: &str = ".podhull-new";

/// The root of a node's files.
#[derive(Debug, Clone)]
pub struct Tree {
    root: PathBuf,
}

impl Tree {
    /// Below a directory.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Whether it is that of this process too.
    pub fn is_own(&self) -> bool {
        self.root == Path::new("/")
    }

    /// Where something of the node is, seen from here, links not followed: for messages, and for what is known to be no link.
    pub fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root.join(path.as_ref().strip_prefix("/").unwrap_or(path.as_ref()))
    }

    /// Where a directory of the node really is, seen from here; none if it is not there.
    pub fn find(&self, path: impl AsRef<Path>) -> Result<Option<PathBuf>, NodeError> {
        let path = path.as_ref();
        let fail = |errno: Errno| NodeError::file("find", self.at(path), errno.into());
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, &self.root, flags, Mode::empty()).map_err(fail)?;
        let inside = path.strip_prefix("/").unwrap_or(path);
        let inside = if inside.as_os_str().is_empty() { Path::new(".") } else { inside };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let found: OwnedFd = match rustix::fs::openat2(&root, inside, flags, Mode::empty(), resolve) {
            Ok(found) => found,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(fail(errno)),
        };
        let link = format!("/proc/self/fd/{}", found.as_raw_fd());
        fs::read_link(link).map(Some).map_err(|error| NodeError::file("find", self.at(path), error))
    }

    /// Likewise, and made if it is not there.
    pub fn make(&self, path: impl AsRef<Path>) -> Result<PathBuf, NodeError> {
        let mut below = PathBuf::from("/");
        let mut place = self.find(&below)?.ok_or_else(|| NodeError::NoRoot(self.root.clone()))?;
        for component in path.as_ref().components() {
            let Component::Normal(name) = component else { continue };
            below.push(name);
            place = match self.find(&below)? {
                Some(place) => place,
                None => {
                    let place = place.join(name);
                    let made = fs::create_dir(&place).map_err(|error| NodeError::file("create", place.clone(), error));
                    // Another may have been here in between; a link that leads nowhere is as it was.
                    match (made, self.find(&below)?) {
                        (_, Some(place)) => place,
                        (Err(error), None) => return Err(error),
                        (Ok(()), None) => return Err(NodeError::file("find", place, Errno::NOENT.into())),
                    }
                }
            };
        }
        Ok(place)
    }

    /// What a file of the node says; none if there is none. One that is a link is not followed: it would be replaced.
    pub fn read(&self, path: &Path) -> Result<Option<String>, NodeError> {
        let Some(directory) = path.parent().map(|parent| self.find(parent)).transpose()?.flatten() else {
            return Ok(None);
        };
        let place = directory.join(path.file_name().unwrap_or_default());
        let fail = |error| NodeError::file("read", place.clone(), error);
        // Not blocking: a pipe in this place would wait for a writer.
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
        let file = match File::options().read(true).custom_flags(flags).open(&place) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::LOOP) => return Err(NodeError::Link(place)),
            Err(error) => return Err(fail(error)),
        };
        if !file.metadata().map_err(fail)?.is_file() {
            return Err(NodeError::NoFile(place));
        }
        let mut text = String::new();
        file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(fail)?;
        if text.len() as u64 > MAX_FILE {
            return Err(NodeError::TooLong(place));
        }
        Ok(Some(text))
    }

    /// Writes a file of the node, in one step for whoever reads it, with the permissions it had.
    pub fn write(&self, path: &Path, text: &str) -> Result<(), NodeError> {
        let directory = self.make(path.parent().unwrap_or(Path::new("/")))?;
        let place = directory.join(path.file_name().unwrap_or_default());
        let mode = fs::symlink_metadata(&place).map_or(0o644, |metadata| metadata.permissions().mode() & 0o7777);
        replace(&place, mode, |file| file.write_all(text.as_bytes()))
            .map_err(|error| NodeError::file("write", place, error))
    }

    /// Removes a file of the node.
    pub fn remove(&self, path: &Path) -> Result<(), NodeError> {
        let Some(directory) = self.find(path.parent().unwrap_or(Path::new("/")))? else { return Ok(()) };
        let place = directory.join(path.file_name().unwrap_or_default());
        match fs::remove_file(&place) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(NodeError::file("remove", place, error)),
            _ => Ok(()),
        }
    }
}

/// Puts a file in a place at once, when it is whole and on the disk.
pub fn replace(place: &Path, mode: u32, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let mut name = place.file_name().unwrap_or_default().to_owned();
    name.push(UNFINISHED);
    let unfinished = place.with_file_name(name);
    // One is left if an earlier attempt was killed.
    match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let written = (|| {
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&unfinished)?;
        write(&mut file)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&unfinished, place)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    written?;
    sync_directory(place.parent().unwrap_or(Path::new("/")))
}

/// Sees to it that names in a directory are on the disk.
pub fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}
