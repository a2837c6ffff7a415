//! What processes of a pod use on the host, from the files of `/proc`.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use super::pods::{Pod, TICKS};
use crate::state::{Process, start_time};

/// What a process is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The machine.
    Vmm,
    /// Stands for a container, or a program executed in one.
    Shadow,
    /// containerd speaks to it.
    Shim,
    /// A command in the foreground.
    Command,
}

impl Kind {
    /// As it is called in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vmm => "vmm",
            Self::Shadow => "shadow",
            Self::Shim => "shim",
            Self::Command => "command",
        }
    }
}

/// What processes of one kind use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Numbers {
    /// How many there are.
    pub processes: u64,
    /// Processor time; of a machine, its guest's too.
    pub cpu: Duration,
    /// Bytes in memory, all of those that are shared with other processes counted.
    pub resident: u64,
    /// Bytes in memory, of those shared only this process's part.
    pub proportional: u64,
    /// Open files.
    pub files: u64,
    /// Threads.
    pub threads: u64,
}

impl Numbers {
    /// A process that is there.
    fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // Counted from behind the name, which may contain anything: field 3 is the first.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let bytes = |name: &str| {
            let line = rollup.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let kib: Option<u64> = line.and_then(|line| line.split_ascii_whitespace().next()?.parse().ok());
            kib.unwrap_or_default() * 1024
        };
        Some(Self {
            processes: 1,
            cpu: Duration::from_millis((field(14)? + field(15)?) * 1000 / TICKS),
            resident: bytes("Rss"),
            proportional: bytes("Pss"),
            files: fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |fds| fds.count() as u64),
            threads: field(20)?,
        })
    }

    /// The sum of both.
    pub fn and(self, other: Self) -> Self {
        Self {
            processes: self.processes + other.processes,
            cpu: self.cpu + other.cpu,
            resident: self.resident + other.resident,
            proportional: self.proportional + other.proportional,
            files: self.files + other.files,
            threads: self.threads + other.threads,
        }
    }
}

/// What a pod's processes use, by what they are for.
pub fn of(pod: &Pod) -> BTreeMap<Kind, Numbers> {
    let mut pids = BTreeMap::new();
    for known in pod.containers() {
        if let Some(shadow) = there(known.state.process) {
            pids.insert(shadow, Kind::Shadow);
            if let Some((parent, kind)) = maker(shadow) {
                pids.insert(parent, kind);
            }
        }
        // Those of what is executed in it.
        let group = known.state.cgroup.as_ref().and_then(|group| group.processes().ok()).unwrap_or_default();
        pids.extend(group.into_iter().map(|pid| (pid, Kind::Shadow)));
    }
    pids.extend(pod.first.state.machine.and_then(|machine| there(machine.0)).map(|pid| (pid, Kind::Vmm)));
    let mut numbers: BTreeMap<Kind, Numbers> = BTreeMap::new();
    for (pid, kind) in pids {
        // One may end while we look.
        if let Some(of_one) = Numbers::of(pid) {
            let sum = numbers.entry(kind).or_default();
            *sum = sum.and(of_one);
        }
    }
    numbers
}

/// The process, if its number is still its own.
fn there(process: Process) -> Option<i32> {
    (start_time(process.pid) == Some(process.start_time)).then_some(process.pid)
}

/// Who has made a shadow, and stays: its shim, or a command in the foreground.
fn maker(shadow: i32) -> Option<(i32, Kind)> {
    let stat = fs::read_to_string(format!("/proc/{shadow}/stat")).ok()?;
    let parent: i32 = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()?;
    match fs::read_to_string(format!("/proc/{parent}/comm")).ok()?.trim_end() {
        "podhull-shim" => Some((parent, Kind::Shim)),
        "podhull" => Some((parent, Kind::Command)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_uses_what_it_does() {
        let pid = std::process::id().cast_signed();
        let found = Numbers::of(pid).unwrap();
        assert!(found.resident > 0 && found.proportional > 0 && found.files > 2 && found.threads >= 1, "{found:?}");
        assert_eq!(found.and(found).processes, 2);
        assert!(Numbers::of(i32::MAX).is_none());
        assert_eq!(there(Process { pid, start_time: 1 }), None);
    }
}
