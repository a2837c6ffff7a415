//! `state.json`: what is written down of a container.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use oci_spec::runtime::Hooks;
use serde::{Deserialize, Serialize};

use crate::cgroup::{Cgroup, CgroupError, Patience, Placement};
use crate::pod::{Demand, Sizing, Timeline, Users};

/// Version of `state.json`. Raised when a reader of the version before could misread it.
pub const VERSION: u32 = 1;

/// What `state.json` holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// [`VERSION`] of who wrote it.
    pub version: u32,
    /// Version of the specification.
    pub oci_version: String,
    /// The container.
    pub id: String,
    /// The process that stands for the container on the host.
    #[serde(flatten)]
    pub process: Process,
    /// As it was when this was written; [`super::Known::status`] knows better.
    pub status: Status,
    /// Whether its processes stand still, be it created or running.
    #[serde(default)]
    pub paused: bool,
    /// Directory of the bundle.
    pub bundle: PathBuf,
    /// Directory of its root file system.
    pub rootfs: PathBuf,
    /// When it was made, RFC 3339.
    pub created: String,
    /// Of the specification.
    #[serde(default)]
    pub annotations: Option<HashMap<String, String>>,
    /// Whether it stays when it has ended, until `delete`.
    #[serde(default)]
    pub kept: bool,
    /// The process of its machine.
    #[serde(default)]
    pub machine: Option<Machine>,
    /// The pod it is in, if the machine is another's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member_of: Option<Membership>,
    /// Its users, if it has a user namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<Users>,
    /// Hooks of the specification that come after the container was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hooks: Option<Hooks>,
    /// What it asks for of the size of its machine.
    #[serde(default)]
    pub demand: Demand,
    /// What was in force for that when the machine was made.
    #[serde(default)]
    pub sizing: Sizing,
    /// How its start went, as far as it got.
    #[serde(default, skip_serializing_if = "Timeline::is_empty")]
    pub timeline: Timeline,
    /// Its control group, and that of its machine's process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<Cgroup>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_cgroup: Option<Cgroup>,
    /// The descriptor at which its process hears that its program is ready, if somebody waits for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notify: Option<i32>,
}

/// A process that is not taken for another with its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since boot (`/proc/<pid>/stat`, field 22); 0 if it is not known.
    pub start_time: u64,
}

/// Whose machine a container is in that has none of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Name of the pod: the container that the machine was made for.
    pub pod: String,
    /// The process of its machine.
    pub machine: Machine,
}

/// A machine's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine(pub Process);

impl Machine {
    /// The process with a number.
    pub fn of(pid: i32) -> Self {
        Self(Process::of(pid))
    }
}

impl std::fmt::Display for Process {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} {}", self.pid, self.start_time)
    }
}

impl Process {
    /// The process with a number.
    pub fn of(pid: i32) -> Self {
        Self { pid, start_time: start_time(pid).unwrap_or(0) }
    }
}

/// Field 22, counted from behind the name, which may contain anything.
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Where in its life a container is (runtime-spec, `runtime.md`; `paused` is runc's).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Being made.
    Creating,
    /// Its program waits for `start`.
    Created,
    /// Its program runs.
    Running,
    /// Its processes stand still until `resume`.
    Paused,
    /// Its program has ended.
    Stopped,
}

impl std::fmt::Display for Status {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

impl State {
    /// The state of a container that this process makes now; `pid` is its own, as the host counts.
    pub fn new(id: &str, pid: i32, bundle: &Path, rootfs: &Path, annotations: Option<HashMap<String, String>>) -> Self {
        Self {
            version: VERSION,
            oci_version: crate::cli::OCI_VERSION.into(),
            id: id.into(),
            process: Process::of(pid),
            status: Status::Creating,
            paused: false,
            bundle: bundle.into(),
            rootfs: rootfs.into(),
            created: crate::log::rfc3339(SystemTime::now()),
            annotations,
            kept: false,
            machine: None,
            member_of: None,
            users: None,
            hooks: None,
            demand: Demand::default(),
            sizing: Sizing::default(),
            timeline: Timeline::default(),
            cgroup: None,
            machine_cgroup: None,
            notify: None,
        }
    }

    /// Notes where its control groups are to be.
    pub fn place(&mut self, placement: Option<&Placement>) {
        self.cgroup = placement.map(|placement| placement.container(self.process));
        let machine = self.machine.map(|machine| machine.0);
        self.machine_cgroup = placement.zip(machine).map(|(placement, machine)| placement.machine(machine));
    }

    /// Removes its control groups, as far as there are any; what is still in them is killed, and waited for.
    pub fn remove_cgroups(&self, patience: Patience) -> Result<(), CgroupError> {
        self.cgroups().try_for_each(|group| group.remove(patience))
    }

    /// Its control groups.
    pub fn cgroups(&self) -> impl Iterator<Item = &Cgroup> {
        self.cgroup.iter().chain(&self.machine_cgroup)
    }

    /// The pod the container is in; none while it is not known.
    pub fn pod(&self) -> Option<Membership> {
        let own = || self.machine.map(|machine| Membership { pod: self.id.clone(), machine });
        self.member_of.clone().or_else(own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_read_as_it_was_written() {
        let annotations = HashMap::from([("a".to_owned(), "b".to_owned())]);
        let mut state = State::new(
            "x",
            std::process::id().cast_signed(),
            Path::new("/bundle"),
            Path::new("/root"),
            Some(annotations),
        );
        state.machine = Some(Machine(Process { pid: 7, start_time: 8 }));
        let text = serde_json::to_string(&state).unwrap();
        let read: State = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), text);
        assert_eq!(read.machine, state.machine);
        assert!(read.process.start_time > 0);
    }
}
