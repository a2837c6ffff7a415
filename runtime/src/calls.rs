//! How long calls of a pod's agent took, whoever made them: a page of counters in the pod's directory that all processes share.
//! It is the pod's, and goes with it.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// Name of the file in the pod's directory.
const FILE: &str = "calls";

/// Its length.
const PAGE: usize = 4096;

/// The calls that are counted; the place of each is that of its counters.
const METHODS: [&str; 20] = [
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

/// Upper bounds of the buckets, in seconds; one more has no bound.
pub const BOUNDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// Counters of a method: one for each bucket, and the sum in nanoseconds.
const COUNTERS: usize = BOUNDS.len() + 2;

const _: () = assert!(METHODS.len() * COUNTERS * size_of::<u64>() <= PAGE);

/// The counters of a pod.
pub struct Calls {
    page: NonNull<AtomicU64>,
}

// SAFETY: the page is shared memory that is only ever accessed by atomic operations.
unsafe impl Send for Calls {}
// SAFETY: as above.
unsafe impl Sync for Calls {}

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
    pub fn open(pod: BorrowedFd<'_>) -> Result<Self, Errno> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(pod, FILE, flags, Mode::from_raw_mode(0o600))?;
        rustix::fs::ftruncate(&file, PAGE as u64)?;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let page = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)
        }?;
        NonNull::new(page.cast()).map(|page| Self { page }).ok_or(Errno::NOMEM)
    }

    /// Counts one.
    pub fn count(&self, method: &str, took: Duration) {
        let Some(index) = METHODS.iter().position(|known| *known == method) else { return };
        let bucket = BOUNDS.iter().position(|bound| took.as_secs_f64() <= *bound).unwrap_or(BOUNDS.len());
        let counters = &self.counters()[index * COUNTERS..][..COUNTERS];
        counters[bucket].fetch_add(1, Ordering::Relaxed);
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        counters[COUNTERS - 1].fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// The methods that were called.
    pub fn so_far(&self) -> Vec<Durations> {
        let methods = METHODS.iter().zip(self.counters().chunks_exact(COUNTERS)).map(|(method, counters)| Durations {
            method,
            buckets: std::array::from_fn(|bucket| counters[bucket].load(Ordering::Relaxed)),
            seconds: counters[COUNTERS - 1].load(Ordering::Relaxed) as f64 / 1e9,
        });
        methods.filter(|durations| durations.buckets.iter().any(|count| *count > 0)).collect()
    }

    fn counters(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is a page of a file of that length, which nobody but root can cut, and lives as long as this.
        unsafe { std::slice::from_raw_parts(self.page.as_ptr(), METHODS.len() * COUNTERS) }
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and nothing borrows it any more.
        let _ = unsafe { rustix::mm::munmap(self.page.as_ptr().cast(), PAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn what_one_counts_another_sees() {
        let directory = tempfile::tempdir().unwrap();
        let pod = std::fs::File::open(directory.path()).unwrap();
        let (one, other) = (Calls::open(pod.as_fd()).unwrap(), Calls::open(pod.as_fd()).unwrap());
        assert!(other.so_far().is_empty());
        one.count("Grow", Duration::from_millis(2));
        one.count("Grow", Duration::from_secs(11));
        one.count("no such", Duration::from_secs(1));
        drop(one);
        let [durations] = &other.so_far()[..] else { panic!("{:?}", other.so_far()) };
        assert_eq!((durations.method, durations.seconds), ("Grow", 11.002));
        assert_eq!((durations.buckets[1], durations.buckets[12], durations.buckets.iter().sum::<u64>()), (1, 1, 2));
    }
}
