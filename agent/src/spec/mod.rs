//! The part of an OCI `config.json` that the guest enforces.
//!
//! Every structure refuses fields it does not know, so that nothing a caller asked for can be dropped here: a field is
//! enforced by the agent, or carries [`HostSide`] because the host enforces it, or is an error that names it. Strings with
//! a closed vocabulary (capabilities, rlimits, mount options, system calls) stay strings: the code that enforces them knows
//! the words, and can say which one it does not know.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize as DeriveDeserialize;
use serde::de::{Deserialize, Deserializer, IgnoredAny};

pub use podhull_limits::{DeviceRule, Resources};

/// A value that is the host's to enforce; its content is of no interest in the guest.
#[derive(Debug, Clone, Default)]
pub struct HostSide;

impl<'de> Deserialize<'de> for HostSide {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer).map(|_| Self)
    }
}

/// Callers written in Go say `null` for an empty list.
fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// `config.json`, runtime-spec `config.md`.
#[derive(Debug, Clone, DeriveDeserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    pub oci_version: String,
    pub process: Process,
    pub root: Option<Root>,
    #[serde(default)]
    pub hostname: String,
    #[serde(default)]
    pub domainname: String,
    #[serde(default, deserialize_with = "nullable")]
    pub mounts: Vec<Mount>,
    #[serde(default, deserialize_with = "nullable")]
    pub hooks: Hooks,
    #[serde(default, deserialize_with = "nullable")]
    pub annotations: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "nullable")]
    pub linux: Linux,
}

#[derive(Debug, Clone, DeriveDeserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Root {
    /// The host's path; the guest's is in the request.
    #[serde(rename = "path")]
    pub _path: HostSide,
    #[serde(default)]
    pub readonly: bool,
}

#[derive(Debug, Clone, DeriveDeserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Process {
    #[serde(default)]
    pub terminal: bool,
    pub console_size: Option<ConsoleSize>,
    #[serde(default)]
    pub user: User,
    #[serde(default, deserialize_with = "nullable")]
    pub args: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    pub env: Vec<String>,
    pub cwd: PathBuf,
    pub capabilities: Option<Capabilities>,
    #[serde(default, deserialize_with = "nullable")]
    pub rlimits: Vec<Rlimit>,
    #[serde(default)]
    pub no_new_privileges: bool,
    /// Labels belong to the security modules of the host's kernel; the guest's has none.
    #[serde(rename = "apparmorProfile")]
    pub _apparmor_profile: Option<HostSide>,
    #[serde(rename = "selinuxLabel")]
    pub _selinux_label: Option<HostSide>,
    pub oom_score_adj: Option<i32>,
    pub scheduler: Option<Scheduler>,
    #[serde(rename = "ioPriority")]
    pub io_priority: Option<IoPriority>,
    #[serde(rename = "execCPUAffinity")]
    pub exec_cpu_affinity: Option<CpuAffinity>,
}

#[derive(Debug, Clone, DeriveDeserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ConsoleSize {
    pub height: u16,
    pub width: u16,
}

#[derive(Debug, Clone, Default, DeriveDeserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct User {
    #[serde(default)]
    pub uid: u32,
    #[serde(default)]
    pub gid: u32,
    pub umask: Option<u32>,
    #[serde(default, deserialize_with = "nullable")]
    pub additional_gids: Vec<u32>,
    /// Resolved to numbers by the caller; the specification has it for Windows alone.
    #[serde(rename = "username")]
    pub _username: Option<HostSide>,
}

#[derive(Debug, Clone, Default, DeriveDeserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Capabilities {
    #[serde(default, deserialize_with = "nullable")]
    pub bounding: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    pub effective: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    pub inheritable: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    pub permitted: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    pub ambient: Vec<String>,
}

#[derive(Debug, Clone, DeriveDeserialize)]
#[serde(deny_unknown_fields)]
pub struct Rlimit {
    #[serde(rename = "type")]
    pub kind: String,
    pub soft: u64,
    pub hard: u64,
}

