//! The networks that callers make, and what they promise: published ports, names, several networks of one container.

use std::time::Instant;

use serde_json::Value;

use super::oci;
use crate::bundle::DEBIAN;
use crate::docker::{self, Docker};
use crate::leaks::Leaks;
use crate::podman::{self, Podman};
use crate::run::{DEADLINE, Ended, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("networks::podman_publishes_ports_and_names", podman_publishes_ports_and_names),
    oci("networks::podman_gives_a_container_several", podman_gives_a_container_several),
    oci("networks::podman_pods_have_one", podman_pods_have_one),
    oci("networks::docker_publishes_ports", docker_publishes_ports),
];

/// Answers HTTP on port 80 and UDP on port 7, to all of the world.
const SERVE: &str = "
import http.server, socket, threading
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'served\\n')
udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
udp.bind(('::', 7))
def datagrams():
    while True:
        udp.sendto(*udp.recvfrom(65536))
threading.Thread(target=datagrams, daemon=True).start()
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
server = Server(('::', 80), Handler)
print('ready', flush=True)
server.serve_forever()
";

/// A program of this host, to its end.
fn here(words: &[&str]) -> Outcome<Ended> {
    Running::start(&words.iter().map(Into::into).collect::<Vec<_>>(), &[])?.wait()
}

fn curl(url: &str) -> Outcome<String> {
    here(&["curl", "-sS", "-m", "30", url])?.output()
}

/// Sends a datagram and waits for it to come back.
fn udp(address: &str, port: &str) -> Outcome<String> {
    let script = "import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(30); \
                  s.sendto(b'there and back', (sys.argv[1], int(sys.argv[2]))); print(s.recv(100).decode())";
    here(&["python3", "-c", script, address, port])?.output()
}

