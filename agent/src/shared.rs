//! Directories of the host that several containers of the pod have among their files. Each is a file system of its own to the guest's
//! kernel, which it mounts when somebody gets there: in the mount namespace of a container, a new one each time, whose files would
//! not be those of the next. So the agent gets there first, and containers find it mounted.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use crate::pod::{PodError, relative};

/// How long the host may take to show them.
const DEADLINE: Duration = Duration::from_secs(30);

/// All of them, and how many containers have each.
#[derive(Default)]
pub struct Shared(Mutex<HashMap<PathBuf, usize>>);

/// Those of one container, until this goes.
pub struct Users {
    all: Arc<Shared>,
    paths: Vec<PathBuf>,
}

impl Shared {
    /// Mounts those with these names in the root of the share, as far as they are not.
    pub async fn mount(self: &Arc<Self>, share: &Path, names: Vec<String>) -> Result<Users, PodError> {
        let path =
            |name: &String| relative(name).map(|name| share.join(name)).ok_or_else(|| PodError::Shared(name.clone()));
        let paths = names.iter().map(path).collect::<Result<Vec<_>, _>>()?;
        if paths.is_empty() {
            return Ok(Users { all: self.clone(), paths });
        }
        let mut users = Users { all: self.clone(), paths: Vec::new() };
        let mount = move || {
            for path in paths {
                *users.all.lock().entry(path.clone()).or_default() += 1;
                // Even one that others have: the host may have put another mount there since.
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let opened = rustix::fs::openat(CWD, &path, flags, Mode::empty());
                let failed = |source| PodError::OpenShared { path: path.clone(), source };
                let opened = opened.map(drop).map_err(failed);
                users.paths.push(path);
                opened?;
            }
            Ok(users)
        };
        let mounted = tokio::time::timeout(DEADLINE, tokio::task::spawn_blocking(mount)).await;
        mounted.map_err(|_| PodError::SlowShared)?.map_err(PodError::SharedTask)?
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one user of each away, and unmounts what has none left: the host cannot let go of it before.
    fn leave(&self, paths: &[PathBuf]) {
        for path in paths {
            // Held meanwhile: who comes now is to find it mounted for good, or not at all.
            let mut users = self.lock();
            let Some(count) = users.get_mut(path) else { continue };
            *count -= 1;
            if *count == 0 {
                users.remove(path);
                match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                    // The host has taken it away, and the kernel has noticed.
                    Ok(()) | Err(Errno::NOENT | Errno::INVAL) => {}
                    Err(errno) => eprintln!("podhull-agent: unmount {}: {errno}", path.display()),
                }
            }
        }
    }
}

impl Drop for Users {
    fn drop(&mut self) {
        let (all, paths) = (self.all.clone(), std::mem::take(&mut self.paths));
        if !paths.is_empty() {
            // The host is asked on the way, and the agent's thread has containers to serve.
            tokio::task::spawn_blocking(move || all.leave(&paths));
        }
    }
}
