//! `podhull run`: a container from its bundle.

use std::path::PathBuf;

use super::create::Container;
use super::{Context, Failure, trace};
use crate::pod;

/// Create a container from a bundle and run it
///
/// Runs in the foreground with the terminal or the standard streams of the caller, and exits with the status of the
/// container: its own, or 128 and the number of the signal that ended it. With `--detach` it returns when the program runs.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull run -b /srv/hello hello            run the bundle in /srv/hello
  echo hi | podhull run cat                  run the bundle in the current directory
  podhull run --pid-file /run/x.pid x        write the pid that stands for the container to a file
  podhull run --guest-console boot.log x     see what the guest kernel prints, slowly")]
pub struct Arguments {
    #[command(flatten)]
    pub container: Container,

    /// Return when the program runs; `podhull delete` removes the container
    #[arg(short, long)]
    detach: bool,

    /// Leave the container there when it has ended, until `podhull delete`
    #[arg(long)]
    keep: bool,

    /// File to write to how the start went; see `podhull trace`
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,

    /// For callers of runc; nothing is reparented to this process
    #[arg(long, hide = true)]
    no_subreaper: bool,
}

impl Arguments {
    /// Runs the container; returns its exit status.
    pub fn execute(self, context: &Context) -> Result<u8, Failure> {
        let inherited = context.take_inherited()?;
        let id = &self.container.id;
        let trace = || {
            let Some(path) = &self.trace else { return };
            // It runs all the same.
            if let Err(error) = trace::text(&context.root, id).and_then(|text| trace::write(path, &text)) {
                context.log.warning(&error.to_string());
            }
        };
        if !self.detach {
            return Ok(pod::run_in_foreground(&self.container.create(context), inherited, self.keep, trace)?);
        }
        let handed = pod::Handed { terminal: None, inherited };
        pod::create(&self.container.create(context), pod::Launch::as_this_process(), handed)?;
        if let Err(error) = pod::start_created(&context.root, id, &context.log) {
            // What this command made it removes; the error that counts is the first.
            let _ = pod::delete(&context.root, id, true, &context.log);
            return Err(error.into());
        }
        trace();
        Ok(0)
    }
}
