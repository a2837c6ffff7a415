//! What the administrator of a host sees of its pods.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use serde_json::{Value, json};

use super::config::Configuration;
use super::disks::Loop;
use super::podhull;
use super::pods::in_the_pod_of;
use crate::container::Container;
use crate::containerd::{self, Containerd, Shim};
use crate::leaks::Leaks;
use crate::metrics::{Metrics, labels_of};
use crate::processes;
use crate::run::{DEADLINE, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    podhull("operations::pods_are_listed_with_what_they_use", pods_are_listed),
    podhull("operations::metrics_are_valid_and_move_with_a_load", metrics_move),
    podhull("operations::metrics_tell_of_limits", metrics_tell_of_limits),
    podhull("operations::a_start_is_traced", a_start_is_traced),
    podhull("operations::a_shim_serves_the_metrics_of_its_pod", a_shim_serves_metrics),
    podhull("operations::the_log_of_a_guest", the_log_of_a_guest),
    podhull("operations::logs_say_whom_they_are_about", logs_say_whom_they_are_about),
    podhull("operations::a_shell_in_the_guest_where_it_is_enabled", a_shell_in_the_guest),
];

fn pods(scene: &Scene, more: &[&str]) -> Outcome<Vec<Value>> {
    let words = [&["pods", "--format", "json"], more].concat();
    Ok(serde_json::from_str(&scene.call(&words)?.output()?)?)
}

/// How many processors this host has: what can be used of them in some time is so much more.
fn processors() -> Outcome<f64> {
    Ok(u32::try_from(std::thread::available_parallelism()?.get())?.into())
}

fn pods_are_listed(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    ensure_eq!(pods(scene, &[])?.len(), 0, "pods before there are any");
    let bundle = scene.debian()?.sh("echo ready; exec sleep 1000");
    let bundle = bundle.set("/annotations/io.kubernetes.cri.sandbox-name", "web".into());
    let bundle = bundle.set("/annotations/io.kubernetes.cri.sandbox-namespace", "shop".into());
    let began = Instant::now();
    let first = Container::make(scene, &bundle, &["run", "-d"])?;
    let up = Instant::now();
    let member = in_the_pod_of(scene.debian()?.sh("echo ready; exec sleep 1000"), &first);
    let member = Container::make(scene, &member, &["run", "-d"])?;
    let least = up.elapsed().as_secs_f64();
    let [pod] = &pods(scene, &[])?[..] else { return Err("not one pod".into()) };
    ensure_eq!(
        (&pod["id"], &pod["namespace"], &pod["name"]),
        (&first.id.clone().into(), &"shop".into(), &"web".into()),
        "names in {pod}"
    );
    ensure_eq!(pod["containers"], 2, "containers of {pod}");
    let number = |key: &str| pod[key].as_f64().ok_or_else(|| format!("no {key} in {pod}"));
    let mebibytes = |key: &str| Outcome::Ok(number(key)? / f64::from(1 << 20));
    // Two containers without limits.
    ensure!(number("cpus")? >= 1.0 && mebibytes("memory")? >= 2048.0, "size of {pod}");
    let (used, pss) = (mebibytes("memoryUsed")?, mebibytes("pss")?);
    ensure!((5.0..1000.0).contains(&used) && (20.0..1000.0).contains(&pss), "memory in use of {pod}");
    let (uptime, most) = (number("uptime")?, began.elapsed().as_secs_f64());
    // Its clock has ticks of a hundredth.
    ensure!(uptime > least - 0.02 && uptime < most + 0.02, "{least} to {most} s of {pod}");
    let cpu = number("cpuPercent")?;
    ensure!(cpu > 0.0 && cpu < 105.0 * processors()?, "time of {pod}");
    // By its name, and as a table; and what is not there is named.
    ensure_eq!(pods(scene, &["shop/web"])?.len(), 1, "pods of that name");
    let table = scene.call(&["pods", &first.id])?.output()?;
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    ensure!(
        lines.len() == 2 && lines[0][0] == "POD" && lines[1][..3] == [&*first.id, "shop/web", "2"],
        "table {table}"
    );
    let missing = scene.call(&["pods", "nobody"])?.expect_status(1)?;
    ensure!(missing.stderr.contains("pod \"nobody\" is not running"), "stderr {:?}", missing.stderr);
    // Again and again, until it is ended.
    let watch = ["pods", "--watch", "--interval", "1", "--format", "json"].map(Into::into);
    let words = [&[scene.runtime.program().into()], &watch[..]].concat();
    let mut watching = Running::start(&words, &[])?;
    for look in 0..3 {
        let line = watching.line()?;
        let seen: Vec<Value> = serde_json::from_str(&line)?;
        ensure!(seen.len() == 1 && seen[0]["id"] == pod["id"], "look {look}: {line}");
    }
    watching.signal(Signal::INT)?;
    ensure_eq!(watching.wait()?.signal, Some(Signal::INT.as_raw()), "what ended it");
    a_table_is_redrawn(scene, &first.id)?;
    member.end()?;
    ensure_eq!(pods(scene, &[])?[0]["containers"], 1, "containers when one is gone");
    first.end()?;
    ensure_eq!(pods(scene, &[])?.len(), 0, "pods in the end");
    before.check()
}

