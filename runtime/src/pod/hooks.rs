//! Hooks on the host (runtime-spec, `config.md`, POSIX-platform Hooks): programs of the caller's at points of a container's
//! life, each with the container's state on its standard input. Those of `startContainer` are the agent's.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use oci_spec::runtime::{Hook, Hooks};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SeekFrom, memfd_create};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};
use serde_json::json;

use crate::state::{State, Status};

/// How much of what a hook writes is kept for the error, in bytes.
const MAX_OUTPUT: usize = 4096;

/// A hook that failed. Callers of runc match on the first words.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It could not be run, or not be waited for.
    #[error("error running {kind} hook #{number}: {path:?}: {source}")]
    Run {
        /// Of which list.
        kind: &'static str,
        /// Place in it, from 0.
        number: usize,
        /// The program.
        path: std::path::PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It ended with another status than 0.
    #[error("error running {kind} hook #{number}: {status}, stdout: {stdout}, stderr: {stderr}")]
    Failed {
        /// Of which list.
        kind: &'static str,
        /// Place in it, from 0.
        number: usize,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote.
        stdout: String,
        /// What it wrote.
        stderr: String,
    },
    /// It was killed.
    #[error("error running {kind} hook #{number}: hook ran past specified timeout of {}s", timeout.as_secs())]
    TimedOut {
        /// Of which list.
        kind: &'static str,
        /// Place in it, from 0.
        number: usize,
        /// Its `timeout`.
        timeout: Duration,
    },
}

/// A point of a container's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// The shadow is in its namespaces, and the container not made.
    Made,
    /// The program runs.
    Started,
    /// Nothing is left of the container.
    Deleted,
}

/// Runs the hooks of a point, in the order of the specification, up to the first that fails; those of [`Point::Deleted`] all, since
/// there is nothing that a failure could end, and the first failure is what is returned. `shadow` is a descriptor of
/// the process that stands for the container (a pidfd), while there is one: `createContainer` hooks run in its namespaces.
///
/// Of these namespaces the mount namespace is not one. runc runs them where the files of the host are still to be seen
/// beside the container's, and so they find their own libraries; the shadow's has the container's files alone.
pub fn run(hooks: &Hooks, point: Point, state: &State, shadow: Option<BorrowedFd<'_>>) -> Result<(), HookError> {
    let (status, lists) = match point {
        Point::Made => (
            Status::Creating,
            [
                ("prestart", prestart(hooks)),
                ("createRuntime", hooks.create_runtime()),
                ("createContainer", hooks.create_container()),
            ]
            .to_vec(),
        ),
        Point::Started => (Status::Running, [("poststart", hooks.poststart())].to_vec()),
        Point::Deleted => (Status::Stopped, [("poststop", hooks.poststop())].to_vec()),
    };
    let told = told(state, status);
    let mut failed = Ok(());
    for (kind, list) in lists {
        for (number, hook) in list.iter().flatten().enumerate() {
            let within = shadow.filter(|_| kind == "createContainer");
            let result = run_one(hook, &told, &state.bundle, within).map_err(|end| end.of(kind, number, hook));
            if point != Point::Deleted {
                result?;
            } else if failed.is_ok() {
                failed = result;
            }
        }
    }
    failed
}

/// Of an old specification, and what Docker uses.
#[allow(deprecated)]
fn prestart(hooks: &Hooks) -> &Option<Vec<Hook>> {
    hooks.prestart()
}

/// Of all hooks those that come after the container was made.
pub fn later(hooks: &Hooks) -> Option<Hooks> {
    let mut later = Hooks::default();
    later.set_poststart(hooks.poststart().clone().filter(|list| !list.is_empty()));
    later.set_poststop(hooks.poststop().clone().filter(|list| !list.is_empty()));
    (later.poststart().is_some() || later.poststop().is_some()).then_some(later)
}

