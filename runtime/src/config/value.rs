//! Values of the configuration: from TOML, from the text of an annotation, and as people and programs are shown them.

use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::json;
use toml::de::DeValue;

use super::keys::{ByAnnotation, Key, Kind, names};

/// Longest list of kernel parameters in bytes: the machine has a command line of its own before them, and 2047 in all.
const MAX_PARAMS: usize = 1024;

/// A value of its key's kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A number.
    Number(u64),
    /// A number of MiB.
    Mebibytes(u64),
    /// A path.
    Path(PathBuf),
    /// A text.
    Text(String),
    /// Names of keys.
    Keys(Vec<Key>),
}

impl Value {
    /// Of a file; an error is what is wrong with it.
    pub fn of_toml(kind: Kind, value: &DeValue<'_>) -> Result<Self, String> {
        let found = |expected: &str| format!("expected {expected}, found {}", article(value.type_str()));
        match (kind, value) {
            (Kind::Cpus { .. } | Kind::Mebibytes { .. }, DeValue::Integer(number)) => {
                let parsed = i128::from_str_radix(number.as_str(), number.radix());
                Self::of_number(kind, parsed.unwrap_or(i128::MAX))
            }
            (Kind::Cpus { .. }, _) => Err(found("a whole number of CPUs")),
            (Kind::Mebibytes { .. }, _) => Err(found("a whole number of MiB")),
            (Kind::Path | Kind::Params, DeValue::String(text)) => Self::of_text(kind, text),
            (Kind::Path | Kind::Params, _) => Err(found("a string")),
            (Kind::Keys, DeValue::Array(elements)) => {
                let keys = elements.iter().map(|element| match element.get_ref() {
                    DeValue::String(name) => annotatable(name),
                    other => Err(format!("expected a list of strings, found {} in it", article(other.type_str()))),
                });
                keys.collect::<Result<_, _>>().map(Self::Keys)
            }
            (Kind::Keys, _) => Err(found("a list of strings")),
        }
    }

    /// Of an annotation.
    pub fn of_text(kind: Kind, text: &str) -> Result<Self, String> {
        match kind {
            Kind::Cpus { .. } | Kind::Mebibytes { .. } => {
                let number = text.trim().parse::<i128>();
                let number = number.map_err(|_| format!("{text:?} is not a whole number{}", unit(kind)))?;
                Self::of_number(kind, number)
            }
            Kind::Path => {
                let path = Path::new(text);
                match path.is_absolute() && !text.contains('\0') {
                    true => Ok(Self::Path(path.to_owned())),
                    false => Err(format!("{text:?} is not an absolute path")),
                }
            }
            Kind::Params => params(text).map(Self::Text),
            Kind::Keys => text.split_whitespace().map(annotatable).collect::<Result<_, _>>().map(Self::Keys),
        }
    }

    fn of_number(kind: Kind, number: i128) -> Result<Self, String> {
        let (least, most) = match kind {
            Kind::Cpus { most } => (1, most),
            Kind::Mebibytes { least, most } => (least, most),
            Kind::Path | Kind::Params | Kind::Keys => (0, u64::MAX),
        };
        match u64::try_from(number) {
            Ok(number) if (least..=most).contains(&number) => Ok(match kind {
                Kind::Mebibytes { .. } => Self::Mebibytes(number),
                _ => Self::Number(number),
            }),
            _ => Err(format!("{number} is not between {least} and {most}{}", if least > 1 { " MiB" } else { "" })),
        }
    }

    /// If it is one.
    pub fn number(&self) -> Option<u64> {
        match self {
            Self::Number(number) | Self::Mebibytes(number) => Some(*number),
            _ => None,
        }
    }

    /// If it is one.
    pub fn into_path(self) -> Option<PathBuf> {
        match self {
            Self::Path(path) => Some(path),
            _ => None,
        }
    }

