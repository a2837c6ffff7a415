//! The process of a pod's shim.

use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use ttrpc::r#async::transport;

use super::arguments::Arguments;
use super::connections::Connections;
use super::container::Surroundings;
use super::events::Publisher;
use super::service::Tasks;
use super::start::{EVENTS, LISTENER_FD};
use super::timed::Durations;
use super::{fifo, state_root};
use crate::descriptors::raise_limit;
use crate::log::{Format, Log};

/// Name of the process.
const NAME: &std::ffi::CStr = c"podhull-shim";

/// How many descriptors this process may have open, if it may: some five for each program that is executed.
const DESCRIPTORS: u64 = 16384;

/// How long the last answers and events may take.
const LAST: Duration = Duration::from_secs(3);

/// Why it cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// `start` gives it one.
    #[error("no socket at descriptor 3: containerd starts this program by itself; see docs/containerd.md")]
    NoSocket,
    /// No event loop.
    #[error("cannot set up event handling: {0}")]
    Events(#[source] io::Error),
    /// The server.
    #[error("cannot serve: {0}")]
    Server(#[source] ttrpc::Error),
}

/// Serves until containerd says that there is nothing more to do.
pub fn serve(arguments: &Arguments) -> Result<(), ServeError> {
    // It was started as /proc/self/exe, which `ps` would show as "exe". A name too many is no reason to fail.
    let _ = rustix::thread::set_name(NAME);
    let listener = inherited()?;
    let socket = listener.local_addr().ok().and_then(|address| address.as_pathname().map(PathBuf::from));
    let log = match fifo::log() {
        Some(file) => Log::to(file, Format::Text, arguments.debug),
        None => Log::stderr(),
    };
    end_by_panics();
    raise_limit(DESCRIPTORS);
    let events = std::env::var(EVENTS).unwrap_or_default();
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().map_err(ServeError::Events)?;
    let served = runtime.block_on(async {
        let (publisher, sender) = Publisher::new(&events, &arguments.namespace);
        let sender = tokio::spawn(sender.run());
        let over = Arc::new(Notify::new());
        let surroundings = Surroundings {
            namespace: arguments.namespace.clone(),
            root: state_root(&arguments.namespace),
            class: arguments.class.clone(),
            log,
            debug: arguments.debug,
            publisher,
            durations: Durations::new(),
        };
        let tasks = Tasks::new(Arc::new(surroundings), over.clone());
        let (connections, open) = Connections::of(listener).map_err(ServeError::Events)?;
        let server = ttrpc::r#async::Server::new().add_listener(transport::Listener::new(connections));
        let mut server = server.register_service(tasks.services());
        server.start().await.map_err(ServeError::Server)?;
        over.notified().await;
        // Nobody finds it from here on.
        if let Some(socket) = &socket {
            let _ = std::fs::remove_file(socket);
        }
        // The last answer is still to be written; and a client in Go that finds a connection closed with the answer in it may say that it
        // was closed, and no more. Who has its answer closes the connection.
        let _ = tokio::time::timeout(LAST, open.closed()).await;
        let _ = tokio::time::timeout(LAST, server.shutdown()).await;
        drop((server, tasks));
        // It ends with the last that has a Publisher: also what still gives back the room of a container in another's machine.
        let _ = tokio::time::timeout(LAST, sender).await;
        Ok(())
    });
    runtime.shutdown_background();
    served
}

/// A panic anywhere ends this process, and says why: containerd then sees its connection closed and removes the containers, and waits for
/// no answer that will never come.
fn end_by_panics() {
    std::panic::set_hook(Box::new(|panic| {
        if let Some(file) = fifo::log() {
            Log::to(file, Format::Text, false).error(&panic.to_string());
        }
        std::process::abort();
    }));
}

/// The listener that this process was started with.
fn inherited() -> Result<UnixListener, ServeError> {
    // SAFETY: who starts this process put the socket there, and nothing else has opened anything yet; fcntl tells if it is not
    // open.
    let listener = unsafe {
        if libc::fcntl(LISTENER_FD, libc::F_SETFD, libc::FD_CLOEXEC) != 0 {
            return Err(ServeError::NoSocket);
        }
        UnixListener::from_raw_fd(LISTENER_FD)
    };
    listener.local_addr().map_err(|_| ServeError::NoSocket)?;
    Ok(listener)
}
