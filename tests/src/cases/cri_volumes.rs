//! Volumes as kubelet makes them, seen from inside.

use std::collections::BTreeSet;
use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use k8s_cri::v1::{ImageSpec, Mount};
use rustix::fs::inotify;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};

use super::oci;
use crate::cri::{Cri, PATIENT, Pod, container, volume, with_python};
use crate::run::DEADLINE;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq, image};

pub const CASES: &[Case] = &[
    oci("cri_volumes::shared_by_containers", shared_by_containers),
    oci("cri_volumes::in_memory", in_memory),
    oci("cri_volumes::updated_meanwhile", updated_meanwhile),
    oci("cri_volumes::of_an_image", of_an_image),
];

/// The directory of a pod's volume, where kubelet has it.
pub fn directory(scene: &Scene, kind: &str, name: &str) -> Outcome<PathBuf> {
    let path = scene.directory.join("pods/uid/volumes").join(format!("kubernetes.io~{kind}")).join(name);
    fs::create_dir_all(&path)?;
    Ok(path)
}

/// A file system in memory, or a part of something elsewhere: a mount that ends with this.
pub struct Memory(pub PathBuf);

impl Memory {
    /// One that was not there.
    pub fn mount(path: PathBuf, options: &str) -> Outcome<Self> {
        // Not by mount(8), which leaves files of its own in /run.
        mount("tmpfs", &path, "tmpfs", MountFlags::empty(), Some(CString::new(options)?.as_c_str()))?;
        Ok(Self(path))
    }

