//! What a guest may do wrong.

use std::io;
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;

use podhull_protocol::{
    AdjustClockResponse, ContainerStatsResponse, CreateContainerResponse, CreatePodResponse, DiskStats, Empty, Event,
    EventsRequest, ExecProcessResponse, Exit, GrowResponse, GuestCpuStats, GuestMemoryStats, HugetlbStats,
    InterfaceStats, IoDeviceStats, IoStats, LogLine, MemoryStats, NamedStats, OutOfMemory, PodStatsResponse,
    ReadLogResponse, event,
};
use protobuf::Message;
use ttrpc::proto::MESSAGE_TYPE_RESPONSE;
use ttrpc::{Code, MessageHeader};

use crate::frame::{self, Call, Connection};
use crate::{LIFE, reset, streams};

/// Bytes of answers that are too long, within what ttrpc takes.
const LONG: usize = 3 << 20;

/// Kinds of misbehaviour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// None.
    None,
    /// Instead of frames, random bytes without end.
    Garbage,
    /// A frame that says it has 4 GiB, and has them.
    HugeFrame,
    /// A frame of no known type.
    WrongType,
    /// An answer that is no message.
    NoMessage,
    /// Answers for calls that nobody made, before each that somebody did.
    WrongIds,
    /// The first call is never answered.
    Mute,
    /// The connection ends with the first call.
    HangsUp,
    /// Another version of the protocol, with all it has to say of that.
    Version,
    /// The container has an impossible process id.
    AbsurdPid,
    /// An answer with a million fields that nobody knows.
    ManyFields,
    /// Nobody takes streams.
    NoStreams,
    /// The machine resets itself in the middle of a call.
    Vanishes,
    /// PID 1 ends while a container runs.
    Dies,
    /// Connections to all ports of the host, all the time.
    Storm,
    /// An exit status that cannot be.
    AbsurdExit,
    /// Events of others without end, and in between the one that counts.
    ForeignEvents,
    /// Events without end as soon as somebody listens, and no other answer from then on.
    FloodOfEvents,
    /// An event of several MiB.
    LongEvent,
    /// The end, then events without end, and no answer any more.
    EventsAfterExit,
    /// Output without end, of a container that does not end.
    EndlessOutput,
    /// The same of one that has ended.
    OutputAfterExit,
    /// Processes killed for lack of memory without end, of a container that does not end.
    StarvesForEver,
    /// Answers to all but the making of a container that are as long, and say as much nonsense, as fits.
    Lies,
    /// No answer to anything but the making of a container.
    Deaf,
    /// A container that was started does not end, and from then on no answer to anything but what its machine is given up without.
    Silent,
}

impl Fault {
    /// By its name.
    pub fn named(name: &str) -> Self {
        match name {
            "garbage" => Self::Garbage,
            "huge-frame" => Self::HugeFrame,
            "wrong-type" => Self::WrongType,
            "no-message" => Self::NoMessage,
            "wrong-ids" => Self::WrongIds,
            "mute" => Self::Mute,
            "hangs-up" => Self::HangsUp,
            "version" => Self::Version,
            "absurd-pid" => Self::AbsurdPid,
            "many-fields" => Self::ManyFields,
            "no-streams" => Self::NoStreams,
            "vanishes" => Self::Vanishes,
            "dies" => Self::Dies,
            "storm" => Self::Storm,
            "absurd-exit" => Self::AbsurdExit,
            "foreign-events" => Self::ForeignEvents,
            "flood-of-events" => Self::FloodOfEvents,
            "long-event" => Self::LongEvent,
            "events-after-exit" => Self::EventsAfterExit,
            "endless-output" => Self::EndlessOutput,
            "output-after-exit" => Self::OutputAfterExit,
            "starves-for-ever" => Self::StarvesForEver,
            "lies" => Self::Lies,
            "deaf" => Self::Deaf,
            "silent" => Self::Silent,
            "none" => Self::None,
            // A test that asks for what is not there must fail.
            _ => reset(),
        }
    }
}

/// Whether a container was started, which is told to who waits for it.
static STARTED: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());

/// Takes calls until the connection ends.
pub fn converse(mut connection: Connection, fault: Fault) {
    while let Ok(call) = frame::read(&mut connection) {
        if respond(&mut connection, &call, fault).is_err() {
            return;
        }
        if call.request.method == "StartContainer" {
            *STARTED.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
            STARTED.1.notify_all();
        }
    }
}

/// Waits until it was started, and its caller has the answer.
fn await_start() {
    let started = STARTED.0.lock().unwrap_or_else(PoisonError::into_inner);
    drop(STARTED.1.wait_while(started, |started| !*started));
}

