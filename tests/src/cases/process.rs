//! The process as the spec describes it: users, capabilities, limits, paths, and seccomp.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use super::oci;
use crate::bundle::{Bundle, DEBIAN};
use crate::runtime::Runtime;
use crate::seccomp::default_profile;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("process::is_as_the_spec_gives_it", is_as_the_spec_gives_it),
    oci("process::capabilities_are_exactly_those_given", capabilities_are_exactly_those_given),
    oci("process::no_new_privileges", no_new_privileges),
    oci("process::root_and_paths_are_read_only_or_masked", root_and_paths_are_read_only_or_masked),
    oci("process::seccomp_returns_its_errno_or_kills", seccomp_returns_its_errno_or_kills),
    oci("process::seccomp_default_profile_is_as_with_runc", seccomp_default_profile_is_as_with_runc),
    oci("process::default_container_is_as_with_runc", default_container_is_as_with_runc),
    oci("process::configured_container_is_as_with_runc", configured_container_is_as_with_runc),
    oci("process::privileged_container_is_as_with_runc", privileged_container_is_as_with_runc),
    oci("process::user_namespace_is_as_with_runc", user_namespace_is_as_with_runc),
];

const PROBE: &str = include_str!("probe.py");

/// Runs the probe and reads its answer.
fn probe(scene: &Scene, bundle: Bundle, runtime: Option<&Runtime>) -> Outcome<Value> {
    let bundle = bundle.python(PROBE);
    let ended = scene.start_with(runtime.unwrap_or(&scene.runtime), &bundle)?.wait()?;
    Ok(serde_json::from_str(&ended.output()?)?)
}

/// A container in which nothing is left at its default.
fn configured(scene: &Scene) -> Outcome<Bundle> {
    let bundle = scene
        .debian()?
        .set("/process/user", json!({ "uid": 1000, "gid": 1001, "umask": 0o027, "additionalGids": [5, 44, 4242] }))
        .set("/process/cwd", json!("/usr/share"))
        .set("/process/env", json!(["PATH=/usr/bin:/bin", "EMPTY=", "SPACE=a b", "LANG=C.UTF-8"]))
        .set("/process/oomScoreAdj", json!(321))
        .set("/process/capabilities/bounding", json!(["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"]))
        .set("/process/capabilities/inheritable", json!(["CAP_CHOWN", "CAP_KILL"]))
        .set("/process/capabilities/permitted", json!(["CAP_CHOWN", "CAP_KILL"]))
        .set("/process/capabilities/effective", json!(["CAP_KILL"]))
        .set("/process/capabilities/ambient", json!(["CAP_KILL"]))
        .set(
            "/linux/sysctl",
            json!({ "net.ipv4.ip_forward": "1", "kernel.msgmax": "4321", "net.core.somaxconn": "99" }),
        )
        .set("/process/noNewPrivileges", json!(false));
    let limits = [("NOFILE", 77, 99), ("CORE", 0, 0), ("STACK", 4 << 20, 8 << 20), ("NPROC", 50, 60), ("CPU", 70, 80)];
    let limits =
        limits.map(|(kind, soft, hard)| json!({ "type": format!("RLIMIT_{kind}"), "soft": soft, "hard": hard }));
    Ok(bundle.set("/process/rlimits", json!(limits)))
}

fn is_as_the_spec_gives_it(scene: &Scene) -> Outcome {
    let found = probe(scene, configured(scene)?, None)?;
    let expected = [
        ("Uid", json!("1000 1000 1000 1000")),
        ("Gid", json!("1001 1001 1001 1001")),
        ("Groups", json!("5 44 4242")),
        ("Umask", json!("0027")),
        ("NoNewPrivs", json!("0")),
        ("Seccomp", json!("0")),
        ("oom_score_adj", json!("321")),
        ("cwd", json!("/usr/share")),
        ("session", json!([1, 1, 1])),
        ("cgroup", json!("0::/")),
        (
            "environment",
            json!({ "PATH": "/usr/bin:/bin", "EMPTY": "", "SPACE": "a b", "LANG": "C.UTF-8", "HOME": "/" }),
        ),
        // Numbers of capability.h: CHOWN 0, KILL 5, NET_RAW 13. At execve of another user than root, what is ambient is
        // all that stays permitted and effective (capabilities(7)).
        ("CapBnd", json!("0000000000002021")),
        ("CapInh", json!("0000000000000021")),
        ("CapPrm", json!("0000000000000020")),
        ("CapEff", json!("0000000000000020")),
        ("CapAmb", json!("0000000000000020")),
        ("SigBlk", json!("0000000000000000")),
        ("descriptors", json!([0, 1, 2])),
    ];
    for (name, expected) in expected {
        ensure_eq!(found[name], expected, "{name}");
    }
    let limits = [
        ("Max open files", "77", "99"),
        ("Max core file size", "0", "0"),
        ("Max stack size", "4194304", "8388608"),
        ("Max processes", "50", "60"),
        ("Max cpu time", "70", "80"),
    ];
    for (name, soft, hard) in limits {
        ensure_eq!(found["limits"][name], json!([soft, hard]), "{name}");
    }
    let script = "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax /proc/sys/net/core/somaxconn";
    ensure_eq!(scene.run(&configured(scene)?.sh(script))?.output()?, "1\n4321\n99\n", "sysctls");
    Ok(())
}