/// On a terminal the table is drawn over the one before.
fn a_table_is_redrawn(scene: &Scene, id: &str) -> Outcome {
    let tmux = crate::terminal::Tmux::start(&scene.directory, 160, 20)?;
    let program = scene.runtime.program().display();
    tmux.type_line(&format!("clear; {program} pods --watch --interval 1 {id}"))?;
    let (mut uptimes, until) = (Vec::new(), Instant::now() + DEADLINE);
    while uptimes.len() < 3 {
        let screen = tmux.screen()?;
        let lines: Vec<Vec<&str>> = screen.lines().map(|line| line.split_whitespace().collect()).collect();
        // Else it has just been cleared.
        if let [head, row] = &lines[..]
            && head.first() == Some(&"POD")
            && row.get(..3) == Some(&[id, "shop/web", "2"])
        {
            let at = head.iter().position(|word| *word == "UPTIME").ok_or("no column for the uptime")?;
            // With a unit, what memory comes to is two words.
            let uptime = row.get(at + 1).copied().unwrap_or_default().to_owned();
            if uptimes.last() != Some(&uptime) {
                uptimes.push(uptime);
            }
        }
        ensure!(Instant::now() < until, "after {uptimes:?} on the screen: {screen}");
        std::thread::sleep(Duration::from_millis(100));
    }
    tmux.key("C-c")?;
    tmux.expect("host> ")
}

/// Seconds of the wall clock.
fn since_the_epoch() -> Outcome<f64> {
    Ok(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64())
}

