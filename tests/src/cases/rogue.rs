//! A guest that misbehaves on purpose: its agent is `tests/rogue`, in the same machine and behind the same callers as any other. What
//! it does costs an error that says what was wrong, at most, and in time; no memory without bounds, no panic, and nothing stays.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use k8s_cri::v1::{
    LinuxContainerResources, ListPodSandboxRequest, PodSandboxConfig, PodSandboxState, PodSandboxStatsRequest,
};
use serde_json::json;

use super::config::Configuration;
use super::containerd::{stopped, stopped_within};
use super::operations::get;
use super::{long, podhull, rogue_silent};
use crate::bundle::Bundle;
use crate::container::Container;
use crate::containerd::{Containerd, Shim, check};
use crate::cri::{self, Cri, PATIENT, Pod, container, resources};
use crate::leaks::Leaks;
use crate::metrics::Metrics;
use crate::run::{DEADLINE, Ended, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq, processes};

pub const CASES: &[Case] = &[
    podhull("rogue::a_container", a_container),
    podhull("rogue::what_has_no_end", what_has_no_end),
    podhull("rogue::who_looks_at_it", who_looks_at_it),
    long(podhull("rogue::commands", commands)),
    long(podhull("rogue::behind_containerd", behind_containerd)),
    long(podhull("rogue::behind_kubelet", behind_kubelet)),
];

/// The image with the agent that misbehaves.
const IMAGE: &str = "/opt/podhull-tests/rogue.img";

/// The annotation that says how.
pub(super) const PARAMS: &str = "io.podhull.machine.kernel_params";

/// Most memory that a process of ours may ever have, but the one with the guest's in it.
const MOST: u64 = 64 << 20;

/// The same of that one, for a container that may have 64 MiB.
const MOST_OF_MACHINE: u64 = 400 << 20;

/// Longest that anything may take: the agent has two minutes for what is work, and output that does not end is looked at every
/// half a minute.
pub(super) const LATEST: Duration = Duration::from_secs(240);

/// What is said of a machine that is reset, which guests do that panic.
const RESET: &str = "the guest's kernel panicked, or its agent died: the virtual machine was reset";

/// Has machines start from the image, for as long as it is there.
pub(super) fn configuration() -> Outcome<Configuration> {
    ensure!(Path::new(IMAGE).is_file(), "no {IMAGE}: `make stage` makes it");
    let host = Configuration::new()?;
    let text = format!(
        "[machine]\nimage = {IMAGE:?}\n[annotations]\nallow = [\"machine.kernel_params\"]\n\
        [debug]\nshell = \"/bin/busybox\"\n"
    );
    host.write("config.toml", &text)?;
    Ok(host)
}

fn bundle(scene: &Scene, fault: &str) -> Outcome<Bundle> {
    let limits = json!({ "memory": { "limit": 64 << 20 } });
    let bundle = scene.debian()?.sh("true").set("/linux/resources", limits);
    Ok(bundle.set("/annotations", json!({ PARAMS: format!("rogue={fault}") })))
}

/// The most memory that each descendant of the suite ever had.
pub(super) struct Peaks {
    over: Arc<AtomicBool>,
    watcher: JoinHandle<HashMap<(i32, String), u64>>,
}

impl Peaks {
    pub(super) fn watch() -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let end = over.clone();
        let watcher = thread::spawn(move || {
            let mut peaks = HashMap::new();
            while !end.load(Ordering::Relaxed) {
                for process in processes::descendants(std::process::id().cast_signed()) {
                    let status = fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap_or_default();
                    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
                    let peak = peak.and_then(|peak| peak.trim().trim_end_matches(" kB").parse::<u64>().ok());
                    if let Some(peak) = peak {
                        // The most there ever was only grows.
                        peaks.insert((process.pid, process.command), peak * 1024);
                    }
                }
                thread::sleep(Duration::from_millis(200));
            }
            peaks
        });
        Self { over, watcher }
    }

    /// None was too much; some are there.
    pub(super) fn check(self) -> Outcome {
        self.over.store(true, Ordering::Relaxed);
        let peaks = self.watcher.join().map_err(|_| "the watcher panicked")?;
        // By what runs: others have the test's own directory among their words. What is about to run another program still has the
        // suite's memory, and its words.
        let suite = std::env::args().next().unwrap_or_default();
        let ours = |command: &str| {
            command.split(' ').next().is_some_and(|program| program.contains("podhull") && program != suite)
        };
        let mut count = 0;
        for ((_, command), peak) in peaks.iter().filter(|((_, command), _)| ours(command)) {
            let most = if command.starts_with("podhull vmm") { MOST_OF_MACHINE } else { MOST };
            ensure!(*peak <= most, "{peak} bytes of memory of {command}");
            count += 1;
        }
        ensure!(count > 0, "no process was seen");
        Ok(())
    }
}

