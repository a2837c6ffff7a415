//! What a process that stands for a container, or for a program executed in one, gives up before it listens to the guest: its
//! capabilities, and system calls.
//!
//! A call that is not on the list fails as if the kernel did not have it (`ENOSYS`; `clone3`, whose arguments a filter cannot see, is
//! then made as `clone` by the C library): no program and no process is started, nothing mounted, traced, or loaded
//! into the kernel, no namespace made or entered, and no memory made executable.
//!
//! A container's shadow has one thing left to do as root, which is to attach mounts where the guest has made places for them: what
//! that takes it gives up when the container is made, and until then no thread has it in effect but for that moment.

use std::collections::BTreeMap;
use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

/// Gives up what this thread could do as root, for good. What it has open stays open.
pub fn drop_privileges() -> io::Result<()> {
    set_no_new_privs(true)?;
    Ok(have(CapabilitySet::empty(), CapabilitySet::empty())?)
}

/// The same, and for all threads of this process, those to come too, the system calls that they have no use for.
pub fn confine() -> io::Result<()> {
    drop_privileges()?;
    install(allow_beside(&[]))
}

/// The same but for what [`mount_and_confine`] takes, which no thread has in effect.
pub fn confine_but_for_mounting() -> io::Result<()> {
    set_no_new_privs(true)?;
    // A host may give root less than all.
    have(CapabilitySet::empty(), capabilities(None)?.permitted & MOUNTING)?;
    install(allow_beside(UNTIL_MOUNTED))
}

/// Calls `mount` with the capabilities that attaching a mount takes, and gives up what was left after
/// [`confine_but_for_mounting`].
pub fn mount_and_confine(mount: impl FnOnce()) -> io::Result<()> {
    let permitted = capabilities(None)?.permitted;
    have(permitted, permitted)?;
    mount();
    drop_privileges()?;
    // Beside the first filter, which stays: of two the stricter decides.
    install(refuse(UNTIL_MOUNTED))
}

fn have(effective: CapabilitySet, permitted: CapabilitySet) -> rustix::io::Result<()> {
    set_capabilities(None, CapabilitySets { effective, permitted, inheritable: CapabilitySet::empty() })
}

fn install(filter: Result<BpfProgram, BackendError>) -> io::Result<()> {
    seccompiler::apply_filter_all_threads(&filter.map_err(io::Error::other)?).map_err(io::Error::other)
}

/// To attach a mount, and to find its place in directories that are their owner's alone.
const MOUNTING: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::DAC_READ_SEARCH);

/// To attach a mount, and to give that up.
const UNTIL_MOUNTED: &[i64] = &[libc::SYS_move_mount, libc::SYS_seccomp];

/// Bytes, descriptors, waiting.
const STREAMS: &[i64] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_splice,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_pipe2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_signalfd4,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_connect,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
];

/// The container's state, and sockets among its files.
const FILES: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_faccessat2,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlinkat,
    libc::SYS_mkdirat,
    libc::SYS_chdir,
    libc::SYS_fchdir,
    libc::SYS_umask,
    libc::SYS_memfd_create,
];

/// Memory, threads, time, signals, processes that are there, and the end.
const LIFE: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_uname,
    libc::SYS_kill,
    libc::SYS_tgkill,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// As whom a thread connects to sockets of the host; the others have no capability to change that.
const IDENTITY: &[i64] =
    &[libc::SYS_setresuid, libc::SYS_setresgid, libc::SYS_setgroups, libc::SYS_capset, libc::SYS_capget];

/// `prctl` with these: names of threads, and what [`drop_privileges`] does.
const PRCTL: &[i32] = &[libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_NO_NEW_PRIVS];

/// `ioctl` with these: terminals and their sizes.
const IOCTL: &[u64] = &[
    libc::FIONBIO,
    libc::FIONREAD,
    libc::TCGETS,
    libc::TCSETS,
    libc::TCSETSW,
    libc::TCSETSF,
    libc::TIOCGWINSZ,
    libc::TIOCSWINSZ,
    libc::TIOCGPTN,
    // Of the C library since 2.41.
    0x802c_542a,
    0x402c_542b,
    0x402c_542c,
    0x402c_542d,
];

/// What is on the lists, and a few more.
fn allow_beside(more: &[i64]) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in [STREAMS, FILES, LIFE, IDENTITY, more].into_iter().flatten() {
        rules.insert(*call, Vec::new());
    }
    let mut when = |call: i64, argument: u8, test: SeccompCmpOp, value: u64| {
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, test, value)?;
        rules.entry(call).or_default().push(SeccompRule::new(vec![condition])?);
        Ok::<_, BackendError>(())
    };
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        when(call, 2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0)?;
    }
    // A thread, which has the signal handlers of the others: no process.
    let thread = (libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD) as u64;
    when(libc::SYS_clone, 0, SeccompCmpOp::MaskedEq(thread), thread)?;
    when(libc::SYS_unshare, 0, SeccompCmpOp::Eq, libc::CLONE_FS as u64)?;
    when(libc::SYS_socket, 0, SeccompCmpOp::Eq, libc::AF_UNIX as u64)?;
    when(libc::SYS_socket, 0, SeccompCmpOp::Eq, libc::AF_INET as u64)?;
    when(libc::SYS_socket, 0, SeccompCmpOp::Eq, libc::AF_INET6 as u64)?;
    when(libc::SYS_socketpair, 0, SeccompCmpOp::Eq, libc::AF_UNIX as u64)?;
    for option in PRCTL {
        when(libc::SYS_prctl, 0, SeccompCmpOp::Eq, u64::from(option.unsigned_abs()))?;
    }
    for request in IOCTL {
        when(libc::SYS_ioctl, 1, SeccompCmpOp::Eq, *request)?;
    }
    compile(rules, MISSING, SeccompAction::Allow)
}

/// All but a few.
fn refuse(calls: &[i64]) -> Result<BpfProgram, BackendError> {
    compile(calls.iter().map(|call| (*call, Vec::new())).collect(), SeccompAction::Allow, MISSING)
}

/// As if the kernel did not have the call.
const MISSING: SeccompAction = SeccompAction::Errno(libc::ENOSYS as u32);

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    others: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    SeccompFilter::new(rules, others, listed, std::env::consts::ARCH.try_into()?)?.try_into()
}
