//! `podhull features`: what a specification may ask for, as callers want to know it before they ask (runtime-spec,
//! `features.md`).

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::PrettyFormatter;

use crate::cgroup::PROPERTY_ANNOTATION;
use crate::config;
use crate::spec::words;

/// Print what this runtime supports, as JSON
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull features | jq .mountOptions        options that mounts may have")]
pub struct Arguments {}

impl Arguments {
    /// Prints it. Needs no virtual machine, and is quick: Docker calls it when it starts.
    pub fn execute(self) -> Result<u8, io::Error> {
        let mut text = Vec::new();
        let formatter = PrettyFormatter::with_indent(b"    ");
        Features::of_podhull().serialize(&mut serde_json::Serializer::with_formatter(&mut text, formatter))?;
        text.push(b'\n');
        io::stdout().write_all(&text)?;
        Ok(0)
    }
}

/// The same for who wants it as a message.
pub fn json() -> serde_json::Result<Vec<u8>> {
    serde_json::to_vec(&Features::of_podhull())
}

/// Keys in the order of runc, which is that of `specs-go/features`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Features {
    oci_version_min: &'static str,
    oci_version_max: &'static str,
    hooks: &'static [&'static str],
    /// Those of all file systems: what a file system has of its own does not belong here.
    mount_options: Vec<&'static str>,
    linux: Linux,
    annotations: BTreeMap<&'static str, &'static str>,
    /// Annotations that have the runtime do something: a caller should not take them from everybody.
    potentially_unsafe_config_annotations: &'static [&'static str],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Linux {
    namespaces: &'static [&'static str],
    capabilities: &'static [&'static str],
    cgroup: Cgroup,
    seccomp: Seccomp,
    apparmor: Enabled,
    selinux: Enabled,
    intel_rdt: Enabled,
    mount_extensions: MountExtensions,
    net_devices: Enabled,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Cgroup {
    v1: bool,
    v2: bool,
    systemd: bool,
    systemd_user: bool,
    rdma: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Seccomp {
    enabled: bool,
    actions: &'static [&'static str],
    operators: &'static [&'static str],
    archs: &'static [&'static str],
    known_flags: &'static [&'static str],
    supported_flags: &'static [&'static str],
}

#[derive(Serialize)]
struct MountExtensions {
    idmap: Enabled,
}

#[derive(Serialize)]
struct Enabled {
    enabled: bool,
}

/// Flags of filters, which the guest's kernel has all.
const SECCOMP_FLAGS: &[&str] =
    &["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"];

impl Features {
    fn of_podhull() -> Self {
        let no = || Enabled { enabled: false };
        Self {
            oci_version_min: "1.0.0",
            oci_version_max: super::OCI_VERSION,
            hooks: &["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
            mount_options: words::mount_options(),
            linux: Linux {
                namespaces: &["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
                capabilities: &podhull_protocol::CAPABILITIES,
                cgroup: Cgroup { v1: false, v2: true, systemd: true, systemd_user: false, rdma: false },
                seccomp: Seccomp {
                    enabled: true,
                    actions: &[
                        "SCMP_ACT_ALLOW",
                        "SCMP_ACT_ERRNO",
                        "SCMP_ACT_KILL",
                        "SCMP_ACT_KILL_PROCESS",
                        "SCMP_ACT_KILL_THREAD",
                        "SCMP_ACT_LOG",
                        "SCMP_ACT_TRACE",
                        "SCMP_ACT_TRAP",
                    ],
                    operators: &[
                        "SCMP_CMP_EQ",
                        "SCMP_CMP_GE",
                        "SCMP_CMP_GT",
                        "SCMP_CMP_LE",
                        "SCMP_CMP_LT",
                        "SCMP_CMP_MASKED_EQ",
                        "SCMP_CMP_NE",
                    ],
                    archs: &["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"],
                    known_flags: SECCOMP_FLAGS,
                    supported_flags: SECCOMP_FLAGS,
                },
                // Profiles and labels are taken, and left out.
                apparmor: no(),
                selinux: no(),
                intel_rdt: no(),
                mount_extensions: MountExtensions { idmap: Enabled { enabled: true } },
                net_devices: no(),
            },
            annotations: BTreeMap::from([
                ("io.podhull.commit", super::COMMIT),
                ("io.podhull.version", super::VERSION),
                // The name by which callers know.
                ("org.opencontainers.runc.checkpoint.enabled", "false"),
            ]),
            potentially_unsafe_config_annotations: &[config::PREFIX, config::KATA_PREFIX, PROPERTY_ANNOTATION],
        }
    }
}
