//! Volumes that kubelet writes anew while a container has them: ConfigMaps, Secrets, projected ones, and the downward API. kubelet
//! writes a new directory beside the old one, and a link `..data` that leads to it takes the place of the one before by rename.
//! The guest's kernel knows nothing of that, so who waits for it inside would not be told: the guest has a copy, which its agent
//! changes in the same way, as often as it is told here that there is something new. It reads that from the share: nothing of
//! what is in the volume goes through this process, which has nothing but word of the rename.

use std::collections::BTreeSet;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use podhull_protocol::{MAX_VOLUMES, Volume};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
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
    /// What the guest is told of each, and the number of its watch.
    watched: Vec<(i32, Volume)>,
    /// Why one cannot be watched.
    failure: Option<Errno>,
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
                let volume = Volume { name: name.clone(), source: in_share.into(), ..Default::default() };
                self.watched.push((watch, volume));
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
            none => none.insert(inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?),
        };
        let path = format!("/proc/self/fd/{}", source.as_raw_fd());
        inotify::add_watch(inotify, path, WatchFlags::MOVED_TO | WatchFlags::ONLYDIR)
    }

    /// What the guest is told.
    pub fn told(&self) -> Vec<Volume> {
        self.watched.iter().map(|(_, volume)| volume.clone()).collect()
    }

    /// Has the guest copy what is new, for as long as it is polled. What cannot be copied is, when it has changed again.
    pub async fn serve(self, session: &Session<'_>) -> Result<(), RunError> {
        let Session { id, agent, log, .. } = session;
        if let Some(errno) = self.failure {
            log.warning(&format!(
                "container {id}: programs are not told when its volumes change: {errno}; \
                 raise fs.inotify.max_user_instances or max_user_watches (sysctl)"
            ));
        }
        let Some(inotify) = self.inotify else { return Ok(()) };
        // SAFETY: the descriptor is owned by the AsyncFd from here on, and never replaced.
        let inotify = unsafe { AsyncFd::register(inotify) }.map_err(|error| RunError::Signals(error.into()))?;
        loop {
            let mut ready = inotify.readable().await.map_err(RunError::Signals)?;
            let changed = changed(inotify.get_ref());
            ready.clear_ready();
            for (_, volume) in self.watched.iter().filter(|(watch, _)| changed.has(*watch)) {
                if let Err(error) = agent.update_volume(id, &volume.name).await {
                    log.debug(|| format!("{id}: {error}"));
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
