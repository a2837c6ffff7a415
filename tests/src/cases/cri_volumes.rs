//! Volumes as kubelet makes them, seen from inside.

use std::collections::BTreeSet;
use std::ffi::{CString, OsString};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use k8s_cri::v1::{ContainerConfig, ImageSpec, Mount};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};

use super::disks::Loop;
use super::oci;
use crate::cri::{Cri, PATIENT, Pod, container, volume};
use crate::run::DEADLINE;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq, image};

pub const CASES: &[Case] = &[
    oci("cri_volumes::shared_by_containers", shared_by_containers),
    oci("cri_volumes::in_memory", in_memory),
    oci("cri_volumes::updated_meanwhile", updated_meanwhile),
    oci("cri_volumes::of_the_host", of_the_host),
    oci("cri_volumes::of_the_host_s_special_files", of_the_host_s_special_files),
    oci("cri_volumes::read_only_with_what_is_below", read_only_with_what_is_below),
];

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

/// What a volume's files are, beside what is in them.
#[derive(Clone, Copy)]
struct Rights {
    mode: u32,
    group: u32,
}

/// As kubelet's atomic writer does: another directory, and one link that leads there.
fn write_atomically(volume: &Path, version: &str, rights: Rights, files: &[(&str, &str)]) -> Outcome {
    let new = format!("..{version}");
    let directory = volume.join(&new);
    fs::create_dir(&directory)?;
    for (name, text) in files {
        let path = directory.join(name);
        fs::create_dir_all(path.parent().ok_or("no name")?)?;
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(rights.mode))?;
        chown(&path, None, Some(rights.group))?;
    }
    let old = fs::read_link(volume.join("..data")).ok();
    symlink(&new, volume.join("..data_tmp"))?;
    fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
    let keys = |directory: &Path| -> Outcome<BTreeSet<OsString>> {
        Ok(fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<_>>()?)
    };
    let new_keys = keys(&directory)?;
    for key in &new_keys {
        if fs::symlink_metadata(volume.join(key)).is_err() {
            symlink(Path::new("..data").join(key), volume.join(key))?;
        }
    }
    if let Some(old) = old.map(|old| volume.join(old)) {
        for key in keys(&old)?.difference(&new_keys) {
            fs::remove_file(volume.join(key))?;
        }
        fs::remove_dir_all(old)?;
    }
    Ok(())
}

/// Tells of what is made in two directories, moved there and removed there, and of the end of a third (inotify(7)).
const WATCH: &str = "import ctypes, os, struct
c = ctypes.CDLL(None, use_errno=True)
fd = c.inotify_init()
words = {0x80: 'moved', 0x100: 'made', 0x200: 'removed', 0x400: 'ended'}
names = {}
for name, mask in (('/etc/settings', 0x380), ('/etc/secret', 0x380), ('/etc/settings/..data', 0x400)):
    wd = c.inotify_add_watch(fd, name.encode(), mask)
    assert wd > 0, os.strerror(ctypes.get_errno())
    names[wd] = name
print('watching', flush=True)
while True:
    data = os.read(fd, 4096)
    while data:
        wd, mask, cookie, length = struct.unpack('iIII', data[:16])
        for bit, word in words.items():
            if mask & bit:
                print(names[wd], word, data[16:16 + length].rstrip(b'\\0').decode(), flush=True)
        data = data[16 + length:]
";

/// What is told of an update in which a key is new, and one has vanished.
const TOLD: &str = "/etc/settings made ..2
/etc/settings made ..data_tmp
/etc/settings moved ..data
/etc/settings made third
/etc/settings removed vanishing
/etc/settings/..data ended 
/etc/settings removed ..1
";

/// Nobody on this host can watch more than they do, until this ends.
struct Unwatched(String);

impl Unwatched {
    const PATH: &str = "/proc/sys/fs/inotify/max_user_instances";

    fn begin() -> Outcome<Self> {
        let before = fs::read_to_string(Self::PATH)?;
        fs::write(Self::PATH, "0")?;
        Ok(Self(before))
    }
}

impl Drop for Unwatched {
    fn drop(&mut self) {
        let _ = fs::write(Self::PATH, &self.0);
    }
}

/// How long what is new may take to be seen.
const SOON: Duration = Duration::from_secs(1);

