//! How many files a process may have open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// As many as this process wants, if it may. Services and sessions are given 1024 by default.
pub fn raise_limit(wanted: u64) {
    let limit = getrlimit(Resource::Nofile);
    let wanted = Some(limit.maximum.unwrap_or(wanted).min(wanted));
    if limit.current < wanted && limit.current.is_some() {
        // What it may not, it does without.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: wanted, ..limit });
    }
}
