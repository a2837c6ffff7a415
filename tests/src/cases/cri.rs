//! Pods as kubelet makes them, through containerd's Container Runtime Interface.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use k8s_cri::v1 as api;

use super::{oci, podhull};
pub use crate::cri::PATIENT;
use crate::cri::{self, Cri, container, resources};
use crate::run::DEADLINE;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("cri::a_pod_and_its_container", a_pod_and_its_container),
    oci("cri::five_containers_come_and_go", five_containers_come_and_go),
    oci("cri::what_is_executed_too_long", what_is_executed_too_long),
    oci("cri::limits", limits),
    oci("cri::a_log_is_rotated", a_log_is_rotated),
    oci("cri::names_of_a_pod", names_of_a_pod),
    oci("cri::containerd_killed_meanwhile", containerd_killed_meanwhile),
    podhull("cri::a_pod_that_is_killed", a_pod_that_is_killed),
    podhull("cri::a_class_with_a_configuration", a_class_with_a_configuration),
];

/// Starts one that is [`PATIENT`], and waits until it listens to signals.
pub fn patient(cri: &Cri, pod: &crate::cri::Pod, config: api::ContainerConfig) -> Outcome<String> {
    let id = cri.launch(pod, config)?;
    cri.shell(&id, "until [ -e /ready ]; do sleep 0.1; done")?;
    Ok(id)
}

fn a_pod_and_its_container(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("one")?)?;
    let status = cri.pod_status(&pod)?;
    let network = status.network.clone().unwrap_or_default();
    ensure!(network.ip.starts_with("10.88.7.") && network.additional_ips.len() == 1, "addresses {network:?}");

    let script = "echo out; echo err >&2; trap 'exit 3' TERM; touch /ready; while :; do sleep 0.1; done";
    let id = patient(&cri, &pod, container("main", &["sh", "-c", script]))?;
    ensure_eq!(cri.shell(&id, "hostname")?, "one\n", "name of the host");
    let seen = cri.shell(&id, "ip -o address show dev eth0")?;
    ensure!(seen.contains(&network.ip) && seen.contains(&network.additional_ips[0].ip), "addresses inside {seen}");
    let failed = cri.exec(&id, &["sh", "-c", "echo some; echo other >&2; exit 4"], 0)?;
    ensure_eq!((failed.status, &*failed.stdout, &*failed.stderr), (4, "some\n", "other\n"), "what was executed");
    cri.stop(&id, 30)?;
    let ended = cri.status(&id)?;
    ensure_eq!((ended.exit_code, &*ended.reason), (3, "Error"), "status {ended:?}");
    let log = cri.log(&pod, "main")?;
    let lines: Vec<_> = log.lines().filter_map(|line| line.split_once(' ')).map(|(_, line)| line).collect();
    ensure_eq!(lines.len(), 2, "log {log}");
    ensure!(lines.contains(&"stdout F out") && lines.contains(&"stderr F err"), "log {log}");
    cri.remove(&id)?;
    cri.remove_pod(&pod)?;
    cri.end()
}

/// They share network and IPC; each is made anew while the others go on, and none outlives the pod.
fn five_containers_come_and_go(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("five")?)?;
    let mut ids = Vec::new();
    for number in 0..5 {
        ids.push(patient(&cri, &pod, container(&format!("c{number}"), PATIENT))?);
    }
    // What one listens for at localhost, another reaches; and what it leaves in shared memory.
    cri.shell(&ids[0], "echo here >/dev/shm/file; echo spoken | nc -l -p 4321 >/dev/null 2>&1 &")?;
    ensure_eq!(
        cri.shell(&ids[4], "until nc 127.0.0.1 4321 </dev/null; do sleep 0.1; done; cat /dev/shm/file")?,
        "spoken\nhere\n",
        "what another hears and reads"
    );
    for round in 1..=scene.repeat.min(10) {
        let number = round % 5;
        let old = ids[number].clone();
        // As if it had crashed, or asked to end.
        if round % 2 == 0 {
            cri.stop(&old, 30)?;
            ensure_eq!(cri.status(&old)?.exit_code, 3, "exit status");
        } else {
            // A shell that is PID 1 does not die of a signal that it sends itself.
            cri.stop(&old, 0)?;
            ensure_eq!(cri.status(&old)?.exit_code, 137, "exit status");
        }
        let mut config = container(&format!("c{number}"), PATIENT);
        config.metadata.get_or_insert_default().attempt = u32::try_from(round)?;
        // kubelet keeps the one before for its log.
        ids[number] = patient(&cri, &pod, config)?;
        cri.remove(&old)?;
    }
    for id in &ids {
        ensure_eq!(cri.status(id)?.state(), api::ContainerState::ContainerRunning, "state of {id}");
    }
    // One that was made and never started is no obstacle.
    cri.create(&pod, container("never", PATIENT))?;
    cri.remove_pod(&pod)?;
    let left = cri.call(async |mut client| client.list_containers(api::ListContainersRequest::default()).await)?;
    ensure_eq!(left.containers.len(), 0, "containers that are left");
    cri.end()
}

