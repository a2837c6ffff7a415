//! Volumes of kind hostPath, and parts of volumes, seen from inside.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;

use k8s_cri::v1::{Mount, MountPropagation};
use rustix::mount::{MountPropagationFlags, mount_change};

use super::cri_volumes::{Memory, directory};
use super::disks::Loop;
use super::oci;
use crate::cri::{Cri, PATIENT, container, volume, with_python};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq, image};

pub const CASES: &[Case] = &[
    oci("cri_host_paths::files_and_directories", files_and_directories),
    oci("cri_host_paths::special_files", special_files),
    oci("cri_host_paths::read_only_with_what_is_below", read_only_with_what_is_below),
    oci("cri_host_paths::what_is_mounted_below", what_is_mounted_below),
];

/// Directories, files, a termination log, and part of a volume.
fn files_and_directories(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let host = scene.make_directory("host")?;
    fs::create_dir_all(host.join("directory/below"))?;
    fs::write(host.join("file"), "of the host\n")?;
    fs::write(host.join("termination-log"), "")?;
    let parts = directory(scene, "empty-dir", "parts")?;
    fs::create_dir_all(parts.join("a/b"))?;
    fs::write(parts.join("a/b/c"), "part\n")?;
    fs::write(parts.join("a/settings"), "of a part\n")?;
    // A part of a volume is bound where nobody can put anything else in its place.
    let bound = |part: &str, number: u8| {
        Memory::bind(&parts.join(part), scene.directory.join(format!("pods/uid/volume-subpaths/parts/main/{number}")))
    };
    let (directory_part, file_part) = (bound("a/b", 0)?, bound("a/settings", 1)?);
    let pod = cri.run(cri.pod_config("host")?)?;
    let mut config = container("main", PATIENT);
    config.mounts = vec![
        volume(&host.join("directory"), "/directory", false),
        volume(&host.join("directory"), "/looked-at", true),
        volume(&host.join("file"), "/etc/file", false),
        volume(&host.join("termination-log"), "/dev/termination-log", false),
        volume(&directory_part.0, "/part", false),
        volume(&file_part.0, "/etc/app/settings", false),
        volume(&host.join("file"), "/part/inside", true),
    ];
    let id = cri.launch(&pod, config)?;
    cri.shell(&id, "echo inside >/directory/below/new; echo more >>/etc/file; echo why >/dev/termination-log")?;
    ensure_eq!(fs::read_to_string(host.join("directory/below/new"))?, "inside\n", "file made inside");
    ensure_eq!(fs::read_to_string(host.join("file"))?, "of the host\nmore\n", "file written to inside");
    ensure_eq!(fs::read_to_string(host.join("termination-log"))?, "why\n", "termination log");
    ensure_eq!(cri.shell(&id, "cat /looked-at/below/new /part/c")?, "inside\npart\n", "files");
    ensure_eq!(
        cri.shell(&id, "echo added >>/etc/app/settings; cat /etc/app/*")?,
        "of a part\nadded\n",
        "a file that is a part"
    );
    ensure_eq!(fs::read_to_string(parts.join("a/settings"))?, "of a part\nadded\n", "the same on the host");
    ensure_eq!(cri.shell(&id, "cat /part/inside")?, "of the host\nmore\n", "a file in a volume that is another");
    // What is written in place is seen; another file by that name is not, as with any bind mount.
    fs::write(parts.join("a/settings"), "written anew\n")?;
    ensure_eq!(cri.shell(&id, "cat /etc/app/settings")?, "written anew\n", "what the host has written");
    let denied = cri.exec(&id, &["touch", "/looked-at/no"], 0)?;
    ensure!(denied.stderr.contains("Read-only file system"), "writing where it must not: {denied:?}");
    ensure!(!host.join("directory/no").exists(), "it was made");
    cri.remove_pod(&pod)?;
    drop((directory_part, file_part));
    cri.end()
}

/// A socket, by itself and in its directory, character and block devices, and a directory that is not there.
fn special_files(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    cri.import(&image::of_debian(scene)?)?;
    let host = scene.make_directory("host")?;
    let disk = Loop::new(scene)?;
    fs::create_dir_all(host.join("plugins/driver"))?;
    let serve = |path: &str| -> Outcome<_> {
        let listener = UnixListener::bind(host.join(path))?;
        Ok(std::thread::spawn(move || -> std::io::Result<String> {
            let (mut client, _) = listener.accept()?;
            let mut said = String::new();
            client.read_to_string(&mut said)?;
            client.write_all(b"heard")?;
            Ok(said)
        }))
    };
    let servers = [serve("socket")?, serve("plugins/driver/csi.sock")?];
    let pod = cri.run(cri.pod_config("special")?)?;
    let mounts = vec![
        volume(&host.join("socket"), "/run/driver.sock", false),
        volume(&host.join("plugins"), "/plugins", false),
        volume(Path::new("/dev/zero"), "/dev/nothing", false),
        volume(&disk.path, "/dev/disk", false),
        volume(&host.join("new/directory"), "/new", false),
    ];
    let id = cri.launch(&pod, with_python("main", PATIENT, mounts))?;
    let connect = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); \
        s.send(b'hello'); s.shutdown(socket.SHUT_WR); print(s.recv(100).decode())";
    for (path, server) in ["/run/driver.sock", "/plugins/driver/csi.sock"].into_iter().zip(servers) {
        let talked = cri.exec(&id, &["python3", "-c", connect, path], 60)?;
        ensure_eq!((&*talked.stdout, &*talked.stderr), ("heard\n", ""), "what the server at {path} answers");
        ensure_eq!(server.join().map_err(|_| "the server panicked")??, "hello", "what the server at {path} has heard");
    }
    ensure_eq!(
        cri.shell(&id, "stat -c %F /run/driver.sock /dev/nothing /dev/disk /new")?,
        "socket\ncharacter special file\nblock special file\ndirectory\n",
        "what they are"
    );
    ensure_eq!(cri.shell(&id, "head -c 4 /dev/nothing | tr '\\0' z")?, "zzzz", "bytes of a device");
    // Which devices may be used is not said by what is mounted.
    ensure!(
        cri.exec(&id, &["head", "-c", "1", "/dev/disk"], 0)?.status != 0,
        "a disk is read that is no device of the pod"
    );
    cri.shell(&id, "echo inside >/new/file")?;
    ensure_eq!(fs::read_to_string(host.join("new/directory/file"))?, "inside\n", "file in the directory");
    cri.remove_pod(&pod)?;
    drop(disk);
    cri.end()
}

