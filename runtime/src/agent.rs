//! The agent's client. Every call has a deadline, and every answer is checked: the guest is hostile.

mod frames;
#[cfg(test)]
pub mod stand_in;

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use podhull_protocol::{
    AdjustClockRequest, AgentClient, ConfigureNetworkRequest, ContainerStatsRequest, ContainerStatsResponse,
    CreateContainerRequest, CreatePodRequest, DeleteContainerRequest, DeleteProcessRequest, Event, EventsRequest,
    ExecProcessRequest, GrowRequest, HostSocket, LogLine, PauseContainerRequest, PodStatsRequest, PodStatsResponse,
    ReadLogRequest, ResizeTerminalRequest, ResumeContainerRequest, SharedMemory, SignalContainerRequest,
    SignalProcessRequest, StartContainerRequest, UpdateContainerRequest, UpdateVolumeRequest, event,
};
use ttrpc::r#async::ClientStreamReceiver;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::{Context, with_duration};

use crate::calls::{AGENT, Calls};
use crate::pod::GuestTimes;
use frames::{Bounds, Frames};

/// For calls that the agent answers at once, on a host that is very busy.
const PROMPT: Duration = Duration::from_secs(30);

/// For calls in which the guest works: making a container, plugging memory.
const WORK: Duration = Duration::from_secs(120);

/// Longest text of the agent that is shown, in characters.
const MAX_TEXT: usize = 1000;

/// How ttrpc says that a call was not answered by its deadline.
const LATE: &str = "Request deadline elapsed";

/// How it says that it cannot read what came.
const UNREADABLE: [&str; 2] = ["npack", "malformed packet"];

/// What went wrong with the agent.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// It answered with an error.
    #[error("{0}")]
    Refused(String),
    /// It answered that what it is about is in no state for that.
    #[error("{0}")]
    NotNow(String),
    /// It answered that there is no such thing (any more).
    #[error("{0}")]
    Missing(String),
    /// It did not answer in time.
    #[error("the agent in the guest did not answer {0} in time")]
    Silent(&'static str),
    /// The connection ended.
    #[error("the agent in the guest is gone: {0}")]
    Gone(String),
    /// It said something that cannot be.
    #[error("the agent in the guest answered nonsense: {0}")]
    Nonsense(&'static str),
    /// The connection could not be made.
    #[error("cannot connect to the agent: {0}")]
    Connect(#[source] io::Error),
}

impl AgentError {
    fn of(call: &'static str, error: ttrpc::Error) -> Self {
        // It is printed where its user reads it.
        let shown = |c: char| if c.is_control() { ' ' } else { c };
        let text = |text: &str| text.chars().take(MAX_TEXT).map(shown).collect::<String>();
        match error {
            ttrpc::Error::RpcStatus(status) if status.code() == ttrpc::Code::DEADLINE_EXCEEDED => Self::Silent(call),
            ttrpc::Error::RpcStatus(status) if status.code() == ttrpc::Code::FAILED_PRECONDITION => {
                Self::NotNow(text(status.message()))
            }
            ttrpc::Error::RpcStatus(status) if status.code() == ttrpc::Code::NOT_FOUND => {
                Self::Missing(text(status.message()))
            }
            ttrpc::Error::RpcStatus(status) => Self::Refused(text(status.message())),
            ttrpc::Error::Others(said) if said == LATE => Self::Silent(call),
            ttrpc::Error::Others(said) if UNREADABLE.iter().any(|what| said.contains(what)) => {
                Self::Nonsense("no message of its protocol")
            }
            other => {
                let said = other.to_string();
                let too_much = [frames::LONG_ANSWER, frames::LONG_EVENT, frames::FLOOD];
                match too_much.into_iter().find(|what| said.ends_with(what)) {
                    Some(what) => Self::Nonsense(what),
                    None => Self::Gone(text(&said)),
                }
            }
        }
    }
}

/// How a container ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// As a shell reports it: the exit code, or 128 and the signal.
    pub status: u8,
    /// A process of it was killed for lack of memory.
    pub out_of_memory: bool,
    /// It was ended by SIGKILL.
    pub killed: bool,
}

/// What a guest says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// Its kernel's release.
    pub release: String,
    /// When it reached what.
    pub times: GuestTimes,
}

/// What a guest is to take into use.
#[derive(Debug, Clone, Copy)]
pub struct Growth {
    /// CPUs that are to be online; 0: as many as are.
    pub cpus: u32,
    /// Look for new devices.
    pub rescan: bool,
}

/// Connection to the agent of a pod.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    /// Where it is noted how long calls took.
    calls: Option<Arc<Calls>>,
    /// What holds for this connection.
    bounds: Bounds,
}

