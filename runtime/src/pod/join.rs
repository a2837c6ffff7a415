//! Namespaces that a specification names by their paths (`config-linux.md`, Namespaces): whose they are, and what follows. One that
//! another container's shadow is in is that container's, and both are of one pod; a network namespace may be anybody's, and so may
//! a user namespace, whose mappings are taken then.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::LinuxNamespaceType;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::link::Shared;
use super::users::{Named, Users};
use crate::config;
use crate::spec::Config;
use crate::state::{self, Known, Membership, StateError};

/// Why a namespace cannot be joined.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// There is nothing at the path.
    #[error("linux.namespaces[{index}].path: {path:?}: {source}")]
    Open {
        /// Place in the list.
        index: usize,
        /// As written.
        path: PathBuf,
        /// Why.
        source: Errno,
    },
    /// Something else is there.
    #[error("linux.namespaces[{index}].path: {path:?} is no {} namespace", word(*kind))]
    Other {
        /// Place in the list.
        index: usize,
        /// As written.
        path: PathBuf,
        /// What it should be.
        kind: LinuxNamespaceType,
    },
    /// Containers of a pod do not share these.
    #[error(
        "linux.namespaces[{index}].path: not supported: a {} namespace cannot be joined, only those of network, ipc, \
         uts, pid and user",
        word(*kind)
    )]
    Kind {
        /// Place in the list.
        index: usize,
        /// What it is.
        kind: LinuxNamespaceType,
    },
    /// It is of no container of ours.
    #[error(
        "linux.namespaces[{index}].path: {path:?} is the {} namespace of no podhull container: what the host's kernel has \
         in it cannot be had in a virtual machine",
        word(*kind)
    )]
    Nobodys {
        /// Place in the list.
        index: usize,
        /// As written.
        path: PathBuf,
        /// What it is.
        kind: LinuxNamespaceType,
    },
    /// Its users are those of the host, or of the machine.
    #[error(
        "linux.namespaces[{index}].path: {path:?} is the host's user namespace: leave the entry out for a container without one"
    )]
    HostUsers {
        /// Place in the list.
        index: usize,
        /// As written.
        path: PathBuf,
    },
    /// What its users are cannot be seen.
    #[error("linux.namespaces[{index}].path: cannot look at the users of {path:?}: {source}")]
    Users {
        /// Place in the list.
        index: usize,
        /// As written.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It would be the virtual machine's, and not the host's.
    #[error(
        "linux.namespaces[{index}].path: not supported: {path:?} is the host's network, which cannot be had in a virtual \
         machine: give the container a network namespace of its own"
    )]
    HostNetwork {
        /// Place in the list.
        index: usize,
        /// As written.
        path: PathBuf,
    },
    /// One container cannot be in two machines.
    #[error("linux.namespaces[{index}].path: {path:?} is in the pod of {other:?}, another one in that of {pod:?}")]
    TwoPods {
        /// Place in the list.
        index: usize,
        /// As written.
        path: PathBuf,
        /// Whose it is.
        other: String,
        /// And the other.
        pod: String,
    },
    /// Its pod ends at this moment.
    #[error("linux.namespaces[{index}].path: the virtual machine of pod {pod:?} is gone")]
    Gone {
        /// Place in the list.
        index: usize,
        /// Whose it was.
        pod: String,
    },
    /// The other containers cannot be looked at.
    #[error(transparent)]
    State(#[from] StateError),
}

/// What a container is to be in that is there already.
#[derive(Default)]
pub struct Joined {
    /// The pod whose machine it is in; none: it has its own.
    pub pod: Option<Membership>,
    /// Namespaces that are other containers' of that pod.
    pub shared: Vec<Shared>,
    /// Namespaces of the host for its shadow.
    pub namespaces: Vec<(LinuxNamespaceType, OwnedFd)>,
    /// Its users, if its user namespace is there already.
    pub users: Option<Users>,
}

