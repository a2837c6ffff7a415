//! Control groups (cgroup v2) of the containers.
//!
//! All containers live below one group of the guest. `cgroupsPath` names a container's group below that; the groups on the
//! way hand every controller down, so that a parent's limit binds the sum of its children.

mod devices;
mod events;
mod freezer;
mod stats;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use podhull_limits::LimitError;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::spec::{DeviceRule, Resources};
pub use events::Watch;

/// How long killed processes may take to be gone. A process stuck in the kernel longer stays, and the error says so.
const KILL_DEADLINE: Duration = Duration::from_secs(30);

/// What cannot be done with a control group.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("linux.cgroupsPath {0:?}: expected a path without \"..\", or slice:prefix:name")]
    Path(String),
    /// runc's words.
    #[error("bad sub cgroup path: {0}")]
    SubPath(String),
    #[error("sub cgroup {path}: {source}")]
    Below { path: PathBuf, source: io::Error },
    #[error("make the control group {path}: {source}")]
    Make { path: PathBuf, source: io::Error },
    #[error(
        "{path}: the control group has processes already: it belongs to another container, or name another one in cgroupsPath"
    )]
    Occupied { path: PathBuf },
    #[error("read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("write {value:?} to {path}: {source}")]
    Write { path: PathBuf, value: String, source: io::Error },
    #[error(transparent)]
    Limits(#[from] LimitError),
    #[error(transparent)]
    Devices(#[from] devices::DevicesError),
    #[error("watch {path}: {source}")]
    Watch { path: PathBuf, source: io::Error },
    #[error("{path}: the processes were not {} within {} s", if *.frozen { "frozen" } else { "thawed" }, freezer::DEADLINE.as_secs())]
    Freeze { path: PathBuf, frozen: bool },
    #[error("linux.resources.devices: the rules of a container cannot be changed")]
    DevicesChanged,
    #[error("{path}: processes still there {} s after they were killed", KILL_DEADLINE.as_secs())]
    StillThere { path: PathBuf },
    #[error("remove the control group {path}: {source}")]
    Remove { path: PathBuf, source: io::Error },
}

impl CgroupError {
    /// Whether the specification is at fault, not the machine.
    pub fn is_invalid(&self) -> bool {
        match self {
            Self::Limits(error) => error.is_invalid(),
            Self::Write { source, .. } => source.kind() == io::ErrorKind::InvalidInput,
            other => matches!(
                other,
                Self::Path(_)
                    | Self::SubPath(_)
                    | Self::DevicesChanged
                    | Self::Below { .. }
                    | Self::Devices(devices::DevicesError::Rule(_))
            ),
        }
    }
}

/// The group that holds all containers.
pub struct Hierarchy {
    mount_point: PathBuf,
    top: PathBuf,
}

impl Hierarchy {
    /// Makes the group `name` in the hierarchy mounted at `mount_point`, with every controller there is.
    pub fn new(mount_point: impl AsRef<Path>, name: &str) -> Result<Self, CgroupError> {
        let mount_point = mount_point.as_ref();
        hand_down_controllers(mount_point)?;
        let top = mount_point.join(name);
        make(&top)?;
        hand_down_controllers(&top)?;
        Ok(Self { mount_point: mount_point.into(), top })
    }

    /// The group of what is in no container, as the agent itself.
    pub fn open_root(&self) -> Result<OwnedFd, CgroupError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(&self.mount_point, flags, Mode::empty())
            .map_err(|errno| CgroupError::Read { path: self.mount_point.clone(), source: errno.into() })
    }

    /// Makes a container's group, with its device rules. A group that exists already is taken if it is empty.
    pub fn create(&self, cgroups_path: &str, id: &str, limits: &Resources) -> Result<Cgroup, CgroupError> {
        let mut cgroup = Cgroup { mount_point: self.mount_point.clone(), path: self.top.clone(), made: Vec::new() };
        match cgroup.make(names(cgroups_path, id)?).and_then(|()| cgroup.prepare(limits)) {
            Ok(()) => Ok(cgroup),
            Err(error) => {
                cgroup.remove_made();
                Err(error)
            }
        }
    }
}

