//! `containerd.runtime.sandbox.v1.Sandbox` (containerd, `docs/sandbox-api.md`): the pod as such, where containerd is told that the
//! shim makes it (`sandboxer = "shim"`). There is no container from an image that holds the pod open then, but one of ours without a
//! program, of which containerd does not know: its shadow is the process that the pod's namespaces are looked up by, and its machine
//! is the pod's. So everything that containers of a pod have in common is as with `podsandbox`.

mod bundle;
mod config;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest, PlatformResponse,
    SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest,
    ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
    WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async;
use containerd_shim_protos::types::platform::Platform;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, Result};

use self::config::Pod;
use super::container::{Container, Surroundings, beside};
use super::error::{error, failed, not_found, not_now, of_stop, text};
use super::events::{any, timestamp};
use super::process::{Exit, Phase};
use super::service::{Tasks, whole};
use super::{metrics, rootfs};
use crate::state::check_id;

/// CRI's words for the state of a pod.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// How long a pod is given to end that is killed: longer than a container, which is given up in the end.
const END: Duration = Duration::from_secs(100);

/// A pod.
pub struct Sandbox {
    id: String,
    bundle: PathBuf,
    created_at: SystemTime,
    /// Held while it is started, and while it is stopped.
    turn: Mutex<()>,
    /// What holds it open, once it was started.
    holder: OnceLock<Arc<Container>>,
    /// How it ended.
    exit: watch::Sender<Option<Exit>>,
}

impl Sandbox {
    /// Makes its files. containerd has made the network namespace, and what is in it.
    async fn create(request: CreateSandboxRequest) -> Result<Arc<Self>> {
        let invalid = |what: String| error(Code::INVALID_ARGUMENT, what);
        if !request.rootfs.is_empty() {
            return Err(invalid("rootfs: a pod has no root file system of its own here".into()));
        }
        let pod = Pod::read(&request.options.unwrap_or_default()).map_err(|error| invalid(error.to_string()))?;
        check_id(&request.sandbox_id).map_err(|error| invalid(error.to_string()))?;
        let (bundle, netns) = (PathBuf::from(request.bundle_path), request.netns_path);
        // This process is in a bundle already, which may be another's.
        if !bundle.is_absolute() {
            return Err(invalid(format!("bundle_path: {bundle:?} is not an absolute path")));
        }
        let sandbox = Arc::new(Self::new(request.sandbox_id, bundle));
        let this = sandbox.clone();
        beside(move || bundle::make(&this.bundle, &this.id, &pod, &netns)).await?.map_err(failed)?;
        Ok(sandbox)
    }

    /// One that was not started.
    pub fn new(id: String, bundle: PathBuf) -> Self {
        let (created_at, exit) = (SystemTime::now(), watch::Sender::new(None));
        Self { id, bundle, created_at, turn: Mutex::default(), holder: OnceLock::new(), exit }
    }

    /// Starts its machine, and returns the process that stands for it.
    async fn start(self: &Arc<Self>, surroundings: Arc<Surroundings>) -> Result<u32> {
        let _turn = self.turn.lock().await;
        match (self.holder.get(), self.exit()) {
            (_, Some(_)) => return Err(not_now(format!("sandbox {:?} has ended", self.id))),
            (Some(_), None) => return Err(not_now(format!("sandbox {:?} was started already", self.id))),
            (None, None) => {}
        }
        let holder = Container::hold_pod(surroundings, &self.id, &self.bundle).await?;
        if let Err(error) = holder.start("").await {
            let _ = holder.delete().await;
            return Err(error);
        }
        let pid = holder.init.pid_u32();
        self.hold(holder);
        Ok(pid)
    }

    /// It is open from here on, until what holds it has ended.
    pub fn hold(self: &Arc<Self>, holder: Arc<Container>) {
        let _ = self.holder.set(holder.clone());
        let this = self.clone();
        tokio::spawn(async move {
            if let Some(exit) = holder.init.wait().await {
                this.exit.send_replace(Some(exit));
            }
        });
    }

