//! Which directories the guest may go by for a while without asking again, by name and attributes.
//!
//! A guest keeps a name that is valid for any time at all after that time too, until it is short of memory, and each that it keeps
//! is an open file here and a pinned inode in the host. One that is never valid it drops with its last use. So only so many are
//! ever valid.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use virtiofsd::filesystem::Entry;
use virtiofsd::fuse::{ATTR_SUBMOUNT, Attr, ROOT_ID};

/// How long the guest may go by one: enough for the call that asked and those that follow it, whose requests were mostly for the
/// directories on their way. What the host puts in its place by rename is seen this much later at most.
pub const VALID: Duration = Duration::from_millis(100);

/// As many as a large tree of programs has. The paths to all other files are asked for, component by component.
const MOST: usize = 8192;

/// The directories that the guest was told to go by and has not forgotten.
#[derive(Default)]
pub struct Directories(Mutex<HashSet<u64>>);

impl Directories {
    fn lock(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the guest is told of a name in a directory. Those in the root come and go with what is shared, under names that others
    /// had before.
    pub fn timed(&self, parent: u64, entry: Entry) -> Entry {
        match parent != ROOT_ID && is_directory(&entry.attr) && self.keep(entry.inode) {
            // A mount is held by whoever knows its name: that is to be dropped with its last use.
            true if entry.attr.flags & ATTR_SUBMOUNT != 0 => Entry { attr_timeout: VALID, ..entry },
            true => Entry { entry_timeout: VALID, attr_timeout: VALID, ..entry },
            false => entry,
        }
    }

    /// How long attributes are valid that would be for so long were they a file's.
    pub fn valid(&self, inode: u64, attr: &Attr, otherwise: Duration) -> Duration {
        if is_directory(attr) && self.lock().contains(&inode) { VALID } else { otherwise }
    }

    fn keep(&self, inode: u64) -> bool {
        let mut kept = self.lock();
        kept.contains(&inode) || (kept.len() < MOST && kept.insert(inode))
    }

    /// The guest has dropped the node, or is told that it is gone; whether it could go by it.
    pub fn forget(&self, inode: u64) -> bool {
        self.lock().remove(&inode)
    }

    /// The guest has dropped all nodes.
    pub fn clear(&self) {
        self.lock().clear();
    }
}

fn is_directory(attr: &Attr) -> bool {
    attr.mode & libc::S_IFMT == libc::S_IFDIR
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(inode: u64, mode: u32) -> Entry {
        let attr = Attr { mode: mode | 0o755, ..Attr::default() };
        Entry { inode, generation: 0, attr, attr_timeout: Duration::ZERO, entry_timeout: Duration::ZERO }
    }

    #[test]
    fn directories_alone_and_so_many_of_them_are_valid() {
        let directories = Directories::default();
        let valid = |inode, mode| {
            assert_eq!(directories.timed(ROOT_ID, entry(inode, mode)).entry_timeout, Duration::ZERO);
            let timed = directories.timed(2, entry(inode, mode));
            assert_eq!(timed.entry_timeout, timed.attr_timeout);
            assert_eq!(directories.valid(inode, &timed.attr, Duration::ZERO), timed.attr_timeout);
            timed.entry_timeout
        };
        assert_eq!(valid(1, libc::S_IFREG), Duration::ZERO);
        assert_eq!(valid(1, libc::S_IFLNK), Duration::ZERO);
        for inode in 0..MOST as u64 {
            assert_eq!(valid(inode, libc::S_IFDIR), VALID);
        }
        assert_eq!(valid(u64::MAX, libc::S_IFDIR), Duration::ZERO);
        assert_eq!(valid(7, libc::S_IFDIR), VALID);
        assert!(directories.forget(8) && !directories.forget(8));
        assert_eq!(valid(u64::MAX, libc::S_IFDIR), VALID);
        assert_eq!(valid(8, libc::S_IFDIR), Duration::ZERO);
        directories.clear();
        assert_eq!(valid(8, libc::S_IFDIR), VALID);
        let mut mount = entry(9, libc::S_IFDIR);
        mount.attr.flags = ATTR_SUBMOUNT;
        let timed = directories.timed(2, mount);
        assert_eq!((timed.entry_timeout, timed.attr_timeout), (Duration::ZERO, VALID));
    }
}
