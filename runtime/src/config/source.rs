//! Where a value was set.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

/// Where a value was set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Nowhere.
    Default,
    /// An environment variable.
    Variable(&'static str),
    /// A file of the configuration.
    File {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
    /// An annotation of the pod's first container.
    Annotation(String),
}

impl fmt::Display for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => formatter.write_str("default"),
            Self::Variable(name) => write!(formatter, "${name}"),
            Self::File { path, line } => write!(formatter, "{}:{line}", path.display()),
            Self::Annotation(name) => write!(formatter, "annotation {name}"),
        }
    }
}
