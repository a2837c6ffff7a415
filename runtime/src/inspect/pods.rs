//! The pods that there are.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;

use crate::cli::ROOT;
use crate::config;
use crate::descriptors::raise_limit;
use crate::shim;
use crate::state::{self, Known, StateError, Status};

/// Annotations by which CRI's runtimes name a pod: its namespace, and its name. containerd's own, and kubelet's, which CRI-O passes on.
const NAMES: [&str; 2] = ["io.kubernetes.cri.sandbox-namespace", "io.kubernetes.cri.sandbox-name"];
const NAMES_WITH_CRI_O: [&str; 2] = ["io.kubernetes.pod.namespace", "io.kubernetes.pod.name"];

/// Descriptors of who looks at many pods: one for each container, and three more for each pod.
const DESCRIPTORS: u64 = 65536;

/// Ticks of a second in `/proc` (`USER_HZ` is 100 on every architecture that has KVM).
pub const TICKS: u64 = 100;

/// Why a pod cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// What is written under a state root.
    #[error(transparent)]
    State(#[from] StateError),
    /// None of that name.
    #[error("pod {0:?} is not running: see `podhull pods`")]
    Missing(String),
    /// More than one of it.
    #[error("{name:?} is more than one pod: {}: say its id, and --root", listed(found))]
    Several {
        /// What was asked for.
        name: String,
        /// Their ids, and the state roots they are under.
        found: Vec<(String, PathBuf)>,
    },
    /// No event loop.
    #[error("cannot set up event handling: {0}")]
    Events(#[source] std::io::Error),
    /// Descriptors.
    #[error("cannot look at all pods at once: {0}: raise the limit of open files (ulimit -n)")]
    TooMany(Errno),
}

fn listed(pods: &[(String, PathBuf)]) -> String {
    pods.iter().map(|(id, root)| format!("{id} under {}", root.display())).collect::<Vec<_>>().join(", ")
}

/// A machine that runs, and the containers in it.
pub struct Pod {
    /// The state root it is under.
    pub root: PathBuf,
    /// The container that the machine was made for; the pod has its id.
    pub first: Known,
    /// The others.
    pub members: Vec<Known>,
}

impl Pod {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.first.state.id
    }

    /// The first container and the others.
    pub fn containers(&self) -> impl Iterator<Item = &Known> {
        std::iter::once(&self.first).chain(&self.members)
    }

    /// Its namespace and name, if it is Kubernetes'.
    pub fn name(&self) -> Option<(&str, &str)> {
        name_in(self.first.state.annotations.as_ref()?)
    }

    /// How many of its containers have not ended; what holds a pod of Kubernetes' open is none of them.
    pub fn count(&self) -> usize {
        let counts = |known: &&Known| {
            let holds = known.state.annotations.as_ref().is_some_and(config::is_sandbox);
            !holds && known.status() != Status::Stopped
        };
        self.containers().filter(counts).count()
    }

    /// How long its machine's process has been there.
    pub fn uptime(&self) -> Duration {
        let ticks = self.first.state.machine.map_or(0, |machine| machine.0.start_time);
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let now = Duration::new(now.tv_sec.cast_unsigned(), u32::try_from(now.tv_nsec).unwrap_or(0));
        now.saturating_sub(Duration::from_millis(ticks * 1000 / TICKS))
    }
}

/// Namespace and name in the annotations of a pod's first container. A pod may have some of its own under the names of another runtime.
fn name_in(annotations: &HashMap<String, String>) -> Option<(&str, &str)> {
    let names = if config::is_of_cri_o(annotations) { NAMES_WITH_CRI_O } else { NAMES };
    let [namespace, name] = names.map(|name| annotations.get(name));
    Some((namespace?, name?))
}

/// Where pods are: below this root, and if it is the one that commands have by default, below those of shims too.
fn roots(root: &Path) -> Vec<PathBuf> {
    let shims = if root == Path::new(ROOT) { shim::state_roots() } else { Vec::new() };
    std::iter::once(root.to_owned()).chain(shims).collect()
}

/// All that run under a root, by id.
fn under(root: &Path) -> Result<Vec<Pod>, InspectError> {
    let (own, mut members): (Vec<_>, Vec<_>) =
        state::list(root)?.into_iter().partition(|known| known.state.member_of.is_none());
    let mut pods = Vec::new();
    for first in own {
        let (Some(pod), true) = (first.state.pod(), first.status() != Status::Stopped) else { continue };
        let its = members.extract_if(.., |known| known.state.member_of.as_ref() == Some(&pod)).collect();
        pods.push(Pod { root: root.to_owned(), first, members: its });
    }
    Ok(pods)
}

/// The one with this id under a root.
pub fn chosen_under(root: &Path, id: &str) -> Result<Vec<Pod>, InspectError> {
    let pods: Vec<_> = under(root)?.into_iter().filter(|pod| pod.id() == id).collect();
    if pods.is_empty() { Err(InspectError::Missing(id.into())) } else { Ok(pods) }
}

/// Lets this process look at as many pods as there may be.
pub fn expect_many() {
    raise_limit(DESCRIPTORS);
}

/// Those with these ids, or names as `namespace/name`; all if there are none.
pub fn chosen(root: &Path, names: &[String]) -> Result<Vec<Pod>, InspectError> {
    let mut pods = Vec::new();
    for root in roots(root) {
        pods.extend(under(&root)?);
    }
    let is = |pod: &Pod, name: &String| {
        pod.id() == name || pod.name().is_some_and(|(namespace, own)| name.split_once('/') == Some((namespace, own)))
    };
    if let Some(missing) = names.iter().find(|name| !pods.iter().any(|pod| is(pod, name))) {
        return Err(InspectError::Missing(missing.clone()));
    }
    Ok(pods.into_iter().filter(|pod| names.is_empty() || names.iter().any(|name| is(pod, name))).collect())
}

/// The one with this id or name.
pub fn one(root: &Path, name: &str) -> Result<Pod, InspectError> {
    let mut pods = chosen(root, &[name.to_owned()])?;
    match (pods.pop(), pods.is_empty()) {
        (Some(pod), true) => Ok(pod),
        (None, _) => Err(InspectError::Missing(name.into())),
        (Some(last), false) => {
            let found = pods.iter().chain([&last]).map(|pod| (pod.id().to_owned(), pod.root.clone())).collect();
            Err(InspectError::Several { name: name.into(), found })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_cannot_take_the_name_of_another_by_its_own_annotations() {
        let of = |given: &[(&str, &str)]| {
            let annotations = given.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            name_in(&annotations).map(|(namespace, name)| format!("{namespace}/{name}"))
        };
        let containerd = [(NAMES[0], "shop"), (NAMES[1], "web")];
        let cri_o = [(NAMES_WITH_CRI_O[0], "bank"), (NAMES_WITH_CRI_O[1], "till")];
        let is_cri_o = ("io.kubernetes.cri-o.ContainerType", "sandbox");
        assert_eq!(of(&containerd).as_deref(), Some("shop/web"));
        assert_eq!(of(&[&containerd[..], &cri_o].concat()).as_deref(), Some("shop/web"));
        assert_eq!(of(&[&containerd[..], &cri_o, &[is_cri_o]].concat()).as_deref(), Some("bank/till"));
        assert_eq!(of(&[&containerd[..], &[is_cri_o]].concat()), None);
        assert_eq!(of(&cri_o), None);
    }
}
