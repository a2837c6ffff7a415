//! What the guest as a whole has used, from the files of `/proc`, and each of its containers.

use podhull_protocol::{
    ContainerStatsResponse, DiskStats, GuestCpuStats, GuestMemoryStats, InterfaceStats, IoDeviceStats, IoStats,
    MAX_POD_STATS, NamedStats, PodStatsResponse,
};
use protobuf::Message;

/// Most interfaces and disks that are told.
const MOST: usize = 64;

/// Milliseconds of a unit of `/proc/stat` (`USER_HZ` is 100 on every architecture that has KVM).
const TICK_MS: u64 = 10;

/// Bytes of a sector of `/proc/diskstats`, whatever those of the disk have.
const SECTOR: u64 = 512;

/// What surrounds the numbers of a container in the answer: a tag and a length.
const AROUND: u64 = 4;

/// Puts the numbers of containers beside those of the guest, as far as there is room for them. `traffic` is `/proc/net/dev` as the pod's
/// network has it.
pub fn together<'a>(
    traffic: &str,
    containers: impl Iterator<Item = (&'a str, ContainerStatsResponse)>,
) -> PodStatsResponse {
    let mut answer = read();
    answer.interfaces = traffic.lines().filter_map(interface).take(MOST).collect();
    let mut left = (MAX_POD_STATS as u64).saturating_sub(answer.compute_size());
    for (id, stats) in containers {
        let named = NamedStats { id: id.into(), stats: Some(brief(stats)).into(), ..NamedStats::default() };
        match left.checked_sub(named.compute_size() + AROUND) {
            Some(less) => left = less,
            None => break,
        }
        answer.containers.push(named);
    }
    answer
}

/// What is told of each container where there may be many.
fn brief(mut stats: ContainerStatsResponse) -> ContainerStatsResponse {
    stats.hugetlb.clear();
    if let Some(cpu) = stats.cpu.as_mut() {
        cpu.pressure.clear();
    }
    if let Some(memory) = stats.memory.as_mut() {
        memory.stat.retain(|name, _| name == "inactive_file");
        memory.pressure.clear();
        if let Some(events) = memory.events.as_mut() {
            *events = podhull_protocol::MemoryEvents { oom_kill: events.oom_kill, ..Default::default() };
        }
    }
    if let Some(io) = stats.io.as_mut() {
        let sum = |of: fn(&IoDeviceStats) -> u64| io.devices.iter().map(of).fold(0, u64::saturating_add);
        let all = IoDeviceStats {
            read_bytes: sum(|device| device.read_bytes),
            written_bytes: sum(|device| device.written_bytes),
            ..IoDeviceStats::default()
        };
        *io = IoStats { devices: vec![all], ..IoStats::default() };
    }
    stats
}

/// Reads all of it but the network's and the containers' own.
fn read() -> PodStatsResponse {
    // What cannot be read is left out.
    let text = |path| std::fs::read_to_string(path).unwrap_or_default();
    PodStatsResponse {
        cpu: cpu(&text("/proc/stat")).into(),
        memory: Some(memory(&text("/proc/meminfo"))).into(),
        disks: text("/proc/diskstats").lines().filter_map(disk).take(MOST).collect(),
        uptime_ms: crate::boot::monotonic_ns() / 1_000_000,
        ..PodStatsResponse::default()
    }
}

fn cpu(stat: &str) -> Option<GuestCpuStats> {
    let mut numbers = stat.lines().next()?.strip_prefix("cpu ")?.split_ascii_whitespace();
    let mut next = || numbers.next().and_then(|number| number.parse::<u64>().ok()).unwrap_or_default() * TICK_MS;
    let each =
        |line: &&str| line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    Some(GuestCpuStats {
        user_ms: next(),
        nice_ms: next(),
        system_ms: next(),
        idle_ms: next(),
        iowait_ms: next(),
        irq_ms: next(),
        softirq_ms: next(),
        steal_ms: next(),
        online: stat.lines().filter(each).count() as u32,
        ..GuestCpuStats::default()
    })
}

fn memory(meminfo: &str) -> GuestMemoryStats {
    let of = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let kib = line.and_then(|line| line.split_ascii_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or_default() * 1024
    };
    GuestMemoryStats {
        total: of("MemTotal"),
        free: of("MemFree"),
        available: of("MemAvailable"),
        cached: of("Cached"),
        slab: of("Slab"),
        ..GuestMemoryStats::default()
    }
}

