//! What a run may leave behind, and must not: processes, mounts, cgroups, files, network and loop devices.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, wait};

use crate::{Outcome, ensure, processes};

/// The kernel takes mounts and cgroups of a process that was killed down in its own time, after it was reaped. What leaks stays.
const SETTLE: Duration = Duration::from_secs(20);

/// Where files may appear while containers run.
const WATCHED: [&str; 4] = ["/run", "/tmp", "/dev/shm", "/var/lib/podhull"];

/// What a runtime or its caller makes once, for all its containers.
const MADE_ONCE: [&str; 19] = [
    "/run/podhull",
    "/run/podhull/pods",
    "/run/runc",
    "/run/crun",
    "/run/youki",
    "/run/containers",
    "/run/containers/networks",
    "/run/containers/networks/aardvark.lock",
    "/run/containers/networks/firewall",
    "/run/containers/networks/firewall/firewall-driver",
    "/run/containers/networks/firewall/firewall-reload.lock",
    "/run/containers/networks/firewall/networks",
    "/run/containers/networks/firewall/ports",
    "/run/containers/networks/ipam.db",
    "/run/lock",
    "/run/systemd/transient",
    "/run/systemd/show-status",
    "/run/lock/netavark.lock",
    "/dev/shm/libpod_lock",
];

/// Everything that is there, at one moment.
#[derive(Debug, Default, Clone)]
pub struct Leaks(BTreeSet<String>);

impl Leaks {
    /// Looks around before a run.
    pub fn watch() -> Self {
        let mut there = BTreeSet::new();
        // The suite is the reaper of all its descendants, so a daemon that someone left cannot hide.
        for process in processes::descendants(std::process::id().cast_signed()) {
            there.insert(format!("process {} {}", process.pid, process.command));
        }
        let mut namespaces = BTreeSet::new();
        for process in processes::all() {
            let Ok(namespace) = fs::read_link(format!("/proc/{}/ns/mnt", process.pid)) else { continue };
            if namespaces.insert(namespace) {
                let table = fs::read_to_string(format!("/proc/{}/mountinfo", process.pid)).unwrap_or_default();
                // Options of the file system itself, the last field, change without a mount: cgroup2 does so.
                let mounts = table.lines().map(|line| line.rsplit_once(' ').map_or(line, |(mount, _)| mount));
                there.extend(mounts.map(|mount| format!("mount {mount}")));
            }
        }
        for place in WATCHED {
            files(Path::new(place), "file", &mut there);
        }
        directories(Path::new("/sys/fs/cgroup"), &mut there);
        for device in fs::read_dir("/sys/class/net").into_iter().flatten().flatten() {
            there.insert(format!("network device {}", device.file_name().display()));
        }
        for device in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
            if let Ok(file) = fs::read_to_string(device.path().join("loop/backing_file")) {
                there.insert(format!("loop device {} of {}", device.file_name().display(), file.trim()));
            }
        }
        Self(there)
    }

    /// What is there now and was not there before.
    pub fn since(&self) -> Vec<String> {
        Self::watch().0.difference(&self.0).cloned().collect()
    }

    /// Fails if anything is left that was not there before.
    pub fn check(&self) -> Outcome {
        self.check_without(&[])
    }

    /// The same where callers have made these directories once for themselves, those inside of others first. They are removed as soon
    /// as nothing is in them; if that does not come they stay, and are an error.
    pub fn check_without(&self, own: &[&str]) -> Outcome {
        let until = Instant::now() + SETTLE;
        loop {
            reap();
            for directory in own {
                let _ = fs::remove_dir(directory);
            }
            let left = self.since();
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > until {
                let mut text = format!("{} things left behind:", left.len());
                for thing in left.iter().take(20) {
                    let _ = write!(text, "\n    {thing}");
                }
                return Err(text.into());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Takes down what a failed test has left of processes, mounts, files and control groups, as far as that goes: it would be in the
    /// way of the next ones.
    pub fn take_down(&self) {
        let until = Instant::now() + SETTLE;
        // What ends may leave more, and takes its time.
        while !processes::descendants(std::process::id().cast_signed()).is_empty() && Instant::now() < until {
            kill_leftovers();
            thread::sleep(Duration::from_millis(20));
        }
        let key = |mount: &str| mount.splitn(6, ' ').map(str::to_owned).step_by(4).collect::<Vec<_>>();
        // A mount is the same by its number and its place; its options may change.
        let there: BTreeSet<_> = self.0.iter().filter_map(|thing| thing.strip_prefix("mount ")).map(key).collect();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for mount in table.lines().rev().map(key).filter(|mount| !there.contains(mount)) {
            if let [_, place] = &mount[..] {
                let _ = unmount(place, UnmountFlags::DETACH);
            }
        }
        loop {
            reap();
            let left = self.since();
            let paths = |kind| left.iter().rev().filter_map(move |thing| thing.strip_prefix(kind)).map(Path::new);
            // In reverse order what is in a directory comes before it.
            let removed: Vec<_> = paths("file ")
                .map(|path| if is_directory(path) { fs::remove_dir(path) } else { fs::remove_file(path) })
                .chain(paths("cgroup ").map(fs::remove_dir))
                .collect();
            if removed.iter().all(Result::is_ok) || Instant::now() > until {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Not of what a link leads to.
fn is_directory(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir())
}

/// Kills what a failed test left running.
pub fn kill_leftovers() {
    for process in processes::descendants(std::process::id().cast_signed()) {
        if let Some(pid) = Pid::from_raw(process.pid) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    reap();
}

/// Reaps orphans that came to the suite as their reaper; no child of its own is waited for elsewhere at this moment.
fn reap() {
    while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
}

fn files(directory: &Path, what: &str, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if !MADE_ONCE.iter().any(|made| path == Path::new(made)) {
            found.insert(format!("{what} {}", path.display()));
        }
        if is_directory {
            files(&path, what, found);
        }
    }
}

fn directories(directory: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.insert(format!("cgroup {}", entry.path().display()));
            directories(&entry.path(), found);
        }
    }
}

/// Open files of the whole host, and the bytes of memory that are available once caches are dropped.
#[derive(Debug, Clone, Copy)]
pub struct Totals {
    /// First field of /proc/sys/fs/file-nr.
    pub files: i64,
    /// MemAvailable, in KiB.
    pub available_kib: i64,
}

impl Totals {
    /// Drops caches and counts.
    pub fn now() -> Outcome<Self> {
        rustix::fs::sync();
        fs::write("/proc/sys/vm/drop_caches", "3")?;
        let text = fs::read_to_string("/proc/sys/fs/file-nr")?;
        let files = text.split_whitespace().next().ok_or("empty file-nr")?.parse()?;
        let text = fs::read_to_string("/proc/meminfo")?;
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).ok_or("no MemAvailable")?;
        let available_kib = line.trim().trim_end_matches(" kB").parse()?;
        ensure!(available_kib > 0, "MemAvailable is {available_kib}");
        Ok(Self { files, available_kib })
    }
}
