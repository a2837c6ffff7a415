use std::fs;
use std::path::Path;

use containerd_shim_protos::protobuf::CodedOutputStream;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use serde_json::{Value, json};

use super::bundle;
use super::config::{Mode, Pod};
use crate::spec::read::read;

/// A message of fields, each a text, a message or a number.
fn message(fields: &[(u32, Field<'_>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut out = CodedOutputStream::vec(&mut bytes);
    for (number, field) in fields {
        match field {
            Field::Bytes(value) => out.write_bytes(*number, value).unwrap(),
            Field::Number(value) => out.write_int64(*number, *value).unwrap(),
        }
    }
    out.flush().unwrap();
    drop(out);
    bytes
}

enum Field<'a> {
    Bytes(&'a [u8]),
    Number(i64),
}

use Field::{Bytes, Number};

fn pod() -> Pod {
    let metadata = message(&[(1, Bytes(b"web")), (2, Bytes(b"u-1")), (3, Bytes(b"default")), (4, Number(1))]);
    let dns = message(&[(1, Bytes(b"10.0.0.10")), (1, Bytes(b"10.0.0.11")), (2, Bytes(b"cluster.local"))]);
    let annotation = message(&[(1, Bytes(b"io.podhull.machine.vcpus")), (2, Bytes(b"2"))]);
    let other = message(&[(1, Bytes(b"example.org/x")), (2, Bytes(b"y"))]);
    let sysctl = message(&[(1, Bytes(b"kernel.shmmax")), (2, Bytes(b"65536"))]);
    let namespaces = message(&[(2, Number(1)), (3, Number(0))]);
    let security = message(&[(1, Bytes(&namespaces)), (99, Bytes(b"later"))]);
    let resources = message(&[(1, Number(100_000)), (2, Number(-1)), (4, Number(1 << 27))]);
    let linux = message(&[
        (1, Bytes(b"/kubepods.slice/kubepods-pod1.slice")),
        (2, Bytes(&security)),
        (3, Bytes(&sysctl)),
        (5, Bytes(&resources)),
    ]);
    let config = message(&[
        (1, Bytes(&metadata)),
        (2, Bytes(b"web-0")),
        (4, Bytes(&dns)),
        (7, Bytes(&annotation)),
        (7, Bytes(&other)),
        (8, Bytes(&linux)),
    ]);
    Pod::read(&Any { type_url: "runtime.v1.PodSandboxConfig".into(), value: config, ..Default::default() }).unwrap()
}

#[test]
fn a_pod_is_read_as_kubelet_describes_it() {
    let pod = pod();
    assert_eq!((&*pod.name, &*pod.uid, &*pod.namespace, &*pod.hostname), ("web", "u-1", "default", "web-0"));
    assert_eq!((pod.network, pod.pid, pod.ipc), (Mode::Pod, Mode::Container, Mode::Pod));
    assert_eq!(pod.resources, Some([100_000, -1, 0, 1 << 27]));
    assert_eq!(pod.users, None);
    assert_eq!(pod.dns.unwrap()[0], ["10.0.0.10", "10.0.0.11"]);
}

#[test]
fn what_is_no_pod_is_refused() {
    let read =
        |kind: &str, value: &[u8]| Pod::read(&Any { type_url: kind.into(), value: value.into(), ..Default::default() });
    assert_eq!(read("", b"").unwrap(), Pod::default());
    assert!(read("containerd.runc.v1.Options", b"").unwrap_err().to_string().contains("containerd.runc.v1.Options"));
    assert!(read("runtime.v1.PodSandboxConfig", b"\x0a\xff").is_err());
    assert!(read("runtime.v1.PodSandboxConfig", b"\x12\x01\xff").unwrap_err().to_string().contains("field 2"));
}

#[test]
fn what_containers_write_is_where_containerd_has_a_disk() {
    let base = tempfile::tempdir().unwrap();
    let [bundle, disk] = ["bundle", "disk"].map(|name| base.path().join(name));
    fs::create_dir(&bundle).and_then(|()| fs::create_dir(&disk)).unwrap();
    std::os::unix::fs::symlink(&disk, bundle.join("work")).unwrap();
    bundle::make_files(&bundle, &Pod { hostname: "web-0".into(), ..Pod::default() }).unwrap();
    assert_eq!(fs::read_to_string(disk.join("etc/hostname")).unwrap(), "web-0\n");
    assert!(disk.join("etc/hosts").exists() && disk.join("etc/resolv.conf").exists() && !bundle.join("etc").exists());
}

/// What [`bundle::make`] writes but for the mount.
fn specification(pod: &Pod) -> Value {
    bundle::specification("pod-1", pod, "/run/netns/x")
}

#[test]
fn what_holds_a_pod_is_specified_as_containerd_specifies_its_own() {
    let spec = specification(&pod());
    // All of it is known here.
    read(&spec.to_string()).unwrap();
    assert_eq!(spec["hostname"], "web-0");
    assert_eq!(spec["linux"]["cgroupsPath"], "kubepods-pod1.slice:cri-containerd:pod-1");
    assert_eq!(spec["linux"]["sysctl"]["kernel.shmmax"], "65536");
    assert_eq!(spec["linux"]["sysctl"]["net.ipv4.ip_unprivileged_port_start"], "0");
    let annotations = &spec["annotations"];
    assert_eq!(annotations["io.kubernetes.cri.container-type"], "sandbox");
    assert_eq!(annotations["io.kubernetes.cri.sandbox-memory"], "134217728");
    assert_eq!(annotations["io.podhull.machine.vcpus"], "2");
    assert!(annotations["example.org/x"].is_null());
    let namespaces = spec["linux"]["namespaces"].as_array().unwrap();
    assert!(namespaces.contains(&json!({ "type": "network", "path": "/run/netns/x" })));
    assert!(namespaces.contains(&json!({ "type": "pid" })) && namespaces.contains(&json!({ "type": "ipc" })));
    let of_node = Pod { pid: Mode::Node, cgroup_parent: "/pods/one".into(), ..Pod::default() };
    let spec = specification(&of_node);
    assert_eq!(spec["linux"]["cgroupsPath"], "/pods/one/pod-1");
    assert!(!spec["linux"]["namespaces"].as_array().unwrap().contains(&json!({ "type": "pid" })));
}

#[test]
fn a_container_has_the_files_of_its_pod_unless_it_has_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let complete = |mut spec: Value| -> Value {
        spec["ociVersion"] = "1.2.0".into();
        fs::write(directory.path().join("config.json"), spec.to_string()).unwrap();
        bundle::complete(directory.path(), Path::new("/b")).unwrap();
        serde_json::from_slice(&fs::read(directory.path().join("config.json")).unwrap()).unwrap()
    };
    let ipc = json!({ "namespaces": [{ "type": "ipc", "path": "/proc/1/ns/ipc" }] });
    let hosts = json!({ "destination": "/etc/hosts/", "type": "bind", "source": "/kubelet/hosts" });
    let memory = json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm" });
    let spec =
        complete(json!({ "root": { "path": "rootfs", "readonly": true }, "mounts": [hosts, memory], "linux": ipc }));
    let at = |place: &str| -> Vec<Value> {
        let mounts = spec["mounts"].as_array().unwrap();
        mounts.iter().filter(|mount| mount["destination"] == place).cloned().collect()
    };
    assert_eq!(spec["mounts"].as_array().unwrap().len(), 4);
    assert_eq!(spec["mounts"][0], hosts);
    assert_eq!(at("/dev/shm")[0]["source"], "/b/shm");
    assert_eq!(at("/etc/resolv.conf")[0]["source"], "/b/work/etc/resolv.conf");
    assert_eq!(at("/etc/hostname")[0]["options"], json!(["rbind", "rprivate", "ro"]));
    // One that shares no IPC has shared memory of its own.
    let spec = complete(
        json!({ "root": { "path": "rootfs" }, "mounts": [memory], "linux": { "namespaces": [{ "type": "ipc" }] } }),
    );
    assert_eq!(spec["mounts"][0], memory);
    assert_eq!(spec["mounts"].as_array().unwrap().len(), 4);
}

#[test]
fn a_container_whose_specification_is_no_object_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    for text in ["[]", "7", "null", "\"x\"", "{"] {
        fs::write(directory.path().join("config.json"), text).unwrap();
        let error = bundle::complete(directory.path(), Path::new("/b")).unwrap_err();
        assert!(error.to_string().starts_with("config.json: "), "{text}: {error}");
    }
}
