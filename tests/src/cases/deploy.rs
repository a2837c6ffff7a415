//! podhull on a node of Kubernetes: put there, told to containerd, and taken away.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use k8s_cri::v1 as api;

use super::{long, oci, podhull};
use crate::containerd::{Containerd, Shim, check};
use crate::cri::{Cri, container, resources, security};
use crate::image;
use crate::leaks::Leaks;
use crate::run::{Ended, Running};
use crate::suite::{Case, Scene};
use crate::terminal::shell_line;
use crate::{Outcome, ensure, ensure_eq, processes};

pub const CASES: &[Case] = &[
    podhull("deploy::containerd_is_told", containerd_is_told),
    podhull("deploy::pods_keep_a_version", pods_keep_a_version),
    podhull("deploy::a_version_that_cannot_run_is_nobody_s", a_version_that_cannot_run_is_nobodys),
    podhull("deploy::the_image_installs", the_image_installs),
    oci("deploy::the_overhead_is_enough", |scene| overhead(scene, &[("small", &[64]), ("three", &[128, 64, 64])])),
    long(oci("deploy::the_overhead_of_a_large_pod", |scene| overhead(scene, &[("large", &[1024, 512])]))),
    long(oci("deploy::a_pod_that_takes_all_of_its_machine", takes_all)),
    oci("deploy::the_overhead_is_enough_for_an_idle_pod", overhead_of_an_idle_pod),
    // With the others that need systemd.
    podhull("systemd::containerd_of_a_node_is_restarted", containerd_of_a_node_is_restarted),
];

/// Where nodes have it.
const DIRECTORY: &str = "/opt/podhull";
const SHIM: &str = "/opt/podhull/current/bin/containerd-shim-podhull-v2";

/// The files of an administrator: containerd reads both, and has the table of its plugin from the second alone or from both, by
/// its version.
const CONFIG: &str = "version = 2\nimports = [\"conf.d/*.toml\"]\n";
const IMPORTED: &str = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nmax_container_log_line_size = 12345\n\
    [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.other]\nruntime_type = \"io.containerd.runc.v2\"";

fn run(words: &[&str]) -> Outcome<Ended> {
    Running::start(&words.iter().map(Into::into).collect::<Vec<_>>(), &[])?.wait()
}

/// `podhull node`, changing files alone.
fn node(scene: &Scene, words: &[&str]) -> Outcome<Ended> {
    scene.call(&[&["node"], words, &["--offline"]].concat())
}

/// containerd itself, whichever is installed, understands what was written, and goes by the administrator's settings too.
fn containerd_is_told(scene: &Scene) -> Outcome {
    let tree = scene.make_directory("node")?;
    for directory in ["etc/containerd/conf.d", "proc"] {
        fs::create_dir_all(tree.join(directory))?;
    }
    let (config, imported) = (tree.join("etc/containerd/config.toml"), tree.join("etc/containerd/conf.d/cri.toml"));
    // Absolute, since containerd does not look for relative patterns beside the file.
    let first = CONFIG.replace("conf.d", &tree.join("etc/containerd/conf.d").to_string_lossy());
    fs::write(&config, &first)?;
    fs::write(&imported, IMPORTED)?;
    let config_words = config.to_string_lossy().into_owned();
    let seen = || run(&["containerd", "--config", &config_words, "config", "dump"])?.output();
    let without = seen()?;
    ensure!(!without.contains("runtimes.kata]") && without.contains("12345"), "before: {without}");

    let words = ["install", "--config", &config_words, "--handler", "kata", "--handler", "podhull"];
    let said = node(scene, &words)?.output()?;
    ensure!(said.contains("cri.toml is changed"), "installing: {said}");
    let with = seen()?;
    for expected in
        ["containerd.runtimes.kata]", "containerd.runtimes.podhull]", "containerd.runtimes.other]", "12345", SHIM]
    {
        ensure!(with.contains(expected), "no {expected} in {with}");
    }
    ensure_eq!(node(scene, &words)?.output()?.lines().count(), 1, "what is changed the second time");
    node(scene, &["uninstall", "--config", &config_words])?.output()?;
    ensure_eq!((fs::read_to_string(&config)?, &*fs::read_to_string(&imported)?), (first, IMPORTED), "files afterwards");
    let after = seen()?;
    ensure!(!after.contains("runtimes.kata]") && after.contains("12345"), "afterwards: {after}");
    ensure!(!Path::new(DIRECTORY).exists(), "{DIRECTORY} is still there");
    Ok(())
}

