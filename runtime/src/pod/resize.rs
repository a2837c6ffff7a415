//! Another size for a pod's machine, when what its containers ask for together is another.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use super::command::{CommandError, event_loop};
use super::size::{Demand, Size, Sizing};
use crate::agent::{Agent, AgentError, Growth};
use crate::cgroup::Cgroup;
use crate::log::Log;
use crate::machine::Control;
use crate::state::{self, State};

/// How long a guest may take to give back what a container had that is gone. Nothing depends on it, and somebody waits.
const LEAVING: Duration = Duration::from_secs(3);

/// How long one may take to accept a connection.
const CONNECTING: Duration = Duration::from_secs(30);

/// The machine of a pod, which no other command changes meanwhile.
pub struct Machine<'a> {
    pod: String,
    root: &'a Path,
    /// What was in force when it was made.
    sizing: Sizing,
    /// Of its containers, but the one that is changed.
    others: Vec<Demand>,
    log: &'a Log,
    /// Held to the end.
    _turn: OwnedFd,
}

impl<'a> Machine<'a> {
    /// The machine of a container that is about to be changed; none if it is gone.
    pub fn of(root: &'a Path, container: &State, log: &'a Log) -> Result<Option<Self>, CommandError> {
        Self::beside(root, container, |state| state.id != container.id, log)
    }

    /// The machine that a container is in, or was, with those of the containers that are counted as others there.
    fn beside(
        root: &'a Path,
        container: &State,
        is_other: impl Fn(&State) -> bool,
        log: &'a Log,
    ) -> Result<Option<Self>, CommandError> {
        let Some(pod) = container.pod() else { return Ok(None) };
        let turn = state::take_turn_of_pod(root, &pod.pod)?;
        // Only now: who had its turn before may have added one.
        let there = state::list(root)?.into_iter().map(|known| known.state);
        let others = there.filter(|state| is_other(state) && state.pod().as_ref() == Some(&pod));
        let of_first = |state: &State| {
            // Whoever made the group of the pod may have given it another limit since.
            let room = state.machine_cgroup.as_ref().and_then(Cgroup::memory);
            Sizing { room, ..state.sizing.clone() }
        };
        let mut sizing = (container.id == pod.pod).then(|| of_first(container));
        let mut demands = Vec::new();
        for state in others {
            if state.id == pod.pod {
                sizing = Some(of_first(&state));
            }
            demands.push(state.demand);
        }
        // Where the first container is gone its machine is about to be.
        let sizing = sizing.unwrap_or_default();
        Ok(Some(Self { pod: pod.pod, root, sizing, others: demands, log, _turn: turn }))
    }

    /// The size it is to have with a container that asks for this.
    pub fn size_with(&self, demand: &Demand) -> Result<Size, CommandError> {
        self.size_of(Some(demand))
    }

    fn size_of(&self, demand: Option<&Demand>) -> Result<Size, CommandError> {
        let demands: Vec<_> = self.others.iter().chain(demand).collect();
        Ok(Size::of(&self.sizing, &demands)?)
    }

    /// Makes room for a container.
    fn fit(&self, demand: &Demand) -> Result<(), CommandError> {
        let (before, after) = (self.size_of(None)?, self.size_of(Some(demand))?);
        if after.is(before) { Ok(()) } else { self.resize(after) }
    }

    /// Takes the room of a container away that is gone. The guest need not have given it when this returns, and one that does not
    /// answer keeps it.
    fn shrink(&self, before: &Demand) -> Result<(), CommandError> {
        let (before, after) = (self.size_of(Some(before))?, self.size_of(None)?);
        if after.is(before) {
            return Ok(());
        }
        let give = async {
            let pod = self.open()?;
            // Nothing is waited for that the deadline does not end.
            let control = Control::dial_in_loop(pod.as_fd())?;
            self.give(pod, control, after).await
        };
        let given = async { tokio::time::timeout(LEAVING, give).await };
        event_loop()?.block_on(given).unwrap_or(Err(CommandError::Kept(LEAVING)))
    }

    /// Gives it a size. Memory and CPUs that are more are there on return; memory that is less goes at the guest's pace, and
    /// what is in use stays.
    pub fn resize(&self, size: Size) -> Result<(), CommandError> {
        event_loop()?.block_on(async {
            let pod = self.open()?;
            // One that is busy is waited for: somebody depends on it.
            let control = Control::dial(pod.as_fd())?;
            self.give(pod, control, size).await
        })
    }

    fn open(&self) -> Result<OwnedFd, CommandError> {
        Ok(state::open_pod(self.root, &self.pod)?)
    }

    async fn give(&self, pod: OwnedFd, mut control: Control, size: Size) -> Result<(), CommandError> {
        let Size { cpus, memory, .. } = size;
        control.set_cpus(cpus).await?;
        control.set_memory(memory).await?;
        let agent = tokio::time::timeout(CONNECTING, Agent::dial_in_loop(pod.as_fd())).await;
        let agent = agent.map_err(|_| AgentError::Connect(io::ErrorKind::TimedOut.into()))??;
        let online = agent.grow(Growth { cpus, rescan: true }).await?;
        // Not before: the memory device may be one that the guest has to find.
        control.await_memory().await?;
        self.log.debug(|| format!("pod {}: {online} CPUs, {memory} bytes of memory", self.pod));
        if online < cpus {
            let pod = &self.pod;
            self.log.warning(&format!("pod {pod}: its virtual machine cannot have more than {online} CPUs, of {cpus}"));
        }
        Ok(())
    }
}

/// Makes room for a container that joins a pod.
pub fn join(root: &Path, container: &State, log: &Log) -> Result<(), CommandError> {
    match Machine::of(root, container, log)? {
        Some(machine) => machine.fit(&container.demand),
        None => Ok(()),
    }
}

/// Takes the room of a container away that has left its pod. The pod may end at the same time.
pub fn leave(root: &Path, container: &State, log: &Log) {
    if container.member_of.is_none() {
        return;
    }
    // One of the same name has been made since.
    let left = Machine::beside(root, container, |_| true, log).and_then(|machine| match machine {
        Some(machine) if !machine.others.is_empty() => machine.shrink(&container.demand),
        _ => Ok(()),
    });
    if let Err(error) = left {
        log.debug(|| format!("{}: {error}", container.id));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::time::Instant;

    use podhull_vmm::control::{self, Notice};
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

    use super::*;

    #[test]
    fn a_guest_that_accepts_nothing_is_not_waited_for_when_a_container_leaves() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("pods/p");
        std::fs::create_dir_all(&directory).unwrap();
        let listener =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let path = directory.join(crate::machine::CONTROL_SOCKET);
        rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let server = std::thread::spawn(move || {
            let client = rustix::net::accept(listener).unwrap();
            for _ in 0..2 {
                control::receive::<control::Request>(&client).unwrap();
                control::send(&client, &Notice::Done, &[]).unwrap();
            }
        });
        // It takes the connection, and says nothing.
        let _agent = UnixListener::bind(directory.join(crate::stdio::SOCKET)).unwrap();
        let machine = Machine {
            pod: "p".into(),
            root: root.path(),
            sizing: Sizing::default(),
            others: Vec::new(),
            log: &Log::stderr(),
            _turn: rustix::fs::open("/", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap(),
        };
        let before = Demand::expected(64 << 20, 0, 0).unwrap();
        let began = Instant::now();
        let left = machine.shrink(&before);
        assert!(matches!(left, Err(CommandError::Kept(LEAVING))), "{left:?}");
        assert!(began.elapsed() < CONNECTING / 2, "{:?}", began.elapsed());
        server.join().unwrap();
    }
}