fn metrics_move(scene: &Scene) -> Outcome {
    let disk = Loop::new(scene)?;
    let before = Leaks::watch();
    let shared = scene.make_directory("shared")?;
    std::fs::write(shared.join("from-host"), vec![b'x'; 3 << 20])?;
    let (began, clock) = (Instant::now(), since_the_epoch()?);
    let bundle = disk.give(scene.debian()?, "/dev/xvdz", "rwm").bind(&shared, "/mnt", &["rbind", "rw"]);
    let bundle = bundle.sh("echo ready; exec sleep 1000");
    let container = Container::make(scene, &bundle, &["run", "-d"])?;
    let made = began.elapsed().as_secs_f64();
    let scrape = || Metrics::read(&scene.call(&["metrics", &container.id])?.output()?);
    let pod = labels_of(&container.id, "/run/podhull");
    let own = format!("{pod},container=\"{}\"", container.id);
    let began = Instant::now();
    let idle = scrape()?;
    let started = idle.of("podhull_pod_start_time_seconds", &pod)?;
    // Clocks of processes have ticks of a hundredth.
    ensure!((clock - 0.1..clock + made + 0.1).contains(&started), "started at {started}, asked at {clock}");
    // Half a second of a processor, 32 MiB of memory, a megabyte through an interface, a mebibyte to a disk, two to a file of the
    // host, and three from one.
    let load = "
import os, sys, time, socket
kept = bytearray(b'x') * (32 << 20)
until = time.process_time() + 0.5
while time.process_time() < until: pass
out, into = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
into.bind(('127.0.0.1', 0))
for _ in range(100):
    out.sendto(b'x' * 10000, into.getsockname())
    into.recv(20000)
disk = open('/dev/xvdz', 'r+b', buffering=0)
disk.write(bytes(1 << 20))
os.fsync(disk.fileno())
with open('/mnt/from-guest', 'wb', buffering=0) as file: file.write(bytes(2 << 20))
with open('/mnt/from-host', 'rb') as file: file.read()
print('done', flush=True)
sys.stdin.read()
";
    let mut running = crate::run::Running::start(
        &[
            scene.runtime.program().into(),
            "exec".into(),
            container.id.clone().into(),
            "python3".into(),
            "-c".into(),
            load.into(),
        ],
        &[],
    )?;
    running.expect_line("done")?;
    let loaded = scrape()?;
    // Nothing can have used more than there was.
    let most = began.elapsed().as_secs_f64() * processors()?;
    let grown = |name: &str, labels: &str| Outcome::Ok(loaded.of(name, labels)? - idle.of(name, labels)?);
    let cpu = grown("podhull_container_cpu_usage_seconds_total", &own)?;
    ensure!((0.5..most).contains(&cpu), "the container used {cpu} s of a processor, of {most}");
    let guest = grown("podhull_guest_cpu_seconds_total", &format!("{pod},mode=\"user\""))?;
    ensure!((0.4..most).contains(&guest), "the guest used {guest} s of a processor, of {most}");
    let vmm = format!("{pod},process=\"vmm\"");
    let host = grown("podhull_process_cpu_seconds_total", &vmm)?;
    ensure!((0.4..most).contains(&host), "the machine used {host} s of a processor, of {most}");
    for name in ["podhull_container_memory_usage_bytes", "podhull_container_memory_working_set_bytes"] {
        let memory = grown(name, &own)? / f64::from(1 << 20);
        ensure!((32.0..100.0).contains(&memory), "{name} has grown by {memory} MiB");
    }
    let memory = grown("podhull_process_proportional_memory_bytes", &vmm)? / f64::from(1 << 20);
    ensure!((25.0..200.0).contains(&memory), "the machine has grown by {memory} MiB");
    let free = grown("podhull_guest_memory_available_bytes", &pod)? / f64::from(1 << 20);
    ensure!((-200.0..-25.0).contains(&free), "memory that is available has grown by {free} MiB");
    let sent = grown("podhull_guest_network_transmit_bytes_total", &format!("{pod},interface=\"lo\""))?;
    ensure!((1e6..1.2e6).contains(&sent), "{sent} bytes were sent");
    let written = loaded.of_all("podhull_guest_disk_written_bytes_total", &pod)
        - idle.of_all("podhull_guest_disk_written_bytes_total", &pod);
    ensure_eq!(written, f64::from(1 << 20), "bytes that were written to a disk");
    // Programs were read, too.
    let read = grown("podhull_share_read_bytes_total", &pod)? / f64::from(1 << 20);
    ensure!((3.0..200.0).contains(&read), "{read} MiB were read from files");
    let written = grown("podhull_share_written_bytes_total", &pod)? / f64::from(1 << 20);
    ensure!((2.0..3.0).contains(&written), "{written} MiB were written to files");
    for (kind, least, most) in [("read", 3.0, 1e5), ("write", 2.0, 1e3), ("other", 3.0, 1e6)] {
        let requests = grown("podhull_share_requests_total", &format!("{pod},kind=\"{kind}\""))?;
        ensure!((least..most).contains(&requests), "{requests} requests to {kind}");
    }
    ensure_eq!(
        grown("podhull_agent_request_duration_seconds_count", &format!("{pod},method=\"PodStats\""))?,
        1.0,
        "looks"
    );
    ensure_eq!(
        loaded.of("podhull_agent_request_duration_seconds_count", &format!("{pod},method=\"ExecProcess\""))?,
        1.0,
        "calls"
    );

    let exits = loaded.of("podhull_vm_exits_total", &format!("{pod},reason=\"port_write\""))?;
    ensure!((10.0..1e6).contains(&exits), "{exits} writes of ports");
    for (name, least) in
        [("podhull_process_open_fds", 5.0), ("podhull_process_threads", 3.0), ("podhull_processes", 1.0)]
    {
        let found = loaded.of(name, &vmm)?;
        ensure!((least..1000.0).contains(&found), "{name} is {found}");
    }
    // The container's, and that of what was executed in it.
    ensure_eq!(loaded.of("podhull_processes", &format!("{pod},process=\"shadow\""))?, 2.0, "shadows");
    for phase in ["launch", "prepare", "machine", "boot", "hooks", "create", "grow", "start"] {
        let labels = format!("{pod},phase=\"{phase}\"");
        ensure_eq!(loaded.of("podhull_start_phase_duration_seconds_count", &labels)?, 1.0, "starts");
    }
    let boot = loaded.of("podhull_start_phase_duration_seconds_sum", &format!("{pod},phase=\"boot\""))?;
    ensure!(boot > made / 100.0 && boot < made, "the guest took {boot} s to boot, of {made} until it ran");
    running.wait()?.expect_status(0)?;
    container.end()?;
    ensure_eq!(scene.call(&["metrics"])?.output()?, "", "metrics when there is no pod");
    before.check()
}

