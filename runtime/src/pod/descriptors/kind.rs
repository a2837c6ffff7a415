//! What a descriptor is, and so what can stand for it in the guest.

use std::os::fd::OwnedFd;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};

use super::DescriptorError;
use crate::pod::tree::Tree;
use crate::stdio::Way;

/// Why a file is refused that no mount shows.
pub const NOWHERE: &str = "its file is mounted nowhere that podhull could share it from, and a copy would not be the same file; open \
                           it for reading alone to have its bytes handed over";

/// What is kept of how a file was opened.
const FILE_FLAGS: OFlags =
    OFlags::ACCMODE.union(OFlags::APPEND).union(OFlags::SYNC).union(OFlags::DSYNC).union(OFlags::PATH);

/// File systems whose files are the host's kernel itself, by `linux/magic.h`: those of processes and of devices, control groups,
/// debugging and tracing, objects of BPF, namespaces.
const OF_THE_KERNEL: [i64; 10] = [
    0x9fa0,
    0x6265_6572,
    0x27_e0eb,
    0x6367_7270,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
    0xcafe_4a11,
    0x6165_676c,
    NAMESPACES,
];
const NAMESPACES: i64 = 0x6e73_6673;

/// What stands for a descriptor.
pub enum Kind {
    /// The same file, through the share, opened and positioned the same way.
    File { flags: OFlags, position: u64, tree: Tree<'static> },
    /// The device that the guest has itself.
    Device { name: &'static str, flags: OFlags },
    /// Its bytes.
    Stream(Way),
}

/// A descriptor, looked at.
pub struct Look {
    pub number: i32,
    /// What the kernel calls it.
    pub name: String,
    pub kind: Kind,
    /// Of a file: whether its bytes may stand for it.
    pub can_be_stream: bool,
    pub nonblocking: bool,
}

impl Look {
    /// The error that there is nothing like it in the guest.
    pub fn refuse(&self, why: &'static str) -> DescriptorError {
        DescriptorError::Refused { number: self.number, name: self.name.clone(), why }
    }
}

/// Looks at a descriptor that the caller has at `number`.
pub fn look(number: i32, fd: &OwnedFd) -> Result<Look, DescriptorError> {
    let failed = |errno| DescriptorError::Look(number, errno);
    let name = super::name(number, fd)?;
    let refuse = |why| Err(DescriptorError::Refused { number, name: name.clone(), why });
    let stat = rustix::fs::fstat(fd).map_err(failed)?;
    let flags = rustix::fs::fcntl_getfl(fd).map_err(failed)?;
    let access = flags & OFlags::ACCMODE;
    let path_only = flags.contains(OFlags::PATH);
    let nonblocking = flags.contains(OFlags::NONBLOCK);
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        kind @ (FileType::RegularFile | FileType::Directory) => {
            let directory = kind == FileType::Directory;
            let readable = !directory && !path_only && access == OFlags::RDONLY;
            let system = rustix::fs::fstatfs(fd).map_err(failed)?;
            if OF_THE_KERNEL.contains(&system.f_type) {
                match readable && system.f_type != NAMESPACES {
                    true => Kind::Stream(Way::In),
                    false => {
                        return refuse(
                            "it is part of the host's kernel; of such files only the bytes can be handed over",
                        );
                    }
                }
            } else {
                let position = match directory || path_only {
                    true => 0,
                    false => rustix::fs::tell(fd).map_err(failed)?,
                };
                let (kept, read_only) = match directory {
                    true => ((flags & FILE_FLAGS) | OFlags::DIRECTORY, false),
                    false => (flags & FILE_FLAGS, readable),
                };
                let tree = Tree { recursive: directory, read_only, all_read_only: false, owners: None };
                let can_be_stream = readable;
                return Ok(Look {
                    number,
                    name,
                    kind: Kind::File { flags: kept, position, tree },
                    can_be_stream,
                    nonblocking,
                });
            }
        }
        _ if path_only => return refuse("it was opened with O_PATH, and is neither a file nor a directory"),
        FileType::Fifo => match access {
            OFlags::RDONLY => Kind::Stream(Way::In),
            OFlags::WRONLY => Kind::Stream(Way::Out),
            _ => return refuse("it is a pipe that is open for reading and for writing; open it for one of them"),
        },
        FileType::CharacterDevice => match device(stat.st_rdev) {
            Some(name) => Kind::Device { name, flags: access },
            None if rustix::termios::isatty(fd) => Kind::Stream(way(access)),
            None => return refuse("it is a device of the host"),
        },
        FileType::BlockDevice => return refuse("it is a block device of the host; name it in linux.devices instead"),
        FileType::Socket => match socket(fd).map_err(failed)? {
            Socket::Connected => Kind::Stream(Way::Both),
            Socket::Idle => return refuse("it is a socket that is neither connected nor listening"),
            Socket::Other => return refuse("only stream sockets of AF_UNIX, AF_INET and AF_INET6 can be"),
        },
        _ => {
            return refuse(
                "files, directories, pipes, stream sockets, terminals, null, zero, full, random and urandom can be",
            );
        }
    };
    Ok(Look { number, name, kind, can_be_stream: false, nonblocking })
}

/// Which way bytes go that a descriptor was opened for.
fn way(access: OFlags) -> Way {
    match access {
        OFlags::RDONLY => Way::In,
        OFlags::WRONLY => Way::Out,
        _ => Way::Both,
    }
}

enum Socket {
    Connected,
    Idle,
    Other,
}

fn socket(fd: &OwnedFd) -> Result<Socket, Errno> {
    let streams = [AddressFamily::UNIX, AddressFamily::INET, AddressFamily::INET6];
    if sockopt::socket_type(fd)? != SocketType::STREAM || !streams.contains(&sockopt::socket_domain(fd)?) {
        return Ok(Socket::Other);
    }
    match rustix::net::getpeername(fd) {
        Ok(_) => Ok(Socket::Connected),
        Err(Errno::NOTCONN) => Ok(Socket::Idle),
        Err(errno) => Err(errno),
    }
}

/// The device that every kernel has under this number.
fn device(number: u64) -> Option<&'static str> {
    const MEMORY: u32 = 1;
    match (rustix::fs::major(number), rustix::fs::minor(number)) {
        (MEMORY, 3) => Some("null"),
        (MEMORY, 5) => Some("zero"),
        (MEMORY, 7) => Some("full"),
        (MEMORY, 8) => Some("random"),
        (MEMORY, 9) => Some("urandom"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::Mode;

    fn open(path: &str, flags: OFlags) -> OwnedFd {
        rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    fn refusal(fd: OwnedFd) -> String {
        match look(7, &fd) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("taken"),
        }
    }

    #[test]
    fn a_file_is_shared_as_it_was_opened() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("file");
        std::fs::write(&path, "0123456789").unwrap();
        let path = path.to_str().unwrap();
        let fd = open(path, OFlags::RDONLY | OFlags::NONBLOCK);
        rustix::fs::seek(&fd, rustix::fs::SeekFrom::Start(4)).unwrap();
        let Look { kind: Kind::File { flags, position, tree }, can_be_stream, nonblocking, .. } = look(3, &fd).unwrap()
        else {
            panic!("no file");
        };
        assert_eq!((flags, position), (OFlags::RDONLY, 4));
        assert!(tree.read_only && !tree.recursive && can_be_stream && nonblocking);
        let fd = open(path, OFlags::RDWR | OFlags::APPEND | OFlags::TRUNC);
        let Look { kind: Kind::File { flags, tree, .. }, can_be_stream, .. } = look(3, &fd).unwrap() else {
            panic!("no file");
        };
        assert_eq!(flags, OFlags::RDWR | OFlags::APPEND);
        assert!(!tree.read_only && !can_be_stream);
        let fd = open(base.path().to_str().unwrap(), OFlags::RDONLY | OFlags::DIRECTORY);
        let Look { kind: Kind::File { flags, tree, .. }, .. } = look(3, &fd).unwrap() else { panic!("no directory") };
        assert_eq!(flags, OFlags::RDONLY | OFlags::DIRECTORY);
        assert!(tree.recursive && !tree.read_only);
    }

    #[test]
    fn pipes_have_one_direction_and_devices_are_the_guests() {
        let (reader, writer) = std::io::pipe().unwrap();
        assert!(matches!(look(3, &reader.into()).unwrap().kind, Kind::Stream(Way::In)));
        assert!(matches!(look(3, &writer.into()).unwrap().kind, Kind::Stream(Way::Out)));
        let kind = look(3, &open("/dev/zero", OFlags::RDONLY)).unwrap().kind;
        assert!(matches!(kind, Kind::Device { name: "zero", flags: OFlags::RDONLY }));
    }

    #[test]
    fn what_has_no_like_is_refused_by_number_and_name() {
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let text = refusal(event);
        assert!(text.starts_with("descriptor 7 (anon_inode:[eventfd]) cannot be handed"), "{text}");
        assert!(refusal(open("/proc/self", OFlags::RDONLY)).contains("the host's kernel"));
        assert!(refusal(open("/dev/null", OFlags::PATH)).contains("O_PATH"));
        assert!(matches!(look(3, &open("/proc/self/stat", OFlags::RDONLY)).unwrap().kind, Kind::Stream(Way::In)));
    }
}
