//! PID 1 of a guest that misbehaves on purpose: the other side of what podhull may rely on. The word `rogue=NAME` of the kernel's
//! command line, which the kernel makes a variable, says how ([`Fault`]). In all else it is as good an agent as podhull needs to take
//! it for one: it answers each call, takes streams, and says after a moment that the container has ended with 0.
#![no_main]

mod fault;
mod frame;
mod vsock;

use std::fs::File;
use std::io::{Read, Write};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use podhull_protocol::{AGENT_PORT, READY_PORT, STDIO_PORT};

use fault::Fault;

/// How long a container runs in it, once it was started.
pub const LIFE: Duration = Duration::from_secs(3);

/// Streams of the container.
static STREAMS: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// In place of Rust's: its runtime wants `/dev/null`, which PID 1 does not have.
#[unsafe(no_mangle)]
extern "C" fn main(_argc: libc::c_int, _argv: *const *const libc::c_char) -> libc::c_int {
    // SAFETY: ignores a signal; no handler is involved.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    serve(Fault::named(&std::env::var("rogue").unwrap_or_default()))
}

fn serve(fault: Fault) -> ! {
    let Ok(calls) = vsock::listen(AGENT_PORT) else { reset() };
    if fault != Fault::NoStreams {
        let Ok(streams) = vsock::listen(STDIO_PORT) else { reset() };
        thread::spawn(move || take_streams(&streams, fault));
    }
    if fault == Fault::Storm {
        storm();
    }
    let _ = vsock::connect(READY_PORT);
    loop {
        if let Ok(connection) = vsock::accept(&calls) {
            thread::spawn(move || fault::converse(frame::Connection::new(connection), fault));
        }
    }
}

/// Streams say who they are, and are kept.
fn take_streams(listener: &File, fault: Fault) {
    while let Ok(mut stream) = vsock::accept(listener) {
        let mut token = [0; 8];
        if stream.read_exact(&mut token).is_err() {
            continue;
        }
        if matches!(fault, Fault::EndlessOutput | Fault::OutputAfterExit)
            && let Ok(mut output) = stream.try_clone()
        {
            thread::spawn(move || while output.write_all(&[b'x'; 4096]).is_ok() {});
        }
        streams().push(stream);
    }
}

fn streams() -> std::sync::MutexGuard<'static, Vec<File>> {
    STREAMS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Connects to all ports of the host, whoever is there.
fn storm() {
    for first in 0..4 {
        thread::spawn(move || {
            let mut port: u32 = first;
            loop {
                let _ = vsock::connect(port);
                port = port.wrapping_mul(7).wrapping_add(4);
            }
        });
    }
}

/// Ends the machine.
fn reset() -> ! {
    // SAFETY: reboot with a command that takes no argument.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
    std::process::abort()
}
