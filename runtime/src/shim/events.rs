//! Events for containerd, in the order in which they happened.
//!
//! A containerd that is being restarted is waited for: its socket is made anew, and the directory tells of that (inotify).

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{MessageDyn, MessageField};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::time::timeout;
use ttrpc::context::with_duration;

/// How long containerd may take to take one.
const ANSWER: Duration = Duration::from_secs(10);

/// How long a containerd that is away is waited for. It asks for the state of everything when it comes back.
const AWAY: Duration = Duration::from_secs(300);

/// How often one is sent that containerd does not want.
const TRIES: u32 = 5;

/// Most events that wait. More than that nobody will miss: they are of hours ago.
const MOST: usize = 4096;

/// What has happened.
#[derive(Debug)]
pub enum Event {
    Created(task::TaskCreate),
    Started(task::TaskStart),
    OutOfMemory(task::TaskOOM),
    Exited(task::TaskExit),
    Deleted(task::TaskDelete),
    ExecAdded(task::TaskExecAdded),
    ExecStarted(task::TaskExecStarted),
    Paused(task::TaskPaused),
    Resumed(task::TaskResumed),
}

impl Event {
    fn parts(&self) -> (&'static str, &dyn MessageDyn) {
        match self {
            Self::Created(event) => (topics::TASK_CREATE_EVENT_TOPIC, event),
            Self::Started(event) => (topics::TASK_START_EVENT_TOPIC, event),
            Self::OutOfMemory(event) => (topics::TASK_OOM_EVENT_TOPIC, event),
            Self::Exited(event) => (topics::TASK_EXIT_EVENT_TOPIC, event),
            Self::Deleted(event) => (topics::TASK_DELETE_EVENT_TOPIC, event),
            Self::ExecAdded(event) => (topics::TASK_EXEC_ADDED_EVENT_TOPIC, event),
            Self::ExecStarted(event) => (topics::TASK_EXEC_STARTED_EVENT_TOPIC, event),
            Self::Paused(event) => (topics::TASK_PAUSED_EVENT_TOPIC, event),
            Self::Resumed(event) => (topics::TASK_RESUMED_EVENT_TOPIC, event),
        }
    }

    fn envelope(&self, namespace: &str) -> Envelope {
        let (topic, event) = self.parts();
        Envelope {
            timestamp: MessageField::some(timestamp(SystemTime::now())),
            namespace: namespace.into(),
            topic: topic.into(),
            event: MessageField::some(any(event)),
            ..Default::default()
        }
    }
}

/// A message by its name, as containerd has names of messages: bare.
pub fn any(message: &dyn MessageDyn) -> Any {
    Any {
        type_url: message.descriptor_dyn().full_name().to_owned(),
        // Fails for messages with required fields that are not there; version 3 of the language has none.
        value: message.write_to_bytes_dyn().unwrap_or_default(),
        ..Default::default()
    }
}

/// A moment.
pub fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: since.as_secs().cast_signed(),
        nanos: since.subsec_nanos().cast_signed(),
        ..Default::default()
    }
}

/// Takes events; they are sent by [`Sender`].
#[derive(Clone)]
pub struct Publisher(mpsc::Sender<Envelope>, String);

impl Publisher {
    /// For the containers of a namespace; the other half sends to `address`, or to nobody if that is empty.
    pub fn new(address: &str, namespace: &str) -> (Self, Sender) {
        let (sender, receiver) = mpsc::channel(MOST);
        let path = address.strip_prefix("unix://").unwrap_or(address);
        (Self(sender, namespace.into()), Sender { receiver, path: path.into(), client: None })
    }

    /// Something has happened.
    pub fn publish(&self, event: &Event) {
        // Full: see MOST.
        let _ = self.0.try_send(event.envelope(&self.1));
    }
}

/// Sends events, one after the other.
pub struct Sender {
    receiver: mpsc::Receiver<Envelope>,
    path: PathBuf,
    client: Option<EventsClient>,
}

impl Sender {
    /// Sends until there will be no more.
    pub async fn run(mut self) {
        while let Some(envelope) = self.receiver.recv().await {
            if self.path.as_os_str().is_empty() {
                continue;
            }
            let request = ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
            let _ = timeout(AWAY, self.send(&request)).await;
        }
    }

    async fn send(&mut self, request: &ForwardRequest) {
        let mut refused = 0;
        while refused < TRIES {
            let client = match self.client.take() {
                Some(client) => client,
                None => match self.connect().await {
                    Ok(client) => client,
                    // There is no such directory, or no way to watch it: nobody will come back there.
                    Err(_) => return,
                },
            };
            match client.forward(with_duration(ANSWER), request).await {
                Ok(_) => {
                    self.client = Some(client);
                    return;
                }
                // It has answered, in a way; or the connection is of before a restart, or whoever listens there hangs up.
                Err(_) => refused += 1,
            }
        }
    }

    /// Connects, when there is somebody to connect to.
    async fn connect(&self) -> io::Result<EventsClient> {
        let address = format!("unix://{}", self.path.display());
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        // Watched before it is tried, so that nothing is missed.
        let watch = Watch::new(directory)?;
        loop {
            match Client::connect(&address).await {
                Ok(client) => return Ok(EventsClient::new(client)),
                Err(_) => watch.changed().await?,
            }
        }
    }
}

/// Tells of what is made in a directory.
struct Watch(AsyncFd<std::os::fd::OwnedFd>);

impl Watch {
    fn new(directory: &Path) -> io::Result<Self> {
        let fd = crate::inotify::instance()?;
        // A socket is there before anybody listens at it; containerd changes its mode after that.
        let made = inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO | inotify::WatchFlags::ATTRIB;
        inotify::add_watch(&fd, directory, made)?;
        // SAFETY: the descriptor is owned by the AsyncFd from here on, and never replaced.
        Ok(Self(unsafe { AsyncFd::register(fd) }?))
    }

    /// Waits for the next thing to be made.
    async fn changed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            // What it is does not matter: who is there is found out by connecting.
            match rustix::io::read(self.0.get_ref(), &mut [0; 4096]) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::WOULDBLOCK) => ready.clear_ready(),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

#[cfg(test)]
impl Sender {
    /// What waits to be sent.
    pub fn waiting(&mut self) -> Vec<Envelope> {
        std::iter::from_fn(|| self.receiver.try_recv().ok()).collect()
    }
}
