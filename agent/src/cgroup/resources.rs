//! `linux.resources` as writes to files of cgroup v2.
//!
//! The specification speaks of cgroup v1; where the two count differently the conversion is the one every runtime uses, so
//! that a limit means the same here.

use std::borrow::Cow;

use crate::spec::{BlockIo, Cpu, HugepageLimit, Memory, Resources, ThrottleDevice};

/// A resource that cannot be enforced as given.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResourcesError {
    #[error("linux.resources.{field}: cgroup v2 has no such control; leave it out")]
    NotInV2 { field: &'static str },
    #[error(
        "linux.resources.memory.swap: expected memory and swap together, at least memory.limit ({limit}), not {swap}"
    )]
    Swap { limit: i64, swap: i64 },
    #[error("linux.resources.memory.swap: {0} needs memory.limit")]
    SwapWithoutLimit(i64),
    #[error(
        "linux.resources.memory.limit: {limit} is below the {current} bytes in use, and checkBeforeUpdate asks to refuse that"
    )]
    BelowUse { limit: i64, current: u64 },
    #[error("linux.resources.cpu.quota: expected microseconds or -1, not {0}")]
    Quota(i64),
    #[error("linux.resources.blockIO.weight: expected 10 to 1000, not {0}")]
    BlockWeight(u16),
    #[error("linux.resources.hugepageLimits: expected a page size such as 2MB, not {0:?}")]
    PageSize(String),
    #[error("linux.resources.unified: expected a file name of a control group, not {0:?}")]
    Unified(String),
}

/// One write.
#[derive(Debug, PartialEq, Eq)]
pub struct Setting {
    /// The first of these files that exists.
    pub files: Vec<Cow<'static, str>>,
    pub value: String,
    /// Whether the value is what a kernel without the file does anyway.
    pub optional: bool,
    /// Whether the same comes again later, and may be refused as long as that has not.
    pub repeated: bool,
    /// The field of the specification.
    pub needed_for: &'static str,
}

fn setting(file: &'static str, value: impl ToString, needed_for: &'static str) -> Setting {
    Setting { files: vec![Cow::Borrowed(file)], value: value.to_string(), optional: false, repeated: false, needed_for }
}

/// The writes, in an order the kernel takes. `current` reads a file of the group, for what a limit means only together with
/// another that stays as it is.
pub fn settings(limits: &Resources, current: impl Fn(&str) -> Option<String>) -> Result<Vec<Setting>, ResourcesError> {
    if limits.network.class_id.is_some_and(|id| id != 0) {
        return Err(ResourcesError::NotInV2 { field: "network.classID" });
    }
    if !limits.network.priorities.is_empty() {
        return Err(ResourcesError::NotInV2 { field: "network.priorities" });
    }
    let mut settings = Vec::new();
    cpu(&limits.cpu, &current, &mut settings)?;
    memory(&limits.memory, &current, &mut settings)?;
    if let Some(limit) = limits.pids.limit.filter(|limit| *limit != 0) {
        settings.push(setting("pids.max", max_or(limit), "linux.resources.pids.limit"));
    }
    block_io(&limits.block_io, &mut settings)?;
    for limit in &limits.hugepage_limits {
        hugepages(limit, &mut settings)?;
    }
    for (device, limit) in &limits.rdma {
        let (handles, objects) = (limit.hca_handles, limit.hca_objects);
        let number = |limit: Option<u32>| limit.map_or("max".into(), |limit| limit.to_string());
        let value = format!("{device} hca_handle={} hca_object={}", number(handles), number(objects));
        settings.push(setting("rdma.max", value, "linux.resources.rdma"));
    }
    for (file, value) in &limits.unified {
        if file.is_empty() || file.contains('/') || !file.contains('.') || file.contains("..") {
            return Err(ResourcesError::Unified(file.clone()));
        }
        settings.push(Setting {
            files: vec![Cow::Owned(file.clone())],
            value: value.clone(),
            optional: false,
            repeated: false,
            needed_for: "linux.resources.unified",
        });
    }
    Ok(settings)
}

