//! Ending a container from outside, and removing what there is of it: nobody inside is asked.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use podhull_vmm::jail::Jail;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{Known, MAX_DOCUMENT, MOUNTS_FILE, TURN, TURN_FILE, find, open, open_pod, read, take_turn};
use crate::cgroup::{Cgroup, CgroupError, PATIENCE, Patience};
use crate::state::{GROUPS, Membership, PODS, Process, StateError, check_id, same_file};

/// How long a process may take to end that was killed.
const END: Duration = Duration::from_secs(10);

/// How often a directory is removed in which others make files meanwhile. Each of them makes two or three, once.
const MOST_MADE: u32 = 20;

/// How long it is waited for what takes time.
#[derive(Clone, Copy)]
enum Time {
    /// For each thing as long as it may take.
    Each,
    /// The same, but for all of them together not longer than until then.
    Until(Instant),
}

impl Time {
    fn at_most(self, most: Duration) -> Duration {
        match self {
            Self::Each => most,
            Self::Until(until) => most.min(until.saturating_duration_since(Instant::now())),
        }
    }

    fn of_groups(self) -> Patience {
        let until = match self {
            Self::Each => None,
            Self::Until(until) => Some(until),
        };
        Patience { until, ..PATIENCE }
    }
}

impl Known {
    /// Ends the container's processes, if they live, and removes all of it; false if somebody else did at the same time.
    pub fn destroy(self) -> Result<bool, StateError> {
        let time = Time::Each;
        end(self.state.process, time)?;
        // It sees its channel closed and ends by itself; but not if it is stopped.
        if let Some(machine) = self.state.machine {
            end(machine.0, time)?;
        }
        if let Some(member) = &self.state.member_of {
            member.leave(&self.root, &self.state.id)?;
        }
        self.state.remove_cgroups(time.of_groups())?;
        remove_from(&self.root, &self.state.id, &self.directory, time)
    }

    /// Kills the container's processes, its machine, and all else that is in its control groups; does not wait for their ends.
    pub fn kill(&self) -> Result<(), CgroupError> {
        let processes = [Some(self.state.process), self.state.machine.map(|machine| machine.0)];
        for process in processes.into_iter().flatten().filter_map(find) {
            let _ = pidfd_send_signal(&process, Signal::KILL);
        }
        self.state.cgroups().map(Cgroup::kill).fold(Ok(()), Result::and)
    }

    /// Removes as much of a container that was killed as can be until then, and tells why not the rest: nobody keeps that any more, so
    /// that who makes a container later sweeps it. False if somebody else removed it at the same time, or something is left.
    pub fn clear(mut self, until: Instant, mut warn: impl FnMut(&StateError)) -> bool {
        let (time, id) = (Time::Until(until), self.state.id.clone());
        let path = self.root.join(&id);
        let turn = match take_turn(&self.directory, &path, TURN_FILE, time.at_most(TURN)) {
            Err(StateError::Missing(_)) => return false,
            turn => turn.inspect_err(&mut warn),
        };
        if !same_file(&self.directory, &path) {
            return false;
        }
        // Who had its turn before may have changed it.
        self.state = read(&self.directory, &path).unwrap_or(self.state);
        self.state.kept = false;
        let mut done = |result: Result<(), StateError>| result.inspect_err(&mut warn).is_ok();
        done(self.write());
        let mut ended = done(end(self.state.process, time));
        if let Some(machine) = self.state.machine {
            ended &= done(end(machine.0, time));
        }
        if let Some(member) = &self.state.member_of {
            done(member.leave_in(&self.root, &id, time));
        }
        // By what is written down they are found again.
        ended &= done(self.state.remove_cgroups(time.of_groups()).map_err(StateError::from));
        turn.is_ok() && ended && done(remove_directories(&self.root, &id))
    }
}

impl Membership {
    /// Takes the files of a container out of its pod's machine.
    pub fn leave(&self, root: &Path, id: &str) -> Result<(), StateError> {
        self.leave_in(root, id, Time::Each)
    }

    fn leave_in(&self, root: &Path, id: &str, time: Time) -> Result<(), StateError> {
        let path = root.join(PODS).join(&self.pod);
        let turn = open_pod(root, &self.pod).and_then(|pod| take_turn(&pod, &path, MOUNTS_FILE, time.at_most(TURN)));
        let _turn = match turn {
            // Its directory goes first.
            Err(StateError::Missing(_)) => return Ok(()),
            turn => turn?,
        };
        match self.mounts()? {
            Some(mounts) => Jail::of_running(mounts.as_fd(), |share| share.detach(id))
                .map_err(|error| StateError::Mounts(self.pod.clone(), error.to_string())),
            None => Ok(()),
        }
    }
}

/// Removes a container whose state cannot be read, and ends the process that holds it.
pub fn remove(root: &Path, id: &str) -> Result<(), StateError> {
    remove_in(root, id, Time::Each)
}

/// The same, and waits no longer than until then.
pub fn remove_until(root: &Path, id: &str, until: Instant) -> Result<(), StateError> {
    remove_in(root, id, Time::Until(until))
}

