//! Who a container's programs are, and what they may, as pods' security contexts say; seen from inside.

use std::fs;
use std::path::Path;

use k8s_cri::v1::security_profile::ProfileType;
use k8s_cri::v1::{
    Capability, ContainerConfig, Int64Value, NamespaceMode, NamespaceOption, SeLinuxOption, SecurityProfile,
    SupplementalGroupsPolicy,
};
use serde_json::json;

use super::disks::Loop;
use super::{oci, podhull};
use crate::cri::{self, Cri, PATIENT, Pod, container, resources, security};
use crate::run::{DEADLINE, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq, processes};

pub const CASES: &[Case] = &[
    oci("cri_security::users_and_rights", users_and_rights),
    oci("cri_security::privileged", privileged),
    oci("cri_security::system_calls", system_calls),
    oci("cri_security::processes_of_each_other", processes_of_each_other),
    oci("cri_security::parameters_of_the_kernel", parameters_of_the_kernel),
    oci("cri_security::parameters_that_are_the_node_s", parameters_that_are_the_node_s),
    oci("cri_security::groups", groups),
    oci("cri_security::proc_is_masked_or_not", proc_is_masked_or_not),
    oci("cri_security::profiles_of_the_node", profiles_of_the_node),
    podhull("cri_security::what_is_the_node_s", what_is_the_node_s),
    podhull("cri_security::who_goes_first_without_memory", who_goes_first_without_memory),
];

/// A container whose security context was changed.
fn with(name: &str, change: impl FnOnce(&mut k8s_cri::v1::LinuxContainerSecurityContext)) -> ContainerConfig {
    let mut config = container(name, PATIENT);
    change(security(&mut config));
    config
}

/// A line of `/proc/self/status`.
fn line(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":"));
    line.unwrap_or_default().trim().to_owned()
}

fn profile(kind: ProfileType, path: &str) -> Option<SecurityProfile> {
    Some(SecurityProfile { profile_type: kind.into(), localhost_ref: path.into() })
}

fn users_and_rights(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("rights")?)?;
    let status = |id: &str| cri.shell(id, "cat /proc/1/status");

    let other = cri.launch(
        &pod,
        with("other", |security| {
            security.run_as_user = Some(Int64Value { value: 1000 });
            security.run_as_group = Some(Int64Value { value: 2000 });
            security.supplemental_groups = vec![3000, 4000];
            security.no_new_privs = true;
            security.capabilities = Some(Capability { drop_capabilities: vec!["ALL".into()], ..Default::default() });
        }),
    )?;
    let inside = status(&other)?;
    ensure_eq!(line(&inside, "Uid"), "1000\t1000\t1000\t1000", "user");
    ensure_eq!(line(&inside, "Gid"), "2000\t2000\t2000\t2000", "group");
    let groups = line(&inside, "Groups");
    ensure!(["3000", "4000"].iter().all(|group| groups.split(' ').any(|found| found == *group)), "groups {groups:?}");
    ensure_eq!(line(&inside, "NoNewPrivs"), "1", "no_new_privs");
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        ensure_eq!(line(&inside, set), "0000000000000000", "{set}");
    }

    let named = cri.launch(&pod, with("named", |security| security.run_as_username = "other".into()))?;
    ensure_eq!(cri.shell(&named, "id -un; id -gn")?, "other\nother\n", "user by name");

    let able = cri.launch(
        &pod,
        with("able", |security| {
            let (add_capabilities, drop_capabilities) = (vec!["NET_ADMIN".into()], vec!["CHOWN".into()]);
            security.capabilities = Some(Capability { add_capabilities, drop_capabilities, ..Default::default() });
            security.readonly_rootfs = true;
            security.masked_paths = vec!["/proc/keys".into(), "/proc/scsi".into()];
            security.readonly_paths = vec!["/proc/sys".into()];
        }),
    )?;
    let bits = u64::from_str_radix(&line(&status(&able)?, "CapEff"), 16)?;
    ensure_eq!((bits & 1, bits >> 12 & 1), (0, 1), "CAP_CHOWN, CAP_NET_ADMIN of {bits:x}");
    cri.shell(&able, "ip link set lo mtu 60000")?;
    let denied = cri.exec(&able, &["touch", "/file"], 0)?;
    ensure!(denied.stderr.contains("Read-only file system"), "the root is written to: {denied:?}");
    ensure_eq!(cri.shell(&able, "cat /proc/keys; ls /proc/scsi 2>&1 | grep -v such || true")?, "", "what is masked");
    ensure!(
        cri.exec(&able, &["sh", "-c", "echo 1 >/proc/sys/vm/overcommit_memory"], 0)?.status != 0,
        "/proc/sys is written to"
    );
    cri.remove_pod(&pod)?;
    cri.end()
}

