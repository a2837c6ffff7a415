//! What is said to the server that nobody should say: it answers with an error that has a code, takes no more memory than it is given, and goes
//! on. Containers are children of the test, without a machine.

mod sandbox;
mod watched;

use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Enum, Message};
use containerd_shim_protos::shim_async::TaskClient;
use rustix::fs::{CWD, FileType, mknodat};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::Context;

use super::super::events::{Publisher, Sender};
use super::super::timed::Durations;
use super::*;
use crate::agent::stand_in;
use crate::calls::{Calls, SHIM};
use crate::log::Log;
use crate::state::{Directory, Status};

/// For what is done at once.
const SOON: Duration = Duration::from_secs(60);

const SERVICE: &str = "containerd.task.v2.Task";

/// Of the only container.
static DELETE: std::sync::LazyLock<DeleteRequest> =
    std::sync::LazyLock::new(|| DeleteRequest { id: "c".into(), ..Default::default() });

/// A server of its own.
struct Shim {
    directory: TempDir,
    tasks: Arc<Tasks>,
    over: Arc<Notify>,
    sender: Sender,
    _server: ttrpc::r#async::Server,
}

impl Shim {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (publisher, sender) = Publisher::new("", "n");
        let surroundings = Surroundings {
            namespace: "n".into(),
            root: directory.path().join("root"),
            class: None,
            log: Log::stderr(),
            debug: false,
            publisher,
            durations: Durations::new(),
        };
        let over = Arc::new(Notify::new());
        let tasks = Tasks::new(Arc::new(surroundings), over.clone());
        let address = format!("unix://{}", directory.path().join("s").display());
        let server = ttrpc::r#async::Server::new().bind(&address).unwrap();
        let mut server = server.register_service(tasks.services());
        server.start().await.unwrap();
        Self { directory, tasks, over, sender, _server: server }
    }

    async fn connect(&self) -> UnixStream {
        UnixStream::connect(self.directory.path().join("s")).await.unwrap()
    }

    async fn client(&self) -> TaskClient {
        TaskClient::new(ttrpc::r#async::Client::new(Socket::new(self.connect().await)))
    }

    /// That it still answers.
    async fn check(&self) {
        let client = self.client().await;
        let answer = timeout(SOON, client.connect(Context::default(), &ConnectRequest::new())).await.unwrap().unwrap();
        assert_eq!((answer.shim_pid, answer.task_pid), (std::process::id(), 0));
    }

    /// A container that is a child of this process.
    fn container(&self, id: &str) -> (Arc<Container>, Child) {
        let child = sleep();
        let container = Container::of_child(self.tasks.surroundings.clone(), id, child.id().cast_signed());
        let place = Place::default();
        let _ = place.container.set(container.clone());
        self.tasks.containers().insert(id.into(), Arc::new(place));
        (container, child)
    }
}

fn without_terminal() -> String {
    let mut config: serde_json::Value = serde_json::from_str(crate::spec::document::TEXT).unwrap();
    config["process"]["terminal"] = false.into();
    config.to_string()
}

fn sleep() -> Child {
    Command::new("sleep").arg("1000").spawn().unwrap()
}

/// The same and its number; who it is given to waits for its end.
fn sleeping() -> (Child, i32) {
    let child = sleep();
    let pid = child.id().cast_signed();
    (child, pid)
}

fn frame(length: usize, stream: u32, kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(length).unwrap();
    [&length.to_be_bytes()[..], &stream.to_be_bytes(), &[kind, 0], payload].concat()
}

fn request(
    stream: u32,
    service: &str,
    method: &str,
    payload: &dyn containerd_shim_protos::protobuf::MessageDyn,
) -> Vec<u8> {
    let (service, method) = (service.into(), method.into());
    let request =
        ttrpc::Request { service, method, payload: payload.write_to_bytes_dyn().unwrap(), ..Default::default() };
    let payload = request.write_to_bytes().unwrap();
    frame(payload.len(), stream, 1, &payload)
}

