//! What it costs whoever calls podhull by way of containerd: its shim beside the one for runc.

use std::ffi::OsStr;

use super::Bench;
use super::report::{Figure, Panel};
use crate::containerd::{Containerd, Shim};
use crate::runtime::Runtime;
use crate::{Outcome, ensure_eq};

/// Each with a daemon of its own.
struct Contender {
    name: &'static str,
    containerd: Containerd,
    runs: Vec<f64>,
    execs: Vec<f64>,
}

/// `ctr run --rm`, and `ctr task exec` in a container that runs, in turns.
pub fn measure(bench: &Bench) -> Outcome<Vec<Panel>> {
    let contender = |name, runtime: &Runtime, shim| {
        let containerd = Containerd::start(&bench.scene("shim", runtime)?, shim)?;
        Outcome::Ok(Contender { name, containerd, runs: Vec::new(), execs: Vec::new() })
    };
    let runc = Runtime::find(OsStr::new("runc"))?;
    let mut contenders = [contender("podhull", &bench.podhull, Shim::Podhull)?, contender("runc", &runc, Shim::Runc)?];
    for contender in &contenders {
        contender.containerd.run(&["-d"], "idle", &["sleep", "100000"])?.expect_status(0)?;
    }
    bench.rounds("shim", bench.rounds, |round| {
        for turn in 0..contenders.len() {
            let turns = contenders.len();
            let contender = &mut contenders[(round.unwrap_or(0) + turn) % turns];
            let run = contender.containerd.run(&["--rm"], "once", &["echo", "done"])?.expect_status(0)?;
            ensure_eq!(run.stdout, "done\n", "what the container said");
            let words = ["task", "exec", "--exec-id", "once", "idle", "true"];
            let exec = contender.containerd.call(&words)?.expect_status(0)?;
            if round.is_some() {
                contender.runs.push(run.took.as_secs_f64() * 1e3);
                contender.execs.push(exec.took.as_secs_f64() * 1e3);
            }
        }
        Ok(())
    })?;

    let (mut runs, mut execs) = (Vec::new(), Vec::new());
    for Contender { name, containerd, runs: run, execs: exec } in contenders {
        containerd.call(&["task", "delete", "--force", "idle"])?;
        containerd.call(&["container", "delete", "idle"])?.expect_status(0)?;
        containerd.end()?;
        runs.push(Figure::new(format!("{name}: ctr run --rm echo"), "ms", run));
        execs.push(Figure::new(format!("{name}: ctr task exec true"), "ms", exec));
    }
    runs.push(Figure::ratio("ctr run: podhull / runc", &runs[0], &runs[1]).at_most(1.0));
    // Kata's: an agent needs no new runtime process.
    execs.push(Figure::ratio("ctr task exec: podhull / runc", &execs[0], &execs[1]).at_most(0.6));
    let panel = |title, figures| Panel { title, unit: "ms", successive: false, figures };
    Ok(vec![
        panel("By way of containerd's client, from its start to its end", runs),
        panel("Executing true by way of containerd's client", execs),
    ])
}
