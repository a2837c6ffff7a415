//! What goes away under pods, and what is known of them then: containerd, a shim, a machine.
//!
//! Each is done PODHULL_TEST_REPEAT times, at most [`MOST`].

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use k8s_cri::v1 as api;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::config::Configuration;
use super::cri::{PATIENT, patient};
use super::{oci, podhull};
use crate::cri::{self, Cri, Pod, container, resources, volume};
use crate::leaks::Leaks;
use crate::run::{DEADLINE, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq, processes};

pub const CASES: &[Case] = &[
    oci("cri_outages::containerd_goes_and_comes_back", containerd_goes_and_comes_back),
    podhull("cri_outages::a_killed_shim", a_killed_shim),
    podhull("cri_outages::a_killed_machine", a_killed_machine),
    podhull("cri_outages::a_killed_agent", a_killed_agent),
];

const MOST: usize = 50;

/// Counts in its log, until a file with its name appears; by its name it exits, or uses more memory than it may.
const COUNTING: &str = "
n=0
while :; do
    echo $n; n=$((n + 1)); sleep 1
    [ ! -e /volume/exit-$NAME ] || exit 7
    [ ! -e /volume/starve-$NAME ] || exec tail -c 200000000 /dev/zero
done";

/// A pod with a container that counts.
struct Counting {
    pod: Pod,
    name: String,
    id: String,
    attempt: u32,
    /// How often containerd was away since it was made.
    outages: usize,
}

impl Counting {
    fn launch(&mut self, cri: &Cri, directory: &Path) -> Outcome {
        self.attempt += 1;
        self.outages = 0;
        let mut config = container("main", &["sh", "-c", COUNTING]);
        config.metadata.get_or_insert_default().attempt = self.attempt;
        config.log_path = self.log();
        config.envs = vec![api::KeyValue { key: "NAME".into(), value: format!("{}-{}", self.name, self.attempt) }];
        config.mounts.push(volume(directory, "/volume", true));
        resources(&mut config).memory_limit_in_bytes = 32 << 20;
        self.id = cri.launch(&self.pod, config)?;
        Ok(())
    }

    fn log(&self) -> String {
        format!("main.{}", self.attempt)
    }

    /// How many numbers its log has: in order, none twice, and without what containerd had read and not written when it was killed.
    fn lines(&self, cri: &Cri) -> Outcome<usize> {
        let log = cri.log(&self.pod, &self.log())?;
        // What comes after the last end of a line is being written.
        let lines = log.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        let numbers = lines.map(|line| Ok(line.rsplit(' ').next().unwrap_or_default().parse()?));
        let numbers: Vec<usize> = numbers.collect::<Outcome<_>>().map_err(|error| format!("{error} in {log}"))?;
        let (mut next, mut gaps) = (0, 0);
        for number in &numbers {
            ensure!(*number >= next, "{number} comes where {next} is to come: {log}");
            gaps += usize::from(*number > next);
            next = number + 1;
        }
        ensure!(gaps <= self.outages, "{gaps} gaps after {} outages: {log}", self.outages);
        Ok(numbers.len())
    }

    /// It counts on, and executes what it is asked to.
    fn check(&self, cri: &Cri) -> Outcome {
        ensure_eq!(cri.status(&self.id)?.state(), api::ContainerState::ContainerRunning, "state of {}", self.name);
        ensure_eq!(cri.shell(&self.id, "echo fine")?, "fine\n", "what is executed in {}", self.name);
        let before = self.lines(cri)?;
        wait(&format!("{} does not count on from {before}", self.name), || Ok(self.lines(cri)? > before + 2))
    }
}

/// All of them do, at the same time.
fn check_all(all: &[Counting], cri: &Cri) -> Outcome {
    let checked: Vec<Outcome> = thread::scope(|scope| {
        let threads: Vec<_> = all.iter().map(|counting| scope.spawn(|| counting.check(cri))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err("it panicked".into()))).collect()
    });
    checked.into_iter().collect::<Outcome<Vec<()>>>().map(drop)
}

