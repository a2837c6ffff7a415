//! podhull: an OCI runtime that gives every pod a KVM virtual machine of its own.
//!
//! `cli` has one file per subcommand and decides exit codes; `bundle` and `spec` read and check what the caller wants;
//! `pod` makes it so, with `machine` (the VMM process), `network`, `agent` (the guest's PID 1), `stdio`, `signals` and `handover` as its hands;
//! `config` is what the administrator of the host has decided; `state` owns what lies under `/run/podhull`, `cgroup` the control groups on the host. `inspect` is for who looks at
//! pods, with `calls` that counts what their agents were asked. `shim` is the same for containerd, and
//! `node` puts all of it on nodes of Kubernetes.

mod agent;
mod bundle;
mod calls;
mod cgroup;
mod cli;
mod config;
mod confine;
mod descriptors;
mod handover;
mod inotify;
mod inspect;
mod log;
mod machine;
mod network;
mod node;
mod oom;
mod pod;
mod shim;
mod signals;
mod spec;
mod state;
mod stdio;

fn main() -> std::process::ExitCode {
    // The first moment there is: a start is counted from here.
    pod::command_began();
    match std::env::args_os().next() {
        Some(name) if shim::is_called(&name) => shim::main(),
        _ => cli::main(),
    }
}
