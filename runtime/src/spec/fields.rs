//! Every field of the OCI runtime specification (1.3) and what becomes of it (design D8): nothing is dropped in silence.
//!
//! Paths are written with `[]` for any element of a list and `*` for any key of a map. A field below a refused one needs
//! no line of its own.

use serde_json::Value;

use super::read::ConfigError;

/// What becomes of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// The agent enforces it in the guest, on the words of the specification.
    Enforced,
    /// The runtime enforces it on the host, or both sides do.
    Host,
    /// Taken, checked for its type, and left out for the guest, because what it is for the machine gives; and how.
    /// See [`labels`](super::labels).
    LeftOut(&'static str),
    /// Not supported, and why. Empty values (`null`, `""`, `0`, `false`, `[]`, `{}`) ask for nothing and are let through.
    Refused(&'static str),
}

use Fate::{Enforced, Host, LeftOut, Refused};

const PROFILE: &str = "a default profile of callers (docker-default, cri-containerd.apparmor.d, nerdctl-default, crio-default, \
     containers-default-VERSION) confines a process of the host, and this one is in the virtual machine; unconfined is as it \
     says; any other is refused";
const PROCESS_LABEL: &str = "one of a default type (container_t, svirt_lxc_net_t, container_init_t, container_kvm_t, svirt_kvm_net_t, \
     spc_t) confines a process of the host, and this one is in the virtual machine; any other is refused";
const LABEL: &str = "it guards files against processes of the host, and who uses them here is in the virtual machine";
const CGROUP_V1: &str = "cgroup v2, which every pod uses, has no such control";
const HOST_DEVICE: &str = "host devices are not passed into the pod yet";
const OTHER_SYSTEM: &str = "for another operating system";

/// All fields, in the order of the specification's pages.
pub const FIELDS: &[(&str, Fate)] = &[
    // config.md
    ("ociVersion", Host),
    ("root", Host),
    ("root.path", Host),
    ("root.readonly", Host),
    ("mounts", Host),
    ("mounts[]", Host),
    ("mounts[].destination", Enforced),
    ("mounts[].source", Host),
    ("mounts[].type", Host),
    ("mounts[].options", Host),
    ("mounts[].options[]", Host),
    ("mounts[].uidMappings", Host),
    ("mounts[].uidMappings[]", Host),
    ("mounts[].uidMappings[].containerID", Host),
    ("mounts[].uidMappings[].hostID", Host),
    ("mounts[].uidMappings[].size", Host),
    ("mounts[].gidMappings", Host),
    ("mounts[].gidMappings[]", Host),
    ("mounts[].gidMappings[].containerID", Host),
    ("mounts[].gidMappings[].hostID", Host),
    ("mounts[].gidMappings[].size", Host),
    ("process", Enforced),
    ("process.terminal", Host),
    ("process.consoleSize", Host),
    ("process.consoleSize.height", Host),
    ("process.consoleSize.width", Host),
    ("process.cwd", Enforced),
    ("process.env", Enforced),
    ("process.env[]", Enforced),
    ("process.args", Enforced),
    ("process.args[]", Enforced),
    ("process.commandLine", Refused(OTHER_SYSTEM)),
    ("process.rlimits", Enforced),
    ("process.rlimits[]", Enforced),
    ("process.rlimits[].type", Enforced),
    ("process.rlimits[].soft", Enforced),
    ("process.rlimits[].hard", Enforced),
    ("process.apparmorProfile", LeftOut(PROFILE)),
    ("process.capabilities", Enforced),
    ("process.capabilities.bounding", Enforced),
    ("process.capabilities.bounding[]", Enforced),
    ("process.capabilities.permitted", Enforced),
    ("process.capabilities.permitted[]", Enforced),
    ("process.capabilities.effective", Enforced),
    ("process.capabilities.effective[]", Enforced),
    ("process.capabilities.inheritable", Enforced),
    ("process.capabilities.inheritable[]", Enforced),
    ("process.capabilities.ambient", Enforced),
    ("process.capabilities.ambient[]", Enforced),
    ("process.noNewPrivileges", Enforced),
    ("process.oomScoreAdj", Host),
    ("process.scheduler", Enforced),
    ("process.scheduler.policy", Enforced),
    ("process.scheduler.nice", Enforced),
    ("process.scheduler.priority", Enforced),
    ("process.scheduler.flags", Enforced),
    ("process.scheduler.flags[]", Enforced),
    ("process.scheduler.runtime", Enforced),
    ("process.scheduler.deadline", Enforced),
    ("process.scheduler.period", Enforced),
    ("process.selinuxLabel", LeftOut(PROCESS_LABEL)),
    ("process.ioPriority", Enforced),
    ("process.ioPriority.class", Enforced),
    ("process.ioPriority.priority", Enforced),
    ("process.execCPUAffinity", Enforced),
    ("process.execCPUAffinity.initial", Enforced),
    ("process.execCPUAffinity.final", Enforced),
    ("process.user", Enforced),
    ("process.user.uid", Enforced),
    ("process.user.gid", Enforced),
    ("process.user.umask", Enforced),
    ("process.user.additionalGids", Enforced),
    ("process.user.additionalGids[]", Enforced),
    ("process.user.username", Refused(OTHER_SYSTEM)),
    ("hostname", Enforced),
    ("domainname", Enforced),
    ("hooks", Enforced),
    ("hooks.prestart", Host),
    ("hooks.prestart[]", Host),
    ("hooks.prestart[].path", Host),
    ("hooks.prestart[].args", Host),
    ("hooks.prestart[].args[]", Host),
    ("hooks.prestart[].env", Host),
    ("hooks.prestart[].env[]", Host),
    ("hooks.prestart[].timeout", Host),
    ("hooks.createRuntime", Host),
    ("hooks.createRuntime[]", Host),
    ("hooks.createRuntime[].path", Host),
    ("hooks.createRuntime[].args", Host),
    ("hooks.createRuntime[].args[]", Host),
    ("hooks.createRuntime[].env", Host),
    ("hooks.createRuntime[].env[]", Host),
    ("hooks.createRuntime[].timeout", Host),
    ("hooks.createContainer", Host),
    ("hooks.createContainer[]", Host),
    ("hooks.createContainer[].path", Host),
    ("hooks.createContainer[].args", Host),
    ("hooks.createContainer[].args[]", Host),
    ("hooks.createContainer[].env", Host),
    ("hooks.createContainer[].env[]", Host),
    ("hooks.createContainer[].timeout", Host),
    ("hooks.startContainer", Enforced),
    ("hooks.startContainer[]", Enforced),
    ("hooks.startContainer[].path", Enforced),
    ("hooks.startContainer[].args", Enforced),
    ("hooks.startContainer[].args[]", Enforced),
    ("hooks.startContainer[].env", Enforced),
    ("hooks.startContainer[].env[]", Enforced),
    ("hooks.startContainer[].timeout", Enforced),
    ("hooks.poststart", Host),
    ("hooks.poststart[]", Host),
    ("hooks.poststart[].path", Host),
    ("hooks.poststart[].args", Host),
    ("hooks.poststart[].args[]", Host),
    ("hooks.poststart[].env", Host),
    ("hooks.poststart[].env[]", Host),
    ("hooks.poststart[].timeout", Host),
    ("hooks.poststop", Host),
    ("hooks.poststop[]", Host),
    ("hooks.poststop[].path", Host),
    ("hooks.poststop[].args", Host),
    ("hooks.poststop[].args[]", Host),
    ("hooks.poststop[].env", Host),
    ("hooks.poststop[].env[]", Host),
    ("hooks.poststop[].timeout", Host),
    ("annotations", Host),
    ("annotations.*", Host),
    ("linux", Enforced),
    ("solaris", Refused(OTHER_SYSTEM)),
    ("windows", Refused(OTHER_SYSTEM)),
    ("zos", Refused(OTHER_SYSTEM)),
    ("freebsd", Refused(OTHER_SYSTEM)),
    ("vm", Refused("the virtual machine of a pod is podhull's own")),
    // config-linux.md
    ("linux.namespaces", Enforced),
    ("linux.namespaces[]", Enforced),
    ("linux.namespaces[].type", Enforced),
    ("linux.namespaces[].path", Host),
    ("linux.uidMappings", Enforced),
    ("linux.uidMappings[]", Enforced),
    ("linux.uidMappings[].containerID", Enforced),
    ("linux.uidMappings[].hostID", Enforced),
    ("linux.uidMappings[].size", Enforced),
    ("linux.gidMappings", Enforced),
    ("linux.gidMappings[]", Enforced),
    ("linux.gidMappings[].containerID", Enforced),
    ("linux.gidMappings[].hostID", Enforced),
    ("linux.gidMappings[].size", Enforced),
    ("linux.timeOffsets", Enforced),
    ("linux.timeOffsets.boottime", Enforced),
    ("linux.timeOffsets.boottime.secs", Enforced),
    ("linux.timeOffsets.boottime.nanosecs", Enforced),
    ("linux.timeOffsets.monotonic", Enforced),
    ("linux.timeOffsets.monotonic.secs", Enforced),
    ("linux.timeOffsets.monotonic.nanosecs", Enforced),
    ("linux.devices", Host),
    ("linux.devices[]", Host),
    ("linux.devices[].type", Host),
    ("linux.devices[].path", Host),
    ("linux.devices[].major", Host),
    ("linux.devices[].minor", Host),
    ("linux.devices[].fileMode", Host),
    ("linux.devices[].uid", Host),
    ("linux.devices[].gid", Host),
    ("linux.netDevices", Refused(HOST_DEVICE)),
    ("linux.cgroupsPath", Host),
    ("linux.resources", Host),
    ("linux.resources.devices", Enforced),
    ("linux.resources.devices[]", Enforced),
    ("linux.resources.devices[].allow", Enforced),
    ("linux.resources.devices[].type", Enforced),
    ("linux.resources.devices[].major", Enforced),
    ("linux.resources.devices[].minor", Enforced),
    ("linux.resources.devices[].access", Enforced),
    ("linux.resources.memory", Host),
    ("linux.resources.memory.limit", Host),
    ("linux.resources.memory.reservation", Host),
    ("linux.resources.memory.swap", Host),
    ("linux.resources.memory.kernel", Refused(CGROUP_V1)),
    ("linux.resources.memory.kernelTCP", Refused(CGROUP_V1)),
    ("linux.resources.memory.swappiness", Refused(CGROUP_V1)),
    ("linux.resources.memory.disableOOMKiller", Refused(CGROUP_V1)),
    ("linux.resources.memory.useHierarchy", Host),
    ("linux.resources.memory.checkBeforeUpdate", Host),
    ("linux.resources.cpu", Host),
    ("linux.resources.cpu.shares", Host),
    ("linux.resources.cpu.quota", Host),
    ("linux.resources.cpu.burst", Host),
    ("linux.resources.cpu.period", Host),
    ("linux.resources.cpu.realtimeRuntime", Refused(CGROUP_V1)),
    ("linux.resources.cpu.realtimePeriod", Refused(CGROUP_V1)),
    ("linux.resources.cpu.cpus", Host),
    ("linux.resources.cpu.mems", Host),
    ("linux.resources.cpu.idle", Host),
    ("linux.resources.pids", Host),
    ("linux.resources.pids.limit", Host),
    ("linux.resources.blockIO", Host),
    ("linux.resources.blockIO.weight", Host),
    ("linux.resources.blockIO.leafWeight", Refused(CGROUP_V1)),
    ("linux.resources.blockIO.weightDevice", Host),
    ("linux.resources.blockIO.weightDevice[]", Host),
    ("linux.resources.blockIO.weightDevice[].major", Host),
    ("linux.resources.blockIO.weightDevice[].minor", Host),
    ("linux.resources.blockIO.weightDevice[].weight", Host),
    ("linux.resources.blockIO.weightDevice[].leafWeight", Refused(CGROUP_V1)),
    ("linux.resources.blockIO.throttleReadBpsDevice", Host),
    ("linux.resources.blockIO.throttleReadBpsDevice[]", Host),
    ("linux.resources.blockIO.throttleReadBpsDevice[].major", Host),
    ("linux.resources.blockIO.throttleReadBpsDevice[].minor", Host),
    ("linux.resources.blockIO.throttleReadBpsDevice[].rate", Host),
    ("linux.resources.blockIO.throttleWriteBpsDevice", Host),
    ("linux.resources.blockIO.throttleWriteBpsDevice[]", Host),
    ("linux.resources.blockIO.throttleWriteBpsDevice[].major", Host),
    ("linux.resources.blockIO.throttleWriteBpsDevice[].minor", Host),
    ("linux.resources.blockIO.throttleWriteBpsDevice[].rate", Host),
    ("linux.resources.blockIO.throttleReadIOPSDevice", Host),
    ("linux.resources.blockIO.throttleReadIOPSDevice[]", Host),
    ("linux.resources.blockIO.throttleReadIOPSDevice[].major", Host),
    ("linux.resources.blockIO.throttleReadIOPSDevice[].minor", Host),
    ("linux.resources.blockIO.throttleReadIOPSDevice[].rate", Host),
    ("linux.resources.blockIO.throttleWriteIOPSDevice", Host),
    ("linux.resources.blockIO.throttleWriteIOPSDevice[]", Host),
    ("linux.resources.blockIO.throttleWriteIOPSDevice[].major", Host),
    ("linux.resources.blockIO.throttleWriteIOPSDevice[].minor", Host),
    ("linux.resources.blockIO.throttleWriteIOPSDevice[].rate", Host),
    ("linux.resources.hugepageLimits", Host),
    ("linux.resources.hugepageLimits[]", Host),
    ("linux.resources.hugepageLimits[].pageSize", Host),
    ("linux.resources.hugepageLimits[].limit", Host),
    ("linux.resources.network", Refused(CGROUP_V1)),
    ("linux.resources.rdma", Refused(HOST_DEVICE)),
    ("linux.resources.unified", Host),
    ("linux.resources.unified.*", Host),
    ("linux.intelRdt", Refused("cache and bandwidth of the host's CPUs are not divided among pods yet")),
    ("linux.memoryPolicy", Refused("the guest has one memory node")),
    ("linux.sysctl", Enforced),
    ("linux.sysctl.*", Enforced),
    ("linux.seccomp", Enforced),
    ("linux.seccomp.defaultAction", Enforced),
    ("linux.seccomp.defaultErrnoRet", Enforced),
    ("linux.seccomp.architectures", Enforced),
    ("linux.seccomp.architectures[]", Enforced),
    ("linux.seccomp.flags", Enforced),
    ("linux.seccomp.flags[]", Enforced),
    ("linux.seccomp.listenerPath", Refused("a notification descriptor cannot leave the guest's kernel")),
    ("linux.seccomp.listenerMetadata", Refused("a notification descriptor cannot leave the guest's kernel")),
    ("linux.seccomp.syscalls", Enforced),
    ("linux.seccomp.syscalls[]", Enforced),
    ("linux.seccomp.syscalls[].names", Enforced),
    ("linux.seccomp.syscalls[].names[]", Enforced),
    ("linux.seccomp.syscalls[].action", Enforced),
    ("linux.seccomp.syscalls[].errnoRet", Enforced),
    ("linux.seccomp.syscalls[].args", Enforced),
    ("linux.seccomp.syscalls[].args[]", Enforced),
    ("linux.seccomp.syscalls[].args[].index", Enforced),
    ("linux.seccomp.syscalls[].args[].value", Enforced),
    ("linux.seccomp.syscalls[].args[].valueTwo", Enforced),
    ("linux.seccomp.syscalls[].args[].op", Enforced),
    ("linux.rootfsPropagation", Enforced),
    ("linux.maskedPaths", Enforced),
    ("linux.maskedPaths[]", Enforced),
    ("linux.readonlyPaths", Enforced),
    ("linux.readonlyPaths[]", Enforced),
    ("linux.mountLabel", LeftOut(LABEL)),
    ("linux.personality", Enforced),
    ("linux.personality.domain", Enforced),
    ("linux.personality.flags", Enforced),
    ("linux.personality.flags[]", Enforced),
];

/// What a walk over a document has found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Paths of properties that no specification we know has.
    pub unknown: Vec<String>,
    /// Paths of lists where no list belongs.
    pub lists: Vec<String>,
    /// Whether a key was written with other letters, upper or lower, than its field.
    pub respelt: bool,
}

