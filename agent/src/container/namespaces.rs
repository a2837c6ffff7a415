//! Namespaces of a container.

use std::io;
use std::os::fd::AsRawFd;

use rustix::process::Pid;

use crate::spec::{IdMapping, Spec};

/// Namespaces that cannot be made as given.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    #[error("linux.namespaces: expected mount, pid, network, ipc, uts, user, cgroup or time, not {0:?}")]
    Unknown(String),
    #[error("linux.namespaces: {0} is there twice")]
    Twice(String),
    #[error("linux.namespaces: {kind} with the path {path:?}: joining a namespace by path is not supported")]
    Path { kind: String, path: String },
    #[error("{field} needs a {kind} namespace in linux.namespaces")]
    Missing { field: &'static str, kind: &'static str },
    #[error("linux.namespaces: user needs uidMappings and gidMappings")]
    NoMappings,
    #[error("shared namespace: expected network, ipc, uts, pid or user, not {0:?}")]
    NotShared(String),
    #[error("shared namespace: {0} is not in linux.namespaces, or there twice")]
    SharedMissing(String),
    #[error("linux.timeOffsets: expected monotonic or boottime, not {0:?}")]
    UnknownClock(String),
    #[error("linux.{field}: write the mappings: {source}")]
    Mappings { field: &'static str, source: io::Error },
}

/// What of the namespaces is made by which step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Namespaces {
    /// Flags for `clone3`.
    pub clone_flags: u64,
    /// Those of them that are another container's, or the pod's.
    pub shared_flags: u64,
    pub user: bool,
    /// Made by the container's init for itself: its root is the cgroup it is in, and a clone is moved there only after its
    /// namespaces are made.
    pub cgroup: bool,
    /// Made by the init, because its clocks can be set only before a process is in it.
    pub time: bool,
}

impl Namespaces {
    /// Checks the namespaces and everything that needs one of them.
    pub fn of(spec: &Spec) -> Result<Self, NamespaceError> {
        let linux = &spec.linux;
        let mut namespaces = Self { clone_flags: 0, shared_flags: 0, user: false, cgroup: false, time: false };
        let mut seen: Vec<&str> = Vec::new();
        for namespace in &linux.namespaces {
            let kind = namespace.kind.as_str();
            let flag = match kind {
                "mount" => libc::CLONE_NEWNS,
                "pid" => libc::CLONE_NEWPID,
                "network" => libc::CLONE_NEWNET,
                "ipc" => libc::CLONE_NEWIPC,
                "uts" => libc::CLONE_NEWUTS,
                "user" => libc::CLONE_NEWUSER,
                "cgroup" | "time" => 0,
                _ => return Err(NamespaceError::Unknown(kind.into())),
            };
            if seen.contains(&kind) {
                return Err(NamespaceError::Twice(kind.into()));
            }
            if !namespace.path.is_empty() {
                return Err(NamespaceError::Path { kind: kind.into(), path: namespace.path.clone() });
            }
            seen.push(kind);
            namespaces.clone_flags |= u64::from(flag.unsigned_abs());
            namespaces.user |= kind == "user";
            namespaces.cgroup |= kind == "cgroup";
            namespaces.time |= kind == "time";
        }
        let mapped = !linux.uid_mappings.is_empty() && !linux.gid_mappings.is_empty();
        if namespaces.user && !mapped {
            return Err(NamespaceError::NoMappings);
        }
        for (field, given, kind) in [
            ("linux.uidMappings", !linux.uid_mappings.is_empty(), "user"),
            ("linux.gidMappings", !linux.gid_mappings.is_empty(), "user"),
            ("linux.timeOffsets", !linux.time_offsets.is_empty(), "time"),
            ("hostname", !spec.hostname.is_empty(), "uts"),
            ("domainname", !spec.domainname.is_empty(), "uts"),
            ("linux.maskedPaths", !linux.masked_paths.is_empty(), "mount"),
            ("linux.readonlyPaths", !linux.readonly_paths.is_empty(), "mount"),
            ("mounts", !spec.mounts.is_empty(), "mount"),
            ("root.readonly", spec.root.as_ref().is_some_and(|root| root.readonly), "mount"),
        ] {
            if given && !seen.contains(&kind) {
                return Err(NamespaceError::Missing { field, kind });
            }
        }
        if let Some(clock) = linux.time_offsets.keys().find(|clock| !matches!(clock.as_str(), "monotonic" | "boottime"))
        {
            return Err(NamespaceError::UnknownClock(clock.clone()));
        }
        Ok(namespaces)
    }

    /// One of them is another container's.
    pub fn share(&mut self, kind: &str) -> Result<(), NamespaceError> {
        let flag = shared_flag(kind)?;
        if self.clone_flags & flag == 0 || self.shared_flags & flag != 0 {
            return Err(NamespaceError::SharedMissing(kind.into()));
        }
        self.shared_flags |= flag;
        Ok(())
    }

