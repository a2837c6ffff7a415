//! How many files a process may have open, and which one it is started with.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Has a program be started in a session of its own, with this descriptor at `place` and nothing else open beyond the standard
/// streams: our own caller may have left us some of its descriptors.
pub fn inherit_only(command: &mut Command, descriptor: i32, place: i32) {
    let check = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    let prepare = move || {
        // SAFETY: plain system calls on integers.
        unsafe {
            check(libc::setsid())?;
            if descriptor == place {
                check(libc::fcntl(descriptor, libc::F_SETFD, 0))?;
            } else {
                check(libc::dup2(descriptor, place))?;
            }
            // Not closed now: the standard library reports a failed exec through a descriptor of its own.
            let (first, last) = (place as libc::c_uint + 1, libc::c_uint::MAX);
            check(libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_CLOEXEC) as libc::c_int)
        }
    };
    // SAFETY: between fork and exec the closure only makes system calls, and allocates nothing.
    unsafe {
        command.pre_exec(prepare);
    }
}

/// As many as this process wants, if it may. Services and sessions are given 1024 by default.
pub fn raise_limit(wanted: u64) {
    let limit = getrlimit(Resource::Nofile);
    let wanted = Some(limit.maximum.unwrap_or(wanted).min(wanted));
    if limit.current < wanted && limit.current.is_some() {
        // What it may not, it does without.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: wanted, ..limit });
    }
}
