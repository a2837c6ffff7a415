//! What podhull costs, measured beside what it is compared with, in one run on one host.
//!
//! [`start`] times runs and boots, [`commands`] what callers do with a container, [`callers`] Podman, [`shim`] containerd's
//! client, [`kubernetes`] pods; [`exits`] counts exits of the virtual CPU, [`memory`] weighs an idle pod, [`files`] and [`tree`] move large and many files through the shared file system,
//! [`network`] bytes through the tap, [`sizes`] looks at what is installed. Each returns panels of figures ([`report`]),
//! which become a table, JSON and a chart ([`chart`]). Contenders take turns within each round, so that what else the host
//! does meets all of them alike; a figure is the median of its rounds.

pub mod callers;
pub mod chart;
pub mod commands;
pub mod exits;
pub mod files;
pub mod kubernetes;
pub mod memory;
pub mod microvm;
pub mod network;
pub mod pod;
pub mod report;
pub mod shim;
pub mod sizes;
pub mod start;
pub mod tree;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use rustix::process::{getpid, set_child_subreaper};
use serde_json::json;

use crate::runtime::Runtime;
use crate::suite::Scene;
use crate::{Outcome, ensure};
use report::Panel;

/// Fewest rounds whose median is worth keeping.
const ROUNDS: usize = 15;

const HELP: &str = "podhull-bench [--out DIR] [FILTER...]: measures podhull beside runc, crun and QEMU's microvm; as root.
Prints a table; writes bench.json and bench.svg into DIR (the working directory). With FILTERs, only measurements whose name
contains one of them: start, commands, callers, shim, kubernetes, exits, memory, files, tree,
network, sizes. A missed target is said, and is no failure.
PODHULL_RUNTIME: the podhull to measure (podhull). PODHULL_BENCH_ROUNDS: rounds (15); fewer are for trying.";

