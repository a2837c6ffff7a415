//! One look at pods: their processes on the host, their machines, and what their agents say. A guest that does not answer holds up
//! nobody for long, and the host's numbers are there all the same.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use podhull_protocol::PodStatsResponse;
use podhull_vmm::control::Measured;
use rustix::io::Errno;
use tokio::task::JoinSet;

use super::pods::{InspectError, Pod};
use super::processes::{self, Kind, Numbers};
use crate::agent::{Agent, AgentError};
use crate::calls::{AGENT, Callee, Calls, Durations, SHIM};
use crate::machine::{Control, MachineError};
use crate::state::StateError;

/// How long a machine and its agent may take together: less than Prometheus waits by default.
const DEADLINE: Duration = Duration::from_secs(8);

/// What was seen of a pod.
#[derive(Default)]
pub struct Look {
    /// Its processes on the host.
    pub processes: BTreeMap<Kind, Numbers>,
    /// Its machine, if that has answered.
    pub machine: Option<Measured>,
    /// Its guest, if that has answered.
    pub guest: Option<PodStatsResponse>,
    /// How long calls of its agent took.
    pub calls: Vec<Durations>,
    /// How long requests to its shim took, if it has one.
    pub requests: Vec<Durations>,
}

impl Look {
    /// All its processes together.
    pub fn host(&self) -> Numbers {
        self.processes.values().fold(Numbers::default(), |sum, numbers| sum.and(*numbers))
    }
}

/// Looks at pods, at all at once.
pub fn look_at_all(pods: &[Pod]) -> Result<Vec<Look>, InspectError> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_io().enable_time().build().map_err(InspectError::Events)?;
    let mut answers = runtime.block_on(async {
        let mut asked = JoinSet::new();
        for (index, pod) in pods.iter().enumerate() {
            match pod.first.pod() {
                Ok(directory) => drop(asked.spawn(async move { (index, ask(directory).await) })),
                Err(StateError::Write(_, error)) => enough(&error)?,
                // One that ends while we look answers nothing.
                Err(_) => {}
            }
        }
        let mut answers = BTreeMap::new();
        while let Some(answered) = asked.join_next().await {
            if let Ok((index, answer)) = answered {
                answers.insert(index, answer?);
            }
        }
        Ok::<_, InspectError>(answers)
    })?;
    let looks = pods.iter().enumerate().map(|(index, pod)| {
        let (machine, guest) = answers.remove(&index).unwrap_or_default();
        let directory = pod.first.pod().ok();
        let durations = |callee: &'static Callee| {
            let calls = directory.as_ref().and_then(|directory| Calls::find(directory.as_fd(), callee).ok());
            calls.map(|calls| calls.so_far()).unwrap_or_default()
        };
        Look { processes: processes::of(pod), machine, guest, calls: durations(AGENT), requests: durations(SHIM) }
    });
    Ok(looks.collect())
}

/// What a pod's machine and agent say, as far as they do.
async fn ask(pod: OwnedFd) -> Result<(Option<Measured>, Option<PodStatsResponse>), InspectError> {
    let machine = async {
        let asked = async { Control::dial_in_loop(pod.as_fd())?.measure().await };
        match tokio::time::timeout(DEADLINE, asked).await {
            Ok(Err(MachineError::Dial(error))) => enough(&error).map(|()| None),
            answered => Ok(answered.ok().and_then(Result::ok)),
        }
    };
    let guest = async {
        let asked = async { Agent::dial_in_loop(pod.as_fd()).await?.pod_stats().await };
        match tokio::time::timeout(DEADLINE, asked).await {
            Ok(Err(AgentError::Connect(error))) => enough(&error).map(|()| None),
            answered => Ok(answered.ok().and_then(Result::ok)),
        }
    };
    let (machine, guest) = tokio::join!(machine, guest);
    Ok((machine?, guest?))
}

/// What this process lacks is no answer of a pod's.
fn enough(error: &io::Error) -> Result<(), InspectError> {
    match Errno::from_io_error(error) {
        Some(errno @ (Errno::MFILE | Errno::NFILE)) => Err(InspectError::TooMany(errno)),
        _ => Ok(()),
    }
}
