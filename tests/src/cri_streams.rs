//! Streams of programs and of ports, by the WebSocket that containerd serves for kubelet: its protocol `v4.channel.k8s.io`.

use std::net::TcpStream;
use std::time::Duration;

use tungstenite::client::IntoClientRequest;
use tungstenite::http::HeaderValue;
use tungstenite::{Message, WebSocket};

use crate::Outcome;
use crate::netns::Netns;
use crate::run::DEADLINE;

/// Number of a channel: the first byte of each message.
pub const STDIN: u8 = 0;
/// What is read.
pub const STDOUT: u8 = 1;
/// What is complained of.
pub const STDERR: u8 = 2;
/// How it ended, as a document.
pub const STATUS: u8 = 3;
/// Size of the terminal, as a document.
pub const RESIZE: u8 = 4;

/// An open connection.
pub struct Streams {
    socket: WebSocket<TcpStream>,
    /// What came on each channel.
    received: [Vec<u8>; 5],
    ended: bool,
}

impl Streams {
    /// Connects to an address that containerd has answered with, from where it listens; `query` goes to its end.
    pub fn open(node: &Netns, url: &str, query: &str) -> Outcome<Self> {
        let address = url.strip_prefix("http://").ok_or("not an address of HTTP")?;
        let host = address.split('/').next().unwrap_or_default().to_owned();
        let stream = node.within(move || TcpStream::connect(host))??;
        stream.set_read_timeout(Some(DEADLINE))?;
        let mut request = format!("ws://{address}{query}").into_client_request()?;
        let protocol = HeaderValue::from_static("v4.channel.k8s.io");
        request.headers_mut().insert("Sec-WebSocket-Protocol", protocol);
        let (socket, _) = tungstenite::client(request, stream).map_err(|error| error.to_string())?;
        Ok(Self { socket, received: Default::default(), ended: false })
    }

    /// Sends bytes on a channel.
    pub fn send(&mut self, channel: u8, bytes: &[u8]) -> Outcome {
        Ok(self.socket.send(Message::binary([&[channel], bytes].concat()))?)
    }

    /// Receives until `enough` says so, or all have come to their end; returns what came on a channel so far.
    pub fn receive(&mut self, channel: u8, enough: impl Fn(&[u8]) -> bool) -> Outcome<Vec<u8>> {
        let place = usize::from(channel);
        while !self.ended && !enough(&self.received[place]) {
            match self.socket.read() {
                Ok(Message::Binary(bytes)) => {
                    let Some((channel, bytes)) = bytes.split_first() else { continue };
                    let received = self.received.get_mut(usize::from(*channel)).ok_or("no such channel")?;
                    received.extend_from_slice(bytes);
                }
                Ok(Message::Close(_)) | Err(tungstenite::Error::ConnectionClosed) => self.ended = true,
                Ok(_) => {}
                Err(error) => return Err(format!("{error}; received {:?}", self.received).into()),
            }
        }
        Ok(self.received[place].clone())
    }

    /// Receives text until it contains some.
    pub fn expect(&mut self, channel: u8, text: &str) -> Outcome<String> {
        let found = |bytes: &[u8]| String::from_utf8_lossy(bytes).contains(text);
        let received = self.receive(channel, found)?;
        let received = String::from_utf8_lossy(&received).into_owned();
        match received.contains(text) {
            true => Ok(received),
            false => Err(format!("no {text:?} in {received:?}").into()),
        }
    }

    /// All that comes on a channel to its end.
    pub fn rest(&mut self, channel: u8) -> Outcome<String> {
        Ok(String::from_utf8_lossy(&self.receive(channel, |_| false)?).into_owned())
    }

    /// Ends it from this side.
    pub fn close(mut self) {
        let _ = self.socket.get_ref().set_read_timeout(Some(Duration::from_secs(1)));
        let _ = self.socket.close(None);
        let _ = self.socket.flush();
    }
}