#[derive(Debug, Clone, DeriveDeserialize)]
#[serde(deny_unknown_fields)]
pub struct Scheduler {
    pub policy: String,
    #[serde(default)]
    pub nice: i32,
    #[serde(default)]
    pub priority: i32,
    #[serde(default, deserialize_with = "nullable")]
    pub flags: Vec<String>,
    #[serde(default)]
    pub runtime: u64,
    #[serde(default)]
    pub deadline: u64,
    #[serde(default)]
    pub period: u64,
}

#[derive(Debug, Clone, DeriveDeserialize)]
#[serde(deny_unknown_fields)]
pub struct IoPriority {
    pub class: String,
    #[serde(default)]
    pub priority: u16,
}

#[derive(Debug, Clone, DeriveDeserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mount {
    pub destination: PathBuf,
    #[serde(rename = "type", default)]
    pub kind: String,
    #[serde(default)]
    pub source: String,
    #[serde(default, deserialize_with = "nullable")]
    pub options: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    pub uid_mappings: Vec<IdMapping>,
    #[serde(default, deserialize_with = "nullable")]
    pub gid_mappings: Vec<IdMapping>,
}

#[derive(Debug, Clone, Default, DeriveDeserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hooks {
    #[serde(rename = "prestart")]
    pub _prestart: Option<HostSide>,
    #[serde(rename = "createRuntime")]
    pub _create_runtime: Option<HostSide>,
    #[serde(rename = "createContainer")]
    pub _create_container: Option<HostSide>,
    #[serde(default, deserialize_with = "nullable")]
    pub start_container: Vec<Hook>,
    #[serde(rename = "poststart")]
    pub _poststart: Option<HostSide>,
    #[serde(rename = "poststop")]
    pub _poststop: Option<HostSide>,
}

#[derive(Debug, Clone, DeriveDeserialize)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    pub path: String,
    #[serde(default, deserialize_with = "nullable")]
    pub args: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    pub env: Vec<String>,
    /// Seconds.
    pub timeout: Option<u64>,
}

/// CPUs of processes that are executed in a running container, as lists (`0-3,7`).
#[derive(Debug, Clone, DeriveDeserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuAffinity {
    #[serde(default)]
    pub initial: String,
    #[serde(rename = "final", default)]
    pub last: String,
}

/// `config-linux.md`.
#[derive(Debug, Clone, Default, DeriveDeserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Linux {
    #[serde(default, deserialize_with = "nullable")]
    pub namespaces: Vec<Namespace>,
    #[serde(default, deserialize_with = "nullable")]
    pub uid_mappings: Vec<IdMapping>,
    #[serde(default, deserialize_with = "nullable")]
    pub gid_mappings: Vec<IdMapping>,
    #[serde(default, deserialize_with = "nullable")]
    pub time_offsets: BTreeMap<String, TimeOffset>,
    #[serde(default, deserialize_with = "nullable")]
    pub devices: Vec<Device>,
    #[serde(default)]
    pub cgroups_path: String,
    #[serde(default, deserialize_with = "nullable")]
    pub resources: Resources,
    #[serde(default)]
    pub rootfs_propagation: String,
    pub seccomp: Option<Seccomp>,
    #[serde(default, deserialize_with = "nullable")]
    pub sysctl: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "nullable")]
    pub masked_paths: Vec<PathBuf>,
    #[serde(default, deserialize_with = "nullable")]
    pub readonly_paths: Vec<PathBuf>,
    #[serde(rename = "mountLabel")]
    pub _mount_label: Option<HostSide>,
    pub personality: Option<Personality>,
}

#[derive(Debug, Clone, DeriveDeserialize)]
#[serde(deny_unknown_fields)]
pub struct Namespace {
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default)]
    pub path: String,
}

#[derive(Debug, Clone, PartialEq, Eq, DeriveDeserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IdMapping {
    #[serde(rename = "containerID")]
    pub container_id: u32,
    #[serde(rename = "hostID")]
    pub host_id: u32,
    pub size: u32,
}

#[derive(Debug, Clone, DeriveDeserialize)]
#[serde(deny_unknown_fields)]
pub struct TimeOffset {
    #[serde(default)]
    pub secs: i64,
    #[serde(default)]
    pub nanosecs: u32,
}

