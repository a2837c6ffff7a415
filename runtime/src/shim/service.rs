//! `containerd.task.v2.Task` and `containerd.task.v3.Task`, which are the same under two names.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse,
    StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::shim_async::{Task, create_task};
use tokio::sync::Notify;
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, Result};

use super::container::{Container, Surroundings};
use super::error::{error, failed, not_found};
use super::events::timestamp;
use super::process::Process;

/// Names of the service: that of the version that containerd has spoken since 1.3, and of 2.0.
const NAMES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// The containers of a pod, and what containerd asks for.
pub struct Tasks {
    surroundings: Arc<Surroundings>,
    /// `None`: it is being made.
    containers: Mutex<HashMap<String, Option<Arc<Container>>>>,
    /// That there is nothing more to do.
    over: Arc<Notify>,
}

impl Tasks {
    /// None yet.
    pub fn new(surroundings: Arc<Surroundings>, over: Arc<Notify>) -> Arc<Self> {
        Arc::new(Self { surroundings, containers: Mutex::default(), over })
    }

    /// To be registered with a server.
    pub fn services(self: &Arc<Self>) -> HashMap<String, ttrpc::r#async::Service> {
        let named =
            |name: &str| create_task(self.clone()).into_values().map(move |service| (name.to_owned(), service)).next();
        NAMES.iter().filter_map(|name| named(name)).collect()
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Container>>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.containers()
            .get(id)
            .cloned()
            .flatten()
            .ok_or_else(|| not_found(format!("container {id:?} does not exist")))
    }
}

fn deleted(process: &Process) -> DeleteResponse {
    let exit = process.exit();
    DeleteResponse {
        pid: process.pid_u32(),
        exit_status: exit.map_or(0, |exit| exit.status),
        exited_at: exit.map(|exit| timestamp(exit.at)).map_or_else(MessageField::none, MessageField::some),
        ..Default::default()
    }
}

#[async_trait]
impl Task for Tasks {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Result<CreateTaskResponse> {
        let id = request.id.clone();
        if self.containers().contains_key(&id) {
            return Err(error(Code::ALREADY_EXISTS, format!("container {id:?} exists already")));
        }
        self.containers().insert(id.clone(), None);
        match Container::create(self.surroundings.clone(), request).await {
            Ok(container) => {
                let pid = container.init.pid_u32();
                self.containers().insert(id, Some(container));
                Ok(CreateTaskResponse { pid, ..Default::default() })
            }
            Err(error) => {
                self.containers().remove(&id);
                Err(error)
            }
        }
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Result<StartResponse> {
        let pid = self.container(&request.id)?.start(&request.exec_id).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Result<Empty> {
        self.container(&request.id)?.add(request)?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Result<DeleteResponse> {
        let container = self.container(&request.id)?;
        if !request.exec_id.is_empty() {
            return Ok(deleted(&*container.forget(&request.exec_id).await?));
        }
        container.delete().await?;
        self.containers().remove(&request.id);
        Ok(deleted(&container.init))
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Result<StateResponse> {
        self.container(&request.id)?.state(&request.exec_id)
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Result<PidsResponse> {
        Ok(PidsResponse { processes: self.container(&request.id)?.pids(), ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Result<Empty> {
        self.container(&request.id)?.pause().await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Result<Empty> {
        self.container(&request.id)?.resume().await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Result<Empty> {
        let why = "checkpoint: not supported: podhull does not save running containers, which are in virtual machines";
        Err(error(Code::UNIMPLEMENTED, why))
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Result<Empty> {
        self.container(&request.id)?.kill(&request.exec_id, request.signal, request.all).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Result<Empty> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        let size = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
        // Of what has no terminal, or is not there yet, the size does not matter.
        match process.ends.get().and_then(|ends| ends.resize(size(request.height), size(request.width))) {
            Some(Err(error)) => Err(failed(error)),
            _ => Ok(Empty::new()),
        }
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Result<Empty> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        if request.stdin {
            process.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Result<Empty> {
        self.container(&request.id)?.update(request.resources.value.clone()).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Result<WaitResponse> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        let exit = process.wait().await;
        let exited_at = MessageField::some(timestamp(exit.at));
        Ok(WaitResponse { exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Result<StatsResponse> {
        let stats = MessageField::some(self.container(&request.id)?.stats().await?);
        Ok(StatsResponse { stats, ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Result<ConnectResponse> {
        let task_pid = self.container(&request.id).map_or(0, |container| container.init.pid_u32());
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Result<Empty> {
        // It is asked for each container; the last one counts.
        if self.containers().is_empty() {
            self.over.notify_one();
        }
        Ok(Empty::new())
    }
}