/// It may whatever there is to do in its machine, or on its node, and has none of the host's devices.
fn privileged(scene: &Scene) -> Outcome {
    let disk = Loop::new(scene)?;
    let cri = Cri::start(scene)?;
    let mut config = cri.pod_config("privileged")?;
    config.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
    let pod = cri.run(config)?;
    let id = cri.launch(&pod, with("main", |security| security.privileged = true))?;
    let status = cri.shell(&id, "cat /proc/1/status")?;
    let last: u32 = cri.shell(&id, "cat /proc/sys/kernel/cap_last_cap")?.trim().parse()?;
    ensure_eq!(u64::from_str_radix(&line(&status, "CapEff"), 16)?, (1 << (last + 1)) - 1, "capabilities");
    ensure_eq!(line(&status, "Seccomp"), "0", "seccomp");
    cri.shell(&id, "mkdir /mnt; mount -t tmpfs tmpfs /mnt && umount /mnt")?;
    let name = disk.path.file_name().ok_or("no name")?.display();
    let seen = cri.shell(&id, &format!("ls -d /dev/{name} /sys/block/{name} 2>/dev/null || true"))?;
    // runc on a node has them all.
    let expected = if scene.runtime.is_virtual() { String::new() } else { format!("/dev/{name}\n/sys/block/{name}\n") };
    ensure_eq!(seen, expected, "what it has of a disk of the host's");
    cri.shell(&id, "echo 1 >/proc/sys/net/ipv4/ip_forward; mkdir /sys/fs/cgroup/inside; rmdir /sys/fs/cgroup/inside")?;
    cri.remove_pod(&pod)?;
    cri.end()
}

