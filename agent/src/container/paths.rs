//! Paths that the container may not see, or not change.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    open_tree,
};

use super::mount_options::{Attributes, attribute};
use super::rootfs::{self, Rootfs, set_attributes};

/// A path that stays open.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    #[error("linux.{field}: expected an absolute path, not {path}")]
    Relative { field: &'static str, path: PathBuf },
    #[error("mask {path}: {source}")]
    Mask { path: PathBuf, source: Errno },
    #[error("make {path} read-only: {source}")]
    ReadOnly { path: PathBuf, source: Errno },
}

/// Covers files by `/dev/null` and directories by an empty one. What is not there needs no cover.
pub fn mask(root: &Rootfs, paths: &[PathBuf]) -> Result<(), PathError> {
    let mut empty: Option<OwnedFd> = None;
    for path in paths {
        check(path, "maskedPaths")?;
        let failed = |source| PathError::Mask { path: path.clone(), source };
        let Some(target) = existing(root, path).map_err(failed)? else { continue };
        let stat = rustix::fs::fstat(&target).map_err(failed)?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let cover = if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            match &empty {
                None => &*empty.insert(empty_directory().map_err(failed)?),
                Some(first) => {
                    // Clones of one mount: a tmpfs each would be memory each.
                    let clone = open_tree(first, "", flags | OpenTreeFlags::AT_EMPTY_PATH).map_err(failed)?;
                    rootfs::attach(&clone, &target).map_err(failed)?;
                    continue;
                }
            }
        } else {
            // The guest's, which the container cannot have put there.
            let null = open_tree(CWD, "/dev/null", flags).map_err(failed)?;
            rootfs::attach(&null, &target).map_err(failed)?;
            continue;
        };
        rootfs::attach(cover, &target).map_err(failed)?;
    }
    Ok(())
}

/// Makes what is there read-only, with the mounts below.
pub fn make_readonly(root: &Rootfs, paths: &[PathBuf]) -> Result<(), PathError> {
    for path in paths {
        check(path, "readonlyPaths")?;
        let failed = |source| PathError::ReadOnly { path: path.clone(), source };
        let Some(target) = existing(root, path).map_err(failed)? else { continue };
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = open_tree(&target, "", flags | OpenTreeFlags::AT_RECURSIVE).map_err(failed)?;
        let attributes = Attributes { set: attribute::RDONLY, clear: 0 };
        set_attributes(&tree, attributes, None, true).map_err(failed)?;
        rootfs::attach(&tree, &target).map_err(failed)?;
    }
    Ok(())
}

fn check(path: &Path, field: &'static str) -> Result<(), PathError> {
    if path.is_absolute() { Ok(()) } else { Err(PathError::Relative { field, path: path.into() }) }
}

fn existing(root: &Rootfs, path: &Path) -> Result<Option<OwnedFd>, Errno> {
    match root.open_raw(path, OFlags::PATH) {
        Ok(target) => Ok(Some(target)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn empty_directory() -> Result<OwnedFd, Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("source", "tmpfs"), ("mode", "755"), ("nr_inodes", "1"), ("nr_blocks", "1")] {
        fsconfig_set_string(&context, key, value)?;
    }
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY)
}