/// A pod is one of the version that it began with, and as long as it runs that is not taken away.
fn pods_keep_a_version(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let config = scene.directory.join("config.toml").to_string_lossy().into_owned();
    node(scene, &["install", "--config", &config])?.output()?;
    let containerd = Containerd::start(scene, Shim::Podhull)?;
    let words = ["run", "-d", "--runtime", SHIM, image::WHOLE_NAME, "kept", "sleep", "1000"];
    containerd.call(&words)?.output()?;
    let kernel = ["task", "exec", "--exec-id", "kernel", "kept", "uname", "-r"];
    ensure!(containerd.call(&kernel)?.output()?.contains("podhull"), "kernel of the container");

    let refused = node(scene, &["uninstall", "--config", &config])?.expect_status(1)?;
    ensure!(refused.stderr.contains("processes of podhull run on this node"), "refusal {:?}", refused.stderr);
    ensure!(Path::new(SHIM).exists() && Path::new(&config).exists(), "something is gone");
    containerd.call(&["task", "kill", "-s", "SIGKILL", "kept"])?.output()?;
    super::containerd::stopped(&containerd, "kept")?;
    containerd.call(&["task", "delete", "kept"])?;
    containerd.call(&["container", "delete", "kept"])?.output()?;
    containerd.end()?;

    node(scene, &["uninstall", "--config", &config])?.output()?;
    ensure!(!Path::new(DIRECTORY).exists() && !Path::new(&config).exists(), "something is left");
    check(&before)
}

/// A version with which pods cannot run is not that of new pods, which have the one from before.
fn a_version_that_cannot_run_is_nobodys(scene: &Scene) -> Outcome {
    let config = scene.directory.join("config.toml").to_string_lossy().into_owned();
    node(scene, &["install", "--config", &config])?.output()?;
    let current = || fs::read_link(Path::new(DIRECTORY).join("current"));
    let (before, text) = (current()?, fs::read_to_string(&config)?);
    // Another one by a byte at the end of its image.
    let library = scene.make_directory("library")?;
    for file in ["vmlinux", "guest.img"] {
        fs::copy(Path::new("/usr/lib/podhull").join(file), library.join(file))?;
    }
    fs::OpenOptions::new().append(true).open(library.join("guest.img"))?.write_all(b"x")?;
    let script = format!(
        "busybox mount --bind /dev/null /dev/kvm && PODHULL_LIBDIR={} exec {} node install --config {config} --handler another",
        library.display(),
        scene.runtime.program().display(),
    );
    let refused = run(&["unshare", "--mount", "sh", "-c", &script])?.expect_status(1)?;
    let versions = Path::new(DIRECTORY).join("versions");
    ensure!(
        refused.stderr.contains("check failed on the node: ") && refused.stderr.contains("/dev/kvm"),
        "refusal {:?}",
        refused.stderr
    );
    ensure_eq!(fs::read_dir(&versions)?.count(), 2, "versions");
    ensure_eq!(current()?, before, "the version of new pods");
    ensure_eq!(fs::read_to_string(&config)?, text, "what containerd is told");
    node(scene, &["uninstall", "--config", &config])?.output()?;
    ensure!(!Path::new(DIRECTORY).exists(), "{DIRECTORY} is still there");
    Ok(())
}