/// Its pods have the sizes of a file that the class names.
fn a_class_with_a_configuration(scene: &Scene) -> Outcome {
    let class = scene.make_directory("class")?.join("class.toml");
    fs::write(&class, "[machine]\nmemory = 256\n")?;
    let cri = Cri::with_class(scene, &class)?;
    let pod = cri.run(cri.pod_config("small")?)?;
    let text = scene.call(&["--root", cri::STATE, "pods", "--format", "json", &pod.id])?.output()?;
    let pods: serde_json::Value = serde_json::from_str(&text)?;
    ensure_eq!(pods[0]["memory"], 256_u64 << 20, "memory of the machine: {text}");
    // containerd before 2.3 takes the options of any class for those of runc's shim then, and starts no container.
    if cri::sandboxer()?.is_none() || cri.version()? >= (2, 3) {
        let id = patient(&cri, &pod, container("main", PATIENT))?;
        let memory = "sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";
        let memory: u64 = cri.shell(&id, memory)?.trim().parse()?;
        ensure!((128 << 10..=256 << 10).contains(&memory), "{memory} KiB of memory, with 256 MiB");
    }
    cri.remove_pod(&pod)?;
    cri.end()
}

/// It is killed where it runs: itself, and as with runc not what it has started.
fn what_is_executed_too_long(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("late")?)?;
    let id = patient(&cri, &pod, container("main", PATIENT))?;
    for _ in 0..scene.repeat.min(20) {
        let script = "sleep 5432 >/dev/null 2>&1 & echo $! >/started; exec sleep 4321";
        let late = cri.exec(&id, &["sh", "-c", script], 2);
        let error = late.err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(error.contains("DeadlineExceeded"), "what took too long: {error:?}");
        let until = Instant::now() + DEADLINE;
        while cri.shell(&id, "ps -o args")?.contains("sleep 4321") {
            ensure!(Instant::now() < until, "it still runs");
        }
        // Which is killed now, and not waited for by anybody else.
        cri.shell(&id, "kill -9 $(cat /started)").map_err(|error| format!("what it has started: {error}"))?;
    }
    ensure_eq!(cri.exec(&id, &["no-such-program"], 0).is_err(), true, "a program that is not there fails");
    ensure_eq!(cri.shell(&id, "echo fine")?, "fine\n", "what is executed afterwards");
    cri.remove_pod(&pod)?;
    cri.end()
}

/// What a container may use, before and after it is changed, and what it says that it has used.
fn limits(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("limits")?)?;
    let mut config = container("main", PATIENT);
    let limits = resources(&mut config);
    (limits.memory_limit_in_bytes, limits.cpu_period, limits.cpu_quota) = (128 << 20, 100_000, 50_000);
    let id = patient(&cri, &pod, config)?;
    let inside = |file: &str| -> Outcome<String> {
        Ok(cri.shell(&id, &format!("cat /sys/fs/cgroup/{file}"))?.trim().to_owned())
    };
    ensure_eq!(inside("memory.max")?, "134217728", "memory.max");
    ensure_eq!(inside("cpu.max")?, "50000 100000", "cpu.max");
    for (memory, quota) in [(256_i64 << 20, 100_000), (96 << 20, 20_000)] {
        let linux = api::LinuxContainerResources {
            memory_limit_in_bytes: memory,
            cpu_period: 100_000,
            cpu_quota: quota,
            ..Default::default()
        };
        let request =
            api::UpdateContainerResourcesRequest { container_id: id.clone(), linux: Some(linux), ..Default::default() };
        cri.call(async |mut client| client.update_container_resources(request).await)?;
        ensure_eq!(inside("memory.max")?, memory.to_string(), "memory.max");
        ensure_eq!(inside("cpu.max")?, format!("{quota} 100000"), "cpu.max");
    }

    cri.remove_pod(&pod)?;
    cri.end()
}

