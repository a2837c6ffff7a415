//! What programs read of a command's output: key for key what runc prints, in its order.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::oci;
use crate::bundle::Bundle;
use crate::container::Container;
use crate::leaks::Leaks;
use crate::runtime::Runtime;
use crate::shape::Shape;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("documents::of_a_container_are_runc_s", of_a_container_are_runc_s),
    oci("documents::features_are_runc_s", features_are_runc_s),
    oci("documents::spec_for_a_user_is_runc_s", spec_for_a_user_is_runc_s),
    oci("documents::a_root_that_is_not_there_has_no_containers", a_root_that_is_not_there_has_no_containers),
];

/// What a runtime says of a container while it runs, and when it has ended.
struct Said {
    states: [String; 2],
    lists: [String; 2],
    processes: String,
    pid: i32,
}

fn ask(scene: &Scene, runtime: &Runtime, bundle: &Bundle, root: &Path) -> Outcome<Said> {
    let root = root.to_string_lossy().into_owned();
    let container = Container::make_with(scene, runtime, bundle, &["--root", &root, "run", "-d"])?;
    let call = |arguments: &[&str]| scene.call_with(runtime, &[&["--root", &root], arguments].concat())?.output();
    let id = container.id.as_str();
    let documents = || Outcome::Ok((call(&["state", id])?, call(&["list", "--format", "json"])?));
    let (state, list) = documents()?;
    let processes = call(&["ps", "--format", "json", id])?;
    call(&["kill", id, "KILL"])?;
    container.wait()?;
    let (ended, list_of_ended) = documents()?;
    call(&["delete", id])?;
    let same = |text: String| text.replace(id, "ID");
    Ok(Said {
        states: [same(state), same(ended)],
        lists: [same(list), same(list_of_ended)],
        processes,
        pid: container.pid.as_raw_nonzero().get(),
    })
}

/// A document without what differs from run to run, and from runtime to runtime.
fn same_for_all(text: &str) -> Outcome<Value> {
    let mut value: Value = serde_json::from_str(text)?;
    let one = if value.is_array() { &mut value[0] } else { &mut value };
    ensure!(one["created"].as_str().is_some_and(|time| time.ends_with('Z')), "no time in {one}");
    for key in ["created", "ociVersion", "pid"] {
        one[key] = Value::Null;
    }
    Ok(value)
}

fn of_a_container_are_runc_s(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let bundle = scene.debian()?.sh("exec sleep 1000");
    let bundle = bundle.set("/annotations", json!({ "org.example.b": "1", "org.example.a": "<&>", "z": "" }));
    let [ours, theirs] = [&scene.runtime, &Runtime::runc()?].map(|runtime| {
        let root = scene.make_directory("root")?;
        ask(scene, runtime, &bundle, &root)
    });
    let (ours, theirs) = (ours?, theirs?);
    let documents = ours.states.iter().chain(&ours.lists).zip(theirs.states.iter().chain(&theirs.lists));
    for (ours, theirs) in documents {
        let [our_shape, their_shape] = [ours, theirs].map(|text| serde_json::from_str::<Shape>(text));
        ensure_eq!(our_shape?, their_shape?, "keys of {ours} and {theirs}");
        ensure_eq!(same_for_all(ours)?, same_for_all(theirs)?, "values");
        // Down to the ends of lines.
        ensure_eq!(ours.lines().count(), theirs.lines().count(), "lines of {ours}");
        ensure_eq!(ours.ends_with('\n'), theirs.ends_with('\n'), "end of {ours}");
    }
    for said in [&ours, &theirs] {
        ensure_eq!(said.processes, format!("[{}]\n", said.pid), "processes");
        let pids =
            said.states.each_ref().map(|text| serde_json::from_str(text).map(|state: Value| state["pid"].clone()));
        let [running, ended] = pids;
        ensure_eq!((running?, ended?), (json!(said.pid), json!(0)), "pids");
    }
    before.check()
}

/// What each key says is the runtime's own.
fn features_are_runc_s(scene: &Scene) -> Outcome {
    let text = scene.call(&["features"])?.output()?;
    let theirs = scene.call_with(&Runtime::runc()?, &["features"])?.output()?;
    let keys = |text: &str| -> Outcome<Vec<String>> {
        let keys = serde_json::from_str::<Shape>(text)?.keys();
        Ok(keys.into_iter().filter(|key| !key.starts_with("/annotations/")).collect())
    };
    let (ours, theirs) = (keys(&text)?, keys(&theirs)?);
    let common: Vec<_> = ours.iter().filter(|key| theirs.contains(key)).collect();
    ensure_eq!(common, theirs.iter().collect::<Vec<_>>(), "keys that runc has, in its order, of {text}");
    ensure!(text.starts_with("{\n    \"ociVersionMin\"") && text.ends_with("}\n"), "form of {text}");
    Ok(())
}

fn spec_for_a_user_is_runc_s(scene: &Scene) -> Outcome {
    let [ours, theirs] = [&scene.runtime, &Runtime::runc()?].map(|runtime| -> Outcome<(Shape, Value)> {
        let directory = scene.make_directory("spec")?;
        let path = directory.to_string_lossy();
        scene.call_with(runtime, &["spec", "--rootless", "--bundle", &path])?.output()?;
        let text = fs::read_to_string(directory.join("config.json"))?;
        let mut value: Value = serde_json::from_str(&text)?;
        (value["ociVersion"], value["hostname"]) = (Value::Null, Value::Null);
        Ok((serde_json::from_str(&text)?, value))
    });
    let ((our_shape, ours), (their_shape, theirs)) = (ours?, theirs?);
    ensure_eq!(ours, theirs, "values");
    ensure_eq!(our_shape.keys(), their_shape.keys(), "keys");
    Ok(())
}

fn a_root_that_is_not_there_has_no_containers(scene: &Scene) -> Outcome {
    let runc = Runtime::runc()?;
    for arguments in [&["list"][..], &["list", "-q"], &["list", "--format", "json"], &["list", "--quiet", "-f", "json"]]
    {
        let [ours, theirs] = [&scene.runtime, &runc].map(|runtime| {
            let root = scene.directory.join(format!("no-such-root-of-{}", runtime.name()));
            let _ = fs::remove_dir(&root);
            let ended = scene.call_with(runtime, &[&["--root", &root.to_string_lossy()], arguments].concat());
            ended.map(|ended| (ended.status, ended.stdout))
        });
        ensure_eq!(ours?, theirs?, "status and output of {arguments:?}");
    }
    Ok(())
}
