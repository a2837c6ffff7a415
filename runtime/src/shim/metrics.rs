//! What a container uses, as containerd wants it: numbers of cgroup v2, which are the guest's.

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
};
use containerd_shim_protos::protobuf::MessageField;
use podhull_protocol::{ContainerStatsResponse, CpuStats, MemoryStats, Pressure, PressureLine};

/// Most devices and page sizes that are passed on.
const MOST: usize = 1000;

/// The numbers of a container. The guest is not believed that there are more than some of anything.
pub fn of(stats: ContainerStatsResponse) -> Metrics {
    let pids = stats.pids.unwrap_or_default();
    let memory = stats.memory.unwrap_or_default();
    let events = memory.events.clone().unwrap_or_default();
    let io = stats.io.unwrap_or_default();
    let hugetlb = stats.hugetlb.into_iter().take(MOST).map(|huge| HugeTlbStat {
        current: huge.usage,
        max: huge.limit,
        pagesize: huge.page_size.chars().filter(char::is_ascii_alphanumeric).take(16).collect(),
        failcnt: huge.limit_hits,
        ..Default::default()
    });
    let usage = io.devices.iter().take(MOST).map(|device| IOEntry {
        major: device.major.into(),
        minor: device.minor.into(),
        rbytes: device.read_bytes,
        wbytes: device.written_bytes,
        rios: device.reads,
        wios: device.writes,
        ..Default::default()
    });
    Metrics {
        pids: MessageField::some(PidsStat {
            current: pids.current,
            // No limit is 0, as with containerd's shim for runc.
            limit: if pids.limit == u64::MAX { 0 } else { pids.limit },
            ..Default::default()
        }),
        cpu: MessageField::some(cpu(&stats.cpu.unwrap_or_default())),
        memory: MessageField::some(memory_of(&memory)),
        io: MessageField::some(IOStat { usage: usage.collect(), psi: psi(io.pressure.as_ref()), ..Default::default() }),
        hugetlb: hugetlb.collect(),
        memory_events: MessageField::some(MemoryEvents {
            low: events.low,
            high: events.high,
            max: events.max,
            oom: events.oom,
            oom_kill: events.oom_kill,
            oom_group_kill: events.oom_group_kill,
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// What the containers of a pod use together; there is no limit if one of them has none.
pub fn together(all: impl IntoIterator<Item = ContainerStatsResponse>) -> ContainerStatsResponse {
    let mut sum = ContainerStatsResponse::new();
    let add = |sum: &mut u64, more: u64| *sum = sum.saturating_add(more);
    for stats in all {
        let (cpu, more) = (sum.cpu.mut_or_insert_default(), stats.cpu.unwrap_or_default());
        add(&mut cpu.usage_usec, more.usage_usec);
        add(&mut cpu.user_usec, more.user_usec);
        add(&mut cpu.system_usec, more.system_usec);
        let (memory, more) = (sum.memory.mut_or_insert_default(), stats.memory.unwrap_or_default());
        add(&mut memory.usage, more.usage);
        add(&mut memory.limit, more.limit);
        add(&mut memory.swap_usage, more.swap_usage);
        add(&mut memory.swap_limit, more.swap_limit);
        for (name, value) in more.stat.into_iter().take(MOST) {
            if memory.stat.len() < MOST || memory.stat.contains_key(&name) {
                add(memory.stat.entry(name).or_default(), value);
            }
        }
        let (pids, more) = (sum.pids.mut_or_insert_default(), stats.pids.unwrap_or_default());
        add(&mut pids.current, more.current);
        add(&mut pids.limit, more.limit);
    }
    sum
}

fn cpu(cpu: &CpuStats) -> CPUStat {
    CPUStat {
        usage_usec: cpu.usage_usec,
        user_usec: cpu.user_usec,
        system_usec: cpu.system_usec,
        nr_periods: cpu.periods,
        nr_throttled: cpu.throttled_periods,
        throttled_usec: cpu.throttled_usec,
        psi: psi(cpu.pressure.as_ref()),
        ..Default::default()
    }
}

fn memory_of(memory: &MemoryStats) -> MemoryStat {
    let of = |name: &str| memory.stat.get(name).copied().unwrap_or_default();
    MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
        workingset_refault: of("workingset_refault_anon").saturating_add(of("workingset_refault_file")),
        workingset_activate: of("workingset_activate_anon").saturating_add(of("workingset_activate_file")),
        workingset_nodereclaim: of("workingset_nodereclaim"),
        pgrefill: of("pgrefill"),
        pgscan: of("pgscan"),
        pgsteal: of("pgsteal"),
        pgactivate: of("pgactivate"),
        pgdeactivate: of("pgdeactivate"),
        pglazyfree: of("pglazyfree"),
        pglazyfreed: of("pglazyfreed"),
        thp_fault_alloc: of("thp_fault_alloc"),
        thp_collapse_alloc: of("thp_collapse_alloc"),
        usage: memory.usage,
        usage_limit: memory.limit,
        max_usage: memory.peak,
        swap_usage: memory.swap_usage,
        swap_limit: memory.swap_limit,
        swap_max_usage: memory.swap_peak,
        psi: psi(memory.pressure.as_ref()),
        ..Default::default()
    }
}

fn psi(pressure: Option<&Pressure>) -> MessageField<PSIStats> {
    let line = |line: Option<&PressureLine>| {
        line.map_or_else(MessageField::none, |line| {
            let (avg10, avg60, avg300) = (line.avg10, line.avg60, line.avg300);
            MessageField::some(PSIData { avg10, avg60, avg300, total: line.total_usec, ..Default::default() })
        })
    };
    pressure.map_or_else(MessageField::none, |pressure| {
        let (some, full) = (line(pressure.some.as_ref()), line(pressure.full.as_ref()));
        MessageField::some(PSIStats { some, full, ..Default::default() })
    })
}
