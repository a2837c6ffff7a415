//! Descriptors that a caller hands to a container's program beyond its standard streams (`--preserve-fds`, `LISTEN_FDS`). One of the
//! host means nothing to another kernel: each is stood for in the guest by what behaves the same, or refused by its number and name.

mod attached;
mod inherited;
mod kind;

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use podhull_protocol::{Descriptor, GuestDevice, MAX_DESCRIPTORS, SharedFile, descriptor};
use rustix::io::Errno;

pub use attached::{Attached, directory as directory_of_executed};
pub use inherited::{Asked, Inherited};
use kind::Kind;

use super::tree::Tree;
use crate::stdio::{Further, StdioError, Way, token};

/// Number of the first beyond the standard streams.
pub const FIRST: i32 = 3;

/// Why a program cannot have the descriptors of its caller.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorError {
    /// In runc's words.
    #[error("unable to stat preserved-fd {index} (of {count}): stat /proc/self/fd/{number}: no such file or directory")]
    Missing {
        /// Which of those to be preserved, from 0.
        index: usize,
        /// How many are to be.
        count: usize,
        /// Its number.
        number: i32,
    },
    /// The same of one that systemd, or who does as it, was to hand over.
    #[error("LISTEN_FDS is {count}, but descriptor {number} is not open")]
    NotListening {
        /// What is in the environment.
        count: usize,
        /// The first that is not open.
        number: i32,
    },
    /// More than are handed over.
    #[error("--preserve-fds, LISTEN_FDS: {0} descriptors are more than {MAX_DESCRIPTORS}")]
    TooMany(usize),
    /// It cannot be looked at.
    #[error("descriptor {0}: {1}")]
    Look(i32, #[source] Errno),
    /// There is nothing like it in the guest.
    #[error("descriptor {number} ({name}) cannot be handed to a virtual machine: {why}")]
    Refused {
        /// Its number.
        number: i32,
        /// What the kernel calls it.
        name: String,
        /// Why not.
        why: &'static str,
    },
    /// The kernel refuses to clone the mount of a file.
    #[error("descriptor {number} ({name}): cannot clone the mount that it is in: {errno}")]
    Clone {
        /// Its number.
        number: i32,
        /// Its path.
        name: String,
        /// Why.
        errno: Errno,
    },
    /// No random numbers.
    #[error(transparent)]
    Token(#[from] StdioError),
}

/// What stands for a program's descriptors.
#[derive(Default)]
pub struct Prepared {
    /// What the agent is told, in order.
    pub told: Vec<Descriptor>,
    /// Files, as detached mounts, and where they are to be below the machine's share.
    pub files: Vec<(String, OwnedFd)>,
    /// What moves over streams.
    pub streams: Vec<Further>,
}

/// Looks at what the descriptors are. Their files are to be in a directory of the share.
pub fn prepare(fds: Vec<OwnedFd>, directory: &str) -> Result<Prepared, DescriptorError> {
    let mut prepared = Prepared::default();
    for (fd, number) in fds.into_iter().zip(FIRST..) {
        let look = kind::look(number, &fd)?;
        let kind = match look.kind {
            Kind::File { flags, position, ref tree } => {
                let path = format!("{directory}/{number}");
                match Tree::clone(tree, fd.as_fd()) {
                    Ok(mount) => {
                        prepared.files.push((path.clone(), mount));
                        let flags = flags.bits();
                        descriptor::Kind::File(SharedFile { path, flags, position, ..Default::default() })
                    }
                    // One that is mounted nowhere, or where we are not.
                    Err(Errno::INVAL) if look.can_be_stream => prepared.stream(fd, Way::In)?,
                    Err(Errno::INVAL) => return Err(look.refuse(kind::NOWHERE)),
                    Err(errno) => return Err(DescriptorError::Clone { number, name: look.name, errno }),
                }
            }
            Kind::Device { name, flags } => {
                let flags = flags.bits();
                descriptor::Kind::Device(GuestDevice { name: name.into(), flags, ..Default::default() })
            }
            Kind::Stream(way) => prepared.stream(fd, way)?,
        };
        let told = Descriptor { kind: Some(kind), nonblocking: look.nonblocking, ..Default::default() };
        prepared.told.push(told);
    }
    Ok(prepared)
}

impl Prepared {
    fn stream(&mut self, fd: OwnedFd, way: Way) -> Result<descriptor::Kind, DescriptorError> {
        let token = token()?;
        self.streams.push(Further { token, fd, way });
        Ok(match way {
            Way::In => descriptor::Kind::Input(token),
            Way::Out => descriptor::Kind::Output(token),
            Way::Both => descriptor::Kind::Socket(token),
        })
    }
}

/// Directory of a container's files among these, below the machine's share.
pub fn directory(container: &str) -> String {
    format!("{container}/descriptors")
}

/// The environment by which a program finds that it has so many listening sockets; it is process 1 of its container.
pub fn environment(listening: usize) -> Vec<String> {
    match listening {
        0 => Vec::new(),
        count => vec![format!("LISTEN_FDS={count}"), "LISTEN_PID=1".into()],
    }
}

/// What the kernel calls an open file.
fn name(number: i32, fd: &OwnedFd) -> Result<String, DescriptorError> {
    use std::os::fd::AsRawFd;
    let link = Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string());
    let name = rustix::fs::readlink(&link, Vec::new()).map_err(|errno| DescriptorError::Look(number, errno))?;
    Ok(name.to_string_lossy().into_owned())
}
