//! What a container uses, key for key as runc prints it on a host with cgroup v2 (its `types/events.go`): made from what the
//! agent says, which is bounded and checked here.

use std::collections::BTreeMap;

use podhull_protocol::{ContainerStatsResponse, CpuStats, IoDeviceStats, MemoryStats, Pressure, PressureLine};
use serde::Serialize;

/// Most lines of `memory.stat`, devices and page sizes that are passed on.
const MOST: usize = 1000;

/// Longest name of one, in bytes.
const LONGEST: usize = 100;

/// Nanoseconds in a microsecond: runc prints the former, cgroup v2 counts the latter.
const NANOSECONDS: u64 = 1000;

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// All of it.
#[derive(Serialize)]
pub struct Stats {
    cpu: Cpu,
    cpuset: CpuSet,
    memory: Memory,
    pids: Pids,
    blkio: Blkio,
    hugetlb: BTreeMap<String, Hugetlb>,
    intel_rdt: Empty,
    /// runc has them for veth pairs it made itself, which it does not.
    network_interfaces: Option<Empty>,
}

#[derive(Serialize)]
struct Empty {}

#[derive(Serialize)]
struct Cpu {
    usage: CpuUsage,
    throttling: Throttling,
    #[serde(skip_serializing_if = "Option::is_none")]
    psi: Option<Psi>,
}

