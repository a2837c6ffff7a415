use std::collections::HashMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;
use virtiofsd::filesystem::OpenOptions;
use virtiofsd::fuse::{
    AttrOut, CreateIn, EntryOut, FsOptions, GetattrIn, GetxattrIn, InHeader, InitInCompat, InitInExt, InitOut, OpenIn,
    OpenOut, OutHeader, ReadIn, ReleaseIn, SetxattrIn, WriteIn, WriteOut,
};
use vm_memory::ByteValued;

use super::super::test_driver::{Descriptor, Driven, NEXT, Part, WRITE, drive_with};
use super::*;
use crate::control::Traffic;
use crate::jail::{Kind, confine_in_test};

const ROOT: u64 = 1;
const HEADER: usize = size_of::<OutHeader>();

/// A directory that is gone after the test.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("podhull-fs-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn share(root: &Path) -> Share {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    let fds: OwnedFd = rustix::fs::open("/proc/self/fd", flags, rustix::fs::Mode::empty()).unwrap();
    Share::new(ShareConfig {
        tag: "share".into(),
        root: root.to_str().unwrap().into(),
        proc_self_fd: fds.into(),
        threads: 4,
        confine: Box::new(|| confine_in_test(Kind::Files)),
    })
    .unwrap()
}

/// A mounted share, spoken to in FUSE.
struct Mounted {
    driven: Driven,
    unique: u64,
    uid: u32,
}

type Answer = Result<Vec<u8>, i32>;

impl Mounted {
    fn new(share: &mut Share) -> Self {
        let mut mounted = Self { driven: drive_with(share, 0, true), unique: 0, uid: 0 };
        let options = FsOptions::SUBMOUNTS
            | FsOptions::INIT_EXT
            | FsOptions::MAX_PAGES
            | FsOptions::BIG_WRITES
            | FsOptions::HANDLE_KILLPRIV_V2
            | FsOptions::POSIX_ACL
            | FsOptions::DONT_MASK
            | FsOptions::SETXATTR_EXT
            | FsOptions::CREATE_SUPP_GROUP;
        let init = InitInCompat { major: 7, minor: 38, max_readahead: 1 << 20, flags: options.bits() as u32 };
        let more = InitInExt { flags2: (options.bits() >> 32) as u32, ..Default::default() };
        let answer = mounted.ask(26, 0, &[init.as_slice(), more.as_slice()].concat(), size_of::<InitOut>()).unwrap();
        let out: InitOut = object(&answer);
        assert_eq!(out.max_write, 1 << 20);
        assert_eq!(out.max_pages, 256);
        mounted
    }

    fn message(&mut self, opcode: u32, nodeid: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 1;
        let header = InHeader {
            len: (size_of::<InHeader>() + body.len()) as u32,
            opcode,
            unique: self.unique,
            nodeid,
            uid: self.uid.into(),
            gid: self.uid.into(),
            pid: 1,
            ..Default::default()
        };
        [header.as_slice(), body].concat()
    }

    /// Sends a request with room for `room` bytes after the answer's header.
    fn ask(&mut self, opcode: u32, nodeid: u64, body: &[u8], room: usize) -> Answer {
        let message = self.message(opcode, nodeid, body);
        let (header, body) = message.split_at(size_of::<InHeader>());
        let parts = [Part::Out(header.into()), Part::Out(body.into()), Part::In(HEADER), Part::In(room)];
        let (length, answer) = self.driven.rings[1].request(&parts);
        let out: OutHeader = object(&answer);
        assert_eq!((out.len, out.unique), (length, self.unique));
        match out.error {
            0 => Ok(answer[HEADER..length as usize].to_vec()),
            error => Err(-error),
        }
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        self.ask(1, parent, &zero_terminated(name), size_of::<EntryOut>()).map(|answer| object(&answer))
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let open = OpenIn { flags: flags as u32, ..Default::default() };
        self.ask(14, node, open.as_slice(), size_of::<OpenOut>()).map(|answer| object::<OpenOut>(&answer).fh)
    }

    fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<(EntryOut, u64), i32> {
        let create = CreateIn { flags: libc::O_RDWR as u32, mode, ..Default::default() };
        let body = [create.as_slice(), &zero_terminated(name)].concat();
        let answer = self.ask(35, parent, &body, size_of::<EntryOut>() + size_of::<OpenOut>())?;
        Ok((object(&answer), object::<OpenOut>(&answer[size_of::<EntryOut>()..]).fh))
    }

    fn read(&mut self, node: u64, fh: u64, offset: u64, size: usize) -> Answer {
        let read = ReadIn { fh, offset, size: size as u32, ..Default::default() };
        self.ask(15, node, read.as_slice(), size)
    }

    fn write(&mut self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let write = WriteIn { fh, offset, size: data.len() as u32, ..Default::default() };
        let body = [write.as_slice(), data].concat();
        self.ask(16, node, &body, size_of::<WriteOut>()).map(|answer| object::<WriteOut>(&answer).size)
    }

    fn release(&mut self, node: u64, fh: u64) -> Answer {
        self.ask(18, node, ReleaseIn { fh, ..Default::default() }.as_slice(), 0)
    }

    fn attributes(&mut self, node: u64) -> Result<AttrOut, i32> {
        self.ask(3, node, GetattrIn::default().as_slice(), size_of::<AttrOut>()).map(|answer| object(&answer))
    }
}

