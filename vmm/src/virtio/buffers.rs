//! The bytes of a descriptor chain, in order, without the descriptors.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vhost_user_backend::bitmap::BitmapMmapRegion;
use vm_memory::bitmap::BS;
use vm_memory::{ByteValued, VolatileSlice};

/// A piece of guest memory.
pub type Slice<'a> = VolatileSlice<'a, BS<'a, BitmapMmapRegion>>;

/// Pieces of guest memory read or written from front to back. Made by [`super::Chain`], which has checked that they lie
/// in guest memory. The guest may change the bytes at any time: copy out what decides anything, once.
#[derive(Clone)]
pub struct Buffers<'a> {
    slices: VecDeque<Slice<'a>>,
    length: usize,
}

impl<'a> Buffers<'a> {
    /// Over these pieces; the sum of their lengths fits a `usize` (the chain checks it).
    pub(super) fn new(slices: VecDeque<Slice<'a>>) -> Self {
        let length = slices.iter().map(Slice::len).sum();
        Self { slices, length }
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Nothing left.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The rest as pieces.
    pub fn slices(&self) -> impl Iterator<Item = &Slice<'a>> {
        self.slices.iter()
    }

    /// Drops the first `count` bytes, or all that there are.
    pub fn skip(&mut self, mut count: usize) {
        count = count.min(self.length);
        self.length -= count;
        while count > 0 {
            let Some(front) = self.slices.front_mut() else { return };
            if count < front.len() {
                if let Ok(rest) = front.offset(count) {
                    *front = rest;
                }
                return;
            }
            count -= front.len();
            self.slices.pop_front();
        }
    }

    /// Keeps at most the first `count` bytes and returns the rest.
    pub fn split_off(&mut self, count: usize) -> Buffers<'a> {
        let mut rest = self.clone();
        rest.skip(count);
        let mut left = count.min(self.length);
        self.length = left;
        self.slices.retain_mut(|slice| {
            let take = left.min(slice.len());
            left -= take;
            if take < slice.len()
                && let Ok(part) = slice.subslice(0, take)
            {
                *slice = part;
            }
            take > 0
        });
        rest
    }

    /// Copies from guest memory, consuming; returns how many bytes there were, at most `data.len()`.
    pub fn read(&mut self, data: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            if done == data.len() {
                break;
            }
            done += slice.copy_to(&mut data[done..]);
        }
        self.skip(done);
        done
    }

    /// Copies into guest memory, consuming; returns how many bytes fitted.
    pub fn write(&mut self, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            if done == data.len() {
                break;
            }
            let count = slice.len().min(data.len() - done);
            slice.copy_from(&data[done..done + count]);
            done += count;
        }
        self.skip(done);
        done
    }

    /// Copies a whole object out, or nothing.
    pub fn read_object<T: ByteValued + Default>(&mut self) -> Option<T> {
        let mut object = T::default();
        if self.length < size_of::<T>() {
            return None;
        }
        self.read(object.as_mut_slice());
        Some(object)
    }

    /// Copies a whole object in, or nothing.
    pub fn write_object<T: ByteValued>(&mut self, object: &T) -> Option<()> {
        if self.length < size_of::<T>() {
            return None;
        }
        self.write(object.as_slice());
        Some(())
    }

    /// Reads from a file descriptor straight into guest memory (`readv`, or `preadv` at an offset), consuming what came.
    pub fn fill_from(&mut self, fd: impl AsFd, offset: Option<u64>) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        let count = self.vectored(|iov, count| match offset {
            // SAFETY: the vectors point to mapped guest memory that lives as long as `self`; the kernel bounds the write by
            // their lengths.
            None => unsafe { libc::readv(fd, iov, count) },
            // SAFETY: as above.
            Some(offset) => unsafe { libc::preadv(fd, iov, count, offset as libc::off_t) },
        })?;
        self.skip(count);
        Ok(count)
    }

    /// Reads from a file descriptor straight into guest memory, and what does not fit there into `overflow`; consumes
    /// nothing. Returns how many bytes came.
    pub fn fill_beyond(&self, fd: impl AsFd, overflow: &mut [u8]) -> io::Result<usize> {
        let guards: Vec<_> = self.slices.iter().map(Slice::ptr_guard_mut).collect();
        let mut vectors: Vec<_> =
            guards.iter().map(|g| libc::iovec { iov_base: g.as_ptr().cast(), iov_len: g.len() }).collect();
        vectors.push(libc::iovec { iov_base: overflow.as_mut_ptr().cast(), iov_len: overflow.len() });
        let fd = fd.as_fd().as_raw_fd();
        // SAFETY: the vectors point to mapped guest memory that lives as long as `self`, and to `overflow`, which nobody else
        // has; the kernel bounds the write by their lengths.
        retried(|| unsafe { libc::readv(fd, vectors.as_ptr(), vectors.len() as libc::c_int) })
    }

    /// Writes guest memory straight to a file descriptor (`writev`, or `pwritev` at an offset), consuming what went.
    pub fn drain_to(&mut self, fd: impl AsFd, offset: Option<u64>) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        let count = self.vectored(|iov, count| match offset {
            // SAFETY: the vectors point to mapped guest memory that lives as long as `self`; the kernel only reads it.
            None => unsafe { libc::writev(fd, iov, count) },
            // SAFETY: as above.
            Some(offset) => unsafe { libc::pwritev(fd, iov, count, offset as libc::off_t) },
        })?;
        self.skip(count);
        Ok(count)
    }

    /// Calls `call` with the first `IOV_MAX` pieces as I/O vectors.
    fn vectored(&self, call: impl Fn(*const libc::iovec, libc::c_int) -> libc::ssize_t) -> io::Result<usize> {
        let guards: Vec<_> = self.slices.iter().take(libc::UIO_MAXIOV as usize).map(Slice::ptr_guard_mut).collect();
        let vectors: Vec<_> =
            guards.iter().map(|g| libc::iovec { iov_base: g.as_ptr().cast(), iov_len: g.len() }).collect();
        retried(|| call(vectors.as_ptr(), vectors.len() as libc::c_int))
    }
}

/// Makes a call until no signal comes in between.
fn retried(call: impl Fn() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        let result = call();
        if result >= 0 {
            return Ok(result as usize);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
