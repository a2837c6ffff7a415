//! Starting a program of a suite, and waiting for it, never without a deadline.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};

use crate::leaks::kill_leftovers;
use crate::{Outcome, ensure};

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
    // With a session and a terminal of its own, as a person's shell gives it: some tests are about terminals.
    let mut command = Command::new("setsid");
    command.args(["--ctty", "--wait"]).args(words).envs(environment.iter().copied()).current_dir(working);
    command.stdin(terminal()?).stdout(File::create(&stdout)?).stderr(File::create(&stderr)?);
    command.process_group(0);
    let mut child = command.spawn().map_err(|error| format!("cannot start {}: {error}", program.display()))?;
    let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
    let ready = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&Timespec::try_from(deadline)?));
    let ended = ready? != 0;
    if !ended {
        kill_leftovers();
    }
    let status = child.wait()?;
    let text = |path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let (stdout, stderr) = (text(&stdout)?, text(&stderr)?);
    ensure!(ended, "{} did not end within {} s: {stdout}{stderr}", program.display(), deadline.as_secs());
    let status = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(-1);
    Ok(Printed { status, stdout, stderr })
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
