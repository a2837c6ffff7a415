//! What types cannot say about a specification: combinations, bounds, vocabularies.
//!
//! The agent checks again what it enforces; here it is refused before anything is made.

use std::collections::HashSet;
use std::path::{Component, Path};

use oci_spec::runtime::{
    Arch, Hooks, Linux, LinuxDevice, LinuxDeviceType, LinuxIdMapping, LinuxNamespaceType, LinuxResources, LinuxSeccomp,
    LinuxSeccompAction, Mount, Process, Spec,
};

use podhull_protocol::CAPABILITIES;
use serde_json::Value;

use super::devices::{self, Fate};
use super::read::ConfigError;
use super::{HostFiles, has_option, host_files, words};

/// Checks a specification of the right types.
pub fn check(spec: &Spec) -> Result<(), ConfigError> {
    version(spec.version())?;
    match spec.root() {
        Some(root) if root.path().as_os_str().is_empty() => return Err(wrong("root.path", "is empty")),
        Some(root) => text("root.path", &root.path().to_string_lossy())?,
        None => return Err(wrong("root", "is missing")),
    }
    process(spec.process().as_ref().ok_or_else(|| wrong("process", "is missing"))?)?;
    let users = spec.linux().as_ref().and_then(|linux| linux.uid_mappings().as_ref());
    let mapped = users.is_some_and(|users| !users.is_empty()) || spec.linux().as_ref().is_some_and(joins_users);
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        check_mount(&format!("mounts[{index}]"), mount)?;
        check_owners(&format!("mounts[{index}]"), mount, mapped)?;
    }
    if let Some(given) = spec.hooks() {
        hooks(given)?;
    }
    let absent = Linux::default_absent();
    linux(spec, spec.linux().as_ref().unwrap_or(&absent))
}

#[allow(deprecated)]
fn hooks(hooks: &Hooks) -> Result<(), ConfigError> {
    for (kind, list) in [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ] {
        for (index, hook) in list.iter().flatten().enumerate() {
            let field = |name: &str| format!("hooks.{kind}[{index}].{name}");
            absolute(&field("path"), hook.path())?;
            if hook.timeout().is_some_and(|timeout| timeout <= 0) {
                return Err(wrong(field("timeout"), "must be greater than 0 seconds"));
            }
        }
    }
    Ok(())
}

/// Names of capabilities as they were written: the typed view takes `kill` for `CAP_KILL`, the specification does not.
pub fn capability_names(document: &Value) -> Result<(), ConfigError> {
    let Some(sets) = document.pointer("/process/capabilities").and_then(Value::as_object) else { return Ok(()) };
    for (set, names) in sets {
        for (index, name) in names.as_array().into_iter().flatten().filter_map(Value::as_str).enumerate() {
            if !CAPABILITIES.contains(&name) {
                let field = format!("process.capabilities.{set}[{index}]");
                return Err(wrong(field, format!("unknown capability {name:?}")));
            }
        }
    }
    Ok(())
}

/// `Linux::default()` of the crate is a filled-in example; a missing `linux` object asks for nothing.
trait Absent {
    fn default_absent() -> Self;
}

impl Absent for Linux {
    fn default_absent() -> Self {
        let mut linux = Linux::default();
        linux.set_namespaces(None).set_resources(None).set_masked_paths(None).set_readonly_paths(None);
        linux
    }
}

fn wrong(field: impl Into<String>, problem: impl Into<String>) -> ConfigError {
    ConfigError::Value { field: field.into(), problem: problem.into() }
}

fn version(version: &str) -> Result<(), ConfigError> {
    let mut parts = version.split(['.', '-']);
    let numbers = [parts.next(), parts.next(), parts.next()].map(|part| part.and_then(|p| p.parse::<u32>().ok()));
    match numbers {
        [Some(1), Some(_), Some(_)] => Ok(()),
        _ if version.is_empty() => Err(wrong("ociVersion", "is missing")),
        _ => Err(wrong("ociVersion", format!("{version:?} is not a version 1.x.y"))),
    }
}

