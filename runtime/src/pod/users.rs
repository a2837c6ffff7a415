//! The users of a container with a user namespace: its own, or those of another container of its pod.
//!
//! A container's shadow is in no user namespace but that of the host: what it does for the container takes the host's root, and the
//! container's users are the guest's. So `/proc/<pid>/ns/user` of a shadow is the host's for all of them, and what is meant by it
//! is told by whose it is.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::{fs, io};

use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder, LinuxNamespaceType};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::user_namespace::with_user_namespace;
use crate::spec::Config;
use crate::state::Known;

/// Which users of the container are which of the guest, and so of the host's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Users {
    /// Of users.
    pub uid_mappings: Vec<LinuxIdMapping>,
    /// Of groups.
    pub gid_mappings: Vec<LinuxIdMapping>,
    /// The host's user namespace that was named for them, by device and inode. The container's shadow holds it open as long as it
    /// lives, so that no other gets its number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<(u64, u64)>,
}

impl Users {
    /// Those of a specification with a user namespace.
    pub fn of(config: &Config) -> Option<Self> {
        let linux = config.spec().linux().as_ref()?;
        let mapped = linux.namespaces().iter().flatten().any(|one| one.typ() == LinuxNamespaceType::User);
        mapped.then(|| Self {
            uid_mappings: linux.uid_mappings().clone().unwrap_or_default(),
            gid_mappings: linux.gid_mappings().clone().unwrap_or_default(),
            namespace: None,
        })
    }

    /// Those of a user namespace of the host, made by whoever asks for the container.
    pub fn of_namespace(namespace: &OwnedFd) -> io::Result<Self> {
        let stat = rustix::fs::fstat(namespace)?;
        with_user_namespace(Some(namespace), |process| {
            let read = |file| mappings(&fs::read_to_string(format!("/proc/{process}/{file}"))?);
            Ok(Self {
                uid_mappings: read("uid_map")?,
                gid_mappings: read("gid_map")?,
                namespace: Some((stat.st_dev, stat.st_ino)),
            })
        })
    }
}

/// `user_namespaces(7)`: lines of the first inside, the first outside, and how many.
fn mappings(text: &str) -> io::Result<Vec<LinuxIdMapping>> {
    let wrong = || io::Error::other(format!("cannot read the mappings {text:?}"));
    let line = |line: &str| {
        let numbers: Vec<u32> = line.split_ascii_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
        let &[inside, outside, size] = &numbers[..] else { return None };
        LinuxIdMappingBuilder::default().container_id(inside).host_id(outside).size(size).build().ok()
    };
    match text.lines().map(line).collect::<Option<Vec<_>>>() {
        Some(mappings) if !mappings.is_empty() => Ok(mappings),
        _ => Err(wrong()),
    }
}

/// A path that names a user namespace.
pub struct Named {
    /// The directory it is in, if there is one: held, so that it keeps its number.
    directory: Option<OwnedFd>,
    number: (u64, u64),
}

impl Named {
    /// What a path names that was opened.
    pub fn new(path: &Path, namespace: &OwnedFd) -> io::Result<Self> {
        let stat = rustix::fs::fstat(namespace)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = path.parent().and_then(|parent| rustix::fs::open(parent, flags, Mode::empty()).ok());
        Ok(Self { directory, number: (stat.st_dev, stat.st_ino) })
    }

    /// Whether it is that of a container: the link of its shadow's process, or what was named for it too.
    pub fn is_of(&self, known: &Known) -> bool {
        // Held while the number is used, so that it is not another's.
        let Some(_process) = known.process() else { return false };
        let theirs = rustix::fs::stat(format!("/proc/{}/ns", known.state.process.pid));
        let directory = self.directory.as_ref().map(rustix::fs::fstat);
        if let (Some(Ok(directory)), Ok(theirs)) = (directory, theirs)
            && (directory.st_dev, directory.st_ino) == (theirs.st_dev, theirs.st_ino)
        {
            return true;
        }
        known.state.users.as_ref().is_some_and(|users| users.namespace == Some(self.number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read_as_the_kernel_writes_them() {
        let read = mappings("         0     100000      65536\n     65536          0          1\n").unwrap();
        let read: Vec<_> = read.iter().map(|one| (one.container_id(), one.host_id(), one.size())).collect();
        assert_eq!(read, [(0, 100_000, 65_536), (65_536, 0, 1)]);
        for text in ["", "0 1", "0 1 2 3", "0 1 x", "0 0 4294967296"] {
            assert!(mappings(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_namespace_has_the_mappings_it_was_made_with() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let asked = mappings("0 5000 10\n").unwrap();
        let namespace = super::super::user_namespace::user_namespace(&asked, &asked).unwrap();
        let users = Users::of_namespace(&namespace).unwrap();
        assert_eq!((&users.uid_mappings, &users.gid_mappings), (&asked, &asked));
        let named = Named::new(Path::new("/proc/self/ns/user"), &namespace).unwrap();
        assert_eq!(users.namespace, Some(named.number));
    }
}