fn capabilities_are_exactly_those_given(scene: &Scene) -> Outcome {
    for (names, mask) in
        [(&["CAP_SYS_TIME", "CAP_BPF", "CAP_CHOWN"][..], "0000008002000001"), (&[], "0000000000000000")]
    {
        let found = scene.run(&scene.debian()?.capabilities(names).sh("grep ^Cap /proc/self/status"))?.output()?;
        let expected: String = ["Inh", "Prm", "Eff", "Bnd", "Amb"].map(|set| format!("Cap{set}:\t{mask}\n")).concat();
        ensure_eq!(found, expected, "sets with {names:?}");
    }
    Ok(())
}

/// A set-user-id program gains its owner's rights, or not.
fn no_new_privileges(scene: &Scene) -> Outcome {
    let volume = scene.make_directory("volume")?;
    fs::copy(format!("{DEBIAN}/usr/bin/id"), volume.join("id"))?;
    fs::set_permissions(volume.join("id"), Permissions::from_mode(0o4755))?;
    for (given, expected) in [(true, "1000\nNoNewPrivs:\t1\n"), (false, "0\nNoNewPrivs:\t0\n")] {
        let bundle = scene
            .debian()?
            .bind(&volume, "/mnt", &["rbind"])
            .set("/process/user", json!({ "uid": 1000, "gid": 1000 }))
            .set("/process/noNewPrivileges", json!(given))
            .sh("/mnt/id -u; grep NoNewPrivs /proc/self/status");
        ensure_eq!(scene.run(&bundle)?.output()?, expected, "with noNewPrivileges {given}");
    }
    Ok(())
}

fn root_and_paths_are_read_only_or_masked(scene: &Scene) -> Outcome {
    let script = "
exec 2>&1
touch /etc/made
touch /var/tmp/made
touch /tmp/e2e-made && rm /tmp/e2e-made && echo writable
cat /etc/passwd; echo $?
ls /usr/share; echo $?
mount -o remount,rw /var/tmp
umount /etc/passwd
";
    let bundle = |readonly: bool| -> Outcome<Bundle> {
        let bundle = scene.debian()?.set("/root/readonly", json!(readonly));
        let bundle =
            bundle.push("/linux/readonlyPaths", json!("/var/tmp")).push("/linux/maskedPaths", json!("/etc/passwd"));
        let bundle =
            bundle.push("/linux/maskedPaths", json!("/usr/share")).push("/linux/maskedPaths", json!("/no/such"));
        Ok(bundle.sh(script))
    };
    let found = scene.run(&bundle(true)?)?.stdout;
    let errors = found.matches("Read-only file system").count();
    ensure!(errors == 3, "{errors} of 3 writes were refused:\n{found}");
    ensure!(found.contains("\n0\n0\n"), "masked paths are not empty:\n{found}");
    ensure!(!found.contains("writable"), "the root is writable:\n{found}");
    let found = scene.run(&bundle(false)?.push("/linux/readonlyPaths", json!("/etc")))?.stdout;
    let errors = found.matches("Read-only file system").count();
    ensure!(errors == 2 && found.contains("writable\n0\n0\n"), "with a writable root:\n{found}");
    Ok(())
}