/// The next answer: its stream, and the code in it.
async fn answer(stream: &mut UnixStream) -> (u32, Code) {
    let read = async {
        let length = stream.read_u32().await.unwrap();
        let number = stream.read_u32().await.unwrap();
        let mut rest = vec![0; 2 + length as usize];
        stream.read_exact(&mut rest).await.unwrap();
        let response = ttrpc::Response::parse_from_bytes(&rest[2..]).unwrap();
        (number, response.status.code.enum_value().unwrap())
    };
    timeout(SOON, read).await.unwrap()
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("{other}"),
    }
}

/// Resident memory of this process.
fn memory() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[tokio::test]
async fn frames_that_are_none_are_answered_or_end_their_own_connection() {
    let shim = Shim::start().await;
    let mut stream = shim.connect().await;
    let state = || request(9, SERVICE, "State", &StateRequest::new());
    for (said, expected) in [
        (frame(3, 1, 1, b"\xff\xff\xff"), (1, Code::INVALID_ARGUMENT)),
        (request(2, SERVICE, "State", &StateRequest::new()), (2, Code::INVALID_ARGUMENT)),
        // Bytes of a stream that nobody has opened.
        (frame(1, 3, 3, b"x"), (3, Code::INVALID_ARGUMENT)),
        // No kind of message, or what servers say: no answer to these, but to the next.
        ([frame(1, 5, 77, b"x"), state()].concat(), (9, Code::NOT_FOUND)),
        ([frame(1, 5, 2, b"x"), state()].concat(), (9, Code::NOT_FOUND)),
        (request(7, SERVICE, "Frob", &StateRequest::new()), (7, Code::UNIMPLEMENTED)),
        // As ttrpc has it; the original says that it is not implemented.
        (request(7, "frob.Task", "State", &StateRequest::new()), (7, Code::INVALID_ARGUMENT)),
        // A state is not asked for with a number.
        (request(7, SERVICE, "State", &ResizePtyRequest { width: 1, ..Default::default() }), (7, Code::NOT_FOUND)),
    ] {
        stream.write_all(&said).await.unwrap();
        assert_eq!(answer(&mut stream).await, expected, "{said:?}");
    }
    // A message that is no request of this method, in a request that is one.
    let inner = ttrpc::Request {
        service: SERVICE.into(),
        method: "State".into(),
        payload: vec![0xff; 10],
        ..Default::default()
    };
    let inner = inner.write_to_bytes().unwrap();
    stream.write_all(&frame(inner.len(), 1, 1, &inner)).await.unwrap();
    assert_eq!(answer(&mut stream).await.0, 1);
    // Less than announced, and nothing any more.
    stream.write_all(&frame(100, 1, 1, b"short")).await.unwrap();
    drop(stream);
    let mut seed = 1_u64;
    for _ in 0..200 {
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            seed.to_be_bytes()[0]
        })
        .take(1000)
        .collect();
        let mut stream = shim.connect().await;
        stream.write_all(&noise).await.unwrap();
    }
    shim.check().await;
}

#[tokio::test]
async fn what_is_announced_takes_no_memory_before_it_is_there() {
    let shim = Shim::start().await;
    let before = memory();
    let mut all = Vec::new();
    // 256 MiB in all, and 256 GiB that are more than a message may have.
    for length in [4 << 20, u32::MAX as usize] {
        for _ in 0..64 {
            let mut stream = shim.connect().await;
            stream.write_all(&frame(length, 1, 1, b"x")).await.unwrap();
            all.push(stream);
        }
    }
    shim.check().await;
    let more = memory().saturating_sub(before);
    assert!(more < 100 << 20, "{more} bytes");
    // Too long, and all of it there: it is refused, and the next is answered.
    let mut stream = shim.connect().await;
    let (mut reader, mut writer) = stream.split();
    let length = (4 << 20) + 1;
    let write = async {
        writer.write_all(&frame(length, 1, 1, &vec![0; length])).await.unwrap();
        writer.write_all(&request(3, SERVICE, "State", &StateRequest::new())).await.unwrap();
    };
    let mut first = [0; 4];
    let (_, read) = timeout(SOON, async { tokio::join!(write, reader.read_exact(&mut first)) }).await.unwrap();
    read.unwrap();
    let mut rest = vec![0; 6 + u32::from_be_bytes(first) as usize];
    stream.read_exact(&mut rest).await.unwrap();
    let response = ttrpc::Response::parse_from_bytes(&rest[6..]).unwrap();
    assert_eq!(response.status.code.value(), Code::INVALID_ARGUMENT.value());
    assert_eq!(answer(&mut stream).await, (3, Code::NOT_FOUND));
}

