//! What a bundle asks for: reading `config.json`, checking every field of it (design D8), and what follows for the machine.

pub mod devices;
pub mod document;
mod fields;
mod labels;
mod position;
pub mod read;
mod validate;
pub use validate::last_of_list;
pub mod words;

use std::path::Path;

use oci_spec::runtime::{LinuxIdMapping, LinuxResources, Mount, Spec};
use podhull_limits::Resources as Limits;
use serde_json::{Value, json};

use read::ConfigError;

/// A specification that was read and checked.
#[derive(Debug)]
pub struct Config {
    /// Typed view.
    spec: Spec,
    /// The same document with every field the guest has to know, unknown and empty refused ones removed.
    document: Value,
    /// Properties that no version of the runtime specification we know has; it asks to ignore them.
    unknown: Vec<String>,
    /// `linux.resources` once more, as the limits they are.
    limits: Limits,
    /// What was left out for the guest.
    left_out: LeftOut,
}

/// What of a specification is taken and is not for the guest.
#[derive(Debug)]
struct LeftOut {
    /// Paths of the devices that a privileged container is not given, because they are all that the host has.
    devices: Vec<String>,
    /// Paths of fields with profiles and labels.
    labels: Vec<String>,
}

impl Config {
    /// The typed view.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// What of the file has no effect in the guest though nothing is wrong with it, and why: a sentence each.
    pub fn remarks(&self) -> impl Iterator<Item = String> {
        let LeftOut { devices, labels } = &self.left_out;
        let unknown = |field| format!("{field} is no property of the specification: ignored");
        let device = |path| format!("linux.devices: {path} is the host's and not named by a rule: left out");
        let label = |field| format!("{field}: the machine confines the container, and has no such module: left out");
        self.unknown.iter().map(unknown).chain(devices.iter().map(device)).chain(labels.iter().map(label))
    }

    /// `linux.resources`.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// `root.path` as written.
    pub fn root_path(&self) -> &Path {
        self.spec.root().as_ref().map(|root| root.path().as_path()).unwrap_or(Path::new(""))
    }