/// The state as hooks are told it (runtime-spec, `runtime.md`, State).
fn told(state: &State, status: Status) -> Vec<u8> {
    let mut told = json!({
        "ociVersion": state.oci_version,
        "id": state.id,
        "status": status,
        "bundle": state.bundle,
    });
    if status != Status::Stopped {
        told["pid"] = json!(state.process.pid);
    }
    if let Some(annotations) = &state.annotations {
        told["annotations"] = json!(annotations);
    }
    told.to_string().into_bytes()
}

/// How a hook failed.
enum End {
    Run(io::Error),
    Failed(ExitStatus, String, String),
    TimedOut(Duration),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Run(error)
    }
}

impl End {
    fn of(self, kind: &'static str, number: usize, hook: &Hook) -> HookError {
        match self {
            Self::Run(source) => HookError::Run { kind, number, path: hook.path().clone(), source },
            Self::Failed(status, stdout, stderr) => HookError::Failed { kind, number, status, stdout, stderr },
            Self::TimedOut(timeout) => HookError::TimedOut { kind, number, timeout },
        }
    }
}

fn run_one(hook: &Hook, state: &[u8], bundle: &Path, namespaces: Option<BorrowedFd<'_>>) -> Result<(), End> {
    // A file and not a pipe: one that reads nothing holds up nobody.
    let mut stdin = File::from(memfd_create("state", MemfdFlags::CLOEXEC).map_err(io::Error::from)?);
    stdin.write_all(state)?;
    rustix::fs::seek(&stdin, SeekFrom::Start(0)).map_err(io::Error::from)?;
    let (stdout, their_stdout) = pipe()?;
    let (stderr, their_stderr) = pipe()?;

    let mut command = Command::new(hook.path());
    if let Some((name, arguments)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(arguments);
    }
    command.env_clear().envs(hook.env().iter().flatten().filter_map(|entry| entry.split_once('=')));
    command.current_dir(bundle).stdin(stdin).stdout(their_stdout).stderr(their_stderr);
    if let Some(shadow) = namespaces {
        let shadow = shadow.try_clone_to_owned()?;
        let all = ThreadNameSpaceType::NETWORK
            | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
            | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
            | ThreadNameSpaceType::CONTROL_GROUP;
        // SAFETY: between fork and exec the closure makes one system call, and allocates nothing.
        unsafe {
            command.pre_exec(move || Ok(move_into_thread_name_spaces(shadow.as_fd(), all)?));
        }
    }
    let child = command.spawn()?;
    // Our copies of the pipes' other ends.
    drop(command);
    let timeout = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs);
    let mut outputs = [Output::of(stdout), Output::of(stderr)];
    match wait(child, &mut outputs, timeout)? {
        None => Err(End::TimedOut(timeout.unwrap_or_default())),
        Some(status) if status.success() => Ok(()),
        Some(status) => {
            let [stdout, stderr] = outputs.map(|output| output.text());
            Err(End::Failed(status, stdout, stderr))
        }
    }
}

fn pipe() -> io::Result<(OwnedFd, Stdio)> {
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((ours, theirs.into()))
}

/// One of a hook's outputs.
struct Output {
    pipe: File,
    kept: Vec<u8>,
    ended: bool,
}

impl Output {
    fn of(pipe: OwnedFd) -> Self {
        Self { pipe: pipe.into(), kept: Vec::new(), ended: false }
    }

