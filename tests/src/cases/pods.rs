//! Containers that are in one another's namespaces, and so in one pod.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use serde_json::{Value, json};

use super::{oci, podhull};
use crate::bundle::Bundle;
use crate::container::Container;
use crate::leaks::Leaks;
use crate::run::{DEADLINE, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq, processes};

pub const CASES: &[Case] = &[
    oci("pods::network_ipc_and_host_name_are_shared_and_the_rest_is_not", network_ipc_and_host_name_are_shared),
    oci("pods::processes_are_shared", processes_are_shared),
    oci("pods::a_member_in_the_foreground", a_member_in_the_foreground),
    oci("pods::files_of_a_member", files_of_a_member),
    podhull("pods::containers_come_and_go_in_one_machine", containers_come_and_go_in_one_machine),
    podhull("pods::a_bind_is_mounted_once_and_goes_with_its_last_user", a_bind_is_mounted_once),
    podhull("pods::a_pod_ends_with_its_first_container", a_pod_ends_with_its_first_container),
    podhull("pods::a_killed_shadow_takes_its_container_along", a_killed_shadow_takes_its_container_along),
    podhull("pods::what_cannot_be_joined_is_named", what_cannot_be_joined_is_named),
];

/// A bundle whose container is in the namespaces of another: the type in the specification, and its file.
fn in_those_of(bundle: Bundle, other: &Container, shared: &[(&str, &str)]) -> Bundle {
    let pid = other.pid.as_raw_nonzero();
    let namespaces: Vec<Value> = ["mount", "pid", "network", "ipc", "uts", "cgroup"]
        .iter()
        .map(|kind| match shared.iter().find(|(name, _)| name == kind) {
            Some((_, file)) => json!({ "type": kind, "path": format!("/proc/{pid}/ns/{file}") }),
            None => json!({ "type": kind }),
        })
        .collect();
    let mut bundle = bundle.set("/linux/namespaces", Value::from(namespaces));
    if let Some(config) = bundle.config.as_object_mut() {
        config.remove("hostname");
    }
    bundle
}

const POD: &[(&str, &str)] = &[("network", "net"), ("ipc", "ipc"), ("uts", "uts")];

/// A bundle whose container shares what containers of a pod share.
pub fn in_the_pod_of(bundle: Bundle, other: &Container) -> Bundle {
    in_those_of(bundle, other, POD)
}

fn first<'a>(scene: &'a Scene, script: &str) -> Outcome<Container<'a>> {
    let container = Container::make(scene, &scene.debian()?.sh(script), &["run", "-d"])?;
    container.expect_output("ready")?;
    Ok(container)
}

fn end(container: &Container) -> Outcome {
    container.call(&["kill", &container.id, "KILL"])?.output()?;
    ensure_eq!(container.wait()?, 137, "exit status of {}", container.id);
    container.delete()
}

/// Machines on this host.
fn machines() -> usize {
    processes::all().iter().filter(|process| process.command.starts_with("podhull vmm")).count()
}

fn network_ipc_and_host_name_are_shared(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let serve = "import http.server, sys; \
        s = http.server.HTTPServer(('127.0.0.1', 8080), http.server.SimpleHTTPRequestHandler); \
        print('ready', flush=True); s.serve_forever()";
    let bundle = scene.debian()?.set("/hostname", json!("pod-host")).python(serve);
    let pod = Container::make(scene, &bundle, &["run", "-d"])?;
    pod.expect_output("ready")?;
    scene.call(&["exec", &pod.id, "ipcmk", "-M", "4096"])?.output()?;
    let look = "import urllib.request, subprocess, os; \
        print(urllib.request.urlopen('http://127.0.0.1:8080/', timeout=30).status); \
        print(os.uname().nodename); \
        print(len([l for l in subprocess.run(['ipcs', '-m'], capture_output=True, text=True).stdout.splitlines() if l.startswith('0x')])); \
        print(os.getpid(), open('/proc/1/cmdline').read().startswith('python3')); \
        print('ready', flush=True); import time; time.sleep(1000)";
    let member = Container::make(scene, &in_those_of(scene.debian()?.python(look), &pod, POD), &["run", "-d"])?;
    member.expect_output("ready")?;
    ensure_eq!(member.output()?, "200\npod-host\n1\n1 True\nready\n", "what the member sees");
    // A third, of its own network but of the second's ipc namespace, which is the first's.
    let third = in_those_of(
        scene.debian()?.sh("ipcs -m | grep -c ^0x; hostname | wc -l; wget -q -O- http://127.0.0.1:8080/ || echo alone"),
        &member,
        &[("ipc", "ipc")],
    );
    let ended = scene.run(&third)?;
    ensure_eq!(ended.stdout, "1\n1\nalone\n", "what the third sees: {:?}", ended.stderr);
    if scene.runtime.is_virtual() {
        ensure_eq!(machines(), 1, "machines");
    }
    end(&member)?;
    end(&pod)?;
    before.check()
}

