//! `podhull resume`: lets the processes of a paused container go on.

use super::Context;
use crate::pod::{self, CommandError};

/// Let the processes of a paused container go on
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull resume hello")]
pub struct Arguments {
    /// Name of the container
    id: String,
}

impl Arguments {
    /// Returns when they do.
    pub fn execute(self, context: &Context) -> Result<u8, CommandError> {
        pod::resume(&context.root, &self.id).map(|()| 0)
    }
}
