//! Changes of a control group's event files.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::readiness;

/// Tells when a file such as `memory.events` has changed.
pub struct Watch {
    inotify: AsyncFd<OwnedFd>,
}

impl Watch {
    /// Changes from here on are told.
    pub fn new(path: &Path) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(&inotify, path, WatchFlags::MODIFY)?;
        Ok(Self { inotify: readiness::watch(inotify, Interest::READABLE)? })
    }

    /// Waits for a change. Several may be told as one.
    pub async fn changed(&mut self) -> io::Result<()> {
        let mut events = [0; 4096];
        self.inotify.async_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut events)?)).await?;
        Ok(())
    }
}
