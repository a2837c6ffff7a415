//! Suites of others, run with podhull and, as control, with runc: what is expected of each case is data, `tests/conformance/*.tsv`.
//!
//! [`suites`] knows what the suites are and runs their files by [`program`], [`tap`] reads what they print, [`ratchet`] compares it
//! with the data. [`schema`] compares the specification's schema with the documentation.

pub mod program;
pub mod ratchet;
pub mod schema;
pub mod suites;
pub mod tap;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{getpid, set_child_subreaper};

use crate::leaks::kill_leftovers;
use crate::run::Running;
use crate::runtime::Runtime;
use crate::suite::part;
use crate::{Outcome, ensure, processes};
use ratchet::{Measured, RUNTIMES, compare, render};
use suites::Suite;
use tap::Verdict;

/// How long what a container consists of may take to end after its file's last test.
const SETTLE: Duration = Duration::from_secs(10);

const HELP: &str = "\
podhull-conformance SUITES [--only RUNTIME] [--out DIR] [FILTER...]

Runs the suites in the directory SUITES (tests/conformance/build-suites makes it) with podhull and with runc, as root, and fails
if a case does not end as tests/conformance/*.tsv says, or is not there. Looks, too, for what docs/oci-support.md does not have of the
specification's schema; that is the file runtime-spec/config-schema.json.

    FILTER            only files whose SUITE/FILE contains it; SUITE/FILE:CASE of a bats file only the cases that contain CASE
    --only RUNTIME    only podhull, or only runc
    --out DIR         write the measured outcome to DIR/SUITE.tsv, as data, and what failed cases said to DIR/SUITE.log
PODHULL_TEST_PART: K/N, only the Kth of N parts of the files, of about equal length, to share them among hosts.";

struct Options {
    suites: PathBuf,
    runtimes: Vec<usize>,
    out: Option<PathBuf>,
    filters: Vec<(String, Option<String>)>,
}

/// Runs what the command line says.
pub fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.is_empty() || words.iter().any(|word| word == "--help" || word == "-h") {
        println!("{HELP}");
        return ExitCode::SUCCESS;
    }
    match Options::parse(words).and_then(|options| run(&options)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("podhull-conformance: {error}");
            ExitCode::FAILURE
        }
    }
}

impl Options {
    fn parse(words: Vec<String>) -> Outcome<Self> {
        let mut options = Self { suites: PathBuf::new(), runtimes: vec![0, 1], out: None, filters: Vec::new() };
        let mut words = words.into_iter();
        options.suites = words.next().ok_or("the directory of the suites is missing")?.into();
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
            match word.as_str() {
                "--only" => {
                    let name = value()?;
                    let index = RUNTIMES.iter().position(|runtime| *runtime == name);
                    options.runtimes = vec![index.ok_or_else(|| format!("no runtime {name}"))?];
                }
                "--out" => options.out = Some(value()?.into()),
                _ => options.filters.push(match word.split_once(':') {
                    Some((file, case)) => (file.to_owned(), Some(case.to_owned())),
                    None => (word, None),
                }),
            }
        }
        Ok(options)
    }

    /// Whether a file is to be run, and if so, with which of its cases.
    fn chooses(&self, name: &str) -> Option<Option<&str>> {
        if self.filters.is_empty() {
            return Some(None);
        }
        let filter = self.filters.iter().find(|(file, _)| name.contains(file.as_str()))?;
        Some(filter.1.as_deref())
    }
}

fn run(options: &Options) -> Outcome<bool> {
    ensure!(rustix::process::geteuid().is_root(), "the suites need root");
    set_child_subreaper(Some(getpid()))?;
    enter_cgroup()?;
    let runtimes = RUNTIMES.map(|name| Runtime::find(name.as_ref()));
    let (mine, parts) = part()?;
    let started = Instant::now();
    let (mut cases, mut differences) = (0, 0);
    if mine == 1 && options.chooses(schema::NAME).is_some() {
        let (properties, missing) = schema::missing(&options.suites)?;
        let word = if missing.is_empty() { "ok  " } else { "FAIL" };
        println!("{word} {}: {properties} properties", schema::NAME);
        missing.iter().for_each(|path| println!("     {path}: not in docs/oci-support.md"));
        cases += 1;
        differences += missing.len();
    }
    for suite in Suite::ALL {
        let expectations = suite.expectations()?;
        let files = suite.files(&options.suites)?;
        if options.filters.is_empty() {
            for file in expectations.files().into_iter().filter(|file| !files.contains(*file)) {
                differences += 1;
                println!("FAIL {}/{file}: is in the data, and not in the suite", suite.name());
            }
        }
        let chosen = files.iter().filter_map(|file| {
            let name = format!("{}/{file}", suite.name());
            options.chooses(&name).map(|filter| (file.as_str(), filter))
        });
        let chosen: Vec<(&str, Option<&str>)> = chosen.collect();
        let sizes: Vec<usize> = chosen.iter().map(|(file, _)| expectations.cases(file).count().max(1)).collect();
        for ((file, filter), part) in chosen.into_iter().zip(shares(&sizes, parts)) {
            if part != mine {
                continue;
            }
            let name = format!("{}/{file}", suite.name());
            let mut measured = Measured::new();
            let mut said: BTreeMap<String, String> = BTreeMap::new();
            let mut seconds = Vec::new();
            let mut broken = false;
            for &which in &options.runtimes {
                let runtime = runtimes[which].as_ref().map_err(ToString::to_string)?;
                let began = Instant::now();
                match one(suite, options, file, filter, runtime.program()) {
                    Ok(cases) => {
                        for (case, (verdict, text)) in cases {
                            if verdict != Verdict::Pass {
                                let head = format!("== {file}: {case}: {} with {}", verdict.word(), RUNTIMES[which]);
                                *said.entry(case.clone()).or_default() += &format!("{head}\n{text}");
                            }
                            measured.entry(case).or_default()[which] = Some(verdict);
                        }
                    }
                    Err(error) => {
                        broken = true;
                        differences += 1;
                        println!("FAIL {name} with {}: {error}", RUNTIMES[which]);
                    }
                }
                seconds.push(format!("{} {:.1} s", RUNTIMES[which], began.elapsed().as_secs_f64()));
            }
            complete(suite, file, &options.runtimes, &mut measured);
            let found = compare(&expectations, file, &measured, filter.is_none() && !broken);
            let word = if found.is_empty() && !broken { "ok  " } else { "FAIL" };
            println!("{word} {name}: {} cases ({})", measured.len(), seconds.join(", "));
            for (index, (case, difference)) in found.iter().enumerate() {
                println!("     {difference}");
                // Once for both runtimes.
                if found.get(index + 1).is_none_or(|(next, _)| next != case) {
                    print!("{}", said.get(case).map_or("", String::as_str));
                }
            }
            cases += measured.len();
            differences += found.len();
            if let Some(out) = &options.out {
                append(&out.join(format!("{}.tsv", suite.name())), &render(&expectations, file, &measured))?;
                append(&out.join(format!("{}.log", suite.name())), &said.into_values().collect::<String>())?;
            }
        }
    }
    println!("{cases} cases, {differences} not as expected ({:.0} s)", started.elapsed().as_secs_f64());
    Ok(cases > 0 && differences == 0)
}

/// Which of `parts` hosts, counted from 1, runs each file: the largest first, each to who has least. A case takes about as long
/// as another.
fn shares(sizes: &[usize], parts: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|index| std::cmp::Reverse(sizes[*index]));
    let mut loads = vec![0; parts];
    let mut shares = vec![0; sizes.len()];
    for index in order {
        let Some((least, load)) = loads.iter_mut().enumerate().min_by_key(|(_, load)| **load) else { break };
        *load += sizes[index];
        shares[index] = least + 1;
    }
    shares
}

/// Leaves the root of all control groups, where nothing but an emulated host's first process is: tests of runc look for files that
/// the root does not have.
fn enter_cgroup() -> Outcome {
    let group = Path::new("/sys/fs/cgroup/conformance");
    fs::create_dir_all(group).map_err(|error| format!("{}: {error}", group.display()))?;
    Ok(fs::write(group.join("cgroup.procs"), std::process::id().to_string())?)
}

/// A validation program that does not fail with one runtime does not name what fails with the other: that passed.
fn complete(suite: Suite, file: &str, runtimes: &[usize], measured: &mut Measured) {
    if suite != Suite::RuntimeTools {
        return;
    }
    let ran = measured.get(file).copied().unwrap_or_default();
    for verdicts in measured.values_mut() {
        for &which in runtimes {
            if ran[which].is_some() {
                verdicts[which].get_or_insert(Verdict::Pass);
            }
        }
    }
}

/// Runs a file with a runtime, and sees to it that nothing of podhull outlives it.
fn one(suite: Suite, options: &Options, file: &str, filter: Option<&str>, runtime: &Path) -> Outcome<suites::Cases> {
    // A short name: tests make sockets below.
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let directory = std::env::temp_dir().join(format!("conformance.{}.{number}", std::process::id()));
    fs::create_dir_all(&directory)?;
    let cases = suite.run(&options.suites, file, filter, runtime, &directory);
    if suite == Suite::RuntimeTools {
        delete_all(runtime)?;
    }
    let left = left_behind(runtime);
    kill_leftovers();
    // Tests leave mounts and worse; what is below is gone with the host.
    let _ = fs::remove_dir_all(&directory);
    let cases = cases?;
    ensure!(left.is_empty(), "left behind: {}", left.join("; "));
    Ok(cases)
}

/// Removes the containers that validation programs leave as they are.
fn delete_all(runtime: &Path) -> Outcome {
    let listed = Running::start(&[runtime.into(), "list".into(), "--quiet".into()], &[])?.wait()?.output()?;
    for id in listed.lines() {
        let words = [runtime.into(), "delete".into(), "--force".into(), id.into()];
        Running::start(&words, &[])?.wait()?.output()?;
    }
    Ok(())
}

/// Processes of the runtime that are still there some time after the last test.
fn left_behind(runtime: &Path) -> Vec<String> {
    // A sealed copy has the name too.
    let name = runtime.file_name().unwrap_or_default().to_string_lossy();
    let until = Instant::now() + SETTLE;
    loop {
        let left: Vec<String> = processes::descendants(std::process::id().cast_signed())
            .into_iter()
            .filter(|process| {
                process.program.as_ref().is_some_and(|program| program.to_string_lossy().contains(&*name))
            })
            .map(|process| format!("{} {}", process.pid, process.command))
            .collect();
        if left.is_empty() || Instant::now() > until {
            return left;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn append(path: &Path, text: &str) -> Outcome {
    let mut file = File::options().create(true).append(true).open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_shared_by_their_size_each_to_one() {
        assert_eq!(shares(&[1, 10, 3, 4, 2], 2), [2, 1, 2, 2, 2]);
        assert_eq!(shares(&[1, 1, 1], 1), [1, 1, 1]);
        assert!(shares(&[], 2).is_empty());
    }
}
