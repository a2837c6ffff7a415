//! What a runtime is given: a directory with config.json, made from the runtime's own `spec` document.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::{Outcome, ensure};

/// Debian minbase with python3, stress-ng and what else tests/host/image/debian-packages lists; on the host's own disk.
pub const DEBIAN: &str = "/bundles/debian/rootfs";

/// Every capability of Linux 6.12 (capability.h).
pub const ALL_CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// The five capability sets of the specification.
pub const CAPABILITY_SETS: [&str; 5] = ["bounding", "effective", "inheritable", "permitted", "ambient"];

/// A bundle in the making; [`Bundle::write`] puts its config.json down.
#[derive(Clone)]
pub struct Bundle {
    /// The directory; it exists.
    pub directory: PathBuf,
    /// What becomes config.json.
    pub config: Value,
}

impl Bundle {
    /// A bundle in `directory`, which is made: `spec` without a terminal, on the root file system `rootfs`.
    pub fn new(directory: PathBuf, spec: &Value, rootfs: &Path) -> Outcome<Self> {
        fs::create_dir_all(&directory)?;
        let bundle = Self { directory, config: spec.clone() };
        Ok(bundle.set("/process/terminal", json!(false)).set("/root/path", json!(rootfs)))
    }

    /// Sets a value by its JSON pointer; objects on the way are made. Panics on a path through something else, which is
    /// a mistake in the test.
    pub fn set(mut self, pointer: &str, value: Value) -> Self {
        let mut place = &mut self.config;
        for key in pointer.split('/').skip(1) {
            if place.is_null() {
                *place = json!({});
            }
            place = &mut place[key];
        }
        *place = value;
        self
    }

    /// Removes a member of an object by the object's JSON pointer.
    pub fn remove(mut self, pointer: &str, key: &str) -> Self {
        if let Some(object) = self.config.pointer_mut(pointer).and_then(Value::as_object_mut) {
            object.remove(key);
        }
        self
    }

    /// Appends to a list by its JSON pointer; a missing list is made.
    pub fn push(mut self, pointer: &str, value: Value) -> Self {
        if let Some(list) = self.config.pointer_mut(pointer).and_then(Value::as_array_mut) {
            list.push(value);
            return self;
        }
        self.set(pointer, json!([value]))
    }

    /// The program and its arguments.
    pub fn args<I: AsRef<str>>(self, args: &[I]) -> Self {
        let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
        self.set("/process/args", json!(args))
    }

    /// A shell script as the program.
    pub fn sh(self, script: &str) -> Self {
        self.args(&["sh", "-c", script])
    }

    /// A Python script as the program.
    pub fn python(self, script: &str) -> Self {
        self.args(&["python3", "-c", script])
    }

    /// The root file system is written to.
    pub fn writable(self) -> Self {
        self.set("/root/readonly", json!(false))
    }

    /// The capabilities in all five sets.
    pub fn capabilities(mut self, names: &[&str]) -> Self {
        for set in CAPABILITY_SETS {
            self = self.set(&format!("/process/capabilities/{set}"), json!(names));
        }
        self
    }

    /// The namespaces, by type, each new.
    pub fn namespaces(self, types: &[&str]) -> Self {
        let list: Vec<Value> = types.iter().map(|kind| json!({ "type": kind })).collect();
        self.set("/linux/namespaces", json!(list))
    }

    /// A host directory or file at a place in the container.
    pub fn bind(self, source: &Path, destination: &str, options: &[&str]) -> Self {
        let mount = json!({ "type": "bind", "source": source, "destination": destination, "options": options });
        self.push("/mounts", mount)
    }

    /// All that `docker run --privileged` lifts, except the host's devices.
    pub fn privileged(self) -> Self {
        let mut bundle = self
            .capabilities(&ALL_CAPABILITIES)
            .set("/process/noNewPrivileges", json!(false))
            .set("/linux/maskedPaths", json!([]))
            .set("/linux/readonlyPaths", json!([]))
            .set("/linux/resources/devices", json!([{ "allow": true, "access": "rwm" }]));
        for mount in bundle.config["mounts"].as_array_mut().into_iter().flatten() {
            if let Some(options) = mount["options"].as_array_mut() {
                options.retain(|option| option != "ro");
            }
        }
        bundle
    }

    /// Writes config.json.
    pub fn write(&self) -> Outcome {
        fs::write(self.directory.join("config.json"), serde_json::to_vec_pretty(&self.config)?)?;
        Ok(())
    }
}

/// Makes a root file system of nothing but busybox, where Debian would be too much to copy or to change.
pub fn make_busybox_root(root: &Path) -> Outcome {
    let host = Path::new("/bin/busybox");
    ensure!(host.exists(), "no {}: the package busybox-static is missing on this host", host.display());
    for directory in ["bin", "dev", "etc", "proc", "run", "sys", "tmp", "var"] {
        fs::create_dir_all(root.join(directory))?;
    }
    fs::copy(host, root.join("bin/busybox"))?;
    let applets = Command::new(host).arg("--list").output()?;
    for applet in String::from_utf8(applets.stdout)?.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    Ok(())
}