/// What a program of ours says of a guest like that: a line, and not the guest's own.
fn check_words(fault: &str, ended: &Ended) -> Outcome {
    // What it writes without end is of this.
    let said = ended.stderr.trim_start_matches('x');
    ensure!(ended.signal.is_none(), "{fault}: signal {:?}, stderr {said:.300?}", ended.signal);
    ensure!(!said.contains("panicked at"), "{fault}: {said}");
    ensure!(said.lines().count() <= 1 && said.len() < 4096, "{fault}: {} bytes of {said:.300?}", said.len());
    ensure!(!said.trim_end().contains(char::is_control), "{fault}: {said:.300?}");
    Ok(())
}

/// Runs a container that fails with these words, or ends with 0 if there are none.
fn check_end(fault: &str, words: &[&str], ended: &Ended) -> Outcome {
    check_words(fault, ended)?;
    if words.is_empty() {
        ensure_eq!(ended.status, 0, "{fault}: stderr {:.300?}", ended.stderr);
        return Ok(());
    }
    ensure!(ended.status != 0, "{fault}: it succeeded");
    let said = ended.stderr.trim_start_matches('x');
    ensure!(words.iter().any(|word| said.contains(word)), "{fault}: none of {words:?} in {said:.300?}");
    Ok(())
}

/// What is said of each that goes wrong before its program runs, and of each that does so afterwards; nothing if it ends with 0.
const QUICK: &[(&str, &[&str])] = &[
    ("none", &[]),
    ("garbage", &["nonsense: an answer that is too long", "nonsense: an event that is too long"]),
    ("huge-frame", &["nonsense: an answer that is too long"]),
    ("wrong-type", &["nonsense: no message of its protocol"]),
    ("no-message", &["nonsense: no message of its protocol"]),
    ("many-fields", &["nonsense: an answer that is too long"]),
    ("hangs-up", &["the agent in the guest is gone"]),
    ("version", &["the versions differ"]),
    ("absurd-pid", &["nonsense: the process id of the container"]),
    ("no-streams", &["cannot connect the container's"]),
    ("vanishes", &[RESET]),
    ("wrong-ids", &[]),
    ("storm", &[]),
    ("absurd-exit", &["nonsense: the exit status of the container"]),
    ("dies", &[RESET]),
    ("foreign-events", &[]),
    ("long-event", &["nonsense: an event that is too long"]),
    ("events-after-exit", &[]),
];

/// The same of those that are waited for: the deadline of what is work, and that of output.
const SLOW: &[(&str, &[&str])] = &[
    ("mute", &["did not answer CreatePod in time"]),
    ("output-after-exit", &["the container has ended, but its output has not"]),
];

/// One for each kind, those that take their time beside the others.
fn a_container(scene: &Scene) -> Outcome {
    let _host = configuration()?;
    let before = Leaks::watch();
    let peaks = Peaks::watch();
    let start = |fault: &str| -> Outcome<Running> {
        let bundle = bundle(scene, fault)?;
        bundle.write()?;
        let run = crate::terminal::shell_line(&scene.runtime.run_words(&bundle.directory, &scene.id()));
        // What it has to say without end must not be kept here.
        Running::start(&["sh".into(), "-c".into(), format!("exec {run} >/dev/null").into()], &[])
    };
    let waiting = SLOW.iter().map(|(fault, _)| start(fault)).collect::<Outcome<Vec<_>>>()?;
    for (fault, words) in QUICK {
        check_end(fault, words, &start(fault)?.wait_within(LATEST)?)?;
    }
    for ((fault, words), run) in SLOW.iter().zip(waiting) {
        check_end(fault, words, &run.wait_within(LATEST)?)?;
    }
    peaks.check()?;
    before.check()
}

/// Ticks of processors that the processes of a container have used, but its machine.
fn worked(id: &str) -> u64 {
    let ours =
        |process: &processes::Process| process.program.as_ref().is_some_and(|program| program.ends_with("podhull"));
    let all = processes::all().into_iter().filter(ours);
    let of = all.filter(|process| process.command.contains(id) && !process.command.starts_with("podhull vmm"));
    // User and system time are the twelfth and thirteenth field behind the name (proc(5)).
    let ticks = |process: processes::Process| {
        let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid)).unwrap_or_default();
        let fields = stat.rsplit_once(')').map(|(_, fields)| fields).unwrap_or_default();
        fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum::<u64>()
    };
    of.map(ticks).sum()
}

