//! A container of the pod, from its making to its end, and what is executed in it.

mod watch;

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use containerd_shim_protos::api::{CreateTaskRequest, DeleteResponse, ExecProcessRequest, ProcessInfo};
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskIO as EventIo, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::shim::oci::ProcessDetails;
use podhull_protocol::ContainerStatsResponse;
use rustix::process::{Signal, pidfd_send_signal};
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use ttrpc::{Code, Result};

use super::error::{error, failed, not_found, not_now, of_command, of_create, of_exec, of_io, of_kill, of_stats};
use super::events::{Event, Publisher, any, timestamp};
use super::io::{Io, Names, Owner};
use super::options::Options;
use super::process::{Phase, Process};
use super::timed::Durations;
use super::{process, rootfs, scrape};
use crate::bundle;
use crate::cgroup::Manager;
use crate::log::Log;
use crate::pod::{self, Announce, CommandError, Create, Execution, Handed, Inherited, Launch};
use crate::signals;
use crate::spec::{Config, Resources};
use crate::state::{self, Known, Status};

/// Most processes that are known of a container. Those that have ended, and that nobody has deleted, make room for others: CRI-O
/// deletes none that it has killed because it took too long.
const MOST_EXECUTED: usize = 4096;

/// What all containers of a shim have in common.
pub struct Surroundings {
    /// containerd's namespace.
    pub namespace: String,
    /// The state root.
    pub root: PathBuf,
    /// File with the configuration of the pod's runtime class, where that was said before there was a container.
    pub class: Option<PathBuf>,
    /// Where to say what is done.
    pub log: Log,
    /// The same for processes that are started.
    pub debug: bool,
    /// Who is told what happens.
    pub publisher: Publisher,
    /// How long it took to answer.
    pub durations: Arc<Durations>,
}

/// A container.
pub struct Container {
    id: String,
    bundle: PathBuf,
    surroundings: Arc<Surroundings>,
    /// Where to say what is done with it.
    log: Log,
    cgroups: Manager,
    /// Whether it is what holds a pod open, which containerd knows as a sandbox and not as a container: no event is of it.
    holds_pod: bool,
    /// Its first process.
    pub init: Arc<Process>,
    executed: Mutex<HashMap<String, Arc<Process>>>,
    /// Whether its first process has ended, which is told later: nothing is executed any more.
    ending: AtomicBool,
    /// Whether the ends of all that was executed in it have been told: its own is next, and nothing begins.
    over: AtomicBool,
    /// Ends when its first process is watched, which it does not begin before.
    watched: Mutex<Option<oneshot::Receiver<()>>>,
    /// Who serves its metrics.
    metrics: OnceLock<Serving>,
}

/// What ends when it is dropped.
struct Serving(AbortHandle);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Does what waits, beside everything else.
pub async fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(failed)
}

impl Container {
    /// Makes it, up to its program's start.
    pub async fn create(surroundings: Arc<Surroundings>, request: CreateTaskRequest) -> Result<Arc<Self>> {
        Self::make(surroundings, request, false).await
    }

    /// Makes one without a program, which holds a pod open.
    pub async fn hold_pod(surroundings: Arc<Surroundings>, id: &str, bundle: &Path) -> Result<Arc<Self>> {
        let bundle = bundle.to_string_lossy().into_owned();
        Self::make(surroundings, CreateTaskRequest { id: id.into(), bundle, ..Default::default() }, true).await
    }

