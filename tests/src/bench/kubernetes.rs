//! Pods as kubelet makes them: how long they take, alone and many at once, and what an idle one weighs.

use std::ffi::OsStr;
use std::time::Instant;

use super::report::{Figure, Panel};
use super::{Bench, memory};
use crate::cri::{Cri, container};
use crate::runtime::Runtime;
use crate::{Outcome, ensure_eq, processes};

/// Waits for ever, and ends when it is told to.
const IDLE: &[&str] = &["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done"];

/// Pods started at once.
const AT_ONCE: usize = 20;

/// What is taken of each runtime, in ms.
#[derive(Default)]
struct Samples {
    sandbox: Vec<f64>,
    one: Vec<f64>,
    five: Vec<f64>,
    all: Vec<f64>,
    slowest: Vec<f64>,
    each: Vec<f64>,
}

/// Podhull and runc in turns.
pub fn measure(bench: &Bench) -> Outcome<Vec<Panel>> {
    let runtimes = [bench.podhull.clone(), Runtime::find(OsStr::new("runc"))?];
    let mut samples: [Samples; 2] = Default::default();
    let mut weights: [Vec<f64>; 2] = Default::default();
    for ((runtime, samples), ours) in runtimes.iter().zip(&mut samples).zip([true, false]) {
        // One after the other: each has a node's control groups and directories to itself.
        let cri = Cri::start(&bench.scene("kubernetes", runtime)?)?;
        bench.rounds(&format!("kubernetes, {}", runtime.name()), bench.few(), |round| {
            let (sandbox, one) = timed(&cri, "one", 1)?;
            let (_, five) = timed(&cri, "five", 5)?;
            if round.is_some() {
                samples.sandbox.push(sandbox);
                samples.one.push(one);
                samples.five.push(five);
            }
            if ours {
                let [own, guest] = weigh(&cri)?;
                if round.is_some() {
                    weights[0].push(own);
                    weights[1].push(guest);
                }
            }
            Ok(())
        })?;
        for _ in 0..bench.few().min(3) {
            let (all, each) = at_once(&cri)?;
            samples.all.push(all);
            samples.slowest.push(each.iter().copied().fold(0.0, f64::max));
            samples.each.extend(each);
        }
        cri.end()?;
    }

    let (mut ones, mut many) = (Vec::new(), Vec::new());
    for (runtime, samples) in runtimes.iter().zip(samples) {
        let name = runtime.name();
        ones.push(Figure::new(format!("{name}: RunPodSandbox"), "ms", samples.sandbox));
        ones.push(Figure::new(format!("{name}: a pod of one container, to running"), "ms", samples.one));
        ones.push(Figure::new(format!("{name}: a pod of five containers, to running"), "ms", samples.five));
        many.push(Figure::new(format!("{name}: {AT_ONCE} pods at once, all running"), "ms", samples.all));
        many.push(Figure::new(format!("{name}: the slowest of {AT_ONCE} pods at once"), "ms", samples.slowest));
        many.push(Figure::new(format!("{name}: one of {AT_ONCE} pods at once"), "ms", samples.each));
    }
    ones.push(Figure::ratio("a pod of one container: podhull / runc", &ones[1], &ones[4]));
    many.push(Figure::ratio(format!("podhull: {AT_ONCE} pods at once / one pod"), &many[0], &ones[1]).at_most(12.0));
    let [own, guest] = weights;
    let weight = vec![
        Figure::new("all host processes beside guest memory", "MiB", own).at_most(12.0),
        Figure::new("guest memory, PSS", "MiB", guest),
    ];
    let panel = |title, unit, figures| Panel { title, unit, successive: false, figures };
    Ok(vec![
        panel("Pods through containerd's CRI", "ms", ones),
        panel("Pods through containerd's CRI, 20 at once", "ms", many),
        panel("An idle pod of one container through CRI: shim, shadows and machine, PSS", "MiB", weight),
    ])
}

/// Makes a pod with so many containers and takes it away again: until its sandbox and until all containers ran, in ms.
fn timed(cri: &Cri, name: &str, containers: usize) -> Outcome<(f64, f64)> {
    let config = cri.pod_config(name)?;
    let began = Instant::now();
    let pod = cri.run(config)?;
    let sandbox = began.elapsed();
    for number in 0..containers {
        cri.launch(&pod, container(&format!("main-{number}"), IDLE))?;
    }
    let all = began.elapsed();
    cri.remove_pod(&pod)?;
    Ok((sandbox.as_secs_f64() * 1e3, all.as_secs_f64() * 1e3))
}

/// The same with pods of one container, all asked for at the same time, and none waiting for another's: until the last of them ran, and
/// what each of them took, in ms.
fn at_once(cri: &Cri) -> Outcome<(f64, Vec<f64>)> {
    let configs = (0..AT_ONCE).map(|number| cri.pod_config(&format!("many-{number}"))).collect::<Outcome<Vec<_>>>()?;
    let began = Instant::now();
    let started = cri.start_all(configs, &container("main", IDLE))?;
    let all = began.elapsed();
    ensure_eq!(started.len(), AT_ONCE, "count of pods");
    for (pod, _) in &started {
        cri.remove_pod(pod)?;
    }
    let each = started.iter().map(|(_, took)| took.as_secs_f64() * 1e3).collect();
    Ok((all.as_secs_f64() * 1e3, each))
}

/// An idle pod of one container, at rest: memory of its host processes, without and of its guest, in MiB.
fn weigh(cri: &Cri) -> Outcome<[f64; 2]> {
    let before: Vec<i32> = processes::all().iter().map(|process| process.pid).collect();
    let pod = cri.run(cri.pod_config("idle")?)?;
    cri.launch(&pod, container("main", IDLE))?;
    // Those of podhull's that came with it.
    let family = || {
        let new = processes::all().into_iter().filter(|process| !before.contains(&process.pid));
        let ours = new.filter(|process| {
            process.program.as_ref().and_then(|program| program.file_name()).is_some_and(|name| name == "podhull")
        });
        ours.map(|process| process.pid).collect()
    };
    let (own, machine) = memory::at_rest(family).map_err(|error| format!("the pod of {}: {error}", pod.id))?;
    cri.remove_pod(&pod)?;
    Ok([(own.own + machine.own) / 1024.0, machine.guest / 1024.0])
}
