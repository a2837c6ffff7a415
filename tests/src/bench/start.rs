//! From the command to the end of `/bin/true`, and from the start of a virtual machine to what first runs in it.

use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

use super::report::{Figure, Panel};
use super::{Bench, microvm, pod};
use crate::Outcome;
use crate::bundle::{Bundle, DEBIAN};
use crate::run::Running;
use crate::runtime::Runtime;

/// What a run consists of: a name, and the message of the log that ends it. The last one ends with the process.
const PHASES: [(&str, Option<&str>); 9] = [
    ("process started", Some(pod::RUN)),
    ("bundle read, its files mounted", Some(pod::STARTING)),
    ("VM created, kernel entered", Some(pod::RUNS)),
    ("kernel booted, agent up", Some(pod::READY)),
    ("container created", Some(pod::CREATED)),
    ("container started", Some(pod::STARTED)),
    ("program ran, exit seen", Some(pod::ENDED)),
    ("output written, container deleted", Some(pod::DELETED)),
    ("everything removed", None),
];

/// A bundle that does nothing, for any of the runtimes: their `spec` documents are the same.
pub fn nothing(bench: &Bench) -> Outcome<Bundle> {
    let bundle =
        Bundle::new(bench.directory.join("true"), &bench.podhull.spec, Path::new(DEBIAN))?.args(&["/bin/true"]);
    bundle.write()?;
    Ok(bundle)
}

/// All contenders in each round, the first one of a round another each time.
pub fn measure(bench: &Bench) -> Outcome<Vec<Panel>> {
    let others = [Runtime::find(OsStr::new("runc"))?, Runtime::find(OsStr::new("crun"))?];
    let bundle = nothing(bench)?;
    let microvm = microvm::Microvm::prepare(bench)?;

    let (mut podhull, mut boot, mut qemu) = (Vec::new(), Vec::new(), Vec::new());
    let mut theirs = [Vec::new(), Vec::new()];
    let mut phases = PHASES.map(|_| Vec::new());
    bench.rounds("start", bench.rounds, |round| {
        let keep = |samples: &mut Vec<f64>, sample: Duration| {
            if round.is_some() {
                samples.push(milliseconds(sample));
            }
        };
        let number = round.unwrap_or(bench.rounds);
        for turn in 0..4 {
            match (number + turn) % 4 {
                0 => {
                    let (took, log) = pod::Pod::start(bench, &bundle, &format!("bench-{number}"))?.end()?;
                    keep(&mut podhull, took);
                    keep(&mut boot, log.at(pod::READY)?.saturating_sub(log.at(pod::STARTING)?));
                    let mut from = Duration::ZERO;
                    for ((_, end), samples) in PHASES.iter().zip(&mut phases) {
                        let end = end.map_or(Ok(took), |end| log.since_start(end))?;
                        keep(samples, end.saturating_sub(from));
                        from = end;
                    }
                }
                1 => keep(&mut qemu, microvm.boot()?),
                other => {
                    let words = others[other - 2].run_words(&bundle.directory, &format!("bench-{number}"));
                    keep(&mut theirs[other - 2], Running::start(&words, &[])?.wait()?.expect_status(0)?.took);
                }
            }
        }
        Ok(())
    })?;

    let [runc, crun] = theirs;
    let podhull = Figure::new("podhull run", "ms", podhull);
    let runc = Figure::new("runc run", "ms", runc);
    let crun = Figure::new("crun run", "ms", crun);
    let boot = Figure::new("podhull: VMM start to agent ready", "ms", boot);
    let qemu = Figure::new("QEMU microvm: start to first instruction of init", "ms", qemu);
    let to_runc = Figure::ratio("podhull run / runc run", &podhull, &runc).at_most(1.0);
    let to_crun = Figure::ratio("podhull run / crun run", &podhull, &crun);
    let to_qemu = Figure::ratio("podhull's boot / QEMU microvm's", &boot, &qemu).at_most(0.4);
    let phases = PHASES.iter().zip(phases).map(|((name, _), samples)| Figure::new(*name, "ms", samples)).collect();
    Ok(vec![
        Panel {
            title: "Running /bin/true, from the command to its end; the same bundle",
            unit: "ms",
            successive: false,
            figures: vec![podhull, runc, crun, to_runc, to_crun],
        },
        Panel {
            title: "Booting the same kernel and image with 256 MiB (podhull's includes its agent's connection)",
            unit: "ms",
            successive: false,
            figures: vec![boot, qemu, to_qemu],
        },
        Panel { title: "What podhull run /bin/true spends its time on", unit: "ms", successive: true, figures: phases },
    ])
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
