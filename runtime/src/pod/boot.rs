//! A machine of a container's own: from its first instruction to the container in it, and what it grows by meanwhile.

use std::cell::Cell;
use std::future;
use std::os::fd::OwnedFd;
use std::time::Duration;

use podhull_protocol::CreatePodRequest;
use podhull_vmm::control::Device;

use super::clock;
use super::link::{Handed, Orders};
use super::names::Names;
use super::network::Wiring;
use super::session::Session;
use super::size::Size;
use super::start::RunError;
use super::timeline::Phase;
use crate::agent::Growth;
use crate::machine::{Channel, Control, MachineError};
use crate::stdio::Flow;

/// How long a guest may take to boot, on a host that boots many at once.
pub const BOOT: Duration = Duration::from_secs(120);

/// How long the process of a machine that is given up may take to say where the guest was.
const ANSWER: Duration = Duration::from_secs(5);

/// A machine on its way up.
pub struct Boot<'a> {
    pub channel: &'a Channel,
    pub size: Size,
    pub booted: Cell<bool>,
    /// The file of the limit of memory of the container's group on the host, once it was handed over.
    pub memory_limit: Cell<Option<OwnedFd>>,
}

impl Boot<'_> {
    /// From the start of the machine to the container in it, which `request` makes together with the pod, as soon as it is
    /// ordered.
    pub async fn make(
        &self,
        session: &Session<'_>,
        start: impl Future<Output = Result<(), MachineError>>,
        mut request: CreatePodRequest,
        orders: &Orders,
    ) -> Result<Flow, RunError> {
        let Session { id, log, .. } = session;
        let ready = self.channel.agent_ready();
        start.await?;
        session.reached(Phase::Machine);
        log.debug(|| format!("{id}: machine runs"));
        let boot = async {
            let exits = match tokio::time::timeout(BOOT, ready).await {
                Ok(Ok(exits)) => exits,
                Ok(Err(_)) => return Err(MachineError::Gone.into()),
                Err(_) => {
                    self.channel.give_up().await?;
                    // Its answer is the machine's end, which whoever polls this hears of first.
                    let _ = tokio::time::timeout(ANSWER, future::pending::<()>()).await;
                    return Err(RunError::Late("its process does not say where it is".into()));
                }
            };
            self.booted.set(true);
            session.reached(Phase::Boot);
            log.debug(|| format!("{id}: agent ready after {exits} exits to user space"));
            Ok(())
        };
        let ordered = async { Ok(orders.entered().await?) };
        let ((), Handed { network, memory_limit }) = tokio::try_join!(boot, ordered)?;
        session.reached(Phase::Hooks);
        self.memory_limit.set(memory_limit);
        if let Some(Wiring { resources, fds, description }) = network {
            self.channel.add(resources, &fds, Vec::new()).await?;
            request.network = Some(description).into();
        }

        // Not before: the guest sets its clock by it.
        request.realtime_ns = clock::now();
        let mut names = Names::new()?;
        request.names = names.token();
        names.begin(session.pod)?;
        let pod = async { Ok(session.agent.create_pod(&request).await?) };
        let names = async { Ok(names.serve().await?) };
        let (flow, guest, (), ()) = tokio::try_join!(session.streams(), pod, self.add_cpus_and_memory(), names)?;
        session.reached(Phase::Create);
        session.timeline.borrow_mut().guest = Some(guest.times);
        log.debug(|| format!("{id}: container created on Linux {}", guest.release));
        // Programs look once, when they start, at how many CPUs and how much memory there are, and size thread pools and heaps
        // by it.
        let cpus = async {
            if self.size.cpus > 1 {
                session.agent.grow(Growth { cpus: self.size.cpus, rescan: false }).await?;
            }
            Ok::<_, RunError>(())
        };
        let memory = async {
            if self.grows() {
                // Over a connection of its own: the answers of the channel come in order, and this one takes its time.
                Control::dial(session.pod)?.await_memory().await?;
            }
            Ok(())
        };
        tokio::try_join!(cpus, memory)?;
        session.reached(Phase::Grow);
        Ok(flow)
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
    pub async fn add_helpers(&self, session: &Session<'_>) -> Result<(), RunError> {
        self.channel.add(Vec::new(), &[], vec![Device::Entropy, Device::Balloon]).await?;
        // CPUs may be others meanwhile.
        session.agent.grow(Growth { cpus: 0, rescan: true }).await?;
        let Size { cpus, memory, .. } = self.size;
        session.log.debug(|| format!("{}: {cpus} CPUs, {memory} bytes of memory", session.id));
        Ok(())
    }
}
