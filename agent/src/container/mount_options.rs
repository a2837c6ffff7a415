//! Mount options as callers write them, sorted by who takes them: the mount, its propagation, or the file system.

use rustix::mount::MountPropagationFlags as Propagation;

/// Attributes of `mount_setattr(2)`; the libc crate has them, in types of their own.
pub mod attribute {
    pub const RDONLY: u64 = 0x1;
    pub const NOSUID: u64 = 0x2;
    pub const NODEV: u64 = 0x4;
    pub const NOEXEC: u64 = 0x8;
    /// The field of the following three; relatime is zero.
    pub const ATIME: u64 = 0x70;
    pub const RELATIME: u64 = 0x00;
    pub const NOATIME: u64 = 0x10;
    pub const STRICTATIME: u64 = 0x20;
    pub const NODIRATIME: u64 = 0x80;
    pub const NOSYMFOLLOW: u64 = 0x20_0000;
}
use attribute as attr;

/// Attributes to set and to clear on a mount, or a tree of mounts.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    pub set: u64,
    pub clear: u64,
}

impl Attributes {
    /// Later options win over earlier ones.
    fn apply(&mut self, change: Change) {
        match change {
            Change::Set(bits) => {
                self.set |= bits;
                self.clear &= !bits;
            }
            Change::Clear(bits) => {
                self.set &= !bits;
                self.clear |= bits;
            }
            // The kernel wants the whole field cleared where any value of it is set.
            Change::Atime(value) => {
                self.set = self.set & !attr::ATIME | value;
                self.clear |= attr::ATIME;
            }
        }
    }

    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}

#[derive(Clone, Copy)]
enum Change {
    Set(u64),
    Clear(u64),
    Atime(u64),
}

/// An option string, taken apart.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// A bind mount; `Some(true)` with the mounts below its source.
    pub bind: Option<bool>,
    pub remount: bool,
    /// Fill a tmpfs with what it covers.
    pub copy_up: bool,
    /// Of this mount.
    pub attributes: Attributes,
    /// Of this mount and those below.
    pub recursive: Attributes,
    /// In order; each with whether it goes for the mounts below as well.
    pub propagation: Vec<(PropagationKind, bool)>,
    /// Flags of the file system instance that every kind of file system has.
    pub superblock: Vec<&'static str>,
    /// What only the kind of file system can know.
    pub data: Vec<(String, Option<String>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PropagationKind {
    Private,
    Shared,
    Slave,
    Unbindable,
}

impl PropagationKind {
    /// `MS_PRIVATE` and so on.
    pub fn flags(self) -> Propagation {
        match self {
            Self::Private => Propagation::PRIVATE,
            Self::Shared => Propagation::SHARED,
            // rustix names slave by its other word.
            Self::Slave => Propagation::DOWNSTREAM,
            Self::Unbindable => Propagation::UNBINDABLE,
        }
    }

    /// `shared`, `rslave` and so on, and whether it is the recursive one.
    pub fn parse(word: &str) -> Option<(Self, bool)> {
        let kind = |word| match word {
            "private" => Some(Self::Private),
            "shared" => Some(Self::Shared),
            "slave" => Some(Self::Slave),
            "unbindable" => Some(Self::Unbindable),
            _ => None,
        };
        kind(word).map(|kind| (kind, false)).or_else(|| Some((kind(word.strip_prefix('r')?)?, true)))
    }
}

/// An option that would have to be dropped.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    #[error("mount option {0:?}: id-mapped mounts are not supported")]
    IdMapped(String),
    #[error("mount option {0:?}: expected a name, or name=value")]
    Malformed(String),
}

impl MountOptions {
    pub fn parse(options: &[String]) -> Result<Self, OptionError> {
        let mut parsed = Self::default();
        for option in options {
            parsed.take(option)?;
        }
        Ok(parsed)
    }

