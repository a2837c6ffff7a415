//! The calls of `agent.proto`, each handed to the pod.

use std::io;
use std::sync::Arc;

use podhull_protocol::{
    AdjustClockRequest, AdjustClockResponse, Agent, ConfigureNetworkRequest, ContainerStatsRequest,
    ContainerStatsResponse, CreateContainerRequest, CreateContainerResponse, CreatePodRequest, CreatePodResponse,
    DeleteContainerRequest, DeleteProcessRequest, Empty, Event, EventsRequest, ExecProcessRequest, ExecProcessResponse,
    GrowRequest, GrowResponse, PauseContainerRequest, PodStatsRequest, PodStatsResponse, ReadLogRequest,
    ReadLogResponse, ResizeTerminalRequest, ResumeContainerRequest, SignalContainerRequest, SignalProcessRequest,
    StartContainerRequest, UpdateContainerRequest, UpdateVolumeRequest, event,
};
use ttrpc::r#async::{ServerStreamSender, TtrpcContext};

use crate::connection::Alive;
use crate::log;
use crate::pod::{Pod, PodError};

/// The service, as one connection has it.
pub struct Service {
    pod: Arc<Pod>,
    connection: Alive,
}

impl Service {
    pub fn new(pod: Arc<Pod>, connection: Alive) -> Self {
        Self { pod, connection }
    }

    /// Runs a call to its end even if its caller gives up: what it began is finished or removed.
    async fn run<T: Send + 'static>(
        &self,
        call: impl Future<Output = Result<T, PodError>> + Send + 'static,
    ) -> ttrpc::Result<T> {
        match tokio::spawn(call).await {
            Ok(result) => result.map_err(status),
            Err(error) => Err(ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INTERNAL, error))),
        }
    }
}

fn status(error: PodError) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), error))
}

fn empty(_: ()) -> Empty {
    Empty::default()
}

#[async_trait::async_trait]
impl Agent for Service {
    async fn create_pod(&self, _: &TtrpcContext, request: CreatePodRequest) -> ttrpc::Result<CreatePodResponse> {
        let pod = self.pod.clone();
        self.run(async move { pod.create(request).await }).await
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let pod = self.pod.clone();
        self.run(async move { pod.create_container(request).await }).await
    }

    async fn start_container(&self, _: &TtrpcContext, request: StartContainerRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        self.run(async move { pod.start(&request.id).await }).await.map(empty)
    }

    async fn signal_container(&self, _: &TtrpcContext, request: SignalContainerRequest) -> ttrpc::Result<Empty> {
        self.pod.signal(&request.id, request.signal, request.all).map(empty).map_err(status)
    }

    async fn exec_process(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<ExecProcessResponse> {
        let pod = self.pod.clone();
        self.run(async move { pod.exec(request).await }).await
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalProcessRequest) -> ttrpc::Result<Empty> {
        let signalled = self.pod.signal_process(&request.container_id, &request.exec_id, request.signal);
        signalled.map(empty).map_err(status)
    }

    async fn delete_process(&self, _: &TtrpcContext, request: DeleteProcessRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        self.run(async move { pod.delete_process(&request.container_id, &request.exec_id).await }).await.map(empty)
    }

    async fn pause_container(&self, _: &TtrpcContext, request: PauseContainerRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        self.run(async move { pod.pause(&request.id).await }).await.map(empty)
    }

    async fn resume_container(&self, _: &TtrpcContext, request: ResumeContainerRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        self.run(async move { pod.resume(&request.id).await }).await.map(empty)
    }

    async fn update_container(&self, _: &TtrpcContext, request: UpdateContainerRequest) -> ttrpc::Result<Empty> {
        self.pod.update(&request.id, &request.resources).map(empty).map_err(status)
    }

    async fn update_volume(&self, _: &TtrpcContext, request: UpdateVolumeRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        self.run(async move { pod.update_volume(&request.container_id, &request.name).await }).await.map(empty)
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: ContainerStatsRequest,
    ) -> ttrpc::Result<ContainerStatsResponse> {
        self.pod.stats(&request.id).map_err(status)
    }

    async fn pod_stats(&self, _: &TtrpcContext, _: PodStatsRequest) -> ttrpc::Result<PodStatsResponse> {
        Ok(self.pod.stats_of_all().await)
    }

    async fn read_log(&self, _: &TtrpcContext, request: ReadLogRequest) -> ttrpc::Result<ReadLogResponse> {
        let unreadable =
            |error| ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INTERNAL, format!("read the log: {error}")));
        let read = tokio::task::spawn_blocking(move || log::read(request.max_bytes as usize));
        let lines = read.await.map_err(io::Error::other).and_then(|lines| lines).map_err(unreadable)?;
        Ok(ReadLogResponse { lines, ..ReadLogResponse::default() })
    }

    async fn adjust_clock(&self, _: &TtrpcContext, request: AdjustClockRequest) -> ttrpc::Result<AdjustClockResponse> {
        self.pod.adjust_clock(request).map_err(status)
    }

    async fn resize_terminal(&self, _: &TtrpcContext, request: ResizeTerminalRequest) -> ttrpc::Result<Empty> {
        self.pod.resize(&request.id, &request.exec_id, request.rows, request.columns).map(empty).map_err(status)
    }

    async fn delete_container(&self, _: &TtrpcContext, request: DeleteContainerRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        self.run(async move { pod.delete(&request.id).await }).await.map(empty)
    }

    async fn grow(&self, _: &TtrpcContext, request: GrowRequest) -> ttrpc::Result<GrowResponse> {
        let pod = self.pod.clone();
        self.run(async move { pod.grow(request).await }).await
    }

    async fn configure_network(&self, _: &TtrpcContext, request: ConfigureNetworkRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        self.run(async move { pod.configure_network(request).await }).await.map(empty)
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        request: EventsRequest,
        stream: ServerStreamSender<Event>,
    ) -> ttrpc::Result<()> {
        let mut connection = self.connection.clone();
        if request.watch {
            let mut watcher = self.pod.events.watcher(&request.container_id, &request.exec_id);
            let watching = Some(event::Kind::Watching(Empty::default()));
            stream.send(&Event { container_id: request.container_id, kind: watching, ..Event::default() }).await?;
            while let Some(event) = connection.meanwhile(watcher.next()).await {
                stream.send(&event).await?;
            }
            return Ok(());
        }
        let mut reader = self.pod.events.reader(&request.container_id, &request.exec_id);
        while let Some(event) = connection.meanwhile(reader.next()).await {
            if let Err(error) = stream.send(&event).await {
                reader.put_back(event);
                return Err(error);
            }
        }
        Ok(())
    }
}
