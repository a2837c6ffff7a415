//! The first process of a container that has no program, and holds the namespaces of its pod open for others.

use std::convert::Infallible;

use rustix::io::Errno;

use super::init::Places;
use super::rootfs::last_errno;

/// Waits for processes that are orphaned in the pid namespace, whose init this is, and ends with SIGTERM and SIGINT.
pub fn hold(places: Places) -> Result<Infallible, Errno> {
    // Nobody looks into this process by way of /proc: what it is made of is the agent.
    // SAFETY: a plain system call on integers.
    if unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } < 0 {
        return Err(last_errno());
    }
    let _ = rustix::thread::set_name(c"pause");
    // SAFETY: the set is filled in by the first call, and outlives the others.
    let awaited = unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGCHLD] {
            libc::sigaddset(&raw mut set, signal);
        }
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) < 0 {
            return Err(last_errno());
        }
        set
    };
    // What execve closes for others. Its end tells the agent that this process is where it is to be.
    // SAFETY: nothing here uses these descriptors any more; this process never returns to who opened them, but with an error.
    if unsafe { libc::syscall(libc::SYS_close_range, places.first, libc::c_uint::MAX, 0) } < 0 {
        return Err(last_errno());
    }
    loop {
        let mut signal = 0;
        // SAFETY: both are on this stack.
        if unsafe { libc::sigwait(&raw const awaited, &raw mut signal) } != 0 {
            continue;
        }
        if signal != libc::SIGCHLD {
            // SAFETY: ends this process, which has nothing to finish.
            unsafe { libc::_exit(0) };
        }
        // SAFETY: a plain system call; nobody asks how they ended.
        while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
    }
}