fn seccomp_returns_its_errno_or_kills(scene: &Scene) -> Outcome {
    let script = "
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def call(*words):
    ctypes.set_errno(0)
    return ctypes.get_errno() if libc.syscall(*words) == -1 else 0
mkdir, sethostname, personality, getpriority = 83, 170, 135, 140
print(call(mkdir, b'/tmp/x', 0), call(sethostname, b'x', 1), call(personality, 8), call(personality, 0xffffffff), flush=True)
print(call(getpriority, 0, 0))
";
    let rules = |last: &str| {
        json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [
                { "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 71 },
                { "names": ["sethostname"], "action": "SCMP_ACT_ERRNO" },
                { "names": ["personality"], "action": "SCMP_ACT_ERRNO", "errnoRet": 75,
                  "args": [{ "index": 0, "value": 8, "op": "SCMP_CMP_EQ" }] },
                { "names": ["getpriority"], "action": last },
            ],
        })
    };
    // SIGSYS is 31: KILL_PROCESS and TRAP end the process with it.
    for (action, status) in [("SCMP_ACT_LOG", 0), ("SCMP_ACT_KILL_PROCESS", 159), ("SCMP_ACT_TRAP", 159)] {
        let bundle = scene.debian()?.set("/linux/seccomp", rules(action));
        let ended = scene.run(&bundle.python(script))?.expect_status(status)?;
        let expected = if status == 0 { "71 1 75 0\n0\n" } else { "71 1 75 0\n" };
        ensure_eq!(ended.stdout, expected, "errors of calls with {action} for the last");
    }
    Ok(())
}

/// Ordinary programs work under the engines' default profile, and what it blocks fails with the same errors as with runc.
fn seccomp_default_profile_is_as_with_runc(scene: &Scene) -> Outcome {
    let granted = ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_NET_BIND_SERVICE"];
    let script = "
import ctypes, errno, subprocess
libc = ctypes.CDLL(None, use_errno=True)
bad = ctypes.c_void_p(1)
calls = dict(acct=163, add_key=248, bpf=321, clock_settime=227, clone3=435, create_module=174, delete_module=176,
    fanotify_init=300, finit_module=313, fsopen=430, get_mempolicy=239, init_module=175, io_uring_setup=425, ioperm=173,
    iopl=172, kcmp=312, kexec_load=246, keyctl=250, lookup_dcookie=212, mbind=237, mount=165, mount_setattr=442,
    move_mount=429, name_to_handle_at=303, nfsservctl=180, open_by_handle_at=304, open_tree=428, perf_event_open=298,
    pidfd_getfd=438, pivot_root=155, process_vm_readv=310, ptrace=101, quotactl=179, reboot=169, request_key=249,
    set_mempolicy=238, setdomainname=171, sethostname=170, setns=308, settimeofday=164, swapon=167, syslog=103,
    umount2=166, unshare=272, userfaultfd=323, ustat=136, vmsplice=278, statx=332, openat2=437, memfd_create=319,
    landlock_create_ruleset=444, futex_waitv=449, fchmodat2=452, epoll_pwait2=441, rseq=334, pkey_alloc=330)
for name, number in calls.items():
    ctypes.set_errno(0)
    result = libc.syscall(number, bad, bad, bad, bad, bad, bad)
    print(name, errno.errorcode.get(ctypes.get_errno(), 'none'))
print(subprocess.check_output(['apt-get', '--version'], text=True).split()[0])
print(subprocess.check_output(['stress-ng', '--version'], text=True).split()[0])
print(subprocess.check_output('/usr/lib32/libc.so.6', text=True).split()[0])
";
    let bundle = scene.debian()?.capabilities(&granted).set("/linux/seccomp", default_profile(&granted)?);
    let bundle = bundle.python(script);
    let ours = scene.run(&bundle)?.output()?;
    let theirs = scene.start_with(&Runtime::runc()?, &bundle)?.wait()?.output()?;
    for (ours, theirs) in ours.lines().zip(theirs.lines()) {
        // A call that the guest's kernel lacks is no hole in the profile.
        let lacking = ours.ends_with(" ENOSYS") && !theirs.ends_with(" EPERM");
        ensure!(lacking || ours == theirs, "under the default profile: {ours}, with runc {theirs}");
    }
    ensure_eq!(ours.lines().count(), theirs.lines().count(), "lines");
    ensure!(
        ours.contains("io_uring_setup ENOSYS") && ours.contains("vmsplice EPERM"),
        "the profile blocks nothing:\n{ours}"
    );
    Ok(())
}

fn default_container_is_as_with_runc(scene: &Scene) -> Outcome {
    as_with_runc(scene, scene.debian()?)
}

