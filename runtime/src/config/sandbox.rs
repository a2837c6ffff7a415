//! What CRI's runtimes say of a pod in advance: which container is the sandbox's, which runs nothing but `pause`, and how much the
//! containers together will ask for, which come one after the other.
//!
//! CRI-O hands all annotations of a pod on, containerd only those that its administrator lets through: where CRI-O says what a container
//! is, names that are containerd's are the pod's own, and say nothing.

use serde::Deserialize;

use super::{Annotations, ConfigError};
use crate::pod::Demand;

/// What a container is: CRI-O's, and containerd's.
const TYPES: [&str; 2] = ["io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri.container-type"];

/// containerd's, in microseconds and bytes; 0 is no limit. A fourth, `sandbox-cpu-shares`, is no limit.
const QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// CRI-O's, under its name of now and the one before: CRI's `LinuxContainerResources` as JSON.
const RESOURCES: [&str; 2] = ["pod-linux-resources.crio.io", "io.kubernetes.cri-o.PodLinuxResources"];

/// What counts of them.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Resources {
    cpu_period: i64,
    cpu_quota: i64,
    memory_limit_in_bytes: i64,
}

/// Whether they are of a container of CRI-O's.
pub fn is_of_cri_o(annotations: &Annotations) -> bool {
    annotations.contains_key(TYPES[0])
}

/// Whether a container holds a pod open and does nothing else.
pub fn is_sandbox(annotations: &Annotations) -> bool {
    TYPES.iter().find_map(|name| annotations.get(*name)).is_some_and(|kind| kind == "sandbox")
}

/// Whether a container is one of a pod's that CRI made, beside its sandbox.
pub fn is_of_pod(annotations: &Annotations) -> bool {
    TYPES.iter().find_map(|name| annotations.get(*name)).is_some_and(|kind| kind == "container")
}

/// How much the containers of a pod will ask for together, as far as somebody says.
pub fn expected(annotations: &Annotations) -> Result<Option<Demand>, ConfigError> {
    let wrong = |name: &str, problem: String| ConfigError::Annotation { name: name.into(), problem };
    let number = |name: &str| match annotations.get(name) {
        Some(text) => text.parse::<i64>().map(Some).map_err(|_| wrong(name, format!("{text:?} is not a whole number"))),
        None => Ok(None),
    };
    if !is_of_cri_o(annotations) {
        let (memory, quota, period) = (number(MEMORY)?, number(QUOTA)?, number(PERIOD)?);
        if memory.is_some() || quota.is_some() {
            let [memory, quota, period] = [memory, quota, period].map(Option::unwrap_or_default);
            return Ok(Demand::expected(memory, quota, period));
        }
    }
    for name in RESOURCES {
        if let Some(text) = annotations.get(name) {
            let resources: Resources = serde_json::from_str(text).map_err(|error| wrong(name, error.to_string()))?;
            let Resources { cpu_period, cpu_quota, memory_limit_in_bytes } = resources;
            return Ok(Demand::expected(memory_limit_in_bytes, cpu_quota, cpu_period));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(given: &[(&str, &str)]) -> Annotations {
        given.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn both_runtimes_say_what_a_pod_will_ask_for() {
        let containerd = annotations(&[(QUOTA, "150000"), (PERIOD, "100000"), (MEMORY, "134217728")]);
        let resources =
            r#"{"cpu_period":100000,"cpu_quota":150000,"cpu_shares":1536,"memory_limit_in_bytes":134217728}"#;
        let wanted = Demand::expected(128 << 20, 150_000, 100_000);
        assert!(wanted.is_some());
        assert_eq!(expected(&containerd).unwrap(), wanted);
        for name in RESOURCES {
            assert_eq!(expected(&annotations(&[(name, resources)])).unwrap(), wanted);
        }
        assert_eq!(expected(&annotations(&[(QUOTA, "0"), (PERIOD, "100000"), (MEMORY, "0")])).unwrap(), None);
        assert_eq!(expected(&Annotations::new()).unwrap(), None);
    }

    #[test]
    fn what_is_no_number_is_refused_by_name() {
        let error = expected(&annotations(&[(MEMORY, "lots")])).unwrap_err().to_string();
        assert_eq!(error, "annotation io.kubernetes.cri.sandbox-memory: \"lots\" is not a whole number");
        let error = expected(&annotations(&[(RESOURCES[0], "{")])).unwrap_err().to_string();
        assert!(error.starts_with("annotation pod-linux-resources.crio.io: "), "{error}");
    }

    #[test]
    fn the_sandbox_s_container_is_known_with_both_runtimes() {
        for name in TYPES {
            assert!(is_sandbox(&annotations(&[(name, "sandbox")])));
            assert!(!is_sandbox(&annotations(&[(name, "container")])));
            assert!(is_of_pod(&annotations(&[(name, "container")])));
            assert!(!is_of_pod(&annotations(&[(name, "sandbox")])));
        }
    }

    #[test]
    fn what_cri_o_says_itself_is_no_matter_of_a_pod_s_own_annotations() {
        let of_crio = ("io.kubernetes.cri-o.ContainerType", "container");
        assert!(!is_sandbox(&annotations(&[of_crio, ("io.kubernetes.cri.container-type", "sandbox")])));
        let resources = r#"{"memory_limit_in_bytes":134217728}"#;
        let given = annotations(&[of_crio, (RESOURCES[0], resources), (MEMORY, "lots"), (QUOTA, "1")]);
        assert_eq!(expected(&given).unwrap(), Demand::expected(128 << 20, 0, 0));
        assert_eq!(expected(&annotations(&[of_crio, (MEMORY, "1000000")])).unwrap(), None);
    }
}