/// It is ended from outside.
fn what_has_no_end(scene: &Scene) -> Outcome {
    let _host = configuration()?;
    for fault in ["endless-output", "flood-of-events", "starves-for-ever"] {
        let before = Leaks::watch();
        let peaks = Peaks::watch();
        let bundle = bundle(scene, fault)?;
        bundle.write()?;
        let id = scene.id();
        let run = crate::terminal::shell_line(&scene.runtime.run_words(&bundle.directory, &id));
        let run = Running::start(&["sh".into(), "-c".into(), format!("exec {run} >/dev/null").into()], &[])?;
        let until = Instant::now() + DEADLINE;
        while !Path::new("/run/podhull").join(&id).join("state.json").exists() {
            ensure!(Instant::now() < until, "{fault}: it does not begin: {}", run.stderr());
            thread::sleep(Duration::from_millis(50));
        }
        // When it has worked for two seconds, what it keeps would be seen.
        let until = Instant::now() + LATEST;
        while worked(&id) < 200 {
            ensure!(Instant::now() < until, "{fault}: it has worked for {} hundredths of a second", worked(&id));
            thread::sleep(Duration::from_millis(100));
        }
        scene.call(&["delete", "--force", &id])?.expect_status(0)?;
        let ended = run.wait_within(LATEST)?;
        ensure!(ended.status != 0 && !ended.stderr.contains("panicked at"), "{fault}: {:.300?}", ended.stderr);
        peaks.check().map_err(|error| format!("{fault}: {error}"))?;
        before.check().map_err(|error| format!("{fault}: {error}"))?;
    }
    Ok(())
}

/// Every command ends, and shows nothing that does something to a terminal, or that Prometheus does not understand.
fn answers(scene: &Scene, fault: &str, id: &str, commands: impl Iterator<Item = &'static [&'static str]>) -> Outcome {
    let mut running = Vec::new();
    for command in commands {
        let words = super::broken::words(command, id);
        let mut all = vec![scene.runtime.program().into()];
        all.extend(words.iter().map(Into::into));
        running.push((words, Running::start(&all, &[])?));
    }
    for (words, run) in running {
        let ended = run.wait_within(LATEST)?;
        check_words(&format!("{fault}: {words:?}"), &ended)?;
        let said = &ended.stdout;
        ensure!(
            said.chars().all(|c| c == '\n' || !c.is_control()) && said.len() < 8 << 20,
            "{fault}: {words:?}: {} bytes of {said:.300?}",
            said.len()
        );
        match &*words[0] {
            "metrics" => drop(Metrics::read(said)?),
            // It was asked for no more than a thousand bytes of the guest's, and escapes them.
            "logs" if words.contains(&"--bytes".to_owned()) => {
                ensure!(said.len() < 16 << 10, "{fault}: {words:?}: {} bytes", said.len());
            }
            _ => {}
        }
    }
    Ok(())
}

/// Who looks after a host's pods.
fn who_looks_at_it(scene: &Scene) -> Outcome {
    let _host = configuration()?;
    let before = Leaks::watch();
    let peaks = Peaks::watch();
    let bundle = bundle(scene, "lies")?;
    let container = Container::create(scene, &bundle)?;
    let more: [&[&str]; 3] = [&["events", "--stats", "ID"], &["exec", "ID", "true"], &["ps", "ID"]];
    answers(scene, "lies", &container.id, super::broken::LOOKS.into_iter().chain(more))?;
    scene.call(&["delete", "--force", &container.id])?.output()?;
    ensure!(container.wait()? != 0, "it succeeded");
    peaks.check()?;
    before.check()
}

/// Every command on such a container ends, whatever it is told; one that ends the container needs nothing of the guest.
fn commands(scene: &Scene) -> Outcome {
    let _host = configuration()?;
    for fault in ["lies", "deaf"] {
        let before = Leaks::watch();
        let peaks = Peaks::watch();
        let container = Container::create(scene, &bundle(scene, fault)?)?;
        let ends = |command: &&[&str]| !matches!(command, ["delete", ..] | ["events", "ID"]);
        let commands = super::broken::COMMANDS.into_iter().filter(ends).chain(super::broken::LOOKS);
        answers(scene, fault, &container.id, commands)?;
        scene.call(&["delete", "--force", &container.id])?.output()?;
        // It may have given such a guest up before.
        ensure!(container.wait()? != 0, "{fault}: it succeeded");
        peaks.check().map_err(|error| format!("{fault}: {error}"))?;
        before.check().map_err(|error| format!("{fault}: {error}"))?;
    }
    Ok(())
}

