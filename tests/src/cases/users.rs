//! User namespaces that are one for all containers of a pod.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use k8s_cri::v1::{ContainerConfig, IdMapping, NamespaceMode, UserNamespace};
use serde_json::{Value, json};

use super::{oci, podhull};
use crate::bundle::Bundle;
use crate::container::Container;
use crate::cri::{Cri, PATIENT, container, security, volume};
use crate::leaks::Leaks;
use crate::podman::{self, Podman};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq, image};

pub const CASES: &[Case] = &[
    oci("users::of_another_container", of_another_container),
    podhull("users::that_cannot_be_had_are_named", that_cannot_be_had_are_named),
    oci("users::of_podman_s_pods", of_podman_s_pods),
    oci("users::of_kubernetes_pods", of_kubernetes_pods),
];

/// Users 0 to 65535 of the container are these of the host, and its groups those.
const USERS: [(&str, u32); 2] = [("uidMappings", 100_000), ("gidMappings", 200_000)];

/// A bundle with a user namespace, and namespaces that are its own, or at a path. Its root may do what takes all of these in it.
fn mapped(bundle: Bundle, path: impl Fn(&str) -> Option<String>) -> Bundle {
    let kinds =
        [("user", "user"), ("mount", "mnt"), ("pid", "pid"), ("network", "net"), ("ipc", "ipc"), ("uts", "uts")];
    let namespaces: Vec<Value> = kinds
        .iter()
        .map(|(kind, file)| match path(file) {
            Some(path) => json!({ "type": kind, "path": path }),
            None => json!({ "type": kind }),
        })
        .collect();
    let bundle = bundle.set("/linux/namespaces", Value::from(namespaces)).capabilities(&[
        "CAP_CHOWN",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_SYS_ADMIN",
        "CAP_SYS_TIME",
    ]);
    USERS.iter().fold(bundle, |bundle, (field, first)| {
        bundle.set(&format!("/linux/{field}"), json!([{ "containerID": 0, "hostID": first, "size": 65_536 }]))
    })
}

/// What its users are, what it may as their root, and what it may not, whatever its capabilities.
const LOOK: &str = "
import ctypes, os, socket, sys
print(*open('/proc/self/uid_map').read().split(), *open('/proc/self/gid_map').read().split())
print('ids', os.getuid(), os.getgid(), 'root', os.stat('/usr').st_uid, 'volume', os.stat('/mnt').st_uid)
name = '/mnt/' + sys.argv[1]
open(name, 'w')
os.chown(name, 1000, 1001)
socket.sethostname(sys.argv[1])
print('host name', socket.gethostname())
c = ctypes.CDLL(None, use_errno=True)
for what, call in (
    ('chown', lambda: os.chown(name, 70000, 70000)),
    ('clock', lambda: __import__('time').clock_settime(0, 1)),
    ('swap', lambda: c.swapoff(b'/mnt') and (_ for _ in ()).throw(OSError(ctypes.get_errno(), ''))),
):
    try: call(); print(what, 'done')
    except OSError as error: print(what, error.errno)
print(os.readlink('/proc/self/ns/user'), flush=True)
";

/// The last line of what it prints names its user namespace.
fn seen(text: &str) -> (String, String) {
    let (rest, last) = text.trim_end().rsplit_once('\n').unwrap_or_default();
    (rest.to_owned(), last.to_owned())
}

