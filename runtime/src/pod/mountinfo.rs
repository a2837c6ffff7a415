//! The mounts that this process sees, as `/proc/self/mountinfo` tells of them (`proc_pid_mountinfo(5)`).

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;

/// All of them.
pub struct Mounts(Vec<Mount>);

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Mount {
    /// Its number, which another may have that comes later.
    pub id: u64,
    /// Of its file system, major and minor.
    pub device: (u32, u32),
    /// Which directory of its file system it shows.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
    /// What it may not be used for, and the like.
    options: Vec<u8>,
    /// The type of its file system, with a subtype behind a dot.
    kind: Vec<u8>,
}

/// File systems, beside those by FUSE, of which a look at a file is a question to somebody: a server, or who mounts what is asked for.
const ASK_OTHERS: [&[u8]; 9] = [b"9p", b"afs", b"autofs", b"ceph", b"cifs", b"lustre", b"nfs", b"nfs4", b"smb3"];

impl Mounts {
    /// Those that this thread sees now.
    pub fn read() -> io::Result<Self> {
        Ok(Self(
            fs::read("/proc/thread-self/mountinfo")?.split(|byte| *byte == b'\n').filter_map(Mount::parse).collect(),
        ))
    }

    /// The one that an open file is in, if this thread sees it.
    pub fn of(&self, file: impl AsFd) -> Result<Option<&Mount>, Errno> {
        let id = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id;
        Ok(self.0.iter().find(|mount| mount.id == id))
    }

    /// Those of a file system, if they show all of it.
    pub fn whole(&self, device: (u32, u32)) -> impl Iterator<Item = &Mount> {
        self.0.iter().filter(move |mount| mount.device == device && mount.root == Path::new("/"))
    }

    /// Those somewhere below a path.
    pub fn below(&self, path: &Path) -> Vec<&Mount> {
        self.0.iter().filter(|mount| mount.point != path && mount.point.starts_with(path)).collect()
    }
}

impl Mount {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let id = number(fields.next()?)?;
        let device = fields.nth(1)?.split(|byte| *byte == b':').map(number).collect::<Option<Vec<u32>>>()?;
        let [major, minor] = device[..] else { return None };
        let (root, point) = (path(fields.next()?), path(fields.next()?));
        let options = fields.next()?.into();
        // As many fields as there are come before.
        let kind = fields.skip_while(|field| *field != b"-").nth(1)?.into();
        Some(Self { id, device: (major, minor), root, point, options, kind })
    }
}

fn number<T: std::str::FromStr>(text: &[u8]) -> Option<T> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Spaces and the like are written as three octal digits behind a backslash.
fn path(text: &[u8]) -> PathBuf {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).filter(|_| *first == b'\\').and_then(|digits| {
            digits.iter().try_fold(0u8, |value, digit| {
                let digit = digit.checked_sub(b'0').filter(|digit| *digit < 8)?;
                value.checked_mul(8)?.checked_add(digit)
            })
        });
        plain.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    OsString::from_vec(plain).into()
}

impl Mount {
    /// Whether somebody is asked about its files, who may take as long as they like for an answer.
    pub fn asks_others(&self) -> bool {
        self.kind.starts_with(b"fuse") || ASK_OTHERS.contains(&&*self.kind)
    }

    /// What a path that is in this mount is called in its file system, from there on.
    pub fn in_file_system(&self, path: &Path) -> Option<PathBuf> {
        let below = path.strip_prefix(&self.point).ok()?;
        let root = self.root.strip_prefix("/").ok()?;
        // Of a directory that was removed.
        (!self.root.as_os_str().as_bytes().ends_with(b"//deleted")).then(|| root.join(below))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_taken_apart() {
        let line = br"36 35 98:0 /mnt1/a\040b /mnt\134\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        let mount = Mount::parse(line).unwrap();
        assert_eq!((mount.id, mount.device), (36, (98, 0)));
        assert_eq!((mount.root.as_path(), mount.point.as_path()), (Path::new("/mnt1/a b"), Path::new(r"/mnt\ 2")));
        assert_eq!(mount.in_file_system(Path::new(r"/mnt\ 2/x")), Some("mnt1/a b/x".into()));
        assert_eq!(mount.in_file_system(Path::new("/mnt")), None);
        assert!(!mount.asks_others());
        for kind in ["nfs4", "fuse.sshfs", "fuseblk", "autofs"] {
            let line = format!("1 2 0:9 / /mnt rw - {kind} server rw");
            assert!(Mount::parse(line.as_bytes()).unwrap().asks_others(), "{kind}");
        }
        for wrong in
            [&b""[..], b"x", b"36 35 98 / / rw", b"36 35 98:x / / rw - ext3 /dev/root rw", b"36 35 98:0 / / rw"]
        {
            assert_eq!(Mount::parse(wrong), None);
        }
        let odd = path(br"\9\777\0");
        assert_eq!(odd.as_os_str().as_bytes(), br"\9\777\0");
    }

    #[test]
    fn what_is_mounted_below_a_path_is_found() {
        let mounts = Mounts::read().unwrap();
        assert!(mounts.below(Path::new("/")).iter().any(|mount| mount.point == Path::new("/proc")));
        assert!(mounts.below(Path::new("/proc")).iter().all(|mount| mount.point != Path::new("/proc")));
        assert!(mounts.below(Path::new("/pro")).is_empty());
    }
}
