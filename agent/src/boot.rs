//! PID 1: from the kernel's hand-over to "agent ready".
//!
//! Everything here is boot time of every pod, so it holds what containers need and nothing else.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};

use crate::{cgroup, container::namespaces, log, serve, vsock};

/// A guest that cannot come up. The machine is reset with this as its last words.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("mount {kind} on {target}: {source}")]
    Mount { kind: &'static str, target: &'static str, source: Errno },
    #[error("open /dev/null as standard streams: {0}")]
    StandardStreams(Errno),
    #[error("write {value} to {path}: {source}")]
    Sysctl { path: &'static str, value: &'static str, source: io::Error },
    #[error("raise limit {name}: {source}")]
    Limit { name: &'static str, source: Errno },
    #[error("bring up the loopback interface: {0}")]
    Loopback(io::Error),
    #[error(transparent)]
    Cgroup(#[from] cgroup::CgroupError),
    #[error("listen on vsock port {port}: {source}")]
    Listen { port: u32, source: io::Error },
    #[error(transparent)]
    Serve(#[from] serve::ServeError),
}

const HARDENED: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Kind, mount point, flags, data; in order, because later ones lie in earlier ones.
const MOUNTS: [(&str, &str, MountFlags, Option<&std::ffi::CStr>); 7] = [
    ("devtmpfs", "/dev", MountFlags::NOSUID.union(MountFlags::NOEXEC), Some(c"mode=0755")),
    ("proc", "/proc", HARDENED, None),
    ("sysfs", "/sys", HARDENED, None),
    ("cgroup2", "/sys/fs/cgroup", HARDENED, None),
    (
        "devpts",
        "/dev/pts",
        MountFlags::NOSUID.union(MountFlags::NOEXEC),
        Some(c"newinstance,gid=5,mode=0620,ptmxmode=0666"),
    ),
    ("tmpfs", "/run", MountFlags::NOSUID.union(MountFlags::NODEV), Some(c"mode=0755")),
    ("tmpfs", "/tmp", MountFlags::NOSUID.union(MountFlags::NODEV), Some(c"mode=1777")),
];

/// The kernel scales these by the memory it booted with, which is a fraction of what the pod will have.
const SYSCTLS: [(&str, &str); 4] = [
    ("/proc/sys/fs/nr_open", "1073741816"),
    ("/proc/sys/fs/file-max", "9223372036854775807"),
    ("/proc/sys/kernel/threads-max", "4194304"),
    ("/proc/sys/kernel/pid_max", "4194304"),
];

/// When the agent was started, and when it listened, on the monotonic clock.
static STARTED: AtomicU64 = AtomicU64::new(0);
static READY: AtomicU64 = AtomicU64::new(0);

/// The monotonic clock in nanoseconds. It began with the kernel.
pub fn monotonic_ns() -> u64 {
    nanoseconds(ClockId::Monotonic)
}

/// The wall clock, which a container may have set to what it likes.
pub fn realtime_ns() -> u64 {
    nanoseconds(ClockId::Realtime)
}

fn nanoseconds(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    u64::try_from(now.tv_sec).unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(now.tv_nsec.cast_unsigned())
}

/// When the agent was started, and when it listened; 0 on an ordinary machine.
pub fn times() -> [u64; 2] {
    [&STARTED, &READY].map(|time| time.load(Ordering::Relaxed))
}

/// Sets the guest up and serves the pod until the machine ends.
pub fn run() -> ! {
    STARTED.store(monotonic_ns(), Ordering::Relaxed);
    std::panic::set_hook(Box::new(|panic| {
        say(&format!("podhull-agent: {panic}\n"));
        reset();
    }));
    if let Err(error) = boot() {
        say(&format!("podhull-agent: {error}\n"));
    }
    reset()
}

fn boot() -> Result<(), BootError> {
    for (kind, target, flags, data) in MOUNTS {
        mount_one(kind, target, flags, data)?;
    }
    standard_streams()?;
    log::begin();
    for (path, value) in SYSCTLS {
        std::fs::write(path, value).map_err(|source| BootError::Sysctl { path, value, source })?;
    }
    raise_limits()?;
    namespaces::loopback_up().map_err(BootError::Loopback)?;
    let cgroups = cgroup::Hierarchy::new("/sys/fs/cgroup", "pod")?;
    let agent = listen(podhull_protocol::AGENT_PORT)?;
    let stdio = listen(podhull_protocol::STDIO_PORT)?;
    READY.store(monotonic_ns(), Ordering::Relaxed);
    Err(serve::serve(serve::Listeners::Vsock { agent, stdio }, cgroups).into())
}

fn listen(port: u32) -> Result<std::os::fd::OwnedFd, BootError> {
    vsock::listen(port).map_err(|source| BootError::Listen { port, source })
}

fn mount_one(
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: Option<&std::ffi::CStr>,
) -> Result<(), BootError> {
    if target == "/dev/pts" {
        // devtmpfs is ours to write to, unlike the guest's root.
        match rustix::fs::mkdir(target, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(source) => return Err(BootError::Mount { kind, target, source }),
        }
    }
    match mount(kind, target, kind, flags, data) {
        // The kernel has mounted devtmpfs already.
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(source) => Err(BootError::Mount { kind, target, source }),
    }
}

/// Without a console the kernel starts PID 1 without standard streams; their numbers must not be taken by anything else.
fn standard_streams() -> Result<(), BootError> {
    loop {
        let fd =
            rustix::fs::openat(CWD, "/dev/null", OFlags::RDWR, Mode::empty()).map_err(BootError::StandardStreams)?;
        let number = std::os::fd::IntoRawFd::into_raw_fd(fd);
        if number > 2 {
            // SAFETY: the number was just given away by into_raw_fd, and nothing else uses it.
            drop(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(number) });
            return Ok(());
        }
    }
}

/// What the agent has is what a container inherits where its specification is silent (see `container::limits` for open
/// files). Counts of processes are the business of cgroups, and the kernel's default follows the memory it booted with.
fn raise_limits() -> Result<(), BootError> {
    let unlimited = Rlimit { current: None, maximum: None };
    let files = Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) };
    for (name, resource, limit) in [
        ("RLIMIT_NPROC", Resource::Nproc, unlimited),
        ("RLIMIT_SIGPENDING", Resource::Sigpending, unlimited),
        ("RLIMIT_NOFILE", Resource::Nofile, files),
    ] {
        setrlimit(resource, limit).map_err(|source| BootError::Limit { name, source })?;
    }
    Ok(())
}

/// To the kernel's log, which the host sees on the console if it asked for one.
fn say(message: &str) {
    // A message that cannot be said must not keep the machine from its reset.
    let _ = std::fs::write("/dev/kmsg", message);
}

/// A reset is the one way out that needs no ACPI; the machine monitor takes it as the end.
fn reset() -> ! {
    // SAFETY: reboot with a command that takes no argument.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
    // Only without CAP_SYS_BOOT; PID 1 that ends makes the kernel panic, and panic=-1 resets.
    std::process::abort()
}
