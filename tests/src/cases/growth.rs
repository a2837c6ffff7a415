//! The size of a pod's machine follows the limits of its containers.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::podhull;
use crate::container::Container;
use crate::leaks::Leaks;
use crate::run::DEADLINE;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    podhull("growth::of_a_container_that_is_updated", of_a_container_that_is_updated),
    podhull("growth::of_a_pod_that_is_joined", of_a_pod_that_is_joined),
];

const MIB: u64 = 1 << 20;

/// MiB of memory of a container's machine.
fn memory(container: &Container) -> Outcome<u64> {
    let script = "read name kib rest </proc/meminfo; echo $kib";
    let kib: u64 = container.call(&["exec", &container.id, "sh", "-c", script])?.output()?.trim().parse()?;
    Ok(kib / 1024)
}

/// Uses memory, and fails if it cannot be had.
fn use_memory(container: &Container, mib: u64) -> Outcome {
    let script = format!("print(sum(memoryview(b'x' * ({mib} << 20))[::4096]) // 120)");
    let used = container.call(&["exec", &container.id, "python3", "-c", &script])?.output()?;
    ensure_eq!(used, format!("{}\n", mib * 256), "pages used");
    Ok(())
}

/// The guest gives memory back at its own pace.
fn wait_until_less(container: &Container, most: u64) -> Outcome {
    let until = Instant::now() + DEADLINE;
    loop {
        let found = memory(container)?;
        if found <= most {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{found} MiB of memory; at most {most} were expected");
        thread::sleep(Duration::from_millis(200));
    }
}

fn limit(mib: u64) -> serde_json::Value {
    json!({ "memory": { "limit": mib * MIB }, "cpu": { "quota": 100_000, "period": 100_000 } })
}

fn of_a_container_that_is_updated(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    // The smallest has no memory device to begin with, the other has.
    for (begin, more) in [(64, 300), (200, 400)] {
        let bundle = scene.debian()?.set("/linux/resources", limit(begin)).sh("exec sleep 1000");
        let container = Container::make(scene, &bundle, &["run", "-d"])?;
        let id = container.id.as_str();
        let first = memory(&container)?;
        ensure!((begin..begin + 200).contains(&first), "{first} MiB of memory for a limit of {begin}");
        scene.call(&["update", "--memory", &format!("{more}m"), id])?.output()?;
        let grown = memory(&container)?;
        ensure!((more..more + 250).contains(&grown), "{grown} MiB of memory for a limit of {more}");
        use_memory(&container, more - 60)?;
        // Other limits change nothing of it.
        scene.call(&["update", "--pids-limit", "50", id])?.output()?;
        ensure_eq!(memory(&container)?, grown, "MiB of memory after another update");
        scene.call(&["update", "--memory", &format!("{begin}m"), id])?.output()?;
        wait_until_less(&container, first + 50)?;
        scene.call(&["update", "--memory", &format!("{more}m"), id])?.output()?;
        ensure_eq!(memory(&container)?, grown, "MiB of memory when it is more again");
        container.end()?;
        before.check()?;
    }
    Ok(())
}

fn of_a_pod_that_is_joined(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let bundle = scene.debian()?.set("/linux/resources", limit(64)).sh("exec sleep 1000");
    let first = Container::make(scene, &bundle, &["run", "-d"])?;
    let small = memory(&first)?;
    let join = |mib| -> Outcome<Container> {
        let bundle = scene.debian()?.set("/linux/resources", limit(mib)).sh("exec sleep 1000");
        Container::make(scene, &super::pods::in_the_pod_of(bundle, &first), &["run", "-d"])
    };
    let (second, third) = (join(200)?, join(300)?);
    let grown = memory(&first)?;
    ensure!(grown >= 64 + 200 + 300, "{grown} MiB of memory for limits of 64, 200 and 300");
    use_memory(&second, 150)?;
    use_memory(&third, 250)?;
    // What one leaves is given back, and what the others have stays.
    third.end()?;
    wait_until_less(&first, grown - 250)?;
    ensure!(memory(&first)? >= 64 + 200, "{} MiB of memory", memory(&first)?);
    use_memory(&second, 150)?;
    second.end()?;
    wait_until_less(&first, small + 50)?;
    first.end()?;
    before.check()
}
