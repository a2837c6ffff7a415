//! Telling those who look into the container's control group on the host that it was out of memory.
//!
//! The kernel that killed the container is the guest's. On the host, conmon and containerd's shim learn of it from `oom_kill` in
//! `memory.events` of the container's group, where its shadow is alone with those of executed programs: nothing counts there but
//! that the kernel kills a process of that group for lack of memory. So the shadow of a container that was killed so in its guest
//! takes all memory from its group, as the last thing it does. It is killed, and that is the status that it would have exited with.
//!
//! The file is opened by who makes the group. A shadow could raise its own limit with it, which it could also pass by where no limit
//! is asked for; the machine's memory is not in this group.

use std::os::fd::OwnedFd;

/// Takes all memory from the group that `file` is the limit of: does not return if the kernel kills this process for it.
pub fn starve(file: OwnedFd) {
    // Where it may not be written any more, the group is gone, and with it who could look.
    let _ = rustix::io::write(&file, b"0");
}
