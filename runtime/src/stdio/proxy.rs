//! A container with a terminal in the foreground: its terminal is a new one, as it would be in the background, and this
//! passes everything between that and the terminal of the caller, which is in raw mode meanwhile.

use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;

use rustix::io::Errno;

use super::terminal::Terminal;
use super::{StdioError, console, duplicate, pump, spawn};
use crate::signals;

/// Between two terminals. Dropping it gives the caller its own back as it was.
pub struct Proxy {
    /// The caller's.
    outer: Terminal,
    /// The master of the container's.
    master: OwnedFd,
    /// The other side of it, until the container has it.
    peer: Option<OwnedFd>,
    output: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Makes the container's terminal, as large as the caller's, else of the size that the specification asks for.
    pub fn open(size: Option<(u16, u16)>) -> Result<Self, StdioError> {
        let outer = Terminal::open()?;
        let (master, peer) = console::pair(outer.size().or(size)).map_err(StdioError::Terminal)?;
        Ok(Self { outer, master, peer: Some(peer), output: None })
    }

    /// The container's side, once.
    pub fn take_peer(&mut self) -> Option<OwnedFd> {
        self.peer.take()
    }

    /// From now on what is typed is the container's.
    pub fn start(&mut self) -> Result<(), StdioError> {
        self.outer.set_raw()?;
        let copy = |fd: Result<OwnedFd, Errno>| fd.map_err(StdioError::Duplicate);
        let (keys, to) = (copy(duplicate(rustix::stdio::stdin()))?, copy(duplicate(self.master.as_fd()))?);
        // It ends with the process: there may be no key any more.
        spawn("keys", move || pump::copy(keys.as_fd(), to.as_fd())).map_err(StdioError::Thread)?;
        let (from, screen) = (copy(duplicate(self.master.as_fd()))?, copy(duplicate(rustix::stdio::stdout()))?);
        let output = spawn("screen", move || pump::copy(from.as_fd(), screen.as_fd()));
        self.output = Some(output.map_err(StdioError::Thread)?);
        Ok(())
    }

    /// Passes the size of the caller's terminal on.
    pub fn resize(&self) {
        if let Some(size) = self.outer.size() {
            // The container may have ended at this very moment.
            let _ = console::set_size(self.master.as_fd(), size);
        }
    }

    /// Stops this process, with the caller's terminal as it was, until it is continued.
    pub fn stop(&self) {
        self.outer.restore();
        signals::stop();
    }

    /// Goes on after [`Proxy::stop`].
    pub fn resume(&self) -> Result<(), StdioError> {
        self.outer.set_raw()?;
        self.resize();
        Ok(())
    }

    /// Waits until everything that the container has written is on the screen. To be called when nobody has the other side
    /// of its terminal any more.
    pub fn drain(&mut self) {
        if let Some(output) = self.output.take() {
            // It only moves bytes.
            let _ = output.join();
        }
    }
}
