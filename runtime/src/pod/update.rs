//! Other limits for a container that is there.

use std::path::Path;

use super::command::{CommandError, ask};
use super::size::Size;
use crate::agent::AgentError;
use crate::spec::Resources;
use crate::state::{Known, Status};

/// Changes the limits that are given; all others stay as they are.
pub fn update(root: &Path, id: &str, resources: &Resources) -> Result<(), CommandError> {
    let known = Known::load_to_change(root, id)?;
    match known.status() {
        Status::Created | Status::Running | Status::Paused => {}
        status => return Err(CommandError::NotRunning(id.into(), status)),
    }
    // A limit that this host cannot keep.
    Size::for_resources(Some(resources.typed()))?;
    ask(&known, async |agent| agent.update_container(id, resources.document()).await).map_err(|error| match error {
        CommandError::Agent(AgentError::NotNow(_)) => CommandError::NotRunning(id.into(), known.status()),
        other => other,
    })?;
    // Where callers look for them, and what is of the host and not of the guest.
    if let Some(group) = &known.state.machine_cgroup {
        group.set(&resources.limits().of_host())?;
    }
    match &known.state.cgroup {
        Some(group) => Ok(group.set(resources.limits())?),
        None => Ok(()),
    }
}