fn system_calls(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let path = scene.directory.join("profile.json");
    let denied = json!([{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 }]);
    fs::write(&path, json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": denied }).to_string())?;
    let pod = cri.run(cri.pod_config("calls")?)?;
    let of = |name: &str, profile| cri.launch(&pod, with(name, |security| security.seccomp = profile));
    let usual = of("usual", profile(ProfileType::RuntimeDefault, ""))?;
    ensure_eq!(line(&cri.shell(&usual, "cat /proc/1/status")?, "Seccomp"), "2", "with the runtime's profile");
    ensure!(cri.exec(&usual, &["unshare", "-U", "true"], 0)?.status != 0, "unshare with the runtime's profile");
    let free = of("free", profile(ProfileType::Unconfined, ""))?;
    ensure_eq!(line(&cri.shell(&free, "cat /proc/1/status")?, "Seccomp"), "0", "without one");
    cri.shell(&free, "unshare -U true")?;
    let own = of("own", profile(ProfileType::Localhost, &path.to_string_lossy()))?;
    let answer = cri.exec(&own, &["mkdir", "/new"], 0)?;
    ensure!(answer.stderr.contains("not supported"), "mkdir with a profile of its own: {answer:?}");
    cri.remove_pod(&pod)?;
    cri.end()
}

/// Launches a container that sees processes like this, of another if that is named.
fn seeing(cri: &Cri, pod: &Pod, name: &str, mode: NamespaceMode, target: &str) -> Outcome<String> {
    let config = with(name, |security| {
        let namespaces = security.namespace_options.get_or_insert_default();
        namespaces.set_pid(mode);
        target.clone_into(&mut namespaces.target_id);
    });
    cri.launch(pod, config)
}

/// Those of a pod, if it is so asked, and those of one container for another that is there to look at it.
fn processes_of_each_other(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let mut config = cri.pod_config("together")?;
    let linux = config.linux.get_or_insert_default().security_context.get_or_insert_default();
    linux.namespace_options.get_or_insert_default().set_pid(NamespaceMode::Pod);
    let pod = cri.run(config)?;
    let one = seeing(&cri, &pod, "one", NamespaceMode::Pod, "")?;
    let two = seeing(&cri, &pod, "two", NamespaceMode::Pod, "")?;
    cri.shell(&one, "sleep 1234 >/dev/null 2>&1 &")?;
    let seen = cri.shell(&two, "ps -o args")?;
    // What holds the pod open is containerd's container, or podhull's own.
    let holds = seen.contains("sleep 2147483647") || seen.contains("{pause}");
    ensure!(seen.contains("sleep 1234") && holds, "processes of the pod: {seen}");
    cri.remove_pod(&pod)?;

    let pod = cri.run(cri.pod_config("apart")?)?;
    let one = seeing(&cri, &pod, "one", NamespaceMode::Container, "")?;
    let two = seeing(&cri, &pod, "two", NamespaceMode::Container, "")?;
    cri.shell(&one, "sleep 1234 >/dev/null 2>&1 &")?;
    let seen = cri.shell(&two, "ps -o args")?;
    ensure!(!seen.contains("sleep 1234"), "processes of another container: {seen}");
    let debugger = seeing(&cri, &pod, "debugger", NamespaceMode::Target, &one)?;
    let seen = cri.shell(&debugger, "ps -o args")?;
    ensure!(seen.contains("sleep 1234"), "processes of the container that is looked at: {seen}");
    cri.stop(&debugger, 10)?;
    cri.remove(&debugger)?;
    ensure!(cri.shell(&one, "ps -o args")?.contains("sleep 1234"), "it took the other's along");
    cri.remove_pod(&pod)?;
    cri.end()
}

fn parameters_of_the_kernel(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let mut config = cri.pod_config("sysctls")?;
    // The last three are those that Kubernetes calls unsafe.
    let wanted = [
        ("net.ipv4.ip_unprivileged_port_start", "0"),
        ("kernel.shm_rmid_forced", "1"),
        ("net.core.somaxconn", "1234"),
        ("kernel.msgmax", "16384"),
        ("fs.mqueue.msg_max", "20"),
    ];
    let sysctls = wanted.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    config.linux.get_or_insert_default().sysctls = sysctls.collect();
    let pod = cri.run(config)?;
    let id = cri.launch(&pod, container("main", PATIENT))?;
    for (name, value) in wanted {
        let path = name.replace('.', "/");
        let found = cri.shell(&id, &format!("cat /proc/sys/{path}"))?;
        ensure_eq!(found.trim(), value, "{name}");
    }
    cri.remove_pod(&pod)?;
    cri.end()
}

/// They are of no namespace: runc has none of them either.
fn parameters_that_are_the_node_s(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    for name in ["vm.overcommit_memory", "kernel.hostname", "fs.file-max"] {
        let before = fs::read_to_string(Path::new("/proc/sys").join(name.replace('.', "/")))?;
        let mut config = cri.pod_config("sysctls")?;
        config.linux.get_or_insert_default().sysctls = [(name.to_owned(), "1".to_owned())].into();
        let error = cri.run(config).err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(error.contains(name), "a pod with {name}: {error:?}");
        ensure_eq!(
            fs::read_to_string(Path::new("/proc/sys").join(name.replace('.', "/")))?,
            before,
            "{name} of the node"
        );
    }
    cri::remove_group("sysctls", DEADLINE)?;
    cri.end()
}

/// Those of the image are added to, or not.
fn groups(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("groups")?)?;
    let of = |name: &str, policy| -> Outcome<Vec<u32>> {
        let config = with(name, |security| {
            security.run_as_user = Some(Int64Value { value: 1000 });
            security.run_as_group = Some(Int64Value { value: 2000 });
            security.supplemental_groups = vec![3000];
            security.set_supplemental_groups_policy(policy);
        });
        let id = cri.launch(&pod, config)?;
        let status = cri.shell(&id, "cat /proc/1/status")?;
        ensure_eq!(line(&status, "Gid"), "2000\t2000\t2000\t2000", "group");
        let mut groups: Vec<u32> =
            line(&status, "Groups").split_whitespace().filter_map(|group| group.parse().ok()).collect();
        groups.retain(|group| *group != 2000);
        let executed = cri.shell(&id, "id -G")?;
        for group in &groups {
            ensure!(executed.split_whitespace().any(|found| found == group.to_string()), "no {group} in {executed}");
        }
        Ok(groups)
    };
    ensure_eq!(of("merged", SupplementalGroupsPolicy::Merge)?, [3000, 50_000], "groups with those of the image");
    match cri.version()? {
        version if version < (2, 0) => {
            println!("     cri_security::groups: containerd {version:?} knows no policy Strict: left out");
        }
        _ => ensure_eq!(of("strict", SupplementalGroupsPolicy::Strict)?, [3000], "groups without those of the image"),
    }
    cri.remove_pod(&pod)?;
    cri.end()
}

