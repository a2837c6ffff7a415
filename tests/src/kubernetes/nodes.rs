//! What `deploy/` says to the server of a cluster: who labels nodes, and which pods wait for that.

use super::cluster::{Cluster, NODE};
use super::place::{Place, has};
use crate::{Outcome, ensure, ensure_eq};

const BASE: &str = include_str!("../../../deploy/kustomize/base/podhull.yaml");
const UNINSTALL: &str = include_str!("../../../deploy/kustomize/uninstall/podhull.yaml");
const PAGE: &str = include_str!("../../../docs/kubernetes.md");

/// A pod of the class that the base makes, and another where a kubelet turns it away that has not heard of the label yet.
const WAITING: &str = "apiVersion: apps/v1
kind: StatefulSet
metadata: {name: waiting}
spec:
  serviceName: waiting
  selector: {matchLabels: {app: waiting}}
  template:
    metadata: {labels: {app: waiting}}
    spec:
      runtimeClassName: podhull
      automountServiceAccountToken: false
      terminationGracePeriodSeconds: 1
      containers:
        - {name: main, image: 'docker.io/library/busybox:latest', imagePullPolicy: Never, command: [sleep, '1000']}
";

/// In the namespace of what is installed.
fn say(cluster: &Cluster, words: &[&str]) -> Outcome<String> {
    cluster.kubectl(&[&["--namespace", "podhull"], words].concat())?.output()
}

/// The label that says that pods can run there.
fn label(cluster: &Cluster) -> Outcome<String> {
    say(cluster, &["get", "node", NODE, "-o", r"jsonpath={.metadata.labels.podhull\.io/ready}"])
}

/// What the step of a manifest does that labels a node, with a token.
fn label_step(cluster: &Cluster, manifest: &str, token: &str) -> Outcome {
    let step = manifest.lines().find_map(|line| line.trim().strip_prefix("args: [label, ")?.strip_suffix(']'));
    let step = step.ok_or("no step labels a node")?.replace("$(NODE)", NODE);
    let words: Vec<_> = ["--token", token, "label"].into_iter().chain(step.split(", ")).collect();
    cluster.kubectl(&words)?.output().map(drop)
}

/// The server takes the whole base; the step that labels a node may do that and nothing else; and a pod of the base's class goes to no
/// node before.
pub fn are_labelled(places: &[Place; 2]) -> Outcome {
    let cluster = places[0].cluster;
    cluster.kubectl(&["create", "namespace", "podhull"])?.output()?;
    let typed = PAGE.split('`').find(|span| span.starts_with("kubectl label namespace "));
    let words: Vec<_> = typed.ok_or("no label of a namespace on the page")?.split(' ').skip(1).collect();
    cluster.kubectl(&words)?.output()?;
    let enforced = r"jsonpath={.metadata.labels.pod-security\.kubernetes\.io/enforce}";
    ensure_eq!(say(cluster, &["get", "namespace", "podhull", "-o", enforced])?, "privileged", "Pod Security");

    let typed = PAGE.lines().find_map(|line| line.strip_prefix("kubectl apply -k deploy/"));
    let base = format!("/usr/share/podhull/{}", typed.ok_or("no base on the page")?);
    let taken = cluster.kubectl(&["apply", "--dry-run=server", "-k", &base])?.output()?;
    has(
        &taken,
        &["namespace/podhull ", "daemonset.apps/podhull-node created", "runtimeclass.node.k8s.io/podhull created"],
    )?;

    // No image of the installer is there; and containerd has been told of the one name.
    let is_wanted =
        |document: &&str| !document.contains("\nkind: DaemonSet\n") && !document.contains("\nhandler: kata\n");
    let objects: Vec<_> = BASE.split("---\n").filter(is_wanted).collect();
    let objects = objects.join("---\n").replace("handler: podhull\n", "handler: kata\n");
    let apply = ["--namespace", "podhull", "apply", "-f", "-"];
    cluster.kubectl_with(&apply, &objects)?.output()?;
    ensure_eq!(label(cluster)?, "", "label of a node that was not installed");
    say(cluster, &["wait", "--for=create", "serviceaccount/default", "--timeout=120s"])?;
    cluster.kubectl_with(&apply, WAITING)?.output()?;
    for condition in ["--for=create", "--for=condition=PodScheduled=false"] {
        say(cluster, &["wait", "pod/waiting-0", condition, "--timeout=120s"])?;
    }

    let token = say(cluster, &["create", "token", "podhull-node"])?;
    let token = token.trim();
    for words in [
        &["get", "pods", "--all-namespaces"][..],
        &["label", "namespace", "podhull", "podhull.io/ready=true"],
        &["delete", "node", NODE, "--dry-run=server"],
    ] {
        let refused = cluster.kubectl(&[&["--token", token], words].concat())?;
        ensure!(refused.status != 0 && refused.stderr.contains("Forbidden"), "{words:?} with its token: {refused:?}");
    }
    for _ in 0..2 {
        label_step(cluster, BASE, token)?;
        ensure_eq!(label(cluster)?, "true", "label of a node that was installed");
    }
    say(cluster, &["rollout", "status", "statefulset/waiting", "--timeout=270s"])?;
    label_step(cluster, UNINSTALL, token)?;
    ensure_eq!(label(cluster)?, "", "label of a node that loses podhull");
    // What runs there goes on.
    let restarts = "jsonpath={.status.phase} {.status.containerStatuses[0].restartCount}";
    ensure_eq!(say(cluster, &["get", "pod", "waiting-0", "-o", restarts])?, "Running 0", "the pod afterwards");
    say(cluster, &["delete", "statefulset", "waiting", "--cascade=foreground", "--timeout=200s"])?;
    cluster.kubectl_with(&["--namespace", "podhull", "delete", "-f", "-"], &objects)?.output()?;
    cluster.kubectl(&["delete", "namespace", "podhull", "--timeout=200s"])?.output().map(drop)
}
