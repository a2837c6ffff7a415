//! Where the groups of a container and of its pod's machine are to be, and making them there.

use std::path::{Component, Path, PathBuf};

use podhull_limits::{Resources, settings, weight_on_a_line};
use rustix::fs::statfs;

use super::group::{Cgroup, MOUNT_POINT, Place};
use super::properties::{self, Property};
use super::{CgroupError, systemd};
use crate::config;
use crate::spec::Config;
use crate::state::Process;

/// `f_type` of cgroup v2 (linux/magic.h).
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

/// What the names of machines' groups begin with.
const MACHINE: &str = "podhull_vm-";

/// What the ids of containers in Kubernetes pods have before them in the names of their groups.
const SHADOW: &str = "podhull_";

/// Prefix of the scopes of containers that name none.
const PREFIX: &str = "podhull";

/// Slice of the scopes of containers that name none.
const SLICE: &str = "system.slice";

/// Who makes the groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Manager {
    /// We do; `cgroupsPath` is their path.
    #[default]
    Files,
    /// systemd does (`--systemd-cgroup`), as transient scopes; `cgroupsPath` is `slice:prefix:name`.
    Systemd,
}

/// The places of the groups of one container.
#[derive(Debug)]
pub struct Placement {
    id: String,
    container: Place,
    /// The slice both are in, if systemd makes them.
    slice: String,
    /// What the annotations want systemd to know.
    properties: Vec<Property>,
    limits: Resources,
}

impl Placement {
    /// Decides where the groups are to be; none on a host without cgroup v2, if nothing is asked for that needs one.
    pub fn new(manager: Manager, config: &Config, id: &str) -> Result<Option<Self>, CgroupError> {
        let linux = config.spec().linux().as_ref();
        let path = linux.and_then(|linux| linux.cgroups_path().as_deref()).unwrap_or(Path::new(""));
        let of_pod = config.spec().annotations().as_ref().is_some_and(config::is_of_pod);
        let path = &if of_pod { named_apart(path) } else { path.into() };
        let limits = config.limits().clone();
        if !is_v2() {
            let limited = settings(&limits, weight_on_a_line, |_| None).map_or(true, |settings| !settings.is_empty());
            let needed = [
                (manager == Manager::Systemd, "--systemd-cgroup"),
                (path != Path::new(""), "linux.cgroupsPath"),
                (limited, "linux.resources"),
            ];
            return match needed.iter().find(|(needed, _)| *needed) {
                Some((_, what)) => Err(CgroupError::NoV2(what)),
                None => Ok(None),
            };
        }
        let mut properties = Vec::new();
        let (container, slice) = match manager {
            Manager::Files => (files_path(path, id, own_path)?, String::new()),
            Manager::Systemd => {
                if !systemd::is_running() {
                    return Err(CgroupError::NoSystemd);
                }
                for (key, value) in config.spec().annotations().iter().flatten() {
                    properties.extend(properties::of_annotation(key, value)?);
                }
                scope(path, id)?
            }
        };
        Ok(Some(Self { id: id.into(), container, slice, properties, limits }))
    }

    /// The group of the container with this shadow.
    pub fn container(&self, shadow: Process) -> Cgroup {
        Cgroup { place: self.container.clone(), process: shadow }
    }

    /// The group of a machine's process, beside it.
    pub fn machine(&self, machine: Process) -> Cgroup {
        let parent = self.container.path.parent().unwrap_or(Path::new("/"));
        let name = format!("{MACHINE}{}", machine.pid);
        let place = match &self.container.unit {
            None => Place { path: parent.join(name), unit: None },
            Some(_) => {
                let unit = format!("{name}.scope");
                Place { path: parent.join(&unit), unit: Some(unit) }
            }
        };
        Cgroup { place, process: machine }
    }

    /// Most bytes that may be used in the groups above both: a pod's, where there is one.
    pub fn memory(&self) -> Option<u64> {
        Place { path: self.container.path.parent()?.into(), unit: None }.memory()
    }

    /// Makes the group of the machine's process, and moves it there. Memory that it uses before stays with our own group.
    pub fn make_machine(&self, machine: Process) -> Result<(), CgroupError> {
        let group = self.machine(machine);
        let Some(unit) = &group.place.unit else { return group.make() };
        let description = format!("virtual machine of podhull container {}", self.id);
        // systemd has a default for scopes.
        let further = vec![Property::new("TasksMax", properties::INFINITY)];
        group.start(unit, systemd::Scope { slice: self.slice.clone(), description, further })
    }