#[tokio::test]
async fn what_is_asked_of_nobody_is_not_found() {
    let shim = Shim::start().await;
    let client = shim.client().await;
    let context = Context::default;
    let id = || "none".to_owned();
    assert_eq!(code(client.start(context(), &StartRequest { id: id(), ..Default::default() }).await), Code::NOT_FOUND);
    assert_eq!(code(client.state(context(), &StateRequest { id: id(), ..Default::default() }).await), Code::NOT_FOUND);
    assert_eq!(
        code(client.delete(context(), &DeleteRequest { id: id(), ..Default::default() }).await),
        Code::NOT_FOUND
    );
    let exec = DeleteRequest { id: id(), exec_id: "e".into(), ..Default::default() };
    assert_eq!(code(client.delete(context(), &exec).await), Code::NOT_FOUND);
    assert_eq!(code(client.kill(context(), &KillRequest { id: id(), ..Default::default() }).await), Code::NOT_FOUND);
    let exec = ExecProcessRequest { id: id(), exec_id: "e".into(), ..Default::default() };
    assert_eq!(code(client.exec(context(), &exec).await), Code::NOT_FOUND);
    assert_eq!(code(client.pids(context(), &PidsRequest { id: id(), ..Default::default() }).await), Code::NOT_FOUND);
    assert_eq!(code(client.pause(context(), &PauseRequest { id: id(), ..Default::default() }).await), Code::NOT_FOUND);
    assert_eq!(
        code(client.resume(context(), &ResumeRequest { id: id(), ..Default::default() }).await),
        Code::NOT_FOUND
    );
    let resize = ResizePtyRequest { id: id(), ..Default::default() };
    assert_eq!(code(client.resize_pty(context(), &resize).await), Code::NOT_FOUND);
    let close = CloseIORequest { id: id(), ..Default::default() };
    assert_eq!(code(client.close_io(context(), &close).await), Code::NOT_FOUND);
    let update = UpdateTaskRequest { id: id(), ..Default::default() };
    assert_eq!(code(client.update(context(), &update).await), Code::NOT_FOUND);
    assert_eq!(code(client.wait(context(), &WaitRequest { id: id(), ..Default::default() }).await), Code::NOT_FOUND);
    assert_eq!(code(client.stats(context(), &StatsRequest { id: id(), ..Default::default() }).await), Code::NOT_FOUND);
    let checkpoint = CheckpointTaskRequest { id: id(), ..Default::default() };
    assert_eq!(code(client.checkpoint(context(), &checkpoint).await), Code::UNIMPLEMENTED);
    client.shutdown(context(), &ShutdownRequest { id: id(), ..Default::default() }).await.unwrap();
    timeout(SOON, shim.over.notified()).await.unwrap();
}

