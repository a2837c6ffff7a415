//! The network of a container: what its network namespace has on the host it has too, and it carries its traffic.

use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::{oci, podhull};
use crate::bundle::Bundle;
use crate::container::Container;
use crate::netns::Netns;
use crate::run::{DEADLINE, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq, processes};

pub const CASES: &[Case] = &[
    oci("network::a_namespace_that_was_there", a_namespace_that_was_there),
    oci("network::the_configuration_is_the_same", the_configuration_is_the_same),
    oci("network::filled_between_create_and_start", filled_between_create_and_start),
    oci("network::filled_by_a_hook", filled_by_a_hook),
    oci("network::macvlan", macvlan),
    oci("network::large_transfers", large_transfers),
    podhull("network::nothing_stays_in_the_namespace_of_others", nothing_stays_in_the_namespace_of_others),
    podhull("network::an_interface_is_one_container_s", an_interface_is_one_container_s),
    podhull("network::what_cannot_be_joined_is_named", what_cannot_be_joined_is_named),
    podhull("network::the_host_s_network_is_refused", the_host_s_network_is_refused),
];

/// Answers TCP and UDP on port 7 with what it was sent, on both families, until it is killed.
pub const ECHO: &str = "
import socket, threading
def echo(stream):
    with stream:
        while data := stream.recv(65536):
            stream.sendall(data)
def datagrams(sock):
    while True:
        sock.sendto(*sock.recvfrom(65536))
udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
udp.bind(('::', 7))
threading.Thread(target=datagrams, args=(udp,), daemon=True).start()
server = socket.create_server(('::', 7), family=socket.AF_INET6, dualstack_ipv6=True)
print('ready', flush=True)
while True:
    threading.Thread(target=echo, args=(server.accept()[0],), daemon=True).start()
";

/// Asks each address of its arguments: TCP, small and large, and UDP.
pub const ASK: &str = "
import socket, sys
for address in sys.argv[1:]:
    with socket.create_connection((address, 7), timeout=60) as stream:
        for length in (1, 1000000):
            sent, received = bytes(i % 251 for i in range(length)), b''
            import threading
            threading.Thread(target=stream.sendall, args=(sent,)).start()
            while len(received) < length:
                data = stream.recv(65536)
                if not data: break
                received += data
            assert received == sent, (address, length, len(received))
    family = socket.AF_INET6 if ':' in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as udp:
        udp.settimeout(20)
        for length in (0, 1400, 9000):
            udp.sendto(b'x' * length, (address, 7))
            assert udp.recv(65536) == b'x' * length, (address, length)
    print(address, 'answers', flush=True)
";

const NAMESPACES: [&str; 6] = ["mount", "pid", "network", "ipc", "uts", "cgroup"];

/// A bundle whose container is in a network namespace.
fn inside(bundle: Bundle, netns: &Netns) -> Bundle {
    let list = NAMESPACES.map(|kind| match kind {
        "network" => json!({ "type": kind, "path": netns.path }),
        kind => json!({ "type": kind }),
    });
    bundle.set("/linux/namespaces", Value::from(list.to_vec()))
}

/// As Podman and CNI do it: connected before there is a container.
fn pair(scene: &Scene) -> Outcome<(Netns, Netns)> {
    let (pod, lan) = (Netns::new(scene, "pod")?, Netns::new(scene, "lan")?);
    pod.connect("eth0", &["10.88.0.2/24", "fd88::2/64"], &lan, "lan0", &["10.88.0.1/24", "fd88::1/64"])?;
    pod.ip("route add default via 10.88.0.1")?;
    pod.ip("route add default via fd88::1")?;
    Ok((pod, lan))
}

