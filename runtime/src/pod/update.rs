//! Other limits for a container that is there.

use std::path::Path;

use super::command::{CommandError, ask};
use super::resize::Machine;
use crate::agent::AgentError;
use crate::log::Log;
use crate::spec::Resources;
use crate::state::{Known, StateError, Status};

/// Changes the limits that are given; all others stay as they are. The machine grows before the container may use more, and
/// shrinks after it may no longer.
pub fn update(root: &Path, id: &str, resources: &Resources, log: &Log) -> Result<(), CommandError> {
    let mut known = Known::load_to_change(root, id)?;
    match known.status() {
        Status::Created | Status::Running | Status::Paused => {}
        status => return Err(CommandError::NotRunning(id.into(), status)),
    }
    let demand = known.state.demand.with(resources.typed());
    let machine = Machine::of(root, &known.state, log)?.ok_or_else(|| StateError::Missing(id.into()))?;
    let (before, after) = (machine.size_with(&known.state.demand)?, machine.size_with(&demand)?);
    let most = before.or_more(after);
    if !most.is(before) {
        machine.resize(most)?;
    }
    if let Err(error) = ask(&known, async |agent| agent.update_container(id, resources.document()).await) {
        if !most.is(before) {
            let _ = machine.resize(before);
        }
        return Err(match error {
            // As with a signal: its program has ended.
            CommandError::Agent(AgentError::NotNow(_) | AgentError::Missing(_)) => {
                CommandError::NotRunning(id.into(), Status::Stopped)
            }
            other => other,
        });
    }
    // Where callers look for them, and what is of the host and not of the guest.
    if let Some(group) = &known.state.machine_cgroup {
        group.set(&resources.limits().of_host())?;
    }
    if let Some(group) = &known.state.cgroup {
        group.set(resources.limits())?;
    }
    known.state.demand = demand;
    known.write()?;
    if !after.is(most) {
        machine.resize(after)?;
    }
    Ok(())
}