/// Which methods took how long at most, in buckets of [`crate::calls::BOUNDS`], once there is a pod; and which are never noted.
#[tokio::test]
async fn it_is_noted_how_long_each_method_took() {
    let shim = Shim::start().await;
    let (durations, client) = (&shim.tasks.surroundings.durations, shim.client().await);
    let pod = std::fs::File::open(shim.directory.path()).unwrap();
    let noted = || -> Vec<(&str, u64)> {
        let all = Calls::find(pod.as_fd(), SHIM).unwrap().so_far();
        all.iter().map(|of| (of.method, of.buckets.iter().sum())).collect()
    };
    client.connect(Context::default(), &ConnectRequest::new()).await.unwrap();
    durations.give_to(pod.as_fd()).unwrap();
    assert_eq!(noted(), [("Connect", 1)]);
    // One that fails, one under the other name of the service, and one that waits for an end.
    let (container, mut child) = shim.container("c");
    client.state(Context::default(), &StateRequest::new()).await.unwrap_err();
    let mut stream = shim.connect().await;
    stream
        .write_all(&request(1, NAMES[1], "Pids", &PidsRequest { id: "c".into(), ..Default::default() }))
        .await
        .unwrap();
    assert_eq!(answer(&mut stream).await, (1, Code::OK));
    child.kill().unwrap();
    timeout(SOON, container.init.wait()).await.unwrap();
    client.wait(Context::default(), &WaitRequest { id: "c".into(), ..Default::default() }).await.unwrap();
    assert_eq!(noted(), [("State", 1), ("Pids", 1), ("Connect", 1)]);
    // Every method there is, and no others.
    let services = shim.tasks.services();
    let mut known: Vec<&str> =
        services.values().flat_map(|service| service.methods.keys().map(String::as_str)).collect();
    known.sort_unstable();
    known.dedup();
    for method in &known {
        durations.note(method, Duration::from_millis(1));
    }
    let mut of: Vec<_> = noted().into_iter().map(|(method, _)| method).chain(["Wait", "WaitSandbox"]).collect();
    of.sort_unstable();
    assert_eq!(of, known);
    assert!(services.values().all(|service| service.streams.is_empty()));
}

/// A server gives up what takes longer than who asked wanted to wait.
#[tokio::test]
async fn what_is_given_up_is_noted_too() {
    let shim = Shim::start().await;
    let pod = std::fs::File::open(shim.directory.path()).unwrap();
    shim.tasks.surroundings.durations.give_to(pod.as_fd()).unwrap();
    let client = shim.client().await;
    let place = Arc::new(Place::default());
    let turn = place.turn.lock().await;
    shim.tasks.containers().insert("c".into(), place.clone());
    let context = ttrpc::context::with_duration(Duration::from_millis(30));
    client.delete(context, &DELETE).await.unwrap_err();
    drop(turn);
    let noted = async {
        while Calls::find(pod.as_fd(), SHIM).unwrap().so_far().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, noted).await.unwrap();
    let [of] = &Calls::find(pod.as_fd(), SHIM).unwrap().so_far()[..] else { panic!("not one method") };
    assert!(of.method == "Delete" && of.seconds >= 0.03, "{of:?}");
}

#[tokio::test]
async fn what_cannot_be_made_leaves_its_name_free() {
    let shim = Shim::start().await;
    let client = shim.client().await;
    let bundle = shim.directory.path().join("b");
    let create = |bundle: &Path, options: Option<Any>| CreateTaskRequest {
        id: "c".into(),
        bundle: bundle.to_str().unwrap().into(),
        options: options.into(),
        ..Default::default()
    };
    for _ in 0..2 {
        assert_eq!(code(client.create(Context::default(), &create(&bundle, None)).await), Code::UNKNOWN);
    }
    std::fs::create_dir(&bundle).unwrap();
    for (text, options, expected) in [
        ("{", None, Code::INVALID_ARGUMENT),
        // It says that there is a terminal, which nobody asks for.
        (crate::spec::document::TEXT, None, Code::INVALID_ARGUMENT),
        (&*without_terminal(), Some("frob"), Code::INVALID_ARGUMENT),
        // A root file system that is not there.
        (&*without_terminal(), None, Code::UNKNOWN),
    ] {
        std::fs::write(bundle.join("config.json"), text).unwrap();
        let options = options.map(|kind| Any { type_url: kind.into(), ..Default::default() });
        assert_eq!(code(client.create(Context::default(), &create(&bundle, options)).await), expected, "{text}");
    }
    let restored = CreateTaskRequest { checkpoint: "/c".into(), ..create(&bundle, None) };
    assert_eq!(code(client.create(Context::default(), &restored).await), Code::UNIMPLEMENTED);
    assert!(shim.tasks.containers().is_empty());
}

