//! Files among the descriptors of an executed program: the pod's machine runs, and they are brought into it from outside, as those of
//! a container that joins a pod are.
//!
//! They are taken out again by the process that brought them, if it keeps its rights until the program has ended. A shadow does not,
//! and any process may be killed: what is left is taken out when files are brought into the container the next time, and else goes
//! with the container.

use std::os::fd::{AsFd, OwnedFd};

use podhull_vmm::jail::{Jail, JailError};

use crate::state::{Process, start_time};

/// Files of one program in a machine.
pub struct Attached {
    /// The mount namespace of the machine.
    machine: OwnedFd,
    directory: String,
    /// Whether they are taken out with this.
    held: bool,
}

impl Attached {
    /// Brings files to where they are to be, all of them below the directory of `process` ([`directory`]).
    pub fn new(
        machine: OwnedFd,
        container: &str,
        process: Process,
        files: Vec<(String, OwnedFd)>,
    ) -> Result<Self, JailError> {
        // Before the first is there, so that it goes with this whatever comes next.
        let attached = Self { machine, directory: directory(container, process), held: true };
        let others = of_container(container);
        let left = Jail::of_running(attached.machine.as_fd(), |share| share.names(&others))?;
        // Not in there: it has no `/proc`.
        let gone: Vec<_> = left.iter().filter(|left| !is_alive(left)).collect();
        Jail::of_running(attached.machine.as_fd(), |share| {
            gone.iter().try_for_each(|left| share.detach(&format!("{others}/{left}")))?;
            files.iter().try_for_each(|(path, mount)| share.attach(path, mount))
        })?;
        Ok(attached)
    }

    /// This process will not be able to take them out.
    pub fn leave(&mut self) {
        self.held = false;
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if self.held {
            // If the machine is gone, so are they.
            let _ = Jail::of_running(self.machine.as_fd(), |share| share.detach(&self.directory));
        }
    }
}

/// Where a process has the files of the program it stands for.
pub fn directory(container: &str, process: Process) -> String {
    format!("{}/{}", of_container(container), name(process))
}

fn of_container(container: &str) -> String {
    format!("{container}/executed")
}

fn name(process: Process) -> String {
    format!("{}-{}", process.pid, process.start_time)
}

/// Whether the process with this name is there; by the host's `/proc`, so that the pid namespace of who asks does not matter.
fn is_alive(name: &str) -> bool {
    let process = name.split_once('-').and_then(|(pid, started)| Some((pid.parse().ok()?, started.parse().ok()?)));
    process.is_some_and(|(pid, started): (i32, u64)| start_time(pid) == Some(started))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_by_its_name_and_not_taken_for_another() {
        let this = Process::of(std::process::id().cast_signed());
        assert!(is_alive(&name(this)));
        assert!(!is_alive(&name(Process { start_time: this.start_time + 1, ..this })));
        assert!(!is_alive("x-1") && !is_alive("1"));
    }
}
