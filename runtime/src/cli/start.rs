//! `podhull start`: runs the program of a created container.

use super::Context;
use crate::pod::{self, CommandError};

/// Run the program of a container that `create` made
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull create -b /srv/hello hello && podhull start hello")]
pub struct Arguments {
    /// Name of the container
    pub id: String,
}

impl Arguments {
    /// Returns when the program has been executed.
    pub fn execute(self, context: &Context) -> Result<u8, CommandError> {
        pod::start_created(&context.root, &self.id, &context.log).map(|()| 0)
    }
}
