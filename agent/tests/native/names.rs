//! Names that are asked for in a pod, and answered by the host.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::time::Duration;

use podhull_protocol::ConfigureNetworkRequest;
use podhull_protocol::names::{HEADER_BYTES, Header, frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use ttrpc::Code;

use crate::harness::{Agent, deadline, new_token, refused};

const RESOLVER: (Ipv4Addr, u16) = (Ipv4Addr::new(127, 0, 0, 11), 53);

/// Answers over UDP with the question, over TCP with the question twice, and some not at all.
async fn answer(mut stream: UnixStream) {
    loop {
        let mut header = [0; HEADER_BYTES];
        if stream.read_exact(&mut header).await.is_err() {
            return;
        }
        let header = Header::from_bytes(header);
        let mut question = vec![0; usize::from(header.length)];
        stream.read_exact(&mut question).await.unwrap();
        if question != b"silent" {
            let answer = question.repeat(1 + usize::from(header.whole));
            stream.write_all(&frame(header.number, header.whole, &answer).unwrap()).await.unwrap();
        }
    }
}

/// In the network of an agent.
pub async fn inside<T: Send + 'static>(agent: &Agent, work: impl FnOnce() -> T + Send + 'static) -> T {
    let namespace = std::fs::File::open(format!("/proc/{}/ns/net", agent.pid())).unwrap();
    let there = move || {
        let kind = rustix::thread::LinkNameSpaceType::Network;
        rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), Some(kind)).unwrap();
        work()
    };
    // A thread of its own, for it does not come back.
    let thread = std::thread::spawn(there);
    while !thread.is_finished() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    thread.join().unwrap()
}

fn ask_whole(stream: &mut TcpStream, question: &[u8]) -> std::io::Result<Vec<u8>> {
    stream.write_all(&[&(question.len() as u16).to_be_bytes(), question].concat())?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

#[tokio::test(flavor = "current_thread")]
async fn names_are_asked_of_the_host_and_the_port_stays_free() {
    let agent = Agent::listen(true).await;
    let token = new_token();
    agent.create_pod(|request| request.names = token).await.unwrap();
    tokio::spawn(answer(agent.stream(token).await));
    let network = ConfigureNetworkRequest { resolver: RESOLVER.0.octets().into(), ..Default::default() };
    // The second time there is nothing to do.
    for _ in 0..2 {
        agent.client.configure_network(deadline(), &network).await.unwrap();
    }
    inside(&agent, || {
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        udp.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        udp.send_to(b"silent", RESOLVER).unwrap();
        for question in [&b"a question"[..], &[7; 5000]] {
            udp.send_to(question, RESOLVER).unwrap();
            let mut answer = [0; 9000];
            let (length, from) = udp.recv_from(&mut answer).unwrap();
            assert_eq!((&answer[..length], from), (question, RESOLVER.into()));
        }
        let mut tcp = TcpStream::connect(RESOLVER).unwrap();
        for _ in 0..2 {
            assert_eq!(ask_whole(&mut tcp, b"whole").unwrap(), b"wholewhole");
        }
        // A server of names of a container's own.
        let server = UdpSocket::bind("0.0.0.0:53").unwrap();
        let _listener = std::net::TcpListener::bind("0.0.0.0:53").unwrap();
        udp.send_to(b"to the server", "127.0.0.1:53").unwrap();
        let mut question = [0; 64];
        assert_eq!(server.recv(&mut question).unwrap(), 13);
        // When too many wait the next is told so, where it can be.
        let refused = (0..100).find_map(|_| {
            for _ in 0..100 {
                udp.send_to(b"silent", RESOLVER).unwrap();
            }
            ask_whole(&mut TcpStream::connect(RESOLVER).unwrap(), b"x").err()
        });
        assert_eq!(refused.unwrap().kind(), std::io::ErrorKind::UnexpectedEof);
    })
    .await;
}

#[tokio::test(flavor = "current_thread")]
async fn without_a_stream_there_is_nobody_to_ask() {
    let agent = Agent::listen(true).await;
    agent.create_pod(|_| {}).await.unwrap();
    let network = |resolver: &[u8]| ConfigureNetworkRequest { resolver: resolver.into(), ..Default::default() };
    let (code, text) = refused(agent.client.configure_network(deadline(), &network(&[127, 0, 0, 11])).await);
    assert_eq!(code, Code::INTERNAL);
    assert!(text.contains("no stream to ask the resolver at 127.0.0.11 over"), "{text}");
    let (code, text) = refused(agent.client.configure_network(deadline(), &network(&[10, 0, 0, 1])).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("resolver [10, 0, 0, 1]"), "{text}");
}
