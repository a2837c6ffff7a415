//! `podhull metrics`: what pods use, for Prometheus.

use std::io::Write as _;

use super::{Context, Failure};
use crate::inspect;

/// Print what pods use, and how their starts went, in Prometheus' text format
///
/// Those of the command line and those of shims; with another --root than the default, those below it.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull metrics > /var/lib/node_exporter/podhull.prom
  podhull metrics web                        of one pod")]
pub struct Arguments {
    /// Ids of pods, or their names in Kubernetes as NAMESPACE/NAME; without any, all
    #[arg(value_name = "POD")]
    pods: Vec<String>,
}

impl Arguments {
    /// Prints them.
    pub fn execute(self, context: &Context) -> Result<u8, Failure> {
        inspect::expect_many();
        let text = inspect::metrics(&inspect::chosen(&context.root, &self.pods)?)?;
        std::io::stdout().write_all(text.as_bytes())?;
        Ok(0)
    }
}