/// Waits for a line in what a container has written.
fn ready(podman: &Podman, container: &str) -> Outcome {
    let until = Instant::now() + DEADLINE;
    loop {
        let logs = podman.call(&["logs", container])?.output()?;
        if logs.contains("ready") {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{container} has written {logs:?}");
    }
}

fn podman_publishes_ports_and_names(scene: &Scene) -> Outcome {
    let podman = Podman::new(scene)?;
    let before = Leaks::watch();
    podman.call(&["network", "create", "--subnet", "10.77.1.0/24", "e2e"])?.output()?;
    let run = |options: &[&str], command: &[&str]| {
        podman.call(&[&["run", "--network", "e2e"], options, &["--rootfs", DEBIAN], command].concat())
    };
    run(&["-d", "--name", "web", "-p", "18080:80", "-p", "18007:7/udp"], &["python3", "-c", SERVE])?.output()?;
    ready(&podman, "web")?;
    let address = podman.call(&["inspect", "-f", "{{.NetworkSettings.Networks.e2e.IPAddress}}", "web"])?.output()?;
    let address = address.trim();
    ensure_eq!(curl(&format!("http://{address}/"))?, "served\n", "by its address");
    ensure_eq!(curl("http://127.0.0.1:18080/")?, "served\n", "by a published port");
    ensure_eq!(curl("http://10.77.1.1:18080/")?, "served\n", "by a published port of another address of the host");
    ensure_eq!(udp("10.77.1.1", "18007")?, "there and back\n", "by a published port of UDP");

    // Whom they ask for names is the caller's resolver, on the host's end of the network.
    let ask = "import socket, urllib.request; print(socket.gethostbyname('web')); \
               print(urllib.request.urlopen('http://web/', timeout=60).read().decode(), end=''); \
               print(open('/etc/hosts').read().count('10.77.1.'), open('/etc/resolv.conf').read().count('10.77.1.1'))";
    let found = run(&["--rm"], &["python3", "-c", ask])?.output()?;
    ensure_eq!(found, format!("{address}\nserved\n1 1\n"), "by its name, from another container");

    podman.call(&["restart", "-t", "0", "web"])?.output()?;
    podman.call(&["rm", "-f", "-t", "0", "web"])?.output()?;
    podman.call(&["network", "rm", "e2e"])?.output()?;
    podman::check(&before)
}

fn podman_gives_a_container_several(scene: &Scene) -> Outcome {
    let podman = Podman::new(scene)?;
    let before = Leaks::watch();
    podman.call(&["network", "create", "--subnet", "10.77.2.0/24", "-o", "mtu=1400", "one"])?.output()?;
    podman
        .call(&["network", "create", "--ipv6", "--subnet", "10.77.3.0/24", "--subnet", "fd77:3::/64", "two"])?
        .output()?;
    let networks =
        ["--network", "one:ip=10.77.2.9,mac=02:00:00:00:77:02", "--network", "two:ip=10.77.3.9,ip6=fd77:3::9"];
    let run = [&["run", "--rm"][..], &networks, &["--rootfs", DEBIAN, "ip", "-j", "address"]].concat();
    let found: Value = serde_json::from_str(&podman.call(&run)?.output()?)?;
    let mut addresses = Vec::new();
    for interface in found.as_array().into_iter().flatten().filter(|interface| interface["ifname"] != "lo") {
        for address in interface["addr_info"].as_array().into_iter().flatten() {
            if address["scope"] == "global" {
                addresses.push(format!("{} {} {}", interface["mtu"], address["local"], address["prefixlen"]));
            }
        }
    }
    addresses.sort();
    let expected = ["1400 \"10.77.2.9\" 24", "1500 \"10.77.3.9\" 24", "1500 \"fd77:3::9\" 64"];
    ensure_eq!(addresses, expected, "addresses");
    ensure!(found.to_string().contains("02:00:00:00:77:02"), "no such MAC address in {found}");
    podman.call(&["network", "rm", "one", "two"])?.output()?;
    podman::check(&before)
}

fn podman_pods_have_one(scene: &Scene) -> Outcome {
    let podman = Podman::new(scene)?;
    let before = Leaks::watch();
    podman.call(&["network", "create", "--subnet", "10.77.4.0/24", "e2e"])?.output()?;
    podman.call(&["pod", "create", "--name", "p", "--network", "e2e", "-p", "18081:80"])?.output()?;
    let run = |options: &[&str], command: &[&str]| {
        podman.call(&[&["run", "--pod", "p"], options, &["--rootfs", DEBIAN], command].concat())
    };
    run(&["-d", "--name", "server"], &["python3", "-c", SERVE])?.output()?;
    ready(&podman, "server")?;
    ensure_eq!(curl("http://127.0.0.1:18081/")?, "served\n", "by a published port of the pod");
    let ask =
        "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1/', timeout=60).read().decode(), end='')";
    ensure_eq!(run(&["--rm"], &["python3", "-c", ask])?.output()?, "served\n", "from another container of the pod");
    podman.call(&["pod", "rm", "-f", "-t", "0", "p"])?.output()?;
    podman.call(&["network", "rm", "e2e"])?.output()?;
    podman::check(&before)
}

fn docker_publishes_ports(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let docker = Docker::start(scene, &["--bip", "10.77.5.1/24"])?;
    let serve = "echo served > /index.html; httpd -f -p 80 -h / & echo ready; wait";
    docker.call(&["run", "-d", "--name", "web", "-p", "18082:80", "busybox", "sh", "-c", serve])?.output()?;
    let until = Instant::now() + DEADLINE;
    while !docker.call(&["logs", "web"])?.output()?.contains("ready") {
        ensure!(Instant::now() < until, "not ready");
    }
    let address = docker.call(&["inspect", "-f", "{{.NetworkSettings.IPAddress}}", "web"])?.output()?;
    let address = format!("http://{}/index.html", address.trim());
    // The server may not have its socket yet when it is said to be ready.
    while here(&["curl", "-sS", "-m", "30", &address])?.status != 0 {
        ensure!(Instant::now() < until, "no answer from {address}");
    }
    ensure_eq!(curl(&address)?, "served\n", "by its address");
    ensure_eq!(curl("http://127.0.0.1:18082/index.html")?, "served\n", "by a published port");
    let get = ["run", "--rm", "busybox", "wget", "-q", "-O-", "-T", "60", &address];
    ensure_eq!(docker.call(&get)?.output()?, "served\n", "from another container");
    docker.call(&["restart", "-t", "0", "web"])?.output()?;
    docker.call(&["rm", "-f", "web"])?.output()?;
    docker.end()?;
    let _ = here(&["ip", "link", "delete", "docker0"])?;
    docker::check(&before)
}