/// containerd asks for the end of a pod once, for its first container, and removes the others whenever it comes to that.
#[tokio::test]
async fn the_end_that_was_asked_for_comes_with_the_last_container() {
    let shim = Shim::start().await;
    let client = shim.client().await;
    let ended = async |id: &str| {
        let (container, mut child) = shim.container(id);
        child.kill().unwrap();
        timeout(SOON, container.init.wait()).await.unwrap();
    };
    let delete = async |id: &str| {
        let request = DeleteRequest { id: id.into(), ..Default::default() };
        client.delete(Context::default(), &request).await.unwrap();
    };
    let shutdown = async |id: &str| {
        let request = ShutdownRequest { id: id.into(), ..Default::default() };
        client.shutdown(Context::default(), &request).await.unwrap();
    };
    let mut over = Box::pin(shim.over.notified());
    let mut goes_on = async || timeout(Duration::ZERO, &mut over).await.is_err();
    for id in ["pause", "one", "two"] {
        ended(id).await;
    }
    // One of a pod that goes on, and one that could not be made.
    delete("one").await;
    shutdown("one").await;
    shutdown("never").await;
    assert!(goes_on().await);
    ended("three").await;
    delete("three").await;
    assert!(goes_on().await);
    delete("pause").await;
    shutdown("pause").await;
    assert!(goes_on().await, "\"two\" is still there");
    delete("two").await;
    timeout(SOON, over).await.unwrap();
    // Who comes now comes too late.
    let create = CreateTaskRequest { id: "late".into(), ..Default::default() };
    assert_eq!(code(client.create(Context::default(), &create).await), Code::UNAVAILABLE);
}

/// containerd is killed, or gives up, while a container is being made.
#[tokio::test]
async fn what_nobody_waits_for_any_more_is_finished() {
    let shim = Shim::start().await;
    let bundle = shim.directory.path().join("b");
    std::fs::create_dir(&bundle).unwrap();
    std::fs::write(bundle.join("config.json"), without_terminal()).unwrap();
    let pipe = shim.directory.path().join("out");
    mknodat(CWD, &pipe, FileType::Fifo, 0o600.into(), 0).unwrap();
    // It waits for somebody to read its output.
    let create = CreateTaskRequest {
        id: "c".into(),
        bundle: bundle.to_str().unwrap().into(),
        stdout: pipe.to_str().unwrap().into(),
        ..Default::default()
    };
    let mut stream = shim.connect().await;
    stream.write_all(&request(1, SERVICE, "Create", &create)).await.unwrap();
    stream.write_all(&request(3, SERVICE, "Create", &create)).await.unwrap();
    assert_eq!(answer(&mut stream).await, (3, Code::ALREADY_EXISTS));
    stream
        .write_all(&request(5, SERVICE, "State", &StateRequest { id: "c".into(), ..Default::default() }))
        .await
        .unwrap();
    assert_eq!(answer(&mut stream).await, (5, Code::NOT_FOUND));
    let client = shim.client().await;
    let mut delete = Box::pin(client.delete(Context::default(), &DELETE));
    assert!(timeout(Duration::from_millis(50), &mut delete).await.is_err(), "it is not made yet");
    let shutdown = ShutdownRequest { id: "c".into(), ..Default::default() };
    shim.client().await.shutdown(Context::default(), &shutdown).await.unwrap();
    drop(stream);
    let _reader = rustix::fs::open(&pipe, rustix::fs::OFlags::RDWR, 0.into()).unwrap();
    assert_eq!(code(timeout(SOON, delete).await.unwrap()), Code::NOT_FOUND);
    assert!(shim.tasks.containers().is_empty());
    timeout(SOON, shim.over.notified()).await.unwrap();
}