fn cpu(cpu: &Cpu, current: impl Fn(&str) -> Option<String>, settings: &mut Vec<Setting>) -> Result<(), ResourcesError> {
    const BURST: &str = "linux.resources.cpu.burst";
    if cpu.realtime_runtime.is_some_and(|runtime| runtime != 0) {
        return Err(ResourcesError::NotInV2 { field: "cpu.realtimeRuntime" });
    }
    if cpu.realtime_period.is_some_and(|period| period != 0) {
        return Err(ResourcesError::NotInV2 { field: "cpu.realtimePeriod" });
    }
    if let Some(idle) = cpu.idle {
        settings.push(setting("cpu.idle", idle, "linux.resources.cpu.idle"));
    }
    if let Some(shares) = cpu.shares.filter(|shares| *shares != 0) {
        // An idle group has no weight to set.
        if cpu.idle != Some(1) {
            settings.push(setting("cpu.weight", weight_of_shares(shares), "linux.resources.cpu.shares"));
        }
    }
    let quota = cpu.quota.filter(|quota| *quota != 0);
    let period = cpu.period.filter(|period| *period != 0);
    if let Some(quota) = quota.filter(|quota| *quota < -1) {
        return Err(ResourcesError::Quota(quota));
    }
    if let Some(burst) = cpu.burst {
        // More than the quota is refused, by whichever of the two comes first: a smaller one has to be before, a larger after.
        settings.push(Setting { repeated: true, ..setting("cpu.max.burst", burst, BURST) });
    }
    if quota.is_some() || period.is_some() {
        let there = || current("cpu.max").and_then(|text| Some(text.split_whitespace().next()?.to_owned()));
        let quota = quota.map(max_or).or_else(there).unwrap_or_else(|| "max".into());
        let value = match period {
            Some(period) => format!("{quota} {period}"),
            None => quota,
        };
        settings.push(setting("cpu.max", value, "linux.resources.cpu.quota and period"));
    }
    if let Some(burst) = cpu.burst {
        settings.push(setting("cpu.max.burst", burst, BURST));
    }
    for (file, list, field) in
        [("cpuset.cpus", &cpu.cpus, "linux.resources.cpu.cpus"), ("cpuset.mems", &cpu.mems, "linux.resources.cpu.mems")]
    {
        if let Some(list) = list.as_deref().filter(|list| !list.is_empty()) {
            settings.push(setting(file, list, field));
        }
    }
    Ok(())
}

fn memory(
    memory: &Memory,
    current: impl Fn(&str) -> Option<String>,
    settings: &mut Vec<Setting>,
) -> Result<(), ResourcesError> {
    let not_in_v2 = |field| Err(ResourcesError::NotInV2 { field });
    if memory.kernel.is_some_and(|kernel| kernel > 0) {
        return not_in_v2("memory.kernel");
    }
    if memory.kernel_tcp.is_some_and(|kernel| kernel > 0) {
        return not_in_v2("memory.kernelTCP");
    }
    if memory.swappiness.is_some() {
        return not_in_v2("memory.swappiness");
    }
    if memory.disable_oom_killer == Some(true) {
        return not_in_v2("memory.disableOOMKiller");
    }
    if memory.use_hierarchy == Some(false) {
        return not_in_v2("memory.useHierarchy");
    }
    let limit = memory.limit.filter(|limit| *limit != 0);
    if let (Some(true), Some(limit)) = (memory.check_before_update, limit)
        && let Some(current) = current("memory.current").and_then(|text| text.trim().parse().ok())
        && u64::try_from(limit).is_ok_and(|limit| limit < current)
    {
        return Err(ResourcesError::BelowUse { limit, current });
    }
    let there = || current("memory.max").and_then(|text| text.trim().parse().ok());
    let swap = memory.swap.unwrap_or_default();
    if let Some(swap) = swap_of(swap, if swap > 0 { limit.or_else(there) } else { limit })? {
        settings.push(Setting {
            optional: swap <= 0,
            ..setting("memory.swap.max", max_or(swap), "linux.resources.memory.swap")
        });
    }
    if let Some(limit) = limit {
        settings.push(setting("memory.max", max_or(limit), "linux.resources.memory.limit"));
    }
    if let Some(reservation) = memory.reservation.filter(|reservation| *reservation != 0) {
        settings.push(setting("memory.low", max_or(reservation), "linux.resources.memory.reservation"));
    }
    Ok(())
}

