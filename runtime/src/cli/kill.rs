//! `podhull kill`: sends a signal to a container.

use super::{Context, Failure};
use crate::{pod, signals};

/// Send a signal to the first process of a container
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull kill hello                         ask it to end: SIGTERM
  podhull kill hello KILL                    end it; names and numbers are the same: SIGKILL, 9
  podhull kill --all hello KILL              end all of its processes")]
pub struct Arguments {
    /// Send it to all processes of the container
    #[arg(short, long)]
    all: bool,

    /// Name of the container
    id: String,

    /// The signal, by name or number
    #[arg(default_value = "SIGTERM")]
    signal: String,
}

impl Arguments {
    /// Returns when the signal was sent.
    pub fn execute(self, context: &Context) -> Result<u8, Failure> {
        let signal = signals::parse(&self.signal).ok_or(Failure::UnknownSignal(self.signal))?;
        pod::kill(&context.root, &self.id, signal, self.all)?;
        Ok(0)
    }
}