/// What a container may use, and what became of one that wanted more.
fn metrics_tell_of_limits(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let bundle = scene.debian()?.set("/linux/resources/memory", json!({ "limit": 96 << 20 }));
    let bundle = bundle.set("/annotations/io.kubernetes.cri.sandbox-name", "web".into());
    let bundle = bundle.set("/annotations/io.kubernetes.cri.sandbox-namespace", "shop".into());
    let container = Container::make(scene, &bundle.sh("echo ready; exec sleep 1000"), &["run", "-d"])?;
    container.expect_output("ready")?;
    let id = &*container.id;
    let scrape = || Metrics::read(&scene.call(&["metrics", id])?.output()?);
    let pod = labels_of(id, "/run/podhull");
    let own = format!("{pod},container=\"{id}\"");
    let (killed, throttled) = ("podhull_container_oom_kills_total", "podhull_container_cpu_throttled_seconds_total");
    let idle = scrape()?;
    ensure_eq!(idle.of("podhull_pod_info", &format!("{pod},namespace=\"shop\",name=\"web\""))?, 1.0, "names");
    let cpus: f64 = scene.call(&["exec", id, "nproc"])?.output()?.trim().parse()?;
    ensure_eq!(idle.of("podhull_vm_cpus", &pod)?, cpus, "processors");
    let limit = idle.of("podhull_container_memory_limit_bytes", &own)?;
    ensure_eq!(limit, f64::from(96 << 20), "limit of its memory");
    ensure_eq!((idle.of(killed, &own)?, idle.of(throttled, &own)?), (0.0, 0.0), "before it wants more");
    // One is killed for lack of memory, and one waits for four fifths of two seconds.
    scene.call(&["exec", id, "tail", "/dev/zero"])?.expect_status(137)?;
    scene.call(&["update", "--cpu-quota", "20000", "--cpu-period", "100000", id])?.output()?;
    let began = Instant::now();
    scene.call(&["exec", id, "timeout", "2", "sh", "-c", "while :; do :; done"])?.expect_status(124)?;
    let (loaded, most) = (scrape()?, began.elapsed().as_secs_f64() * cpus);
    ensure_eq!(loaded.of(killed, &own)?, 1.0, "what was killed for lack of memory");
    let waited = loaded.of(throttled, &own)?;
    ensure!((0.2..most).contains(&waited), "it was kept waiting for {waited} s, of {most}");
    container.end()?;
    before.check()
}

/// Complete events of a track, in order: name, beginning and length in microseconds.
fn track(trace: &Value, name: &str) -> Outcome<Vec<(String, f64, f64)>> {
    let events = trace["traceEvents"].as_array().ok_or("no events")?;
    let named = events.iter().find(|event| event["name"] == "thread_name" && event["args"]["name"] == name);
    let (pid, tid) =
        named.map(|event| (&event["pid"], &event["tid"])).ok_or_else(|| format!("no track {name}: {trace}"))?;
    let mut found = Vec::new();
    for event in events {
        match event["ph"].as_str() {
            Some("M") => ensure!(event["args"]["name"].is_string(), "{event}"),
            Some("X") => {
                let (at, length) = (event["ts"].as_f64(), event["dur"].as_f64());
                let (Some(at), Some(length)) = (at, length) else { return Err(format!("no times in {event}").into()) };
                ensure!(at >= 0.0 && length >= 0.0 && event["pid"].is_u64() && event["tid"].is_u64(), "{event}");
                if (&event["pid"], &event["tid"]) == (pid, tid) {
                    found.push((event["name"].as_str().ok_or("no name")?.to_owned(), at, length));
                }
            }
            _ => return Err(format!("event {event}").into()),
        }
    }
    Ok(found)
}

