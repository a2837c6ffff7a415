//! Block devices of the host among a container's devices.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::process::Command;

use serde_json::json;

use super::{oci, podhull, pods};
use crate::bundle::Bundle;
use crate::container::Container;
use crate::leaks::Leaks;
use crate::podman::{self, Podman};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("disks::read_and_written_as_their_rules_say", read_and_written_as_their_rules_say),
    podhull("disks::of_several_containers_of_a_pod", of_several_containers_of_a_pod),
    oci("disks::of_podman_privileged_and_not", of_podman_privileged_and_not),
];

/// A loop device, over a file of the test's.
pub struct Loop {
    file: PathBuf,
    /// Where it is.
    pub path: PathBuf,
    major: u32,
    minor: u32,
}

/// Bytes of its file.
const SIZE: u64 = 4 << 20;

impl Loop {
    /// Over a new file, which begins with a few words.
    pub fn new(scene: &Scene) -> Outcome<Self> {
        let file = scene.make_directory("disk")?.join("file");
        File::create_new(&file)?.set_len(SIZE)?;
        fs::File::options().write(true).open(&file)?.write_all_at(b"of the host", 0)?;
        let made = Command::new("losetup").args(["--find", "--show"]).arg(&file).output()?;
        ensure!(made.status.success(), "losetup: {}", String::from_utf8_lossy(&made.stderr));
        let path = PathBuf::from(String::from_utf8(made.stdout)?.trim());
        let stat = fs::metadata(&path)?;
        ensure!(stat.file_type().is_block_device(), "{} is no block device", path.display());
        let (major, minor) = (rustix::fs::major(stat.rdev()), rustix::fs::minor(stat.rdev()));
        Ok(Self { file, path, major, minor })
    }

    /// A bundle with this disk at a path, and rules that allow as much.
    pub fn give(&self, bundle: Bundle, path: &str, access: &str) -> Bundle {
        give((self.major, self.minor), bundle, path, access)
    }

    /// What is at a place of it on the host.
    pub fn read(&self, offset: u64, length: usize) -> Outcome<String> {
        let mut bytes = vec![0; length];
        File::open(&self.file)?.read_exact_at(&mut bytes, offset)?;
        Ok(String::from_utf8(bytes)?)
    }
}

/// The same with any numbers.
fn give((major, minor): (u32, u32), bundle: Bundle, path: &str, access: &str) -> Bundle {
    bundle
        .set(
            "/linux/devices",
            json!([{ "path": path, "type": "b", "major": major, "minor": minor, "fileMode": 0o640, "uid": 0, "gid": 6 }]),
        )
        .set(
            "/linux/resources/devices",
            json!([
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "b", "major": major, "minor": minor, "access": access },
            ]),
        )
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

const WRITE: &str = "dd of=/dev/xvdz bs=512 seek=1 conv=notrunc,fsync status=none";

fn read_and_written_as_their_rules_say(scene: &Scene) -> Outcome {
    let disk = Loop::new(scene)?;
    let before = Leaks::watch();
    let script = format!(
        "head -c 11 /dev/xvdz; echo; echo from inside | {WRITE} && echo written; blockdev --getsize64 /dev/xvdz; \
         stat -c '%F %A %u %g' /dev/xvdz"
    );
    let found = scene.run(&disk.give(scene.debian()?, "/dev/xvdz", "rwm").sh(&script))?.output()?;
    ensure_eq!(found, format!("of the host\nwritten\n{SIZE}\nblock special file brw-r----- 0 6\n"), "the disk inside");
    ensure_eq!(disk.read(512, 11)?, "from inside", "what was written, on the host");

    let script = format!("head -c 11 /dev/xvdz; echo; echo never | {WRITE} 2>/dev/null || echo closed");
    let found = scene.run(&disk.give(scene.debian()?, "/dev/xvdz", "rm").sh(&script))?.output()?;
    ensure_eq!(found, "of the host\nclosed\n", "a disk that may be read");
    ensure_eq!(disk.read(512, 11)?, "from inside", "what could not be written, on the host");

    // With users of its own a container cannot have nodes of its own.
    let mapping = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    let path = if scene.runtime.is_virtual() { "/dev/xvdz".into() } else { disk.path.to_string_lossy() };
    let bundle = disk
        .give(scene.debian()?, &path, "rm")
        .namespaces(&["user", "pid", "mount", "network", "ipc", "uts", "cgroup"])
        .set("/linux/uidMappings", mapping.clone())
        .set("/linux/gidMappings", mapping)
        .sh("cd /dev; stat -c %F xvd* loop* 2>/dev/null; true");
    ensure_eq!(scene.run(&bundle)?.output()?, "block special file\n", "a disk of a container with users of its own");
    before.check()?;
    if scene.runtime.is_virtual() {
        let bundle = give((4095, 77), scene.debian()?, "/dev/xvdz", "r").args(&["true"]);
        let refused = scene.run(&bundle)?.expect_status(1)?;
        let expected = "linux.devices[0]: \"/dev/xvdz\": cannot open block device 4095:77 of this host: ";
        ensure!(refused.stderr.contains(expected), "stderr: {}", refused.stderr);
    }
    Ok(())
}

