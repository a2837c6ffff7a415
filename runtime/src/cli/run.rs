//! `podhull run`: a container from its bundle, in the foreground.

use std::path::PathBuf;

use super::Context;
use crate::pod::{self, RunError};

/// Create a container from a bundle and run it
///
/// Runs in the foreground with the terminal or the standard streams of the caller, and exits with the status of the
/// container: its own, or 128 and the number of the signal that ended it.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull run -b /srv/hello hello            run the bundle in /srv/hello
  echo hi | podhull run cat                  run the bundle in the current directory
  podhull run --pid-file /run/x.pid x        write the pid of this process to a file
  podhull run --guest-console boot.log x     see what the guest kernel prints, slowly")]
pub struct Arguments {
    /// Directory with config.json and the root filesystem
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,

    /// File to write the pid that stands for the container to
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,

    /// Unix socket that is sent the terminal of a container with `process.terminal`
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,

    /// File to append what the guest kernel prints to; slows the start down
    #[arg(long, value_name = "FILE")]
    guest_console: Option<PathBuf>,

    /// Name of the container: letters, digits, `_`, `+`, `-` and `.`
    id: String,
}

impl Arguments {
    /// Runs the container; returns its exit status.
    pub fn execute(self, context: &Context) -> Result<u8, RunError> {
        pod::run(pod::Run {
            id: &self.id,
            bundle: &self.bundle,
            pid_file: self.pid_file.as_deref(),
            console_socket: self.console_socket.as_deref(),
            guest_console: self.guest_console.as_deref(),
            root: &context.root,
            log: &context.log,
        })
    }
}