    async fn make(surroundings: Arc<Surroundings>, request: CreateTaskRequest, holds_pod: bool) -> Result<Arc<Self>> {
        let began = pod::monotonic_now();
        if !request.checkpoint.is_empty() {
            return Err(error(
                Code::UNIMPLEMENTED,
                "checkpoint: podhull does not restore containers, which are in virtual machines",
            ));
        }
        let wrong = |what: String| error(Code::INVALID_ARGUMENT, what);
        let bundle = PathBuf::from(&request.bundle);
        let (asked, read) = {
            let (asked, bundle) = (request.options.clone().into_option().unwrap_or_default(), bundle.clone());
            beside(move || (Options::read(&asked), bundle::config(&bundle))).await?
        };
        let asked = asked.map_err(|error| wrong(error.to_string()))?;
        let config = read.map_err(|error| of_create(error.into()))?;
        if config.terminal() != request.terminal {
            let [has, wants] = [config.terminal(), request.terminal];
            return Err(wrong(format!("process.terminal of config.json is {has}, and the request says {wants}")));
        }
        let names = Names {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let owner = Owner { namespace: surroundings.namespace.clone(), id: request.id.clone() };
        let Io { streams, terminal, ends } = Io::open(&names, &owner).await.map_err(of_io)?;
        let container = Arc::new(Self {
            cgroups: asked.cgroups.unwrap_or_else(|| manager(&config)),
            id: request.id.clone(),
            bundle,
            log: surroundings.log.clone().of_container(&request.id),
            surroundings,
            holds_pod,
            init: Arc::new(Process::new("", Vec::new(), names)),
            executed: Mutex::default(),
            ending: AtomicBool::new(false),
            over: AtomicBool::new(false),
            watched: Mutex::default(),
            metrics: OnceLock::new(),
        });
        let this = container.clone();
        let class = asked.config.or_else(|| this.surroundings.class.clone());
        let mounts = request.rootfs.clone();
        let made = beside(move || {
            rootfs::mount_all(&this.bundle, &mounts).map_err(failed)?;
            let launch = Launch {
                words: this.words(&["create", "--bundle"], &[this.bundle.as_os_str(), this.id.as_ref()]),
                streams: Some(streams),
            };
            let create = Create {
                id: &this.id,
                bundle: &this.bundle,
                announce: Announce::default(),
                console_socket: false,
                cgroups: this.cgroups,
                class: class.as_deref(),
                // Not this process's own, which the host spares as it does containerd.
                oom_score_adj: Some(0),
                began,
                holds_pod,
                root: &this.surroundings.root,
                log: &this.log,
            };
            pod::create(&create, launch, Handed { terminal, inherited: Inherited::default() }).map_err(|error| {
                let _ = rootfs::unmount_all(&this.bundle);
                of_create(error)
            })
        });
        let created = match made.await? {
            Ok(created) => created,
            Err(error) => {
                ends.finish().await;
                return Err(error);
            }
        };
        if let Some(machine) = created.machine {
            // Its end is its shadow's business; here it is waited for.
            match process::open(machine) {
                Ok(machine) => drop(tokio::spawn(async move { process::reap(machine.as_fd()).await })),
                Err(error) => container.log.warning(&format!("process {machine}: {error}")),
            }
        }
        let pidfd = match process::open(created.shadow) {
            Ok(pidfd) => pidfd,
            Err(error) => {
                process::end(created.shadow);
                let removed = container.remove().await;
                ends.finish().await;
                return Err(removed.err().unwrap_or_else(|| failed(error)));
            }
        };
        container.init.made(created.shadow, pidfd, ends, Phase::Created);
        container.publish(&Event::Created(TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: MessageField::some(EventIo {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
                ..Default::default()
            }),
            pid: container.init.pid_u32(),
            ..Default::default()
        }));
        container.watch();
        if created.machine.is_some() {
            container.serve_metrics();
        }
        Ok(container)
    }

    /// Serves what the pod uses, for as long as this container is known: the machine is its own.
    fn serve_metrics(&self) {
        let pod = state::open_pod(&self.surroundings.root, &self.id).map_err(std::io::Error::other);
        let given = pod.and_then(|pod| Ok(self.surroundings.durations.give_to(pod.as_fd())?));
        if let Err(error) = given {
            self.log.warning(&format!("cannot say how long requests take: {error}"));
        }
        let (surroundings, log, id) = (self.surroundings.clone(), self.log.clone(), self.id.clone());
        let serving = tokio::spawn(async move {
            // A pod without is one all the same.
            if let Err(error) = scrape::serve(surroundings.root.clone(), id).await {
                log.warning(&format!("cannot serve metrics: {error}"));
            }
        });
        let _ = self.metrics.set(Serving(serving.abort_handle()));
    }

