//! The ends of a container's processes, and what is told of them: in order, and whatever holds them up.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use containerd_shim_protos::protobuf::MessageField;
use tokio::sync::oneshot;

use super::super::events::{Event, timestamp};
use super::super::process::{Exit, Phase, Process};
use super::{Container, beside};
use crate::agent::{Agent, AgentError, Events, Happening};
use crate::state::{Known, StateError};

/// How long what is executed in a container may take to end after that has, and again when it was killed.
const AFTER: Duration = Duration::from_secs(10);

/// How long a guest may take to write back what a container has written that was killed.
const LAST_PAGES: Duration = Duration::from_secs(60);

/// How long the last event of a container may come after its end.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// How long the start of a program may wait for somebody to watch it.
const WATCHED: Duration = Duration::from_secs(10);

/// How often it is tried to be told of what happens to a container.
const TRIES: u32 = 5;

/// How long after one the next is made: a host or a guest that lacks memory, or descriptors, may have some again.
const PAUSE: Duration = Duration::from_secs(1);

/// How often containerd is told that a process was killed for lack of memory.
const OFTEN: Duration = Duration::from_millis(100);

impl Container {
    /// Begins to wait for the end of its first process, and for what happens before.
    pub(super) fn watch(self: &Arc<Self>) {
        let (watching, watched) = oneshot::channel();
        *self.watched.lock().unwrap_or_else(PoisonError::into_inner) = Some(watched);
        tokio::spawn(self.clone().watch_first(watching));
    }

    /// Waits for the end of its first process. What was executed in it ends with it, and is told of first.
    async fn watch_first(self: Arc<Self>, watching: oneshot::Sender<()>) {
        let (lives, over) = oneshot::channel();
        let mut memory = tokio::spawn(self.clone().watch_memory(watching, over));
        let exit = end_of(&self.init).await;
        self.ending.store(true, Ordering::Relaxed);
        drop(lives);
        self.end_executed().await;
        // That it was killed for lack of memory is known in the guest before its end is.
        if tokio::time::timeout(LAST_WORDS, &mut memory).await.is_err() {
            memory.abort();
        }
        self.ended(&self.init, exit).await;
    }

    /// The same for a program that was executed.
    pub(super) async fn watch_executed(self: Arc<Self>, process: Arc<Process>) {
        let exit = end_of(&process).await;
        self.ended(&process, exit).await;
    }

    /// Tells of the end of a process, and lets go of what was held for it.
    async fn ended(&self, process: &Process, exit: Exit) {
        // It is told of its start first.
        let turn = process.turn.lock().await;
        self.publish(&Event::Exited(TaskExit {
            container_id: self.id.clone(),
            id: if process.exec.is_empty() { self.id.clone() } else { process.exec.clone() },
            pid: process.pid_u32(),
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        }));
        process.exited(exit);
        drop(turn);
        process.finish().await;
    }

    /// The container has ended, and with it what was executed in it: their ends are told before its own. What does not end by
    /// itself is killed, and if that does not help given up.
    async fn end_executed(&self) {
        let all: Vec<_> = self.executed().values().cloned().collect();
        for killed in [false, true] {
            if killed {
                all.iter().filter(|process| process.phase() == Phase::Running).for_each(|process| process.kill());
            }
            let at_rest = async {
                for process in &all {
                    process.at_rest().await;
                }
            };
            if tokio::time::timeout(AFTER, at_rest).await.is_ok() {
                break;
            }
        }
        // What has not begun by now does not; what has in this moment ends first, too.
        self.over.store(true, Ordering::SeqCst);
        for process in all.iter().filter(|process| process.phase() == Phase::Running) {
            process.kill();
            let _ = tokio::time::timeout(AFTER, process.wait()).await;
        }
    }

    /// Tells of processes that are killed for lack of memory. `watching` goes when none is missed any more, or it cannot be helped;
    /// `over` when the container has ended: who does not watch by then has nothing more to wait for.
    async fn watch_memory(self: Arc<Self>, watching: oneshot::Sender<()>, mut over: oneshot::Receiver<()>) {
        let (mut watching, mut last) = (Some(watching), None);
        for number in 1..=TRIES {
            let begun = tokio::select! {
                _ = &mut over => return,
                begun = self.begin_to_watch() => begun,
            };
            let told = match begun {
                Ok(None) => return,
                Ok(Some((_agent, events))) => {
                    watching = None;
                    self.tell_of_kills(events, &mut last).await
                }
                Err(error) => Err(error),
            };
            let Err(error) = told else { break };
            // With its machine the connection ends, a moment before that is known here.
            if tokio::time::timeout(PAUSE, &mut over).await.is_ok() {
                break;
            }
            let what = "cannot tell whether processes are killed for lack of memory";
            self.log.warning(&format!("{what}: {error} (attempt {number} of {TRIES})"));
        }
        drop(watching);
    }

    /// Asks its guest what happens to it; none if it is not there any more.
    async fn begin_to_watch(self: &Arc<Self>) -> Result<Option<(Agent, Events)>, AgentError> {
        let this = self.clone();
        let dial = beside(move || {
            let pod = match Known::load(&this.surroundings.root, &this.id).and_then(|known| known.pod()) {
                Err(StateError::Missing(_)) => return Ok(None),
                pod => pod.map_err(io::Error::other)?,
            };
            crate::stdio::dial(pod.as_fd(), podhull_protocol::AGENT_PORT).map(Some)
        });
        let dialed = dial.await.map_err(io::Error::other).flatten().map_err(AgentError::Connect)?;
        let Some(stream) = dialed else { return Ok(None) };
        let agent = Agent::new(stream)?;
        let events = agent.watch(&self.id).await?;
        Ok(Some((agent, events)))
    }

    /// Tells of what happens until it ends.
    async fn tell_of_kills(&self, mut events: Events, last: &mut Option<Instant>) -> Result<(), AgentError> {
        while events.next(&self.id).await? == Happening::OutOfMemory {
            // The guest can say it as often as it likes.
            if last.is_some_and(|last| last.elapsed() < OFTEN) {
                continue;
            }
            *last = Some(Instant::now());
            // Where CRI-O, which takes no events, looks for it.
            let _ = std::fs::write(self.bundle.join("oom"), "");
            self.publish(&Event::OutOfMemory(TaskOOM { container_id: self.id.clone(), ..Default::default() }));
        }
        Ok(())
    }

    /// Waits until nothing that happens to it is missed. A guest that does not say so is none that anybody needs to be told of.
    pub(super) async fn watched(&self) {
        let watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(watched) = watched {
            let _ = tokio::time::timeout(WATCHED, watched).await;
        }
    }

    /// It is being killed. What does not end then is held up by output that nobody reads, or by a guest that does nothing any more:
    /// the output is given up, and then what stands for it here is ended, with its machine if that is its own. containerd gives up
    /// on a pod that does not start, and removes it, within a minute.
    pub(super) async fn insist(self: Arc<Self>) {
        if tokio::time::timeout(AFTER, self.init.wait()).await.is_ok() {
            return;
        }
        self.init.give_up_output();
        // What never ran has written nothing.
        let patience = if self.init.phase() == Phase::Created { Duration::ZERO } else { LAST_PAGES };
        if tokio::time::timeout(patience, self.init.wait()).await.is_err() {
            self.init.kill();
        }
    }
}

/// Waits for the end of a process that was made.
async fn end_of(process: &Process) -> Exit {
    let status = process.reap().await.unwrap_or(255);
    Exit { status, at: SystemTime::now() }
}
