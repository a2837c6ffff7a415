//! Containers with a terminal.

use podhull_protocol::Stdio;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::harness::{Agent, DEADLINE, SYS_RESOURCE, lacks_capability, new_token, set, shell, with, without_namespace};

fn on_terminal(line: &str) -> Value {
    with(shell(line), [("/process/terminal", json!(true))])
}

async fn start(agent: &Agent, spec: &Value, rows: u32, columns: u32) -> UnixStream {
    let token = new_token();
    let stream = agent.stream(token).await;
    let stdio = Stdio { terminal: true, stdout: token, rows, columns, ..Stdio::default() };
    agent.create("a", &agent.rootfs(), spec, stdio).await.unwrap();
    agent.start_container("a").await.unwrap();
    stream
}

/// Reads until the text has come.
async fn expect(stream: &mut UnixStream, text: &str) -> String {
    let mut seen = String::new();
    let mut buffer = [0; 4096];
    while !seen.contains(text) {
        let read = tokio::time::timeout(DEADLINE, stream.read(&mut buffer)).await;
        let count = read.unwrap_or_else(|_| panic!("no {text:?} in {seen:?}")).unwrap();
        assert!(count > 0, "no {text:?} in {seen:?}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    seen
}

#[tokio::test(flavor = "current_thread")]
async fn the_terminal_is_the_containers_own_and_its_console() {
    let agent = Agent::start().await;
    let spec = on_terminal(
        "tty; stat -c '%U %a' /dev/pts/0; stty size; echo direct > /dev/console; echo > /dev/tty; ls -l /proc/self/fd/2",
    );
    let mut stream = start(&agent, &spec, 30, 110).await;
    let output = expect(&mut stream, "fd/2").await;
    assert!(output.starts_with("/dev/pts/0\r\nroot 620\r\n30 110\r\ndirect\r\n"), "{output}");
    assert_eq!(agent.exit_of("a").await.code, 0);
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn the_size_of_the_specification_counts_where_the_call_has_none() {
    let agent = Agent::start().await;
    let spec = with(on_terminal("stty size"), [("/process/consoleSize", json!({"height": 10, "width": 110}))]);
    let mut stream = start(&agent, &spec, 0, 0).await;
    expect(&mut stream, "10 110\r\n").await;
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_new_window_size_is_told_to_the_program() {
    let agent = Agent::start().await;
    let spec = on_terminal("trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 0.01; done");
    let mut stream = start(&agent, &spec, 24, 80).await;
    expect(&mut stream, "ready").await;
    agent.resize("a", 50, 132).await;
    expect(&mut stream, "50 132").await;
    assert_eq!(agent.exit_of("a").await.code, 0);
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn keys_are_line_discipline_and_control_c_interrupts() {
    let agent = Agent::start().await;
    let spec = on_terminal(
        "trap 'echo interrupted; exit 9' INT; echo ready; read line; echo \"got $line\"; while :; do sleep 0.01; done",
    );
    let mut stream = start(&agent, &spec, 24, 80).await;
    expect(&mut stream, "ready").await;
    stream.write_all(b"hello\n").await.unwrap();
    expect(&mut stream, "got hello").await;
    stream.write_all(b"\x03").await.unwrap();
    expect(&mut stream, "interrupted").await;
    assert_eq!(agent.exit_of("a").await.code, 9);
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_stream_closed_both_ways_hangs_up() {
    let agent = Agent::start().await;
    let mut spec = on_terminal("echo ready; exec sleep 1000");
    without_namespace(&mut spec, "pid");
    let mut stream = start(&agent, &spec, 24, 80).await;
    expect(&mut stream, "ready").await;
    drop(stream);
    assert_eq!(agent.exit_of("a").await.signal, 1);
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn the_end_of_input_alone_does_not_hang_up() {
    let agent = Agent::start().await;
    let spec = on_terminal("echo ready; sleep 0.3; echo still here");
    let mut stream = start(&agent, &spec, 24, 80).await;
    stream.shutdown().await.unwrap();
    expect(&mut stream, "still here").await;
    assert_eq!(agent.exit_of("a").await.code, 0);
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_terminal_belongs_to_the_user_also_in_a_user_namespace() {
    if lacks_capability(SYS_RESOURCE) {
        return;
    }
    let agent = Agent::start().await;
    let spec = with(
        on_terminal("tty; stat -c %u /dev/pts/0; echo x > /dev/tty"),
        [("/process/user", json!({"uid": 1000, "gid": 1000}))],
    );
    let mut stream = start(&agent, &spec, 24, 80).await;
    expect(&mut stream, "/dev/pts/0\r\n1000\r\nx\r\n").await;
    agent.exit_of("a").await;
    agent.delete("a").await;
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    let mut spec = on_terminal("tty; stat -c %u /dev/pts/0; echo x > /dev/console");
    set(&mut spec, "/linux/namespaces/-", json!({"type": "user"}));
    set(&mut spec, "/linux/uidMappings", mapping.clone());
    set(&mut spec, "/linux/gidMappings", mapping);
    let mut stream = start(&agent, &spec, 24, 80).await;
    expect(&mut stream, "/dev/pts/0\r\n0\r\nx\r\n").await;
    agent.exit_of("a").await;
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn call_and_specification_must_agree_on_the_terminal() {
    let agent = Agent::start().await;
    let (_, message) = agent.refusal(&on_terminal("true")).await;
    assert!(message.contains("process.terminal is true, but the call says false"), "{message}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_program_that_is_missing_is_told_with_a_terminal_too() {
    let agent = Agent::start().await;
    let spec = with(on_terminal(""), [("/process/args", json!(["missing"]))]);
    for _ in 0..20 {
        let token = new_token();
        let stdio = Stdio { terminal: true, stdout: token, ..Stdio::default() };
        let error = agent.create("a", &agent.rootfs(), &spec, stdio).await.unwrap_err().to_string();
        assert!(error.contains("executable file not found in $PATH"), "{error}");
    }
}
