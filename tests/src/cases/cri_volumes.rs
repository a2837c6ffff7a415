//! Volumes as kubelet makes them, seen from inside.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use k8s_cri::v1::{ContainerConfig, ImageSpec, Mount};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};

use super::oci;
use crate::cri::{Cri, Pod, container, volume};
use crate::run::DEADLINE;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq, image};

pub const CASES: &[Case] = &[
    oci("cri_volumes::shared_by_containers", shared_by_containers),
    oci("cri_volumes::in_memory", in_memory),
    oci("cri_volumes::updated_meanwhile", updated_meanwhile),
    oci("cri_volumes::of_the_host", of_the_host),
];

/// Waits until it is told to end.
const PATIENT: &[&str] = &["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"];

/// The directory of a pod's volume, where kubelet has it.
fn directory(scene: &Scene, kind: &str, name: &str) -> Outcome<PathBuf> {
    let path = scene.directory.join("pods/uid/volumes").join(format!("kubernetes.io~{kind}")).join(name);
    fs::create_dir_all(&path)?;
    Ok(path)
}

/// A file system in memory, which ends with this.
struct Memory(PathBuf);

impl Memory {
    fn mount(path: PathBuf, options: &str) -> Outcome<Self> {
        // Not by mount(8), which leaves files of its own in /run.
        mount("tmpfs", &path, "tmpfs", MountFlags::empty(), Some(CString::new(options)?.as_c_str()))?;
        Ok(Self(path))
    }

