//! A pod on the host: what is opened for it, how large it is, and its life from start to end.

mod command;
mod exec;
mod mounts;
mod resources;
mod session;
mod shadow;
mod size;
mod start;

use std::path::PathBuf;

pub use command::{CommandError, delete, kill, start as start_created};
pub use exec::{Exec, ExecError, exec, running};
pub use resources::ResourceError;
pub use shadow::{CreateError, FLAG as SHADOW_FLAG, Pipe, in_shadow};
pub use size::host_memory;
pub use start::{Report, Run, RunError, run};

/// Where the guest kernel is, if it is one.
pub fn kernel() -> Result<PathBuf, ResourceError> {
    resources::kernel().map(|_| resources::library_file(resources::KERNEL))
}

/// Where the guest image is, if it is one.
pub fn image() -> Result<PathBuf, ResourceError> {
    resources::image().map(|_| resources::library_file(resources::IMAGE))
}
