//! The file system that is served: the library's pass-through file system, with what a hostile guest could do to it taken
//! out.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid,
    SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};
use virtiofsd::oslib::ReadvFlags;
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs};
use virtiofsd::read_dir::ReadDir;

use super::directories::Directories;
use super::keep::Kept;
use super::threads::own_file_system_context;
use super::traffic::Counts;
use super::unnamed::{Unnamed, copy, is_unnamed, write};

/// File descriptors kept for the rest of the process: devices, sockets, and files open for the length of a call.
const RESERVED_FILES: u64 = 512;

/// Most files without a name, and handles of them.
const MAX_UNNAMED: u64 = 16384;

/// How long attributes count: as short as the guest can, one tick of its clock. So the answer to a look-up serves the call
/// that asked, which otherwise asks again for the attributes of each directory it goes through: a third of all requests.
const ATTRIBUTES: Duration = Duration::from_millis(1);

/// `trusted.` attributes need `CAP_SYS_ADMIN` on the host, which no thread here has, and overlayfs in the guest needs them:
/// they are kept as `user.` attributes, which the guest in turn cannot reach by that name.
const XATTR_MAP: &str = ":map:trusted.:user.virtiofs.:";

/// The files of a share, as FUSE sees them. Cloning shares them.
#[derive(Clone)]
pub struct Files(Arc<Inner>);

struct Inner {
    passthrough: PassthroughFs,
    unnamed: Unnamed,
    kept: Kept,
    directories: Directories,
    traffic: Counts,
    /// Held during initialisation: two at a time would both make the root.
    initialising: Mutex<()>,
}

impl Files {
    /// The files below `root`, an absolute path. See [`super::ShareConfig`].
    pub fn new(root: String, proc_self_fd: File) -> io::Result<Self> {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        let available = limit.saturating_sub(RESERVED_FILES);
        let unnamed_limit = MAX_UNNAMED.min(available / 8);
        let unnamed = Unnamed::new(proc_self_fd.try_clone()?, xattr_map()?, unnamed_limit as usize);
        let config = Config {
            root_dir: root,
            proc_sfd_rawfd: Some(proc_self_fd),
            guest_fd_limit: available - unnamed_limit,
            // No name of a file is kept in the guest: the host may put another behind it at any time. File contents are,
            // which shared mappings need; they are dropped when the attributes differ.
            entry_timeout: Duration::ZERO,
            attr_timeout: ATTRIBUTES,
            cache_policy: CachePolicy::Auto,
            writeback: false,
            // Entries that may not be kept are not worth the lookup.
            readdirplus: false,
            allow_direct_io: true,
            xattr: true,
            xattrmap: Some(xattr_map()?),
            posix_acl: NegotiationMode::Auto,
            // Without it the guest would ask for security.capability before each write.
            killpriv_v2: true,
            announce_submounts: true,
            // File handles would need CAP_DAC_READ_SEARCH, which opens any file of a file system, shared or not.
            inode_file_handles: InodeFileHandlesMode::Never,
            ..Config::default()
        };
        // Making it changes the umask of the calling thread's context.
        let passthrough = std::thread::scope(|scope| {
            scope.spawn(|| own_file_system_context().and_then(|()| PassthroughFs::new(config))).join()
        })
        .map_err(|_| io::Error::other("panic"))??;
        let (kept, directories, traffic) = Default::default();
        Ok(Self(Arc::new(Inner { passthrough, unnamed, kept, directories, traffic, initialising: Mutex::new(()) })))
    }

    fn inner(&self) -> &PassthroughFs {
        &self.0.passthrough
    }

    fn unnamed(&self) -> &Unnamed {
        &self.0.unnamed
    }

    /// What is counted of requests.
    pub fn traffic(&self) -> &Counts {
        &self.0.traffic
    }

    /// Makes a file without a name in the file system of a directory, and opens it.
    pub fn create_unnamed(
        &self,
        ctx: Context,
        parent: u64,
        mode: u32,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, u64)> {
        self.unnamed().create(ctx, &self.directory(ctx, parent)?, mode, flags, umask, extensions)
    }

