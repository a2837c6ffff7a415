//! What the guest as a whole has used, from the files of `/proc`.

use podhull_protocol::{DiskStats, GuestCpuStats, GuestMemoryStats, InterfaceStats, PodStatsResponse};

/// Most interfaces and disks that are told.
const MOST: usize = 64;

/// Milliseconds of a unit of `/proc/stat` (`USER_HZ` is 100 on every architecture that has KVM).
const TICK_MS: u64 = 10;

/// Bytes of a sector of `/proc/diskstats`, whatever those of the disk have.
const SECTOR: u64 = 512;

/// Reads all of it but the containers' own.
pub fn read() -> PodStatsResponse {
    // What cannot be read is left out.
    let text = |path| std::fs::read_to_string(path).unwrap_or_default();
    PodStatsResponse {
        cpu: cpu(&text("/proc/stat")).into(),
        memory: Some(memory(&text("/proc/meminfo"))).into(),
        interfaces: text("/proc/net/dev").lines().filter_map(interface).take(MOST).collect(),
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
}