fn a_start_is_traced(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let path = scene.directory.join("trace.json");
    // Of which it is known how long it takes at least, beside the boot, however long all does.
    let hook = json!([{ "path": "/bin/sleep", "args": ["sleep", "1"] }]);
    let bundle = scene.debian()?.set("/hooks/createRuntime", hook).sh("echo ready");
    bundle.write()?;
    let mut words = scene.runtime.run_words(&bundle.directory, &scene.id());
    words.splice(2..2, ["--trace".into(), path.clone().into()]);
    let began = Instant::now();
    crate::run::Running::start(&words, &[])?.wait()?.output()?;
    let all = began.elapsed().as_secs_f64() * 1e6;
    let trace: Value = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
    ensure_eq!(trace["displayTimeUnit"], "ms", "unit");
    let phases = track(&trace, "start")?;
    let names: Vec<_> = phases.iter().map(|(name, ..)| name.as_str()).collect();
    ensure_eq!(names, ["launch", "prepare", "machine", "boot", "hooks", "create", "grow", "wait", "start"], "phases");
    let mut end = 0.0;
    for (name, at, length) in &phases {
        ensure!((0.0..1.0).contains(&(at - end).abs()), "{name} begins at {at}, and what is before it ends at {end}");
        end = at + length;
    }
    let hooks = phases.iter().find(|(name, ..)| name == "hooks").map_or(0.0, |(_, at, length)| at + length);
    ensure!(hooks >= 1e6 && end < all, "a hook of a second ends after {hooks} of {end} of {all} microseconds");
    // What the guest does is where it is waited for.
    let (_, boots, booting) = phases.iter().find(|(name, ..)| name == "boot").cloned().ok_or("no boot")?;
    let kernel = track(&trace, "kernel")?;
    ensure!(
        kernel.len() == 1 && kernel[0].1 >= boots && kernel[0].2 > booting / 4.0,
        "kernel {kernel:?} in {phases:?}"
    );
    let agent = track(&trace, "agent")?;
    ensure!(agent.len() == 2 && agent[0].1 >= kernel[0].1 + kernel[0].2 - 1.0 && agent[0].2 > 0.0, "agent {agent:?}");
    let container = track(&trace, "container")?;
    let (_, creates, creating) = phases.iter().find(|(name, ..)| name == "create").cloned().ok_or("no create")?;
    let made = &container[0];
    ensure!(made.2 > 0.0 && made.1 + made.2 <= creates + creating + 1.0, "container {container:?} in {phases:?}");

    // Of one that was created and started by others, and of another in its pod.
    let first = Container::create(scene, &scene.debian()?.sh("echo ready; exec sleep 1000"))?;
    first.start()?;
    let trace: Value = serde_json::from_str(&first.call(&["trace", &first.id])?.output()?)?;
    ensure_eq!(track(&trace, "start")?.len(), 9, "phases of {trace}");
    let bundle = in_the_pod_of(scene.debian()?.sh("exec sleep 1000"), &first);
    let member = Container::make(scene, &bundle, &["run", "-d"])?;
    let trace: Value = serde_json::from_str(&first.call(&["trace", &member.id])?.output()?)?;
    let names: Vec<_> = track(&trace, "start")?.into_iter().map(|(name, ..)| name).collect();
    ensure_eq!(names, ["launch", "prepare", "hooks", "create", "wait", "start"], "phases of a member");
    ensure_eq!(trace["otherData"]["pod"], first.id, "pod of a member");
    member.end()?;
    first.end()?;
    before.check()
}

/// Asks over HTTP; returns the head and the body.
pub fn get(path: &Path) -> Outcome<(String, String)> {
    answer(ask(path)?)
}

fn ask(path: &Path) -> Outcome<UnixStream> {
    let directory = std::fs::File::open(path.parent().ok_or("no directory")?)?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&directory);
    let mut stream = UnixStream::connect(format!("/proc/self/fd/{fd}/metrics.sock"))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: pod\r\n\r\n")?;
    Ok(stream)
}

fn answer(mut stream: UnixStream) -> Outcome<(String, String)> {
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(|| format!("answer {text:?}"))?;
    Ok((head.to_owned(), body.to_owned()))
}

