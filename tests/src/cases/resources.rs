//! Limits of resources, read from inside: the container's own cgroup says what it used.

use serde_json::{Value, json};

use super::{long, oci, podhull};
use crate::bundle::Bundle;
use crate::run::DEADLINE;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("resources::limits_are_in_the_cgroup", limits_are_in_the_cgroup),
    podhull("resources::a_program_finds_its_machine_whole", a_program_finds_its_machine_whole),
    oci("resources::cgroup_path_nests", cgroup_path_nests),
    oci("resources::too_much_memory_is_killed", too_much_memory_is_killed),
    podhull("resources::the_run_says_out_of_memory", the_run_says_out_of_memory),
    oci("resources::devices_are_denied_and_allowed", devices_are_denied_and_allowed),
    oci("resources::a_fork_bomb_is_contained", a_fork_bomb_is_contained),
    oci("resources::a_processor_quota_holds", a_processor_quota_holds),
    long(oci("resources::a_parent_s_quota_binds_its_children", a_parent_s_quota_binds_its_children)),
];

/// Prints what the container's cgroup used in ten seconds, and how long these were: both in microseconds. A shell, because all of
/// this has only the tenth of a processor that is measured.
const MEASURE: &str = "
look() { read name used </sys/fs/cgroup/cpu.stat; read up rest </proc/uptime; echo $used ${up}0000; }
look; sleep 10; look
kill $WORKERS
";

/// What sizes a heap or a thread pool looks once, at its start.
fn a_program_finds_its_machine_whole(scene: &Scene) -> Outcome {
    let processors = std::thread::available_parallelism()?;
    for (limit, least) in [(None, 1900), (Some(1024), 1024), (Some(64), 64)] {
        let mut bundle = scene.debian()?.sh("read name kib rest </proc/meminfo; echo $((kib / 1024)) $(nproc)");
        if let Some(limit) = limit {
            bundle = bundle.set("/linux/resources/memory", json!({ "limit": limit << 20 }));
        }
        let found = scene.run(&bundle)?.output()?;
        let (memory, cpus) = found.trim().split_once(' ').ok_or("one word only")?;
        let memory: u64 = memory.parse()?;
        ensure!(memory >= least, "{memory} MiB of memory with a limit of {limit:?} MiB");
        ensure_eq!(cpus, processors.to_string(), "processors");
    }
    Ok(())
}

fn limits_are_in_the_cgroup(scene: &Scene) -> Outcome {
    let bundle = scene
        .debian()?
        .set(
            "/linux/resources/cpu",
            json!({ "shares": 2048, "quota": 25_000, "period": 50_000, "cpus": "0", "mems": "0" }),
        )
        .set("/linux/resources/memory", json!({ "limit": 100 << 20, "reservation": 50 << 20, "swap": 100 << 20 }))
        .set("/linux/resources/pids", json!({ "limit": 33 }))
        .set("/linux/resources/hugepageLimits", json!([{ "pageSize": "2MB", "limit": 4 << 20 }]))
        .set("/linux/resources/unified", json!({ "memory.high": "90000000", "cgroup.max.depth": "7" }))
        .sh("cd /sys/fs/cgroup; for f in cpu.max cpu.weight cpuset.cpus cpuset.mems memory.max memory.low pids.max \
             hugetlb.2MB.max memory.high cgroup.max.depth; do echo $f $(cat $f); done");
    let found = scene.run(&bundle)?.output()?;
    // Shares 2 to 262144 become weights 1 to 10000: in a straight line up to runc 1.2 (1 + (2048 - 2) * 9999 / 262142), then on
    // a curve through 1024 and 100. A memory limit is in whole pages.
    let weight = if found.contains("cpu.weight 79\n") { 79 } else { 174 };
    let expected = format!(
        "cpu.max 25000 50000\ncpu.weight {weight}\ncpuset.cpus 0\ncpuset.mems 0\nmemory.max 104857600\n\
                    memory.low 52428800\npids.max 33\nhugetlb.2MB.max 4194304\nmemory.high 89997312\ncgroup.max.depth 7\n"
    );
    ensure_eq!(found, expected, "files of the cgroup");
    Ok(())
}

