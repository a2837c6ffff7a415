//! `podhull state`: what is known of a container, as JSON.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use serde::Serialize;

use super::{Context, Failure};
use crate::state::{Known, Status};

/// Print the state of a container as JSON
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull state hello | jq -r .status        creating, created, running, paused or stopped")]
pub struct Arguments {
    /// Name of the container
    id: String,
}

/// A container as callers of runc expect it, key for key (runc's `list.go`).
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Shown {
    oci_version: String,
    pub id: String,
    /// 0 if it has ended.
    pub pid: i32,
    pub status: Status,
    pub bundle: PathBuf,
    rootfs: PathBuf,
    pub created: String,
    /// Sorted, as Go writes them.
    #[serde(skip_serializing_if = "Option::is_none")]
    annotations: Option<BTreeMap<String, String>>,
    /// Only `list` says who.
    pub owner: String,
}

impl From<Known> for Shown {
    fn from(known: Known) -> Self {
        let status = known.status();
        let state = known.state;
        Self {
            oci_version: state.oci_version,
            id: state.id,
            pid: if status == Status::Stopped { 0 } else { state.process.pid },
            status,
            bundle: state.bundle,
            rootfs: state.rootfs,
            created: state.created,
            annotations: state.annotations.filter(|all| !all.is_empty()).map(BTreeMap::from_iter),
            owner: String::new(),
        }
    }
}

impl Arguments {
    /// Prints it.
    pub fn execute(self, context: &Context) -> Result<u8, Failure> {
        let shown = Shown::from(Known::load(&context.root, &self.id)?);
        std::io::stdout().write_all(text(&shown)?.as_bytes())?;
        Ok(0)
    }
}

/// Without an end of line, as runc prints it.
fn text(shown: &Shown) -> std::io::Result<String> {
    Ok(serde_json::to_string_pretty(shown)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_runc_s() {
        let annotations = ["b", "a"].map(|key| (key.to_owned(), format!("of {key}")));
        let mut shown = Shown {
            oci_version: "1.2.0".into(),
            id: "x".into(),
            pid: 7,
            status: Status::Running,
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            created: "2026-01-31T12:00:00.123456789Z".into(),
            annotations: Some(BTreeMap::from(annotations)),
            owner: String::new(),
        };
        let golden = include_str!("../../tests/golden/state.json");
        assert_eq!(text(&shown).unwrap() + "\n", golden);
        // `list` has it on a line, and says who made it.
        shown.owner = "root".into();
        shown.annotations = None;
        let golden = include_str!("../../tests/golden/list.json");
        assert_eq!(super::super::list::json(&[shown]).unwrap(), golden);
        assert_eq!(super::super::list::json(&[]).unwrap(), "null\n");
    }
}