fn a_shim_serves_metrics(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let containerd = Containerd::start(scene, Shim::Podhull)?;
    let began = Instant::now();
    containerd.run(&["-d"], "web", &["sh", "-c", "trap exit TERM; while :; do sleep 0.1; done"])?.output()?;
    let root = "/run/containerd/podhull/default";
    let own = labels_of("web", root);
    let socket = Path::new(root).join("pods/web/metrics.sock");
    let metadata = std::fs::metadata(&socket)?;
    let directory = std::fs::metadata(socket.parent().ok_or("no directory")?)?;
    ensure_eq!((metadata.uid(), directory.mode() & 0o077), (0, 0), "owner of the socket, and who else gets there");
    let (head, body) = get(&socket)?;
    ensure!(
        head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("\r\nContent-Type: text/plain; version=0.0.4"),
        "{head}"
    );
    let metrics = Metrics::read(&body)?;
    ensure_eq!(metrics.of("podhull_guest_up", &own)?, 1.0, "guests");
    for process in ["vmm", "shadow", "shim"] {
        let labels = format!("{own},process=\"{process}\"");
        let memory = metrics.of("podhull_process_proportional_memory_bytes", &labels)?;
        ensure!((1e5..1e9).contains(&memory), "{memory} bytes of memory of {process}");
    }
    let time = metrics.of("podhull_container_cpu_usage_seconds_total", &format!("{own},container=\"web\""))?;
    let most = began.elapsed().as_secs_f64() * processors()?;
    ensure!((0.001..most).contains(&time), "{time} s of a processor, of {most}");
    let starts = format!("{own},phase=\"start\"");
    ensure_eq!(metrics.of("podhull_start_phase_duration_seconds_count", &starts)?, 1.0, "starts");
    // How long it took to answer, and not how long somebody waits for the end.
    let (boot, create) = ("podhull_start_phase_duration_seconds_sum", "podhull_shim_request_duration_seconds_sum");
    let least = metrics.of(boot, &format!("{own},phase=\"boot\""))?;
    let (took, most) = (metrics.of(create, &format!("{own},method=\"Create\""))?, began.elapsed().as_secs_f64());
    ensure!((least..most).contains(&took), "the answer to Create took {took} s, of {least} to {most}");
    for method in ["Create", "Start"] {
        let labels = format!("{own},method=\"{method}\"");
        ensure_eq!(metrics.of("podhull_shim_request_duration_seconds_count", &labels)?, 1.0, "{method}");
    }
    ensure!(!body.contains("method=\"Wait"), "calls that wait are counted: {body}");
    // The commands see it too.
    ensure_eq!(pods(scene, &[])?[0]["root"], root, "root of the pod");
    let again = Metrics::read(&scene.call(&["metrics"])?.output()?)?;
    ensure_eq!(again.of("podhull_pod_containers", &own)?, 1.0, "containers");
    a_client_that_is_not_let_in(&socket)?;
    ids_are_those_of_a_root(scene, root)?;
    containerd.call(&["task", "delete", "--force", "web"])?.output()?;
    containerd.call(&["container", "delete", "web"])?.output()?;
    ensure!(!socket.exists(), "{} is still there", socket.display());
    containerd.end()?;
    containerd::check(&before)
}

/// A client for whom the shim has no descriptor is let in when it has one again.
fn a_client_that_is_not_let_in(socket: &Path) -> Outcome {
    let shim = processes::all().into_iter().find(processes::Process::is_shim).ok_or("no shim")?.pid;
    // How often its threads have gone to sleep, and whether all of them do.
    let rest = || -> Outcome<(u64, bool)> {
        let (mut turns, mut asleep) = (0, true);
        for thread in std::fs::read_dir(format!("/proc/{shim}/task"))? {
            // One that has ended meanwhile does nothing.
            let status = std::fs::read_to_string(thread?.path().join("status")).unwrap_or_default();
            let value = |name| status.lines().find_map(|line| line.strip_prefix(name)).map_or("", str::trim);
            turns += value("voluntary_ctxt_switches:").parse().unwrap_or(0);
            asleep &= status.is_empty() || value("State:").starts_with('S');
        }
        Ok((turns, asleep))
    };
    let waiting = || -> Outcome<bool> {
        let sockets = Running::start(&["ss", "-Hxl"].map(Into::into), &[])?.wait()?.output()?;
        let own = sockets.lines().find(|line| line.contains("/metrics.sock")).ok_or("nobody listens")?;
        Ok(own.split_whitespace().nth(2) == Some("1"))
    };
    let limit = |limit| prlimit(Pid::from_raw(shim), Resource::Nofile, limit);
    let before = limit(Rlimit { current: Some(0), maximum: Some(0) })?;
    let ((idle, _), client) = (rest()?, ask(socket)?);
    // It has woken up for the client, sleeps again, and the client still waits in the kernel: it could not be taken from there.
    let (mut last, until) = ((0, false), Instant::now() + DEADLINE);
    loop {
        let look = rest()?;
        if look == last && look.0 > idle && look.1 && waiting()? {
            break;
        }
        ensure!(Instant::now() < until, "the shim does not wake up, or takes the client: {idle}, {look:?}");
        last = look;
        std::thread::sleep(Duration::from_millis(20));
    }
    limit(before)?;
    let (head, _) = answer(client)?;
    ensure!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    Ok(())
}

