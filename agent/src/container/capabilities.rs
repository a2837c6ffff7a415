//! The five sets of capabilities (`capabilities(7)`).

use podhull_protocol::CAPABILITIES;
use rustix::io::Errno;

use super::rootfs::last_errno;
use crate::spec;

/// Capabilities that cannot be set as given.
#[derive(Debug, thiserror::Error)]
pub enum CapabilityError {
    #[error("process.capabilities.{set}: unknown capability {name:?}")]
    Unknown { set: &'static str, name: String },
    #[error("drop {name} from the bounding set: {source}")]
    Bounding { name: &'static str, source: Errno },
    #[error("set the effective, permitted and inheritable capabilities: {0}")]
    Set(Errno),
    #[error("ambient capabilities: {0}")]
    Raise(Errno),
}

/// One bit a capability.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capabilities {
    bounding: u64,
    effective: u64,
    inheritable: u64,
    permitted: u64,
    ambient: u64,
}

impl Capabilities {
    /// None is none at all.
    pub fn of(given: Option<&spec::Capabilities>) -> Result<Self, CapabilityError> {
        let Some(given) = given else { return Ok(Self::default()) };
        let inheritable = bits("inheritable", &given.inheritable)?;
        Ok(Self {
            bounding: bits("bounding", &given.bounding)?,
            effective: bits("effective", &given.effective)?,
            permitted: bits("permitted", &given.permitted)?,
            // The kernel keeps the ambient set within the permitted and the inheritable one. runc's own default document
            // asks for more than that, so what is beyond them is nothing, as with runc, and not an error.
            ambient: bits("ambient", &given.ambient)? & bits("permitted", &given.permitted)? & inheritable,
            inheritable,
        })
    }

    /// Drops from the bounding set what is not in it; while the process still has CAP_SETPCAP.
    pub fn bound(&self) -> Result<(), CapabilityError> {
        for (number, name) in CAPABILITIES.iter().enumerate() {
            if self.bounding & 1 << number == 0 {
                prctl(libc::PR_CAPBSET_DROP, number as u64, 0)
                    .map_err(|source| CapabilityError::Bounding { name, source })?;
            }
        }
        Ok(())
    }

    /// Sets the other four; after the change of user, which takes them.
    pub fn set(&self) -> Result<(), CapabilityError> {
        /// `_LINUX_CAPABILITY_VERSION_3`.
        const VERSION: u32 = 0x2008_0522;
        #[repr(C)]
        struct Header {
            version: u32,
            pid: i32,
        }
        let header = Header { version: VERSION, pid: 0 };
        // Two words each of effective, permitted, inheritable.
        let word = |shift: u32| [self.effective, self.permitted, self.inheritable].map(|set| (set >> shift) as u32);
        let data = [word(0), word(32)];
        // SAFETY: version 3 has two structures of three words, which is what `data` is; both outlive the call.
        if unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) } < 0 {
            return Err(CapabilityError::Set(last_errno()));
        }
        prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64, 0).map_err(CapabilityError::Raise)?;
        for number in (0..CAPABILITIES.len()).filter(|number| self.ambient & 1 << number != 0) {
            prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as u64, number as u64)
                .map_err(CapabilityError::Raise)?;
        }
        Ok(())
    }
}

fn bits(set: &'static str, names: &[String]) -> Result<u64, CapabilityError> {
    names.iter().try_fold(0, |bits, name| match CAPABILITIES.iter().position(|known| known == name) {
        Some(number) => Ok(bits | 1 << number),
        None => Err(CapabilityError::Unknown { set, name: name.clone() }),
    })
}

/// `prctl(2)` with numbers alone.
pub fn prctl(option: libc::c_int, first: u64, second: u64) -> Result<(), Errno> {
    // SAFETY: the options used in this program take no pointers.
    if unsafe { libc::prctl(option, first, second, 0u64, 0u64) } < 0 { Err(last_errno()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Result<Capabilities, CapabilityError> {
        Capabilities::of(Some(&serde_json::from_str(json).unwrap()))
    }

    #[test]
    fn names_become_bits_by_their_number() {
        let capabilities =
            of(r#"{"bounding":["CAP_CHOWN","CAP_CHECKPOINT_RESTORE"],"effective":["CAP_KILL"]}"#).unwrap();
        assert_eq!(capabilities, Capabilities { bounding: 1 | 1 << 40, effective: 1 << 5, ..Capabilities::default() });
    }

    #[test]
    fn an_unknown_name_is_an_error_that_says_where() {
        let error = of(r#"{"permitted":["CAP_FLY"]}"#).unwrap_err().to_string();
        assert_eq!(error, r#"process.capabilities.permitted: unknown capability "CAP_FLY""#);
    }

    #[test]
    fn ambient_is_what_is_permitted_and_inheritable_as_well() {
        let given =
            r#"{"ambient":["CAP_KILL","CAP_CHOWN"],"permitted":["CAP_KILL","CAP_CHOWN"],"inheritable":["CAP_CHOWN"]}"#;
        assert_eq!(of(given).unwrap().ambient, 1);
    }
}
