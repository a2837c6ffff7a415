//! How long calls took: of a pod's agent, whoever made them, and of its shim. A page of counters for each in the pod's directory that
//! all processes share. They are the pod's, and go with it.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// Length of a page's file.
const PAGE: usize = 4096;

/// What is called.
pub struct Callee {
    /// Name of the file in the pod's directory.
    file: &'static str,
    /// The calls that are counted; the place of each is that of its counters.
    methods: &'static [&'static str],
}

/// The agent of a pod.
pub const AGENT: &Callee = &Callee { file: "calls", methods: &AGENT_METHODS };

/// Its shim.
pub const SHIM: &Callee = &Callee { file: "requests", methods: &SHIM_METHODS };

const AGENT_METHODS: [&str; 20] = [
    "CreatePod",
    "CreateContainer",
    "StartContainer",
    "SignalContainer",
    "ExecProcess",
    "SignalProcess",
    "DeleteProcess",
    "PauseContainer",
    "ResumeContainer",
    "UpdateContainer",
    "UpdateVolume",
    "ContainerStats",
    "PodStats",
    "ReadLog",
    "ResizeTerminal",
    "DeleteContainer",
    "Grow",
    "ConfigureNetwork",
    "Events",
    "AdjustClock",
];

/// Of the Task and the Sandbox service, but for those that wait for the end of what runs: `Wait` and `WaitSandbox`.
const SHIM_METHODS: [&str; 25] = [
    "State",
    "Create",
    "Start",
    "Delete",
    "Pids",
    "Pause",
    "Resume",
    "Checkpoint",
    "Kill",
    "Exec",
    "ResizePty",
    "CloseIO",
    "Update",
    "Stats",
    "Connect",
    "Shutdown",
    "CreateSandbox",
    "StartSandbox",
    "Platform",
    "StopSandbox",
    "SandboxStatus",
    "PingSandbox",
    "ShutdownSandbox",
    "SandboxMetrics",
    "UpdateSandbox",
];

/// Upper bounds of the buckets, in seconds; one more has no bound.
pub const BOUNDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// Counters of a method: one for each bucket, and the sum in nanoseconds.
const COUNTERS: usize = BOUNDS.len() + 2;

const _: () = assert!(AGENT_METHODS.len() * COUNTERS * size_of::<u64>() <= PAGE);
const _: () = assert!(SHIM_METHODS.len() * COUNTERS * size_of::<u64>() <= PAGE);

/// The counters of what is called.
pub struct Calls {
    callee: &'static Callee,
    counters: Counters,
}

/// Where they are.
enum Counters {
    /// In this process, until there is a pod.
    Here(Box<[AtomicU64]>),
    /// In the pod's directory.
    Shared(Page),
}

/// How long calls of one method took.
#[derive(Debug, Clone, PartialEq)]
pub struct Durations {
    /// Which.
    pub method: &'static str,
    /// How many were in each bucket, and in none below it.
    pub buckets: [u64; BOUNDS.len() + 1],
    /// All together, in seconds.
    pub seconds: f64,
}

impl Calls {
    /// Those of the pod with this directory; made if nobody has called anything yet.
    pub fn open(pod: BorrowedFd<'_>, callee: &'static Callee) -> Result<Self, Errno> {
        Ok(Self { callee, counters: Counters::Shared(Page::open(pod, callee.file, OFlags::CREATE)?) })
    }

    /// Those of the pod with this directory, if it has any.
    pub fn find(pod: BorrowedFd<'_>, callee: &'static Callee) -> Result<Self, Errno> {
        Ok(Self { callee, counters: Counters::Shared(Page::open(pod, callee.file, OFlags::empty())?) })
    }

    /// Those of a pod that is yet to be made.
    pub fn without_pod(callee: &'static Callee) -> Self {
        let counters = (0..callee.methods.len() * COUNTERS).map(|_| AtomicU64::new(0)).collect();
        Self { callee, counters: Counters::Here(counters) }
    }

    /// From here on they are those of the pod with this directory, and what was counted before there was a pod is.
    pub fn give_to(&mut self, pod: BorrowedFd<'_>) -> Result<(), Errno> {
        let shared = Self::open(pod, self.callee)?;
        if let Counters::Here(counters) = &self.counters {
            for (counter, before) in shared.counters().iter().zip(counters) {
                counter.fetch_add(before.load(Ordering::Relaxed), Ordering::Relaxed);
            }
        }
        *self = shared;
        Ok(())
    }

