//! The host's files of a container, as detached mounts: nothing is ever mounted in the host's mount namespace. The
//! machine's process attaches them in its own.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{LinuxIdMapping, Mount};
use podhull_protocol::{SharedMemory, VOLUMES_DIR};
use podhull_vmm::control::Resource;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::binds::{Binds, Source};
use super::memory as in_guest;
use super::mountinfo::Mounts;
use super::sockets::{Search, Socket};
use super::tree::{Owners, Tree};
use super::user_namespace::user_namespace;
use super::view::Place;
use super::volumes::Volumes;
use crate::bundle::Bundle;
use crate::spec::{Config, HostFiles, has_option, host_files};

/// Most bind mounts of a container: their descriptors travel in one message together with the machine's own.
const MAX_BINDS: usize = 180;

/// Why the host's files cannot be given to a pod.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The source cannot be opened.
    #[error("mounts[{index}].source {path:?}: {errno}")]
    Source {
        /// Place in `mounts`.
        index: usize,
        /// As written.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// The kernel refuses to clone the mount.
    #[error("cannot clone the mount of {path:?}: {errno}{}", remedy(*errno))]
    Clone {
        /// What was to be cloned.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// An overlay cannot be mounted.
    #[error("mounts[{index}]: cannot mount the overlay {options:?}: {errno}")]
    Overlay {
        /// Place in `mounts`.
        index: usize,
        /// Those of the file system.
        options: String,
        /// Why.
        errno: Errno,
    },
    /// It is not known what is mounted where.
    #[error("/proc/thread-self/mountinfo: {0}")]
    Mountinfo(#[source] std::io::Error),
    /// There is no user namespace with these mappings.
    #[error("mounts[{0}].uidMappings, gidMappings: {1}")]
    Mappings(usize, #[source] std::io::Error),
    /// The kernel refuses to give the files of a mount other owners.
    #[error("mounts[{index}]: files of {path:?} cannot have other owners: {errno}{}", owners_remedy(*errno))]
    Owners {
        /// Place in `mounts`.
        index: usize,
        /// What was to be cloned.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// A mount point is missing in a root that will be read-only, and cannot be made.
    #[error("cannot make {path:?} in the root filesystem: {errno}")]
    MountPoint {
        /// Path in the container.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// procfs or sysfs where a link is, or a file. runc's words.
    #[error("filesystem {kind:?} must be mounted on ordinary directory: {path:?}")]
    NotDirectory {
        /// Type of the file system.
        kind: String,
        /// Path in the container.
        path: PathBuf,
    },
    /// A socket cannot be stood for.
    #[error("socket {0:?}: {1}")]
    Socket(PathBuf, #[source] std::io::Error),
    /// More than a message can carry.
    #[error("mounts: {0} bind mounts, and files that the program is to inherit, are more than {MAX_BINDS}")]
    TooMany(usize),
}

fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::PERM => "; podhull must run as root (CAP_SYS_ADMIN)",
        Errno::NOSYS => "; podhull needs Linux 5.12 or newer",
        _ => "",
    }
}

fn owners_remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::INVAL => "; its file system, or one mounted below it, knows no id-mapped mounts",
        Errno::PERM => "; it is an id-mapped mount already",
        _ => "",
    }
}

/// Path of the container's root filesystem below the share.
pub fn root_in_share(id: &str) -> String {
    format!("{id}/rootfs")
}

/// The host's files of a container, as detached mounts.
pub struct Prepared {
    /// For the machine.
    pub resources: Vec<(Resource, OwnedFd)>,
    /// For who looks at the container from the host.
    pub root: OwnedFd,
    /// Mount points of the container, in order, and what is seen there from the host.
    pub places: Vec<(PathBuf, Place)>,
    /// Memory of the guest in place of a tmpfs of the host.
    pub memory: Vec<SharedMemory>,
    /// Names, in the root of the share, of directories that other containers of the pod may have too.
    pub directories: Vec<String>,
    /// Sockets of the host, in whose places the guest has its own.
    pub sockets: Vec<Socket>,
    /// Volumes of the host that the guest has copies of.
    pub volumes: Volumes,
    /// What the user should know; one line each.
    pub warnings: Vec<String>,
}

impl Prepared {
    /// Adds files of the host that are no mounts of the container.
    pub fn add_files(&mut self, files: Vec<(String, OwnedFd)>) -> Result<(), MountError> {
        self.resources.extend(files.into_iter().map(|(path, mount)| (Resource::Mount { path }, mount)));
        // One is the root.
        match self.resources.len() - 1 {
            count if count > MAX_BINDS => Err(MountError::TooMany(count)),
            _ => Ok(()),
        }
    }
}

/// Clones the mounts of the root filesystem and of each bind mount, and writes into the specification where the guest
/// finds the latter.
pub fn prepare(id: &str, bundle: &mut Bundle) -> Result<Prepared, MountError> {
    let mut places: Vec<_> = bundle.config.mounts().iter().map(place).collect();
    let from_host: Vec<_> = bundle
        .config
        .mounts()
        .iter()
        .enumerate()
        .filter_map(|(index, mount)| host_files(mount).map(|kind| (index, mount, kind)))
        .collect();
    if from_host.len() > MAX_BINDS {
        return Err(MountError::TooMany(from_host.len()));
    }
    let mut resources = Vec::with_capacity(from_host.len() + 1);
    let mut sources = Vec::with_capacity(from_host.len());
    let mut known = Mappings::default();
    let mut files = Vec::new();
    let mut memory = Vec::new();
    let mut binds = Binds::default();
    let mut there = None;
    let mut host_sockets = Vec::new();
    let mut volumes = Volumes::default();
    let mut search = Search::new();
    let mut over = Vec::new();
    for (index, mount, kind) in from_host {
        let read_only = last(mount, ["ro", "rw"]) == Some("ro");
        if let HostFiles::Overlay(options) = kind {
            let tree = Tree { recursive: false, read_only, all_read_only: false, owners: None };
            let fail = |errno| MountError::Overlay { index, options: options.clone(), errno };
            let [ours, theirs] = tree.overlay(&options).map_err(fail)?;
            let path = format!("{id}/mounts/{index}");
            sources.push((index, format!("{}/{path}", podhull_protocol::SHARE_DIR)));
            resources.push((Resource::Mount { path }, theirs));
            places[index].1 = Place::Files(ours);
            continue;
        }
        let path = mount.source().clone().unwrap_or_default();
        let fail = |errno| MountError::Source { index, path: path.clone(), errno };
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let source = rustix::fs::openat(&bundle.directory, &path, flags, Mode::empty()).map_err(fail)?;
        let stat = rustix::fs::fstat(&source).map_err(fail)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            files.push(index);
        }
        let mounts = match &mut there {
            Some(mounts) => mounts,
            none => none.insert(Mounts::read().map_err(MountError::Mountinfo)?),
        };
        let owners = asked_owners(&bundle.config, mount);
        let in_memory = match owners {
            None => in_guest::volume(&source, &stat, mounts).map_err(fail)?,
            // What is theirs in the guest's memory would be others'.
            Some(_) => None,
        };
        let in_memory = match in_memory {
            None if mount.destination() == Path::new("/dev/shm") => in_guest::posix(&source, &stat).map_err(fail)?,
            in_memory => in_memory,
        };
        if let Some((shared, path)) = in_memory {
            sources.push((index, format!("{}/{path}", podhull_protocol::MEMORY_DIR)));
            memory.push(shared);
            continue;
        }
        let in_words = owners.as_ref().map(|owners| format!("{owners:?}"));
        let owners = owners.map(|owners| known.owners(owners)).transpose();
        let tree = Tree {
            recursive: has_option(mount, "rbind"),
            read_only,
            all_read_only: last(mount, ["rro", "rrw"]) == Some("rro"),
            owners: owners.map_err(|error| MountError::Mappings(index, error))?,
        };
        let clone = || {
            tree.clone(source.as_fd()).map_err(|errno| match &tree.owners {
                Some(_) => MountError::Owners { index, path: path.clone(), errno },
                None => MountError::Clone { path: path.clone(), errno },
            })
        };
        if FileType::from_raw_mode(stat.st_mode) == FileType::Socket {
            let socket =
                Socket::new(source.as_fd(), clone()?).map_err(|error| MountError::Socket(path.clone(), error))?;
            places[index].1 = Place::Files(clone()?);
            sources.push((index, socket.path()));
            host_sockets.push(socket);
            continue;
        }
        let in_share = format!("{id}/mounts/{index}");
        if read_only && let Some(name) = volumes.watch(&path, source.as_fd(), &in_share) {
            resources.push((Resource::Mount { path: in_share }, clone()?));
            places[index].1 = Place::Files(clone()?);
            sources.push((index, format!("{VOLUMES_DIR}/{id}/{name}")));
            continue;
        }
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let seen = |path: &Path| {
                let later = &bundle.config.mounts()[index + 1..];
                !later.iter().any(|mount| path.starts_with(mount.destination()))
            };
            let found = match mounts.of(&source).map_err(fail)?.is_some_and(|mount| mount.asks_others()) {
                true => Vec::new(),
                false => search.below(source.as_fd()),
            };
            for found in found {
                let path = mount.destination().join(&found.path);
                // The specification is text.
                if let Some(text) = path.to_str().filter(|_| seen(&path)) {
                    over.push((socket(&found.file, tree.owners, &path)?, text.to_owned()));
                }
            }
        }
        let source = Source { file: &source, stat: &stat, tree: &tree, owners: in_words };
        let name = binds.add(&source, clone()?, mounts).map_err(fail)?;
        places[index].1 = Place::Files(clone()?);
        sources.push((index, format!("{}/{name}", podhull_protocol::SHARE_DIR)));
    }
    let directories = binds.directories();
    resources.extend(binds.into_resources(id));
    let read_only = bundle.config.root_readonly();
    if read_only {
        make_mount_points(bundle, &files)?;
    }
    let root = || {
        Tree { recursive: true, read_only, all_read_only: false, owners: None }
            .clone(bundle.root.as_fd())
            .map_err(|errno| MountError::Clone { path: bundle.root_path.clone(), errno })
    };
    resources.push((Resource::Mount { path: root_in_share(id) }, root()?));
    let root = root()?;
    for (index, source) in sources {
        bundle.config.bind_in_guest(index, &source);
    }
    for (socket, path) in over {
        bundle.config.stand_for_in_guest(&path, &socket.path());
        host_sockets.push(socket);
    }
    let remedy = "bind the sockets that it needs by themselves";
    let mut warnings = Vec::new();
    if search.more {
        warnings.push(format!(
            "container {id}: more programs of the host listen in the directories that it has than it can reach: {remedy}"
        ));
    }
    if search.unseen {
        warnings.push(format!(
            "container {id}: there are too many files in the directories that it has to look for sockets in all of them: {remedy}"
        ));
    }
    Ok(Prepared { resources, root, places, memory, directories, sockets: host_sockets, volumes, warnings })
}

