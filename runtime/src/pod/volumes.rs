//! Volumes that kubelet writes anew while a container has them: ConfigMaps, Secrets, projected ones, and the downward API. kubelet
//! writes a new directory beside the old one, and a link `..data` that leads to it takes the place of the one before by rename.
//! The guest's kernel knows nothing of that, so who waits for it inside would not be told: the guest has a copy, which its agent
//! changes in the same way, as often as it is told here that there is something new. It reads that from the share: nothing of
//! what is in the volume goes through this process, which has nothing but word of the rename.

use std::collections::BTreeSet;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use podhull_protocol::{MAX_VOLUMES, Volume};
use rustix::fs::inotify::{self, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

use super::session::Session;
use super::start::RunError;

/// Directories that kubelet has such volumes in.
const KINDS: [&str; 4] =
    ["kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api"];

/// The link that leads to what is there now.
const DATA: &std::ffi::CStr = c"..data";

/// Room for some events: each is 16 bytes and a name.
const EVENTS: usize = 4096;

/// Those of one container.
#[derive(Default)]
pub struct Volumes {
    inotify: Option<OwnedFd>,
    watched: Vec<Watched>,
    /// Why one cannot be watched.
    failure: Option<Errno>,
}

/// One of them.
struct Watched {
    /// Number of its watch, which another for the same directory has too.
    watch: i32,
    /// As written.
    path: PathBuf,
    /// What the guest is told.
    told: Volume,
}

impl Volumes {
    /// Watches a directory of the host that is bound read-only, if it is such a volume; returns the name of its copy. One
    /// that cannot be watched is like any other directory.
    pub fn watch(&mut self, path: &Path, source: BorrowedFd<'_>, in_share: &str) -> Option<String> {
        let of_kubelet = path.iter().any(|part| KINDS.iter().any(|kind| part == *kind));
        if !of_kubelet || self.watched.len() >= MAX_VOLUMES || rustix::fs::readlinkat(source, DATA, Vec::new()).is_err()
        {
            return None;
        }
        match self.add(source) {
            Ok(watch) => {
                let name = self.watched.len().to_string();
                let told = Volume { name: name.clone(), source: in_share.into(), ..Default::default() };
                self.watched.push(Watched { watch, path: path.into(), told });
                Some(name)
            }
            Err(errno) => {
                self.failure = Some(errno);
                None
            }
        }
    }

    fn add(&mut self, source: BorrowedFd<'_>) -> Result<i32, Errno> {
        let inotify = match &mut self.inotify {
            Some(inotify) => inotify,
            none => none.insert(crate::inotify::instance()?),
        };
        let path = format!("/proc/self/fd/{}", source.as_raw_fd());
        inotify::add_watch(inotify, path, WatchFlags::MOVED_TO | WatchFlags::ONLYDIR)
    }

    /// What the guest is told.
    pub fn told(&self) -> Vec<Volume> {
        self.watched.iter().map(|watched| watched.told.clone()).collect()
    }

    /// Has the guest copy what is new, for as long as it is polled. What cannot be copied is, when it has changed again.
    pub async fn serve(self, session: &Session<'_>) -> Result<(), RunError> {
        let Session { id, agent, log, .. } = session;
        if let Some(errno) = self.failure {
            log.warning(&format!(
                "container {id}: programs are not told when its volumes change: {errno}; \
                 raise fs.inotify.max_user_watches (sysctl)"
            ));
        }
        let Some(inotify) = self.inotify else { return Ok(()) };
        // SAFETY: the descriptor is owned by the AsyncFd from here on, and never replaced.
        let inotify = unsafe { AsyncFd::register(inotify) }.map_err(|error| RunError::Signals(error.into()))?;
        loop {
            let mut ready = inotify.readable().await.map_err(RunError::Signals)?;
            let changed = changed(inotify.get_ref());
            ready.clear_ready();
            for Watched { path, told, .. } in self.watched.iter().filter(|watched| changed.has(watched.watch)) {
                if let Err(error) = agent.update_volume(id, &told.name).await {
                    log.warning(&format!("container {id}: {} stays as it was: {error}", path.display()));
                }
            }
        }
    }
}

/// Which directories have something new.
enum Changed {
    These(BTreeSet<i32>),
    /// More has happened than the kernel has kept.
    All,
}

impl Changed {
    fn has(&self, watch: i32) -> bool {
        match self {
            Self::These(watches) => watches.contains(&watch),
            Self::All => true,
        }
    }
}

/// All that has happened up to now.
fn changed(inotify: &OwnedFd) -> Changed {
    let mut buffer = [MaybeUninit::uninit(); EVENTS];
    let mut events = inotify::Reader::new(inotify, &mut buffer);
    let (mut watches, mut all) = (BTreeSet::new(), false);
    while let Ok(event) = events.next() {
        all |= event.events().contains(ReadFlags::QUEUE_OVERFLOW);
        if event.file_name() == Some(DATA) {
            watches.insert(event.wd());
        }
    }
    if all { Changed::All } else { Changed::These(watches) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::fd::AsFd;
    use std::os::unix::fs::symlink;

    use rustix::fs::{Mode, OFlags};

    fn volume(base: &Path, kind: &str, name: &str) -> (PathBuf, OwnedFd) {
        let path = base.join(kind).join(name);
        fs::create_dir_all(path.join("..1")).unwrap();
        symlink("..1", path.join("..data")).unwrap();
        let directory = rustix::fs::open(&path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        (path, directory)
    }

    fn write(volume: &Path) {
        symlink("..2", volume.join("..data_tmp")).unwrap();
        fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    }

    #[test]
    fn volumes_are_directories_of_kubelets_with_a_link_to_what_they_have() {
        let base = tempfile::tempdir().unwrap();
        let mut volumes = Volumes::default();
        for (number, kind) in KINDS.iter().enumerate() {
            let (path, directory) = volume(base.path(), kind, "name");
            assert_eq!(volumes.watch(&path, directory.as_fd(), "share"), Some(number.to_string()));
        }
        let (path, directory) = volume(base.path(), "kubernetes.io~empty-dir", "name");
        assert_eq!(volumes.watch(&path, directory.as_fd(), "share"), None);
        let (path, directory) = volume(base.path(), KINDS[0], "plain");
        fs::remove_file(path.join("..data")).unwrap();
        assert_eq!(volumes.watch(&path, directory.as_fd(), "share"), None);
        fs::create_dir(path.join("..data")).unwrap();
        assert_eq!(volumes.watch(&path, directory.as_fd(), "share"), None);
        assert_eq!(volumes.told().len(), KINDS.len());
        assert!(volumes.failure.is_none());
    }

    #[test]
    fn the_rename_is_noticed_and_nothing_else() {
        let base = tempfile::tempdir().unwrap();
        let (one, first) = volume(base.path(), KINDS[0], "one");
        let (two, second) = volume(base.path(), KINDS[1], "two");
        let mut volumes = Volumes::default();
        volumes.watch(&one, first.as_fd(), "1").unwrap();
        volumes.watch(&two, second.as_fd(), "2").unwrap();
        volumes.watch(&two, second.as_fd(), "3").unwrap();
        let changed = || {
            let changed = changed(volumes.inotify.as_ref().unwrap());
            let sources = volumes.watched.iter().filter(|watched| changed.has(watched.watch));
            sources.map(|watched| watched.told.source.as_str()).collect::<Vec<_>>()
        };
        assert!(changed().is_empty());
        fs::create_dir(one.join("..2")).unwrap();
        fs::write(one.join("..2/key"), "").unwrap();
        fs::write(one.join("other"), "").unwrap();
        fs::rename(one.join("other"), one.join("another")).unwrap();
        assert!(changed().is_empty());
        write(&two);
        assert_eq!(changed(), ["2", "3"]);
        assert!(changed().is_empty());
        for _ in 0..100 {
            write(&one);
        }
        write(&two);
        assert_eq!(changed(), ["1", "2", "3"]);
        assert!(changed().is_empty());
    }

    #[test]
    fn more_events_than_are_kept_are_word_of_all() {
        let base = tempfile::tempdir().unwrap();
        let (path, directory) = volume(base.path(), KINDS[0], "name");
        let mut volumes = Volumes::default();
        volumes.watch(&path, directory.as_fd(), "share").unwrap();
        let most: usize = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap().trim().parse().unwrap();
        for name in 0..most + 10 {
            // Of different names: the same twice is one event.
            fs::write(path.join("file"), "").unwrap();
            fs::rename(path.join("file"), path.join(format!("{}", name % 2))).unwrap();
        }
        assert!(matches!(changed(volumes.inotify.as_ref().unwrap()), Changed::All));
    }
}