#[tokio::test]
async fn what_comes_at_the_wrong_time_is_refused() {
    let shim = Shim::start().await;
    let client = shim.client().await;
    let context = Context::default;
    let (container, mut child) = shim.container("c");
    let create = CreateTaskRequest { id: "c".into(), ..Default::default() };
    assert_eq!(code(client.create(context(), &create).await), Code::ALREADY_EXISTS);
    assert_eq!(code(client.delete(context(), &DELETE).await), Code::FAILED_PRECONDITION);
    // Whether it is there.
    client.kill(context(), &KillRequest { id: "c".into(), ..Default::default() }).await.unwrap();
    // Somebody needs it.
    client.shutdown(context(), &ShutdownRequest { id: "other".into(), ..Default::default() }).await.unwrap();

    let exec = |name: &str, spec: &[u8]| ExecProcessRequest {
        id: "c".into(),
        exec_id: name.into(),
        spec: Some(Any { value: spec.into(), ..Default::default() }).into(),
        ..Default::default()
    };
    for (name, spec) in [("", &b"{}"[..]), ("e", b""), ("e", b"[]"), ("e", b"{"), ("e", b"\xff")] {
        assert_eq!(code(client.exec(context(), &exec(name, spec)).await), Code::INVALID_ARGUMENT, "{name} {spec:?}");
    }
    client.exec(context(), &exec("e", b"{}")).await.unwrap();
    assert_eq!(code(client.exec(context(), &exec("e", b"{}")).await), Code::ALREADY_EXISTS);
    let kill = KillRequest { id: "c".into(), exec_id: "e".into(), signal: 9, ..Default::default() };
    assert_eq!(code(client.kill(context(), &kill).await), Code::FAILED_PRECONDITION);
    let resize =
        ResizePtyRequest { id: "c".into(), exec_id: "e".into(), width: u32::MAX, height: 1, ..Default::default() };
    client.resize_pty(context(), &resize).await.unwrap();
    let close = CloseIORequest { id: "c".into(), exec_id: "e".into(), stdin: true, ..Default::default() };
    client.close_io(context(), &close).await.unwrap();
    // Who waits for what was never started is told when nobody wants it any more.
    let wait = WaitRequest { id: "c".into(), exec_id: "e".into(), ..Default::default() };
    let mut waiting = shim.connect().await;
    waiting.write_all(&request(1, SERVICE, "Wait", &wait)).await.unwrap();
    waiting.write_all(&request(3, SERVICE, "State", &StateRequest::new())).await.unwrap();
    assert_eq!(answer(&mut waiting).await, (3, Code::NOT_FOUND));
    let delete = DeleteRequest { id: "c".into(), exec_id: "e".into(), ..Default::default() };
    assert_eq!(client.delete(context(), &delete).await.unwrap().pid, 0);
    assert_eq!(answer(&mut waiting).await, (1, Code::NOT_FOUND));
    assert_eq!(code(client.delete(context(), &delete).await), Code::NOT_FOUND);
    assert_eq!(code(client.wait(context(), &wait).await), Code::NOT_FOUND);
    let start = StartRequest { id: "c".into(), exec_id: "e".into(), ..Default::default() };
    assert_eq!(code(client.start(context(), &start).await), Code::NOT_FOUND);

    child.kill().unwrap();
    timeout(SOON, container.init.wait()).await.unwrap();
    assert_eq!(code(client.exec(context(), &exec("late", b"{}")).await), Code::FAILED_PRECONDITION);
    let kill = KillRequest { id: "c".into(), signal: 9, ..Default::default() };
    assert_eq!(code(client.kill(context(), &kill).await), Code::NOT_FOUND);
    client.resize_pty(context(), &ResizePtyRequest { id: "c".into(), ..Default::default() }).await.unwrap();
    let other = shim.client().await;
    // Two at once: one of them removes it.
    let second = tokio::spawn(async move { other.delete(Context::default(), &DELETE).await });
    let answers = [client.delete(context(), &DELETE).await, second.await.unwrap()];
    let statuses: Vec<_> = answers.iter().flatten().map(|answer| answer.exit_status).collect();
    assert_eq!(statuses, [137]);
    client.shutdown(context(), &ShutdownRequest::new()).await.unwrap();
    timeout(SOON, shim.over.notified()).await.unwrap();
}

