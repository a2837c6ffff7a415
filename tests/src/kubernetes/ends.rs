//! Pods that end.

use serde_json::Value;

use super::Case;
use super::place::{Place, has};
use crate::{Outcome, ensure_eq};

pub const CASES: &[Case] = &[
    Case { name: "ends::is_tried_until_it_succeeds", run: is_tried_until_it_succeeds },
    Case { name: "ends::is_out_of_memory", run: is_out_of_memory },
];

const ENDS: &str = include_str!("../../kubernetes/pods/ends.yaml");

fn is_tried_until_it_succeeds(place: &Place) -> Outcome<String> {
    place.apply(ENDS)?;
    place.wait("pod/retried", "jsonpath={.status.phase}=Succeeded")?;
    let status: Value = serde_json::from_str(&place.value("pod/retried", ".status.containerStatuses[0]")?)?;
    let (now, before) = (&status["state"]["terminated"], &status["lastState"]["terminated"]);
    let seen = [&status["restartCount"], &now["exitCode"], &now["reason"], &now["message"], &before["exitCode"]];
    let seen = seen.map(ToString::to_string).join(" ");
    ensure_eq!(seen, r#"2 0 "Completed" "end 3\n" 42"#, "its status {status}");
    let logs = place.say(&["logs", "retried"])?;
    has(&logs, &["run 3"])?;
    place.say(&["delete", "pod", "retried"])?;
    Ok(seen + &logs)
}

fn is_out_of_memory(place: &Place) -> Outcome<String> {
    place.apply(ENDS)?;
    place.wait("pod/starved", "jsonpath={.status.phase}=Failed")?;
    let status: Value =
        serde_json::from_str(&place.value("pod/starved", ".status.containerStatuses[0].state.terminated")?)?;
    ensure_eq!((&status["reason"], &status["exitCode"]), (&"OOMKilled".into(), &137.into()), "how it ended: {status}");
    place.say(&["delete", "pod", "starved"])?;
    Ok(status["reason"].to_string())
}