/// What kubelet has masked in an ordinary container, and read-only.
const MASKED: [&str; 7] =
    ["/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi", "/sys/firmware"];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

fn proc_is_masked_or_not(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("proc")?)?;
    let usual = with("usual", |security| {
        security.masked_paths = MASKED.map(str::to_owned).into();
        security.readonly_paths = READ_ONLY.map(str::to_owned).into();
    });
    let usual = cri.launch(&pod, usual)?;
    // kubelet says nothing of either for a procMount of Unmasked.
    let unmasked = cri.launch(&pod, container("unmasked", PATIENT))?;
    let mounts = |id: &str| cri.shell(id, "cut -d ' ' -f 2 /proc/mounts | grep ^/proc/ || true");
    let covered = mounts(&usual)?;
    // What a kernel does not have is not covered: that of the machine has no kcore.
    for path in ["/proc/keys", "/proc/timer_list", "/proc/sys", "/proc/sysrq-trigger"] {
        ensure!(covered.lines().any(|line| line == path), "{path} in {covered}");
    }
    ensure_eq!(mounts(&unmasked)?, "", "what is mounted in /proc");
    ensure_eq!(cri.shell(&usual, "cat /proc/keys | wc -c")?, "0\n", "keys that are masked");
    // Root may write what it has read, if it may write at all.
    let same = "cd /proc/sys/vm; value=$(cat overcommit_memory); echo $value >overcommit_memory";
    let denied = cri.exec(&usual, &["sh", "-c", same], 0)?;
    ensure!(denied.stderr.contains("Read-only file system"), "writing to /proc/sys: {denied:?}");
    cri.shell(&unmasked, same)?;
    cri.remove_pod(&pod)?;
    cri.end()
}

fn run(words: &[&str]) -> Outcome<String> {
    Running::start(&words.iter().map(Into::into).collect::<Vec<_>>(), &[])?.wait()?.output()
}