/// Notes what it sees first in which file, and when.
const NOTE: &str = "import sys, time
seen = {}
while True:
    for path in sys.argv[1:]:
        try: text = open(path).read()
        except OSError: continue
        if seen.get(path) != text:
            seen[path] = text
            print(path, text, time.time_ns(), flush=True)
    time.sleep(0.02)
";

/// Has a container note what is in its files from now on.
fn note(cri: &Cri, id: &str, files: &str) -> Outcome {
    cri.exec(id, &["sh", "-c", &format!("cat >/note <<'EOF'\n{NOTE}\nEOF\n")], 0)?;
    cri.shell(id, &format!("python3 /note {files} >/noted 2>&1 & until [ -s /noted ]; do sleep 0.1; done")).map(drop)
}

/// Waits until it has noted this; it was to see it soon after it was written.
fn noted(cri: &Cri, id: &str, file: &str, text: &str, written: SystemTime) -> Outcome {
    let until = Instant::now() + DEADLINE;
    let line = format!("{file} {text} ");
    loop {
        let all = cri.shell(id, "cat /noted")?;
        if let Some(time) = all.lines().find_map(|noted| noted.strip_prefix(&line)) {
            let seen = SystemTime::UNIX_EPOCH + Duration::from_nanos(time.parse()?);
            // Its clock is not this one; that it is right is of another test.
            let late = seen.duration_since(written).unwrap_or_default();
            ensure!(late <= SOON, "{file} is {text} after {late:?}");
            return Ok(());
        }
        ensure!(Instant::now() < until, "{file} is never {text}: {all}");
    }
}

