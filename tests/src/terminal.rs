//! Terminals: a tmux session as a person has it, and the socket over which a caller gets the terminal's master.

use std::ffi::OsString;
use std::fs::File;
use std::io::{IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::run::DEADLINE;
use crate::{Failure, Outcome, ensure};

/// A shell in a tmux session with a server of its own.
pub struct Tmux {
    socket: PathBuf,
}

impl Tmux {
    /// Starts a session of the given size; its socket is in `directory`.
    pub fn start(directory: &Path, columns: u16, rows: u16) -> Outcome<Self> {
        let tmux = Self { socket: directory.join("tmux.sock") };
        let (columns, rows) = (columns.to_string(), rows.to_string());
        tmux.call(&[
            "-f",
            "/dev/null",
            "new-session",
            "-d",
            "-s",
            "e2e",
            "-x",
            &columns,
            "-y",
            &rows,
            "env PS1='host> ' sh",
        ])?;
        // The status line would take one row away from the session.
        tmux.call(&["set-option", "-g", "status", "off"])?;
        tmux.call(&["resize-window", "-t", "e2e", "-x", &columns, "-y", &rows])?;
        tmux.expect("host> ")?;
        Ok(tmux)
    }

    /// Types text and Enter.
    pub fn type_line(&self, text: &str) -> Outcome {
        self.call(&["send-keys", "-t", "e2e", "-l", text])?;
        self.key("Enter")
    }

    /// Presses a key by tmux's name for it: `C-c`, `C-z`, `Enter`.
    pub fn key(&self, name: &str) -> Outcome {
        self.call(&["send-keys", "-t", "e2e", name]).map(drop)
    }

    /// Gives the window another size.
    pub fn resize(&self, columns: u16, rows: u16) -> Outcome {
        self.call(&["resize-window", "-t", "e2e", "-x", &columns.to_string(), "-y", &rows.to_string()]).map(drop)
    }

    /// What is on the screen, without trailing spaces.
    pub fn screen(&self) -> Outcome<String> {
        let output = self.call(&["capture-pane", "-p", "-t", "e2e"])?;
        Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
    }

    /// Waits until the screen's last line begins with `text` or, if `text` has an end of line, until the screen holds it.
    pub fn expect(&self, text: &str) -> Outcome {
        let until = Instant::now() + DEADLINE;
        loop {
            let screen = self.screen()?;
            let last = screen.lines().last().unwrap_or_default();
            let there = if text.contains('\n') {
                format!("\n{screen}\n").contains(text)
            } else {
                last.starts_with(text.trim_end())
            };
            if there {
                return Ok(());
            }
            ensure!(Instant::now() < until, "{text:?} did not appear on the screen:\n{screen}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn call(&self, arguments: &[&str]) -> Outcome<Output> {
        let output = Command::new("tmux").arg("-S").arg(&self.socket).args(arguments).output();
        let output = output.map_err(|error| format!("cannot start tmux: {error}"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "tmux {}: {}", arguments.join(" "), said.trim());
        Ok(output)
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        let _ = self.call(&["kill-server"]);
    }
}

/// The command line of `words` for a shell.
pub fn shell_line(words: &[OsString]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("'{}'", word.display())).collect();
    quoted.join(" ")
}

/// Waits for the terminal, as callers of `--console-socket` do.
pub fn receive_terminal(listener: &UnixListener) -> Outcome<File> {
    receive(listener).map(|(fd, _)| File::from(fd))
}

/// Waits for one connection and the file descriptor that it carries (SCM_RIGHTS), with what it is called.
pub fn receive(listener: &UnixListener) -> Outcome<(OwnedFd, String)> {
    wait_readable(listener, "nobody connected to the socket")?;
    let (stream, _) = listener.accept()?;
    wait_readable(&stream, "nothing came over the socket")?;
    let mut name = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(&stream, &mut [IoSliceMut::new(&mut name)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fds = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let fd = fds.ok_or("no file descriptor came over the socket")?;
    Ok((fd, String::from_utf8_lossy(&name[..received.bytes]).into_owned()))
}

/// Reads from a terminal's master until `text` has come.
pub fn read_until(terminal: &mut File, text: &str) -> Outcome<String> {
    let mut read = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let so_far = String::from_utf8_lossy(&read).into_owned();
        if so_far.contains(text) {
            return Ok(so_far);
        }
        wait_readable(terminal, &format!("{text:?} did not come, only {so_far:?}"))?;
        let count = terminal.read(&mut buffer).map_err(|error| format!("{error} after {so_far:?}"))?;
        ensure!(count > 0, "the terminal ended after {so_far:?}");
        read.extend_from_slice(&buffer[..count]);
    }
}

fn wait_readable(fd: &impl std::os::fd::AsFd, otherwise: &str) -> Outcome {
    let ready = poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&Timespec::try_from(DEADLINE)?))?;
    if ready == 0 { Err(Failure::from(otherwise)) } else { Ok(()) }
}
