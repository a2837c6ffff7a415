//! A node of Kubernetes: podhull's files on it, and containerd told of them. What the installer in `deploy/` does, by hand or in a
//! container that has the node's files in a directory.
//!
//! Each step can be repeated, and a node on which one has failed is as it was or does with the next attempt what is missing. One
//! installer works on a node at a time.

mod containerd;
mod service;
mod tree;
mod versions;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd::Change;
pub use tree::Tree;
pub use versions::Files;
use versions::Versions;

/// A note that containerd has not read its configuration yet.
const TO_RESTART: &str = "restart-containerd";

/// Why a node is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A file of the node, or of ours.
    #[error("{what} {path}: {error}")]
    File {
        /// What was to be done.
        what: &'static str,
        /// With it.
        path: PathBuf,
        /// Why it could not.
        error: io::Error,
    },
    /// There is no node.
    #[error("{0} does not exist: --at names the directory that has the node's files")]
    NoRoot(PathBuf),
    /// It would be replaced by a file.
    #[error("{0} is a symbolic link: name the file itself with --config")]
    Link(PathBuf),
    /// Nor anything else.
    #[error("{0} is not a regular file")]
    NoFile(PathBuf),
    /// No configuration is that long.
    #[error("{0} is longer than 1 MiB")]
    TooLong(PathBuf),
    /// Nor of that many files.
    #[error("{0} imports too many files")]
    TooMany(PathBuf),
    /// What it imports decides where our tables go.
    #[error("{path}: import {pattern:?}: only patterns of names with \"*\" are understood")]
    Pattern {
        /// The file.
        path: PathBuf,
        /// What it imports.
        pattern: PathBuf,
    },
    /// Without a version it is of the first.
    #[error("{path}: configuration of version {version}; versions 2 to 4 are understood (containerd config migrate)")]
    Version {
        /// The file.
        path: PathBuf,
        /// What it says, or 1.
        version: u64,
    },
    /// Somebody else has the name.
    #[error("{path} has a runtime {handler:?} that is not podhull's: remove it, or choose other names with --handler")]
    Taken {
        /// The name.
        handler: String,
        /// The file that containerd begins with.
        path: PathBuf,
    },
    /// No place for our tables.
    #[error("{path}: cannot be added to: {problem}")]
    Unchangeable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Pods would lose their runtime.
    #[error(
        "{count} processes of podhull run on this node, the first is {first}: end the pods that have its runtime class"
    )]
    InUse {
        /// How many.
        count: usize,
        /// One of them.
        first: u32,
    },
    /// Nobody can be asked who has podhull.
    #[error("the node's processes are not in {0}: mount its /proc there, or go on with --offline if none runs")]
    NoProcesses(PathBuf),
    /// Another installer.
    #[error("{path}: another installer is at work for more than {} seconds: try again", .waited.as_secs())]
    Busy {
        /// Where all of it is.
        path: PathBuf,
        /// So long.
        waited: Duration,
    },
    /// A program of the node.
    #[error("cannot start {0} on the node: {1}")]
    Start(String, io::Error),
    /// Likewise.
    #[error("{0} failed on the node: {1}")]
    Failed(String, String),
    /// Likewise.
    #[error("{0} does not come to an end on the node within {secs} seconds: carry it out there, then try again", secs = .1.as_secs())]
    Late(String, Duration),
    /// There is no containerd now.
    #[error("{first}; with its files as they were before, once more: {again}; start it by hand")]
    Twice {
        /// With the files as they were to be.
        first: Box<NodeError>,
        /// With those from before.
        again: Box<NodeError>,
    },
    /// Nobody to be told.
    #[error("none of these services is active: {0}; go on with --offline, then restart containerd")]
    NoService(String),
}

impl NodeError {
    fn file(what: &'static str, path: PathBuf, error: io::Error) -> Self {
        Self::File { what, path, error }
    }
}

/// A node, and how it is dealt with.
pub struct Node {
    /// Its files.
    pub tree: Tree,
    /// containerd's configuration, where it is not found by itself.
    pub config: Option<PathBuf>,
    /// Change files alone: nothing is carried out on the node.
    pub offline: bool,
}