fn respond(connection: &mut Connection, call: &Call, fault: Fault) -> io::Result<()> {
    let stream = call.stream;
    let is = |method: &str| call.request.method == method;
    if is("CreatePod") {
        return create_pod(connection, stream, fault);
    }
    match fault {
        Fault::Lies if !is("Events") => return lie(connection, call),
        Fault::Deaf if !is("Events") => return Ok(()),
        Fault::Silent if !is("Grow") && *STARTED.0.lock().unwrap_or_else(PoisonError::into_inner) => return Ok(()),
        Fault::EventsAfterExit | Fault::FloodOfEvents if !is("Events") && !is("StartContainer") => return Ok(()),
        Fault::WrongIds => wrong_ids(connection, stream)?,
        _ => {}
    }
    match &*call.request.method {
        "Events" => {
            let request = EventsRequest::parse_from_bytes(&call.request.payload).map_err(io::Error::other)?;
            let mut events = connection.try_clone()?;
            if request.watch {
                let watching = Some(event::Kind::Watching(Empty::default()));
                frame::event(&mut events, stream, &Event { kind: watching, ..Default::default() })?;
            }
            thread::spawn(move || tell(&mut events, stream, &request, fault));
            Ok(())
        }
        "Grow" => frame::answer(connection, stream, &GrowResponse { cpus_online: 1, ..Default::default() }),
        "CreateContainer" => {
            frame::answer(connection, stream, &CreateContainerResponse { pid: 7, ..Default::default() })
        }
        "ExecProcess" => frame::answer(connection, stream, &ExecProcessResponse { pid: 8, ..Default::default() }),
        "ContainerStats" => frame::answer(connection, stream, &ContainerStatsResponse::default()),
        _ => frame::answer(connection, stream, &Empty::default()),
    }
}

fn create_pod(connection: &mut Connection, stream: u32, fault: Fault) -> io::Result<()> {
    let container = CreateContainerResponse { pid: 7, ..Default::default() };
    let mut pod =
        CreatePodResponse { kernel_release: "6.12".into(), container: Some(container).into(), ..Default::default() };
    match fault {
        Fault::Garbage => loop {
            connection.send(&noise(stream))?;
        },
        Fault::HugeFrame => {
            let header = MessageHeader { length: u32::MAX, stream_id: stream, type_: MESSAGE_TYPE_RESPONSE, flags: 0 };
            frame::write(connection, header, &[])?;
            loop {
                connection.send(&[0; 64 << 10])?;
            }
        }
        Fault::WrongType => return frame::plain(connection, 0x77, stream, b"what"),
        Fault::NoMessage => return frame::answer_bytes(connection, stream, vec![0xff; 1000]),
        Fault::WrongIds => wrong_ids(connection, stream)?,
        Fault::Mute => return Ok(()),
        Fault::HangsUp => return Err(io::ErrorKind::ConnectionAborted.into()),
        Fault::Version => {
            let text = format!("the versions differ\n\u{1b}[2J\0{}", "x".repeat(100_000));
            return frame::refuse(connection, stream, Code::FAILED_PRECONDITION, &text);
        }
        Fault::AbsurdPid => pod.container.mut_or_insert_default().pid = i32::MIN,
        Fault::ManyFields => return frame::answer_bytes(connection, stream, many_fields()),
        Fault::Vanishes => reset(),
        _ => {}
    }
    frame::answer(connection, stream, &pod)
}

/// Fields with numbers from a million on, of three bytes of number and one of value each.
fn many_fields() -> Vec<u8> {
    let field = |number: u32| {
        let key = (number << 3).to_le_bytes();
        let key = u32::from_le_bytes(key);
        [(key & 0x7f | 0x80) as u8, (key >> 7 & 0x7f | 0x80) as u8, (key >> 14 & 0x7f) as u8, 1]
    };
    (1 << 12..1 << 18).flat_map(field).chain(std::iter::repeat_n(field(1 << 12), LONG / 8).flatten()).collect()
}

fn wrong_ids(connection: &mut Connection, stream: u32) -> io::Result<()> {
    for other in [0, stream + 2, stream + 1, u32::MAX, 0x8000_0000] {
        frame::answer(connection, other, &CreatePodResponse::default())?;
        frame::event(connection, other, &exit("nobody", 1))?;
    }
    Ok(())
}

fn noise(seed: u32) -> Vec<u8> {
    let mut state = u64::from(seed) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..64 << 10).map(|_| next()).collect()
}

fn exit(id: &str, code: u32) -> Event {
    let exit = Exit { code, ..Default::default() };
    Event { container_id: id.into(), kind: Some(event::Kind::Exit(exit)), ..Default::default() }
}

fn starved(id: &str) -> Event {
    let kill = OutOfMemory { kills: u64::MAX, ..Default::default() };
    Event { container_id: id.into(), kind: Some(event::Kind::OutOfMemory(kill)), ..Default::default() }
}

