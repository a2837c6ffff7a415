//! A container that some command made before, found by its id.

mod removal;

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::document::{Process, VERSION, start_time};
use super::{DOCUMENT, Membership, PODS, State, StateError, Status, check_id, same_file};
use crate::cgroup::{PATIENCE, Patience};
pub use removal::{remove, remove_until};

/// Longest `state.json`: annotations are the caller's.
const MAX_DOCUMENT: u64 = 4 << 20;

/// How long one command may wait for another that changes the same container. What it waits for asks the guest, within a
/// deadline of its own.
const TURN: Duration = Duration::from_secs(30);

/// File in a container's directory that is locked by the command that changes the container.
pub const TURN_FILE: &str = "lock";

/// File in a pod's directory that is locked by who changes the mounts of its machine.
const MOUNTS_FILE: &str = "mounts";

/// How long a process may take that was killed for nobody who waits for it.
const SOON: Duration = Duration::from_secs(1);

/// A container that exists.
pub struct Known {
    root: PathBuf,
    /// What was written down.
    pub state: State,
    directory: OwnedFd,
    /// Held by who changes it.
    turn: Option<OwnedFd>,
}

impl Known {
    /// Finds a container.
    pub fn load(root: &Path, id: &str) -> Result<Self, StateError> {
        check_id(id)?;
        let directory = open_container(root, id)?;
        let state = read(&directory, &root.join(id))?;
        Ok(Self { root: root.into(), state, directory, turn: None })
    }

    /// Finds a container to change what it does: until this is dropped no other command does. The container itself may end,
    /// and be deleted, at any time.
    pub fn load_to_change(root: &Path, id: &str) -> Result<Self, StateError> {
        check_id(id)?;
        let path = root.join(id);
        let directory = open_container(root, id)?;
        let turn = take_turn(&directory, &path, TURN_FILE, TURN)?;
        // Only now: who had it before has changed it.
        let state = read(&directory, &path)?;
        Ok(Self { root: root.into(), state, directory, turn: Some(turn) })
    }

    /// Where in its life it is now.
    pub fn status(&self) -> Status {
        // Not by its process: this may be asked in another pid namespace.
        match self.state.status {
            _ if !is_locked(&self.directory) => Status::Stopped,
            Status::Created | Status::Running if self.state.paused => Status::Paused,
            status => status,
        }
    }

    /// Who made it.
    pub fn owner(&self) -> u32 {
        rustix::fs::fstat(&self.directory).map_or(0, |stat| stat.st_uid)
    }

    /// The pod's directory, with its sockets.
    pub fn pod(&self) -> Result<OwnedFd, StateError> {
        let pod = self.state.member_of.as_ref().map_or(&self.state.id, |member| &member.pod);
        open_pod(&self.root, pod)
    }

    /// The process that stands for the container; `None` if it is gone.
    pub fn process(&self) -> Option<OwnedFd> {
        find(self.state.process)
    }

    /// Writes its state down as it is now; to be called by who alone may change it. Of a container that was deleted meanwhile
    /// nothing is to be known.
    pub fn write(&self) -> Result<(), StateError> {
        let path = self.root.join(&self.state.id);
        match super::write(self.directory.as_fd(), &path, &self.state) {
            Err(_) if !same_file(&self.directory, &path) => Ok(()),
            written => written,
        }
    }

    /// Lets other commands change it again.
    pub fn release(&mut self) {
        self.turn = None;
    }
}

impl Membership {
    /// The mount namespace of the pod's machine, which has the files of its containers; none if the machine is gone.
    pub fn mounts(&self) -> Result<Option<OwnedFd>, StateError> {
        let Some(_process) = find(self.machine.0) else { return Ok(None) };
        let path = format!("/proc/{}/ns/mnt", self.machine.0.pid);
        match rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(namespace) => Ok(Some(namespace)),
            // It has just ended.
            Err(Errno::NOENT | Errno::SRCH) => Ok(None),
            Err(errno) => Err(StateError::Mounts(self.pod.clone(), errno.to_string())),
        }
    }
}

/// Waits until no other command changes the machine of a pod; until this is dropped no other does.
pub fn take_turn_of_pod(root: &Path, pod: &str) -> Result<OwnedFd, StateError> {
    take_turn(&open_pod(root, pod)?, &root.join(PODS).join(pod), TURN_FILE, TURN)
}

