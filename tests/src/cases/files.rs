//! Files that container and host share: the root file system and bind mounts.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::oci;
use crate::bundle::DEBIAN;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("files::debian_programs_run", debian_programs_run),
    oci("files::a_replaced_file_is_seen_at_once", a_replaced_file_is_seen_at_once),
    oci("files::bind_mounts", bind_mounts),
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
