//! How large a pod's machine is: memory and CPUs, from the limits of its containers.

use oci_spec::runtime::{LinuxResources, Spec};
use serde::{Deserialize, Serialize};

use crate::config::is_sandbox;
use crate::spec::last_of_list;

const MIB: u64 = 1 << 20;

/// Memory a machine boots with. What is missing to its size is plugged while its container is made: a smaller
/// machine boots sooner.
const BASE_MEMORY: u64 = 256 * MIB;

/// What guest kernel and agent need beside the containers' limits; a 32nd of the limits more is for page tables and the
/// kernel's account of pages.
const GUEST_OVERHEAD: u64 = 96 * MIB;

/// What the host's processes need of a pod of up to five containers, in the same control group as the machine's memory; the host's
/// tables for that memory are a 512th of it more.
const HOST_OVERHEAD: u64 = 24 * MIB;

/// What they need for each container more.
const MEMBER_OVERHEAD: u64 = 4 * MIB;

/// Granularity of guest memory.
const PAGE: u64 = 2 * MIB;

/// Granularity of the region that can be plugged: the block in which Linux adds memory on x86-64.
const BLOCK: u64 = 128 * MIB;

/// Most memory a machine can have: what a processor with the fewest address bits still reaches.
pub const MAX_MEMORY: u64 = 512 << 30;

/// Most CPUs a machine can have.
pub const MAX_CPUS: u32 = 64;

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
    /// Nor one above what the administrator of the host, or the pod itself, allows.
    #[error(
        "linux.resources.memory.limit: {asked} bytes is more than the {most} bytes that the configuration allows \
         (machine.max_memory; `podhull config show` says who)"
    )]
    Maximum {
        /// The limit.
        asked: u64,
        /// What a machine may have.
        most: u64,
    },
}

/// What is in force for the size of a pod's machine, from the time when it was made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Sizing {
    /// Bytes for containers without a limit, beside what the others ask for; as many as the host has at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// CPUs for containers without a quota, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// Most bytes it may have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_memory: Option<u64>,
    /// Most CPUs it may have, and what it can grow to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_cpus: Option<u32>,
    /// Bytes it has at least.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub least_memory: Option<u64>,
    /// CPUs it has at least.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub least_cpus: Option<u32>,
    /// Bytes that may be used in the control groups that it is in, those of the host's processes too. They are not exceeded, but a
    /// machine has what it boots with: one that has too little does not boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub room: Option<u64>,
    /// What its containers will ask for together. They come one after the other, and the machine is not to change for each.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<Demand>,
}

impl Sizing {
    /// [`Self::memory`] where nobody says.
    pub const DEFAULT_MEMORY: u64 = 2048 * MIB;

    /// Memory that containers need together.
    fn memory(&self, demands: &[&Demand]) -> u64 {
        let limits = demands.iter().filter_map(|demand| demand.memory());
        let limits = limits.fold(0u64, |sum, limit| sum.saturating_add(limit).saturating_add(limit / 32));
        let limited = !demands.is_empty() && demands.iter().all(|demand| demand.memory().is_some());
        limits.saturating_add(if limited { GUEST_OVERHEAD } else { self.memory.unwrap_or(Self::DEFAULT_MEMORY) })
    }

    /// Most memory that a machine of so many containers may have, that its control group is never full: the kernel of the host would
    /// kill the machine, and with it all of them, where that of the guest reclaims, or kills what takes too much.
    fn bound(&self, containers: usize) -> u64 {
        let Some(room) = self.room else { return u64::MAX };
        let further = u64::try_from(containers.saturating_sub(5)).unwrap_or(u64::MAX);
        let room = room.saturating_sub(HOST_OVERHEAD.saturating_add(further.saturating_mul(MEMBER_OVERHEAD)));
        let bound = room - room.div_ceil(513);
        bound - bound % PAGE
    }

    /// CPUs that they need together.
    fn cpus(&self, demands: &[&Demand]) -> u64 {
        let quotas = demands.iter().filter_map(|demand| demand.cpus()).fold(0, u64::saturating_add);
        let limited = !demands.is_empty() && demands.iter().all(|demand| demand.cpus().is_some());
        quotas.saturating_add(if limited { 0 } else { u64::from(self.cpus.unwrap_or(MAX_CPUS)) })
    }
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
    /// Whether the container only holds the pod open, and asks for nothing where it has no limits.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    idle: bool,
    /// Whether its limits are others than it was made with.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    changed: bool,
}

