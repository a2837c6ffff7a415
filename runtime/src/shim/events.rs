//! Events for containerd, in the order in which they happened.
//!
//! A containerd that is being restarted is waited for: its socket is made anew, and the directory tells of that (inotify). It takes
//! events, and forgets them, some moments before those in it who want to know of them have begun to listen: CRI would not know that a
//! container was killed for lack of memory. So the first event waits until somebody asks for a container, which they do next.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
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
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;
use ttrpc::context::with_duration;

/// How long containerd may take to take one.
const ANSWER: Duration = Duration::from_secs(10);

/// When one that is away is looked for again though nobody has told that it is back: where too many wait to be answered by it, or nothing
/// can be had that would tell.
const AGAIN: Duration = Duration::from_secs(10);

/// How long a containerd that is back may take until somebody asks for a container. There may be nobody who does.
const SETTLED: Duration = Duration::from_secs(5);

/// How often one is sent that containerd does not want.
const TRIES: u32 = 5;

/// Most events that wait while containerd is away, which executes nothing meanwhile: each container ends once.
const MOST: usize = 4096;

/// How many of them may tell of kills for lack of memory, of which there is no end as long as what is killed is begun again.
const KILLS: usize = MOST / 2;

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
pub struct Publisher {
    sender: mpsc::Sender<Envelope>,
    namespace: String,
    asked: Arc<Notify>,
}

impl Publisher {
    /// For the containers of a namespace; the other half sends to `address`, or to nobody if that is empty.
    pub fn new(address: &str, namespace: &str) -> (Self, Sender) {
        let (sender, receiver) = mpsc::channel(MOST);
        let path = address.strip_prefix("unix://").unwrap_or(address);
        let asked = Arc::<Notify>::default();
        let sender = Self { sender, namespace: namespace.into(), asked: asked.clone() };
        (sender, Sender { receiver, path: path.into(), client: None, asked })
    }

    /// Something has happened.
    pub fn publish(&self, event: &Event) {
        if matches!(event, Event::OutOfMemory(_)) && self.sender.capacity() <= MOST - KILLS {
            return;
        }
        // Full: see MOST.
        let _ = self.sender.try_send(event.envelope(&self.namespace));
    }

    /// Somebody has asked for a container, and hears of what happens to it from now on.
    pub fn asked(&self) {
        self.asked.notify_waiters();
    }
}

/// Sends events, one after the other.
pub struct Sender {
    receiver: mpsc::Receiver<Envelope>,
    path: PathBuf,
    client: Option<EventsClient>,
    asked: Arc<Notify>,
}

impl Sender {
    /// Sends until there will be no more. A containerd that is away is waited for as long as it takes: there are never more than [`MOST`].
    pub async fn run(mut self) {
        while let Some(envelope) = self.receiver.recv().await {
            if self.path.as_os_str().is_empty() {
                continue;
            }
            let request = ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
            self.send(&request).await;
        }
    }

