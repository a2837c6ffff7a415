//! A command that stays in the foreground for as long as the shadow that it has made: what is typed, and signals, are the
//! container's meanwhile.

use std::io;
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::link::News;
use super::shadow::Shadow;
use crate::signals::{self, Waiting};
use crate::spec::Config;
use crate::stdio::{Proxy, StdioError};

/// Why it cannot stay.
#[derive(Debug, thiserror::Error)]
pub enum ForegroundError {
    /// Nothing can be waited for.
    #[error("cannot wait for the container's process: {0}")]
    Wait(#[source] io::Error),
    /// The terminal.
    #[error(transparent)]
    Stdio(#[from] StdioError),
}

/// What comes next.
pub enum Next {
    /// The shadow has said something.
    News(News),
    /// It will say nothing more: it has ended, or is about to.
    Over,
    /// A signal ends the command, with this status: there is no program yet that it could be for.
    Interrupted(u8),
}

/// The command's side of a program in the foreground.
pub struct Foreground {
    signals: Waiting,
    /// Between the terminal of the caller and the program's.
    proxy: Option<Proxy>,
    running: bool,
}

impl Foreground {
    /// From here on no signal ends this process between making something and removing it. There is a terminal if the
    /// configuration asks for one, unless somebody else is sent it.
    pub fn new(config: &Config, console_socket: bool) -> Result<Self, ForegroundError> {
        signals::block();
        let signals = Waiting::new().map_err(ForegroundError::Wait)?;
        let proxy = match config.terminal() && !console_socket {
            true => Some(Proxy::open(config.console_size())?),
            false => None,
        };
        Ok(Self { signals, proxy, running: false })
    }

    /// The program's side of the terminal, once.
    pub fn take_peer(&mut self) -> Option<OwnedFd> {
        self.proxy.as_mut().and_then(Proxy::take_peer)
    }

    /// The program is there: what is typed is its own, and signals are.
    pub fn begin(&mut self) -> Result<(), ForegroundError> {
        if let Some(proxy) = &mut self.proxy {
            proxy.start()?;
        }
        self.running = true;
        Ok(())
    }

    /// Waits for what is the caller's to deal with, and passes everything else on.
    pub fn next(&self, shadow: &Shadow) -> Result<Next, ForegroundError> {
        loop {
            let (signal, news) = {
                let link = shadow.link();
                let mut fds = [PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&link, PollFlags::IN)];
                match poll(&mut fds, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => return Err(ForegroundError::Wait(errno.into())),
                }
                (!fds[0].revents().is_empty(), !fds[1].revents().is_empty())
            };
            if news {
                return Ok(shadow.news().map_or(Next::Over, Next::News));
            }
            if signal
                && let Some(signal) = self.signals.next()
                && let Some(status) = self.signal(shadow, signal)?
            {
                return Ok(Next::Interrupted(status));
            }
        }
    }

    /// The status to end with, if the signal ends the command.
    fn signal(&self, shadow: &Shadow, signal: i32) -> Result<Option<u8>, ForegroundError> {
        match (signal, &self.proxy) {
            (libc::SIGWINCH, Some(proxy)) => proxy.resize(),
            // From outside: the key of the terminal goes to the container. The shell gets a sane terminal.
            (libc::SIGTSTP, Some(proxy)) => proxy.stop(),
            (libc::SIGCONT, Some(proxy)) if self.running => proxy.resume()?,
            (signal, _) if signals::is_ours(signal) => {}
            (signal, _) if self.running => shadow.signal(signal),
            (signal, _) if signals::ends_by_default(signal) => {
                return Ok(Some(u8::try_from(128 + signal).unwrap_or(u8::MAX)));
            }
            _ => {}
        }
        Ok(None)
    }

    /// The shadow has ended: waits until everything that the program has written is on the screen.
    pub fn end(mut self) {
        if let Some(proxy) = &mut self.proxy {
            proxy.drain();
        }
    }
}