/// A measurement: its name for the command line, and what it returns.
type Measurement = (&'static str, fn(&Bench) -> Outcome<Vec<Panel>>);

const MEASUREMENTS: [Measurement; 11] = [
    ("start", start::measure),
    ("commands", commands::measure),
    ("callers", callers::measure),
    ("shim", shim::measure),
    ("kubernetes", kubernetes::measure),
    ("exits", exits::measure),
    ("memory", memory::measure),
    ("files", files::measure),
    ("tree", tree::measure),
    ("network", network::measure),
    ("sizes", sizes::measure),
];

/// What all measurements need.
pub struct Bench {
    /// The podhull that is measured.
    pub podhull: Runtime,
    /// How often each figure is taken.
    pub rounds: usize,
    /// For files of this run; removed in the end.
    pub directory: PathBuf,
}

impl Bench {
    /// Rounds of what takes long.
    pub fn few(&self) -> usize {
        self.rounds.div_ceil(3)
    }

    /// What a test would have, to make containers with a runtime; `what` names its directory.
    pub fn scene(&self, what: &str, runtime: &Runtime) -> Outcome<Scene> {
        let directory = self.directory.join(format!("{what}-{}", runtime.name()));
        fs::create_dir_all(&directory)?;
        Ok(Scene::new(runtime.clone(), 1, directory))
    }

    /// Runs `round` once to warm the caches and then `count` times.
    pub fn rounds(&self, name: &str, count: usize, mut round: impl FnMut(Option<usize>) -> Outcome) -> Outcome {
        let began = Instant::now();
        round(None)?;
        for number in 0..count {
            round(Some(number))?;
            eprint!("\r{name}: round {} of {count}, {:.0} s  ", number + 1, began.elapsed().as_secs_f64());
        }
        eprintln!();
        Ok(())
    }

    /// A file that is installed with podhull, found as podhull finds it.
    pub fn library_file(&self, name: &str) -> Outcome<PathBuf> {
        let directory = match std::env::var_os("PODHULL_LIBDIR").filter(|directory| !directory.is_empty()) {
            Some(directory) => PathBuf::from(directory),
            None => self.podhull.program().canonicalize()?.with_file_name("../lib/podhull"),
        };
        let beside = directory.join(name);
        let file = if beside.exists() { beside } else { Path::new("/usr/lib/podhull").join(name) };
        ensure!(file.exists(), "no {}: is podhull installed?", file.display());
        Ok(file.canonicalize()?)
    }
}

/// Measures what was asked for.
pub fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("podhull-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Outcome<bool> {
    let (mut out, mut filters) = (PathBuf::from("."), Vec::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--help" | "-h" => {
                println!("{HELP}");
                return Ok(true);
            }
            "--out" => out = arguments.next().ok_or("--out needs a directory")?.into(),
            option if option.starts_with('-') => return Err(format!("no option {option}; see --help").into()),
            _ => filters.push(argument),
        }
    }
    ensure!(rustix::process::geteuid().is_root(), "the measurements need root");
    // What stands for a container in the background is ours when its parent has gone.
    set_child_subreaper(Some(getpid()))?;
    let rounds = match std::env::var("PODHULL_BENCH_ROUNDS") {
        Ok(text) => {
            text.parse().ok().filter(|rounds| *rounds > 0).ok_or("PODHULL_BENCH_ROUNDS is not a positive number")?
        }
        Err(_) => ROUNDS,
    };
    let chosen: Vec<&Measurement> = MEASUREMENTS
        .iter()
        .filter(|(name, _)| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str())))
        .collect();
    ensure!(!chosen.is_empty(), "no measurement has {filters:?} in its name; see --help");
    fs::create_dir_all(&out)?;
    if filters.is_empty() && rounds >= ROUNDS {
        eprintln!("{rounds} rounds: about 25 minutes in a software host that has two CPUs to itself");
    }

    let directory = PathBuf::from(format!("/var/tmp/podhull-bench.{}", std::process::id()));
    fs::create_dir_all(&directory)?;
    let bench = Bench { podhull: Runtime::under_test()?, rounds, directory };
    let (mut panels, mut failed) = (Vec::new(), Vec::new());
    for (name, measure) in chosen {
        match measure(&bench) {
            Ok(measured) => panels.extend(measured),
            Err(error) => {
                eprintln!("podhull-bench: {name}: {error}");
                failed.push(*name);
            }
        }
    }
    let removed = fs::remove_dir_all(&bench.directory);

    ensure!(panels.iter().any(|panel| !panel.figures.is_empty()), "nothing was measured");
    print!("{}", report::table(&panels));
    let host = host();
    let title = format!("podhull on {}, {rounds} rounds", host["cpu"].as_str().unwrap_or("an unknown CPU"));
    let document = json!({ "host": host, "rounds": rounds, "failed": failed, "panels": report::json(&panels) });
    fs::write(out.join("bench.json"), serde_json::to_vec_pretty(&document)?)?;
    fs::write(out.join("bench.svg"), chart::svg(&title, &panels))?;
    if rounds < ROUNDS {
        println!("Only {rounds} rounds: figures to try with, not to keep.");
    }
    if !failed.is_empty() {
        println!("failed: {}", failed.join(" "));
    }
    // Last: what failed may have left something mounted there, and the figures are there all the same.
    removed?;
    Ok(failed.is_empty())
}

/// What the figures were taken on. An emulated host says so by its CPU's flags: real ones have no `hypervisor` beside KVM of
/// their own, except where virtual machines are nested.
fn host() -> serde_json::Value {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(": ")).map(|(_, value)| value.to_owned()).unwrap_or_default()
    };
    let hypervisor = field("flags").split(' ').any(|flag| flag == "hypervisor");
    let cpu = format!("{}{}", field("model name"), if hypervisor { " (itself virtual or emulated)" } else { "" });
    json!({
        "kernel": rustix::system::uname().release().to_string_lossy(),
        "cpu": cpu,
        "cpus": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
    })
}
