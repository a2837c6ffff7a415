//! Standard streams without a terminal.

use podhull_protocol::Stdio;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{
    Agent, SYS_RESOURCE, deadline, lacks_capability, new_token, read_all, set, shell, with, without_namespace,
};

#[tokio::test(flavor = "current_thread")]
async fn a_program_gets_its_streams_and_its_exit_code_comes_back() {
    let agent = Agent::start().await;
    let outcome = agent.run_in(&agent.rootfs(), &shell("cat; echo oops >&2; exit 42"), b"hello").await;
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("hello", "oops\n"));
    assert_eq!((outcome.exit.code, outcome.exit.signal), (42, 0));
}

#[tokio::test(flavor = "current_thread")]
async fn a_gigabyte_arrives_whole() {
    const CHUNK: usize = 1 << 20;
    const CHUNKS: usize = 1 << 10;
    let agent = Agent::start().await;
    let (input, output) = (new_token(), new_token());
    let (mut stdin, mut stdout) = (agent.stream(input).await, agent.stream(output).await);
    let stdio = Stdio { stdin: input, stdout: output, ..Stdio::default() };
    agent.create("a", &agent.rootfs(), &shell("cat"), stdio).await.unwrap();
    agent.start_container("a").await.unwrap();
    let mut chunk: Vec<u8> = (0..CHUNK).map(|at| (at * 7 + at / 251) as u8).collect();
    let expected = chunk.clone();
    let write = async {
        for number in 0..CHUNKS {
            chunk[..8].copy_from_slice(&number.to_le_bytes());
            stdin.write_all(&chunk).await.unwrap();
        }
        stdin.shutdown().await.unwrap();
    };
    let read = async {
        let mut buffer = vec![0; CHUNK];
        for number in 0..CHUNKS {
            stdout.read_exact(&mut buffer).await.unwrap();
            assert!(buffer[..8] == number.to_le_bytes() && buffer[8..] == expected[8..], "chunk {number}");
        }
        assert_eq!(stdout.read(&mut buffer).await.unwrap(), 0);
    };
    tokio::join!(write, read);
    assert_eq!(agent.exit_of("a").await.code, 0);
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn streams_without_a_token_are_dev_null() {
    let agent = Agent::start().await;
    let token = new_token();
    let stderr = agent.stream(token).await;
    let stdio = Stdio { stderr: token, ..Stdio::default() };
    let line = "cat; echo lost; echo $(readlink /proc/$$/fd/0) $(readlink /proc/$$/fd/1) >&2";
    agent.create("a", &agent.rootfs(), &shell(line), stdio).await.unwrap();
    agent.start_container("a").await.unwrap();
    assert_eq!(read_all(stderr).await, "/dev/null /dev/null\n");
    assert_eq!(agent.exit_of("a").await.code, 0);
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_call_waits_for_its_stream() {
    let agent = Agent::start().await;
    let token = new_token();
    let stdio = Stdio { stdout: token, ..Stdio::default() };
    let (rootfs, spec) = (agent.rootfs(), shell("echo early"));
    let mut create = std::pin::pin!(agent.create("a", &rootfs, &spec, stdio));
    let early = tokio::time::timeout(std::time::Duration::from_millis(300), &mut create).await;
    assert!(early.is_err(), "its output would be lost");
    let stdout = agent.stream(token).await;
    create.await.unwrap();
    agent.start_container("a").await.unwrap();
    assert_eq!(read_all(stdout).await, "early\n");
    agent.exit_of("a").await;
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn an_exit_is_told_only_when_the_output_is_out() {
    let agent = Agent::start().await;
    let token = new_token();
    let stdout = agent.stream(token).await;
    let stdio = Stdio { stdout: token, ..Stdio::default() };
    agent.create("a", &agent.rootfs(), &shell("head -c 1000000 /dev/zero"), stdio).await.unwrap();
    agent.start_container("a").await.unwrap();
    let exit = agent.exit_of("a");
    tokio::pin!(exit);
    let early = tokio::time::timeout(std::time::Duration::from_millis(300), &mut exit).await;
    assert!(early.is_err(), "nobody has read yet");
    assert_eq!(read_all(stdout).await.len(), 1_000_000);
    assert_eq!(exit.await.code, 0);
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn processes_that_outlive_the_init_do_not_hold_its_exit() {
    let agent = Agent::start().await;
    let mut spec = shell("sleep 1000 & echo out; exit 4");
    without_namespace(&mut spec, "pid");
    let outcome = agent.run(&spec).await;
    assert_eq!((outcome.stdout.as_str(), outcome.exit.code), ("out\n", 4));
}

#[tokio::test(flavor = "current_thread")]
async fn a_reader_that_goes_away_is_a_closed_pipe() {
    let agent = Agent::start().await;
    let token = new_token();
    let mut stdout = agent.stream(token).await;
    let stdio = Stdio { stdout: token, ..Stdio::default() };
    let mut spec = shell("exec yes");
    without_namespace(&mut spec, "pid");
    agent.create("a", &agent.rootfs(), &spec, stdio).await.unwrap();
    agent.start_container("a").await.unwrap();
    stdout.read_exact(&mut [0; 100]).await.unwrap();
    drop(stdout);
    assert_eq!(agent.exit_of("a").await.signal, 13);
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_that_closes_its_input_stops_the_writer() {
    let agent = Agent::start().await;
    let token = new_token();
    let mut stdin = agent.stream(token).await;
    let stdio = Stdio { stdin: token, ..Stdio::default() };
    agent.create("a", &agent.rootfs(), &shell("exec 0<&-; sleep 1000"), stdio).await.unwrap();
    agent.start_container("a").await.unwrap();
    let flood = async { while stdin.write_all(&[0; 65536]).await.is_ok() {} };
    tokio::time::timeout(crate::harness::DEADLINE, flood).await.expect("the writer is told");
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn an_ordinary_user_can_open_its_streams_again() {
    if lacks_capability(SYS_RESOURCE) {
        return;
    }
    let agent = Agent::start().await;
    let spec = with(
        shell("echo out > /dev/stdout; echo err > /dev/stderr; cat /dev/stdin"),
        [("/process/user", json!({"uid": 1000, "gid": 1000}))],
    );
    let outcome = agent.run_in(&agent.rootfs(), &spec, b"in\n").await;
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("out\nin\n", "err\n"));
}

#[tokio::test(flavor = "current_thread")]
async fn a_token_counts_once() {
    let agent = Agent::start().await;
    let token = new_token();
    let stdio = Stdio { stdout: token, stderr: token, ..Stdio::default() };
    let error = agent.create("a", &agent.rootfs(), &shell("true"), stdio).await.unwrap_err().to_string();
    assert!(error.contains("announced twice"), "{error}");
    // The failed call has let go of it.
    let stdio = Stdio { stdout: token, ..Stdio::default() };
    let stdout = agent.stream(token).await;
    agent.create("a", &agent.rootfs(), &shell("echo again"), stdio).await.unwrap();
    agent.start_container("a").await.unwrap();
    assert_eq!(read_all(stdout).await, "again\n");
    agent.exit_of("a").await;
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn strangers_on_the_stream_port_are_turned_away() {
    let agent = Agent::start().await;
    let mut unclaimed = Vec::new();
    for _ in 0..100 {
        unclaimed.push(agent.stream(new_token()).await);
    }
    // Some wait for a call that may come; those above the bound are closed.
    let mut closed = 0;
    for stream in &mut unclaimed {
        let mut byte = [0];
        let read = tokio::time::timeout(std::time::Duration::from_millis(20), stream.read(&mut byte)).await;
        closed += usize::from(matches!(read, Ok(Ok(0) | Err(_))));
    }
    assert_eq!(closed, 36);
    let mut spec = shell("echo on");
    set(&mut spec, "/hostname", "x");
    let token = new_token();
    let stdio = Stdio { stdout: token, ..Stdio::default() };
    let rootfs = agent.rootfs();
    let mut create = std::pin::pin!(agent.create("a", &rootfs, &spec, stdio));
    // The agent is to know of the token first.
    let _ = tokio::time::timeout(std::time::Duration::from_millis(300), &mut create).await;
    let stdout = agent.stream(token).await;
    create.await.unwrap();
    agent
        .client
        .start_container(deadline(), &podhull_protocol::StartContainerRequest { id: "a".into(), ..Default::default() })
        .await
        .unwrap();
    assert_eq!(read_all(stdout).await, "on\n");
}