fn wait(what: &str, mut done: impl FnMut() -> Outcome<bool>) -> Outcome {
    let until = Instant::now() + DEADLINE;
    while !done()? {
        ensure!(Instant::now() < until, "{what}");
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Its pods go on, their logs too, and what ended without it is known with its status.
fn containerd_goes_and_comes_back(scene: &Scene) -> Outcome {
    let mut cri = Cri::start(scene)?;
    let directory = scene.make_directory("volume")?;
    let mut all = Vec::new();
    for number in 0..if scene.is_soak() { 10 } else { 3 } {
        let name = format!("p{number}");
        let pod = cri.run(cri.pod_config(&name)?)?;
        let mut counting = Counting { pod, name, id: String::new(), attempt: 0, outages: 0 };
        counting.launch(&cri, &directory)?;
        all.push(counting);
    }
    // In a soak as many of each kind.
    let rounds = scene.repeat.min(MOST) * if scene.is_soak() { 2 } else { 1 };
    for round in 0..rounds {
        check_all(&all, &cri)?;
        // Of two pods the containers end meanwhile: one by itself, and one that is killed for lack of memory.
        let (one, other) = (round % all.len(), (round + 1) % all.len());
        let ends = [(one, "exit", 7), (other, "starve", 137)];
        let pids = ends.iter().map(|(index, ..)| cri.process(&all[*index].id)).collect::<Outcome<Vec<_>>>()?;
        cri.without_containerd(round % 2 == 1, || {
            for (index, how, _) in ends {
                let Counting { name, attempt, .. } = &all[index];
                fs::write(directory.join(format!("{how}-{name}-{attempt}")), "")?;
            }
            wait("what is to end does not", || Ok(pids.iter().all(|pid| has_ended(*pid))))
        })?;
        for counting in &mut all {
            counting.outages += 1;
        }
        for (index, how, status) in ends {
            let Counting { id, name, .. } = &all[index];
            ensure_eq!(cri.ended(id)?.exit_code, status, "round {round}: status of {name} ({how})");
            // Why is told by an event, which comes when there is somebody to take it again.
            let reason = if how == "starve" { "OOMKilled" } else { "Error" };
            wait(&format!("round {round}: {name} has not ended with the reason {reason}"), || {
                Ok(cri.status(id)?.reason == reason)
            })?;
        }
        for (index, ..) in ends {
            let old = all[index].id.clone();
            all[index].launch(&cri, &directory)?;
            cri.remove(&old)?;
        }
    }
    check_all(&all, &cri)?;
    for counting in &all {
        ensure_eq!(cri.pod_status(&counting.pod)?.state(), api::PodSandboxState::SandboxReady, "state of the pod");
    }
    for counting in &all {
        cri.remove_pod(&counting.pod)?;
    }
    cri.end()
}

/// Nobody but its shim takes the end of one, which may be another process's child.
fn has_ended(pid: i32) -> bool {
    !processes::all().iter().any(|process| process.pid == pid && !matches!(process.state, 'Z' | 'X'))
}

/// A pod of two containers.
struct Two {
    pod: Pod,
    ids: Vec<String>,
}

impl Two {
    fn run(cri: &Cri, name: &str) -> Outcome<Self> {
        let pod = cri.run(cri.pod_config(name)?)?;
        let ids =
            ["a", "b"].iter().map(|name| patient(cri, &pod, container(name, PATIENT))).collect::<Outcome<Vec<_>>>()?;
        Ok(Self { pod, ids })
    }

    /// The ids of its containers, and its own.
    fn all(&self) -> Vec<String> {
        [&self.ids[..], std::slice::from_ref(&self.pod.id)].concat()
    }

    /// The ids of those that containerd knows as containers: the pod is none where the shim makes it by itself.
    fn told(&self) -> Outcome<Vec<String>> {
        Ok(if cri::sandboxer()?.is_some() { self.ids.clone() } else { self.all() })
    }

    /// Its containers have ended, as if they had been killed or with one of these statuses, and it is not ready any more. Returns those
    /// that containerd itself has heard of that they were killed.
    fn check_killed(&self, cri: &Cri, others: &[i32]) -> Outcome<Vec<String>> {
        let mut killed = Vec::new();
        for id in &self.ids {
            match cri.ended(id)?.exit_code {
                137 => killed.push(id.clone()),
                status => ensure!(others.contains(&status), "exit status {status}, not 137 or one of {others:?}"),
            }
        }
        wait("the pod is still ready", || {
            Ok(cri.pod_status(&self.pod)?.state() == api::PodSandboxState::SandboxNotready)
        })?;
        Ok(killed)
    }

    /// No process is about it any more; one that has removed something may end a moment later.
    fn check_gone(&self) -> Outcome {
        let of = |process: &processes::Process| self.all().iter().any(|id| process.command.contains(id));
        let mut left = Vec::new();
        wait("processes are left", || {
            left = processes::all().into_iter().filter(of).collect();
            Ok(left.is_empty())
        })
        .map_err(|error| format!("{error}: {left:?}").into())
    }
}

/// Kills the one process that this is true of.
fn kill_one(what: &str, is_it: impl Fn(&processes::Process) -> bool) -> Outcome {
    let found: Vec<_> = processes::all().into_iter().filter(is_it).collect();
    let [process] = &found[..] else { return Err(format!("{what}: {found:?}").into()) };
    kill_process(Pid::from_raw(process.pid).ok_or("no pid")?, Signal::KILL)?;
    Ok(())
}

/// In an event of a process that was killed.
const KILLED: &str = "\"exit_status\":137";

fn a_killed_shim(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let mut told = 0;
    for round in 0..scene.repeat.min(MOST) {
        let mut events = cri.events()?;
        let name = format!("s{round}");
        let two = Two::run(&cri, &name)?;
        kill_one("shims", |process| process.is_shim() && process.command.contains(&two.pod.id))?;
        (|| -> Outcome {
            // 255 is what containerd makes of a shim that it was waiting for, and then it may have the task deleted before it finds the
            // shim gone and cleans up after it: of that it hears 137, and tells.
            let killed = two.check_killed(&cri, &[255])?;
            cri.take_down(&two.pod)?;
            // Who cleans up is waited for by nobody who stops the pod.
            cri::remove_group(&name, DEADLINE)?;
            two.check_gone()?;
            check_told(&mut events, &killed)
        })()
        .map_err(|error| format!("round {round}: {error}"))?;
        events.signal(Signal::KILL)?;
        // Of whichever container, the pod's own among them.
        let exits = events.wait()?.stdout;
        told += exits.lines().filter(|line| line.contains(" /tasks/exit ") && line.contains(KILLED)).count();
    }
    ensure!(told > 0, "of no container was containerd told that it was killed");
    cri.end()
}

/// The end of each of these is told, as of one that was killed.
fn check_told(events: &mut Running, ids: &[String]) -> Outcome {
    let mut told = Vec::new();
    while !ids.iter().all(|id| told.contains(id)) {
        let line = events.line().map_err(|error| format!("told of {told:?}, and not of all of {ids:?}: {error}"))?;
        let Some((_, text)) = line.split_once(" /tasks/exit ") else { continue };
        let event: Value = serde_json::from_str(text)?;
        if event["id"] == event["container_id"] {
            ensure_eq!(event["exit_status"], 137, "status in {line}");
            told.push(event["id"].as_str().unwrap_or_default().to_owned());
        }
    }
    Ok(())
}

fn a_killed_machine(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    ends_of_machines(scene, &cri, "m", |_, name| {
        let group = format!("/pod-{name}/");
        kill_one("machines", |process| {
            let of = fs::read_to_string(format!("/proc/{}/cgroup", process.pid)).unwrap_or_default();
            process.command.starts_with("podhull vmm") && of.contains(&group)
        })
    })?;
    cri.end()
}

/// Writes zeros over the program of the guest's first process, which cannot be killed: it faults with the next thing it does, as
/// late as when it is told that this shell has ended.
const OVERWRITE: &str = "
set -- $(grep -m 1 r-xp /proc/1/maps)
first=$((0x${1%-*} / 4096)) last=$((0x${1#*-} / 4096))
exec dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$first count=$((last - first)) conv=notrunc";

fn a_killed_agent(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let host = Configuration::new()?;
    host.write("config.toml", "[debug]\nshell = \"/bin/busybox\"\n")?;
    let cri = Cri::start(scene)?;
    ends_of_machines(scene, &cri, "a", |pod, _| {
        let ended = scene.call(&["--root", cri::STATE, "debug", &pod.id, "-c", OVERWRITE])?;
        ensure!(ended.status != 0, "the shell has ended well, and its machine with it: {ended:?}");
        Ok(())
    })?;
    cri.end()?;
    drop(host);
    before.check()
}

/// However a machine ends: all of its containers exit, and who listens is told so in order.
fn ends_of_machines(scene: &Scene, cri: &Cri, letter: &str, mut end: impl FnMut(&Pod, &str) -> Outcome) -> Outcome {
    for round in 0..scene.repeat.min(MOST) {
        let mut events = cri.events()?;
        let name = format!("{letter}{round}");
        let two = Two::run(cri, &name)?;
        let id = &two.ids[0];
        // What its client makes for streams stays when the task is gone first.
        let fifos = scene.make_directory("fifos")?.display().to_string();
        let options = ["task", "exec", "--fifo-dir", &fifos, "--exec-id", "long", id];
        let executed = cri.client(&[&options[..], &["sh", "-c", "touch /long; sleep 1000"]].concat())?;
        cri.shell(id, "until [ -e /long ]; do sleep 0.1; done")?;
        end(&two.pod, &name)?;
        ensure!(executed.wait()?.status != 0, "what was executed has succeeded");
        (|| -> Outcome {
            two.check_killed(cri, &[])?;
            cri.remove_pod(&two.pod)?;
            two.check_gone()?;
            check_order(&mut events, &two)
        })()
        .map_err(|error| format!("round {round}: {error}"))?;
        // Its end is of no interest.
        events.signal(Signal::KILL)?;
        events.wait()?;
    }
    Ok(())
}

/// The end of each process comes once, of a container's first one last, and the end of a container before it is deleted.
fn check_order(events: &mut Running, two: &Two) -> Outcome {
    let mut ended: HashMap<String, Vec<String>> = HashMap::new();
    let mut deleted = Vec::new();
    let all = two.told()?;
    while !all.iter().all(|id| deleted.contains(id)) {
        let line = events.line()?;
        let Some((_, rest)) = line.split_once(" /tasks/") else { continue };
        let (topic, text) = rest.split_once(' ').ok_or_else(|| format!("no event: {line}"))?;
        let event: Value = serde_json::from_str(text)?;
        let word = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        let id = word("container_id");
        match topic {
            "exit" => {
                ensure!(!deleted.contains(&id), "it ends after it was deleted: {line}");
                let processes = ended.entry(id.clone()).or_default();
                ensure!(!processes.contains(&word("id")), "it ends twice: {line}");
                ensure!(!processes.contains(&id), "a process ends after the first one of its container: {line}");
                processes.push(word("id"));
            }
            "delete" if word("id").is_empty() || word("id") == id => {
                ensure!(
                    ended.get(&id).is_some_and(|processes| processes.contains(&id)),
                    "deleted before its end: {line}"
                );
                deleted.push(id);
            }
            _ => {}
        }
    }
    let processes = ended.get(&two.ids[0]).cloned().unwrap_or_default();
    ensure!(processes.contains(&"long".to_owned()), "the end of what was executed is not told: {processes:?}");
    Ok(())
}