/// The image of the installer, as a container that has a node's files in a directory.
fn the_image_installs(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let page = include_str!("../../../docs/kubernetes.md");
    let build = page.lines().find(|line| line.starts_with("buildah build ")).ok_or("no buildah on the page")?;
    let name = build.split(' ').find(|word| word.starts_with("podhull-node:")).ok_or("no image on the page")?;
    // What the page is typed in: the repository, after `make install`.
    let (repository, tree) = (scene.make_directory("repository")?, scene.make_directory("node")?);
    let context = repository.join("target/node");
    for (directory, files) in [("usr/bin", &["podhull"][..]), ("usr/lib/podhull", &["vmlinux", "guest.img"])] {
        fs::create_dir_all(context.join(directory))?;
        for file in files {
            fs::copy(Path::new("/").join(directory).join(file), context.join(directory).join(file))?;
        }
    }
    fs::create_dir(repository.join("deploy"))?;
    fs::write(repository.join("deploy/Containerfile"), include_str!("../../../deploy/Containerfile"))?;
    fs::create_dir(tree.join("proc"))?;
    let storage = scene.make_directory("buildah")?;
    let path = |name: &str| storage.join(name).to_string_lossy().into_owned();
    let (root, runroot) = (path("root"), path("run"));
    let own = [&["buildah", "--root", &root, "--runroot", &runroot][..], image::DRIVER].concat();
    let call = |words: &[&str]| run(&[&own[..], words].concat())?.output();
    let words = shell_line(&own.iter().map(Into::into).collect::<Vec<_>>());
    let typed = build.replacen("buildah", &words, 1);
    run(&["sh", "-c", &format!("cd {} && {typed}", repository.display())])?.output()?;
    call(&["from", "--pull-never", "--name", "work", &format!("localhost/{name}")])?;
    let volume = format!("{}:/host", tree.display());
    let installer = |words: &[&str]| {
        let container = ["run", "--isolation", "oci", "--runtime", "runc", "--network", "none", "-v", &volume, "work"];
        call(&[&container[..], &["/usr/bin/podhull", "node"], words, &["--at", "/host", "--offline"]].concat())
    };
    installer(&["install", "--handler", "kata"])?;
    let installed = tree.join("opt/podhull/current");
    for file in ["bin/podhull", "lib/podhull/vmlinux", "lib/podhull/guest.img"] {
        let (there, here) = (fs::read(installed.join(file))?, fs::read(Path::new("/usr").join(file))?);
        ensure!(there == here, "{file} is another");
    }
    ensure!(installed.join("bin/containerd-shim-kata-v2").exists(), "no shim");
    let config = fs::read_to_string(tree.join("etc/containerd/config.toml"))?;
    ensure!(config.contains("runtimes.kata]") && !config.contains("runtimes.podhull]"), "configuration {config}");
    installer(&["uninstall"])?;
    ensure!(
        !tree.join("opt/podhull").exists() && !tree.join("etc/containerd/config.toml").exists(),
        "something is left"
    );
    call(&["rm", "work"])?;
    before.check()
}

