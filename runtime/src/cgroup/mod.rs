//! Control groups on the host (cgroup v2).
//!
//! A container has one at its `cgroupsPath`, as with any runtime. In it are its shadow and those of the programs executed in
//! it, and its limits are written there, where callers read them (`docker stats`, cAdvisor). What is limited by them is in the
//! guest; a limit on the host that stops the shadow, such as one process at most, stops nothing else. In a pod of Kubernetes the group's
//! name has `podhull_` before the container's id, so that kubelet does not take what the shadow uses for what the container uses.
//!
//! The process of the pod's machine is in a group of its own beside the container's, `podhull_vm-<pid>`. Of the limits of the
//! container that it was made for, those about shares and parts of the host bind it too: weights, sets of CPUs and of memory
//! nodes, block devices, which the guest has not. The others do not: what bounds a machine are its memory and its vCPUs, and
//! the limits of their common parent (a Kubernetes pod's, a slice). Its name has no container's id in it, so that nobody who
//! looks for containers by their ids takes it for one.
//!
//! Devices are no matter of the host's groups: a shadow opens none.

mod group;
mod placement;
mod properties;
mod systemd;

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use group::Cgroup;
pub use placement::{Manager, Placement};
use podhull_limits::LimitError;
pub use properties::PROPERTY_ANNOTATION;

/// How long the removal of a control group may take.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For processes that were killed to end.
    pub processes: Duration,
    /// For systemd to stop the unit, where it is one's.
    pub systemd: Duration,
    /// When all of it ends, whatever the others say.
    pub until: Option<Instant>,
}

/// Before a group is given up.
pub const PATIENCE: Patience = Patience { processes: Duration::from_secs(10), systemd: systemd::DEADLINE, until: None };

impl Patience {
    fn at_most(self, most: Duration) -> Duration {
        self.until.map_or(most, |until| most.min(until.saturating_duration_since(Instant::now())))
    }
}

/// What cannot be done with a control group of the host. Callers match on some of the words, which are runc's.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// cgroup v1, or a mixture.
    #[error(
        "{0} needs cgroup v2, which is not what this host has at /sys/fs/cgroup: boot it with systemd.unified_cgroup_hierarchy=1"
    )]
    NoV2(&'static str),
    /// No systemd to ask.
    #[error("--systemd-cgroup: this host was not booted with systemd")]
    NoSystemd,
    /// Not of systemd's form.
    #[error(
        "linux.cgroupsPath: expected cgroupsPath to be of format \"slice:prefix:name\" for systemd cgroups, got {0:?} instead"
    )]
    NotSystemd(String),
    /// Of systemd's form, and no name of a unit.
    #[error("linux.cgroupsPath {0:?}: not a slice and the name of a scope in it")]
    Unit(String),
    /// Our own group cannot be named from the root of the hierarchy.
    #[error(
        "linux.cgroupsPath is not absolute, and this process's own control group, {0:?}, is not below the mounted ones"
    )]
    Outside(String),
    /// An annotation that systemd is to be told.
    #[error("annotation {0}: {1}")]
    Annotation(String, &'static str),
    /// Limits that cannot be, or were not, set.
    #[error(transparent)]
    Limits(#[from] LimitError),
    /// It is somebody else's.
    #[error("container's cgroup is not empty: {count} process(es) found in {path}: name another in linux.cgroupsPath")]
    Occupied {
        /// The group.
        path: PathBuf,
        /// How many.
        count: usize,
    },
    /// Nothing would run in it.
    #[error("container's cgroup unexpectedly frozen: {0}")]
    Frozen(PathBuf),
    /// A directory.
    #[error("cannot make the control group {0}: {1}")]
    Make(PathBuf, #[source] io::Error),
    /// A file.
    #[error("cannot read {0}: {1}")]
    Read(PathBuf, #[source] io::Error),
    /// A process.
    #[error("cannot move process {pid} to the control group {path}: {source}")]
    Move {
        /// Which.
        pid: i32,
        /// Where to.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Its processes.
    #[error("cannot kill the processes of the control group {0}: {1}")]
    Kill(PathBuf, #[source] io::Error),
    /// They do not end.
    #[error("processes are still in the control group {path} {seconds} s after they were killed")]
    StillThere {
        /// The group.
        path: PathBuf,
        /// How long it was waited.
        seconds: u64,
    },
    /// The directory.
    #[error("cannot remove the control group {0}: {1}")]
    Remove(PathBuf, #[source] io::Error),
    /// The way to systemd.
    #[error("cannot ask systemd over the system bus: {0}")]
    Bus(#[source] zbus::Error),
    /// No event loop to wait for it.
    #[error("cannot ask systemd: no event loop: {0}")]
    Events(#[source] io::Error),
    /// It says no.
    #[error("systemd: cannot {what} {unit}: {why}")]
    Systemd {
        /// To do what.
        what: &'static str,
        /// With which unit.
        unit: String,
        /// What it says.
        why: String,
    },
}
