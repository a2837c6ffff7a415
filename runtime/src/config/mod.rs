//! What the administrator of a host may decide, and a pod for itself (design D16): `/etc/podhull/config.toml`, the files of
//! `/etc/podhull/config.d`, the file of a runtime class, and annotations. Without any of them everything works.
//!
//! `keys` is the table of all keys, `value` what they may be; `file` finds the files and trusts them, `parse` reads them, and
//! `annotations` lays what a pod asks for over them. `kata` has the words of Kata Containers, and `sandbox` what CRI's runtimes
//! say of a pod in advance.

mod annotations;
mod file;
mod kata;
mod keys;
#[cfg(test)]
mod page;
mod parse;
mod sandbox;
mod source;
mod value;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::pod::{IMAGE, KERNEL, LIBRARY, Sizing, host_cpus, host_memory, library_file};
pub use annotations::{PREFIX, check_member};
pub use kata::PREFIX as KATA_PREFIX;
pub use keys::{KEYS, Key};
pub use sandbox::{is_of_cri_o, is_of_pod, is_sandbox};
pub use source::Source;
use value::Value;

/// Where the files are.
const DIRECTORY: &str = "/etc/podhull";

/// Annotations of a container.
pub type Annotations = HashMap<String, String>;

const MIB: u64 = 1 << 20;

/// What is wrong with the configuration, or with an annotation.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file or directory that is there cannot be read.
    #[error("{0}: cannot be read: {1}")]
    Read(PathBuf, #[source] Errno),
    /// Whoever it belongs to could change what root runs.
    #[error("{0}: belongs to user {1}: the configuration has to be root's (chown root)")]
    Owner(PathBuf, u32),
    /// The same.
    #[error("{0}: others than root may write it (mode {1:04o}): chmod go-w")]
    Writable(PathBuf, u32),
    /// A directory, a device, a pipe.
    #[error("{0}: is not a regular file")]
    NotAFile(PathBuf),
    /// No configuration is that long.
    #[error("{0}: is longer than {max} bytes", max = file::MAX_FILE)]
    TooLong(PathBuf),
    /// Not TOML.
    #[error("{path}: line {line}: {problem}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What the parser says.
        problem: String,
    },
    /// A key that there is not, or that cannot have this value.
    #[error("{path}: line {line}: {key}: {problem}")]
    Key {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// As written, with its table.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Two values that exclude each other.
    #[error("{key} ({source_of_key}): {problem}")]
    Value {
        /// The key that asks for too much.
        key: &'static str,
        /// Where it was set.
        source_of_key: Source,
        /// What is wrong with it.
        problem: String,
    },
    /// An annotation that there is not, that is not allowed, or that cannot have this value.
    #[error("annotation {name}: {problem}")]
    Annotation {
        /// Its whole name.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// A value and where it was set.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    value: Value,
    source: Source,
}

/// What is in force. What nobody has set is not in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config(BTreeMap<Key, Entry>);

/// A line of `config show`.
#[derive(Debug, Serialize)]
pub struct Shown {
    /// Name of the key.
    pub key: &'static str,
    /// Its value; none where there is no limit, or nothing.
    pub value: Option<serde_json::Value>,
    /// The same for people.
    #[serde(skip)]
    pub text: String,
    /// Where it was set.
    pub from: Source,
}

/// What a machine is made with. Whoever makes a pod finds it out once, so that what changes later is for later pods.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// What its size depends on.
    pub sizing: Sizing,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The guest image.
    pub image: PathBuf,
    /// More for the guest kernel's command line.
    pub kernel_params: String,
    /// Directory for what the guest kernel prints.
    pub guest_console: Option<PathBuf>,
    /// Whether the administrator may look into the guest.
    #[serde(default)]
    pub debug: bool,
}

impl Config {
    /// What the files of this host say.
    pub fn read() -> Result<Self, ConfigError> {
        Self::read_with(None)
    }