/// Swap alone, from memory and swap together.
fn swap_of(swap: i64, limit: Option<i64>) -> Result<Option<i64>, ResourcesError> {
    match (swap, limit) {
        // Unlimited memory has unlimited swap, unless it is said.
        (0, Some(-1)) | (-1, _) => Ok(Some(-1)),
        (0, _) => Ok(None),
        (swap, None | Some(-1)) => Err(ResourcesError::SwapWithoutLimit(swap)),
        (swap, Some(limit)) if limit < 0 || swap < limit => Err(ResourcesError::Swap { limit, swap }),
        (swap, Some(limit)) => Ok(Some(swap - limit)),
    }
}

fn block_io(block_io: &BlockIo, settings: &mut Vec<Setting>) -> Result<(), ResourcesError> {
    const WEIGHT: &str = "linux.resources.blockIO.weight";
    let not_leaf = |leaf: Option<u16>| match leaf {
        None | Some(0) => Ok(()),
        Some(_) => Err(ResourcesError::NotInV2 { field: "blockIO.leafWeight" }),
    };
    not_leaf(block_io.leaf_weight)?;
    let mut weigh = |prefix: String, weight: u16| {
        if !(10..=1000).contains(&weight) {
            return Err(ResourcesError::BlockWeight(weight));
        }
        // The BFQ scheduler takes the weight as it is; the other's goes from 1 to 10000.
        let converted = 1 + (u64::from(weight) - 10) * 9999 / 990;
        let default = if prefix.is_empty() { "default " } else { &prefix };
        settings.push(setting("io.weight", format!("{default}{converted}"), WEIGHT));
        Ok(())
    };
    if let Some(weight) = block_io.weight.filter(|weight| *weight != 0) {
        weigh(String::new(), weight)?;
    }
    for device in &block_io.weight_device {
        not_leaf(device.leaf_weight)?;
        if let Some(weight) = device.weight.filter(|weight| *weight != 0) {
            weigh(format!("{}:{} ", device.major, device.minor), weight)?;
        }
    }
    let mut throttle = |key: &str, devices: &[ThrottleDevice], field| {
        settings.extend(devices.iter().map(|ThrottleDevice { major, minor, rate }| {
            setting("io.max", format!("{major}:{minor} {key}={rate}"), field)
        }));
    };
    throttle("rbps", &block_io.throttle_read_bps_device, "linux.resources.blockIO.throttleReadBpsDevice");
    throttle("wbps", &block_io.throttle_write_bps_device, "linux.resources.blockIO.throttleWriteBpsDevice");
    throttle("riops", &block_io.throttle_read_iops_device, "linux.resources.blockIO.throttleReadIOPSDevice");
    throttle("wiops", &block_io.throttle_write_iops_device, "linux.resources.blockIO.throttleWriteIOPSDevice");
    Ok(())
}

fn hugepages(limit: &HugepageLimit, settings: &mut Vec<Setting>) -> Result<(), ResourcesError> {
    let digits = limit.page_size.trim_end_matches(|c: char| c.is_ascii_uppercase());
    let unit = &limit.page_size[digits.len()..];
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) || !matches!(unit, "KB" | "MB" | "GB") {
        return Err(ResourcesError::PageSize(limit.page_size.clone()));
    }
    for (kind, optional) in [("max", false), ("rsvd.max", true)] {
        settings.push(Setting {
            files: vec![Cow::Owned(format!("hugetlb.{}.{kind}", limit.page_size))],
            value: limit.limit.to_string(),
            optional,
            repeated: false,
            needed_for: "linux.resources.hugepageLimits",
        });
    }
    Ok(())
}

