//! Profiles of AppArmor and labels of SELinux, which callers give every container on a host that has such a module.

use std::fs;

use serde_json::json;

use super::podhull;
use crate::container::Container;
use crate::leaks::Leaks;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    podhull("labels::are_taken_and_left_out", are_taken_and_left_out),
    podhull("labels::of_one_s_own_are_refused", of_one_s_own_are_refused),
];

const PROCESS: &str = "system_u:system_r:container_t:s0:c94,c620";
const FILES: &str = "system_u:object_r:container_file_t:s0:c94,c620";

/// The profile and the labels are of no host: runc would refuse them where there is no such module, and where there is one.
fn are_taken_and_left_out(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let (log, directory) = (scene.directory.join("log"), scene.make_directory("files")?);
    fs::write(directory.join("file"), "of the host")?;
    let context = |name: &str| format!("{name}=\"{FILES}\"");
    let tmpfs = json!({
        "destination": "/mnt", "type": "tmpfs", "source": "tmpfs",
        "options": ["size=64k", context("context"), format!("rootcontext={FILES}")],
    });
    let bundle = scene
        .debian()?
        .set("/process/apparmorProfile", json!("containers-default-0.62.2"))
        .set("/process/selinuxLabel", json!(PROCESS))
        .set("/linux/mountLabel", json!(FILES))
        .push("/mounts", tmpfs)
        .bind(&directory, "/opt", &["rbind", "ro", &context("fscontext"), &context("defcontext")])
        .sh("cat /opt/file; grep ' /mnt ' /proc/self/mounts; exec sleep 1000");
    let words = ["--debug", "--log", &log.to_string_lossy(), "run", "-d"];
    let container = Container::make(scene, &bundle, &words)?;
    container.expect_output(" /mnt ")?;
    let text = container.output()?;
    ensure!(text.starts_with("of the host") && text.contains("size=64k"), "files in the container: {text:?}");
    ensure!(!text.contains("context"), "a label in the container: {text:?}");

    let process = scene.directory.join("process.json");
    let mut object = bundle.config["process"].clone();
    object["args"] = json!(["echo", "executed"]);
    fs::write(&process, object.to_string())?;
    let execute = [
        &["--apparmor", "docker-default", "--process-label", PROCESS, &container.id, "echo", "executed"][..],
        &["--process", &process.to_string_lossy(), &container.id],
    ];
    for arguments in execute {
        let words = [&["exec"], arguments].concat();
        ensure_eq!(scene.call(&words)?.output()?, "executed\n", "output of {words:?}");
    }

    let text = fs::read_to_string(&log)?;
    let index = bundle.config["mounts"].as_array().map_or(0, Vec::len);
    let mounts = [index - 2, index - 1].map(|index| format!("mounts[{index}].options"));
    let fields = ["process.apparmorProfile", "process.selinuxLabel", "linux.mountLabel"].map(str::to_owned);
    for field in fields.iter().chain(&mounts) {
        let named = text.lines().any(|line| line.contains(field.as_str()) && line.contains("left out"));
        ensure!(named, "no line about {field} in the log:\n{text}");
    }
    container.end()?;
    before.check()
}

/// They would confine the program itself, and are not dropped.
fn of_one_s_own_are_refused(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let label = "system_u:system_r:my_app_t:s0";
    for (pointer, value) in [("/process/apparmorProfile", "k8s-nginx"), ("/process/selinuxLabel", label)] {
        let ended = scene.run(&scene.debian()?.set(pointer, json!(value)).sh("echo never"))?.expect_status(1)?;
        let field = pointer[1..].replace('/', ".");
        ensure!(ended.stderr.contains(&format!("{field}: {value:?}")), "what is said of {pointer}: {:?}", ended.stderr);
        ensure!(ended.stdout.is_empty(), "it ran: {:?}", ended.stdout);
    }
    let bundle = scene.debian()?.set("/process/apparmorProfile", json!("unconfined")).sh("echo ready; exec sleep 1000");
    let container = Container::make(scene, &bundle, &["run", "-d"])?;
    container.expect_output("ready")?;
    for (option, value) in [("--apparmor", "k8s-nginx"), ("--process-label", label)] {
        let ended = scene.call(&["exec", option, value, &container.id, "echo", "never"])?;
        ensure!(ended.status != 0 && ended.stderr.contains(value), "exec {option}: {ended:?}");
    }
    ensure_eq!(
        scene.call(&["exec", "--apparmor", "unconfined", &container.id, "echo", "ran"])?.output()?,
        "ran\n",
        "output"
    );
    container.end()?;
    before.check()
}