    /// What the files of this host say, and after them the file of a runtime class.
    pub fn read_with(class: Option<&Path>) -> Result<Self, ConfigError> {
        let mut config = file::read(Path::new(DIRECTORY), 0)?;
        if let Some(class) = class {
            file::read_class(&mut config, class, 0)?;
        }
        if std::env::var_os(LIBRARY).is_some_and(|directory| !directory.is_empty()) {
            for (key, name) in [(Key::Kernel, KERNEL), (Key::Image, IMAGE)] {
                config.set(key, Value::Path(library_file(name)), Source::Variable(LIBRARY));
            }
        }
        config.check()?;
        Ok(config)
    }

    /// What is in force for a pod of its own with these annotations.
    pub fn with(self, annotations: &Annotations) -> Result<Self, ConfigError> {
        annotations::apply(self, annotations, Host { memory: host_memory(), vcpus: u64::from(host_cpus()) })
    }

    fn set(&mut self, key: Key, value: Value, source: Source) {
        self.0.insert(key, Entry { value, source });
    }

    /// That no value excludes another.
    fn check(&self) -> Result<(), ConfigError> {
        for (key, max) in [(Key::Vcpus, Key::MaxVcpus), (Key::Memory, Key::MaxMemory)] {
            let (Some(entry), Some(most)) = (self.0.get(&key), self.0.get(&max)) else { continue };
            if entry.value.number() > most.value.number() {
                let problem = format!("{} is more than {}, {}", entry.value, max.name(), most.describe());
                return Err(match &entry.source {
                    Source::Annotation(name) => ConfigError::Annotation { name: name.clone(), problem },
                    source => ConfigError::Value { key: key.name(), source_of_key: source.clone(), problem },
                });
            }
        }
        Ok(())
    }

    /// The files that something of this is from.
    pub fn files(&self) -> BTreeSet<&Path> {
        let files = self.0.values().filter_map(|entry| match &entry.source {
            Source::File { path, .. } => Some(path.as_path()),
            _ => None,
        });
        files.collect()
    }

    /// Every key, in the order of the table.
    pub fn show(&self) -> Vec<Shown> {
        let shown = |line: &keys::Line| match self.0.get(&line.key) {
            Some(Entry { value, source }) => {
                Shown { key: line.name, value: Some(value.json()), text: value.to_string(), from: source.clone() }
            }
            None => {
                let value = self.default_of(line.key);
                let text = value.as_ref().map_or_else(|| line.unset.to_owned(), ToString::to_string);
                Shown { key: line.name, value: value.as_ref().map(Value::json), text, from: Source::Default }
            }
        };
        KEYS.iter().map(shown).collect()
    }

    /// What a key is that nobody has set, if that is a value of its own.
    fn default_of(&self, key: Key) -> Option<Value> {
        match key {
            Key::Memory => {
                let most = self.number(Key::MaxMemory).unwrap_or(u64::MAX);
                Some(Value::Mebibytes((Sizing::DEFAULT_MEMORY / MIB).min(most)))
            }
            Key::Kernel => Some(Value::Path(library_file(KERNEL))),
            Key::Image => Some(Value::Path(library_file(IMAGE))),
            Key::Allow => Some(Value::Keys(keys::allowed_by_default().collect())),
            Key::Vcpus | Key::MaxVcpus | Key::MaxMemory | Key::KernelParams | Key::GuestConsole | Key::DebugShell => {
                None
            }
        }
    }

    fn get(&self, key: Key) -> Option<Value> {
        self.0.get(&key).map(|entry| entry.value.clone()).or_else(|| self.default_of(key))
    }

    fn number(&self, key: Key) -> Option<u64> {
        self.0.get(&key).and_then(|entry| entry.value.number())
    }

    fn path(&self, key: Key) -> Option<PathBuf> {
        self.get(key).and_then(Value::into_path)
    }

    /// The guest kernel.
    pub fn kernel(&self) -> PathBuf {
        self.path(Key::Kernel).unwrap_or_default()
    }

    /// The guest image.
    pub fn image(&self) -> PathBuf {
        self.path(Key::Image).unwrap_or_default()
    }

    /// Where what guest kernels print is kept.
    pub fn guest_console(&self) -> Option<PathBuf> {
        self.path(Key::GuestConsole)
    }

    /// The administrator's shell in guests.
    pub fn debug_shell(&self) -> Option<PathBuf> {
        self.path(Key::DebugShell)
    }