/// One that was found in a directory, whose owners are those of what is in it.
fn socket(file: &OwnedFd, owners: Option<Owners<'_>>, path: &Path) -> Result<Socket, MountError> {
    let tree = Tree { recursive: false, read_only: false, all_read_only: false, owners };
    let mount = tree.clone(file.as_fd()).map_err(|errno| MountError::Clone { path: path.into(), errno })?;
    Socket::new(file.as_fd(), mount).map_err(|error| MountError::Socket(path.into(), error))
}

/// Which of two options, each of which undoes the other, counts.
fn last<'a>(mount: &'a Mount, words: [&str; 2]) -> Option<&'a str> {
    mount.options().iter().flatten().rev().find(|option| words.contains(&option.as_str())).map(String::as_str)
}

/// User namespaces of id-mapped mounts, one for all that have the same mappings.
#[derive(Default)]
struct Mappings {
    made: Vec<([Vec<LinuxIdMapping>; 2], OwnedFd)>,
}

impl Mappings {
    fn owners(&mut self, asked: AskedOwners) -> std::io::Result<Owners<'_>> {
        let AskedOwners { mappings, all } = asked;
        let index = match self.made.iter().position(|(made, _)| *made == mappings) {
            Some(index) => index,
            None => {
                let namespace = user_namespace(&mappings[0], &mappings[1])?;
                self.made.push((mappings, namespace));
                self.made.len() - 1
            }
        };
        Ok(Owners { namespace: self.made[index].1.as_fd(), all })
    }
}