fn processes_are_shared(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let pod = first(scene, "sleep 4321 & echo ready; wait")?;
    let script = "pgrep -f '^sleep 4321' >/dev/null && echo seen; echo ready; exec sleep 1000";
    let shared = [POD, &[("pid", "pid")]].concat();
    let member = Container::make(scene, &in_those_of(scene.debian()?.sh(script), &pod, &shared), &["run", "-d"])?;
    member.expect_output("ready")?;
    ensure_eq!(member.output()?, "seen\nready\n", "what the member sees");
    let seen = scene.call(&["exec", &member.id, "pgrep", "-f", "^sleep 4321"])?.output()?;
    ensure_eq!(seen.lines().count(), 1, "what is executed in it sees {seen:?}");
    // The first process of the namespace ends all of it.
    pod.call(&["kill", &pod.id, "KILL"])?.output()?;
    ensure_eq!(member.wait()?, 137, "exit status of the member");
    ensure_eq!(pod.wait()?, 137, "exit status of the first");
    member.delete()?;
    pod.delete()?;
    before.check()
}

fn a_member_in_the_foreground(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let pod = first(scene, "echo ready; exec sleep 1000")?;
    for _ in 0..scene.repeat.min(20) {
        let bundle = in_those_of(scene.debian()?.sh("cat; echo err >&2; exit 42"), &pod, POD);
        let mut run = scene.start(&bundle)?;
        run.send(b"through\n")?;
        let ended = run.wait()?.expect_status(42)?;
        ensure_eq!((&*ended.stdout, &*ended.stderr), ("through\n", "err\n"), "output");
    }
    let ended = scene.run(&in_those_of(scene.debian()?.args(&["/no/such/program"]), &pod, POD))?;
    ensure!(ended.status != 0 && ended.stderr.contains("/no/such/program"), "{} {:?}", ended.status, ended.stderr);
    ensure_eq!(pod.status()?, "running", "status of the first");
    end(&pod)?;
    before.check()
}

fn files_of_a_member(scene: &Scene) -> Outcome {
    let pod = first(scene, "echo ready; exec sleep 1000")?;
    let volume = scene.make_directory("volume")?;
    fs::write(volume.join("file"), "from the host\n")?;
    let script =
        "cat /volume/file; echo back > /volume/answer; echo x > /fixed/file || echo read-only; echo root > /new";
    let bundle =
        scene.busybox()?.writable().bind(&volume, "/volume", &["rbind"]).bind(&volume, "/fixed", &["bind", "ro"]);
    let root = bundle.directory.join("rootfs");
    let ended = scene.run(&in_those_of(bundle.sh(script), &pod, POD))?;
    ensure_eq!(ended.stdout, "from the host\nread-only\n", "what it read: {:?}", ended.stderr);
    ensure_eq!(fs::read_to_string(volume.join("answer"))?, "back\n", "what it wrote");
    ensure_eq!(fs::read_to_string(root.join("new"))?, "root\n", "what it wrote in its root");
    end(&pod)
}

/// Mounts in the machine of the pod of a container.
fn mounts_of_the_machine(pod: &Container) -> Outcome<usize> {
    Ok(mountinfo_of_the_machine(pod)?.lines().count())
}

/// Whether the binds in it can be written, one after the other.
fn writable_binds_of_the_machine(pod: &Container) -> Outcome<Vec<bool>> {
    let mounts = mountinfo_of_the_machine(pod)?;
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let binds = fields.filter(|fields| fields.get(4).is_some_and(|point| point.starts_with("/@")));
    Ok(binds.map(|fields| fields.get(5).is_some_and(|options| options.starts_with("rw"))).collect())
}

fn mountinfo_of_the_machine(pod: &Container) -> Outcome<String> {
    Ok(fs::read_to_string(machine_of(pod)?.join("mountinfo"))?)
}

/// Files that the process of the machine has open: each that the guest knows is one.
fn files_of_the_machine(pod: &Container) -> Outcome<usize> {
    Ok(fs::read_dir(machine_of(pod)?.join("fd"))?.count())
}

/// The process of the machine of a container's pod.
fn machine_of(pod: &Container) -> Outcome<PathBuf> {
    let state = format!("/run/podhull/{}/state.json", pod.id);
    let state: Value = serde_json::from_slice(&fs::read(state)?)?;
    Ok(Path::new("/proc").join(state["machine"]["pid"].to_string()))
}

