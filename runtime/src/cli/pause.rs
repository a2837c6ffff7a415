//! `podhull pause`: stops the processes of a container.

use super::Context;
use crate::pod::{self, CommandError};

/// Stop all processes of a container where they are
///
/// Its memory stays as it is, and so does its virtual machine. `resume` lets it go on.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull pause hello
  podhull pause hello && podhull resume hello")]
pub struct Arguments {
    /// Name of the container
    id: String,
}

impl Arguments {
    /// Returns when they stand still.
    pub fn execute(self, context: &Context) -> Result<u8, CommandError> {
        pod::pause(&context.root, &self.id).map(|()| 0)
    }
}