fn of_another_container(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let volume = scene.make_directory("volume")?;
    chown(&volume, Some(USERS[0].1), Some(USERS[1].1))?;
    let look = |bundle: Bundle, name: &str, then: &str| {
        bundle.bind(&volume, "/mnt", &["rbind"]).args(&["python3", "-c", &format!("{LOOK}{then}"), name])
    };
    let expected = |name: &str| {
        format!(
            "0 100000 65536 0 200000 65536\nids 0 0 root 65534 volume 0\nhost name {name}\nchown 22\nclock 1\nswap 1"
        )
    };
    let bundle =
        look(mapped(scene.debian()?, |_| None), "first", "print('ready', flush=True)\nimport time; time.sleep(1000)");
    let pod = Container::make(scene, &bundle, &["run", "-d"])?;
    pod.expect_output("ready")?;
    let output = pod.output()?;
    let (text, users) = seen(output.trim_end().trim_end_matches("ready"));
    ensure_eq!(text, expected("first"), "what the first sees");
    let pid = pod.pid.as_raw_nonzero();
    for (name, shared) in
        [("apart", &["user", "net", "ipc", "uts"][..]), ("together", &["user", "net", "ipc", "uts", "pid"])]
    {
        let of_pod = |file: &str| shared.contains(&file).then(|| format!("/proc/{pid}/ns/{file}"));
        let mut bundle = look(mapped(scene.debian()?, of_pod), name, "");
        if let Some(config) = bundle.config.as_object_mut() {
            config.remove("hostname");
        }
        let output = scene.run(&bundle)?.output()?;
        let (text, others) = seen(&output);
        ensure_eq!(text, expected(name), "what the member {name} sees");
        ensure_eq!(others, users, "user namespace of the member {name}");
        let metadata = fs::metadata(volume.join(name))?;
        ensure_eq!((metadata.uid(), metadata.gid()), (101_000, 201_001), "owner on the host");
    }
    // What is executed in it is among its users, too.
    let executed = pod.call(&["exec", &pod.id, "readlink", "/proc/self/ns/user"])?.output()?;
    ensure_eq!(executed.trim(), users, "user namespace of what is executed");
    pod.end()?;
    before.check()
}

