//! Signals of a foreground run: taken as data instead of interrupting, because most of them are the container's.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use tokio::io::unix::AsyncFd;

/// A signal's number; `libc` has the names.
pub type Signal = i32;

/// Blocks every signal that can be, for this thread and those it starts: from here on nothing ends this process between
/// making something and noting that it must be removed.
///
/// Left alone are the stop signals a terminal sends to its background (SIGTTIN, SIGTTOU): they must stop us as they stop
/// any other program, and a blocked one would be an I/O error instead.
pub fn block() {
    // SAFETY: the set is initialized by sigfillset before it is used, and is not used afterwards.
    unsafe {
        let mut set = MaybeUninit::uninit();
        libc::sigfillset(set.as_mut_ptr());
        libc::sigdelset(set.as_mut_ptr(), libc::SIGTTIN);
        libc::sigdelset(set.as_mut_ptr(), libc::SIGTTOU);
        libc::pthread_sigmask(libc::SIG_SETMASK, set.as_ptr(), std::ptr::null_mut());
    }
}

/// Runs something with SIGTTOU blocked, so that a program in the background may set its terminal.
pub fn without_background_stop<T>(action: impl FnOnce() -> T) -> T {
    // SAFETY: both sets are initialized, by sigemptyset and by pthread_sigmask, before they are used.
    unsafe {
        let (mut set, mut old) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGTTOU);
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), old.as_mut_ptr());
        let result = action();
        libc::pthread_sigmask(libc::SIG_SETMASK, old.as_ptr(), std::ptr::null_mut());
        result
    }
}

/// Stops this process until it is continued.
pub fn stop() {
    // SAFETY: a plain system call on integers.
    unsafe {
        libc::kill(libc::getpid(), libc::SIGSTOP);
    }
}

/// Whether a signal is nobody's but ours: runc's rule for what it does not forward.
pub fn is_ours(signal: Signal) -> bool {
    matches!(signal, libc::SIGCHLD | libc::SIGWINCH | libc::SIGURG)
}

/// Whether a signal ends a program that does nothing about it.
pub fn ends_by_default(signal: Signal) -> bool {
    !is_ours(signal) && !matches!(signal, libc::SIGCONT | libc::SIGTSTP | libc::SIGPIPE)
}

/// The number of a signal given as a number or as a name, with or without `SIG`, as `kill` has them (signal(7)).
pub fn parse(text: &str) -> Option<Signal> {
    if let Ok(number) = text.parse::<Signal>() {
        return (0..=MAX_SIGNAL).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
        return Some(*number);
    }
    let from = |prefix: &str, first: Signal, sign: Signal| {
        let rest = name.strip_prefix(prefix)?;
        let distance = if rest.is_empty() { 0 } else { rest.get(1..)?.parse::<Signal>().ok()? };
        let number = first + sign * distance;
        (libc::SIGRTMIN()..=MAX_SIGNAL).contains(&number).then_some(number)
    };
    from("RTMIN", libc::SIGRTMIN(), 1).or_else(|| from("RTMAX", MAX_SIGNAL, -1))
}

/// The last real-time signal.
const MAX_SIGNAL: Signal = 64;

