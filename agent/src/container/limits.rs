//! What the agent sets on a container's process from outside, because raising it takes a capability of the guest: resource
//! limits and the score for the out-of-memory killer.

use std::io;

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::spec::Process;

/// Limits that cannot be set as given.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    #[error("process.rlimits: unknown limit {0:?}")]
    Unknown(String),
    #[error("process.rlimits: {0} is there twice")]
    Twice(String),
    #[error("process.rlimits: {kind}: the soft limit {soft} is above the hard limit {hard}")]
    SoftAboveHard { kind: String, soft: u64, hard: u64 },
    #[error("process.oomScoreAdj: expected -1000 to 1000, not {0}")]
    OomScore(i32),
    #[error("set {kind}: {source}")]
    Set { kind: String, source: rustix::io::Errno },
    #[error("set the out-of-memory score: {0}")]
    WriteOomScore(io::Error),
}

/// Open files of a container that says nothing: the kernel's soft limit, which programs with `select` rely on, and a hard one
/// like that of other systems' services.
const DEFAULT_FILES: Rlimit = Rlimit { current: Some(1024), maximum: Some(524_288) };

const RESOURCES: [(&str, Resource); 16] = [
    ("RLIMIT_AS", Resource::As),
    ("RLIMIT_CORE", Resource::Core),
    ("RLIMIT_CPU", Resource::Cpu),
    ("RLIMIT_DATA", Resource::Data),
    ("RLIMIT_FSIZE", Resource::Fsize),
    ("RLIMIT_LOCKS", Resource::Locks),
    ("RLIMIT_MEMLOCK", Resource::Memlock),
    ("RLIMIT_MSGQUEUE", Resource::Msgqueue),
    ("RLIMIT_NICE", Resource::Nice),
    ("RLIMIT_NOFILE", Resource::Nofile),
    ("RLIMIT_NPROC", Resource::Nproc),
    ("RLIMIT_RSS", Resource::Rss),
    ("RLIMIT_RTPRIO", Resource::Rtprio),
    ("RLIMIT_RTTIME", Resource::Rttime),
    ("RLIMIT_SIGPENDING", Resource::Sigpending),
    ("RLIMIT_STACK", Resource::Stack),
];

/// Limits, checked.
#[derive(Debug)]
pub struct Limits {
    rlimits: Vec<(String, Resource, Rlimit)>,
    oom_score_adj: Option<i32>,
}

impl Limits {
    pub fn of(process: &Process) -> Result<Self, LimitError> {
        let mut rlimits: Vec<(String, Resource, Rlimit)> = Vec::with_capacity(process.rlimits.len() + 1);
        for limit in &process.rlimits {
            let kind = limit.kind.clone();
            let Some((_, resource)) = RESOURCES.iter().find(|(name, _)| *name == kind) else {
                return Err(LimitError::Unknown(kind));
            };
            if rlimits.iter().any(|(there, ..)| *there == kind) {
                return Err(LimitError::Twice(kind));
            }
            if limit.soft > limit.hard {
                return Err(LimitError::SoftAboveHard { kind, soft: limit.soft, hard: limit.hard });
            }
            // RLIM_INFINITY is the largest number.
            let value = |value| (value != u64::MAX).then_some(value);
            rlimits.push((kind, *resource, Rlimit { current: value(limit.soft), maximum: value(limit.hard) }));
        }
        if !rlimits.iter().any(|(kind, ..)| kind == "RLIMIT_NOFILE") {
            rlimits.push(("RLIMIT_NOFILE".into(), Resource::Nofile, DEFAULT_FILES));
        }
        if let Some(score) = process.oom_score_adj.filter(|score| !(-1000..=1000).contains(score)) {
            return Err(LimitError::OomScore(score));
        }
        Ok(Self { rlimits, oom_score_adj: process.oom_score_adj })
    }

    pub fn set(&self, pid: Pid) -> Result<(), LimitError> {
        for (kind, resource, limit) in &self.rlimits {
            prlimit(Some(pid), *resource, *limit).map_err(|source| LimitError::Set { kind: kind.clone(), source })?;
        }
        if let Some(score) = self.oom_score_adj {
            std::fs::write(format!("/proc/{}/oom_score_adj", pid.as_raw_nonzero()), score.to_string())
                .map_err(LimitError::WriteOomScore)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Result<Limits, LimitError> {
        Limits::of(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn limits_that_cannot_be_are_refused() {
        assert!(matches!(
            of(r#"{"cwd":"/","rlimits":[{"type":"RLIMIT_SPEED","soft":1,"hard":1}]}"#),
            Err(LimitError::Unknown(_))
        ));
        assert!(matches!(
            of(r#"{"cwd":"/","rlimits":[{"type":"RLIMIT_CORE","soft":2,"hard":1}]}"#),
            Err(LimitError::SoftAboveHard { .. })
        ));
        assert!(matches!(
            of(
                r#"{"cwd":"/","rlimits":[{"type":"RLIMIT_CORE","soft":1,"hard":1},{"type":"RLIMIT_CORE","soft":1,"hard":1}]}"#
            ),
            Err(LimitError::Twice(_))
        ));
        assert!(matches!(of(r#"{"cwd":"/","oomScoreAdj":1001}"#), Err(LimitError::OomScore(1001))));
    }

    #[test]
    fn the_largest_number_is_no_limit() {
        let limits =
            of(r#"{"cwd":"/","rlimits":[{"type":"RLIMIT_CORE","soft":5,"hard":18446744073709551615}]}"#).unwrap();
        assert_eq!(limits.rlimits[0].2, Rlimit { current: Some(5), maximum: None });
    }
}
