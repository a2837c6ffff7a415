//! Files that container and host share: the root file system and bind mounts.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde_json::json;

use super::{oci, podhull};
use crate::bundle::DEBIAN;
use crate::run::DEADLINE;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("files::debian_programs_run", debian_programs_run),
    oci("files::a_replaced_file_is_seen_at_once", a_replaced_file_is_seen_at_once),
    oci("files::a_directory_made_anew_is_seen_at_once", a_directory_made_anew_is_seen_at_once),
    oci("files::bind_mounts", bind_mounts),
    podhull("files::id_mapped_mounts", id_mapped_mounts),
    oci("files::overlays_of_the_host", overlays_of_the_host),
    oci("files::the_root_behaves_as_a_local_file_system", the_root_behaves_as_a_local_file_system),
    oci("files::a_large_file_is_the_same_from_both_sides", a_large_file_is_the_same_from_both_sides),
];

/// A directory in the Debian root that goes away with the test.
struct Shared {
    inside: String,
    outside: PathBuf,
}

impl Shared {
    fn new(scene: &Scene) -> Outcome<Self> {
        let inside = format!("/var/tmp/{}", scene.id());
        let outside = Path::new(DEBIAN).join(&inside[1..]);
        fs::create_dir(&outside)?;
        Ok(Self { inside, outside })
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.outside);
    }
}

fn debian_programs_run(scene: &Scene) -> Outcome {
    let found = scene.run(&scene.debian()?.python("import sys; print('python', 6 * 7, sys.version_info.major)"))?;
    ensure_eq!(found.output()?, "python 42 3\n", "python3");
    let found = scene.run(&scene.debian()?.args(&["apt-get", "--version"]))?.output()?;
    ensure!(found.starts_with("apt ") && found.contains("Supported modules"), "apt-get --version: {found:?}");
    let found = scene.run(&scene.debian()?.args(&["stress-ng", "--version"]))?.output()?;
    ensure!(found.starts_with("stress-ng, version"), "stress-ng --version: {found:?}");
    Ok(())
}

/// Ten times PODHULL_TEST_REPEAT replacements, by rename and in place, each read by name right afterwards.
fn a_replaced_file_is_seen_at_once(scene: &Scene) -> Outcome {
    let shared = Shared::new(scene)?;
    let script = format!("while read order; do cat {0}/file; ls {0} | wc -l; done", shared.inside);
    fs::write(shared.outside.join("file"), "first\n")?;
    let mut run = scene.start(&scene.debian()?.sh(&script))?;
    run.send(b"read\n")?;
    run.expect_line("first")?;
    run.expect_line("1")?;
    for number in 0..10 * scene.repeat {
        let text = format!("{number} {}\n", "x".repeat(number % 100));
        if number % 3 == 2 {
            File::options().write(true).truncate(true).open(shared.outside.join("file"))?.write_all(text.as_bytes())?;
        } else {
            fs::write(shared.outside.join("next"), &text)?;
            fs::rename(shared.outside.join("next"), shared.outside.join("file"))?;
        }
        run.send(b"read\n")?;
        let line = run.line()?;
        ensure!(line == text.trim_end_matches('\n'), "replacement {number} was not seen, but {line:?}");
        run.expect_line("1")?;
    }
    fs::remove_file(shared.outside.join("file"))?;
    fs::write(shared.outside.join("other"), "")?;
    run.send(b"read\n")?;
    run.expect_line("1")?;
    let ended = run.wait()?.expect_status(0)?;
    ensure!(ended.stderr.contains("No such file"), "a file removed on the host is still there: {:?}", ended.stderr);
    Ok(())
}

