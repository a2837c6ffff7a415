//! `podhull trace`: how a container's start went.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use super::{Context, Failure};
use crate::inspect;
use crate::state::Known;

/// Print how a container's start went, for ui.perfetto.dev or chrome://tracing
///
/// From the command that made the container to its program's start: phases on the host, and what the guest did meanwhile.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull trace hello > hello.json
  podhull --root /run/containerd/podhull/k8s.io trace -o start.json ID")]
pub struct Arguments {
    /// File to write it to; the default is standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Name of the container
    id: String,
}

impl Arguments {
    /// Prints it.
    pub fn execute(self, context: &Context) -> Result<u8, Failure> {
        let text = text(&context.root, &self.id)?;
        match self.output {
            Some(path) => write(&path, &text)?,
            None => std::io::stdout().write_all(text.as_bytes())?,
        }
        Ok(0)
    }
}

/// The trace of a container, a line of JSON.
pub fn text(root: &Path, id: &str) -> Result<String, Failure> {
    let state = Known::load(root, id)?.state;
    let pod = state.pod().map_or_else(|| id.to_owned(), |pod| pod.pod);
    Ok(inspect::trace(id, &pod, &state.timeline).to_string() + "\n")
}

/// Writes a trace to a file.
pub fn write(path: &Path, text: &str) -> Result<(), Failure> {
    std::fs::write(path, text).map_err(|error| Failure::Trace(path.to_owned(), error))
}
