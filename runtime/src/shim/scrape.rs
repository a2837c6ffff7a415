//! What a pod uses, for who scrapes its socket: HTTP/1.1, one request on each connection, whose path does not matter. The socket is
//! root's, and goes with the pod's directory.

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use crate::inspect;
use crate::state;

/// Name of the socket in the pod's directory.
const SOCKET: &str = "metrics.sock";

/// Longest request that is listened to, in bytes.
const MAX_REQUEST: usize = 8192;

/// How long a client may take to ask, and to take its answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Clients that are served at a time.
const CLIENTS: usize = 4;

/// How long one waits who cannot be let in, for lack of descriptors or memory: it would be tried again at once.
const PAUSE: Duration = Duration::from_secs(1);

/// Serves the pod `id` under a state root, until it is dropped.
pub async fn serve(root: PathBuf, id: String) -> io::Result<()> {
    let listener = listen(&root, &id)?;
    let places = Arc::new(Semaphore::new(CLIENTS));
    loop {
        // Who comes while all are busy waits in the kernel.
        let Ok(place) = places.clone().acquire_owned().await else { return Ok(()) };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let (root, id) = (root.clone(), id.clone());
        tokio::spawn(async move {
            // A client that is gone, or slow, or speaks no HTTP, is its own affair.
            let _ = tokio::time::timeout(PATIENCE * 2, answer(stream, root, id)).await;
            drop(place);
        });
    }
}

/// Nobody but root gets to its directory.
fn listen(root: &Path, id: &str) -> io::Result<UnixListener> {
    let directory = state::open_pod(root, id).map_err(io::Error::other)?;
    // By way of its directory's descriptor: paths of sockets are at most 107 bytes long.
    UnixListener::bind(format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd()))
}

async fn answer(mut stream: UnixStream, root: PathBuf, id: String) -> io::Result<()> {
    let (status, kind, body) = match tokio::time::timeout(PATIENCE, request(&mut stream)).await {
        Ok(Ok(true)) => {
            let look = move || inspect::chosen_under(&root, &id).and_then(|pods| inspect::metrics(&pods));
            match tokio::task::spawn_blocking(look).await? {
                Ok(text) => ("200 OK", "text/plain; version=0.0.4; charset=utf-8", text),
                Err(error) => ("503 Service Unavailable", "text/plain; charset=utf-8", format!("{error}\n")),
            }
        }
        Ok(Ok(false)) => ("405 Method Not Allowed", "text/plain; charset=utf-8", "only GET is answered\n".into()),
        _ => return Ok(()),
    };
    let length = body.len();
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

/// Reads a request up to the end of its head; whether it is one to be answered.
async fn request(stream: &mut UnixStream) -> io::Result<bool> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if head.len() >= MAX_REQUEST || stream.read_buf(&mut head).await? == 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok(head.starts_with(b"GET "))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask(what: &[u8]) -> String {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let served = tokio::spawn(answer(theirs, "/no/such/root".into(), "pod".into()));
        ours.write_all(what).await.unwrap();
        ours.shutdown().await.unwrap();
        let mut said = String::new();
        let _ = ours.read_to_string(&mut said).await;
        let _ = served.await.unwrap();
        said
    }

    #[tokio::test]
    async fn who_asks_is_answered_and_who_speaks_in_tongues_is_not() {
        let said = ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(said.starts_with("HTTP/1.1 503 ") && said.ends_with("see `podhull pods`\n"), "{said}");
        assert!(ask(b"POST / HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 405 "));
        assert_eq!(ask(b"GET / HTTP/1.1\r\n").await, "");
        assert_eq!(ask(&[b'x'; 3 * MAX_REQUEST]).await, "");
    }
}
