//! How soon the host's kernel ends a process when it has no memory left (`proc_pid_oom_score_adj(5)`): -1000 never, 1000 first.

use std::io;

/// First of all.
const MOST: i32 = 1000;

/// That of a process.
pub fn score(pid: i32) -> io::Result<i32> {
    std::fs::read_to_string(path(pid))?.trim().parse().map_err(io::Error::other)
}

/// Sets that of a process, to 1000 at most.
pub fn set_score(pid: i32, score: i32) -> io::Result<()> {
    std::fs::write(path(pid), score.min(MOST).to_string())
}

fn path(pid: i32) -> String {
    format!("/proc/{pid}/oom_score_adj")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_given_up_sooner() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id().cast_signed();
        let before = score(pid).unwrap();
        set_score(pid, before + 1).unwrap();
        assert_eq!(score(pid).unwrap(), (before + 1).min(MOST));
        set_score(pid, 5000).unwrap();
        assert_eq!(score(pid).unwrap(), MOST);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
