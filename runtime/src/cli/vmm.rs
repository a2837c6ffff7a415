//! `podhull vmm`: the machine's process, started by the runtime and by nobody else.

use std::process::ExitCode;

/// Be the virtual machine of a pod (started by podhull itself, with its control channel as descriptor 3)
#[derive(clap::Args)]
pub struct Arguments {}

impl Arguments {
    /// Lives until the channel closes or the machine ends.
    pub fn execute(self) -> ExitCode {
        // It was started as /proc/self/exe, which `ps` would show as "exe". A name too many is no reason to fail.
        let _ = rustix::thread::set_name(c"podhull-vmm");
        ExitCode::from(u8::try_from(podhull_vmm::process::main()).unwrap_or(u8::MAX))
    }
}