/// Profiles of AppArmor and labels of SELinux: with a host that has neither containerd refuses the former, unless nothing is asked for,
/// and knows nothing of the latter; with AppArmor a profile of one's own is refused, as it would be of no effect in a machine.
fn profiles_of_the_node(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("profiles")?)?;
    let of = |name: &str, profile| cri.launch(&pod, with(name, |security| security.apparmor = profile));
    let free = of("free", profile(ProfileType::Unconfined, ""))?;
    ensure_eq!(cri.shell(&free, "echo here")?, "here\n", "what is executed without a profile");
    let node_has = Path::new("/sys/kernel/security/apparmor").exists() && Path::new("/sbin/apparmor_parser").exists();
    let usual = of("usual", profile(ProfileType::RuntimeDefault, ""));
    ensure_eq!(usual.is_ok(), node_has, "whether one runs with the runtime's profile: {usual:?}");
    let own =
        of("own", profile(ProfileType::Localhost, "no-such-profile")).err().ok_or("one of no such profile runs")?;
    ensure!(own.to_string().to_lowercase().contains("apparmor"), "refusal {own}");
    let labelled = cri.launch(
        &pod,
        with("labelled", |security| {
            let word = |word: &str| word.to_owned();
            security.selinux_options =
                Some(SeLinuxOption { user: word("u"), role: word("r"), r#type: word("t"), level: word("s0:c1,c2") });
        }),
    )?;
    ensure_eq!(cri.shell(&labelled, "echo here")?, "here\n", "what is executed with a label");
    cri.remove_pod(&pod)?;
    cri.end()
}

/// Its network is refused; its processes and IPC are those of the machine.
fn what_is_the_node_s(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let with = |name: &str, change: fn(&mut NamespaceOption)| -> Outcome<_> {
        let mut config = cri.pod_config(name)?;
        let linux = config.linux.get_or_insert_default().security_context.get_or_insert_default();
        change(linux.namespace_options.get_or_insert_default());
        cri.run(config)
    };
    let error = with("network", |namespaces| namespaces.set_network(NamespaceMode::Node)).err();
    let error = error.map(|error| error.to_string()).unwrap_or_default();
    ensure!(error.contains("network"), "a pod on the node's network: {error:?}");

    let of_node: fn(&mut NamespaceOption) = |namespaces| {
        namespaces.set_pid(NamespaceMode::Node);
        namespaces.set_ipc(NamespaceMode::Node);
    };
    let pod = with("rest", of_node)?;
    let mut config = container("main", PATIENT);
    of_node(security(&mut config).namespace_options.get_or_insert_default());
    let id = cri.launch(&pod, config.clone())?;
    let seen = cri.shell(&id, "ps -o args")?;
    ensure!(seen.contains("agent") && !seen.contains("containerd"), "processes of the machine: {seen}");
    // Its queues, semaphores and shared memory: one for all that ask for them, and nothing of the node's.
    let made = run(&["ipcmk", "-M", "4096"])?;
    let number = made.trim().rsplit(' ').next().unwrap_or_default().to_owned();
    config.metadata.get_or_insert_default().name = "other".into();
    let other = cri.launch(&pod, config)?;
    let look = "readlink /proc/self/ns/ipc; wc -l </proc/sysvipc/shm";
    let (seen, by_other) = (cri.shell(&id, look)?, cri.shell(&other, look)?);
    run(&["ipcrm", "-m", &number])?;
    let lines: Vec<_> = seen.lines().collect();
    // The first that a kernel has (PROC_IPC_INIT_INO), and no line about shared memory but its head.
    ensure_eq!(lines, ["ipc:[4026531839]", "1"], "IPC of a container");
    ensure_eq!(by_other, seen, "IPC of the other");
    cri.remove_pod(&pod)?;
    cri::remove_group("network", DEADLINE)?;
    cri.end()
}

/// The node's kernel goes by the container that is to stay longest, for the machine that all of them are in.
fn who_goes_first_without_memory(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("score")?)?;
    let score =
        |pid: i32| -> Outcome<i32> { Ok(fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?.trim().parse()?) };
    let of = |process: &processes::Process| {
        let group = fs::read_to_string(format!("/proc/{}/cgroup", process.pid)).unwrap_or_default();
        process.command.starts_with("podhull vmm") && group.contains("/pod-score/")
    };
    let machine = processes::all().into_iter().find(of).ok_or("no machine")?.pid;
    for (name, own, both) in [("burstable", 700, 700), ("besteffort", 1000, 700), ("guaranteed", -997, -997)] {
        let mut config = container(name, PATIENT);
        resources(&mut config).oom_score_adj = own;
        let id = cri.launch(&pod, config)?;
        ensure_eq!(cri.shell(&id, "cat /proc/1/oom_score_adj")?, format!("{own}\n"), "score inside of {name}");
        ensure_eq!(score(cri.process(&id)?)?, i32::try_from(own)?, "score of what stands for {name}");
        ensure_eq!(score(machine)?, both, "score of the machine with {name}");
    }
    cri.remove_pod(&pod)?;
    cri.end()
}
