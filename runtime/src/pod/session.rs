//! A container's life in its machine, from the first instruction of the guest to the last byte of output.

use std::cell::Cell;
use std::os::fd::BorrowedFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use podhull_protocol::CreatePodRequest;
use podhull_vmm::control::Device;

use super::link::Orders;
use super::size::Size;
use super::start::RunError;
use crate::agent::{Agent, Exit, Growth};
use crate::log::Log;
use crate::machine::{Channel, MachineError};
use crate::signals::{self, Signals};
use crate::stdio::Stdio;

/// How long a guest may take to boot, on a host that boots many at once.
pub const BOOT: Duration = Duration::from_secs(60);

/// How far a run is; decides what signals mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No container yet: a signal that ends programs ends the run.
    Starting,
    /// Signals are the container's.
    Running,
    /// Only output is left.
    Ended,
}

/// How far a container is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Only its program is missing.
    Created,
    /// Its program runs, by an order.
    Started,
}

/// What a session ends with.
pub enum Outcome {
    /// The container has ended, and its output was written.
    Exited(Exit),
    /// A signal ended the run while there was no container.
    Interrupted(signals::Signal),
}

/// A container and the machine it runs in.
pub struct Session<'a> {
    pub id: &'a str,
    pub agent: Agent,
    pub channel: &'a Channel,
    pub stdio: &'a Stdio,
    pub size: Size,
    /// The pod's directory.
    pub pod: BorrowedFd<'a>,
    pub log: &'a Log,
    phase: Cell<Phase>,
    booted: Cell<bool>,
}

impl<'a> Session<'a> {
    /// A session in which nothing has happened yet.
    pub fn new(
        id: &'a str,
        agent: Agent,
        channel: &'a Channel,
        stdio: &'a Stdio,
        size: Size,
        pod: BorrowedFd<'a>,
        log: &'a Log,
    ) -> Self {
        let (phase, booted) = (Cell::new(Phase::Starting), Cell::new(false));
        Self { id, agent, channel, stdio, size, pod, log, phase, booted }
    }

    /// Whether the agent has listened.
    pub fn booted(&self) -> bool {
        self.booted.get()
    }

