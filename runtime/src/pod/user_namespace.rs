//! User namespaces of the host, entered by a process that does nothing, for what the kernel tells or takes of one in use only.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use oci_spec::runtime::LinuxIdMapping;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::CWD;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// How long a process may take to enter one: it makes three system calls.
const ENTERING: Duration = Duration::from_secs(30);

/// A user namespace with these mappings, which no process is in.
pub fn user_namespace(users: &[LinuxIdMapping], groups: &[LinuxIdMapping]) -> io::Result<OwnedFd> {
    with_user_namespace(None, |process| {
        for (file, mappings) in [("uid_map", users), ("gid_map", groups)] {
            let lines: String = mappings
                .iter()
                .map(|one| format!("{} {} {}\n", one.container_id(), one.host_id(), one.size()))
                .collect();
            // In one call: a second one is refused.
            fs::OpenOptions::new().write(true).open(format!("/proc/{process}/{file}"))?.write_all(lines.as_bytes())?;
        }
        Ok(fs::File::open(format!("/proc/{process}/ns/user"))?.into())
    })
}

/// Does something while a process, which does nothing, is in a user namespace that is there, or in a new one; it is given the
/// process's number. The process may be stopped by who is root in the namespace, and is killed in the end.
pub fn with_user_namespace<T>(there: Option<&OwnedFd>, act: impl FnOnce(&str) -> io::Result<T>) -> io::Result<T> {
    let (gone, ours) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let (named, name) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let flags = if there.is_none() { libc::CLONE_NEWUSER } else { 0 };
    // SAFETY: the child makes system calls only, until it ends: it takes no lock that a thread of ours may hold.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) };
    if child == 0 {
        // SAFETY: the call takes no pointers.
        let entered = there.is_none_or(|there| unsafe { libc::setns(there.as_raw_fd(), libc::CLONE_NEWUSER) } == 0);
        // Of what other threads have open it holds nothing back: they may be here at the same time, and wait for an end of file.
        close_others([gone.as_raw_fd(), name.as_raw_fd()]);
        // Its number as procfs has it, which is not the one that `clone` says if this process is in a pid namespace.
        let mut own = [0; 16];
        if entered && let Ok(length) = rustix::fs::readlinkat_raw(CWD, "/proc/self", &mut own[..]) {
            let _ = rustix::io::write(&name, &own[..length]);
            // Until it is killed, or whoever would do that has ended.
            let _ = rustix::io::read(&gone, &mut [0; 1]);
        }
        // SAFETY: ends the child, without anything that the parent has at its exit.
        unsafe { libc::_exit(0) };
    }
    let child = i32::try_from(child).ok().and_then(Pid::from_raw);
    let child = child.ok_or_else(io::Error::last_os_error)?;
    drop((gone, name));
    let done = number_of(&named).and_then(|number| act(&number));
    // It is not waited for yet, so the number is its own.
    let killed = kill_process(child, Signal::KILL);
    drop(ours);
    waitpid(Some(child), WaitOptions::empty())?;
    killed?;
    done
}

/// Closes every descriptor of this process but these two.
fn close_others(mut kept: [i32; 2]) {
    kept.sort_unstable();
    let [low, high] = kept.map(i32::cast_unsigned);
    for (first, last) in [(0, low.wrapping_sub(1)), (low + 1, high.wrapping_sub(1)), (high + 1, u32::MAX)] {
        if first <= last && !(first == 0 && low == 0) {
            // SAFETY: the call takes no pointers, and this process uses no others of its descriptors.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}

/// What the process says of itself.
fn number_of(named: &OwnedFd) -> io::Result<String> {
    let deadline = Timespec::try_from(ENTERING).map_err(io::Error::other)?;
    if poll(&mut [PollFd::from_borrowed_fd(named.as_fd(), PollFlags::IN)], Some(&deadline))? == 0 {
        return Err(io::Error::other(format!("nobody could enter it within {} s", ENTERING.as_secs())));
    }
    let mut number = [0; 16];
    match rustix::io::read(named, &mut number)? {
        0 => Err(io::Error::other("it cannot be entered")),
        count => String::from_utf8(number[..count].into()).map_err(io::Error::other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::LinuxIdMappingBuilder;

    /// Each process that is waited for has a copy of what others were opened by.
    #[test]
    fn many_at_once_do_not_wait_for_each_other() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let mapping = [LinuxIdMappingBuilder::default().container_id(0u32).host_id(7u32).size(9u32).build().unwrap()];
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..300 {
                        let namespace = user_namespace(&mapping, &mapping).unwrap();
                        let read = |process: &str| fs::read_to_string(format!("/proc/{process}/uid_map"));
                        let map = with_user_namespace(Some(&namespace), read).unwrap();
                        assert_eq!(map.split_ascii_whitespace().collect::<Vec<_>>(), ["0", "7", "9"]);
                    }
                });
            }
        });
    }

    #[test]
    fn one_that_is_stopped_is_not_waited_for() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let stop = |process: &str| {
            let pid = process.parse().ok().and_then(Pid::from_raw).unwrap();
            Ok(kill_process(pid, Signal::STOP)?)
        };
        with_user_namespace(None, stop).unwrap();
    }
}
