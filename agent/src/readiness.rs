//! Descriptors that the runtime watches.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A descriptor that stays the same, and open, for as long as it is owned.
pub trait Stable: AsRawFd {}

impl Stable for OwnedFd {}
impl Stable for Arc<OwnedFd> {}

/// Has the runtime tell when the descriptor is ready. It must be non-blocking where it is read from or written to.
pub fn watch<T: Stable>(fd: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: by the trait the descriptor is open and the same until it is dropped, which is after it was deregistered.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}