/// An installer that has the node's files in a directory reaches the node's own service, and restarts it only where its
/// configuration has changed; what runs goes on.
fn containerd_of_a_node_is_restarted(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let path = |name: &str| scene.directory.join(name).display().to_string();
    let (config, socket, host) = (path("config.toml"), path("socket"), path("host"));
    let disabled =
        ["btrfs", "zfs", "devmapper", "blockfile"].map(|name| format!("io.containerd.snapshotter.v1.{name}"));
    let disabled =
        [&disabled[..], &["io.containerd.grpc.v1.cri", "io.containerd.nri.v1.nri"].map(str::to_owned)].concat();
    let original = format!(
        "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = {disabled:?}\n[grpc]\naddress = {socket:?}\n",
        path("root"),
        path("state"),
    );
    fs::write(&config, &original)?;
    fs::create_dir(&host)?;
    // As Debian's, without what it comes after, and as often as it is started here.
    let unit = Path::new("/run/systemd/system/containerd.service");
    let service = format!(
        "[Unit]\nDefaultDependencies=no\nStartLimitIntervalSec=0\n[Service]\nType=notify\nExecStart=/usr/bin/containerd --config {config}\n\
         ExecStartPre=/bin/sh -c '! grep -q runtimes.broken {config}'\nKillMode=process\nDelegate=yes\n"
    );
    fs::write(unit, service)?;
    run(&["systemctl", "daemon-reload"])?.output()?;
    run(&["systemctl", "start", "containerd"])?.output()?;
    let daemon = || super::systemd::property("containerd.service", "MainPID");
    let ctr = |words: &[&str]| run(&[&["ctr", "--address", &socket], words].concat());
    let program = scene.runtime.program().display().to_string();
    let installer = |words: &str| {
        // Busybox's leaves nothing in /run.
        let script =
            format!("busybox mount -o rbind / {host} && exec {program} node {words} --at {host} --config {config}");
        run(&["unshare", "--mount", "sh", "-c", &script])
    };

    let first = daemon()?;
    let said = installer("install --handler kata")?.output()?;
    ensure!(said.contains("containerd is restarted"), "installing: {said}");
    let second = daemon()?;
    ensure!(second != first, "it is still {first}");
    let archive = image::busybox(scene)?;
    ctr(&["image", "import", &archive.to_string_lossy()])?.output()?;
    ctr(&["run", "-d", "--runtime", SHIM, image::WHOLE_NAME, "kept", "sleep", "1000"])?.output()?;
    let said = installer("install --handler kata")?.output()?;
    ensure!(!said.contains("restarted") && daemon()? == second, "the second time: {said}");
    let refused = installer("uninstall")?.expect_status(1)?;
    ensure!(refused.stderr.contains("processes of podhull"), "refusal {:?}", refused.stderr);

    // With this it does not start: it has what it had before.
    let had = fs::read_to_string(&config)?;
    let refused = installer("install --handler kata --handler broken")?.expect_status(1)?;
    ensure!(
        refused.stderr.contains("systemctl restart containerd failed on the node: ")
            && !refused.stderr.contains("once more"),
        "refusal {:?}",
        refused.stderr
    );
    ensure_eq!(fs::read_to_string(&config)?, had, "configuration after a failure");
    ctr(&["version"])?.output()?;
    let second = daemon()?;
    let said = installer("install --handler kata")?.output()?;
    ensure!(!said.contains("restarted") && daemon()? == second, "after a failure: {said}");

    let said = installer("install --handler kata --handler other")?.output()?;
    ensure!(said.contains("containerd is restarted") && daemon()? != second, "another name: {said}");
    let kernel = ["task", "exec", "--exec-id", "kernel", "kept", "uname", "-r"];
    ensure!(ctr(&kernel)?.output()?.contains("podhull"), "kernel of the container");
    ctr(&["task", "delete", "--force", "kept"])?;
    ctr(&["container", "delete", "kept"])?.output()?;
    let said = installer("uninstall")?.output()?;
    ensure!(said.contains("containerd is restarted"), "uninstalling: {said}");
    ensure_eq!(fs::read_to_string(&config)?, original, "configuration afterwards");
    ensure!(!Path::new(DIRECTORY).exists(), "{DIRECTORY} is still there");
    run(&["systemctl", "stop", "containerd"])?.output()?;
    fs::remove_file(unit)?;
    run(&["systemctl", "daemon-reload"])?.output()?;
    check(&before)
}

/// A number of what the runtime classes say that a pod needs beside its containers.
fn overhead_of_classes(key: &str, unit: &str) -> Outcome<i64> {
    let values = include_str!("../../../deploy/chart/values.yaml");
    let overhead = values.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_suffix(unit));
    Ok(overhead.ok_or_else(|| format!("no {key}of the overhead among the chart's values"))?.parse()?)
}

