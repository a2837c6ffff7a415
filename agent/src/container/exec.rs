//! Processes executed in a container that is there.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use podhull_protocol::Event;
use rustix::io::Errno;

use super::launch::{self, LaunchError, Place};
use super::limits::Limits;
use super::watched::{Ready, Watched};
use super::{Container, ContainerError, Streams, Surroundings, affinity, init, process};
use crate::descriptors::Wanted;
use crate::spec::{Process, Spec};
use crate::stdio::{ContainerEnds, Pumps};

/// Executed processes that a container may have and not be rid of.
const MOST: usize = 4096;

/// What is to be executed.
pub struct Request<'a> {
    pub id: String,
    pub process: &'a [u8],
    pub streams: Streams,
    pub descriptors: Wanted,
    /// Path of a control group below the container's.
    pub cgroup: &'a str,
    pub ignore_paused: bool,
    /// In the guest itself instead of in the container.
    pub in_guest: bool,
}

/// What a process in the guest itself is confined by: nothing.
const GUEST: &str = r#"{"ociVersion": "1.2.0", "process": {"cwd": "/"}}"#;

/// The executed processes of a container, by name; none where one is being made or deleted.
#[derive(Default)]
pub struct Executed {
    processes: Mutex<HashMap<String, Option<Arc<Watched>>>>,
}

impl Executed {
    fn reserve(&self, id: &str) -> Result<Reservation<'_>, ContainerError> {
        let mut processes = self.processes.lock().unwrap_or_else(PoisonError::into_inner);
        if processes.contains_key(id) {
            return Err(ContainerError::ProcessExists(id.into()));
        }
        if processes.len() >= MOST {
            return Err(ContainerError::TooManyProcesses);
        }
        processes.insert(id.into(), None);
        Ok(Reservation { executed: self, id: id.into(), becomes: None })
    }

    pub fn get(&self, id: &str) -> Result<Arc<Watched>, ContainerError> {
        let processes = self.processes.lock().unwrap_or_else(PoisonError::into_inner);
        processes.get(id).cloned().flatten().ok_or_else(|| ContainerError::NoProcess(id.into()))
    }

    /// Takes a process out for its deletion; its name stays taken.
    fn take(&self, id: &str) -> Result<(Arc<Watched>, Reservation<'_>), ContainerError> {
        let mut processes = self.processes.lock().unwrap_or_else(PoisonError::into_inner);
        let process = processes.get_mut(id).and_then(Option::take);
        let process = process.ok_or_else(|| ContainerError::NoProcess(id.into()))?;
        Ok((process, Reservation { executed: self, id: id.into(), becomes: None }))
    }

    pub fn all(&self) -> Vec<Arc<Watched>> {
        let processes = self.processes.lock().unwrap_or_else(PoisonError::into_inner);
        processes.values().flatten().cloned().collect()
    }
}

/// A name that is busy, and what it becomes when the work on it ends, in whatever way.
struct Reservation<'a> {
    executed: &'a Executed,
    id: String,
    becomes: Option<Arc<Watched>>,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut processes = self.executed.processes.lock().unwrap_or_else(PoisonError::into_inner);
        match self.becomes.take() {
            Some(process) => processes.insert(std::mem::take(&mut self.id), Some(process)),
            None => processes.remove(&self.id),
        };
    }
}

impl Container {
    /// Executes a process. Returns its pid when it has become its program.
    pub async fn exec(&self, request: Request<'_>, around: Surroundings<'_>) -> Result<i32, ContainerError> {
        let document = if request.in_guest { GUEST.as_bytes() } else { &self.spec };
        let spec: Spec = serde_json::from_slice(document).map_err(ContainerError::Spec)?;
        let given: Process = serde_json::from_slice(request.process).map_err(ContainerError::ProcessJson)?;
        let process = given.within(&spec.process);
        process::check(&process)?;
        if let Some(affinity) = &process.exec_cpu_affinity {
            affinity::check(affinity)?;
        }
        let limits = Limits::of(&process)?;
        let mut reservation = self.executed.reserve(&request.id)?;
        // What it lacks that is ending is no mistake of whoever asks.
        let or_stopped = |error| if self.init.is_ending() { ContainerError::ExecStopped } else { error };
        let ready = self.exec_ready(request, document, &spec, &process, &limits, &around).await.map_err(or_stopped)?;
        ready.pass().await.map_err(or_stopped)?;
        let event = Event { container_id: self.id.clone(), exec_id: reservation.id.clone(), ..Event::default() };
        let (watched, _) = ready.watched(event, self.cgroup.clone(), around.events.clone(), None);
        let pid = watched.pid.as_raw_nonzero().get();
        reservation.becomes = Some(Arc::new(watched));
        Ok(pid)
    }

