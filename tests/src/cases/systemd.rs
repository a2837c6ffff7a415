//! `--systemd-cgroup`: systemd makes the control groups. These run on a host that was booted with it
//! (`tests/host/job/with-systemd`), and nowhere else.

use std::collections::BTreeMap;
use std::path::Path;

use rustix::process::{Signal, kill_process};
use serde_json::json;

use super::cgroups::{ROOT, execute, group_of, machines_beside, processes_in, reap, value};
use super::{oci, podhull};
use crate::container::Container;
use crate::leaks::Leaks;
use crate::run::Running;
use crate::runtime::Runtime;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("systemd::a_container_is_a_scope", a_container_is_a_scope),
    oci("systemd::without_a_path_it_is_in_the_system_slice", without_a_path_it_is_in_the_system_slice),
    oci("systemd::an_executed_program_is_in_the_scope", an_executed_program_is_in_the_scope),
    oci("systemd::annotations_are_properties", annotations_are_properties),
    oci("systemd::what_is_no_scope_is_refused", what_is_no_scope_is_refused),
    podhull("systemd::limits_are_properties_as_with_runc", limits_are_properties_as_with_runc),
    podhull("systemd::the_machine_is_a_scope_beside_it", the_machine_is_a_scope_beside_it),
    podhull("systemd::a_killed_shadow_leaves_nothing", a_killed_shadow_leaves_nothing),
];

const CREATE: &[&str] = &["--systemd-cgroup", "create"];

