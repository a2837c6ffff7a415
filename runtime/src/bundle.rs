//! A bundle: a directory with `config.json` and a root filesystem (runtime-spec, `bundle.md`).
//!
//! It is hostile: its files may be symbolic links, pipes, huge, or change while they are read. So everything is reached
//! from one descriptor of the directory, and read once.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use serde_json::Value;

use crate::spec::Config;
use crate::spec::read::{ConfigError, read};

/// Longest `config.json` in bytes: with the request around it, it must fit into one message to the agent (4 MiB).
const MAX_CONFIG: u64 = 3 * 1024 * 1024;

/// What is wrong with a bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The directory cannot be opened.
    #[error("bundle {0}: {1}")]
    Directory(PathBuf, #[source] Errno),
    /// `config.json` cannot be opened or read.
    #[error("bundle {0}: config.json: {1}; `podhull spec` writes one")]
    NoConfig(PathBuf, #[source] Errno),
    /// `config.json` is a directory, a device, a pipe.
    #[error("bundle {0}: config.json is not a regular file")]
    NotAFile(PathBuf),
    /// `config.json` cannot be read.
    #[error("bundle {0}: config.json: {1}")]
    Read(PathBuf, #[source] std::io::Error),
    /// More than a message can carry.
    #[error("bundle {0}: config.json has {1} bytes, more than {MAX_CONFIG}")]
    TooLong(PathBuf, u64),
    /// Its content is wrong.
    #[error("bundle {0}: config.json{1}")]
    Config(PathBuf, #[source] ConfigError),
    /// The root filesystem cannot be opened.
    #[error("root.path: {0}: {1}")]
    Root(PathBuf, #[source] Errno),
    /// The root filesystem is reached through a symbolic link, which could be changed to lead elsewhere.
    #[error("root.path: {0} is a symbolic link or leads through one: name the directory itself")]
    RootIsLink(PathBuf),
}

/// A bundle that was read.
pub struct Bundle {
    /// Absolute, without symbolic links.
    pub path: PathBuf,
    /// The directory (`O_PATH`); relative paths of the specification start here.
    pub directory: OwnedFd,
    /// The specification.
    pub config: Config,
    /// The root filesystem's directory (`O_PATH`).
    pub root: OwnedFd,
    /// Absolute path of the root filesystem, for state files.
    pub root_path: PathBuf,
}

/// What the bundle's `config.json` says.
pub fn config(path: &Path) -> Result<Config, BundleError> {
    let directory = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| BundleError::Directory(path.to_owned(), e))?;
    read(&read_config(path, &directory)?).map_err(|error| BundleError::Config(path.to_owned(), error))
}

/// What the bundle's `config.json` says, its `process` changed by `change`, and checked as a whole again.
pub fn with_process(path: &Path, change: impl FnOnce(&mut Value)) -> Result<Config, BundleError> {
    let directory = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| BundleError::Directory(path.to_owned(), e))?;
    let text = read_config(path, &directory)?;
    let wrong = |error| BundleError::Config(path.to_owned(), error);
    // Read as it is first: an error has its line and column there.
    read(&text).map_err(wrong)?;
    let mut document: Value = serde_json::from_str(&text).unwrap_or_default();
    change(&mut document["process"]);
    read(&document.to_string()).map_err(wrong)
}

impl Bundle {
    /// Opens the directory, reads and checks `config.json`, and opens the root filesystem.
    pub fn open(path: &Path) -> Result<Self, BundleError> {
        let directory = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| BundleError::Directory(path.to_owned(), e))?;
        let path = path
            .canonicalize()
            .map_err(|e| BundleError::Directory(path.to_owned(), Errno::from_io_error(&e).unwrap_or(Errno::IO)))?;
        let text = read_config(&path, &directory)?;
        let config = read(&text).map_err(|e| BundleError::Config(path.clone(), e))?;
        let root_path = path.join(config.root_path());
        let root = open_root(&directory, config.root_path()).map_err(|errno| match errno {
            Errno::LOOP => BundleError::RootIsLink(root_path.clone()),
            errno => BundleError::Root(root_path.clone(), errno),
        })?;
        Ok(Self { path, directory, config, root, root_path })
    }
}

fn read_config(path: &Path, directory: &OwnedFd) -> Result<String, BundleError> {
    // Not blocking: a pipe in this place would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(directory, "config.json", flags, Mode::empty())
        .map_err(|e| BundleError::NoConfig(path.to_owned(), e))?;
    let stat = rustix::fs::fstat(&fd).map_err(|e| BundleError::NoConfig(path.to_owned(), e))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(BundleError::NotAFile(path.to_owned()));
    }
    let mut text = Vec::with_capacity(stat.st_size.clamp(0, MAX_CONFIG as i64) as usize + 1);
    let length =
        File::from(fd).take(MAX_CONFIG + 1).read_to_end(&mut text).map_err(|e| BundleError::Read(path.to_owned(), e))?
            as u64;
    if length > MAX_CONFIG {
        return Err(BundleError::TooLong(path.to_owned(), stat.st_size.max(0) as u64));
    }
    String::from_utf8(text).map_err(|e| {
        let line = 1 + e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count();
        BundleError::Config(path.to_owned(), ConfigError::NotText { line })
    })
}

/// As runc, no symbolic link is followed on the way: whoever can change one could otherwise choose what the guest is given.
fn open_root(directory: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::openat2(
        directory,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )
}