    async fn exec_ready(
        &self,
        request: Request<'_>,
        document: &[u8],
        spec: &Spec,
        process: &Process,
        limits: &Limits,
        around: &Surroundings<'_>,
    ) -> Result<Ready, ContainerError> {
        let mut pumps = Pumps::new();
        let uid = spec.linux.guest_uid(process.user.uid);
        let gid = spec.linux.guest_gid(process.user.gid);
        let window = request.streams.window(process);
        let (mut ends, terminal) = request.streams.ends(process, &mut pumps, uid, gid)?;
        ends.further = request.descriptors.make(&mut pumps, uid, gid).await?;
        let config = init::Config {
            id: self.id.clone(),
            rootfs: if request.in_guest { "/".into() } else { self.rootfs.clone() },
            spec: serde_json::from_slice(document).map_err(ContainerError::Spec)?,
            process: Some(serde_json::from_slice(request.process).map_err(ContainerError::ProcessJson)?),
            holds_pod: false,
            shared_flags: 0,
            window,
        };
        // No waiting between this look and the launch, so that a container being deleted takes the process with it.
        if !self.init.is_alive() || self.is_deleted() {
            return Err(ContainerError::ExecStopped);
        }
        if self.cgroup.is_frozen() && !request.ignore_paused && !request.in_guest {
            return Err(ContainerError::ExecPaused);
        }
        let time_namespace = spec.has_namespace("time").then(|| self.time_namespace()).transpose()?;
        let place = Place::With { init: &self.init.pidfd, pid_namespace: spec.has_namespace("pid"), time_namespace };
        let launched = match request.in_guest {
            true => launch::launch(&config, &place, &around.cgroups.open_root()?, &ends, around.reaper)?,
            false => self.launch_exec(request.cgroup, &config, &place, &ends, around)?,
        };
        // Ours: the streams end when the process's own are closed.
        drop(ends);
        Ready::await_from(launched, limits, terminal, pumps).await
    }

    fn launch_exec(
        &self,
        below: &str,
        config: &init::Config<'_>,
        place: &Place<'_>,
        ends: &ContainerEnds,
        around: &Surroundings<'_>,
    ) -> Result<launch::Launched, ContainerError> {
        let busy = |error: &LaunchError| matches!(error, LaunchError::Clone(source) if source.raw_os_error() == Some(Errno::BUSY.raw_os_error()));
        let mut launched = launch::launch(config, place, &self.cgroup.open_below(below)?, ends, around.reaper);
        // A container that manages groups of its own (systemd, a nested engine) has left the top one, which may then have no
        // processes any more: join its init where that is now.
        if below.is_empty() && launched.as_ref().is_err_and(busy) {
            let group = self.cgroup.open_of(self.init.pid.as_raw_nonzero().get())?;
            launched = launch::launch(config, place, &group, ends, around.reaper);
        }
        Ok(launched?)
    }

    /// The init enters its time namespace with `execve`.
    fn time_namespace(&self) -> Result<std::os::fd::OwnedFd, ContainerError> {
        let kind = if self.is_started() { "time" } else { "time_for_children" };
        let opened = launch::open_namespace(&self.init.pid.as_raw_nonzero().to_string(), kind)?;
        // Not reaped yet, so the number was still its own.
        if !self.init.is_alive() {
            return Err(ContainerError::ExecStopped);
        }
        Ok(opened)
    }

    /// Sends a signal to an executed process.
    pub fn signal_process(&self, id: &str, number: i32) -> Result<(), ContainerError> {
        let signal = super::signal_of(number).ok_or(ContainerError::UnknownSignal(number))?;
        match self.executed.get(id)?.signal(signal) {
            Ok(true) => Ok(()),
            Ok(false) => Err(ContainerError::ProcessNotRunning),
            Err(source) => Err(ContainerError::Signal { signal: number, source }),
        }
    }

    /// Forgets an executed process, and kills it if it runs.
    pub async fn delete_process(&self, id: &str) -> Result<(), ContainerError> {
        let (process, _reservation) = self.executed.take(id)?;
        process.signal(rustix::process::Signal::KILL).map_err(|source| ContainerError::Signal { signal: 9, source })?;
        process.finish().await;
        Ok(())
    }
}