/// The same for its mounts. To change the size of the machine is to wait for the guest, and this is not.
pub fn take_turn_of_mounts(root: &Path, pod: &str) -> Result<OwnedFd, StateError> {
    take_turn(&open_pod(root, pod)?, &root.join(PODS).join(pod), MOUNTS_FILE, TURN)
}

/// The directory of a pod, with its sockets.
pub fn open_pod(root: &Path, pod: &str) -> Result<OwnedFd, StateError> {
    check_id(pod)?;
    super::open(&root.join(PODS).join(pod)).map_err(|error| match error {
        // It was deleted a moment ago.
        StateError::Write(_, error) if error.kind() == io::ErrorKind::NotFound => StateError::Missing(pod.into()),
        other => other,
    })
}

/// All containers whose state can be read, by id.
pub fn list(root: &Path) -> Result<Vec<Known>, StateError> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(StateError::Unreadable(root.into(), error.to_string())),
    };
    let mut ids: Vec<_> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    ids.sort();
    let known = |id: &String| match Known::load(root, id) {
        Ok(known) => Some(Ok(known)),
        // Not for them: some would be missing.
        Err(error @ StateError::Descriptors(..)) => Some(Err(error)),
        // One may go while we look; what is no container has another name, or no document.
        Err(_) => None,
    };
    ids.iter().filter_map(known).collect()
}

/// Whether somebody holds the container of this directory.
pub fn is_held(container: &Path) -> bool {
    open(container).is_some_and(|directory| is_locked(&directory))
}

/// Removes the control groups of a container whose processes have ended, or are about to; false if that would take long.
pub fn remove_cgroups(container: &Path) -> bool {
    // Without a document there are none.
    let state = open(container).and_then(|directory| read(&directory, container).ok());
    let patience = Patience { processes: SOON, ..PATIENCE };
    state.is_none_or(|state| state.remove_cgroups(patience).is_ok())
}

/// Whether the container of this directory stays although nobody holds it.
pub fn is_kept(container: &Path) -> bool {
    let Some(directory) = open(container) else { return false };
    // A document that cannot be read is no reason to remove what may be somebody's container.
    container.join(DOCUMENT).exists() && read(&directory, container).map_or(true, |state| state.kept)
}

/// `path` is the directory's.
fn read(directory: &OwnedFd, path: &Path) -> Result<State, StateError> {
    let id = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let unreadable = |what: String| StateError::Unreadable(path.join(DOCUMENT), what);
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(directory, DOCUMENT, flags, Mode::empty()) {
        Ok(file) => fs::File::from(file),
        // Deleted meanwhile, or not written yet.
        Err(Errno::NOENT) if !same_file(directory, path) || is_locked(directory) => {
            return Err(StateError::Missing(id.into()));
        }
        Err(errno @ (Errno::MFILE | Errno::NFILE)) => return Err(StateError::Descriptors(path.into(), errno)),
        Err(errno) => return Err(unreadable(errno.to_string())),
    };
    // Few are longer: then two calls read it, else one for each doubling.
    let mut text = String::with_capacity(4096);
    file.take(MAX_DOCUMENT).read_to_string(&mut text).map_err(|e| unreadable(e.to_string()))?;
    let version = serde_json::from_str::<Version>(&text).map_err(|e| unreadable(e.to_string()))?.version;
    if version > VERSION {
        return Err(unreadable(format!("it is of version {version}, written by a newer podhull")));
    }
    let state: State = serde_json::from_str(&text).map_err(|e| unreadable(e.to_string()))?;
    if state.id == id { Ok(state) } else { Err(unreadable(format!("it is that of {:?}", state.id))) }
}

#[derive(serde::Deserialize)]
struct Version {
    version: u32,
}

fn open(path: &Path) -> Option<OwnedFd> {
    try_open(path).ok()
}

