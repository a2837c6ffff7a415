//! Block devices of the host that a container is given: disks of its machine. Another container of the pod that is given the same
//! one has the same disk, which stays as long as the machine.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use podhull_protocol::Disk;
use podhull_vmm::control::Resource;
use rustix::fs::{FileType, Mode, OFlags, makedev, mknodat, openat};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use super::view::file_system;
use crate::spec::{Config, devices};

/// A device that cannot be given to a pod.
#[derive(Debug, thiserror::Error)]
#[error("linux.devices[{index}]: {path:?}: cannot open block device {major}:{minor} of this host: {errno}{}", remedy(*errno))]
pub struct DiskError {
    index: usize,
    path: PathBuf,
    major: i64,
    minor: i64,
    errno: Errno,
}

fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::NXIO | Errno::NODEV => "; there is none with this number",
        _ => "",
    }
}

/// Disks of a container.
pub struct Disks {
    /// For the machine.
    pub resources: Vec<(Resource, OwnedFd)>,
    /// For the agent.
    pub told: Vec<Disk>,
}

/// Opens what the specification names, by its numbers: what is at its path on the host is not what it asks for.
pub fn open(config: &Config) -> Result<Disks, DiskError> {
    let mut disks = Disks { resources: Vec::new(), told: Vec::new() };
    for (index, device, read_only) in devices::disks(config.spec()) {
        let (major, minor) = (device.major(), device.minor());
        let failed = |errno| DiskError { index, path: device.path().clone(), major, minor, errno };
        let number = |number: i64| u32::try_from(number).map_err(|_| failed(Errno::INVAL));
        let (major, minor) = (number(major)?, number(minor)?);
        let (fd, read_only) = open_device(major, minor, read_only).map_err(failed)?;
        // Without what it is open for: the machine has it once, and is to see if that is not enough.
        let serial = format!("{major}:{minor}");
        disks.told.push(Disk { major, minor, serial: serial.clone(), ..Default::default() });
        disks.resources.push((Resource::Disk { read_only, serial }, fd));
    }
    Ok(disks)
}

/// By a node of our own, which nobody else can reach. Returns too whether it can only be read.
fn open_device(major: u32, minor: u32, read_only: bool) -> Result<(OwnedFd, bool), Errno> {
    let place = file_system("tmpfs", &[("size", "16k"), ("mode", "0700")], MountAttrFlags::empty())?;
    mknodat(&place, "disk", FileType::BlockDevice, Mode::RUSR | Mode::WUSR, makedev(major, minor))?;
    let open = |flags| openat(&place, "disk", flags | OFlags::CLOEXEC, Mode::empty());
    if !read_only {
        match open(OFlags::RDWR) {
            // As with any runtime: it is there, and whoever writes to it is told.
            Err(Errno::ROFS | Errno::ACCESS) => {}
            opened => return Ok((opened?, false)),
        }
    }
    Ok((open(OFlags::RDONLY)?, true))
}