    /// A part of one, elsewhere.
    pub fn bind(part: &Path, path: PathBuf) -> Outcome<Self> {
        if part.is_dir() {
            fs::create_dir_all(&path)?;
        } else {
            fs::create_dir_all(path.parent().ok_or("no directory")?)?;
            File::create_new(&path)?;
        }
        mount_bind(part, &path)?;
        Ok(Self(path))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// Holds a lock and memory of a file, and tells of them on a socket to one who writes there, and to one who may only read.
const SERVER: &str = "import fcntl, mmap, os, socket
f = open('/shared/memory', 'w+b'); f.truncate(4096); m = mmap.mmap(f.fileno(), 4096)
l = open('/shared/lock', 'w'); fcntl.flock(l, fcntl.LOCK_EX)
s = socket.socket(socket.AF_UNIX); s.bind('/shared/new'); s.listen(); os.rename('/shared/new', '/shared/socket')
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
    let member =
        |name: &str, readonly| cri.launch(&pod, with_python(name, PATIENT, vec![volume(&shared, "/shared", readonly)]));
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
    // In a pod with a kernel of its own it is that one's memory.
    let count = if scene.runtime.is_virtual() { 0 } else { 1 };
    ensure_eq!(fs::read_dir(&part)?.count(), count, "files on the host");
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

/// Tells of what is made in directories, moved there and removed there, and of the end of one (inotify(7)).
const WATCH: &str = "import ctypes, os, struct
c = ctypes.CDLL(None, use_errno=True)
fd = c.inotify_init()
words = {0x80: 'moved', 0x100: 'made', 0x200: 'removed', 0x400: 'ended'}
names = {}
for name, mask in (('/etc/settings', 0x380), ('/etc/secret', 0x380), ('/run/secrets/token', 0x80), ('/etc/pod', 0x80),
    ('/etc/settings/..data', 0x400)):
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

/// All that root may have of the kernel's instances of inotify, so that nobody else gets one in its name.
fn all_of_roots() -> Outcome<Vec<OwnedFd>> {
    let mut all = Vec::new();
    loop {
        match inotify::init(inotify::CreateFlags::CLOEXEC) {
            Ok(instance) => all.push(instance),
            Err(Errno::MFILE) => return Ok(all),
            Err(errno) => return Err(errno.into()),
        }
    }
}

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

/// How many times something new is written, of which one is to be seen soon: the host may stand still for a while.
const TRIES: usize = 3;

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

/// Waits until it has noted this, and returns how long after it was written.
fn noted(cri: &Cri, id: &str, file: &str, text: &str, written: SystemTime) -> Outcome<Duration> {
    let until = Instant::now() + DEADLINE;
    let line = format!("{file} {text} ");
    loop {
        let all = cri.shell(id, "cat /noted")?;
        if let Some(time) = all.lines().find_map(|noted| noted.strip_prefix(&line)) {
            let seen = SystemTime::UNIX_EPOCH + Duration::from_nanos(time.parse()?);
            // Its clock is this one's, or nearly so. It may see what is written before who has written it looks at the time.
            let early = written.duration_since(seen).unwrap_or_default();
            ensure!(early <= SOON, "{file} is {text} {early:?} before it was written");
            return Ok(seen.duration_since(written).unwrap_or_default());
        }
        ensure!(Instant::now() < until, "{file} is never {text}: {all}");
    }
}

/// Has something new written to a file, by what returns it, until one is seen soon; each is seen.
fn seen_soon(cri: &Cri, id: &str, file: &str, mut write: impl FnMut() -> Outcome<String>) -> Outcome {
    let mut late = Vec::new();
    while late.len() < TRIES {
        let text = write()?;
        let lateness = noted(cri, id, file, &text, SystemTime::now())?;
        if lateness <= SOON {
            return Ok(());
        }
        late.push(lateness);
    }
    Err(format!("{file} is seen after {late:?}").into())
}

/// What is written anew is seen within a second, and who waits for that is told.
fn updated_meanwhile(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let config_map = directory(scene, "configmap", "settings")?;
    let secret = Memory::mount(directory(scene, "secret", "password")?, "size=1m,mode=2775,gid=2000")?;
    let token = Memory::mount(directory(scene, "projected", "kube-api-access")?, "size=1m,mode=0755")?;
    let pod_info = Memory::mount(directory(scene, "downward-api", "pod-info")?, "size=1m,mode=0755")?;
    let (plain, guarded) = (Rights { mode: 0o644, group: 0 }, Rights { mode: 0o440, group: 2000 });
    let settings = [("key", "first"), ("other", "same"), ("vanishing", "x"), ("deep/er/key", "below")];
    write_atomically(&config_map, "1", plain, &settings)?;
    write_atomically(&secret.0, "1", guarded, &[("word", "one")])?;
    write_atomically(&token.0, "1", plain, &[("token", "old"), ("namespace", "default")])?;
    write_atomically(&pod_info.0, "1", plain, &[("labels", "a=\"b\"")])?;
    let pod = cri.run(cri.pod_config("updated")?)?;
    // A node's root has none left to give.
    let instances = all_of_roots()?;
    cri.import(&image::of_debian(scene)?)?;
    let mounts = vec![
        volume(&config_map, "/etc/settings", true),
        volume(&secret.0, "/etc/secret", true),
        volume(&token.0, "/run/secrets/token", true),
        volume(&pod_info.0, "/etc/pod", true),
    ];
    let id = cri.launch(&pod, with_python("main", PATIENT, mounts))?;
    ensure_eq!(
        cri.shell(
            &id,
            "cd /etc; cat settings/key settings/other settings/deep/er/key secret/word /run/secrets/token/* pod/*"
        )?,
        "firstsamebelowonedefaultolda=\"b\"",
        "files"
    );
    let rights = "cd /etc; stat -Lc '%a %u %g' settings settings/key settings/deep secret secret/word";
    let expected = "755 0 0\n644 0 0\n755 0 0\n2775 0 2000\n440 0 2000\n";
    ensure_eq!(cri.shell(&id, rights)?, expected, "modes and owners");
    ensure_eq!(cri.exec(&id, &["touch", "/etc/settings/new"], 0)?.status, 1, "status of who writes");
    cri.exec(&id, &["sh", "-c", &format!("cat >/watch <<'EOF'\n{WATCH}\nEOF\n")], 0)?;
    cri.shell(&id, "python3 /watch >/told 2>&1 & until grep -q watching /told; do sleep 0.1; done")?;
    note(&cri, &id, "/etc/settings/key /etc/secret/word /run/secrets/token/token /etc/pod/labels")?;

    let settings = [("key", "second"), ("other", "same"), ("third", "new"), ("deep/er/key", "deeper")];
    // The first file of each is the one that is noted.
    let updates: [(&Path, _, &[_], _); 4] = [
        (&config_map, plain, &settings, "/etc/settings/key"),
        (&secret.0, guarded, &[("word", "two")], "/etc/secret/word"),
        (&token.0, plain, &[("token", "new"), ("namespace", "default")], "/run/secrets/token/token"),
        (&pod_info.0, plain, &[("labels", "c=\"d\"")], "/etc/pod/labels"),
    ];
    let mut written = Vec::new();
    for (volume, rights, files, _) in updates {
        write_atomically(volume, "2", rights, files)?;
        written.push(SystemTime::now());
    }
    let mut late = Vec::new();
    for (update, written) in updates.into_iter().zip(written) {
        let (.., files, path) = update;
        if noted(&cri, &id, path, files[0].1, written)? > SOON {
            late.push(update);
        }
    }
    let seen =
        cri.shell(&id, "cd /etc; cat settings/key settings/third settings/deep/er/key secret/word; ls settings")?;
    ensure_eq!(seen, "secondnewdeepertwodeep\nkey\nother\nthird\n", "what it has a second later");
    let seen = cri.shell(&id, "cat /run/secrets/token/* /etc/pod/*")?;
    ensure_eq!(seen, "defaultnewc=\"d\"", "what it has of others a second later");
    ensure_eq!(cri.shell(&id, rights)?, expected, "modes and owners afterwards");
    let until = Instant::now() + DEADLINE;
    loop {
        let told = cri.shell(&id, "cat /told")?;
        let of_settings: String =
            told.lines().filter(|line| line.contains("settings")).map(|line| format!("{line}\n")).collect();
        let others = ["/etc/secret", "/run/secrets/token", "/etc/pod"];
        if of_settings == TOLD && others.iter().all(|name| told.contains(&format!("{name} moved ..data\n"))) {
            break;
        }
        ensure!(Instant::now() < until, "the watcher is told: {told}");
    }

    for (volume, rights, files, path) in late {
        let mut tries = 0;
        seen_soon(&cri, &id, path, || {
            tries += 1;
            let text = format!("{}-{tries}", files[0].1);
            write_atomically(volume, &format!("2-{tries}"), rights, &[&[(files[0].0, &*text)], &files[1..]].concat())?;
            Ok(text)
        })?;
    }
    let mut last = 2;
    for count in [10, 100] {
        seen_soon(&cri, &id, "/etc/settings/key", || {
            for _ in 0..count {
                last += 1;
                let text = last.to_string();
                write_atomically(&config_map, &text, plain, &[("key", &text), (&format!("key-{text}"), &text)])?;
            }
            Ok(last.to_string())
        })?;
        let expected = format!("{last}..{last}\n..data\nkey\nkey-{last}\n");
        let seen = cri.shell(&id, "cd /etc/settings; cat key; LC_ALL=C ls -A")?;
        ensure_eq!(seen, expected, "what it has after {count} in a row");
    }

    // Where no more can be watched they are seen all the same.
    drop(instances);
    let unwatched = Unwatched::begin()?;
    let second = cri.launch(&pod, with_python("second", PATIENT, vec![volume(&config_map, "/etc/settings", true)]))?;
    drop(unwatched);
    note(&cri, &second, "/etc/settings/key")?;
    for container in [&id, &second] {
        seen_soon(&cri, container, "/etc/settings/key", || {
            last += 1;
            let text = last.to_string();
            write_atomically(&config_map, &text, plain, &[("key", &text)])?;
            Ok(text)
        })?;
        ensure_eq!(cri.shell(container, "cat /etc/settings/key")?, last.to_string(), "what each has");
    }
    cri.remove_pod(&pod)?;
    drop((secret, token, pod_info));
    cri.end()
}

/// What is in an image, without what runs from it.
fn of_an_image(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let version = cri.version()?;
    if version < (2, 1) {
        println!("     cri_volumes::of_an_image: containerd {version:?} knows no volumes of images: left out");
        return cri.end();
    }
    let name = "docker.io/library/data:latest";
    cri.import(&image::busybox_as(scene, name)?)?;
    let pod = cri.run(cri.pod_config("image")?)?;
    let mut config = container("main", PATIENT);
    let image = Some(ImageSpec { image: name.into(), ..Default::default() });
    let mounts = ["/data", "/again"].map(|path| Mount { image: image.clone(), ..volume(Path::new(""), path, true) });
    config.mounts = mounts.into();
    let ids = [cri.launch(&pod, config.clone())?, {
        config.metadata.get_or_insert_default().name = "other".into();
        cri.launch(&pod, config)?
    }];
    for id in &ids {
        ensure_eq!(
            cri.shell(id, "grep other: /data/etc/passwd; cmp /bin/sh /again/bin/sh")?,
            "other:x:1000:1000:other:/:/bin/sh\n",
            "files"
        );
        for path in ["/data/new", "/again/etc/passwd"] {
            let denied = cri.exec(id, &["sh", "-c", &format!("echo >>{path}")], 0)?;
            ensure!(denied.stderr.contains("Read-only file system"), "writing to an image: {denied:?}");
        }
        // What is executed there is executed.
        ensure_eq!(
            cri.shell(id, "/data/bin/busybox echo from the image")?,
            "from the image\n",
            "a program of the image"
        );
    }
    cri.remove_pod(&pod)?;
    cri.end()
}