/// What is mounted below a volume stays writable in an ordinary read-only one with runc, and in a machine nothing does: its kernel
/// mounts it as the volume is.
fn read_only_with_what_is_below(scene: &Scene) -> Outcome {
    let host = scene.make_directory("host")?;
    fs::create_dir(host.join("below"))?;
    let below = Memory::mount(host.join("below"), "size=1m")?;
    let run = |options: &[&str]| {
        let script = "touch /mnt/file; touch /mnt/below/file && echo written";
        scene.run(&scene.debian()?.bind(&host, "/mnt", options).sh(script))
    };
    let ordinary = run(&["rbind", "ro"])?;
    let expected = if scene.runtime.is_virtual() { "" } else { "written\n" };
    ensure_eq!(ordinary.stdout, expected, "what is below one that is read-only: {:?}", ordinary.stderr);
    let all = run(&["rbind", "rro"])?;
    ensure_eq!(all.stdout, "", "what is below one that is read-only with all below");
    ensure_eq!(all.stderr.matches("Read-only file system").count(), 2, "errors: {:?}", all.stderr);

    let cri = Cri::start(scene)?;
    // containerd 2 asks runtimes of type io.containerd.runc.v2 alone whether they can do it for recursive_read_only; in a machine what is
    // below is read-only without that, too.
    let mount = match (scene.runtime.is_virtual(), cri.version()?) {
        (true, _) => Some(volume(&host, "/mnt", true)),
        (false, version) if version < (2, 0) => {
            println!("     cri_host_paths: containerd {version:?} knows no recursive_read_only: left out");
            None
        }
        (false, _) => Some(Mount { recursive_read_only: true, ..volume(&host, "/mnt", true) }),
    };
    if let Some(mount) = mount {
        let pod = cri.run(cri.pod_config("below")?)?;
        let mut config = container("main", PATIENT);
        config.mounts = vec![mount];
        let id = cri.launch(&pod, config)?;
        let denied = cri.exec(&id, &["touch", "/mnt/file", "/mnt/below/new"], 0)?;
        ensure_eq!(denied.stderr.matches("Read-only file system").count(), 2, "errors: {denied:?}");
        cri.remove_pod(&pod)?;
    }
    drop(below);
    cri.end()
}

/// By the node: what is there when the container is made is there inside. What comes later does where both have one kernel, and in
/// no case what a machine mounts on the node.
fn what_is_mounted_below(scene: &Scene) -> Outcome {
    let host = scene.make_directory("host")?;
    let shared = Memory::bind(&host, host.clone())?;
    mount_change(&shared.0, MountPropagationFlags::SHARED)?;
    for name in ["first", "second"] {
        fs::create_dir(host.join(name))?;
    }
    let first = Memory::mount(host.join("first"), "size=1m")?;
    fs::write(host.join("first/file"), "there before\n")?;
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("mounted")?)?;
    let with = |name: &str, propagation: MountPropagation| {
        let mut config = container(name, PATIENT);
        config.mounts = vec![Mount { propagation: propagation.into(), ..volume(&host, "/mnt", false) }];
        cri.launch(&pod, config)
    };
    let id = with("main", MountPropagation::PropagationHostToContainer)?;
    ensure_eq!(cri.shell(&id, "cat /mnt/first/file")?, "there before\n", "file of what was mounted before");
    let second = Memory::mount(host.join("second"), "size=1m")?;
    fs::write(host.join("second/file"), "")?;
    let expected = if scene.runtime.is_virtual() { "" } else { "file\n" };
    ensure_eq!(cri.shell(&id, "ls /mnt/second")?, expected, "files of what was mounted later");
    let both = with("both", MountPropagation::PropagationBidirectional);
    if scene.runtime.is_virtual() {
        let error = both.err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(error.contains("do not propagate"), "a mount both ways: {error:?}");
    } else {
        both?;
    }
    cri.remove_pod(&pod)?;
    drop((second, first, shared));
    cri.end()
}
