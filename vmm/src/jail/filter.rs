//! System calls, by what a thread is for: a list of those it may make, with the values of the arguments that matter. Any
//! other call ends the process with `SIGSYS`; the kernel's audit log names it (`type=1326`).
//!
//! What is nowhere in the lists: executable memory, programs, processes, sockets that are not handed in, mounts, namespaces,
//! tracing, loading of code into the kernel.

use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;

use kvm_bindings as kvm;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use super::Kind;
use crate::process::CONTROL_FD;
use crate::virtio::net::{TUNGETIFF, TUNGETVNETHDRSZ, TUNSETOFFLOAD};

/// Installs the filter of a kind on the calling thread.
pub fn install(kind: Kind) -> io::Result<()> {
    if kind == Kind::Main {
        seccompiler::apply_filter(program(&OLD_CLONE, old_clone)?).map_err(io::Error::other)?;
    }
    seccompiler::apply_filter(program(&PROGRAMS[kind as usize], || calls(kind).compile())?).map_err(io::Error::other)
}

/// Threads of a kind share their program. Compiling one again by accident, in two threads at once, does no harm.
static PROGRAMS: [OnceLock<BpfProgram>; 7] = [const { OnceLock::new() }; 7];
static OLD_CLONE: OnceLock<BpfProgram> = OnceLock::new();

fn program(
    slot: &'static OnceLock<BpfProgram>,
    compile: impl FnOnce() -> Result<BpfProgram, seccompiler::BackendError>,
) -> io::Result<&'static BpfProgram> {
    match slot.get() {
        Some(program) => Ok(program),
        None => {
            let program = compile().map_err(io::Error::other)?;
            Ok(slot.get_or_init(|| program))
        }
    }
}

/// `clone3` has its flags in memory, where a filter cannot look. The C library takes it for missing, and uses `clone`.
fn old_clone() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let (missing, others) = (SeccompAction::Errno(libc::ENOSYS as u32), SeccompAction::Allow);
    SeccompFilter::new(rules, others, missing, std::env::consts::ARCH.try_into()?)?.try_into()
}

/// The calls of a kind.
fn calls(kind: Kind) -> Calls {
    let mut calls = Calls::default();
    every_thread(&mut calls);
    match kind {
        Kind::Vcpu => vcpu(&mut calls),
        Kind::Device => device(&mut calls),
        Kind::Vsock => vsock(&mut calls),
        Kind::Block => block(&mut calls),
        Kind::Net => net(&mut calls),
        Kind::Files => files(&mut calls),
        Kind::Main => main(&mut calls),
    }
    calls
}

/// System calls that are allowed.
#[derive(Default)]
struct Calls {
    rules: BTreeMap<i64, Vec<Vec<(u8, Test)>>>,
}

/// What an argument, of 32 bits, must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Test {
    Is(u64),
    /// Has none of these bits.
    Lacks(u64),
}

use Test::{Is, Lacks};

impl Calls {
    /// Whatever their arguments are.
    fn any(&mut self, calls: &[i64]) -> &mut Self {
        for call in calls {
            self.rules.insert(*call, Vec::new());
        }
        self
    }

    /// If all tests of arguments hold; or those of another line of the same call.
    fn when(&mut self, call: i64, tests: &[(u8, Test)]) -> &mut Self {
        match self.rules.get_mut(&call) {
            // Allowed whatever its arguments are.
            Some(lines) if lines.is_empty() => {}
            Some(lines) => lines.push(tests.to_vec()),
            None => drop(self.rules.insert(call, vec![tests.to_vec()])),
        }
        self
    }

    /// `ioctl` with one of these requests.
    fn ioctls(&mut self, requests: &[u64]) -> &mut Self {
        for request in requests {
            self.when(libc::SYS_ioctl, &[(1, Is(*request))]);
        }
        self
    }