#[derive(Debug, Clone, DeriveDeserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    #[serde(rename = "type")]
    pub kind: String,
    pub path: PathBuf,
    #[serde(default)]
    pub major: i64,
    #[serde(default)]
    pub minor: i64,
    pub file_mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

#[derive(Debug, Clone, DeriveDeserialize)]
#[serde(deny_unknown_fields)]
pub struct Personality {
    pub domain: String,
    #[serde(default, deserialize_with = "nullable")]
    pub flags: Vec<String>,
}

#[derive(Debug, Clone, DeriveDeserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Seccomp {
    pub default_action: String,
    pub default_errno_ret: Option<u32>,
    #[serde(default, deserialize_with = "nullable")]
    pub architectures: Vec<String>,
    pub flags: Option<Vec<String>>,
    #[serde(default)]
    pub listener_path: String,
    #[serde(default)]
    pub listener_metadata: String,
    #[serde(default, deserialize_with = "nullable")]
    pub syscalls: Vec<SeccompRule>,
}

#[derive(Debug, Clone, DeriveDeserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SeccompRule {
    pub names: Vec<String>,
    pub action: String,
    pub errno_ret: Option<u32>,
    #[serde(default, deserialize_with = "nullable")]
    pub args: Vec<SeccompArg>,
}

#[derive(Debug, Clone, DeriveDeserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SeccompArg {
    pub index: u32,
    pub value: u64,
    #[serde(default)]
    pub value_two: u64,
    pub op: String,
}

impl Spec {
    /// Whether the specification asks for a namespace of this type.
    pub fn has_namespace(&self, kind: &str) -> bool {
        self.linux.namespaces.iter().any(|namespace| namespace.kind == kind)
    }
}

impl Process {
    /// A process executed in a running container: what it does not say is that of the container's own process, as with runc.
    pub fn within(mut self, container: &Self) -> Self {
        self.capabilities = self.capabilities.or_else(|| container.capabilities.clone());
        self.oom_score_adj = self.oom_score_adj.or(container.oom_score_adj);
        self.scheduler = self.scheduler.or_else(|| container.scheduler.clone());
        self.io_priority = self.io_priority.or_else(|| container.io_priority.clone());
        self.exec_cpu_affinity = self.exec_cpu_affinity.or_else(|| container.exec_cpu_affinity.clone());
        self.user.umask = self.user.umask.or(container.user.umask);
        if self.rlimits.is_empty() {
            self.rlimits = container.rlimits.clone();
        }
        self
    }
}

impl Linux {
    /// The guest's id of a container's user, and itself where no mapping covers it.
    pub fn guest_uid(&self, uid: u32) -> u32 {
        map_id(&self.uid_mappings, uid)
    }

    /// The guest's id of a container's group, and itself where no mapping covers it.
    pub fn guest_gid(&self, gid: u32) -> u32 {
        map_id(&self.gid_mappings, gid)
    }
}

fn map_id(mappings: &[IdMapping], id: u32) -> u32 {
    mappings
        .iter()
        .find_map(|m| (id.checked_sub(m.container_id)? < m.size).then(|| m.host_id.wrapping_add(id - m.container_id)))
        .unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_nobody_knows_is_an_error_that_names_it() {
        let json = r#"{"ociVersion":"1.2.0","process":{"cwd":"/","args":["a"]},"linux":{"wishes":[]}}"#;
        let error = serde_json::from_str::<Spec>(json).unwrap_err().to_string();
        assert!(error.contains("unknown field `wishes`"), "{error}");
    }

    #[test]
    fn null_is_an_empty_list() {
        let json = r#"{"ociVersion":"1.2.0","process":{"cwd":"/","args":null,"env":null},"mounts":null,"linux":null}"#;
        let spec: Spec = serde_json::from_str(json).unwrap();
        assert!(spec.process.args.is_empty() && spec.mounts.is_empty());
    }

    #[test]
    fn ids_are_mapped_inside_their_range_and_nowhere_else() {
        let mappings = [IdMapping { container_id: 10, host_id: 1000, size: 5 }];
        assert_eq!(map_id(&mappings, 10), 1000);
        assert_eq!(map_id(&mappings, 14), 1004);
        assert_eq!(map_id(&mappings, 15), 15);
        assert_eq!(map_id(&mappings, 9), 9);
    }
}
