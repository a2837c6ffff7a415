//! Files without a name (`O_TMPFILE`), which the library does not serve.
//!
//! They have node numbers and file handles of their own, with the highest bit set, which the library never gives. A file
//! that is given a name later is looked up by it and is the library's from then on; who has it open keeps what it has.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid, ZeroCopyReader,
    ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};
use virtiofsd::oslib::{ScopedUmask, WritevFlags};
use virtiofsd::passthrough::credentials::{UnixCredentials, drop_effective_cap};
use virtiofsd::passthrough::xattrmap::{AppliedRule, XattrMap};
use virtiofsd::soft_idmap::{GuestId, HostId, Id};

/// The bit that tells these numbers from the library's.
const UNNAMED: u64 = 1 << 63;

/// Flags of an open that mean something for a file that is there. `O_APPEND` comes with each write.
const OPEN_FLAGS: i32 = libc::O_ACCMODE | libc::O_TRUNC | libc::O_DIRECT | libc::O_SYNC | libc::O_NONBLOCK;

/// Whether a node number is that of a file without a name.
pub fn is_unnamed(inode: u64) -> bool {
    inode & UNNAMED != 0
}

/// The files without a name that the guest knows.
pub struct Unnamed {
    proc_self_fd: File,
    xattr_map: XattrMap,
    /// Most files and handles together, each of which may take a file descriptor.
    limit: usize,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    last_number: u64,
    inodes: HashMap<u64, (Arc<File>, u64)>,
    handles: HashMap<u64, (u64, Arc<File>)>,
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// The result of a system call.
fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Unnamed {
    /// None yet, and never more than `limit`.
    pub fn new(proc_self_fd: File, xattr_map: XattrMap, limit: usize) -> Self {
        Self { proc_self_fd, xattr_map, limit, table: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all.
    pub fn clear(&self) {
        let mut table = self.lock();
        table.inodes.clear();
        table.handles.clear();
    }

    /// Makes a file in the file system of `directory`, as the caller, and opens it.
    pub fn create(
        &self,
        ctx: Context,
        directory: &File,
        mode: u32,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, u64)> {
        let groups = extensions.sup_gids.into_iter().map(GuestId::id_mapped).collect();
        // Without O_EXCL it can be given a name later.
        let how = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC | (flags as i32 & libc::O_EXCL);
        let file = {
            let credentials = UnixCredentials::new(ctx.uid.id_mapped(), ctx.gid.id_mapped());
            // The guest has checked permission, which may come of a capability.
            let _as_caller = credentials.supplementary_gid(false, groups).set()?;
            let _umask = ScopedUmask::new(umask);
            // SAFETY: the path is a C string; the flags ask for a mode, and it is given.
            let fd = unsafe { libc::openat(directory.as_raw_fd(), c".".as_ptr(), how, mode & 0o7777) };
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: just opened, owned by nothing else.
            Arc::new(unsafe { File::from_raw_fd(fd) })
        };
        let opened = if flags as i32 & (OPEN_FLAGS & !libc::O_ACCMODE) == 0 {
            file.clone()
        } else {
            Arc::new(self.reopen(&file, flags)?)
        };
        let attr = attributes(&file)?;
        let mut table = self.lock();
        let inode = table.number(self.limit)?;
        table.inodes.insert(inode, (file, 1));
        let handle = table.number(self.limit)?;
        table.handles.insert(handle, (inode, opened));
        let entry = Entry { inode, generation: 0, attr, attr_timeout: Duration::ZERO, entry_timeout: Duration::ZERO };
        Ok((entry, handle))
    }

    fn reopen(&self, file: &File, flags: u32) -> io::Result<File> {
        let name = self.proc_name(file);
        let flags = flags as i32 & OPEN_FLAGS | libc::O_CLOEXEC;
        // SAFETY: the name is a C string; no flag asks for a mode.
        let fd = unsafe { libc::openat(self.proc_self_fd.as_raw_fd(), name.as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just opened, owned by nothing else.
        Ok(unsafe { File::from_raw_fd(fd) })
    }

    /// The name of an open file below `/proc/self/fd`.
    fn proc_name(&self, file: &File) -> CString {
        CString::new(file.as_raw_fd().to_string()).unwrap_or_default()
    }

    fn inode(&self, inode: u64) -> io::Result<Arc<File>> {
        self.lock().inodes.get(&inode).map(|(file, _)| file.clone()).ok_or_else(|| errno(libc::EBADF))
    }

    /// The open file of a handle, if it is one of that node.
    pub fn handle(&self, inode: u64, handle: u64) -> io::Result<Arc<File>> {
        let table = self.lock();
        let found = table.handles.get(&handle).filter(|(of, _)| *of == inode);
        found.map(|(_, file)| file.clone()).ok_or_else(|| errno(libc::EBADF))
    }

    /// The file of a handle if one is given, else of the node.
    fn either(&self, inode: u64, handle: Option<u64>) -> io::Result<Arc<File>> {
        handle.map_or_else(|| self.inode(inode), |handle| self.handle(inode, handle))
    }

    pub fn forget(&self, inode: u64, count: u64) {
        let mut table = self.lock();
        if let Some((_, lookups)) = table.inodes.get_mut(&inode) {
            *lookups = lookups.saturating_sub(count);
            if *lookups == 0 {
                table.inodes.remove(&inode);
            }
        }
    }

    pub fn open(&self, inode: u64, kill_priv: bool, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let file = self.inode(inode)?;
        let _without_fsetid = kill_priv.then(|| drop_effective_cap("FSETID")).transpose()?;
        let opened = Arc::new(self.reopen(&file, flags)?);
        let mut table = self.lock();
        let handle = table.number(self.limit)?;
        table.handles.insert(handle, (inode, opened));
        Ok((Some(handle), OpenOptions::empty()))
    }

    pub fn release(&self, inode: u64, handle: u64) -> io::Result<()> {
        self.handle(inode, handle)?;
        self.lock().handles.remove(&handle);
        Ok(())
    }

    pub fn getattr(&self, inode: u64) -> io::Result<(Attr, Duration)> {
        Ok((attributes(&*self.inode(inode)?)?, Duration::ZERO))
    }

    pub fn setattr(
        &self,
        inode: u64,
        attr: SetattrIn,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        let file = self.either(inode, handle)?;
        let fd = file.as_raw_fd();
        if valid.contains(SetattrValid::MODE) {
            // SAFETY: numbers only.
            check(unsafe { libc::fchmod(fd, attr.mode & 0o7777) })?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let id = |set, id| if valid.contains(set) { id } else { u32::MAX };
            let uid = id(SetattrValid::UID, attr.uid.into_inner());
            let gid = id(SetattrValid::GID, attr.gid.into_inner());
            // SAFETY: numbers only.
            check(unsafe { libc::fchown(fd, uid, gid) })?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let kill = valid.contains(SetattrValid::KILL_SUIDGID);
            let _without_fsetid = kill.then(|| drop_effective_cap("FSETID")).transpose()?;
            // SAFETY: numbers only.
            check(unsafe { libc::ftruncate(fd, attr.size as libc::off_t) })?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let time = |set, now, seconds: u64, nanoseconds: u32| libc::timespec {
                tv_sec: seconds as i64,
                tv_nsec: match (valid.contains(now), valid.contains(set)) {
                    (true, _) => libc::UTIME_NOW,
                    (_, true) => nanoseconds.into(),
                    _ => libc::UTIME_OMIT,
                },
            };
            let times = [
                time(SetattrValid::ATIME, SetattrValid::ATIME_NOW, attr.atime, attr.atimensec),
                time(SetattrValid::MTIME, SetattrValid::MTIME_NOW, attr.mtime, attr.mtimensec),
            ];
            // SAFETY: points to two times.
            check(unsafe { libc::futimens(fd, times.as_ptr()) })?;
        }
        self.getattr(inode)
    }

    pub fn read(
        &self,
        inode: u64,
        handle: u64,
        mut data: impl ZeroCopyWriter,
        size: u32,
        offset: u64,
    ) -> io::Result<usize> {
        data.read_from_file_at(&*self.handle(inode, handle)?, size as usize, offset, None)
    }

    pub fn fsync(&self, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        let file = self.handle(inode, handle)?;
        if datasync { file.sync_data() } else { file.sync_all() }
    }

    pub fn statfs(&self, inode: u64) -> io::Result<libc::statvfs64> {
        let file = self.inode(inode)?;
        // SAFETY: plain numbers, for which zero is a value.
        let mut stat: libc::statvfs64 = unsafe { std::mem::zeroed() };
        // SAFETY: the call fills what it is given.
        check(unsafe { libc::fstatvfs64(file.as_raw_fd(), &mut stat) })?;
        Ok(stat)
    }

    /// Gives the file a name in `directory`.
    pub fn link(&self, inode: u64, directory: &File, name: &CStr) -> io::Result<()> {
        let file = self.inode(inode)?;
        let (from, to) = (self.proc_self_fd.as_raw_fd(), directory.as_raw_fd());
        let source = self.proc_name(&file);
        // SAFETY: both names are C strings.
        check(unsafe { libc::linkat(from, source.as_ptr(), to, name.as_ptr(), libc::AT_SYMLINK_FOLLOW) })
    }

    fn host_xattr<'a>(&self, name: &'a CStr) -> io::Result<std::borrow::Cow<'a, CStr>> {
        match self.xattr_map.map_client_xattr(name).map_err(|_| errno(libc::ENOTSUP))? {
            AppliedRule::Pass(name) => Ok(name),
            AppliedRule::Deny => Err(errno(libc::EPERM)),
            AppliedRule::Unsupported => Err(errno(libc::ENOTSUP)),
        }
    }

    pub fn setxattr(&self, inode: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        let (file, name) = (self.inode(inode)?, self.host_xattr(name)?);
        let flags = rustix::fs::XattrFlags::from_bits_retain(flags);
        Ok(rustix::fs::fsetxattr(&*file, &*name, value, flags)?)
    }

    pub fn getxattr(&self, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let (file, name) = (self.inode(inode)?, self.host_xattr(name)?);
        let mut value = vec![0; size as usize];
        let count = rustix::fs::fgetxattr(&*file, &*name, &mut value[..])?;
        if size == 0 {
            return Ok(GetxattrReply::Count(count as u32));
        }
        value.truncate(count);
        Ok(GetxattrReply::Value(value))
    }

    pub fn listxattr(&self, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let file = self.inode(inode)?;
        let mut names = vec![0; size as usize];
        let count = rustix::fs::flistxattr(&*file, &mut names[..])?;
        if size == 0 {
            return Ok(ListxattrReply::Count(count as u32));
        }
        names.truncate(count);
        let mut names = self.xattr_map.map_server_xattrlist(names).map_err(|_| errno(libc::EIO))?;
        // The map makes a lone zero byte of an empty list.
        if names == [0] {
            names.clear();
        }
        Ok(ListxattrReply::Names(names))
    }

    pub fn removexattr(&self, inode: u64, name: &CStr) -> io::Result<()> {
        let (file, name) = (self.inode(inode)?, self.host_xattr(name)?);
        Ok(rustix::fs::fremovexattr(&*file, &*name)?)
    }

    pub fn fallocate(&self, inode: u64, handle: u64, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        let file = self.handle(inode, handle)?;
        // SAFETY: numbers only.
        check(unsafe { libc::fallocate64(file.as_raw_fd(), mode as i32, offset as i64, length as i64) })
    }

    pub fn lseek(&self, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let file = self.handle(inode, handle)?;
        // SAFETY: numbers only.
        let position = unsafe { libc::lseek(file.as_raw_fd(), offset as libc::off_t, whence as i32) };
        u64::try_from(position).map_err(|_| io::Error::last_os_error())
    }
}

impl Table {
    /// A number that was never given before.
    fn number(&mut self, limit: usize) -> io::Result<u64> {
        if self.inodes.len() + self.handles.len() >= limit {
            return Err(errno(libc::ENFILE));
        }
        self.last_number += 1;
        Ok(UNNAMED | self.last_number)
    }
}

/// Writes to a file that is open, as `pwrite(2)`, or at its end.
pub fn write(
    file: &File,
    mut data: impl ZeroCopyReader,
    size: u32,
    offset: u64,
    append: bool,
    kill_priv: bool,
) -> io::Result<usize> {
    let _without_fsetid = kill_priv.then(|| drop_effective_cap("FSETID")).transpose()?;
    data.write_to_file_at(file, size as usize, offset, append.then_some(WritevFlags::RWF_APPEND))
}

/// Copies from one open file to another, as `copy_file_range(2)`.
pub fn copy(from: &File, from_offset: u64, to: &File, to_offset: u64, length: u64) -> io::Result<usize> {
    let (mut from_offset, mut to_offset) = (from_offset as libc::off64_t, to_offset as libc::off64_t);
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    let (input, output) = (from.as_raw_fd(), to.as_raw_fd());
    // SAFETY: points to two offsets.
    let count = unsafe { libc::copy_file_range(input, &mut from_offset, output, &mut to_offset, length, 0) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

fn attributes(file: &File) -> io::Result<Attr> {
    // SAFETY: plain numbers, for which zero is a value.
    let mut stat: libc::stat64 = unsafe { std::mem::zeroed() };
    // SAFETY: the call fills what it is given.
    check(unsafe { libc::fstat64(file.as_raw_fd(), &mut stat) })?;
    Attr::try_from_stat64(stat, |uid| Ok(uid.id_mapped()), |gid| Ok(gid.id_mapped()))
}