/// Both sides reach each other; the container runs [`ECHO`], and asks the other side when it is told to by `exec`.
fn check_traffic(container: &Container, lan: &Netns, inside: &[&str], outside: &[&str]) -> Outcome {
    container.expect_output("ready")?;
    let asked = [&["python3", "-c", ASK], inside].concat();
    let answers =
        |addresses: &[&str]| addresses.iter().map(|address| format!("{address} answers\n")).collect::<String>();
    ensure_eq!(lan.run(&asked)?.output()?, answers(inside), "from outside");
    for address in inside {
        lan.run(&["ping", "-c", "2", "-i", "0.2", "-W", "20", address])?.expect_status(0)?;
    }
    let mut server = lan.start(&["python3", "-c", ECHO])?;
    server.expect_line("ready")?;
    let asked = [&["exec", &container.id, "python3", "-c", ASK], outside].concat();
    ensure_eq!(container.call(&asked)?.output()?, answers(outside), "from inside");
    server.signal(Signal::KILL)?;
    server.wait()?;
    Ok(())
}

fn end(container: &Container) -> Outcome {
    container.call(&["kill", &container.id, "KILL"])?.output()?;
    ensure_eq!(container.wait()?, 137, "exit status");
    container.delete()
}

const INSIDE: &[&str] = &["10.88.0.2", "fd88::2"];
const OUTSIDE: &[&str] = &["10.88.0.1", "fd88::1"];

fn a_namespace_that_was_there(scene: &Scene) -> Outcome {
    let (pod, lan) = pair(scene)?;
    let container = Container::make(scene, &inside(scene.debian()?.python(ECHO), &pod), &["run", "-d"])?;
    check_traffic(&container, &lan, INSIDE, OUTSIDE)?;
    // The interface is still where callers look for it, with its addresses and its counters.
    let found = pod.ip("-s -o address show dev eth0")?;
    ensure!(found.contains("10.88.0.2/24") && found.contains("fd88::2/64"), "addresses on the host: {found:?}");
    end(&container)?;
    ensure_eq!(pod.leftovers()?, "", "left behind");
    Ok(())
}

/// What `ip` says in a namespace, without what differs from one kernel to the next.
pub fn configuration(text: &str) -> Outcome<Vec<String>> {
    let mut lines = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        let Value::Array(entries) = serde_json::from_str(line)? else { return Err(format!("no list: {line}").into()) };
        for entry in entries {
            let get =
                |key: &str| entry.get(key).filter(|value| !value.is_null()).map(|value| format!(" {key}={value}"));
            if let Some(Value::Array(addresses)) = entry.get("addr_info") {
                if entry["ifname"] != "lo" {
                    let keys = ["ifname", "address", "mtu"];
                    lines.push(keys.iter().filter_map(|key| get(key)).collect());
                    for address in addresses {
                        let keys = ["family", "local", "prefixlen", "broadcast", "scope", "address"];
                        let of = |key: &&str| address.get(*key).map(|value| format!(" {key}={value}"));
                        lines.push(format!("{}:{}", entry["ifname"], keys.iter().filter_map(of).collect::<String>()));
                    }
                }
            } else {
                let keys = [
                    "type", "dst", "gateway", "dev", "protocol", "scope", "metric", "prefsrc", "lladdr", "metrics",
                    "flags",
                ];
                lines.push(keys.iter().filter_map(|key| get(key)).collect());
            }
        }
    }
    lines.sort();
    Ok(lines)
}

/// Says it.
pub const SHOW: &str = "ip -j address; ip -j route; ip -j -6 route; ip -j neighbour show nud permanent";