    async fn send(&mut self, request: &ForwardRequest) {
        let mut refused = 0;
        while refused < TRIES {
            let client = match self.client.take() {
                Some(client) => client,
                None => match self.connect_settled().await {
                    Ok(client) => client,
                    // There is no such directory: nobody will come back there.
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

    /// Connects, when there is somebody to connect to; if that was waited for, when somebody has asked for a container, too.
    async fn connect_settled(&self) -> io::Result<EventsClient> {
        // Begins here: who asks may be faster than what follows.
        let mut asked = pin!(self.asked.notified());
        asked.as_mut().enable();
        let (client, was_away) = self.connect().await?;
        if was_away {
            let _ = timeout(SETTLED, asked).await;
        }
        Ok(client)
    }

    /// Connects, when there is somebody to connect to. Says whether that had to be waited for.
    async fn connect(&self) -> io::Result<(EventsClient, bool)> {
        let address = format!("unix://{}", self.path.display());
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        let mut watch = None;
        let mut was_away = false;
        loop {
            match (Client::connect(&address).await, &watch) {
                (Ok(client), _) => return Ok((EventsClient::new(client), was_away)),
                (Err(_), Some(watch)) => changed(watch).await?,
                (Err(_), None) => match Watch::new(directory) {
                    // It is looked for once more, that nothing is missed that was made before.
                    Ok(made) => watch = Some(made),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(error),
                    Err(_) => tokio::time::sleep(AGAIN).await,
                },
            }
            was_away = true;
        }
    }
}

/// Waits until it is time to look again.
async fn changed(watch: &Watch) -> io::Result<()> {
    timeout(AGAIN, watch.changed()).await.unwrap_or(Ok(()))
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::os::unix::fs::PermissionsExt;

    use async_trait::async_trait;
    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    /// Takes topics.
    struct Taker(mpsc::UnboundedSender<String>);

    #[async_trait]
    impl Events for Taker {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let _ = self.0.send(request.envelope.topic.clone());
            Ok(Empty::new())
        }
    }

    /// Listens, and changes the mode of its socket afterwards, as containerd does.
    async fn listen(path: &Path) -> (Server, mpsc::UnboundedReceiver<String>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let services: HashMap<_, _> = create_events(Arc::new(Taker(sender)));
        let server = Server::new().bind(&format!("unix://{}", path.display())).unwrap();
        let mut server = server.register_service(services);
        server.start().await.unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660)).unwrap();
        (server, receiver)
    }

    /// Sends, and has found nobody yet.
    async fn in_vain(sender: Sender) -> tokio::task::JoinHandle<()> {
        let mut running = Box::pin(sender.run());
        assert!(timeout(Duration::from_millis(50), &mut running).await.is_err());
        tokio::spawn(running)
    }

    fn starved() -> Event {
        Event::OutOfMemory(task::TaskOOM { container_id: "c".into(), ..Default::default() })
    }

    #[test]
    fn kills_without_end_leave_room_for_ends() {
        let (publisher, mut sender) = Publisher::new("/nowhere", "default");
        (0..2 * MOST).for_each(|_| publisher.publish(&starved()));
        publisher.publish(&Event::Exited(task::TaskExit::default()));
        let mut waiting: Vec<_> =
            std::iter::from_fn(|| sender.receiver.try_recv().ok()).map(|event| event.topic).collect();
        assert_eq!(waiting.pop().as_deref(), Some(topics::TASK_EXIT_EVENT_TOPIC));
        assert_eq!(waiting, vec![topics::TASK_OOM_EVENT_TOPIC; KILLS]);
    }

    #[tokio::test]
    async fn who_is_back_is_told_when_somebody_asks() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let (publisher, sender) = Publisher::new(&path.display().to_string(), "n");
        publisher.publish(&starved());
        let sender = in_vain(sender).await;
        let (mut first, mut topics) = listen(&path).await;
        assert!(timeout(SETTLED / 10, topics.recv()).await.is_err());
        publisher.asked();
        assert_eq!(topics.recv().await.unwrap(), "/tasks/oom");
        // At once from then on.
        publisher.publish(&starved());
        let soon = SETTLED / 2;
        assert_eq!(timeout(soon, topics.recv()).await.unwrap().unwrap(), "/tasks/oom");

        // Nothing is waited for where it was not away when there was something to tell.
        first.stop_listen().await;
        drop(first);
        std::fs::remove_file(&path).unwrap();
        let (_second, mut topics) = listen(&path).await;
        publisher.publish(&starved());
        assert_eq!(timeout(soon, topics.recv()).await.unwrap().unwrap(), "/tasks/oom");
        sender.abort();
    }

    #[tokio::test]
    async fn who_is_back_is_told_where_nobody_asks() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let (publisher, sender) = Publisher::new(&path.display().to_string(), "n");
        publisher.publish(&starved());
        drop(publisher);
        let sender = in_vain(sender).await;
        let (_server, mut topics) = listen(&path).await;
        assert_eq!(timeout(SETTLED * 10, topics.recv()).await.unwrap().unwrap(), "/tasks/oom");
        sender.await.unwrap();
    }
}
