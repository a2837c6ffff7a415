//! What kubelet is told of the use of pods and containers, for metrics, autoscaling and eviction, after a load that is known.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use k8s_cri::v1 as api;

use super::oci;
use crate::cri::{Cri, Pod, container, volume};
use crate::run::DEADLINE;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] =
    &[oci("cri_statistics::of_a_container", of_a_container), oci("cri_statistics::of_a_pod", of_a_pod)];

/// Uses so many seconds of a processor in user mode, by the account that its kernel keeps of it, and prints what it came to. What it
/// writes stays in the guest: files of the host would be work that is not in that account.
fn burning(seconds: u64) -> String {
    format!(
        "until [ \"${{user%%.*}}\" = 0m{seconds} ]; do n=0; while [ $n -lt 2000 ]; do n=$((n + 1)); done; times >/dev/shm/times; \
        read user system </dev/shm/times; done; echo $user $system"
    )
}

/// Seconds that are burnt.
const BURNT: u64 = 3;

/// The same in a pod, of which more is told than of what burns.
const BURNT_IN_POD: u64 = 5;

/// How long a pod is watched that does nothing.
const IDLE: Duration = Duration::from_secs(5);

/// What it takes a pod to begin to burn, and to tell of it, on an emulated machine: a program is started.
const BEGINNING: Duration = Duration::from_millis(250);

/// Bytes of memory that a pod may have more or less than what is held in it: a guest's memory comes in pages of 2 MiB, of which it may
/// have begun some before, and give others back meanwhile.
const ROOM: u64 = 8 << 20;

/// MiB of memory that are held.
const HELD: u64 = 40;

/// A pod with a container that does nothing by itself.
fn idle(cri: &Cri) -> Outcome<(Pod, String)> {
    let pod = cri.run(cri.pod_config("statistics")?)?;
    let mut config = container("main", &["sleep", "1000"]);
    config.labels.insert("of".into(), "the test".into());
    let id = cri.launch(&pod, config)?;
    Ok((pod, id))
}

/// Burns in a container; how many nanoseconds of a processor that was.
fn burn(cri: &Cri, id: &str) -> Outcome<u64> {
    burnt(&cri.shell(id, &burning(BURNT))?, BURNT)
}

/// The same by what it has printed.
fn burnt(said: &str, seconds: u64) -> Outcome<u64> {
    let mut sum = 0;
    for time in said.split_whitespace() {
        let (minutes, seconds) = time.trim_end_matches('s').split_once('m').ok_or_else(|| format!("times {said:?}"))?;
        sum += minutes.parse::<u64>()? * 60_000_000_000 + (seconds.parse::<f64>()? * 1e9) as u64;
    }
    ensure!(sum >= seconds * 1_000_000_000, "only {sum} ns of a processor were burnt");
    Ok(sum)
}

/// Writes so many MiB into memory that stays, and looks that they are there.
fn hold(cri: &Cri, id: &str, count: u64) -> Outcome {
    cri.shell(id, &format!("dd if=/dev/zero of=/dev/shm/held-{count} bs=1M count={count} 2>/dev/null"))?;
    let size = cri.shell(id, &format!("stat -c %s /dev/shm/held-{count}"))?;
    ensure_eq!(size.trim().parse::<u64>()?, count << 20, "bytes that are held");
    Ok(())
}

fn value(number: Option<api::UInt64Value>, what: &str) -> Outcome<u64> {
    Ok(number.ok_or_else(|| format!("no {what}"))?.value)
}

/// Nanoseconds of a processor, and bytes of memory.
fn used(cpu: Option<&api::CpuUsage>, memory: Option<&api::MemoryUsage>) -> Outcome<(u64, u64)> {
    let (cpu, memory) = (cpu.ok_or("no account of processors")?, memory.ok_or("no account of memory")?);
    Ok((
        value(cpu.usage_core_nano_seconds, "time of processors")?,
        value(memory.working_set_bytes, "memory that is worked with")?,
    ))
}

fn of_container(stats: &api::ContainerStats) -> Outcome<(u64, u64)> {
    used(stats.cpu.as_ref(), stats.memory.as_ref())
}

fn grown(before: u64, after: u64, what: &str) -> Outcome<u64> {
    Ok(after.checked_sub(before).ok_or_else(|| format!("{what} has shrunk from {before} to {after}"))?)
}