fn try_open(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

/// The directory of a container that is there.
fn open_container(root: &Path, id: &str) -> Result<OwnedFd, StateError> {
    let path = root.join(id);
    try_open(&path).map_err(|errno| match errno {
        Errno::MFILE | Errno::NFILE => StateError::Descriptors(path, errno),
        _ => StateError::Missing(id.into()),
    })
}

/// A shared lock is no obstacle to others who look at the same time.
fn is_locked(directory: &OwnedFd) -> bool {
    let locked = rustix::fs::flock(directory, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK);
    if !locked {
        let _ = rustix::fs::flock(directory, FlockOperation::Unlock);
    }
    locked
}

/// Waits until no other command changes the container of a directory, or sweeps or deletes it.
fn take_turn(directory: &OwnedFd, path: &Path, file: &str, time: Duration) -> Result<OwnedFd, StateError> {
    let id = || path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let wrong = |errno| match errno {
        // The directory was removed.
        Errno::NOENT => StateError::Missing(id()),
        Errno::TIMEDOUT => StateError::Busy(id()),
        errno => StateError::Write(path.join(file), Errno::into(errno)),
    };
    lock_in_time(open_lock(directory, file).map_err(wrong)?, time).map_err(wrong)
}

/// The file by which commands take turns; made if it is not there.
pub fn open_turn(directory: impl AsFd) -> Result<OwnedFd, Errno> {
    open_lock(directory, TURN_FILE)
}

fn open_lock(directory: impl AsFd, file: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory, file, flags, Mode::from_raw_mode(0o600))
}

/// The same for one who sweeps what nobody holds, and does not wait.
pub fn try_turn(directory: impl AsFd) -> Option<OwnedFd> {
    let turn = open_turn(directory).ok()?;
    rustix::fs::flock(&turn, FlockOperation::NonBlockingLockExclusive).ok()?;
    Some(turn)
}

/// Waits for an exclusive lock, but not for ever. There is no such call: when the deadline has passed a thread goes on
/// waiting, until the process ends or it gets the lock and gives it back.
pub fn lock_in_time(file: OwnedFd, deadline: Duration) -> Result<OwnedFd, Errno> {
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => return Ok(file),
        Err(Errno::WOULDBLOCK) => {}
        Err(errno) => return Err(errno),
    }
    let (sender, receiver) = std::sync::mpsc::channel();
    let wait = move || {
        let locked = rustix::io::retry_on_intr(|| rustix::fs::flock(&file, FlockOperation::LockExclusive));
        let _ = sender.send(locked.map(|()| file));
    };
    let thread = std::thread::Builder::new().name("lock".into()).spawn(wait);
    let thread = thread.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))?;
    let locked = receiver.recv_timeout(deadline).map_err(|_| Errno::TIMEDOUT)?;
    // At its end: a shadow must have one thread alone for what comes next.
    let _ = thread.join();
    locked
}

fn find(process: Process) -> Option<OwnedFd> {
    let pidfd = pidfd_open(Pid::from_raw(process.pid)?, PidfdFlags::empty()).ok()?;
    // After the descriptor is open its number cannot become another's.
    (start_time(process.pid) == Some(process.start_time)).then_some(pidfd)
}

#[cfg(test)]
mod tests {
    use super::super::Directory;
    use super::*;

    fn root(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("podhull-known-{}-{name}", std::process::id()))
    }

    #[test]
    fn a_container_is_found_as_long_as_it_was_not_deleted() {
        let root = root("found");
        assert!(matches!(Known::load(&root, "a"), Err(StateError::Missing(_))));
        let mut held = Directory::create(&root, "a").unwrap();
        let mut state = State::new("a", std::process::id().cast_signed(), Path::new("/b"), Path::new("/r"), None);
        (state.status, state.kept) = (Status::Running, true);
        held.write(&state).unwrap();
        held.keep();
        assert_eq!(Known::load(&root, "a").unwrap().status(), Status::Running);
        drop(held);
        assert_eq!(Known::load(&root, "a").unwrap().status(), Status::Stopped);
        // Another's start sweeps only what nobody keeps.
        drop(Directory::create(&root, "b").unwrap());
        assert!(matches!(Directory::create(&root, "a"), Err(StateError::InUse(_))));
        assert_eq!(list(&root).unwrap().len(), 1);
        Known {
            root: root.clone(),
            state: State { process: Process { pid: 1, start_time: 1 }, ..state },
            directory: open(&root.join("a")).unwrap(),
            turn: None,
        }
        .destroy()
        .unwrap();
        assert!(list(&root).unwrap().is_empty());
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn a_document_that_cannot_be_used_is_named() {
        let root = root("unreadable");
        let container = root.join("a");
        fs::create_dir_all(&container).unwrap();
        for (text, what) in [("{", "EOF"), (r#"{"version": 99}"#, "newer"), (r#"{"version": 1}"#, "missing field")] {
            fs::write(container.join(DOCUMENT), text).unwrap();
            let error = Known::load(&root, "a").err().unwrap().to_string();
            assert!(error.contains(what) && error.contains("state.json"), "{error}");
        }
        remove(&root, "a").unwrap();
        fs::remove_dir_all(&root).unwrap();
    }
}
