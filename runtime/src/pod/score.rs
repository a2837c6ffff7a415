//! What the host goes by when it has no memory left (`process.oomScoreAdj`), for the processes that stand for a container and its pod.

use std::io;
use std::path::Path;

use super::command::CommandError;
use crate::oom;
use crate::state::{self, State};

/// Has the host go by a container's score for its shadow, and for the machine that is made for it, whatever whoever makes it has. What
/// only holds a pod open is the last to go, and says nothing about the machine ([`join`]).
pub fn begin(container: &State, score: Option<i32>) -> io::Result<()> {
    let Some(score) = score else { return Ok(()) };
    let machine = container.machine.filter(|_| !container.demand.is_idle()).map(|machine| machine.0.pid);
    [Some(container.process.pid), machine].into_iter().flatten().try_for_each(|pid| oom::set_score(pid, score))
}

/// Has the host go by the lowest score of a pod's working containers for their machine, which ends with all of them, when a container
/// joins them.
pub fn join(root: &Path, container: &State) -> Result<(), CommandError> {
    let Some(member) = &container.member_of else { return Ok(()) };
    let _turn = state::take_turn_of_pod(root, &member.pod)?;
    let pod = container.pod();
    let mut lowest = oom::score(container.process.pid).ok();
    for known in state::list(root)? {
        let state = &known.state;
        if state.pod() != pod || state.demand.is_idle() || state.id == container.id {
            continue;
        }
        let score = oom::score(state.process.pid);
        // Only now: where it is still there, the number was nobody else's.
        if known.process().is_some() {
            lowest = lowest.into_iter().chain(score.ok()).min();
        }
    }
    let Some(lowest) = lowest else { return Ok(()) };
    oom::set_score(member.machine.0.pid, lowest).map_err(CommandError::OomScore)
}
