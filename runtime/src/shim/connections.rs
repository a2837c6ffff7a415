//! The connections of a shim's clients, and when there are none any more.

use std::convert::Infallible;
use std::io;
use std::os::unix::net::UnixListener as Listener;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

/// What the connections of a listener hold; nothing is ever sent.
type Held = mpsc::Sender<Infallible>;

/// Connections as they come, until [`Open`] is waited for.
pub struct Connections {
    listener: UnixListener,
    held: mpsc::WeakSender<Infallible>,
}

/// All of those that are open.
pub struct Open {
    held: Held,
    closed: mpsc::Receiver<Infallible>,
}

impl Connections {
    /// Those that come to a listener.
    pub fn of(listener: Listener) -> io::Result<(Self, Open)> {
        listener.set_nonblocking(true)?;
        let (held, closed) = mpsc::channel(1);
        Ok((Self { listener: UnixListener::from_std(listener)?, held: held.downgrade() }, Open { held, closed }))
    }
}

impl Open {
    /// Waits until all clients have closed theirs; none comes any more.
    pub async fn closed(mut self) {
        drop(self.held);
        let _ = self.closed.recv().await;
    }
}

impl Stream for Connections {
    type Item = io::Result<Connection>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let accepted = self.listener.poll_accept(context);
        // One that comes too late is an error: the server takes no end of them.
        let connection = |stream| match self.held.upgrade() {
            Some(held) => Ok(Connection { stream, _held: held }),
            None => Err(io::ErrorKind::ConnectionAborted.into()),
        };
        accepted.map(|accepted| Some(accepted.and_then(|(stream, _)| connection(stream))))
    }
}

/// One of them.
pub struct Connection {
    stream: UnixStream,
    _held: Held,
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream as Client;
    use std::time::Duration;
    use tokio::io::AsyncReadExt;
    use tokio::time::timeout;

    #[tokio::test]
    async fn the_last_that_is_closed_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let (mut connections, open) = Connections::of(Listener::bind(&path).unwrap()).unwrap();
        let mut clients: Vec<Client> = (0..2).map(|_| Client::connect(&path).unwrap()).collect();
        let mut served = tokio::task::JoinSet::new();
        for _ in 0..2 {
            let next = std::future::poll_fn(|context| Pin::new(&mut connections).poll_next(context)).await;
            let mut connection = next.unwrap().unwrap();
            served.spawn(async move { connection.read_to_end(&mut Vec::new()).await });
        }
        let mut closed = Box::pin(open.closed());
        let wait = Duration::from_millis(50);
        for _ in 0..2 {
            assert!(timeout(wait, &mut closed).await.is_err());
            clients.pop();
        }
        timeout(Duration::from_secs(60), closed).await.unwrap();
        let _late = Client::connect(&path).unwrap();
        let next = std::future::poll_fn(|context| Pin::new(&mut connections).poll_next(context)).await;
        assert!(next.unwrap().is_err());
    }
}
