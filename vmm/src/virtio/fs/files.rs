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
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs};
use virtiofsd::read_dir::ReadDir;

use super::threads::own_file_system_context;

/// File descriptors kept for the rest of the process: devices, sockets, and files open for the length of a call.
const RESERVED_FILES: u64 = 512;

/// `trusted.` attributes need `CAP_SYS_ADMIN` on the host, which no thread here has, and overlayfs in the guest needs them:
/// they are kept as `user.` attributes, which the guest in turn cannot reach by that name.
const XATTR_MAP: &str = ":map:trusted.:user.virtiofs.:";

/// The files of a share, as FUSE sees them. Cloning shares them.
#[derive(Clone)]
pub struct Files(Arc<Inner>);

struct Inner {
    passthrough: PassthroughFs,
    /// Held during initialisation: two at a time would both make the root.
    initialising: Mutex<()>,
}

impl Files {
    /// The files below `root`, an absolute path. See [`super::ShareConfig`].
    pub fn new(root: String, proc_self_fd: File) -> io::Result<Self> {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        let config = Config {
            root_dir: root,
            proc_sfd_rawfd: Some(proc_self_fd),
            guest_fd_limit: limit.saturating_sub(RESERVED_FILES),
            // Nothing about names and attributes is kept in the guest: the host may change them at any time. File
            // contents are, which shared mappings need; they are dropped when the attributes differ.
            entry_timeout: Duration::ZERO,
            attr_timeout: Duration::ZERO,
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
        Ok(Self(Arc::new(Inner { passthrough, initialising: Mutex::new(()) })))
    }

    fn inner(&self) -> &PassthroughFs {
        &self.0.passthrough
    }
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
        self.inner().init(capable)
    }

    fn destroy(&self) {
        self.inner().destroy();
    }

    fn lookup(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.inner().lookup(ctx, parent, component(name)?)
    }

    fn forget(&self, ctx: Context, inode: u64, count: u64) {
        self.inner().forget(ctx, inode, count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(u64, u64)>) {
        self.inner().batch_forget(ctx, requests);
    }

    fn getattr(&self, ctx: Context, inode: u64, handle: Option<u64>) -> io::Result<(Attr, Duration)> {
        self.inner().getattr(ctx, inode, handle)
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: u64,
        attr: SetattrIn,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        self.inner().setattr(ctx, inode, attr, handle, valid)
    }

    fn readlink(&self, ctx: Context, inode: u64) -> io::Result<Vec<u8>> {
        self.inner().readlink(ctx, inode)
    }

    fn symlink(&self, ctx: Context, target: &CStr, parent: u64, name: &CStr, ext: Extensions) -> io::Result<Entry> {
        self.inner().symlink(ctx, target, parent, component(name)?, ext)
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
        self.inner().mknod(ctx, parent, component(name)?, mode, rdev, umask, extensions)
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
        self.inner().mkdir(ctx, parent, component(name)?, mode, umask, extensions)
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
        self.inner().link(ctx, inode, parent, component(name)?)
    }

    fn open(&self, ctx: Context, inode: u64, kill_priv: bool, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        self.inner().open(ctx, inode, kill_priv, flags)
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
        self.inner().create(ctx, parent, component(name)?, mode, kill_priv, flags, umask, extensions)
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
        self.inner().read(ctx, inode, handle, data, size, offset, lock_owner, flags)
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
        self.inner().write(ctx, inode, handle, data, size, offset, lock_owner, delayed_write, kill_priv, flags)
    }

    fn flush(&self, ctx: Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        self.inner().flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.inner().fsync(ctx, inode, datasync, handle)
    }

    fn fallocate(&self, ctx: Context, inode: u64, handle: u64, mode: u32, offset: u64, length: u64) -> io::Result<()> {
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
        self.inner().release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: Context, inode: u64) -> io::Result<libc::statvfs64> {
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
        self.inner().setxattr(ctx, inode, name, value, flags, extra_flags)
    }

    fn getxattr(&self, ctx: Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.inner().getxattr(ctx, inode, name, size)
    }

    fn listxattr(&self, ctx: Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.inner().listxattr(ctx, inode, size)
    }

    fn removexattr(&self, ctx: Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.inner().removexattr(ctx, inode, name)
    }

    fn opendir(&self, ctx: Context, inode: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
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
        self.inner().copyfilerange(ctx, inode_in, handle_in, offset_in, inode_out, handle_out, offset_out, len, flags)
    }

    fn syncfs(&self, ctx: Context, inode: u64) -> io::Result<()> {
        self.inner().syncfs(ctx, inode)
    }
}