    /// What holds it open, which then is a container that runs.
    pub fn running(&self) -> Result<&Arc<Container>> {
        match (self.holder.get(), self.exit()) {
            (Some(holder), None) => Ok(holder),
            (None, None) => Err(not_now(format!("sandbox {:?} was not started", self.id))),
            (_, Some(_)) => Err(not_now(format!("sandbox {:?} has ended", self.id))),
        }
    }

    /// Asks containers to end, and waits for that only so long. Who wants them to end at once is not held up meanwhile.
    async fn ask_to_end(&self, containers: Vec<Arc<Container>>, patience: Duration) {
        if patience.is_zero() || self.running().is_err() {
            return;
        }
        // One that has ended, or was not started, needs no asking: what has no handler yet would not hear it.
        let ends = containers.into_iter().filter(|container| container.runs()).map(|container| async move {
            // It may have ended meanwhile.
            let _ = container.kill("", libc::SIGTERM.cast_unsigned(), false).await;
            container.init.wait().await;
        });
        let all: JoinSet<()> = ends.collect();
        let _ = tokio::time::timeout(patience, all.join_all()).await;
    }

    /// Ends its machine, and with it what runs there; leaves nothing of it on the host but its files. Who stops it again asks for nothing.
    async fn stop(&self) -> Result<()> {
        let _turn = self.turn.lock().await;
        if let Some(holder) = self.holder.get() {
            if matches!(holder.init.phase(), Phase::Running | Phase::Created) {
                // It may have ended meanwhile.
                let _ = holder.kill("", libc::SIGKILL.cast_unsigned(), true).await;
            }
            let ended = tokio::time::timeout(END, holder.init.wait()).await;
            ended.map_err(|_| error(Code::DEADLINE_EXCEEDED, format!("sandbox {:?} does not end", self.id)))?;
            match holder.delete().await {
                Err(ttrpc::Error::RpcStatus(status)) if status.code() == Code::NOT_FOUND => {}
                deleted => drop(deleted.map_err(of_stop)?),
            }
        }
        // One that was never started has ended now.
        self.exit.send_if_modified(|exit| {
            let never = exit.is_none();
            exit.get_or_insert(Exit { status: 0, at: SystemTime::now() });
            never
        });
        let bundle = self.bundle.clone();
        beside(move || rootfs::unmount_all(&bundle)).await?.map_err(failed)
    }

    fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        ended.unwrap_or(Exit { status: 0, at: SystemTime::now() })
    }

    /// What a person wants to know of it beside its state.
    async fn info(self: &Arc<Self>, pid: u32) -> Result<String> {
        let path = self.bundle.join("config.json");
        let spec: serde_json::Value = beside(move || match std::fs::read(path) {
            Ok(text) => serde_json::from_slice(&text).unwrap_or_default(),
            Err(_) => serde_json::Value::Null,
        })
        .await?;
        Ok(serde_json::json!({ "pid": pid, "bundle": self.bundle, "runtimeSpec": spec }).to_string())
    }

    fn status(&self) -> SandboxStatusResponse {
        let exit = self.exit();
        let ready = self.holder.get().is_some() && exit.is_none();
        SandboxStatusResponse {
            sandbox_id: self.id.clone(),
            pid: self.holder.get().map_or(0, |holder| holder.init.pid_u32()),
            state: if ready { READY } else { NOT_READY }.into(),
            created_at: MessageField::some(timestamp(self.created_at)),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            ..Default::default()
        }
    }

    /// Adds what a container has of its pod to the specification in its bundle.
    pub async fn complete(self: &Arc<Self>, bundle: &Path) -> Result<()> {
        let (this, bundle) = (self.clone(), bundle.to_owned());
        beside(move || bundle::complete(&bundle, &this.bundle)).await?.map_err(failed)
    }
}

/// What containerd asks for.
pub struct Service(pub Arc<Tasks>);

impl Service {
    fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>> {
        let found = self.0.sandbox().filter(|sandbox| sandbox.id == id);
        found.ok_or_else(|| not_found(format!("sandbox {id:?} does not exist")))
    }
}