    /// The command line of a shadow.
    fn words(&self, command: &[&str], rest: &[&std::ffi::OsStr]) -> Vec<OsString> {
        let Surroundings { root, debug, .. } = &*self.surroundings;
        let mut words: Vec<OsString> =
            vec!["--root".into(), root.into(), "--log".into(), self.bundle.join("log.json").into()];
        words.extend(["--log-format", "json"].map(OsString::from));
        words.extend(debug.then(|| "--debug".into()));
        words.extend((self.cgroups == Manager::Systemd).then(|| "--systemd-cgroup".into()));
        words.extend(command.iter().map(OsString::from));
        words.extend(rest.iter().map(OsString::from));
        words
    }

    fn publish(&self, event: &Event) {
        if !self.holds_pod {
            self.surroundings.publisher.publish(event);
        }
    }

    fn executed(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.executed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its first process, or with a name one that is executed in it.
    pub fn process(&self, exec: &str) -> Result<Arc<Process>> {
        match exec {
            "" => Ok(self.init.clone()),
            exec => {
                self.executed().get(exec).cloned().ok_or_else(|| not_found(format!("process {exec:?} does not exist")))
            }
        }
    }

    /// Its state, or that of what is executed in it.
    pub async fn state(&self, exec: &str) -> Result<containerd_shim_protos::api::StateResponse> {
        let process = self.process(exec)?;
        let paused = process.phase() == Phase::Running && self.is_paused().await?;
        Ok(process.state(&self.id, &self.bundle.to_string_lossy(), paused))
    }

    /// As it is written down: the command line pauses and resumes, too.
    async fn is_paused(&self) -> Result<bool> {
        let (root, id) = (self.surroundings.root.clone(), self.id.clone());
        beside(move || Known::load(&root, &id).is_ok_and(|known| known.status() == Status::Paused)).await
    }

    /// Starts its program, or executes one that was added; returns the process that stands for it.
    pub async fn start(self: &Arc<Self>, exec: &str) -> Result<u32> {
        let process = self.process(exec)?;
        let _turn = process.turn.lock().await;
        if exec.is_empty() {
            self.watched().await;
            let this = self.clone();
            let Surroundings { root, .. } = &*self.surroundings;
            let root = root.clone();
            beside(move || pod::start_created(&root, &this.id, &this.log)).await?.map_err(of_command)?;
            process.started();
            self.publish(&Event::Started(TaskStart {
                container_id: self.id.clone(),
                pid: process.pid_u32(),
                ..Default::default()
            }));
        } else {
            self.execute(&process).await?;
            self.publish(&Event::ExecStarted(TaskExecStarted {
                container_id: self.id.clone(),
                exec_id: exec.into(),
                pid: process.pid_u32(),
                ..Default::default()
            }));
            tokio::spawn(self.clone().watch_executed(process.clone()));
        }
        Ok(process.pid_u32())
    }

    async fn execute(self: &Arc<Self>, process: &Arc<Process>) -> Result<()> {
        match process.phase() {
            Phase::Added => {}
            // While another request was waited for.
            Phase::Forgotten => return Err(not_found(format!("process {:?} does not exist", process.exec))),
            _ => return Err(not_now(format!("process {:?} was started already", process.exec))),
        }
        self.check_running()?;
        let owner = Owner { namespace: self.surroundings.namespace.clone(), id: self.id.clone() };
        let Io { streams, terminal, ends } = Io::open(&process.names, &owner).await.map_err(of_io)?;
        let (this, added) = (self.clone(), process.clone());
        let executed = beside(move || {
            let known = pod::running(&this.surroundings.root, &this.id, false)?;
            let spec = added.spec();
            let config = bundle::with_process(&this.bundle, |value| {
                *value = spec;
                value["terminal"] = added.names.terminal.into();
            })?;
            let words = this.words(&["exec", "--detach"], &[this.id.as_ref()]);
            let execution = Execution {
                known,
                config,
                announce: Announce::default(),
                console_socket: false,
                inherited: Inherited::default(),
            };
            pod::exec_in_background(execution, Launch { words, streams: Some(streams) }, terminal)
        });
        let unwanted = match executed.await? {
            Ok(pid) => {
                let refused = match process::open(pid) {
                    // The end of the container was told meanwhile, and nothing comes after it.
                    Ok(_) if self.over.load(Ordering::SeqCst) => self.not_running(),
                    Ok(pidfd) => {
                        process.made(pid, pidfd, ends, Phase::Running);
                        return Ok(());
                    }
                    Err(error) => failed(error),
                };
                process::end(pid);
                refused
            }
            Err(error) => of_exec(error),
        };
        ends.finish().await;
        Err(unwanted)
    }

    fn not_running(&self) -> ttrpc::Error {
        not_now(format!("container {:?} is not running", self.id))
    }

    fn check_running(&self) -> Result<()> {
        if self.ending.load(Ordering::Relaxed) { Err(self.not_running()) } else { Ok(()) }
    }

    /// Adds a program to execute.
    pub fn add(&self, request: ExecProcessRequest) -> Result<()> {
        self.check_running()?;
        let wrong =
            |what: String| error(Code::INVALID_ARGUMENT, format!("spec of process {:?}: {what}", request.exec_id));
        if request.exec_id.is_empty() {
            return Err(wrong("no name".into()));
        }
        // Kept as it came: read, it would take several times the memory, for as long as nobody starts it.
        let spec = request.spec.into_option().unwrap_or_default().value;
        let read: Value = serde_json::from_slice(&spec).map_err(|e| wrong(e.to_string()))?;
        if !read.is_object() {
            return Err(wrong("not an object".into()));
        }
        let names =
            Names { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, terminal: request.terminal };
        let mut executed = self.executed();
        if executed.contains_key(&request.exec_id) {
            return Err(error(Code::ALREADY_EXISTS, format!("process {:?} exists already", request.exec_id)));
        }
        if executed.len() >= MOST_EXECUTED && !forget_oldest(&mut executed) {
            let what = format!("container {:?} has {MOST_EXECUTED} processes that have not ended", self.id);
            return Err(error(Code::RESOURCE_EXHAUSTED, what));
        }
        executed.insert(request.exec_id.clone(), Arc::new(Process::new(&request.exec_id, spec, names)));
        drop(executed);
        self.publish(&Event::ExecAdded(TaskExecAdded {
            container_id: self.id.clone(),
            exec_id: request.exec_id,
            ..Default::default()
        }));
        Ok(())
    }

    /// Sends a signal to its first process, to all of them, or to one that was executed.
    pub async fn kill(self: &Arc<Self>, exec: &str, signal: u32, all: bool) -> Result<()> {
        let process = self.process(exec)?;
        let number = i32::try_from(signal).unwrap_or(-1);
        match process.phase() {
            Phase::Exited(_) | Phase::Forgotten => return Err(not_found("process already finished")),
            Phase::Added => return Err(not_now("process not created")),
            Phase::Created | Phase::Running => {}
        }
        // Whether it is there, which is known by now.
        if number == 0 {
            return Ok(());
        }
        if !(1..=64).contains(&number) {
            return Err(error(Code::INVALID_ARGUMENT, format!("there is no signal {signal}")));
        }
        if exec.is_empty() {
            let this = self.clone();
            if number == libc::SIGKILL {
                tokio::spawn(self.clone().insist());
            }
            return match beside(move || pod::kill(&this.surroundings.root, &this.id, number, all)).await? {
                // Nobody inside does it, or there is nobody left but what it has written: see there. Its end is yet to be told.
                Err(CommandError::Agent(_) | CommandError::NotRunning(..)) if number == libc::SIGKILL => Ok(()),
                killed => killed.map_err(of_kill),
            };
        }
        let Some(shadow) = process.shadow() else { return Err(not_now("process not created")) };
        // Real-time signals have no names.
        let signal = match number {
            libc::SIGSTOP => return signals::send_stop(shadow).map_err(|_| not_found("process already finished")),
            // SAFETY: it is in range; whoever sends signals of the C library's own means a process of the guest.
            _ => unsafe { Signal::from_raw_unchecked(number) },
        };
        pidfd_send_signal(shadow, signal).map_err(|_| not_found("process already finished"))
    }

    /// Whether its program was started, and has not ended.
    pub fn runs(&self) -> bool {
        self.init.phase() == Phase::Running
    }

    /// Stops all of it where it is.
    pub async fn pause(self: &Arc<Self>) -> Result<()> {
        let this = self.clone();
        beside(move || pod::pause(&this.surroundings.root, &this.id)).await?.map_err(of_command)?;
        self.publish(&Event::Paused(TaskPaused { container_id: self.id.clone(), ..Default::default() }));
        Ok(())
    }

    /// Lets it go on.
    pub async fn resume(self: &Arc<Self>) -> Result<()> {
        let this = self.clone();
        beside(move || pod::resume(&this.surroundings.root, &this.id)).await?.map_err(of_command)?;
        self.publish(&Event::Resumed(TaskResumed { container_id: self.id.clone(), ..Default::default() }));
        Ok(())
    }

    /// Other limits.
    pub async fn update(self: &Arc<Self>, resources: Vec<u8>) -> Result<()> {
        let wrong = |what: String| error(Code::INVALID_ARGUMENT, format!("resources: {what}"));
        let document = serde_json::from_slice(&resources).map_err(|e| wrong(e.to_string()))?;
        let resources = Resources::read(document).map_err(|e| wrong(e.to_string()))?;
        let this = self.clone();
        let update = move || pod::update(&this.surroundings.root, &this.id, &resources, &this.log);
        beside(update).await?.map_err(of_command)
    }

    /// What it uses.
    pub async fn stats(self: &Arc<Self>) -> Result<ContainerStatsResponse> {
        let this = self.clone();
        beside(move || pod::stats(&this.surroundings.root, &this.id)).await?.map_err(of_stats)
    }

    /// The processes of the host that stand for it and for what is executed in it. The first one is among them when it has ended,
    /// too: a containerd that is back from a restart takes a shim without processes for one that nobody needs.
    pub fn pids(&self) -> Vec<ProcessInfo> {
        let mut all = vec![self.init.clone()];
        all.extend(self.executed().values().filter(|process| process.phase() == Phase::Running).cloned());
        let info = |process: Arc<Process>| {
            let details = ProcessDetails { exec_id: process.exec.clone(), ..Default::default() };
            let info = if process.exec.is_empty() { MessageField::none() } else { MessageField::some(any(&details)) };
            ProcessInfo { pid: process.pid_u32(), info, ..Default::default() }
        };
        all.into_iter().map(info).collect()
    }

    /// Forgets a program that has ended, or was never started.
    pub async fn forget(&self, exec: &str) -> Result<DeleteResponse> {
        let process = self.process(exec)?;
        let turn = process.turn.lock().await;
        match process.phase() {
            Phase::Added => process.forget(),
            Phase::Exited(_) => {
                drop(turn);
                process.finished().await;
            }
            // By another request, meanwhile.
            Phase::Forgotten => return Err(not_found(format!("process {exec:?} does not exist"))),
            Phase::Created | Phase::Running => return Err(not_now(format!("process {exec:?} is running"))),
        }
        let mut executed = self.executed();
        // Another of its name may be there by now.
        if executed.get(exec).is_some_and(|known| Arc::ptr_eq(known, &process)) {
            executed.remove(exec);
        }
        Ok(deleted(&process))
    }

    /// Removes it.
    pub async fn delete(&self) -> Result<DeleteResponse> {
        // One that is being started runs, or has ended, when that is over.
        let phase = {
            let _turn = self.init.turn.lock().await;
            self.init.phase()
        };
        match phase {
            Phase::Running => return Err(not_now(format!("container {:?} is running: stop it first", self.id))),
            Phase::Exited(_) => self.init.finished().await,
            _ => {}
        }
        self.remove().await?;
        // It may have been there until now, and its end is told.
        self.init.wait().await;
        self.init.finished().await;
        // Who waits for one that was never started waits for nothing.
        self.executed().drain().for_each(|(_, process)| process.forget());
        let answer = deleted(&self.init);
        self.publish(&Event::Deleted(TaskDelete {
            container_id: self.id.clone(),
            pid: answer.pid,
            exit_status: answer.exit_status,
            exited_at: answer.exited_at.clone(),
            ..Default::default()
        }));
        Ok(answer)
    }

    /// Removes what there is of it beside this process, whatever it does.
    async fn remove(&self) -> Result<()> {
        let (surroundings, id, bundle) = (self.surroundings.clone(), self.id.clone(), self.bundle.clone());
        let log = self.log.clone();
        let removed = beside(move || {
            let removed = pod::destroy(&surroundings.root, &id, true, &log).map_err(of_command)?;
            rootfs::unmount_all(&bundle).map_err(failed)?;
            Ok::<_, ttrpc::Error>(removed)
        });
        if let Some(state) = removed.await?? {
            // Nobody waits for the guest to give back its room: CRI does all there is to do for an end in ten seconds, or has lost it.
            // This process does, at its end, as the thread has what publishes events.
            let (surroundings, log) = (self.surroundings.clone(), self.log.clone());
            drop(tokio::task::spawn_blocking(move || pod::leave(&surroundings.root, &state, &log)));
        }
        Ok(())
    }
}

/// Makes room by the one that ended first; false if all of them go on.
fn forget_oldest(executed: &mut HashMap<String, Arc<Process>>) -> bool {
    let ended = executed.iter().filter_map(|(name, process)| Some((process.exit()?.at, name)));
    let Some(name) = ended.min().map(|(_, name)| name.clone()) else { return false };
    executed.remove(&name).is_some()
}

/// What is said of a process that is not to be known any more.
fn deleted(process: &Process) -> DeleteResponse {
    let exit = process.exit();
    DeleteResponse {
        pid: process.pid_u32(),
        exit_status: exit.map_or(0, |exit| exit.status),
        exited_at: exit.map(|exit| timestamp(exit.at)).map_or_else(MessageField::none, MessageField::some),
        ..Default::default()
    }
}

/// Who makes control groups, where options do not say: what `linux.cgroupsPath` looks like does.
fn manager(config: &Config) -> Manager {
    let path = config.spec().linux().as_ref().and_then(|linux| linux.cgroups_path().as_deref());
    let path = path.and_then(Path::to_str).unwrap_or_default();
    if !path.starts_with('/') && path.matches(':').count() == 2 { Manager::Systemd } else { Manager::Files }
}

#[cfg(test)]
impl Container {
    /// One whose first process is a child of this process.
    pub fn of_child(surroundings: Arc<Surroundings>, id: &str, pid: i32) -> Arc<Self> {
        let container = Arc::new(Self {
            cgroups: Manager::Files,
            id: id.into(),
            bundle: surroundings.root.join(id),
            log: surroundings.log.clone().of_container(id),
            surroundings,
            holds_pod: false,
            init: Arc::new(Process::new("", Vec::new(), Names::default())),
            executed: Mutex::default(),
            ending: AtomicBool::new(false),
            over: AtomicBool::new(false),
            watched: Mutex::default(),
            metrics: OnceLock::new(),
        });
        container.init.made(pid, process::open(pid).unwrap(), super::io::Ends::default(), Phase::Running);
        container.watch();
        container
    }

    /// Has a child of this process stand for a program that was added.
    pub fn execute_child(self: &Arc<Self>, exec: &str, pid: i32) -> Arc<Process> {
        let process = self.process(exec).unwrap();
        process.made(pid, process::open(pid).unwrap(), super::io::Ends::default(), Phase::Running);
        tokio::spawn(self.clone().watch_executed(process.clone()));
        process
    }

    /// Whether the end of its first process was seen, if not told.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }
}
