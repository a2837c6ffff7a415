//! The files of a sandbox, in the bundle that containerd has made for it: what it is made of itself, and what its containers have in
//! common. With a container of its own for each pod (`sandboxer = "podsandbox"`) it is containerd that makes the same.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::config::{Mode, Pod};
use crate::config::{KATA_PREFIX, PREFIX};
use crate::shim::rootfs::{self, RootfsError};

/// Files that each container has from its pod, unless its specification has others there.
const FILES: [&str; 3] = ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf"];

/// POSIX shared memory.
const MEMORY: &str = "/dev/shm";

/// What the host goes by when it has no memory left, as containerd's own has it.
const OOM_SCORE_ADJ: i64 = -998;

/// What cannot be made, or read.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// A file.
    #[error("bundle of the sandbox: {0}: {1}")]
    File(PathBuf, #[source] io::Error),
    /// What is no specification.
    #[error("config.json: {0}")]
    Config(#[source] serde_json::Error),
    /// The shared memory.
    #[error(transparent)]
    Memory(#[from] RootfsError),
}

/// What containers write. containerd's link to its directory on a disk, which goes with the bundle; the bundle itself is in memory that
/// the node's own services need.
const WORK: &str = "work";

/// Makes the files of a pod whose network namespace is at this path.
pub fn make(bundle: &Path, id: &str, pod: &Pod, netns: &str) -> Result<(), BundleError> {
    make_files(bundle, pod)?;
    let path = bundle.join("config.json");
    let text = specification(id, pod, netns).to_string();
    fs::write(&path, text).map_err(|error| BundleError::File(path, error))?;
    Ok(rootfs::mount_memory(bundle)?)
}

/// Those in common.
pub(super) fn make_files(bundle: &Path, pod: &Pod) -> Result<(), BundleError> {
    let work = bundle.join(WORK);
    let write = |name: &str, text: &[u8]| {
        let path = work.join(name);
        fs::write(&path, text).map_err(|error| BundleError::File(path, error))
    };
    // The root of what holds the pod, with places for its mounts: it is read-only.
    for path in [bundle.join("root/dev"), bundle.join("root/proc"), work.join("etc")] {
        fs::create_dir_all(&path).map_err(|error| BundleError::File(path, error))?;
    }
    let node = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let hostname = if pod.hostname.is_empty() { &node } else { &pod.hostname };
    write("etc/hostname", format!("{hostname}\n").as_bytes())?;
    write("etc/hosts", &of_node("/etc/hosts")?)?;
    match &pod.dns {
        Some(dns) => write("etc/resolv.conf", resolver(dns).as_bytes()),
        None => write("etc/resolv.conf", &of_node("/etc/resolv.conf")?),
    }
}

/// A file of the node's; one that is not there is empty.
fn of_node(path: &str) -> Result<Vec<u8>, BundleError> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read.map_err(|error| BundleError::File(path.into(), error)),
    }
}

/// `resolv.conf` in containerd's words.
fn resolver([servers, searches, options]: &[Vec<String>; 3]) -> String {
    let line = |name: &str, words: &[String], between: &str| match words {
        [] => String::new(),
        words => format!("{name} {}\n", words.join(between)),
    };
    [line("search", searches, " "), line("nameserver", servers, "\nnameserver "), line("options", options, " ")]
        .concat()
}

/// The specification of what holds the pod: as that of the container that containerd makes for others, without a program.
pub(super) fn specification(id: &str, pod: &Pod, netns: &str) -> Value {
    let mut namespaces = vec![json!({ "type": "mount" })];
    let mut sysctls = pod.sysctls.clone();
    if pod.network != Mode::Node {
        namespaces.push(json!({ "type": "network", "path": netns }));
        namespaces.push(json!({ "type": "uts" }));
        // As containerd 2 has them, unless it is told otherwise.
        for (name, value) in
            [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")]
        {
            if pod.users.is_none() || name != "net.ipv4.ping_group_range" {
                sysctls.entry(name.into()).or_insert_with(|| value.into());
            }
        }
    }
    for (kind, mode) in [("pid", pod.pid), ("ipc", pod.ipc)] {
        if mode != Mode::Node {
            namespaces.push(json!({ "type": kind }));
        }
    }
    let mut linux = json!({ "sysctl": sysctls });
    if let Some(users) = &pod.users {
        namespaces.push(json!({ "type": "user" }));
        let [uids, gids] = users.each_ref().map(|ranges| {
            let range = |(inside, outside, size): &(u32, u32, u32)| {
                json!({ "containerID": inside, "hostID": outside, "size": size })
            };
            Value::from_iter(ranges.iter().map(range))
        });
        (linux["uidMappings"], linux["gidMappings"]) = (uids, gids);
    }
    linux["namespaces"] = namespaces.into();
    if !pod.cgroup_parent.is_empty() {
        linux["cgroupsPath"] = group(&pod.cgroup_parent, id).into();
    }
    let mut spec = json!({
        "ociVersion": "1.2.0",
        "process": {
            "args": ["pause"],
            "cwd": "/",
            "user": { "uid": 0, "gid": 0 },
            "noNewPrivileges": true,
            "oomScoreAdj": OOM_SCORE_ADJ,
        },
        "root": { "path": "root", "readonly": true },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"] },
        ],
        "annotations": annotations(id, pod),
        "linux": linux,
    });
    if !pod.hostname.is_empty() && pod.network != Mode::Node {
        spec["hostname"] = pod.hostname.clone().into();
    }
    spec
}