/// Tells who asked for a container's events how it ends.
fn tell(connection: &mut Connection, stream: u32, request: &EventsRequest, fault: Fault) -> io::Result<()> {
    let id = &*request.container_id;
    match fault {
        Fault::ForeignEvents => {
            let until = std::time::Instant::now() + LIFE;
            while std::time::Instant::now() < until {
                frame::event(connection, stream, &exit("another", 9))?;
                frame::event(connection, stream, &Event { exec_id: "another".into(), ..exit(id, 9) })?;
                frame::event(connection, stream, &Event { container_id: id.into(), ..Default::default() })?;
            }
        }
        Fault::FloodOfEvents | Fault::StarvesForEver => loop {
            frame::event(connection, stream, &starved(id))?;
        },
        Fault::LongEvent => frame::event(connection, stream, &exit(&"y".repeat(LONG), 9))?,
        Fault::EndlessOutput | Fault::Lies | Fault::Deaf | Fault::Silent => loop {
            thread::park();
        },
        _ => {}
    }
    // However long who asked for its events takes to have it started.
    await_start();
    thread::sleep(LIFE);
    if fault == Fault::Dies {
        std::process::exit(1);
    }
    if fault != Fault::OutputAfterExit {
        // Their readers are to see the end.
        for stream in streams().drain(..) {
            crate::vsock::end(&stream);
        }
    }
    let code = if fault == Fault::AbsurdExit { 4_000_000_000 } else { 0 };
    frame::event(connection, stream, &exit(id, code))?;
    if fault == Fault::EventsAfterExit {
        loop {
            frame::event(connection, stream, &starved(id))?;
        }
    }
    Ok(())
}

/// As long as fits, and nothing that can be.
fn lie(connection: &mut Connection, call: &Call) -> io::Result<()> {
    match &*call.request.method {
        "PodStats" => frame::answer(connection, call.stream, &absurd_pod()),
        "ReadLog" => frame::answer(connection, call.stream, &absurd_log()),
        // Whether the volume is new in the guest, nobody can know.
        "UpdateVolume" => frame::answer_bytes(connection, call.stream, vec![0xff; 1000]),
        "ContainerStats" => {
            let device = IoDeviceStats { major: u32::MAX, reads: u64::MAX, ..Default::default() };
            let hugetlb = HugetlbStats { page_size: "../\n\"".into(), limit: u64::MAX, ..Default::default() };
            let mut memory = MemoryStats { usage: u64::MAX, limit: 0, ..Default::default() };
            memory.stat = (0..2000).map(|number| (format!("\n{number}{}", "z".repeat(20)), u64::MAX)).collect();
            let stats = ContainerStatsResponse {
                memory: Some(memory).into(),
                io: Some(IoStats { devices: vec![device; 1000], ..Default::default() }).into(),
                hugetlb: vec![hugetlb; 1000],
                ..Default::default()
            };
            frame::answer(connection, call.stream, &stats)
        }
        "Grow" => frame::answer(connection, call.stream, &GrowResponse { cpus_online: u32::MAX, ..Default::default() }),
        "ExecProcess" => {
            frame::answer(connection, call.stream, &ExecProcessResponse { pid: i32::MIN, ..Default::default() })
        }
        "AdjustClock" => {
            let clock = AdjustClockResponse { realtime_ns: u64::MAX, ..Default::default() };
            frame::answer(connection, call.stream, &clock)
        }
        "UpdateContainer" => frame::answer_bytes(connection, call.stream, many_fields()),
        "SignalContainer" => frame::refuse(connection, call.stream, Code::OK, "\n\n"),
        "PauseContainer" => frame::answer_bytes(connection, call.stream, vec![0xff; 100]),
        "StartContainer" => frame::answer(connection, call.stream, &Empty::default()),
        _ => frame::refuse(connection, call.stream, Code::UNKNOWN, &"no\n".repeat(30_000)),
    }
}

/// A name that is a line of its own in a terminal, and the end of a label in Prometheus' text; of many, most are not the only one.
fn absurd_name(number: usize) -> String {
    format!("\n\u{1b}[2J\"}} 1\npodhull_pod_info{{pod=\"{}", number % 7)
}

/// Numbers that cannot be, of containers, interfaces and disks that are not there.
fn absurd_pod() -> PodStatsResponse {
    let memory = MemoryStats { usage: u64::MAX, limit: 1, ..Default::default() };
    let stats = ContainerStatsResponse { memory: Some(memory).into(), ..Default::default() };
    let containers = (0..1000).map(|number| NamedStats {
        id: absurd_name(number),
        stats: Some(stats.clone()).into(),
        ..Default::default()
    });
    let interfaces = (0..1000).map(|number| InterfaceStats {
        name: absurd_name(number),
        received_bytes: u64::MAX,
        ..Default::default()
    });
    let disks = (0..1000).map(|number| DiskStats { name: absurd_name(number), reads: u64::MAX, ..Default::default() });
    PodStatsResponse {
        containers: containers.collect(),
        cpu: Some(GuestCpuStats { user_ms: u64::MAX, idle_ms: u64::MAX, ..Default::default() }).into(),
        memory: Some(GuestMemoryStats { total: 0, free: u64::MAX, available: u64::MAX, ..Default::default() }).into(),
        interfaces: interfaces.collect(),
        disks: disks.collect(),
        uptime_ms: u64::MAX,
        ..Default::default()
    }
}

/// More than was asked for, of what does things to a terminal.
fn absurd_log() -> ReadLogResponse {
    let line = LogLine {
        priority: u32::MAX,
        time_us: u64::MAX,
        text: "\u{1b}[2Jevil\n\u{9b}31m\r\0".repeat(100),
        ..Default::default()
    };
    ReadLogResponse { lines: vec![line; 700], ..Default::default() }
}