fn that_cannot_be_had_are_named(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let bundle = scene.debian()?.sh("echo ready; exec sleep 1000");
    let without = Container::make(scene, &bundle, &["run", "-d"])?;
    without.expect_output("ready")?;
    let of_shadow = format!("/proc/{}/ns/user", without.pid.as_raw_nonzero());
    for (path, what) in [
        ("/proc/1/ns/user", "is the host's user namespace"),
        (of_shadow.as_str(), "is the host's user namespace"),
        ("/proc/1/ns/uts", "is no user namespace"),
    ] {
        let bundle = mapped(scene.debian()?, |file| (file == "user").then(|| path.to_owned())).sh("echo never");
        let ended = scene.run(&bundle)?.expect_status(1)?;
        ensure!(ended.stderr.contains(what) && ended.stdout.is_empty(), "no {what:?} in {:?}", ended.stderr);
    }
    without.end()?;
    // One of the host's that nobody of ours is in, as CRI-O and containerd 2 make it: its mappings count, whatever is said of them.
    let mut maker = std::process::Command::new("unshare");
    maker.args(["--user", "--map-users=0:300000:1000", "--map-groups=0:300000:1000", "sleep", "1000"]);
    let mut maker = maker.spawn()?;
    let path = format!("/proc/{}/ns/user", maker.id());
    let began = std::time::Instant::now();
    while fs::read_to_string(format!("/proc/{}/gid_map", maker.id()))?.split_whitespace().nth(1) != Some("300000") {
        ensure!(began.elapsed() < crate::run::DEADLINE, "unshare maps nobody");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let there = |bundle: Bundle, other: Option<&Container>| {
        let other = other.map(|other| other.pid.as_raw_nonzero());
        mapped(bundle, |file| match (file, other) {
            ("user", _) => Some(path.clone()),
            ("net" | "ipc" | "uts", Some(pid)) => Some(format!("/proc/{pid}/ns/{file}")),
            _ => None,
        })
    };
    let look = "cat /proc/self/uid_map; readlink /proc/self/ns/user; echo ready";
    let first = there(scene.debian()?, None).sh(&format!("{look}; exec sleep 1000"));
    let first = Container::make(scene, &first, &["run", "-d"])?;
    first.expect_output("ready")?;
    let mut second = there(scene.debian()?, Some(&first)).sh(look);
    if let Some(config) = second.config.as_object_mut() {
        config.remove("hostname");
    }
    let seen = scene.run(&second)?.output()?;
    ensure_eq!(seen, first.output()?, "users of the second");
    let map: Vec<&str> = seen.lines().next().unwrap_or_default().split_whitespace().collect();
    ensure_eq!(map, ["0", "300000", "1000"], "mappings");
    first.end()?;
    maker.kill()?;
    maker.wait()?;
    before.check()
}

fn of_podman_s_pods(scene: &Scene) -> Outcome {
    let podman = Podman::new(scene)?;
    podman.load()?;
    let before = Leaks::watch();
    let files = ["/etc/subuid", "/etc/subgid"];
    let were = files.map(|file| fs::read_to_string(file).unwrap_or_default());
    for file in files {
        fs::write(file, "containers:200000:65536\n")?;
    }
    let result = pods_of_podman(scene, &podman);
    for (file, was) in files.iter().zip(were) {
        fs::write(file, was)?;
    }
    result?;
    podman::check(&before)
}

fn pods_of_podman(scene: &Scene, podman: &Podman) -> Outcome {
    let volume = scene.make_directory("volume")?;
    chown(&volume, Some(200_000), Some(200_000))?;
    let mount = format!("{}:/mnt", volume.display());
    podman
        .call(&[
            "pod",
            "create",
            "--name",
            "p",
            "--network",
            "none",
            "--userns=auto:size=2000",
            "--hostname",
            "in-the-pod",
        ])?
        .output()?;
    let look = "echo $(cat /proc/self/uid_map) $(stat -c %u:%g /bin/sh /mnt); hostname; touch /mnt/$0 /own; \
        chown 5:6 /mnt/$0; readlink /proc/self/ns/user";
    let expected = "0 200000 2000 0:0 0:0\nin-the-pod\n";
    let main = format!("{look}; exec sleep 1000");
    podman
        .call(&["run", "-d", "--pod", "p", "--name", "main", "-v", &mount, image::NAME, "sh", "-c", &main, "main"])?
        .output()?;
    let words = ["run", "--rm", "--pod", "p", "-v", &mount, image::NAME, "sh", "-c", look, "second"];
    let second = podman.call(&words)?.output()?;
    let main = podman.call(&["logs", "main"])?.output()?;
    ensure_eq!(second, main, "what the second of the pod sees");
    ensure!(second.starts_with(expected), "what both see: {second}");
    for name in ["main", "second"] {
        let metadata = fs::metadata(volume.join(name))?;
        ensure_eq!((metadata.uid(), metadata.gid()), (200_005, 200_006), "owner on the host of {name}'s file");
    }
    let executed = podman.call(&["exec", "main", "cat", "/proc/self/uid_map"])?.output()?;
    ensure_eq!(executed.split_whitespace().collect::<Vec<_>>(), ["0", "200000", "2000"], "users of what is executed");
    podman.call(&["pod", "rm", "-f", "-t", "0", "p"])?.output()?;

    // Two that are not in a pod of Podman's.
    let one =
        ["run", "-d", "--name", "one", "--network", "none", "--userns=auto:size=2000", image::NAME, "sleep", "1000"];
    podman.call(&one)?.output()?;
    let look = "echo $(cat /proc/self/uid_map) $(stat -c %u:%g /bin/sh)";
    let words =
        ["run", "--rm", "--network", "container:one", "--userns", "container:one", image::NAME, "sh", "-c", look];
    ensure_eq!(podman.call(&words)?.output()?, "0 200000 2000 0:0\n", "users of one that is in the other's namespaces");
    podman.call(&["rm", "-f", "-t", "0", "one"])?.output().map(drop)
}

/// First user and group of the pod on the node.
const NODE_S: u32 = 300_000;

/// The user namespace that kubelet asks for where `hostUsers` is false.
fn of_the_pod() -> UserNamespace {
    let all = vec![IdMapping { host_id: NODE_S, container_id: 0, length: 65_536 }];
    UserNamespace { mode: NamespaceMode::Pod.into(), uids: all.clone(), gids: all }
}

fn of_kubernetes_pods(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let host = scene.make_directory("host")?;
    // Since version 2 volumes are id-mapped, and their owners on the node are those inside.
    let id_mapped = cri.version()?.0 >= 2;
    let owner = if id_mapped { 0 } else { NODE_S };
    chown(&host, Some(owner), Some(owner))?;
    let mut config = cri.pod_config("users")?;
    let linux = config.linux.get_or_insert_default().security_context.get_or_insert_default();
    linux.namespace_options.get_or_insert_default().userns_options = Some(of_the_pod());
    let pod = cri.run(config)?;
    let of = |name: &str, change: &dyn Fn(&mut ContainerConfig)| {
        let mut config = container(name, PATIENT);
        security(&mut config).namespace_options.get_or_insert_default().userns_options = Some(of_the_pod());
        let mut mount = volume(&host, "/mnt", false);
        if id_mapped {
            (mount.uid_mappings, mount.gid_mappings) = (of_the_pod().uids, of_the_pod().gids);
        }
        config.mounts = vec![mount];
        change(&mut config);
        cri.launch(&pod, config)
    };
    let one = of("one", &|_| {})?;
    let two = of("two", &|config| security(config).run_as_user = Some(k8s_cri::v1::Int64Value { value: 1000 }))?;
    let able = of("able", &|config| {
        let add_capabilities = vec!["SYS_TIME".into(), "NET_ADMIN".into(), "SYS_ADMIN".into()];
        security(config).capabilities = Some(k8s_cri::v1::Capability { add_capabilities, ..Default::default() });
    })?;
    let users = cri.shell(&one, "readlink /proc/self/ns/user")?;
    for id in [&one, &two, &able] {
        let look = "echo $(cat /proc/self/uid_map /proc/self/gid_map) $(stat -c %u:%g / /bin/sh /mnt)";
        let expected = format!("0 {NODE_S} 65536 0 {NODE_S} 65536 0:0 0:0 0:0\n");
        ensure_eq!(cri.shell(id, look)?, expected, "users, and owners of the root, of a program and of the volume");
        ensure_eq!(cri.shell(id, "readlink /proc/self/ns/user")?, users, "user namespace");
    }
    ensure_eq!(cri.shell(&two, "id -u")?, "1000\n", "user");
    if scene.runtime.is_virtual() {
        // Their network is not that of the guest itself.
        let metrics = scene.call(&["metrics"])?.output()?;
        let of = metrics.lines().find(|line| line.starts_with("podhull_guest_network_receive_bytes_total"));
        ensure!(metrics.contains("interface=\"eth0\""), "interfaces in metrics: {of:?}");
    }
    cri.shell(&one, "touch /mnt/file /own; chown 1000:1001 /mnt/file; chmod 660 /mnt/file")?;
    let metadata = fs::metadata(host.join("file"))?;
    ensure_eq!((metadata.uid(), metadata.gid()), (owner + 1000, owner + 1001), "owner of the file on the node");
    cri.shell(&two, "echo mine >/mnt/file")?;
    ensure_eq!(fs::read_to_string(host.join("file"))?, "mine\n", "file");
    ensure!(cri.exec(&one, &["chown", "70000", "/mnt/file"], 0)?.status != 0, "a user was given who is nobody there");
    // Its capabilities are for what is the pod's.
    cri.shell(
        &able,
        "ip link set lo mtu 60000; hostname named; mount -t tmpfs tmpfs /opt || mount -t tmpfs tmpfs /tmp",
    )?;
    ensure_eq!(cri.shell(&one, "hostname")?, "named\n", "host name");
    let denied = cri.exec(&able, &["date", "-s", "2001-01-01 00:00"], 0)?;
    ensure!(denied.stderr.contains("not permitted"), "setting the clock: {denied:?}");
    // It has the network of CNI's plugins.
    let address = cri.pod_status(&pod)?.network.unwrap_or_default().ip;
    let addresses = cri.shell(&one, "ip addr show eth0")?;
    ensure!(!address.is_empty() && addresses.contains(&format!("{address}/")), "{address:?} in {addresses}");
    cri.shell(&one, "ping -c 1 -W 60 10.88.7.1")?;
    cri.stop(&two, 10)?;
    cri.remove(&two)?;
    let again = of("again", &|_| {})?;
    ensure_eq!(
        cri.shell(&again, "cat /mnt/file; readlink /proc/self/ns/user")?,
        format!("mine\n{users}"),
        "one made anew"
    );
    cri.remove_pod(&pod)?;
    ensure!(Path::new(&host).join("file").exists(), "the volume is gone");
    cri.end()
}
