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
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::NodeError;
use super::tree::{Tree, replace, sync_directory};
use crate::pod::{IMAGE, KERNEL, library_file};
use crate::shim;

/// Where all of it is.
pub const DIRECTORY: &str = "/opt/podhull";

/// The version that new pods get.
pub const CURRENT: &str = "current";

const VERSIONS: &str = "versions";

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

/// The versions on a node.
pub struct Versions {
    directory: PathBuf,
}

impl Versions {
    /// Those that are there; none if there is no directory of them.
    pub fn find(tree: &Tree) -> Result<Option<Self>, NodeError> {
        Ok(tree.find(DIRECTORY)?.map(|directory| Self { directory }))
    }

    /// Likewise, with a directory for them.
    pub fn make(tree: &Tree) -> Result<Self, NodeError> {
        let directory = tree.make(DIRECTORY)?;
        Ok(Self { directory })
    }

    /// A file that says that something is still to be done.
    pub fn note(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Adds one, and makes it that of new pods.
    pub fn add(&self, files: &Files) -> Result<(), NodeError> {
        let versions = self.directory.join(VERSIONS);
        let place = versions.join(files.name());
        let fail = |error| NodeError::file("write", place.clone(), error);
        fs::create_dir_all(&versions).map_err(fail)?;
        if !files.are_in(&place) {
            let unfinished = versions.join(UNFINISHED);
            remove_if_there(&unfinished).map_err(fail)?;
            files.copy_to(&unfinished).map_err(fail)?;
            // Somebody has changed or cut short what is there: it cannot stay under this name.
            remove_if_there(&place).map_err(fail)?;
            fs::rename(&unfinished, &place).map_err(fail)?;
            sync_directory(&versions).map_err(fail)?;
        }
        self.switch(files.name()).map_err(fail)
    }

    fn switch(&self, name: &str) -> io::Result<()> {
        let (current, target) = (self.directory.join(CURRENT), Path::new(VERSIONS).join(name));
        if fs::read_link(&current).is_ok_and(|found| found == target) {
            return Ok(());
        }
        let unfinished = self.directory.join(".current.podhull-new");
        match fs::remove_file(&unfinished) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => symlink(target, &unfinished)?,
        }
        fs::rename(&unfinished, current)?;
        sync_directory(&self.directory)
    }

    /// Processes of the node whose program is of one of them, with the version's name.
    pub fn in_use(&self, tree: &Tree) -> Result<Vec<(u32, String)>, NodeError> {
        let mut programs = Vec::new();
        for name in self.names()? {
            if let Ok(metadata) = fs::metadata(self.directory.join(VERSIONS).join(&name).join("bin/podhull")) {
                programs.push(((metadata.dev(), metadata.ino()), name));
            }
        }
        let processes = tree.at("/proc");
        let fail = |error| NodeError::file("list", processes.clone(), error);
        let own = tree.is_own().then(std::process::id);
        let mut found = Vec::new();
        for entry in fs::read_dir(&processes).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            // One that has ended meanwhile, or is the kernel's own, has none.
            let Ok(metadata) = fs::metadata(processes.join(&name).join("exe")) else { continue };
            let file = (metadata.dev(), metadata.ino());
            if let Some((_, version)) = programs.iter().find(|(program, _)| *program == file)
                && own != Some(pid)
            {
                found.push((pid, version.clone()));
            }
        }
        Ok(found)
    }

    /// Removes those that neither new pods nor any process have.
    pub fn prune(&self, tree: &Tree) -> Result<Vec<String>, NodeError> {
        let used = self.in_use(tree)?;
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

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
