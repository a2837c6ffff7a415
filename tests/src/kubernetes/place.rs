//! Where the pods of one class are in the cluster, and what may be left of them.

use std::collections::HashSet;
use std::fs;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::cluster::{Cluster, PATIENCE};
use crate::run::{Ended, Running};
use crate::{Outcome, ensure, processes};

/// A namespace of the cluster that has the name of the class of all pods in it.
pub struct Place<'a> {
    /// The cluster.
    pub cluster: &'a Cluster,
    /// The class, and the namespace.
    pub class: &'static str,
    /// A port of the node that is for this class.
    pub port: u16,
    applied: Mutex<HashSet<&'static str>>,
    /// Whether the pod that most cases look at came to run: who waits for it once in vain does not wait again.
    pub full: OnceLock<Result<(), String>>,
}

impl<'a> Place<'a> {
    /// Makes the namespace, and the class.
    pub fn new(cluster: &'a Cluster, class: &'static str, port: u16) -> Outcome<Self> {
        let place = Self { cluster, class, port, applied: Mutex::default(), full: OnceLock::new() };
        let overhead = if class == "runc" { "" } else { "overhead: {podFixed: {memory: 128Mi, cpu: 100m}}\n" };
        let objects = format!(
            "apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {{name: {class}}}\nhandler: {class}\n{overhead}---\n\
             apiVersion: v1\nkind: Namespace\nmetadata: {{name: {class}}}\n"
        );
        cluster.kubectl_with(&["apply", "-f", "-"], &objects)?.output()?;
        place.kubectl(&["wait", "--for=create", "serviceaccount/default", "--timeout=120s"])?.output()?;
        Ok(place)
    }

    /// kubectl in the namespace, started.
    pub fn start(&self, words: &[&str]) -> Outcome<Running> {
        self.cluster.start_kubectl(&[&["--namespace", self.class], words].concat())
    }

    /// kubectl in the namespace, to its end.
    pub fn kubectl(&self, words: &[&str]) -> Outcome<Ended> {
        self.cluster.kubectl(&[&["--namespace", self.class], words].concat())
    }

    /// What kubectl says, which succeeds.
    pub fn say(&self, words: &[&str]) -> Outcome<String> {
        self.kubectl(words)?.output()
    }

    /// A directory of the node's that pods have.
    pub fn directory(&self) -> String {
        format!("/var/tmp/podhull-kubernetes-{}", self.class)
    }

    /// Applies a manifest, with this class, once.
    pub fn apply(&self, manifest: &'static str) -> Outcome {
        let mut applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
        if applied.contains(manifest) {
            return Ok(());
        }
        let text = manifest
            .replace("runtimeClassName: CLASS", &format!("runtimeClassName: {}", self.class))
            .replace("HOSTPORT", &self.port.to_string())
            .replace("HOSTPATH", &self.directory());
        self.cluster.kubectl_with(&["--namespace", self.class, "apply", "-f", "-"], &text)?.output()?;
        applied.insert(manifest);
        Ok(())
    }

    /// Waits for what `kubectl wait` knows; who waits in vain is told what there is.
    pub fn wait(&self, what: &str, condition: &str) -> Outcome {
        let (condition, timeout) = (format!("--for={condition}"), format!("--timeout={}s", PATIENCE.as_secs() - 30));
        let ended = self.kubectl(&["wait", what, &condition, &timeout])?;
        if ended.status != 0 {
            let described = self.say(&["describe", what])?;
            return Err(format!("{what} does not come to {condition}: {}\n{described}", ended.stderr).into());
        }
        Ok(())
    }

    /// A value of an object.
    pub fn value(&self, what: &str, path: &str) -> Outcome<String> {
        self.say(&["get", what, "-o", &format!("jsonpath={{{path}}}")])
    }

    /// What a shell in a container says, which succeeds.
    pub fn shell(&self, pod: &str, container: &str, script: &str) -> Outcome<String> {
        self.say(&["exec", pod, "-c", container, "--", "sh", "-c", script])
    }

    /// What the server or, through it, kubelet says, as JSON.
    pub fn raw(&self, path: &str) -> Outcome<Value> {
        Ok(serde_json::from_str(&self.say(&["get", "--raw", path])?)?)
    }
}

/// Fails if anything is left of pods on the node, which has some time to take it down.
pub fn nothing_is_left() -> Outcome {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let left = left()?;
        if left.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < until, "left on the node: {}", left.join("; "));
        thread::sleep(Duration::from_secs(1));
    }
}

fn left() -> Outcome<Vec<String>> {
    let mut left = Vec::new();
    let of_a_pod = |command: &str| {
        let name = command.split(' ').next().and_then(|word| word.rsplit('/').next()).unwrap_or_default();
        name.starts_with("containerd-shim") || name == "podhull" || name == "runc" || name.starts_with("podhull-shadow")
    };
    let running = processes::all().into_iter().filter(|process| !matches!(process.state, 'Z' | 'X'));
    left.extend(
        running.filter(|process| of_a_pod(&process.command)).map(|process| format!("process {}", process.command)),
    );
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let of_pods = ["/var/lib/kubelet/pods/", "/run/containerd/", "/run/netns/", "/run/podhull"];
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let points = points.filter(|point| of_pods.iter().any(|of| point.starts_with(of)));
    left.extend(points.map(|point| format!("mount {point}")));
    for directory in [
        "/run/containerd/podhull/k8s.io",
        "/run/containerd/podhull/k8s.io/pods",
        "/run/containerd/runc/k8s.io",
        "/run/containerd/io.containerd.runtime.v2.task/k8s.io",
        "/run/podhull/pods",
        "/run/netns",
        "/var/lib/kubelet/pods",
        "/sys/fs/cgroup/kubepods",
        "/sys/fs/cgroup/kubepods/besteffort",
        "/sys/fs/cgroup/kubepods/burstable",
    ] {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let own = ["pods", "besteffort", "burstable"].iter().any(|own| entry.file_name() == *own);
            if !own && entry.file_type()?.is_dir() || directory == "/run/netns" {
                left.push(entry.path().display().to_string());
            }
        }
    }
    Ok(left)
}

/// Fails unless a text has these parts.
pub fn has(text: &str, parts: &[&str]) -> Outcome {
    for part in parts {
        ensure!(text.contains(part), "no {part:?} in {text}");
    }
    Ok(())
}
