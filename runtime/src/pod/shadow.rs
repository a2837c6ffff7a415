//! The shadow: the process that stands for a container on the host. A child of `create`, which returns when the container is
//! made; then the shadow is the child of whoever the caller chose for orphans, holds the machine, moves the container's
//! streams and signals, and exits with its status.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::pipe::PipeFlags;

use super::start::Report;
use crate::state::Known;

/// Descriptor at which the shadow finds the pipe to `create`.
const REPORT_FD: i32 = 3;

/// What is written there when it is made; anything else is why it was not.
const MADE: u8 = 0;

/// Longest error that is passed on, in bytes.
const MAX_ERROR: u64 = 64 * 1024;

/// Why there is no container.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The shadow said it.
    #[error("{0}")]
    Failed(String),
    /// The shadow cannot be started.
    #[error("cannot start the container's process: {0}")]
    Spawn(#[source] io::Error),
    /// The shadow ended without a word.
    #[error("the container's process ended before the container was made: {0}")]
    Died(std::process::ExitStatus),
}

/// The flag by which a command line is a shadow's.
pub const FLAG: &str = "--shadow";

/// Starts the shadow, with the command line of this process and [`FLAG`], and waits until what it stands for is made: the
/// container `id`, or a program in it.
pub fn in_shadow(root: &Path, id: &str) -> Result<(), CreateError> {
    let (ours, theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|e| CreateError::Spawn(e.into()))?;
    let fd = theirs.as_raw_fd();
    let mut command = Command::new("/proc/self/exe");
    command.arg0("podhull").arg(FLAG).args(std::env::args_os().skip(1));
    // SAFETY: between fork and exec the closure only makes system calls, and allocates nothing.
    unsafe {
        command.pre_exec(move || inherit_only(fd));
    }
    let mut child = command.spawn().map_err(CreateError::Spawn)?;
    drop(theirs);
    // The shadow's start has a deadline for each of its steps; its end closes the pipe.
    let mut pipe = File::from(ours);
    let mut said = vec![MADE];
    if pipe.read_exact(&mut said).is_err() {
        said.clear();
    }
    if said == [MADE] {
        return Ok(());
    }
    let _ = pipe.take(MAX_ERROR).read_to_end(&mut said);
    let status = child.wait().map_err(CreateError::Spawn)?;
    if !said.is_empty() {
        return Err(CreateError::Failed(String::from_utf8_lossy(&said).into_owned()));
    }
    // Killed in the middle: it could not tidy up. What it had not written down yet the next command sweeps.
    if let Ok(known) = Known::load(root, id)
        && known.state.process.pid == child.id().cast_signed()
    {
        let _ = known.destroy();
    }
    Err(CreateError::Died(status))
}

/// A session of its own, the pipe at its place, and nothing else of the caller's beyond the standard streams.
fn inherit_only(report: i32) -> io::Result<()> {
    let check = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: plain system calls on integers.
    unsafe {
        check(libc::setsid())?;
        if report == REPORT_FD {
            check(libc::fcntl(report, libc::F_SETFD, 0))?;
        } else {
            check(libc::dup2(report, REPORT_FD))?;
        }
        // Not closed now: the standard library reports a failed exec through a descriptor of its own.
        let first = REPORT_FD as libc::c_uint + 1;
        check(libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) as libc::c_int)
    }
}

/// The shadow's end of the pipe; `None` if nobody gave it one.
pub struct Pipe(File);

impl Pipe {
    /// To be called once, and first.
    pub fn inherited() -> Option<Self> {
        // SAFETY: `create` put the pipe there, and nothing else has opened anything yet; fcntl tells if it is not open.
        let fd = unsafe {
            if libc::fcntl(REPORT_FD, libc::F_SETFD, libc::FD_CLOEXEC) != 0 {
                return None;
            }
            OwnedFd::from_raw_fd(REPORT_FD)
        };
        rustix::fs::fstat(&fd)
            .ok()
            .filter(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Fifo)?;
        Some(Self(File::from(fd)))
    }

    /// What tells `create` that the container is made.
    pub fn report(&self) -> io::Result<Report> {
        let mut pipe = self.0.try_clone()?;
        Ok(Box::new(move || pipe.write_all(&[MADE])))
    }

    /// Tells `create` why it is not; an error if that has heard all it waited for.
    pub fn fail(mut self, error: &str) -> io::Result<()> {
        self.0.write_all(error.as_bytes())
    }
}
