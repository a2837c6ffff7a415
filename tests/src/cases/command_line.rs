//! The command line itself: what a person or a caller asks before anything runs.

use serde_json::{Map, Value};

use super::{oci, podhull};
use crate::runtime::Runtime;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("command_line::version_has_the_lines_callers_parse", version_has_the_lines_callers_parse),
    podhull("command_line::spec_is_the_document_of_runc", spec_is_the_document_of_runc),
    podhull("command_line::check_says_that_this_host_can_run_pods", check_says_that_this_host_can_run_pods),
    oci("command_line::features_have_the_keys_callers_read", features_have_the_keys_callers_read),
    podhull("command_line::every_command_has_help_with_an_example", every_command_has_help_with_an_example),
    podhull("command_line::a_wrong_flag_is_named_in_one_line", a_wrong_flag_is_named_in_one_line),
];

fn version_has_the_lines_callers_parse(scene: &Scene) -> Outcome {
    let text = scene.call(&["--version"])?.output()?;
    let first = text.lines().next().unwrap_or_default();
    ensure!(first.starts_with(&format!("{} version ", scene.runtime.name())), "first line {first:?}");
    ensure!(
        text.lines().any(|line| line.starts_with("spec: 1.")),
        "no line with the specification's version in {text:?}"
    );
    Ok(())
}

fn spec_is_the_document_of_runc(scene: &Scene) -> Outcome {
    let mut differences = Vec::new();
    compare("", &scene.runtime.spec, &Runtime::runc()?.spec, &mut differences);
    // Each runtime puts its own name and version there.
    differences.retain(|difference| !difference.starts_with("/hostname ") && !difference.starts_with("/ociVersion "));
    ensure!(differences.is_empty(), "{}", differences.join("; "));
    Ok(())
}

/// Where two documents differ.
fn compare(pointer: &str, ours: &Value, theirs: &Value, differences: &mut Vec<String>) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            for name in ours.keys().chain(theirs.keys().filter(|name| !ours.contains_key(*name))) {
                let side = |document: &Map<String, Value>| document.get(name).cloned().unwrap_or(Value::Null);
                compare(&format!("{pointer}/{name}"), &side(ours), &side(theirs), differences);
            }
        }
        _ if ours != theirs => differences.push(format!("{pointer} is {ours}, with runc {theirs}")),
        _ => {}
    }
}

fn check_says_that_this_host_can_run_pods(scene: &Scene) -> Outcome {
    let text = scene.call(&["check"])?.output()?;
    for point in ["/dev/kvm", "cgroup", "vmlinux", "guest.img"] {
        ensure!(text.contains(point), "nothing about {point} in:\n{text}");
    }
    Ok(())
}

fn features_have_the_keys_callers_read(scene: &Scene) -> Outcome {
    let features: Value = serde_json::from_str(&scene.call(&["features"])?.output()?)?;
    ensure!(features["ociVersionMin"].is_string() && features["ociVersionMax"].is_string(), "versions of {features}");
    for (pointer, word) in [
        ("/mountOptions", "rbind"),
        ("/mountOptions", "rro"),
        ("/linux/namespaces", "network"),
        ("/linux/capabilities", "CAP_SYS_ADMIN"),
        ("/linux/seccomp/actions", "SCMP_ACT_ERRNO"),
        ("/linux/seccomp/operators", "SCMP_CMP_MASKED_EQ"),
        ("/linux/seccomp/archs", "SCMP_ARCH_X86_64"),
    ] {
        let list = features.pointer(pointer).and_then(Value::as_array).ok_or_else(|| format!("no {pointer}"))?;
        ensure!(list.iter().any(|one| one == word), "{pointer} lacks {word}: {list:?}");
    }
    ensure_eq!(features["linux"]["seccomp"]["enabled"], Value::from(true), "seccomp");
    Ok(())
}

fn every_command_has_help_with_an_example(scene: &Scene) -> Outcome {
    let overview = scene.call(&["--help"])?.output()?;
    for command in ["run", "create", "start", "state", "list", "ps", "kill", "delete", "spec", "check", "features"] {
        ensure!(overview.contains(command), "--help does not name {command}");
        let help = scene.call(&[command, "--help"])?.output()?;
        let example = help.lines().any(|line| line.trim_start().contains(&format!("podhull {command}")));
        ensure!(example && help.contains("Example"), "no example in the help of {command}:\n{help}");
    }
    Ok(())
}

fn a_wrong_flag_is_named_in_one_line(scene: &Scene) -> Outcome {
    for arguments in [&["run", "--levitate", "x"][..], &["--levitate"], &["levitate"]] {
        let ended = scene.call(arguments)?.expect_status(1)?;
        ensure!(ended.stderr.contains("levitate"), "stderr {:?} does not name it", ended.stderr);
        ensure_eq!(ended.stderr.lines().count(), 1, "lines of {:?}", ended.stderr);
    }
    Ok(())
}