/// Whose files are whose in a mount.
#[derive(Debug)]
struct AskedOwners {
    /// Of users and of groups.
    mappings: [Vec<LinuxIdMapping>; 2],
    /// In the mounts below too.
    all: bool,
}

/// What a mount asks for: mappings of its own, or those of the container's users.
fn asked_owners(config: &Config, mount: &Mount) -> Option<AskedOwners> {
    let all = has_option(mount, "ridmap");
    let linux = config.spec().linux().as_ref();
    let mappings = match (mount.uid_mappings(), mount.gid_mappings()) {
        (Some(users), Some(groups)) if !users.is_empty() => [users.clone(), groups.clone()],
        _ if all || has_option(mount, "idmap") => [
            linux.and_then(|linux| linux.uid_mappings().clone()).unwrap_or_default(),
            linux.and_then(|linux| linux.gid_mappings().clone()).unwrap_or_default(),
        ],
        _ => return None,
    };
    Some(AskedOwners { mappings, all })
}

/// What is seen from the host where a mount is that is not one of the host's files.
fn place(mount: &oci_spec::runtime::Mount) -> (PathBuf, Place) {
    let place = if mount.typ().as_deref() == Some("proc") { Place::Processes } else { Place::Hidden };
    (mount.destination().clone(), place)
}

