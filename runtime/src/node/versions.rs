//! podhull's files on a node, one directory for each version, so that pods that run keep theirs:
//!
//! ```text
//! /opt/podhull/versions/<version>-<hash>/bin/{podhull,containerd-shim-*-v2}
//! /opt/podhull/versions/<version>-<hash>/lib/podhull/{vmlinux,guest.img}
//! /opt/podhull/current -> versions/<version>-<hash>
//! ```
//!
//! A shim starts all of its pod's processes as the program that it is itself; so a pod stays with the version it began with.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::NodeError;
use super::tree::{Tree, replace, sync_directory};
use crate::pod::{IMAGE, KERNEL, library_file};
use crate::shim;
use crate::state::lock_in_time;

/// Where all of it is.
pub const DIRECTORY: &str = "/opt/podhull";

/// The version that new pods get.
pub const CURRENT: &str = "current";

/// Where they are.
pub const VERSIONS: &str = "versions";

/// How long another installer may take: it asks the node's programs, some of which have deadlines of minutes, but most of them end soon.
const TURN: Duration = Duration::from_secs(120);

/// A directory that is not finished, or on its way out.
const UNFINISHED: &str = ".unfinished";

/// The files of a version: where they are in its directory, their permissions, and where they come from.
pub struct Files {
    files: [(&'static str, u32, PathBuf); 3],
    /// What they are called together.
    name: String,
}

impl Files {
    /// Those that this program was installed with.
    pub fn own() -> Result<Self, NodeError> {
        Self::of(PathBuf::from("/proc/self/exe"), library_file(KERNEL), library_file(IMAGE))
    }

    /// These.
    pub fn of(program: PathBuf, kernel: PathBuf, image: PathBuf) -> Result<Self, NodeError> {
        let files = [
            ("bin/podhull", 0o755, program),
            ("lib/podhull/vmlinux", 0o644, kernel),
            ("lib/podhull/guest.img", 0o644, image),
        ];
        let mut hash = Sha256::new();
        for (name, _, path) in &files {
            let of_file = digest(path).map_err(|error| NodeError::file("read", path.clone(), error))?;
            hash.update(name);
            hash.update(of_file);
        }
        let hash: String = hash.finalize()[..6].iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { name: format!("{}-{hash}", crate::cli::VERSION), files })
    }

    /// What the version is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether they are in a directory as they should be.
    fn are_in(&self, directory: &Path) -> bool {
        let same = |(name, _, path): &(&str, u32, PathBuf)| matches!((digest(&directory.join(name)), digest(path)), (Ok(there), Ok(here)) if there == here);
        self.files.iter().all(same)
            && shim::NAMES.iter().all(|name| directory.join("bin").join(name).symlink_metadata().is_ok())
    }

    /// Copies them into a directory that is not there.
    fn copy_to(&self, directory: &Path) -> io::Result<()> {
        for (name, mode, path) in &self.files {
            let place = directory.join(name);
            let parent = place.parent().unwrap_or(directory);
            fs::create_dir_all(parent)?;
            replace(&place, *mode, |file| io::copy(&mut File::open(path)?, file).map(drop))?;
        }
        for name in shim::NAMES {
            symlink("podhull", directory.join("bin").join(name))?;
        }
        sync_directory(&directory.join("bin"))
    }
}

fn digest(path: &Path) -> io::Result<[u8; 32]> {
    let mut file = File::open(path)?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 16]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().into()),
            count => hash.update(&buffer[..count]),
        }
    }
}

/// The versions on a node. No other installer changes them until this is dropped.
pub struct Versions {
    directory: PathBuf,
    /// The directory, locked.
    _turn: OwnedFd,
}

impl Versions {
    /// Those that are there; none if there is no directory of them.
    pub fn find(tree: &Tree) -> Result<Option<Self>, NodeError> {
        while let Some(directory) = tree.find(DIRECTORY)? {
            if let Some(versions) = Self::lock(directory)? {
                return Ok(Some(versions));
            }
        }
        Ok(None)
    }

    /// Likewise, with a directory for them.
    pub fn make(tree: &Tree) -> Result<Self, NodeError> {
        loop {
            if let Some(versions) = Self::lock(tree.make(DIRECTORY)?)? {
                return Ok(versions);
            }
        }
    }