/// In nanoseconds.
#[derive(Serialize)]
struct CpuUsage {
    #[serde(skip_serializing_if = "is_zero")]
    total: u64,
    kernel: u64,
    user: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Throttling {
    #[serde(skip_serializing_if = "is_zero")]
    periods: u64,
    #[serde(skip_serializing_if = "is_zero")]
    throttled_periods: u64,
    #[serde(skip_serializing_if = "is_zero")]
    throttled_time: u64,
}

/// cgroup v1 has these; version 2 leaves them all at 0.
#[derive(Default, Serialize)]
struct CpuSet {
    cpu_exclusive: u64,
    mem_hardwall: u64,
    mem_exclusive: u64,
    memory_migrate: u64,
    memory_spread_page: u64,
    memory_spread_slab: u64,
    memory_pressure: u64,
    sched_load_balance: u64,
    sched_relax_domain_level: i64,
}

#[derive(Serialize)]
struct Memory {
    #[serde(skip_serializing_if = "is_zero")]
    cache: u64,
    usage: MemoryEntry,
    swap: MemoryEntry,
    kernel: MemoryEntry,
    #[serde(rename = "kernelTCP")]
    kernel_tcp: MemoryEntry,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    raw: BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    psi: Option<Psi>,
    event_count: EventCount,
}

#[derive(Default, Serialize)]
struct MemoryEntry {
    limit: u64,
    #[serde(skip_serializing_if = "is_zero")]
    usage: u64,
    #[serde(skip_serializing_if = "is_zero")]
    max: u64,
    failcnt: u64,
}

#[derive(Serialize)]
struct EventCount {
    low: u64,
    high: u64,
    max: u64,
    oom: u64,
    oom_kill: u64,
    oom_group_kill: u64,
}

#[derive(Serialize)]
struct Pids {
    #[serde(skip_serializing_if = "is_zero")]
    current: u64,
    #[serde(skip_serializing_if = "is_zero")]
    limit: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Blkio {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_service_bytes_recursive: Vec<BlkioEntry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_serviced_recursive: Vec<BlkioEntry>,
    #[serde(skip_serializing_if = "Option::is_none")]
    psi: Option<Psi>,
}

#[derive(Serialize)]
struct BlkioEntry {
    #[serde(skip_serializing_if = "is_zero")]
    major: u64,
    #[serde(skip_serializing_if = "is_zero")]
    minor: u64,
    op: &'static str,
    #[serde(skip_serializing_if = "is_zero")]
    value: u64,
}

#[derive(Serialize)]
struct Hugetlb {
    #[serde(skip_serializing_if = "is_zero")]
    usage: u64,
    failcnt: u64,
}

#[derive(Serialize)]
struct Psi {
    some: PsiLine,
    full: PsiLine,
}

#[derive(Default, Serialize)]
struct PsiLine {
    avg10: f64,
    avg60: f64,
    avg300: f64,
    total: u64,
}

impl From<ContainerStatsResponse> for Stats {
    fn from(stats: ContainerStatsResponse) -> Self {
        let pids = stats.pids.unwrap_or_default();
        let hugetlb = stats.hugetlb.into_iter().filter(|huge| is_name(&huge.page_size)).take(MOST);
        Self {
            cpu: cpu(stats.cpu.unwrap_or_default()),
            cpuset: CpuSet::default(),
            memory: memory(stats.memory.unwrap_or_default()),
            // No limit is 0.
            pids: Pids { current: pids.current, limit: if pids.limit == u64::MAX { 0 } else { pids.limit } },
            blkio: blkio(&stats.io.devices, stats.io.pressure.as_ref()),
            hugetlb: hugetlb
                .map(|huge| (huge.page_size, Hugetlb { usage: huge.usage, failcnt: huge.limit_hits }))
                .collect(),
            intel_rdt: Empty {},
            network_interfaces: None,
        }
    }
}

/// A name as the kernel gives them.
fn is_name(name: &str) -> bool {
    name.len() <= LONGEST && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

fn cpu(cpu: CpuStats) -> Cpu {
    let nanoseconds = |microseconds: u64| microseconds.saturating_mul(NANOSECONDS);
    Cpu {
        usage: CpuUsage {
            total: nanoseconds(cpu.usage_usec),
            kernel: nanoseconds(cpu.system_usec),
            user: nanoseconds(cpu.user_usec),
        },
        throttling: Throttling {
            periods: cpu.periods,
            throttled_periods: cpu.throttled_periods,
            throttled_time: nanoseconds(cpu.throttled_usec),
        },
        psi: psi(cpu.pressure.as_ref()),
    }
}

fn memory(memory: MemoryStats) -> Memory {
    let events = memory.events.unwrap_or_default();
    let raw: BTreeMap<_, _> = memory.stat.into_iter().filter(|(name, _)| is_name(name)).take(MOST).collect();
    Memory {
        cache: raw.get("file").copied().unwrap_or_default(),
        usage: MemoryEntry { limit: memory.limit, usage: memory.usage, max: memory.peak, failcnt: events.max },
        // Memory and swap together, as version 1 counts; of the two peaks nothing follows for their sum.
        swap: MemoryEntry {
            limit: match memory.swap_limit {
                u64::MAX => u64::MAX,
                limit => limit.saturating_add(memory.limit),
            },
            usage: memory.swap_usage.saturating_add(memory.usage),
            ..MemoryEntry::default()
        },
        kernel: MemoryEntry::default(),
        kernel_tcp: MemoryEntry::default(),
        raw,
        psi: psi(memory.pressure.as_ref()),
        event_count: EventCount {
            low: events.low,
            high: events.high,
            max: events.max,
            oom: events.oom,
            oom_kill: events.oom_kill,
            oom_group_kill: events.oom_group_kill,
        },
    }
}

fn blkio(devices: &[IoDeviceStats], pressure: Option<&Pressure>) -> Blkio {
    let (mut bytes, mut operations) = (Vec::new(), Vec::new());
    for device in devices.iter().take(MOST) {
        let entry = |op, value| BlkioEntry { major: device.major.into(), minor: device.minor.into(), op, value };
        bytes.extend([
            entry("Read", device.read_bytes),
            entry("Write", device.written_bytes),
            entry("Discard", device.discarded_bytes),
        ]);
        operations.extend([
            entry("Read", device.reads),
            entry("Write", device.writes),
            entry("Discard", device.discards),
        ]);
    }
    Blkio { io_service_bytes_recursive: bytes, io_serviced_recursive: operations, psi: psi(pressure) }
}

fn psi(pressure: Option<&Pressure>) -> Option<Psi> {
    // JSON has no infinity.
    let percent = |average: f64| if average.is_finite() { average } else { 0.0 };
    let line = |line: Option<&PressureLine>| {
        line.map_or_else(PsiLine::default, |line| PsiLine {
            avg10: percent(line.avg10),
            avg60: percent(line.avg60),
            avg300: percent(line.avg300),
            total: line.total_usec,
        })
    };
    pressure.map(|pressure| Psi { some: line(pressure.some.as_ref()), full: line(pressure.full.as_ref()) })
}

#[cfg(test)]
mod tests {
    use podhull_protocol::{HugetlbStats, IoStats, MemoryEvents, PidsStats};
    use serde_json::{Value, json};

    use super::*;

    fn json_of(stats: ContainerStatsResponse) -> Value {
        serde_json::to_value(Stats::from(stats)).unwrap()
    }

    #[test]
    fn a_guest_that_says_nothing_has_used_nothing() {
        let entry = json!({"limit": 0, "failcnt": 0});
        assert_eq!(
            json_of(ContainerStatsResponse::default()),
            json!({
                "cpu": {"usage": {"kernel": 0, "user": 0}, "throttling": {}},
                "cpuset": {
                    "cpu_exclusive": 0, "mem_hardwall": 0, "mem_exclusive": 0, "memory_migrate": 0,
                    "memory_spread_page": 0, "memory_spread_slab": 0, "memory_pressure": 0, "sched_load_balance": 0,
                    "sched_relax_domain_level": 0,
                },
                "memory": {
                    "usage": entry, "swap": entry, "kernel": entry, "kernelTCP": entry,
                    "event_count": {"low": 0, "high": 0, "max": 0, "oom": 0, "oom_kill": 0, "oom_group_kill": 0},
                },
                "pids": {}, "blkio": {}, "hugetlb": {}, "intel_rdt": {}, "network_interfaces": null,
            })
        );
    }

    #[test]
    fn numbers_are_in_the_units_of_runc() {
        let line = PressureLine { avg10: 1.5, avg60: f64::INFINITY, total_usec: 7, ..Default::default() };
        let stats = ContainerStatsResponse {
            cpu: Some(CpuStats {
                usage_usec: 3,
                user_usec: 1,
                system_usec: u64::MAX,
                periods: 4,
                throttled_usec: 5,
                pressure: Some(Pressure { some: Some(line).into(), ..Default::default() }).into(),
                ..Default::default()
            })
            .into(),
            memory: Some(MemoryStats {
                usage: 100,
                limit: 200,
                peak: 150,
                swap_usage: 10,
                swap_limit: 20,
                events: Some(MemoryEvents { max: 6, oom_kill: 1, ..Default::default() }).into(),
                stat: [("file".to_owned(), 42), ("bad key".to_owned(), 1)].into(),
                ..Default::default()
            })
            .into(),
            pids: Some(PidsStats { current: 2, limit: u64::MAX, ..Default::default() }).into(),
            io: Some(IoStats {
                devices: vec![IoDeviceStats { major: 254, read_bytes: 9, writes: 1, ..Default::default() }],
                ..Default::default()
            })
            .into(),
            hugetlb: vec![HugetlbStats { page_size: "2MB".into(), limit_hits: 3, ..Default::default() }],
            ..Default::default()
        };
        let found = json_of(stats);
        assert_eq!(found["cpu"]["usage"], json!({"total": 3000, "user": 1000, "kernel": u64::MAX}));
        assert_eq!(found["cpu"]["throttling"], json!({"periods": 4, "throttledTime": 5000}));
        assert_eq!(found["cpu"]["psi"]["some"], json!({"avg10": 1.5, "avg60": 0.0, "avg300": 0.0, "total": 7}));
        assert_eq!(found["memory"]["usage"], json!({"limit": 200, "usage": 100, "max": 150, "failcnt": 6}));
        assert_eq!(found["memory"]["swap"], json!({"limit": 220, "usage": 110, "failcnt": 0}));
        assert_eq!((&found["memory"]["cache"], &found["memory"]["raw"]), (&json!(42), &json!({"file": 42})));
        assert_eq!(found["memory"]["event_count"]["oom_kill"], 1);
        assert_eq!(found["pids"], json!({"current": 2}));
        assert_eq!(
            found["blkio"]["ioServiceBytesRecursive"],
            json!([
                {"major": 254, "op": "Read", "value": 9}, {"major": 254, "op": "Write"}, {"major": 254, "op": "Discard"}
            ])
        );
        assert_eq!(found["blkio"]["ioServicedRecursive"][1], json!({"major": 254, "op": "Write", "value": 1}));
        assert_eq!(found["hugetlb"], json!({"2MB": {"failcnt": 3}}));
    }
}