    fn take(&mut self, option: &str) -> Result<(), OptionError> {
        match option {
            "defaults" | "silent" | "loud" => {}
            "bind" => self.bind = Some(self.bind.unwrap_or(false)),
            "rbind" => self.bind = Some(true),
            "remount" => self.remount = true,
            "tmpcopyup" => self.copy_up = true,
            "idmap" | "ridmap" => return Err(OptionError::IdMapped(option.into())),
            "sync" => self.superblock.push("sync"),
            "async" => self.superblock.push("async"),
            "dirsync" => self.superblock.push("dirsync"),
            "lazytime" => self.superblock.push("lazytime"),
            "nolazytime" => self.superblock.push("nolazytime"),
            "mand" => self.superblock.push("mand"),
            "nomand" => self.superblock.push("nomand"),
            _ => {
                if let Some(change) = change(option) {
                    self.attributes.apply(change);
                } else if let Some(change) = option.strip_prefix('r').and_then(change) {
                    self.recursive.apply(change);
                } else if let Some(propagation) = PropagationKind::parse(option) {
                    self.propagation.push(propagation);
                } else {
                    self.data.push(match option.split_once('=') {
                        Some(("", _)) => return Err(OptionError::Malformed(option.into())),
                        Some((key, value)) => (key.into(), Some(value.into())),
                        None if option.is_empty() => return Err(OptionError::Malformed(option.into())),
                        None => (option.into(), None),
                    });
                }
            }
        }
        Ok(())
    }
}

fn change(option: &str) -> Option<Change> {
    Some(match option {
        "ro" => Change::Set(attr::RDONLY),
        "rw" => Change::Clear(attr::RDONLY),
        "nosuid" => Change::Set(attr::NOSUID),
        "suid" => Change::Clear(attr::NOSUID),
        "nodev" => Change::Set(attr::NODEV),
        "dev" => Change::Clear(attr::NODEV),
        "noexec" => Change::Set(attr::NOEXEC),
        "exec" => Change::Clear(attr::NOEXEC),
        "nodiratime" => Change::Set(attr::NODIRATIME),
        "diratime" => Change::Clear(attr::NODIRATIME),
        "nosymfollow" => Change::Set(attr::NOSYMFOLLOW),
        "symfollow" => Change::Clear(attr::NOSYMFOLLOW),
        "noatime" => Change::Atime(attr::NOATIME),
        "strictatime" => Change::Atime(attr::STRICTATIME),
        // The negations mean "not that": what is left is the kernel's default.
        "relatime" | "atime" | "norelatime" | "nostrictatime" => Change::Atime(attr::RELATIME),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> MountOptions {
        MountOptions::parse(&options.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn options_go_to_whom_they_concern() {
        let options = parse(&["nosuid", "noexec", "ro", "mode=755", "newinstance", "rslave", "sync", "rnodev"]);
        assert_eq!(options.attributes, Attributes { set: attr::NOSUID | attr::NOEXEC | attr::RDONLY, clear: 0 });
        assert_eq!(options.recursive, Attributes { set: attr::NODEV, clear: 0 });
        assert_eq!(options.data, [("mode".into(), Some("755".into())), ("newinstance".into(), None)]);
        assert_eq!(options.propagation, [(PropagationKind::Slave, true)]);
        assert_eq!(options.superblock, ["sync"]);
    }

    #[test]
    fn the_last_of_two_contrary_options_wins() {
        assert_eq!(parse(&["ro", "rw"]).attributes, Attributes { set: 0, clear: attr::RDONLY });
        assert_eq!(parse(&["suid", "nosuid"]).attributes, Attributes { set: attr::NOSUID, clear: 0 });
        assert_eq!(
            parse(&["noatime", "strictatime"]).attributes,
            Attributes { set: attr::STRICTATIME, clear: attr::ATIME }
        );
        assert_eq!(parse(&["rbind", "bind"]).bind, Some(true));
    }

    #[test]
    fn words_that_begin_with_r_are_not_all_recursive() {
        let options = parse(&["ro", "relatime", "rro", "rrelatime", "rprivate", "remount"]);
        assert_eq!(options.attributes, Attributes { set: attr::RDONLY, clear: attr::ATIME });
        assert_eq!(options.recursive, Attributes { set: attr::RDONLY, clear: attr::ATIME });
        assert!(options.remount);
    }

    #[test]
    fn what_would_be_dropped_is_refused() {
        assert_eq!(MountOptions::parse(&["idmap".into()]), Err(OptionError::IdMapped("idmap".into())));
        assert_eq!(MountOptions::parse(&["=x".into()]), Err(OptionError::Malformed("=x".into())));
    }
}