/// The shim serves containerd all the same, and what is removed is gone.
fn behind_containerd(scene: &Scene) -> Outcome {
    let _host = configuration()?;
    let before = Leaks::watch();
    let peaks = Peaks::watch();
    let containerd = Containerd::start(scene, Shim::Podhull)?;
    let volume = Volume::new(scene)?;
    let mount = format!("type=bind,src={},dst=/etc/settings,options=rbind:ro", volume.0.display());
    let run = |fault: &str| {
        let annotation = format!("{PARAMS}=rogue={fault}");
        let options = ["-d", "--null-io", "--memory-limit", "67108864", "--annotation", &annotation];
        let more = if fault == "lies" { [&options[..], &["--mount", &mount]].concat() } else { options.to_vec() };
        Running::start(&containerd.run_words(&more, fault, &["true"]), &[])?.wait_within(LATEST)
    };
    for fault in ["garbage", "hangs-up", "absurd-pid", "version"] {
        let failed = run(fault)?.expect_status(1)?;
        ensure!(failed.stderr.contains("agent") || failed.stderr.contains("versions"), "{fault}: {:?}", failed.stderr);
        let _ = containerd.call(&["container", "delete", fault])?;
    }
    for fault in ["starves-for-ever", "lies", "silent"] {
        run(fault)?.output()?;
    }
    // It is waited for beside the others.
    thread::scope(|scope| {
        let silent = scope.spawn(|| rogue_silent::behind_containerd(&containerd));
        let (_, body) = get(Path::new("/run/containerd/podhull/default/pods/lies/metrics.sock"))?;
        Metrics::read(&body)?;
        // It cannot say that it has what is new.
        volume.update()?;
        let directory = containerd.socket().with_file_name("state/io.containerd.runtime.v2.task/default/lies");
        let until = Instant::now() + DEADLINE;
        loop {
            let log = fs::read_to_string(directory.join("log.json"))?;
            if log.contains("settings stays as it was") {
                break;
            }
            ensure!(Instant::now() < until, "nothing is said of the volume: {log}");
            thread::sleep(Duration::from_millis(100));
        }
        for question in ["metrics", "ps", "pause", "resume"] {
            // Whatever the answer is.
            let ended = containerd.call(&["task", question, "lies"])?;
            ensure!(!ended.stderr.contains("panicked at"), "{question}: {:?}", ended.stderr);
        }
        // It says that it does, and does not: in the end its shadow is killed, while there are others.
        containerd.call(&["task", "kill", "--signal", "SIGKILL", "starves-for-ever"])?.output()?;
        // It may have been given up before.
        let killed = containerd.call(&["task", "kill", "--signal", "SIGKILL", "lies"])?;
        ensure!(killed.status == 0 || killed.stderr.contains("process already finished"), "{:?}", killed.stderr);
        run("absurd-exit")?.output()?;
        stopped(&containerd, "absurd-exit")?;
        // The agent gone is the machine gone.
        for _ in 0..scene.repeat.min(50) {
            run("dies")?.output()?;
            stopped(&containerd, "dies")?;
            let deleted = containerd.call(&["task", "delete", "dies"])?;
            ensure!(deleted.stderr.contains("non-zero exit code"), "exit status: {:?}", deleted.stderr);
            containerd.call(&["container", "delete", "dies"])?.output()?;
        }
        silent.join().unwrap_or_else(|_| Err("it panicked".into()))
    })?;
    for fault in ["absurd-exit", "starves-for-ever", "lies"] {
        stopped_within(&containerd, fault, LATEST)?;
        containerd.call(&["task", "delete", fault])?;
        containerd.call(&["container", "delete", fault])?.output()?;
    }
    peaks.check()?;
    containerd.end()?;
    check(&before)
}

/// A ConfigMap's, of which the guest is told when kubelet writes it anew.
struct Volume(PathBuf);

impl Volume {
    fn new(scene: &Scene) -> Outcome<Self> {
        let path = scene.directory.join("pods/uid/volumes/kubernetes.io~configmap/settings");
        fs::create_dir_all(path.join("..1"))?;
        symlink("..1", path.join("..data"))?;
        Ok(Self(path))
    }

    fn update(&self) -> Outcome {
        fs::create_dir(self.0.join("..2"))?;
        symlink("..2", self.0.join("..data_tmp"))?;
        Ok(fs::rename(self.0.join("..data_tmp"), self.0.join("..data"))?)
    }
}

