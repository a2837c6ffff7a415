//! `podhull restore`: refused, in the form that callers of runc understand.

use std::path::PathBuf;

use super::checkpoint::OfBoth;
use super::{Context, Failure};

/// Refused: containers are not made from what a checkpoint saved
///
/// For callers of runc. CRIU restores processes of the host; those of a container are in its virtual machine.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
#[command(after_help = "Examples:
  podhull restore --image-path DIR hello     says why not, and exits with 1
  podhull run -d hello                       begins anew")]
pub struct Arguments {
    /// Unix socket that is sent the terminal
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,

    /// With TCP connections closed
    #[arg(long)]
    tcp_close: bool,

    /// Directory with config.json and the root filesystem
    #[arg(short, long, value_name = "DIR")]
    bundle: Option<PathBuf>,

    /// Return when the container runs
    #[arg(short, long)]
    detach: bool,

    /// File to write the pid that stands for the container to
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,

    /// For callers of runc
    #[arg(long)]
    no_subreaper: bool,

    /// For callers of runc
    #[arg(long)]
    no_pivot: bool,

    /// Profile of a security module
    #[arg(long, value_name = "TYPE:NAME")]
    lsm_profile: Option<String>,

    /// Label for mounts
    #[arg(long, value_name = "CONTEXT")]
    lsm_mount_context: Option<String>,

    #[command(flatten)]
    both: OfBoth,
}

impl Arguments {
    /// Says why not.
    pub fn execute(self, _: &Context) -> Result<u8, Failure> {
        Err(Failure::Unsupported("restore"))
    }
}
