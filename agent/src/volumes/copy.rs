//! A copy of a directory that is written as kubelet's atomic writer does: each version of its files is a directory of its own, whose
//! name begins with two dots; the link `..data` leads to the present one, and is replaced by rename; the names that are seen
//! are links through that. The copy is changed in the same steps, in the same order.
//!
//! The host may write the next version at any time: then what was read of one is no whole, which the link tells afterwards.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::Errno;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::container::copy_up::copy_attributes;

/// Most of one version, in pages: 1 MiB is the most that Kubernetes keeps in one object, and a projected volume has several.
pub const MAX_PAGES: usize = 2048;

/// What room is counted in.
pub const PAGE: usize = 4096;

/// Deeper than what names its keys by paths.
const MAX_DEPTH: u32 = 32;

/// Versions that may come while one is read. Who writes even more of them says so again, and there is another try.
const ATTEMPTS: u32 = 8;

/// The link to the present version.
const DATA: &CStr = c"..data";

/// What becomes that.
const DATA_TMP: &CStr = c"..data_tmp";

/// Why there is no copy of what is there now.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error("it is not written as kubelet's are")]
    Layout,
    #[error("it is larger than {} MiB", (MAX_PAGES * PAGE) >> 20)]
    TooLarge,
    #[error("the copies of all volumes have no more room")]
    NoRoom,
    #[error("it changes all the time")]
    Changing,
    #[error("{name:?}: {source}")]
    Entry { name: CString, source: Errno },
}

/// A directory, its copy, and what that has now.
pub struct Copy {
    source: OwnedFd,
    copy: OwnedFd,
    room: Arc<Semaphore>,
    version: Option<Version>,
}

/// What was copied.
struct Version {
    /// Of its directory.
    name: CString,
    /// Names at its top.
    keys: BTreeSet<CString>,
    /// Whose owner and times the links have.
    link: Stat,
    /// Given back when it is removed.
    _room: OwnedSemaphorePermit,
}

impl Copy {
    /// Fills an empty directory. `room` is what copies may take in all, in pages.
    pub fn new(source: OwnedFd, copy: OwnedFd, room: Arc<Semaphore>) -> Result<Self, CopyError> {
        check_layout(source.as_fd())?;
        let mut made = Self { source, copy, room, version: None };
        made.update()?;
        Ok(made)
    }

    /// Makes it what is there now.
    pub fn update(&mut self) -> Result<(), CopyError> {
        for _ in 0..ATTEMPTS {
            let name = self.current()?;
            if self.version.as_ref().is_some_and(|version| version.name == name) {
                return Ok(());
            }
            let read = self.read(&name);
            let unchanged = self.current().is_ok_and(|now| now == name);
            match read {
                Ok(version) if unchanged => return self.show(version),
                Err(error) if unchanged => {
                    let _ = remove(self.copy.as_fd(), &name, 0);
                    return Err(error);
                }
                Ok(_) | Err(_) => {
                    let _ = remove(self.copy.as_fd(), &name, 0);
                }
            }
        }
        Err(CopyError::Changing)
    }

    /// Name of the directory that is the present version.
    fn current(&self) -> Result<CString, CopyError> {
        let target = rustix::fs::readlinkat(&self.source, DATA, Vec::new()).map_err(in_entry(DATA))?;
        let bytes = target.as_bytes();
        let own = bytes.len() > 2 && bytes.starts_with(b"..") && !bytes.contains(&b'/');
        if !own || *target == *DATA || *target == *DATA_TMP {
            return Err(CopyError::Layout);
        }
        Ok(target)
    }

    /// Copies a version to where nobody looks yet.
    fn read(&self, name: &CStr) -> Result<Version, CopyError> {
        let link = rustix::fs::statat(&self.source, DATA, AtFlags::SYMLINK_NOFOLLOW).map_err(in_entry(DATA))?;
        // What is left of a try that failed.
        remove(self.copy.as_fd(), name, 0).map_err(in_entry(name))?;
        let mut room = Room::new(&self.room)?;
        let keys = copy_directory(self.source.as_fd(), self.copy.as_fd(), name, &mut room, 0)?;
        if keys.iter().any(|key| key.as_bytes().starts_with(b"..")) {
            return Err(CopyError::Layout);
        }
        Ok(Version { name: name.into(), keys, link, _room: room.taken })
    }