/// Looks up all namespaces that have a path.
pub fn look_up(root: &Path, config: &Config) -> Result<Joined, JoinError> {
    let mut joined = Joined::default();
    let mut known = None;
    let namespaces = config.spec().linux().iter().flat_map(|linux| linux.namespaces().iter().flatten());
    for (index, namespace) in namespaces.enumerate() {
        let (kind, Some(path)) = (namespace.typ(), namespace.path()) else { continue };
        if path.as_os_str().is_empty() {
            continue;
        }
        if !is_shareable(kind) {
            return Err(JoinError::Kind { index, kind });
        }
        let fd = open(index, path, kind)?;
        let known = match &mut known {
            Some(known) => known,
            none => none.insert(state::list(root)?),
        };
        let users = |source| JoinError::Users { index, path: path.clone(), source };
        let named = match kind {
            LinuxNamespaceType::User => Some(Named::new(path, &fd).map_err(users)?),
            _ => None,
        };
        match known
            .iter()
            .find(|known| named.as_ref().map_or_else(|| is_in(known, kind, &fd), |named| named.is_of(known)))
        {
            Some(owner) => {
                if kind == LinuxNamespaceType::User {
                    let users = owner.state.users.clone();
                    joined.users = Some(users.ok_or_else(|| JoinError::HostUsers { index, path: path.clone() })?);
                }
                let pod = owner.state.pod().ok_or_else(|| JoinError::Gone { index, pod: owner.state.id.clone() })?;
                match &joined.pod {
                    Some(other) if other.pod != pod.pod => {
                        let (other, pod) = (pod.pod, other.pod.clone());
                        return Err(JoinError::TwoPods { index, path: path.clone(), other, pod });
                    }
                    _ => joined.pod = Some(pod),
                }
                joined.shared.push(Shared { kind, container: owner.state.id.clone() });
            }
            None if kind == LinuxNamespaceType::User => {
                if is_same("/proc/self/ns/user", &fd) {
                    return Err(JoinError::HostUsers { index, path: path.clone() });
                }
                joined.users = Some(Users::of_namespace(&fd).map_err(users)?);
            }
            // The guest has one of its own in its place; containers that come later name it as the pod's.
            None if is_pinned(config, kind) && !is_of_the_host(kind, &fd) => {}
            None if kind != LinuxNamespaceType::Network => {
                return Err(JoinError::Nobodys { index, path: path.clone(), kind });
            }
            None if is_of_the_host(kind, &fd) => return Err(JoinError::HostNetwork { index, path: path.clone() }),
            None => {}
        }
        joined.namespaces.push((kind, fd));
    }
    Ok(joined)
}

/// Types that containers of a pod may share.
fn is_shareable(kind: LinuxNamespaceType) -> bool {
    use LinuxNamespaceType::{Ipc, Network, Pid, User, Uts};
    matches!(kind, Network | Ipc | Uts | Pid | User)
}

/// The type as the specification writes it; what the kernel calls it is its `Display`.
pub fn word(kind: LinuxNamespaceType) -> String {
    match kind {
        LinuxNamespaceType::Network => "network".into(),
        LinuxNamespaceType::Mount => "mount".into(),
        kind => kind.to_string(),
    }
}

/// Looks at what it is before it is opened: the bundle may name a pipe or a device.
fn open(index: usize, path: &Path, kind: LinuxNamespaceType) -> Result<OwnedFd, JoinError> {
    /// `linux/magic.h`.
    const NSFS_MAGIC: i64 = 0x6e73_6673;
    let fail = |source| JoinError::Open { index, path: path.to_owned(), source };
    let other = || JoinError::Other { index, path: path.to_owned(), kind };
    let found = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(fail)?;
    if rustix::fs::fstatfs(&found).map_err(fail)?.f_type != NSFS_MAGIC {
        return Err(other());
    }
    let again = format!("/proc/self/fd/{}", found.as_raw_fd());
    let fd = rustix::fs::open(again, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(fail)?;
    // Its values are the flags of clone(2).
    if type_of(&fd).map_err(fail)? == kind as libc::c_int { Ok(fd) } else { Err(other()) }
}

/// `ioctl_nsfs(2)`.
fn type_of(namespace: &OwnedFd) -> Result<libc::c_int, Errno> {
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    // SAFETY: the call takes no argument.
    match unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_NSTYPE) } {
        -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
        kind => Ok(kind),
    }
}

/// Whether a container's shadow is in a namespace.
fn is_in(known: &Known, kind: LinuxNamespaceType, namespace: &OwnedFd) -> bool {
    // Held while the number is used, so that it is not another's.
    let Some(_process) = known.process() else { return false };
    is_same(&format!("/proc/{}/ns/{kind}", known.state.process.pid), namespace)
}

/// Whether a namespace of this kind is new, and waits for a pod: CRI-O makes them first, and keeps them, each by a file. What the host's
/// kernel has in them are sysctls, which the specification has too.
fn is_pinned(config: &Config, kind: LinuxNamespaceType) -> bool {
    matches!(kind, LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts)
        && config.spec().annotations().as_ref().is_some_and(|all| config::is_of_cri_o(all) && config::is_sandbox(all))
}

