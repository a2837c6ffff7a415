//! `containerd.task.v2.Task` and `containerd.task.v3.Task`, which are the same under two names; and the pod they are of, if
//! containerd knows it as one.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse,
    StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::{Task, create_task};
use tokio::sync::Notify;
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, Result};

use super::container::{Container, Surroundings};
use super::error::{error, failed, not_found};
use super::events::{any, timestamp};
use super::metrics;
use super::sandbox::{self, Sandbox};
use super::timed::timed;

/// Names of the service: that of the version that containerd has spoken since 1.3, and of 2.0.
const NAMES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// The containers of a pod.
pub struct Tasks {
    pub surroundings: Arc<Surroundings>,
    containers: Mutex<HashMap<String, Arc<Place>>>,
    /// The pod, if it was made for itself: while it is there, it is what keeps this process.
    sandbox: OnceLock<Arc<Sandbox>>,
    /// Held while that is made: of two that are asked for at once the later one is to find the first.
    pub making: tokio::sync::Mutex<()>,
    /// Whether containerd has asked for the end, which comes with that of the last container. Changed while those are locked.
    asked: AtomicBool,
    /// That there is nothing more to do.
    over: Arc<Notify>,
}

/// That of a container, from the moment it is asked for.
#[derive(Default)]
struct Place {
    /// Held while it is made, and while it is removed.
    turn: tokio::sync::Mutex<()>,
    /// Once it was made.
    container: OnceLock<Arc<Container>>,
}

/// What containerd asks for.
struct Service(Arc<Tasks>);

impl Tasks {
    /// None yet.
    pub fn new(surroundings: Arc<Surroundings>, over: Arc<Notify>) -> Arc<Self> {
        let (containers, sandbox, asked) = (Mutex::default(), OnceLock::new(), AtomicBool::new(false));
        Arc::new(Self { surroundings, containers, sandbox, making: tokio::sync::Mutex::default(), asked, over })
    }

    /// To be registered with a server.
    pub fn services(self: &Arc<Self>) -> HashMap<String, ttrpc::r#async::Service> {
        let service = Arc::new(Service(self.clone()));
        let named = |name: &str| {
            create_task(service.clone()).into_values().map(move |service| (name.to_owned(), service)).next()
        };
        let sandbox = create_sandbox(Arc::new(sandbox::Service(self.clone())));
        let services = NAMES.iter().filter_map(|name| named(name)).chain(sandbox);
        services.map(|(name, service)| (name, timed(service, &self.surroundings.durations))).collect()
    }

    /// The pod, if it was made for itself.
    pub fn sandbox(&self) -> Option<Arc<Sandbox>> {
        self.sandbox.get().cloned()
    }

    /// Whether there is neither a pod nor a container yet.
    pub fn is_free(&self) -> bool {
        self.sandbox.get().is_none() && self.containers().is_empty()
    }

    /// Takes a pod, if there is none.
    pub fn give(&self, sandbox: &Arc<Sandbox>) -> bool {
        self.sandbox.set(sandbox.clone()).is_ok()
    }

    /// Containers that are there.
    pub fn made(&self) -> Vec<Arc<Container>> {
        self.containers().values().filter_map(|place| place.container.get().cloned()).collect()
    }

    /// The pod is over: so is this process, with the last container.
    pub fn end(&self) {
        let containers = self.containers();
        self.asked.store(true, Ordering::Relaxed);
        if self.is_over(&containers) {
            self.over.notify_one();
        }
    }

    /// Whether there is nothing more to do.
    fn is_over(&self, containers: &HashMap<String, Arc<Place>>) -> bool {
        containers.is_empty() && self.asked.load(Ordering::Relaxed)
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Arc<Place>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, id: &str) -> Result<Arc<Place>> {
        self.containers().get(id).cloned().ok_or_else(|| missing(id))
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.place(id)?.container.get().cloned().ok_or_else(|| missing(id))
    }

    async fn create(&self, request: CreateTaskRequest) -> Result<CreateTaskResponse> {
        let id = request.id.clone();
        let place = Arc::new(Place::default());
        let _turn = place.turn.lock().await;
        {
            let mut containers = self.containers();
            // It would be left alone within seconds.
            if self.is_over(&containers) {
                return Err(error(Code::UNAVAILABLE, "this shim is ending: start another"));
            }
            match containers.entry(id.clone()) {
                Entry::Occupied(_) => {
                    return Err(error(Code::ALREADY_EXISTS, format!("container {id:?} exists already")));
                }
                Entry::Vacant(free) => drop(free.insert(place.clone())),
            }
        }
        let make = async {
            if let Some(sandbox) = self.sandbox() {
                // Else it would be in a machine of its own.
                sandbox.running()?;
                sandbox.complete(Path::new(&request.bundle)).await?;
            }
            Container::create(self.surroundings.clone(), request).await
        };
        let container = make.await.inspect_err(|_| self.remove(&id))?;
        let pid = container.init.pid_u32();
        let _ = place.container.set(container);
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn delete(&self, request: DeleteRequest) -> Result<DeleteResponse> {
        if !request.exec_id.is_empty() {
            return self.container(&request.id)?.forget(&request.exec_id).await;
        }
        let place = self.place(&request.id)?;
        // One that is still being made is waited for: who has given it up asks once.
        let _turn = place.turn.lock().await;
        let container = self.container(&request.id)?;
        let answer = container.delete().await?;
        self.remove(&request.id);
        Ok(answer)
    }

    fn remove(&self, id: &str) {
        let mut containers = self.containers();
        containers.remove(id);
        if self.is_over(&containers) {
            self.over.notify_one();
        }
    }

    /// A container is no longer needed, and this process if that was the last one. containerd 2 may say so for the first container of
    /// a pod alone, while others are still being removed; or for each.
    fn shutdown(&self) {
        if self.sandbox.get().is_none() {
            self.end();
        }
    }
}