fn zero_terminated(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

fn object<T: ByteValued + Default>(bytes: &[u8]) -> T {
    let mut object = T::default();
    object.as_mut_slice().copy_from_slice(&bytes[..size_of::<T>()]);
    object
}

#[test]
fn the_configuration_space_has_the_tag_and_one_request_queue() {
    let directory = Directory::new();
    let share = share(&directory.0);
    let mut config = [0xff; 48];
    share.read_config(0, &mut config);
    assert_eq!(&config[..6], b"share\0");
    assert_eq!(config[36..48], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut far = [0xff; 4];
    share.read_config(u64::MAX, &mut far);
    assert_eq!(far, [0; 4]);
}

#[test]
fn files_are_read_and_written_from_either_side() {
    let directory = Directory::new();
    let mut share = share(&directory.0);
    let mut guest = Mounted::new(&mut share);
    let content: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect();
    fs::write(directory.path("from-host"), &content).unwrap();

    let entry = guest.lookup(ROOT, "from-host").unwrap();
    assert_eq!(entry.attr.size, content.len() as u64);
    let fh = guest.open(entry.nodeid, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(entry.nodeid, fh, 0, 1 << 20).unwrap(), content);
    assert_eq!(guest.read(entry.nodeid, fh, (1 << 20) - 3, 100).unwrap(), content[(1 << 20) - 3..]);
    assert_eq!(guest.release(entry.nodeid, fh), Ok(vec![]));
    assert_eq!(guest.read(entry.nodeid, fh, 0, 1), Err(libc::EBADF));

    guest.uid = 1000;
    fs::set_permissions(&directory.0, fs::Permissions::from_mode(0o777)).unwrap();
    let (entry, fh) = guest.create(ROOT, "from-guest", 0o640).unwrap();
    assert_eq!(guest.write(entry.nodeid, fh, 0, &content), Ok(1 << 20));
    assert_eq!(fs::read(directory.path("from-guest")).unwrap(), content);
    let metadata = fs::metadata(directory.path("from-guest")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (1000, 1000, 0o640));

    // Where its user alone may not: the guest has decided that, perhaps by a capability.
    fs::set_permissions(&directory.0, fs::Permissions::from_mode(0o555)).unwrap();
    guest.create(ROOT, "by-capability", 0o600).unwrap();
    assert_eq!(fs::metadata(directory.path("by-capability")).unwrap().uid(), 1000);
}

#[test]
fn what_the_guest_asks_for_is_counted() {
    let directory = Directory::new();
    let mut share = share(&directory.0);
    let traffic = share.traffic();
    let mut guest = Mounted::new(&mut share);
    fs::write(directory.path("f"), [7; 5000]).unwrap();
    let entry = guest.lookup(ROOT, "f").unwrap();
    let fh = guest.open(entry.nodeid, libc::O_RDWR).unwrap();
    // FUSE_INIT, LOOKUP, OPEN.
    assert_eq!(traffic.so_far(), Traffic { others: 3, ..Default::default() });
    // What is there counts, not what was asked for; and nothing of what fails.
    assert_eq!(guest.read(entry.nodeid, fh, 4000, 4096).unwrap().len(), 1000);
    assert_eq!(guest.write(entry.nodeid, fh, 0, &[8; 300]), Ok(300));
    assert_eq!(guest.read(entry.nodeid, fh + 99, 0, 4096), Err(libc::EBADF));
    assert_eq!(guest.write(entry.nodeid, fh + 99, 0, &[8; 300]), Err(libc::EBADF));
    // Files without a name are the same to it.
    let create = CreateIn { flags: libc::O_RDWR as u32, mode: 0o600, ..Default::default() };
    let room = size_of::<EntryOut>() + size_of::<OpenOut>();
    let made = guest.ask(51, ROOT, &[create.as_slice(), b"/\0"].concat(), room).unwrap();
    let (node, fh) = (object::<EntryOut>(&made).nodeid, object::<OpenOut>(&made[size_of::<EntryOut>()..]).fh);
    assert_eq!(guest.write(node, fh, 0, &[9; 40]), Ok(40));
    assert_eq!(guest.read(node, fh, 0, 4096).unwrap().len(), 40);
    let expected = Traffic { reads: 3, writes: 3, others: 4, read_bytes: 1040, written_bytes: 340 };
    assert_eq!(traffic.so_far(), expected);
}

#[test]
fn no_name_of_a_file_is_kept_in_the_guest_so_a_rename_is_seen_at_once() {
    let directory = Directory::new();
    let mut share = share(&directory.0);
    let mut guest = Mounted::new(&mut share);
    assert_eq!(guest.lookup(ROOT, "file").unwrap_err(), libc::ENOENT);
    fs::write(directory.path("file"), "old").unwrap();
    let old = guest.lookup(ROOT, "file").unwrap();
    assert_eq!((old.entry_valid, old.entry_valid_nsec), (0, 0), "of the name");
    // Attributes serve the call that asked.
    assert_eq!((old.attr_valid, old.attr_valid_nsec), (0, 1_000_000), "of the attributes");
    fs::write(directory.path("next"), "newer").unwrap();
    fs::rename(directory.path("next"), directory.path("file")).unwrap();
    let new = guest.lookup(ROOT, "file").unwrap();
    assert_ne!(new.nodeid, old.nodeid);
    assert_eq!(new.attr.size, 5);
    // The replaced file can still be read by who has it.
    let fh = guest.open(old.nodeid, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(old.nodeid, fh, 0, 10).unwrap(), b"old");
    assert_eq!(guest.attributes(old.nodeid).unwrap().attr.nlink, 0);
}

#[test]
fn a_directory_is_kept_for_a_moment_and_is_stale_when_the_host_has_removed_it() {
    let valid = |entry: &EntryOut| (entry.entry_valid, entry.entry_valid_nsec, entry.attr_valid, entry.attr_valid_nsec);
    let moment = (0, 100_000_000, 0, 100_000_000);
    let directory = Directory::new();
    let mut share = share(&directory.0);
    let mut guest = Mounted::new(&mut share);
    fs::create_dir_all(directory.path("shared/made/on-host")).unwrap();
    let top = guest.lookup(ROOT, "shared").unwrap();
    assert_eq!(valid(&top), (0, 0, 0, 1_000_000), "of what is shared");
    let old = guest.lookup(top.nodeid, "made").unwrap();
    assert_eq!(valid(&old), moment);
    assert_eq!(valid(&guest.lookup(old.nodeid, "on-host").unwrap()), moment);
    assert_eq!(guest.attributes(old.nodeid).unwrap().attr_valid_nsec, 100_000_000);
    assert_eq!(guest.lookup(old.nodeid, "file").unwrap_err(), libc::ENOENT);

    fs::remove_dir_all(directory.path("shared/made")).unwrap();
    fs::create_dir(directory.path("shared/made")).unwrap();
    fs::write(directory.path("shared/made/file"), "new").unwrap();
    assert_eq!(guest.lookup(old.nodeid, "file").unwrap_err(), libc::ESTALE);
    assert_eq!(guest.create(old.nodeid, "another", 0o600).unwrap_err(), libc::ESTALE);
    let mut list = || guest.ask(27, old.nodeid, OpenIn::default().as_slice(), size_of::<OpenOut>()).map(drop);
    assert_eq!((list(), list()), (Err(libc::ESTALE), Ok(())), "of who goes by its name, and of who is in it");
    let new = guest.lookup(top.nodeid, "made").unwrap();
    assert_ne!(new.nodeid, old.nodeid);
    assert_eq!(guest.lookup(new.nodeid, "file").unwrap().attr.size, 3);
}

#[test]
fn who_only_reads_need_not_say_that_it_closes() {
    let directory = Directory::new();
    let mut share = share(&directory.0);
    let mut guest = Mounted::new(&mut share);
    fs::write(directory.path("file"), "x").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap().nodeid;
    for (access, expected) in [(libc::O_RDONLY, true), (libc::O_WRONLY, false), (libc::O_RDWR, false)] {
        let open = OpenIn { flags: access as u32, ..Default::default() };
        let answer = guest.ask(14, node, open.as_slice(), size_of::<OpenOut>()).unwrap();
        let flags = object::<OpenOut>(&answer).open_flags;
        assert_eq!(flags & OpenOptions::NOFLUSH.bits() != 0, expected);
    }
}

#[test]
fn contents_are_kept_of_a_file_that_is_not_changed() {
    let kept = |guest: &mut Mounted, name: &str| {
        let node = guest.lookup(ROOT, name).unwrap().nodeid;
        let answer = guest.ask(14, node, OpenIn::default().as_slice(), size_of::<OpenOut>()).unwrap();
        object::<OpenOut>(&answer).open_flags & OpenOptions::KEEP_CACHE.bits() != 0
    };
    let directory = Directory::new();
    let mut new = share(&directory.0);
    let mut guest = Mounted::new(&mut new);
    fs::write(directory.path("file"), "x").unwrap();
    assert_eq!([kept(&mut guest, "file"), kept(&mut guest, "file")], [false, false]);
    // A file that every system has had for a while.
    let mut old = share(Path::new("/usr/bin"));
    let mut guest = Mounted::new(&mut old);
    assert_eq!([kept(&mut guest, "env"), kept(&mut guest, "env")], [false, true]);
}

#[test]
fn trusted_attributes_are_kept_as_user_attributes_that_the_guest_cannot_name() {
    let directory = Directory::new();
    let mut share = share(&directory.0);
    let mut guest = Mounted::new(&mut share);
    let (entry, _) = guest.create(ROOT, "file", 0o644).unwrap();
    let mut set = |name: &str| {
        let header = SetxattrIn { size: 1, ..Default::default() };
        guest.ask(21, entry.nodeid, &[header.as_slice(), &zero_terminated(name), b"y"].concat(), 0)
    };
    assert_eq!(set("user.plain"), Ok(vec![]));
    assert_eq!(set("trusted.overlay.opaque"), Ok(vec![]));
    assert_eq!(set("user.virtiofs.trusted.overlay.opaque"), Err(libc::EPERM));
    let list = guest.ask(23, entry.nodeid, GetxattrIn { size: 4096, ..Default::default() }.as_slice(), 4096).unwrap();
    let names: Vec<_> = list.split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(names.contains(&&b"trusted.overlay.opaque"[..]) && names.contains(&&b"user.plain"[..]));
}

#[test]
fn names_that_are_not_one_component_are_refused() {
    let directory = Directory::new();
    let inside = directory.path("inside");
    fs::create_dir(&inside).unwrap();
    fs::write(directory.path("outside"), "secret").unwrap();
    let mut share = share(&inside);
    let mut guest = Mounted::new(&mut share);
    for name in ["..", ".", "", "../outside", "/etc/passwd", "a/b"] {
        assert_eq!(guest.lookup(ROOT, name).unwrap_err(), libc::EINVAL, "{name}");
        assert_eq!(guest.create(ROOT, name, 0o600).unwrap_err(), libc::EINVAL, "{name}");
        assert_eq!(guest.ask(10, ROOT, &zero_terminated(name), 0), Err(libc::EINVAL), "{name}");
    }
    let both = [zero_terminated("../outside"), zero_terminated("mine")].concat();
    assert_eq!(guest.ask(12, ROOT, &[&ROOT.to_le_bytes()[..], &both].concat(), 0), Err(libc::EINVAL));
    assert_eq!(fs::read(directory.path("outside")).unwrap(), b"secret");
}

#[test]
fn a_file_without_a_name_is_written_and_named_later() {
    let directory = Directory::new();
    fs::set_permissions(&directory.0, fs::Permissions::from_mode(0o2777)).unwrap();
    let mut share = share(&directory.0);
    let mut guest = Mounted::new(&mut share);
    let make = |guest: &mut Mounted, flags: i32, extension: &[u8]| {
        let create = CreateIn { flags: flags as u32, mode: 0o666, umask: 0o022, ..Default::default() };
        let body = [create.as_slice(), b"/\0", extension].concat();
        let answer = guest.ask(51, ROOT, &body, size_of::<EntryOut>() + size_of::<OpenOut>())?;
        let fh = object::<OpenOut>(&answer[size_of::<EntryOut>()..]).fh;
        Ok::<_, i32>((object::<EntryOut>(&answer), fh))
    };
    guest.uid = 1000;
    fs::set_permissions(&directory.0, fs::Permissions::from_mode(0o2555)).unwrap();
    let (entry, fh) = make(&mut guest, libc::O_RDWR, &[]).unwrap();
    guest.uid = 0;
    let node = entry.nodeid;
    assert_eq!((entry.attr.nlink, entry.attr.mode), (0, libc::S_IFREG | 0o644));
    assert_eq!((entry.attr.uid, fs::read_dir(&directory.0).unwrap().count()), (1000.into(), 0));
    assert_eq!(guest.write(node, fh, 0, b"content"), Ok(7));
    assert_eq!(guest.read(node, fh, 3, 100).unwrap(), b"tent");
    assert_eq!(guest.attributes(node).unwrap().attr.size, 7);
    let second = guest.open(node, libc::O_RDONLY | libc::O_APPEND).unwrap();
    assert_eq!(guest.read(node, second, 0, 100).unwrap(), b"content");
    assert_eq!(guest.write(node, second, 0, b"x"), Err(libc::EBADF));
    let set = SetxattrIn { size: 1, ..Default::default() };
    let body = [set.as_slice(), &zero_terminated("trusted.overlay.origin"), b"y"].concat();
    assert_eq!(guest.ask(21, node, &body, 0), Ok(vec![]));

    let link = [&node.to_le_bytes()[..], b"../outside\0"].concat();
    assert_eq!(guest.ask(13, ROOT, &link, size_of::<EntryOut>()), Err(libc::EINVAL));
    let link = [&node.to_le_bytes()[..], b"named\0"].concat();
    let named: EntryOut = object(&guest.ask(13, ROOT, &link, size_of::<EntryOut>()).unwrap());
    assert_eq!((named.attr.ino, named.attr.nlink), (entry.attr.ino, 1));
    assert_eq!(guest.lookup(ROOT, "named").unwrap().nodeid, named.nodeid);
    assert_eq!(fs::read(directory.path("named")).unwrap(), b"content");
    assert_eq!(guest.write(node, fh, 7, b" more"), Ok(5));
    assert_eq!(fs::read(directory.path("named")).unwrap(), b"content more");
    let get = GetxattrIn { size: 10, ..Default::default() };
    let get = [get.as_slice(), b"trusted.overlay.origin\0"].concat();
    assert_eq!(guest.ask(22, named.nodeid, &get, 10).unwrap(), b"y");

    assert_eq!(guest.release(node, fh), Ok(vec![]));
    assert_eq!(guest.release(node, fh), Err(libc::EBADF));
    assert_eq!(guest.release(node, second), Ok(vec![]));
    let forget = guest.message(2, node, &1u64.to_le_bytes());
    assert_eq!(guest.driven.rings[0].request(&[Part::Out(forget)]).0, 0);
    assert_eq!(guest.attributes(node).unwrap_err(), libc::EBADF);

    // For good without a name; with the caller's other groups; malformed.
    let (entry, _) = make(&mut guest, libc::O_RDWR | libc::O_EXCL, &[]).unwrap();
    let link = [&entry.nodeid.to_le_bytes()[..], b"other\0"].concat();
    assert_eq!(guest.ask(13, ROOT, &link, size_of::<EntryOut>()), Err(libc::ENOENT));
    let groups: Vec<_> = [16u32, 32, 1, 77].iter().flat_map(|word| word.to_le_bytes()).collect();
    assert!(make(&mut guest, libc::O_RDWR, &groups).is_ok());
    for bad in [&groups[..15], &[16, 0, 0, 0], &[0; 8], &[255; 16]] {
        assert_eq!(make(&mut guest, libc::O_RDWR, bad).unwrap_err(), libc::EINVAL);
    }
    let file = guest.lookup(ROOT, "named").unwrap().nodeid;
    let body = [CreateIn::default().as_slice(), b"/\0"].concat();
    assert_eq!(guest.ask(51, file, &body, 200), Err(libc::ENOTDIR));
}

#[test]
fn malformed_requests_get_errors_and_the_device_goes_on() {
    let directory = Directory::new();
    let mut share = share(&directory.0);
    let mut guest = Mounted::new(&mut share);
    let ring = &mut guest.driven.rings[1];
    // Shorter than a header; nothing readable; nothing to write to; too little to write to.
    assert_eq!(ring.request(&[Part::Out(vec![0xff; 7]), Part::In(64)]).0, 16);
    assert_eq!(ring.request(&[Part::In(64)]).0, 16);
    assert_eq!(ring.request(&[Part::Out(vec![])]).0, 0);
    assert_eq!(ring.request(&[Part::Out(vec![0xff; 100])]).0, 0);
    // All but DESTROY, which works with and without an answer.
    for opcode in (0..64).filter(|opcode| *opcode != 38) {
        for room in [0, 1, 15] {
            let message = guest.message(opcode, ROOT, &[0; 64]);
            let parts: &[_] = if room == 0 { &[Part::Out(message)] } else { &[Part::Out(message), Part::In(room)] };
            assert_eq!(guest.driven.rings[1].request(parts).0, 0, "opcode {opcode} room {room}");
        }
        // Without a body, and with a length that is a lie.
        let message = guest.message(opcode, ROOT, &[]);
        assert!(guest.driven.rings[1].request(&[Part::Out(message), Part::In(4096)]).0 >= 16);
        let mut message = guest.message(opcode, ROOT, &[0xaa; 48]);
        message[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(guest.driven.rings[1].request(&[Part::Out(message), Part::In(4096)]).0, 16);
    }
    fs::write(directory.path("file"), "x").unwrap();
    assert_eq!(guest.lookup(ROOT, "file").unwrap().attr.size, 1);
}

#[test]
fn a_broken_ring_stops_the_device() {
    let directory = Directory::new();
    let mut share = share(&directory.0);
    let mut guest = Mounted::new(&mut share);
    let ring = &mut guest.driven.rings[1];
    ring.offer_descriptors(&[
        Descriptor { address: 0x10_0000, length: 16, flags: NEXT | WRITE, next: 1 },
        Descriptor { address: 0x10_0000, length: 16, flags: 0, next: 0 },
    ]);
    ring.kick();
    assert!(matches!(guest.driven.broken(), Broken::Chain { .. }));
}

#[test]
fn a_stopped_worker_gives_its_queues_back_and_goes_on_where_it_was() {
    let directory = Directory::new();
    let mut share = share(&directory.0);
    let mut guest = Mounted::new(&mut share);
    fs::write(directory.path("file"), "content").unwrap();
    let entry = guest.lookup(ROOT, "file").unwrap();
    let fh = guest.open(entry.nodeid, libc::O_RDONLY).unwrap();

    let worker = guest.driven.stop();
    let states: Vec<_> = worker.queues().iter().map(|queue| queue.unwrap().state().next_avail).collect();
    assert_eq!(states, [0, 3]);
    // A request that comes in the pause is served after it.
    let read = ReadIn { fh, size: 7, ..Default::default() };
    let message = guest.message(15, entry.nodeid, read.as_slice());
    let head = guest.driven.rings[1].offer(&[Part::Out(message), Part::In(HEADER + 7)]);
    assert_eq!(guest.driven.rings[1].take_used(), None);
    guest.driven.run_on(worker);
    assert_eq!(guest.driven.rings[1].wait(), (head, 23));
    assert_eq!(&guest.driven.rings[1].written(head)[HEADER..], b"content");
}

#[test]
fn a_reset_ends_the_session() {
    let directory = Directory::new();
    let mut share = share(&directory.0);
    fs::write(directory.path("file"), "content").unwrap();
    let mut guest = Mounted::new(&mut share);
    let entry = guest.lookup(ROOT, "file").unwrap();
    drop(guest.driven.stop());
    share.reset();
    let mut guest = Mounted::new(&mut share);
    assert_eq!(guest.open(entry.nodeid, libc::O_RDONLY), Err(libc::EBADF));
    assert_eq!(guest.lookup(ROOT, "file").unwrap().attr.size, 7);
}

#[test]
fn many_requests_at_a_time_are_each_answered_once() {
    let directory = Directory::new();
    let mut share = share(&directory.0);
    let mut guest = Mounted::new(&mut share);
    for number in 0..100 {
        fs::write(directory.path(&format!("{number}")), vec![0; number]).unwrap();
    }
    for _ in 0..20 {
        let mut expected = HashMap::new();
        for number in 0..100 {
            let message = guest.message(1, ROOT, &zero_terminated(&number.to_string()));
            let head = guest.driven.rings[1].offer(&[Part::Out(message), Part::In(HEADER + size_of::<EntryOut>())]);
            expected.insert(head, number);
            if number % 7 == 0 {
                guest.driven.rings[1].kick();
            }
        }
        guest.driven.rings[1].kick();
        while !expected.is_empty() {
            let (head, _) = guest.driven.rings[1].wait();
            let number = expected.remove(&head).expect("answered twice");
            let entry: EntryOut = object(&guest.driven.rings[1].written(head)[HEADER..]);
            assert_eq!(entry.attr.size, number);
        }
    }
}

#[test]
fn a_share_whose_threads_cannot_be_confined_is_not_made() {
    let directory = Directory::new();
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY;
    let fds: OwnedFd = rustix::fs::open("/proc/self/fd", flags, rustix::fs::Mode::empty()).unwrap();
    let result = Share::new(ShareConfig {
        tag: "share".into(),
        root: directory.0.to_str().unwrap().into(),
        proc_self_fd: fds.into(),
        threads: 2,
        confine: Box::new(|| Err(io::ErrorKind::PermissionDenied.into())),
    });
    assert!(matches!(result, Err(ShareError::Thread(_))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn random_requests_never_end_the_server(
        messages in prop::collection::vec(
            (0u32..64, 0u64..4, prop::collection::vec(any::<u8>(), 0..200), 0usize..300, any::<bool>()), 1..20)
    ) {
        let directory = Directory::new();
        fs::write(directory.path("a"), "x").unwrap();
        let mut share = share(&directory.0);
        let mut guest = Mounted::new(&mut share);
        let _ = guest.lookup(ROOT, "a");
        for (opcode, node, mut body, room, small) in messages {
            if small {
                // Small numbers reach deeper: handles, sizes and flags that exist.
                body.iter_mut().skip(1).for_each(|byte| *byte = u8::from(*byte > 250));
            }
            let message = guest.message(opcode, node, &body);
            let (length, _) = guest.driven.rings[1].request(&[Part::Out(message), Part::In(room)]);
            prop_assert!(length as usize <= room);
        }
        if guest.lookup(ROOT, "a").is_err() {
            // Forgotten, destroyed or removed: a new session works.
            drop(guest.driven.stop());
            Mounted::new(&mut share);
        }
    }
}