    fn compile(self) -> Result<BpfProgram, seccompiler::BackendError> {
        let condition = |(argument, test): (u8, Test)| {
            let (operator, value) = match test {
                Is(value) => (SeccompCmpOp::Eq, value),
                Lacks(bits) => (SeccompCmpOp::MaskedEq(bits), 0),
            };
            SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
        };
        let mut rules = BTreeMap::new();
        for (call, lines) in self.rules {
            let line = |tests: Vec<_>| SeccompRule::new(tests.into_iter().map(condition).collect::<Result<_, _>>()?);
            rules.insert(call, lines.into_iter().map(line).collect::<Result<_, _>>()?);
        }
        let (others, listed) = (SeccompAction::KillProcess, SeccompAction::Allow);
        SeccompFilter::new(rules, others, listed, std::env::consts::ARCH.try_into()?)?.try_into()
    }
}

/// The direction of an `ioctl` request's argument.
const NONE: u64 = 0;
const WRITE: u64 = 1;
const READ: u64 = 2;

/// A request of KVM: direction and size of what it points to, and its number (`linux/kvm.h`).
const fn kvm_request(direction: u64, number: u64, size: usize) -> u64 {
    const KVM: u64 = 0xae;
    direction << 30 | (size as u64) << 16 | KVM << 8 | number
}

const KVM_RUN: u64 = kvm_request(NONE, 0x80, 0);
const KVM_IOEVENTFD: u64 = kvm_request(WRITE, 0x79, size_of::<kvm::kvm_ioeventfd>());
const KVM_SIGNAL_MSI: u64 = kvm_request(WRITE, 0xa5, size_of::<kvm::kvm_msi>());
const KVM_GET_LAPIC: u64 = kvm_request(READ, 0x8e, size_of::<kvm::kvm_lapic_state>());
const KVM_SET_LAPIC: u64 = kvm_request(WRITE, 0x8f, size_of::<kvm::kvm_lapic_state>());
const KVM_SET_CPUID2: u64 = kvm_request(WRITE, 0x90, size_of::<kvm::kvm_cpuid2>());

/// A vCPU's state, saved and restored on its thread; the registers also tell where a guest was when it could not go on.
const VCPU_STATE: [u64; 22] = [
    kvm_request(READ, 0x81, size_of::<kvm::kvm_regs>()),
    kvm_request(WRITE, 0x82, size_of::<kvm::kvm_regs>()),
    kvm_request(READ, 0x83, size_of::<kvm::kvm_sregs>()),
    kvm_request(WRITE, 0x84, size_of::<kvm::kvm_sregs>()),
    kvm_request(READ | WRITE, 0x88, size_of::<kvm::kvm_msrs>()),
    kvm_request(WRITE, 0x89, size_of::<kvm::kvm_msrs>()),
    KVM_GET_LAPIC,
    KVM_SET_LAPIC,
    KVM_SET_CPUID2,
    kvm_request(READ | WRITE, 0x91, size_of::<kvm::kvm_cpuid2>()),
    kvm_request(READ, 0x98, size_of::<kvm::kvm_mp_state>()),
    kvm_request(WRITE, 0x99, size_of::<kvm::kvm_mp_state>()),
    kvm_request(READ, 0x9f, size_of::<kvm::kvm_vcpu_events>()),
    kvm_request(WRITE, 0xa0, size_of::<kvm::kvm_vcpu_events>()),
    kvm_request(READ, 0xa1, size_of::<kvm::kvm_debugregs>()),
    kvm_request(WRITE, 0xa2, size_of::<kvm::kvm_debugregs>()),
    kvm_request(NONE, 0xa2, 0),
    kvm_request(NONE, 0xa3, 0),
    kvm_request(WRITE, 0xa5, size_of::<kvm::kvm_xsave>()),
    kvm_request(READ, 0xa6, size_of::<kvm::kvm_xcrs>()),
    kvm_request(WRITE, 0xa7, size_of::<kvm::kvm_xcrs>()),
    kvm_request(READ, 0xcf, size_of::<kvm::kvm_xsave>()),
];