fn the_configuration_is_the_same(scene: &Scene) -> Outcome {
    let (pod, lan) = pair(scene)?;
    // Not the MTU, addresses, routes that anybody would guess.
    pod.connect("net1", &["192.168.7.9/28"], &lan, "lan1", &["192.168.7.1/28"])?;
    pod.ip("link set net1 down")?;
    pod.ip("link set net1 address 02:11:22:33:44:55 mtu 1380")?;
    pod.ip("link set net1 up")?;
    for words in [
        "address add 192.168.7.10/28 dev net1",
        "address add 10.200.0.1 peer 10.200.0.2 dev net1",
        "route add 172.16.0.0/12 via 192.168.7.1 dev net1 metric 77 src 192.168.7.10 mtu 1300",
        "route add 10.99.0.0/16 via 10.88.0.77 dev eth0 onlink",
        "route add 10.98.0.1 dev eth0 scope link",
        "route add blackhole 10.97.0.0/16",
        "route add unreachable fd97::/64",
        "route add fd98::/64 via fd88::1 metric 5",
        "neighbour add 10.88.0.50 lladdr 02:00:00:00:00:50 dev eth0 nud permanent",
        "neighbour add fd88::50 lladdr 02:00:00:00:00:51 dev eth0 nud permanent",
    ] {
        pod.ip(words)?;
    }
    let expected = configuration(&pod.run(&["sh", "-c", SHOW])?.output()?)?;
    ensure!(expected.len() > 20, "only {expected:?}");
    let found = configuration(&scene.run(&inside(scene.debian()?.sh(SHOW), &pod))?.output()?)?;
    let missing: Vec<_> = expected.iter().filter(|line| !found.contains(line)).collect();
    let further: Vec<_> = found.iter().filter(|line| !expected.contains(line)).collect();
    ensure!(missing.is_empty() && further.is_empty(), "missing in the container {missing:#?}, further {further:#?}");
    ensure_eq!(pod.leftovers()?, "", "left behind");
    Ok(())
}

/// As Docker does.
fn filled_between_create_and_start(scene: &Scene) -> Outcome {
    let lan = Netns::new(scene, "lan")?;
    let container = Container::create(scene, &scene.debian()?.python(ECHO))?;
    let pod = Netns::of(container.pid.as_raw_nonzero().get());
    pod.ip("link set lo up")?;
    pod.connect("eth0", &["10.88.0.2/24", "fd88::2/64"], &lan, "lan0", &["10.88.0.1/24", "fd88::1/64"])?;
    pod.ip("route add default via 10.88.0.1")?;
    container.start()?;
    check_traffic(&container, &lan, INSIDE, OUTSIDE)?;
    end(&container)
}

/// As Docker before version 26 and nerdctl do.
fn filled_by_a_hook(scene: &Scene) -> Outcome {
    let lan = Netns::new(scene, "lan")?;
    let script = scene.directory.join("hook");
    let fill = format!(
        "#!/bin/sh
set -e
pid=$(jq .pid)
lan='nsenter --net={} --'
pod=\"nsenter --net=/proc/$pid/ns/net --\"
$lan ip link add lan0 type veth peer name tmp-eth0
$lan ip link set tmp-eth0 netns /proc/$pid/ns/net name eth0
$lan ip address add 10.88.0.1/24 dev lan0
$lan ip link set lan0 up
$pod ip address add 10.88.0.2/24 dev eth0
$pod ip link set eth0 up
$pod ip link set lo up
",
        lan.path.display()
    );
    std::fs::write(&script, fill)?;
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let bundle = scene.debian()?.python(ECHO).set("/hooks/createRuntime", json!([{ "path": script }]));
    let container = Container::make(scene, &bundle, &["run", "-d"])?;
    check_traffic(&container, &lan, &["10.88.0.2"], &["10.88.0.1"])?;
    end(&container)
}

fn macvlan(scene: &Scene) -> Outcome {
    let (pod, lan, host) = (Netns::new(scene, "pod")?, Netns::new(scene, "lan")?, Netns::new(scene, "host")?);
    host.connect("uplink", &[], &lan, "lan0", &["10.88.0.1/24", "fd88::1/64"])?;
    host.ip("link add link uplink name tmp-eth0 type macvlan mode bridge")?;
    host.ip(&format!("link set tmp-eth0 netns {} name eth0", pod.path.display()))?;
    pod.ip("address add 10.88.0.2/24 dev eth0")?;
    pod.ip("address add fd88::2/64 dev eth0 nodad")?;
    pod.ip("link set eth0 up")?;
    let container = Container::make(scene, &inside(scene.debian()?.python(ECHO), &pod), &["run", "-d"])?;
    check_traffic(&container, &lan, INSIDE, OUTSIDE)?;
    end(&container)
}