    /// What a machine is made with, for a pod whose first container has these annotations; see [`Self::with`].
    fn settings(&self, annotations: &Annotations) -> Result<Settings, ConfigError> {
        let cpus = |key| self.number(key).and_then(|number| u32::try_from(number).ok());
        let bytes = |key| self.number(key).map(|mebibytes| mebibytes * MIB);
        // What a pod asks for itself it has at least, whatever its containers' limits are.
        let asked = |key| self.0.get(&key).is_some_and(|entry| matches!(entry.source, Source::Annotation(_)));
        let sizing = Sizing {
            memory: bytes(Key::Memory),
            cpus: cpus(Key::Vcpus),
            max_memory: bytes(Key::MaxMemory),
            max_cpus: cpus(Key::MaxVcpus),
            least_memory: bytes(Key::Memory).filter(|_| asked(Key::Memory)),
            least_cpus: cpus(Key::Vcpus).filter(|_| asked(Key::Vcpus)),
            // What the group has that it is in is no setting.
            room: None,
            expected: sandbox::expected(annotations)?,
        };
        Ok(Settings {
            sizing,
            kernel: self.kernel(),
            image: self.image(),
            kernel_params: self.get(Key::KernelParams).map(|value| value.to_string()).unwrap_or_default(),
            guest_console: self.guest_console(),
            debug: self.debug_shell().is_some(),
        })
    }
}

impl Entry {
    /// The value, and where it was set.
    fn describe(&self) -> String {
        format!("{} ({})", self.value, self.source)
    }
}

impl Settings {
    /// What the machine of a pod is made with whose first container has these annotations, and whose runtime class this file.
    pub fn for_pod(annotations: &Annotations, class: Option<&Path>) -> Result<Self, ConfigError> {
        Config::read_with(class)?.with(annotations)?.settings(annotations)
    }
}

/// What there is on this host, in bytes and CPUs.
#[derive(Debug, Clone, Copy)]
struct Host {
    memory: u64,
    vcpus: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(given: &[(Key, Value)]) -> Config {
        let mut config = Config::default();
        for (line, (key, value)) in given.iter().enumerate() {
            config.set(*key, value.clone(), Source::File { path: "/c.toml".into(), line: line + 1 });
        }
        config
    }

    #[test]
    fn a_default_above_its_maximum_is_refused_unless_nobody_set_it() {
        let config = file(&[(Key::MaxMemory, Value::Mebibytes(1024)), (Key::Memory, Value::Mebibytes(2048))]);
        let expected = "machine.memory (/c.toml:2): 2048 MiB is more than machine.max_memory, 1024 MiB (/c.toml:1)";
        assert_eq!(config.check().unwrap_err().to_string(), expected);
        let config = file(&[(Key::MaxMemory, Value::Mebibytes(1024))]);
        config.check().unwrap();
        assert_eq!(config.show()[Key::Memory as usize].text, "1024 MiB");
    }

    #[test]
    fn settings_are_those_of_the_pod_and_a_floor_is_only_what_it_asks_for_itself() {
        let config = file(&[
            (Key::Memory, Value::Mebibytes(512)),
            (Key::MaxVcpus, Value::Number(4)),
            (Key::Kernel, Value::Path("/k".into())),
            (Key::GuestConsole, Value::Path("/var/log".into())),
        ]);
        let name = "io.kubernetes.cri.sandbox-memory".to_owned();
        let settings = config.clone().settings(&Annotations::from([(name, "1048576".into())])).unwrap();
        let sizing = Sizing {
            memory: Some(512 * MIB),
            max_cpus: Some(4),
            expected: crate::pod::Demand::expected(1 << 20, 0, 0),
            ..Sizing::default()
        };
        assert_eq!(settings.sizing, sizing);
        assert_eq!((settings.kernel, settings.guest_console), ("/k".into(), Some("/var/log".into())));
        let asked = Annotations::from([("io.podhull.machine.memory".into(), "256".into())]);
        let sizing = config.with(&asked).unwrap().settings(&asked).unwrap().sizing;
        assert_eq!((sizing.memory, sizing.least_memory), (Some(256 * MIB), Some(256 * MIB)));
        let text = serde_json::to_string(&sizing).unwrap();
        assert_eq!(serde_json::from_str::<Sizing>(&text).unwrap(), sizing);
    }
}
