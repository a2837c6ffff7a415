//! A pod on the host: what is opened for it, how large it is, and its life from start to end.

mod announce;
mod boot;
mod command;
mod create;
mod descriptors;
mod disks;
mod exec;
mod foreground;
mod forwards;
mod hooks;
mod join;
mod link;
mod member;
mod mounts;
mod names;
mod network;
mod notify;
mod resize;
mod resources;
mod session;
mod shadow;
mod size;
mod sockets;
mod start;
mod starve;
mod tree;
mod update;
mod view;
mod volumes;
mod watch;

use std::path::PathBuf;

pub use announce::Announce;
pub use command::{CommandError, delete, kill, pause, resume, start as start_created};
pub use create::{Create, CreateError, Handed, create, run as run_in_foreground};
pub use descriptors::{Asked, DescriptorError, Inherited};
pub use exec::{Exec, ExecError, Execution, exec, exec_in_background, exec_in_foreground, running};
pub use link::{Creator, News};
pub use notify::SOCKET as NOTIFY_SOCKET;
pub use resources::ResourceError;
pub use shadow::{FLAG as SHADOW_FLAG, Launch, NAME as SHADOW_NAME};
pub use size::{Demand, host_memory};
pub use start::{Run, RunError, run};
pub use update::update;
pub use watch::{Seen, stats, watch};

/// Where the guest kernel is, if it is one.
pub fn kernel() -> Result<PathBuf, ResourceError> {
    resources::kernel().map(|_| resources::library_file(resources::KERNEL))
}

/// Where the guest image is, if it is one.
pub fn image() -> Result<PathBuf, ResourceError> {
    resources::image().map(|_| resources::library_file(resources::IMAGE))
}