/// A container's group.
#[derive(Debug)]
pub struct Cgroup {
    mount_point: PathBuf,
    path: PathBuf,
    /// The groups this container made on the way, outermost first.
    made: Vec<PathBuf>,
}

impl Cgroup {
    fn make(&mut self, names: Vec<String>) -> Result<(), CgroupError> {
        for name in names {
            hand_down_controllers(&self.path)?;
            self.path.push(name);
            if make(&self.path)? {
                self.made.push(self.path.clone());
            }
        }
        Ok(())
    }

    fn prepare(&self, limits: &Resources) -> Result<(), CgroupError> {
        if !read(&self.path.join("cgroup.procs"))?.is_empty() {
            return Err(CgroupError::Occupied { path: self.path.clone() });
        }
        devices::Program::new(&limits.devices)?.attach(&self.open()?)?;
        Ok(())
    }

    /// Sets the limits. To be called when the init is ready for its program, not before: making a container is our work, and
    /// at a tenth of a processor would take ten times as long.
    pub fn set_limits(&self, limits: &Resources) -> Result<(), CgroupError> {
        Ok(podhull_limits::apply(&self.path, limits, podhull_limits::weight_on_a_curve)?)
    }

    /// Changes the limits of a container whose device rules are `devices`.
    pub fn update_limits(&self, limits: &Resources, devices: &[DeviceRule]) -> Result<(), CgroupError> {
        if !limits.devices.is_empty() && devices::Program::new(&limits.devices)? != devices::Program::new(devices)? {
            return Err(CgroupError::DevicesChanged);
        }
        self.set_limits(limits)
    }

    /// A descriptor of the group, for `CLONE_INTO_CGROUP`.
    pub fn open(&self) -> Result<OwnedFd, CgroupError> {
        rustix::fs::openat(CWD, &self.path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| CgroupError::Read { path: self.path.clone(), source: errno.into() })
    }

