//! `podhull shadow`: the process that stands for a container, started by `create` and by nobody else.

use std::process::ExitCode;

use super::Context;
use super::create::Container;
use crate::pod::{self, Pipe};

/// Stand for a container on the host (started by podhull itself, with a pipe to its creator as descriptor 3)
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    container: Container,
}

impl Arguments {
    /// Lives as long as the container; returns its exit status.
    pub fn execute(self, context: Context) -> ExitCode {
        // It was started as /proc/self/exe, which `ps` would show as "exe". A name too many is no reason to fail.
        let _ = rustix::thread::set_name(c"podhull-shadow");
        let Some(pipe) = Pipe::inherited() else {
            context.log.error("shadow: started by hand; it is part of podhull create");
            return ExitCode::from(super::FAILURE);
        };
        let context = Context { log: context.log.quiet(), ..context };
        let result = pipe
            .report()
            .map_err(pod::RunError::Report)
            .and_then(|created| pod::run(self.container.run(&context, Some(created))));
        match result {
            Ok(status) => ExitCode::from(status),
            Err(error) => {
                context.log.debug(|| error.to_string());
                pipe.fail(&error.to_string());
                ExitCode::from(super::FAILURE)
            }
        }
    }
}