fn containers_come_and_go_in_one_machine(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let pod = first(scene, "echo ready; exec sleep 1000")?;
    let mounts = mounts_of_the_machine(&pod)?;
    let volume = scene.make_directory("volume")?;
    for _ in 0..scene.repeat.min(20) {
        let bundle = scene.debian()?.bind(&volume, "/mnt", &["rbind"]).sh("echo ready; exec sleep 1000");
        let bundle = in_those_of(bundle, &pod, POD);
        let members =
            [Container::make(scene, &bundle, &["run", "-d"])?, Container::make(scene, &bundle, &["run", "-d"])?];
        for member in &members {
            member.expect_output("ready")?;
        }
        ensure_eq!(machines(), 1, "machines");
        // A root for each, and the volume for both.
        ensure_eq!(mounts_of_the_machine(&pod)?, mounts + 3, "mounts while there are members");
        for member in &members {
            end(member)?;
        }
        ensure_eq!(mounts_of_the_machine(&pod)?, mounts, "mounts afterwards");
    }
    // One that was never started, and one that runs.
    let bundle = in_those_of(scene.debian()?.sh("exec sleep 1000"), &pod, POD);
    let created = Container::create(scene, &bundle)?;
    created.delete()?;
    let running = Container::make(scene, &bundle, &["run", "-d"])?;
    running.call(&["delete", "--force", &running.id])?.output()?;
    ensure_eq!((created.wait()?, running.wait()?), (137, 137), "exit statuses");
    ensure_eq!(mounts_of_the_machine(&pod)?, mounts, "mounts at last");
    let alive = scene.call(&["exec", &pod.id, "echo", "alive"])?.output()?;
    ensure_eq!(alive, "alive\n", "the first");
    end(&pod)?;
    before.check()
}

fn a_bind_is_mounted_once(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let volume = scene.make_directory("volume")?;
    let pod = first(scene, "echo ready; exec sleep 1000")?;
    let without = mounts_of_the_machine(&pod)?;
    let member = |options: &[&str], script: &str| -> Outcome<Container<'_>> {
        let bundle = scene.debian()?.bind(&volume, "/mnt", options).bind(&volume, "/srv", &["rbind", "ro"]);
        let made = Container::make(scene, &in_those_of(bundle.sh(script), &pod, POD), &["run", "-d"])?;
        made.expect_output("ready")?;
        Ok(made)
    };
    let stays = "echo ready; exec sleep 1000";
    let inside = |member: &Container, script: &str| scene.call(&["exec", &member.id, "sh", "-c", script]);
    // Root and volume. As long as all only read, the host does not let anybody write.
    let reader = member(&["bind", "ro"], stays)?;
    ensure_eq!(mounts_of_the_machine(&pod)?, without + 2, "mounts with one");
    ensure_eq!(writable_binds_of_the_machine(&pod)?, [false], "whether the one that reads could write");
    for turn in 0..20 {
        // Every second one is killed, and deleted by another.
        let writer = member(&["rbind"], &format!("echo {turn} >/mnt/file; {stays}"))?;
        ensure_eq!(mounts_of_the_machine(&pod)?, without + 3, "mounts with both");
        ensure_eq!(writable_binds_of_the_machine(&pod)?, [true], "whether the one that writes can");
        ensure_eq!(inside(&reader, "cat /mnt/file /srv/file")?.output()?, format!("{turn}\n{turn}\n"), "what is read");
        ensure!(inside(&reader, "touch /mnt/file")?.status != 0, "the one that may only read writes");
        ensure!(inside(&writer, "touch /srv/file")?.status != 0, "the other writes where it may not");
        match turn % 2 {
            0 => end(&writer)?,
            _ => {
                kill_process(writer.pid, Signal::KILL)?;
                writer.wait()?;
                writer.delete()?;
            }
        }
        ensure_eq!(mounts_of_the_machine(&pod)?, without + 2, "mounts with one again");
    }
    end(&reader)?;
    ensure_eq!(mounts_of_the_machine(&pod)?, without, "mounts at last");
    let files = files_of_the_machine(&pod)?;
    for _ in 0..scene.repeat.clamp(5, 20) {
        end(&member(&["rbind"], stays)?)?;
        ensure_eq!(mounts_of_the_machine(&pod)?, without, "mounts without any");
    }
    // What the guest's kernel still knows is of the last one at most: it has let go of the volume.
    let began = Instant::now();
    while files_of_the_machine(&pod)? > files {
        ensure!(began.elapsed() < DEADLINE, "the machine has {} files open, of {files}", files_of_the_machine(&pod)?);
        std::thread::sleep(Duration::from_millis(50));
    }
    end(&pod)?;
    before.check()
}

