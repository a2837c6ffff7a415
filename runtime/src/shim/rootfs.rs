//! The root file system of a container, mounted as containerd asks for it: in the bundle, where callers of runc find it too.

use std::ffi::CString;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::Mount;
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MoveMountFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive, mount_remount, move_mount,
    unmount,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::pod::{Owners, Tree, mapped_overlay, user_namespace};

/// What mount(2) takes of a file system's own options: a page, with its end.
const MAX_DATA: usize = 4096;

/// Options that are flags of mount(2), and what they are not.
const FLAGS: &[(&str, MountFlags, bool)] = &[
    ("ro", MountFlags::RDONLY, true),
    ("rw", MountFlags::RDONLY, false),
    ("nosuid", MountFlags::NOSUID, true),
    ("suid", MountFlags::NOSUID, false),
    ("nodev", MountFlags::NODEV, true),
    ("dev", MountFlags::NODEV, false),
    ("noexec", MountFlags::NOEXEC, true),
    ("exec", MountFlags::NOEXEC, false),
    ("sync", MountFlags::SYNCHRONOUS, true),
    ("async", MountFlags::SYNCHRONOUS, false),
    ("dirsync", MountFlags::DIRSYNC, true),
    ("noatime", MountFlags::NOATIME, true),
    ("atime", MountFlags::NOATIME, false),
    ("nodiratime", MountFlags::NODIRATIME, true),
    ("diratime", MountFlags::NODIRATIME, false),
    ("relatime", MountFlags::RELATIME, true),
    ("norelatime", MountFlags::RELATIME, false),
    ("strictatime", MountFlags::STRICTATIME, true),
    ("nostrictatime", MountFlags::STRICTATIME, false),
];

