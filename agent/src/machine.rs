//! The virtual machine itself: clock, entropy, devices, CPUs, memory.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use rustix::time::{ClockId, Timespec};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::readiness;

/// Bytes of entropy that a pod starts with.
pub const ENTROPY_BYTES: usize = 64;

/// How long a disk may take to appear, which the host has added before it says so.
const DISK_DEADLINE: Duration = Duration::from_secs(30);

/// How far ahead files of the share are read, in KiB; the kernel's own 128 are for disks.
const READ_AHEAD_KIB: &str = "512";

/// What could not be done to the machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("set the clock: {0}")]
    Clock(Errno),
    #[error("correct the clock by {0} ns: {1}")]
    AdjustClock(i64, #[source] io::Error),
    #[error("entropy: expected {ENTROPY_BYTES} bytes, not {0}")]
    EntropyLength(usize),
    #[error("open /dev/random: {0}")]
    Random(Errno),
    #[error("add entropy: {0}")]
    AddEntropy(io::Error),
    #[error("reseed the random number generator: {0}")]
    Reseed(io::Error),
    #[error("set the host name: {0}")]
    Hostname(Errno),
    #[error("write {path}: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("read {path}: {source}")]
    Read { path: &'static str, source: io::Error },
    #[error("{path} has no {what}")]
    Format { path: &'static str, what: &'static str },
    #[error("mount the share {tag:?} on {target}: {source}")]
    Share { tag: String, target: &'static str, source: Errno },
    #[error("listen for kernel events: {0}")]
    Uevents(io::Error),
    #[error("the machine has no disk {0:?} after {seconds} s", seconds = DISK_DEADLINE.as_secs())]
    DiskMissing(String),
}

/// Proof that the agent is PID 1 of a virtual machine, whose clock, devices and memory are its to set.
#[derive(Clone, Copy)]
pub struct Machine;

impl Machine {
    /// Sets the wall clock, in nanoseconds since the epoch.
    pub fn set_clock(self, realtime_ns: u64) -> Result<(), MachineError> {
        let time =
            Timespec { tv_sec: (realtime_ns / 1_000_000_000) as i64, tv_nsec: (realtime_ns % 1_000_000_000) as i64 };
        rustix::time::clock_settime(ClockId::Realtime, time).map_err(MachineError::Clock)
    }

    /// Corrects the wall clock, which is so many nanoseconds behind: at once, or little by little (adjtime(3)), in place of what is left
    /// of an earlier correction.
    pub fn adjust_clock(self, behind_ns: i64, step: bool) -> Result<(), MachineError> {
        let mut correction = correction(behind_ns, step);
        // SAFETY: the kernel reads and writes one such structure.
        if unsafe { libc::adjtimex(&raw mut correction) } < 0 {
            return Err(MachineError::AdjustClock(behind_ns, io::Error::last_os_error()));
        }
        Ok(())
    }

    /// Credits the host's entropy and makes the kernel use it from now on: clones of one template must not share a state.
    pub fn add_entropy(self, entropy: &[u8]) -> Result<(), MachineError> {
        /// `RNDADDENTROPY` and `struct rand_pool_info` of `linux/random.h`.
        const ADD_ENTROPY: libc::Ioctl = 0x4008_5203_u32 as libc::Ioctl;
        const RESEED_CRNG: libc::Ioctl = 0x5207;
        #[repr(C)]
        struct PoolInfo {
            entropy_bits: libc::c_int,
            bytes: libc::c_int,
            pool: [u8; ENTROPY_BYTES],
        }
        let pool = entropy.try_into().map_err(|_| MachineError::EntropyLength(entropy.len()))?;
        let info = PoolInfo { entropy_bits: (ENTROPY_BYTES * 8) as i32, bytes: ENTROPY_BYTES as i32, pool };
        let random = rustix::fs::openat(CWD, "/dev/random", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(MachineError::Random)?;
        // SAFETY: the kernel reads `bytes` bytes of the pool behind the two numbers, which is what the structure holds.
        if unsafe { libc::ioctl(random.as_raw_fd(), ADD_ENTROPY, &raw const info) } < 0 {
            return Err(MachineError::AddEntropy(io::Error::last_os_error()));
        }
        // SAFETY: the call has no argument.
        if unsafe { libc::ioctl(random.as_raw_fd(), RESEED_CRNG) } < 0 {
            return Err(MachineError::Reseed(io::Error::last_os_error()));
        }
        Ok(())
    }

    /// Sets the name of the guest's own UTS namespace.
    pub fn set_hostname(self, name: &str) -> Result<(), MachineError> {
        rustix::system::sethostname(name.as_bytes()).map_err(MachineError::Hostname)
    }

    /// Finds the devices the host has added. Their drivers are built in and probe within the write, so that on return they are
    /// there; memory alone arrives later, because its driver asks the host for one block after the other.
    pub fn rescan(self) -> Result<(), MachineError> {
        // New memory is to be used, whatever the kernel was built for; a kernel without hotplug has no such file.
        match write("/sys/devices/system/memory/auto_online_blocks", "online") {
            Err(MachineError::Write { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
        write("/sys/bus/pci/rescan", "1")
    }

    /// Mounts the share of the pod.
    pub fn mount_share(self, tag: &str) -> Result<(), MachineError> {
        let target = podhull_protocol::SHARE_DIR;
        let failed = |source| MachineError::Share { tag: tag.into(), target, source };
        mount(tag, target, "virtiofs", MountFlags::empty(), None).map_err(failed)?;
        // Each request is a way to the host and back, whatever it carries: a library is read in a few, not in dozens.
        let device = rustix::fs::stat(target).map_err(failed)?.st_dev;
        let bdi = format!("/sys/class/bdi/{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
        // By default it may have a hundredth of what may be written late, as a file system of nobody knows whom: in a small
        // machine each writer would sleep most of the time.
        write(format!("{bdi}/strict_limit"), "0")?;
        write(format!("{bdi}/max_ratio"), "100")?;
        write(format!("{bdi}/read_ahead_kb"), READ_AHEAD_KIB)
    }

    /// Brings the first `count` CPUs online, as far as there are as many, and takes all others offline; 0 leaves them as they
    /// are. Says how many are online then. Takes milliseconds a CPU; not for the agent's thread.
    pub fn online_cpus(self, count: u32) -> Result<u32, MachineError> {
        // The first one is always online, and has no such file.
        for cpu in 1..if count == 0 { 0 } else { u32::MAX } {
            let path = format!("/sys/devices/system/cpu/cpu{cpu}/online");
            let wanted = if cpu < count { "1" } else { "0" };
            match std::fs::read(&path) {
                Ok(state) if state.starts_with(wanted.as_bytes()) => {}
                Ok(_) => write(path, wanted)?,
                // CPUs are created in order.
                Err(_) => break,
            }
        }
        let online = read("/sys/devices/system/cpu/online")?;
        cpu_count(&online).ok_or(MachineError::Format { path: "/sys/devices/system/cpu/online", what: "list of CPUs" })
    }

    /// Waits until the machine has the disk with a serial number; returns its number and name.
    pub async fn wait_for_disk(self, serial: &str) -> Result<DiskNumber, MachineError> {
        let events = KernelEvents::listen()?;
        let deadline = tokio::time::Instant::now() + DISK_DEADLINE;
        let mut scanned = false;
        loop {
            if let Some(found) = find_disk(serial).map_err(|source| MachineError::Read { path: BLOCK, source })? {
                return Ok(found);
            }
            if !std::mem::replace(&mut scanned, true) {
                self.rescan()?;
            } else if !events.changed(deadline).await? {
                return Err(MachineError::DiskMissing(serial.into()));
            }
        }
    }
}

/// What adjtimex(2) is told. In microseconds either way: who asks for nanoseconds once gets them from then on, and programs in
/// containers may not expect them.
fn correction(behind_ns: i64, step: bool) -> libc::timex {
    let behind = behind_ns / 1000;
    // SAFETY: it is all numbers.
    let mut correction: libc::timex = unsafe { std::mem::zeroed() };
    if step {
        correction.modes = libc::ADJ_SETOFFSET;
        // The second of the two is never negative.
        correction.time = libc::timeval { tv_sec: behind.div_euclid(1_000_000), tv_usec: behind.rem_euclid(1_000_000) };
    } else {
        correction.modes = libc::ADJ_OFFSET_SINGLESHOT;
        correction.offset = behind;
    }
    correction
}

fn write(path: impl Into<PathBuf>, value: &str) -> Result<(), MachineError> {
    let path = path.into();
    std::fs::write(&path, value).map_err(|source| MachineError::Write { path, source })
}

fn read(path: &'static str) -> Result<String, MachineError> {
    std::fs::read_to_string(path).map_err(|source| MachineError::Read { path, source })
}

/// Messages of the kernel about its objects (group 1 of `NETLINK_KOBJECT_UEVENT`).
struct KernelEvents(AsyncFd<OwnedFd>);

impl KernelEvents {
    fn listen() -> Result<Self, MachineError> {
        let listen = || -> io::Result<_> {
            let socket = rustix::net::socket_with(
                AddressFamily::NETLINK,
                SocketType::DGRAM,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                Some(netlink::KOBJECT_UEVENT),
            )?;
            rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 1))?;
            readiness::watch(socket, Interest::READABLE)
        };
        listen().map(Self).map_err(MachineError::Uevents)
    }

    /// Waits for a message, and takes all that there are; false if none came. What they say does not matter, only that
    /// something changed; lost ones (ENOBUFS) neither.
    async fn changed(&self, deadline: tokio::time::Instant) -> Result<bool, MachineError> {
        let Ok(ready) = tokio::time::timeout_at(deadline, self.0.readable()).await else { return Ok(false) };
        let mut ready = ready.map_err(MachineError::Uevents)?;
        let mut message = [0; 4096];
        loop {
            match rustix::net::recv(&self.0, &mut message[..], RecvFlags::DONTWAIT) {
                Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(MachineError::Uevents(errno.into())),
            }
        }
        ready.clear_ready();
        Ok(true)
    }
}

/// Where the kernel shows its disks.
const BLOCK: &str = "/sys/block";

/// Which device a disk is, for the guest's kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskNumber {
    pub major: u32,
    pub minor: u32,
}

fn find_disk(serial: &str) -> io::Result<Option<DiskNumber>> {
    for disk in std::fs::read_dir(BLOCK)? {
        let path = disk?.path();
        // Others have none.
        if std::fs::read_to_string(path.join("serial")).is_ok_and(|own| own.trim_end() == serial) {
            let number = std::fs::read_to_string(path.join("dev"))?;
            let parsed = number
                .trim_end()
                .split_once(':')
                .and_then(|(major, minor)| Some(DiskNumber { major: major.parse().ok()?, minor: minor.parse().ok()? }));
            return parsed.map(Some).ok_or_else(|| io::Error::other(format!("{number:?} is no number of a device")));
        }
    }
    Ok(None)
}

/// Length of a kernel's list of CPUs, as `0-3,6`.
fn cpu_count(list: &str) -> Option<u32> {
    list.trim().split(',').try_fold(0u32, |count, part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        count.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_back_are_seconds_back_and_a_part_of_one_forth() {
        for (behind_ns, seconds, microseconds) in [
            (5_400_000_001_999, 5400, 1),
            (-5_400_000_000_000, -5400, 0),
            (-1_000_000, -1, 999_000),
            (-1_500_000_000, -2, 500_000),
            (i64::MAX, 9_223_372_036, 854_775),
            (i64::MIN, -9_223_372_037, 145_225),
        ] {
            let correction = correction(behind_ns, true);
            assert_eq!(correction.modes, libc::ADJ_SETOFFSET);
            assert_eq!((correction.time.tv_sec, correction.time.tv_usec), (seconds, microseconds), "{behind_ns}");
        }
    }

    #[test]
    fn what_is_not_a_step_is_an_offset_alone() {
        for (behind_ns, microseconds) in [(30_000_000, 30_000), (-499_999_999, -499_999)] {
            let correction = correction(behind_ns, false);
            assert_eq!((correction.modes, correction.offset), (libc::ADJ_OFFSET_SINGLESHOT, microseconds));
            assert_eq!((correction.time.tv_sec, correction.time.tv_usec), (0, 0));
        }
    }

    #[test]
    fn cpu_lists_are_counted() {
        assert_eq!(cpu_count("0\n"), Some(1));
        assert_eq!(cpu_count("0-3,6\n"), Some(5));
        assert_eq!(cpu_count("3-0"), None);
        assert_eq!(cpu_count(""), None);
    }
}