/// `  eth0: bytes packets errs drop fifo frame compressed multicast bytes packets errs drop ...`
fn interface(line: &str) -> Option<InterfaceStats> {
    let (name, numbers) = line.split_once(':')?;
    let numbers: Vec<u64> = numbers.split_ascii_whitespace().filter_map(|number| number.parse().ok()).collect();
    let [received, sent] = [numbers.get(..4)?, numbers.get(8..12)?];
    Some(InterfaceStats {
        name: name.trim().to_owned(),
        received_bytes: received[0],
        received_packets: received[1],
        received_errors: received[2],
        received_dropped: received[3],
        sent_bytes: sent[0],
        sent_packets: sent[1],
        sent_errors: sent[2],
        sent_dropped: sent[3],
        ..InterfaceStats::default()
    })
}

/// `254 0 vda reads merged sectors ms writes merged sectors ms ...`
fn disk(line: &str) -> Option<DiskStats> {
    let mut words = line.split_ascii_whitespace().skip(2);
    let name = words.next()?.to_owned();
    let numbers: Vec<u64> = words.filter_map(|number| number.parse().ok()).collect();
    let [reads, _, read_sectors, _, writes, _, written_sectors, ..] = numbers[..] else { return None };
    let (read_bytes, written_bytes) = (read_sectors * SECTOR, written_sectors * SECTOR);
    // A device without a disk, as unused loop devices are.
    (reads + writes > 0).then(|| DiskStats { name, reads, read_bytes, writes, written_bytes, ..DiskStats::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_are_read() {
        let found = cpu("cpu  5 1 2 3 4 0 6 7 0 0\ncpu0 5 1\ncpu1 0 0\nintr 7\n").unwrap();
        assert_eq!((found.user_ms, found.idle_ms, found.steal_ms, found.online), (50, 30, 70, 2));
        let found = memory("MemTotal:  2048 kB\nMemFree: 1024 kB\nCached: 4 kB\nSwapCached: 9 kB\n");
        assert_eq!((found.total, found.free, found.cached, found.available), (2 << 20, 1 << 20, 4096, 0));
        let found = interface("  eth0: 10 2 3 4 0 0 0 0 50 6 7 8 0 0 0 0").unwrap();
        assert_eq!((&*found.name, found.received_bytes, found.sent_bytes, found.sent_dropped), ("eth0", 10, 50, 8));
        assert!(interface("Inter-|   Receive").is_none());
        let found = disk(" 254 0 vda 2 0 8 1 3 0 16 1 0 5 6").unwrap();
        assert_eq!((&*found.name, found.reads, found.read_bytes, found.written_bytes), ("vda", 2, 4096, 8192));
        assert!(disk("7 0 loop0 0 0 0 0 0 0 0 0 0 0 0").is_none() && disk("7 0 x 1").is_none());
    }

    #[test]
    fn many_containers_are_told_of_in_brief_and_too_many_in_part() {
        // As large as they get.
        let mut stats = ContainerStatsResponse::new();
        let cpu = stats.cpu.mut_or_insert_default();
        (cpu.usage_usec, cpu.user_usec, cpu.system_usec) = (u64::MAX, u64::MAX, u64::MAX);
        (cpu.periods, cpu.throttled_periods, cpu.throttled_usec) = (u64::MAX, u64::MAX, u64::MAX);
        cpu.pressure.mut_or_insert_default().some.mut_or_insert_default().avg10 = 1.0;
        let memory = stats.memory.mut_or_insert_default();
        (memory.usage, memory.limit, memory.peak) = (1 << 40, u64::MAX, 1 << 40);
        memory.stat = (0..60).map(|number| (format!("number_{number}"), u64::MAX)).collect();
        memory.stat.insert("inactive_file".into(), 7);
        memory.events.mut_or_insert_default().max = 5;
        memory.events.mut_or_insert_default().oom_kill = 6;
        let device = IoDeviceStats { read_bytes: 1, reads: 9, written_bytes: 2, ..Default::default() };
        stats.io.mut_or_insert_default().devices = vec![device; 1000];
        let ids: Vec<_> = (0..5000).map(|number| format!("{number:064}")).collect();
        let told = |count| together("", ids.iter().take(count).map(|id| (id.as_str(), stats.clone())));
        let answer = told(500);
        assert_eq!(answer.containers.len(), 500);
        let first = answer.containers[0].stats.as_ref().unwrap();
        let memory = first.memory.as_ref().unwrap();
        assert_eq!((memory.stat.len(), memory.stat["inactive_file"], memory.limit), (1, 7, u64::MAX));
        let events = memory.events.as_ref().unwrap();
        assert_eq!((events.oom_kill, events.max, first.cpu.as_ref().unwrap().throttled_usec), (6, 0, u64::MAX));
        let [io] = &first.io.as_ref().unwrap().devices[..] else { panic!("{first:?}") };
        assert_eq!((io.read_bytes, io.written_bytes, io.reads), (1000, 2000, 0));
        let answer = told(5000);
        assert!(answer.compute_size() <= MAX_POD_STATS as u64, "{}", answer.compute_size());
        assert!((500..1000).contains(&answer.containers.len()), "{}", answer.containers.len());
    }
}
