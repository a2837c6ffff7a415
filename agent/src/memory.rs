//! Memory that containers of a pod share as files: tmpfs of the guest, where the host binds one of its own into several of them.
//! Behind two binds virtio-fs has two files, whose pages are not the same.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{CWD, Mode};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use crate::pod::PodError;

/// All of it.
pub struct Memory {
    directory: PathBuf,
    made: Mutex<HashSet<String>>,
}

impl Memory {
    /// None yet; what is made is below `directory`.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory, made: Mutex::default() }
    }

    /// Makes one, if it is not there. `name` must be a name and not a path.
    pub fn make(&self, name: &str, bytes: u64, mode: u32) -> Result<(), PodError> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.contains(name) {
            return Ok(());
        }
        let failed = |source| PodError::Memory { name: name.into(), source };
        let path = self.directory.join(name);
        for directory in [&self.directory, &path] {
            // A container in a user namespace goes through it.
            match rustix::fs::mkdirat(CWD, directory, Mode::from_raw_mode(0o711)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
        let size = if bytes == 0 { String::new() } else { format!("size={bytes},") };
        let options = format!("{size}mode={:o}", mode & 0o7777);
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        let options = std::ffi::CString::new(options).map_err(|_| failed(Errno::INVAL))?;
        mount("tmpfs", &path, "tmpfs", flags, &*options).map_err(failed)?;
        made.insert(name.into());
        Ok(())
    }
}
