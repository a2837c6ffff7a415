//! A process of a container as containerd sees it: its first one, or one executed in it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use containerd_shim_protos::api::{StateResponse, Status};
use containerd_shim_protos::protobuf::{EnumOrUnknown, MessageField};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};
use serde_json::Value;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, watch};

use super::events::timestamp;
use super::io::{Ends, Names};

/// Where in its life it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Named, but not made.
    Added,
    /// Made; its program does not run yet.
    Created,
    /// Its program runs.
    Running,
    /// It has ended.
    Exited(Exit),
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// As a shell reports it.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

/// A process.
pub struct Process {
    /// Of the executed one; empty: the first.
    pub exec: String,
    /// What to execute, as `process` of `config.json`; of the first one nothing.
    pub spec: Value,
    /// Where its streams go.
    pub names: Names,
    /// What stays here of its streams, once it was made.
    pub ends: OnceLock<Ends>,
    /// The process that stands for it, once it was made: a child of this one.
    shadow: OnceLock<(i32, OwnedFd)>,
    phase: watch::Sender<Phase>,
    /// Whether containerd has closed its input, which may be before it is there.
    closed: AtomicBool,
    /// Whether all of its streams have come to their end.
    over: watch::Sender<bool>,
    /// Held while it is started: that it ended is told after that it began.
    pub turn: Mutex<()>,
}

impl Process {
    /// One that is not made yet.
    pub fn new(exec: &str, spec: Value, names: Names) -> Self {
        Self {
            exec: exec.into(),
            spec,
            names,
            ends: OnceLock::new(),
            shadow: OnceLock::new(),
            phase: watch::Sender::new(Phase::Added),
            closed: AtomicBool::new(false),
            over: watch::Sender::new(false),
            turn: Mutex::new(()),
        }
    }

    /// It was made; `pid` is a child of this process that was not waited for.
    pub fn made(&self, pid: i32, ends: Ends, phase: Phase) -> io::Result<()> {
        let known = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
        let _ = self.shadow.set((pid, pidfd_open(known, PidfdFlags::empty())?));
        let _ = self.ends.set(ends);
        if self.closed.load(Ordering::SeqCst) {
            self.close_stdin();
        }
        self.phase.send_replace(phase);
        Ok(())
    }

    /// There will be no more input.
    pub fn close_stdin(&self) {
        self.closed.store(true, Ordering::SeqCst);
        if let Some(ends) = self.ends.get() {
            ends.close_stdin();
        }
    }

    /// Its program runs. It may have ended since, which then is said next.
    pub fn started(&self) {
        self.phase.send_replace(Phase::Running);
    }

    /// It has ended.
    pub fn exited(&self, exit: Exit) {
        self.phase.send_replace(Phase::Exited(exit));
    }

    /// Where in its life it is.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// The process that stands for it on the host; 0 before it was made.
    pub fn pid(&self) -> i32 {
        self.shadow.get().map_or(0, |(pid, _)| *pid)
    }

    /// The same process, to send signals to.
    pub fn shadow(&self) -> Option<&OwnedFd> {
        self.shadow.get().map(|(_, pidfd)| pidfd)
    }

    /// As containerd counts.
    pub fn pid_u32(&self) -> u32 {
        self.pid().cast_unsigned()
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        match self.phase() {
            Phase::Exited(exit) => Some(exit),
            _ => None,
        }
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exit {
        let mut phase = self.phase.subscribe();
        loop {
            if let Phase::Exited(exit) = *phase.borrow_and_update() {
                return exit;
            }
            // This holds the sender.
            let _ = phase.changed().await;
        }
    }

    /// Has all of its streams come to their end, and says so.
    pub async fn finish(&self) {
        if let Some(ends) = self.ends.get() {
            ends.finish().await;
        }
        self.over.send_replace(true);
    }

    /// Waits until all of its streams have; there is a deadline to that.
    pub async fn finished(&self) {
        let mut over = self.over.subscribe();
        // This holds the sender.
        let _ = over.wait_for(|over| *over).await;
    }

    /// Its state in containerd's words; `paused`, if its container is.
    pub fn state(&self, id: &str, bundle: &str, paused: bool) -> StateResponse {
        let status = match self.phase() {
            Phase::Added | Phase::Created => Status::CREATED,
            Phase::Running if paused => Status::PAUSED,
            Phase::Running => Status::RUNNING,
            Phase::Exited(_) => Status::STOPPED,
        };
        let exit = self.exit();
        StateResponse {
            id: id.into(),
            bundle: bundle.into(),
            pid: self.pid_u32(),
            status: EnumOrUnknown::new(status),
            stdin: self.names.stdin.clone(),
            stdout: self.names.stdout.clone(),
            stderr: self.names.stderr.clone(),
            terminal: self.names.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| timestamp(exit.at)).map_or_else(MessageField::none, MessageField::some),
            exec_id: self.exec.clone(),
            ..Default::default()
        }
    }
}

/// Waits for the end of a child of this process; returns its status as a shell reports it.
pub async fn reap(pid: i32) -> io::Result<u32> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    // It was not waited for, so the number is still its own.
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    // SAFETY: the descriptor is owned by the AsyncFd from here on, and never replaced.
    let pidfd = unsafe { AsyncFd::register(pidfd) }?;
    loop {
        let mut ready = pidfd.readable().await?;
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match waitid(WaitId::PidFd(pidfd.get_ref().as_fd()), options)? {
            Some(status) => {
                let signal = status.terminating_signal().map(|signal| 128 + signal);
                return Ok(status.exit_status().or(signal).unwrap_or(255).cast_unsigned());
            }
            None => ready.clear_ready(),
        }
    }
}
