//! Profiles of AppArmor and labels of SELinux. Callers give them to every container on a host that has such a module.
//!
//! They say what a process of the host may ask of the host's kernel, and there is no such process of a container: its
//! programs ask the kernel of their machine, which has neither module. So they are taken, and left out for the guest.
//!
//! The container's shadow is a process of the host, and is not put under them all the same. They are written for what the
//! container runs: a profile may deny what the shadow does for it (reach the machine's sockets, pass signals and a terminal
//! on), and a label may deny it what the caller's label owns (its standard streams, the pod's directory). A transition is
//! to be had for it only before it gives up new privileges and what of `/proc` it would be written to. And there is little
//! left to confine: no program of the container ever runs in it, and it has no capabilities, a root that is the container's
//! and a filter of system calls.

use serde_json::Value;

use super::fields;

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
        if value.is_some_and(|value| value.as_str().is_some_and(|text| !text.is_empty())) {
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
    fn what_is_left_out_is_named_and_everything_else_stays() {
        let mut document = json!({
            "process": {"apparmorProfile": "docker-default", "selinuxLabel": "a:b:c:d", "cwd": "/"},
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
