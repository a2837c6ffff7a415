//! Namespaces: each of the spec is the container's own, each that is left out is the machine's.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};

use serde_json::json;

use super::oci;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("namespaces::each_in_the_spec_is_private", each_in_the_spec_is_private),
    oci("namespaces::each_left_out_is_the_machine_s", each_left_out_is_the_machine_s),
    oci("namespaces::private_ones_are_empty", private_ones_are_empty),
    oci("namespaces::host_name_and_domain_name", host_name_and_domain_name),
    oci("namespaces::users_are_mapped", users_are_mapped),
];

/// Without a pid namespace the machine's first process is visible, and with it the machine's own namespaces.
const COMPARE: &str = "
import os
for name in ('pid', 'net', 'ipc', 'uts', 'mnt', 'cgroup', 'user'):
    own, first = (os.readlink(f'/proc/{who}/ns/{name}') for who in ('self', '1'))
    print(name, 'shared' if own == first else 'private')
";

fn each_in_the_spec_is_private(scene: &Scene) -> Outcome {
    let bundle = scene.debian()?.privileged().namespaces(&["mount", "network", "ipc", "uts", "cgroup"]);
    let found = scene.run(&bundle.python(COMPARE))?.output()?;
    // The network of a pod is its machine's, which has no other.
    let network = if scene.runtime.is_virtual() { "shared" } else { "private" };
    let expected =
        format!("pid shared\nnet {network}\nipc private\nuts private\nmnt private\ncgroup private\nuser shared\n");
    ensure_eq!(found, expected, "namespaces");
    // The numbers of first namespaces are fixed (include/linux/proc_ns.h): that is how to tell with a pid namespace.
    let found = scene.run(&scene.debian()?.sh("readlink /proc/self/ns/pid /proc/self/ns/user; echo $$"))?.output()?;
    let lines: Vec<&str> = found.lines().collect();
    ensure!(lines.first() != Some(&"pid:[4026531836]"), "the pid namespace is the machine's");
    ensure_eq!(lines.get(1), Some(&"user:[4026531837]"), "user namespace without one in the spec");
    ensure_eq!(lines.get(2), Some(&"1"), "pid of the first process");
    Ok(())
}

fn each_left_out_is_the_machine_s(scene: &Scene) -> Outcome {
    // A host name without a namespace of its own for it would be the machine's, which runtimes refuse; and without one for the
    // network it would be the host's.
    let bundle = scene.debian()?.privileged().namespaces(&["mount", "network"]).remove("", "hostname");
    let found = scene.run(&bundle.python(COMPARE))?.output()?;
    let network = if scene.runtime.is_virtual() { "shared" } else { "private" };
    let expected =
        format!("pid shared\nnet {network}\nipc shared\nuts shared\nmnt private\ncgroup shared\nuser shared\n");
    ensure_eq!(found, expected, "namespaces");
    Ok(())
}

fn private_ones_are_empty(scene: &Scene) -> Outcome {
    let script = "
import os
print('devices', sorted(os.listdir('/sys/class/net')))
print('messages', len(open('/proc/sysvipc/msg').readlines()))
print('queues', os.listdir('/dev/mqueue'))
print('processes', sorted(int(name) for name in os.listdir('/proc') if name.isdigit()))
print('cgroup', open('/proc/self/cgroup').read().strip())
";
    let found = scene.run(&scene.debian()?.python(script))?.output()?;
    let expected = "devices ['lo']\nmessages 1\nqueues []\nprocesses [1]\ncgroup 0::/\n";
    ensure_eq!(found, expected, "what is in fresh namespaces");
    Ok(())
}

fn host_name_and_domain_name(scene: &Scene) -> Outcome {
    let mut bundle = scene.debian()?.set("/hostname", json!("outer-rim"));
    let mut expected = String::from("outer-rim\n");
    // runc 1.1 does not know the field yet.
    if scene.runtime.is_virtual() {
        bundle = bundle.set("/domainname", json!("galaxy.example"));
        expected += "galaxy.example\n";
    } else {
        expected += "(none)\n";
    }
    let found = scene.run(&bundle.sh("uname -n; cat /proc/sys/kernel/domainname"))?.output()?;
    ensure_eq!(found, expected, "names");
    let host = fs::read_to_string("/proc/sys/kernel/hostname")?;
    ensure!(host.trim() != "outer-rim", "the host has got the container's name");
    Ok(())
}

fn users_are_mapped(scene: &Scene) -> Outcome {
    let volume = scene.make_directory("volume")?;
    chown(&volume, Some(100_000), Some(200_000))?;
    let script = "
import os
for name in ('uid_map', 'gid_map', 'setgroups'):
    print(name, *open('/proc/self/' + name).read().split())
print('ids', os.getuid(), os.getgid())
root, volume = os.stat('/usr'), os.stat('/mnt')
print('root', root.st_uid, root.st_gid)
print('volume', volume.st_uid, volume.st_gid)
open('/mnt/by-root', 'w')
open('/mnt/by-other', 'w')
os.chown('/mnt/by-other', 1000, 1001)
try:
    os.chown('/mnt/by-other', 70000, 70000)
except OSError as error:
    print('unmapped', error.errno)
print('private', os.readlink('/proc/self/ns/user') != 'user:[4026531837]')
";
    let bundle = scene
        .debian()?
        .namespaces(&["user", "pid", "mount", "network", "ipc", "uts", "cgroup"])
        .set("/linux/uidMappings", json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]))
        .set("/linux/gidMappings", json!([{ "containerID": 0, "hostID": 200_000, "size": 65_536 }]))
        .capabilities(&["CAP_CHOWN", "CAP_SETUID", "CAP_SETGID"])
        .bind(&volume, "/mnt", &["rbind"])
        .python(script);
    let found = scene.run(&bundle)?.output()?;
    let expected = "uid_map 0 100000 65536\ngid_map 0 200000 65536\nsetgroups allow\nids 0 0\nroot 65534 65534\nvolume 0 0\n\
                    unmapped 22\nprivate True\n";
    ensure_eq!(found, expected, "inside");
    let owner = |name| fs::metadata(volume.join(name)).map(|metadata| (metadata.uid(), metadata.gid()));
    ensure_eq!(owner("by-root")?, (100_000, 200_000), "owner on the host of a file of the container's root");
    ensure_eq!(owner("by-other")?, (101_000, 201_001), "owner on the host of a file of the container's user 1000");
    Ok(())
}
