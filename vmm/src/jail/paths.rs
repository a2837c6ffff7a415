//! Landlock: which paths threads may use. Beside the root it holds against what the root cannot: a directory of the host that
//! the process has open, which leads to all of its file system by way of `..`.
//!
//! As much of it as the kernel offers; one that has none is no error. Rules reach below mounts that are attached to the
//! share, since Landlock follows a path up through mount points, and below an open directory of a mount that is attached
//! nowhere, up to the root of that. What is open stays open. As a side effect nothing can be mounted any more.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr as _, RulesetCreated,
    RulesetCreatedAttr as _, RulesetError, Scope,
};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;

use super::{JailError, remove_tree, step};

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

/// A directory that the process is to remove at its end, with all that is in it.
#[derive(Debug)]
pub struct Leftover {
    parent: OwnedFd,
    name: CString,
    directory: OwnedFd,
}

impl Leftover {
    /// The one with this name in `parent`.
    pub fn new(parent: OwnedFd, name: String) -> Result<Self, JailError> {
        let open = || {
            let is_name = !matches!(&*name, "" | "." | "..") && !name.contains('/');
            let name = CString::new(name).ok().filter(|_| is_name).ok_or(Errno::INVAL)?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let directory = openat(&parent, &name, flags, Mode::empty())?;
            Ok((name, directory))
        };
        let (name, directory) = step("what is to be removed", open())?;
        Ok(Self { parent, name, directory })
    }

    /// Removes it.
    pub fn remove(&self) -> Result<(), Errno> {
        remove_tree(self.parent.as_fd(), &self.name)
    }
}

/// Everything below the root, and removal of the leftovers; no connection by TCP, and neither signals nor abstract sockets
/// beyond the threads that come from this one.
pub fn only_the_share(leftovers: &[Leftover]) -> Result<(), JailError> {
    let root = PathFd::new("/").map_err(failed)?;
    let everything = AccessFs::from_all(KNOWN);
    let restrict = || {
        let rules = Ruleset::default()
            .handle_access(everything)?
            .handle_access(AccessNet::from_all(KNOWN))?
            .scope(Scope::from_all(KNOWN))?
            .create()?
            .add_rule(PathBeneath::new(root, everything))?;
        allow_removal(rules, leftovers)?.restrict_self()
    };
    restrict().map(drop).map_err(failed::<RulesetError>)
}

/// No path but for removal of the leftovers.
pub fn none(leftovers: &[Leftover]) -> Result<(), JailError> {
    let restrict = || {
        let rules = Ruleset::default().handle_access(AccessFs::from_all(KNOWN))?.create()?;
        allow_removal(rules, leftovers)?.restrict_self()
    };
    restrict().map(drop).map_err(failed::<RulesetError>)
}

/// A directory is removed from its parent. What is allowed there is allowed below it too, in what other machines have: so it is no
/// more than to remove directories, which are empty then. Theirs are not, and what is in them cannot be removed.
fn allow_removal(mut rules: RulesetCreated, leftovers: &[Leftover]) -> Result<RulesetCreated, RulesetError> {
    for Leftover { parent, directory, .. } in leftovers {
        rules = rules
            .add_rule(PathBeneath::new(directory, AccessFs::ReadDir | AccessFs::RemoveDir | AccessFs::RemoveFile))?
            .add_rule(PathBeneath::new(parent, AccessFs::RemoveDir))?;
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    use rustix::fs::{AtFlags, CWD};
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
    fn a_directory_that_is_open_leads_nowhere_and_of_its_entries_one_can_be_removed() {
        let base = tempfile();
        for name in ["id", "other"] {
            std::fs::create_dir_all(base.join("state").join(name).join("sub")).unwrap();
            std::fs::write(base.join("state").join(name).join("sub/file"), "x").unwrap();
        }
        std::fs::write(base.join("state/file"), "x").unwrap();
        std::fs::write(base.join("secret"), "x").unwrap();
        let [state, above] = ["state", "."].map(|name| File::open(base.join(name)).unwrap());
        let other = File::open(base.join("state/other/sub")).unwrap();
        let parent = state.try_clone().unwrap();
        let path = base.clone();
        restricted(move || {
            let leftovers = [Leftover::new(parent.into(), "id".into()).unwrap()];
            none(&leftovers).unwrap();
            let read = |directory: &File, name| openat(directory, name, OFlags::RDONLY, Mode::empty()).map(drop);
            assert_eq!(read(&state, "../secret"), Err(Errno::ACCESS));
            assert_eq!(read(&state, "id/sub/file"), Err(Errno::ACCESS));
            assert_eq!(read(&above, "secret"), Err(Errno::ACCESS));
            assert_eq!(remove_tree(above.as_fd(), c"secret"), Err(Errno::ACCESS));
            // Of another.
            for name in [c"file", c"other"] {
                assert_eq!(remove_tree(state.as_fd(), name), Err(Errno::ACCESS));
            }
            assert_eq!(remove_tree(other.as_fd(), c"file"), Err(Errno::ACCESS));
            let remove = |name, flags| rustix::fs::unlinkat(&state, name, flags);
            assert_eq!(remove("other/sub/file", AtFlags::empty()), Err(Errno::ACCESS));
            assert_eq!(remove("other/sub", AtFlags::REMOVEDIR), Err(Errno::NOTEMPTY));

            leftovers[0].remove().unwrap();
            leftovers[0].remove().unwrap();
            let exists = |name: &str| std::fs::exists(path.join(name)).unwrap();
            assert!(exists("secret") && exists("state/other/sub/file") && !exists("state/id"));
        });
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn what_is_to_be_removed_is_a_directory_with_a_name() {
        let base = tempfile();
        std::fs::create_dir_all(base.join("id/sub")).unwrap();
        std::fs::write(base.join("file"), "").unwrap();
        std::os::unix::fs::symlink("id", base.join("link")).unwrap();
        for name in ["", ".", "..", "id/sub", "id/", "file", "link", "missing", "a\0"] {
            Leftover::new(File::open(&base).unwrap().into(), name.into()).unwrap_err();
        }
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
