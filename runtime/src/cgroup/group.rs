//! A control group by its place, whatever else is known of what is in it.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::{Component, Path, PathBuf};
use std::time::Instant;

use podhull_limits::Resources;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{CgroupError, Patience, properties, systemd};
use crate::state::Process;

/// Where cgroup v2 is mounted, on every host that has it and nothing else.
pub(super) const MOUNT_POINT: &str = "/sys/fs/cgroup";

/// Extended attribute of a group that was made by us: the process it was made for.
const MARK: &str = "trusted.podhull.process";

/// A control group, of one of our processes. It is written down in `state.json` before it is made, so that whoever comes
/// later finds it; by its mark they see whether it was made, and is not another's at the same place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cgroup {
    /// Its place.
    #[serde(flatten)]
    pub(super) place: Place,
    /// The process it is made for.
    pub(super) process: Process,
}

/// Where a control group is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Place {
    /// Its place in the hierarchy, as `/proc/<pid>/cgroup` has it.
    pub(super) path: PathBuf,
    /// The unit it is the group of, if systemd makes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) unit: Option<String>,
}

impl Cgroup {
    /// Sets limits; what `limits` leaves out stays as it is. All are set, or none.
    pub fn set(&self, limits: &Resources) -> Result<(), CgroupError> {
        let directory = self.place.directory();
        if let Some(unit) = &self.place.unit {
            let current = |file: &str| fs::read_to_string(directory.join(file)).ok();
            // It would write what it knows of over what we write.
            systemd::set_properties(unit, properties::of(limits, current)?)?;
        }
        Ok(podhull_limits::apply(&directory, limits, podhull_limits::weight_on_a_line)?)
    }

    /// Moves a further process here, with all its threads.
    pub fn add(&self, pid: i32) -> Result<(), CgroupError> {
        let path = self.place.directory();
        write(&path.join("cgroup.procs"), &pid.to_string()).map_err(|source| CgroupError::Move { pid, path, source })
    }

    /// Its processes and those of the groups below it, none if it is gone.
    pub fn processes(&self) -> Result<Vec<i32>, CgroupError> {
        self.place.processes()
    }

    /// Processes that the kernel killed in it for lack of memory.
    pub fn out_of_memory(&self) -> u64 {
        let events = fs::read_to_string(self.place.directory().join("memory.events")).unwrap_or_default();
        value(&events, "oom_kill").unwrap_or_default()
    }

    /// The file of its limit of memory, to be written; `None` where memory is not controlled, or it is gone.
    pub fn memory_limit(&self) -> Option<File> {
        fs::OpenOptions::new().write(true).open(self.place.directory().join("memory.max")).ok()
    }

    /// Most bytes that may be used in it; see [`Place::memory`].
    pub fn memory(&self) -> Option<u64> {
        self.place.memory()
    }

    /// Makes it without systemd, with its process in it.
    pub(super) fn make(&self) -> Result<(), CgroupError> {
        let mut group = PathBuf::from(MOUNT_POINT);
        let mut made = Vec::new();
        let mut make = |name: Component<'_>| {
            hand_down_controllers(&group);
            group.push(name);
            match fs::create_dir(&group) {
                Ok(()) => made.push(group.clone()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(CgroupError::Make(group.clone(), error)),
            }
            Ok(())
        };
        let names = self.place.path.components().filter(|name| matches!(name, Component::Normal(_)));
        let result = { names }
            .try_for_each(&mut make)
            .and_then(|()| self.place.check_free())
            .and_then(|()| self.mark())
            .and_then(|()| self.add(self.process.pid));
        if result.is_err() {
            // The reason is the error to tell.
            made.iter().rev().take_while(|group| fs::remove_dir(group).is_ok()).for_each(drop);
        }
        result
    }

    /// Makes it a scope of systemd's, with its process in it.
    pub(super) fn start(&self, unit: &str, scope: systemd::Scope) -> Result<(), CgroupError> {
        self.place.check_free()?;
        systemd::start(unit, self.process.pid, scope)?;
        self.mark()
    }

    fn mark(&self) -> Result<(), CgroupError> {
        let path = self.place.directory();
        rustix::fs::setxattr(&path, MARK, self.process.to_string().as_bytes(), XattrFlags::empty())
            .map_err(|errno| CgroupError::Make(path, errno.into()))
    }

    fn is_marked(&self) -> bool {
        let expected = self.process.to_string();
        let mut found = [0; 64];
        let length = rustix::fs::getxattr(self.place.directory(), MARK, &mut found);
        length.is_ok_and(|length| &found[..length] == expected.as_bytes())
    }

    /// Kills what is in it, if it was made, and in the groups below it.
    pub fn kill(&self) -> Result<(), CgroupError> {
        if self.is_marked() { kill(&self.place.directory()) } else { Ok(()) }
    }

    /// Removes it, if it was made, and the groups below it; what is still in them is killed, and waited for.
    pub fn remove(&self, patience: Patience) -> Result<(), CgroupError> {
        if !self.is_marked() {
            return Ok(());
        }
        let directory = self.place.directory();
        let until = Instant::now() + patience.at_most(patience.processes);
        let mut stopped = None;
        loop {
            kill(&directory)?;
            if !wait_until_empty(&directory, until)? {
                return Err(CgroupError::StillThere { path: directory, seconds: patience.processes.as_secs() });
            }
            let stop = |unit| systemd::stop(unit, patience.at_most(patience.systemd));
            let stopped = stopped.get_or_insert_with(|| self.place.unit.as_deref().map_or(Ok(()), stop));
            match remove_tree(&directory) {
                // What is being executed at this moment came between: it is killed, and waited for, too.
                Err(CgroupError::Remove(_, error))
                    if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < until => {}
                removed => return removed.and(std::mem::replace(stopped, Ok(()))),
            }
        }
    }
}

