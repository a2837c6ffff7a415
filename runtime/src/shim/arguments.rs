//! The command line of shims: Go's flags, and a word for what to do (containerd, `pkg/shim/shim.go`).

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

/// What is wrong with it.
#[derive(Debug, thiserror::Error)]
pub enum ArgumentError {
    /// Not one of ours, nor of containerd's.
    #[error("unknown argument {0:?}: containerd starts this program by itself; see docs/containerd.md")]
    Unknown(OsString),
    /// A flag at the end.
    #[error("-{0} needs a value")]
    NoValue(String),
    /// Nothing to name things by.
    #[error("-{0} is missing: containerd starts this program by itself; see docs/containerd.md")]
    Missing(&'static str),
    /// It becomes part of paths.
    #[error("-{0} {1:?}: expected 1 to 128 letters, digits, \"_\", \"-\" and \".\", not \".\" or \"..\"")]
    NoName(&'static str, String),
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// `-v`.
    Version,
    /// `-info`.
    Info,
    /// Make the process of a pod, or find it, and print its address.
    Start,
    /// Remove what is left of a container whose shim is gone.
    Delete,
    /// Be the process of a pod.
    Serve,
}

/// The command line.
#[derive(Debug)]
pub struct Arguments {
    /// What to do.
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// The container.
    pub id: String,
    /// Where containerd listens.
    pub address: String,
    /// Directory of the bundle; for `delete`, which has another working directory.
    pub bundle: Option<PathBuf>,
    /// File with the configuration of the pod's runtime class: `start` tells it to the process, and nobody else.
    pub class: Option<PathBuf>,
    /// Say what is done.
    pub debug: bool,
}

impl Arguments {
    /// Reads it; the first word is the program's name.
    pub fn read(words: impl Iterator<Item = OsString>) -> Result<Self, ArgumentError> {
        let mut read = Self {
            action: Action::Serve,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            bundle: None,
            class: None,
            debug: false,
        };
        let mut words = words.skip(1);
        while let Some(word) = words.next() {
            let unknown = || ArgumentError::Unknown(word.clone());
            let text = word.to_str().ok_or_else(unknown)?;
            let Some(flag) = text.strip_prefix("--").or_else(|| text.strip_prefix('-')) else {
                read.action = match text {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    _ => return Err(unknown()),
                };
                continue;
            };
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(OsString::from(value))),
                None => (flag, None),
            };
            match name {
                "debug" => read.debug = value.as_deref().is_none_or(|value| value == OsStr::new("true")),
                "v" | "info" => {
                    read.action = if name == "v" { Action::Version } else { Action::Info };
                    return Ok(read);
                }
                "namespace" | "id" | "address" | "bundle" | "publish-binary" | "socket" | "class" => {
                    let value = value.or_else(|| words.next()).ok_or_else(|| ArgumentError::NoValue(name.into()))?;
                    let text =
                        || value.to_str().map(str::to_owned).ok_or_else(|| ArgumentError::Unknown(value.clone()));
                    match name {
                        "namespace" => read.namespace = text()?,
                        "id" => read.id = text()?,
                        "address" => read.address = text()?,
                        "bundle" => read.bundle = Some(value.into()),
                        "class" => read.class = Some(value.into()),
                        // The former is how shims that cannot speak ttrpc tell of events, the latter another way to name ours.
                        _ => {}
                    }
                }
                _ => return Err(unknown()),
            }
        }
        for (flag, value) in [("namespace", &read.namespace), ("id", &read.id)] {
            if value.is_empty() {
                return Err(ArgumentError::Missing(flag));
            }
            let valid = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
            if value.len() > 128 || value == "." || value == ".." || !value.chars().all(valid) {
                return Err(ArgumentError::NoName(flag, value.chars().take(200).collect()));
            }
        }
        Ok(read)
    }
}

/// What `-v` prints.
pub fn version() -> Vec<u8> {
    let name = std::env::args_os().next().unwrap_or_default();
    format!("{}:\n  Version:  {}\n", name.to_string_lossy(), env!("CARGO_PKG_VERSION")).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Arguments, ArgumentError> {
        Arguments::read(line.split(' ').map(OsString::from))
    }

    #[test]
    fn the_lines_of_containerd_and_cri_o_are_read() {
        let start = read("shim -namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/c -id a1 -debug start");
        let start = start.unwrap();
        assert_eq!((start.action, &*start.namespace, &*start.id), (Action::Start, "k8s.io", "a1"));
        assert_eq!((&*start.address, start.debug), ("/run/c.sock", true));
        let words = ["s", "-namespace", "default", "-address", "", "-publish-binary", "/c", "-id", "b", "start"];
        let from_cri_o = Arguments::read(words.iter().map(OsString::from)).unwrap();
        assert_eq!((from_cri_o.action, &*from_cri_o.address), (Action::Start, ""));
        let delete = read("s -namespace n -address a -publish-binary p -id i -bundle /b delete").unwrap();
        assert_eq!((delete.action, delete.bundle), (Action::Delete, Some("/b".into())));
        assert_eq!(read("s -v").unwrap().action, Action::Version);
        assert_eq!(read("s -info").unwrap().action, Action::Info);
        assert_eq!(read("s -namespace=n --id=i").unwrap().action, Action::Serve);
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (line, word) in [
            ("s -frob -id i", "-frob"),
            ("s -id", "-id needs a value"),
            ("s -namespace n start", "-id is missing"),
            ("s -namespace ../x -id i start", "../x"),
            ("s -namespace n -id .. start", ".."),
            ("s -namespace n -id i stop", "stop"),
        ] {
            let error = read(line).unwrap_err().to_string();
            assert!(error.contains(word), "{line}: {error}");
        }
    }
}