/// As often, the directory around the file: removed and made anew, or replaced by rename, which may be seen a moment late.
fn a_directory_made_anew_is_seen_at_once(scene: &Scene) -> Outcome {
    let shared = Shared::new(scene)?;
    let script = format!(
        "cd {}; while read order; do [ $order != list ] || ls a/b; cat a/b/file; [ $order != write ] || echo made >a/b/from-guest; done",
        shared.inside
    );
    let make = |name: &str, text: &str| -> Outcome {
        fs::create_dir_all(shared.outside.join(name).join("b"))?;
        Ok(fs::write(shared.outside.join(name).join("b/file"), text)?)
    };
    make("a", "first\n")?;
    let mut run = scene.start(&scene.debian()?.writable().sh(&script))?;
    run.send(b"read\n")?;
    run.expect_line("first")?;
    for number in 0..10 * scene.repeat {
        fs::remove_dir_all(shared.outside.join("a"))?;
        make("a", &format!("made {number}\n"))?;
        run.send(b"write\n")?;
        run.expect_line(&format!("made {number}"))?;
        run.send(b"read\n")?;
        run.expect_line(&format!("made {number}"))?;
        let written = fs::read_to_string(shared.outside.join("a/b/from-guest"))?;
        ensure_eq!(written, "made\n", "the file of the container");

        fs::remove_dir_all(shared.outside.join("a"))?;
        make("a", &format!("made {number}\n"))?;
        run.send(b"list\n")?;
        run.expect_line("file")?;
        run.expect_line(&format!("made {number}"))?;

        make("next", &format!("renamed {number}\n"))?;
        fs::rename(shared.outside.join("a"), shared.outside.join("last"))?;
        fs::rename(shared.outside.join("next"), shared.outside.join("a"))?;
        let until = Instant::now() + DEADLINE;
        loop {
            run.send(b"read\n")?;
            let line = run.line()?;
            if line == format!("renamed {number}") {
                break;
            }
            ensure!(line == format!("made {number}") && Instant::now() < until, "{line:?} instead of renamed {number}");
        }
        fs::remove_dir_all(shared.outside.join("last"))?;
    }
    run.close_stdin();
    run.wait()?.expect_status(0).map(drop)
}

fn bind_mounts(scene: &Scene) -> Outcome {
    let (writable, readonly) = (scene.make_directory("writable")?, scene.make_directory("readonly")?);
    fs::create_dir(writable.join("below"))?;
    fs::write(readonly.join("file"), "given\n")?;
    let single = scene.directory.join("single");
    fs::write(&single, "single\n")?;
    let script = "
exec 2>&1
echo made >/mnt/made
cat /media/file
touch /media/made
cat /etc/debian_version
echo more >>/etc/debian_version
mkdir /mnt/below/deeper
cp /bin/true /mnt/program; /mnt/program && echo executed
ls /srv /srv/below
cat /proc/self/mountinfo >/mnt/mountinfo";
    let bundle = scene
        .debian()?
        .bind(&writable, "/mnt", &["rbind", "rw", "noexec"])
        .bind(&readonly, "/media", &["bind", "ro", "nosuid", "nodev"])
        .bind(&single, "/etc/debian_version", &["bind"])
        .bind(&writable, "/srv", &["bind", "ro"])
        .sh(script);
    let found = scene.run(&bundle)?.output()?;
    ensure!(found.contains("given\n"), "a file of the bind mount:\n{found}");
    ensure!(found.contains("/media/made': Read-only file system"), "a read-only bind mount:\n{found}");
    ensure!(found.contains("single\n"), "a bind mount of one file:\n{found}");
    ensure!(found.contains("/mnt/program: Permission denied") && !found.contains("executed"), "noexec:\n{found}");
    ensure!(found.contains("/srv/below:\ndeeper"), "a second mount of the same directory:\n{found}");
    ensure_eq!(fs::read_to_string(writable.join("made"))?, "made\n", "a file made inside");
    ensure_eq!(fs::read_to_string(&single)?, "single\nmore\n", "the single file after an append inside");
    ensure!(writable.join("below/deeper").is_dir(), "a directory made inside is not on the host");
    Ok(())
}