/// JSON can carry NUL, paths and arguments cannot.
fn text(field: &str, text: &str) -> Result<(), ConfigError> {
    if text.contains('\0') { Err(wrong(field, "contains a NUL character")) } else { Ok(()) }
}

fn absolute(field: &str, path: &Path) -> Result<(), ConfigError> {
    text(field, &path.to_string_lossy())?;
    if path.is_absolute() { Ok(()) } else { Err(wrong(field, format!("{path:?} is not an absolute path"))) }
}

fn process(process: &Process) -> Result<(), ConfigError> {
    match process.args().as_deref() {
        None | Some([]) => return Err(wrong("process.args", "is empty: nothing to run")),
        Some(args) => args.iter().enumerate().try_for_each(|(i, a)| text(&format!("process.args[{i}]"), a))?,
    }
    for (index, variable) in process.env().iter().flatten().enumerate() {
        text(&format!("process.env[{index}]"), variable)?;
    }
    absolute("process.cwd", process.cwd())?;
    let mut seen = Vec::new();
    for (index, limit) in process.rlimits().iter().flatten().enumerate() {
        if seen.contains(&limit.typ()) {
            return Err(wrong(format!("process.rlimits[{index}].type"), format!("{} is there twice", limit.typ())));
        }
        seen.push(limit.typ());
        if limit.soft() > limit.hard() {
            return Err(wrong(
                format!("process.rlimits[{index}].soft"),
                format!("{} is above the hard limit {}", limit.soft(), limit.hard()),
            ));
        }
    }
    if let Some(size) = process.console_size()
        && (size.height() > u64::from(u16::MAX) || size.width() > u64::from(u16::MAX))
    {
        return Err(wrong("process.consoleSize", "is above 65535"));
    }
    Ok(())
}

fn check_mount(field: &str, mount: &Mount) -> Result<(), ConfigError> {
    absolute(&format!("{field}.destination"), mount.destination())?;
    let files = host_files(mount);
    let kind = match files {
        Some(HostFiles::Bind) => "bind",
        Some(HostFiles::Overlay(_)) | None => mount.typ().as_deref().unwrap_or_default(),
    };
    if kind == "bind" {
        match mount.source() {
            Some(source) if !source.as_os_str().is_empty() => {
                text(&format!("{field}.source"), &source.to_string_lossy())?
            }
            _ => return Err(wrong(format!("{field}.source"), "is missing: nothing to bind")),
        }
    } else {
        words::mount_type(kind).map_err(|problem| wrong(format!("{field}.type"), problem))?;
    }
    for (index, option) in mount.options().iter().flatten().enumerate() {
        words::mount_option(kind, option).map_err(|problem| wrong(format!("{field}.options[{index}]"), problem))?;
    }
    Ok(())
}

/// `mapped`: the container has users of its own.
fn check_owners(field: &str, mount: &Mount, mapped: bool) -> Result<(), ConfigError> {
    let all = [("uidMappings", mount.uid_mappings()), ("gidMappings", mount.gid_mappings())]
        .map(|(name, mappings)| (format!("{field}.{name}"), mappings.as_deref().unwrap_or_default()));
    let [(_, users), (_, groups)] = &all;
    match (users.is_empty(), groups.is_empty()) {
        (true, true) if !mapped && (has_option(mount, "idmap") || has_option(mount, "ridmap")) => {
            return Err(wrong(field, "is to be id-mapped, but neither it nor linux has uidMappings and gidMappings"));
        }
        (true, true) => return Ok(()),
        (false, false) if matches!(host_files(mount), Some(HostFiles::Bind)) => {}
        (false, false) => return Err(wrong(&all[0].0, "only bind mounts can be id-mapped")),
        (users, _) => {
            let [(user_field, _), (group_field, _)] = &all;
            let (missing, there) = if users { (user_field, "gidMappings") } else { (group_field, "uidMappings") };
            return Err(wrong(missing, format!("is missing, and {there} is there")));
        }
    }
    all.iter().try_for_each(|(field, mappings)| check_mappings(field, mappings))
}