/// Packets as large as the kernel makes them cross in one piece, both ways: that is what makes a network fast.
fn large_transfers(scene: &Scene) -> Outcome {
    const BYTES: u64 = 64 << 20;
    let sink = format!(
        "
import socket
server = socket.create_server(('0.0.0.0', 7))
print('ready', flush=True)
stream = server.accept()[0]
total, buffer = 0, bytearray(1 << 20)
while total < {BYTES} and (count := stream.recv_into(buffer)):
    total += count
stream.sendall(total.to_bytes(8))
"
    );
    let source = format!(
        "
import socket, sys, time
stream = socket.create_connection((sys.argv[1], 7), timeout=80)
began, block = time.monotonic(), bytes(1 << 20)
for _ in range({BYTES} >> 20):
    stream.sendall(block)
print(int.from_bytes(stream.recv(8)), time.monotonic() - began)
"
    );
    let (pod, lan) = pair(scene)?;
    let transferred = |output: &str| -> Outcome<f64> {
        let (bytes, seconds) = output.trim().split_once(' ').ok_or("no figures")?;
        ensure_eq!(bytes.parse::<u64>()?, BYTES, "bytes that arrived");
        Ok(BYTES as f64 / (1 << 20) as f64 / seconds.parse::<f64>()?)
    };
    // Packets and bytes that came to the host's end, and that left it.
    let counters = || -> Outcome<[(u64, u64); 2]> {
        let all: Value = serde_json::from_str(&lan.ip("-s -j link show dev lan0")?)?;
        let count = |way: &str, what: &str| all[0]["stats64"][way][what].as_u64().ok_or("no counters");
        Ok([(count("rx", "packets")?, count("rx", "bytes")?), (count("tx", "packets")?, count("tx", "bytes")?)])
    };
    let container = Container::make(scene, &inside(scene.debian()?.python(&sink), &pod), &["run", "-d"])?;
    container.expect_output("ready")?;
    let before = counters()?;
    let into = transferred(&lan.run(&["python3", "-c", &source, "10.88.0.2"])?.output()?)?;
    let between = counters()?;
    ensure_eq!(container.wait()?, 0, "exit status");
    container.delete()?;

    let mut server = lan.start(&["python3", "-c", &sink])?;
    server.expect_line("ready")?;
    let bundle = scene.debian()?.args(&["python3", "-c", &source, "10.88.0.1"]);
    let again = counters()?;
    let out = transferred(&scene.run(&inside(bundle, &pod))?.output()?)?;
    let after = counters()?;
    server.wait()?.expect_status(0)?;
    let size = |way: usize, from: &[(u64, u64); 2], to: &[(u64, u64); 2]| {
        (to[way].1 - from[way].1) / (to[way].0 - from[way].0).max(1)
    };
    let sizes = [size(1, &before, &between), size(0, &again, &after)];
    println!(
        "     {into:.0} MiB/s into the container in packets of {} bytes, {out:.0} out of it in those of {}",
        sizes[0], sizes[1]
    );
    ensure!(sizes.iter().all(|size| *size > 6000), "bytes of a packet on the average, in and out: {sizes:?}");
    Ok(())
}