/// The files of a volume belong to the users of a container with users of its own, under the numbers they have there.
fn id_mapped_mounts(scene: &Scene) -> Outcome {
    let volume = scene.make_directory("volume")?;
    for (name, user) in [("root", 0), ("user", 1000), ("stranger", 70_000)] {
        fs::write(volume.join(name), name)?;
        chown(volume.join(name), Some(user), Some(user))?;
    }
    let mapping = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    let script = "
set -e
stat -c '%u %g' /mnt/root /mnt/user /mnt/stranger /srv/user /media/root
echo more >/mnt/new
chown 1000:5 /mnt/new
mkdir /mnt/directory
stat -c '%u %g' /mnt/new /mnt/directory
setpriv --reuid 1000 --regid 1000 --clear-groups sh -c 'echo mine >>/mnt/user && touch /mnt/other' 2>/dev/null || echo closed
! rm /srv/user 2>/dev/null || echo removed";
    let bundle = scene
        .debian()?
        .namespaces(&["user", "pid", "mount", "network", "ipc", "uts", "cgroup"])
        .capabilities(&["CAP_CHOWN", "CAP_SETUID", "CAP_SETGID"])
        .set("/linux/uidMappings", mapping.clone())
        .set("/linux/gidMappings", mapping.clone())
        .bind(&volume, "/mnt", &["bind", "idmap"])
        .bind(&volume, "/srv", &["rbind", "ro"])
        .push(
            "/mounts",
            // By its own mappings: what is root's is user 7's of the host, which is nobody in the container.
            json!({ "destination": "/media", "type": "bind", "source": volume, "options": ["rbind", "ridmap"],
                "uidMappings": [{ "containerID": 0, "hostID": 100_007, "size": 1 }],
                "gidMappings": [{ "containerID": 0, "hostID": 100_008, "size": 1 }] }),
        )
        .sh(script);
    let found = scene.run(&bundle)?.output()?;
    let nobody = "65534 65534";
    ensure_eq!(
        found,
        format!("0 0\n1000 1000\n{nobody}\n{nobody}\n7 8\n1000 5\n0 0\nclosed\n"),
        "owners inside, and what its users may"
    );
    ensure_eq!(fs::read_to_string(volume.join("user"))?, "usermine\n", "what its user wrote");
    for (name, owner) in [("new", (1000, 5)), ("directory", (0, 0)), ("stranger", (70_000, 70_000))] {
        let stat = fs::metadata(volume.join(name))?;
        ensure_eq!((stat.uid(), stat.gid()), owner, "owner of {name} on the host");
    }
    // Where that cannot be had: procfs has no such mounts.
    let bundle = scene
        .debian()?
        .namespaces(&["user", "pid", "mount", "network", "ipc", "uts", "cgroup"])
        .set("/linux/uidMappings", mapping.clone())
        .set("/linux/gidMappings", mapping)
        .bind(Path::new("/proc/sys"), "/mnt", &["bind", "idmap"]);
    let refused = scene.run(&bundle.args(&["true"]))?.expect_status(1)?;
    ensure!(refused.stderr.contains("\"/proc/sys\" cannot have other owners"), "stderr: {}", refused.stderr);
    Ok(())
}

/// As Podman asks for with `-v DIR:/PATH:O`, and for volumes that are images.
fn overlays_of_the_host(scene: &Scene) -> Outcome {
    let [lower, upper, work, image] = ["lower", "upper", "work", "image"].map(|name| scene.make_directory(name));
    let (lower, upper, work, image) = (lower?, upper?, work?, image?);
    fs::write(lower.join("file"), "below\n")?;
    fs::write(image.join("more"), "image\n")?;
    let path = |directory: &Path| directory.display().to_string();
    let writable = [
        format!("lowerdir={}", path(&lower)),
        format!("upperdir={}", path(&upper)),
        format!("workdir={}", path(&work)),
        "nosuid".into(),
    ];
    let layers = [format!("lowerdir={}:{}", path(&image), path(&lower)), "ro".into()];
    let mount = |destination: &str, options: &[String]| json!({ "destination": destination, "type": "overlay", "source": "overlay", "options": options });
    let script = "
cat /mnt/file; echo above >/mnt/file; rm /mnt/file; echo again >/mnt/file; cat /mnt/file; mkdir /mnt/directory
cat /srv/file /srv/more; touch /srv/new 2>/dev/null || echo closed";
    let bundle =
        scene.debian()?.push("/mounts", mount("/mnt", &writable)).push("/mounts", mount("/srv", &layers)).sh(script);
    ensure_eq!(scene.run(&bundle)?.output()?, "below\nagain\nbelow\nimage\nclosed\n", "what is seen inside");
    ensure_eq!(fs::read_to_string(upper.join("file"))?, "again\n", "the upper file");
    ensure!(upper.join("directory").is_dir(), "no directory in the upper one");
    ensure_eq!(fs::read_to_string(lower.join("file"))?, "below\n", "the lower file");
    if scene.runtime.is_virtual() {
        let missing = [format!("lowerdir={}", path(&lower.join("none")))];
        let bundle = scene.debian()?.push("/mounts", mount("/mnt", &missing)).args(&["true"]);
        let refused = scene.run(&bundle)?.expect_status(1)?;
        ensure!(refused.stderr.contains("cannot mount the overlay \"lowerdir="), "stderr: {}", refused.stderr);
    }
    Ok(())
}

