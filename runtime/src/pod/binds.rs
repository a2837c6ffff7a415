//! Bind sources: a container has each of them once in the pod's machine, and so have all containers of the pod together. Behind two
//! mounts the guest would see two files in one: its pipes and sockets would not connect, nor its pages be the same.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::{AsFd, OwnedFd};

use podhull_vmm::control::Resource;
use rustix::fs::{FileType, Stat};
use rustix::io::Errno;

use super::mountinfo::Mounts;
use super::tree::Tree;

/// Bind sources of a container.
#[derive(Default)]
pub struct Binds(Vec<Bind>);

struct Bind {
    name: String,
    mount: OwnedFd,
    read_only: bool,
    directory: bool,
}

/// A file or directory that is to be bound.
pub struct Source<'a> {
    /// Where it is.
    pub file: &'a OwnedFd,
    /// What it is.
    pub stat: &'a Stat,
    /// How it is cloned.
    pub tree: &'a Tree<'a>,
    /// In words, whose files are whose in it, if that is other than on the host.
    pub owners: Option<String>,
}

impl Binds {
    /// Adds a source whose clone is `mount`, and says where in the share it will be. Who may only read it binds it read-only in the
    /// guest if another may write.
    pub fn add(&mut self, source: &Source<'_>, mount: OwnedFd, mounts: &Mounts) -> Result<String, Errno> {
        let name = source.name(mounts)?;
        let read_only = source.tree.read_only;
        let directory = source.is_directory();
        match self.0.iter_mut().find(|bind| bind.name == name) {
            Some(bind) if bind.read_only && !read_only => (bind.mount, bind.read_only) = (mount, false),
            Some(_) => {}
            None => self.0.push(Bind { name: name.clone(), mount, read_only, directory }),
        }
        Ok(name)
    }

    /// Names of those that are directories, which the guest mounts once for all.
    pub fn directories(&self) -> Vec<String> {
        self.0.iter().filter(|bind| bind.directory).map(|bind| bind.name.clone()).collect()
    }

    /// For the machine, as those of a container.
    pub fn into_resources(self, id: &str) -> impl Iterator<Item = (Resource, OwnedFd)> {
        self.0.into_iter().map(move |Bind { name, mount, .. }| (Resource::SharedMount { name, user: id.into() }, mount))
    }
}

impl Source<'_> {
    fn is_directory(&self) -> bool {
        FileType::from_raw_mode(self.stat.st_mode) == FileType::Directory
    }

    /// A name that another source has only if both may be one mount. Whether it may be written does not count: the pod may, if
    /// one of its containers may. What its own mount does not allow does, and what is mounted below it at this moment.
    fn name(&self, mounts: &Mounts) -> Result<String, Errno> {
        let below = match self.tree.recursive && self.is_directory() {
            true => mounts.below(&super::path_of(self.file.as_fd())?),
            false => Vec::new(),
        };
        let flags = rustix::fs::fstatvfs(self.file)?.f_flag.bits();
        let all_read_only = self.tree.all_read_only && !below.is_empty();
        let mut how = DefaultHasher::new();
        (flags, all_read_only, &self.owners, below).hash(&mut how);
        let (major, minor) = (rustix::fs::major(self.stat.st_dev), rustix::fs::minor(self.stat.st_dev));
        Ok(format!("@{major}-{minor}-{}-{:016x}", self.stat.st_ino, how.finish()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, OFlags};
    use std::fs;
    use std::path::Path;

    const PLAIN: Tree<'static> = Tree { recursive: true, read_only: false, all_read_only: false, owners: None };

    fn open(path: impl AsRef<Path>) -> OwnedFd {
        rustix::fs::open(path.as_ref(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    /// The name, and the descriptor as if it was a clone.
    fn add(binds: &mut Binds, path: impl AsRef<Path>, tree: &Tree<'_>, owners: Option<&str>) -> String {
        let (file, mounts) = (open(path), Mounts::read().unwrap());
        let stat = rustix::fs::fstat(&file).unwrap();
        let source = Source { file: &file, stat: &stat, tree, owners: owners.map(Into::into) };
        let clone = rustix::io::fcntl_dupfd_cloexec(&file, 0).unwrap();
        binds.add(&source, clone, &mounts).unwrap()
    }

    #[test]
    fn a_source_is_there_once_whatever_its_name_is_and_whoever_may_write() {
        let base = tempfile::tempdir().unwrap();
        fs::create_dir_all(base.path().join("a/b")).unwrap();
        fs::write(base.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink("a", base.path().join("link")).unwrap();
        let mut binds = Binds::default();
        let read_only = Tree { read_only: true, all_read_only: true, ..PLAIN };
        let first = add(&mut binds, base.path().join("a"), &read_only, None);
        assert!(first.starts_with('@') && binds.0[0].read_only);
        assert_eq!(add(&mut binds, base.path().join("link"), &PLAIN, None), first);
        assert_eq!(add(&mut binds, base.path().join("a/b/.."), &Tree { recursive: false, ..read_only }, None), first);
        assert!(binds.0.len() == 1 && !binds.0[0].read_only);
        assert_ne!(add(&mut binds, base.path().join("a/b"), &PLAIN, None), first);
        assert_ne!(add(&mut binds, base.path().join("a"), &PLAIN, Some("0 1000 1")), first);
        assert_ne!(add(&mut binds, base.path().join("file"), &PLAIN, None), first);
        assert_eq!(binds.directories().len(), 3);
        assert_eq!(binds.into_resources("id").count(), 4);
    }

    #[test]
    fn mounts_below_make_a_source_another() {
        let mut binds = Binds::default();
        let all = add(&mut binds, "/", &PLAIN, None);
        assert_ne!(add(&mut binds, "/", &Tree { recursive: false, ..PLAIN }, None), all);
        assert_ne!(add(&mut binds, "/", &Tree { all_read_only: true, ..PLAIN }, None), all);
        assert_eq!(add(&mut binds, "/", &Tree { read_only: true, ..PLAIN }, None), all);
    }
}
