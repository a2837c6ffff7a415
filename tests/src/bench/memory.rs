//! What an idle pod weighs on the host: its processes, and apart from them its guest's memory.

use std::fs;
use std::ops::AddAssign;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::report::{Figure, Panel};
use super::{Bench, pod};
use crate::bundle::{Bundle, DEBIAN};
use crate::{Outcome, ensure, processes};

/// Limits of the pods, and what of them is private: bytes, and MiB at most.
const PODS: [(u64, &str, &str, f64); 2] = [
    (256 << 20, "256 MiB", "An idle pod with a limit of 256 MiB, PSS and private memory on the host", 24.0),
    (2 << 30, "2 GiB", "An idle pod with a limit of 2 GiB, PSS and private memory on the host", 60.0),
];

/// An anonymous mapping of as many KiB is guest memory: no stack or heap of the VMM is that large.
const GUEST_MAPPING: f64 = (32 << 10) as f64;

/// A pod is at rest when its memory has not changed by more than this, in KiB, over some looks in a row.
const AT_REST: f64 = 128.0;
const LOOKS: usize = 3;
const BETWEEN_LOOKS: Duration = Duration::from_secs(1);
const REST_DEADLINE: Duration = Duration::from_secs(60);

/// Memory of a process in KiB.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Memory {
    /// Its share of all but guest memory.
    pub own: f64,
    /// Its share of guest memory: RAM, and the kernel and the image mapped into it.
    pub guest: f64,
    /// Guest memory that is no file's: it is shared with nobody, and cannot be dropped.
    guest_private: f64,
}

impl AddAssign for Memory {
    fn add_assign(&mut self, other: Self) {
        self.own += other.own;
        self.guest += other.guest;
        self.guest_private += other.guest_private;
    }
}

impl Memory {
    fn of(pid: i32) -> Outcome<Self> {
        let path = format!("/proc/{pid}/smaps");
        let text = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
        Self::parse(&text).ok_or_else(|| format!("{path} is not as proc_pid_smaps(5) has it").into())
    }

    fn parse(smaps: &str) -> Option<Self> {
        let mut memory = Self::default();
        let (mut file, mut size, mut pss, mut anonymous) = ("", 0.0, 0.0, 0.0);
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let first = words.next()?;
            match first {
                "Size:" => size = words.next()?.parse().ok()?,
                "Pss:" => pss = words.next()?.parse().ok()?,
                "Anonymous:" => anonymous = words.next()?.parse().ok()?,
                // The last line of a mapping. Huge pages are advised for guest RAM alone.
                "VmFlags:" => {
                    let huge = words.any(|flag| flag == "hg");
                    let ours = ["/vmlinux", "/guest.img"].iter().any(|name| file.ends_with(name));
                    if ours || huge || (file.is_empty() && size >= GUEST_MAPPING) {
                        memory += Self { own: 0.0, guest: pss, guest_private: anonymous };
                    } else {
                        memory += Self { own: pss, guest: 0.0, guest_private: 0.0 };
                    }
                }
                // `address permissions offset device inode [file]`
                _ if !first.ends_with(':') => file = words.nth(4).unwrap_or_default(),
                _ => {}
            }
        }
        Some(memory)
    }
}

/// Memory of these processes together, and of the machine's among them.
fn weigh(pids: Vec<i32>) -> Outcome<(Memory, Memory)> {
    let (mut run, mut vmm) = (Memory::default(), Memory::default());
    for pid in pids {
        let memory = Memory::of(pid)?;
        if memory.guest > 0.0 { vmm += memory } else { run += memory }
    }
    ensure!(vmm.guest != 0.0, "no process of podhull's has guest memory");
    Ok((run, vmm))
}

