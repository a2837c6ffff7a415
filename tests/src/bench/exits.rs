//! Exits of the virtual CPU up to agent-ready, as the host's kernel traces them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::time::{ClockId, DynamicClockId, clock_gettime, clock_gettime_dynamic};

use super::report::{Figure, Panel};
use super::{Bench, pod, start};
use crate::{Outcome, ensure};

const TRACEFS: &str = "/sys/kernel/tracing";

/// Reasons that are page faults of the second level: on AMD one, on Intel two (KVM's names of them).
const PAGE_FAULTS: [&str; 3] = ["npf", "EPT_VIOLATION", "EPT_MISCONFIG"];

/// Kilobytes for each CPU: an event takes about 100 bytes, a boot some thousand events.
const BUFFER: &str = "8192";

/// A ring buffer of our own, that follows this process's children.
struct Tracing {
    instance: PathBuf,
    mounted: bool,
}

impl Tracing {
    fn begin() -> Outcome<Self> {
        let mounted = !Path::new(TRACEFS).join("instances").exists();
        if mounted {
            let status = Command::new("mount").args(["-t", "tracefs", "tracefs", TRACEFS]).status()?;
            ensure!(status.success(), "cannot mount tracefs at {TRACEFS}: does the host's kernel trace events?");
        }
        let instance = Path::new(TRACEFS).join(format!("instances/podhull-bench.{}", std::process::id()));
        fs::create_dir(&instance)?;
        let tracing = Self { instance, mounted };
        // The wall clock, but for a whole number of seconds.
        tracing.write("trace_clock", "tai")?;
        tracing.write("buffer_size_kb", BUFFER)?;
        tracing.write("options/event-fork", "1")?;
        tracing.write("set_event_pid", &tracing.own_pid()?)?;
        for event in ["kvm_exit", "kvm_userspace_exit"] {
            tracing.write(&format!("events/kvm/{event}/enable"), "1")?;
        }
        Ok(tracing)
    }

    /// This process's id as the tracer counts, which knows no PID namespaces: from the line of a mark of ours.
    fn own_pid(&self) -> Outcome<String> {
        self.write("trace_marker", "podhull-bench")?;
        let trace = fs::read_to_string(self.instance.join("trace"))?;
        let mark = trace.lines().find(|line| line.contains(": tracing_mark_write: ")).ok_or("a mark was not traced")?;
        // The name before the id may have spaces and dashes.
        let (head, _) = mark.split_once(" [").ok_or("a traced line has no CPU")?;
        Ok(head.trim_end().rsplit('-').next().unwrap_or_default().to_owned())
    }

    fn write(&self, file: &str, text: &str) -> Outcome {
        let path = self.instance.join(file);
        Ok(fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?)
    }

    /// How often each reason came before `end`, a time of the wall clock: of exits, and of exits to user space.
    fn counts(&self, end: Duration) -> Outcome<[BTreeMap<String, f64>; 2]> {
        for cpu in fs::read_dir(self.instance.join("per_cpu"))?.flatten() {
            let stats = fs::read_to_string(cpu.path().join("stats"))?;
            let lost = stats.lines().find_map(|line| line.strip_prefix("overrun: "));
            ensure!(lost == Some("0"), "the trace buffer of {BUFFER} KB was too small: {stats}");
        }
        let offset = clock_gettime_dynamic(DynamicClockId::Tai)?.tv_sec - clock_gettime(ClockId::Realtime).tv_sec;
        let end = end + Duration::from_secs(u64::try_from(offset)?);
        let mut counts = [BTreeMap::new(), BTreeMap::new()];
        for line in fs::read_to_string(self.instance.join("trace"))?.lines() {
            let Some((kind, time, reason)) = event(line) else { continue };
            if time <= end {
                *counts[kind].entry(reason.to_owned()).or_insert(0.0) += 1.0;
            }
        }
        Ok(counts)
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.instance);
        if self.mounted {
            let _ = Command::new("umount").arg(TRACEFS).status();
        }
    }
}

