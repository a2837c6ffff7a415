//! A container's life in a machine, from when it is made to the last byte of output.

use std::cell::{Cell, RefCell};
use std::os::fd::BorrowedFd;

use super::link::Orders;
use super::start::RunError;
use super::timeline::{self, Timeline};
use crate::agent::{Agent, Exit};
use crate::log::Log;
use crate::signals::{self, Signals};
use crate::stdio::{Flow, Stdio};

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

/// A container in a machine, and the way to its agent.
pub struct Session<'a> {
    pub id: &'a str,
    pub agent: Agent,
    pub stdio: &'a Stdio,
    /// The pod's directory.
    pub pod: BorrowedFd<'a>,
    pub log: &'a Log,
    phase: Cell<Phase>,
    /// How its start goes.
    pub timeline: RefCell<Timeline>,
}

impl<'a> Session<'a> {
    /// A session in which nothing has happened yet.
    pub fn new(
        id: &'a str,
        agent: Agent,
        stdio: &'a Stdio,
        pod: BorrowedFd<'a>,
        timeline: Timeline,
        log: &'a Log,
    ) -> Self {
        Self { id, agent, stdio, pod, log, phase: Cell::new(Phase::Starting), timeline: RefCell::new(timeline) }
    }

    /// A phase of its start has ended.
    pub fn reached(&self, phase: timeline::Phase) {
        self.timeline.borrow_mut().end(phase);
    }

    /// Connects the standard streams.
    pub async fn streams(&self) -> Result<Flow, RunError> {
        let mut flow = self.stdio.connect(self.pod)?;
        flow.connected().await?;
        Ok(flow)
    }

    /// The whole life. `make` makes the container, `helpers` is done while its program runs, and `reached` is called at each
    /// step. The program is executed when that is ordered, in the foreground, else when somebody else asks the agent for it.
    pub async fn live(
        &self,
        make: impl Future<Output = Result<Flow, RunError>>,
        helpers: impl Future<Output = Result<(), RunError>>,
        orders: &Orders,
        foreground: bool,
        mut reached: impl FnMut(Step, &Timeline) -> Result<(), RunError>,
    ) -> Result<Outcome, RunError> {
        let mut flow = make.await?;
        let mut events = self.agent.events(self.id, "").await?;
        reached(Step::Created, &self.timeline.borrow())?;

        self.phase.set(Phase::Running);
        if foreground {
            orders.go_on().await?;
            self.reached(timeline::Phase::Wait);
            self.agent.start_container(self.id).await?;
            self.reached(timeline::Phase::Start);
            self.log.debug(|| format!("{}: container started", self.id));
            reached(Step::Started, &self.timeline.borrow())?;
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
                helped = helpers => {
                    helped?;
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
