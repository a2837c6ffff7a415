//! Starting a program of a suite, and waiting for it, never without a deadline.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, WaitOptions, WaitStatus, pidfd_open, wait as wait_for_any};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};

use crate::Outcome;
use crate::leaks::kill_leftovers;

/// How often orphans are reaped.
const TICK: Duration = Duration::from_millis(20);

/// What a program of a suite came to.
#[derive(Debug)]
pub struct Printed {
    /// Its exit status; 128 and the signal's number if a signal ended it.
    pub status: i32,
    /// What it wrote on standard output.
    pub stdout: String,
    /// What it wrote on standard error.
    pub stderr: String,
}

/// Runs a program to its end. What it prints goes to files in `directory`: containers that a test leaves in the background hold
/// its outputs open, so that a pipe would have no end.
pub fn run(
    words: &[&OsStr],
    environment: &[(&str, &OsStr)],
    working: &Path,
    directory: &Path,
    deadline: Duration,
) -> Outcome<Printed> {
    let program = words.first().ok_or("no program to start")?;
    let (stdout, stderr) = (directory.join("stdout"), directory.join("stderr"));
    // With mounts of its own: without a mount namespace, a container's root becomes that of everything here. And with a session and
    // a terminal of its own, as a person's shell gives it: some tests are about terminals.
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "slave", "setsid", "--ctty", "--wait"]).args(words);
    command.envs(environment.iter().copied()).current_dir(working);
    command.stdin(terminal()?).stdout(File::create(&stdout)?).stderr(File::create(&stderr)?);
    command.process_group(0);
    let child = command.spawn().map_err(|error| format!("cannot start {}: {error}", program.display()))?;
    let status = wait(Pid::from_child(&child), deadline)?;
    if status.is_none() {
        kill_leftovers();
    }
    let text = |path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let (stdout, stderr) = (text(&stdout)?, text(&stderr)?);
    let late = || format!("{} did not end within {} s: {stdout}{stderr}", program.display(), deadline.as_secs());
    let status = status.ok_or_else(late)?;
    let status = status.exit_status().or(status.terminating_signal().map(|signal| 128 + signal)).unwrap_or(-1);
    Ok(Printed { status, stdout, stderr })
}

/// The status of our only child, if it ends in time. Orphans below it come to us, and are reaped at once: a container's first
/// process does not end before each other one is gone.
fn wait(child: Pid, deadline: Duration) -> Outcome<Option<WaitStatus>> {
    let until = Instant::now() + deadline;
    let pidfd = pidfd_open(child, PidfdFlags::empty())?;
    let tick = Timespec::try_from(TICK)?;
    loop {
        match wait_for_any(WaitOptions::NOHANG)? {
            Some((pid, status)) if pid == child => return Ok(Some(status)),
            Some(_) => {}
            None if Instant::now() > until => return Ok(None),
            None => {
                poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&tick))?;
            }
        }
    }
}

/// A terminal in front of which somebody looks on, and types nothing.
fn terminal() -> Outcome<Stdio> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    unlockpt(&master)?;
    let slave: OwnedFd = ioctl_tiocgptpeer(&master, flags)?;
    // Ends when nobody has the other side any more.
    thread::spawn(move || {
        let (mut master, mut buffer) = (File::from(master), [0; 4096]);
        while master.read(&mut buffer).is_ok_and(|count| count > 0) {}
    });
    Ok(slave.into())
}