/// What containerd has kept of a pod that did not start, where it could not take it away in the time that it has for that: kubelet
/// stops and removes it again and again.
fn take_away(cri: &Cri, config: &PodSandboxConfig) -> Outcome {
    let uid = config.metadata.as_ref().map(|metadata| &metadata.uid);
    let until = Instant::now() + LATEST;
    loop {
        let request = ListPodSandboxRequest::default();
        let mut pods = cri.call(async |mut client| client.list_pod_sandbox(request).await)?.items;
        pods.retain(|pod| pod.metadata.as_ref().map(|metadata| &metadata.uid) == uid);
        let Some(pod) = pods.pop() else { return Ok(()) };
        if let Err(error) = cri.take_down(&Pod { id: pod.id, config: config.clone() }) {
            ensure!(Instant::now() < until, "what is left of it: {error}");
            thread::sleep(Duration::from_secs(1));
        }
    }
}

/// Such a pod does not start, or can be removed as any other; kubelet is told so in as many words as it can keep.
fn behind_kubelet(scene: &Scene) -> Outcome {
    let _host = configuration()?;
    let peaks = Peaks::watch();
    let cri = Cri::start(scene)?;
    // A guest like that takes no more memory than it began with.
    let limit = LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() };
    let config = |fault: &str| {
        let mut config = cri.pod_config(fault)?;
        config.annotations.insert(PARAMS.to_owned(), format!("rogue={fault}"));
        config.linux.get_or_insert_default().resources = Some(limit.clone());
        Outcome::Ok(config)
    };
    let check = |fault: &str, error: &str, words: &[&str]| {
        ensure!(words.iter().any(|word| error.contains(word)), "{fault}: none of {words:?} in {error:.600?}");
        ensure!(
            error.len() < 8192 && !error.contains("panicked at"),
            "{fault}: {} bytes of {error:.600?}",
            error.len()
        );
        Outcome::Ok(())
    };
    let does_not_start = |fault: &str, words: &[&str]| {
        let config = config(fault)?;
        let error = cri.run(config.clone()).err().ok_or_else(|| format!("{fault}: the pod runs"))?;
        check(fault, &error.to_string(), words)?;
        take_away(&cri, &config).map_err(|error| format!("{fault}: {error}"))?;
        // It is kubelet's, and nothing is in it, as soon as such a guest is given up.
        cri::remove_group(fault, LATEST)
    };
    // One that goes on, and says without end that it has no memory left.
    let pod = cri.run(config("starves-for-ever")?)?;
    let mut main = container("main", PATIENT);
    *resources(&mut main) = limit.clone();
    let main = cri.launch(&pod, main)?;
    let stats = PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    cri.call(async |mut client| client.pod_sandbox_stats(stats).await)?;
    ensure_eq!(cri.pod_status(&pod)?.state(), PodSandboxState::SandboxReady, "state of the pod");
    thread::scope(|scope| {
        // What has to be given up is waited for beside the others.
        let given_up = [
            scope.spawn(|| {
                // Its container has to be before its pod has, which is more than one call is for.
                cri.stop(&main, 0)?;
                cri.remove_pod(&pod)
            }),
            scope.spawn(|| {
                let pod = cri.run(config("silent")?)?;
                ensure_eq!(cri.pod_status(&pod)?.state(), PodSandboxState::SandboxReady, "state of the silent pod");
                cri.remove_pod(&pod)
            }),
            scope.spawn(|| does_not_start("lies", &["cannot configure the network of the virtual machine: no no no "])),
        ];
        for (fault, words) in [
            ("garbage", &["nonsense: an answer that is too long", "nonsense: an event that is too long"][..]),
            ("hangs-up", &["the agent in the guest is gone"]),
            ("version", &["the versions differ"]),
            ("absurd-pid", &["nonsense: the process id of the container"]),
            ("vanishes", &[RESET]),
        ] {
            does_not_start(fault, words)?;
        }
        // One that has started, and ends by itself, or dies.
        for fault in ["none", "dies"] {
            let pod = cri.run(config(fault)?).map_err(|error| format!("{fault}: {error}"))?;
            let until = Instant::now() + DEADLINE;
            while cri.pod_status(&pod)?.state() != PodSandboxState::SandboxNotready {
                ensure!(Instant::now() < until, "{fault}: the pod does not end");
                thread::sleep(Duration::from_millis(100));
            }
            cri.remove_pod(&pod)?;
        }
        given_up.into_iter().try_for_each(|one| one.join().unwrap_or_else(|_| Err("it panicked".into())))
    })?;
    peaks.check()?;
    cri.end()
}
