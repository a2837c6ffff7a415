//! `podhull --shadow COMMAND`: the process that stands for what the command makes, started by that and by nobody else.

use std::process::ExitCode;

use super::{Command, Context, Failure};
use crate::machine::MachineError;
use crate::pod::{self, Creator, News, RunError};

/// What callers see of a container that was ended by SIGKILL.
const KILLED: u8 = 137;

/// Lives as long as the container, or the program executed in one; returns its exit status.
pub fn stand(command: Option<Command>, context: Context) -> ExitCode {
    // One arena for its threads, which allocate little: each that has its own costs some system calls, and pages for as long as it lives.
    // SAFETY: no other thread runs yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    // It was started as /proc/self/exe, which `ps` would show as "exe". A name too many is no reason to fail.
    if let Ok(name) = std::ffi::CString::new(pod::SHADOW_NAME) {
        let _ = rustix::thread::set_name(&name);
    }
    let Some(creator) = Creator::inherited() else {
        context.log.error(&format!("{}: only podhull itself starts its shadows", pod::SHADOW_FLAG));
        return ExitCode::from(super::FAILURE);
    };
    // Standard error is the container's.
    let context = Context { log: context.log.quiet(), ..context };
    let result = match command {
        Some(Command::Create(create)) => pod::run(&create.container.run(&context, &creator)).map_err(Failure::from),
        Some(Command::Run(run)) => pod::run(&run.container.run(&context, &creator)).map_err(Failure::from),
        Some(Command::Debug(debug)) => debug.run(&context, &creator),
        Some(Command::Exec(exec)) => exec.run(&context, &creator).map_err(Failure::from),
        _ => Err(Failure::NoShadow),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            let told = match &failure {
                Failure::Run(RunError::Machine(MachineError::Gone)) => creator.tell(&News::MachineGone),
                failure => creator.tell_text(News::Failed, &failure.to_string()),
            };
            // Who made it waits for that no more: then the log is all there is to tell, and the container has ended as if it
            // had been killed, which its machine was.
            if told.is_err() {
                context.log.error(&failure.to_string());
                return ExitCode::from(KILLED);
            }
            ExitCode::from(failure.status())
        }
    }
}
