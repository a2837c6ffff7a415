//! What it costs whoever calls podhull by way of Podman.

use std::ffi::OsStr;

use super::Bench;
use super::report::{Figure, Panel};
use crate::podman::Podman;
use crate::runtime::Runtime;
use crate::{Outcome, ensure_eq};

/// `podman run --rm` with each runtime in turns.
pub fn measure(bench: &Bench) -> Outcome<Vec<Panel>> {
    let runtimes = [bench.podhull.clone(), Runtime::find(OsStr::new("runc"))?, Runtime::find(OsStr::new("crun"))?];
    let scenes = runtimes.iter().map(|runtime| bench.scene("callers", runtime)).collect::<Outcome<Vec<_>>>()?;
    let callers = scenes.iter().map(Podman::new).collect::<Outcome<Vec<_>>>()?;
    let mut samples: [Vec<f64>; 3] = Default::default();
    bench.rounds("callers", bench.few(), |round| {
        for (podman, samples) in callers.iter().zip(&mut samples) {
            let ended = podman.run(&["--rm"], &["echo", "done"])?.expect_status(0)?;
            ensure_eq!(ended.stdout, "done\n", "what the container said");
            if round.is_some() {
                samples.push(ended.took.as_secs_f64() * 1e3);
            }
        }
        Ok(())
    })?;
    let mut figures: Vec<Figure> = runtimes
        .iter()
        .zip(samples)
        .map(|(runtime, samples)| Figure::new(format!("{}: podman run --rm echo", runtime.name()), "ms", samples))
        .collect();
    figures.push(Figure::ratio("podman run: podhull / runc", &figures[0], &figures[1]));
    Ok(vec![Panel { title: "By way of Podman, from its start to its end", unit: "ms", successive: false, figures }])
}