fn cgroup_path_nests(scene: &Scene) -> Outcome {
    let outer = scene.id();
    let bundle = scene
        .debian()?
        .set("/linux/cgroupsPath", json!(format!("/{outer}/middle/inner")))
        .namespaces(&["pid", "mount", "network", "ipc", "uts"])
        .sh("cat /proc/self/cgroup");
    let ended = scene.run(&bundle)?;
    // Only the last is removed: others may be about to use those on the way.
    for path in [format!("/sys/fs/cgroup/{outer}/middle"), format!("/sys/fs/cgroup/{outer}")] {
        std::fs::remove_dir(path)?;
    }
    let found = ended.output()?;
    ensure!(found.trim().ends_with(&format!("/{outer}/middle/inner")), "cgroup {found:?}");
    Ok(())
}

/// 128 MiB in a container of 64 MiB.
const ALLOCATE: &str = "data = bytearray(128 << 20); print('survived', len(data))";

fn too_much_memory_is_killed(scene: &Scene) -> Outcome {
    let limit = json!({ "limit": 64 << 20, "swap": 64 << 20 });
    let bundle = scene.debian()?.set("/linux/resources/memory", limit.clone());
    let ended = scene.run(&bundle.python(ALLOCATE))?.expect_status(137)?;
    ensure_eq!(ended.stdout, "", "stdout");
    // Enough is enough: what fits is not killed, and a child that is killed does not take its parent with it.
    let bundle = scene.debian()?.set("/linux/resources/memory", limit);
    let script = format!(
        "python3 -c 'data = bytearray(30 << 20); print(len(data))'; python3 -c \"{ALLOCATE}\"; echo $?; echo alive"
    );
    let found = scene.run(&bundle.sh(&script))?.output()?;
    ensure_eq!(found, "31457280\n137\nalive\n", "stdout");
    Ok(())
}

fn the_run_says_out_of_memory(scene: &Scene) -> Outcome {
    let bundle = scene.debian()?.set("/linux/resources/memory", json!({ "limit": 64 << 20 }));
    let ended = scene.run(&bundle.python(ALLOCATE))?.expect_status(137)?;
    let said = ended.stderr.to_lowercase();
    ensure!(said.contains("out of memory") || said.contains("oom"), "stderr {:?}", ended.stderr);
    Ok(())
}

const DEVICES: &str = "/linux/resources/devices";

fn devices_are_denied_and_allowed(scene: &Scene) -> Outcome {
    // Numbers 121 and 122 are for local use and have no driver: ENXIO shows that the rules let an open pass.
    let script = "
exec 2>&1
cat /dev/null; : >/dev/null; head -c 4 /dev/zero | wc -c; head -c 4 /dev/urandom | wc -c
mknod /dev/kmsg1 c 1 11 && : </dev/kmsg1 && echo kmsg; (: >/dev/kmsg1) || echo kmsg not written
mknod /dev/denied c 121 7; (: </dev/denied); mknod /dev/allowed c 122 7; (: </dev/allowed)
mknod /dev/block b 121 7; (: </dev/block)
true";
    let bundle = scene
        .debian()?
        .capabilities(&["CAP_MKNOD", "CAP_SYSLOG"])
        .push(
            "/linux/resources/devices",
            json!({ "allow": true, "type": "c", "major": 1, "minor": 11, "access": "rm" }),
        )
        .push(DEVICES, json!({ "allow": true, "type": "c", "major": 121, "minor": 8, "access": "rwm" }))
        .push(DEVICES, json!({ "allow": true, "type": "c", "major": 122, "access": "rwm" }))
        .sh(script);
    let found = scene.run(&bundle)?.output()?;
    ensure!(found.contains("4\n4\n"), "reading the usual devices:\n{found}");
    ensure!(
        found.contains("\nkmsg\n") && found.contains("kmsg not written"),
        "a device that may only be read:\n{found}"
    );
    ensure!(found.contains("/dev/denied: Operation not permitted"), "a device that was not allowed:\n{found}");
    ensure!(
        found.contains("/dev/block: Operation not permitted"),
        "a block device of an allowed character device's number:\n{found}"
    );
    ensure!(found.contains("/dev/allowed: No such device or address"), "an allowed device without a driver:\n{found}");
    Ok(())
}