/// What systemd says of a unit.
fn show(unit: &str, properties: &[&str]) -> Outcome<BTreeMap<String, String>> {
    let list = properties.join(",");
    let words = ["systemctl", "show", "-p", &list, unit].map(Into::into);
    let text = Running::start(&words, &[])?.wait()?.output()?;
    Ok(text.lines().filter_map(|line| line.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
}

/// One of its properties.
pub fn property(unit: &str, name: &str) -> Outcome<String> {
    show(unit, &[name])?.remove(name).ok_or_else(|| format!("{unit} has no property {name}").into())
}

fn is_loaded(unit: &str) -> Outcome<bool> {
    Ok(property(unit, "LoadState")? != "not-found")
}

fn a_container_is_a_scope(scene: &Scene) -> Outcome {
    let name = scene.id();
    let unit = format!("test-{name}.scope");
    let group = Path::new(ROOT).join("machine.slice/machine-inner.slice").join(&unit);
    let bundle = scene.debian()?.set("/linux/cgroupsPath", json!(format!("machine-inner.slice:test:{name}")));
    let bundle = bundle.sh("exec sleep 1000");
    // Twice: the name is free as soon as the container is deleted.
    for _ in 0..2 {
        let container = Container::make(scene, &bundle, CREATE)?;
        ensure_eq!(group_of(container.pid)?, group, "group");
        container.start()?;
        ensure_eq!(property(&unit, "ActiveState")?, "active", "state of the scope");
        ensure_eq!(property(&unit, "Delegate")?, "yes", "delegation");
        container.end()?;
        ensure!(!group.exists(), "the group is still there");
        ensure!(!is_loaded(&unit)?, "the scope is still there");
    }
    for slice in ["machine-inner.slice", "machine.slice"] {
        Running::start(&["systemctl", "stop", slice].map(Into::into), &[])?.wait()?.output()?;
    }
    Ok(())
}

fn without_a_path_it_is_in_the_system_slice(scene: &Scene) -> Outcome {
    let container = Container::make(scene, &scene.debian()?.sh("exec sleep 1000"), CREATE)?;
    let unit = format!("{}-{}.scope", scene.runtime.name(), container.id);
    ensure_eq!(group_of(container.pid)?, Path::new(ROOT).join("system.slice").join(unit), "group");
    container.end()
}

fn an_executed_program_is_in_the_scope(scene: &Scene) -> Outcome {
    let container = Container::make(scene, &scene.debian()?.sh("exec sleep 1000"), CREATE)?;
    container.start()?;
    // Without the flag: the container knows.
    let executed = execute(&container, &["sleep", "1000"])?;
    ensure_eq!(group_of(executed)?, group_of(container.pid)?, "group of the executed program");
    let reaper = reap(executed);
    container.end()?;
    Ok(reaper.join().map_err(|_| "panic")??)
}

fn annotations_are_properties(scene: &Scene) -> Outcome {
    let bundle = scene.debian()?.sh("exec sleep 1000").set(
        "/annotations",
        json!({ "org.systemd.property.TimeoutStopUSec": "uint64 7000000", "org.systemd.property.KillSignal": "10" }),
    );
    let container = Container::make(scene, &bundle, CREATE)?;
    let unit = format!("{}-{}.scope", scene.runtime.name(), container.id);
    ensure_eq!(property(&unit, "TimeoutStopUSec")?, "7s", "property of an annotation");
    ensure_eq!(property(&unit, "KillSignal")?, "10", "property of an annotation");
    container.end()?;
    let bundle = bundle.set("/annotations", json!({ "org.systemd.property.KillSignal": "soon" }));
    let error = Container::make(scene, &bundle, CREATE).err().ok_or("a wrong annotation is taken")?.to_string();
    ensure!(error.contains("org.systemd.property.KillSignal"), "{error}");
    Ok(())
}

fn what_is_no_scope_is_refused(scene: &Scene) -> Outcome {
    for (path, expected) in [
        (
            "/a/b",
            "expected cgroupsPath to be of format \"slice:prefix:name\" for systemd cgroups, got \"/a/b\" instead",
        ),
        ("no-slice:test:x", "slice"),
    ] {
        let bundle = scene.debian()?.set("/linux/cgroupsPath", json!(path)).sh("exec sleep 1000");
        let error = Container::make(scene, &bundle, CREATE).err().ok_or("it is taken")?.to_string();
        ensure!(error.contains(expected), "{path}: {error}");
    }
    Ok(())
}

const PROPERTIES: &[&str] = &[
    "MemoryMax",
    "MemoryLow",
    "MemoryHigh",
    "MemorySwapMax",
    "TasksMax",
    "CPUWeight",
    "CPUQuotaPerSecUSec",
    "CPUQuotaPeriodUSec",
    "AllowedCPUs",
    "AllowedMemoryNodes",
];

const FILES: &[&str] = &[
    "memory.max",
    "memory.low",
    "memory.high",
    "memory.swap.max",
    "pids.max",
    "cpu.weight",
    "cpu.max",
    "cpuset.cpus",
    "cpuset.mems",
];

fn limits_are_properties_as_with_runc(scene: &Scene) -> Outcome {
    let runc = Runtime::runc()?;
    for resources in [
        json!({}),
        json!({
            "memory": { "limit": 64 << 20, "reservation": 32 << 20, "swap": 96 << 20 },
            "pids": { "limit": 33 },
            "cpu": { "shares": 2048, "quota": 12_345, "period": 50_000, "cpus": "0", "mems": "0" },
        }),
        json!({
            "memory": { "limit": -1 }, "pids": { "limit": -1 }, "cpu": { "quota": -1, "period": 20_000 },
            "unified": { "memory.high": "90000000" },
        }),
    ] {
        let mut found = Vec::new();
        for runtime in [&scene.runtime, &runc] {
            let bundle = scene.debian()?.set("/linux/resources", resources.clone()).sh("exec sleep 1000");
            let container = Container::make_with(scene, runtime, &bundle, CREATE)?;
            let (unit, group) = (format!("{}-{}.scope", runtime.name(), container.id), group_of(container.pid)?);
            let files = || FILES.iter().map(|file| value(&group, file)).collect::<Outcome<Vec<_>>>();
            let before = files()?;
            let properties = show(&unit, PROPERTIES)?;
            // systemd writes what it knows of again.
            Running::start(&["systemctl", "daemon-reload"].map(Into::into), &[])?.wait()?.output()?;
            let after = files()?;
            ensure_eq!(after, before, "{FILES:?} of {} after systemd read its units again", runtime.name());
            found.push((properties, before));
            container.end()?;
        }
        ensure_eq!(found[0], found[1], "properties and files with {resources}, beside runc's");
    }
    Ok(())
}

fn the_machine_is_a_scope_beside_it(scene: &Scene) -> Outcome {
    let bundle = scene.debian()?.set("/linux/resources/pids", json!({ "limit": 5 })).sh("exec sleep 1000");
    let container = Container::make(scene, &bundle, CREATE)?;
    let group = group_of(container.pid)?;
    let [machine] = &machines_beside(&group)?[..] else { return Err("not one machine".into()) };
    let unit = machine.file_name().ok_or("no name")?.to_string_lossy().into_owned();
    let [pid] = processes_in(machine)?[..] else { return Err("not one process of the machine".into()) };
    ensure_eq!(unit, format!("podhull_vm-{pid}.scope"), "name of the machine's scope");
    ensure_eq!(property(&unit, "TasksMax")?, "infinity", "processes of the machine");
    // When the host goes down the container is ended before its machine.
    let after = property(&format!("podhull-{}.scope", container.id), "After")?;
    ensure!(after.split(' ').any(|other| other == unit), "After={after}");
    container.end()?;
    ensure!(!machine.exists() && !is_loaded(&unit)?, "the machine's scope is still there");
    Ok(())
}

fn a_killed_shadow_leaves_nothing(scene: &Scene) -> Outcome {
    for _ in 0..scene.repeat.min(10) {
        let before = Leaks::watch();
        let bundle = scene.debian()?.sh("exec sleep 1000");
        let container = Container::make(scene, &bundle, &["--systemd-cgroup", "run", "-d"])?;
        let group = group_of(container.pid)?;
        let machine = machines_beside(&group)?;
        kill_process(container.pid, Signal::KILL)?;
        container.end()?;
        for group in machine.iter().chain([&group]) {
            let unit = group.file_name().ok_or("no name")?.to_string_lossy().into_owned();
            ensure!(!is_loaded(&unit)?, "{unit} is still there");
        }
        before.check()?;
    }
    Ok(())
}
