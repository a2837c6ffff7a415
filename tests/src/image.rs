//! A container image as a file, as any caller loads it.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::bundle::{DEBIAN, make_busybox_root};
use crate::suite::Scene;
use crate::{Outcome, ensure};

/// What Docker and Podman call it.
pub const NAME: &str = "busybox";

/// Its whole name.
pub const WHOLE_NAME: &str = "docker.io/library/busybox:latest";

/// How Podman and Buildah store images, without a mount that stays.
pub const DRIVER: &[&str] = &["--storage-driver", "overlay", "--storage-opt", "overlay.skip_mount_home=true"];

/// Makes an archive of busybox, which goes with the test's directory.
pub fn busybox(scene: &Scene) -> Outcome<PathBuf> {
    busybox_as(scene, WHOLE_NAME)
}

/// The same by another name.
pub fn busybox_as(scene: &Scene, name: &str) -> Outcome<PathBuf> {
    let directory = scene.make_directory("image")?;
    let root = directory.join("root");
    make_busybox_root(&root)?;
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    // Users as in any image.
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\nother:x:1000:1000:other:/:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\nother:x:1000:\nextra:x:50000:other\n")?;
    archive(&directory, name, "/bin", &["sh"])
}

/// Makes an archive `name` of a program that waits, as Kubernetes has one in each pod.
pub fn pause(scene: &Scene, name: &str) -> Outcome<PathBuf> {
    let directory = scene.make_directory("image")?;
    make_busybox_root(&directory.join("root"))?;
    archive(&directory, name, "/bin", &["sleep", "2147483647"])
}

/// Makes an archive `services` of what the root of servers has beside its programs, which are mounted at `/usr` then, and of
/// further files in `/etc`.
pub fn of_services(scene: &Scene, files: &[(&str, &str)]) -> Outcome<PathBuf> {
    let directory = scene.make_directory("image")?;
    let root = directory.join("root");
    without_programs(Path::new("/bundles/services/rootfs"), &root, &["etc"])?;
    for name in ["data", "var/lib/nginx", "var/log/nginx"] {
        fs::create_dir_all(root.join(name))?;
    }
    for (name, text) in files {
        fs::write(root.join("etc").join(name), text)?;
    }
    archive(&directory, "docker.io/library/services:latest", "/usr/sbin:/usr/bin", &["sh"])
}

/// What is to be mounted in containers of [`of_debian`].
pub const DEBIAN_PROGRAMS: &str = "/bundles/debian/rootfs/usr:/usr:ro";

/// Makes an archive `localhost/debian` of what the Debian has beside its programs: they are mounted.
pub fn of_debian(scene: &Scene) -> Outcome<PathBuf> {
    let directory = scene.make_directory("image")?;
    without_programs(Path::new(DEBIAN), &directory.join("root"), &["etc", "var"])?;
    archive(&directory, "localhost/debian:latest", "/usr/sbin:/usr/bin", &["sh"])
}

/// Makes a root of some of the directories of another.
fn without_programs(other: &Path, root: &Path, directories: &[&str]) -> Outcome {
    for name in ["dev", "opt", "proc", "root", "run", "sys", "tmp", "usr"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    for name in ["bin", "lib", "lib64", "sbin"] {
        symlink(Path::new("usr").join(name), root.join(name))?;
    }
    for name in directories {
        let status = Command::new("cp").arg("-a").arg(other.join(name)).arg(root).status()?;
        ensure!(status.success(), "cp: {status}");
    }
    Ok(())
}

/// Makes one of `root` in a directory: one layer, its configuration, and a list of both.
fn archive(directory: &Path, name: &str, path: &str, command: &[&str]) -> Outcome<PathBuf> {
    let (root, parts) = (directory.join("root"), directory.join("parts"));
    fs::create_dir_all(&parts)?;
    tar(&parts.join("layer.tar"), &root, &["."])?;
    fs::remove_dir_all(&root)?;
    let sum = Command::new("sha256sum").arg(parts.join("layer.tar")).output()?;
    ensure!(sum.status.success(), "sha256sum: {}", sum.status);
    let sum = String::from_utf8(sum.stdout)?;
    let sum = sum.split(' ').next().unwrap_or_default();
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Env": [format!("PATH={path}")], "Cmd": command },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{sum}")] },
    });
    fs::write(parts.join("config.json"), config.to_string())?;
    let manifest = json!([{ "Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"] }]);
    fs::write(parts.join("manifest.json"), manifest.to_string())?;
    let archive = directory.join("image.tar");
    tar(&archive, &parts, &["manifest.json", "config.json", "layer.tar"])?;
    fs::remove_dir_all(&parts)?;
    Ok(archive)
}

/// What is in a directory, as an archive.
fn tar(archive: &Path, directory: &Path, names: &[&str]) -> Outcome {
    let status = Command::new("tar").arg("-C").arg(directory).arg("-cf").arg(archive).args(names).status()?;
    ensure!(status.success(), "tar: {status}");
    Ok(())
}
