//! What lies under the state root (`/run/podhull`), and whose it is.
//!
//! ```text
//! <root>/<id>/state.json         the container; see [`State`]
//! <root>/<id>/groups.json        its control groups once more, for who cannot read that
//! <root>/<id>/lock               locked by the command that changes what the container does
//! <root>/<id>/notify.sock        on which its program says that it is ready
//! <root>/pods/<id>/vsock.sock    the way into the guest
//! <root>/pods/<id>/control.sock  the way to the machine's process
//! <root>/pods/<id>/metrics.sock  where a shim tells Prometheus of its pod
//! <root>/pods/<id>/calls         how long calls of the agent took
//! <root>/pods/<id>/requests      how long a shim took to answer
//! <root>/pods/<id>/lock          locked by the command that changes the size of the machine
//! <root>/pods/<id>/mounts        locked by who changes the mounts of the machine
//! <root>/@<random>/              a container's directory in the making
//! ```
//!
//! A container's directory is locked (`flock`) by its shadow, or by the `podhull run` that runs it, for as long as that
//! lives. An unlocked directory is a container that has ended, if its `state.json` says that it is kept until `delete`;
//! everything else that is not locked was left by a process that was killed.

mod document;
mod known;

use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use podhull_vmm::jail::remove_tree;
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use rustix::rand::GetRandomFlags;
use serde::Serialize;

use crate::cgroup::CgroupError;
use crate::pod::NOTIFY_SOCKET;
pub use document::{Machine, Membership, Process, State, Status, start_time};
pub use known::{Known, list, lock_in_time, open_pod, remove, remove_until, take_turn_of_mounts, take_turn_of_pod};

/// Directory of the pods; not a container's id.
const PODS: &str = "pods";

/// What is wrong with the state of a container.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// runc's rule.
    #[error(
        "invalid container id {0:?}: 1 to 1024 letters, digits, \"_\", \"+\", \"-\" and \".\", not \".\" or \"..\""
    )]
    InvalidId(String),
    /// A name this directory has for something else.
    #[error("container id {PODS:?} is reserved: choose another")]
    ReservedId,
    /// Its directory is locked.
    #[error("container id {0:?} is in use: choose another, or end that container first")]
    InUse(String),
    /// There is no such container.
    #[error("container {0:?} does not exist")]
    Missing(String),
    /// Its `state.json` cannot be used.
    #[error("{0}: {1}; podhull delete --force removes the container")]
    Unreadable(PathBuf, String),
    /// This process has as many open files as it may.
    #[error("cannot open {0}: {1}: raise the limit of open files (ulimit -n)")]
    Descriptors(PathBuf, #[source] Errno),
    /// A machine's mounts could not be changed.
    #[error("pod {0:?}: cannot change the files of its virtual machine: {1}")]
    Mounts(String, String),
    /// A file or directory could not be made.
    #[error("cannot write {0}: {1}")]
    Write(PathBuf, #[source] io::Error),
    /// Another command works on it, for longer than one waits.
    #[error("container {0:?} is being changed by another command that does not come to an end")]
    Busy(String),
    /// The kernel does not let go of it.
    #[error("process {0} was killed and does not end: is a file system of the host stuck?")]
    DoesNotEnd(String),
    /// Its control groups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// An id that is a valid name.
pub fn check_id(id: &str) -> Result<(), StateError> {
    let valid = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    if id.is_empty() || id.len() > 1024 || id == "." || id == ".." || !id.chars().all(valid) {
        let shown = if id.chars().count() > 64 { id.chars().take(64).chain(['…']).collect() } else { id.to_owned() };
        return Err(StateError::InvalidId(shown));
    }
    if id == PODS { Err(StateError::ReservedId) } else { Ok(()) }
}

/// An id that nobody has at this moment; to have it takes [`Directory::create`].
pub fn check_free(root: &Path, id: &str) -> Result<(), StateError> {
    check_id(id)?;
    let path = root.join(id);
    if known::is_held(&path) || known::is_kept(&path) { Err(StateError::InUse(id.to_owned())) } else { Ok(()) }
}

/// The directories of one container, held and locked by this process; dropping it removes them, unless they are kept.
///
/// Nothing is looked up by its path once it is made: the process may have another root by then.
pub struct Directory {
    root: PathBuf,
    root_fd: OwnedFd,
    id: String,
    keep: bool,
    /// The container's directory, locked; the lock goes with it.
    container: OwnedFd,
    pods: OwnedFd,
}

impl Directory {
    /// Takes an id: sweeps what killed processes left, and makes the container's and the pod's directory.
    pub fn create(root: &Path, id: &str) -> Result<Self, StateError> {
        check_id(id)?;
        make(root, 0o711)?;
        sweep(root);
        let path = root.join(id);
        // Made under another name and locked before it gets its own, so that nobody ever sees it unlocked.
        let (new, lock) = begin(root)?;
        let renamed = rustix::fs::renameat_with(rustix::fs::CWD, &new, rustix::fs::CWD, &path, RenameFlags::NOREPLACE);
        if let Err(errno) = renamed {
            let _ = fs::remove_dir_all(&new);
            return Err(match errno {
                Errno::EXIST => StateError::InUse(id.to_owned()),
                errno => StateError::Write(path, errno.into()),
            });
        }
        // Whatever fails from here on takes the directory with it.
        let unmade = Unmade(&path);
        let pods = root.join(PODS);
        make(&pods, 0o711)?;
        make(&pods.join(id), 0o700)?;
        let (root_fd, pods) = (open(root)?, open(&pods)?);
        std::mem::forget(unmade);
        Ok(Self { root: root.to_owned(), root_fd, id: id.to_owned(), keep: false, container: lock, pods })
    }

    /// Leaves the container's directory, and what is in it, to `delete`.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// The container's directory.
    pub fn container(&self) -> PathBuf {
        self.root.join(&self.id)
    }

    /// The pod's directory.
    pub fn pod(&self) -> PathBuf {
        self.root.join(PODS).join(&self.id)
    }

    /// The pod's directory.
    pub fn open_pod(&self) -> Result<OwnedFd, StateError> {
        open(&self.pod())
    }

    /// The directory of all containers.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root_fd.as_fd()
    }

    /// The directory of all pods.
    pub fn pods(&self) -> BorrowedFd<'_> {
        self.pods.as_fd()
    }

    /// Writes `state.json` by rename: a reader sees the old or the new one, whole.
    pub fn write(&self, state: &State) -> Result<(), StateError> {
        write(self.container.as_fd(), &self.container(), state)
    }

    /// Writes down where the control groups are to be.
    pub fn write_groups(&self, state: &State) -> Result<(), StateError> {
        let groups: Vec<_> = state.cgroups().collect();
        if groups.is_empty() { Ok(()) } else { write_file(self.container.as_fd(), &self.container(), GROUPS, &groups) }
    }
}