/// What kubelet says of a pod whose containers have limits of so many MiB together, and its group with the limit that kubelet gives it.
fn limited_pod(cri: &Cri, name: &str, all: i64) -> Outcome<(api::PodSandboxConfig, PathBuf)> {
    let overhead = overhead_of_classes("memory: ", "Mi")?;
    let mut config = cri.pod_config(name)?;
    let group = Path::new("/sys/fs/cgroup/kubepods").join(format!("pod-{name}"));
    for above in ["/sys/fs/cgroup", "/sys/fs/cgroup/kubepods"] {
        fs::write(Path::new(above).join("cgroup.subtree_control"), "+memory")?;
    }
    fs::write(group.join("memory.max"), ((all + overhead) << 20).to_string())?;
    let bytes =
        |mebibytes: i64| api::LinuxContainerResources { memory_limit_in_bytes: mebibytes << 20, ..Default::default() };
    let linux = config.linux.get_or_insert_default();
    (linux.resources, linux.overhead) = (Some(bytes(all)), Some(bytes(overhead)));
    Ok((config, group))
}

/// A container that takes its limits away, and then all the memory of its machine, is killed there: the group of its pod was never
/// full.
fn takes_all(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let (mut config, group) = limited_pod(&cri, "greedy", 1024)?;
    config.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
    let pod = cri.run(config)?;
    // The limits of what is above it in the machine are not its own to change.
    let script = "echo max >/sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/memory.max && tail /dev/zero";
    let mut config = container("main", &["sh", "-c", script]);
    resources(&mut config).memory_limit_in_bytes = 1024 << 20;
    security(&mut config).privileged = true;
    let id = cri.launch(&pod, config)?;
    let ended = cri.ended(&id)?;
    ensure_eq!(ended.exit_code, 137, "status of what takes all memory, which says {:?}", cri.log(&pod, "main"));
    // In the group of the container somebody is killed, for who looks there.
    let events = fs::read_to_string(group.join("memory.events.local"))?;
    ensure!(events.contains("oom 0\n"), "{events}");
    ensure_eq!(cri.pod_status(&pod)?.state(), api::PodSandboxState::SandboxReady, "state of its pod");
    let peak: i64 = fs::read_to_string(group.join("memory.peak"))?.trim().parse()?;
    ensure!(peak > 1024 << 20, "at most {peak} bytes were in its group");
    eprintln!("greedy: at most {} MiB in a group of {} MiB", peak >> 20, 1024 + overhead_of_classes("memory: ", "Mi")?);
    cri.remove_pod(&pod)?;
    cri.end()
}