    /// As programs are shown it: as it is written in a file.
    pub fn json(&self) -> serde_json::Value {
        match self {
            Self::Number(number) | Self::Mebibytes(number) => json!(number),
            Self::Path(path) => json!(path.to_string_lossy()),
            Self::Text(text) => json!(text),
            Self::Keys(keys) => json!(keys.iter().map(|key| key.name()).collect::<Vec<_>>()),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(formatter, "{number}"),
            Self::Mebibytes(number) => write!(formatter, "{number} MiB"),
            Self::Path(path) => write!(formatter, "{}", path.display()),
            Self::Text(text) => formatter.write_str(text),
            Self::Keys(keys) if keys.is_empty() => formatter.write_str("none"),
            Self::Keys(keys) => formatter.write_str(&keys.iter().map(|key| key.name()).collect::<Vec<_>>().join(" ")),
        }
    }
}

fn unit(kind: Kind) -> &'static str {
    match kind {
        Kind::Cpus { .. } => " of CPUs",
        Kind::Mebibytes { .. } => " of MiB",
        _ => "",
    }
}

fn article(word: &str) -> String {
    let article = if word.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {word}")
}

/// A key that annotations may be allowed to set.
fn annotatable(name: &str) -> Result<Key, String> {
    match Key::find(name) {
        Some(key) if key.line().annotation == ByAnnotation::Never => {
            Err(format!("{name} cannot be set by annotations"))
        }
        Some(key) => Ok(key),
        None => Err(format!("{name:?} is no key; there are {}", names())),
    }
}

/// Parameters of the guest kernel, as words with one space between them.
fn params(text: &str) -> Result<String, String> {
    if !text.chars().all(|letter| matches!(letter, ' '..='~')) {
        return Err(format!("{text:?} is not all printable ASCII"));
    }
    for word in text.split(' ') {
        let name = word.split('=').next().unwrap_or_default();
        if name.starts_with("agent.") || name.starts_with("systemd.") {
            return Err(format!("{word:?} is for the agent or the image of Kata Containers, which podhull has not"));
        }
        if matches!(name, "--" | "init" | "rdinit" | "root" | "rootfstype" | "initrd" | "maxcpus" | "nr_cpus") {
            return Err(format!("{word:?}: the machine is booted with its own"));
        }
    }
    let words = text.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
    if words.len() > MAX_PARAMS {
        return Err(format!("{} bytes of parameters are more than {MAX_PARAMS}", words.len()));
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(key: Key, text: &str) -> String {
        match Value::of_text(key.line().kind, text) {
            Ok(value) => value.to_string(),
            Err(problem) => problem,
        }
    }

    #[test]
    fn the_text_of_an_annotation_is_a_value_or_what_is_wrong_with_it() {
        for (key, given, expected) in [
            (Key::Vcpus, "4", "4"),
            (Key::Vcpus, "0", "0 is not between 1 and 64"),
            (Key::Vcpus, "65", "65 is not between 1 and 64"),
            (Key::Vcpus, "two", "\"two\" is not a whole number of CPUs"),
            (Key::Memory, " 512 ", "512 MiB"),
            (Key::Memory, "2Gi", "\"2Gi\" is not a whole number of MiB"),
            (Key::Memory, "-1", "-1 is not between 128 and 524288 MiB"),
            (Key::Kernel, "/boot/vmlinux", "/boot/vmlinux"),
            (Key::Kernel, "vmlinux", "\"vmlinux\" is not an absolute path"),
            (Key::KernelParams, " a=b  c ", "a=b c"),
            (Key::KernelParams, "a\nb", "\"a\\nb\" is not all printable ASCII"),
            (Key::KernelParams, "a init=/bin/sh", "\"init=/bin/sh\": the machine is booted with its own"),
            (Key::KernelParams, "a -- b", "\"--\": the machine is booted with its own"),
            (
                Key::KernelParams,
                "agent.log=debug",
                "\"agent.log=debug\" is for the agent or the image of Kata Containers, which podhull has not",
            ),
        ] {
            assert_eq!(text(key, given), expected, "{given:?}");
        }
        assert!(text(Key::KernelParams, &"a ".repeat(600)).contains("more than 1024"));
    }
}
