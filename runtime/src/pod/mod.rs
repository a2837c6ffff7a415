//! A pod on the host: what is opened for it, how large it is, and its life from start to end.

mod announce;
mod binds;
mod boot;
mod clock;
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
mod memory;
mod mountinfo;
mod mounts;
mod names;
mod network;
mod notify;
mod resize;
mod resources;
mod rest;
mod score;
mod session;
mod shadow;
mod size;
mod sockets;
mod start;
mod starve;
mod timeline;
mod tree;
mod update;
mod user_namespace;
mod users;
mod view;
mod volumes;
mod watch;

use std::ffi::OsString;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use rustix::io::Errno;

pub use announce::Announce;
pub use command::{CommandError, ask, delete, destroy, kill, pause, resume, start as start_created, tell_of_removal};
pub use create::{Create, CreateError, Handed, create, run as run_in_foreground};
pub use descriptors::{Asked, DescriptorError, Inherited};
pub use exec::{Exec, ExecError, Execution, exec, exec_in_background, exec_in_foreground, running};
pub use link::{Creator, News};
pub use notify::SOCKET as NOTIFY_SOCKET;
pub use resize::leave;
pub use resources::{IMAGE, KERNEL, LIBRARY, ResourceError, image, kernel, library_file};
pub use shadow::{FLAG as SHADOW_FLAG, Launch, NAME as SHADOW_NAME};
#[cfg(test)]
pub use size::SizeError;
pub use size::{Demand, MAX_CPUS, MAX_MEMORY, Sizing, host_cpus, host_memory};
pub use start::{Run, RunError, run};
pub use timeline::{GuestTimes, Phase, Timeline, command_began, now as monotonic_now};
pub use tree::{Owners, Tree, mapped_overlay};
pub use update::update;
pub use user_namespace::user_namespace;
pub use users::Users;
pub use watch::{Seen, stats, watch};

/// The path of what is open, from the root of this process.
fn path_of(file: BorrowedFd<'_>) -> Result<PathBuf, Errno> {
    let path = rustix::fs::readlink(format!("/proc/self/fd/{}", file.as_raw_fd()), Vec::new())?;
    Ok(OsString::from_vec(path.into_bytes()).into())
}