    /// A part of one, elsewhere.
    fn bind(part: &Path, path: PathBuf) -> Outcome<Self> {
        fs::create_dir_all(&path)?;
        mount_bind(part, &path)?;
        Ok(Self(path))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// A container in which Python is, beside volumes.
fn with_python(name: &str, mounts: Vec<Mount>) -> ContainerConfig {
    let mut config = container(name, PATIENT);
    let [host, inside, _] = [0, 1, 2].map(|n| image::DEBIAN_PROGRAMS.split(':').nth(n).unwrap_or_default());
    config.mounts = mounts;
    config.mounts.push(volume(Path::new(host), inside, true));
    config.image = Some(ImageSpec { image: "localhost/debian:latest".into(), ..Default::default() });
    config
}

/// Holds a lock and memory of a file, and tells of them on a socket to one who writes there, and to one who may only read.
const SERVER: &str = "import fcntl, mmap, socket
f = open('/shared/memory', 'w+b'); f.truncate(4096); m = mmap.mmap(f.fileno(), 4096)
l = open('/shared/lock', 'w'); fcntl.flock(l, fcntl.LOCK_EX)
s = socket.socket(socket.AF_UNIX); s.bind('/shared/socket'); s.listen()
for n in range(2):
    c, _ = s.accept()
    c.recv(1); m[n] = 65 + n; c.send(b'x')
    c.recv(1); c.send(b'heard' if m[100 + n] == 97 + n else b'nothing'); c.close()
";

/// What the memory has before and after a word with the server, and whether the lock is taken.
const CLIENT: &str = "import fcntl, mmap, socket, sys
n, write = int(sys.argv[1]), sys.argv[2] == 'write'
s = socket.socket(socket.AF_UNIX); s.connect('/shared/socket')
f = open('/shared/memory', 'r+b' if write else 'rb')
m = mmap.mmap(f.fileno(), 4096, access=mmap.ACCESS_WRITE if write else mmap.ACCESS_READ)
print(m[n]); s.send(b'x'); s.recv(1); print(m[n])
if write: m[100 + n] = 97 + n
s.send(b'x'); print(s.recv(10).decode())
try: fcntl.flock(open('/shared/lock'), fcntl.LOCK_EX | fcntl.LOCK_NB); print('not locked')
except BlockingIOError: print('locked')
";

/// What one says on a socket, or through a pipe, the other hears; a lock is a lock, and memory of a file is the same.
fn shared_by_containers(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    cri.import(&image::of_debian(scene)?)?;
    let shared = directory(scene, "empty-dir", "shared")?;
    let pod = cri.run(cri.pod_config("volumes")?)?;
    let member = |name: &str, readonly| cri.launch(&pod, with_python(name, vec![volume(&shared, "/shared", readonly)]));
    let reader = member("reader", true)?;
    let one = member("one", false)?;
    let two = member("two", false)?;
    cri.shell(&one, "echo hello >/shared/file; mkfifo /shared/pipe")?;
    for other in [&two, &reader] {
        ensure_eq!(cri.shell(other, "cat /shared/file")?, "hello\n", "file");
    }
    ensure_eq!(cri.exec(&reader, &["touch", "/shared/file"], 0)?.status, 1, "status of who may not write");
    cri.shell(&two, "cat /shared/pipe >/heard 2>&1 &")?;
    let spoken = cri.exec(&one, &["sh", "-c", "echo through >/shared/pipe"], 60)?;
    ensure_eq!(spoken.status, 0, "a word through a pipe: {spoken:?}");
    cri.shell(&two, "until grep -q through /heard; do sleep 0.1; done")?;

    fs::write(shared.join("server"), SERVER)?;
    fs::write(shared.join("client"), CLIENT)?;
    cri.shell(&one, "python3 /shared/server >/said 2>&1 & until [ -e /shared/socket ]; do sleep 0.1; done")?;
    let heard = cri.exec(&two, &["python3", "/shared/client", "0", "write"], 60)?;
    ensure_eq!((&*heard.stdout, &*heard.stderr), ("0\n65\nheard\nlocked\n", ""), "what the other container has");
    let heard = cri.exec(&reader, &["python3", "/shared/client", "1", "read"], 60)?;
    let expected = ("0\n66\nnothing\nlocked\n", "");
    ensure_eq!((&*heard.stdout, &*heard.stderr), expected, "what the one that may only read has");
    cri.remove_pod(&pod)?;
    cri.end()
}

/// It has its size, and is the same for all; the owner is whom kubelet has given it to.
fn in_memory(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let cache = Memory::mount(directory(scene, "empty-dir", "cache")?, "size=1m,mode=2770,gid=1000")?;
    let pod = cri.run(cri.pod_config("memory")?)?;
    let member = |name: &str| {
        let mut config = container(name, PATIENT);
        config.mounts = vec![volume(&cache.0, "/cache", false)];
        cri.launch(&pod, config)
    };
    let (one, two) = (member("one")?, member("two")?);
    ensure_eq!(cri.shell(&one, "stat -c '%a %u %g' /cache")?, "2770 0 1000\n", "mode and owner");
    let full = cri.exec(&one, &["dd", "if=/dev/zero", "of=/cache/big", "bs=4k", "count=512"], 0)?;
    ensure!(full.status != 0 && full.stderr.contains("No space left"), "writing too much: {full:?}");
    ensure_eq!(cri.shell(&two, "stat -c %s /cache/big")?, "1048576\n", "size that the other sees");
    cri.shell(&two, "rm /cache/big; echo kept >/cache/file")?;
    // What a container leaves there, one that is made anew finds.
    cri.stop(&two, 10)?;
    cri.remove(&two)?;
    let two = member("two-again")?;
    ensure_eq!(cri.shell(&two, "cat /cache/file")?, "kept\n", "file of one that is gone");
    ensure_eq!(cri.shell(&one, "cat /cache/file")?, "kept\n", "file of another");
    part_of_memory(scene, &cri, &pod, &cache)?;
    cri.remove_pod(&pod)?;
    drop(cache);
    cri.end()
}

/// A part of it, which kubelet makes and binds elsewhere, is in the same memory.
fn part_of_memory(scene: &Scene, cri: &Cri, pod: &Pod, cache: &Memory) -> Outcome {
    let part = cache.0.join("part/of it");
    fs::create_dir_all(&part)?;
    chown(&part, Some(1001), Some(1002))?;
    fs::set_permissions(&part, fs::Permissions::from_mode(0o751))?;
    let bound = Memory::bind(&part, scene.directory.join("pods/uid/volume-subpaths/cache/parts/0"))?;
    let mut config = container("parts", PATIENT);
    config.mounts = vec![volume(&bound.0, "/part", false), volume(&cache.0, "/whole", true)];
    let id = cri.launch(pod, config)?;
    ensure_eq!(cri.shell(&id, "stat -c '%a %u %g' /part")?, "751 1001 1002\n", "mode and owner of the part");
    ensure_eq!(cri.shell(&id, "echo in the part >/part/file; cat '/whole/part/of it/file'")?, "in the part\n", "file");
    ensure_eq!(cri.shell(&id, "cat /whole/file")?, "kept\n", "file of another in the whole");
    ensure_eq!(cri.exec(&id, &["touch", "/whole/file"], 0)?.status, 1, "status of who may not write");
    ensure_eq!(fs::read_dir(&part)?.count(), 0, "files on the host");
    Ok(())
}

/// As kubelet's atomic writer does: another directory, and one link that leads there.
fn write_atomically(volume: &Path, version: &str, files: &[(&str, &str)]) -> Outcome {
    let new = format!("..{version}");
    fs::create_dir(volume.join(&new))?;
    for (name, text) in files {
        fs::write(volume.join(&new).join(name), text)?;
    }
    let old = fs::read_link(volume.join("..data")).ok();
    symlink(&new, volume.join("..data_tmp"))?;
    fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
    for (name, _) in files {
        if fs::symlink_metadata(volume.join(name)).is_err() {
            symlink(Path::new("..data").join(name), volume.join(name))?;
        }
    }
    if let Some(old) = old {
        fs::remove_dir_all(volume.join(old))?;
    }
    Ok(())
}

/// Tells of what is moved into two directories (inotify(7)).
const WATCH: &str = "import ctypes, os, struct
c = ctypes.CDLL(None, use_errno=True)
fd = c.inotify_init()
names = {}
for name in ('/etc/settings', '/etc/secret'):
    wd = c.inotify_add_watch(fd, name.encode(), 0x80)
    assert wd > 0, os.strerror(ctypes.get_errno())
    names[wd] = name
print('watching', flush=True)
while True:
    data = os.read(fd, 4096)
    while data:
        wd, mask, cookie, length = struct.unpack('iIII', data[:16])
        print(names[wd], data[16:16 + length].rstrip(b'\\0').decode(), flush=True)
        data = data[16 + length:]
";

/// What is written anew is seen within a second, and who waits for that is told.
fn updated_meanwhile(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let config_map = directory(scene, "configmap", "settings")?;
    let secret = Memory::mount(directory(scene, "secret", "password")?, "size=1m")?;
    write_atomically(&config_map, "1", &[("key", "first"), ("other", "same")])?;
    write_atomically(&secret.0, "1", &[("word", "one")])?;
    let pod = cri.run(cri.pod_config("updated")?)?;
    cri.import(&image::of_debian(scene)?)?;
    let mounts = vec![volume(&config_map, "/etc/settings", true), volume(&secret.0, "/etc/secret", true)];
    let id = cri.launch(&pod, with_python("main", mounts))?;
    ensure_eq!(cri.shell(&id, "cat /etc/settings/key /etc/settings/other /etc/secret/word")?, "firstsameone", "files");
    ensure_eq!(cri.exec(&id, &["touch", "/etc/settings/new"], 0)?.status, 1, "status of who writes");
    cri.exec(&id, &["sh", "-c", &format!("cat >/watch <<'EOF'\n{WATCH}\nEOF\n")], 0)?;
    cri.shell(&id, "python3 /watch >/told 2>&1 & until grep -q watching /told; do sleep 0.1; done")?;
    write_atomically(&config_map, "2", &[("key", "second"), ("other", "same"), ("third", "new")])?;
    write_atomically(&secret.0, "2", &[("word", "two")])?;
    let until = Instant::now() + Duration::from_secs(1);
    let mut seen = String::new();
    while seen != "secondtwo" {
        seen = cri.shell(&id, "cat /etc/settings/key /etc/secret/word")?;
        ensure!(seen == "secondtwo" || Instant::now() < until, "a second later it has {seen}");
    }
    ensure_eq!(cri.shell(&id, "cat /etc/settings/third")?, "new", "a file that was not there before");
    let until = Instant::now() + DEADLINE;
    loop {
        let told = cri.shell(&id, "cat /told")?;
        if ["settings", "secret"].iter().all(|name| told.contains(&format!("/etc/{name} ..data\n"))) {
            break;
        }
        ensure!(Instant::now() < until, "the watcher is told: {told}");
    }
    cri.remove_pod(&pod)?;
    drop(secret);
    cri.end()
}

/// Directories, files, a termination log, and part of a volume.
fn of_the_host(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let host = scene.make_directory("host")?;
    fs::create_dir_all(host.join("directory/below"))?;
    fs::write(host.join("file"), "of the host\n")?;
    fs::write(host.join("termination-log"), "")?;
    let parts = directory(scene, "empty-dir", "parts")?;
    fs::create_dir_all(parts.join("a/b"))?;
    fs::write(parts.join("a/b/c"), "part\n")?;
    let pod = cri.run(cri.pod_config("host")?)?;
    let mut config = container("main", PATIENT);
    config.mounts = vec![
        volume(&host.join("directory"), "/directory", false),
        volume(&host.join("directory"), "/looked-at", true),
        volume(&host.join("file"), "/etc/file", false),
        volume(&host.join("termination-log"), "/dev/termination-log", false),
        volume(&parts.join("a/b"), "/part", false),
    ];
    let id = cri.launch(&pod, config)?;
    cri.shell(&id, "echo inside >/directory/below/new; echo more >>/etc/file; echo why >/dev/termination-log")?;
    ensure_eq!(fs::read_to_string(host.join("directory/below/new"))?, "inside\n", "file made inside");
    ensure_eq!(fs::read_to_string(host.join("file"))?, "of the host\nmore\n", "file written to inside");
    ensure_eq!(fs::read_to_string(host.join("termination-log"))?, "why\n", "termination log");
    ensure_eq!(cri.shell(&id, "cat /looked-at/below/new /part/c")?, "inside\npart\n", "files");
    let denied = cri.exec(&id, &["touch", "/looked-at/no"], 0)?;
    ensure!(denied.stderr.contains("Read-only file system"), "writing where it must not: {denied:?}");
    ensure!(!host.join("directory/no").exists(), "it was made");
    cri.remove_pod(&pod)?;
    cri.end()
}