fn configured_container_is_as_with_runc(scene: &Scene) -> Outcome {
    let volume = scene.make_directory("volume")?;
    let bundle = configured(scene)?
        .set("/linux/rootfsPropagation", json!("slave"))
        .bind(&volume, "/mnt", &["rbind", "ro", "nosuid", "noexec", "rprivate"])
        .push("/mounts", json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m", "nodev", "mode=1770"] }))
        .push("/linux/devices", json!({ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 7, "gid": 8 }));
    as_with_runc(scene, bundle)
}

fn privileged_container_is_as_with_runc(scene: &Scene) -> Outcome {
    as_with_runc(scene, scene.debian()?.privileged().writable())
}

fn user_namespace_is_as_with_runc(scene: &Scene) -> Outcome {
    let mapping = json!([{ "containerID": 0, "hostID": 100_000, "size": 1_000 }, { "containerID": 1_000, "hostID": 200_000, "size": 60_000 }]);
    let bundle = scene
        .debian()?
        .namespaces(&["user", "pid", "mount", "network", "ipc", "uts", "cgroup"])
        .set("/linux/uidMappings", mapping.clone())
        .set("/linux/gidMappings", mapping)
        .set("/process/user", json!({ "uid": 5, "gid": 1_001, "additionalGids": [7] }));
    as_with_runc(scene, bundle)
}

/// Compares what the probe sees in both, field by field.
fn as_with_runc(scene: &Scene, bundle: Bundle) -> Outcome {
    let limited: BTreeSet<&str> = bundle.config["process"]["rlimits"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|limit| match limit["type"].as_str()? {
            "RLIMIT_NOFILE" => Some("Max open files"),
            "RLIMIT_CORE" => Some("Max core file size"),
            "RLIMIT_STACK" => Some("Max stack size"),
            "RLIMIT_NPROC" => Some("Max processes"),
            "RLIMIT_CPU" => Some("Max cpu time"),
            _ => None,
        })
        .collect();
    let masked: Vec<String> = serde_json::from_value(bundle.config["linux"]["maskedPaths"].clone())?;
    let ours = probe(scene, bundle.clone(), None)?;
    let theirs = probe(scene, bundle, Some(&Runtime::runc()?))?;
    let mut differences = Vec::new();
    let mut compare = |what: &str, ours: &Value, theirs: &Value| {
        if ours != theirs {
            differences.push(format!("{what}: {ours}, with runc {theirs}"));
        }
    };
    for (name, theirs) in theirs.as_object().ok_or("the probe printed no object")? {
        let ours = &ours[name];
        match name.as_str() {
            // A limit that is not given is inherited: from whoever called runc, or from the agent.
            "limits" => {
                for limit in &limited {
                    compare(limit, &ours[*limit], &theirs[*limit]);
                }
            }
            // What only one of the kernels has is not compared, nor what is there to see of it unmasked.
            "masked" | "readonly" => {
                for (path, theirs) in theirs.as_object().into_iter().flatten() {
                    if let (Some(ours), true) = (ours.get(path), name != "masked" || masked.contains(path)) {
                        compare(&format!("{name} {path}"), ours, theirs);
                    }
                }
            }
            "mounts" | "devices" => {
                for (ours, theirs) in differing(ours, theirs) {
                    compare(name, &ours, &theirs);
                }
            }
            _ => compare(name, ours, theirs),
        }
    }
    ensure!(differences.is_empty(), "{} differences:\n    {}", differences.len(), differences.join("\n    "));
    Ok(())
}

/// Of two collections with a path as key or first item: pairs of what differs, null where one lacks it.
fn differing(ours: &Value, theirs: &Value) -> Vec<(Value, Value)> {
    let keyed = |value: &Value| -> std::collections::BTreeMap<String, Value> {
        match value {
            Value::Object(object) => object.iter().map(|(path, value)| (path.clone(), json!([path, value]))).collect(),
            // Several mounts may be on one point: what counts is all of them.
            Value::Array(list) => list
                .iter()
                .enumerate()
                .map(|(index, item)| {
                    let point = item[0].as_str().unwrap_or_default();
                    let before = list[..index].iter().filter(|other| other[0] == item[0]).count();
                    (format!("{point} {before}"), item.clone())
                })
                .collect(),
            _ => Default::default(),
        }
    };
    let (ours, theirs) = (keyed(ours), keyed(theirs));
    let paths: BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
    let find =
        |all: &std::collections::BTreeMap<String, Value>, path: &String| all.get(path).cloned().unwrap_or(Value::Null);
    paths
        .into_iter()
        .map(|path| (find(&ours, path), find(&theirs, path)))
        .filter(|(ours, theirs)| ours != theirs)
        .collect()
}
