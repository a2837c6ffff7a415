//! Pods that controllers make, and the node that they have to leave.

use super::Case;
use super::cluster::NODE;
use super::place::{Place, has, nothing_is_left};
use crate::{Outcome, ensure_eq};

pub const CASES: &[Case] = &[
    Case { name: "workloads::job_is_done", run: job_is_done },
    Case { name: "workloads::deployment_is_rolled_out", run: deployment_is_rolled_out },
];

const JOB: &str = include_str!("../../kubernetes/pods/job.yaml");
const DEPLOYMENT: &str = include_str!("../../kubernetes/pods/deployment.yaml");

fn job_is_done(place: &Place) -> Outcome<String> {
    place.apply(JOB)?;
    place.wait("job/twice", "condition=Complete")?;
    let logs = place.say(&["logs", "--selector", "job-name=twice", "--prefix=false"])?;
    ensure_eq!(logs, "done\ndone\n", "what both said");
    place.say(&["delete", "job", "twice"])?;
    Ok(logs)
}

fn deployment_is_rolled_out(place: &Place) -> Outcome<String> {
    place.apply(DEPLOYMENT)?;
    let rolled_out = || place.say(&["rollout", "status", "deployment/kept", "--timeout=250s"]);
    rolled_out()?;
    place.say(&["set", "env", "deployment/kept", "EDITION=second"])?;
    rolled_out()?;
    let edition = place.say(&["exec", "deployment/kept", "--", "sh", "-c", "echo $EDITION"])?;
    ensure_eq!(edition, "second\n", "what runs");
    place.say(&["scale", "deployment/kept", "--replicas=2"])?;
    rolled_out()?;
    place.value("deployment/kept", ".status.readyReplicas")
}

/// Evicts all pods of both classes, looks that nothing is left of them, and lets those come again that are kept running.
pub fn node_is_drained(places: &[Place; 2]) -> Outcome {
    for place in places {
        place.apply(DEPLOYMENT)?;
        place.say(&["rollout", "status", "deployment/kept", "--timeout=250s"])?;
    }
    let cluster = places[0].cluster;
    let words = ["drain", NODE, "--force", "--delete-emptydir-data", "--ignore-daemonsets", "--timeout=250s"];
    let said = cluster.kubectl(&words)?.output()?;
    has(&said, &["drained"])?;
    nothing_is_left()?;
    cluster.kubectl(&["uncordon", NODE])?.output()?;
    for place in places {
        place.say(&["rollout", "status", "deployment/kept", "--timeout=250s"])?;
        place.say(&["delete", "deployment", "kept", "--cascade=foreground", "--timeout=250s"])?;
    }
    nothing_is_left()
}
