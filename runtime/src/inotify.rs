//! Instances of inotify. The kernel gives each user 128 of them by default (`fs.inotify.max_user_instances`): as many as there are
//! containers on a node with a hundred pods, whose root needs some itself. So each process that stands for a container or a pod takes
//! its instance, and the watches in it, in the name of a user that there is not.

use std::os::fd::OwnedFd;

use rustix::fs::inotify::{self, CreateFlags};
use rustix::io::Errno;
use rustix::process::Uid;

/// From here on nobody gives users numbers (systemd, "Users, Groups, UIDs and GIDs on systemd Systems"); a process's fits in below.
const NOBODYS: u32 = 0x8000_0000;

/// Makes one, not blocking, which counts against the limit of root only where this thread may not be anybody else.
pub fn instance() -> Result<OwnedFd, Errno> {
    let root = rustix::process::geteuid();
    let nobody = Uid::from_raw(NOBODYS | rustix::process::getpid().as_raw_nonzero().get().unsigned_abs());
    // Of this thread alone, and the file system's user with it. Being another takes its capabilities for that long, and makes the
    // process one that does not dump core.
    let dumpable = rustix::process::dumpable_behavior();
    let is_nobody = rustix::thread::set_thread_res_uid(None, nobody, None).is_ok();
    let made = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK);
    if is_nobody {
        rustix::thread::set_thread_res_uid(None, root, None).expect("whose process it is stays root");
        dumpable.and_then(rustix::process::set_dumpable_behavior)?;
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::inotify::WatchFlags;

    #[test]
    fn there_is_one_when_root_has_none_left() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dumpable = rustix::process::dumpable_behavior().unwrap();
        let capabilities = rustix::thread::capabilities(None).unwrap();
        // By default the kernel refuses the 129th; where a host gives more, less is seen here.
        let all_of_roots: Vec<_> = (0..500).map_while(|_| inotify::init(CreateFlags::CLOEXEC).ok()).collect();
        let one = instance().unwrap();
        drop(all_of_roots);
        assert!(rustix::process::geteuid().is_root());
        assert_eq!(rustix::thread::capabilities(None).unwrap(), capabilities);
        assert_eq!(rustix::process::dumpable_behavior().unwrap(), dumpable);
        // Root's directories are watched, whoever it is counted for.
        let private = tempfile::tempdir().unwrap();
        inotify::add_watch(&one, private.path(), WatchFlags::MOVED_TO).unwrap();
    }
}