fn a_fork_bomb_is_contained(scene: &Scene) -> Outcome {
    let script = "
import os, signal, subprocess, time
# A bomb that no one stops: each process forks as long as it can.
bomb = subprocess.Popen(['bash', '-c', 'bomb() { bomb | bomb & }; while :; do bomb; done'],
    start_new_session=True, stderr=subprocess.DEVNULL)
most = 0
until = time.monotonic() + 5
while time.monotonic() < until:
    most = max(most, int(open('/sys/fs/cgroup/pids.current').read()))
    refused = int(open('/sys/fs/cgroup/pids.events').readline().split()[1])
    time.sleep(0.1)
print('most', most, 'refused', refused > 0)
for _ in range(1000):
    others = [int(name) for name in os.listdir('/proc') if name.isdigit() and int(name) != os.getpid()]
    if not others:
        break
    os.kill(-1, signal.SIGKILL)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    time.sleep(0.01)
# The machine answers again.
print(subprocess.check_output(['echo', 'answers'], text=True).strip())
";
    let bundle = scene.debian()?.set("/linux/resources/pids", json!({ "limit": 20 })).python(script);
    let found = scene.run(&bundle)?.output()?;
    ensure_eq!(found, "most 20 refused True\nanswers\n", "around a fork bomb");
    Ok(())
}

/// A worker that takes what it is given.
const WORKER: &str = "stress-ng --cpu 1 --timeout 3600 --quiet --temp-path /dev/shm";

/// A tenth of a processor. Long periods: whoever's processor stands still over several of them, as an emulated one may, gets the
/// quota of one.
fn a_tenth() -> Value {
    json!({ "quota": 50_000, "period": 500_000 })
}

fn a_processor_quota_holds(scene: &Scene) -> Outcome {
    let script = format!("while :; do :; done & WORKERS=$!\n{MEASURE}");
    let bundle = scene.busybox()?.set("/linux/resources/cpu", a_tenth());
    check_percent(scene, &bundle.sh(&script))
}

/// The container is the parent: it has 10 %, and makes two children of 6 % each.
fn a_parent_s_quota_binds_its_children(scene: &Scene) -> Outcome {
    // A cgroup with processes of its own cannot give controllers to children (cgroup-v2, no internal processes).
    let script = format!(
        "
cd /sys/fs/cgroup
mkdir self a b
echo 0 >self/cgroup.procs
echo +cpu >cgroup.subtree_control
for name in a b; do
    echo 30000 500000 >$name/cpu.max
    (echo 0 >$name/cgroup.procs; exec {WORKER}) &
    WORKERS=\"$WORKERS $!\"
done
workers() {{ cat /proc/[0-9]*/comm | grep -c stress-ng-cpu; }}
until [ $(workers) = 2 ]; do sleep 1; done
{MEASURE}"
    );
    let bundle = scene.debian()?.privileged().set("/linux/resources/cpu", a_tenth());
    check_percent(scene, &bundle.sh(&script))
}

/// Runs what prints two measurements, and computes the share of one processor between them.
fn check_percent(scene: &Scene, bundle: &Bundle) -> Outcome {
    // To start stress-ng with a tenth of an emulated processor takes a while.
    let text = scene.start(bundle)?.wait_within(4 * DEADLINE)?.output()?;
    let figures: Vec<f64> = text.split_whitespace().filter_map(|word| word.replace('.', "").parse().ok()).collect();
    let [first, began, last, ended] = figures[..] else { return Err(format!("no four figures but {text:?}").into()) };
    let percent = 100.0 * (last - first) / (ended - began);
    ensure!((9.0..=11.0).contains(&percent), "{percent:.2} % of a processor instead of 10 %: {text:?}");
    let long_enough = ended - began > 9e6;
    ensure!(long_enough, "not ten seconds: {text:?}");
    Ok(())
}
