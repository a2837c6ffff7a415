//! The processes of a container, as `ps` shows them.
//!
//! Their number, names and arguments are the container's to choose, and its arguments are read from its memory: a process can
//! have that wait for as long as it likes (a page of a file system it serves itself). So this runs on a thread of its own, one
//! for a container at most, and is waited for only so long.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use podhull_protocol::{ListProcessesResponse, ProcessInfo};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::time::{ClockId, clock_gettime};

use super::{Container, ContainerError};
use crate::cgroup::{Cgroup, CgroupError};

const DEADLINE: Duration = Duration::from_secs(10);

/// Processes told at most.
const MOST: usize = 32_768;

/// Of the arguments of one process, and of all.
const COMMAND_BYTES: u64 = 4096;
const COMMANDS_BYTES: usize = 1 << 20;

/// `USER_HZ`, which is what `/proc` counts in on every architecture of Linux but Alpha and IA-64.
const TICK_NS: u64 = 10_000_000;

impl Container {
    /// Lists the processes.
    pub async fn processes(&self) -> Result<ListProcessesResponse, ContainerError> {
        let slow = |_| ContainerError::ProcessesSlow(DEADLINE);
        let turn = tokio::time::timeout(DEADLINE, self.listing.clone().lock_owned()).await.map_err(slow)?;
        let cgroup = self.cgroup.clone();
        let listed = tokio::task::spawn_blocking(move || {
            let listed = list(&cgroup);
            drop(turn);
            listed
        });
        Ok(tokio::time::timeout(DEADLINE, listed).await.map_err(slow)?.map_err(ContainerError::ListTask)??)
    }
}

fn list(cgroup: &Arc<Cgroup>) -> Result<ListProcessesResponse, CgroupError> {
    let mut pids = cgroup.processes()?;
    pids.sort_unstable();
    let truncated = pids.len() > MOST;
    let mut commands = COMMANDS_BYTES;
    let mut processes = Vec::new();
    for pid in pids.into_iter().take(MOST) {
        // One that has ended meanwhile is no process any more.
        let Some(process) = look(pid, commands > 0) else { continue };
        commands = commands.saturating_sub(process.command.len());
        processes.push(process);
    }
    Ok(ListProcessesResponse { processes, truncated, ..ListProcessesResponse::default() })
}

fn look(pid: i32, with_arguments: bool) -> Option<ProcessInfo> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // Held open, so that all that follows is about one process, whatever becomes of its number.
    let directory = rustix::fs::openat(CWD, format!("/proc/{pid}"), flags, Mode::empty()).ok()?;
    let read = |file: &str, limit: u64| -> Option<Vec<u8>> {
        let file = rustix::fs::openat(&directory, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let mut bytes = Vec::new();
        File::from(file).take(limit).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    };
    let stat = Stat::parse(&read("stat", 4096)?)?;
    let status = String::from_utf8_lossy(&read("status", 16_384)?).into_owned();
    let uid =
        status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_ascii_whitespace().nth(1)?.parse().ok()?;
    let arguments = if with_arguments { read("cmdline", COMMAND_BYTES).unwrap_or_default() } else { Vec::new() };
    let [now, up] = [ClockId::Realtime, ClockId::Boottime].map(|clock| {
        let time = clock_gettime(clock);
        time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
    });
    let alive = up.saturating_sub(stat.started_ns).max(1);
    Some(ProcessInfo {
        pid,
        ppid: stat.ppid,
        uid,
        cpu_percent: (u128::from(stat.cpu_ns) * 100 / u128::from(alive)).try_into().unwrap_or(u32::MAX),
        started_ns: now.saturating_sub(alive),
        tty: terminal(stat.terminal),
        cpu_time_ns: stat.cpu_ns,
        command: command(&arguments, &stat.name),
        ..ProcessInfo::default()
    })
}

/// What is of interest in `/proc/PID/stat` (`proc_pid_stat(5)`).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    name: String,
    ppid: i32,
    terminal: u32,
    cpu_ns: u64,
    /// Since the machine was started.
    started_ns: u64,
}

impl Stat {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(bytes);
        // The name is in parentheses, and may have some itself.
        let (begin, end) = (text.find('(')?, text.rfind(')')?);
        let fields: Vec<&str> = text.get(end + 1..)?.split_ascii_whitespace().collect();
        let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
        Some(Self {
            name: text.get(begin + 1..end)?.to_owned(),
            ppid: fields.get(1)?.parse().ok()?,
            terminal: fields.get(4)?.parse::<i32>().ok()?.cast_unsigned(),
            cpu_ns: number(11)?.saturating_add(number(12)?).saturating_mul(TICK_NS),
            started_ns: number(19)?.saturating_mul(TICK_NS),
        })
    }
}

/// The name of a terminal by its number, as under `/dev`.
fn terminal(number: u32) -> String {
    let (major, minor) = (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xf_ff00);
    match (major, minor) {
        (4, 0..64) => format!("tty{minor}"),
        (4, _) => format!("ttyS{}", minor - 64),
        (5, 1) => "console".into(),
        (136..=143, _) => format!("pts/{}", (major - 136) << 8 | minor),
        _ => "?".into(),
    }
}

fn command(arguments: &[u8], name: &str) -> String {
    let end = arguments.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    if end == 0 {
        return format!("[{name}]");
    }
    String::from_utf8_lossy(&arguments[..end]).replace('\0', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_look_like_the_rest_of_the_line() {
        let line = b"7 (a) R 1 (b) S 3 7 7 34817 7 4194304 1 0 0 0 5 6 0 0 20 0 1 0 1234 0 0";
        let stat = Stat::parse(line).unwrap();
        assert_eq!((stat.name.as_str(), stat.ppid, stat.terminal), ("a) R 1 (b", 3, 34817));
        assert_eq!((stat.cpu_ns, stat.started_ns), (110_000_000, 12_340_000_000));
        assert_eq!(Stat::parse(b"7 (a"), None);
        assert_eq!(Stat::parse(b"7 )a("), None);
    }

    #[test]
    fn terminals_have_the_names_they_have_in_dev() {
        for (major, minor, name) in
            [(0, 0, "?"), (4, 1, "tty1"), (4, 64, "ttyS0"), (5, 1, "console"), (136, 1, "pts/1"), (136, 300, "pts/300")]
        {
            let number: u32 = minor & 0xff | major << 8 | (minor & !0xff) << 12;
            assert_eq!(terminal(number), name);
        }
    }

    #[test]
    fn arguments_are_joined_and_a_process_without_any_is_named() {
        assert_eq!(command(b"sleep\x001000\0", "sleep"), "sleep 1000");
        assert_eq!(command(b"a\0\0b\0\0", "x"), "a  b");
        assert_eq!(command(b"", "kthreadd"), "[kthreadd]");
        assert_eq!(command(b"\0\0", "x"), "[x]");
    }
}
