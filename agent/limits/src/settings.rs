//! `linux.resources` as writes to files of cgroup v2.
//!
//! The specification speaks of cgroup v1; where the two count differently the conversion is the one every runtime uses, so
//! that a limit means the same here.

use std::borrow::Cow;

use crate::resources::{BlockIo, Cpu, HugepageLimit, Memory, Resources, ThrottleDevice};

/// A limit that cannot be enforced as given.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unenforceable {
    /// It is of cgroup v1 alone.
    #[error("linux.resources.{field}: cgroup v2 has no such control; leave it out")]
    NotInV2 {
        /// The field, below `linux.resources`.
        field: &'static str,
    },
    /// Less than the memory alone.
    #[error(
        "linux.resources.memory.swap: expected memory and swap together, at least memory.limit ({limit}), not {swap}"
    )]
    Swap {
        /// Memory.
        limit: i64,
        /// Memory and swap.
        swap: i64,
    },
    /// The sum is given, and the memory is not.
    #[error("linux.resources.memory.swap: {0} needs memory.limit")]
    SwapWithoutLimit(i64),
    /// It would kill processes.
    #[error(
        "linux.resources.memory.limit: {limit} is below the {current} bytes in use, and checkBeforeUpdate asks to refuse that"
    )]
    BelowUse {
        /// The limit.
        limit: i64,
        /// What is in use.
        current: u64,
    },
    /// Below -1.
    #[error("linux.resources.cpu.quota: expected microseconds or -1, not {0}")]
    Quota(i64),
    /// Out of range.
    #[error("linux.resources.blockIO.weight: expected 10 to 1000, not {0}")]
    BlockWeight(u16),
    /// Not a number and a unit.
    #[error("linux.resources.hugepageLimits: expected a page size such as 2MB, not {0:?}")]
    PageSize(String),
    /// Not a file, or not one of this group.
    #[error("linux.resources.unified: expected a file name of a control group, not {0:?}")]
    Unified(String),
    /// It does something with processes.
    #[error("linux.resources.unified: {0:?} is no limit; leave it out")]
    NoLimit(String),
    /// Of another form than the file has.
    #[error("linux.resources.unified: {file} cannot be {value:?}")]
    Value {
        /// The file.
        file: String,
        /// The value.
        value: String,
    },
}

/// One write.
#[derive(Debug, PartialEq, Eq)]
pub struct Setting {
    /// The first of these whose file exists; the last is the one that every kernel should have.
    pub choices: Vec<Choice>,
    /// Whether the value is what a kernel without the file does anyway.
    pub optional: bool,
    /// Whether the same comes again later, and may be refused as long as that has not.
    pub repeated: bool,
    /// The field of the specification.
    pub needed_for: &'static str,
}

/// A file and what to write to it.
#[derive(Debug, PartialEq, Eq)]
pub struct Choice {
    /// Its name in the group.
    pub file: Cow<'static, str>,
    /// The value.
    pub value: String,
}

/// How `cpu.shares` become `cpu.weight`.
pub type Weight = fn(u64) -> u64;

fn choice(file: impl Into<Cow<'static, str>>, value: impl ToString) -> Choice {
    Choice { file: file.into(), value: value.to_string() }
}

fn setting(file: impl Into<Cow<'static, str>>, value: impl ToString, needed_for: &'static str) -> Setting {
    Setting { choices: vec![choice(file, value)], optional: false, repeated: false, needed_for }
}

/// The writes, in an order the kernel takes. `current` reads a file of the group, for what a limit means only together with
/// another that stays as it is.
pub fn settings(
    limits: &Resources,
    weight: Weight,
    current: impl Fn(&str) -> Option<String>,
) -> Result<Vec<Setting>, Unenforceable> {
    if limits.network.class_id.is_some_and(|id| id != 0) {
        return Err(Unenforceable::NotInV2 { field: "network.classID" });
    }
    if !limits.network.priorities.is_empty() {
        return Err(Unenforceable::NotInV2 { field: "network.priorities" });
    }
    let mut settings = Vec::new();
    cpu(&limits.cpu, weight, &current, &mut settings)?;
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
            return Err(Unenforceable::Unified(file.clone()));
        }
        if file.starts_with("cgroup.") && !file.starts_with("cgroup.max.") {
            return Err(Unenforceable::NoLimit(file.clone()));
        }
        settings.push(setting(file.clone(), value, "linux.resources.unified"));
    }
    Ok(settings)
}