/// What the main thread asks of the machine beside: vCPUs that come late, and the clock of a snapshot.
const MACHINE: [u64; 3] = [
    kvm_request(NONE, 0x41, 0),
    kvm_request(WRITE, 0x7b, size_of::<kvm::kvm_clock_data>()),
    kvm_request(READ, 0x7c, size_of::<kvm::kvm_clock_data>()),
];

const FIONBIO: u64 = 0x5421;
const BLKDISCARD: u64 = 0x1277;
/// Sizes of logical and physical blocks.
const BLOCK_SIZES: [u64; 2] = [0x1268, 0x127b];

/// The `CLONE_` flags of a thread of the C library.
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

/// Memory, locks, time, the end of a thread or the process with its last words, and events to other threads.
fn every_thread(calls: &mut Calls) {
    calls.any(&[
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_close,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_brk,
        libc::SYS_futex,
        libc::SYS_sched_yield,
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_restart_syscall,
        libc::SYS_getrandom,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        libc::SYS_getpid,
        libc::SYS_gettid,
        libc::SYS_tgkill,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ]);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        calls.when(call, &[(2, Lacks(libc::PROT_EXEC as u64))]);
    }
    // A check of the standard library, in builds with debug assertions, before it closes a descriptor.
    calls.when(libc::SYS_fcntl, &[(1, Is(libc::F_GETFD as u64))]);
    // The last words of a fault.
    calls.when(libc::SYS_sendto, &[(0, Is(CONTROL_FD as u64))]);
}

/// Runs, and sets up queues where the driver says so: an event for each, which KVM signals, and what the device waits with.
fn vcpu(calls: &mut Calls) {
    calls.ioctls(&[KVM_RUN, KVM_SIGNAL_MSI, KVM_IOEVENTFD]).ioctls(&VCPU_STATE);
    calls.any(&[libc::SYS_eventfd2, libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_timerfd_create]);
    // A driver that resets its device, as a guest that reboots does, ends the connections there are.
    calls.any(&[libc::SYS_shutdown, libc::SYS_recvfrom]);
    copies(calls);
}

/// Waits for kicks, and interrupts the guest.
fn device(calls: &mut Calls) {
    calls.ioctls(&[KVM_SIGNAL_MSI]);
    calls.any(&[libc::SYS_epoll_ctl, libc::SYS_epoll_wait, libc::SYS_epoll_pwait, libc::SYS_poll, libc::SYS_ppoll]);
    // The console's: what the guest prints.
    calls.any(&[libc::SYS_writev]);
    // The file server's: it makes a session of the queues.
    calls.any(&[libc::SYS_epoll_create1, libc::SYS_eventfd2]);
    copies(calls);
}

/// Of descriptors.
fn copies(calls: &mut Calls) {
    calls.any(&[libc::SYS_dup]).when(libc::SYS_fcntl, &[(1, Is(libc::F_DUPFD_CLOEXEC as u64))]);
}

fn vsock(calls: &mut Calls) {
    device(calls);
    calls.ioctls(&[FIONBIO]);
    calls.any(&[
        libc::SYS_accept4,
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_sendto,
        libc::SYS_sendmsg,
        libc::SYS_shutdown,
        libc::SYS_timerfd_settime,
    ]);
}

fn block(calls: &mut Calls) {
    device(calls);
    calls.ioctls(&[BLKDISCARD]);
    calls.any(&[
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_preadv,
        libc::SYS_pwritev,
        libc::SYS_fdatasync,
        libc::SYS_fallocate,
    ]);
}

/// Reads packets, and says once, when its driver is ready, which of them it takes.
fn net(calls: &mut Calls) {
    device(calls);
    calls.ioctls(&[TUNSETOFFLOAD]).any(&[libc::SYS_readv]);
}

