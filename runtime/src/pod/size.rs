//! How large a pod's machine is: memory and CPUs, from the limits of its container.

use oci_spec::runtime::{LinuxResources, Spec};

use crate::spec::last_of_list;

const MIB: u64 = 1 << 20;

/// Memory of a pod without a limit, if the host has as much.
const DEFAULT_MEMORY: u64 = 2048 * MIB;

/// Memory a machine boots with. What is missing to its size is plugged while its container is made: a smaller
/// machine boots sooner.
const BASE_MEMORY: u64 = 256 * MIB;

/// What guest kernel and agent need beside the container's limit; a 32nd of the limit more is for page tables and the
/// kernel's account of pages.
const GUEST_OVERHEAD: u64 = 96 * MIB;

/// Granularity of guest memory.
const PAGE: u64 = 2 * MIB;

/// Granularity of the region that can be plugged: the block in which Linux adds memory on x86-64.
const BLOCK: u64 = 128 * MIB;

/// Most CPUs a machine can have.
const MAX_CPUS: u32 = 64;

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

/// Size of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Bytes it boots with.
    pub memory_base: u64,
    /// Bytes it could grow to.
    pub memory_max: u64,
    /// Bytes it is to have.
    pub memory: u64,
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
    /// The size for a container on this host.
    pub fn for_container(spec: &Spec) -> Result<Self, SizeError> {
        Self::for_resources(spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()))
    }

    /// The size for a container with these limits on this host.
    pub fn for_resources(resources: Option<&LinuxResources>) -> Result<Self, SizeError> {
        let cpu = resources.and_then(|r| r.cpu().as_ref());
        let quota = cpu.and_then(|c| c.quota()).and_then(|q| u64::try_from(q).ok()).filter(|q| *q > 0);
        let period = cpu.and_then(|c| c.period()).filter(|p| *p > 0).unwrap_or(100_000);
        let list = cpu.and_then(|c| c.cpus().as_deref()).filter(|list| !list.is_empty());
        Self::new(
            resources.and_then(limit_of),
            quota.map(|quota| quota.div_ceil(period)),
            list.and_then(last_of_list).map(|last| u64::from(last) + 1),
            host_memory(),
            host_cpus(),
        )
    }

    /// `quota_cpus`: as many as the CPU quota can keep busy; `set_cpus`: as many as its set of CPUs names.
    fn new(
        limit: Option<u64>,
        quota_cpus: Option<u64>,
        set_cpus: Option<u64>,
        host_memory: u64,
        host_cpus: u32,
    ) -> Result<Self, SizeError> {
        let memory = match limit {
            Some(asked) if asked > host_memory => return Err(SizeError::Memory { asked, host: host_memory }),
            Some(limit) => (limit + GUEST_OVERHEAD + limit / 32).min(host_memory.max(GUEST_OVERHEAD)),
            None => DEFAULT_MEMORY.min(host_memory),
        };
        let memory = memory.next_multiple_of(PAGE);
        let memory_base = memory.min(BASE_MEMORY);
        let memory_max = memory_base + (memory - memory_base).next_multiple_of(BLOCK);
        let host_cpus = host_cpus.clamp(1, MAX_CPUS);
        let cpus = match (quota_cpus, set_cpus) {
            (None, _) => host_cpus,
            (Some(quota), set) => {
                let wanted = quota.max(set.unwrap_or(1)).max(1);
                u32::try_from(wanted).unwrap_or(MAX_CPUS).min(host_cpus)
            }
        };
        Ok(Self { memory_base, memory_max, memory, cpus })
    }
}

/// The container's memory limit in bytes, if it has one.
pub fn memory_limit(spec: &Spec) -> Option<u64> {
    limit_of(spec.linux().as_ref()?.resources().as_ref()?)
}

fn limit_of(resources: &LinuxResources) -> Option<u64> {
    u64::try_from(resources.memory().as_ref()?.limit()?).ok().filter(|limit| *limit > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: u64 = 6144 * MIB;

    #[test]
    fn without_limits_a_pod_has_the_default_memory_and_all_cpus() {
        let size = Size::new(None, None, None, HOST, 2).unwrap();
        assert_eq!(
            size,
            Size { memory_base: 256 * MIB, memory_max: (256 + 14 * 128) * MIB, memory: 2048 * MIB, cpus: 2 }
        );
        assert_eq!(Size::new(None, None, None, 1024 * MIB, 200).unwrap().memory, 1024 * MIB);
        assert_eq!(Size::new(None, None, None, HOST, 200).unwrap().cpus, 64);
    }

    #[test]
    fn a_small_limit_makes_a_small_machine_that_never_grows() {
        let size = Size::new(Some(64 * MIB), Some(1), None, HOST, 2).unwrap();
        assert_eq!(size, Size { memory_base: 162 * MIB, memory_max: 162 * MIB, memory: 162 * MIB, cpus: 1 });
    }

    #[test]
    fn a_limit_above_the_host_is_refused_and_one_near_it_is_bounded() {
        let error = Size::new(Some(HOST + 1), None, None, HOST, 2).unwrap_err();
        assert!(error.to_string().contains(&(HOST + 1).to_string()) && error.to_string().contains(&HOST.to_string()));
        assert_eq!(Size::new(Some(HOST), None, None, HOST, 2).unwrap().memory, HOST);
        assert!(Size::new(Some(u64::MAX), None, None, HOST, 2).is_err());
    }

    #[test]
    fn a_quota_decides_how_many_cpus_unless_the_set_names_more() {
        let cpus = |quota, set| Size::new(None, quota, set, HOST, 8).unwrap().cpus;
        assert_eq!(cpus(Some(3), None), 3);
        assert_eq!(cpus(Some(1), Some(4)), 4);
        assert_eq!(cpus(Some(100), None), 8);
        assert_eq!(cpus(None, Some(2)), 8);
    }
}
