//! `podhull spec`: a `config.json` to begin with.

use std::borrow::Cow;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::PathBuf;

use rustix::process::{getegid, geteuid};

use crate::spec::document;

/// Write a config.json to begin with
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull spec                               write ./config.json
  podhull spec -b /srv/hello                 write /srv/hello/config.json")]
pub struct Arguments {
    /// Directory to write config.json to
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,

    /// Write what runc needs for a user who is not root: the host's network among it, which podhull refuses
    #[arg(long)]
    rootless: bool,
}

/// Why no specification was written.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// It never overwrites.
    #[error("{0} exists already: remove it first")]
    Exists(PathBuf),
    /// The file could not be made.
    #[error("cannot write {0}: {1}")]
    Write(PathBuf, #[source] io::Error),
}

impl Arguments {
    /// Writes the file.
    pub fn execute(self) -> Result<(), SpecError> {
        let path = self.bundle.join("config.json");
        let text = match self.rootless {
            true => Cow::Owned(document::rootless(geteuid().as_raw(), getegid().as_raw())),
            false => Cow::Borrowed(document::TEXT),
        };
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(mut file) => file.write_all(text.as_bytes()).map_err(|e| SpecError::Write(path, e)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(SpecError::Exists(path)),
            Err(error) => Err(SpecError::Write(path, error)),
        }
    }
}