    /// None if another has removed it meanwhile: each time that has come to its end.
    fn lock(directory: PathBuf) -> Result<Option<Self>, NodeError> {
        let fail = |error| NodeError::file("lock", directory.clone(), error);
        let opened = match File::open(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(fail)?,
        };
        let own = opened.metadata().map_err(fail)?;
        // Who could open it could lock it.
        opened.set_permissions(fs::Permissions::from_mode(0o711)).map_err(fail)?;
        let turn = lock_in_time(opened.into(), TURN).map_err(|errno| match errno {
            Errno::TIMEDOUT => NodeError::Busy { path: directory.clone(), waited: TURN },
            errno => fail(errno.into()),
        })?;
        match fs::metadata(&directory) {
            Ok(there) if (there.dev(), there.ino()) == (own.dev(), own.ino()) => {
                Ok(Some(Self { directory, _turn: turn }))
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(fail(error)),
            _ => Ok(None),
        }
    }

    /// A file that says that something is still to be done.
    pub fn note(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Adds one, which is nobody's yet.
    pub fn add(&self, files: &Files) -> Result<(), NodeError> {
        let versions = self.directory.join(VERSIONS);
        let place = versions.join(files.name());
        let fail = |error| NodeError::file("write", place.clone(), error);
        fs::create_dir_all(&versions).map_err(fail)?;
        if files.are_in(&place) {
            return Ok(());
        }
        let unfinished = versions.join(UNFINISHED);
        remove_if_there(&unfinished).map_err(fail)?;
        files.copy_to(&unfinished).map_err(fail)?;
        // Somebody has changed or cut short what is there: it cannot stay under this name.
        remove_if_there(&place).map_err(fail)?;
        fs::rename(&unfinished, &place).map_err(fail)?;
        sync_directory(&versions).map_err(fail)
    }

    /// Makes one that of new pods.
    pub fn switch(&self, name: &str) -> Result<(), NodeError> {
        let (current, target) = (self.directory.join(CURRENT), Path::new(VERSIONS).join(name));
        if fs::read_link(&current).is_ok_and(|found| found == target) {
            return Ok(());
        }
        let fail = |error| NodeError::file("write", current.clone(), error);
        let unfinished = self.directory.join(".current.podhull-new");
        match fs::remove_file(&unfinished) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
            _ => symlink(target, &unfinished).map_err(fail)?,
        }
        fs::rename(&unfinished, &current).map_err(fail)?;
        sync_directory(&self.directory).map_err(fail)
    }

    /// Processes of the node whose program is of one of them, with the version's name. Where the node is `offline` it need not have any.
    pub fn in_use(&self, tree: &Tree, offline: bool) -> Result<Vec<(u32, String)>, NodeError> {
        let mut programs = Vec::new();
        for name in self.names()? {
            let program = self.directory.join(VERSIONS).join(&name).join("bin/podhull");
            if let (Ok(device), Ok(metadata)) = (device_of(&program), fs::metadata(&program)) {
                programs.push(((device, metadata.ino()), name));
            }
        }
        let processes = tree.at("/proc");
        // A directory in which nothing is mounted has none either.
        if !offline && !processes.join("1").exists() {
            return Err(NodeError::NoProcesses(processes));
        }
        let fail = |error| NodeError::file("list", processes.clone(), error);
        let own = tree.is_own().then(std::process::id);
        let mut found = Vec::new();
        for entry in fs::read_dir(&processes).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            let program = processes.join(&name).join("exe");
            // Programs of other file systems may be out of reach: nobody is asked there.
            let file = device_of(&program).and_then(|device| {
                let ours = programs.iter().any(|((there, _), _)| *there == device);
                let number = || rustix::fs::stat(&program).map(|found| (device, found.st_ino));
                ours.then(number).transpose()
            });
            let file = match file {
                Ok(Some(file)) => file,
                // One that has ended meanwhile, or is the kernel's own, has none.
                Ok(None) | Err(Errno::NOENT | Errno::SRCH | Errno::STALE | Errno::NOTCONN) => continue,
                Err(errno) => return Err(NodeError::file("look at", program, errno.into())),
            };
            if let Some((_, version)) = programs.iter().find(|(program, _)| *program == file)
                && own != Some(pid)
            {
                found.push((pid, version.clone()));
            }
        }
        Ok(found)
    }

    /// Removes those that neither new pods nor any process have.
    pub fn prune(&self, tree: &Tree, offline: bool) -> Result<Vec<String>, NodeError> {
        let used = self.in_use(tree, offline)?;
        let current = fs::read_link(self.directory.join(CURRENT)).unwrap_or_default();
        let mut removed = Vec::new();
        for name in self.names()? {
            if current.file_name() != Some(name.as_ref()) && used.iter().all(|(_, version)| *version != name) {
                let place = self.directory.join(VERSIONS).join(&name);
                remove_if_there(&place).map_err(|error| NodeError::file("remove", place, error))?;
                removed.push(name);
            }
        }
        Ok(removed)
    }

    fn names(&self) -> Result<Vec<String>, NodeError> {
        let versions = self.directory.join(VERSIONS);
        let fail = |error| NodeError::file("list", versions.clone(), error);
        let entries = match fs::read_dir(&versions) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(fail)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            names.extend(entry.map_err(fail)?.file_name().into_string().ok());
        }
        names.sort();
        Ok(names)
    }

    /// Removes all of it.
    pub fn remove(self) -> Result<(), NodeError> {
        remove_if_there(&self.directory).map_err(|error| NodeError::file("remove", self.directory.clone(), error))
    }
}

/// The device of the file system with a file, as the kernel knows it by itself. It does not ask FUSE, or a server, for that.
fn device_of(path: &Path) -> Result<(u32, u32), Errno> {
    let found = rustix::fs::statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::empty())?;
    Ok((found.stx_dev_major, found.stx_dev_minor))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
