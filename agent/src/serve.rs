//! The agent's one thread: listeners, ready signal, server.

use std::io;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use podhull_protocol::READY_PORT;
use tokio::io::Interest;
use ttrpc::r#async::transport::Listener;

use crate::machine::Machine;
use crate::readiness;
use crate::service::Service;
use crate::{cgroup, connection, pod, reaper, stdio, vsock};

/// Why the agent cannot serve, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("start the runtime: {0}")]
    Runtime(io::Error),
    #[error("watch for ended processes: {0}")]
    Reaper(io::Error),
    #[error("accept a connection: {0}")]
    Calls(io::Error),
    #[error("accept a standard stream: {0}")]
    Stdio(io::Error),
    #[error("tell the host that the agent is ready: {0}")]
    Ready(io::Error),
}

/// Where the host's calls and the standard streams come in.
pub enum Listeners {
    /// In a virtual machine.
    Vsock { agent: OwnedFd, stdio: OwnedFd },
    /// On an ordinary machine, for tests; paths below `share` stand for the pod's share, and shared memory is in `memory`.
    Unix { agent: OwnedFd, stdio: OwnedFd, share: PathBuf, memory: PathBuf },
}

/// Serves until something breaks that nothing can be served without.
pub fn serve(listeners: Listeners, cgroups: cgroup::Hierarchy) -> ServeError {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build() {
        Ok(runtime) => runtime,
        Err(error) => return ServeError::Runtime(error),
    };
    match runtime.block_on(serve_forever(listeners, cgroups)) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

async fn serve_forever(
    listeners: Listeners,
    cgroups: cgroup::Hierarchy,
) -> Result<std::convert::Infallible, ServeError> {
    let reaper = reaper::Reaper::start().map_err(ServeError::Reaper)?;
    let (calls, stdio, machine, share, memory) = match listeners {
        Listeners::Vsock { agent, stdio } => {
            // SAFETY: the descriptor is an open vsock listener and is given away here.
            let calls = unsafe { Listener::from_raw_vsock_listener_fd(agent.into_raw_fd()) };
            let directories = [podhull_protocol::SHARE_DIR, podhull_protocol::MEMORY_DIR];
            let [share, memory] = directories.map(PathBuf::from);
            (calls, stdio, Some(Machine), share, memory)
        }
        Listeners::Unix { agent, stdio, share, memory } => {
            // SAFETY: the descriptor is an open Unix listener and is given away here.
            let calls = unsafe { Listener::from_raw_unix_listener_fd(agent.into_raw_fd()) };
            (calls, stdio, None, share, memory)
        }
    };
    let in_machine = machine.is_some();
    let streams = Arc::new(stdio::Streams::default());
    let pod = Arc::new(pod::Pod::new(share, memory, cgroups, machine, reaper, streams.clone()));
    let calls = calls.map_err(ServeError::Calls)?;
    let listener = readiness::watch(stdio, Interest::READABLE).map_err(ServeError::Stdio)?;
    if in_machine {
        signal_ready().map_err(ServeError::Ready)?;
    }
    let service = |connection| podhull_protocol::create_agent(Arc::new(Service::new(pod.clone(), connection)));
    tokio::select! {
        error = connection::serve(calls, service) => Err(ServeError::Calls(error)),
        stopped = streams.accept_from(listener) => stopped.map_err(ServeError::Stdio),
    }
}

/// The connection request is the signal; the host refuses it, and that refusal is nobody's business.
fn signal_ready() -> io::Result<()> {
    let fd = vsock::begin_connect(vsock::HOST, READY_PORT)?;
    let fd = readiness::watch(fd, Interest::WRITABLE)?;
    tokio::spawn(async move {
        let _ = fd.writable().await;
    });
    Ok(())
}