/// They have one disk, and so see at once what another has written.
fn of_several_containers_of_a_pod(scene: &Scene) -> Outcome {
    let disk = Loop::new(scene)?;
    let before = Leaks::watch();
    let first = Container::make(
        scene,
        &disk.give(scene.debian()?, "/dev/xvdz", "r").sh("head -c 11 /dev/xvdz; echo ready; sleep 1000"),
        &["run", "-d"],
    )?;
    first.expect_output("ready")?;
    let writing = |access| -> Outcome<Bundle> {
        let bundle = disk.give(scene.debian()?, "/dev/xvdz", access);
        Ok(pods::in_the_pod_of(bundle, &first).sh(&format!("echo from a member | {WRITE}; echo done")))
    };
    // Two disks with the same bytes would not agree, and this one cannot be written.
    let refused = scene.run(&writing("rw")?)?.expect_status(1)?;
    let expected = format!("has disk \"{}:{}\" already, and only for reading", disk.major, disk.minor);
    ensure!(refused.stderr.contains(&expected), "stderr: {}", refused.stderr);
    first.end()?;

    let first = Container::make(scene, &scene.debian()?.sh("echo ready; sleep 1000"), &["run", "-d"])?;
    first.expect_output("ready")?;
    let member = |script: &str| -> Outcome<String> {
        let bundle = pods::in_the_pod_of(disk.give(scene.debian()?, "/dev/xvdz", "rw"), &first).sh(script);
        scene.run(&bundle)?.output()
    };
    ensure_eq!(member("echo from a member | dd of=/dev/xvdz bs=512 seek=2 conv=notrunc status=none")?, "", "writing");
    let read = "dd if=/dev/xvdz bs=512 skip=2 count=1 status=none | head -c 13";
    ensure_eq!(member(read)?, "from a member", "what the next one reads");
    ensure_eq!(member("ls -d /sys/block/vd*")?, "/sys/block/vda\n", "disks of the machine");
    first.end()?;
    ensure_eq!(disk.read(1024, 13)?, "from a member", "what came to the host");
    before.check()
}

/// Whoever asks for a privileged container means its machine, and not all the disks of the host.
fn of_podman_privileged_and_not(scene: &Scene) -> Outcome {
    let disk = Loop::new(scene)?;
    let podman = Podman::new(scene)?;
    let before = Leaks::watch();
    let path = disk.path.to_string_lossy().into_owned();
    let (device, privileged) = (format!("{path}:/dev/given:r"), scene.runtime.is_virtual());
    let script = "head -c 11 /dev/given; echo; find /dev -type b | wc -l; mount -t tmpfs none /mnt && echo mounted";
    let found = podman.run(&["--rm", "--device", &device], &["sh", "-c", script])?;
    ensure_eq!(found.stdout, "of the host\n1\n", "with a device; stderr {:?}", found.stderr);
    if privileged {
        let script =
            "find /dev -type b | wc -l; mount -t tmpfs none /mnt && echo mounted; test -c /dev/null && echo null";
        let found = podman.run(&["--rm", "--privileged"], &["sh", "-c", script])?.output()?;
        ensure_eq!(found, "0\nmounted\nnull\n", "privileged");
    }
    podman::check(&before)
}
