//! The commands that callers use one after the other, a program executed in a container that runs, and bytes through its output.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::Path;

use super::Bench;
use super::report::{Figure, Panel};
use crate::bundle::{Bundle, DEBIAN};
use crate::run::{DEADLINE, Running};
use crate::runtime::Runtime;
use crate::{Outcome, ensure};

/// MiB that a container writes to a pipe.
const MIB: u32 = 1024;

/// What is taken of each runtime: creating, starting and deleting together, executing, the shadow, and writing.
#[derive(Default)]
struct Samples {
    cycle: Vec<f64>,
    exec: Vec<f64>,
    rate: Vec<f64>,
    shadow: Vec<f64>,
}

/// All contenders in each round, the first one of a round another each time.
pub fn measure(bench: &Bench) -> Outcome<Vec<Panel>> {
    let (runc, crun) = (Runtime::find(OsStr::new("runc"))?, Runtime::find(OsStr::new("crun"))?);
    let runtimes = [&bench.podhull, &runc, &crun];
    let bundle = |name: &str| Bundle::new(bench.directory.join(name), &bench.podhull.spec, Path::new(DEBIAN));
    let idle = bundle("idle")?.args(&["sleep", "1000"]);
    idle.write()?;
    let writer = bundle("writer")?.args(&["head", "-c", &format!("{MIB}M"), "/dev/zero"]);
    writer.write()?;
    let mut samples: [Samples; 3] = Default::default();
    bench.rounds("commands", bench.rounds, |round| {
        for turn in 0..runtimes.len() {
            let index = (round.unwrap_or(0) + turn) % runtimes.len();
            let taken = take(runtimes[index], &idle)?;
            if round.is_some() {
                let samples = &mut samples[index];
                samples.cycle.push(taken.cycle);
                samples.exec.push(taken.exec);
                samples.shadow.push(taken.shadow);
            }
        }
        Ok(())
    })?;
    // Each takes so long that the noise of the host evens out within it.
    bench.rounds("output", bench.few(), |round| {
        for (runtime, samples) in runtimes.iter().zip(&mut samples) {
            let rate = write(runtime, &writer)?;
            samples.rate.extend(round.map(|_| rate));
        }
        Ok(())
    })?;

    let (mut cycles, mut execs, mut rates, mut shadow) = (Vec::new(), Vec::new(), Vec::new(), None);
    for (runtime, samples) in runtimes.iter().zip(samples) {
        let name = runtime.name();
        cycles.push(Figure::new(format!("{name}: create, start, delete"), "ms", samples.cycle));
        execs.push(Figure::new(format!("{name}: exec /bin/true"), "ms", samples.exec));
        rates.push(Figure::new(format!("{name}: output to a pipe"), "MiB/s", samples.rate));
        shadow.get_or_insert(Figure::new("shadow of a container, PSS", "MiB", samples.shadow).at_most(1.0));
    }
    cycles.push(Figure::ratio("create, start, delete: podhull / runc", &cycles[0], &cycles[1]).at_most(1.0));
    execs.push(Figure::ratio("exec: podhull / runc", &execs[0], &execs[1]).at_most(1.0));
    rates.push(Figure::ratio("output: runc / podhull", &rates[1], &rates[0]).at_most(2.0));
    let panel = |title, unit, figures| Panel { title, unit, successive: false, figures };
    Ok(vec![
        panel("Commands of a container's life, from each one's start to its end", "ms", cycles),
        panel("Executing /bin/true in a container that runs", "ms", execs),
        panel("1 GiB from a container's output to a pipe (more is better)", "MiB/s", rates),
        panel("The process that stands for a container in the background", "MiB", shadow.into_iter().collect()),
    ])
}

/// One of each.
struct Taken {
    cycle: f64,
    exec: f64,
    shadow: f64,
}

fn take(runtime: &Runtime, idle: &Bundle) -> Outcome<Taken> {
    let id = format!("bench-{}", std::process::id());
    let program: OsString = runtime.program().into();
    let directory = &idle.directory;
    // What stays in the background would keep the outputs open.
    let call = |script: &str| -> Outcome<f64> {
        let words = ["sh".into(), "-c".into(), script.into(), program.clone(), id.clone().into(), directory.into()];
        Ok(Running::start(&words, &[])?.wait()?.expect_status(0)?.took.as_secs_f64() * 1e3)
    };
    let mut cycle = call("exec $0 create -b $2 --pid-file $2/pid $1 >/dev/null 2>&1 </dev/null")?;
    cycle += call("exec $0 start $1")?;
    let exec = call("exec $0 exec $1 /bin/true")?;
    let shadow = pss(fs::read_to_string(directory.join("pid"))?.trim())?;
    cycle += call("exec $0 delete --force $1")?;
    Ok(Taken { cycle, exec, shadow })
}

/// MiB a second, the start and the end of the container included.
fn write(runtime: &Runtime, writer: &Bundle) -> Outcome<f64> {
    let script = "test $($0 run -b $1 bench-writer | wc -c) = $2".to_owned();
    let bytes = (u64::from(MIB) << 20).to_string();
    let words: [OsString; 6] =
        ["sh".into(), "-c".into(), script.into(), runtime.program().into(), (&writer.directory).into(), bytes.into()];
    let took = Running::start(&words, &[])?.wait_within(DEADLINE * 2)?.expect_status(0)?.took;
    Ok(f64::from(MIB) / took.as_secs_f64())
}

/// Memory of a process in MiB, its share of what others have too.
fn pss(pid: &str) -> Outcome<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).ok_or("no Pss in smaps_rollup")?;
    let kib: u32 = line.trim().trim_end_matches(" kB").parse()?;
    ensure!(kib > 0, "process {pid} has no memory");
    Ok(f64::from(kib) / 1024.0)
}
