//! From the text of a file to values, with an error that says where: an unknown key is one.

use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::keys::{Key, names};
use super::value::Value;
use super::{ConfigError, kata};

/// A value as a file has it.
#[derive(Debug)]
pub struct Found {
    /// What it is of.
    pub key: Key,
    /// Itself.
    pub value: Value,
    /// Counted from 1.
    pub line: usize,
}

/// Reads a file's text.
pub fn parse(path: &Path, text: &str) -> Result<Vec<Found>, ConfigError> {
    let line_at = |offset: usize| 1 + text.as_bytes()[..offset.min(text.len())].iter().filter(|b| **b == b'\n').count();
    let document = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
        path: path.to_owned(),
        line: line_at(error.span().map_or(0, |span| span.start)),
        problem: error.message().split_whitespace().collect::<Vec<_>>().join(" "),
    })?;
    let mut leaves = Vec::new();
    gather(document.get_ref(), "", &mut leaves);
    // The first mistake of the file, and not of the alphabet.
    leaves.sort_by_key(|leaf| leaf.offset);
    let found = leaves.into_iter().map(|Leaf { name, value, offset }| {
        let line = line_at(offset);
        let wrong = |problem| ConfigError::Key { path: path.to_owned(), line, key: name.clone(), problem };
        match Key::find(&name) {
            Some(key) => {
                let value = Value::of_toml(key.line().kind, value).map_err(wrong)?;
                Ok(Found { key, value, line })
            }
            None => Err(wrong(unknown(&name, value))),
        }
    });
    found.collect()
}

struct Leaf<'a> {
    /// With the names of its tables before it.
    name: String,
    value: &'a DeValue<'a>,
    offset: usize,
}

/// All that is no table, and empty tables but those that have keys of ours.
fn gather<'a>(table: &'a DeTable<'a>, parent: &str, leaves: &mut Vec<Leaf<'a>>) {
    for (key, value) in table {
        let name = match parent {
            "" => key.get_ref().to_string(),
            parent => format!("{parent}.{}", key.get_ref()),
        };
        let value: &Spanned<DeValue<'a>> = value;
        match value.get_ref() {
            DeValue::Table(inner) if !inner.is_empty() => gather(inner, &name, leaves),
            DeValue::Table(_) if is_table(&name) => {}
            value => leaves.push(Leaf { name, value, offset: key.span().start }),
        }
    }
}

/// Whether it is the name of a table of ours.
fn is_table(name: &str) -> bool {
    super::KEYS.iter().any(|line| line.name.split('.').next() == Some(name))
}