    /// Makes the container's group, without limits yet, and moves its shadow there.
    pub fn make_container(&self, shadow: Process, machine: Option<Process>) -> Result<(), CgroupError> {
        let group = self.container(shadow);
        let Some(unit) = &group.place.unit else { return group.make() };
        let mut further = self.properties.clone();
        // What starts later is stopped earlier: when the host goes down the container is told first.
        let machine = machine.and_then(|machine| self.machine(machine).place.unit);
        further.extend(machine.map(|machine| Property::new("After", vec![machine])));
        let description = format!("podhull container {}", self.id);
        group.start(unit, systemd::Scope { slice: self.slice.clone(), description, further })
    }

    /// Sets the limits of the container, and those that bind the machine it has for itself. Not before its shadow has all
    /// its threads: a container may be allowed a single process.
    pub fn limit(&self, shadow: Process, machine: Option<Process>) -> Result<(), CgroupError> {
        if let Some(machine) = machine {
            self.machine(machine).set(&self.limits.of_host())?;
        }
        self.container(shadow).set(&self.limits)
    }
}

fn is_v2() -> bool {
    statfs(MOUNT_POINT).is_ok_and(|fs| fs.f_type == CGROUP2_SUPER_MAGIC)
}

/// The path with what follows the last separator in its name under another name.
///
/// In the group are shadows, which use next to nothing: kubelet would take that for what the container uses, in place of what CRI
/// tells it, wherever cAdvisor finds a group whose name is the container's id (`extractIDFromCgroupPath`: what is behind the last
/// dash of a scope's name, or else the whole name). cAdvisor itself searches for an id anywhere in the name, so that the container
/// is there all the same, with its limits.
fn named_apart(path: &Path) -> PathBuf {
    match path.to_str() {
        None | Some("") => path.into(),
        Some(text) => {
            let (before, id) = text.split_at(text.rfind(['/', ':', '-']).map_or(0, |at| at + 1));
            format!("{before}{SHADOW}{id}").into()
        }
    }
}