    /// Whether its users are another container's.
    pub fn has_users_of_another(&self) -> bool {
        self.shared_flags & u64::from(libc::CLONE_NEWUSER.unsigned_abs()) != 0
    }

    /// Whether its network is its own.
    pub fn has_own_network(&self) -> bool {
        self.clone_flags & !self.shared_flags & u64::from(libc::CLONE_NEWNET.unsigned_abs()) != 0
    }
}

/// The flag of a type that containers of a pod may share.
pub fn shared_flag(kind: &str) -> Result<u64, NamespaceError> {
    let flag = match kind {
        "network" => libc::CLONE_NEWNET,
        "ipc" => libc::CLONE_NEWIPC,
        "uts" => libc::CLONE_NEWUTS,
        "pid" => libc::CLONE_NEWPID,
        "user" => libc::CLONE_NEWUSER,
        _ => return Err(NamespaceError::NotShared(kind.into())),
    };
    Ok(u64::from(flag.unsigned_abs()))
}

/// Maps the users and groups of a new user namespace, from outside.
pub fn write_mappings(pid: Pid, spec: &Spec) -> Result<(), NamespaceError> {
    let write = |file: &str, field, mappings: &[IdMapping]| {
        let lines: String = mappings.iter().map(|m| format!("{} {} {}\n", m.container_id, m.host_id, m.size)).collect();
        std::fs::write(format!("/proc/{}/{file}", pid.as_raw_nonzero()), lines)
            .map_err(|source| NamespaceError::Mappings { field, source })
    };
    write("uid_map", "uidMappings", &spec.linux.uid_mappings)?;
    write("gid_map", "gidMappings", &spec.linux.gid_mappings)
}

/// Brings up the loopback interface of the network namespace the process is in (`netdevice(7)`).
pub fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: ifreq is plain numbers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the kernel reads a whole ifreq, with a name that ends in zeros and flags.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(linux: &str, rest: &str) -> Result<Namespaces, NamespaceError> {
        let json = format!(r#"{{"ociVersion":"1.2.0","process":{{"cwd":"/"}},"linux":{linux}{rest}}}"#);
        Namespaces::of(&serde_json::from_str(&json).unwrap())
    }

    #[test]
    fn cgroup_and_time_are_left_to_the_init() {
        let namespaces =
            of(r#"{"namespaces":[{"type":"pid"},{"type":"cgroup"},{"type":"time"},{"type":"mount"}]}"#, "").unwrap();
        assert_eq!(namespaces.clone_flags, (libc::CLONE_NEWPID | libc::CLONE_NEWNS) as u64);
        assert!(namespaces.cgroup && namespaces.time && !namespaces.user);
    }

    #[test]
    fn a_shared_namespace_is_one_that_the_specification_names() {
        let mut namespaces = of(r#"{"namespaces":[{"type":"network"},{"type":"mount"}]}"#, "").unwrap();
        assert!(namespaces.has_own_network());
        namespaces.share("network").unwrap();
        assert!(!namespaces.has_own_network());
        assert!(matches!(namespaces.share("network"), Err(NamespaceError::SharedMissing(_))));
        assert!(matches!(namespaces.share("ipc"), Err(NamespaceError::SharedMissing(_))));
        assert!(!namespaces.has_users_of_another());
        assert!(matches!(namespaces.share("mount"), Err(NamespaceError::NotShared(_))));
    }

    #[test]
    fn namespaces_that_cannot_be_are_refused() {
        assert!(matches!(of(r#"{"namespaces":[{"type":"moon"}]}"#, ""), Err(NamespaceError::Unknown(_))));
        assert!(matches!(of(r#"{"namespaces":[{"type":"pid"},{"type":"pid"}]}"#, ""), Err(NamespaceError::Twice(_))));
        assert!(matches!(
            of(r#"{"namespaces":[{"type":"network","path":"/proc/1/ns/net"}]}"#, ""),
            Err(NamespaceError::Path { .. })
        ));
        assert!(matches!(of(r#"{"namespaces":[{"type":"user"}]}"#, ""), Err(NamespaceError::NoMappings)));
    }

    #[test]
    fn what_needs_a_namespace_is_refused_without() {
        for (linux, rest) in [
            (r#"{"uidMappings":[{"containerID":0,"hostID":1,"size":1}]}"#, ""),
            (r#"{"timeOffsets":{"boottime":{"secs":5}}}"#, ""),
            (r#"{"maskedPaths":["/proc/kcore"]}"#, ""),
            ("{}", r#","hostname":"x""#),
            ("{}", r#","root":{"path":"r","readonly":true}"#),
        ] {
            assert!(matches!(of(linux, rest), Err(NamespaceError::Missing { .. })), "{linux} {rest}");
        }
    }
}
