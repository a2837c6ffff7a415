//! Which files' contents the guest may keep cached from one open to the next.
//!
//! Unless told otherwise a FUSE client drops what it has cached of a file when the file is opened, under the feet of those
//! that have it open or mapped: each start of a program would read its libraries again. It may keep it if the file has not
//! been changed since it was opened last. Time stamps tell that, but for changes so soon after one another that they get
//! the same; so only a file that had been left alone for a while by then is trusted.
//!
//! A host process that writes to a shared mapping changes the stamps only now and then; the guest may see such writes as
//! late.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use virtiofsd::fuse::Attr;

/// Seconds without a change after which a later change is sure to get other stamps: that of the coarsest file system (2),
/// and as much for a server whose clock is not ours.
const SETTLED: u64 = 4;

/// What changes when a file does.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamps {
    size: u64,
    mtime: (u64, u32),
    ctime: (u64, u32),
}

/// The files opened, as they were then. One entry for each node that the guest knows at most.
#[derive(Default)]
pub struct Kept {
    /// The stamps, and whether they had settled.
    opened: Mutex<HashMap<u64, (Stamps, bool)>>,
}

impl Kept {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, (Stamps, bool)>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A file with these attributes is opened: whether the guest may keep what it has of it.
    pub fn open(&self, inode: u64, attr: &Attr) -> bool {
        // A clock before 1970 trusts nothing.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        self.open_at(inode, attr, now)
    }

    fn open_at(&self, inode: u64, attr: &Attr, now: u64) -> bool {
        let (mtime, ctime) = ((attr.mtime, attr.mtimensec), (attr.ctime, attr.ctimensec));
        let stamps = Stamps { size: attr.size, mtime, ctime };
        // A change always sets ctime to the time; mtime may have been set to any.
        let settled = attr.ctime.checked_add(SETTLED).is_some_and(|time| time < now);
        self.lock().insert(inode, (stamps, settled)) == Some((stamps, true))
    }

    /// The guest has dropped the node, and with it what it had cached.
    pub fn forget(&self, inode: u64) {
        self.lock().remove(&inode);
    }

    /// The guest has dropped all nodes.
    pub fn clear(&self) {
        self.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed_at(ctime: u64) -> Attr {
        Attr { size: 10, mtime: 5, ctime, ..Attr::default() }
    }

    #[test]
    fn contents_are_kept_from_the_second_open_of_a_file_left_alone() {
        let kept = Kept::default();
        assert!(!kept.open_at(2, &changed_at(100), 200));
        assert!(kept.open_at(2, &changed_at(100), 201));
        assert!(!kept.open_at(3, &changed_at(100), 201));
        kept.forget(2);
        assert!(!kept.open_at(2, &changed_at(100), 202));
        kept.clear();
        assert!(!kept.open_at(3, &changed_at(100), 202));
    }

    #[test]
    fn a_change_of_any_stamp_drops_them() {
        for attr in [
            changed_at(150),
            Attr { ctimensec: 1, ..changed_at(100) },
            Attr { mtimensec: 1, ..changed_at(100) },
            Attr { size: 11, ..changed_at(100) },
        ] {
            let kept = Kept::default();
            kept.open_at(2, &changed_at(100), 200);
            assert!(!kept.open_at(2, &attr, 200));
        }
    }

    #[test]
    fn a_file_changed_a_moment_before_it_was_opened_is_not_trusted_at_the_next_open() {
        let kept = Kept::default();
        assert!(!kept.open_at(2, &changed_at(100), 100));
        assert!(!kept.open_at(2, &changed_at(100), 104));
        assert!(!kept.open_at(2, &changed_at(100), 105));
        assert!(kept.open_at(2, &changed_at(100), 106));
        assert!(!kept.open_at(3, &changed_at(u64::MAX), 200));
        assert!(!kept.open_at(3, &changed_at(u64::MAX), 200));
    }
}