/// The path of our own group.
fn own_path() -> Result<String, CgroupError> {
    let file = PathBuf::from("/proc/self/cgroup");
    let text = std::fs::read_to_string(&file).map_err(|e| CgroupError::Read(file, e))?;
    Ok(text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").to_owned())
}

/// As with runc: an absolute path is from the root of the hierarchy, any other, and the id where there is none, is beside the
/// group of who asks, which has processes and so can have no groups with limits below it.
fn files_path(path: &Path, id: &str, own: impl FnOnce() -> Result<String, CgroupError>) -> Result<Place, CgroupError> {
    let wanted = if path.components().any(|c| matches!(c, Component::Normal(_))) { path } else { Path::new(id) };
    let mut place = PathBuf::from("/");
    if wanted.is_relative() {
        let own = own()?;
        if Path::new(&own).components().any(|c| c == Component::ParentDir) {
            return Err(CgroupError::Outside(own));
        }
        place.push(Path::new(&own).parent().unwrap_or(Path::new("/")));
    }
    place.extend(wanted.components().filter(|c| matches!(c, Component::Normal(_))));
    Ok(Place { path: place, unit: None })
}

/// The scope `prefix-name` in a slice, and the slice.
fn scope(path: &Path, id: &str) -> Result<(Place, String), CgroupError> {
    let text = path.to_string_lossy();
    let (slice, prefix, name) = match text.split(':').collect::<Vec<_>>()[..] {
        [""] => (SLICE, PREFIX, id),
        ["", prefix, name] => (SLICE, prefix, name),
        [slice, prefix, name] => (slice, prefix, name),
        _ => return Err(CgroupError::NotSystemd(text.into_owned())),
    };
    let bad = || CgroupError::Unit(text.to_string());
    let unit = if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") };
    let mut place = slice_path(slice).ok_or_else(bad)?;
    // systemd knows best what a unit may be called; what leads elsewhere is not even asked for.
    if name.is_empty() || unit.contains('/') {
        return Err(bad());
    }
    place.push(&unit);
    Ok((Place { path: place, unit: Some(unit) }, slice.to_owned()))
}

/// `a-b.slice` is in `a.slice`, and `-.slice` is the root (systemd.slice(5)).
fn slice_path(slice: &str) -> Option<PathBuf> {
    let stem = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::from("/");
    if stem == "-" {
        return Some(path);
    }
    if stem.contains('/') || stem.split('-').any(str::is_empty) {
        return None;
    }
    let ends = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
    path.extend(ends.map(|end| format!("{}.slice", &stem[..end])));
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_from_the_root_or_beside_us() {
        let at = |path: &str, own: &str| {
            let group = files_path(Path::new(path), "id", || Ok(own.to_owned())).map_err(|e| e.to_string())?;
            Ok::<_, String>(group.path.to_str().unwrap().to_owned())
        };
        assert_eq!(at("/a/b", "/../x").unwrap(), "/a/b");
        assert_eq!(at("/a/./b/", "/").unwrap(), "/a/b");
        assert_eq!(at("a/b", "/user.slice/session.scope").unwrap(), "/user.slice/a/b");
        for nothing in ["", "/", "."] {
            assert_eq!(at(nothing, "/user.slice/session.scope").unwrap(), "/user.slice/id");
            assert_eq!(at(nothing, "/").unwrap(), "/id");
        }
        assert!(at("", "/../x").unwrap_err().contains("\"/../x\""));
    }

    #[test]
    fn groups_of_pods_containers_are_not_named_by_their_ids_alone() {
        let apart = |path: &str| named_apart(Path::new(path)).to_str().unwrap().to_owned();
        assert_eq!(apart("/kubepods/pod1-2/ab12"), "/kubepods/pod1-2/podhull_ab12");
        assert_eq!(apart("/kubepods/pod1-2/crio-ab12"), "/kubepods/pod1-2/crio-podhull_ab12");
        assert_eq!(apart("kubepods-pod1.slice:cri-containerd:ab12"), "kubepods-pod1.slice:cri-containerd:podhull_ab12");
        assert_eq!((apart("ab12"), apart("")), ("podhull_ab12".into(), String::new()));
    }

    #[test]
    fn a_scope_is_in_its_slices() {
        let at = |path: &str| {
            let (group, slice) = scope(Path::new(path), "id").map_err(|e| e.to_string())?;
            Ok::<_, String>(format!("{slice} {} {}", group.path.display(), group.unit.unwrap()))
        };
        assert_eq!(at("").unwrap(), "system.slice /system.slice/podhull-id.scope podhull-id.scope");
        assert_eq!(at(":p:x").unwrap(), "system.slice /system.slice/p-x.scope p-x.scope");
        assert_eq!(
            at("machine-a.slice:libpod:x").unwrap(),
            "machine-a.slice /machine.slice/machine-a.slice/libpod-x.scope libpod-x.scope"
        );
        assert_eq!(at("-.slice::x").unwrap(), "-.slice /x.scope x.scope");
        assert!(
            at("/a/b").unwrap_err().contains("to be of format \"slice:prefix:name\" for systemd cgroups, got \"/a/b\"")
        );
        for bad in ["a--b.slice:p:x", "a:p:x", "a/b.slice:p:x", "a.slice:p:x/y", "a.slice:../p:x", "a.slice:p:"] {
            assert!(at(bad).unwrap_err().contains("not a slice"), "{bad}");
        }
    }

    #[test]
    fn a_machine_is_beside_its_container_under_a_name_that_no_container_has() {
        let beside = |path: &str, unit: Option<&str>| {
            let container = Place { path: path.into(), unit: unit.map(str::to_owned) };
            let (slice, properties, limits) = (String::new(), Vec::new(), Resources::default());
            let placement = Placement { id: "id".into(), container, slice, properties, limits };
            let place = placement.machine(Process { pid: 7, start_time: 8 }).place;
            (place.path.to_str().unwrap().to_owned(), place.unit)
        };
        assert_eq!(beside("/docker/abc", None), ("/docker/podhull_vm-7".into(), None));
        assert_eq!(beside("/abc", None), ("/podhull_vm-7".into(), None));
        let unit = Some("podhull_vm-7.scope".to_owned());
        assert_eq!(beside("/m.slice/x-abc.scope", Some("x-abc.scope")), ("/m.slice/podhull_vm-7.scope".into(), unit));
    }
}
