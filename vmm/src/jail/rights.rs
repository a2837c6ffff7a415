//! Capabilities, which each thread has for itself and inherits from the one that started it.

use rustix::io::Errno;
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities, remove_capability_from_bounding_set,
    set_capabilities, set_capabilities_secure_bits, set_no_new_privs,
};

use super::{JailError, step};

/// By these the file server acts for the guest's users: gives files away, reads and writes what root of the guest may, keeps
/// set-id bits, makes device nodes and file capabilities, and takes a user's identity on for as long as it makes a file.
///
/// Not `DAC_READ_SEARCH`: all it would add is opening files by handle, and with it any file of a file system.
const FILE_SERVER: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID);

/// Being root gives nothing, at no `execve` to come and by no ambient capability, and that is locked. What a change of the
/// effective user does stays as it is: the file server relies on losing and regaining its capabilities by it.
const SECURE_BITS: CapabilitiesSecureBits = CapabilitiesSecureBits::NO_ROOT
    .union(CapabilitiesSecureBits::NO_ROOT_LOCKED)
    .union(CapabilitiesSecureBits::KEEP_CAPS_LOCKED)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED)
    .union(CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED);

/// Drops all but the file server's, and whatever could give others back.
pub fn keep_those_of_the_file_server() -> Result<(), JailError> {
    for number in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            // One more than the kernel knows.
            Err(Errno::INVAL) => break,
            Err(errno) => return step("bounding set of capabilities", Err(errno)),
        }
    }
    step("secure bits", set_capabilities_secure_bits(SECURE_BITS))?;
    step("no_new_privs", set_no_new_privs(true))?;
    // A host may give root less than all.
    let had = step("capabilities", capabilities(None))?.permitted;
    set(had & FILE_SERVER)
}

/// Drops all.
pub fn drop_all() -> Result<(), JailError> {
    set(CapabilitySet::empty())
}

fn set(permitted: CapabilitySet) -> Result<(), JailError> {
    let sets = CapabilitySets { effective: permitted, permitted, inheritable: CapabilitySet::empty() };
    step("capabilities", set_capabilities(None, sets))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::thread::{capability_is_in_bounding_set, no_new_privs};

    /// All of it is of the thread alone.
    #[test]
    fn a_thread_keeps_what_the_file_server_needs_and_then_nothing() {
        if !capabilities(None).unwrap().effective.contains(FILE_SERVER | CapabilitySet::SETPCAP) {
            eprintln!("skipped: not root");
            return;
        }
        std::thread::spawn(|| {
            keep_those_of_the_file_server().unwrap();
            let sets = capabilities(None).unwrap();
            assert_eq!((sets.effective, sets.permitted), (FILE_SERVER, FILE_SERVER));
            assert_eq!(sets.inheritable, CapabilitySet::empty());
            assert!(!capability_is_in_bounding_set(CapabilitySet::CHOWN).unwrap());
            assert!(no_new_privs().unwrap());
            std::thread::spawn(|| {
                drop_all().unwrap();
                assert_eq!(capabilities(None).unwrap().permitted, CapabilitySet::empty());
                assert_eq!(set(CapabilitySet::CHOWN).unwrap_err().source.raw_os_error(), Some(libc::EPERM));
            })
            .join()
            .unwrap();
            assert_eq!(capabilities(None).unwrap().permitted, FILE_SERVER);
        })
        .join()
        .unwrap();
    }
}