fn linux(spec: &Spec, linux: &Linux) -> Result<(), ConfigError> {
    let mut namespaces = HashSet::new();
    for (index, namespace) in linux.namespaces().iter().flatten().enumerate() {
        if !namespaces.insert(namespace.typ() as u32) {
            return Err(wrong(format!("linux.namespaces[{index}].type"), "is there twice"));
        }
    }
    let has = |kind: LinuxNamespaceType| namespaces.contains(&(kind as u32));
    if !has(LinuxNamespaceType::Network) {
        return Err(wrong(
            "linux.namespaces",
            "has no network namespace, which asks for the host's network: that cannot be had in a virtual machine; give the \
             container a network namespace (podman and docker: --network bridge or none)",
        ));
    }
    for (field, value) in [("hostname", spec.hostname()), ("domainname", spec.domainname())] {
        let value = value.as_deref().unwrap_or_default();
        text(field, value)?;
        if value.len() > 64 {
            return Err(wrong(field, "is longer than 64 bytes"));
        }
        if !value.is_empty() && !has(LinuxNamespaceType::Uts) {
            return Err(wrong(field, "needs a UTS namespace in linux.namespaces"));
        }
    }
    user_namespace(linux, has(LinuxNamespaceType::User))?;
    for clock in linux.time_offsets().iter().flatten().map(|(clock, _)| clock) {
        if !["monotonic", "boottime"].contains(&clock.as_str()) {
            return Err(wrong(format!("linux.timeOffsets.{clock}"), "unknown clock"));
        }
        if !has(LinuxNamespaceType::Time) {
            return Err(wrong("linux.timeOffsets", "needs a time namespace in linux.namespaces"));
        }
    }
    for (index, device) in linux.devices().iter().flatten().enumerate() {
        check_device(&format!("linux.devices[{index}]"), spec, device)?;
    }
    if let Some(resources) = linux.resources() {
        check_resources(resources)?;
    }
    let cgroup = linux.cgroups_path().as_deref().unwrap_or(Path::new(""));
    text("linux.cgroupsPath", &cgroup.to_string_lossy())?;
    if cgroup.components().any(|component| component == Component::ParentDir) {
        return Err(wrong("linux.cgroupsPath", format!("{cgroup:?} contains \"..\"")));
    }
    match linux.rootfs_propagation().as_deref().unwrap_or_default() {
        "" | "private" | "rprivate" | "slave" | "rslave" | "unbindable" | "runbindable" => {}
        word @ ("shared" | "rshared") => {
            return Err(wrong(
                "linux.rootfsPropagation",
                format!("{word:?}: mounts do not propagate between guest and host; use \"rslave\" or \"rprivate\""),
            ));
        }
        word => return Err(wrong("linux.rootfsPropagation", format!("unknown propagation {word:?}"))),
    }
    for (field, paths) in [("linux.maskedPaths", linux.masked_paths()), ("linux.readonlyPaths", linux.readonly_paths())]
    {
        for (index, path) in paths.iter().flatten().enumerate() {
            absolute(&format!("{field}[{index}]"), Path::new(path))?;
        }
    }
    linux.seccomp().as_ref().map_or(Ok(()), seccomp)
}

/// Whether its user namespace is there already.
fn joins_users(linux: &Linux) -> bool {
    let users = linux.namespaces().iter().flatten().filter(|namespace| namespace.typ() == LinuxNamespaceType::User);
    users.filter_map(|users| users.path().as_ref()).any(|path| !path.as_os_str().is_empty())
}

