//! A connection of the host's, served by itself, so that what goes on for as long as it stands ends with it: `ttrpc` does not
//! tell a stream's handler that its peer is gone.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use ttrpc::r#async::transport::{Listener, Socket};
use ttrpc::r#async::{Server, Service};

/// Whether a connection stands.
#[derive(Clone)]
pub struct Alive(watch::Receiver<()>);

impl Alive {
    /// Waits for something; none if the connection ends before.
    pub async fn meanwhile<T>(&mut self, event: impl Future<Output = Option<T>>) -> Option<T> {
        tokio::select! {
            biased;
            event = event => event,
            () = self.ended() => None,
        }
    }

    async fn ended(&mut self) {
        // Nothing is ever sent: its only change is its end.
        while self.0.changed().await.is_ok() {}
    }
}

/// Serves the calls of each connection with a service of its own, for as long as new ones can be taken.
pub async fn serve(mut listener: Listener, service: impl Fn(Alive) -> HashMap<String, Service>) -> io::Error {
    loop {
        match std::future::poll_fn(|context| Pin::new(&mut listener).poll_next(context)).await {
            Some(Ok(socket)) => {
                let (sender, receiver) = watch::channel(());
                let alive = Alive(receiver);
                let listener = Listener::new(Once(Some(Counted { socket, _alive: sender })));
                let server = Server::new().add_listener(listener).register_service(service(alive.clone()));
                tokio::spawn(serve_one(server, alive));
            }
            // The peer was gone before it was accepted.
            Some(Err(error)) if matches!(error.kind(), io::ErrorKind::ConnectionAborted) => {}
            Some(Err(error)) => return error,
            None => return io::ErrorKind::NotConnected.into(),
        }
    }
}

async fn serve_one(mut server: Server, mut alive: Alive) {
    // It has a listener, and that is all it can lack.
    if server.start().await.is_ok() {
        // The connection ends with its server.
        alive.ended().await;
    }
}

/// The one connection of a server.
struct Once(Option<Counted>);

impl Stream for Once {
    type Item = io::Result<Counted>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Ready(self.0.take().map(Ok))
    }
}

/// A socket whose end is seen.
struct Counted {
    socket: Socket,
    _alive: watch::Sender<()>,
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(context, to)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use podhull_protocol::{Agent, AgentClient, Event, EventsRequest};
    use tokio::net::{UnixListener, UnixStream};
    use tokio::sync::mpsc;
    use ttrpc::r#async::{Client, ServerStreamSender, TtrpcContext};
    use ttrpc::context;

    use super::*;

    /// Streams nothing, and tells when a stream begins and ends.
    struct Silent(Alive, mpsc::UnboundedSender<bool>);

    #[async_trait::async_trait]
    impl Agent for Silent {
        async fn events(
            &self,
            _: &TtrpcContext,
            _: EventsRequest,
            _stream: ServerStreamSender<Event>,
        ) -> ttrpc::Result<()> {
            self.1.send(true).unwrap();
            let nothing: Option<()> = self.0.clone().meanwhile(std::future::pending()).await;
            assert!(nothing.is_none());
            self.1.send(false).unwrap();
            Ok(())
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_stream_ends_with_its_connection_and_with_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = Listener::from(UnixListener::bind(&path).unwrap());
        let (sender, mut streams) = mpsc::unbounded_channel();
        tokio::spawn(serve(listener, move |alive| {
            podhull_protocol::create_agent(Arc::new(Silent(alive, sender.clone())))
        }));
        let connect = async || {
            let stream = UnixStream::connect(&path).await.unwrap();
            AgentClient::new(Client::new(Socket::new(stream)))
        };
        let (one, other) = (connect().await, connect().await);
        let begun = one.events(context::Context::default(), &EventsRequest::default()).await.unwrap();
        let kept = other.events(context::Context::default(), &EventsRequest::default()).await.unwrap();
        let mut next = async || tokio::time::timeout(Duration::from_secs(30), streams.recv()).await.unwrap();
        assert_eq!((next().await, next().await), (Some(true), Some(true)));
        drop((begun, one));
        assert_eq!(next().await, Some(false));
        drop((kept, other));
        assert_eq!(next().await, Some(false));
    }
}
