//! Connections that programs of the host make in a container's network namespace, which is the shadow's too, to an address of its
//! own: forwarded ports arrive at `localhost` there. The servers are in the guest; each connection goes there on a stream of its
//! own, and on from the agent.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use podhull_protocol::forward::{CONNECTED, to_bytes};
use rustix::net::sockopt::set_socket_linger;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;

use crate::log::Log;
use crate::network::{Local, Namespace};
use crate::stdio;

/// Connections of one pod at a time; more wait.
const MAX_CONNECTIONS: usize = 256;

/// How long the guest may take to connect one.
const DEADLINE: Duration = Duration::from_secs(30);

/// Where connections arrive, and how the guest is reached.
pub struct Forwards {
    token: u64,
    pod: OwnedFd,
    listeners: Mutex<Vec<std::net::TcpListener>>,
    begun: Notify,
    room: Arc<Semaphore>,
}

impl Forwards {
    /// Takes connections in the network namespace of this process, which must have its privileges yet. `pod` is the pod's
    /// directory. What comes beside, if anything, is to be held for as long as connections are to be taken. A pod does without if
    /// the kernel cannot do this.
    pub fn open(namespace: Namespace, pod: BorrowedFd<'_>, log: &Log) -> Option<(Arc<Self>, Option<OwnedFd>)> {
        let open = || {
            let Local { listeners, rule } = Local::open(namespace)?;
            let forwards = Self {
                token: stdio::token().map_err(io::Error::other)?,
                pod: pod.try_clone_to_owned()?,
                listeners: Mutex::new(listeners),
                begun: Notify::new(),
                room: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            };
            Ok((Arc::new(forwards), rule))
        };
        let warn = |error: &io::Error| {
            log.warning(&format!(
                "connections to localhost in the container's network namespace do not reach the container: {error}; is \
                 nftables with nft_tproxy and nft_socket in the kernel?"
            ));
        };
        open().inspect_err(warn).ok()
    }

    /// What the agent is told.
    pub fn token(&self) -> u64 {
        self.token
    }

    /// The pod is made, and its agent knows the token. Until then connections wait.
    pub fn begin(&self) {
        self.begun.notify_one();
    }

    /// Serves for as long as it is polled.
    pub async fn serve(self: Arc<Self>) -> Infallible {
        self.begun.notified().await;
        let listeners = std::mem::take(&mut *self.listeners.lock().unwrap_or_else(PoisonError::into_inner));
        let mut serving = JoinSet::new();
        for listener in listeners.into_iter().filter_map(|listener| TcpListener::from_std(listener).ok()) {
            serving.spawn(self.clone().accept(listener));
        }
        while serving.join_next().await.is_some() {}
        std::future::pending().await
    }

    /// Takes connections until there can be no more.
    async fn accept(self: Arc<Self>, listener: TcpListener) {
        let mut connections = JoinSet::new();
        while let Ok(room) = self.room.clone().acquire_owned().await {
            while connections.try_join_next().is_some() {}
            match listener.accept().await {
                Ok((client, _)) => {
                    let forwards = self.clone();
                    connections.spawn(async move {
                        let _room = room;
                        forwards.forward(client).await;
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                // Too many files are open: it gets better when one of ours is closed, and else never.
                Err(_) if connections.join_next().await.is_some() => {}
                Err(_) => return,
            }
        }
    }

    /// A connection to its end. One that nobody takes in the guest, or that breaks, is reset.
    async fn forward(&self, mut client: TcpStream) {
        let done = async {
            let destination = client.local_addr()?;
            client.set_nodelay(true)?;
            let mut stream = tokio::time::timeout(DEADLINE, self.connect(destination)).await??;
            copy_bidirectional(&mut client, &mut stream).await
        };
        if done.await.is_err() {
            let _ = set_socket_linger(&client, Some(Duration::ZERO));
        }
    }

    /// A stream to who listens in the guest.
    async fn connect(&self, destination: SocketAddr) -> io::Result<UnixStream> {
        let mut stream = stdio::connect_in_loop(self.pod.as_fd(), self.token).await?;
        stream.write_all(&to_bytes(destination)).await?;
        match stream.read_u8().await? {
            CONNECTED => Ok(stream),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}