impl Agent {
    /// Speaks on this stream; needs a runtime.
    pub fn new(stream: UnixStream) -> Result<Self, AgentError> {
        stream.set_nonblocking(true).map_err(AgentError::Connect)?;
        Ok(Self::speak(tokio::net::UnixStream::from_std(stream).map_err(AgentError::Connect)?))
    }

    fn speak(stream: tokio::net::UnixStream) -> Self {
        let bounds = Bounds::default();
        let stream = Socket::new(Frames::new(stream, bounds.clone()));
        Self { client: AgentClient::new(ttrpc::r#async::Client::new(stream)), calls: None, bounds }
    }

    /// Notes how long calls take among those of the pod with this directory. What cannot be noted is no reason not to call.
    pub fn counted(self, pod: BorrowedFd<'_>) -> Self {
        Self { calls: Calls::open(pod, AGENT).ok().map(Arc::new), ..self }
    }

    /// Speaks to the agent behind the socket in a pod's directory; needs a runtime.
    pub fn dial(pod: BorrowedFd<'_>) -> Result<Self, AgentError> {
        let stream = crate::stdio::dial(pod, podhull_protocol::AGENT_PORT).map_err(AgentError::Connect)?;
        Ok(Self::new(stream)?.counted(pod))
    }

    /// The same without holding up the event loop. A deadline is for who waits for it.
    pub async fn dial_in_loop(pod: BorrowedFd<'_>) -> Result<Self, AgentError> {
        let stream =
            crate::stdio::dial_in_loop(pod, podhull_protocol::AGENT_PORT).await.map_err(AgentError::Connect)?;
        Ok(Self::speak(stream).counted(pod))
    }

    /// Makes a call, and notes how long it took.
    async fn call<T>(
        &self,
        name: &'static str,
        call: impl Future<Output = Result<T, ttrpc::Error>>,
    ) -> Result<T, AgentError> {
        let began = Instant::now();
        let answer = call.await;
        if let Some(calls) = &self.calls {
            calls.count(name, began.elapsed());
        }
        answer.map_err(|error| AgentError::of(name, error))
    }

    /// Makes the pod and its first container; returns what the guest says of itself.
    pub async fn create_pod(&self, request: &CreatePodRequest) -> Result<Guest, AgentError> {
        let answer = self.call("CreatePod", self.client.create_pod(with_duration(WORK), request)).await?;
        if request.container.is_some() && answer.container.pid <= 1 {
            return Err(AgentError::Nonsense("the process id of the container"));
        }
        let (started, ready) = (answer.started_ns, answer.ready_ns);
        Ok(Guest {
            release: answer.kernel_release.chars().filter(|c| c.is_ascii_graphic()).take(64).collect(),
            times: GuestTimes { started, ready, called: answer.called_ns, made: answer.made_ns },
        })
    }

    /// Makes a further container in the pod.
    pub async fn create_container(&self, request: &CreateContainerRequest) -> Result<(), AgentError> {
        match self.call("CreateContainer", self.client.create_container(with_duration(WORK), request)).await?.pid {
            ..=1 => Err(AgentError::Nonsense("the process id of the container")),
            _ => Ok(()),
        }
    }

    /// Executes the container's program.
    pub async fn start_container(&self, id: &str) -> Result<(), AgentError> {
        let request = StartContainerRequest { id: id.into(), ..Default::default() };
        self.call("StartContainer", self.client.start_container(with_duration(WORK), &request)).await.map(drop)
    }

    /// Sends a signal to the container's init.
    pub async fn signal(&self, id: &str, signal: i32, all: bool) -> Result<(), AgentError> {
        let request = SignalContainerRequest { id: id.into(), signal, all, ..Default::default() };
        self.call("SignalContainer", self.client.signal_container(with_duration(PROMPT), &request)).await.map(drop)
    }

    /// Stops all processes of a container.
    pub async fn pause_container(&self, id: &str) -> Result<(), AgentError> {
        let request = PauseContainerRequest { id: id.into(), ..Default::default() };
        self.call("PauseContainer", self.client.pause_container(with_duration(PROMPT), &request)).await.map(drop)
    }

    /// Lets the processes of a container go on.
    pub async fn resume_container(&self, id: &str) -> Result<(), AgentError> {
        let request = ResumeContainerRequest { id: id.into(), ..Default::default() };
        self.call("ResumeContainer", self.client.resume_container(with_duration(PROMPT), &request)).await.map(drop)
    }

    /// Changes limits of a container; `resources` is a `linux.resources` object.
    pub async fn update_container(&self, id: &str, resources: Vec<u8>) -> Result<(), AgentError> {
        let request = UpdateContainerRequest { id: id.into(), resources, ..Default::default() };
        self.call("UpdateContainer", self.client.update_container(with_duration(PROMPT), &request)).await.map(drop)
    }

    /// Makes the guest's copy of a volume what the host has now.
    pub async fn update_volume(&self, id: &str, name: &str) -> Result<(), AgentError> {
        let request = UpdateVolumeRequest { container_id: id.into(), name: name.into(), ..Default::default() };
        self.call("UpdateVolume", self.client.update_volume(with_duration(PROMPT), &request)).await.map(drop)
    }

    /// What a container has used and may use.
    pub async fn stats(&self, id: &str) -> Result<ContainerStatsResponse, AgentError> {
        let request = ContainerStatsRequest { id: id.into(), ..Default::default() };
        self.call("ContainerStats", self.client.container_stats(with_duration(PROMPT), &request)).await
    }

    /// What the guest as a whole has used, and each of its containers.
    pub async fn pod_stats(&self) -> Result<PodStatsResponse, AgentError> {
        self.call("PodStats", self.client.pod_stats(with_duration(PROMPT), &PodStatsRequest::default())).await
    }

    /// The end of the guest kernel's log.
    pub async fn read_log(&self, max_bytes: u32) -> Result<Vec<LogLine>, AgentError> {
        let request = ReadLogRequest { max_bytes, ..Default::default() };
        let _long = self.bounds.for_long();
        let mut lines = self.call("ReadLog", self.client.read_log(with_duration(PROMPT), &request)).await?.lines;
        // A guest may say more than it was asked for.
        let mut left = usize::try_from(max_bytes).unwrap_or(usize::MAX);
        let fits = |line: &&LogLine| {
            let rest = left.checked_sub(line.text.len().saturating_add(32));
            left = rest.unwrap_or(0);
            rest.is_some()
        };
        let kept = lines.iter().rev().take_while(fits).count();
        lines.drain(..lines.len() - kept);
        Ok(lines)
    }

    /// What the guest's wall clock is, in nanoseconds since the epoch.
    pub async fn clock(&self) -> Result<u64, AgentError> {
        self.adjust_clock(0, false).await
    }

    /// Corrects the guest's wall clock, which is so many nanoseconds behind: at once, or little by little. Returns what it is then.
    pub async fn adjust_clock(&self, behind_ns: i64, step: bool) -> Result<u64, AgentError> {
        let request = AdjustClockRequest { behind_ns, step, ..Default::default() };
        Ok(self.call("AdjustClock", self.client.adjust_clock(with_duration(PROMPT), &request)).await?.realtime_ns)
    }

    /// Executes a further program in a container.
    pub async fn exec(&self, request: &ExecProcessRequest) -> Result<(), AgentError> {
        match self.call("ExecProcess", self.client.exec_process(with_duration(WORK), request)).await?.pid {
            ..=1 => Err(AgentError::Nonsense("the process id of the executed program")),
            _ => Ok(()),
        }
    }

    /// Sends a signal to an executed program.
    pub async fn signal_exec(&self, id: &str, exec: &str, signal: i32) -> Result<(), AgentError> {
        let request =
            SignalProcessRequest { container_id: id.into(), exec_id: exec.into(), signal, ..Default::default() };
        self.call("SignalProcess", self.client.signal_process(with_duration(PROMPT), &request)).await.map(drop)
    }

    /// Forgets an executed program.
    pub async fn delete_exec(&self, id: &str, exec: &str) -> Result<(), AgentError> {
        let request = DeleteProcessRequest { container_id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.call("DeleteProcess", self.client.delete_process(with_duration(WORK), &request)).await.map(drop)
    }

    /// Sets the size of a terminal: the container's, or with `exec` an executed program's.
    pub async fn resize(&self, id: &str, exec: &str, rows: u32, columns: u32) -> Result<(), AgentError> {
        let request =
            ResizeTerminalRequest { id: id.into(), exec_id: exec.into(), rows, columns, ..Default::default() };
        self.call("ResizeTerminal", self.client.resize_terminal(with_duration(PROMPT), &request)).await.map(drop)
    }

    /// Removes what is left of the container; unmounting is what writes its last pages back.
    pub async fn delete_container(&self, id: &str) -> Result<(), AgentError> {
        let request = DeleteContainerRequest { id: id.into(), ..Default::default() };
        self.call("DeleteContainer", self.client.delete_container(with_duration(PROMPT), &request)).await.map(drop)
    }

    /// Takes new devices and CPUs into use, and CPUs that are too many out of use; returns how many are online.
    pub async fn grow(&self, growth: Growth) -> Result<u32, AgentError> {
        let Growth { cpus, rescan } = growth;
        let request = GrowRequest { cpus, rescan, ..Default::default() };
        Ok(self.call("Grow", self.client.grow(with_duration(WORK), &request)).await?.cpus_online)
    }

    /// Makes the pod's network what it says, whatever it was before.
    pub async fn configure_network(&self, request: &ConfigureNetworkRequest) -> Result<(), AgentError> {
        self.call("ConfigureNetwork", self.client.configure_network(with_duration(WORK), request)).await.map(drop)
    }

    /// Copies of a container's events from its return on.
    pub async fn watch(&self, id: &str) -> Result<Events, AgentError> {
        let mut events =
            self.stream(EventsRequest { container_id: id.into(), watch: true, ..Default::default() }).await?;
        let first = tokio::time::timeout(PROMPT, events.receive()).await;
        match first.map_err(|_| AgentError::Silent("Events"))??.kind {
            Some(event::Kind::Watching(_)) => Ok(events),
            _ => Err(AgentError::Nonsense("the first of the events that are watched")),
        }
    }

    /// Events of the pod from now on, and those nobody received yet.
    pub async fn events(&self, id: &str, exec: &str) -> Result<Events, AgentError> {
        self.stream(EventsRequest { container_id: id.into(), exec_id: exec.into(), ..Default::default() }).await
    }

    async fn stream(&self, request: EventsRequest) -> Result<Events, AgentError> {
        // Without a deadline: it lasts as long as the pod, and ends with the connection.
        let receiver = self.client.events(Context::default(), &request).await;
        receiver
            .map(|receiver| Events { receiver, bounds: self.bounds.clone() })
            .map_err(|e| AgentError::of("Events", e))
    }
}

/// The stream of events.
pub struct Events {
    receiver: ClientStreamReceiver<Event>,
    bounds: Bounds,
}

/// What happens to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Happening {
    /// A process of it was killed for lack of memory.
    OutOfMemory,
    /// Its first process has ended.
    Ended,
}

impl Events {
    /// Waits for the next thing to happen to a container as a whole.
    pub async fn next(&mut self, id: &str) -> Result<Happening, AgentError> {
        loop {
            let event = self.receive().await?;
            match event.kind {
                _ if event.container_id != id || !event.exec_id.is_empty() => {}
                Some(event::Kind::OutOfMemory(_)) => return Ok(Happening::OutOfMemory),
                Some(event::Kind::Exit(_)) => return Ok(Happening::Ended),
                _ => {}
            }
        }
    }

    /// Waits for the end of a container, or with `exec` of an executed program.
    pub async fn exit_of(&mut self, id: &str, exec: &str) -> Result<Exit, AgentError> {
        loop {
            let event = self.receive().await?;
            if event.container_id != id || event.exec_id != exec {
                continue;
            }
            if let Some(event::Kind::Exit(exit)) = event.kind {
                return exit_status(exit.code, exit.signal, exit.oom_killed);
            }
        }
    }

    async fn receive(&mut self) -> Result<Event, AgentError> {
        let received = self.receiver.recv().await;
        self.bounds.take();
        match received {
            Ok(Some(event)) => Ok(event),
            Ok(None) => Err(AgentError::Gone("its events ended".into())),
            Err(error) => Err(AgentError::of("Events", error)),
        }
    }
}

fn exit_status(code: u32, signal: u32, out_of_memory: bool) -> Result<Exit, AgentError> {
    let status = match (code, signal) {
        (_, 1..=64) => 128 + signal,
        (0..=255, 0) => code,
        _ => return Err(AgentError::Nonsense("the exit status of the container")),
    };
    let status = u8::try_from(status).map_err(|_| AgentError::Nonsense("the exit status of the container"))?;
    Ok(Exit { status, out_of_memory, killed: signal == libc::SIGKILL as u32 })
}

/// The request for a container.
pub fn container(
    id: &str,
    spec: Vec<u8>,
    rootfs: String,
    stdio: podhull_protocol::Stdio,
    memory: Vec<SharedMemory>,
    directories: Vec<String>,
    sockets: Vec<HostSocket>,
) -> CreateContainerRequest {
    let (id, stdio) = (id.into(), Some(stdio).into());
    CreateContainerRequest { id, spec, rootfs, stdio, memory, directories, sockets, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_by_a_signal_is_128_and_its_number() {
        let status = |code, signal| exit_status(code, signal, false).map(|exit| exit.status).ok();
        assert_eq!(status(42, 0), Some(42));
        assert_eq!(status(255, 0), Some(255));
        assert_eq!(status(0, 9), Some(137));
        assert_eq!(status(0, 64), Some(192));
    }

    #[test]
    fn a_status_that_cannot_be_is_refused() {
        for (code, signal) in [(256, 0), (u32::MAX, 0), (0, 65), (0, u32::MAX)] {
            assert!(matches!(exit_status(code, signal, false), Err(AgentError::Nonsense(_))), "{code} {signal}");
        }
    }
}
