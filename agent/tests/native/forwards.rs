//! Connections of the host to servers of a pod.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};

use podhull_protocol::ConfigureNetworkRequest;
use podhull_protocol::forward::{CONNECTED, to_bytes};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::harness::{Agent, deadline, new_token};
use crate::names::inside;

/// What is heard when something is said to an address, or none if nobody listens there.
async fn say(agent: &Agent, token: u64, destination: SocketAddr, said: &[u8]) -> Option<Vec<u8>> {
    let mut stream: UnixStream = agent.stream(token).await;
    stream.write_all(&to_bytes(destination)).await.unwrap();
    match stream.read_u8().await {
        Ok(answer) => assert_eq!(answer, CONNECTED),
        Err(_) => return None,
    }
    stream.write_all(said).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).await.unwrap();
    Some(heard)
}

#[tokio::test(flavor = "current_thread")]
async fn streams_reach_who_listens_in_the_pod_and_nobody_else() {
    let agent = Agent::listen(true).await;
    let token = new_token();
    agent.create_pod(|request| request.forwards = token).await.unwrap();
    // With which the loopback interface comes up.
    agent.client.configure_network(deadline(), &ConfigureNetworkRequest::default()).await.unwrap();
    let address = inside(&agent, || {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = server.local_addr().unwrap();
        std::thread::spawn(move || {
            loop {
                let (mut stream, _) = server.accept().unwrap();
                let mut said = Vec::new();
                stream.read_to_end(&mut said).unwrap();
                stream.write_all(&said.repeat(2)).unwrap();
            }
        });
        address
    });
    let address = address.await;
    assert_eq!(say(&agent, token, address, b"word ").await.as_deref(), Some(&b"word word "[..]));
    // `localhost` of the other version of IP; not any address of this host.
    let of = |host: &str| SocketAddr::new(host.parse().unwrap(), address.port());
    assert_eq!(say(&agent, token, of("::1"), b"x").await.as_deref(), Some(&b"xx"[..]));
    assert_eq!(say(&agent, token, of("127.0.0.2"), b"x").await, None);
    let long = vec![7; 300_000];
    assert_eq!(say(&agent, token, address, &long).await, Some(long.repeat(2)));
    for nobody in ["127.0.0.1:9", "[::1]:9", "[fe80::1]:9"] {
        assert_eq!(say(&agent, token, nobody.parse().unwrap(), b"").await, None, "{nobody}");
    }
    // What is no destination, or none yet, holds nobody up.
    let _silent = agent.stream(token).await;
    let mut wrong = agent.stream(token).await;
    wrong.write_all(&[5; 19]).await.unwrap();
    assert!(wrong.read_u8().await.is_err());
    assert_eq!(say(&agent, token, address, b"more").await.as_deref(), Some(&b"moremore"[..]));
}