/// Those that containerd gives to the container that it makes for others, and what the pod asks for of podhull. Which of that it may have
/// the configuration says.
fn annotations(id: &str, pod: &Pod) -> Map<String, Value> {
    let asked = pod.annotations.iter().filter(|(name, _)| name.starts_with(PREFIX) || name.starts_with(KATA_PREFIX));
    let mut all: Map<String, Value> = asked.map(|(name, value)| (name.clone(), value.clone().into())).collect();
    let mut add = |name: &str, value: &str| drop(all.insert(format!("io.kubernetes.cri.{name}"), value.into()));
    add("container-type", "sandbox");
    add("sandbox-id", id);
    add("sandbox-name", &pod.name);
    add("sandbox-namespace", &pod.namespace);
    add("sandbox-uid", &pod.uid);
    add("sandbox-log-directory", &pod.log_directory);
    if let Some([period, quota, shares, memory]) = pod.resources {
        add("sandbox-cpu-period", &period.to_string());
        add("sandbox-cpu-quota", &quota.to_string());
        add("sandbox-cpu-shares", &shares.to_string());
        add("sandbox-memory", &memory.to_string());
    }
    all
}

/// A control group, for systemd where it makes the one above.
fn group(parent: &str, id: &str) -> String {
    match Path::new(parent).file_name().and_then(|name| name.to_str()) {
        Some(slice) if slice.ends_with(".slice") => format!("{slice}:cri-containerd:{id}"),
        _ => Path::new(parent).join(id).to_string_lossy().into_owned(),
    }
}

/// Adds to the specification of a container in this bundle what it has from its pod: containerd leaves that to who makes the sandbox.
pub fn complete(container: &Path, sandbox: &Path) -> Result<(), BundleError> {
    let path = container.join("config.json");
    let wrong = |error| BundleError::File(path.clone(), error);
    let text = fs::read(&path).map_err(wrong)?;
    // What is no object has no fields to add anything to.
    let mut spec = Value::Object(serde_json::from_slice(&text).map_err(BundleError::Config)?);
    if !add_mounts(&mut spec, sandbox) {
        return Ok(());
    }
    let new = container.join("config.json.new");
    let written = fs::File::create_new(&new).and_then(|mut file| file.write_all(spec.to_string().as_bytes()));
    written.and_then(|()| fs::rename(&new, &path)).map_err(wrong)
}

/// Returns whether there was anything to add.
fn add_mounts(spec: &mut Value, sandbox: &Path) -> bool {
    let readonly = spec["root"]["readonly"].as_bool().unwrap_or_default();
    let shares_ipc =
        spec["linux"]["namespaces"].as_array().into_iter().flatten().any(|namespace| {
            namespace["type"] == "ipc" && namespace["path"].as_str().is_some_and(|path| !path.is_empty())
        });
    if spec["mounts"].is_null() {
        spec["mounts"] = json!([]);
    }
    // What is no list is told of by who reads it next.
    let Some(mounts) = spec["mounts"].as_array_mut() else { return false };
    let before = mounts.clone();
    let is_at =
        |mount: &Value, place: &str| mount["destination"].as_str().is_some_and(|at| Path::new(at) == Path::new(place));
    for place in FILES {
        if !mounts.iter().any(|mount| is_at(mount, place)) {
            let source = sandbox.join(WORK).join(place.trim_start_matches('/'));
            let access = if readonly { "ro" } else { "rw" };
            mounts.push(json!({ "destination": place, "type": "bind", "source": source, "options": ["rbind", "rprivate", access] }));
        }
    }
    // The one of its own is what containerd has in each specification.
    let own = mounts.iter().position(|mount| is_at(mount, MEMORY) && mount["type"] != "bind");
    if shares_ipc && (own.is_some() || !mounts.iter().any(|mount| is_at(mount, MEMORY))) {
        let shared = json!({
            "destination": MEMORY, "type": "bind", "source": rootfs::memory_of(sandbox), "options": ["rbind", "rprivate", "rw"],
        });
        match own {
            Some(index) => mounts[index] = shared,
            None => mounts.push(shared),
        }
    }
    *mounts != before
}
