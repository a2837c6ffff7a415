//! The session keyring of a container, so that containers do not see one another's keys. A kernel without keys has none to hide.

use rustix::io::Errno;

use super::rootfs::last_errno;

/// A keyring that cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("session keyring: {0}")]
pub struct KeyringError(Errno);

/// `KEYCTL_*` of `linux/keyctl.h`.
const JOIN_SESSION_KEYRING: libc::c_int = 1;
const SETPERM: libc::c_int = 5;
const DESCRIBE: libc::c_int = 6;

/// Joins the container's keyring, which the first to join makes; none on a kernel without keys.
pub fn join(id: &str) -> Result<Option<libc::c_long>, KeyringError> {
    // A name that does not fit is cut: it is for people.
    let mut name = format!("_ses.{id}").into_bytes();
    name.truncate(255);
    name.push(0);
    // SAFETY: the name ends with a zero byte and outlives the call.
    let ring = unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, name.as_ptr()) };
    if ring >= 0 {
        return Ok(Some(ring));
    }
    match last_errno() {
        Errno::NOSYS => Ok(None),
        errno => Err(KeyringError(errno)),
    }
}

/// Lets whoever finds the keyring by its name join it.
pub fn let_search(ring: libc::c_long) -> Result<(), KeyringError> {
    /// `KEY_USR_SEARCH`.
    const USER_SEARCH: u64 = 0x08_0000;
    let mut description = [0u8; 512];
    // SAFETY: the buffer is as long as is said.
    let length =
        unsafe { libc::syscall(libc::SYS_keyctl, DESCRIBE, ring, description.as_mut_ptr(), description.len()) };
    if length < 0 {
        return Err(KeyringError(last_errno()));
    }
    // type;uid;gid;permissions;description
    let permissions = std::str::from_utf8(&description)
        .ok()
        .and_then(|text| u64::from_str_radix(text.split(';').nth(3)?, 16).ok())
        .ok_or(KeyringError(Errno::INVAL))?;
    // SAFETY: the call takes no pointers.
    if unsafe { libc::syscall(libc::SYS_keyctl, SETPERM, ring, permissions | USER_SEARCH) } < 0 {
        return Err(KeyringError(last_errno()));
    }
    Ok(())
}
