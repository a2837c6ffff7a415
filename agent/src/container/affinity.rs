//! CPUs of processes that are executed in a running container (`process.execCPUAffinity`).

use rustix::io::Errno;
use rustix::thread::CpuSet;

use crate::spec::CpuAffinity;

/// CPUs that cannot be had as given.
#[derive(Debug, thiserror::Error)]
pub enum AffinityError {
    #[error(
        "process.execCPUAffinity.{field}: expected a list of CPUs below {} such as 0-3,7, not {list:?}",
        CpuSet::MAX_CPU
    )]
    List { field: &'static str, list: String },
    #[error("process.execCPUAffinity.{field}: run on CPUs {list}: {source}")]
    Set { field: &'static str, list: String, source: Errno },
}

impl AffinityError {
    /// Whether the specification is at fault, not the machine: the kernel's EINVAL is for CPUs that are not there.
    pub fn is_invalid(&self) -> bool {
        matches!(self, Self::List { .. } | Self::Set { source: Errno::INVAL, .. })
    }
}

/// Checks both lists.
pub fn check(affinity: &CpuAffinity) -> Result<(), AffinityError> {
    parse("initial", &affinity.initial)?;
    parse("final", &affinity.last).map(drop)
}

/// Moves the calling process to the CPUs of the list; an empty one leaves it where it is.
pub fn set(field: &'static str, list: &str) -> Result<(), AffinityError> {
    match parse(field, list)? {
        Some(cpus) => rustix::thread::sched_setaffinity(None, &cpus).map_err(|source| AffinityError::Set {
            field,
            list: list.into(),
            source,
        }),
        None => Ok(()),
    }
}

fn parse(field: &'static str, list: &str) -> Result<Option<CpuSet>, AffinityError> {
    if list.is_empty() {
        return Ok(None);
    }
    let wrong = || AffinityError::List { field, list: list.into() };
    let mut cpus = CpuSet::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let number = |text: &str| text.trim().parse::<usize>().ok().filter(|cpu| *cpu < CpuSet::MAX_CPU);
        let (first, last) = number(first).zip(number(last)).filter(|(first, last)| first <= last).ok_or_else(wrong)?;
        (first..=last).for_each(|cpu| cpus.set(cpu));
    }
    Ok(Some(cpus))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_numbers_and_ranges() {
        let cpus = parse("final", "0-2, 7").unwrap().unwrap();
        assert!([0, 1, 2, 7].into_iter().all(|cpu| cpus.is_set(cpu)) && cpus.count() == 4);
        assert!(parse("final", "").unwrap().is_none());
        for list in ["a", "3-1", "1-", "0-99999", "-1", "1,,2"] {
            assert!(parse("initial", list).is_err(), "{list}");
        }
    }
}