/// A container's directory in the making, locked. Another command may sweep it in the moment before it is.
fn begin(root: &Path) -> Result<(PathBuf, OwnedFd), StateError> {
    let mut swept = 0;
    loop {
        let new = root.join(format!("@{}", unique().map_err(|e| StateError::Write(root.to_owned(), e))?));
        make(&new, 0o700)?;
        let lock = rustix::fs::open(&new, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .and_then(|fd| rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive).map(|()| fd))
            // By its files a container's directory is known, from the first moment on.
            .and_then(|fd| known::open_turn(&fd).map(|_| fd));
        match lock {
            Ok(lock) => return Ok((new, lock)),
            Err(Errno::WOULDBLOCK | Errno::NOENT) if swept < MOST_SWEPT => swept += 1,
            Err(errno) => return Err(StateError::Write(new, errno.into())),
        }
    }
}

/// Removes a directory that turned out to be useless.
struct Unmade<'a>(&'a Path);

impl Drop for Unmade<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.0);
    }
}

#[cfg(test)]
impl Directory {
    /// That of a container that looks as if this process stood for it.
    pub fn held(root: &Path, id: &str, status: Status) -> Self {
        let held = Self::create(root, id).unwrap();
        let mut state = State::new(id, std::process::id().cast_signed(), Path::new("/b"), Path::new("/r"), None);
        state.status = status;
        held.write(&state).unwrap();
        held
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // Ids have no zero byte. Nothing can be done about an error here, and the next command sweeps.
        let id = CString::new(self.id.as_str()).unwrap_or_default();
        let _ = remove_tree(self.pods.as_fd(), &id);
        if !self.keep {
            let _ = remove_tree(self.root_fd.as_fd(), &id);
        }
    }
}

/// How often a directory in the making is made again. Two commands that sweep it in its first moment are rare already.
const MOST_SWEPT: u32 = 10;

/// Name of the document in a container's directory.
const DOCUMENT: &str = "state.json";

/// Name of the document that only has its control groups.
const GROUPS: &str = "groups.json";

/// `path` is the directory's, for errors.
fn write(container: BorrowedFd<'_>, path: &Path, state: &State) -> Result<(), StateError> {
    write_file(container, path, DOCUMENT, state)
}

fn write_file(container: BorrowedFd<'_>, path: &Path, name: &str, what: impl Serialize) -> Result<(), StateError> {
    let fail = |error: io::Error| StateError::Write(path.join(name), error);
    let text = serde_json::to_vec(&what).map_err(|e| fail(e.into()))?;
    let new = format!("{name}.{}", unique().map_err(fail)?);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rustix::fs::openat(container, &new, flags, Mode::from_raw_mode(0o600)).map_err(|e| fail(e.into()))?;
    let written =
        File::from(file).write_all(&text).and_then(|()| Ok(rustix::fs::renameat(container, &new, container, name)?));
    written.map_err(|error| {
        let _ = rustix::fs::unlinkat(container, &new, AtFlags::empty());
        fail(error)
    })
}

