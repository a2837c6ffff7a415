//! A small Kubernetes, whose pods are of podhull and, as control, of runc at the same time: what is seen of both must be the same.
//!
//! [`cluster`] starts it, [`place`] is where the pods of one class are; the cases are in [`pod`], [`ends`], [`workloads`] and [`nodes`].

mod cluster;
mod ends;
mod nodes;
mod place;
mod pod;
mod workloads;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Instant;

use crate::runtime::Runtime;
use crate::suite::Scene;
use crate::{Outcome, ensure};
use cluster::Cluster;
use place::Place;

const HELP: &str = "\
podhull-kubernetes PROGRAMS [--out DIR] [FILTER...]

Starts a Kubernetes of one node with the programs in the directory PROGRAMS (tests/kubernetes/build makes it), as root of a host that
is for it alone, and runs each case whose name contains a FILTER, or all, with pods of the class kata and with pods of runc.
Fails if one does not hold, or if what is seen of the two is not the same.

    --out DIR    write to DIR what the programs of the cluster logged";

/// The classes; the second is what the first is compared with.
const CLASSES: [(&str, u16); 2] = [("kata", 18080), ("runc", 18081)];

/// A test of one class, which says what it saw.
struct Case {
    name: &'static str,
    run: fn(&Place) -> Outcome<String>,
}

const ALL: [&[Case]; 3] = [pod::CASES, ends::CASES, workloads::CASES];

/// A test of the cluster, which has the places of both classes.
type OfCluster = (&'static str, fn(&[Place; 2]) -> Outcome);

/// The last one with what the others have left running.
const OF_CLUSTER: [OfCluster; 2] =
    [("nodes::are_labelled", nodes::are_labelled), ("workloads::node_is_drained", workloads::node_is_drained)];

/// Runs what the command line says.
pub fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.is_empty() || words.iter().any(|word| word == "--help" || word == "-h") {
        println!("{HELP}");
        return ExitCode::SUCCESS;
    }
    match start(words) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("podhull-kubernetes: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start(words: Vec<String>) -> Outcome<bool> {
    ensure!(rustix::process::geteuid().is_root(), "a cluster needs root");
    let mut words = words.into_iter();
    let programs = PathBuf::from(words.next().ok_or("the directory of the programs is missing")?);
    let (mut out, mut filters) = (None, Vec::new());
    while let Some(word) = words.next() {
        match word.as_str() {
            "--out" => out = Some(PathBuf::from(words.next().ok_or("--out needs a value")?)),
            _ => filters.push(word),
        }
    }
    let directory = PathBuf::from(format!("/var/tmp/podhull-kubernetes.{}", std::process::id()));
    fs::create_dir_all(&directory)?;
    let scene = Scene::new(Runtime::under_test()?, 1, directory.clone());
    let began = Instant::now();
    let cluster = Cluster::start(&programs, &scene)?;
    println!("a node is ready ({:.0} s)", began.elapsed().as_secs_f64());
    let result = all(&cluster, &filters);
    if let Some(out) = &out {
        cluster.keep_logs(out)?;
    }
    drop(cluster);
    fs::remove_dir_all(&directory)?;
    println!("{:.0} s", began.elapsed().as_secs_f64());
    result
}

fn all(cluster: &Cluster, filters: &[String]) -> Outcome<bool> {
    let [first, second] = CLASSES.map(|(class, port)| Place::new(cluster, class, port));
    let places = [first?, second?];
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
    let (mut passed, mut failed) = (0, Vec::new());
    let mut say = |name: &str, result: Outcome<String>| match result {
        Ok(times) => {
            passed += 1;
            println!("ok   {name} ({times})");
        }
        Err(error) => {
            println!("FAIL {name}: {error}");
            failed.push(format!("{name}: {error}"));
        }
    };
    for case in ALL.into_iter().flatten().filter(|case| wanted(case.name)) {
        say(case.name, both(case, &places));
    }
    for (name, run) in OF_CLUSTER.into_iter().filter(|(name, _)| wanted(name)) {
        let began = Instant::now();
        say(name, run(&places).map(|()| format!("{:.1} s", began.elapsed().as_secs_f64())));
    }
    for failed in &failed {
        println!("failed: {failed}");
    }
    println!("{passed} passed, {} failed", failed.len());
    Ok(passed > 0 && failed.is_empty())
}

/// Runs a case with both classes at the same time, and compares what was seen.
fn both(case: &Case, places: &[Place; 2]) -> Outcome<String> {
    let ran = thread::scope(|scope| {
        let threads = places.each_ref().map(|place| {
            scope.spawn(move || {
                let began = Instant::now();
                // What is named after the class is so in both.
                let seen = (case.run)(place).map(|seen| seen.replace(place.class, "CLASS"));
                (seen, format!("{} {:.1} s", place.class, began.elapsed().as_secs_f64()))
            })
        });
        threads.map(|thread| thread.join().unwrap_or_else(|_| (Err("it panicked".into()), String::new())))
    });
    let [(first, took), (second, control_took)] = ran;
    let [class, control] = places.each_ref().map(|place| place.class);
    let (seen, expected) = match (first, second) {
        (Ok(seen), Ok(expected)) => (seen, expected),
        (first, second) => {
            let said = |class: &str, result: Outcome<String>| match result {
                Ok(_) => format!("holds with {class}"),
                Err(error) => format!("with {class}: {error}"),
            };
            return Err(format!("{}; {}", said(class, first), said(control, second)).into());
        }
    };
    if seen != expected {
        let lines = |text: &str, other: &str, sign: &str| -> String {
            let other: Vec<_> = other.lines().collect();
            text.lines().filter(|line| !other.contains(line)).map(|line| format!("\n    {sign} {line}")).collect()
        };
        let differences = lines(&seen, &expected, class) + &lines(&expected, &seen, control);
        return Err(format!("what is seen with {class} is not as with {control}:{differences}").into());
    }
    Ok(format!("{took}, {control_took}"))
}
