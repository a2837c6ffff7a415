//! Profiles of AppArmor and labels of SELinux. Callers give default ones to every container on a host that has such a module.
//!
//! Those say what a process of the host may ask of the host's kernel, and there is no such process of a container: its
//! programs ask the kernel of their machine, which has neither module. So they are taken, and left out for the guest. Others,
//! which somebody has chosen, confine the program itself: nothing here does what they say, and so they are refused.
//!
//! The container's shadow is a process of the host, and is not put under them all the same. They are written for what the
//! container runs: a profile may deny what the shadow does for it (reach the machine's sockets, pass signals and a terminal
//! on), and a label may deny it what the caller's label owns (its standard streams, the pod's directory). A transition is
//! to be had for it only before it gives up new privileges and what of `/proc` it would be written to. And there is little
//! left to confine: no program of the container ever runs in it, and it has no capabilities, a root that is the container's
//! and a filter of system calls.

use serde_json::Value;

use super::fields;
use super::read::ConfigError;

/// Profiles that callers make for all of their containers: Docker and BuildKit; containerd for Kubernetes; nerdctl; CRI-O; Podman
/// and Buildah, who add their version.
const PROFILES: [&str; 4] = ["docker-default", "cri-containerd.apparmor.d", "nerdctl-default", "crio-default"];
const VERSIONED_PROFILES: [&str; 2] = ["containers-default-", "crio-default-"];

/// No profile.
const UNCONFINED: &str = "unconfined";

/// Types of processes that the policy for containers gives to all of them (container-selinux): ordinary ones, by both names; with
/// systemd inside; in a virtual machine; and privileged ones, which are not confined.
const TYPES: [&str; 6] =
    ["container_t", "svirt_lxc_net_t", "container_init_t", "container_kvm_t", "svirt_kvm_net_t", "spc_t"];

/// Refuses a profile or a label of the process that somebody has chosen.
pub fn check(profile: &str, label: &str) -> Result<(), ConfigError> {
    let wrong = |field: &str, problem| Err(ConfigError::Value { field: field.into(), problem });
    let is_default = PROFILES.contains(&profile)
        || VERSIONED_PROFILES.iter().any(|name| profile.strip_prefix(name).is_some_and(|version| !version.is_empty()));
    if !(profile.is_empty() || profile == UNCONFINED || is_default) {
        return wrong(
            "process.apparmorProfile",
            format!(
                "{profile:?} is a profile of your own, and a virtual machine enforces none: choose the runtime's default \
                 (Kubernetes: type RuntimeDefault) or \"unconfined\", and confine the program by seccomp and capabilities"
            ),
        );
    }
    let type_of = label.split(':').nth(2);
    if !(label.is_empty() || type_of.is_some_and(|name| TYPES.contains(&name))) {
        return wrong(
            "process.selinuxLabel",
            format!(
                "{label:?} has a type of your own, and a virtual machine enforces none: leave it to the runtime \
                 (container_t), and confine the program by seccomp and capabilities"
            ),
        );
    }
    Ok(())
}

/// Options of mounts that give files a label.
const MOUNT_OPTIONS: [&str; 4] = ["context", "defcontext", "fscontext", "rootcontext"];

/// Whether a mount's option gives files a label: `context="system_u:object_r:container_file_t:s0:c1,c2"`, with or without
/// quotation marks.
pub fn is_option(option: &str) -> bool {
    let Some((name, label)) = option.split_once('=') else { return false };
    let label = match label.strip_prefix('"') {
        Some(quoted) => quoted.strip_suffix('"').unwrap_or_default(),
        None => label,
    };
    MOUNT_OPTIONS.contains(&name) && !label.is_empty() && !label.contains(['"', '\0'])
}

/// Takes out of a checked document what is left out of it; returns the paths of what that was.
pub fn leave_out(document: &mut Value) -> Vec<String> {
    let mut out = Vec::new();
    for field in fields::left_out() {
        let (parent, name) = field.rsplit_once('.').unwrap_or(("", field));
        let parent = if parent.is_empty() { String::new() } else { format!("/{}", parent.replace('.', "/")) };
        let value = document.pointer_mut(&parent).and_then(Value::as_object_mut).and_then(|parent| parent.remove(name));
        // Without a profile it is here as it would be there.
        if value.is_some_and(|value| value.as_str().is_some_and(|text| !text.is_empty() && text != UNCONFINED)) {
            out.push(field.to_owned());
        }
    }
    let mounts = document.get_mut("mounts").and_then(Value::as_array_mut);
    for (index, mount) in mounts.into_iter().flatten().enumerate() {
        let Some(options) = mount.get_mut("options").and_then(Value::as_array_mut) else { continue };
        let before = options.len();
        options.retain(|option| !option.as_str().is_some_and(is_option));
        if options.len() < before {
            out.push(format!("mounts[{index}].options"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_option_that_is_a_label_is_told_from_others() {
        for option in [
            "context=\"system_u:object_r:container_file_t:s0:c1,c2\"",
            "context=system_u:object_r:container_file_t:s0",
            "fscontext=a",
            "defcontext=a",
            "rootcontext=\"a\"",
        ] {
            assert!(is_option(option), "{option}");
        }
        for option in
            ["context", "context=", "context=\"\"", "context=\"", "context=\"a", "mycontext=a", "size=context=a"]
        {
            assert!(!is_option(option), "{option}");
        }
    }

    #[test]
    fn what_callers_choose_is_taken_and_what_people_choose_is_refused() {
        for profile in [
            "",
            "unconfined",
            "docker-default",
            "cri-containerd.apparmor.d",
            "nerdctl-default",
            "crio-default",
            "crio-default-1.32.1",
            "containers-default-0.62.2",
        ] {
            check(profile, "").unwrap();
        }
        for profile in ["k8s-nginx", "docker-default-of-mine", "containers-default-", "docker-nginx", "unconfined "] {
            let error = check(profile, "").unwrap_err().to_string();
            assert!(
                error.starts_with(&format!(": process.apparmorProfile: {profile:?} is a profile of your own")),
                "{error}"
            );
        }
        for label in
            ["system_u:system_r:container_t:s0:c94,c620", "unconfined_u:system_r:spc_t:s0", "a:b:container_kvm_t"]
        {
            check("", label).unwrap();
        }
        for label in ["system_u:system_r:my_app_t:s0", "container_t", "::", "a:b:container_t_of_mine:s0"] {
            let error = check("", label).unwrap_err().to_string();
            assert!(error.starts_with(&format!(": process.selinuxLabel: {label:?}")), "{error}");
        }
    }

    #[test]
    fn what_is_left_out_is_named_and_everything_else_stays() {
        let mut document = json!({
            "process": {"apparmorProfile": "docker-default", "selinuxLabel": "a:b:container_t:d", "cwd": "/"},
            "mounts": [{"options": ["ro"]}, {"options": ["ro", "context=\"a,b\"", "size=1k"]}, {}],
            "linux": {"mountLabel": "", "maskedPaths": []},
        });
        assert_eq!(leave_out(&mut document), ["process.apparmorProfile", "process.selinuxLabel", "mounts[1].options"]);
        assert_eq!(
            document,
            json!({
                "process": {"cwd": "/"},
                "mounts": [{"options": ["ro"]}, {"options": ["ro", "size=1k"]}, {}],
                "linux": {"maskedPaths": []},
            })
        );
        let before = document.clone();
        assert!(leave_out(&mut document).is_empty());
        assert_eq!(document, before);
    }
}