fn cpu(
    cpu: &Cpu,
    weight: Weight,
    current: impl Fn(&str) -> Option<String>,
    settings: &mut Vec<Setting>,
) -> Result<(), Unenforceable> {
    const BURST: &str = "linux.resources.cpu.burst";
    if cpu.realtime_runtime.is_some_and(|runtime| runtime != 0) {
        return Err(Unenforceable::NotInV2 { field: "cpu.realtimeRuntime" });
    }
    if cpu.realtime_period.is_some_and(|period| period != 0) {
        return Err(Unenforceable::NotInV2 { field: "cpu.realtimePeriod" });
    }
    if let Some(idle) = cpu.idle {
        settings.push(setting("cpu.idle", idle, "linux.resources.cpu.idle"));
    }
    if let Some(shares) = cpu.shares.filter(|shares| *shares != 0) {
        // An idle group has no weight to set.
        if cpu.idle != Some(1) {
            settings.push(setting("cpu.weight", weight(shares), "linux.resources.cpu.shares"));
        }
    }
    let quota = cpu.quota.filter(|quota| *quota != 0);
    let period = cpu.period.filter(|period| *period != 0);
    if let Some(quota) = quota.filter(|quota| *quota < -1) {
        return Err(Unenforceable::Quota(quota));
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
) -> Result<(), Unenforceable> {
    let not_in_v2 = |field| Err(Unenforceable::NotInV2 { field });
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
        return Err(Unenforceable::BelowUse { limit, current });
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
fn swap_of(swap: i64, limit: Option<i64>) -> Result<Option<i64>, Unenforceable> {
    match (swap, limit) {
        // Unlimited memory has unlimited swap, unless it is said.
        (0, Some(-1)) | (-1, _) => Ok(Some(-1)),
        (0, _) => Ok(None),
        (swap, None | Some(-1)) => Err(Unenforceable::SwapWithoutLimit(swap)),
        (swap, Some(limit)) if limit < 0 || swap < limit => Err(Unenforceable::Swap { limit, swap }),
        (swap, Some(limit)) => Ok(Some(swap - limit)),
    }
}

fn block_io(block_io: &BlockIo, settings: &mut Vec<Setting>) -> Result<(), Unenforceable> {
    const WEIGHT: &str = "linux.resources.blockIO.weight";
    let not_leaf = |leaf: Option<u16>| match leaf {
        None | Some(0) => Ok(()),
        Some(_) => Err(Unenforceable::NotInV2 { field: "blockIO.leafWeight" }),
    };
    not_leaf(block_io.leaf_weight)?;
    let mut weigh = |prefix: String, weight: u16| {
        if !(10..=1000).contains(&weight) {
            return Err(Unenforceable::BlockWeight(weight));
        }
        // The BFQ scheduler takes the weight as it is; the other's goes from 1 to 10000.
        let converted = 1 + (u64::from(weight) - 10) * 9999 / 990;
        let default = if prefix.is_empty() { "default " } else { &prefix };
        let choices = vec![
            choice("io.bfq.weight", format!("{prefix}{weight}")),
            choice("io.weight", format!("{default}{converted}")),
        ];
        settings.push(Setting { choices, optional: false, repeated: false, needed_for: WEIGHT });
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

fn hugepages(limit: &HugepageLimit, settings: &mut Vec<Setting>) -> Result<(), Unenforceable> {
    let digits = limit.page_size.trim_end_matches(|c: char| c.is_ascii_uppercase());
    let unit = &limit.page_size[digits.len()..];
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) || !matches!(unit, "KB" | "MB" | "GB") {
        return Err(Unenforceable::PageSize(limit.page_size.clone()));
    }
    for (kind, optional) in [("max", false), ("rsvd.max", true)] {
        let file = format!("hugetlb.{}.{kind}", limit.page_size);
        settings.push(Setting { optional, ..setting(file, limit.limit, "linux.resources.hugepageLimits") });
    }
    Ok(())
}

fn max_or(value: i64) -> String {
    if value < 0 { "max".into() } else { value.to_string() }
}

/// Shares 2 to 262144 (v1) as weight 1 to 10000 (v2), such that both defaults, 1024 and 100, meet: a quadratic in the
/// logarithms, as runc and crun have it since 2025.
pub fn weight_on_a_curve(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let log = (shares as f64).log2();
            10f64.powf((log * log + 125.0 * log) / 612.0 - 7.0 / 34.0).ceil() as u64
        }
    }
}

/// The same in a straight line: what runc 1.1 writes, and what callers that read the file take it for.
pub fn weight_on_a_line(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
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

    fn plan(json: &str) -> Result<Vec<(String, String)>, Unenforceable> {
        let limits: Resources = serde_json::from_str(json).unwrap();
        let last = |mut setting: Setting| setting.choices.pop().map(|choice| (choice.file.into_owned(), choice.value));
        Ok(settings(&limits, weight_on_a_curve, current)?.into_iter().filter_map(last).collect())
    }

    fn pairs(pairs: &[(&str, &str)]) -> Result<Vec<(String, String)>, Unenforceable> {
        Ok(pairs.iter().map(|(file, value)| (file.to_string(), value.to_string())).collect())
    }

    #[test]
    fn shares_and_weights_meet_at_both_ends_and_at_their_defaults() {
        assert_eq!([2, 1024, 262_144].map(weight_on_a_curve), [1, 100, 10_000]);
        assert_eq!([0, 2, 1024, 2048, 262_144, u64::MAX].map(weight_on_a_line), [1, 1, 39, 79, 10_000, 10_000]);
        for weight in [weight_on_a_curve, weight_on_a_line] {
            assert!((3..262_144).step_by(97).all(|shares| weight(shares) <= weight(shares + 97)));
        }
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
        assert_eq!(plan(r#"{"cpu":{"quota":-2}}"#), Err(Unenforceable::Quota(-2)));
    }

    #[test]
    fn swap_is_what_exceeds_memory() {
        assert_eq!(
            plan(r#"{"memory":{"limit":1000,"swap":1500,"reservation":500}}"#),
            pairs(&[("memory.swap.max", "500"), ("memory.max", "1000"), ("memory.low", "500")])
        );
        assert_eq!(plan(r#"{"memory":{"limit":-1}}"#), pairs(&[("memory.swap.max", "max"), ("memory.max", "max")]));
        assert_eq!(plan(r#"{"memory":{"limit":7,"swap":5}}"#), Err(Unenforceable::Swap { limit: 7, swap: 5 }));
        let unlimited: Resources = serde_json::from_str(r#"{"memory":{"swap":5}}"#).unwrap();
        assert_eq!(
            settings(&unlimited, weight_on_a_line, |_| Some("max\n".into())),
            Err(Unenforceable::SwapWithoutLimit(5))
        );
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
            Err(Unenforceable::BelowUse { limit: 4999, current: 5000 })
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
        let limits = serde_json::from_str(r#"{"blockIO":{"weight":500}}"#).unwrap();
        let [weight] = &settings(&limits, weight_on_a_line, current).unwrap()[..] else { panic!("not one") };
        assert_eq!(weight.choices, [choice("io.bfq.weight", "500"), choice("io.weight", "default 4950")]);
        assert_eq!(plan(r#"{"blockIO":{"weight":9}}"#), Err(Unenforceable::BlockWeight(9)));
    }

    #[test]
    fn huge_pages_are_limited_in_use_and_reserved() {
        assert_eq!(
            plan(r#"{"hugepageLimits":[{"pageSize":"2MB","limit":4194304}]}"#),
            pairs(&[("hugetlb.2MB.max", "4194304"), ("hugetlb.2MB.rsvd.max", "4194304")])
        );
        assert!(matches!(
            plan(r#"{"hugepageLimits":[{"pageSize":"../2MB","limit":1}]}"#),
            Err(Unenforceable::PageSize(_))
        ));
    }

    #[test]
    fn unified_names_files_of_this_group_alone() {
        assert_eq!(plan(r#"{"unified":{"memory.high":"1000"}}"#), pairs(&[("memory.high", "1000")]));
        for name in ["", "../cgroup.procs", "a/b.c", "memory"] {
            let json = format!(r#"{{"unified":{{"{name}":"1"}}}}"#);
            assert_eq!(plan(&json), Err(Unenforceable::Unified(name.into())));
        }
        assert_eq!(plan(r#"{"unified":{"cgroup.max.depth":"7"}}"#), pairs(&[("cgroup.max.depth", "7")]));
        for name in ["cgroup.procs", "cgroup.threads", "cgroup.kill", "cgroup.freeze", "cgroup.subtree_control"] {
            let json = format!(r#"{{"unified":{{"{name}":"1"}}}}"#);
            assert_eq!(plan(&json), Err(Unenforceable::NoLimit(name.into())));
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
            assert_eq!(plan(json), Err(Unenforceable::NotInV2 { field }));
        }
    }
}