    /// Makes a version the present one.
    fn show(&mut self, version: Version) -> Result<(), CopyError> {
        let copy = self.copy.as_fd();
        self.show_owner()?;
        let swap = || {
            match rustix::fs::unlinkat(copy, DATA_TMP, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno),
            }
            rustix::fs::symlinkat(&*version.name, copy, DATA_TMP)?;
            copy_attributes(copy, DATA_TMP, &version.link)?;
            rustix::fs::renameat(copy, DATA_TMP, copy, DATA)
        };
        swap().map_err(in_entry(DATA))?;
        let (owner, group) = (Uid::from_raw(version.link.st_uid), Gid::from_raw(version.link.st_gid));
        let old = self.version.replace(version);
        let new = self.version.as_ref().map(|version| &version.keys);
        let (none, old_keys) = (BTreeSet::new(), old.as_ref().map(|old| &old.keys));
        let (new, old_keys) = (new.unwrap_or(&none), old_keys.unwrap_or(&none));
        for key in new.difference(old_keys) {
            let target = [DATA.to_bytes(), b"/", key.as_bytes()].concat();
            rustix::fs::symlinkat(target, copy, key)
                .and_then(|()| rustix::fs::chownat(copy, key, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW))
                .map_err(in_entry(key))?;
        }
        for key in old_keys.difference(new) {
            rustix::fs::unlinkat(copy, key, AtFlags::empty()).map_err(in_entry(key))?;
        }
        match old {
            Some(old) => remove(copy, &old.name, 0).map_err(in_entry(&old.name)),
            None => Ok(()),
        }
    }

    /// Gives the directory itself the owner and mode of the host's; nobody is told if it has them.
    fn show_owner(&self) -> Result<(), CopyError> {
        let stat = |directory: &OwnedFd| rustix::fs::fstat(directory).map_err(in_entry(c"."));
        let (theirs, ours) = (stat(&self.source)?, stat(&self.copy)?);
        let told = |stat: &Stat| (stat.st_uid, stat.st_gid, stat.st_mode);
        match told(&theirs) == told(&ours) {
            true => Ok(()),
            false => copy_attributes(self.copy.as_fd(), c".", &theirs).map_err(in_entry(c".")),
        }
    }
}

/// What a version takes.
struct Room<'a> {
    all: &'a Arc<Semaphore>,
    taken: OwnedSemaphorePermit,
}

impl<'a> Room<'a> {
    fn new(all: &'a Arc<Semaphore>) -> Result<Self, CopyError> {
        Ok(Self { all, taken: all.clone().try_acquire_many_owned(0).map_err(|_| CopyError::NoRoom)? })
    }

    /// Takes what an entry of so many bytes needs: its pages, and one for what the kernel keeps of it.
    fn take(&mut self, bytes: u64) -> Result<(), CopyError> {
        let pages = bytes.div_ceil(PAGE as u64).saturating_add(1);
        if pages > (MAX_PAGES - self.taken.num_permits()) as u64 {
            return Err(CopyError::TooLarge);
        }
        let taken = self.all.clone().try_acquire_many_owned(pages as u32).map_err(|_| CopyError::NoRoom)?;
        self.taken.merge(taken);
        Ok(())
    }
}

fn in_entry(name: &CStr) -> impl Fn(Errno) -> CopyError + '_ {
    move |source| CopyError::Entry { name: name.into(), source }
}

/// Whether nothing else is in a directory: what has no copy must not be hidden by one.
fn check_layout(source: BorrowedFd<'_>) -> Result<(), CopyError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let listed = rustix::fs::openat(source, c".", flags, Mode::empty()).map_err(in_entry(c"."))?;
    for (index, entry) in Dir::new(listed).map_err(in_entry(c"."))?.enumerate() {
        let entry = entry.map_err(in_entry(c"."))?;
        let name = entry.file_name();
        if index > MAX_PAGES {
            return Err(CopyError::TooLarge);
        }
        if name == c"." || name.to_bytes().starts_with(b"..") {
            continue;
        }
        match rustix::fs::readlinkat(source, name, Vec::new()) {
            Ok(target) if target.as_bytes() == [DATA.to_bytes(), b"/", name.to_bytes()].concat() => {}
            // It is gone since, as one is whose key has vanished.
            Err(Errno::NOENT) => {}
            _ => return Err(CopyError::Layout),
        }
    }
    Ok(())
}

