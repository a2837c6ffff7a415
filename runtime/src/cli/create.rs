//! `podhull create`: everything but the program's start.

use std::path::PathBuf;

use super::{Context, Failure};
use crate::pod;

/// Create a container from a bundle; `start` runs its program
///
/// Returns when the container is made. What stands for it on the host then is a process whose pid is in `state` and in the
/// pid file: it has the standard streams of this command, and exits with the status of the container.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull create -b /srv/hello hello && podhull start hello
  podhull create --pid-file /run/x.pid --console-socket /run/x.sock x")]
pub struct Arguments {
    #[command(flatten)]
    pub container: Container,
}

/// What `create`, and `run` in the background, need to know.
#[derive(clap::Args)]
pub struct Container {
    /// Directory with config.json and the root filesystem
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,

    /// File to write the pid that stands for the container to
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,

    /// Unix socket that is sent a pidfd of the process that stands for the container
    #[arg(long, value_name = "SOCKET")]
    pub pidfd_socket: Option<PathBuf>,

    /// Unix socket that is sent the terminal of a container with `process.terminal`
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,

    /// File to append what the guest kernel prints to; slows the start down
    #[arg(long, value_name = "FILE")]
    pub guest_console: Option<PathBuf>,

    /// For callers of runc; the root of a container is always pivoted, in its own virtual machine
    #[arg(long)]
    pub no_pivot: bool,

    /// For callers of runc; a container's session keyring is its own, in its own virtual machine
    #[arg(long)]
    pub no_new_keyring: bool,

    /// Pass so many descriptors from number 3 on to the program; those of $LISTEN_FDS come before them
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: usize,

    /// Name of the container: letters, digits, `_`, `+`, `-` and `.`
    pub id: String,
}

impl Container {
    /// What is to be made.
    pub fn create<'a>(&'a self, context: &'a Context) -> pod::Create<'a> {
        pod::Create {
            id: &self.id,
            bundle: &self.bundle,
            announce: pod::Announce { pid_file: self.pid_file.as_deref(), pidfd_socket: self.pidfd_socket.as_deref() },
            console_socket: self.console_socket.is_some(),
            cgroups: context.cgroups,
            class: None,
            oom_score_adj: None,
            began: pod::command_began(),
            holds_pod: false,
            root: &context.root,
            log: &context.log,
        }
    }

    /// What its shadow is to run.
    pub fn run<'a>(&'a self, context: &'a Context, creator: &'a pod::Creator) -> pod::Run<'a> {
        pod::Run {
            id: &self.id,
            bundle: &self.bundle,
            console_socket: self.console_socket.as_deref(),
            guest_console: self.guest_console.as_deref(),
            cgroups: context.cgroups,
            creator,
            root: &context.root,
            log: &context.log,
        }
    }
}

impl Arguments {
    /// Makes the container.
    pub fn execute(self, context: &Context) -> Result<u8, Failure> {
        let inherited = context.take_inherited()?;
        let handed = pod::Handed { terminal: None, inherited };
        pod::create(&self.container.create(context), pod::Launch::as_this_process(), handed)?;
        Ok(0)
    }
}
