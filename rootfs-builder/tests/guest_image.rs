//! The builder as its users run it, and its image read back with the tools of EROFS.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails by it")]

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, SystemTime};

/// Magic of an EROFS superblock, 1024 bytes into the image (`fs/erofs/erofs_fs.h` of Linux).
const EROFS_MAGIC: u32 = 0xe0f5_e1e2;

fn builder(agent: &Path, output: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_podhull-rootfs-builder"));
    command.arg("--agent").arg(agent).arg("--output").arg(output);
    command
}

fn build(agent: &Path, output: &Path) {
    let run = builder(agent, output).output().unwrap();
    assert!(run.status.success(), "{}", said(&run));
}

/// What a failed run told its user.
fn said(run: &Output) -> String {
    String::from_utf8(run.stderr.clone()).unwrap()
}

/// A static program at hand: the builder itself.
fn agent_in(folder: &Path) -> PathBuf {
    let agent = folder.join("agent");
    fs::copy(env!("CARGO_BIN_EXE_podhull-rootfs-builder"), &agent).unwrap();
    agent
}

fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn equal_agents_give_equal_images_whatever_their_date_owner_mode_and_the_umask() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent_in(folder.path());
    let first = folder.path().join("first.img");
    build(&agent, &first);

    let elsewhere = tempfile::tempdir().unwrap();
    let copy = agent_in(elsewhere.path());
    fs::set_permissions(&copy, Permissions::from_mode(0o400)).unwrap();
    File::open(&copy).unwrap().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
    // Only root may give a file away; whoever else runs this test has one difference fewer.
    let _ = chown(&copy, Some(1234), Some(5678));
    let second = elsewhere.path().join("second.img");
    let mut command = builder(&copy, &second);
    // SAFETY: umask is async-signal-safe and is all that runs between fork and exec.
    let run = unsafe {
        command.pre_exec(|| {
            libc::umask(0o077);
            Ok(())
        })
    }
    .output()
    .unwrap();
    assert!(run.status.success(), "{}", said(&run));

    assert!(fs::read(&first).unwrap() == fs::read(&second).unwrap(), "the two images differ");
    assert_eq!(fs::metadata(&second).unwrap().mode() & 0o7777, 0o644);
}

#[test]
fn the_image_holds_the_agent_and_its_mount_points_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent_in(folder.path());
    let image = folder.path().join("guest.img");
    build(&agent, &image);

    let bytes = fs::read(&image).unwrap();
    assert_eq!(bytes[1024..1028], EROFS_MAGIC.to_le_bytes());
    assert_eq!(bytes[1024 + 12], 12, "blocks of 4096 bytes");
    assert_eq!(bytes.len() % (2 << 20), 0);

    let tree = folder.path().join("tree");
    let check = Command::new("fsck.erofs").arg(format!("--extract={}", tree.display())).arg(&image).output().unwrap();
    assert!(check.status.success(), "{}", said(&check));
    assert_eq!(names_in(&tree), ["dev", "proc", "run", "sbin", "share", "sys", "tmp"]);
    assert_eq!(names_in(&tree.join("sbin")), ["podhull-agent"]);
    assert!(fs::read(tree.join("sbin/podhull-agent")).unwrap() == fs::read(&agent).unwrap());
    for empty in ["dev", "proc", "run", "share", "sys", "tmp"] {
        assert_eq!(names_in(&tree.join(empty)), [""; 0], "{empty}");
    }
}

#[test]
fn ownership_and_modes_are_those_of_the_table() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent_in(folder.path());
    let image = folder.path().join("guest.img");
    build(&agent, &image);

    for (path, mode) in [
        ("/", 0o040755),
        ("/dev", 0o040755),
        ("/proc", 0o040555),
        ("/run", 0o040755),
        ("/sbin", 0o040755),
        ("/sbin/podhull-agent", 0o100755),
        ("/share", 0o040755),
        ("/sys", 0o040555),
        ("/tmp", 0o041777),
    ] {
        let shown = dump(&image, path);
        assert!(shown.contains("Uid: 0   Gid: 0"), "{path}: {shown}");
        assert_eq!(mode_of(&image, &shown), mode, "{path}");
    }
}

/// `i_mode` of the inode whose number dump.erofs has shown; the tool itself leaves out the sticky bit.
fn mode_of(image: &Path, shown: &str) -> u16 {
    let nid: usize = shown.split("NID: ").nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap();
    let bytes = fs::read(image).unwrap();
    let meta_block = u32::from_le_bytes(bytes[1024 + 40..1024 + 44].try_into().unwrap()) as usize;
    let inode = meta_block * 4096 + nid * 32;
    u16::from_le_bytes(bytes[inode + 4..inode + 6].try_into().unwrap())
}

/// Compressed and inlined files cannot be mapped in place.
#[test]
fn the_agent_is_stored_as_whole_uncompressed_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent_in(folder.path());
    let image = folder.path().join("guest.img");
    build(&agent, &image);

    let shown = dump(&image, "/sbin/podhull-agent");
    assert!(shown.contains("Layout: 0"), "not the flat plain layout: {shown}");
    let size = fs::metadata(&agent).unwrap().len();
    assert!(shown.contains(&format!("Size: {size}  On-disk size: {size}")), "{shown}");
}

fn dump(image: &Path, path: &str) -> String {
    let run = Command::new("dump.erofs").arg(format!("--path={path}")).arg(image).output().unwrap();
    assert!(run.status.success(), "{}", said(&run));
    String::from_utf8(run.stdout).unwrap()
}

#[test]
fn a_failed_build_says_why_and_leaves_the_old_image_alone() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent_in(folder.path());
    let script = folder.path().join("script");
    fs::write(&script, "#!/bin/sh\n").unwrap();
    let image = folder.path().join("guest.img");
    fs::write(&image, "the old one").unwrap();
    let before = names_in(folder.path());

    let missing = folder.path().join("nowhere");
    for (mut command, complaint) in [
        (builder(&missing, &image), format!("read the agent {}: No such file", missing.display())),
        (builder(&script, &image), format!("the agent {} is not a 64-bit ELF program", script.display())),
        (without_path(builder(&agent, &image)), "install the package erofs-utils".to_owned()),
        (
            builder(&agent, &missing.join("guest.img")),
            format!("make a directory for the image in {}", missing.display()),
        ),
        (builder(&agent, folder.path()), format!("write the image to {}", folder.path().display())),
    ] {
        let run = command.output().unwrap();
        assert_eq!(run.status.code(), Some(1), "{complaint}");
        assert!(said(&run).contains(&complaint), "{} does not say {complaint}", said(&run));
        assert_eq!(said(&run).lines().count(), 1);
        assert_eq!(names_in(folder.path()), before);
        assert_eq!(fs::read(&image).unwrap(), b"the old one");
    }
}

fn without_path(mut command: Command) -> Command {
    command.env("PATH", "/nonexistent");
    command
}
