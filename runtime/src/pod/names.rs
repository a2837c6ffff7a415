//! Names that a pod asks for on the host. Docker's resolver answers at a loopback address of the container's network namespace,
//! which is the shadow's too and nobody else's: the agent takes the pod's questions and sends them here, and this asks.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use podhull_protocol::names::{HEADER_BYTES, Header, frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::OwnedReadHalf;
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::network::RESOLVER;
use crate::stdio::{self, StdioError};

/// The port of DNS.
const PORT: u16 = 53;

/// Questions that are asked at once. A guest that has more of them is to wait.
const MAX_QUESTIONS: usize = 64;

/// How long an answer is waited for: the resolver may ask others, each of them several times.
const PATIENCE: Duration = Duration::from_secs(30);

/// The stream of a pod's questions.
pub struct Names {
    token: u64,
    stream: Option<oneshot::Receiver<io::Result<UnixStream>>>,
}

impl Names {
    /// One that is not connected yet.
    pub fn new() -> Result<Self, StdioError> {
        Ok(Self { token: stdio::token()?, stream: None })
    }

    /// What the agent is told.
    pub fn token(&self) -> u64 {
        self.token
    }

    /// Begins to connect it to the agent behind the socket in a pod's directory.
    pub fn begin(&mut self, pod: BorrowedFd<'_>) -> Result<(), StdioError> {
        self.stream = Some(stdio::begin_connect("names", pod, self.token)?);
        Ok(())
    }

    /// Answers from when it is connected until it breaks, or this process ends.
    pub async fn serve(self) -> Result<(), StdioError> {
        let failed = |error| StdioError::Connect("names", error);
        let Some(stream) = self.stream else { return Ok(()) };
        let stream = stream.await.map_err(|_| failed(io::ErrorKind::BrokenPipe.into()))?.map_err(failed)?;
        stream.set_nonblocking(true).map_err(failed)?;
        let stream = tokio::net::UnixStream::from_std(stream).map_err(failed)?;
        tokio::spawn(answer(stream, SocketAddrV4::new(RESOLVER, PORT)));
        Ok(())
    }
}

/// Has a resolver answer what comes over a stream.
async fn answer(stream: tokio::net::UnixStream, resolver: SocketAddrV4) -> io::Result<()> {
    let (mut questions, mut back) = stream.into_split();
    let (sender, mut answers) = mpsc::channel::<Vec<u8>>(1);
    let mut asked = JoinSet::new();
    let send = async {
        while let Some(answer) = answers.recv().await {
            back.write_all(&answer).await?;
        }
        Ok(())
    };
    let receive = async {
        loop {
            let (header, question) = read(&mut questions).await?;
            while asked.len() >= MAX_QUESTIONS {
                asked.join_next().await;
            }
            let sender = sender.clone();
            asked.spawn(async move {
                // The resolver may be silent, or gone: then there is no answer, as there would be none without us.
                let answered = tokio::time::timeout(PATIENCE, ask(resolver, header.whole, &question)).await;
                if let Ok(Ok(answer)) = answered
                    && let Some(frame) = frame(header.number, header.whole, &answer)
                {
                    let _ = sender.send(frame).await;
                }
            });
            while asked.try_join_next().is_some() {}
        }
    };
    tokio::select! {
        sent = send => sent,
        received = receive => received,
    }
}

async fn read(stream: &mut OwnedReadHalf) -> io::Result<(Header, Vec<u8>)> {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).await?;
    let header = Header::from_bytes(header);
    let mut question = vec![0; usize::from(header.length)];
    stream.read_exact(&mut question).await?;
    Ok((header, question))
}

async fn ask(resolver: SocketAddrV4, whole: bool, question: &[u8]) -> io::Result<Vec<u8>> {
    if whole {
        let mut stream = TcpStream::connect(resolver).await?;
        let length = u16::try_from(question.len()).map_err(io::Error::other)?;
        stream.write_all(&[&length.to_be_bytes(), question].concat()).await?;
        let mut answer = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut answer).await?;
        return Ok(answer);
    }
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    socket.connect(resolver).await?;
    socket.send(question).await?;
    let mut answer = vec![0; usize::from(u16::MAX)];
    let length = socket.recv(&mut answer).await?;
    answer.truncate(length);
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers every question with the word and itself.
    async fn resolver() -> SocketAddrV4 {
        let tcp = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let std::net::SocketAddr::V4(address) = tcp.local_addr().unwrap() else { unreachable!() };
        let udp = UdpSocket::bind(address).await.unwrap();
        tokio::spawn(async move {
            let mut question = [0; 512];
            loop {
                let (length, from) = udp.recv_from(&mut question).await.unwrap();
                if &question[..length] != b"silent" {
                    udp.send_to(&[b"udp ", &question[..length]].concat(), from).await.unwrap();
                }
            }
        });
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                let mut question = vec![0; usize::from(stream.read_u16().await.unwrap())];
                stream.read_exact(&mut question).await.unwrap();
                let answer = [b"tcp ", &question[..]].concat();
                stream.write_u16(answer.len() as u16).await.unwrap();
                stream.write_all(&answer).await.unwrap();
            }
        });
        address
    }

    #[tokio::test]
    async fn each_question_has_its_answer_and_silence_holds_nobody_up() {
        let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
        let server = tokio::spawn(answer(theirs, resolver().await));
        let (mut answers, mut questions) = ours.into_split();
        for (number, whole, question) in
            [(1, false, &b"silent"[..]), (2, false, b"a"), (3, true, b"bc"), (4, true, b"")]
        {
            questions.write_all(&frame(number, whole, question).unwrap()).await.unwrap();
        }
        let mut found = Vec::new();
        for _ in 0..3 {
            let (header, answer) = read(&mut answers).await.unwrap();
            found.push((header.number, header.whole, String::from_utf8(answer).unwrap()));
        }
        found.sort();
        assert_eq!(found, [(2, false, "udp a".into()), (3, true, "tcp bc".into()), (4, true, "tcp ".into())]);
        drop((answers, questions));
        assert!(server.await.unwrap().is_err());
    }
}
