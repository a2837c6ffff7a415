//! What the host sees of a container, and the container of the host.

use std::fs;

use super::podhull;
use crate::leaks::Leaks;
use crate::processes;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    podhull("isolation::the_kernel_is_the_guest_s", the_kernel_is_the_guest_s),
    podhull("isolation::the_host_sees_only_podhull", the_host_sees_only_podhull),
];

fn the_kernel_is_the_guest_s(scene: &Scene) -> Outcome {
    let inside = scene.run(&scene.debian()?.args(&["uname", "-r"]))?.output()?;
    let host = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(inside.trim() != host.trim(), "the container runs on the host's kernel {}", host.trim());
    ensure!(inside.starts_with("6.12"), "guest kernel {inside:?}");
    Ok(())
}

/// All processes that come with a container are podhull's, and all mounts of it are under podhull's directory.
fn the_host_sees_only_podhull(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let network = fs::read_to_string("/proc/net/dev")?.lines().count();
    let volume = scene.make_directory("volume")?;
    let bundle = scene.debian()?.bind(&volume, "/mnt", &["rbind"]).sh("sleep 4242 & echo ready; read line");
    let mut run = scene.start(&bundle)?;
    run.expect_line("ready")?;
    let program = fs::canonicalize(scene.runtime.program())?;
    let mut ours = processes::descendants(run.pid());
    ours.extend(processes::all().into_iter().filter(|process| process.pid == run.pid()));
    ensure!(ours.len() >= 2, "the machine is not a process of its own: {ours:?}");
    for process in &ours {
        ensure_eq!(process.program.as_deref(), Some(program.as_path()), "program of {process:?}");
    }
    let stranger = processes::all().into_iter().find(|process| process.command.contains("sleep 4242"));
    ensure!(stranger.is_none(), "a process of the container is on the host: {stranger:?}");
    for thing in before.since() {
        if let Some(mount) = thing.strip_prefix("mount ") {
            // Other namespaces hold copies of the host's own mounts; what counts is whose root file system or volume it is.
            let host = fs::read_to_string("/proc/self/mountinfo")?;
            if host.lines().any(|line| line.starts_with(mount)) {
                let point = mount.split(' ').nth(4).unwrap_or_default();
                ensure!(point.starts_with("/run/podhull"), "mount of the container in the host's namespace: {mount}");
            }
        }
    }
    ensure_eq!(fs::read_to_string("/proc/net/dev")?.lines().count(), network, "network devices of the host");
    run.send(b"end\n")?;
    run.wait()?.expect_status(0)?;
    Ok(())
}