/// Whether a namespace is that of the host's first process; or, where that cannot be seen, ours.
fn is_of_the_host(kind: LinuxNamespaceType, namespace: &OwnedFd) -> bool {
    let [first, own] = ["1", "self"].map(|of| format!("/proc/{of}/ns/{kind}"));
    is_same(if rustix::fs::stat(&first).is_ok() { &first } else { &own }, namespace)
}

fn is_same(path: &str, namespace: &OwnedFd) -> bool {
    match (rustix::fs::stat(path), rustix::fs::fstat(namespace)) {
        (Ok(theirs), Ok(given)) => (theirs.st_dev, theirs.st_ino) == (given.st_dev, given.st_ino),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(kind: &str, path: &str) -> Result<Joined, JoinError> {
        let mut document: serde_json::Value = serde_json::from_str(crate::spec::document::TEXT).unwrap();
        document["linux"]["namespaces"] = serde_json::json!([
            { "type": "mount" },
            { "type": kind, "path": path },
            { "type": "uts" },
            { "type": "pid" },
            { "type": if kind == "network" { "time" } else { "network" } },
        ]);
        let config = crate::spec::read::read(&document.to_string()).unwrap();
        look_up(Path::new("/no/such/directory"), &config)
    }

    #[test]
    fn a_path_is_what_it_says_or_it_is_refused() {
        let error = |kind, path| joined(kind, path).err().unwrap().to_string();
        assert_eq!(
            error("network", "/no/such"),
            "linux.namespaces[1].path: \"/no/such\": No such file or directory (os error 2)"
        );
        for path in ["/dev/zero", "/etc/passwd", "/proc/self/ns/uts"] {
            assert_eq!(error("network", path), format!("linux.namespaces[1].path: {path:?} is no network namespace"));
        }
        assert!(error("cgroup", "/proc/self/ns/cgroup").contains("a cgroup namespace cannot be joined"));
        assert!(error("user", "/proc/self/ns/user").contains("is the host's user namespace"));
        assert!(error("ipc", "/proc/self/ns/ipc").contains("the ipc namespace of no podhull container"));
    }

    #[test]
    fn ipc_and_uts_of_nobodys_are_joined_by_who_opens_a_pod_of_crio_unless_they_are_the_hosts() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let look_up_as = |opens: &str, path: &str| {
            let mut document: serde_json::Value = serde_json::from_str(crate::spec::document::TEXT).unwrap();
            document["annotations"] = serde_json::json!({ "io.kubernetes.cri-o.ContainerType": opens });
            document["linux"]["namespaces"] = serde_json::json!([{ "type": "mount" }, { "type": "ipc", "path": path }, { "type": "uts" }, { "type": "pid" }, { "type": "network" }]);
            let config = crate::spec::read::read(&document.to_string()).unwrap();
            look_up(Path::new("/no/such/directory"), &config).map_err(|error| error.to_string())
        };
        let other = std::thread::spawn(move || {
            // SAFETY: an IPC namespace for this thread alone.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWIPC) }.unwrap();
            let path = "/proc/thread-self/ns/ipc";
            let joined = look_up_as("sandbox", path).unwrap();
            assert!(joined.pod.is_none() && joined.shared.is_empty());
            assert_eq!(type_of(&joined.namespaces[0].1), Ok(libc::CLONE_NEWIPC));
            for (opens, path) in [("container", path), ("sandbox", "/proc/self/ns/ipc")] {
                let error = look_up_as(opens, path).err().unwrap();
                assert!(error.contains("the ipc namespace of no podhull container"), "{error}");
            }
        });
        other.join().unwrap();
    }

    #[test]
    fn a_network_namespace_of_nobodys_is_joined_without_a_pod() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        assert!(joined("network", "/proc/self/ns/net").err().unwrap().to_string().contains("the host's network"));
        let other = std::thread::spawn(|| {
            // SAFETY: a network namespace for this thread alone.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
            let joined = joined("network", "/proc/thread-self/ns/net").unwrap();
            assert!(joined.pod.is_none() && joined.shared.is_empty());
            assert_eq!(joined.namespaces.len(), 1);
            assert_eq!(type_of(&joined.namespaces[0].1), Ok(libc::CLONE_NEWNET));
        });
        other.join().unwrap();
    }
}
