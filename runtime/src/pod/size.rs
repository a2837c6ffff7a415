//! How large a pod's machine is: memory and CPUs, from the limits of its containers.

use oci_spec::runtime::{LinuxResources, Spec};
use serde::{Deserialize, Serialize};

use crate::spec::last_of_list;

const MIB: u64 = 1 << 20;

/// Memory of a pod with a container that has no limit, beside what the others ask for, if the host has as much.
const DEFAULT_MEMORY: u64 = 2048 * MIB;

/// Memory a machine boots with. What is missing to its size is plugged while its container is made: a smaller
/// machine boots sooner.
const BASE_MEMORY: u64 = 256 * MIB;

/// What guest kernel and agent need beside the containers' limits; a 32nd of the limits more is for page tables and the
/// kernel's account of pages.
const GUEST_OVERHEAD: u64 = 96 * MIB;

/// Granularity of guest memory.
const PAGE: u64 = 2 * MIB;

/// Granularity of the region that can be plugged: the block in which Linux adds memory on x86-64.
const BLOCK: u64 = 128 * MIB;

/// Most memory a machine can have: what a processor with the fewest address bits still reaches.
const MAX_MEMORY: u64 = 512 << 30;

/// Most CPUs a machine can have.
const MAX_CPUS: u32 = 64;

/// CPUs a machine can grow to, if the host has as many, whatever it begins with. Each one more costs every machine the guest
/// kernel's own memory for it.
const SPARE_CPUS: u32 = 8;

/// Why a pod cannot have the size it asks for.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// A limit above all there is would never be reached.
    #[error("linux.resources.memory.limit: {asked} bytes is more than the {host} bytes of memory this host has")]
    Memory {
        /// The limit.
        asked: u64,
        /// What the host has.
        host: u64,
    },
}

/// What the size of a machine depends on, of the limits of one container. Negative numbers are no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Demand {
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quota: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    period: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpus: Option<String>,
}

impl Demand {
    /// Of a specification.
    pub fn of(spec: &Spec) -> Self {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        resources.map(|resources| Self::default().with(resources)).unwrap_or_default()
    }

    /// What it is when the limits that are given here are others.
    #[must_use]
    pub fn with(&self, resources: &LinuxResources) -> Self {
        let (memory, cpu) = (resources.memory().as_ref(), resources.cpu().as_ref());
        Self {
            memory: memory.and_then(|memory| memory.limit()).filter(|limit| *limit != 0).or(self.memory),
            quota: cpu.and_then(|cpu| cpu.quota()).filter(|quota| *quota != 0).or(self.quota),
            period: cpu.and_then(|cpu| cpu.period()).filter(|period| *period > 0).or(self.period),
            cpus: cpu.and_then(|cpu| cpu.cpus().clone()).filter(|list| !list.is_empty()).or(self.cpus.clone()),
        }
    }

    fn memory(&self) -> Option<u64> {
        self.memory.and_then(|limit| u64::try_from(limit).ok())
    }

    /// As many CPUs as its quota can keep busy, or its set names if there are more of them.
    fn cpus(&self) -> Option<u64> {
        let quota = self.quota.and_then(|quota| u64::try_from(quota).ok())?;
        let named = self.cpus.as_deref().and_then(last_of_list).map_or(1, |last| u64::from(last) + 1);
        Some(quota.div_ceil(self.period.unwrap_or(100_000)).max(named))
    }
}

/// Size of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Bytes it boots with.
    pub memory_base: u64,
    /// Bytes it can grow to.
    pub memory_max: u64,
    /// Bytes it is to have.
    pub memory: u64,
    /// CPUs it can grow to.
    pub cpus_max: u32,
    /// CPUs it is to have.
    pub cpus: u32,
}

/// Memory of this host in bytes.
pub fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(u64::from(info.mem_unit))
}

/// CPUs this process may run on.
fn host_cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(MAX_CPUS))
}

impl Size {
    /// The size for a container by itself on this host.
    pub fn for_container(spec: &Spec) -> Result<Self, SizeError> {
        Self::of(&[&Demand::of(spec)])
    }

    /// The size for containers together on this host.
    pub fn of(demands: &[&Demand]) -> Result<Self, SizeError> {
        Self::new(demands, host_memory(), host_cpus())
    }

    /// What it is to have while it goes from one size to another: the more of both.
    #[must_use]
    pub fn or_more(self, other: Self) -> Self {
        Self { memory: self.memory.max(other.memory), cpus: self.cpus.max(other.cpus), ..self }
    }

    /// Whether it is to have the same.
    pub fn is(self, other: Self) -> bool {
        (self.memory, self.cpus) == (other.memory, other.cpus)
    }

    fn new(demands: &[&Demand], host_memory: u64, host_cpus: u32) -> Result<Self, SizeError> {
        let host = host_memory.min(MAX_MEMORY);
        let (mut limits, mut unlimited) = (0u64, demands.is_empty());
        for demand in demands {
            match demand.memory() {
                Some(asked) if asked > host => return Err(SizeError::Memory { asked, host }),
                Some(limit) => limits = limits.saturating_add(limit + limit / 32),
                None => unlimited = true,
            }
        }
        let rest = if unlimited { DEFAULT_MEMORY } else { GUEST_OVERHEAD };
        let memory = limits.saturating_add(rest).min(host.max(GUEST_OVERHEAD)).next_multiple_of(PAGE);
        let memory_base = memory.min(BASE_MEMORY);
        // No more is touched of what the machine could grow to than of what it has.
        let memory_max = memory_base + memory.max(host).saturating_sub(memory_base).next_multiple_of(BLOCK);
        let host_cpus = host_cpus.clamp(1, MAX_CPUS);
        let cpus = demands.iter().map(|demand| demand.cpus()).try_fold(0, |sum, cpus| Some(cpus?.saturating_add(sum)));
        let cpus = cpus.filter(|cpus| *cpus > 0).and_then(|cpus| u32::try_from(cpus).ok());
        let cpus = cpus.unwrap_or(MAX_CPUS).min(host_cpus);
        Ok(Self { memory_base, memory_max, memory, cpus_max: cpus.max(SPARE_CPUS.min(host_cpus)), cpus })
    }
}