/// Kind (0 an exit, 1 one to user space), time and reason of a line such as
/// `vcpu0-123 [001] d..1. 1767225600.123456: kvm_exit: vcpu 0 reason npf rip 0x1000000 info1 ...`.
fn event(line: &str) -> Option<(usize, Duration, &str)> {
    let (kind, (head, tail)) = match line.split_once(": kvm_exit: ") {
        Some(parts) => (0, parts),
        None => (1, line.split_once(": kvm_userspace_exit: ")?),
    };
    let (seconds, microseconds) = head.split_whitespace().next_back()?.split_once('.')?;
    let time = Duration::from_secs(seconds.parse().ok()?) + Duration::from_micros(microseconds.parse().ok()?);
    let reason = tail.split_once("reason ")?.1.split(' ').next()?;
    Some((kind, time, reason))
}

/// One boot a round; the counts stand for any machine of this CPU's maker, however fast.
pub fn measure(bench: &Bench) -> Outcome<Vec<Panel>> {
    let bundle = start::nothing(bench)?;
    let tracing = Tracing::begin()?;
    let (mut told, mut all): (Vec<f64>, Vec<[BTreeMap<String, f64>; 2]>) = (Vec::new(), Vec::new());
    bench.rounds("exits", bench.rounds, |round| {
        tracing.write("trace", "")?;
        let (_, log) = pod::Pod::start(bench, &bundle, "bench-exits")?.end()?;
        let counts = tracing.counts(log.at(pod::READY)?)?;
        ensure!(!counts[0].is_empty(), "the kernel traced no exit: is this an other KVM than the CPU's?");
        if round.is_some() {
            told.push(log.number(pod::READY)?);
            all.push(counts);
        }
        Ok(())
    })?;

    let sum = |kind: usize, wanted: &dyn Fn(&str) -> bool| -> Vec<f64> {
        let of_round = |counts: &[BTreeMap<String, f64>; 2]| {
            counts[kind].iter().filter(|(reason, _)| wanted(reason)).map(|(_, count)| count).sum()
        };
        all.iter().map(of_round).collect()
    };
    let is_fault = |reason: &str| PAGE_FAULTS.contains(&reason);
    let mut figures = vec![
        Figure::new("all", "exits", sum(0, &|_| true)),
        Figure::new("page faults", "exits", sum(0, &is_fault)),
        Figure::new("other than page faults", "exits", sum(0, &|reason| !is_fault(reason))).at_most(1500.0),
        Figure::new("to user space, traced", "exits", sum(1, &|_| true)).at_most(500.0),
        Figure::new("to user space, counted by the VMM", "exits", told.clone()).at_most(500.0),
    ];
    for (kind, label) in [(0, ""), (1, " (to user space)")] {
        let mut reasons: Vec<&String> = all.iter().flat_map(|counts| counts[kind].keys()).collect();
        reasons.sort();
        reasons.dedup();
        let of_reason =
            |reason: &String| Figure::new(format!("{reason}{label}"), "exits", sum(kind, &|other| other == reason));
        let mut reasons: Vec<Figure> =
            reasons.into_iter().map(of_reason).filter(|figure| figure.median() >= 1.0).collect();
        reasons.sort_by(|a, b| b.median().total_cmp(&a.median()));
        figures.extend(reasons);
    }
    Ok(vec![Panel { title: "Exits of the virtual CPU up to agent-ready", unit: "exits", successive: false, figures }])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_trace_are_read() {
        let exit = "   vcpu0-77  [001] d..1.  1767225600.000007: kvm_exit:  vcpu 0 reason npf rip 0x1 info1 0x0";
        let exit = exit.replace("kvm_exit:  vcpu", "kvm_exit: vcpu");
        assert_eq!(event(&exit), Some((0, Duration::new(1_767_225_600, 7_000), "npf")));
        let user = " vcpu0-77 [001] .....  1767225600.500000: kvm_userspace_exit: reason KVM_EXIT_IO (2)";
        assert_eq!(event(user), Some((1, Duration::new(1_767_225_600, 500_000_000), "KVM_EXIT_IO")));
        assert_eq!(event("# tracer: nop"), None);
    }
}
