//! What a machine's process may still do, once it has what it needs: the less, the less a guest that broke out into it has
//! won. Each step is an error if it cannot be taken; only Landlock may be missing from a kernel.
//!
//! 1. [`Jail::enter`], with one thread: namespaces of its own, and a root that holds the pod's share and nothing else
//!    (`root`). A pid namespace is entered by being born in it: that is up to whoever starts the process.
//! 2. [`Jail::attach`]: the share's mounts.
//! 3. [`Jail::close`]: no capability but those by which the file server acts for the guest's users, none to be had again
//!    (`rights`), and no path but those below the share (`paths`). The file server's threads start here, and keep these.
//! 4. [`Closed::leave_files`]: no capability and no path for the main thread, and so for all threads to come.
//! 5. [`Kind::confine`]: each thread, the main one too, keeps the system calls that its work needs (`filter`).
//!
//! Threads inherit all of it, so the order in which they start is part of it: a thread never has more than the one that
//! started it. The file server's start before step 4; the others after it, by the main thread alone, whose filter allows
//! what any of theirs does. Nothing in the process can ever be mounted, executed or made a socket of.

mod filter;
mod paths;
mod rights;
mod root;

use std::io;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};

pub use paths::{Leftover, landlock};
pub use root::{Jail, remove_tree};

/// A step failed; the process must not go on.
#[derive(Debug, thiserror::Error)]
#[error("jail: {step}: {source}")]
pub struct JailError {
    step: String,
    source: io::Error,
}

fn step<T>(step: &str, result: Result<T, Errno>) -> Result<T, JailError> {
    result.map_err(|errno| JailError { step: step.into(), source: errno.into() })
}

/// What a thread is for: it decides which system calls it may make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Serves the control channel, and starts the threads of vCPUs and devices.
    Main,
    /// Runs a virtual CPU, and answers its exits: what a driver sets up is set up here.
    Vcpu,
    /// A device of queues, guest memory and nothing else. That of the file system lends its queues.
    Device,
    /// Moves bytes between guest memory and sockets that it is given.
    Vsock,
    /// Moves bytes between guest memory and disks.
    Block,
    /// Moves packets between guest memory and a tap.
    Net,
    /// Serves files.
    Files,
}

/// Confines the calling thread as one of a kind, for good.
pub type Confine = Arc<dyn Fn(Kind) -> io::Result<()> + Send + Sync>;

impl Kind {
    /// Leaves the calling thread the system calls of its kind; any other ends the process with `SIGSYS`. The thread must
    /// have `no_new_privs`, which it inherits.
    pub fn confine(self) -> io::Result<()> {
        filter::install(self)
    }
}

/// Confines the calling thread of a test as it would be in a machine's process.
#[cfg(test)]
pub(crate) fn confine_in_test(kind: Kind) -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    kind.confine()
}

impl Jail {
    /// Makes all of this final but the file server's rights. The leftovers can still be removed.
    pub fn close(self, leftovers: &[Leftover]) -> Result<Closed, JailError> {
        // No memory of a guest in core files, and nobody looks into the process but who may look into all of them.
        step("limit of core files", setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }))?;
        step("not dumpable", set_dumpable_behavior(DumpableBehavior::NotDumpable))?;
        rights::keep_those_of_the_file_server()?;
        paths::only_the_share(leftovers)?;
        Ok(Closed { jail: self })
    }
}

/// A jail whose walls stand; only the file server's threads are to be started.
#[derive(Debug)]
pub struct Closed {
    jail: Jail,
}

impl Closed {
    /// `/proc/self/fd`, by which the file server reopens what it knows.
    pub fn proc_self_fd(&self) -> io::Result<std::fs::File> {
        self.jail.proc_self_fd()
    }

    /// Gives up what only the file server's threads need; what starts from now on has none of it.
    pub fn leave_files(self, leftovers: &[Leftover]) -> Result<(), JailError> {
        rights::drop_all()?;
        paths::none(leftovers)
    }
}

/// Raises the limit of open files to what the process was allowed: the file server holds a descriptor for each file that the
/// guest knows.
pub fn raise_descriptor_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    // The hard limit may always be taken; if not, the guest has fewer files.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}