/// A name that nobody else has. Not the process id: each shadow is the first process of a pid namespace.
fn unique() -> io::Result<String> {
    let mut random = [0; 8];
    // Up to 256 bytes are never cut short (random(4)).
    rustix::rand::getrandom(&mut random, GetRandomFlags::empty())?;
    Ok(format!("{:016x}", u64::from_ne_bytes(random)))
}

fn open(path: &Path) -> Result<OwnedFd, StateError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|e| StateError::Write(path.to_owned(), e.into()))
}

/// Writes a file of any directory by rename.
pub fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut new = OsString::from(path);
    new.push(format!(".{}", std::process::id()));
    let result = fs::write(&new, text).and_then(|()| fs::rename(&new, path));
    if result.is_err() {
        let _ = fs::remove_file(&new);
    }
    result
}

fn make(path: &Path, mode: u32) -> Result<(), StateError> {
    fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(|e| StateError::Write(path.to_owned(), e))
}

/// Removes containers' directories that are not locked, and their control groups. What cannot be removed is left for the next time:
/// it is in nobody's way but its own id's. Nothing else is touched: somebody may have said `--root /run`.
pub fn sweep(root: &Path) {
    let Ok(entries) = fs::read_dir(root) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| check_id(name.trim_start_matches('@')).is_ok()) else { continue };
        let path = root.join(name);
        // Not even locked for a moment: who looked meanwhile would take it for one that runs.
        if known::is_kept(&path) || !is_container(&path, name) {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(directory) = rustix::fs::open(&path, flags, Mode::empty()) else { continue };
        if rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        // Another may be deleting it.
        let Some(_turn) = known::try_turn(&directory) else { continue };
        // Between opening and locking, its owner may have removed it and another taken the name.
        if same_file(&directory, &path) && !known::is_kept(&path) && known::remove_cgroups(&path) {
            let _ = fs::remove_dir_all(root.join(PODS).join(name));
            let _ = fs::remove_dir_all(&path);
        }
    }
}

/// Whether a directory is a container's, or one in the making: by its name, or by having nothing but what podhull puts there.
fn is_container(path: &Path, name: &str) -> bool {
    let ours = |name: &str| [DOCUMENT, GROUPS, known::TURN_FILE, NOTIFY_SOCKET].iter().any(|own| name.starts_with(own));
    let Ok(entries) = fs::read_dir(path) else { return false };
    let mut entries = entries.flatten().peekable();
    let empty = entries.peek().is_none();
    (!empty || name.starts_with('@')) && entries.all(|entry| entry.file_name().to_str().is_some_and(ours))
}

fn same_file(fd: impl AsFd, path: &Path) -> bool {
    match (rustix::fs::fstat(fd), rustix::fs::stat(path)) {
        (Ok(a), Ok(b)) => (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Root(PathBuf);

    impl Root {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("podhull-state-{}-{name}", std::process::id()));
            Self(path)
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn ids_follow_the_rule_of_runc() {
        for id in ["a", "A-1_b.c+d", ".a", "...", &"x".repeat(1024)] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in ["", ".", "..", "../x", "a/b", "a b", "ä", "@a", "pods", &"x".repeat(1025)] {
            assert!(check_id(id).is_err(), "{id}");
        }
        assert!(check_id(&"x".repeat(2000)).unwrap_err().to_string().len() < 200);
    }

    #[test]
    fn an_id_is_in_use_as_long_as_it_is_held_and_nothing_is_left_of_it() {
        let root = Root::new("held");
        let held = Directory::create(&root.0, "a").unwrap();
        assert!(matches!(Directory::create(&root.0, "a"), Err(StateError::InUse(_))));
        let other = Directory::create(&root.0, "b").unwrap();
        assert!(held.pod().is_dir() && held.container().is_dir());
        drop((held, other));
        let left = || fs::read_dir(&root.0).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
        assert_eq!(left(), ["pods"]);
        assert_eq!(fs::read_dir(root.0.join("pods")).unwrap().count(), 0);
        drop(Directory::create(&root.0, "a").unwrap());
    }

    #[test]
    fn what_a_killed_process_left_is_swept() {
        let root = Root::new("swept");
        for left in ["a", "pods/a", "b", "@77", "@78", "empty", "others/deep"] {
            fs::create_dir_all(root.0.join(left)).unwrap();
        }
        for left in ["a/groups.json", "a/state.json.0123456789abcdef", "b/lock", "@78/lock", "others/lock"] {
            fs::write(root.0.join(left), "").unwrap();
        }
        drop(Directory::create(&root.0, "a").unwrap());
        let mut kept: Vec<_> = fs::read_dir(&root.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        kept.sort();
        assert_eq!(kept, ["empty", "others", "pods"]);
    }
}
