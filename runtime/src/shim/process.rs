//! A process of a container as containerd sees it: its first one, or one executed in it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{OnceLock, PoisonError};
use std::time::SystemTime;

use containerd_shim_protos::api::{StateResponse, Status};
use containerd_shim_protos::protobuf::{EnumOrUnknown, MessageField};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process, pidfd_open, pidfd_send_signal, waitid,
};
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
    /// It was never made, and nobody wants it any more.
    Forgotten,
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
    /// What to execute, as `process` of `config.json`, until it was made; of the first one nothing.
    spec: std::sync::Mutex<Vec<u8>>,
    /// Where its streams go.
    pub names: Names,
    /// What stays here of its streams, once it was made.
    ends: OnceLock<Ends>,
    /// The process that stands for it, once it was made: a child of this one.
    shadow: OnceLock<(i32, OwnedFd)>,
    phase: watch::Sender<Phase>,
    /// Whether containerd has closed its input, which may be before it is there.
    closed: AtomicBool,
    /// Rows and columns of its terminal, if containerd has set them; the same.
    size: std::sync::Mutex<Option<(u16, u16)>>,
    /// Whether all of its streams have come to their end.
    over: watch::Sender<bool>,
    /// Held while it is started, or forgotten: that it ended is told after that it began.
    pub turn: Mutex<()>,
}

impl Process {
    /// One that is not made yet.
    pub fn new(exec: &str, spec: Vec<u8>, names: Names) -> Self {
        Self {
            exec: exec.into(),
            spec: std::sync::Mutex::new(spec),
            names,
            ends: OnceLock::new(),
            shadow: OnceLock::new(),
            phase: watch::Sender::new(Phase::Added),
            closed: AtomicBool::new(false),
            size: std::sync::Mutex::default(),
            over: watch::Sender::new(false),
            turn: Mutex::new(()),
        }
    }

    /// It was made; `pid` is a child of this process that was not waited for.
    pub fn made(&self, pid: i32, pidfd: OwnedFd, ends: Ends, phase: Phase) {
        drop(std::mem::take(&mut *self.spec.lock().unwrap_or_else(PoisonError::into_inner)));
        let _ = self.shadow.set((pid, pidfd));
        let _ = self.ends.set(ends);
        if self.closed.load(Ordering::SeqCst) {
            self.close_stdin();
        }
        if let Some(size) = *self.size.lock().unwrap_or_else(PoisonError::into_inner) {
            // It has its own size already, and may have ended.
            let _ = self.set_size(size);
        }
        self.phase.send_replace(phase);
    }

    /// What to execute, of one that was not made yet.
    pub fn spec(&self) -> Value {
        serde_json::from_slice(&self.spec.lock().unwrap_or_else(PoisonError::into_inner)).unwrap_or_default()
    }

    /// Sets rows and columns of its terminal, if it has one; before it is there they wait for it.
    pub fn resize(&self, size: (u16, u16)) -> io::Result<()> {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner) = Some(size);
        self.set_size(size)
    }

    fn set_size(&self, (rows, columns): (u16, u16)) -> io::Result<()> {
        match self.ends.get().and_then(|ends| ends.resize(rows, columns)) {
            Some(resized) => resized,
            None => Ok(()),
        }
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

    /// It will never be made.
    pub fn forget(&self) {
        self.phase.send_if_modified(|phase| {
            let forgotten = *phase == Phase::Added;
            if forgotten {
                *phase = Phase::Forgotten;
            }
            forgotten
        });
    }

    /// Waits for its end, and for that to be told; `None`: it was forgotten without ever having begun.
    pub async fn wait(&self) -> Option<Exit> {
        let mut phase = self.phase.subscribe();
        loop {
            match *phase.borrow_and_update() {
                Phase::Exited(exit) => return Some(exit),
                Phase::Forgotten => return None,
                _ => {}
            }
            // This holds the sender.
            let _ = phase.changed().await;
        }
    }

    /// Waits until it does not run, and is not being started either.
    pub async fn at_rest(&self) {
        drop(self.turn.lock().await);
        if self.phase() == Phase::Running {
            self.wait().await;
        }
    }

    /// Waits for the end of the process that stands for it; returns its status as a shell reports it.
    pub async fn reap(&self) -> io::Result<u32> {
        let (_, pidfd) = self.shadow.get().ok_or(io::ErrorKind::NotFound)?;
        reap(pidfd.as_fd()).await
    }

    /// What it has written is lost from here on, where nobody reads it.
    pub fn give_up_output(&self) {
        if let Some(ends) = self.ends.get() {
            ends.let_go();
        }
    }

    /// Ends it, if it is there.
    pub fn kill(&self) {
        if let Some(shadow) = self.shadow() {
            let _ = pidfd_send_signal(shadow, Signal::KILL);
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
            Phase::Added | Phase::Created | Phase::Forgotten => Status::CREATED,
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

/// A descriptor of a child of this process that was not waited for, so that the number is still its own.
pub fn open(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Ends a child of this process that nothing is known of but its number; it is waited for beside everything else.
pub fn end(pid: i32) {
    let Some(pid) = Pid::from_raw(pid) else { return };
    let _ = kill_process(pid, Signal::KILL);
    tokio::task::spawn_blocking(move || waitid(WaitId::Pid(pid), WaitIdOptions::EXITED));
}

/// Waits for the end of a child of this process (a pidfd); returns its status as a shell reports it.
pub async fn reap(pidfd: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: the descriptor is borrowed for as long as the AsyncFd lives.
    let pidfd = unsafe { AsyncFd::register(pidfd) }?;
    loop {
        let mut ready = pidfd.readable().await?;
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match waitid(WaitId::PidFd(*pidfd.get_ref()), options)? {
            Some(status) => {
                let signal = status.terminating_signal().map(|signal| 128 + signal);
                return Ok(status.exit_status().or(signal).unwrap_or(255).cast_unsigned());
            }
            None => ready.clear_ready(),
        }
    }
}
