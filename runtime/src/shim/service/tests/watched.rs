//! The same for what is told of a container by a guest that is not to be had at once.

use podhull_protocol::{Agent, EventsRequest, OutOfMemory, create_agent, event};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use ttrpc::r#async::ServerStreamSender;

use super::*;
use crate::state::{Directory, State};

/// Tells each who watches that a process was killed, and that the container has ended.
struct Telling(mpsc::UnboundedSender<()>);

#[async_trait]
impl Agent for Telling {
    async fn events(
        &self,
        _: &TtrpcContext,
        request: EventsRequest,
        stream: ServerStreamSender<podhull_protocol::Event>,
    ) -> Result<()> {
        let kinds = [
            event::Kind::Watching(podhull_protocol::Empty::default()),
            event::Kind::OutOfMemory(OutOfMemory::default()),
            event::Kind::Exit(podhull_protocol::Exit::default()),
        ];
        for kind in kinds {
            let container_id = request.container_id.clone();
            let kind = Some(kind);
            stream.send(&podhull_protocol::Event { container_id, kind, ..Default::default() }).await?;
        }
        let _ = self.0.send(());
        Ok(())
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_that_is_not_to_be_had_at_once_is_asked_again() {
    let mut shim = Shim::start().await;
    let root = shim.tasks.surroundings.root.clone();
    let held = Directory::create(&root, "c").unwrap();
    held.write(&State::new("c", 1, &root, &root, None)).unwrap();
    let (sender, mut told) = mpsc::unbounded_channel();
    let agent = shim.directory.path().join("agent");
    let server = ttrpc::r#async::Server::new().bind(&format!("unix://{}", agent.display())).unwrap();
    let mut server = server.register_service(create_agent(Arc::new(Telling(sender))));
    server.start().await.unwrap();
    let machine = UnixListener::bind(held.pod().join("vsock.sock")).unwrap();
    tokio::spawn(async move {
        drop(machine.accept().await.unwrap());
        let (mut stream, _) = machine.accept().await.unwrap();
        while stream.read_u8().await.unwrap() != b'\n' {}
        stream.write_all(b"OK 1\n").await.unwrap();
        let mut agent = UnixStream::connect(&agent).await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut stream, &mut agent).await;
    });
    let (container, mut child) = shim.container("c");
    timeout(SOON, told.recv()).await.unwrap().unwrap();
    let known = async {
        while !root.join("c/oom").exists() {
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, known).await.unwrap();
    child.kill().unwrap();
    timeout(SOON, container.init.wait()).await.unwrap();
    let topics: Vec<_> = shim.sender.waiting().into_iter().map(|event| event.topic).collect();
    assert_eq!(topics, ["/tasks/oom", "/tasks/exit"]);
}
