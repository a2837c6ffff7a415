//! The containerd shim: this program under the name `containerd-shim-podhull-v2` or `containerd-shim-kata-v2`. One process for each
//! pod serves containerd's Task service over ttrpc (containerd, `core/runtime/v2/README.md`); containers are made by `pod`, as by
//! the command line, and their shadows are this process's children.
//!
//! `start` (in `start.rs`) makes that process, or finds it, and prints its address; `serve.rs` is the process; `delete.rs` removes
//! what is left when it is gone.

mod arguments;
mod connections;
mod container;
mod delete;
mod error;
mod events;
mod fifo;
mod info;
mod io;
mod metrics;
mod options;
mod process;
mod rootfs;
mod sandbox;
mod scrape;
mod serve;
mod service;
mod start;
mod timed;

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use arguments::{Action, Arguments};

/// What the names of shims begin with.
const NAME: &str = "containerd-shim-";

/// The names that it is installed under.
pub const NAMES: [&str; 2] = ["containerd-shim-podhull-v2", "containerd-shim-kata-v2"];

/// Why the shim failed before it could answer anybody.
#[derive(Debug, thiserror::Error)]
enum ShimError {
    #[error(transparent)]
    Arguments(#[from] arguments::ArgumentError),
    #[error(transparent)]
    Start(#[from] start::StartError),
    #[error(transparent)]
    Serve(#[from] serve::ServeError),
    #[error(transparent)]
    Info(#[from] info::InfoError),
    #[error("cannot write to standard output: {0}")]
    Output(#[source] std::io::Error),
}

/// Whether a program of this name is a shim.
pub fn is_called(name: &OsStr) -> bool {
    let file = Path::new(name).file_name().unwrap_or_default();
    file.to_str().is_some_and(|file| file.starts_with(NAME))
}

/// Does what the command line says; containerd reads both outputs of `start` as its answer.
pub fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "podhull: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), ShimError> {
    let arguments = Arguments::read(std::env::args_os())?;
    let answer = match arguments.action {
        Action::Version => arguments::version(),
        Action::Info => info::info()?,
        Action::Start => start::start(&arguments)?,
        Action::Delete => delete::delete(&arguments),
        Action::Serve => return Ok(serve::serve(&arguments)?),
    };
    std::io::stdout().write_all(&answer).map_err(ShimError::Output)
}

/// Where state roots are. Not below `/run/podhull`, whose entries are containers.
const STATE_ROOTS: &str = "/run/containerd/podhull";

/// The state root of a namespace's containers.
fn state_root(namespace: &str) -> PathBuf {
    Path::new(STATE_ROOTS).join(namespace)
}

/// The state roots that there are, in order.
pub fn state_roots() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(STATE_ROOTS).into_iter().flatten().flatten();
    let mut roots: Vec<_> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    roots.sort();
    roots
}