    /// Takes all there is, and keeps the first of it.
    fn take(&mut self) {
        let mut buffer = [0; MAX_OUTPUT];
        loop {
            match self.pipe.read(&mut buffer) {
                Ok(0) => return self.ended = true,
                Ok(count) => {
                    let room = MAX_OUTPUT - self.kept.len();
                    self.kept.extend_from_slice(&buffer[..count.min(room)]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.ended = true,
            }
        }
    }

    fn text(self) -> String {
        String::from_utf8_lossy(&self.kept).trim_end().replace('\n', "\\n")
    }
}

/// Waits for a hook's end; `None` if it was killed for its timeout. What it left running may keep the outputs open: that is
/// not waited for.
fn wait(mut child: Child, outputs: &mut [Output; 2], timeout: Option<Duration>) -> io::Result<Option<ExitStatus>> {
    // What no clock counts up to is no deadline.
    let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let ended = {
            let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN)];
            fds.extend(outputs.iter().filter(|output| !output.ended).map(|o| PollFd::new(&o.pipe, PollFlags::IN)));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            rustix::io::retry_on_intr(|| poll(&mut fds, left.as_ref()))?;
            !fds[0].revents().is_empty()
        };
        outputs.iter_mut().for_each(Output::take);
        if ended {
            return child.wait().map(Some);
        }
        if left.is_some_and(|left| left.is_zero()) {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        let mut hook = Hook::default();
        hook.set_path("/bin/sh".into());
        hook.set_args(Some(vec!["sh".into(), "-c".into(), script.into()]));
        hook.set_env(Some(vec!["WORD=hooked".into()]));
        hook.set_timeout(timeout);
        hook
    }

    fn state() -> State {
        State::new("x", 77, Path::new("/tmp"), Path::new("/tmp/root"), None)
    }

    fn run_script(script: &str, timeout: Option<i64>) -> Result<(), String> {
        let mut hooks = Hooks::default();
        hooks.set_create_runtime(Some(vec![hook("exit 0", None), hook(script, timeout)]));
        run(&hooks, Point::Made, &state(), None).map_err(|error| error.to_string())
    }

    #[test]
    fn a_hook_has_the_state_its_environment_and_the_bundle_as_directory() {
        let script = r#"read -r state; [ "$WORD" = hooked ] && [ "$PWD" = /tmp ] && [ -z "$HOME" ] &&
            case $state in *'"id":"x"'*'"pid":77'*'"status":"creating"'*) exit 0;; esac; echo "$state" >&2; exit 1"#;
        run_script(script, None).unwrap();
    }

    #[test]
    fn a_hook_that_fails_is_named_with_what_it_said() {
        let error = run_script("echo out; echo err >&2; exit 3", None).unwrap_err();
        assert_eq!(error, "error running createRuntime hook #1: exit status: 3, stdout: out, stderr: err");
        let error = run_script("yes | head -c 1000000; exit 1", None).unwrap_err();
        assert!(error.len() < 10_000, "{}", error.len());
    }

    #[test]
    fn a_hook_is_killed_at_its_timeout_and_not_waited_for_longer_than_it_lives() {
        let began = Instant::now();
        let error = run_script("exec sleep 60", Some(1)).unwrap_err();
        assert_eq!(error, "error running createRuntime hook #1: hook ran past specified timeout of 1s");
        run_script("sleep 60 & exit 0", Some(30)).unwrap();
        run_script("exit 0", Some(i64::MAX)).unwrap();
        assert!(began.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn poststop_hooks_are_told_of_no_process() {
        let told: serde_json::Value = serde_json::from_slice(&told(&state(), Status::Stopped)).unwrap();
        assert_eq!(told["status"], "stopped");
        assert!(told.get("pid").is_none());
    }

    #[test]
    fn a_poststop_hook_that_fails_keeps_none_from_running() {
        let mark = std::env::temp_dir().join(format!("podhull-poststop-{}", std::process::id()));
        let mut hooks = Hooks::default();
        hooks.set_poststop(Some(vec![hook("exit 4", None), hook(&format!("touch {}", mark.display()), None)]));
        let error = run(&hooks, Point::Deleted, &state(), None).unwrap_err().to_string();
        assert!(error.starts_with("error running poststop hook #0: exit status: 4"), "{error}");
        std::fs::remove_file(&mark).unwrap();
    }

    #[test]
    fn only_what_comes_later_is_kept() {
        let mut hooks = Hooks::default();
        hooks.set_create_runtime(Some(vec![hook("", None)]));
        assert!(later(&hooks).is_none());
        hooks.set_poststop(Some(vec![hook("", None)]));
        assert!(later(&hooks).unwrap().create_runtime().is_none());
    }
}
