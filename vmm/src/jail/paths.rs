//! Landlock: which paths threads may use. Beside the root it holds against what the root cannot: a directory of the host that
//! the process has open, which leads to all of its file system by way of `..`.
//!
//! As much of it as the kernel offers; one that has none is no error. Rules reach below mounts that are attached to the
//! share, since Landlock follows a path up through mount points, and below an open directory of a mount that is attached
//! nowhere, up to the root of that. What is open stays open. As a side effect nothing can be mounted any more.

use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr as _, RulesetCreated,
    RulesetCreatedAttr as _, RulesetError, Scope,
};

use super::JailError;

/// What is restricted where the kernel can: newer kernels may know more, which was not tried.
const KNOWN: ABI = ABI::V6;

/// The version of Landlock that this kernel offers.
pub fn landlock() -> Option<i64> {
    const VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the call takes no structure, and returns a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, VERSION) };
    (version > 0).then_some(version)
}

fn failed<E: std::error::Error + Send + Sync + 'static>(error: E) -> JailError {
    JailError { step: "Landlock".into(), source: std::io::Error::other(error) }
}

/// Everything below the root, and removal below the directories `remove`; no connection by TCP, and neither signals nor
/// abstract sockets beyond the threads that come from this one.
pub fn only_the_share(remove: &[BorrowedFd<'_>]) -> Result<(), JailError> {
    let root = PathFd::new("/").map_err(failed)?;
    let everything = AccessFs::from_all(KNOWN);
    let restrict = || {
        let rules = Ruleset::default()
            .handle_access(everything)?
            .handle_access(AccessNet::from_all(KNOWN))?
            .scope(Scope::from_all(KNOWN))?
            .create()?
            .add_rule(PathBeneath::new(root, everything))?;
        allow_removal(rules, remove)?.restrict_self()
    };
    restrict().map(drop).map_err(failed::<RulesetError>)
}

/// No path but for removal below the directories `remove`.
pub fn none(remove: &[BorrowedFd<'_>]) -> Result<(), JailError> {
    let restrict = || {
        let rules = Ruleset::default().handle_access(AccessFs::from_all(KNOWN))?.create()?;
        allow_removal(rules, remove)?.restrict_self()
    };
    restrict().map(drop).map_err(failed::<RulesetError>)
}

fn allow_removal(mut rules: RulesetCreated, directories: &[BorrowedFd<'_>]) -> Result<RulesetCreated, RulesetError> {
    let removal = AccessFs::ReadDir | AccessFs::RemoveDir | AccessFs::RemoveFile;
    for directory in directories {
        rules = rules.add_rule(PathBeneath::new(directory, removal))?;
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jail::remove_tree;
    use std::fs::File;
    use std::os::fd::AsFd;

    use rustix::fs::{CWD, Mode, OFlags, openat};
    use rustix::io::Errno;
    use rustix::mount::{OpenTreeFlags, open_tree};

    /// In a thread of its own: Landlock is for good.
    fn restricted(test: impl FnOnce() + Send + 'static) {
        if landlock().is_none() {
            eprintln!("skipped: no Landlock here");
            return;
        }
        std::thread::spawn(test).join().unwrap();
    }

    #[test]
    fn a_directory_that_is_open_leads_nowhere_but_its_entries_can_be_removed() {
        let base = tempfile();
        std::fs::create_dir_all(base.join("state/id/sub")).unwrap();
        std::fs::write(base.join("state/id/sub/file"), "x").unwrap();
        std::fs::write(base.join("secret"), "x").unwrap();
        let state = File::open(base.join("state")).unwrap();
        let other = File::open(&base).unwrap();
        let path = base.clone();
        restricted(move || {
            none(&[state.as_fd()]).unwrap();
            let read = |directory: &File, name| openat(directory, name, OFlags::RDONLY, Mode::empty()).map(drop);
            assert_eq!(read(&state, "../secret"), Err(Errno::ACCESS));
            assert_eq!(read(&state, "id/sub/file"), Err(Errno::ACCESS));
            assert_eq!(read(&other, "secret"), Err(Errno::ACCESS));
            assert_eq!(remove_tree(other.as_fd(), c"secret"), Err(Errno::ACCESS));
            remove_tree(state.as_fd(), c"id").unwrap();
            assert!(std::fs::exists(path.join("secret")).unwrap() && !std::fs::exists(path.join("state/id")).unwrap());
        });
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn a_mount_that_is_attached_nowhere_can_be_allowed_and_is_not_otherwise() {
        let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let base = tempfile();
        std::fs::create_dir_all(base.join("sub")).unwrap();
        std::fs::write(base.join("sub/file"), "x").unwrap();
        let (Ok(allowed), Ok(denied)) = (open_tree(CWD, &base, clone), open_tree(CWD, "/", clone)) else {
            eprintln!("skipped: not root");
            return;
        };
        restricted(move || {
            let everything = AccessFs::from_all(KNOWN);
            let rules = Ruleset::default().handle_access(everything).unwrap().create().unwrap();
            rules.add_rule(PathBeneath::new(&allowed, everything)).unwrap().restrict_self().unwrap();
            openat(&allowed, "sub/file", OFlags::RDWR, Mode::empty()).unwrap();
            rustix::fs::linkat(&allowed, "sub/file", &allowed, "link", rustix::fs::AtFlags::empty()).unwrap();
            assert_eq!(openat(&denied, "etc", OFlags::RDONLY, Mode::empty()).map(drop), Err(Errno::ACCESS));
        });
        std::fs::remove_dir_all(base).unwrap();
    }

    fn tempfile() -> std::path::PathBuf {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("podhull-paths-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    }
}
