//! Named pipes of containerd's making: what a container writes goes into one, what it reads comes out of one.
//!
//! containerd may be restarted while a container runs. So each pipe is held open at both ends here: who writes is not ended by a
//! reader that is gone, and who reads is not told of an end by a writer that is.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

/// How long containerd may take to open its end.
const OPENED: Duration = Duration::from_secs(10);

/// A pipe that a container writes to.
pub struct Output {
    /// The container's end.
    pub writer: OwnedFd,
    /// Held for as long as the container may write.
    pub reader: OwnedFd,
}

impl Output {
    /// Opens it, when containerd has opened its end: what nobody reads would be lost with the container.
    pub async fn open(path: &Path) -> io::Result<Self> {
        let open = {
            let path = path.to_owned();
            // Waits for a reader (fifo(7)). Who has made a file instead wants it continued.
            move || OpenOptions::new().append(true).open(path)
        };
        let mut opened = tokio::task::spawn_blocking(open);
        let writer = match tokio::time::timeout(OPENED, &mut opened).await {
            Ok(opened) => opened.map_err(io::Error::other)??,
            Err(_) => {
                // A reader, so that the thread does not wait for ever.
                let _reader = open_now(path, OFlags::RDONLY)?;
                let _ = opened.await;
                return Err(io::Error::new(io::ErrorKind::TimedOut, "nobody has opened it for reading"));
            }
        };
        Ok(Self { writer: writer.into(), reader: open_now(path, OFlags::RDONLY)? })
    }
}

/// A pipe that a container reads from.
pub struct Input {
    /// The container's end.
    pub reader: OwnedFd,
    /// Held until containerd says that there will be no more.
    pub writer: OwnedFd,
}

impl Input {
    /// Opens it. Nobody needs to have the other end.
    pub fn open(path: &Path) -> io::Result<Self> {
        let reader = open_now(path, OFlags::RDONLY)?;
        let writer = open_now(path, OFlags::WRONLY)?;
        // For programs that do not expect less.
        rustix::io::ioctl_fionbio(&reader, false)?;
        Ok(Self { reader, writer })
    }
}

fn open_now(path: &Path, access: OFlags) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, access | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?)
}

/// A file that output is appended to, made with the directories above it if it is not there.
pub fn append(path: &Path) -> io::Result<File> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    // Not waiting for a reader, should it be a pipe.
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().append(true).create(true).mode(0o644).custom_flags(nonblocking).open(path)?;
    rustix::io::ioctl_fionbio(&file, false)?;
    Ok(file)
}

/// The log of a shim, in the working directory: a pipe that containerd reads, if it does. Opened at both ends, since containerd
/// may come to read it later; what does not fit into it is lost.
pub fn log() -> Option<File> {
    open_now(Path::new("log"), OFlags::RDWR).ok().map(File::from)
}
