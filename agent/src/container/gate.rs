//! The last steps of a container's process, be it the init or one executed later: from root inside the container, with every
//! capability, to its program.

use std::ffi::CString;
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::capabilities::{self, Capabilities};
use super::hold::hold;
use super::init::{InitError, Places};
use super::process::{self, ProcessError, Program};
use super::report::Report;
use super::rootfs::last_errno;
use super::scheduling;
use super::seccomp::Filter;
use super::terminal::{Terminal, TerminalError};
use crate::spec::{Personality, Process};

/// What the agent says when the program is to be executed.
pub const START: &[u8] = b"start";

/// A process in front of its program.
pub struct Gate<'a> {
    /// To the agent.
    pub socket: &'a OwnedFd,
    pub places: Places,
    pub process: &'a Process,
    pub env: Vec<CString>,
    pub capabilities: Capabilities,
    pub filter: Option<&'a Filter>,
    pub personality: Option<&'a Personality>,
    pub terminal: Option<Terminal>,
    /// Whether there is no program.
    pub holds_pod: bool,
}

impl Gate<'_> {
    /// Gives up every privilege, reports, waits for the agent's word, and becomes the program. `last` is done in between the
    /// word and the program.
    pub fn pass(self, last: impl FnOnce() -> Result<(), InitError>) -> Result<std::convert::Infallible, InitError> {
        let Self { socket, places, process, env, capabilities, filter, personality, terminal, holds_pod } = self;
        let master = terminal.map(take_terminal).transpose()?;
        if let Some(personality) = personality {
            scheduling::set_personality(personality)?;
        }
        if let Some(scheduler) = &process.scheduler {
            scheduling::set_scheduler(scheduler)?;
        }
        if let Some(priority) = &process.io_priority {
            scheduling::set_io_priority(priority)?;
        }

        // All there are; what follows opens none that would stay. Before the filter, which may not know the call.
        keep_descriptors_from_program(places)?;
        // A filter may be loaded by who has CAP_SYS_ADMIN, or by who gains no privileges any more. The first must be before
        // the capabilities go, and so the filter sees the steps that follow; the second is the last step of its own.
        if process.no_new_privileges {
            capabilities::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).map_err(InitError::NoNewPrivileges)?;
        } else if let Some(filter) = filter {
            filter.load()?;
        }
        capabilities.bound()?;
        // A working directory that its user has no way to is entered as root; one that root has none to, as the user.
        let entered = process::enter_cwd(&process.cwd);
        process::become_user(&process.user)?;
        capabilities.set()?;
        match entered {
            Err(ProcessError::Cwd { source: Errno::ACCESS, .. }) => process::enter_cwd(&process.cwd)?,
            entered => entered?,
        }
        let program = if holds_pod { None } else { Some(Program::find(process, env)?) };

        report_created(socket, master)?;
        wait_for_start(socket)?;
        // What is done last is hooks of whoever wrote the filter: it holds for them, too.
        if process.no_new_privileges
            && let Some(filter) = filter
        {
            filter.load()?;
        }
        last()?;
        // What was ignored so far would stay ignored in the program.
        for signal in [libc::SIGPIPE, libc::SIGHUP] {
            // SAFETY: restores a default; no handler is involved.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        match program {
            Some(program) => Err(program.exec().into()),
            None => hold(places).map_err(InitError::Hold),
        }
    }
}

/// The container's side becomes the standard streams; the other is for the agent.
fn take_terminal(terminal: Terminal) -> Result<OwnedFd, InitError> {
    let master = terminal.master.try_clone().map_err(|error| {
        InitError::Terminal(TerminalError::Control(Errno::from_io_error(&error).unwrap_or(Errno::IO)))
    })?;
    terminal.control()?;
    Ok(master)
}

/// Everything but the program's own is closed by `execve`.
fn keep_descriptors_from_program(places: Places) -> Result<(), InitError> {
    const CLOSE_RANGE_CLOEXEC: libc::c_int = 4;
    // SAFETY: the call takes no pointers, and marking descriptors invalidates none.
    if unsafe { libc::syscall(libc::SYS_close_range, places.first, libc::c_uint::MAX, CLOSE_RANGE_CLOEXEC) } < 0 {
        return Err(InitError::CloseDescriptors(last_errno()));
    }
    Ok(())
}

fn report_created(socket: &OwnedFd, master: Option<OwnedFd>) -> Result<(), InitError> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<BorrowedFd<'_>> = master.iter().map(AsFd::as_fd).collect();
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    let report = Report::Created.encode();
    rustix::net::sendmsg(socket, &[IoSlice::new(&report)], &mut ancillary, SendFlags::NOSIGNAL)
        .map_err(InitError::Report)?;
    Ok(())
}

/// Waits for the agent's word. Its end without one means that the container is given up.
fn wait_for_start(socket: &OwnedFd) -> Result<(), InitError> {
    let mut word = [0; START.len()];
    loop {
        match rustix::net::recv(socket, &mut word[..], RecvFlags::empty()) {
            Ok((_, length)) if word[..length.min(word.len())] == *START => return Ok(()),
            Ok(_) => return Err(InitError::Wait(Errno::CONNRESET)),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(InitError::Wait(errno)),
        }
    }
}