    /// Counts one.
    pub fn count(&self, method: &str, took: Duration) {
        let Some(index) = self.callee.methods.iter().position(|known| *known == method) else { return };
        let bucket = BOUNDS.iter().position(|bound| took.as_secs_f64() <= *bound).unwrap_or(BOUNDS.len());
        let counters = &self.counters()[index * COUNTERS..][..COUNTERS];
        counters[bucket].fetch_add(1, Ordering::Relaxed);
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        counters[COUNTERS - 1].fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// The methods that were called.
    pub fn so_far(&self) -> Vec<Durations> {
        let methods = self.callee.methods.iter().zip(self.counters().chunks_exact(COUNTERS));
        let methods = methods.map(|(method, counters)| Durations {
            method,
            buckets: std::array::from_fn(|bucket| counters[bucket].load(Ordering::Relaxed)),
            seconds: counters[COUNTERS - 1].load(Ordering::Relaxed) as f64 / 1e9,
        });
        methods.filter(|durations| durations.buckets.iter().any(|count| *count > 0)).collect()
    }

    fn counters(&self) -> &[AtomicU64] {
        match &self.counters {
            Counters::Here(counters) => counters,
            Counters::Shared(page) => &page.counters()[..self.callee.methods.len() * COUNTERS],
        }
    }
}

/// A file of [`PAGE`] bytes, mapped.
struct Page(NonNull<AtomicU64>);

// SAFETY: the page is shared memory that is only ever accessed by atomic operations.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    fn open(directory: BorrowedFd<'_>, name: &str, make: OFlags) -> Result<Self, Errno> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | make;
        let file = rustix::fs::openat(directory, name, flags, Mode::from_raw_mode(0o600))?;
        // With its memory: a file system that has none left says so here, and does not kill by SIGBUS who counts.
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, PAGE as u64)?;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let page = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)
        }?;
        NonNull::new(page.cast()).map(Self).ok_or(Errno::NOMEM)
    }

    fn counters(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is a page of a file of that length, which nobody but root can cut, and lives as long as this.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), PAGE / size_of::<AtomicU64>()) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and nothing borrows it any more.
        let _ = unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), PAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    };

    #[test]
    fn what_one_counts_another_sees() {
        let directory = tempfile::tempdir().unwrap();
        let pod = std::fs::File::open(directory.path()).unwrap();
        assert!(Calls::find(pod.as_fd(), AGENT).is_err());
        let (one, other) = (Calls::open(pod.as_fd(), AGENT).unwrap(), Calls::find(pod.as_fd(), AGENT).unwrap());
        assert!(other.so_far().is_empty());
        one.count("Grow", Duration::from_millis(2));
        one.count("Grow", Duration::from_secs(11));
        one.count("no such", Duration::from_secs(1));
        drop(one);
        let [durations] = &other.so_far()[..] else { panic!("{:?}", other.so_far()) };
        assert_eq!((durations.method, durations.seconds), ("Grow", 11.002));
        assert_eq!((durations.buckets[1], durations.buckets[12], durations.buckets.iter().sum::<u64>()), (1, 1, 2));
    }

    #[test]
    fn a_full_file_system_is_told_of_before_anything_is_counted() {
        let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        fsconfig_set_string(context.as_fd(), "size", "8k").unwrap();
        fsconfig_create(context.as_fd()).unwrap();
        let pod = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap();
        let calls = Calls::open(pod.as_fd(), AGENT).unwrap();
        let fill = rustix::fs::openat(&pod, "fill", OFlags::CREATE | OFlags::RDWR, Mode::RUSR).unwrap();
        assert_eq!(rustix::io::write(&fill, &[1; 2 * PAGE]), Ok(PAGE));
        assert_eq!(Calls::open(pod.as_fd(), SHIM).err(), Some(Errno::NOSPC));
        // What was there before still counts.
        calls.count("Grow", Duration::from_millis(2));
        assert_eq!(Calls::find(pod.as_fd(), AGENT).unwrap().so_far().len(), 1);
    }

    #[test]
    fn what_is_counted_before_there_is_a_pod_becomes_the_pods() {
        let directories = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [pod, next] = directories.each_ref().map(|directory| std::fs::File::open(directory.path()).unwrap());
        let counts = |pod: &std::fs::File, callee| {
            let all = Calls::find(pod.as_fd(), callee).map(|calls| calls.so_far()).unwrap_or_default();
            all.iter().map(|of| (of.method, of.buckets.iter().sum::<u64>())).collect::<Vec<_>>()
        };
        let mut calls = Calls::without_pod(SHIM);
        calls.count("Create", Duration::from_secs(1));
        calls.give_to(pod.as_fd()).unwrap();
        calls.count("Create", Duration::from_secs(2));
        calls.count("UpdateSandbox", Duration::from_secs(2));
        calls.count("Wait", Duration::from_secs(2));
        assert_eq!(counts(&pod, SHIM), [("Create", 2), ("UpdateSandbox", 1)]);
        assert_eq!(counts(&pod, AGENT), []);
        // Another pod begins with nothing.
        calls.give_to(next.as_fd()).unwrap();
        assert_eq!(counts(&next, SHIM), []);
    }
}