/// Refuses what is refused; removes refused fields that ask for nothing, and unknown ones: the runtime specification
/// (`config.md`, Extensibility) wants properties it does not define to be ignored.
pub fn check(document: &mut Value) -> Result<Checked, ConfigError> {
    let mut checked = Checked::default();
    walk(document, "", "", &mut checked)?;
    Ok(checked)
}

/// `path` as people read it, `pattern` as the table has it.
fn walk(value: &mut Value, path: &str, pattern: &str, checked: &mut Checked) -> Result<(), ConfigError> {
    match value {
        Value::Object(members) => {
            let mut kept = serde_json::Map::new();
            let given: Vec<String> = members.keys().cloned().collect();
            for (mut key, mut member) in std::mem::take(members) {
                if let Some(name) = spelt_otherwise(pattern, &key)
                    && !given.iter().any(|given| given == name)
                {
                    key = name.to_owned();
                    checked.respelt = true;
                }
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                match fate(pattern, &key) {
                    Some((_, Refused(_))) if is_empty(&member) => {}
                    Some((_, Refused(reason))) => return Err(ConfigError::Refused { field: path, reason }),
                    Some((pattern, Enforced | Host | LeftOut(_))) => {
                        walk(&mut member, &path, pattern, checked)?;
                        kept.insert(key, member);
                    }
                    None => checked.unknown.push(path),
                }
            }
            *members = kept;
        }
        Value::Array(elements) => {
            let pattern = format!("{pattern}[]");
            if !FIELDS.iter().any(|(known, _)| *known == pattern) {
                checked.lists.push(path.to_owned());
            }
            for (index, element) in elements.iter_mut().enumerate() {
                walk(element, &format!("{path}[{index}]"), &pattern, checked)?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// The fields that are taken and left out.
pub fn left_out() -> impl Iterator<Item = &'static str> {
    FIELDS.iter().filter(|(_, fate)| matches!(fate, LeftOut(_))).map(|(pattern, _)| *pattern)
}

/// The line of the table for a member of an object: by its name, else by `*`.
fn fate(parent: &str, key: &str) -> Option<(&'static str, Fate)> {
    let line = |key: &str| {
        FIELDS.iter().copied().find(|(pattern, _)| match pattern.strip_prefix(parent) {
            Some(rest) if parent.is_empty() => rest == key,
            Some(rest) => rest.strip_prefix('.') == Some(key),
            None => false,
        })
    };
    line(key).or_else(|| line("*"))
}

/// The field that a key means to runc, which is not particular about upper and lower case: what limits a container there must not
/// be taken for no field here.
fn spelt_otherwise(parent: &str, key: &str) -> Option<&'static str> {
    if fate(parent, key).is_some() {
        return None;
    }
    FIELDS.iter().find_map(|(pattern, _)| {
        let rest = pattern.strip_prefix(parent)?;
        let name = if parent.is_empty() { rest } else { rest.strip_prefix('.')? };
        (name.eq_ignore_ascii_case(key)).then_some(name)
    })
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(elements) => elements.is_empty(),
        Value::Object(members) => members.values().all(is_empty),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_refused_field_is_named_with_its_place() {
        let mut document = json!({"linux": {"resources": {"blockIO": {"weightDevice": [{}, {"leafWeight": 1}]}}}});
        let error = check(&mut document).unwrap_err().to_string();
        assert!(error.starts_with(": linux.resources.blockIO.weightDevice[1].leafWeight: not supported: "), "{error}");
    }

    #[test]
    fn refused_fields_that_ask_for_nothing_are_taken_out() {
        let mut document = json!({
            "process": {"commandLine": "", "user": {"username": ""}, "cwd": "/"},
            "linux": {"resources": {"memory": {"swappiness": null, "disableOOMKiller": false, "limit": 5}}, "intelRdt": {}},
        });
        assert_eq!(check(&mut document).unwrap(), Checked::default());
        assert_eq!(
            document,
            json!({"process": {"user": {}, "cwd": "/"}, "linux": {"resources": {"memory": {"limit": 5}}}})
        );
    }

    #[test]
    fn properties_of_no_specification_are_ignored_and_reported() {
        let mut document = json!({"process": {"wishes": [1]}, "annotations": {"io.x.y": "z"}});
        assert_eq!(check(&mut document).unwrap().unknown, ["process.wishes"]);
        assert_eq!(document, json!({"process": {}, "annotations": {"io.x.y": "z"}}));
    }

    #[test]
    fn upper_and_lower_case_are_not_told_apart() {
        let mut document = json!({
            "linux": {"Resources": {"CPU": {"Cpus": "0", "shares": 1, "Shares": 2}, "hugepageLimits": [{"pagesize": "2MB"}]}},
            "annotations": {"A": "b", "a": "c"},
        });
        let checked = check(&mut document).unwrap();
        assert!(checked.respelt);
        assert_eq!(checked.unknown, ["linux.resources.cpu.Shares"]);
        assert_eq!(
            document,
            json!({
                "linux": {"resources": {"cpu": {"cpus": "0", "shares": 1}, "hugepageLimits": [{"pageSize": "2MB"}]}},
                "annotations": {"A": "b", "a": "c"},
            })
        );
        let mut refused = json!({"linux": {"INTELRDT": {"closID": "x"}}});
        assert!(check(&mut refused).unwrap_err().to_string().starts_with(": linux.intelRdt"));
    }

    #[test]
    fn nothing_that_is_enforced_is_taken_out() {
        let document = json!({
            "ociVersion": "1.2.0",
            "process": {
                "terminal": true, "consoleSize": {"height": 1, "width": 2}, "cwd": "/", "env": ["A=b"], "args": ["a"],
                "user": {"uid": 1, "gid": 2, "umask": 3, "additionalGids": [4]}, "noNewPrivileges": true,
                "rlimits": [{"type": "RLIMIT_CPU", "soft": 1, "hard": 2}], "capabilities": {"bounding": ["CAP_KILL"]},
                "oomScoreAdj": 1, "scheduler": {"policy": "SCHED_OTHER", "nice": 1, "flags": ["SCHED_FLAG_RESET_ON_FORK"]},
                "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 1},
                "execCPUAffinity": {"initial": "0", "final": "0-1"},
            },
            "root": {"path": "r", "readonly": true}, "hostname": "h", "domainname": "d",
            "mounts": [{"destination": "/a", "type": "bind", "source": "/b", "options": ["ro"]}],
            "hooks": {"startContainer": [{"path": "/a", "args": ["a"], "env": ["A=b"], "timeout": 1}]},
            "annotations": {"a": "b"},
            "linux": {
                "namespaces": [{"type": "pid"}],
                "uidMappings": [{"containerID": 0, "hostID": 1, "size": 2}],
                "gidMappings": [{"containerID": 0, "hostID": 1, "size": 2}],
                "timeOffsets": {"monotonic": {"secs": 1, "nanosecs": 2}},
                "devices": [{"type": "c", "path": "/d", "major": 1, "minor": 3, "fileMode": 4, "uid": 5, "gid": 6}],
                "cgroupsPath": "/a/b",
                "resources": {
                    "devices": [{"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}],
                    "memory": {"limit": 1, "reservation": 2, "swap": 3, "useHierarchy": true, "checkBeforeUpdate": true},
                    "cpu": {"shares": 1, "quota": 2, "burst": 3, "period": 4, "cpus": "0", "mems": "0", "idle": 1},
                    "pids": {"limit": 1}, "hugepageLimits": [{"pageSize": "2MB", "limit": 1}],
                    "blockIO": {
                        "weight": 10, "weightDevice": [{"major": 1, "minor": 2, "weight": 3}],
                        "throttleReadBpsDevice": [{"major": 1, "minor": 2, "rate": 3}],
                    },
                    "unified": {"memory.high": "1"},
                },
                "sysctl": {"a.b": "c"},
                "seccomp": {
                    "defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86"],
                    "flags": ["SECCOMP_FILTER_FLAG_LOG"],
                    "syscalls": [{
                        "names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
                        "args": [{"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_EQ"}],
                    }],
                },
                "rootfsPropagation": "private", "maskedPaths": ["/a"], "readonlyPaths": ["/b"],
                "personality": {"domain": "LINUX32", "flags": ["x"]},
            },
        });
        let mut checked = document.clone();
        assert_eq!(check(&mut checked).unwrap(), Checked::default());
        assert_eq!(checked, document);
    }

    /// The page of the documentation that says what becomes of each field.
    fn page() -> String {
        let mut page = String::from(
            "# Which fields of the OCI runtime specification podhull enforces\n\n\
             Made from the table in `runtime/src/spec/fields.rs` by its tests: after a change there, run\n\
             `PODHULL_WRITE_DOCS=1 cargo test -p podhull fields`.\n\n\
             A refused field is an error that names it, unless its value asks for nothing (`null`, `\"\"`, `0`, `false`, `[]`,\n\
             `{}`). Properties that the specification does not define are ignored, as it demands. `[]` stands for each element\n\
             of a list, `*` for each key of a map.\n\n\
             A block device in `linux.devices` becomes a disk of the virtual machine: at the path that is asked for, under the\n\
             number that the guest's kernel gives it, which also counts in the rules about devices. Where these allow all\n\
             devices, as in a privileged container, a device of the host that no rule names is left out, and `--debug` says so:\n\
             callers list all that the host has there, and what they mean is that nothing is closed to the container.\n\n\
             The profile of AppArmor and the labels of SELinux that callers give every container on a host with such a module\n\
             are taken and left out, and `--debug` says so, as are the options `context`, `fscontext`, `defcontext` and\n\
             `rootcontext` of mounts. They keep a process of the host from what its kernel has, and no program of a container\n\
             is one: its virtual machine is the boundary, whose kernel has no such module. The process that stands for a\n\
             container on the host is not put under them either: they are written for the program, and may forbid what that\n\
             process does for it. It has no capabilities and few system calls instead. A profile or a type of process that\n\
             somebody has chosen (`appArmorProfile: {type: Localhost}`, `--security-opt apparmor=NAME`) confines the program\n\
             itself, and is refused.\n\n\
             | field | |\n| --- | --- |\n",
        );
        for (pattern, fate) in FIELDS {
            page += &match fate {
                Enforced => format!("| `{pattern}` | enforced in the guest |\n"),
                Host => format!("| `{pattern}` | enforced on the host, or on both sides |\n"),
                LeftOut(reason) => format!("| `{pattern}` | taken and left out: {reason} |\n"),
                Refused(reason) => format!("| `{pattern}` | refused: {reason} |\n"),
            };
        }
        page
    }

    #[test]
    fn the_documentation_says_what_the_table_says() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/oci-support.md");
        if std::env::var_os("PODHULL_WRITE_DOCS").is_some() {
            std::fs::write(path, page()).unwrap();
        }
        assert!(std::fs::read_to_string(path).unwrap() == page(), "docs/oci-support.md is stale: see its first lines");
    }

    #[test]
    fn the_table_has_each_field_once_and_after_its_parent() {
        for (index, (pattern, _)) in FIELDS.iter().enumerate() {
            let before = &FIELDS[..index];
            assert!(before.iter().all(|(other, _)| other != pattern), "{pattern} is there twice");
            let parent = match (pattern.strip_suffix("[]"), pattern.rfind('.')) {
                (Some(parent), _) => Some(parent),
                (None, Some(dot)) => Some(&pattern[..dot]),
                (None, None) => None,
            };
            let covered = |parent: &str| before.iter().any(|(other, _)| *other == parent);
            assert!(parent.is_none_or(covered), "{pattern} has no parent in the table");
        }
    }
}