fn nothing_stays_in_the_namespace_of_others(scene: &Scene) -> Outcome {
    let (pod, lan) = pair(scene)?;
    // The namespace itself answers again when there is no container any more.
    let check = |what: &str| -> Outcome {
        let until = Instant::now() + DEADLINE;
        loop {
            let left = pod.leftovers()?;
            if left.is_empty() {
                break;
            }
            ensure!(Instant::now() < until, "left behind after {what}: {left}");
            thread::sleep(Duration::from_millis(50));
        }
        lan.run(&["ping", "-c", "1", "-W", "20", "10.88.0.2"])?.expect_status(0)?;
        Ok(())
    };
    let bundle = || -> Outcome<Bundle> { Ok(inside(scene.debian()?.python(ECHO), &pod)) };
    for killed in ["nobody", "the shadow", "the machine"] {
        let container = Container::make(scene, &bundle()?, &["run", "-d"])?;
        container.expect_output("ready")?;
        ensure!(!pod.leftovers()?.is_empty(), "nothing is joined to the interface");
        match killed {
            "the shadow" => kill_process(container.pid, Signal::KILL)?,
            "the machine" => {
                let all = processes::all();
                let machine = all.iter().find(|process| process.command.starts_with("podhull vmm"));
                let machine = machine.and_then(|process| Pid::from_raw(process.pid)).ok_or("no machine")?;
                kill_process(machine, Signal::KILL)?;
            }
            _ => drop(container.call(&["kill", &container.id, "KILL"])?.output()?),
        }
        container.wait()?;
        // Nobody has deleted it yet.
        check(&format!("the end of {killed}"))?;
        container.delete()?;
    }
    // Who runs it in the foreground is killed; then one that is only being made.
    for moment in ["it runs", "it starts"] {
        let mut run: Running = scene.start(&bundle()?)?;
        match moment {
            "it runs" => run.expect_line("ready")?,
            _ => {
                let until = Instant::now() + DEADLINE;
                while pod.leftovers()?.is_empty() {
                    ensure!(Instant::now() < until, "nothing was joined to the interface");
                }
            }
        }
        run.signal(Signal::KILL)?;
        run.wait()?;
        check(&format!("a kill while {moment}"))?;
        scene.sweep()?;
    }
    Ok(())
}

fn an_interface_is_one_container_s(scene: &Scene) -> Outcome {
    let (pod, lan) = pair(scene)?;
    // Two pods, not one: the second one's namespace is no container's of ours when it is looked up by another state root.
    let first = Container::make(scene, &inside(scene.debian()?.python(ECHO), &pod), &["run", "-d"])?;
    first.expect_output("ready")?;
    let bundle = inside(scene.debian()?.sh("true"), &pod);
    bundle.write()?;
    let root = scene.make_directory("root")?;
    let words = ["--root", &root.to_string_lossy(), "run", "-b", &bundle.directory.to_string_lossy(), "second"]
        .map(String::from);
    let ended = scene.call(&words.iter().map(String::as_str).collect::<Vec<_>>())?;
    ensure!(ended.status != 0 && ended.stderr.contains("interface eth0: another container"), "{:?}", ended.stderr);
    check_traffic(&first, &lan, INSIDE, OUTSIDE)?;
    end(&first)
}

fn what_cannot_be_joined_is_named(scene: &Scene) -> Outcome {
    let pod = Netns::new(scene, "pod")?;
    pod.ip("tuntap add tun7 mode tun")?;
    // One that is down carries nothing.
    scene.run(&inside(scene.debian()?.sh("true"), &pod))?.expect_status(0)?;
    pod.ip("link set tun7 up")?;
    let ended = scene.run(&inside(scene.debian()?.sh("true"), &pod))?;
    ensure!(
        ended.status != 0 && ended.stderr.contains("tun7: it is of kind tun") && ended.stderr.lines().count() == 1,
        "stderr {:?}",
        ended.stderr
    );
    Ok(())
}

fn the_host_s_network_is_refused(scene: &Scene) -> Outcome {
    let without: Vec<&str> = NAMESPACES.into_iter().filter(|kind| *kind != "network").collect();
    let ended = scene.run(&scene.debian()?.namespaces(&without).sh("true"))?;
    ensure!(
        ended.status != 0 && ended.stderr.contains("linux.namespaces") && ended.stderr.contains("the host's network"),
        "stderr {:?}",
        ended.stderr
    );
    Ok(())
}
