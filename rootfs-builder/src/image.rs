//! The image: what is in it, and how it becomes the same bytes every time.
//!
//! | path | mode | purpose |
//! | --- | --- | --- |
//! | `/sbin/podhull-agent` | 0755 | the agent; the kernel is started with `init=/sbin/podhull-agent` |
//! | `/dev` | 0755 | the kernel mounts devtmpfs on it before the agent starts |
//! | `/proc`, `/sys` | 0555 | mount points of the file systems of these names |
//! | `/run`, `/share` | 0755 | mount points of a tmpfs and of the pod's share |
//! | `/tmp` | 1777 | mount point of a tmpfs |
//!
//! Everything belongs to root, bears one fixed time and has no extended attributes. Files are neither compressed nor
//! stored within an inode, because EROFS maps a file in place (DAX) only if its data is whole blocks by itself. The
//! length is a multiple of 2 MiB, the unit in which the guest's kernel takes persistent memory.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::agent;

/// Where the agent is in the image.
const AGENT: &str = "sbin/podhull-agent";

/// Directories of the image with their modes.
const DIRECTORIES: &[(&str, u32)] = &[
    ("", 0o755),
    ("dev", 0o755),
    ("proc", 0o555),
    ("run", 0o755),
    ("sbin", 0o755),
    ("share", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
];

/// Bytes to whose multiple the image is padded.
const ALIGNMENT: u64 = 2 << 20;

/// Time of every file, in seconds since 1970: the same for all images, so that only contents make a difference.
const TIME: &str = "0";

/// Identity of the file system, which mkfs.erofs would else take from a random source.
const UUID: &str = "706f6468-756c-8c00-8000-677565737400";

/// Why no image was made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The agent could not be read.
    #[error("read the agent {path}: {source}")]
    ReadAgent {
        /// The path as it was given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The agent would not start in the guest.
    #[error("the agent {path} is {source}")]
    Agent {
        /// The path as it was given.
        path: PathBuf,
        /// What is wrong with it.
        source: agent::Unfit,
    },
    /// The image's contents or the image itself could not be written.
    #[error("{action} {path}: {source}")]
    Write {
        /// What was being done.
        action: &'static str,
        /// To which file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// `mkfs.erofs` is not installed.
    #[error("mkfs.erofs is not in PATH; install the package erofs-utils")]
    NoMkfs,
    /// `mkfs.erofs` could not be started.
    #[error("start mkfs.erofs: {0}")]
    StartMkfs(#[source] io::Error),
    /// `mkfs.erofs` failed.
    #[error("mkfs.erofs failed ({status}): {message}")]
    Mkfs {
        /// How it ended.
        status: std::process::ExitStatus,
        /// Its last line of output.
        message: String,
    },
}

/// Makes the image of `agent` and puts it at `output`, replacing what is there in one step.
///
/// Needs `mkfs.erofs` 1.5 or newer. What is written on the way lies in one directory beside `output`, removed at the end.
pub fn build(agent: &Path, output: &Path) -> Result<(), BuildError> {
    let program = fs::read(agent).map_err(|source| BuildError::ReadAgent { path: agent.into(), source })?;
    agent::check(&program).map_err(|source| BuildError::Agent { path: agent.into(), source })?;

    let folder = match output.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let work = tempfile::Builder::new()
        .prefix(".guest-image-")
        .tempdir_in(folder)
        .map_err(failed("make a directory for the image in", folder))?;

    let tree = work.path().join("tree");
    lay_out(&tree, &program)?;
    let image = work.path().join("image");
    make_erofs(&tree, &image)?;
    finish(&image)?;
    fs::rename(&image, output).map_err(failed("write the image to", output))
}

/// Makes the directory tree that becomes the image.
fn lay_out(tree: &Path, program: &[u8]) -> Result<(), BuildError> {
    for (name, mode) in DIRECTORIES {
        let path = tree.join(name);
        fs::create_dir(&path).map_err(failed("make the directory", &path))?;
        set_mode(&path, *mode)?;
    }
    let path = tree.join(AGENT);
    fs::write(&path, program).map_err(failed("write", &path))?;
    set_mode(&path, 0o755)
}

/// Modes are set, not created with, so that the caller's umask has no part in them.
fn set_mode(path: &Path, mode: u32) -> Result<(), BuildError> {
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed("set the mode of", path))
}

/// Makes the EROFS `image` from `tree`.
fn make_erofs(tree: &Path, image: &Path) -> Result<(), BuildError> {
    let made = Command::new("mkfs.erofs")
        .args(["-T", TIME, "-U", UUID, "--all-root", "-x-1", "-Enoinline_data,force-inode-compact"])
        .arg(image)
        .arg(tree)
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => BuildError::NoMkfs,
            _ => BuildError::StartMkfs(error),
        })?;
    if made.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&made.stderr);
    let message = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing").trim().to_owned();
    Err(BuildError::Mkfs { status: made.status, message })
}

/// Pads the image to [`ALIGNMENT`], makes it readable for everybody and durable.
fn finish(image: &Path) -> Result<(), BuildError> {
    set_mode(image, 0o644)?;
    let file = File::options().write(true).open(image).map_err(failed("open", image))?;
    let length = file.metadata().map_err(failed("read the length of", image))?.len();
    file.set_len(length.next_multiple_of(ALIGNMENT)).map_err(failed("pad", image))?;
    file.sync_all().map_err(failed("write", image))
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BuildError {
    move |source| BuildError::Write { action, path: path.into(), source }
}