fn of_a_container(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let (pod, id) = idle(&cri)?;
    let stats = || {
        let request = api::ContainerStatsRequest { container_id: id.clone() };
        let answer = cri.call(async |mut client| client.container_stats(request).await)?;
        of_container(&answer.stats.ok_or("no statistics")?)
    };
    let before = stats()?;
    let burnt = burn(&cri, &id)?;
    let busy = stats()?;
    let cpu = grown(before.0, busy.0, "time of processors")?;
    ensure!(cpu * 20 > burnt * 19 && cpu * 20 < burnt * 21, "{cpu} ns of a processor are told of {burnt}");
    hold(&cri, &id, HELD)?;
    let memory = grown(busy.1, stats()?.1, "memory")?;
    let held = HELD << 20;
    ensure!(memory * 20 > held * 19 && memory * 20 < held * 21, "{memory} bytes of memory are told of {held}");

    // Of all at once, kubelet asks for those of a pod, or by labels; none of them are of another.
    let (other, _) = {
        let pod = cri.run(cri.pod_config("other")?)?;
        let id = cri.launch(&pod, container("main", &["sleep", "1000"]))?;
        (pod, id)
    };
    let labels = [("of".to_owned(), "the test".to_owned())].into();
    for (filter, count) in [
        (api::ContainerStatsFilter::default(), 2),
        (api::ContainerStatsFilter { id: id.clone(), ..Default::default() }, 1),
        (api::ContainerStatsFilter { pod_sandbox_id: pod.id.clone(), ..Default::default() }, 1),
        (api::ContainerStatsFilter { label_selector: labels, ..Default::default() }, 1),
    ] {
        let request = api::ListContainerStatsRequest { filter: Some(filter.clone()) };
        let listed = cri.call(async |mut client| client.list_container_stats(request).await)?.stats;
        ensure_eq!(listed.len(), count, "containers with {filter:?}");
        let of = |stats: &&api::ContainerStats| stats.attributes.as_ref().is_some_and(|of| of.id == id);
        let mine = listed.iter().find(of).ok_or_else(|| format!("not listed with {filter:?}"))?;
        let name = mine.attributes.as_ref().and_then(|of| of.metadata.as_ref()).map(|metadata| &*metadata.name);
        ensure_eq!(name, Some("main"), "its name");
        let (cpu, memory) = of_container(mine)?;
        ensure!(cpu >= busy.0 && memory >= busy.1 + held * 19 / 20, "{cpu} ns and {memory} bytes with {filter:?}");
    }
    cri.remove_pod(&other)?;
    cri.remove_pod(&pod)?;
    cri.end()
}

/// Bytes of memory that a group works with: what it has, without what is of files and was not used lately.
fn group_memory(group: &Path) -> Outcome<u64> {
    let stat = fs::read_to_string(group.join("memory.stat"))?;
    let inactive = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok());
    let current: u64 = fs::read_to_string(group.join("memory.current"))?.trim().parse()?;
    Ok(current.saturating_sub(inactive.ok_or("no files")?))
}

/// What the group of kubelet's for a pod has used.
fn group_used(group: &Path) -> Outcome<u64> {
    let stat = fs::read_to_string(group.join("cpu.stat"))?;
    let used = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse::<u64>().ok());
    Ok(used.ok_or("no usage")? * 1000)
}

