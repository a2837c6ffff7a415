//! podhull-agent: PID 1 of a podhull virtual machine.
//!
//! One binary, three entries. As PID 1 it sets the guest up and serves the pod ([`boot`], [`service`]). As
//! `podhull-agent init` it is the first process of a container, started by itself ([`container`]). As
//! `podhull-agent native --dir DIR` it serves the same calls on Unix sockets of an ordinary machine, which is how the
//! container code is tested without a virtual machine.
#![cfg_attr(not(test), no_main)]

mod boot;
mod cgroup;
mod connection;
mod container;
mod descriptors;
mod disks;
mod events;
mod log;
mod machine;
mod memory;
mod native;
mod network;
mod pod;
mod readiness;
mod reaper;
mod serve;
mod service;
mod shared;
mod sockets;
mod spec;
mod stats;
mod stdio;
mod volumes;
mod vsock;

/// The C entry point, in place of Rust's: its runtime opens `/dev/null` for missing standard streams and aborts if there is
/// none, and a guest without a console starts PID 1 with none and `/dev` not mounted yet.
#[cfg(not(test))]
#[unsafe(no_mangle)]
extern "C" fn main(_argc: libc::c_int, _argv: *const *const libc::c_char) -> libc::c_int {
    run()
}

#[cfg_attr(test, allow(dead_code))]
fn run() -> i32 {
    // A stream whose other end is gone is an error of the write, as in Rust's own runtime.
    // SAFETY: ignores a signal; no handler is involved.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let mut arguments = std::env::args_os().skip(1);
    if rustix::process::getpid().is_init() && std::env::args_os().len() < 2 {
        boot::run();
    }
    match arguments.next().as_deref().and_then(|argument| argument.to_str()) {
        Some(container::INIT_ARGUMENT) => container::init::main(arguments),
        Some("native") => native::main(arguments),
        Some("--version") => {
            println!("podhull-agent {}", env!("CARGO_PKG_VERSION"));
            0
        }
        _ => {
            eprintln!("podhull-agent: it is PID 1 of a podhull guest; elsewhere run `podhull-agent native --dir DIR`");
            2
        }
    }
}