/// Copies a directory into another, with all that is in it; returns the names of that.
fn copy_directory(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    name: &CStr,
    room: &mut Room<'_>,
    depth: u32,
) -> Result<BTreeSet<CString>, CopyError> {
    if depth > MAX_DEPTH {
        return Err(CopyError::TooLarge);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let error = in_entry(name);
    room.take(0)?;
    let source = rustix::fs::openat(from, name, flags, Mode::empty()).map_err(&error)?;
    rustix::fs::mkdirat(to, name, Mode::RWXU).map_err(&error)?;
    let copy = rustix::fs::openat(to, name, flags, Mode::empty()).map_err(&error)?;
    let mut names = BTreeSet::new();
    for entry in Dir::read_from(&source).map_err(&error)? {
        let entry = entry.map_err(&error)?;
        let below = entry.file_name();
        if below == c"." || below == c".." {
            continue;
        }
        let stat = rustix::fs::statat(&source, below, AtFlags::SYMLINK_NOFOLLOW).map_err(in_entry(below))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                copy_directory(source.as_fd(), copy.as_fd(), below, room, depth + 1)?;
            }
            FileType::RegularFile => copy_file(source.as_fd(), copy.as_fd(), below, room)?,
            _ => return Err(CopyError::Layout),
        }
        names.insert(below.into());
    }
    let stat = rustix::fs::fstat(&source).map_err(&error)?;
    copy_attributes(to, name, &stat).map_err(&error)?;
    Ok(names)
}

fn copy_file(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr, room: &mut Room<'_>) -> Result<(), CopyError> {
    let error = in_entry(name);
    // It may be another by now, and one that is waited for to be opened.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let source = rustix::fs::openat(from, name, flags, Mode::empty()).map_err(&error)?;
    let stat = rustix::fs::fstat(&source).map_err(&error)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(CopyError::Layout);
    }
    let size = stat.st_size.unsigned_abs();
    room.take(size)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let copy = rustix::fs::openat(to, name, flags, Mode::RUSR | Mode::WUSR).map_err(&error)?;
    let mut left = size as usize;
    while left > 0 {
        match rustix::fs::sendfile(&copy, &source, None, left).map_err(&error)? {
            0 => break,
            count => left -= count,
        }
    }
    drop(copy);
    copy_attributes(to, name, &stat).map_err(&error)
}

