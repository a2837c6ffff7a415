//! `podhull state`: what is known of a container, as JSON.

use std::collections::HashMap;
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
    #[serde(skip_serializing_if = "Option::is_none")]
    annotations: Option<HashMap<String, String>>,
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
            annotations: state.annotations.filter(|annotations| !annotations.is_empty()),
            owner: String::new(),
        }
    }
}

impl Arguments {
    /// Prints it.
    pub fn execute(self, context: &Context) -> Result<u8, Failure> {
        let shown = Shown::from(Known::load(&context.root, &self.id)?);
        // Without an end of line, as runc prints it.
        let text = serde_json::to_vec_pretty(&shown).map_err(std::io::Error::from)?;
        std::io::stdout().write_all(&text)?;
        Ok(0)
    }
}
