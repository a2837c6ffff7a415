//! `startContainer` hooks: the one kind that runs in the container.

use std::ffi::CStr;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::spec::{Hook, Spec};

/// For hooks that say nothing.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// A hook that failed, and with it the start.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    #[error("error running startContainer hook #{number}: {source}")]
    Run { number: usize, source: io::Error },
    #[error("error running startContainer hook #{number}: {}", ended(*status))]
    Failed { number: usize, status: ExitStatus },
    #[error("error running startContainer hook #{number}: hook ran past specified timeout of {}s", timeout.as_secs())]
    TimedOut { number: usize, timeout: Duration },
}

/// How a hook ended, in the words of runc, which are Go's.
fn ended(status: ExitStatus) -> String {
    let Some(signal) = status.signal() else { return format!("exit status {}", status.code().unwrap_or_default()) };
    // SAFETY: the process has one thread, and the text is copied before the next call.
    let name = unsafe { CStr::from_ptr(libc::strsignal(signal)) };
    format!("signal: {}", name.to_string_lossy().to_lowercase())
}

/// How long a hook may take.
pub fn timeout(hook: &Hook) -> Duration {
    hook.timeout.map_or(DEFAULT_TIMEOUT, Duration::from_secs)
}

/// How long all of them may take. What no clock counts up to is no deadline.
pub fn timeouts(spec: &Spec) -> Duration {
    let all = spec.hooks.start_container.iter().map(timeout);
    all.fold(Duration::ZERO, Duration::saturating_add)
}

/// Runs the hooks one after the other, each with the state of the container on its standard input.
pub fn run(spec: &Spec, id: &str) -> Result<(), HookError> {
    let state = serde_json::json!({
        "ociVersion": spec.oci_version,
        "id": id,
        "status": "created",
        "pid": std::process::id(),
        "bundle": "/",
        "annotations": spec.annotations,
    })
    .to_string();
    for (number, hook) in spec.hooks.start_container.iter().enumerate() {
        let failed = |source| HookError::Run { number, source };
        let mut command = Command::new(&hook.path);
        if let Some((name, arguments)) = hook.args.split_first() {
            command.arg0(name).args(arguments);
        }
        command.env_clear().envs(hook.env.iter().filter_map(|entry| entry.split_once('=')));
        let mut child = command.stdin(Stdio::piped()).spawn().map_err(failed)?;
        if let Some(mut stdin) = child.stdin.take() {
            match stdin.write_all(state.as_bytes()) {
                // A hook that reads nothing needs nothing.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                other => other.map_err(failed)?,
            }
        }
        let status = wait(&mut child, timeout(hook)).map_err(failed)?;
        match status {
            Some(status) if status.success() => {}
            Some(status) => return Err(HookError::Failed { number, status }),
            None => return Err(HookError::TimedOut { number, timeout: timeout(hook) }),
        }
    }
    Ok(())
}

/// The child's status, or none if it took too long; then it is killed.
fn wait(child: &mut Child, timeout: Duration) -> io::Result<Option<ExitStatus>> {
    let pid = Pid::from_child(child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let deadline = Instant::now().checked_add(timeout);
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        // More seconds than the kernel has a number for are no deadline either.
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match rustix::event::poll(&mut [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)], left.as_ref()) {
            Ok(0) => {
                child.kill()?;
                child.wait()?;
                return Ok(None);
            }
            Ok(_) => return child.wait().map(Some),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
