//! Faults of the process itself that a guest or a file can cause: a device that is made to touch guest memory which is not
//! there (unplugged), and a mapped file that was cut short. They end the machine; the runtime is told which.
//!
//! And a panic, whose message is on standard error: the process is the first of its pid namespace, for which the kernel
//! ignores a `SIGABRT` of its own, and `abort` would go on to a fault that means something else.

use std::os::fd::RawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use vmm_sys_util::signal::register_signal_handler;

use crate::control::{End, Notice};

/// Where to say it; set before the handlers are.
static CHANNEL: AtomicI32 = AtomicI32::new(-1);
/// What to say, written out beforehand: a signal handler must not allocate.
static LAST_WORDS: OnceLock<[Vec<u8>; 2]> = OnceLock::new();

/// What a shell makes of an end by `SIGABRT`.
const ABORTED: libc::c_int = 128 + libc::SIGABRT;

/// Installs the handlers of `SIGSEGV` and `SIGBUS`, which tell the runtime over `channel` and end the process, and of
/// `SIGABRT`.
pub fn install_handlers(channel: RawFd) -> std::io::Result<()> {
    let words = |what: &str| serde_json::to_vec(&Notice::Ended(End::Misbehaved(what.into())));
    let segv = words("a device was made to use guest memory that is not there")?;
    let bus = words("a mapped file (guest kernel or image) was cut short")?;
    let _ = LAST_WORDS.set([segv, bus]);
    CHANNEL.store(channel, Ordering::SeqCst);
    for (signal, handler) in
        [(libc::SIGSEGV, last_words as _), (libc::SIGBUS, last_words as _), (libc::SIGABRT, end as _)]
    {
        register_signal_handler(signal, handler).map_err(|e| std::io::Error::from_raw_os_error(e.errno()))?;
    }
    Ok(())
}

extern "C" fn end(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: _exit is async-signal-safe, and who aborts does not go on.
    unsafe { libc::_exit(ABORTED) };
}

extern "C" fn last_words(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    if let Some([segv, bus]) = LAST_WORDS.get() {
        let words = if signal == libc::SIGBUS { bus } else { segv };
        // SAFETY: send is async-signal-safe; the bytes are never changed or freed once they are set.
        unsafe {
            libc::send(
                CHANNEL.load(Ordering::SeqCst),
                words.as_ptr().cast(),
                words.len(),
                libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
            )
        };
    }
    // SAFETY: _exit is async-signal-safe, and what the process was doing cannot go on.
    unsafe { libc::_exit(1) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::receive;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::os::fd::AsRawFd;

    #[test]
    fn a_fault_is_the_last_thing_the_runtime_hears() {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        // SAFETY: the child makes system calls and touches memory it has, until it ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            install_handlers(theirs.as_raw_fd()).unwrap();
            // SAFETY: it is not: that is the point. The handler ends the child.
            unsafe { std::ptr::null_mut::<u8>().write_volatile(1) };
        }
        drop(theirs);
        let (notice, _): (Notice, _) = receive(&ours).unwrap();
        assert!(matches!(notice, Notice::Ended(End::Misbehaved(what)) if what.contains("not there")));
        let mut status = 0;
        // SAFETY: waits for the child just made.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(libc::WEXITSTATUS(status), 1);
    }
}
