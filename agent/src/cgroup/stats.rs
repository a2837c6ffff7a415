//! What a container has used and may use, from the files of its group.

use podhull_protocol::{
    ContainerStatsResponse, CpuStats, HugetlbStats, IoDeviceStats, IoStats, MemoryEvents, MemoryStats, PidsStats,
    Pressure, PressureLine,
};

use super::{Cgroup, CgroupError, field, read};

impl Cgroup {
    /// Reads it all. Files of controllers that are not there are left out.
    pub fn stats(&self) -> Result<ContainerStatsResponse, CgroupError> {
        Ok(ContainerStatsResponse {
            cpu: Some(self.cpu()?).into(),
            memory: self.memory().into(),
            pids: self.pids().into(),
            io: self.io().into(),
            hugetlb: self.hugetlb()?,
            ..ContainerStatsResponse::default()
        })
    }

    fn text(&self, file: &str) -> Option<String> {
        read(&self.path.join(file)).ok()
    }

    /// A file of one number, where there is one.
    fn number(&self, file: &str) -> Option<u64> {
        number(self.text(file)?.trim())
    }

    fn pressure(&self, file: &str) -> Option<Pressure> {
        pressure(&self.text(file)?)
    }

    fn cpu(&self) -> Result<CpuStats, CgroupError> {
        // Every group has this one.
        let stat = read(&self.path.join("cpu.stat"))?;
        let of = |name| field(&stat, name).unwrap_or_default();
        Ok(CpuStats {
            usage_usec: of("usage_usec"),
            user_usec: of("user_usec"),
            system_usec: of("system_usec"),
            periods: of("nr_periods"),
            throttled_periods: of("nr_throttled"),
            throttled_usec: of("throttled_usec"),
            pressure: self.pressure("cpu.pressure").into(),
            ..CpuStats::default()
        })
    }

    fn memory(&self) -> Option<MemoryStats> {
        let usage = self.number("memory.current")?;
        let events = self.text("memory.events").unwrap_or_default();
        let of = |name| field(&events, name).unwrap_or_default();
        let stat = self.text("memory.stat").unwrap_or_default();
        let pairs = stat.lines().filter_map(|line| line.split_once(' '));
        Some(MemoryStats {
            usage,
            limit: self.number("memory.max").unwrap_or_default(),
            peak: self.number("memory.peak").unwrap_or_default(),
            swap_usage: self.number("memory.swap.current").unwrap_or_default(),
            swap_limit: self.number("memory.swap.max").unwrap_or_default(),
            swap_peak: self.number("memory.swap.peak").unwrap_or_default(),
            events: Some(MemoryEvents {
                low: of("low"),
                high: of("high"),
                max: of("max"),
                oom: of("oom"),
                oom_kill: of("oom_kill"),
                oom_group_kill: of("oom_group_kill"),
                ..MemoryEvents::default()
            })
            .into(),
            stat: pairs.filter_map(|(name, value)| Some((name.to_owned(), number(value)?))).collect(),
            pressure: self.pressure("memory.pressure").into(),
            ..MemoryStats::default()
        })
    }

    fn pids(&self) -> Option<PidsStats> {
        Some(PidsStats {
            current: self.number("pids.current")?,
            limit: self.number("pids.max").unwrap_or_default(),
            ..PidsStats::default()
        })
    }

    fn io(&self) -> Option<IoStats> {
        Some(IoStats {
            devices: self.text("io.stat")?.lines().filter_map(device).collect(),
            pressure: self.pressure("io.pressure").into(),
            ..IoStats::default()
        })
    }

    fn hugetlb(&self) -> Result<Vec<HugetlbStats>, CgroupError> {
        let unreadable = |source| CgroupError::Read { path: self.path.clone(), source };
        let mut sizes = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(unreadable)? {
            let name = entry.map_err(unreadable)?.file_name();
            let size = name.to_str().and_then(|name| name.strip_prefix("hugetlb.")?.strip_suffix(".current"));
            // hugetlb.2MB.rsvd.current counts reservations.
            sizes.extend(size.filter(|size| !size.contains('.')).map(str::to_owned));
        }
        sizes.sort_unstable();
        let stats = |page_size: String| HugetlbStats {
            usage: self.number(&format!("hugetlb.{page_size}.current")).unwrap_or_default(),
            limit: self.number(&format!("hugetlb.{page_size}.max")).unwrap_or_default(),
            limit_hits: self
                .text(&format!("hugetlb.{page_size}.events"))
                .and_then(|text| field(&text, "max"))
                .unwrap_or_default(),
            page_size,
            ..HugetlbStats::default()
        };
        Ok(sizes.into_iter().map(stats).collect())
    }
}

fn number(text: &str) -> Option<u64> {
    if text == "max" { Some(u64::MAX) } else { text.parse().ok() }
}

/// A line of `io.stat`: `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`.
fn device(line: &str) -> Option<IoDeviceStats> {
    let (device, counts) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let of = |name: &str| {
        let pairs = counts.split_ascii_whitespace().filter_map(|pair| pair.split_once('='));
        pairs.filter(|(key, _)| *key == name).find_map(|(_, value)| value.parse().ok()).unwrap_or_default()
    };
    Some(IoDeviceStats {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        read_bytes: of("rbytes"),
        written_bytes: of("wbytes"),
        discarded_bytes: of("dbytes"),
        reads: of("rios"),
        writes: of("wios"),
        discards: of("dios"),
        ..IoDeviceStats::default()
    })
}

/// A pressure file: `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same for `full`.
fn pressure(text: &str) -> Option<Pressure> {
    let line = |name: &str| -> Option<PressureLine> {
        let rest = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        let of = |key: &str| {
            rest.split_ascii_whitespace()
                .filter_map(|pair| pair.split_once('='))
                .find_map(|(k, v)| (k == key).then_some(v))
        };
        Some(PressureLine {
            avg10: of("avg10")?.parse().ok()?,
            avg60: of("avg60")?.parse().ok()?,
            avg300: of("avg300")?.parse().ok()?,
            total_usec: of("total")?.parse().ok()?,
            ..PressureLine::default()
        })
    };
    Some(Pressure { some: Some(line("some")?).into(), full: line("full").into(), ..Pressure::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_has_one_line_or_two() {
        let some = "some avg10=1.50 avg60=0.20 avg300=0.03 total=12345\n";
        let one = pressure(some).unwrap();
        assert_eq!((one.some.avg10, one.some.total_usec, one.full.is_some()), (1.5, 12345, false));
        let two = pressure(&format!("{some}full avg10=0.00 avg60=0.00 avg300=0.00 total=7\n")).unwrap();
        assert_eq!(two.full.total_usec, 7);
        assert!(pressure("").is_none());
    }

    #[test]
    fn a_device_has_its_counts_by_name() {
        let device = device("254:16 rbytes=4096 wbytes=1 rios=2 wios=3 dbytes=0 dios=9").unwrap();
        assert_eq!((device.major, device.minor, device.read_bytes, device.discards), (254, 16, 4096, 9));
        assert!(super::device("8:0").is_none());
    }

    #[test]
    fn no_limit_is_the_largest_number() {
        assert_eq!((number("max"), number("5"), number("x")), (Some(u64::MAX), Some(5), None));
    }
}
