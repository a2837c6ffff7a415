//! `podhull --shadow COMMAND`: the process that stands for what the command makes, started by that and by nobody else.

use std::process::ExitCode;

use super::{Command, Context, Failure};
use crate::pod::{self, Pipe};

/// Lives as long as the container, or the program executed in one; returns its exit status.
pub fn stand(command: Option<Command>, context: Context) -> ExitCode {
    // It was started as /proc/self/exe, which `ps` would show as "exe". A name too many is no reason to fail.
    let _ = rustix::thread::set_name(c"podhull-shadow");
    let Some(pipe) = Pipe::inherited() else {
        context.log.error(&format!("{}: only podhull itself starts its shadows", pod::SHADOW_FLAG));
        return ExitCode::from(super::FAILURE);
    };
    // Standard error is the container's.
    let context = Context { log: context.log.quiet(), ..context };
    let live = |report| match command {
        Some(Command::Create(create)) => Ok(pod::run(create.container.run(&context, Some(report)))?),
        Some(Command::Run(run)) => Ok(pod::run(run.container.run(&context, Some(report)))?),
        Some(Command::Exec(exec)) => Ok(exec.run(&context, Some(report))?),
        _ => Err(Failure::NoShadow),
    };
    match pipe.report().map_err(Failure::from).and_then(live) {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            // Who made it waits for that no more: then the log is all there is to tell.
            if pipe.fail(&failure.to_string()).is_err() {
                context.log.error(&failure.to_string());
            }
            ExitCode::from(failure.status())
        }
    }
}
