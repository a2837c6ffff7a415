//! What /proc says about processes.

use std::fs;
use std::path::PathBuf;

/// A process as it was when looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    /// Process id of its parent.
    pub parent: i32,
    /// State of `stat`: R, S, D, Z, ...
    pub state: char,
    /// Its arguments, joined by spaces; the name in brackets if it has none.
    pub command: String,
    /// The file it runs, if that can be seen.
    pub program: Option<PathBuf>,
}

impl Process {
    /// Whether it is the shim of a pod, of whichever runtime, and not one that starts or deletes another.
    pub fn is_shim(&self) -> bool {
        let mut words = self.command.split(' ');
        words.next().is_some_and(|name| name.contains("containerd-shim-"))
            && words.all(|word| !["start", "delete"].contains(&word))
    }

    fn read(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may contain anything, so fields are counted from the last parenthesis: state, parent (proc(5)).
        let (head, tail) = stat.rsplit_once(')')?;
        let mut fields = tail.split_whitespace();
        let state = fields.next()?.chars().next()?;
        let parent = fields.next()?.parse().ok()?;
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ").trim().to_owned();
        let name = head.split_once('(').map_or("", |(_, name)| name);
        let command = if arguments.is_empty() { format!("[{name}]") } else { arguments };
        let program = fs::read_link(format!("/proc/{pid}/exe")).ok();
        Some(Self { pid, parent, state, command, program })
    }
}

/// All processes.
pub fn all() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(Process::read).collect()
}

/// The children of `pid`, their children, and so on; zombies are not counted.
pub fn descendants(pid: i32) -> Vec<Process> {
    let all = all();
    let mut family = vec![pid];
    let mut found = Vec::new();
    let mut next = 0;
    while let Some(&parent) = family.get(next) {
        next += 1;
        for process in all.iter().filter(|process| process.parent == parent) {
            family.push(process.pid);
            if !matches!(process.state, 'Z' | 'X') {
                found.push(process.clone());
            }
        }
    }
    found
}

/// What the descendants of `pid` are doing, for the report of a test that hangs.
pub fn describe(pid: i32) -> String {
    let mut text = String::new();
    for process in descendants(pid) {
        text += &format!("\n    {} {} {}", process.pid, process.state, shorten(&process.command));
        let threads = fs::read_dir(format!("/proc/{}/task", process.pid)).into_iter().flatten().flatten();
        for thread in threads {
            let read = |file| fs::read_to_string(thread.path().join(file)).unwrap_or_default();
            let stack = read("stack");
            let place = stack.lines().next().unwrap_or("in user mode").trim_start_matches("[<0>] ").to_owned();
            text += &format!("\n        {}: {place}", read("comm").trim());
        }
    }
    text
}

fn shorten(text: &str) -> String {
    text.chars().take(120).collect()
}