/// Waits for the last line that a container has written, which begins with a word.
fn line(cri: &Cri, pod: &Pod, word: &str) -> Outcome<String> {
    let until = Instant::now() + DEADLINE;
    loop {
        let log = cri.log(pod, "main")?;
        // Before it are the time, the stream, and whether it is whole.
        let text = log.lines().last().and_then(|line| line.splitn(4, ' ').nth(3)).unwrap_or_default();
        if let Some(rest) = text.strip_prefix(word) {
            return Ok(rest.to_owned());
        }
        ensure!(Instant::now() < until, "no line with {word:?} in {log:?}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// It is what the pod's group on the node has used, whose processes the machine, the shadows and the kernel's work for them are; and in
/// it there is a group for each container, where cAdvisor looks for one.
fn of_a_pod(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("statistics")?)?;
    // It burns when there is a file, for which no program is executed that would be in the pod's account.
    let told = scene.make_directory("told")?;
    let script = format!(
        "echo waits; until [ -e /told/burn ]; do sleep 1; done; echo burnt $(sh -c '{}'); exec sleep 1000",
        burning(BURNT_IN_POD)
    );
    let mut config = container("main", &["sh", "-c", &script]);
    config.mounts.push(volume(&told, "/told", true));
    let id = cri.launch(&pod, config)?;
    line(&cri, &pod, "waits")?;
    // What the first program costs that is executed in it, no later one does.
    hold(&cri, &id, 1)?;
    let group = PathBuf::from("/sys/fs/cgroup/kubepods/pod-statistics");
    let stats = || {
        let request = api::PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
        let answer = cri.call(async |mut client| client.pod_sandbox_stats(request).await)?;
        answer.stats.and_then(|stats| stats.linux).ok_or_else(|| crate::Failure::from("no statistics"))
    };
    let of = |stats: &api::LinuxPodSandboxStats| used(stats.cpu.as_ref(), stats.memory.as_ref());

    let (began, before) = (Instant::now(), of(&stats()?)?);
    thread::sleep(IDLE);
    let (burns, idle) = (Instant::now(), of(&stats()?)?);
    let rate = grown(before.0, idle.0, "time of processors")? as f64 / (burns - began).as_nanos() as f64;
    fs::write(told.join("burn"), "")?;
    let said = line(&cri, &pod, "burnt")?;
    let (burnt, busy) = (burnt(&said, BURNT_IN_POD)?, of(&stats()?)?);
    let cpu = grown(idle.0, busy.0, "time of processors")?;
    // It does less beside than when it looked for the file.
    let beside = (rate * burns.elapsed().as_nanos() as f64) as u64 + u64::try_from(BEGINNING.as_nanos())?;
    ensure!(
        cpu * 20 > burnt * 19 && cpu < burnt / 20 * 21 + beside,
        "{cpu} ns of a processor are told of {burnt}, and at most {beside} beside"
    );

    hold(&cri, &id, HELD)?;
    let look = || Outcome::Ok((group_used(&group)?, group_memory(&group)?));
    let ((least, memory_before), told, (most, memory_after)) = (look()?, stats()?, look()?);
    let after = of(&told)?;
    ensure!(after.0 >= least && after.0 <= most, "{} ns of a processor are told of {least} to {most}", after.0);
    // It shrinks, too; and a processor may have a few pages for later that nobody has yet.
    let room = 1 << 20;
    let (least, most) = (memory_before.min(memory_after) - room, memory_before.max(memory_after) + room);
    ensure!(after.1 >= least && after.1 <= most, "{} bytes of memory are told of {least} to {most}", after.1);
    let memory = grown(busy.1, after.1, "memory")?;
    let held = HELD << 20;
    ensure!(memory.abs_diff(held) < held / 20 + ROOM, "{memory} bytes of memory are told of {held}");

    let [container] = &told.containers[..] else { return Err(format!("{} containers", told.containers.len()).into()) };
    ensure!(container.attributes.as_ref().is_some_and(|of| of.id == id), "another container: {container:?}");
    ensure!(of_container(container)?.0 >= burnt, "the container has used {container:?}");
    let filter = api::PodSandboxStatsFilter { id: pod.id.clone(), ..Default::default() };
    let request = api::ListPodSandboxStatsRequest { filter: Some(filter) };
    let listed = cri.call(async |mut client| client.list_pod_sandbox_stats(request).await)?.stats;
    let [listed] = &listed[..] else { return Err(format!("{} pods", listed.len()).into()) };
    ensure!(listed.attributes.as_ref().is_some_and(|of| of.id == pod.id), "another pod: {listed:?}");
    ensure!(of(listed.linux.as_ref().ok_or("no statistics in the list")?)?.0 >= after.0, "less is listed: {listed:?}");

    // cAdvisor finds the id anywhere in the group's name, and asks containerd for that; kubelet takes what it finds there for the
    // container's only where the id is all of the name.
    let own = group.join(if scene.runtime.is_virtual() { format!("podhull_{id}") } else { id.clone() });
    let processes =
        fs::read_to_string(own.join("cgroup.procs")).map_err(|error| format!("{}: {error}", own.display()))?;
    let process = cri.process(&id)?.to_string();
    ensure!(processes.lines().any(|pid| pid == process), "process {process} of the container among {processes:?}");
    ensure!(group_used(&own)? > 0, "the container's group has used nothing");
    cri.remove_pod(&pod)?;
    cri.end()
}