/// What to say of a key that there is not.
fn unknown(name: &str, value: &DeValue<'_>) -> String {
    if is_table(name) {
        return format!("expected a table, found {}", value.type_str());
    }
    match kata::key_of_file(name) {
        Some(key) => format!("is a key of Kata Containers; here it is {}", key.name()),
        None if kata::is_table_of_file(name) => {
            format!("is a key of Kata Containers that podhull has not; its own are {}", names())
        }
        None => format!("unknown key; there are {}", names()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<(Key, String, usize)>, String> {
        let found = parse(Path::new("/c.toml"), text).map_err(|error| error.to_string())?;
        Ok(found.into_iter().map(|found| (found.key, found.value.to_string(), found.line)).collect())
    }

    #[test]
    fn keys_are_found_with_their_lines_however_they_are_written() {
        let text = "# why\n[machine]\nmemory = 1_024\nvcpus = 0x2\nkernel = '/k'\n\n[annotations]\nallow = [\"machine.kernel\"]\n";
        let expected = [
            (Key::Memory, "1024 MiB".to_owned(), 3),
            (Key::Vcpus, "2".to_owned(), 4),
            (Key::Kernel, "/k".to_owned(), 5),
            (Key::Allow, "machine.kernel".to_owned(), 8),
        ];
        assert_eq!(read(text).unwrap(), expected);
        assert_eq!(read("machine.memory = 256").unwrap(), [(Key::Memory, "256 MiB".to_owned(), 1)]);
        assert_eq!(read("machine = { memory = 256 }").unwrap(), [(Key::Memory, "256 MiB".to_owned(), 1)]);
        assert_eq!(read("annotations.allow = []").unwrap(), [(Key::Allow, "none".to_owned(), 1)]);
        assert_eq!(read("[machine]\n[annotations]\n").unwrap(), []);
        assert_eq!(read("").unwrap(), []);
    }

    #[test]
    fn a_mistake_is_named_with_its_file_and_line() {
        for (text, expected) in [
            ("[machine]\nmemroy = 1\n", "/c.toml: line 2: machine.memroy: unknown key; there are machine.vcpus, "),
            ("memory = 1", "/c.toml: line 1: memory: unknown key; there are "),
            ("machine = 1", "/c.toml: line 1: machine: expected a table, found integer"),
            ("\n[debugging]\n", "/c.toml: line 2: debugging: unknown key; "),
            ("[machine.memory]\nmib = 1", "/c.toml: line 2: machine.memory.mib: unknown key; "),
            (
                "[machine]\nmemory = \"2Gi\"",
                "/c.toml: line 2: machine.memory: expected a whole number of MiB, found a string",
            ),
            ("[machine]\nmemory = 1", "/c.toml: line 2: machine.memory: 1 is not between 128 and 524288 MiB"),
            ("[machine]\nvcpus = -1", "/c.toml: line 2: machine.vcpus: -1 is not between 1 and 64"),
            (
                "[machine]\nvcpus = 1.5",
                "/c.toml: line 2: machine.vcpus: expected a whole number of CPUs, found a float",
            ),
            ("[machine]\nkernel = 1", "/c.toml: line 2: machine.kernel: expected a string, found an integer"),
            ("[machine]\nimage = \"img\"", "/c.toml: line 2: machine.image: \"img\" is not an absolute path"),
            (
                "annotations.allow = \"machine.memory\"",
                "/c.toml: line 1: annotations.allow: expected a list of strings, found a string",
            ),
            (
                "annotations.allow = [\"memory\"]",
                "/c.toml: line 1: annotations.allow: \"memory\" is no key; there are ",
            ),
            (
                "annotations.allow = [\"machine.guest_console\"]",
                "/c.toml: line 1: annotations.allow: machine.guest_console cannot be set by annotations",
            ),
            ("[machine]\nmemory = 256\nmemory = 512", "/c.toml: line 3: duplicate key"),
            ("[machine\nmemory = 256", "/c.toml: line 1: "),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.starts_with(expected), "{text:?}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }

    #[test]
    fn the_first_mistake_of_the_file_is_the_one_that_is_told() {
        let error = read("[zoo]\na = 1\n[apple]\nb = 2\n").unwrap_err();
        assert!(error.starts_with("/c.toml: line 2: zoo.a: "), "{error}");
    }

    #[test]
    fn a_key_of_kata_s_configuration_is_told_what_it_is_here() {
        for (text, expected) in [
            (
                "[hypervisor.qemu]\ndefault_vcpus = 1",
                "/c.toml: line 2: hypervisor.qemu.default_vcpus: is a key of Kata Containers; here it is machine.vcpus",
            ),
            (
                "[machine]\ndefault_memory = 2048",
                "/c.toml: line 2: machine.default_memory: is a key of Kata Containers; here it is machine.memory",
            ),
            (
                "[hypervisor.clh]\nenable_annotations = []",
                "/c.toml: line 2: hypervisor.clh.enable_annotations: is a key of Kata Containers; here it is annotations.allow",
            ),
            (
                "[runtime]\nsandbox_cgroup_only = true",
                "/c.toml: line 2: runtime.sandbox_cgroup_only: is a key of Kata Containers that podhull has not; its own are ",
            ),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.starts_with(expected), "{text:?}: {error}");
        }
    }
}