fn max_or(value: i64) -> String {
    if value < 0 { "max".into() } else { value.to_string() }
}

/// Shares 2 to 262144 (v1) as weight 1 to 10000 (v2), such that both defaults, 1024 and 100, meet: a quadratic in the
/// logarithms, as runc and crun have it since 2025.
fn weight_of_shares(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let log = (shares as f64).log2();
            10f64.powf((log * log + 125.0 * log) / 612.0 - 7.0 / 34.0).ceil() as u64
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn current(file: &str) -> Option<String> {
        match file {
            "memory.current" => Some("5000\n".into()),
            "memory.max" => Some("6000\n".into()),
            "cpu.max" => Some("30000 100000\n".into()),
            _ => None,
        }
    }

    fn plan(json: &str) -> Result<Vec<(String, String)>, ResourcesError> {
        let limits: Resources = serde_json::from_str(json).unwrap();
        Ok(settings(&limits, current)?.into_iter().map(|s| (s.files[0].clone().into_owned(), s.value)).collect())
    }

    fn pairs(pairs: &[(&str, &str)]) -> Result<Vec<(String, String)>, ResourcesError> {
        Ok(pairs.iter().map(|(file, value)| (file.to_string(), value.to_string())).collect())
    }

    #[test]
    fn shares_and_weights_meet_at_both_ends_and_at_their_defaults() {
        assert_eq!([2, 1024, 262_144].map(weight_of_shares), [1, 100, 10_000]);
        assert!((3..262_144).step_by(97).all(|shares| weight_of_shares(shares) <= weight_of_shares(shares + 97)));
    }

    #[test]
    fn cpu_limits_become_cpu_files() {
        assert_eq!(plan(r#"{"cpu":{"quota":10000,"period":100000}}"#), pairs(&[("cpu.max", "10000 100000")]));
        assert_eq!(plan(r#"{"cpu":{"quota":10000}}"#), pairs(&[("cpu.max", "10000")]));
        assert_eq!(plan(r#"{"cpu":{"quota":-1,"period":50000}}"#), pairs(&[("cpu.max", "max 50000")]));
        assert_eq!(
            plan(r#"{"cpu":{"shares":1024,"burst":5,"quota":7,"cpus":"0-1","mems":"0"}}"#),
            pairs(&[
                ("cpu.weight", "100"),
                ("cpu.max.burst", "5"),
                ("cpu.max", "7"),
                ("cpu.max.burst", "5"),
                ("cpuset.cpus", "0-1"),
                ("cpuset.mems", "0")
            ])
        );
        assert_eq!(plan(r#"{"cpu":{"idle":1,"shares":5}}"#), pairs(&[("cpu.idle", "1")]));
        assert_eq!(plan(r#"{"cpu":{"quota":-2}}"#), Err(ResourcesError::Quota(-2)));
    }

    #[test]
    fn swap_is_what_exceeds_memory() {
        assert_eq!(
            plan(r#"{"memory":{"limit":1000,"swap":1500,"reservation":500}}"#),
            pairs(&[("memory.swap.max", "500"), ("memory.max", "1000"), ("memory.low", "500")])
        );
        assert_eq!(plan(r#"{"memory":{"limit":-1}}"#), pairs(&[("memory.swap.max", "max"), ("memory.max", "max")]));
        assert_eq!(plan(r#"{"memory":{"limit":7,"swap":5}}"#), Err(ResourcesError::Swap { limit: 7, swap: 5 }));
        let unlimited: Resources = serde_json::from_str(r#"{"memory":{"swap":5}}"#).unwrap();
        assert_eq!(settings(&unlimited, |_| Some("max\n".into())), Err(ResourcesError::SwapWithoutLimit(5)));
    }

    #[test]
    fn what_is_left_out_counts_as_it_is() {
        assert_eq!(plan(r#"{"memory":{"swap":7000}}"#), pairs(&[("memory.swap.max", "1000")]));
        assert_eq!(plan(r#"{"memory":{"swap":-1}}"#), pairs(&[("memory.swap.max", "max")]));
        assert_eq!(plan(r#"{"cpu":{"period":50000}}"#), pairs(&[("cpu.max", "30000 50000")]));
    }

    #[test]
    fn a_limit_below_use_is_refused_only_on_request() {
        assert!(plan(r#"{"memory":{"limit":4999,"checkBeforeUpdate":false}}"#).is_ok());
        assert_eq!(
            plan(r#"{"memory":{"limit":4999,"checkBeforeUpdate":true}}"#),
            Err(ResourcesError::BelowUse { limit: 4999, current: 5000 })
        );
    }

    #[test]
    fn pids_are_unlimited_below_zero_and_untouched_at_zero() {
        assert_eq!(plan(r#"{"pids":{"limit":20}}"#), pairs(&[("pids.max", "20")]));
        assert_eq!(plan(r#"{"pids":{"limit":-1}}"#), pairs(&[("pids.max", "max")]));
        assert_eq!(plan(r#"{"pids":{"limit":0}}"#), pairs(&[]));
    }

    #[test]
    fn block_io_is_weighed_and_throttled() {
        assert_eq!(
            plan(
                r#"{"blockIO":{"weight":10,"weightDevice":[{"major":8,"minor":0,"weight":1000}],
                    "throttleReadBpsDevice":[{"major":8,"minor":0,"rate":600}],
                    "throttleWriteIOPSDevice":[{"major":8,"minor":16,"rate":300}]}}"#
            ),
            pairs(&[
                ("io.weight", "default 1"),
                ("io.weight", "8:0 10000"),
                ("io.max", "8:0 rbps=600"),
                ("io.max", "8:16 wiops=300")
            ])
        );
        assert_eq!(plan(r#"{"blockIO":{"weight":9}}"#), Err(ResourcesError::BlockWeight(9)));
    }

    #[test]
    fn huge_pages_are_limited_in_use_and_reserved() {
        assert_eq!(
            plan(r#"{"hugepageLimits":[{"pageSize":"2MB","limit":4194304}]}"#),
            pairs(&[("hugetlb.2MB.max", "4194304"), ("hugetlb.2MB.rsvd.max", "4194304")])
        );
        assert!(matches!(
            plan(r#"{"hugepageLimits":[{"pageSize":"../2MB","limit":1}]}"#),
            Err(ResourcesError::PageSize(_))
        ));
    }

    #[test]
    fn unified_names_files_of_this_group_alone() {
        assert_eq!(plan(r#"{"unified":{"memory.high":"1000"}}"#), pairs(&[("memory.high", "1000")]));
        for name in ["", "../cgroup.procs", "a/b.c", "memory"] {
            let json = format!(r#"{{"unified":{{"{name}":"1"}}}}"#);
            assert_eq!(plan(&json), Err(ResourcesError::Unified(name.into())));
        }
    }

    #[test]
    fn what_cgroup_v2_cannot_do_is_refused_by_name() {
        for (json, field) in [
            (r#"{"cpu":{"realtimeRuntime":1}}"#, "cpu.realtimeRuntime"),
            (r#"{"memory":{"swappiness":0}}"#, "memory.swappiness"),
            (r#"{"memory":{"disableOOMKiller":true}}"#, "memory.disableOOMKiller"),
            (r#"{"memory":{"kernel":5}}"#, "memory.kernel"),
            (r#"{"network":{"classID":5}}"#, "network.classID"),
        ] {
            assert_eq!(plan(json), Err(ResourcesError::NotInV2 { field }));
        }
    }
}