/// The container's memory limit in bytes, if it has one.
pub fn memory_limit(spec: &Spec) -> Option<u64> {
    Demand::of(spec).memory()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: u64 = 6144 * MIB;

    fn demand(memory: Option<u64>, quota: Option<i64>, cpus: Option<&str>) -> Demand {
        let memory = memory.map(|limit| i64::try_from(limit).unwrap_or(i64::MAX));
        Demand { memory, quota: quota.map(|cpus| cpus * 100_000), period: None, cpus: cpus.map(Into::into) }
    }

    fn memory(limits: &[Option<u64>]) -> Size {
        let demands: Vec<_> = limits.iter().map(|limit| demand(*limit, Some(1), None)).collect();
        Size::new(&demands.iter().collect::<Vec<_>>(), HOST, 2).unwrap()
    }

    #[test]
    fn without_limits_a_pod_has_the_default_memory_and_all_cpus() {
        let size = Size::new(&[&Demand::default()], HOST, 2).unwrap();
        let memory_max = (256 + 46 * 128) * MIB;
        assert_eq!(size, Size { memory_base: 256 * MIB, memory_max, memory: 2048 * MIB, cpus_max: 2, cpus: 2 });
        assert_eq!(Size::new(&[&Demand::default()], 1024 * MIB, 200).unwrap().memory, 1024 * MIB);
        assert_eq!(Size::new(&[&Demand::default()], HOST, 200).unwrap().cpus, 64);
    }

    #[test]
    fn a_small_limit_makes_a_small_machine_that_can_grow_to_the_host_s_size() {
        let size = memory(&[Some(64 * MIB)]);
        assert_eq!((size.memory_base, size.memory), (162 * MIB, 162 * MIB));
        assert!(size.memory_max >= HOST);
        assert_eq!(memory(&[Some(64 * MIB)]).cpus, 1);
    }

    #[test]
    fn containers_of_a_pod_ask_together() {
        assert_eq!(memory(&[Some(64 * MIB), Some(320 * MIB)]).memory, (64 + 320 + 96 + 12) * MIB);
        assert_eq!(memory(&[Some(64 * MIB), None]).memory, (66 + 2048) * MIB);
        assert_eq!(memory(&[None, None]).memory, 2048 * MIB);
        assert_eq!(memory(&[Some(HOST), Some(HOST)]).memory, HOST);
        let (two, all) = (demand(None, Some(2), None), demand(None, None, None));
        assert_eq!(Size::new(&[&two, &two], HOST, 16).unwrap().cpus, 4);
        assert_eq!(Size::new(&[&two, &all], HOST, 16).unwrap().cpus, 16);
    }

    #[test]
    fn a_limit_above_the_host_is_refused_and_one_near_it_is_bounded() {
        let error = Size::new(&[&demand(Some(HOST + 1), None, None)], HOST, 2).unwrap_err();
        assert!(error.to_string().contains(&(HOST + 1).to_string()) && error.to_string().contains(&HOST.to_string()));
        assert_eq!(memory(&[Some(HOST)]).memory, HOST);
        assert!(Size::new(&[&demand(Some(u64::MAX), None, None)], HOST, 2).is_err());
    }

    #[test]
    fn a_quota_decides_how_many_cpus_unless_the_set_names_more() {
        let size = |quota, set| Size::new(&[&demand(None, quota, set)], HOST, 16).unwrap();
        assert_eq!(size(Some(3), None).cpus, 3);
        assert_eq!(size(Some(3), None).cpus_max, 8);
        assert_eq!(size(Some(1), Some("0-3")).cpus, 4);
        assert_eq!(size(Some(100), None).cpus, 16);
        assert_eq!(size(None, Some("0-1")).cpus, 16);
    }

    #[test]
    fn a_change_leaves_what_it_does_not_name() {
        let resources = |text: &str| serde_json::from_str::<LinuxResources>(text).unwrap();
        let demand = Demand::default()
            .with(&resources(r#"{"memory":{"limit":1048576},"cpu":{"quota":150000,"period":50000,"cpus":"0-1"}}"#));
        assert_eq!((demand.memory(), demand.cpus()), (Some(MIB), Some(3)));
        let demand = demand.with(&resources(r#"{"cpu":{"quota":250000}}"#));
        assert_eq!((demand.memory(), demand.cpus()), (Some(MIB), Some(5)));
        let demand = demand.with(&resources(r#"{"memory":{"limit":-1},"cpu":{"quota":-1}}"#));
        assert_eq!((demand.memory(), demand.cpus()), (None, None));
        let text = serde_json::to_string(&demand).unwrap();
        assert_eq!(serde_json::from_str::<Demand>(&text).unwrap(), demand);
    }
}
