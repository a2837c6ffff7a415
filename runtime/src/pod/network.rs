//! The pod's network, as the commands give it to the machine and its agent: what is in the network namespace when the container
//! is made, and what has come since when it starts. Docker fills the namespace between the two.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use podhull_protocol::ConfigureNetworkRequest;
use podhull_vmm::control::Resource;
use protobuf::Message;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::agent::{Agent, AgentError};
use crate::log::Log;
use crate::machine::{Control, MachineError};
use crate::network::{self, Connection, Joined, Network, NetworkError};
use crate::state::{Known, StateError};

/// Why a pod does not get its network.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// What is in the namespace.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Its machine does not take it.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The agent does not take it.
    #[error("cannot configure the network of the virtual machine: {0}")]
    Agent(#[from] AgentError),
    /// It was not found again.
    #[error(transparent)]
    State(#[from] StateError),
    /// A machine has one network.
    #[error(
        "network interface {interface} is the container's own, but the container is in the pod of {pod:?}, and its virtual \
         machine has that one's network: let them share the network too, or nothing"
    )]
    OfMember {
        /// Its name.
        interface: String,
        /// Whose pod it is.
        pod: String,
    },
    /// It did not get to the shadow.
    #[error("cannot hand over the network of the virtual machine: {0}")]
    Hand(#[source] io::Error),
    /// No event loop.
    #[error("cannot set up event handling: {0}")]
    Events(#[source] io::Error),
}

/// A network on its way: what the machine is given, and what the agent is told.
pub struct Wiring {
    /// What the descriptors are.
    pub resources: Vec<Resource>,
    /// The machine is to be the only one that has them.
    pub fds: Vec<OwnedFd>,
    /// What the agent is told.
    pub description: ConfigureNetworkRequest,
}

impl Wiring {
    /// Connects what is in the namespaces of a shadow (a pidfd), which are `joined` already or not; `None` if there is nothing.
    pub fn of(shadow: impl AsFd, joined: Joined, log: &Log) -> Result<Option<Self>, WireError> {
        let Some(Network { description, connections, warnings }) = network::connect(shadow, joined)? else {
            return Ok(None);
        };
        for warning in warnings {
            log.warning(&warning);
        }
        let (mut resources, mut fds) = (Vec::new(), Vec::new());
        for Connection { mac, mtu, tap, rule } in connections {
            resources.extend([Resource::Tap { mac, mtu }, Resource::Hold]);
            fds.extend([tap, rule]);
        }
        Ok(Some(Self { resources, fds, description }))
    }

    /// Puts the description into a file: it may be longer than a message.
    pub fn file(&self) -> Result<OwnedFd, WireError> {
        let write = || {
            let mut file = File::from(memfd_create("network", MemfdFlags::CLOEXEC)?);
            file.write_all(&self.description.write_to_bytes()?)?;
            file.rewind()?;
            Ok(file.into())
        };
        write().map_err(WireError::Hand)
    }

    /// Takes it as it was sent: the file is the first of the descriptors.
    pub fn receive(resources: Vec<Resource>, fds: Vec<OwnedFd>) -> Option<Self> {
        let mut fds = fds.into_iter();
        let mut text = Vec::new();
        File::from(fds.next()?).read_to_end(&mut text).ok()?;
        let description = ConfigureNetworkRequest::parse_from_bytes(&text).ok()?;
        Some(Self { resources, fds: fds.collect(), description })
    }

    /// Gives it to a machine that runs.
    async fn give(self, pod: BorrowedFd<'_>) -> Result<(), WireError> {
        if !self.resources.is_empty() {
            Control::dial(pod)?.add(self.resources, &self.fds).await?;
            drop(self.fds);
        }
        Ok(Agent::dial(pod)?.configure_network(&self.description).await?)
    }
}

/// Before a container's program is executed: gives its machine what has come into its network namespace since it was made.
pub fn renew(root: &Path, known: &Known, log: &Log) -> Result<(), WireError> {
    match give_new(root, known, log) {
        // One that ends meanwhile has no use for it.
        Err(WireError::Network(NetworkError::Enter(error))) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other,
    }
}

fn give_new(root: &Path, known: &Known, log: &Log) -> Result<(), WireError> {
    let Some(shadow) = known.process() else { return Ok(()) };
    if let Some(member) = &known.state.member_of {
        let pod = Known::load(root, &member.pod)?;
        if is_same_network(known, &pod) {
            return Ok(());
        }
        return refuse_own(&shadow, &member.pod);
    }
    let Some(wiring) = Wiring::of(&shadow, Joined::Some, log)? else { return Ok(()) };
    let pod = known.pod()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    runtime.map_err(WireError::Events)?.block_on(wiring.give(pod.as_fd()))
}

/// A container in the pod of another may have a network namespace of its own, but nothing in it: there is one network in a
/// machine.
pub fn refuse_own(shadow: impl AsFd, pod: &str) -> Result<(), WireError> {
    match network::first(shadow)? {
        Some(interface) => Err(WireError::OfMember { interface, pod: pod.to_owned() }),
        None => Ok(()),
    }
}

/// Whether the shadows of two containers are in the same network namespace.
fn is_same_network(one: &Known, other: &Known) -> bool {
    let of = |known: &Known| std::fs::metadata(format!("/proc/{}/ns/net", known.state.process.pid));
    matches!((of(one), of(other)), (Ok(one), Ok(other)) if (one.dev(), one.ino()) == (other.dev(), other.ino()))
}