/// What a FUSE request can come to. Identities and capabilities change for the time of one.
fn files(calls: &mut Calls) {
    device(calls);
    calls.any(&[
        // Names.
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_linkat,
        libc::SYS_mkdirat,
        libc::SYS_mknodat,
        libc::SYS_readlinkat,
        libc::SYS_renameat2,
        libc::SYS_symlinkat,
        libc::SYS_unlinkat,
        libc::SYS_getdents64,
        libc::SYS_fchdir,
        // Attributes.
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_fstatfs,
        libc::SYS_fchmod,
        libc::SYS_fchmodat,
        libc::SYS_fchownat,
        libc::SYS_utimensat,
        libc::SYS_fgetxattr,
        libc::SYS_flistxattr,
        libc::SYS_fremovexattr,
        libc::SYS_fsetxattr,
        libc::SYS_getxattr,
        libc::SYS_listxattr,
        libc::SYS_removexattr,
        libc::SYS_setxattr,
        libc::SYS_name_to_handle_at,
        // Contents.
        libc::SYS_copy_file_range,
        libc::SYS_fallocate,
        libc::SYS_fdatasync,
        libc::SYS_flock,
        libc::SYS_fsync,
        libc::SYS_ftruncate,
        libc::SYS_lseek,
        libc::SYS_pread64,
        libc::SYS_preadv,
        libc::SYS_preadv2,
        libc::SYS_pwrite64,
        libc::SYS_pwritev,
        libc::SYS_pwritev2,
        libc::SYS_syncfs,
        // Identities.
        libc::SYS_capget,
        libc::SYS_capset,
        libc::SYS_getegid,
        libc::SYS_geteuid,
        libc::SYS_setgroups,
        libc::SYS_setresgid,
        libc::SYS_setresuid,
        libc::SYS_umask,
    ]);
    // How libcap-ng finds out which capabilities there are.
    calls.when(libc::SYS_prctl, &[(0, Is(libc::PR_CAPBSET_READ as u64))]);
    calls.when(libc::SYS_prctl, &[(0, Is(libc::PR_CAP_AMBIENT as u64))]);
}