const NAMES: [(&str, Signal); 34] = [
    ("ABRT", libc::SIGABRT),
    ("ALRM", libc::SIGALRM),
    ("BUS", libc::SIGBUS),
    ("CHLD", libc::SIGCHLD),
    ("CLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("FPE", libc::SIGFPE),
    ("HUP", libc::SIGHUP),
    ("ILL", libc::SIGILL),
    ("INT", libc::SIGINT),
    ("IO", libc::SIGIO),
    ("IOT", libc::SIGABRT),
    ("KILL", libc::SIGKILL),
    ("PIPE", libc::SIGPIPE),
    ("POLL", libc::SIGIO),
    ("PROF", libc::SIGPROF),
    ("PWR", libc::SIGPWR),
    ("QUIT", libc::SIGQUIT),
    ("SEGV", libc::SIGSEGV),
    ("STKFLT", libc::SIGSTKFLT),
    ("STOP", libc::SIGSTOP),
    ("SYS", libc::SIGSYS),
    ("TERM", libc::SIGTERM),
    ("TRAP", libc::SIGTRAP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("USR1", libc::SIGUSR1),
    ("USR2", libc::SIGUSR2),
    ("VTALRM", libc::SIGVTALRM),
    ("WINCH", libc::SIGWINCH),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
];

/// The signals that arrive for this process, for who waits in `poll`; they must be blocked.
pub struct Waiting(OwnedFd);

impl Waiting {
    /// From now on.
    pub fn new() -> io::Result<Self> {
        // SAFETY: the set is initialized by sigfillset; the descriptor is new and nobody else's.
        unsafe {
            let mut set = MaybeUninit::uninit();
            libc::sigfillset(set.as_mut_ptr());
            libc::sigdelset(set.as_mut_ptr(), libc::SIGTTIN);
            libc::sigdelset(set.as_mut_ptr(), libc::SIGTTOU);
            match libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(Self(OwnedFd::from_raw_fd(fd))),
            }
        }
    }

    /// One that has arrived.
    pub fn next(&self) -> Option<Signal> {
        read(&self.0).ok()
    }
}

impl AsFd for Waiting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The signals that arrive for this process, for who waits in an event loop; they must be blocked.
pub struct Signals {
    fd: AsyncFd<OwnedFd>,
}

impl Signals {
    /// Needs a runtime.
    pub fn new() -> io::Result<Self> {
        // SAFETY: the descriptor is owned by the AsyncFd from here on, and never replaced.
        Ok(Self { fd: unsafe { AsyncFd::register(Waiting::new()?.0) }? })
    }

    /// The next signal.
    pub async fn next(&self) -> io::Result<Signal> {
        loop {
            let mut guard = self.fd.readable().await?;
            if let Ok(signal) = guard.try_io(|fd| read(fd.get_ref())) {
                return signal;
            }
        }
    }
}

fn read(fd: &OwnedFd) -> io::Result<Signal> {
    let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
    // SAFETY: the kernel writes whole structures of this size or nothing, and its length was asked for.
    unsafe {
        let length = libc::read(fd.as_raw_fd(), info.as_mut_ptr().cast(), size_of::<libc::signalfd_siginfo>());
        if length != size_of::<libc::signalfd_siginfo>().cast_signed() {
            return Err(io::Error::last_os_error());
        }
        let info = info.assume_init();
        let stops = (info.ssi_code, info.ssi_int) == (libc::SI_QUEUE, libc::SIGSTOP);
        Ok(if stops { libc::SIGSTOP } else { info.ssi_signo.cast_signed() })
    }
}

/// Sends a process that takes its signals by this module one that cannot be taken: SIGSTOP, which is not for itself but for what it
/// stands for, as the value of a SIGTSTP (sigqueue(3)).
pub fn send_stop(process: &OwnedFd) -> io::Result<()> {
    /// `siginfo_t` of a signal with a value, on 64-bit machines (`asm-generic/siginfo.h`).
    #[repr(C)]
    struct Queued {
        signo: i32,
        errno: i32,
        code: i32,
        padding: i32,
        pid: i32,
        uid: u32,
        value: usize,
        rest: [u64; 12],
    }
    const { assert!(size_of::<Queued>() == size_of::<libc::siginfo_t>()) };
    let info = Queued {
        signo: libc::SIGTSTP,
        errno: 0,
        code: libc::SI_QUEUE,
        padding: 0,
        pid: rustix::process::getpid().as_raw_nonzero().get(),
        uid: rustix::process::getuid().as_raw(),
        value: libc::SIGSTOP as usize,
        rest: [0; 12],
    };
    // SAFETY: the kernel reads as much as `siginfo_t` has, which is what there is.
    let sent =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), info.signo, &raw const info, 0) };
    if sent == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The test is a process of its own for it: signals that are blocked are of all threads.
    #[test]
    fn a_stop_is_taken_as_one() {
        use rustix::process::{PidfdFlags, WaitOptions, pidfd_open, waitpid};
        // SAFETY: the child makes system calls only, and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: as above; the set is initialized by sigfillset.
            unsafe {
                let mut set = MaybeUninit::uninit();
                libc::sigfillset(set.as_mut_ptr());
                libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
            }
            let seen = Waiting::new().and_then(|waiting| {
                send_stop(&pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?)?;
                Ok(waiting.next() == Some(libc::SIGSTOP))
            });
            // SAFETY: ends the child.
            unsafe { libc::_exit(i32::from(!seen.unwrap_or(false))) };
        }
        let child = rustix::process::Pid::from_raw(child).unwrap();
        let (_, status) = waitpid(Some(child), WaitOptions::empty()).unwrap().unwrap();
        assert_eq!(status.exit_status(), Some(0));
    }

    #[test]
    fn signals_are_numbers_or_names() {
        for (text, number) in [
            ("9", Some(9)),
            ("KILL", Some(9)),
            ("SIGKILL", Some(9)),
            ("sigterm", Some(15)),
            ("0", Some(0)),
            ("64", Some(64)),
            ("RTMIN+1", Some(libc::SIGRTMIN() + 1)),
            ("SIGRTMAX", Some(64)),
            ("RTMAX-64", None),
            ("65", None),
            ("-1", None),
            ("", None),
            ("LEVITATE", None),
        ] {
            assert_eq!(parse(text), number, "{text}");
        }
    }
}