fn user_namespace(linux: &Linux, private: bool) -> Result<(), ConfigError> {
    // It has its mappings.
    let joined = joins_users(linux);
    for (field, mappings) in [("linux.uidMappings", linux.uid_mappings()), ("linux.gidMappings", linux.gid_mappings())]
    {
        let mappings = mappings.as_deref().unwrap_or_default();
        match (private, mappings.is_empty()) {
            (true, true) if !joined => {
                return Err(wrong(field, "is empty, but linux.namespaces asks for a user namespace"));
            }
            (false, false) => return Err(wrong(field, "needs a user namespace in linux.namespaces")),
            _ => {}
        }
        check_mappings(field, mappings)?;
    }
    Ok(())
}

fn check_mappings(field: &str, mappings: &[LinuxIdMapping]) -> Result<(), ConfigError> {
    for (index, mapping) in mappings.iter().enumerate() {
        let ends = |start: u32| start.checked_add(mapping.size());
        if mapping.size() == 0 || ends(mapping.host_id()).is_none() || ends(mapping.container_id()).is_none() {
            return Err(wrong(format!("{field}[{index}].size"), format!("{} is out of range", mapping.size())));
        }
    }
    Ok(())
}

fn check_device(field: &str, spec: &Spec, device: &LinuxDevice) -> Result<(), ConfigError> {
    absolute(&format!("{field}.path"), device.path())?;
    if device.typ() == LinuxDeviceType::A {
        return Err(wrong(format!("{field}.type"), "\"a\" is for rules, not for devices"));
    }
    match devices::fate(spec, device) {
        Fate::Guest | Fate::Disk { .. } | Fate::LeftOut => Ok(()),
        Fate::Refused => Err(wrong(
            field,
            format!(
                "not supported: {} ({} {}:{}) is a device of the host, and of those only block devices can be passed into the \
                 virtual machine",
                device.path().display(),
                device.typ().as_str(),
                device.major(),
                device.minor()
            ),
        )),
    }
}

/// Checks limits of the right types.
pub fn check_resources(resources: &LinuxResources) -> Result<(), ConfigError> {
    for (index, rule) in resources.devices().iter().flatten().enumerate() {
        let access = rule.access().as_deref().unwrap_or_default();
        // Letters beside those that there are mean nothing, as with runc, whose own tests have some.
        if !access.is_empty() && !access.contains(['r', 'w', 'm']) {
            return Err(wrong(
                format!("linux.resources.devices[{index}].access"),
                format!("unknown access {access:?}"),
            ));
        }
    }
    if let Some(memory) = resources.memory() {
        for (field, value) in
            [("limit", memory.limit()), ("reservation", memory.reservation()), ("swap", memory.swap())]
        {
            if value.is_some_and(|value| value < -1) {
                return Err(wrong(format!("linux.resources.memory.{field}"), "is below -1"));
            }
        }
    }
    if let Some(cpu) = resources.cpu() {
        for (field, list) in [("cpus", cpu.cpus()), ("mems", cpu.mems())] {
            if let Some(list) = list.as_deref().filter(|list| !list.is_empty())
                && last_of_list(list).is_none()
            {
                return Err(wrong(
                    format!("linux.resources.cpu.{field}"),
                    format!("{list:?} is not a list like 0-2,7"),
                ));
            }
        }
        if cpu.period().is_some_and(|period| period != 0 && !(1_000..=1_000_000).contains(&period)) {
            return Err(wrong("linux.resources.cpu.period", "is not between 1000 and 1000000 microseconds"));
        }
        if cpu.quota().is_some_and(|quota| quota > 0 && quota < 1_000) {
            return Err(wrong("linux.resources.cpu.quota", "is below 1000 microseconds"));
        }
    }
    for name in resources.unified().iter().flat_map(|unified| unified.keys()) {
        if name.contains(['/', '\0']) || name.starts_with('.') || name.is_empty() {
            return Err(wrong("linux.resources.unified", format!("{name:?} is not the name of a cgroup file")));
        }
    }
    Ok(())
}

