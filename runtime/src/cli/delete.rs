//! `podhull delete`: removes a container.

use super::Context;
use crate::pod::{self, CommandError};
use crate::state;

/// Remove a container that has ended, or was never started
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull delete hello
  podhull delete --force hello               end it first; no error if there is none")]
pub struct Arguments {
    /// End the container first if it runs; no error if it does not exist
    #[arg(short, long)]
    force: bool,

    /// Name of the container
    pub id: String,
}

impl Arguments {
    /// Returns when nothing is left of it.
    pub fn execute(self, context: &Context) -> Result<u8, CommandError> {
        let deleted = pod::delete(&context.root, &self.id, self.force, &context.log);
        // And what commands left that were killed.
        state::sweep(&context.root);
        deleted.map(|()| 0)
    }
}
