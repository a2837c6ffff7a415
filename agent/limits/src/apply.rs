//! Writing limits into a control group.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::resources::Resources;
use crate::settings::{Setting, Unenforceable, Weight, settings};

/// Of `errno(3)`: a number beyond what the file takes.
const ERANGE: i32 = 34;

/// Limits that were not set.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// No kernel would.
    #[error(transparent)]
    Unenforceable(#[from] Unenforceable),
    /// This kernel has no such file.
    #[error("{path}: the kernel has no such control file; {needed_for} cannot be enforced")]
    NoControl {
        /// The file.
        path: PathBuf,
        /// The field of the specification.
        needed_for: &'static str,
    },
    /// This kernel does not take the value.
    #[error("{field}: the kernel does not take {value:?} ({path}: {source})")]
    Refused {
        /// The field of the specification.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// The value.
        value: String,
        /// Why.
        source: io::Error,
    },
}

impl LimitError {
    /// Whether the specification is at fault, not the machine.
    pub fn is_invalid(&self) -> bool {
        match self {
            Self::Unenforceable(_) | Self::NoControl { .. } => true,
            Self::Refused { source, .. } => {
                source.kind() == io::ErrorKind::InvalidInput || source.raw_os_error() == Some(ERANGE)
            }
        }
    }
}

/// Sets the limits of the control group at `group`, all of them or none.
pub fn apply(group: &Path, limits: &Resources, weight: Weight) -> Result<(), LimitError> {
    let current = |file: &str| std::fs::read_to_string(group.join(file)).ok();
    let mut before = Vec::new();
    for setting in settings(limits, weight, current)? {
        if let Err(error) = set(group, &setting, &mut before) {
            for (path, value) in before.iter().rev() {
                // The reason is the error to tell.
                let _ = write(path, if value.is_empty() { "\n" } else { value });
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Writes one setting, and notes what was there if that can be written back: files of one value.
fn set(group: &Path, setting: &Setting, before: &mut Vec<(PathBuf, String)>) -> Result<(), LimitError> {
    for choice in &setting.choices {
        let path = group.join(choice.file.as_ref());
        let there = std::fs::read_to_string(&path).ok().filter(|text| text.lines().count() == 1);
        match write(&path, &choice.value) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if setting.repeated && error.kind() == io::ErrorKind::InvalidInput => return Ok(()),
            Err(source) => {
                let (field, value) = (setting.needed_for, choice.value.clone());
                return Err(LimitError::Refused { field, path, value, source });
            }
            Ok(()) => {
                before.extend(there.map(|text| (path, text.trim_end().to_owned())));
                return Ok(());
            }
        }
    }
    if setting.optional {
        return Ok(());
    }
    let file = setting.choices.last().map(|choice| choice.file.as_ref()).unwrap_or_default();
    Err(LimitError::NoControl { path: group.join(file), needed_for: setting.needed_for })
}

/// Without O_CREAT and O_TRUNC, and in one write: each is one change to the kernel.
fn write(path: &Path, value: &str) -> io::Result<()> {
    std::fs::OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}