/// Pods in the group that kubelet makes for them, limited to what their containers may have and the overhead of the runtime class,
/// whose containers use all of theirs: nothing is killed for it.
fn overhead(scene: &Scene, pods: &[(&str, &[i64])]) -> Outcome {
    let overhead = overhead_of_classes("memory: ", "Mi")?;
    let cri = Cri::start(scene)?;
    for (name, limits) in pods {
        let all = limits.iter().sum::<i64>();
        let (config, group) = limited_pod(&cri, name, all)?;
        let pod = cri.run(config)?;
        let mut ids = Vec::new();
        for (index, limit) in limits.iter().enumerate() {
            let mut config = container(&format!("c{index}"), &["sleep", "1000"]);
            resources(&mut config).memory_limit_in_bytes = limit << 20;
            ids.push(cri.launch(&pod, config)?);
        }
        for (id, limit) in ids.iter().zip(*limits) {
            // Files, which the guest keeps in what is left, and the host in the same group; and memory that stays.
            cri.shell(id, "dd if=/dev/zero of=/file bs=1M count=100 2>/dev/null; cat /file >/dev/null")?;
            let held = limit - 16;
            let bytes = held << 20;
            let hold = format!("({{ head -c {bytes} /dev/zero; sleep 1000; }} | tail -c {bytes}) >/dev/null 2>&1 &");
            cri.shell(id, &hold)?;
            let anonymous = "awk '$1 == \"anon\" { print int($2 / 1048576) }' /sys/fs/cgroup/memory.stat";
            let alive = "grep -q 'oom_kill 0' /sys/fs/cgroup/memory.events";
            let held = cri.exec(
                id,
                &["sh", "-c", &format!("until [ $({anonymous}) -ge {held} ]; do sleep 0.2; {alive} || exit 1; done")],
                170,
            )?;
            let seen = || cri.shell(id, "cat /sys/fs/cgroup/memory.stat /sys/fs/cgroup/memory.events");
            ensure_eq!(held.status, 0, "holding memory: {held:?}, {:?}", seen());
        }
        let read = |file: &str| fs::read_to_string(group.join(file));
        let events = read("memory.events")?;
        ensure!(events.contains("oom_kill 0\n"), "{name}: {events}");
        let stat = read("memory.stat")?;
        let value =
            |name: &str| stat.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<i64>().ok()).unwrap_or(0);
        let stays: i64 = ["anon ", "kernel ", "shmem "].into_iter().map(value).sum();
        ensure!(stays < (all + overhead) << 20, "{name}: {stays} bytes stay of {all} MiB and {overhead} MiB");
        ensure!(stays > (all - 24 * limits.len() as i64) << 20, "{name}: only {stays} bytes are held");
        // Less than the page says of any size; there is more for what containers leave of their limits.
        let beside = 64 + 18 * all / 1024 + 4 * (limits.len() as i64 - 1);
        ensure!(stays <= (all + beside) << 20, "{name}: {stays} bytes stay of {all} MiB, and {beside} MiB beside");
        eprintln!("{name}: limits of {all} MiB, {} MiB beside that stay", (stays >> 20) - all);
        cri.remove_pod(&pod)?;
    }
    cri.end()
}

/// How long an idle pod is watched, and how often kubelet asks for its statistics, which is in that.
const IDLE: [Duration; 2] = [Duration::from_secs(20), Duration::from_secs(10)];

/// A pod whose containers do nothing takes no more of the node's processors, its shim with it, than the runtime class says of a pod.
fn overhead_of_an_idle_pod(scene: &Scene) -> Outcome {
    let millis = u128::try_from(overhead_of_classes("cpu: ", "m")?)?;
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("idle")?)?;
    for index in 0..3 {
        cri.launch(&pod, container(&format!("c{index}"), &["sleep", "1000"]))?;
    }
    let shims: Vec<_> = processes::all().into_iter().filter(processes::Process::is_shim).collect();
    let [shim] = &shims[..] else { return Err(format!("shims: {shims:?}").into()) };
    let ask = || {
        let request = api::PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
        cri.call(async |mut client| client.pod_sandbox_stats(request).await)
    };
    // What it costs once is over.
    ask()?;
    let used = || Outcome::Ok(group_used("/sys/fs/cgroup/kubepods/pod-idle")? + run_time(shim.pid)?);
    let (began, before) = (Instant::now(), used()?);
    while began.elapsed() < IDLE[0] {
        thread::sleep(IDLE[1]);
        ask()?;
    }
    let (used, time) = (used()?.saturating_sub(before), began.elapsed());
    let rate = used.as_micros() * 1000 / time.as_micros();
    eprintln!("an idle pod takes {rate}m of a processor");
    ensure!(rate < millis, "an idle pod takes {rate}m of a processor, of {millis}m: {used:?} in {time:?}");
    cri.remove_pod(&pod)?;
    cri.end()
}

/// The time of processors that a group has used.
fn group_used(group: &str) -> Outcome<Duration> {
    let stat = fs::read_to_string(Path::new(group).join("cpu.stat"))?;
    let used = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok());
    Ok(Duration::from_micros(used.ok_or_else(|| format!("no usage in {stat:?}"))?))
}

/// The time of processors that a process has used, in user mode and in the kernel (proc(5), `stat`).
fn run_time(pid: i32) -> Outcome<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(") ").ok_or("no name in stat")?;
    let ticks = fields.split(' ').skip(11).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>()?;
    // There are a hundred in a second.
    Ok(Duration::from_millis(ticks * 10))
}