    /// `root.readonly`.
    pub fn root_readonly(&self) -> bool {
        self.spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false)
    }

    /// `process.terminal`.
    pub fn terminal(&self) -> bool {
        self.spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or(false)
    }

    /// Rows and columns of `process.consoleSize`.
    pub fn console_size(&self) -> Option<(u16, u16)> {
        let size = self.spec.process().as_ref()?.console_size()?;
        let (rows, columns) = (u16::try_from(size.height()).ok()?, u16::try_from(size.width()).ok()?);
        (rows != 0 && columns != 0).then_some((rows, columns))
    }

    /// `mounts`, in order.
    pub fn mounts(&self) -> &[Mount] {
        self.spec.mounts().as_deref().unwrap_or_default()
    }

    /// Makes `mounts[index]`, whose files are the host's, a bind mount in the document for the guest. What was done on the
    /// host is no more said there.
    pub fn bind_in_guest(&mut self, index: usize, source: &str) {
        let Some(mount) = self.document.pointer_mut(&format!("/mounts/{index}")).and_then(Value::as_object_mut) else {
            return;
        };
        mount.insert("source".into(), source.into());
        mount.insert("type".into(), "bind".into());
        mount.remove("uidMappings");
        mount.remove("gidMappings");
        let options = mount.entry("options").or_insert_with(|| Value::Array(Vec::new()));
        if let Some(options) = options.as_array_mut() {
            let of_host = |option: &str| matches!(option, "idmap" | "ridmap") || option.contains('=');
            options.retain(|option| option.as_str().is_some_and(|option| !of_host(option)));
            if !options.iter().any(|option| option == "bind" || option == "rbind") {
                options.push("bind".into());
            }
        }
    }

    /// Has a socket of the guest stand for one of the host, if that is there when all else is mounted.
    pub fn stand_for_in_guest(&mut self, path: &str, source: &str) {
        let mount = json!({ "type": podhull_protocol::OVER_SOCKET, "source": source, "destination": path });
        if let Some(mounts) = self.document.pointer_mut("/mounts").and_then(Value::as_array_mut) {
            mounts.push(mount);
        }
    }

    /// Takes the paths of namespaces out of the document: they are of the host.
    pub fn clear_namespace_paths(&mut self) {
        let namespaces = self.document.pointer_mut("/linux/namespaces").and_then(Value::as_array_mut);
        for namespace in namespaces.into_iter().flatten().filter_map(Value::as_object_mut) {
            namespace.remove("path");
        }
    }

    /// Makes these the mappings of its user namespace.
    pub fn set_mappings(&mut self, users: &[LinuxIdMapping], groups: &[LinuxIdMapping]) {
        let Some(mut linux) = self.spec.linux().clone() else { return };
        for (field, mappings) in [("uidMappings", users), ("gidMappings", groups)] {
            self.document["linux"][field] = serde_json::to_value(mappings).unwrap_or_default();
        }
        linux.set_uid_mappings(Some(users.to_owned())).set_gid_mappings(Some(groups.to_owned()));
        self.spec.set_linux(Some(linux));
    }

    /// Adds to the program's environment.
    pub fn add_environment(&mut self, entries: Vec<String>) {
        if entries.is_empty() {
            return;
        }
        let env = &mut self.document["process"]["env"];
        if !env.is_array() {
            *env = Value::Array(Vec::new());
        }
        if let Some(env) = env.as_array_mut() {
            env.extend(entries.into_iter().map(Value::from));
        }
    }

    /// Adds a mount, the last.
    pub fn add_mount(&mut self, mount: Mount) {
        let entry = serde_json::to_value(&mount).unwrap_or_default();
        let mut mounts = self.spec.mounts().clone().unwrap_or_default();
        mounts.push(mount);
        self.spec.set_mounts(Some(mounts));
        let mounts = &mut self.document["mounts"];
        if !mounts.is_array() {
            *mounts = Value::Array(Vec::new());
        }
        if let Some(mounts) = mounts.as_array_mut() {
            mounts.push(entry);
        }
    }

    /// The document's `process`, as JSON.
    pub fn process(&self) -> Vec<u8> {
        self.document["process"].to_string().into_bytes()
    }

    /// The document for the guest, as JSON.
    pub fn document(&self) -> Vec<u8> {
        self.document.to_string().into_bytes()
    }
}

/// A `linux.resources` object by itself, read and checked.
#[derive(Debug)]
pub struct Resources {
    typed: LinuxResources,
    document: Value,
    limits: Limits,
}

impl Resources {
    /// Reads one.
    pub fn read(document: Value) -> Result<Self, ConfigError> {
        let (mut document, typed) = read::resources(document)?;
        let limits = read::limits(&document)?;
        read::leave_to_host(&mut document);
        Ok(Self { typed, document, limits })
    }

    /// The typed view.
    pub fn typed(&self) -> &LinuxResources {
        &self.typed
    }

    /// As the limits they are.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// What the guest has to know of it, as JSON.
    pub fn document(&self) -> Vec<u8> {
        self.document.to_string().into_bytes()
    }
}

/// Files of the host that a mount shows.
pub enum HostFiles {
    /// A file or directory.
    Bind,
    /// An overlay of directories, with these options of the file system.
    Overlay(String),
}

/// Which files of the host a mount shows, if any.
pub fn host_files(mount: &Mount) -> Option<HostFiles> {
    let kind = mount.typ().as_deref();
    if kind == Some("bind") || has_option(mount, "bind") || has_option(mount, "rbind") {
        return Some(HostFiles::Bind);
    }
    let own = |options: &[String]| {
        let own: Vec<_> =
            options.iter().map(String::as_str).filter(|option| words::is_overlay_option(option)).collect();
        own.join(",")
    };
    (kind == Some(words::OVERLAY)).then(|| HostFiles::Overlay(own(mount.options().as_deref().unwrap_or_default())))
}

/// Whether a mount has an option.
pub fn has_option(mount: &Mount, option: &str) -> bool {
    mount.options().iter().flatten().any(|o| o == option)
}
