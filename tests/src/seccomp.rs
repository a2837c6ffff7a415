//! The default seccomp profile of container engines, as they hand it to a runtime.
//!
//! The host ships it as `/usr/share/containers/seccomp.json` (package golang-github-containers-common) in the engines' own
//! form, where rules depend on capabilities, architectures and kernel versions. A runtime gets what is left of it for one
//! container on one machine: `linux.seccomp` of config.json.

use serde_json::{Value, json};

use crate::{Outcome, ensure};

const PROFILE: &str = "/usr/share/containers/seccomp.json";

/// The profile for x86-64, Linux 6.12 and a container with these capabilities.
pub fn default_profile(capabilities: &[&str]) -> Outcome<Value> {
    let text = std::fs::read(PROFILE).map_err(|error| format!("{PROFILE}: {error}; it comes with podman"))?;
    let profile: Value = serde_json::from_slice(&text)?;
    let mut architectures = vec![json!("SCMP_ARCH_X86_64")];
    for map in list(&profile["archMap"]).filter(|map| map["architecture"] == "SCMP_ARCH_X86_64") {
        architectures.extend(list(&map["subArchitectures"]).cloned());
    }
    let mut syscalls = Vec::new();
    for rule in list(&profile["syscalls"]) {
        if !applies(&rule["includes"], capabilities, true) || applies(&rule["excludes"], capabilities, false) {
            continue;
        }
        let mut entry = json!({ "names": rule["names"], "action": rule["action"] });
        if !rule["errnoRet"].is_null() {
            entry["errnoRet"] = rule["errnoRet"].clone();
        }
        if list(&rule["args"]).next().is_some() {
            entry["args"] = rule["args"].clone();
        }
        syscalls.push(entry);
    }
    ensure!(syscalls.len() > 5, "{PROFILE} has only {} rules", syscalls.len());
    let mut result = json!({
        "defaultAction": profile["defaultAction"],
        "architectures": architectures,
        "syscalls": syscalls,
    });
    if !profile["defaultErrnoRet"].is_null() {
        result["defaultErrnoRet"] = profile["defaultErrnoRet"].clone();
    }
    Ok(result)
}

/// Whether a condition holds. One without a word about a matter holds in it for `includes`; for `excludes` it needs one
/// that hits.
fn applies(condition: &Value, capabilities: &[&str], otherwise: bool) -> bool {
    let named = |value: &Value| value.as_str().is_some_and(|name| capabilities.contains(&name));
    let here = |value: &Value| matches!(value.as_str(), Some("amd64" | "x86" | "x32"));
    let caps = list(&condition["caps"]).count() > 0;
    let arches = list(&condition["arches"]).count() > 0;
    if otherwise {
        (!caps || list(&condition["caps"]).all(named)) && (!arches || list(&condition["arches"]).any(here))
    } else {
        (caps && list(&condition["caps"]).any(named)) || (arches && list(&condition["arches"]).any(here))
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_without_conditions_is_included_and_not_excluded() {
        assert!(applies(&json!({}), &[], true));
        assert!(!applies(&json!({}), &[], false));
    }

    #[test]
    fn a_rule_for_a_capability_is_included_only_with_it() {
        let condition = json!({ "caps": ["CAP_SYS_ADMIN"] });
        assert!(applies(&condition, &["CAP_SYS_ADMIN"], true));
        assert!(!applies(&condition, &["CAP_KILL"], true));
    }

    #[test]
    fn a_rule_is_excluded_by_the_capability_it_names() {
        let condition = json!({ "caps": ["CAP_SYS_ADMIN"] });
        assert!(applies(&condition, &["CAP_SYS_ADMIN"], false));
        assert!(!applies(&condition, &[], false));
    }

    #[test]
    fn a_rule_for_another_architecture_is_left_out() {
        assert!(!applies(&json!({ "arches": ["s390x"] }), &[], true));
        assert!(applies(&json!({ "arches": ["amd64", "x32"] }), &[], true));
    }
}
