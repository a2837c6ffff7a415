//! A container that some command made before, found by its id.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use podhull_vmm::jail::Jail;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::document::{Process, VERSION, start_time};
use super::{DOCUMENT, Membership, PODS, State, StateError, Status, check_id};
use crate::cgroup::PATIENCE;

/// Longest `state.json`: annotations are the caller's.
const MAX_DOCUMENT: u64 = 4 << 20;

/// How long a process may take to end that was killed.
const END: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// How long a process may take that was killed for nobody who waits for it.
const SOON: Duration = Duration::from_secs(1);

/// A container that exists.
pub struct Known {
    root: PathBuf,
    /// What was written down.
    pub state: State,
    directory: OwnedFd,
}

impl Known {
    /// Finds a container.
    pub fn load(root: &Path, id: &str) -> Result<Self, StateError> {
        check_id(id)?;
        let directory = open(&root.join(id)).ok_or_else(|| StateError::Missing(id.into()))?;
        let state = read(root, id)?;
        Ok(Self { root: root.into(), state, directory })
    }

    /// Where in its life it is now.
    pub fn status(&self) -> Status {
        if is_locked(&self.directory) { self.state.status } else { Status::Stopped }
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

    /// Notes another status.
    pub fn note(&mut self, status: Status) -> Result<(), StateError> {
        self.state.status = status;
        super::write(self.directory.as_fd(), &self.root.join(&self.state.id), &self.state)
    }

    /// Ends the container's processes, if they live, without asking anything inside, and removes all of it.
    pub fn destroy(self) -> Result<(), StateError> {
        // Nobody else does the same meanwhile: the lock is free once the container's process is gone.
        let machine = self.state.machine.map(|machine| machine.0);
        if is_locked(&self.directory) {
            end(self.state.process);
        }
        // It sees its channel closed and ends by itself; but not if it is stopped.
        if let Some(machine) = machine {
            end(machine);
        }
        if let Some(member) = &self.state.member_of {
            member.leave(&self.state.id)?;
        }
        self.state.remove_cgroups(PATIENCE)?;
        remove(&self.root, &self.state.id)
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

    /// Takes the files of a container out of its pod's machine.
    pub fn leave(&self, id: &str) -> Result<(), StateError> {
        match self.mounts()? {
            Some(mounts) => Jail::of_running(mounts.as_fd(), |share| share.detach(id))
                .map_err(|error| StateError::Mounts(self.pod.clone(), error.to_string())),
            None => Ok(()),
        }
    }
}

/// The directory of a pod, with its sockets.
pub fn open_pod(root: &Path, pod: &str) -> Result<OwnedFd, StateError> {
    check_id(pod)?;
    super::open(&root.join(PODS).join(pod))
}

/// Removes a container whose state cannot be read.
pub fn remove(root: &Path, id: &str) -> Result<(), StateError> {
    check_id(id)?;
    for path in [root.join(PODS).join(id), root.join(id)] {
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(StateError::Write(path, error)),
            _ => {}
        }
    }
    Ok(())
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
    // One may go while we look; what is no container has another name, or no document.
    Ok(ids.iter().filter_map(|id| Known::load(root, id).ok()).collect())
}

/// Whether somebody holds the container of this directory.
pub fn is_held(container: &Path) -> bool {
    open(container).is_some_and(|directory| is_locked(&directory))
}

/// Removes the control groups of a container whose processes have ended, or are about to; false if that would take long.
pub fn remove_cgroups(root: &Path, id: &str) -> bool {
    // Without a document there are none.
    read(root, id).map_or(true, |state| state.remove_cgroups(SOON).is_ok())
}

/// Whether the container of this directory stays although nobody holds it.
pub fn is_kept(container: &Path) -> bool {
    let (Some(root), Some(id)) = (container.parent(), container.file_name().and_then(|name| name.to_str())) else {
        return false;
    };
    // A document that cannot be read is no reason to remove what may be somebody's container.
    container.join(DOCUMENT).exists() && read(root, id).map_or(true, |state| state.kept)
}

fn read(root: &Path, id: &str) -> Result<State, StateError> {
    let path = root.join(id).join(DOCUMENT);
    let unreadable = |what: String| StateError::Unreadable(path.clone(), what);
    let mut text = String::new();
    let file = match fs::File::open(&path) {
        Ok(file) => file,
        Err(error) => return Err(unreadable(error.to_string())),
    };
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
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).ok()
}

/// A shared lock is no obstacle to others who look at the same time.
fn is_locked(directory: &OwnedFd) -> bool {
    let locked = rustix::fs::flock(directory, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK);
    if !locked {
        let _ = rustix::fs::flock(directory, FlockOperation::Unlock);
    }
    locked
}

fn find(process: Process) -> Option<OwnedFd> {
    let pidfd = pidfd_open(Pid::from_raw(process.pid)?, PidfdFlags::empty()).ok()?;
    // After the descriptor is open its number cannot become another's.
    (start_time(process.pid) == Some(process.start_time)).then_some(pidfd)
}

/// Kills a process, and waits for its end.
fn end(process: Process) {
    let Some(pidfd) = find(process) else { return };
    let _ = pidfd_send_signal(&pidfd, Signal::KILL);
    let _ = rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&END)));
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
            directory: open(&root).unwrap(),
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