    /// Does something with a name in a directory. That is gone if the host has removed it, but the guest may still go by it, and the
    /// host may have made another: ESTALE tells the guest to ask for each name on the way anew.
    fn in_directory<T>(
        &self,
        ctx: Context,
        parent: u64,
        act: impl FnOnce(&PassthroughFs) -> io::Result<T>,
    ) -> io::Result<T> {
        act(self.inner()).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT) if self.is_gone(ctx, parent) => stale(),
            _ => error,
        })
    }

    /// Whether a directory was removed.
    fn is_gone(&self, ctx: Context, inode: u64) -> bool {
        self.inner().getattr(ctx, inode, None).is_ok_and(|(attr, _)| attr.nlink == 0)
    }

    /// A directory that the library knows, opened.
    fn directory(&self, ctx: Context, inode: u64) -> io::Result<File> {
        let (handle, _) = self.inner().opendir(ctx, inode, libc::O_RDONLY as u32)?;
        let handle = handle.ok_or_else(bad_handle)?;
        let file = self.library_file(ctx, inode, handle);
        self.inner().releasedir(ctx, inode, 0, handle)?;
        file
    }

    /// The open file of one of the library's handles: it shows it to who reads from it.
    fn library_file(&self, ctx: Context, inode: u64, handle: u64) -> io::Result<File> {
        let mut file = None;
        self.inner().read(ctx, inode, handle, Capture(&mut file), 0, 0, None, 0)?;
        file.ok_or_else(bad_handle)
    }

    /// The open file of any handle.
    fn file(&self, ctx: Context, inode: u64, handle: u64) -> io::Result<Arc<File>> {
        if is_unnamed(inode) {
            self.unnamed().handle(inode, handle)
        } else {
            self.library_file(ctx, inode, handle).map(Arc::new)
        }
    }
}

impl Inner {
    /// The guest has dropped a node.
    fn forget(&self, inode: u64) {
        self.kept.forget(inode);
        self.directories.forget(inode);
    }
}

/// Takes a copy of the file that it is to be filled from.
struct Capture<'a>(&'a mut Option<File>);

impl ZeroCopyWriter for Capture<'_> {
    fn read_from_file_at(&mut self, file: &File, _: usize, _: u64, _: Option<ReadvFlags>) -> io::Result<usize> {
        *self.0 = Some(file.try_clone()?);
        Ok(0)
    }
}

fn stale() -> io::Error {
    io::Error::from_raw_os_error(libc::ESTALE)
}

fn bad_handle() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

fn xattr_map() -> io::Result<XattrMap> {
    XattrMap::try_from(XATTR_MAP).map_err(|error| io::Error::other(error.to_string()))
}

/// Refuses a name that is more, or less, than one component: such never comes from a kernel.
fn component(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ => Ok(name),
    }
}

impl FileSystem for Files {
    type Inode = u64;
    type Handle = u64;
    type DirIter = ReadDir<Vec<u8>>;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        if !capable.contains(FsOptions::SUBMOUNTS) {
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        let _one = self.0.initialising.lock().unwrap_or_else(PoisonError::into_inner);
        self.unnamed().clear();
        self.0.kept.clear();
        self.0.directories.clear();
        // The library takes a guest that tells the group for one whose user needs no more than that: where permission comes of
        // a capability, as in a user namespace, creation would fail. The guest is told to tell all the same.
        let groups = capable & FsOptions::CREATE_SUPP_GROUP;
        Ok(self.inner().init(capable - groups)? | groups)
    }

    fn destroy(&self) {
        self.unnamed().clear();
        self.0.kept.clear();
        self.0.directories.clear();
        self.inner().destroy();
    }

    fn lookup(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let name = component(name)?;
        self.in_directory(ctx, parent, |inner| inner.lookup(ctx, parent, name))
            .map(|entry| self.0.directories.timed(parent, entry))
    }