impl Place {
    pub(super) fn directory(&self) -> PathBuf {
        Path::new(MOUNT_POINT).join(self.path.strip_prefix("/").unwrap_or(&self.path))
    }

    /// Most bytes that may be used in it: the least of its own `memory.max` and those of the groups above; none if no group has one.
    pub(super) fn memory(&self) -> Option<u64> {
        let directory = self.directory();
        let groups = directory.ancestors().take_while(|group| *group != Path::new(MOUNT_POINT));
        // "max", or no such file, is no limit.
        groups.filter_map(|group| fs::read_to_string(group.join("memory.max")).ok()?.trim().parse().ok()).min()
    }

    fn processes(&self) -> Result<Vec<i32>, CgroupError> {
        let mut processes = Vec::new();
        for group in tree(&self.directory())? {
            let path = group.join("cgroup.procs");
            match fs::read_to_string(&path) {
                Ok(text) => processes.extend(text.lines().filter_map(|pid| pid.parse::<i32>().ok())),
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(CgroupError::Read(path, error)),
            }
        }
        Ok(processes)
    }

    /// Whether it is not there, or nobody's.
    fn check_free(&self) -> Result<(), CgroupError> {
        let path = self.directory();
        let count = self.processes()?.len();
        if count > 0 {
            return Err(CgroupError::Occupied { path, count });
        }
        match fs::read_to_string(path.join("cgroup.freeze")) {
            Ok(text) if text.trim() == "1" => Err(CgroupError::Frozen(path)),
            _ => Ok(()),
        }
    }
}

/// Gives the children of a group every controller it has. What cannot be given, because the group has processes of its own
/// or is another's, is missed by the limit that needs it.
fn hand_down_controllers(group: &Path) {
    let available = fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
    let control = group.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&control).unwrap_or_default();
    for name in available.split_ascii_whitespace().filter(|name| !enabled.split_ascii_whitespace().any(|e| e == *name))
    {
        let _ = write(&control, &format!("+{name}"));
    }
}

/// The group and those below it, parents first.
fn tree(top: &Path) -> Result<Vec<PathBuf>, CgroupError> {
    let mut groups = vec![top.to_owned()];
    let mut next = 0;
    while let Some(group) = groups.get(next).cloned() {
        next += 1;
        let entries = match fs::read_dir(&group) {
            Ok(entries) => entries,
            Err(error) if is_gone(&error) => continue,
            Err(error) => return Err(CgroupError::Read(group, error)),
        };
        groups.extend(entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
    }
    Ok(groups)
}

/// Kills all processes of the group and of those below it, newborn ones included.
fn kill(group: &Path) -> Result<(), CgroupError> {
    match write(&group.join("cgroup.kill"), "1") {
        Err(error) if !is_gone(&error) => Err(CgroupError::Kill(group.to_owned(), error)),
        _ => Ok(()),
    }
}

/// Waits until no process is in the group and those below it; false if some still are at that time.
fn wait_until_empty(group: &Path, until: Instant) -> Result<bool, CgroupError> {
    let path = group.join("cgroup.events");
    let failed = |error| CgroupError::Read(path.clone(), error);
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if is_gone(&error) => return Ok(true),
        Err(error) => return Err(failed(error)),
    };
    loop {
        let mut text = String::new();
        match file.rewind().and_then(|()| file.read_to_string(&mut text)) {
            Ok(_) if value(&text, "populated") == Some(0) => return Ok(true),
            Ok(_) => {}
            Err(error) if is_gone(&error) => return Ok(true),
            Err(error) => return Err(failed(error)),
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let timeout = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&file, PollFlags::PRI)], timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
    }
}

fn remove_tree(top: &Path) -> Result<(), CgroupError> {
    for group in tree(top)?.into_iter().rev() {
        match fs::remove_dir(&group) {
            Err(error) if !is_gone(&error) => return Err(CgroupError::Remove(group, error)),
            _ => {}
        }
    }
    Ok(())
}

/// Without O_CREAT and O_TRUNC, and in one write: each is one change to the kernel.
fn write(path: &Path, value: &str) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

/// Whether a group was removed, before or while it was looked at.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// The value of a line `name value`.
fn value(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_group_is_found_again_as_it_was_written_down() {
        for text in [
            r#"{"path":"/a/b","process":{"pid":7,"startTime":8}}"#,
            r#"{"path":"/a.slice/x.scope","unit":"x.scope","process":{"pid":7,"startTime":8}}"#,
        ] {
            let group: Cgroup = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&group).unwrap(), text);
            assert_eq!(
                group.place.directory(),
                Path::new("/sys/fs/cgroup").join(&group.place.path.to_str().unwrap()[1..])
            );
        }
    }

    #[test]
    fn a_group_that_is_not_there_has_no_processes_and_is_as_good_as_removed() {
        let place = Place { path: "/no/such/group".into(), unit: None };
        assert!(place.check_free().is_ok());
        let group = Cgroup { place, process: Process { pid: 1, start_time: 1 } };
        assert!(group.processes().unwrap().is_empty());
        assert_eq!(group.out_of_memory(), 0);
        group.kill().unwrap();
        group.remove(Patience { processes: Duration::ZERO, systemd: Duration::ZERO, until: None }).unwrap();
        assert!(group.add(1).unwrap_err().to_string().contains("/sys/fs/cgroup/no/such/group"));
    }

    #[test]
    fn a_line_is_found_by_its_whole_name() {
        assert_eq!(value("populated 1\nfrozen 0\n", "populated"), Some(1));
        assert_eq!(value("oom_kill_x 2\n", "oom_kill"), None);
    }
}