/// What any thread to come needs, since a filter is inherited; starting it; the channel; and removing what was given for it.
fn main(calls: &mut Calls) {
    vcpu(calls);
    vsock(calls);
    block(calls);
    net(calls);
    calls.ioctls(&MACHINE).ioctls(&BLOCK_SIZES).ioctls(&[TUNGETIFF, TUNGETVNETHDRSZ]);
    calls.any(&[
        // A disk is looked at, and what is left over removed.
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_lseek,
        libc::SYS_openat,
        libc::SYS_getdents64,
        libc::SYS_unlinkat,
        // What a thread does first.
        libc::SYS_clone3,
        libc::SYS_rseq,
        libc::SYS_set_robust_list,
        libc::SYS_sched_getaffinity,
    ]);
    calls.when(libc::SYS_clone, &[(0, Is(THREAD))]);
    for option in [libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS] {
        calls.when(libc::SYS_prctl, &[(0, Is(option as u64))]);
    }
    calls.when(libc::SYS_seccomp, &[(0, Is(libc::SECCOMP_SET_MODE_FILTER as u64))]);
    calls.when(libc::SYS_fcntl, &[(1, Is(libc::F_GETFL as u64))]);
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 7] = [Kind::Main, Kind::Vcpu, Kind::Device, Kind::Vsock, Kind::Block, Kind::Net, Kind::Files];

    /// How a child process ends that is confined as `kind` and makes a call, or several.
    fn end_of(kind: Kind, call: impl Fn() -> bool) -> Result<i32, i32> {
        // What allocates comes before the fork.
        let program = program(&PROGRAMS[kind as usize], || calls(kind).compile()).unwrap();
        // SAFETY: the child makes system calls on memory it has, until it ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let confined = rustix::thread::set_no_new_privs(true).is_ok() && seccompiler::apply_filter(program).is_ok();
            let status = if confined && call() { 0 } else { 1 };
            // SAFETY: ends the child.
            unsafe { libc::_exit(status) };
        }
        let mut status = 0;
        // SAFETY: waits for the child just made.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        if libc::WIFSIGNALED(status) { Err(libc::WTERMSIG(status)) } else { Ok(libc::WEXITSTATUS(status)) }
    }

    fn make(call: i64, arguments: [u64; 4]) -> bool {
        let [a, b, c, d] = arguments;
        // SAFETY: the calls of these tests have invalid arguments, or change nothing of the test's.
        unsafe { libc::syscall(call, a, b, c, d, u64::MAX, 0u64) != -1 }
    }

    #[test]
    fn no_thread_executes_makes_sockets_mounts_traces_or_gets_another_namespace() {
        let calls = [
            (libc::SYS_execve, [0; 4]),
            (libc::SYS_execveat, [0; 4]),
            (libc::SYS_fork, [0; 4]),
            (libc::SYS_socket, [libc::AF_UNIX as u64, libc::SOCK_STREAM as u64, 0, 0]),
            (libc::SYS_socket, [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0, 0]),
            (libc::SYS_connect, [0; 4]),
            (libc::SYS_mount, [0; 4]),
            (libc::SYS_move_mount, [0; 4]),
            (libc::SYS_open_tree, [0; 4]),
            (libc::SYS_unshare, [libc::CLONE_NEWUSER as u64, 0, 0, 0]),
            (libc::SYS_setns, [0; 4]),
            (libc::SYS_ptrace, [0; 4]),
            (libc::SYS_process_vm_writev, [0; 4]),
            (libc::SYS_bpf, [0; 4]),
            (libc::SYS_io_uring_setup, [0; 4]),
            (libc::SYS_userfaultfd, [0; 4]),
            (libc::SYS_perf_event_open, [0; 4]),
            (libc::SYS_keyctl, [0; 4]),
            (libc::SYS_open_by_handle_at, [0; 4]),
            (libc::SYS_chroot, [0; 4]),
            (libc::SYS_kill, [0; 4]),
            (libc::SYS_memfd_create, [0; 4]),
        ];
        for kind in KINDS {
            for (call, arguments) in calls {
                assert_eq!(end_of(kind, || make(call, arguments)), Err(libc::SIGSYS), "{kind:?}: system call {call}");
            }
        }
    }

    #[test]
    fn memory_is_never_executable() {
        let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let map = |protection: i32| make(libc::SYS_mmap, [0, 4096, protection as u64, anonymous]);
        for kind in KINDS {
            assert_eq!(end_of(kind, || map(libc::PROT_READ | libc::PROT_WRITE)), Ok(0), "{kind:?}");
            assert_eq!(end_of(kind, || map(libc::PROT_READ | libc::PROT_EXEC)), Err(libc::SIGSYS), "{kind:?}");
            let protect = || make(libc::SYS_mprotect, [0, 4096, libc::PROT_EXEC as u64, 0]);
            assert_eq!(end_of(kind, protect), Err(libc::SIGSYS), "{kind:?}");
        }
    }

    #[test]
    fn a_thread_has_the_calls_of_its_kind_and_not_those_of_another() {
        const BAD: u64 = u32::MAX as u64;
        // The call fails, and the thread lives.
        let fails =
            |kind, call, arguments| assert_eq!(end_of(kind, || !make(call, arguments)), Ok(0), "{kind:?} {call}");
        let killed = |kind, call, arguments| {
            assert_eq!(end_of(kind, || make(call, arguments)), Err(libc::SIGSYS), "{kind:?} {call}")
        };
        let ioctl = |request| [BAD, request, 0, 0];
        fails(Kind::Vcpu, libc::SYS_ioctl, ioctl(KVM_RUN));
        fails(Kind::Main, libc::SYS_ioctl, ioctl(MACHINE[0]));
        killed(Kind::Vcpu, libc::SYS_ioctl, ioctl(MACHINE[0]));
        killed(Kind::Device, libc::SYS_ioctl, ioctl(KVM_RUN));
        fails(Kind::Block, libc::SYS_ioctl, ioctl(BLKDISCARD));
        fails(Kind::Net, libc::SYS_ioctl, ioctl(TUNSETOFFLOAD));
        fails(Kind::Net, libc::SYS_readv, [BAD, 0, 0, 0]);
        fails(Kind::Main, libc::SYS_ioctl, ioctl(TUNGETIFF));
        killed(Kind::Net, libc::SYS_ioctl, ioctl(TUNGETIFF));
        killed(Kind::Block, libc::SYS_ioctl, ioctl(TUNSETOFFLOAD));
        for kind in KINDS {
            // KVM_SET_USER_MEMORY_REGION, TUNSETIFF and TIOCSTI.
            killed(kind, libc::SYS_ioctl, ioctl(0x4020_ae46));
            killed(kind, libc::SYS_ioctl, ioctl(0x4004_54ca));
            killed(kind, libc::SYS_ioctl, ioctl(0x5412));
        }
        fails(Kind::Files, libc::SYS_openat, [BAD, 0, 0, 0]);
        fails(Kind::Main, libc::SYS_openat, [BAD, 0, 0, 0]);
        for kind in [Kind::Vcpu, Kind::Device, Kind::Vsock, Kind::Block, Kind::Net] {
            killed(kind, libc::SYS_openat, [BAD, 0, 0, 0]);
            killed(kind, libc::SYS_clone, [0; 4]);
            killed(kind, libc::SYS_capset, [0; 4]);
        }
        fails(Kind::Vsock, libc::SYS_accept4, [BAD, 0, 0, 0]);
        killed(Kind::Vcpu, libc::SYS_accept4, [BAD, 0, 0, 0]);
        killed(Kind::Files, libc::SYS_accept4, [BAD, 0, 0, 0]);
        killed(Kind::Main, libc::SYS_clone, [libc::CLONE_NEWUSER as u64, 0, 0, 0]);
        killed(Kind::Main, libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0]);
        killed(Kind::Main, libc::SYS_setresuid, [0; 4]);
        killed(Kind::Main, libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0, 0]);
        fails(Kind::Vcpu, libc::SYS_sendto, [CONTROL_FD as u64, 0, 0, 0]);
        killed(Kind::Vcpu, libc::SYS_sendto, [BAD, 0, 0, 0]);
    }

    /// A device that comes late has the filter of the main thread above its own.
    #[test]
    fn the_main_thread_has_the_calls_of_every_thread_it_starts() {
        let main = calls(Kind::Main).rules;
        for kind in [Kind::Vcpu, Kind::Device, Kind::Vsock, Kind::Block, Kind::Net] {
            for (call, lines) in calls(kind).rules {
                let ours = main.get(&call).unwrap_or_else(|| panic!("{kind:?}: system call {call}"));
                assert!(ours.is_empty() || !lines.is_empty() && lines.iter().all(|line| ours.contains(line)), "{call}");
            }
        }
    }

    /// A thread is started, named, confined and joined under the filter of the main thread.
    #[test]
    fn the_main_thread_starts_threads_of_every_kind_but_files() {
        let work = || {
            if install(Kind::Main).is_err() {
                return false;
            }
            [Kind::Vcpu, Kind::Device, Kind::Vsock, Kind::Block, Kind::Net].into_iter().all(|kind| {
                let thread = std::thread::Builder::new().name("late".into()).spawn(move || kind.confine().is_ok());
                thread.is_ok_and(|thread| thread.join().unwrap_or(false))
            })
        };
        // SAFETY: this one allocates after the fork, which the C library provides for in a process of several threads.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let good = rustix::thread::set_no_new_privs(true).is_ok() && work();
            // SAFETY: ends the child.
            unsafe { libc::_exit(if good { 0 } else { 1 }) };
        }
        let mut status = 0;
        // SAFETY: waits for the child just made.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(status, 0);
    }

    #[test]
    fn requests_are_numbered_as_the_kernel_s_header_does() {
        assert_eq!((KVM_RUN, KVM_IOEVENTFD, KVM_SIGNAL_MSI), (0xae80, 0x4040_ae79, 0x4020_aea5));
        assert_eq!((KVM_SET_LAPIC, KVM_SET_CPUID2, VCPU_STATE[0]), (0x4400_ae8f, 0x4008_ae90, 0x8090_ae81));
        assert_eq!(MACHINE, [0xae41, 0x4030_ae7b, 0x8030_ae7c]);
    }
}