/// The highest number in a list of CPUs or memory nodes such as `0-2,7`; `None` if it is not one.
pub fn last_of_list(list: &str) -> Option<u32> {
    let mut last = 0;
    for range in list.trim().split(',') {
        let (from, to) = range.split_once('-').unwrap_or((range, range));
        let (from, to) = (from.trim().parse::<u32>().ok()?, to.trim().parse::<u32>().ok()?);
        if from > to {
            return None;
        }
        last = last.max(to);
    }
    Some(last)
}

fn seccomp(seccomp: &LinuxSeccomp) -> Result<(), ConfigError> {
    for (index, arch) in seccomp.architectures().iter().flatten().enumerate() {
        // Rules for an architecture this machine cannot run are never asked, and profiles for several machines have
        // them; the filter cannot hold both byte orders.
        use Arch::*;
        if matches!(
            arch,
            ScmpArchMips
                | ScmpArchMips64
                | ScmpArchMips64n32
                | ScmpArchPpc
                | ScmpArchPpc64
                | ScmpArchS390
                | ScmpArchS390x
                | ScmpArchParisc
                | ScmpArchParisc64
                | ScmpArchM68k
                | ScmpArchSheb
        ) {
            return Err(wrong(
                format!("linux.seccomp.architectures[{index}]"),
                format!("unsupported architecture {arch}: the guest is x86-64"),
            ));
        }
    }
    let notify = |field: &str, action: LinuxSeccompAction| match action {
        LinuxSeccompAction::ScmpActNotify => Err(ConfigError::Refused {
            field: field.into(),
            reason: "a notification descriptor cannot leave the guest's kernel",
        }),
        _ => Ok(()),
    };
    notify("linux.seccomp.defaultAction", seccomp.default_action())?;
    for (index, rule) in seccomp.syscalls().iter().flatten().enumerate() {
        let field = format!("linux.seccomp.syscalls[{index}]");
        notify(&format!("{field}.action"), rule.action())?;
        if rule.names().is_empty() {
            return Err(wrong(format!("{field}.names"), "is empty"));
        }
        for (position, name) in rule.names().iter().enumerate() {
            if !words::is_syscall(name) {
                return Err(wrong(format!("{field}.names[{position}]"), format!("unknown system call {name:?}")));
            }
        }
        for (position, argument) in rule.args().iter().flatten().enumerate() {
            if argument.index() > 5 {
                return Err(wrong(
                    format!("{field}.args[{position}].index"),
                    "a system call has six arguments, 0 to 5",
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::spec::document;
    use crate::spec::read::read;
    use serde_json::{Value, json};

    /// The error for the default document with one value set, made where it is missing.
    fn with(pointer: &str, value: Value) -> String {
        let mut document: Value = serde_json::from_str(document::TEXT).unwrap();
        let mut at = &mut document;
        for key in pointer.split('.') {
            at = match key.parse::<usize>() {
                Ok(index) => &mut at[index],
                Err(_) => &mut at[key],
            };
        }
        *at = value;
        match read(&document.to_string()) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn each_wrong_value_is_named() {
        for (pointer, value, expected) in [
            ("ociVersion", json!("2.0.0"), ": ociVersion: \"2.0.0\" is not a version 1.x.y"),
            ("root", Value::Null, ": root: is missing"),
            ("process", Value::Null, ": process: is missing"),
            ("process.args", json!([]), ": process.args: is empty: nothing to run"),
            ("process.args.0", json!("a\u{0}b"), ": process.args[0]: contains a NUL character"),
            (
                "process.capabilities.ambient",
                json!(["kill"]),
                ": process.capabilities.ambient[0]: unknown capability \"kill\"",
            ),
            ("process.cwd", json!("here"), ": process.cwd: \"here\" is not an absolute path"),
            ("process.rlimits.0.soft", json!(2048), ": process.rlimits[0].soft: 2048 is above the hard limit 1024"),
            ("mounts.1.type", json!("nfs"), ": mounts[1].type: unknown or unsupported mount type \"nfs\""),
            ("mounts.1.options.0", json!("nosuidd"), ": mounts[1].options[0]: unknown mount option \"nosuidd\""),
            (
                "mounts.1.options.0",
                json!("lowerdir=/a"),
                ": mounts[1].options[0]: unknown mount option \"lowerdir=/a\"",
            ),
            (
                "mounts.1",
                json!({"destination": "/x", "type": "bind", "source": "/a", "options": ["idmap"]}),
                ": mounts[1]: is to be id-mapped, but neither it nor linux has uidMappings and gidMappings",
            ),
            (
                "mounts.1.uidMappings",
                json!([{"containerID": 0, "hostID": 0, "size": 1}]),
                ": mounts[1].gidMappings: is missing, and uidMappings is there",
            ),
            (
                "mounts.1",
                json!({"destination": "/x", "type": "tmpfs", "uidMappings": [{"containerID": 0, "hostID": 0, "size": 1}],
                    "gidMappings": [{"containerID": 0, "hostID": 0, "size": 1}]}),
                ": mounts[1].uidMappings: only bind mounts can be id-mapped",
            ),
            ("linux.rootfsPropagation", json!("odd"), ": linux.rootfsPropagation: unknown propagation \"odd\""),
            ("linux.cgroupsPath", json!("/../up"), ": linux.cgroupsPath: \"/../up\" contains \"..\""),
            ("linux.namespaces.1.type", json!("pid"), ": linux.namespaces[1].type: is there twice"),
            (
                "linux.namespaces",
                json!([{"type": "mount"}]),
                ": linux.namespaces: has no network namespace, which asks for the host's network: that cannot be had in a \
                 virtual machine; give the container a network namespace (podman and docker: --network bridge or none)",
            ),
            (
                "linux.resources.cpu",
                json!({"cpus": "1-x"}),
                ": linux.resources.cpu.cpus: \"1-x\" is not a list like 0-2,7",
            ),
            (
                "linux.uidMappings",
                json!([{"containerID": 0, "hostID": 0, "size": 1}]),
                ": linux.uidMappings: needs a user namespace in linux.namespaces",
            ),
            (
                "linux.seccomp",
                json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read", "opne"], "action": "SCMP_ACT_ERRNO"}]}),
                ": linux.seccomp.syscalls[0].names[1]: unknown system call \"opne\"",
            ),
            (
                "linux.seccomp",
                json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_S390X"]}),
                ": linux.seccomp.architectures[0]: unsupported architecture SCMP_ARCH_S390X: the guest is x86-64",
            ),
            (
                "linux.devices",
                json!([{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]),
                ": linux.devices[0]: not supported: /dev/kvm (c 10:232) is a device of the host, and of those only block \
                 devices can be passed into the virtual machine",
            ),
        ] {
            assert_eq!(with(pointer, value), expected, "{pointer}");
        }
    }

    #[test]
    fn what_callers_really_write_is_accepted() {
        for (pointer, value) in [
            ("linux.devices", json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}])),
            ("linux.rootfsPropagation", json!("rslave")),
            ("linux.resources.memory", json!({"limit": -1, "swap": -1, "swappiness": null})),
            ("mounts.0.options", Value::Null),
            ("hooks", json!({"prestart": null, "poststop": []})),
            ("process.apparmorProfile", json!("containers-default-0.62.2")),
            ("process.selinuxLabel", json!("system_u:system_r:container_t:s0:c94,c620")),
            (
                "linux.seccomp",
                json!({"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"]}),
            ),
        ] {
            assert_eq!(with(pointer, value), "", "{pointer}");
        }
    }
}