    fn forget(&self, ctx: Context, inode: u64, count: u64) {
        if is_unnamed(inode) {
            return self.unnamed().forget(inode, count);
        }
        self.0.forget(inode);
        self.inner().forget(ctx, inode, count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(u64, u64)>) {
        let (unnamed, named): (Vec<_>, Vec<_>) = requests.into_iter().partition(|(inode, _)| is_unnamed(*inode));
        named.iter().for_each(|(inode, _)| self.0.forget(*inode));
        self.inner().batch_forget(ctx, named);
        unnamed.into_iter().for_each(|(inode, count)| self.unnamed().forget(inode, count));
    }

    fn getattr(&self, ctx: Context, inode: u64, handle: Option<u64>) -> io::Result<(Attr, Duration)> {
        if is_unnamed(inode) {
            return self.unnamed().getattr(inode);
        }
        let (attr, timeout) = self.inner().getattr(ctx, inode, handle)?;
        let timeout = self.0.directories.valid(inode, &attr, timeout);
        Ok((attr, timeout))
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: u64,
        attr: SetattrIn,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        if is_unnamed(inode) {
            return self.unnamed().setattr(inode, attr, handle, valid);
        }
        self.inner().setattr(ctx, inode, attr, handle, valid)
    }

    fn readlink(&self, ctx: Context, inode: u64) -> io::Result<Vec<u8>> {
        self.inner().readlink(ctx, inode)
    }

    fn symlink(&self, ctx: Context, target: &CStr, parent: u64, name: &CStr, ext: Extensions) -> io::Result<Entry> {
        let name = component(name)?;
        self.in_directory(ctx, parent, |inner| inner.symlink(ctx, target, parent, name, ext))
    }

    fn mknod(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let name = component(name)?;
        self.in_directory(ctx, parent, |inner| inner.mknod(ctx, parent, name, mode, rdev, umask, extensions))
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let name = component(name)?;
        self.in_directory(ctx, parent, |inner| inner.mkdir(ctx, parent, name, mode, umask, extensions))
            .map(|entry| self.0.directories.timed(parent, entry))
    }

    fn unlink(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.inner().unlink(ctx, parent, component(name)?)
    }

    fn rmdir(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.inner().rmdir(ctx, parent, component(name)?)
    }

    fn rename(
        &self,
        ctx: Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.inner().rename(ctx, old_parent, component(old_name)?, new_parent, component(new_name)?, flags)
    }

    fn link(&self, ctx: Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        if is_unnamed(inode) {
            self.unnamed().link(inode, &self.directory(ctx, parent)?, component(name)?)?;
            return self.inner().lookup(ctx, parent, name);
        }
        self.inner().link(ctx, inode, parent, component(name)?)
    }

    fn open(&self, ctx: Context, inode: u64, kill_priv: bool, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        if is_unnamed(inode) {
            return self.unnamed().open(inode, kill_priv, flags);
        }
        let (handle, mut options) = self.inner().open(ctx, inode, kill_priv, flags)?;
        let (attr, _) = self.inner().getattr(ctx, inode, handle)?;
        options.set(OpenOptions::KEEP_CACHE, self.0.kept.open(inode, &attr));
        // Who only reads has nothing to write back when it closes the file.
        options.set(OpenOptions::NOFLUSH, flags as i32 & libc::O_ACCMODE == libc::O_RDONLY);
        Ok((handle, options))
    }

    fn create(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        let name = component(name)?;
        self.in_directory(ctx, parent, |inner| {
            inner.create(ctx, parent, name, mode, kill_priv, flags, umask, extensions)
        })
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        data: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let read = if is_unnamed(inode) {
            self.unnamed().read(inode, handle, data, size, offset)
        } else {
            self.inner().read(ctx, inode, handle, data, size, offset, lock_owner, flags)
        };
        read.inspect(|bytes| self.traffic().read(*bytes))
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        data: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        let written = if is_unnamed(inode) {
            // What comes from a mapping has its place already.
            let append = flags as i32 & libc::O_APPEND != 0 && !delayed_write;
            write(&*self.unnamed().handle(inode, handle)?, data, size, offset, append, kill_priv)
        } else {
            self.inner().write(ctx, inode, handle, data, size, offset, lock_owner, delayed_write, kill_priv, flags)
        };
        written.inspect(|bytes| self.traffic().written(*bytes))
    }

    fn flush(&self, ctx: Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        if is_unnamed(inode) {
            return self.unnamed().handle(inode, handle).map(drop);
        }
        self.inner().flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        if is_unnamed(inode) {
            return self.unnamed().fsync(inode, datasync, handle);
        }
        self.inner().fsync(ctx, inode, datasync, handle)
    }

    fn fallocate(&self, ctx: Context, inode: u64, handle: u64, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        if is_unnamed(inode) {
            return self.unnamed().fallocate(inode, handle, mode, offset, length);
        }
        self.inner().fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        if is_unnamed(inode) {
            return self.unnamed().release(inode, handle);
        }
        self.inner().release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: Context, inode: u64) -> io::Result<libc::statvfs64> {
        if is_unnamed(inode) {
            return self.unnamed().statfs(inode);
        }
        self.inner().statfs(ctx, inode)
    }

    fn setxattr(
        &self,
        ctx: Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra_flags: SetxattrFlags,
    ) -> io::Result<()> {
        if is_unnamed(inode) {
            return self.unnamed().setxattr(inode, name, value, flags);
        }
        self.inner().setxattr(ctx, inode, name, value, flags, extra_flags)
    }

    fn getxattr(&self, ctx: Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        if is_unnamed(inode) {
            return self.unnamed().getxattr(inode, name, size);
        }
        self.inner().getxattr(ctx, inode, name, size)
    }

    fn listxattr(&self, ctx: Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        if is_unnamed(inode) {
            return self.unnamed().listxattr(inode, size);
        }
        self.inner().listxattr(ctx, inode, size)
    }

    fn removexattr(&self, ctx: Context, inode: u64, name: &CStr) -> io::Result<()> {
        if is_unnamed(inode) {
            return self.unnamed().removexattr(inode, name);
        }
        self.inner().removexattr(ctx, inode, name)
    }

    fn opendir(&self, ctx: Context, inode: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        // Once: who is in it may list it, and finds nothing.
        if self.is_gone(ctx, inode) && self.0.directories.forget(inode) {
            return Err(stale());
        }
        self.inner().opendir(ctx, inode, flags)
    }

    fn readdir(&self, ctx: Context, inode: u64, handle: u64, size: u32, offset: u64) -> io::Result<Self::DirIter> {
        self.inner().readdir(ctx, inode, handle, size, offset)
    }

    fn fsyncdir(&self, ctx: Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.inner().fsyncdir(ctx, inode, datasync, handle)
    }

    fn releasedir(&self, ctx: Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.inner().releasedir(ctx, inode, flags, handle)
    }

    fn access(&self, ctx: Context, inode: u64, mask: u32) -> io::Result<()> {
        self.inner().access(ctx, inode, mask)
    }

    fn lseek(&self, ctx: Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        if is_unnamed(inode) {
            return self.unnamed().lseek(inode, handle, offset, whence);
        }
        self.inner().lseek(ctx, inode, handle, offset, whence)
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        inode_in: u64,
        handle_in: u64,
        offset_in: u64,
        inode_out: u64,
        handle_out: u64,
        offset_out: u64,
        len: u64,
        flags: u64,
    ) -> io::Result<usize> {
        if is_unnamed(inode_in) || is_unnamed(inode_out) {
            let (from, to) = (self.file(ctx, inode_in, handle_in)?, self.file(ctx, inode_out, handle_out)?);
            return copy(&from, offset_in, &to, offset_out, len);
        }
        self.inner().copyfilerange(ctx, inode_in, handle_in, offset_in, inode_out, handle_out, offset_out, len, flags)
    }

    fn syncfs(&self, ctx: Context, inode: u64) -> io::Result<()> {
        self.inner().syncfs(ctx, inode)
    }
}