/// A pod of the command line may have the id of a shim's: they are told apart, and neither is taken for the other.
fn ids_are_those_of_a_root(scene: &Scene, root: &str) -> Outcome {
    let bundle = scene.debian()?.sh("exec sleep 1000");
    bundle.write()?;
    // Its output is not this command's.
    let script = format!(
        "exec {} run -d -b {} web >/dev/null 2>&1",
        scene.runtime.program().display(),
        bundle.directory.display()
    );
    Running::start(&["sh", "-c", &script].map(Into::into), &[])?.wait()?.output()?;
    let metrics = Metrics::read(&scene.call(&["metrics"])?.output()?)?;
    for root in [root, "/run/podhull"] {
        ensure_eq!(metrics.of("podhull_guest_up", &labels_of("web", root))?, 1.0, "guests under {root}");
    }
    ensure_eq!(pods(scene, &["web"])?.len(), 2, "pods of that id");
    let host = Configuration::new()?;
    host.write("config.toml", "[debug]\nshell = \"/bin/busybox\"\n")?;
    for words in [&["logs", "--guest", "web"][..], &["debug", "web"]] {
        let refused = scene.call(words)?;
        let both = format!("\"web\" is more than one pod: web under /run/podhull, web under {root}");
        ensure!(refused.status != 0 && refused.stderr.contains(&both), "{words:?}: {:?}", refused.stderr);
    }
    let log = scene.call(&["--root", root, "logs", "--guest", "web"])?.output()?;
    ensure!(log.contains("Linux version 6."), "the log of one of them: {log}");
    scene.call(&["delete", "--force", "web"])?.output().map(drop)
}