#[async_trait]
impl sandbox_async::Sandbox for Service {
    async fn create_sandbox(&self, _: &TtrpcContext, request: CreateSandboxRequest) -> Result<CreateSandboxResponse> {
        let tasks = self.0.clone();
        let work = async move {
            let _turn = tasks.making.lock().await;
            if !tasks.is_free() {
                return Err(error(Code::ALREADY_EXISTS, "this shim has a pod already"));
            }
            let bundle = PathBuf::from(&request.bundle_path);
            let created = match Sandbox::create(request).await {
                Ok(sandbox) if tasks.give(&sandbox) => return Ok(CreateSandboxResponse::new()),
                Ok(_) => return Err(error(Code::ALREADY_EXISTS, "this shim has a pod already")),
                Err(error) => error,
            };
            let _ = beside(move || rootfs::unmount_all(&bundle)).await;
            Err(created)
        };
        whole(work).await
    }

    async fn start_sandbox(&self, _: &TtrpcContext, request: StartSandboxRequest) -> Result<StartSandboxResponse> {
        let sandbox = self.sandbox(&request.sandbox_id)?;
        let surroundings = self.0.surroundings.clone();
        let created_at = MessageField::some(timestamp(sandbox.created_at));
        let pid = whole(async move { sandbox.start(surroundings).await }).await?;
        Ok(StartSandboxResponse { pid, created_at, ..Default::default() })
    }

    async fn platform(&self, _: &TtrpcContext, request: PlatformRequest) -> Result<PlatformResponse> {
        self.sandbox(&request.sandbox_id)?;
        let platform = Platform { os: "linux".into(), architecture: "amd64".into(), ..Default::default() };
        Ok(PlatformResponse { platform: MessageField::some(platform), ..Default::default() })
    }

    async fn stop_sandbox(&self, _: &TtrpcContext, request: StopSandboxRequest) -> Result<StopSandboxResponse> {
        let sandbox = self.sandbox(&request.sandbox_id)?;
        let (patience, containers) = (Duration::from_secs(request.timeout_secs.into()), self.0.made());
        let work = async move {
            sandbox.ask_to_end(containers, patience).await;
            sandbox.stop().await
        };
        whole(work).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(&self, _: &TtrpcContext, request: WaitSandboxRequest) -> Result<WaitSandboxResponse> {
        let exit = self.sandbox(&request.sandbox_id)?.wait().await;
        let exited_at = MessageField::some(timestamp(exit.at));
        Ok(WaitSandboxResponse { exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn sandbox_status(&self, _: &TtrpcContext, request: SandboxStatusRequest) -> Result<SandboxStatusResponse> {
        let sandbox = self.sandbox(&request.sandbox_id)?;
        let mut status = sandbox.status();
        if request.verbose {
            status.info.insert("info".into(), sandbox.info(status.pid).await?);
        }
        Ok(status)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> Result<PingResponse> {
        let sandbox = self.sandbox(&request.sandbox_id)?;
        // Its guest answers.
        sandbox.running()?.stats().await.map_err(|failure| {
            error(Code::UNAVAILABLE, format!("sandbox {:?} does not answer: {}", sandbox.id, text(&failure)))
        })?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> Result<ShutdownSandboxResponse> {
        match self.sandbox(&request.sandbox_id) {
            Ok(sandbox) => whole(async move { sandbox.stop().await }).await?,
            // One that could not be made is asked for, too: there is nobody else to end this process.
            Err(_) if self.0.is_free() => {}
            Err(missing) => return Err(missing),
        }
        self.0.end();
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> Result<SandboxMetricsResponse> {
        let sandbox = self.sandbox(&request.sandbox_id)?;
        let Some(holder) = sandbox.holder.get() else {
            return Err(not_now(format!("sandbox {:?} was not started", sandbox.id)));
        };
        let mut all = vec![holder.stats().await?];
        for container in self.0.made() {
            // One that has ended uses nothing any more.
            all.extend(container.stats().await);
        }
        let data = MessageField::some(any(&metrics::of(metrics::together(all))));
        let mut answer = SandboxMetricsResponse::new();
        let metric = answer.metrics.mut_or_insert_default();
        (metric.timestamp, metric.id) = (MessageField::some(timestamp(SystemTime::now())), request.sandbox_id);
        metric.data = data;
        Ok(answer)
    }
}

#[cfg(test)]
mod tests;