fn remove_in(root: &Path, id: &str, time: Time) -> Result<(), StateError> {
    check_id(id)?;
    let Some(directory) = open(&root.join(id)) else { return Ok(()) };
    if let Some(holder) = holder(&directory) {
        kill(&holder, "that holds the container", time)?;
    }
    for group in read_groups(&directory) {
        group.remove(time.of_groups())?;
    }
    remove_from(root, id, &directory, time).map(drop)
}

/// Removes what is left of a container that no process holds any more. Another that does the same is waited for, and what
/// somebody makes under the same id meanwhile is left alone; false if there was nothing left to remove.
fn remove_from(root: &Path, id: &str, directory: &OwnedFd, time: Time) -> Result<bool, StateError> {
    let path = root.join(id);
    let _turn = match take_turn(directory, &path, TURN_FILE, time.at_most(TURN)) {
        Ok(turn) => turn,
        Err(StateError::Missing(_)) => return Ok(false),
        Err(error) => return Err(error),
    };
    if !same_file(directory, &path) {
        return Ok(false);
    }
    remove_directories(root, id).map(|()| true)
}

/// Removes the directories of a container.
fn remove_directories(root: &Path, id: &str) -> Result<(), StateError> {
    [root.join(PODS).join(id), root.join(id)]
        .into_iter()
        .try_for_each(|path| remove_all(&path).map_err(|error| StateError::Write(path, error)))
}

/// Removes a directory with all that is in it. Who has it open makes files in it until the moment it is gone: to take turns, or to count
/// calls.
fn remove_all(path: &Path) -> io::Result<()> {
    let mut made = 0;
    loop {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty && made < MOST_MADE => made += 1,
            removed => return removed,
        }
    }
}

/// The control groups of a container whose document says nothing.
fn read_groups(directory: &OwnedFd) -> Vec<Cgroup> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(file) = rustix::fs::openat(directory, GROUPS, flags, Mode::empty()) else { return Vec::new() };
    serde_json::from_reader(fs::File::from(file).take(MAX_DOCUMENT)).unwrap_or_default()
}

/// The shadow that holds a container of which nothing else is known: it has locked its directory. Not another command that
/// sweeps it.
fn holder(directory: &OwnedFd) -> Option<OwnedFd> {
    let stat = rustix::fs::fstat(directory).ok()?;
    let (major, minor) = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let file = format!("{major:02x}:{minor:02x}:{}", stat.st_ino);
    let find = || holder_in(&fs::read_to_string("/proc/locks").ok()?, &file);
    let pid = find()?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    if name.trim_end() != crate::pod::SHADOW_NAME {
        return None;
    }
    let process = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    // After the descriptor is open its number cannot become another's.
    (find() == Some(pid)).then_some(process)
}

/// The process with an exclusive flock on a file, in the words of `/proc/locks`: `1: FLOCK ADVISORY WRITE 77 00:18:5 0 EOF`.
fn holder_in(locks: &str, file: &str) -> Option<i32> {
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let found = fields.get(1..4) == Some(&["FLOCK", "ADVISORY", "WRITE"]) && fields.get(5) == Some(&file);
        if found { fields.get(4)?.parse().ok() } else { None }
    })
}

/// Ends a process, if it still is the one that was written down.
fn end(process: Process, time: Time) -> Result<(), StateError> {
    let Some(pidfd) = find(process) else { return Ok(()) };
    match kill(&pidfd, process.pid, time) {
        Err(StateError::DoesNotEnd(_)) if is_exiting(process.pid) => Ok(()),
        ended => ended,
    }
}

/// Whether a process has let go of all it had, and waits for others to be reaped: the first of a pid namespace ends when
/// nothing is left of all that were executed in it, and that is up to their parents.
fn is_exiting(pid: i32) -> bool {
    /// `PF_EXITING` of `linux/sched.h`.
    const EXITING: u64 = 4;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Field 9, counted from behind the name, which may contain anything.
    let flags = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(6)?.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & EXITING != 0)
}

/// Kills a process, and waits for its end.
fn kill(pidfd: &OwnedFd, which: impl std::fmt::Display, time: Time) -> Result<(), StateError> {
    let _ = pidfd_send_signal(pidfd, Signal::KILL);
    let time = Timespec::try_from(time.at_most(END)).ok();
    match rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(pidfd, PollFlags::IN)], time.as_ref())) {
        Ok(0) => Err(StateError::DoesNotEnd(which.to_string())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::thread;

    use super::super::open_lock;
    use super::*;

    /// The first container of a pod is removed, and another one at the same time.
    #[test]
    fn who_takes_a_turn_at_last_is_in_nobody_s_way() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("pod");
        for _ in 0..2000 {
            fs::create_dir(&path).unwrap();
            let (pod, begin) = (open(&path).unwrap(), Barrier::new(2));
            thread::scope(|scope| {
                scope.spawn(|| {
                    begin.wait();
                    for file in [TURN_FILE, MOUNTS_FILE, "calls"] {
                        let _ = open_lock(&pod, file);
                    }
                });
                begin.wait();
                remove_all(&path).unwrap();
            });
            assert!(!path.exists());
        }
    }
}