fn the_log_of_a_guest(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    // What a hostile container writes into it, if it can, does nothing to a terminal.
    let hostile = "printf '\\033[2Jevil\\n\\233x\\n' >/dev/kmsg; echo ready; exec sleep 1000";
    let device = json!({ "path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11 });
    let bundle = scene.debian()?.privileged().push("/linux/devices", device).sh(hostile);
    let container = Container::make(scene, &bundle, &["run", "-d"])?;
    container.expect_output("ready")?;
    let text = container.call(&["logs", "--guest", &container.id])?.output()?;
    let id = &container.id;
    for expected in ["Linux version 6.", "podhull-agent: version ", &format!("podhull-agent: container {id}: started")]
    {
        ensure!(text.contains(expected), "no {expected:?} in {text}");
    }
    ensure!(text.contains("evil"), "what the container has said is missing: {text}");
    ensure!(text.chars().all(|c| c == '\n' || !c.is_control()), "control characters in {text:?}");
    let json = container.call(&["logs", "--guest", "--format", "json", "--bytes", "2000", id])?.output()?;
    let lines = json.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
    ensure!(
        !lines.is_empty() && json.len() < text.len() * 3 && !json.contains("Linux version"),
        "the last lines: {json}"
    );
    let started = lines.iter().find(|line| line["msg"].as_str().is_some_and(|text| text.ends_with(": started")));
    let started = started.ok_or_else(|| format!("no start in {json}"))?;
    ensure_eq!((&started["pod"], &started["container"]), (&Value::from(&**id), &Value::from(&**id)), "ids");
    ensure!(started["uptime"].as_f64().is_some() && started["level"] == "info", "{started}");
    container.end()?;
    let gone = scene.call(&["logs", "--guest", id])?.expect_status(1)?;
    ensure!(gone.stderr.contains("is not running"), "stderr {:?}", gone.stderr);
    // Of one that is gone, what is kept.
    let kept = scene.make_directory("kept")?;
    let host = Configuration::new()?;
    host.write("config.toml", &format!("[machine]\nguest_console = {kept:?}\n"))?;
    let container = Container::make(scene, &scene.debian()?.sh("true"), &["run", "-d"])?;
    container.wait()?;
    container.delete()?;
    let text = scene.call(&["logs", "--guest", &container.id])?.output()?;
    ensure!(text.contains("Linux version 6."), "the log of a guest that is gone: {text}");
    let text = scene.call(&["logs", "--guest", "--bytes", "300", &container.id])?.output()?;
    ensure!(text.len() <= 300 && !text.contains("Linux version"), "the end of it: {text}");
    before.check()
}

fn logs_say_whom_they_are_about(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let log = scene.directory.join("log.json");
    let log = log.to_string_lossy();
    let first = Container::make(
        scene,
        &scene.debian()?.sh("exec sleep 1000"),
        &["--debug", "--log", &log, "--log-format", "json", "run", "-d"],
    )?;
    let bundle = in_the_pod_of(scene.debian()?.sh("exec sleep 1000"), &first);
    let member = Container::make(scene, &bundle, &["--debug", "--log", &log, "--log-format", "json", "run", "-d"])?;
    let text = std::fs::read_to_string(&*log)?;
    let lines = text.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
    for container in [&first, &member] {
        let of = lines.iter().find(|line| {
            line["container"] == container.id
                && line["msg"].as_str().is_some_and(|text| text.contains("container created"))
        });
        let line = of.ok_or_else(|| format!("no line about {} in {text}", container.id))?;
        ensure_eq!(line["pod"], first.id, "pod of {line}");
    }
    ensure!(lines.iter().all(|line| line["container"].is_string()), "a line about nobody in {text}");
    member.end()?;
    first.end()?;
    before.check()
}

fn a_shell_in_the_guest(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let make = || Container::make(scene, &scene.debian()?.sh("echo ready; exec sleep 4321"), &["run", "-d"]);
    let without = make()?;
    let off = without.call(&["debug", &without.id])?.expect_status(255)?;
    ensure!(off.stderr.contains("debug: it is off: name a static program as debug.shell"), "stderr {:?}", off.stderr);
    let host = Configuration::new()?;
    host.write("config.toml", "[debug]\nshell = \"/bin/busybox\"\n")?;
    // The agent itself refuses.
    let refused = without.call(&["debug", &without.id])?.expect_status(255)?;
    ensure!(refused.stderr.contains("the pod was not started with debug.shell"), "stderr {:?}", refused.stderr);
    without.end()?;
    let pod = make()?;
    pod.expect_output("ready")?;
    let debug = |script: &str| pod.call(&["debug", &pod.id, "-c", script]);
    let look = "cat /proc/1/comm; ps | grep -c '[s]leep 4321'; [ $(readlink /proc/self/ns/mnt) = $(readlink /proc/1/ns/mnt) ] && echo same; \
        id -u; grep CapEff /proc/self/status; cat /proc/self/cgroup; pwd";
    let seen = debug(look)?.output()?;
    let expected = "podhull-agent\n1\nsame\n0\nCapEff:\t000001ffffffffff\n0::/\n/\n";
    ensure_eq!(seen, expected, "what the shell sees");
    ensure_eq!(debug("exit 7")?.status, 7, "its status");
    let killed = debug("kill -TERM $$")?;
    ensure_eq!(killed.status, 143, "status of one that was killed");
    {
        let tmux = crate::terminal::Tmux::start(&scene.directory, 90, 20)?;
        let program = scene.runtime.program().display().to_string();
        tmux.type_line(&format!("clear; {program} debug {}; echo status $?", pod.id))?;
        tmux.expect("guest# ")?;
        tmux.type_line("stty size; exit 5")?;
        tmux.expect("\n20 90\n")?;
        tmux.expect("\nstatus 5\n")?;
    }
    // It is logged, and one that still runs goes with the pod.
    let log = pod.call(&["logs", "--guest", &pod.id])?.output()?;
    ensure!(log.contains("podhull-agent: the host's administrator executes busybox in the guest"), "log {log}");
    let words = [
        scene.runtime.program().into(),
        "debug".into(),
        pod.id.clone().into(),
        "-c".into(),
        "echo in; exec sleep 1000".into(),
    ];
    let mut running = crate::run::Running::start(&words, &[])?;
    running.expect_line("in")?;
    pod.end()?;
    ensure!(running.wait()?.status != 0, "it has ended well");
    before.check()
}