/// Weighs pods of both sizes each round, one at a time.
pub fn measure(bench: &Bench) -> Outcome<Vec<Panel>> {
    let mut samples: Vec<[Vec<f64>; 5]> = PODS.iter().map(|_| Default::default()).collect();
    bench.rounds("memory", bench.rounds, |round| {
        for ((limit, name, ..), samples) in PODS.iter().zip(&mut samples) {
            let directory = bench.directory.join(format!("idle-{limit}"));
            let bundle = Bundle::new(directory, &bench.podhull.spec, Path::new(DEBIAN))?
                .sh("echo up; read line || exit 0")
                .set("/linux/resources/memory/limit", json!(limit));
            bundle.write()?;
            let mut pod = pod::Pod::start(bench, &bundle, "bench-idle")?;
            pod.running.expect_line("up")?;
            pod.wait_for(" bytes of memory")?;
            // podhull itself, its shadow and its machine's process.
            let pid = pod.running.pid();
            let family = || processes::descendants(pid).iter().map(|process| process.pid).chain([pid]).collect();
            let (run, vmm) = at_rest(family).map_err(|error| format!("the pod of {name}: {error}"))?;
            pod.end()?;
            if round.is_some() {
                let kib = [vmm.own, run.own, vmm.own + run.own, vmm.guest, vmm.guest_private];
                samples.iter_mut().zip(kib).for_each(|(samples, kib)| samples.push(kib / 1024.0));
            }
        }
        Ok(())
    })?;

    let panels = PODS.iter().zip(samples).map(|((_, name, title, private), [vmm, run, all, guest, guest_private])| {
        let figure = |what: &str, samples| Figure::new(format!("{name} pod: {what}"), "MiB", samples);
        let figures = vec![
            figure("VMM beside guest memory", vmm).at_most(4.0),
            figure("podhull run and shadow", run),
            figure("all host processes beside guest memory", all).at_most(8.0),
            figure("guest memory, PSS", guest),
            figure("guest memory, private", guest_private).at_most(*private),
        ];
        Panel { title, unit: "MiB", successive: false, figures }
    });
    Ok(panels.collect())
}

/// What processes and the machine among them weigh, when the guest has given back what it does not need; free page reporting takes it
/// some seconds.
pub(super) fn at_rest(pids: impl Fn() -> Vec<i32>) -> Outcome<(Memory, Memory)> {
    let until = Instant::now() + REST_DEADLINE;
    let mut looks: Vec<f64> = Vec::new();
    loop {
        let weight = weigh(pids())?;
        looks.push(weight.1.guest_private);
        if let Some(last) = looks.len().checked_sub(LOOKS).map(|first| &looks[first..]) {
            let (low, high) =
                last.iter().fold((f64::MAX, 0.0f64), |(low, high), &look| (low.min(look), high.max(look)));
            if high - low <= AT_REST {
                return Ok(weight);
            }
        }
        ensure!(Instant::now() < until, "its memory does not come to rest: KiB {looks:?}");
        thread::sleep(BETWEEN_LOOKS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_from_the_processs_own() {
        let mapping = |head: &str, size: u32, pss: u32, anonymous: u32, flags: &str| {
            format!("{head}\nSize: {size} kB\nPss: {pss} kB\nAnonymous: {anonymous} kB\nVmFlags: rd {flags}\n")
        };
        let smaps = [
            mapping("400000-500000 r-xp 00000000 fe:00 12   /usr/bin/podhull", 1024, 500, 0, "ex"),
            mapping("7f0000000000-7f0010000000 rw-p 00000000 00:00 0", 16384, 9000, 9000, "wr hg"),
            mapping(
                "7f0010000000-7f0011000000 rw-p 00200000 fe:00 13 /usr/lib/podhull/vmlinux",
                16384,
                8000,
                1000,
                "wr",
            ),
            mapping("7f0100000000-7f0200000000 ---p 00000000 00:00 0", 4_194_304, 0, 0, "mr"),
            mapping("7ffe00000000-7ffe00021000 rw-p 00000000 00:00 0 [stack]", 132, 20, 20, "gd"),
        ];
        let memory = Memory::parse(&smaps.concat()).unwrap();
        assert_eq!((memory.own, memory.guest, memory.guest_private), (520.0, 17_000.0, 10_000.0));
    }
}
