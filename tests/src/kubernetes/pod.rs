//! One pod with what a pod may have, and what users do with it.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Case;
use super::cluster::{ADDRESS, NODE, PATIENCE, run};
use super::place::{Place, has};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    Case { name: "pod::is_as_asked_for", run: is_as_asked_for },
    Case { name: "pod::is_reached", run: is_reached },
    Case { name: "pod::executes_and_copies", run: executes_and_copies },
    Case { name: "pod::is_counted", run: is_counted },
    Case { name: "pod::is_debugged", run: is_debugged },
    Case { name: "pod::sees_new_configuration", run: sees_new_configuration },
    Case { name: "pod::is_restarted_for_its_health", run: is_restarted_for_its_health },
    Case { name: "pod::is_told_to_stop", run: is_told_to_stop },
];

const FULL: &str = include_str!("../../kubernetes/pods/full.yaml");

/// All that the first container can see of what was asked for, but `/dev/core`, which runc makes where the kernel has `/proc/kcore`.
const LOOK: &str = r#"
for directory in /shared /memory /conf /secret /down /host /projected; do
    find $directory -exec stat -c '%n %F %a %u:%g' {} +
done | grep -v '/\.\.2' | sort
for file in /conf/* /secret/password /down/* /projected/[cps]* /etc/shape /shared/[ip]*; do echo $file: $(cat $file); done
[ $(wc -c </projected/token) -gt 100 ] && echo token
env | grep -v ^ADDRESS= | sort
sed s/$ADDRESS/ADDRESS/ /etc/hosts; cat /etc/resolv.conf; hostname
ip route | sed s/$ADDRESS/ADDRESS/; cat /sys/class/net/eth0/mtu /proc/sys/net/ipv4/ip_local_port_range
df -k /memory | awk 'NR == 2 { print $2 }'
for file in memory.max cpu.max pids.max; do echo $file $(cat /sys/fs/cgroup/$file); done
grep -E 'Cap|NoNew|Seccomp:|Groups' /proc/1/status; cat /proc/1/oom_score_adj; id; ls /dev | grep -vx core; ulimit -n
"#;

/// Uses a processor for a while, and [`HELD`] bytes from then on.
const BUSY: &str = r#"
(head -c 20000000 /dev/zero | tail -c 20000000 | sleep 1000) >/dev/null 2>&1 &
timeout 20 sh -c 'while :; do :; done'; true
"#;
const HELD: u64 = 20_000_000;

/// And the second, which may do little.
const LOOK_BESIDE: &str = r#"
id; grep -E 'Cap|NoNew|Seccomp:' /proc/self/status; cat /part/file; touch /root-is-read-only 2>&1
stat -c '%n %a %u:%g' /memory /memory/of-side /part/file; wget -qO- http://127.0.0.1:8080/
echo beside >/part/written
"#;

/// The pod, running.
fn full(place: &Place) -> Outcome {
    let ready = || place.apply(FULL).and_then(|()| place.wait("pod/full", "condition=Ready"));
    Ok(place.full.get_or_init(|| ready().map_err(|error| error.to_string())).clone()?)
}

fn is_as_asked_for(place: &Place) -> Outcome<String> {
    full(place)?;
    let first = place.shell("full", "web", LOOK)?;
    has(
        &first,
        &["/shared/init: made by init", "/shared/post: post", "/secret/password: hunter2", "NODE=node1", "token\n"],
    )?;
    has(&first, &["memory.max 67108864", "cpu.max 50000 100000", "/etc/shape: round"])?;
    // Of 50m, before runc 1.3.2 and since.
    let weight = place.shell("full", "web", "cat /sys/fs/cgroup/cpu.weight")?;
    ensure!(["2", "11"].contains(&weight.trim()), "cpu.weight is {weight}");
    let second = place.shell("full", "side", LOOK_BESIDE)?;
    has(&second, &["uid=1000", "Read-only file system", "hello"])?;
    let logs = place.say(&["logs", "full", "-c", "side"])?;
    has(&logs, &["side says hi"])?;
    let written = place.shell("full", "web", "cat /shared/part/written")?;
    let conditions = place.value("pod/full", ".status.conditions[*].type}{.status.qosClass")?;
    Ok([first, second, logs, written, conditions].concat())
}

/// By its port on the node, and through the server.
fn is_reached(place: &Place) -> Outcome<String> {
    full(place)?;
    let url = format!("http://{ADDRESS}:{}/", place.port);
    let by_the_node = run(&["curl", "-sf", "-m", "30", &url])?.output()?;
    let mut forwarding = place.start(&["port-forward", "full", ":8080"])?;
    let line = forwarding.line()?;
    let port = line.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next()).ok_or_else(|| line.clone())?;
    let mut seen = by_the_node;
    for _ in 0..2 {
        seen += &run(&["curl", "-sf", "-m", "60", &format!("http://127.0.0.1:{port}/")])?.output()?;
    }
    let proxied = format!("/api/v1/namespaces/{}/pods/full:8080/proxy/", place.class);
    seen += &place.say(&["get", "--raw", &proxied])?;
    ensure_eq!(seen, "hello\n".repeat(4), "what was answered");
    Ok(seen)
}

fn executes_and_copies(place: &Place) -> Outcome<String> {
    full(place)?;
    let exec = ["--namespace", place.class, "exec", "-i", "full", "-c", "web", "--", "sh", "-c"];
    let script = "cat; echo to the other >&2; exit 7";
    let ended = place.cluster.kubectl_with(&[&exec[..], &[script]].concat(), "from outside\n")?;
    ensure_eq!((ended.status, ended.stdout.as_str()), (7, "from outside\n"), "what was executed");
    has(&ended.stderr, &["to the other"])?;

    let mut attached = place.start(&["attach", "-i", "full", "-c", "side"])?;
    attached.send(b"a line\n")?;
    attached.expect_line("got a line")?;
    drop(attached);

    let (here, back) = (format!("/var/tmp/copied-{}", place.class), format!("/var/tmp/back-{}", place.class));
    let bytes: Vec<u8> = (0..300_000_u32).map(|number| number.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    fs::write(&here, &bytes)?;
    place.say(&["cp", &here, "full:/tmp/copied", "-c", "web"])?;
    let sum = place.shell("full", "web", "sha256sum /tmp/copied")?;
    place.say(&["cp", "full:/tmp/copied", &back, "-c", "web"])?;
    ensure!(fs::read(&back)? == bytes, "what comes back is another");
    Ok(ended.stderr + &sum)
}

/// By kubelet, for `kubectl top` and for what scales pods: what its containers use, not what stands for them on the node.
fn is_counted(place: &Place) -> Outcome<String> {
    full(place)?;
    place.shell("full", "web", BUSY)?;
    let used = || -> Outcome<u64> {
        let text = place.shell("full", "web", "sed -n 's/^usage_usec //p' /sys/fs/cgroup/cpu.stat")?;
        Ok(text.trim().parse::<u64>()? * 1000)
    };
    let least = used()?;
    let until = Instant::now() + PATIENCE;
    let path = format!("/api/v1/nodes/{NODE}/proxy/stats/summary");
    loop {
        let summary = place.raw(&path)?;
        let pods = summary["pods"].as_array().ok_or("no pods")?;
        let of_ours = |pod: &&Value| pod["podRef"]["name"] == "full" && pod["podRef"]["namespace"] == place.class;
        let Some(pod) = pods.iter().find(of_ours) else { return Err(format!("no pod in {summary}").into()) };
        let figures = |of: &Value| {
            let of = [&of["cpu"]["usageCoreNanoSeconds"], &of["memory"]["workingSetBytes"]];
            of.map(|figure| figure.as_u64().unwrap_or_default())
        };
        let containers = pod["containers"].as_array().ok_or("no containers")?;
        let web = containers.iter().find(|of| of["name"] == "web").map(figures).unwrap_or_default();
        let counted =
            containers.len() == 2 && containers.iter().chain([pod]).map(figures).all(|figures| !figures.contains(&0));
        // What kubelet tells is some seconds old.
        if counted && web[0] >= least && web[1] >= HELD {
            let most = used()?;
            ensure!(web[0] <= most / 20 * 21, "{} ns of a processor are told of {most}", web[0]);
            // This kubelet does not know the network of runc's pods.
            ensure!(place.class == "runc" || pod["network"]["rxBytes"].is_u64(), "no network: {pod:#}");
            let mut names: Vec<_> = containers.iter().map(|container| container["name"].to_string()).collect();
            names.sort();
            return Ok(names.concat());
        }
        ensure!(Instant::now() < until, "not counted, of {least} ns and {HELD} bytes: {pod:#}");
        thread::sleep(Duration::from_secs(5));
    }
}

/// By a container that comes later, and sees the processes of another.
fn is_debugged(place: &Place) -> Outcome<String> {
    full(place)?;
    let path = format!("/api/v1/namespaces/{}/pods/full/ephemeralcontainers", place.class);
    let container = json!({
        "apiVersion": "v1",
        "kind": "EphemeralContainers",
        "metadata": { "name": "full" },
        "ephemeralContainers": [{
            "name": "debug",
            "image": "docker.io/library/busybox:latest",
            "imagePullPolicy": "Never",
            "command": ["sh", "-c", "ps -o args | grep '^httpd'; wget -qO- http://127.0.0.1:8080/; trap exit TERM; while :; do sleep 0.5; done"],
            "targetContainerName": "web",
        }],
    });
    place.cluster.kubectl_with(&["replace", "--raw", &path, "-f", "-"], &container.to_string())?.output()?;
    place.wait("pod/full", "jsonpath={.status.ephemeralContainerStatuses[0].state.running.startedAt}")?;
    let mut logs = place.start(&["logs", "--follow", "full", "-c", "debug"])?;
    let lines = [logs.line()?, logs.line()?];
    drop(logs);
    ensure!(lines[0].starts_with("httpd -p 8080") && lines[1] == "hello", "what it sees: {lines:?}");
    Ok(lines.concat())
}

/// In a volume, and not where a part of one is mounted.
fn sees_new_configuration(place: &Place) -> Outcome<String> {
    full(place)?;
    place.say(&["patch", "configmap", "conf", "--patch", r#"{"data": {"color": "red", "shape": "square"}}"#])?;
    let wait = "until [ $(cat /conf/color)$(cat /projected/color) = redred ]; do sleep 0.5; done";
    let script = format!("timeout 240 sh -c '{wait}'; cat /conf/color /conf/shape /projected/shape /etc/shape");
    let seen = place.shell("full", "web", &script)?;
    ensure_eq!(seen, "redsquaresquareround", "what the pod sees");
    Ok(seen)
}

fn is_restarted_for_its_health(place: &Place) -> Outcome<String> {
    full(place)?;
    place.shell("full", "web", "rm /tmp/www/index.html")?;
    let of_web = "{.status.containerStatuses[?(@.name==\"web\")]";
    place.wait("pod/full", &format!("jsonpath={of_web}.restartCount}}=1"))?;
    place.wait("pod/full", "condition=Ready")?;
    let before = place.say(&["logs", "--previous", "full", "-c", "web"])?;
    has(&before, &["TERM"])?;
    let last = place.value("pod/full", ".status.containerStatuses[?(@.name==\"web\")].lastState.terminated")?;
    let last: Value = serde_json::from_str(&last)?;
    let others = place.value("pod/full", ".status.containerStatuses[?(@.name==\"side\")].restartCount")?;
    let kept = place.shell("full", "web", "cat /shared/init /host/pre /etc/shape /tmp/www/index.html; ls /tmp")?;
    has(&kept, &["made by init", "stopping"])?;
    Ok(format!("{before}{}{}{others}{kept}", last["exitCode"], last["reason"]))
}

fn is_told_to_stop(place: &Place) -> Outcome<String> {
    full(place)?;
    let marker = format!("{}/pre", place.directory());
    fs::remove_file(&marker)
        .or_else(|error| if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) })?;
    let mut logs = place.start(&["logs", "--follow", "--tail", "1", "full", "-c", "web"])?;
    place.say(&["delete", "pod", "full", "--timeout=200s"])?;
    logs.expect_line("TERM")?;
    Ok(fs::read_to_string(&marker)?)
}