/// What is written anew is seen within a second, and who waits for that is told.
fn updated_meanwhile(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let config_map = directory(scene, "configmap", "settings")?;
    let secret = Memory::mount(directory(scene, "secret", "password")?, "size=1m,mode=2775,gid=2000")?;
    let (plain, guarded) = (Rights { mode: 0o644, group: 0 }, Rights { mode: 0o440, group: 2000 });
    let settings = [("key", "first"), ("other", "same"), ("vanishing", "x"), ("deep/er/key", "below")];
    write_atomically(&config_map, "1", plain, &settings)?;
    write_atomically(&secret.0, "1", guarded, &[("word", "one")])?;
    let pod = cri.run(cri.pod_config("updated")?)?;
    cri.import(&image::of_debian(scene)?)?;
    let mounts = vec![volume(&config_map, "/etc/settings", true), volume(&secret.0, "/etc/secret", true)];
    let id = cri.launch(&pod, with_python("main", mounts))?;
    ensure_eq!(
        cri.shell(&id, "cd /etc; cat settings/key settings/other settings/deep/er/key secret/word")?,
        "firstsamebelowone",
        "files"
    );
    let rights = "cd /etc; stat -Lc '%a %u %g' settings settings/key settings/deep secret secret/word";
    let expected = "755 0 0\n644 0 0\n755 0 0\n2775 0 2000\n440 0 2000\n";
    ensure_eq!(cri.shell(&id, rights)?, expected, "modes and owners");
    ensure_eq!(cri.exec(&id, &["touch", "/etc/settings/new"], 0)?.status, 1, "status of who writes");
    cri.exec(&id, &["sh", "-c", &format!("cat >/watch <<'EOF'\n{WATCH}\nEOF\n")], 0)?;
    cri.shell(&id, "python3 /watch >/told 2>&1 & until grep -q watching /told; do sleep 0.1; done")?;
    note(&cri, &id, "/etc/settings/key /etc/secret/word")?;

    let settings = [("key", "second"), ("other", "same"), ("third", "new"), ("deep/er/key", "deeper")];
    write_atomically(&config_map, "2", plain, &settings)?;
    let written = SystemTime::now();
    write_atomically(&secret.0, "2", guarded, &[("word", "two")])?;
    noted(&cri, &id, "/etc/settings/key", "second", written)?;
    noted(&cri, &id, "/etc/secret/word", "two", written)?;
    let seen =
        cri.shell(&id, "cd /etc; cat settings/key settings/third settings/deep/er/key secret/word; ls settings")?;
    ensure_eq!(seen, "secondnewdeepertwodeep\nkey\nother\nthird\n", "what it has a second later");
    ensure_eq!(cri.shell(&id, rights)?, expected, "modes and owners afterwards");
    let until = Instant::now() + DEADLINE;
    loop {
        let told = cri.shell(&id, "cat /told")?;
        let of_settings: String =
            told.lines().filter(|line| line.contains("settings")).map(|line| format!("{line}\n")).collect();
        if of_settings == TOLD && told.contains("/etc/secret moved ..data\n") {
            break;
        }
        ensure!(Instant::now() < until, "the watcher is told: {told}");
    }

    for (last, count) in [(12, 10), (112, 100)] {
        for version in last - count + 1..=last {
            let text = version.to_string();
            write_atomically(&config_map, &text, plain, &[("key", &text), (&format!("key-{text}"), &text)])?;
        }
        noted(&cri, &id, "/etc/settings/key", &last.to_string(), SystemTime::now())?;
        let expected = format!("{last}..{last}\n..data\nkey\nkey-{last}\n");
        let seen = cri.shell(&id, "cd /etc/settings; cat key; LC_ALL=C ls -A")?;
        ensure_eq!(seen, expected, "what it has after {count} in a row");
    }

    // Where no more can be watched they are seen all the same.
    let unwatched = Unwatched::begin()?;
    let second = cri.launch(&pod, with_python("second", vec![volume(&config_map, "/etc/settings", true)]))?;
    drop(unwatched);
    note(&cri, &second, "/etc/settings/key")?;
    let written = SystemTime::now();
    write_atomically(&config_map, "200", plain, &[("key", "200")])?;
    for container in [&id, &second] {
        noted(&cri, container, "/etc/settings/key", "200", written)?;
        ensure_eq!(cri.shell(container, "cat /etc/settings/key")?, "200", "what each has");
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

/// A socket, character and block devices, and a directory that is not there.
fn of_the_host_s_special_files(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    cri.import(&image::of_debian(scene)?)?;
    let host = scene.make_directory("host")?;
    let disk = Loop::new(scene)?;
    let listener = UnixListener::bind(host.join("socket"))?;
    let server = std::thread::spawn(move || -> std::io::Result<String> {
        let (mut client, _) = listener.accept()?;
        let mut said = String::new();
        client.read_to_string(&mut said)?;
        client.write_all(b"heard")?;
        Ok(said)
    });
    let pod = cri.run(cri.pod_config("special")?)?;
    let mounts = vec![
        volume(&host.join("socket"), "/run/driver.sock", false),
        volume(Path::new("/dev/zero"), "/dev/nothing", false),
        volume(&disk.path, "/dev/disk", false),
        volume(&host.join("new/directory"), "/new", false),
    ];
    let id = cri.launch(&pod, with_python("main", mounts))?;
    let connect = "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/driver.sock'); \
        s.send(b'hello'); s.shutdown(socket.SHUT_WR); print(s.recv(100).decode())";
    let talked = cri.exec(&id, &["python3", "-c", connect], 60)?;
    ensure_eq!((&*talked.stdout, &*talked.stderr), ("heard\n", ""), "what the server answers");
    ensure_eq!(server.join().map_err(|_| "the server panicked")??, "hello", "what the server has heard");
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
    match cri.version()? {
        version if version < (2, 0) => {
            println!("     cri_volumes: containerd {version:?} knows no recursive_read_only: left out");
        }
        // It asks runtimes of that type alone what they can do, and looks at what it has of the others: it panics. kubelet does not ask
        // it for what a runtime class has not said that it can do.
        version if scene.runtime.is_virtual() => {
            println!(
                "     cri_volumes: containerd {version:?} has recursive_read_only for io.containerd.runc.v2 alone: left out"
            );
        }
        _ => {
            let pod = cri.run(cri.pod_config("below")?)?;
            let mut config = container("main", PATIENT);
            config.mounts = vec![Mount { recursive_read_only: true, ..volume(&host, "/mnt", true) }];
            let id = cri.launch(&pod, config)?;
            let denied = cri.exec(&id, &["touch", "/mnt/file", "/mnt/below/new"], 0)?;
            ensure_eq!(denied.stderr.matches("Read-only file system").count(), 2, "errors: {denied:?}");
            cri.remove_pod(&pod)?;
        }
    }
    drop(below);
    cri.end()
}