fn missing(id: &str) -> ttrpc::Error {
    not_found(format!("container {id:?} does not exist"))
}

/// Does what was asked for to its end. The server drops what it waits for when the connection ends, or when who asked has waited
/// long enough; what is half done by then, nobody would finish.
pub async fn whole<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    tokio::spawn(work).await.unwrap_or_else(|failure| Err(error(Code::INTERNAL, failure.to_string())))
}

impl Service {
    /// One that somebody asks for: not containerd, which asks for what there is (Connect, Pids) when it is back.
    fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.0.surroundings.publisher.asked();
        self.0.container(id)
    }
}

#[async_trait]
impl Task for Service {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Result<CreateTaskResponse> {
        let tasks = self.0.clone();
        whole(async move { tasks.create(request).await }).await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Result<StartResponse> {
        let container = self.container(&request.id)?;
        let pid = whole(async move { container.start(&request.exec_id).await }).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Result<Empty> {
        self.container(&request.id)?.add(request)?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Result<DeleteResponse> {
        let tasks = self.0.clone();
        tasks.surroundings.publisher.asked();
        whole(async move { tasks.delete(request).await }).await
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Result<StateResponse> {
        self.container(&request.id)?.state(&request.exec_id).await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Result<PidsResponse> {
        Ok(PidsResponse { processes: self.0.container(&request.id)?.pids(), ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Result<Empty> {
        let container = self.container(&request.id)?;
        whole(async move { container.pause().await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Result<Empty> {
        let container = self.container(&request.id)?;
        whole(async move { container.resume().await }).await?;
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
        process.resize((size(request.height), size(request.width))).map_err(failed)?;
        Ok(Empty::new())
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
        let exit = process.wait().await.ok_or_else(|| not_found("the process was deleted before it was started"))?;
        let exited_at = MessageField::some(timestamp(exit.at));
        Ok(WaitResponse { exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Result<StatsResponse> {
        let stats = any(&metrics::of(self.container(&request.id)?.stats().await?));
        Ok(StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Result<ConnectResponse> {
        let task_pid = self.0.container(&request.id).map_or(0, |container| container.init.pid_u32());
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Result<Empty> {
        self.0.shutdown();
        Ok(Empty::new())
    }
}

#[cfg(test)]
mod tests;
