//! The terminal this process was started in, given to the container: in raw mode, because the terminal that interprets
//! keys is the guest's.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use rustix::fs::{Mode, OFlags};
use rustix::termios::{OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

use super::{StdioError, duplicate};
use crate::signals::without_background_stop;

/// Terminal and mode to return to, for when this process ends without dropping anything.
static RESTORE: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);

/// The terminal; its mode is restored when it is dropped, and on panic.
pub struct Terminal {
    fd: OwnedFd,
    saved: Termios,
}

impl Terminal {
    /// Finds it: standard error, output or input, whichever is one, else the controlling terminal.
    pub fn open() -> Result<Self, StdioError> {
        let standard = [rustix::stdio::stderr(), rustix::stdio::stdout(), rustix::stdio::stdin()];
        let fd = match standard.into_iter().find(|fd| isatty(fd)) {
            Some(fd) => duplicate(fd),
            None => rustix::fs::open("/dev/tty", OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()),
        };
        let fd = fd.map_err(StdioError::NoTerminal)?;
        let saved = tcgetattr(&fd).map_err(StdioError::NoTerminal)?;
        Ok(Self { fd, saved })
    }

    /// Rows and columns, if the terminal knows.
    pub fn size(&self) -> Option<(u16, u16)> {
        size(self.fd.as_fd())
    }

    /// Passes every key through from now on.
    pub fn set_raw(&self) -> Result<(), StdioError> {
        let copy = duplicate(self.fd.as_fd()).map_err(StdioError::Terminal)?;
        if let Ok(mut restore) = RESTORE.lock()
            && restore.is_none()
        {
            *restore = Some((copy, self.saved.clone()));
            let default = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore_now();
                default(info);
            }));
        }
        let mut raw = self.saved.clone();
        raw.make_raw();
        // As runc leaves it: newlines are this terminal's to interpret, and where the output is something else they are as they
        // were written.
        raw.output_modes |= self.saved.output_modes & OutputModes::OPOST;
        tcsetattr(&self.fd, OptionalActions::Now, &raw).map_err(StdioError::Terminal)
    }

    /// Returns to the mode from before.
    pub fn restore(&self) {
        let _ = without_background_stop(|| tcsetattr(&self.fd, OptionalActions::Now, &self.saved));
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        restore_now();
    }
}

/// Returns to the saved mode if it was ever left. On a terminal that is gone there is nothing to restore.
fn restore_now() {
    if let Ok(mut restore) = RESTORE.try_lock()
        && let Some((fd, saved)) = restore.take()
    {
        let _ = without_background_stop(|| tcsetattr(&fd, OptionalActions::Now, &saved));
    }
}

/// Rows and columns of a terminal, if it knows.
pub fn size(fd: BorrowedFd<'_>) -> Option<(u16, u16)> {
    tcgetwinsize(fd).ok().map(|size| (size.ws_row, size.ws_col)).filter(|size| *size != (0, 0))
}
