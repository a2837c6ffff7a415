//! Volumes of the host that are written anew all at once (ConfigMaps, Secrets and the like), as copies in the guest. What changes
//! on the host is seen through the share, but nothing has happened in the guest's kernel then, so that nobody who waits for it
//! (inotify(7)) would be told. A copy that is changed when the host says so tells them.
//!
//! The host is asked for nothing that a bind of the same directory would not show. The copies are files in memory of the agent's,
//! which counts for no container.

mod copy;

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use podhull_protocol::{MAX_VOLUMES, Volume};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree, unmount,
};
use tokio::sync::Semaphore;

use crate::pod::{is_valid_id, relative};
use copy::{Copy, CopyError, MAX_PAGES, PAGE};

/// What all copies of a pod may take, in pages: what does not fit is no copy.
const ALL_PAGES: usize = (32 << 20) / PAGE;

/// How long the copies of a container may take to be made: the share is as slow as the host's file systems.
const DEADLINE: Duration = Duration::from_secs(30);

/// What cannot be done with volumes.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("volumes: {0} are more than {MAX_VOLUMES}")]
    TooMany(usize),
    #[error("volume {name:?} with path {source_path:?}: expected a name, and a relative path without \"..\"")]
    Invalid { name: String, source_path: String },
    #[error("volume {path}: {source}")]
    Place { path: PathBuf, source: Errno },
    #[error("volumes: took longer than {} s", DEADLINE.as_secs())]
    Slow,
    #[error("volumes: {0}")]
    Task(tokio::task::JoinError),
    #[error("volume {0:?} does not exist")]
    Missing(String),
    #[error("volume {name:?}: {source}")]
    Copy { name: String, source: CopyError },
}

impl VolumeError {
    /// Whether who asked is at fault.
    pub fn is_invalid(&self) -> bool {
        matches!(self, Self::TooMany(_) | Self::Invalid { .. })
    }
}

/// Where the copies of a pod are, and what they may take.
pub struct Volumes {
    directory: PathBuf,
    room: Arc<Semaphore>,
}

impl Volumes {
    /// None yet; what is made is below `directory`.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory, room: Arc::new(Semaphore::new(ALL_PAGES)) }
    }

    /// Makes those of a container, from what is below the share.
    pub async fn make(&self, id: &str, volumes: Vec<Volume>, share: &Path) -> Result<Copies, VolumeError> {
        let directory = self.directory.join(id);
        if volumes.is_empty() {
            return Ok(Copies { directory, copies: HashMap::new() });
        }
        if volumes.len() > MAX_VOLUMES {
            return Err(VolumeError::TooMany(volumes.len()));
        }
        let checked = volumes.into_iter().map(|volume| match relative(&volume.source) {
            Some(path) if is_valid_id(&volume.name) => Ok((share.join(path), volume.name)),
            _ => Err(VolumeError::Invalid { name: volume.name, source_path: volume.source }),
        });
        let checked = checked.collect::<Result<Vec<_>, _>>()?;
        let (above, room) = (self.directory.clone(), self.room.clone());
        let made = tokio::task::spawn_blocking(move || {
            make_directory(&above)?;
            // One of the same name that took too long still has it, and would take what is made here away when it is done.
            let created = rustix::fs::mkdirat(CWD, &directory, MODE);
            created.map_err(|source| VolumeError::Place { path: directory.clone(), source })?;
            let mut copies = Copies { directory, copies: HashMap::new() };
            for (source, name) in checked {
                copies.add(&source, name, &room)?;
            }
            Ok(copies)
        });
        tokio::time::timeout(DEADLINE, made).await.map_err(|_| VolumeError::Slow)?.map_err(VolumeError::Task)?
    }
}

/// The volumes of one container. They go with this, when nobody has them mounted any more.
pub struct Copies {
    directory: PathBuf,
    /// By name. There is no copy of what is the host's own.
    copies: HashMap<String, Option<Arc<Mutex<Copy>>>>,
}

impl Copies {
    fn add(&mut self, source: &Path, name: String, room: &Arc<Semaphore>) -> Result<(), VolumeError> {
        let path = self.directory.join(&name);
        let failed = |source| VolumeError::Place { path: path.clone(), source };
        make_directory(&path)?;
        self.copies.insert(name.clone(), None);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let source = rustix::fs::openat(CWD, source, flags, Mode::empty()).map_err(failed)?;
        let attach = |mount: BorrowedFd<'_>| {
            move_mount(mount, "", CWD, &path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(failed)
        };
        let copied = || {
            let memory = memory().ok()?;
            let ours = (source.try_clone().ok()?, memory.try_clone().ok()?);
            Some((memory, Copy::new(ours.0, ours.1, room.clone()).ok()?))
        };
        match copied() {
            Some((memory, copy)) => {
                attach(memory.as_fd())?;
                self.copies.insert(name, Some(Arc::new(Mutex::new(copy))));
                Ok(())
            }
            // What is not as expected, or too large, is seen as any other directory of the host.
            None => {
                let flags = OpenTreeFlags::OPEN_TREE_CLONE
                    | OpenTreeFlags::OPEN_TREE_CLOEXEC
                    | OpenTreeFlags::AT_EMPTY_PATH
                    | OpenTreeFlags::AT_RECURSIVE;
                attach(open_tree(&source, "", flags).map_err(failed)?.as_fd())
            }
        }
    }

    /// Makes a copy what the host has now, when this is awaited.
    pub fn update(&self, name: &str) -> impl Future<Output = Result<(), VolumeError>> + use<> {
        let (found, name) = (self.copies.get(name).cloned(), name.to_owned());
        async move {
            let Some(copy) = found.ok_or_else(|| VolumeError::Missing(name.clone()))? else { return Ok(()) };
            let update = move || copy.lock().unwrap_or_else(PoisonError::into_inner).update();
            let updated = tokio::task::spawn_blocking(update).await.map_err(VolumeError::Task)?;
            updated.map_err(|source| VolumeError::Copy { name, source })
        }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        for name in self.copies.keys() {
            let path = self.directory.join(name);
            let _ = unmount(&path, UnmountFlags::DETACH);
            let _ = rustix::fs::rmdir(&path);
        }
        let _ = rustix::fs::rmdir(&self.directory);
    }
}

/// A container in a user namespace goes through it.
const MODE: Mode = Mode::from_raw_mode(0o711);

fn make_directory(path: &Path) -> Result<(), VolumeError> {
    match rustix::fs::mkdirat(CWD, path, MODE) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(source) => Err(VolumeError::Place { path: path.into(), source }),
    }
}

/// A file system for one copy: two versions are there for a moment.
fn memory() -> Result<OwnedFd, Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "size", (2 * MAX_PAGES * PAGE).to_string())?;
    fsconfig_create(context.as_fd())?;
    let flags = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)
}
