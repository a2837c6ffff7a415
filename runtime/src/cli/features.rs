//! `podhull features`: what a specification may ask for, as callers want to know it before they ask (runtime-spec,
//! `features.md`).

use std::io::{self, Write};

use serde_json::{Value, json};

use crate::spec::words;

/// Print what this runtime supports, as JSON
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull features | jq .mountOptions        options that mounts may have")]
pub struct Arguments {}

impl Arguments {
    /// Prints it. Needs no virtual machine, and is quick: Docker calls it when it starts.
    pub fn execute(self) -> Result<u8, io::Error> {
        let mut text = serde_json::to_vec_pretty(&features())?;
        text.push(b'\n');
        io::stdout().write_all(&text)?;
        Ok(0)
    }
}

fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": super::OCI_VERSION,
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": words::mount_options(),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "capabilities": words::CAPABILITIES.as_slice(),
            "cgroup": { "v1": false, "v2": true, "systemd": true, "systemdUser": false, "rdma": false },
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ",
                    "SCMP_CMP_NE",
                ],
                "archs": ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"],
            },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } },
        },
    })
}
