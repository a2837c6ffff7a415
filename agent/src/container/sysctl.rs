//! `linux.sysctl`.

use std::collections::BTreeMap;
use std::io;

use super::namespaces::Namespaces;

/// A sysctl that cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    #[error("linux.sysctl: {key}: it is not in a separate kernel namespace")]
    NotSeparate { key: String },
    #[error("linux.sysctl: {key}: set it by the field {field}")]
    OwnField { key: String, field: &'static str },
    #[error("linux.sysctl: {key}: expected a name such as net.ipv4.ip_forward")]
    Name { key: String },
    #[error("linux.sysctl: write {value:?} to {key}: {source}")]
    Write { key: String, value: String, source: io::Error },
}

impl SysctlError {
    /// Whether the specification is at fault, not the machine.
    pub fn is_invalid(&self) -> bool {
        match self {
            Self::Write { source, .. } => {
                matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput)
            }
            _ => true,
        }
    }
}

/// Keys that belong to an IPC namespace.
const IPC: [&str; 8] = [
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
    "kernel/shm_rmid_forced",
];

/// The path below `/proc/sys` of every key, if each may be set: it must belong to a namespace of the container's own.
pub fn check(
    sysctl: &BTreeMap<String, String>,
    namespaces: Namespaces,
) -> Result<Vec<(String, &str, &str)>, SysctlError> {
    let has = |flag: libc::c_int| namespaces.clone_flags & u64::from(flag.unsigned_abs()) != 0;
    let mut paths = Vec::new();
    for (key, value) in sysctl {
        let path = path_of(key).ok_or_else(|| SysctlError::Name { key: key.clone() })?;
        let separate = if path == "kernel/hostname" {
            return Err(SysctlError::OwnField { key: key.clone(), field: "hostname" });
        } else if path == "kernel/domainname" {
            has(libc::CLONE_NEWUTS)
        } else if path.starts_with("net/") {
            has(libc::CLONE_NEWNET)
        } else if IPC.contains(&path.as_str()) || path.starts_with("fs/mqueue/") {
            has(libc::CLONE_NEWIPC)
        } else {
            false
        };
        if !separate {
            return Err(SysctlError::NotSeparate { key: key.clone() });
        }
        paths.push((path, key.as_str(), value.as_str()));
    }
    Ok(paths)
}

/// Sets them, through the guest's own `/proc`: the tables of the process's namespaces appear there, and the container has no
/// say in it.
pub fn write(paths: &[(String, &str, &str)]) -> Result<(), SysctlError> {
    for (path, key, value) in paths {
        std::fs::write(format!("/proc/sys/{path}"), value).map_err(|source| SysctlError::Write {
            key: (*key).into(),
            value: (*value).into(),
            source,
        })?;
    }
    Ok(())
}

/// Keys are written with dots or with slashes; whichever comes first separates, and the other is part of a name
/// (`sysctl.d(5)`).
fn path_of(key: &str) -> Option<String> {
    let path: String = match key.find(['.', '/'])? {
        first if key.as_bytes()[first] == b'/' => key.into(),
        _ => key
            .chars()
            .map(|c| {
                if c == '.' {
                    '/'
                } else if c == '/' {
                    '.'
                } else {
                    c
                }
            })
            .collect(),
    };
    path.split('/').all(|part| !part.is_empty() && part != "." && part != "..").then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Namespaces = Namespaces {
        shared_flags: 0,
        clone_flags: (libc::CLONE_NEWIPC | libc::CLONE_NEWNET | libc::CLONE_NEWUTS) as u64,
        user: false,
        cgroup: false,
        time: false,
    };
    const NONE: Namespaces = Namespaces { clone_flags: 0, ..ALL };

    fn one(key: &str) -> BTreeMap<String, String> {
        BTreeMap::from([(key.to_owned(), "1".to_owned())])
    }

    #[test]
    fn both_ways_of_writing_a_key_mean_the_same() {
        assert_eq!(path_of("net.ipv4.conf.eth0/1.forwarding").unwrap(), "net/ipv4/conf/eth0.1/forwarding");
        assert_eq!(path_of("net/ipv4/conf/eth0.1/forwarding").unwrap(), "net/ipv4/conf/eth0.1/forwarding");
    }

    #[test]
    fn a_key_cannot_leave_its_directory() {
        for key in ["net.ipv4.//.kernel", "net/../kernel/panic", "net", "net..x"] {
            assert!(path_of(key).is_none(), "{key}");
        }
    }

    #[test]
    fn a_key_needs_a_namespace_that_holds_it() {
        for key in ["net.ipv4.ip_forward", "kernel.shmmax", "fs.mqueue.msg_max", "kernel.domainname"] {
            assert!(check(&one(key), ALL).is_ok(), "{key}");
            assert!(matches!(check(&one(key), NONE), Err(SysctlError::NotSeparate { .. })), "{key}");
        }
        assert!(matches!(check(&one("kernel.panic"), ALL), Err(SysctlError::NotSeparate { .. })));
        assert!(matches!(check(&one("kernel.hostname"), ALL), Err(SysctlError::OwnField { .. })));
    }
}