impl Node {
    /// Puts these files on the node, and makes containerd know the handlers; `say` is told what was done.
    pub fn install(&self, files: &Files, handlers: &[String], say: &mut dyn FnMut(&str)) -> Result<(), NodeError> {
        // First: what cannot be done is not begun.
        containerd::add(&self.tree, self.config(), handlers)?;
        let versions = Versions::make(&self.tree)?;
        versions.add(files)?;
        if !self.offline {
            service::check(&self.tree, files.name())?;
        }
        // Only now: new pods have it from here on.
        versions.switch(files.name())?;
        say(&format!("podhull {} is installed", files.name()));
        let change = containerd::add(&self.tree, self.config(), handlers)?;
        self.apply(&versions, change.into_iter().collect(), say)?;
        for name in versions.prune(&self.tree, self.offline)? {
            say(&format!("podhull {name} is removed: no process has it"));
        }
        Ok(())
    }

    /// Takes all of it away, unless pods have it.
    pub fn uninstall(&self, say: &mut dyn FnMut(&str)) -> Result<(), NodeError> {
        let versions = match Versions::find(&self.tree)? {
            Some(versions) => versions,
            None => match containerd::remove(&self.tree, self.config()) {
                // Somebody has removed the files alone.
                Ok(changes) if !changes.is_empty() => Versions::make(&self.tree)?,
                Ok(_) => {
                    say("podhull is not installed");
                    return Ok(());
                }
                // What could not be understood was refused by `install`, too.
                Err(error) => {
                    say(&format!("podhull is not installed; whether containerd knows it is not known: {error}"));
                    return Ok(());
                }
            },
        };
        self.refuse_if_used(&versions)?;
        let changes = containerd::remove(&self.tree, self.config())?;
        self.apply(&versions, changes, say)?;
        // A pod may have begun before containerd knew.
        self.refuse_if_used(&versions)?;
        versions.remove()?;
        say("podhull is removed");
        Ok(())
    }

    fn config(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    fn refuse_if_used(&self, versions: &Versions) -> Result<(), NodeError> {
        let used = versions.in_use(&self.tree, self.offline)?;
        match used.first() {
            Some((first, _)) => Err(NodeError::InUse { count: used.len(), first: *first }),
            None => Ok(()),
        }
    }

    /// Changes containerd's files, and has it read them, also if only that is left from an earlier attempt. If it does not start with
    /// them it gets those from before.
    fn apply(&self, versions: &Versions, changes: Vec<Change>, say: &mut dyn FnMut(&str)) -> Result<(), NodeError> {
        let note = versions.note(TO_RESTART);
        // Before anything is changed: one that did not start is not active.
        let service = match !self.offline && (!changes.is_empty() || note.exists()) {
            true => Some(service::active(&self.tree)?),
            false => None,
        };
        if service.is_some() {
            tree::replace(&note, 0o644, |_| Ok(())).map_err(|error| NodeError::file("write", note.clone(), error))?;
        }
        let mut before = Vec::new();
        for change in changes {
            let path = change.path();
            before.push(match self.tree.read(path)? {
                Some(text) => Change::Write(path.to_owned(), text),
                None => Change::Remove(path.to_owned()),
            });
            say(&self.make(&change)?);
        }
        let Some(service) = service else { return Ok(()) };
        match service::restart(&self.tree, service) {
            Ok(()) => say(&format!("{service} is restarted")),
            Err(first) if before.is_empty() => return Err(first),
            Err(first) => {
                for change in before.iter().rev() {
                    self.make(change)?;
                    say(&format!("{} is as it was before", change.path().display()));
                }
                if let Err(again) = service::restart(&self.tree, service) {
                    return Err(NodeError::Twice { first: Box::new(first), again: Box::new(again) });
                }
                done(note)?;
                return Err(first);
            }
        }
        done(note)
    }

    /// Changes a file; says what was done.
    fn make(&self, change: &Change) -> Result<String, NodeError> {
        match change {
            Change::Write(path, text) => {
                self.tree.write(path, text)?;
                Ok(format!("{} is changed", path.display()))
            }
            Change::Remove(path) => {
                self.tree.remove(path)?;
                Ok(format!("{} is removed", path.display()))
            }
        }
    }
}

/// Removes a note.
fn done(note: PathBuf) -> Result<(), NodeError> {
    std::fs::remove_file(&note).map_err(|error| NodeError::file("remove", note, error))
}

#[cfg(test)]
mod tests;