impl Demand {
    /// Of a specification.
    pub fn of(spec: &Spec) -> Self {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let demand = resources.map(|resources| Self::default().with(resources)).unwrap_or_default();
        Self { idle: spec.annotations().as_ref().is_some_and(is_sandbox), changed: false, ..demand }
    }

    /// Whether it only holds a pod open.
    pub fn is_idle(&self) -> bool {
        self.idle
    }

    /// Of the containers of a pod together: bytes of memory, and microseconds of all CPUs in a period. What is not above 0 is no
    /// limit; none if nothing is one.
    pub fn expected(memory: i64, quota: i64, period: i64) -> Option<Self> {
        let limit = |value| Some(value).filter(|value| *value > 0);
        let (memory, quota) = (limit(memory), limit(quota));
        let period = u64::try_from(period).ok().filter(|period| *period > 0);
        (memory.is_some() || quota.is_some()).then(|| Self { memory, quota, period, ..Self::default() })
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
            idle: self.idle,
            changed: true,
        }
    }

    /// Whether nothing is to be had for it.
    fn asks_for_nothing(&self) -> bool {
        self.idle && self.memory().is_none() && self.cpus().is_none()
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
pub fn host_cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(MAX_CPUS))
}

impl Size {
    /// The size for containers together on this host.
    pub fn of(sizing: &Sizing, demands: &[&Demand]) -> Result<Self, SizeError> {
        Self::new(sizing, demands, host_memory(), host_cpus())
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

    fn new(sizing: &Sizing, demands: &[&Demand], host_memory: u64, host_cpus: u32) -> Result<Self, SizeError> {
        let host = host_memory.min(MAX_MEMORY);
        let most = sizing.max_memory.map_or(host, |most| most.min(host));
        for asked in demands.iter().filter_map(|demand| demand.memory()) {
            match asked {
                asked if asked > host => return Err(SizeError::Memory { asked, host }),
                asked if asked > most => return Err(SizeError::Maximum { asked, most }),
                _ => {}
            }
        }
        // What was said in advance is not true any more of what was changed.
        let expected = sizing.expected.as_ref().filter(|_| !demands.iter().any(|demand| demand.changed));
        let working: Vec<&Demand> = demands.iter().copied().filter(|demand| !demand.asks_for_nothing()).collect();
        let together = if working.is_empty() { Vec::from_iter(expected) } else { working };

        let promised =
            expected.filter(|expected| expected.memory().is_some()).map(|expected| sizing.memory(&[expected]));
        let memory = sizing.memory(&together).max(promised.unwrap_or(0)).max(sizing.least_memory.unwrap_or(0));
        let memory = memory.min(most.max(GUEST_OVERHEAD)).next_multiple_of(PAGE);
        let memory_base = memory.min(BASE_MEMORY);
        let memory = memory.min(sizing.bound(demands.len()).max(memory_base));
        // No more is touched of what the machine could grow to than of what it has.
        let memory_max = memory_base + memory.max(most).saturating_sub(memory_base).next_multiple_of(BLOCK);

        let host_cpus = host_cpus.clamp(1, MAX_CPUS);
        let most = sizing.max_cpus.map_or(host_cpus, |most| most.clamp(1, host_cpus));
        let promised = expected.filter(|expected| expected.cpus().is_some()).map(|expected| sizing.cpus(&[expected]));
        let cpus = sizing.cpus(&together).max(promised.unwrap_or(0)).max(sizing.least_cpus.unwrap_or(0).into());
        let cpus = u32::try_from(cpus).unwrap_or(MAX_CPUS).clamp(1, most);
        let cpus_max = if sizing.max_cpus.is_some() { most } else { cpus.max(SPARE_CPUS.min(host_cpus)) };
        Ok(Self { memory_base, memory_max, memory, cpus_max, cpus })
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
        Demand { memory, quota: quota.map(|cpus| cpus * 100_000), cpus: cpus.map(Into::into), ..Demand::default() }
    }

    fn size(demands: &[&Demand], host_memory: u64, host_cpus: u32) -> Result<Size, SizeError> {
        Size::new(&Sizing::default(), demands, host_memory, host_cpus)
    }

    fn memory(limits: &[Option<u64>]) -> Size {
        let demands: Vec<_> = limits.iter().map(|limit| demand(*limit, Some(1), None)).collect();
        size(&demands.iter().collect::<Vec<_>>(), HOST, 2).unwrap()
    }

    #[test]
    fn without_limits_a_pod_has_the_default_memory_and_all_cpus() {
        let found = size(&[&Demand::default()], HOST, 2).unwrap();
        let memory_max = (256 + 46 * 128) * MIB;
        assert_eq!(found, Size { memory_base: 256 * MIB, memory_max, memory: 2048 * MIB, cpus_max: 2, cpus: 2 });
        assert_eq!(size(&[&Demand::default()], 1024 * MIB, 200).unwrap().memory, 1024 * MIB);
        assert_eq!(size(&[&Demand::default()], HOST, 200).unwrap().cpus, 64);
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
        assert_eq!(size(&[&two, &two], HOST, 16).unwrap().cpus, 4);
        assert_eq!(size(&[&two, &all], HOST, 16).unwrap().cpus, 16);
    }

    #[test]
    fn a_limit_above_the_host_is_refused_and_one_near_it_is_bounded() {
        let error = size(&[&demand(Some(HOST + 1), None, None)], HOST, 2).unwrap_err();
        assert!(error.to_string().contains(&(HOST + 1).to_string()) && error.to_string().contains(&HOST.to_string()));
        assert_eq!(memory(&[Some(HOST)]).memory, HOST);
        assert!(size(&[&demand(Some(u64::MAX), None, None)], HOST, 2).is_err());
    }

    #[test]
    fn a_quota_decides_how_many_cpus_unless_the_set_names_more() {
        let with = |quota, set| size(&[&demand(None, quota, set)], HOST, 16).unwrap();
        assert_eq!(with(Some(3), None).cpus, 3);
        assert_eq!(with(Some(3), None).cpus_max, 8);
        assert_eq!(with(Some(1), Some("0-3")).cpus, 4);
        assert_eq!(with(Some(100), None).cpus, 16);
        assert_eq!(with(None, Some("0-1")).cpus, 16);
    }

    fn sized(sizing: &Sizing, demands: &[&Demand]) -> (u64, u32) {
        let size = Size::new(sizing, demands, HOST, 16).unwrap();
        (size.memory / MIB, size.cpus)
    }

    #[test]
    fn the_configuration_says_how_much_there_is_without_limits() {
        let sizing = Sizing { memory: Some(512 * MIB), cpus: Some(2), ..Sizing::default() };
        let (limited, unlimited) = (demand(Some(320 * MIB), Some(3), None), Demand::default());
        assert_eq!(sized(&sizing, &[&unlimited]), (512, 2));
        assert_eq!(sized(&sizing, &[&limited]), (320 + 10 + 96, 3));
        assert_eq!(sized(&sizing, &[&limited, &unlimited]), (320 + 10 + 512, 5));
        let much = Sizing { memory: Some(4 * HOST), cpus: Some(64), ..Sizing::default() };
        assert_eq!(sized(&much, &[&unlimited]), (HOST / MIB, 16));
    }

    #[test]
    fn no_machine_is_or_becomes_larger_than_the_maxima() {
        let sizing = Sizing { max_memory: Some(1024 * MIB), max_cpus: Some(4), ..Sizing::default() };
        let size = Size::new(&sizing, &[&Demand::default()], HOST, 16).unwrap();
        assert_eq!((size.memory, size.memory_max), (1024 * MIB, 1024 * MIB));
        assert_eq!((size.cpus, size.cpus_max), (4, 4));
        let more = Sizing { max_cpus: Some(12), ..Sizing::default() };
        assert_eq!(Size::new(&more, &[&demand(None, Some(1), None)], HOST, 16).unwrap().cpus_max, 12);
        let error = Size::new(&sizing, &[&demand(Some(1025 * MIB), None, None)], HOST, 16).unwrap_err();
        assert!(error.to_string().contains("machine.max_memory"), "{error}");
        let (one, two) = (demand(Some(1000 * MIB), Some(3), None), demand(Some(500 * MIB), Some(3), None));
        assert_eq!(sized(&sizing, &[&one, &two]), (1024, 4));
    }

    #[test]
    fn no_machine_takes_more_than_there_is_room_for_in_its_control_group() {
        let in_group = |limits: &[u64], overhead: u64| {
            let room = limits.iter().sum::<u64>() + overhead;
            let sizing = Sizing { room: Some(room * MIB), ..Sizing::default() };
            let demands: Vec<_> = limits.iter().map(|limit| demand(Some(limit * MIB), Some(1), None)).collect();
            let demands: Vec<_> = demands.iter().collect();
            let size = Size::new(&sizing, &demands, 4 * HOST, 16).unwrap();
            assert_eq!(size.memory_base, size.memory.min(BASE_MEMORY));
            size.memory / MIB
        };
        // What the runtime classes say.
        assert_eq!(in_group(&[64], 128), 64 + 2 + 96);
        assert_eq!(in_group(&[128, 64, 64], 128), 256 + 128 - 24 - 2);
        assert_eq!(in_group(&[1024], 128), 1152 - 24 - 4);
        assert_eq!(in_group(&[3072], 128), 3200 - 24 - 8);
        assert_eq!(in_group(&[1024; 7], 128), 7 * 1024 + 128 - 24 - 8 - 16);
        // Another class, for large pods.
        assert_eq!(in_group(&[4096], 64 + 4 * 18 + 128), 4096 + 128 + 96);
        // None: what it boots with, or what there is.
        assert_eq!(in_group(&[64], 0), 64 + 2 + 96);
        assert_eq!(in_group(&[1024], 0), 1024 - 24 - 2);
        assert_eq!(in_group(&[200], 0), 256);
    }

    #[test]
    fn what_a_pod_asks_for_itself_it_has_at_least() {
        let sizing = Sizing {
            memory: Some(512 * MIB),
            least_memory: Some(512 * MIB),
            cpus: Some(4),
            least_cpus: Some(4),
            ..Sizing::default()
        };
        assert_eq!(sized(&sizing, &[&Demand::default()]), (512, 4));
        assert_eq!(sized(&sizing, &[&demand(Some(64 * MIB), Some(1), None)]), (512, 4));
        assert_eq!(sized(&sizing, &[&demand(Some(1024 * MIB), Some(8), None)]), (1024 + 32 + 96, 8));
    }

    #[test]
    fn a_pod_begins_with_the_size_it_is_said_to_get() {
        let expected = Demand::expected(640 << 20, 250_000, 100_000);
        let sizing = Sizing { expected, ..Sizing::default() };
        let pause = Demand { idle: true, ..Demand::default() };
        let whole = (640 + 20 + 96, 3);
        assert_eq!(sized(&sizing, &[&pause]), whole);
        let (one, two) = (demand(Some(320 * MIB), Some(1), None), demand(Some(320 * MIB), Some(2), None));
        assert_eq!(sized(&sizing, &[&pause, &one]), whole);
        assert_eq!(sized(&sizing, &[&pause, &one, &two]), whole);
        // Somebody has no limits after all.
        assert_eq!(sized(&sizing, &[&pause, &one, &Demand::default()]), (320 + 10 + 2048, 16));
        // Other limits than those that were foreseen.
        let resources: LinuxResources = serde_json::from_str(r#"{"memory":{"limit":67108864}}"#).unwrap();
        assert_eq!(sized(&sizing, &[&pause, &one.with(&resources)]), (64 + 2 + 96, 1));
        // Nobody says anything in advance, or of memory alone.
        assert_eq!(sized(&Sizing::default(), &[&pause]), (2048, 16));
        assert_eq!(sized(&Sizing::default(), &[&pause, &one]), (320 + 10 + 96, 1));
        let sizing = Sizing { expected: Demand::expected(640 << 20, 0, 100_000), ..Sizing::default() };
        assert_eq!(sized(&sizing, &[&pause]), (640 + 20 + 96, 16));
        // More than there is, or may be.
        let sizing = Sizing { expected: Demand::expected(1 << 50, 10_000_000, 100_000), ..Sizing::default() };
        assert_eq!(sized(&sizing, &[&pause]), (HOST / MIB, 16));
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