/// Makes what is missing of the mount points and the working directory, as runc does: the guest cannot, in a root that is
/// read-only on the host. `files` are the places in `mounts` that bind something other than a directory.
fn make_mount_points(bundle: &Bundle, files: &[usize]) -> Result<(), MountError> {
    let mounts = bundle.config.mounts();
    let inside_another = |path: &Path, before: &[oci_spec::runtime::Mount]| {
        before.iter().any(|m| m.destination() != Path::new("/") && path.starts_with(m.destination()))
    };
    for (index, mount) in mounts.iter().enumerate() {
        if !inside_another(mount.destination(), &mounts[..index]) {
            if let Some(kind @ ("proc" | "sysfs")) = mount.typ().as_deref() {
                check_directory(bundle.root.as_fd(), mount.destination(), kind)?;
            }
            make_path(bundle.root.as_fd(), mount.destination(), files.contains(&index))?;
        }
    }
    match bundle.config.spec().process() {
        Some(process) if !inside_another(process.cwd(), mounts) => make_path(bundle.root.as_fd(), process.cwd(), false),
        _ => Ok(()),
    }
}

/// What a link stands for may not be covered by the kernel's files. The guest looks again; here it is before anything is made there.
fn check_directory(root: BorrowedFd<'_>, path: &Path, kind: &str) -> Result<(), MountError> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT);
    match found.and_then(rustix::fs::fstat) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Directory => {
            Err(MountError::NotDirectory { kind: kind.into(), path: path.into() })
        }
        // What is missing is made; what is wrong otherwise is seen then.
        _ => Ok(()),
    }
}

/// Every step is resolved as if the root filesystem were the root directory: its links cannot lead out of it.
fn make_path(root: BorrowedFd<'_>, path: &Path, file: bool) -> Result<(), MountError> {
    let fail = |errno| MountError::MountPoint { path: path.to_owned(), errno };
    let open =
        |at: &Path| rustix::fs::openat2(root, at, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT);
    match open(path) {
        Ok(_) => return Ok(()),
        Err(Errno::NOENT) => {}
        Err(errno) => return Err(fail(errno)),
    }
    let names: Vec<_> =
        path.components().filter_map(|c| if let Component::Normal(n) = c { Some(n) } else { None }).collect();
    let mut at = PathBuf::from("/");
    for (index, name) in names.iter().enumerate() {
        let parent = open(&at).map_err(fail)?;
        at.push(name);
        if open(&at).is_ok() {
            continue;
        }
        let name = CString::new(name.as_encoded_bytes()).map_err(|_| fail(Errno::INVAL))?;
        if file && index + 1 == names.len() {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(&parent, &name, flags, Mode::from_raw_mode(0o644)).map(drop).map_err(fail)?;
        } else {
            rustix::fs::mkdirat(&parent, &name, Mode::from_raw_mode(0o755)).map_err(fail)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn mount_points_are_made_inside_the_root_whatever_its_links_say() {
        let base = std::env::temp_dir().join(format!("podhull-mounts-{}", std::process::id()));
        let root = base.join("rootfs");
        fs::create_dir_all(&root).unwrap();
        fs::create_dir(base.join("outside")).unwrap();
        std::os::unix::fs::symlink("../outside", root.join("way")).unwrap();
        std::os::unix::fs::symlink("/real", root.join("link")).unwrap();
        fs::create_dir(root.join("real")).unwrap();
        let fd = rustix::fs::open(&root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        make_path(fd.as_fd(), Path::new("/link/deep/er"), false).unwrap();
        make_path(fd.as_fd(), Path::new("/link/file"), true).unwrap();
        assert!(root.join("real/deep/er").is_dir() && root.join("real/file").is_file());
        assert!(make_path(fd.as_fd(), Path::new("/way/in"), false).is_err());
        assert_eq!(fs::read_dir(base.join("outside")).unwrap().count(), 0);
        fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn proc_and_sys_are_refused_where_a_link_is() {
        let root = std::env::temp_dir().join(format!("podhull-links-{}", std::process::id()));
        fs::create_dir_all(root.join("sys")).unwrap();
        std::os::unix::fs::symlink("/missing", root.join("proc")).unwrap();
        let fd = rustix::fs::open(&root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let error = check_directory(fd.as_fd(), Path::new("/proc"), "proc").unwrap_err().to_string();
        assert_eq!(error, r#"filesystem "proc" must be mounted on ordinary directory: "/proc""#);
        check_directory(fd.as_fd(), Path::new("/sys"), "sysfs").unwrap();
        check_directory(fd.as_fd(), Path::new("/new"), "proc").unwrap();
        fs::remove_dir_all(&root).unwrap();
    }
}