/// Removes a directory and all in it, if it is there.
fn remove(from: BorrowedFd<'_>, name: &CStr, depth: u32) -> Result<(), Errno> {
    if depth > MAX_DEPTH {
        return Err(Errno::LOOP);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = match rustix::fs::openat(from, name, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        opened => opened?,
    };
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        let below = entry.file_name();
        if below == c"." || below == c".." {
            continue;
        }
        match rustix::fs::unlinkat(&directory, below, AtFlags::empty()) {
            Err(Errno::ISDIR) => remove(directory.as_fd(), below, depth + 1)?,
            unlinked => unlinked?,
        }
    }
    // Who waits for its end is told before those who watch the directory that it was in, if nobody has it open.
    drop(directory);
    rustix::fs::unlinkat(from, name, AtFlags::REMOVEDIR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
    use std::path::{Path, PathBuf};
    use std::sync::atomic::{AtomicBool, Ordering};

    use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

    /// A volume, where its copy is to be, and what copies may take.
    struct Scene {
        base: tempfile::TempDir,
        room: Arc<Semaphore>,
    }

    impl Scene {
        fn new() -> Self {
            let base = tempfile::tempdir().unwrap();
            fs::create_dir(base.path().join("volume")).unwrap();
            fs::create_dir(base.path().join("copy")).unwrap();
            Self { base, room: Arc::new(Semaphore::new(2 * MAX_PAGES)) }
        }

        fn volume(&self) -> PathBuf {
            self.base.path().join("volume")
        }

        fn copy(&self) -> PathBuf {
            self.base.path().join("copy")
        }

        fn begin(&self) -> Result<Copy, CopyError> {
            let open = |path| OwnedFd::from(fs::File::open(path).unwrap());
            Copy::new(open(self.volume()), open(self.copy()), self.room.clone())
        }

        /// A version with these files.
        fn make(&self, version: &str, files: &[(&str, &[u8])]) -> PathBuf {
            let directory = self.volume().join(version);
            fs::create_dir(&directory).unwrap();
            for (name, bytes) in files {
                let path = directory.join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, bytes).unwrap();
            }
            directory
        }

        /// Makes it the present one, and removes that before.
        fn write(&self, version: &str, files: &[(&str, &[u8])]) {
            let directory = self.make(version, files);
            write(&self.volume(), &directory);
        }
    }

    fn write(volume: &Path, directory: &Path) {
        let old = fs::read_link(volume.join("..data"));
        symlink(directory.file_name().unwrap(), volume.join("..data_tmp")).unwrap();
        fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
        let new = listed(directory);
        for key in new.iter().filter(|key| !volume.join(key).is_symlink()) {
            symlink(Path::new("..data").join(key), volume.join(key)).unwrap();
        }
        if let Ok(old) = old.map(|old| volume.join(old)) {
            for key in listed(&old).iter().filter(|key| !new.contains(key)) {
                fs::remove_file(volume.join(key)).unwrap();
            }
            fs::remove_dir_all(old).unwrap();
        }
    }

    fn listed(directory: &Path) -> Vec<String> {
        let names = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    #[test]
    fn a_copy_has_the_same_files_with_their_modes_owners_and_times() {
        let scene = Scene::new();
        let version = scene.make("..1", &[("key", b"text"), ("deep/er/key", b"below"), ("empty", b"")]);
        fs::set_permissions(version.join("key"), fs::Permissions::from_mode(0o400)).unwrap();
        fs::set_permissions(version.join("deep"), fs::Permissions::from_mode(0o2750)).unwrap();
        fs::set_permissions(scene.volume(), fs::Permissions::from_mode(0o2775)).unwrap();
        if rustix::process::geteuid().is_root() {
            chown(version.join("deep/er/key"), Some(1234), Some(5678)).unwrap();
            chown(scene.volume(), None, Some(5678)).unwrap();
        }
        write(&scene.volume(), &version);
        let _copy = scene.begin().unwrap();
        assert_eq!(listed(&scene.copy()), ["..1", "..data", "deep", "empty", "key"]);
        assert_eq!(fs::read_to_string(scene.copy().join("key")).unwrap(), "text");
        assert_eq!(fs::read_to_string(scene.copy().join("deep/er/key")).unwrap(), "below");
        for path in ["", "key", "deep", "deep/er", "deep/er/key", "..1"] {
            let [theirs, ours] = [scene.volume(), scene.copy()].map(|top| fs::metadata(top.join(path)).unwrap());
            let told = |stat: &fs::Metadata| (stat.mode(), stat.uid(), stat.gid());
            assert_eq!(told(&ours), told(&theirs), "{path:?}");
            assert!(path.is_empty() || ours.modified().unwrap() == theirs.modified().unwrap(), "{path:?}");
        }
    }

    #[test]
    fn an_update_is_made_in_the_steps_that_kubelet_makes() {
        let scene = Scene::new();
        scene.write("..1", &[("kept", b"1"), ("gone", b"1")]);
        let mut copy = scene.begin().unwrap();
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
        let of_names = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::DELETE;
        inotify::add_watch(&watch, scene.copy(), of_names).unwrap();
        let old = inotify::add_watch(&watch, scene.copy().join("..data"), WatchFlags::DELETE_SELF).unwrap();
        scene.write("..2", &[("kept", b"2"), ("new", b"2")]);
        copy.update().unwrap();
        copy.update().unwrap();
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&watch, &mut buffer);
        let mut told = Vec::new();
        while let Ok(event) = events.next() {
            if !event.events().contains(ReadFlags::IGNORED) {
                let name = event.file_name().map(|name| name.to_str().unwrap().to_owned());
                told.push((event.events() - ReadFlags::ISDIR, name, event.wd() == old));
            }
        }
        let one = |flags, name: &str| (flags, Some(name.to_owned()), false);
        let expected = [
            one(ReadFlags::CREATE, "..2"),
            one(ReadFlags::CREATE, "..data_tmp"),
            one(ReadFlags::MOVED_TO, "..data"),
            one(ReadFlags::CREATE, "new"),
            one(ReadFlags::DELETE, "gone"),
            (ReadFlags::DELETE_SELF, None, true),
            one(ReadFlags::DELETE, "..1"),
        ];
        assert_eq!(told, expected);
        assert_eq!(listed(&scene.copy()), ["..2", "..data", "kept", "new"]);
        assert_eq!(fs::read_to_string(scene.copy().join("kept")).unwrap(), "2");
    }

    #[test]
    fn a_copy_is_one_version_and_in_the_end_the_last_however_fast_they_come() {
        let scene = Scene::new();
        let version = |number: u32| {
            let text = number.to_string().into_bytes();
            let names: Vec<_> = (0..8).map(|key| format!("{}/key", key + number % 4)).collect();
            let files: Vec<_> = names.iter().map(|name| (name.as_str(), &*text)).collect();
            scene.write(&format!("..{number}"), &files);
        };
        version(0);
        let mut copy = scene.begin().unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                (1..400).for_each(version);
                done.store(true, Ordering::Relaxed);
            });
            while !done.load(Ordering::Relaxed) {
                match copy.update() {
                    Ok(()) | Err(CopyError::Changing) => {}
                    Err(error) => panic!("{error}"),
                }
                let keys = listed(&scene.copy().join("..data"));
                let texts = keys.iter().map(|key| fs::read(scene.copy().join(key).join("key")).unwrap());
                assert_eq!((keys.len(), texts.collect::<BTreeSet<_>>().len()), (8, 1));
            }
        });
        copy.update().unwrap();
        assert_eq!(fs::read_to_string(scene.copy().join("4/key")).unwrap(), "399");
        assert_eq!(listed(&scene.copy()).len(), 10);
    }

    #[test]
    fn what_kubelet_would_not_write_has_no_copy() {
        let refused = |change: fn(&Path)| {
            let scene = Scene::new();
            scene.write("..1", &[("key", b"text"), ("below/key", b"")]);
            change(&scene.volume());
            let error = scene.begin().map(drop).unwrap_err();
            assert_eq!(scene.room.available_permits(), 2 * MAX_PAGES);
            assert!(!scene.copy().join("..data").is_symlink());
            error
        };
        let links: [fn(&Path); 8] = [
            |volume| fs::write(volume.join("another"), "").unwrap(),
            |volume| symlink("/etc/passwd", volume.join("another")).unwrap(),
            |volume| symlink("/etc/passwd", volume.join("..1/link")).unwrap(),
            |volume| symlink("../../..", volume.join("..1/below/link")).unwrap(),
            |volume| fs::write(volume.join("..1/..data"), "").unwrap(),
            |volume| write_link(volume, "/etc"),
            |volume| write_link(volume, "../volume/..1"),
            |volume| rustix::fs::mkfifoat(rustix::fs::CWD, volume.join("..1/fifo"), Mode::RUSR).unwrap(),
        ];
        for change in links {
            assert!(matches!(refused(change), CopyError::Layout));
        }
        for target in ["..", "..data", "..data_tmp", "nothing"] {
            let scene = Scene::new();
            symlink(target, scene.volume().join("..data")).unwrap();
            assert!(matches!(scene.begin(), Err(CopyError::Layout)), "{target}");
        }
        let error = refused(|volume| {
            let file = fs::File::create(volume.join("..1/huge")).unwrap();
            file.set_len(1 << 40).unwrap();
        });
        assert!(matches!(error, CopyError::TooLarge));
        let error = refused(|volume| {
            for number in 0..MAX_PAGES {
                fs::write(volume.join(format!("..1/{number}")), "").unwrap();
            }
        });
        assert!(matches!(error, CopyError::TooLarge));
        let error = refused(|volume| {
            let deep: PathBuf = (0..=MAX_DEPTH).map(|_| "d").collect();
            fs::create_dir_all(volume.join("..1").join(deep)).unwrap();
        });
        assert!(matches!(error, CopyError::TooLarge));
        assert!(matches!(refused(|volume| write_link(volume, "..missing")), CopyError::Entry { .. }));
    }

    fn write_link(volume: &Path, target: &str) {
        fs::remove_file(volume.join("..data")).unwrap();
        symlink(target, volume.join("..data")).unwrap();
    }

    #[test]
    fn what_has_no_room_leaves_what_was_there_and_comes_when_there_is() {
        let scene = Scene::new();
        scene.write("..1", &[("key", b"old")]);
        let mut copy = scene.begin().unwrap();
        let others = scene.room.clone().try_acquire_many_owned(2 * MAX_PAGES as u32 - 4).unwrap();
        scene.write("..2", &[("key", b"new")]);
        assert!(matches!(copy.update(), Err(CopyError::NoRoom)));
        assert_eq!(listed(&scene.copy()), ["..1", "..data", "key"]);
        assert_eq!(fs::read_to_string(scene.copy().join("key")).unwrap(), "old");
        drop(others);
        copy.update().unwrap();
        assert_eq!(listed(&scene.copy()), ["..2", "..data", "key"]);
        assert_eq!(fs::read_to_string(scene.copy().join("key")).unwrap(), "new");
        drop(copy);
        assert_eq!(scene.room.available_permits(), 2 * MAX_PAGES);
    }
}
