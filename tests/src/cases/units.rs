//! A container as a unit of systemd's, which Podman writes. As those of [`super::systemd`], these run on a host that was booted with
//! it.

use std::fs;
use std::time::Instant;

use super::systemd::property;
use super::{long, oci};
use crate::leaks::Leaks;
use crate::podman::{Podman, check};
use crate::run::{DEADLINE, Ended, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq, image};

pub const CASES: &[Case] = &[long(oci("systemd::a_unit_that_podman_writes", a_unit_that_podman_writes))];

const UNIT: &str = "container-unit.service";

fn systemctl(words: &[&str]) -> Outcome<Ended> {
    let words: Vec<_> = ["systemctl"].iter().chain(words).map(Into::into).collect();
    Running::start(&words, &[])?.wait()
}

fn a_unit_that_podman_writes(scene: &Scene) -> Outcome {
    let podman = Podman::with_systemd(scene)?;
    // The unit calls Podman once without the places that it was told, which makes these of its own; more of them when it is stopped.
    Running::start(&["podman", "info"].map(Into::into), &[])?.wait()?.output()?;
    let before = Leaks::watch();
    let script = "trap 'echo bye; exit 0' TERM; echo hello; while :; do sleep 0.1; done";
    let create = ["create", "--name", "unit", "--network", "none", "--log-driver", "k8s-file", "--memory", "64m"];
    podman.call(&[&create[..], &[image::NAME, "sh", "-c", script]].concat())?.output()?;
    let words = ["generate", "systemd", "--new", "--name", "--restart-policy", "always", "unit"];
    let written = podman.call(&words)?.output()?;
    podman.call(&["rm", "unit"])?.output()?;
    let file = format!("/run/systemd/system/{UNIT}");
    fs::write(&file, written)?;
    // This host has nothing of what systemd starts on others, which a service waits for if nothing else is said.
    let more = format!("{file}.d");
    fs::create_dir_all(&more)?;
    fs::write(format!("{more}/host.conf"), "[Unit]\nDefaultDependencies=no\n")?;
    systemctl(&["daemon-reload"])?.output()?;
    let ran = ran(&podman);
    let stopped = systemctl(&["stop", UNIT])?;
    fs::remove_file(&file)?;
    fs::remove_dir_all(&more)?;
    systemctl(&["daemon-reload"])?.output()?;
    ran?;
    stopped.output()?;
    ensure_eq!(podman.call(&["ps", "-aq"])?.output()?, "", "containers after the unit was stopped");
    systemctl(&["reset-failed"])?.output()?;
    systemctl(&["stop", "machine.slice"])?.output()?;
    for own in ["/run/containers", "/run/libpod"] {
        fs::remove_dir_all(own)?;
    }
    check(&before)
}

fn ran(podman: &Podman) -> Outcome {
    systemctl(&["start", UNIT])?.output()?;
    ensure_eq!(property(UNIT, "ActiveState")?, "active", "state of the unit");
    let pid = |name| property(UNIT, name);
    let main = pid("MainPID")?;
    let comm = fs::read_to_string(format!("/proc/{main}/comm"))?;
    ensure_eq!(comm, "conmon\n", "main process of the unit");
    let limit = podman.call(&["exec", "unit", "cat", "/sys/fs/cgroup/memory.max"])?.output()?;
    ensure_eq!(limit, "67108864\n", "limit of memory");
    // It is restarted when it ends by itself.
    podman.call(&["kill", "unit"])?.output()?;
    let until = Instant::now() + DEADLINE;
    while pid("MainPID")? == main || property(UNIT, "ActiveState")? != "active" {
        ensure!(Instant::now() < until, "not restarted: {}", property(UNIT, "ActiveState")?);
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    ensure_eq!(podman.call(&["logs", "unit"])?.output()?, "hello\n", "output after the restart");
    Ok(())
}