    /// The whole life. `request` makes pod and container, as soon as it is ordered; `reached` is called at each step. The
    /// program is executed when that is ordered, in the foreground, else when somebody else asks the agent for it.
    pub async fn live(
        &self,
        start: impl Future<Output = Result<(), MachineError>>,
        mut request: CreatePodRequest,
        orders: &Orders,
        foreground: bool,
        mut reached: impl FnMut(Step) -> Result<(), RunError>,
    ) -> Result<Outcome, RunError> {
        let ready = self.channel.agent_ready();
        start.await?;
        self.log.debug(|| format!("{}: machine runs", self.id));
        let boot = async {
            let exits = match tokio::time::timeout(BOOT, ready).await {
                Ok(Ok(exits)) => exits,
                Ok(Err(_)) => return Err(MachineError::Gone.into()),
                Err(_) => return Err(RunError::NoBoot),
            };
            self.booted.set(true);
            self.log.debug(|| format!("{}: agent ready after {exits} exits to user space", self.id));
            Ok(())
        };
        let ordered = async { Ok(orders.go_on().await?) };
        tokio::try_join!(boot, ordered)?;

        // Not before: the guest sets its clock by it.
        request.realtime_ns = realtime();
        let streams = async {
            let mut flow = self.stdio.connect(self.pod)?;
            flow.connected().await?;
            Ok::<_, RunError>(flow)
        };
        let pod = async { Ok(self.agent.create_pod(&request).await?) };
        let (mut flow, release, ()) = tokio::try_join!(streams, pod, self.add_cpus_and_memory())?;
        self.log.debug(|| format!("{}: container created on Linux {release}", self.id));
        if self.size.cpus > 1 || self.grows() {
            // Programs look once, when they start, at how many CPUs and how much memory there are, and size thread pools
            // and heaps by it.
            let memory_bytes = if self.grows() { self.size.memory } else { 0 };
            self.agent.grow(Growth { cpus: self.size.cpus, memory_bytes, rescan: false }).await?;
        }

        let mut events = self.agent.events(self.id, "").await?;
        reached(Step::Created)?;

        self.phase.set(Phase::Running);
        if foreground {
            orders.go_on().await?;
            self.agent.start_container(self.id).await?;
            self.log.debug(|| format!("{}: container started", self.id));
            reached(Step::Started)?;
        }

        let exit = {
            let mut exit = std::pin::pin!(events.exit_of(self.id, ""));
            let abandoned = async {
                // In the foreground there is one more order: that there will be none.
                match foreground {
                    true => orders.go_on().await,
                    false => std::future::pending().await,
                }
            };
            let mut abandoned = std::pin::pin!(abandoned);
            tokio::select! {
                biased;
                exit = &mut exit => exit?,
                Err(gone) = &mut abandoned => return Err(gone.into()),
                added = self.add_helpers() => {
                    added?;
                    tokio::select! {
                        exit = exit => exit?,
                        Err(gone) = abandoned => return Err(gone.into()),
                    }
                }
            }
        };
        self.phase.set(Phase::Ended);
        self.log.debug(|| format!("{}: container ended with status {}", self.id, exit.status));

        // Its end is known, so what is left of it may fail to go; but unmounting writes its last pages back.
        let (drained, deleted) = tokio::join!(flow.drained(), self.agent.delete_container(self.id));
        if let Err(error) = deleted {
            self.log.debug(|| format!("{}: {error}", self.id));
        }
        drained?;
        self.log.debug(|| format!("{}: output written, container deleted", self.id));
        Ok(Outcome::Exited(exit))
    }

    /// Whether the machine is to have more memory than it boots with.
    fn grows(&self) -> bool {
        self.size.memory > self.size.memory_base
    }

    /// Brings the machine from what boots soonest to what the container was promised, while that is made.
    async fn add_cpus_and_memory(&self) -> Result<(), RunError> {
        if self.size.cpus > 1 {
            self.channel.set_cpus(self.size.cpus).await?;
        }
        if self.grows() {
            self.channel.set_memory(self.size.memory).await?;
        }
        Ok(())
    }

    /// Adds what no program waits for.
    async fn add_helpers(&self) -> Result<(), RunError> {
        self.channel.add(vec![Device::Entropy, Device::Balloon]).await?;
        self.agent.grow(Growth { cpus: self.size.cpus, memory_bytes: 0, rescan: true }).await?;
        self.log.debug(|| format!("{}: {} CPUs, {} bytes of memory", self.id, self.size.cpus, self.size.memory));
        Ok(())
    }

    /// Passes signals on; returns only when one ends the run.
    pub async fn signals(&self, signals: &Signals) -> Result<Outcome, RunError> {
        loop {
            let signal = signals.next().await.map_err(RunError::Signals)?;
            match signal {
                libc::SIGWINCH => self.resize().await,
                signal if signals::is_ours(signal) => {}
                signal if self.phase.get() == Phase::Running => {
                    // It may have ended at this very moment.
                    if let Err(error) = self.agent.signal(self.id, signal, false).await {
                        self.log.debug(|| format!("{}: signal {signal}: {error}", self.id));
                    }
                }
                signal if signals::ends_by_default(signal) => return Ok(Outcome::Interrupted(signal)),
                _ => {}
            }
        }
    }

    async fn resize(&self) {
        let (Phase::Running, Some((rows, columns))) = (self.phase.get(), self.stdio.size()) else { return };
        if let Err(error) = self.agent.resize(self.id, "", rows.into(), columns.into()).await {
            self.log.debug(|| format!("{}: resize: {error}", self.id));
        }
    }
}

/// The wall clock in nanoseconds.
fn realtime() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}
