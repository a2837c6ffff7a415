//! Many at once, and many in a row.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{long, oci};
use crate::container::Container;
use crate::leaks::{Leaks, Totals};
use crate::run::{DEADLINE, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    long(oci("load::twenty_at_once", twenty_at_once)),
    oci("load::many_in_a_row_leak_nothing", many_in_a_row_leak_nothing),
];

fn twenty_at_once(scene: &Scene) -> Outcome {
    let rounds = scene.repeat.div_ceil(50);
    for _ in 0..rounds {
        let mut runs: Vec<Running> = Vec::new();
        for number in 0..20 {
            let bundle = scene.busybox()?.set("/linux/resources/memory", json!({ "limit": 64 << 20 }));
            runs.push(scene.start(&bundle.sh(&format!("echo ready {number}; read line; echo $line; exit {number}")))?);
        }
        for (number, run) in runs.iter_mut().enumerate() {
            ensure_eq!(run.line_within(DEADLINE * 2)?, format!("ready {number}"), "line of the {number}th");
        }
        // All twenty are up at this moment.
        for (number, run) in runs.iter_mut().enumerate() {
            run.send(format!("{number}\n").as_bytes())?;
        }
        for (number, run) in runs.into_iter().enumerate() {
            let ended = run.wait_within(DEADLINE * 2)?.expect_status(i32::try_from(number)?)?;
            ensure_eq!(ended.stdout, format!("ready {number}\n{number}\n"), "stdout of the {number}th");
        }
    }
    Ok(())
}

/// A thousand in a soak of 200, in the foreground and step by step by turns.
fn many_in_a_row_leak_nothing(scene: &Scene) -> Outcome {
    let count = if scene.is_soak() { scene.repeat * 5 } else { 10 };
    let bundle = scene.busybox()?.sh("exit 3");
    let run = || -> Outcome {
        scene.run(&bundle)?.expect_status(3)?;
        let container = Container::create(scene, &bundle)?;
        container.start()?;
        ensure_eq!(container.wait()?, 3, "exit status");
        container.delete()
    };
    // What is made once and kept, by the kernel or by us, is no leak.
    for _ in 0..2 {
        run()?;
    }
    let things = Leaks::watch();
    let own = std::fs::read_dir("/proc/self/fd")?.count();
    let before = Totals::now()?;
    for _ in 0..count.div_ceil(2) {
        run()?;
    }
    things.check()?;
    ensure_eq!(std::fs::read_dir("/proc/self/fd")?.count(), own, "open files of the suite itself");
    // Less than one file for each run of a soak; a few come and go with other processes of the host. A soak that leaks a
    // guest with each run, or its page tables, exceeds 24 MiB many times over. The kernel frees much of what a run used in its own time.
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let after = Totals::now()?;
        let (files, kib) = (after.files - before.files, before.available_kib - after.available_kib);
        if files < 32 && kib < 24 << 10 {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{files} open files more, {kib} KiB less memory available after {count} runs");
        std::thread::sleep(Duration::from_millis(500));
    }
}
