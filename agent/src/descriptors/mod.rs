//! Descriptors of the host that a program has beyond its standard streams: each is stood for by something of the guest's own that
//! behaves as what it is on the host.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use podhull_protocol::{Descriptor, MAX_DESCRIPTORS, descriptor};
use rustix::fs::{CWD, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::pod::relative;
use crate::stdio::{Claim, Pumps, StdioError, Streams};

/// How long the files may take to be opened: the share is as slow as the host's file systems.
const DEADLINE: Duration = Duration::from_secs(30);

/// Flags of open(2) that a file may be opened with.
const FILE_FLAGS: OFlags = OFlags::ACCMODE
    .union(OFlags::APPEND)
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC)
    .union(OFlags::DIRECTORY)
    .union(OFlags::PATH);

/// Devices that every kernel has.
const DEVICES: [&str; 5] = ["null", "zero", "full", "random", "urandom"];

/// Why a program cannot have its descriptors.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorError {
    #[error("descriptors: {0} are more than {MAX_DESCRIPTORS}")]
    TooMany(usize),
    #[error("descriptor {0}: nothing that this agent knows")]
    Unknown(usize),
    #[error("descriptor {number}: path {path:?}: expected a relative path without \"..\"")]
    Path { number: usize, path: String },
    #[error("descriptor {number}: {name:?} is no device that every kernel has")]
    Device { number: usize, name: String },
    #[error("descriptor {number}: open {path}: {source}")]
    Open { number: usize, path: PathBuf, source: Errno },
    #[error("open the files of descriptors: took longer than {} s", DEADLINE.as_secs())]
    Slow,
    #[error("open the files of descriptors: {0}")]
    Task(tokio::task::JoinError),
    #[error("descriptor {number}: {source}")]
    Flags { number: usize, source: Errno },
    #[error(transparent)]
    Stdio(#[from] StdioError),
}

impl DescriptorError {
    /// Whether who asked is at fault.
    pub fn is_invalid(&self) -> bool {
        matches!(self, Self::TooMany(_) | Self::Unknown(_) | Self::Path { .. } | Self::Device { .. })
            || matches!(self, Self::Stdio(StdioError::TokenTwice(_)))
    }
}

/// A file to be opened.
struct File {
    path: PathBuf,
    flags: OFlags,
    position: u64,
}

enum Kind {
    File(File),
    Input(Claim),
    Output(Claim),
    Socket(Claim),
}

/// The descriptors that a program is to have.
pub struct Wanted(Vec<(Kind, bool)>);

impl Wanted {
    /// What a call asks for; from now on its streams may come.
    pub fn of(descriptors: Vec<Descriptor>, share: &Path, streams: &Arc<Streams>) -> Result<Self, DescriptorError> {
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(DescriptorError::TooMany(descriptors.len()));
        }
        let wanted = descriptors.into_iter().zip(3..).map(|(Descriptor { kind, nonblocking, .. }, number)| {
            let kind = match kind.ok_or(DescriptorError::Unknown(number))? {
                descriptor::Kind::File(file) => {
                    let path = relative(&file.path).map(|path| share.join(path));
                    let path = path.ok_or(DescriptorError::Path { number, path: file.path })?;
                    let flags = OFlags::from_bits_retain(file.flags) & FILE_FLAGS;
                    Kind::File(File { path, flags, position: file.position })
                }
                descriptor::Kind::Device(device) => {
                    if !DEVICES.contains(&device.name.as_str()) {
                        return Err(DescriptorError::Device { number, name: device.name });
                    }
                    let flags = OFlags::from_bits_retain(device.flags) & OFlags::ACCMODE;
                    Kind::File(File { path: Path::new("/dev").join(device.name), flags, position: 0 })
                }
                descriptor::Kind::Input(token) => Kind::Input(streams.claim(token)?),
                descriptor::Kind::Output(token) => Kind::Output(streams.claim(token)?),
                descriptor::Kind::Socket(token) => Kind::Socket(streams.claim(token)?),
                _ => return Err(DescriptorError::Unknown(number)),
            };
            Ok((kind, nonblocking))
        });
        Ok(Self(wanted.collect::<Result<_, _>>()?))
    }

    /// Makes them, in order; `pumps` serve them. Pipes belong to the program's user, as its standard streams do.
    pub async fn make(self, pumps: &mut Pumps, uid: u32, gid: u32) -> Result<Vec<OwnedFd>, DescriptorError> {
        let (mut files, mut made) = (Vec::new(), Vec::new());
        for ((kind, nonblocking), number) in self.0.into_iter().zip(3..) {
            let fd = match kind {
                Kind::File(file) => {
                    files.push((made.len(), file));
                    None
                }
                Kind::Input(claim) => Some(pumps.input(Some(claim), uid, gid)?),
                Kind::Output(claim) => Some(pumps.output(Some(claim), uid, gid)?),
                Kind::Socket(claim) => Some(pumps.socket(claim)?),
            };
            made.push((fd, nonblocking, number));
        }
        if !files.is_empty() {
            for (index, fd) in open_all(files).await? {
                made[index].0 = Some(fd);
            }
        }
        let set = |(fd, nonblocking, number): (Option<OwnedFd>, bool, usize)| {
            let fd = fd.ok_or(DescriptorError::Unknown(number))?;
            if nonblocking {
                let flags = rustix::fs::fcntl_getfl(&fd).map(|flags| flags | OFlags::NONBLOCK);
                let set = flags.and_then(|flags| rustix::fs::fcntl_setfl(&fd, flags));
                set.map_err(|source| DescriptorError::Flags { number, source })?;
            }
            Ok(fd)
        };
        made.into_iter().map(set).collect()
    }
}

/// Opens files beside the agent's thread, which has containers to serve.
async fn open_all(files: Vec<(usize, File)>) -> Result<Vec<(usize, OwnedFd)>, DescriptorError> {
    let open = move || files.into_iter().map(|(index, file)| Ok((index, open(index + 3, file)?))).collect();
    let opened = tokio::time::timeout(DEADLINE, tokio::task::spawn_blocking(open)).await;
    opened.map_err(|_| DescriptorError::Slow)?.map_err(DescriptorError::Task)?
}

fn open(number: usize, File { path, flags, position }: File) -> Result<OwnedFd, DescriptorError> {
    let open = || {
        // The host names the file itself, which is no link. Should it have become a pipe, its other end is not waited for.
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NOFOLLOW;
        let fd = rustix::fs::openat(CWD, &path, flags, Mode::empty())?;
        if position != 0 {
            rustix::fs::seek(&fd, SeekFrom::Start(position))?;
        }
        Ok(fd)
    };
    open().map_err(|source| DescriptorError::Open { number, path: path.clone(), source })
}