/// Its program has ended in the guest, and its shadow waits for somebody to read what it has written.
#[tokio::test]
async fn a_signal_for_a_program_that_has_ended_finds_nobody() {
    let shim = Shim::start().await;
    let client = shim.client().await;
    let context = Context::default;
    let (_, mut child) = shim.container("c");
    let held = Directory::held(&shim.tasks.surroundings.root, "c", Status::Running);
    let kill = |signal: i32, all: bool| KillRequest {
        id: "c".into(),
        signal: signal.cast_unsigned(),
        all,
        ..Default::default()
    };
    for refused in [Code::FAILED_PRECONDITION, Code::NOT_FOUND] {
        stand_in::refuse(&held.pod(), refused, "no");
        assert_eq!(code(client.kill(context(), &kill(libc::SIGTERM, false)).await), Code::NOT_FOUND);
        client.kill(context(), &kill(libc::SIGTERM, true)).await.unwrap();
        // Who kills waits for the end that is told.
        client.kill(context(), &kill(libc::SIGKILL, false)).await.unwrap();
    }
    assert_eq!(
        code(client.stats(context(), &StatsRequest { id: "c".into(), ..Default::default() }).await),
        Code::NOT_FOUND
    );
    for signal in [65, -1, i32::MAX] {
        assert_eq!(code(client.kill(context(), &kill(signal, false)).await), Code::INVALID_ARGUMENT, "{signal}");
    }
    child.kill().unwrap();
}

#[tokio::test]
async fn programs_that_nobody_starts_are_not_taken_without_end() {
    let shim = Shim::start().await;
    let (container, mut child) = shim.container("c");
    let add = |number: usize| {
        container.add(ExecProcessRequest {
            id: "c".into(),
            exec_id: number.to_string(),
            spec: Some(Any { value: b"{}".into(), ..Default::default() }).into(),
            ..Default::default()
        })
    };
    let refused = (0..).find_map(|number| add(number).err().map(|error| (number, code::<()>(Err(error))))).unwrap();
    assert_eq!(refused, (4096, Code::RESOURCE_EXHAUSTED));
    // One that has ended, and that nobody deletes, makes room.
    let (mut program, pid) = sleeping();
    let process = container.execute_child("7", pid);
    program.kill().unwrap();
    timeout(SOON, process.wait()).await.unwrap();
    add(4096).unwrap();
    assert_eq!(code(container.process("7").map(drop)), Code::NOT_FOUND);
    assert!(add(4097).is_err());
    child.kill().unwrap();
    timeout(SOON, container.init.wait()).await.unwrap();
}

#[tokio::test]
async fn the_end_of_a_container_is_told_last() {
    let mut shim = Shim::start().await;
    let (container, mut child) = shim.container("c");
    let mut programs = Vec::new();
    for name in ["a", "b"] {
        let spec = Some(Any { value: b"{}".into(), ..Default::default() });
        let (id, exec_id) = ("c".into(), name.into());
        container.add(ExecProcessRequest { id, exec_id, spec: spec.into(), ..Default::default() }).unwrap();
        let program = sleep();
        container.execute_child(name, program.id().cast_signed());
        programs.push(program);
    }
    child.kill().unwrap();
    let ending = async {
        while !container.is_ending() {
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, ending).await.unwrap();
    for mut program in programs {
        program.kill().unwrap();
    }
    timeout(SOON, container.init.wait()).await.unwrap();
    let topics: Vec<_> = shim.sender.waiting().into_iter().filter(|event| event.topic == "/tasks/exit").collect();
    let ids: Vec<_> = topics.iter().map(|event| TaskExit::parse_from_bytes(&event.event.value).unwrap().id).collect();
    assert_eq!(ids.len(), 3);
    assert_eq!(ids[2], "c");
}
