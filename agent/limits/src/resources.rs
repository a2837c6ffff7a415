//! `linux.resources`, `config-linux.md` from "Control groups" on.
//!
//! Every structure refuses fields it does not know, so that nothing a caller asked for can be dropped here.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

/// Callers written in Go say `null` for an empty list.
fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// All limits of a container.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Resources {
    /// Which devices it may use.
    #[serde(default, deserialize_with = "nullable")]
    pub devices: Vec<DeviceRule>,
    /// Memory.
    #[serde(default, deserialize_with = "nullable")]
    pub memory: Memory,
    /// Processors.
    #[serde(default, deserialize_with = "nullable")]
    pub cpu: Cpu,
    /// Processes.
    #[serde(default, deserialize_with = "nullable")]
    pub pids: Pids,
    /// Block devices.
    #[serde(rename = "blockIO", default, deserialize_with = "nullable")]
    pub block_io: BlockIo,
    /// Huge pages, by their size.
    #[serde(default, deserialize_with = "nullable")]
    pub hugepage_limits: Vec<HugepageLimit>,
    /// Of cgroup v1.
    #[serde(default, deserialize_with = "nullable")]
    pub network: Network,
    /// RDMA devices by their names.
    #[serde(default, deserialize_with = "nullable")]
    pub rdma: BTreeMap<String, Rdma>,
    /// Values of files by their names.
    #[serde(default, deserialize_with = "nullable")]
    pub unified: BTreeMap<String, String>,
}

impl Resources {
    /// What of them is about shares and parts of the host, and therefore also binds the machine that a container has for
    /// itself: of the others the guest takes care.
    pub fn of_host(&self) -> Self {
        let Cpu { shares, idle, cpus, mems, .. } = self.cpu.clone();
        Self {
            cpu: Cpu { shares, idle, cpus, mems, ..Default::default() },
            block_io: self.block_io.clone(),
            ..Default::default()
        }
    }
}

/// A rule about devices; where several speak of one, the last counts.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceRule {
    /// Whether it allows or denies.
    pub allow: bool,
    /// `a`, `c`, `b`; empty is `a`.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// All where none.
    pub major: Option<i64>,
    /// All where none.
    pub minor: Option<i64>,
    /// Of `r`, `w` and `m`.
    #[serde(default)]
    pub access: String,
}

/// Bytes; -1 is no limit, 0 is not set.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Memory {
    /// The most.
    pub limit: Option<i64>,
    /// What is left to it when the machine has little.
    pub reservation: Option<i64>,
    /// Memory and swap together, as cgroup v1 counted.
    pub swap: Option<i64>,
    /// Of cgroup v1.
    pub kernel: Option<i64>,
    /// Of cgroup v1.
    #[serde(rename = "kernelTCP")]
    pub kernel_tcp: Option<i64>,
    /// Of cgroup v1.
    pub swappiness: Option<u64>,
    /// Of cgroup v1.
    #[serde(rename = "disableOOMKiller")]
    pub disable_oom_killer: Option<bool>,
    /// True is the only thing cgroup v2 knows.
    pub use_hierarchy: Option<bool>,
    /// Whether a limit below what is in use is refused.
    pub check_before_update: Option<bool>,
}

/// Processors.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Cpu {
    /// Weight against others, as cgroup v1 counted.
    pub shares: Option<u64>,
    /// Microseconds per period; -1 is no limit.
    pub quota: Option<i64>,
    /// Microseconds of unused quota that may be used later.
    pub burst: Option<u64>,
    /// Microseconds.
    pub period: Option<u64>,
    /// Of cgroup v1.
    pub realtime_runtime: Option<i64>,
    /// Of cgroup v1.
    pub realtime_period: Option<u64>,
    /// Which, as a list such as `0-2,7`.
    pub cpus: Option<String>,
    /// Which nodes of memory, as a list.
    pub mems: Option<String>,
    /// 1: it gets what nobody else wants.
    pub idle: Option<i64>,
}

/// Processes and threads.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pids {
    /// The most.
    pub limit: Option<i64>,
}

/// Block devices.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BlockIo {
    /// 10 to 1000, against others.
    pub weight: Option<u16>,
    /// Of cgroup v1.
    pub leaf_weight: Option<u16>,
    /// The same for single devices.
    #[serde(default, deserialize_with = "nullable")]
    pub weight_device: Vec<WeightDevice>,
    /// Bytes read in a second.
    #[serde(default, deserialize_with = "nullable")]
    pub throttle_read_bps_device: Vec<ThrottleDevice>,
    /// Bytes written in a second.
    #[serde(default, deserialize_with = "nullable")]
    pub throttle_write_bps_device: Vec<ThrottleDevice>,
    /// Reads in a second.
    #[serde(rename = "throttleReadIOPSDevice", default, deserialize_with = "nullable")]
    pub throttle_read_iops_device: Vec<ThrottleDevice>,
    /// Writes in a second.
    #[serde(rename = "throttleWriteIOPSDevice", default, deserialize_with = "nullable")]
    pub throttle_write_iops_device: Vec<ThrottleDevice>,
}

/// The weight of one device.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WeightDevice {
    /// Its major number.
    pub major: i64,
    /// Its minor number.
    pub minor: i64,
    /// 10 to 1000, against others.
    pub weight: Option<u16>,
    /// Of cgroup v1.
    pub leaf_weight: Option<u16>,
}

/// The limit of one device.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThrottleDevice {
    /// Its major number.
    pub major: i64,
    /// Its minor number.
    pub minor: i64,
    /// In a second.
    pub rate: u64,
}

/// The limit of huge pages of one size.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HugepageLimit {
    /// Such as `2MB`.
    pub page_size: String,
    /// Bytes.
    pub limit: u64,
}

/// Of cgroup v1: none of it is there in v2.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Class of its packets.
    #[serde(rename = "classID")]
    pub class_id: Option<u32>,
    /// Priorities of its packets, by interface.
    #[serde(default, deserialize_with = "nullable")]
    pub priorities: Vec<Priority>,
}

/// The priority of packets that leave through one interface.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Priority {
    /// The interface.
    pub name: String,
    /// Its priority.
    pub priority: u32,
}

/// The limit of one RDMA device.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rdma {
    /// Handles.
    pub hca_handles: Option<u32>,
    /// Objects.
    pub hca_objects: Option<u32>,
}