/// Why it cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// What only containerd's own code does, or a kind of mount that needs a program.
    #[error("rootfs: {0}: not supported: use a snapshotter whose mounts are plain, such as overlayfs")]
    Unsupported(String),
    /// The kernel says no.
    #[error("rootfs: cannot mount {0} at {1}: {2}")]
    Mount(String, PathBuf, #[source] Errno),
    /// Its files cannot be given other owners.
    #[error("rootfs: cannot give it the owners {0}: {1}")]
    Owners(String, #[source] io::Error),
    /// The directory.
    #[error("rootfs: {0}: {1}")]
    Directory(PathBuf, #[source] io::Error),
    /// It stays.
    #[error("rootfs: cannot unmount {0}: {1}")]
    Unmount(PathBuf, #[source] Errno),
}

/// Where the root file system of a bundle is.
pub fn of(bundle: &Path) -> PathBuf {
    bundle.join("rootfs")
}

/// Where that of a sandbox has the memory that its containers share.
pub fn memory_of(bundle: &Path) -> PathBuf {
    bundle.join("shm")
}

/// Mounts an empty file system in memory there, as containerd does for pods with a container of their own: it is what containers
/// of a pod bind at `/dev/shm`, and in the guest it is memory of the guest's.
pub fn mount_memory(bundle: &Path) -> Result<(), RootfsError> {
    let target = memory_of(bundle);
    std::fs::create_dir(&target).map_err(|error| RootfsError::Directory(target.clone(), error))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("shm", &target, "tmpfs", flags, Some(c"mode=1777,size=64m"))
        .map_err(|errno| RootfsError::Mount("tmpfs shm".into(), target, errno))
}

/// Mounts all of it, or nothing.
pub fn mount_all(bundle: &Path, mounts: &[Mount]) -> Result<(), RootfsError> {
    if mounts.is_empty() {
        return Ok(());
    }
    let target = of(bundle);
    match std::fs::create_dir(&target) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(RootfsError::Directory(target, error));
        }
        _ => {}
    }
    mounts.iter().try_for_each(|mount| mount_one(mount, &target)).inspect_err(|_| {
        let _ = unmount_all(bundle);
    })
}

/// Unmounts whatever is mounted in a bundle.
pub fn unmount_all(bundle: &Path) -> Result<(), RootfsError> {
    [memory_of(bundle), of(bundle)].map(unmount_at).into_iter().collect()
}

fn unmount_at(target: PathBuf) -> Result<(), RootfsError> {
    loop {
        match unmount(&target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Nothing (more).
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(RootfsError::Unmount(target, errno)),
        }
    }
}

fn mount_one(wanted: &Mount, target: &Path) -> Result<(), RootfsError> {
    if !wanted.target.is_empty() {
        return Err(RootfsError::Unsupported(format!("a mount at {:?} in it", wanted.target)));
    }
    let Options { flags, bind, data, owners } = Options::of(wanted)?;
    if let Some(owners) = &owners {
        return mount_mapped(wanted, target, flags, bind, &data, owners);
    }
    let wrong = |errno| RootfsError::Mount(format!("{} {}", wanted.type_, wanted.source), target.to_owned(), errno);
    match bind {
        Some(recursive) => {
            let bound = if recursive {
                mount_bind_recursive(&*wanted.source, target)
            } else {
                mount_bind(&*wanted.source, target)
            };
            bound.map_err(wrong)?;
            // The flags of a bind count when it is mounted again.
            if flags.is_empty() { Ok(()) } else { mount_remount(target, MountFlags::BIND | flags, "").map_err(wrong) }
        }
        None if data.len() < MAX_DATA => {
            let data = CString::new(data).map_err(|_| wrong(Errno::INVAL))?;
            mount(&*wanted.source, target, &*wanted.type_, flags, Some(data.as_c_str())).map_err(wrong)
        }
        None => {
            let (directory, data) = shorten(&data).ok_or_else(|| wrong(Errno::TOOBIG))?;
            let data = CString::new(data).map_err(|_| wrong(Errno::INVAL))?;
            let from_there = || {
                // SAFETY: root and working directory of this thread alone; no descriptor table is unshared.
                unsafe { unshare_unsafe(UnshareFlags::FS) }?;
                rustix::process::chdir(&directory)?;
                mount(&*wanted.source, target, &*wanted.type_, flags, Some(data.as_c_str()))
            };
            std::thread::scope(|scope| scope.spawn(from_there).join()).unwrap_or(Err(Errno::IO)).map_err(wrong)
        }
    }
}

/// Mounts it with the owners that its files have for the container's users: those of an overlay's lower layers, which are many
/// containers' (the upper one was made with them), or of all.
fn mount_mapped(
    wanted: &Mount,
    target: &Path,
    flags: MountFlags,
    bind: Option<bool>,
    data: &str,
    [users, groups]: &[String; 2],
) -> Result<(), RootfsError> {
    let said = || format!("{users} and {groups}");
    let no = |why: &str| RootfsError::Owners(said(), io::Error::other(why));
    let namespace = match (mappings(users), mappings(groups)) {
        (Some(users), Some(groups)) => {
            user_namespace(&users, &groups).map_err(|error| RootfsError::Owners(said(), error))?
        }
        _ => return Err(no("expected uidmap=INSIDE:OUTSIDE:COUNT, and gidmap")),
    };
    let owners = Owners { namespace: namespace.as_fd(), all: bind == Some(true) };
    let made = match bind {
        Some(recursive) => {
            let read_only = flags.contains(MountFlags::RDONLY);
            let tree = Tree { recursive, read_only, all_read_only: false, owners: Some(owners) };
            rustix::fs::open(&*wanted.source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .and_then(|source| tree.clone(source.as_fd()))
        }
        None if wanted.type_ == "overlay" => {
            let (layers, others): (Vec<&str>, Vec<&str>) =
                data.split(',').partition(|option| option.starts_with("lowerdir="));
            let layers: Vec<&Path> = layers
                .iter()
                .flat_map(|option| option.trim_start_matches("lowerdir=").split(':'))
                .map(Path::new)
                .collect();
            if layers.is_empty() {
                return Err(no("an overlay without a lower layer"));
            }
            mapped_overlay(&layers, owners, flags, &others.join(","))
        }
        None => return Err(no(&format!("a mount of type {:?}", wanted.type_))),
    };
    made.and_then(|tree| move_mount(&tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH))
        .map_err(|errno| RootfsError::Owners(said(), errno.into()))
}

/// containerd's words for mappings: `INSIDE:OUTSIDE:COUNT`, several with commas between.
fn mappings(text: &str) -> Option<Vec<LinuxIdMapping>> {
    let one = |text: &str| {
        let numbers: Vec<u32> = text.split(':').map(str::parse).collect::<Result<_, _>>().ok()?;
        let &[inside, outside, size] = &numbers[..] else { return None };
        LinuxIdMappingBuilder::default().container_id(inside).host_id(outside).size(size).build().ok()
    };
    text.split(',').map(one).collect()
}

/// Options of a mount, by whose they are.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    flags: MountFlags,
    /// It is a bind, and whether what is mounted below comes along.
    bind: Option<bool>,
    /// The file system's own.
    data: String,
    /// Whose files are whose: mappings of users and of groups.
    owners: Option<[String; 2]>,
}

impl Options {
    fn of(mount: &Mount) -> Result<Self, RootfsError> {
        let bind = (mount.type_ == "bind").then_some(false);
        let mut read = Self { flags: MountFlags::empty(), bind, data: String::new(), owners: None };
        let of = |name| mount.options.iter().find_map(|option| option.strip_prefix(name)).map(str::to_owned);
        read.owners = match (of("uidmap="), of("gidmap=")) {
            (Some(users), Some(groups)) => Some([users, groups]),
            (None, None) => None,
            _ => return Err(RootfsError::Unsupported("one of the options uidmap and gidmap without the other".into())),
        };
        for option in &mount.options {
            match option.as_str() {
                "bind" => read.bind = Some(read.bind.unwrap_or_default()),
                "rbind" => read.bind = Some(true),
                "defaults" => {}
                _ if option.starts_with("uidmap=") || option.starts_with("gidmap=") => {}
                "loop" | "remount" | "private" | "shared" | "slave" | "rprivate" | "rshared" | "rslave" => {
                    return Err(RootfsError::Unsupported(format!("option {option}")));
                }
                _ if option.starts_with("X-containerd.") => {
                    return Err(RootfsError::Unsupported(format!("option {option}")));
                }
                _ => match FLAGS.iter().find(|(name, ..)| name == option) {
                    Some((_, flag, set)) => read.flags.set(*flag, *set),
                    None => {
                        if !read.data.is_empty() {
                            read.data.push(',');
                        }
                        read.data.push_str(option);
                    }
                },
            }
        }
        match read.bind {
            Some(_) if !read.data.is_empty() => {
                Err(RootfsError::Unsupported(format!("option {} of a bind", read.data)))
            }
            _ => Ok(read),
        }
    }
}

/// The lower layers of an overlay as paths from a directory above all of them; the same paths are that much shorter then.
fn shorten(data: &str) -> Option<(PathBuf, String)> {
    let (before, rest) = data.split_once("lowerdir=")?;
    let (layers, after) = rest.split_once(',').map_or((rest, ""), |(layers, after)| (layers, after));
    let layers: Vec<&Path> = layers.split(':').map(Path::new).collect();
    let mut common = layers.first()?.parent()?.to_owned();
    while !layers.iter().all(|layer| layer.starts_with(&common)) {
        common = common.parent()?.to_owned();
    }
    let relative: Option<Vec<&str>> = layers
        .iter()
        .map(|layer| layer.strip_prefix(&common).ok().and_then(Path::to_str).filter(|p| !p.is_empty()))
        .collect();
    let shorter = [before, "lowerdir=", &relative?.join(":"), if after.is_empty() { "" } else { "," }, after].concat();
    (shorter.len() < MAX_DATA).then_some((common, shorter))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount_of(kind: &str, options: &[&str]) -> Mount {
        Mount {
            type_: kind.into(),
            source: "overlay".into(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn options_are_told_apart() {
        let of = |kind, options: &[&str]| Options::of(&mount_of(kind, options));
        let overlay = of("overlay", &["index=off", "ro", "workdir=/w", "upperdir=/u", "lowerdir=/a:/b"]).unwrap();
        assert_eq!(
            overlay,
            Options {
                flags: MountFlags::RDONLY,
                bind: None,
                data: "index=off,workdir=/w,upperdir=/u,lowerdir=/a:/b".into(),
                owners: None,
            }
        );
        assert_eq!(of("bind", &["rbind", "rw"]).unwrap().bind, Some(true));
        assert_eq!(
            of("bind", &["ro"]).unwrap(),
            Options { flags: MountFlags::RDONLY, bind: Some(false), data: String::new(), owners: None }
        );
        let mapped = of("overlay", &["uidmap=0:5:9,9:1:1", "gidmap=0:6:9", "lowerdir=/a"]).unwrap();
        assert_eq!((mapped.owners, &*mapped.data), (Some(["0:5:9,9:1:1".into(), "0:6:9".into()]), "lowerdir=/a"));
        assert!(of("overlay", &["uidmap=0:5:9"]).unwrap_err().to_string().contains("without the other"));
        assert_eq!(mappings("0:5:9,9:1:1").unwrap().len(), 2);
        for wrong in ["", "0:5", "0:5:x", "0:5:9,"] {
            assert!(mappings(wrong).is_none(), "{wrong:?}");
        }
        for (kind, option) in [("ext4", "loop"), ("erofs", "X-containerd.dmverity=x"), ("bind", "size=1")] {
            assert!(of(kind, &[option]).unwrap_err().to_string().contains(option), "{option}");
        }
    }

    #[test]
    fn layers_have_the_owners_that_are_asked_for() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let base = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let at = |name: &str| base.path().join(name);
        for name in ["high", "low", "upper", "work", "bundle"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        std::fs::write(at("low/file"), "low").unwrap();
        std::fs::write(at("high/file"), "high").unwrap();
        std::os::unix::fs::chown(at("low"), Some(3), Some(4)).unwrap();
        std::fs::write(at("low/other"), "").unwrap();
        std::os::unix::fs::chown(at("low/other"), Some(3), Some(4)).unwrap();
        let word = |name: &str, path: &str| format!("{name}={}", at(path).display());
        let lower = format!("{}:{}", word("lowerdir", "high"), at("low").display());
        let options =
            [&*word("workdir", "work"), &word("upperdir", "upper"), &lower, "uidmap=0:5000:10", "gidmap=0:6000:10"];
        let owner = |name: &str| {
            let stat = rustix::fs::stat(at("bundle/rootfs").join(name)).unwrap();
            (stat.st_uid, stat.st_gid)
        };
        match mount_all(&at("bundle"), &[mount_of("overlay", &options)]) {
            // This directory may be on a file system that cannot be an upper layer.
            Err(RootfsError::Owners(..)) if !Path::new("/sys/module/overlay").exists() => return,
            mounted => mounted.unwrap(),
        }
        let seen = (owner("file"), owner("other"), std::fs::read_to_string(at("bundle/rootfs/file")).unwrap());
        unmount_all(&at("bundle")).unwrap();
        assert_eq!(seen, ((5000, 6000), (5003, 6004), "high".to_owned()));

        let mut bind = mount_of("bind", &["rbind", "ro", "uidmap=0:5000:10", "gidmap=0:6000:10"]);
        bind.source = at("low").display().to_string();
        mount_all(&at("bundle"), &[bind]).unwrap();
        let seen = (owner("other"), std::fs::write(at("bundle/rootfs/new"), "").is_err());
        unmount_all(&at("bundle")).unwrap();
        assert_eq!(seen, ((5003, 6004), true));
    }

    #[test]
    fn many_layers_fit_into_a_page() {
        let layers: Vec<_> = (0..100)
            .map(|n| format!("/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/{n}/fs"))
            .collect();
        let data = format!("workdir=/w,lowerdir={},index=off", layers.join(":"));
        assert!(data.len() > MAX_DATA);
        let (directory, shorter) = shorten(&data).unwrap();
        assert_eq!(directory, Path::new("/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots"));
        assert!(
            shorter.starts_with("workdir=/w,lowerdir=0/fs:1/fs:") && shorter.ends_with(":99/fs,index=off"),
            "{shorter}"
        );
        assert_eq!(shorten("lowerdir=/a:relative"), None);
    }
}