    /// The same of a group below.
    pub fn open_below(&self, below: &str) -> Result<OwnedFd, CgroupError> {
        let path = Path::new(below);
        if !path.components().all(|part| matches!(part, Component::Normal(_) | Component::RootDir | Component::CurDir))
        {
            return Err(CgroupError::SubPath(below.into()));
        }
        let below = path.strip_prefix("/").unwrap_or(path);
        if below.as_os_str().is_empty() {
            return self.open();
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        rustix::fs::openat2(self.open()?, below, flags, Mode::empty(), resolve)
            .map_err(|errno| CgroupError::Below { path: self.path.join(below), source: errno.into() })
    }

    /// The same of the group a process is in, if that is this one or one below.
    pub fn open_of(&self, pid: i32) -> Result<OwnedFd, CgroupError> {
        let file = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let text = read(&file)?;
        let group = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        match self.mount_point.join(group).strip_prefix(&self.path).map(Path::to_str) {
            Ok(Some(below)) => self.open_below(below),
            _ => Err(CgroupError::SubPath(group.into())),
        }
    }

    /// Gives the group to the root user of a container that has user and cgroup namespaces of its own, as far as
    /// `/sys/kernel/cgroup/delegate` says it may be given.
    pub fn delegate(&self, uid: u32) -> Result<(), CgroupError> {
        let own = |path: PathBuf| {
            std::os::unix::fs::chown(&path, Some(uid), None).map_err(|source| CgroupError::Make { path, source })
        };
        own(self.path.clone())?;
        let files = read(Path::new("/sys/kernel/cgroup/delegate"))?;
        for file in files.lines() {
            match own(self.path.join(file)) {
                Err(CgroupError::Make { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Count of processes killed for lack of memory; none without the controller.
    pub fn oom_kills(&self) -> u64 {
        let events = read(&self.path.join("memory.events")).unwrap_or_default();
        field(&events, "oom_kill").unwrap_or_default()
    }

    /// Watches for out-of-memory kills; none without the controller.
    pub fn watch_memory(&self) -> Result<Option<Watch>, CgroupError> {
        let path = self.path.join("memory.events");
        match Watch::new(&path) {
            Ok(watch) => Ok(Some(watch)),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(CgroupError::Watch { path, source }),
        }
    }

    /// Every process of the group and the groups below.
    pub fn processes(&self) -> Result<Vec<i32>, CgroupError> {
        let mut processes = Vec::new();
        for group in self.groups()? {
            processes.extend(read(&group.join("cgroup.procs"))?.lines().filter_map(|pid| pid.parse::<i32>().ok()));
        }
        Ok(processes)
    }

    /// Kills every process of the group and the groups below, newborn ones included.
    pub fn kill(&self) -> Result<(), CgroupError> {
        write(&self.path.join("cgroup.kill"), "1")
    }

    /// Kills what is left, waits for its end, and removes the groups.
    pub async fn remove(&self) -> Result<(), CgroupError> {
        if !self.path.exists() {
            return Ok(());
        }
        self.kill()?;
        let mut watch = self.watch_events()?;
        if !self.await_event(&mut watch, "populated", 0, KILL_DEADLINE).await? {
            return Err(CgroupError::StillThere { path: self.path.clone() });
        }
        self.remove_empty()
    }

    fn watch_events(&self) -> Result<Watch, CgroupError> {
        let path = self.path.join("cgroup.events");
        Watch::new(&path).map_err(|source| CgroupError::Watch { path, source })
    }

    /// Waits until a line of `cgroup.events` has a value; false if it has not in time.
    async fn await_event(
        &self,
        watch: &mut Watch,
        name: &str,
        value: u64,
        deadline: Duration,
    ) -> Result<bool, CgroupError> {
        let path = self.path.join("cgroup.events");
        let deadline = tokio::time::Instant::now() + deadline;
        while field(&read(&path)?, name) != Some(value) {
            match tokio::time::timeout_at(deadline, watch.changed()).await {
                Ok(changed) => changed.map_err(|source| CgroupError::Watch { path: path.clone(), source })?,
                Err(_) => return Ok(false),
            }
        }
        Ok(true)
    }

    fn remove_empty(&self) -> Result<(), CgroupError> {
        for group in self.groups()?.iter().rev() {
            std::fs::remove_dir(group).map_err(|source| CgroupError::Remove { path: group.clone(), source })?;
        }
        self.remove_made();
        Ok(())
    }

    /// Removes the groups that were made on the way, as far as they are not in use.
    fn remove_made(&self) {
        for group in self.made.iter().rev() {
            match std::fs::remove_dir(group) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                // Another container may be in it by now; then it is that one's.
                Err(_) => break,
            }
        }
    }

    /// The group and the groups below, parents first.
    fn groups(&self) -> Result<Vec<PathBuf>, CgroupError> {
        let mut groups = vec![self.path.clone()];
        let mut next = 0;
        while let Some(group) = groups.get(next).cloned() {
            next += 1;
            let unreadable = |source| CgroupError::Read { path: group.clone(), source };
            for entry in std::fs::read_dir(&group).map_err(unreadable)? {
                let entry = entry.map_err(unreadable)?;
                if entry.file_type().map_err(unreadable)?.is_dir() {
                    groups.push(entry.path());
                }
            }
        }
        Ok(groups)
    }
}

/// The names of the groups from the top down to the container's. `slice:prefix:name` is the systemd form of the path.
fn names(cgroups_path: &str, id: &str) -> Result<Vec<String>, CgroupError> {
    let bad = || CgroupError::Path(cgroups_path.to_owned());
    if let [slice, prefix, name] = cgroups_path.split(':').collect::<Vec<_>>()[..] {
        let mut names = slice_names(slice).ok_or_else(bad)?;
        if name.is_empty() || name.contains('/') || prefix.contains('/') {
            return Err(bad());
        }
        names.push(if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") });
        return Ok(names);
    }
    let path = if cgroups_path.trim_matches('/').is_empty() { id } else { cgroups_path };
    let mut names = Vec::new();
    for component in Path::new(path).components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => names.push(name.to_str().ok_or_else(bad)?.to_owned()),
            Component::ParentDir | Component::Prefix(_) => return Err(bad()),
        }
    }
    if names.is_empty() { Err(bad()) } else { Ok(names) }
}

/// `a-b.slice` is `a.slice/a-b.slice` (`systemd.slice(5)`).
fn slice_names(slice: &str) -> Option<Vec<String>> {
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.strip_suffix(".slice")?;
    if stem == "-" {
        return Some(Vec::new());
    }
    if stem.contains('/') || stem.split('-').any(|part| part.is_empty() || part == "..") {
        return None;
    }
    let ends = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
    Some(ends.map(|end| format!("{}.slice", &stem[..end])).collect())
}

/// Makes a group; false if it was there.
fn make(path: &Path) -> Result<bool, CgroupError> {
    match std::fs::create_dir(path) {
        Ok(()) => Ok(true),
        Err(source) if source.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(source) => Err(CgroupError::Make { path: path.into(), source }),
    }
}

/// Gives the children of a group every controller it has.
fn hand_down_controllers(path: &Path) -> Result<(), CgroupError> {
    let (available, control) = (read(&path.join("cgroup.controllers"))?, path.join("cgroup.subtree_control"));
    let enabled = read(&control)?;
    let missing: Vec<String> = available
        .split_ascii_whitespace()
        .filter(|name| !enabled.split_ascii_whitespace().any(|enabled| enabled == *name))
        .map(|name| format!("+{name}"))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    write(&control, &missing.join(" ")).map_err(|error| match error {
        CgroupError::Write { source, .. } if source.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
            CgroupError::Occupied { path: path.into() }
        }
        other => other,
    })
}

fn read(path: &Path) -> Result<String, CgroupError> {
    std::fs::read_to_string(path).map_err(|source| CgroupError::Read { path: path.into(), source })
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    use std::io::Write as _;
    // Without O_CREAT and O_TRUNC, and in one write: each is one change to the kernel.
    let file = std::fs::OpenOptions::new().write(true).open(path);
    file.and_then(|mut file| file.write_all(value.as_bytes())).map_err(|source| CgroupError::Write {
        path: path.into(),
        value: value.into(),
        source,
    })
}

/// A line `name value` of a flat keyed file.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_nests_and_none_is_the_id() {
        assert_eq!(names("/a/b", "id").unwrap(), ["a", "b"]);
        assert_eq!(names("a/./b/", "id").unwrap(), ["a", "b"]);
        assert_eq!(names("", "id").unwrap(), ["id"]);
        assert_eq!(names("/", "id").unwrap(), ["id"]);
        assert!(names("/a/../../b", "id").is_err());
    }

    #[test]
    fn the_systemd_form_becomes_its_path() {
        assert_eq!(
            names("machine-a.slice:podhull:x", "id").unwrap(),
            ["machine.slice", "machine-a.slice", "podhull-x.scope"]
        );
        assert_eq!(names(":podhull:x", "id").unwrap(), ["system.slice", "podhull-x.scope"]);
        assert_eq!(names("-.slice::x", "id").unwrap(), ["x.scope"]);
        assert!(names("a/b.slice:podhull:x", "id").is_err());
        assert!(names("a.slice:podhull:../x", "id").is_err());
    }

    #[test]
    fn a_flat_keyed_file_is_read_by_whole_names() {
        assert_eq!(field("low 0\noom 3\noom_kill 2\n", "oom_kill"), Some(2));
        assert_eq!(field("oom_kill_x 2\n", "oom_kill"), None);
    }
}
