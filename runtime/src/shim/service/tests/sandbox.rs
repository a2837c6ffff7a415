//! The same for a pod that was made for itself; what holds it open is a child of the test, without a machine.

use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest, SandboxStatusRequest,
    ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
};
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::types::mount::Mount;

use super::*;

impl Shim {
    async fn pod(&self) -> SandboxClient {
        SandboxClient::new(ttrpc::r#async::Client::new(Socket::new(self.connect().await)))
    }

    /// A pod that was not started.
    fn sandbox(&self, id: &str) -> Arc<Sandbox> {
        let sandbox = Arc::new(Sandbox::new(id.into(), self.directory.path().join(id)));
        assert!(self.tasks.give(&sandbox));
        sandbox
    }
}

fn start(id: &str) -> StartSandboxRequest {
    StartSandboxRequest { sandbox_id: id.into(), ..Default::default() }
}

fn stop(id: &str, timeout_secs: u32) -> StopSandboxRequest {
    StopSandboxRequest { sandbox_id: id.into(), timeout_secs, ..Default::default() }
}

fn wait(id: &str) -> WaitSandboxRequest {
    WaitSandboxRequest { sandbox_id: id.into(), ..Default::default() }
}

fn status(id: &str) -> SandboxStatusRequest {
    SandboxStatusRequest { sandbox_id: id.into(), verbose: true, ..Default::default() }
}

fn ping(id: &str) -> PingRequest {
    PingRequest { sandbox_id: id.into(), ..Default::default() }
}

fn metrics(id: &str) -> SandboxMetricsRequest {
    SandboxMetricsRequest { sandbox_id: id.into(), ..Default::default() }
}

fn platform(id: &str) -> PlatformRequest {
    PlatformRequest { sandbox_id: id.into(), ..Default::default() }
}

fn shutdown(id: &str) -> ShutdownSandboxRequest {
    ShutdownSandboxRequest { sandbox_id: id.into(), ..Default::default() }
}

/// All that is asked of a pod that there is not.
async fn check_missing(client: &SandboxClient) {
    let context = Context::default;
    assert_eq!(code(client.start_sandbox(context(), &start("none")).await), Code::NOT_FOUND);
    assert_eq!(code(client.platform(context(), &platform("none")).await), Code::NOT_FOUND);
    assert_eq!(code(client.stop_sandbox(context(), &stop("none", 1)).await), Code::NOT_FOUND);
    assert_eq!(code(client.wait_sandbox(context(), &wait("none")).await), Code::NOT_FOUND);
    assert_eq!(code(client.sandbox_status(context(), &status("none")).await), Code::NOT_FOUND);
    assert_eq!(code(client.ping_sandbox(context(), &ping("none")).await), Code::NOT_FOUND);
    assert_eq!(code(client.sandbox_metrics(context(), &metrics("none")).await), Code::NOT_FOUND);
}

#[tokio::test]
async fn what_is_asked_of_no_pod_is_not_found_but_for_its_end() {
    let shim = Shim::start().await;
    let client = shim.pod().await;
    check_missing(&client).await;
    client.shutdown_sandbox(Context::default(), &shutdown("none")).await.unwrap();
    timeout(SOON, shim.over.notified()).await.unwrap();
}

#[tokio::test]
async fn a_pod_that_cannot_be_made_leaves_room_for_one_that_can() {
    let shim = Shim::start().await;
    let client = shim.pod().await;
    let create = |id: &str, bundle: &str| CreateSandboxRequest {
        sandbox_id: id.into(),
        bundle_path: bundle.into(),
        ..Default::default()
    };
    let options = Any { type_url: "frob".into(), ..Default::default() };
    for (request, expected) in [
        (create("", "/b"), Code::INVALID_ARGUMENT),
        (create("../p", "/b"), Code::INVALID_ARGUMENT),
        (create("p", ""), Code::INVALID_ARGUMENT),
        (create("p", "b"), Code::INVALID_ARGUMENT),
        (CreateSandboxRequest { rootfs: vec![Mount::new()], ..create("p", "/b") }, Code::INVALID_ARGUMENT),
        (CreateSandboxRequest { options: Some(options).into(), ..create("p", "/b") }, Code::INVALID_ARGUMENT),
        (create("p", "/dev/null/b"), Code::UNKNOWN),
    ] {
        assert_eq!(code(client.create_sandbox(Context::default(), &request).await), expected, "{request:?}");
        assert!(shim.tasks.is_free());
    }
}

#[tokio::test]
async fn a_pod_that_was_not_started_does_nothing_but_end() {
    let shim = Shim::start().await;
    let client = shim.pod().await;
    let context = Context::default;
    shim.sandbox("p");
    check_missing(&client).await;
    // Somebody needs it.
    assert_eq!(code(client.shutdown_sandbox(context(), &shutdown("none")).await), Code::NOT_FOUND);
    let create = CreateSandboxRequest { sandbox_id: "q".into(), bundle_path: "/b".into(), ..Default::default() };
    assert_eq!(code(client.create_sandbox(context(), &create).await), Code::ALREADY_EXISTS);
    assert_eq!(code(client.ping_sandbox(context(), &ping("p")).await), Code::FAILED_PRECONDITION);
    assert_eq!(code(client.sandbox_metrics(context(), &metrics("p")).await), Code::FAILED_PRECONDITION);
    let found = client.platform(context(), &platform("p")).await.unwrap().platform.unwrap();
    assert_eq!((&*found.os, &*found.architecture), ("linux", "amd64"));
    let found = client.sandbox_status(context(), &status("p")).await.unwrap();
    assert_eq!((&*found.state, found.pid, found.exited_at.is_some()), ("SANDBOX_NOTREADY", 0, false));
    let info: serde_json::Value = serde_json::from_str(&found.info["info"]).unwrap();
    assert_eq!(info["bundle"], shim.directory.path().join("p").to_str().unwrap());
    let container = CreateTaskRequest { id: "c".into(), bundle: "/b".into(), ..Default::default() };
    let task = shim.client().await;
    assert_eq!(code(task.create(context(), &container).await), Code::FAILED_PRECONDITION);
    assert!(shim.tasks.containers().is_empty());
    // It has no files.
    assert_eq!(code(client.start_sandbox(context(), &start("p")).await), Code::UNKNOWN);

    let waiting = tokio::spawn({
        let client = shim.pod().await;
        async move { client.wait_sandbox(Context::default(), &wait("p")).await }
    });
    for timeout_secs in [0, 1000] {
        timeout(SOON, client.stop_sandbox(context(), &stop("p", timeout_secs))).await.unwrap().unwrap();
    }
    assert_eq!(timeout(SOON, waiting).await.unwrap().unwrap().unwrap().exit_status, 0);
    assert_eq!(client.wait_sandbox(context(), &wait("p")).await.unwrap().exit_status, 0);
    assert_eq!(code(client.start_sandbox(context(), &start("p")).await), Code::FAILED_PRECONDITION);
    assert_eq!(code(client.ping_sandbox(context(), &ping("p")).await), Code::FAILED_PRECONDITION);
    assert_eq!(code(task.create(context(), &container).await), Code::FAILED_PRECONDITION);
    assert!(client.sandbox_status(context(), &status("p")).await.unwrap().exited_at.is_some());
    client.shutdown_sandbox(context(), &shutdown("p")).await.unwrap();
    timeout(SOON, shim.over.notified()).await.unwrap();
}

#[tokio::test]
async fn containers_have_the_time_to_end_that_is_given_to_them() {
    let shim = Shim::start().await;
    let client = shim.pod().await;
    let context = Context::default;
    let (container, mut child) = shim.container("c");
    let (mut holding, pid) = sleeping();
    let holder = Container::of_child(shim.tasks.surroundings.clone(), "p", pid);
    shim.sandbox("p").hold(holder.clone());
    assert_eq!(code(client.start_sandbox(context(), &start("p")).await), Code::FAILED_PRECONDITION);
    let found = client.sandbox_status(context(), &status("p")).await.unwrap();
    assert_eq!((&*found.state, found.pid), ("SANDBOX_READY", pid.cast_unsigned()));
    // It has no guest that could answer.
    assert_eq!(code(client.ping_sandbox(context(), &ping("p")).await), Code::UNAVAILABLE);
    let mut stopping = tokio::spawn({
        let client = shim.pod().await;
        async move { client.stop_sandbox(Context::default(), &stop("p", 1000)).await }
    });
    // All of this is one thread: what was asked for has begun.
    for _ in 0..20 {
        client.platform(context(), &platform("p")).await.unwrap();
    }
    holding.kill().unwrap();
    timeout(SOON, holder.init.wait()).await.unwrap();
    assert!(timeout(Duration::from_millis(100), &mut stopping).await.is_err(), "a container goes on");
    child.kill().unwrap();
    timeout(SOON, stopping).await.unwrap().unwrap().unwrap();
    assert!(!container.runs());
    assert_eq!(client.wait_sandbox(context(), &wait("p")).await.unwrap().exit_status, 137);
    assert_eq!(code(client.sandbox_metrics(context(), &metrics("p")).await), Code::NOT_FOUND);
    // The process ends with its last container.
    client.shutdown_sandbox(context(), &shutdown("p")).await.unwrap();
    shim.client().await.delete(context(), &DELETE).await.unwrap();
    timeout(SOON, shim.over.notified()).await.unwrap();
}

#[tokio::test]
async fn containers_have_no_more_time_to_end_than_that() {
    let shim = Shim::start().await;
    let client = shim.pod().await;
    let (container, mut child) = shim.container("c");
    let (mut holding, pid) = sleeping();
    let holder = Container::of_child(shim.tasks.surroundings.clone(), "p", pid);
    shim.sandbox("p").hold(holder);
    let began = std::time::Instant::now();
    let request = stop("p", 1);
    let stopping = client.stop_sandbox(Context::default(), &request);
    let meanwhile = async { holding.kill().unwrap() };
    let (stopped, ()) = timeout(SOON, async { tokio::join!(stopping, meanwhile) }).await.unwrap();
    stopped.unwrap();
    assert!(began.elapsed() >= Duration::from_secs(1) && container.runs());
    child.kill().unwrap();
    timeout(SOON, container.init.wait()).await.unwrap();
}