/// kubelet moves the file away, and says so.
fn a_log_is_rotated(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("log")?)?;
    let script = "n=0; trap 'exit 0' TERM; while :; do echo $n; n=$((n + 1)); [ $n -lt 20 ] || [ -e /more ] || { touch /ready; until [ -e /more ]; do sleep 0.1; done; }; [ $n -lt 40 ] || exit 0; done";
    let id = patient(&cri, &pod, container("main", &["sh", "-c", script]))?;
    let directory = Path::new(&pod.config.log_directory);
    let until = Instant::now() + DEADLINE;
    while !cri.log(&pod, "main")?.contains(" 19\n") {
        ensure!(Instant::now() < until, "the log is {}", cri.log(&pod, "main")?);
        std::thread::sleep(Duration::from_millis(100));
    }
    fs::rename(directory.join("main"), directory.join("main.1"))?;
    let request = api::ReopenContainerLogRequest { container_id: id.clone() };
    cri.call(async |mut client| client.reopen_container_log(request).await)?;
    cri.shell(&id, "touch /more")?;
    ensure_eq!(cri.ended(&id)?.exit_code, 0, "exit status");
    let numbers = |name: &str| -> Outcome<Vec<u32>> {
        let log = cri.log(&pod, name)?;
        log.lines().map(|line| Ok(line.rsplit(' ').next().unwrap_or_default().parse()?)).collect()
    };
    ensure_eq!(numbers("main.1")?, (0..20).collect::<Vec<_>>(), "the log before");
    ensure_eq!(numbers("main")?, (20..40).collect::<Vec<_>>(), "the log after");
    cri.remove_pod(&pod)?;
    cri.end()
}

/// Its own, and those of others that it knows.
fn names_of_a_pod(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let mut config = cri.pod_config("names")?;
    config.hostname = "names-0".into();
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    config.dns_config = Some(api::DnsConfig {
        servers: words(&["10.96.0.10", "10.96.0.11"]),
        searches: words(&["default.svc.cluster.local", "cluster.local"]),
        options: words(&["ndots:5"]),
    });
    let pod = cri.run(config)?;
    let resolver = "search default.svc.cluster.local cluster.local\nnameserver 10.96.0.10\nnameserver 10.96.0.11\n\
                    options ndots:5\n";
    for name in ["one", "two"] {
        let id = patient(&cri, &pod, container(name, PATIENT))?;
        ensure_eq!(cri.shell(&id, "cat /etc/resolv.conf")?, resolver, "resolv.conf of {name}");
        ensure_eq!(cri.shell(&id, "cat /etc/hostname; hostname")?, "names-0\nnames-0\n", "name of the host of {name}");
        ensure_eq!(cri.shell(&id, "cat /etc/hosts")?, fs::read_to_string("/etc/hosts")?, "hosts of {name}");
    }
    cri.remove_pod(&pod)?;
    cri.end()
}

/// The pod goes on, and what ends meanwhile is known afterwards.
fn containerd_killed_meanwhile(scene: &Scene) -> Outcome {
    let mut cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("lasting")?)?;
    let lasting = patient(&cri, &pod, container("lasting", PATIENT))?;
    let ending =
        cri.launch(&pod, container("ending", &["sh", "-c", "until [ -e /dev/shm/end ]; do sleep 0.1; done; exit 7"]))?;
    cri.restart_daemon()?;
    ensure_eq!(cri.pod_status(&pod)?.state(), api::PodSandboxState::SandboxReady, "state of the pod");
    ensure_eq!(cri.shell(&lasting, "touch /dev/shm/end; echo here")?, "here\n", "what is executed afterwards");
    ensure_eq!(cri.ended(&ending)?.exit_code, 7, "exit status of one that ended afterwards");
    let id = patient(&cri, &pod, container("later", PATIENT))?;
    cri.stop(&id, 30)?;
    cri.remove_pod(&pod)?;
    cri.end()
}

/// With its machine everything in it ends; who looks is told.
fn a_pod_that_is_killed(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("killed")?)?;
    let id = patient(&cri, &pod, container("main", PATIENT))?;
    let process = cri.pod_process(&pod)?;
    rustix::process::kill_process(process, rustix::process::Signal::KILL)?;
    ensure_eq!(cri.ended(&id)?.exit_code, 137, "exit status of its container");
    let until = Instant::now() + DEADLINE;
    while cri.pod_status(&pod)?.state() != api::PodSandboxState::SandboxNotready {
        ensure!(Instant::now() < until, "the pod does not end");
        std::thread::sleep(Duration::from_millis(100));
    }
    cri.remove_pod(&pod)?;
    cri.end()
}
