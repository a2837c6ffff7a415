//! Block devices of the node as volumes: by themselves, and with a file system on them that kubelet mounts.

use std::fs;
use std::path::Path;
use std::process::Command;

use k8s_cri::v1::Device;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::disks::Loop;
use super::oci;
use crate::cri::{Cri, PATIENT, container, volume};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] =
    &[oci("cri_disks::as_they_are", as_they_are), oci("cri_disks::with_a_file_system", with_a_file_system)];

fn device(disk: &Loop, path: &str, permissions: &str) -> Device {
    Device { container_path: path.into(), host_path: disk.path.display().to_string(), permissions: permissions.into() }
}

/// As for `volumeDevices` of a pod.
fn as_they_are(scene: &Scene) -> Outcome {
    let (disk, other) = (Loop::new(scene)?, Loop::new(scene)?);
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("disks")?)?;
    let with = |name: &str, devices| {
        let mut config = container(name, PATIENT);
        config.devices = devices;
        cri.launch(&pod, config)
    };
    let writer = with("writer", vec![device(&disk, "/dev/xvda", "rwm"), device(&other, "/dev/data/b", "r")])?;
    let script = "head -c 11 /dev/xvda; echo; stat -c %F /dev/xvda; \
        echo from inside | dd of=/dev/xvda bs=512 seek=1 conv=notrunc,fsync 2>/dev/null; blockdev --getsize64 /dev/xvda";
    let expected = "of the host\nblock special file\n4194304\n";
    ensure_eq!(cri.shell(&writer, script)?, expected, "what is on it, what it is, and its size");
    ensure_eq!(disk.read(512, 11)?, "from inside", "what the host has");
    // What may only be read is, and by nobody who was not given it.
    ensure_eq!(cri.shell(&writer, "head -c 11 /dev/data/b")?, "of the host", "the other");
    let write = "echo no | dd of=/dev/data/b bs=512 conv=notrunc,fsync";
    ensure!(cri.exec(&writer, &["sh", "-c", write], 0)?.status != 0, "what may only be read is written to");
    ensure_eq!(other.read(0, 11)?, "of the host", "what the host has of the other");
    let stranger = with("stranger", Vec::new())?;
    let script = "for number in $(cat /sys/block/*/dev); do mknod /disk b ${number%:*} ${number#*:} && head -c 1 /disk && echo read; \
        rm -f /disk; done";
    let tried = cri.exec(&stranger, &["sh", "-c", script], 0)?;
    ensure!(!tried.stdout.contains("read"), "a container reads disks of another: {tried:?}");
    // One that is made anew has it again, with what is on it.
    cri.stop(&writer, 10)?;
    cri.remove(&writer)?;
    let again = with("again", vec![device(&disk, "/dev/xvda", "rwm")])?;
    ensure_eq!(cri.shell(&again, "tail -c +513 /dev/xvda | head -c 11")?, "from inside", "what is on it");
    cri.remove_pod(&pod)?;
    // Nobody holds it any more: else it would be detached when they let go.
    for disk in [disk, other] {
        let name = disk.path.file_name().unwrap_or_default().to_owned();
        drop(disk);
        ensure!(!Path::new("/sys/block").join(&name).join("loop").exists(), "{name:?} is in use");
    }
    cri.end()
}

/// kubelet mounts it on the node, and binds that.
fn with_a_file_system(scene: &Scene) -> Outcome {
    let disk = Loop::new(scene)?;
    let made = Command::new("mke2fs").args(["-q", "-t", "ext4", "-F"]).arg(&disk.path).output()?;
    ensure!(made.status.success(), "mke2fs: {}", String::from_utf8_lossy(&made.stderr));
    let path = scene.make_directory("volume")?;
    mount(&disk.path, &path, "ext4", MountFlags::empty(), None)?;
    let used = used(scene, &path);
    let unmounted = unmount(&path, UnmountFlags::empty());
    used?;
    // Had anybody kept it, it would be busy.
    unmounted?;
    Ok(())
}

fn used(scene: &Scene, path: &Path) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("file-system")?)?;
    let mut config = container("main", PATIENT);
    config.mounts = vec![volume(path, "/data", false)];
    let id = cri.launch(&pod, config)?;
    cri.shell(&id, "mkdir /data/directory; echo kept >/data/directory/file; ls -d /data/lost+found")?;
    ensure_eq!(fs::read_to_string(path.join("directory/file"))?, "kept\n", "file on the node");
    // It has its size, which is not that of the node's disk.
    let full = cri.exec(&id, &["dd", "if=/dev/zero", "of=/data/big", "bs=64k", "count=100"], 0)?;
    ensure!(full.status != 0 && full.stderr.contains("No space left"), "writing too much: {full:?}");
    cri.shell(&id, "rm /data/big")?;
    cri.remove_pod(&pod)?;
    cri.end()
}
