//! How a caller learns which process stands for what it has asked for.

use std::io;
use std::path::{Path, PathBuf};

use crate::{handover, state};

/// What a process is that stands for a program.
#[derive(Debug, Clone, Copy)]
pub enum Stands {
    /// For a container.
    Container,
    /// For a program executed in one.
    Executed,
}

/// Where a caller wants to be told.
#[derive(Debug, Default, Clone, Copy)]
pub struct Announce<'a> {
    /// A file for its process id.
    pub pid_file: Option<&'a Path>,
    /// A Unix socket for its pidfd, whose signals the process passes on.
    pub pidfd_socket: Option<&'a Path>,
}

/// Why the caller was not told.
#[derive(Debug, thiserror::Error)]
pub enum AnnounceError {
    /// The pid file cannot be written.
    #[error("cannot write the pid file {0}: {1}")]
    PidFile(PathBuf, #[source] io::Error),
    /// Nobody takes the pidfd.
    #[error("cannot send a pidfd to {0}: {1}")]
    PidfdSocket(PathBuf, #[source] io::Error),
}

impl Announce<'_> {
    /// Tells of a process of this pid namespace, which was not waited for.
    pub fn tell(&self, pid: i32, stands: Stands) -> Result<(), AnnounceError> {
        if let Some(socket) = self.pidfd_socket {
            // What runc says of the two.
            let name = match stands {
                Stands::Container => "standard",
                Stands::Executed => "setns",
            };
            let sent = handover::send_process(socket, pid, name);
            sent.map_err(|e| AnnounceError::PidfdSocket(socket.to_owned(), e))?;
        }
        if let Some(path) = self.pid_file {
            let written = state::replace(path, pid.to_string().as_bytes());
            written.map_err(|e| AnnounceError::PidFile(path.to_owned(), e))?;
        }
        Ok(())
    }

    /// Takes back that there was one. A file that somebody else made meanwhile is not told apart.
    pub fn withdraw(&self) {
        if let Some(path) = self.pid_file {
            let _ = std::fs::remove_file(path);
        }
    }
}