fn a_pod_ends_with_its_first_container(scene: &Scene) -> Outcome {
    for signal in [Signal::TERM, Signal::KILL] {
        let before = Leaks::watch();
        let pod = first(scene, "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done")?;
        let script = "echo ready; exec sleep 1000";
        let member = Container::make(scene, &in_those_of(scene.debian()?.sh(script), &pod, POD), &["run", "-d"])?;
        member.expect_output("ready")?;
        let began = Instant::now();
        // The second is the shadow's own end.
        kill_process(pod.pid, signal)?;
        ensure_eq!(pod.wait()?, if signal == Signal::TERM { 3 } else { 137 }, "exit status of the first");
        ensure_eq!(member.wait()?, 137, "exit status of the member");
        ensure!(began.elapsed() < DEADLINE / 2, "it took {:?}", began.elapsed());
        ensure_eq!(member.status()?, "stopped", "status of the member");
        // In the order in which nobody deletes them.
        pod.delete()?;
        member.delete()?;
        before.check()?;
    }
    Ok(())
}

fn a_killed_shadow_takes_its_container_along(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let pod = first(scene, "echo ready; exec sleep 1000")?;
    let mounts = mounts_of_the_machine(&pod)?;
    let shared = [POD, &[("pid", "pid")]].concat();
    let gone = |pattern: &str| -> Outcome {
        let began = Instant::now();
        while scene.call(&["exec", &pod.id, "pgrep", "-f", pattern])?.status == 0 {
            ensure!(began.elapsed() < DEADLINE, "{pattern} lives");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    };
    for _ in 0..scene.repeat.min(20) {
        let member = in_those_of(scene.debian()?.sh("echo ready; exec sleep 7654"), &pod, &shared);
        let member = Container::make(scene, &member, &["run", "-d"])?;
        member.expect_output("ready")?;
        kill_process(member.pid, Signal::KILL)?;
        ensure_eq!(member.wait()?, 137, "exit status");
        gone("^sleep 7654")?;
        ensure_eq!(member.status()?, "stopped", "status");
        member.delete()?;
        ensure_eq!(mounts_of_the_machine(&pod)?, mounts, "mounts afterwards");

        let words = ["exec", &pod.id, "sh", "-c", "echo ready; exec sleep 8765"].map(Into::into);
        let words: Vec<_> = std::iter::once(scene.runtime.program().into()).chain(words).collect();
        let mut executed = Running::start(&words, &[])?;
        executed.expect_line("ready")?;
        let stands = processes::descendants(executed.pid()).first().and_then(|process| Pid::from_raw(process.pid));
        executed.signal(Signal::KILL)?;
        executed.wait()?.expect_status(137)?;
        gone("^sleep 8765")?;
        // It is ours now, and in the pid namespace of the pod's first, which does not end before all in it were reaped.
        waitpid(Some(stands.ok_or("nothing stood for the program")?), WaitOptions::empty())?;
    }
    end(&pod)?;
    before.check()
}

fn what_cannot_be_joined_is_named(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let (one, two) = (first(scene, "echo ready; exec sleep 1000")?, first(scene, "echo ready; exec sleep 1000")?);
    let path = |container: &Container, file: &str| format!("/proc/{}/ns/{file}", container.pid.as_raw_nonzero());
    for (namespaces, what) in [
        (
            json!([{ "type": "network", "path": path(&one, "net") }, { "type": "ipc", "path": path(&two, "ipc") }]),
            "another",
        ),
        (json!([{ "type": "network", "path": path(&one, "uts") }]), "is no network namespace"),
        (json!([{ "type": "network", "path": "/no/such" }]), "/no/such"),
        (json!([{ "type": "network", "path": "/proc/1/ns/net" }]), "host's network"),
        (json!([{ "type": "network" }, { "type": "ipc", "path": "/proc/1/ns/ipc" }]), "of no podhull container"),
        (
            json!([{ "type": "network" }, { "type": "cgroup", "path": path(&one, "cgroup") }]),
            "cgroup namespace cannot be joined",
        ),
    ] {
        let mut bundle = scene.debian()?.sh("echo never").set("/linux/namespaces", namespaces);
        for kind in ["mount", "pid"] {
            bundle = bundle.push("/linux/namespaces", json!({ "type": kind }));
        }
        if let Some(config) = bundle.config.as_object_mut() {
            config.remove("hostname");
        }
        let ended = scene.run(&bundle)?.expect_status(1)?;
        ensure!(ended.stderr.contains(what) && ended.stdout.is_empty(), "no {what:?} in {:?}", ended.stderr);
        ensure_eq!(ended.stderr.lines().count(), 1, "lines of {:?}", ended.stderr);
    }
    end(&one)?;
    end(&two)?;
    before.check()
}