fn the_root_behaves_as_a_local_file_system(scene: &Scene) -> Outcome {
    let shared = Shared::new(scene)?;
    let capabilities = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_DAC_READ_SEARCH",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_SETFCAP",
        "CAP_SYS_ADMIN",
    ];
    let script = include_str!("files.py");
    let bundle = scene.debian()?.writable().capabilities(&capabilities);
    let bundle = bundle.args(&["python3", "-c", script, &shared.inside]);
    let ended = scene.run(&bundle)?;
    ensure!(ended.stdout == "0 wrong\n" && ended.status == 0, "inside:\n{}{}", ended.stdout, ended.stderr);

    // What the host finds of it.
    let about = |name: &str| fs::symlink_metadata(shared.outside.join(name));
    let owned = about("owned")?;
    ensure_eq!((owned.uid(), owned.gid()), (1234, 5678), "owner on the host");
    ensure_eq!(about("sticky/mine")?.uid(), 4000, "owner on the host of another user's file");
    ensure_eq!(about("sticky")?.mode() & 0o7777, 0o3777, "mode on the host");
    ensure_eq!((owned.mtime(), owned.mtime_nsec()), (2, 2), "time on the host");
    ensure!(about("pipe")?.file_type().is_fifo(), "the pipe is none on the host");
    ensure_eq!(fs::read_link(shared.outside.join("dangling"))?, Path::new("/no/such/file"), "target on the host");
    ensure_eq!(about("dangling")?.uid(), 77, "owner of the symbolic link on the host");
    let mapped = fs::read(shared.outside.join("mapped"))?;
    ensure!(mapped[4096..4101] == *b"first" && mapped[8192..8198] == *b"second", "the shared mapping on the host");
    let xattr = |name: &str, attribute: &str| -> Outcome<Vec<u8>> {
        let mut value = vec![0; 64];
        let length = rustix::fs::getxattr(shared.outside.join(name), attribute, &mut value[..])?;
        value.truncate(length);
        Ok(value)
    };
    // `link` and `named` have changed places.
    ensure_eq!(xattr("named", "user.colour")?, b"green\0blue", "extended attribute on the host");
    ensure_eq!(xattr("capable", "security.capability")?.len(), 20, "file capability on the host");
    Ok(())
}

/// 200 MB each way.
fn a_large_file_is_the_same_from_both_sides(scene: &Scene) -> Outcome {
    let shared = Shared::new(scene)?;
    let megabytes = 200;
    let mut file = File::create(shared.outside.join("from-outside"))?;
    let mut block = vec![0; 1_000_000];
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..megabytes {
        // xorshift64: nothing on the way can compress or guess it.
        for word in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&block)?;
    }
    drop(file);
    let script = "
import hashlib, os, sys
os.chdir(sys.argv[1])
digest, seed = hashlib.sha256(), os.urandom(1000000)
with open('from-inside', 'wb') as file:
    for number in range(200):
        block = seed[number:] + seed[:number]
        digest.update(block)
        file.write(block)
print(digest.hexdigest())
for name in ('from-inside', 'from-outside'):
    with open(name, 'rb') as file:
        print(hashlib.file_digest(file, 'sha256').hexdigest())
";
    let bundle = scene.debian()?.writable().args(&["python3", "-c", script, &shared.inside]);
    let mut run = scene.start(&bundle)?;
    let (written, read, outside) = (run.line()?, run.line()?, run.line()?);
    run.wait()?.expect_status(0)?;
    let hash = |name: &str| -> Outcome<String> {
        let output = Command::new("sha256sum").arg(shared.outside.join(name)).output()?;
        let text = String::from_utf8(output.stdout)?;
        Ok(text.split(' ').next().unwrap_or_default().to_owned())
    };
    ensure_eq!(
        fs::metadata(shared.outside.join("from-inside"))?.len(),
        200_000_000,
        "length of the file written inside"
    );
    ensure_eq!(hash("from-inside")?, written, "SHA-256 on the host of what was written inside");
    ensure_eq!(read, written, "SHA-256 inside of what was written inside");
    ensure_eq!(outside, hash("from-outside")?, "SHA-256 inside of what was written on the host");
    Ok(())
}
