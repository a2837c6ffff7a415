//! Scheduler, I/O priority, execution domain.

use rustix::io::Errno;

use super::rootfs::last_errno;
use crate::spec::{IoPriority, Personality, Scheduler};

/// Scheduling that cannot be had as given.
#[derive(Debug, thiserror::Error)]
pub enum SchedulingError {
    #[error("process.scheduler.policy: unknown policy {0:?}")]
    Policy(String),
    #[error("process.scheduler.flags: unknown flag {0:?}")]
    Flag(String),
    #[error("process.scheduler: {0}")]
    Scheduler(Errno),
    #[error(
        "process.ioPriority: expected a class of IOPRIO_CLASS_RT, IOPRIO_CLASS_BE, IOPRIO_CLASS_IDLE and a priority of 0 to 7, not {class:?} and {priority}"
    )]
    IoClass { class: String, priority: u16 },
    #[error("process.ioPriority: {0}")]
    IoPriority(Errno),
    #[error("linux.personality.domain: expected LINUX or LINUX32, not {0:?}")]
    Domain(String),
    #[error("linux.personality.flags: expected none, not {0:?}")]
    PersonalityFlag(String),
    #[error("linux.personality: {0}")]
    Personality(Errno),
}

impl SchedulingError {
    /// Whether the specification is at fault, not the machine.
    pub fn is_invalid(&self) -> bool {
        !matches!(self, Self::Personality(_) | Self::IoPriority(_))
            && !matches!(self, Self::Scheduler(errno) if *errno != Errno::INVAL)
    }
}

/// `sched_setattr(2)` for the calling process.
pub fn set_scheduler(scheduler: &Scheduler) -> Result<(), SchedulingError> {
    /// `struct sched_attr` in its first size.
    #[repr(C)]
    struct SchedAttr {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    let policy = match scheduler.policy.as_str() {
        "SCHED_OTHER" => 0,
        "SCHED_FIFO" => 1,
        "SCHED_RR" => 2,
        "SCHED_BATCH" => 3,
        "SCHED_ISO" => 4,
        "SCHED_IDLE" => 5,
        "SCHED_DEADLINE" => 6,
        other => return Err(SchedulingError::Policy(other.into())),
    };
    let mut flags = 0;
    for flag in &scheduler.flags {
        flags |= match flag.as_str() {
            "SCHED_FLAG_RESET_ON_FORK" => 0x01,
            "SCHED_FLAG_RECLAIM" => 0x02,
            "SCHED_FLAG_DL_OVERRUN" => 0x04,
            "SCHED_FLAG_KEEP_POLICY" => 0x08,
            "SCHED_FLAG_KEEP_PARAMS" => 0x10,
            "SCHED_FLAG_UTIL_CLAMP_MIN" => 0x20,
            "SCHED_FLAG_UTIL_CLAMP_MAX" => 0x40,
            other => return Err(SchedulingError::Flag(other.into())),
        };
    }
    let attr = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy,
        flags,
        nice: scheduler.nice,
        priority: u32::try_from(scheduler.priority).map_err(|_| SchedulingError::Scheduler(Errno::INVAL))?,
        runtime: scheduler.runtime,
        deadline: scheduler.deadline,
        period: scheduler.period,
    };
    // SAFETY: the structure says its size and outlives the call.
    if unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) } < 0 {
        return Err(SchedulingError::Scheduler(last_errno()));
    }
    Ok(())
}

/// `ioprio_set(2)` for the calling process.
pub fn set_io_priority(priority: &IoPriority) -> Result<(), SchedulingError> {
    const WHO_PROCESS: libc::c_int = 1;
    let class = match priority.class.as_str() {
        "IOPRIO_CLASS_RT" => 1,
        "IOPRIO_CLASS_BE" => 2,
        "IOPRIO_CLASS_IDLE" => 3,
        _ => 0,
    };
    if class == 0 || priority.priority > 7 {
        return Err(SchedulingError::IoClass { class: priority.class.clone(), priority: priority.priority });
    }
    let value = class << 13 | libc::c_int::from(priority.priority);
    // SAFETY: the call takes no pointers.
    if unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, value) } < 0 {
        return Err(SchedulingError::IoPriority(last_errno()));
    }
    Ok(())
}

/// `personality(2)`.
pub fn set_personality(personality: &Personality) -> Result<(), SchedulingError> {
    if let Some(flag) = personality.flags.first() {
        return Err(SchedulingError::PersonalityFlag(flag.clone()));
    }
    // PER_LINUX and PER_LINUX32 of linux/personality.h.
    let domain: libc::c_ulong = match personality.domain.as_str() {
        "LINUX" => 0x0000,
        "LINUX32" => 0x0008,
        other => return Err(SchedulingError::Domain(other.into())),
    };
    // SAFETY: the call takes no pointers.
    if unsafe { libc::personality(domain) } < 0 {
        return Err(SchedulingError::Personality(last_errno()));
    }
    Ok(())
}
