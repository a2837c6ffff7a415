//! `podhull checkpoint`: refused, in the form that callers of runc understand.

use std::path::PathBuf;

use super::{Context, Failure};
use crate::state::Known;

/// Refused: the state of a running container is not saved
///
/// For callers of runc. CRIU saves processes of the host; those of a container are in its virtual machine.
#[derive(clap::Args)]
// Podman takes help that succeeds for the promise that the command will.
#[command(disable_help_flag = true)]
#[command(after_help = "Examples:
  podhull checkpoint hello                   says why not, and exits with 1
  podhull pause hello                        keeps it as it is, as long as its host runs")]
pub struct Arguments {
    /// Directory of an earlier image
    #[arg(long, value_name = "DIR")]
    parent_path: Option<PathBuf>,

    /// Let the container run on
    #[arg(long)]
    leave_running: bool,

    /// Without connections that are being made
    #[arg(long)]
    tcp_skip_in_flight: bool,

    /// Descriptor to write to when memory can be fetched
    #[arg(long, value_name = "FD", allow_hyphen_values = true)]
    status_fd: Option<i32>,

    /// Where to send memory
    #[arg(long, value_name = "ADDRESS:PORT")]
    page_server: Option<String>,

    /// Only memory, ahead of the rest
    #[arg(long)]
    pre_dump: bool,

    #[command(flatten)]
    both: OfBoth,
}

/// What `checkpoint` and `restore` both have.
#[derive(clap::Args)]
pub struct OfBoth {
    /// Directory of the image
    #[arg(long, value_name = "DIR")]
    image_path: Option<PathBuf>,

    /// Directory for logs
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,

    /// With open TCP connections
    #[arg(long)]
    tcp_established: bool,

    /// With Unix sockets whose other side is outside
    #[arg(long)]
    ext_unix_sk: bool,

    /// With a terminal
    #[arg(long)]
    shell_job: bool,

    /// Memory when it is used
    #[arg(long)]
    lazy_pages: bool,

    /// With locks of files
    #[arg(long)]
    file_locks: bool,

    /// What to do about control groups
    #[arg(long, value_name = "MODE")]
    manage_cgroups_mode: Option<String>,

    /// Namespace to leave empty; more than once for more
    #[arg(long, value_name = "TYPE")]
    empty_ns: Vec<String>,

    /// No memory twice
    #[arg(long)]
    auto_dedup: bool,

    /// With files that were removed and are still open
    #[arg(long)]
    link_remap: bool,

    /// Say that this is refused
    #[arg(short, long)]
    help: bool,

    /// Name of the container
    #[arg(required_unless_present = "help")]
    id: Option<String>,
}

impl Arguments {
    /// Says why not.
    pub fn execute(self, context: &Context) -> Result<u8, Failure> {
        if let Some(id) = self.both.id.filter(|_| !self.both.help) {
            // Which is the mistake if there is no such container.
            Known::load(&context.root, &id)?;
        }
        Err(Failure::Unsupported("checkpoint"))
    }
}
