//! Pods as kubelet makes them, through containerd's Container Runtime Interface.

use super::oci;
use crate::cri::{Cri, container};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[oci("cri::a_pod_and_its_container", a_pod_and_its_container)];

fn a_pod_and_its_container(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("one")?)?;
    let status = cri.pod_status(&pod)?;
    let network = status.network.clone().unwrap_or_default();
    ensure!(network.ip.starts_with("10.88.7.") && network.additional_ips.len() == 1, "addresses {network:?}");

    let script = "echo out; echo err >&2; trap 'exit 3' TERM; while :; do sleep 0.1; done";
    let id = cri.launch(&pod, container("main", &["sh", "-c", script]))?;
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
