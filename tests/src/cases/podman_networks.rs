//! Podman with networks of its making, in a network namespace that stands for the host's.

use super::oci;
use crate::image;
use crate::leaks::Leaks;
use crate::netns::Netns;
use crate::podman::{Podman, check};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] =
    &[oci("podman_networks::ports_and_names", ports_and_names), oci("podman_networks::play_kube", play_kube)];

/// Serves its first argument as the page of a web server.
const SERVE: &str = "mkdir -p /www && echo $0 >/www/index.html && exec httpd -f -p 80 -h /www";

fn ports_and_names(scene: &Scene) -> Outcome {
    let host = Netns::new(scene, "host")?;
    let podman = Podman::with_network(scene, &host)?;
    let before = Leaks::watch();
    for (name, subnet) in [("lan", "10.91.1.0/24"), ("other", "10.91.2.0/24")] {
        podman.call(&["network", "create", "--subnet", subnet, name])?.output()?;
    }
    let run = |options: &[&str], command: &[&str]| {
        podman.call(&[&["run", "-d"], options, &[image::NAME], command].concat())?.output()
    };
    let healthy = ["--health-cmd", "wget -q -O /dev/null http://127.0.0.1/", "--health-interval", "disable"];
    let web = ["--name", "web", "--network", "lan:alias=shop", "-p", "8080:80", "--memory", "64m"];
    run(&[&web[..], &healthy].concat(), &["sh", "-c", SERVE, "web page"])?;
    run(&["--name", "plain", "-p", "8081:80"], &["sh", "-c", SERVE, "plain page"])?;
    run(&["--name", "client", "--network", "lan", "--network", "other:ip=10.91.2.77"], &["sleep", "1000"])?;

    let curl = |url: &str| {
        let words =
            ["curl", "-s", "--max-time", "60", "--retry", "20", "--retry-connrefused", "--retry-delay", "1", url];
        host.run(&words)?.output()
    };
    ensure_eq!(curl("http://127.0.0.1:8080/")?, "web page\n", "published port, by localhost");
    ensure_eq!(curl("http://10.91.1.1:8080/")?, "web page\n", "published port, by an address of the host");
    ensure_eq!(curl("http://127.0.0.1:8081/")?, "plain page\n", "published port of the default network");

    let client = |command: &[&str]| podman.call(&[&["exec", "client"], command].concat());
    for url in ["http://web/", "http://shop/", "http://10.91.1.1:8080/"] {
        ensure_eq!(
            client(&["wget", "-q", "-T", "60", "-O", "-", url])?.output()?,
            "web page\n",
            "{url} from a container"
        );
    }
    let plain = client(&["wget", "-q", "-T", "60", "-O", "-", "http://10.91.2.1:8081/"])?.output()?;
    ensure_eq!(plain, "plain page\n", "published port, from another network");
    let addresses = client(&["ip", "-4", "-o", "address"])?.output()?;
    ensure!(addresses.contains(" 10.91.1.") && addresses.contains(" 10.91.2.77/24 "), "addresses {addresses}");
    ensure_eq!(client(&["nslookup", "nobody"])?.status, 1, "status of a name that nobody has");

    podman.call(&["healthcheck", "run", "web"])?.expect_status(0)?;
    let health = podman.call(&["inspect", "-f", "{{.State.Health.Status}}", "web"])?.output()?;
    ensure_eq!(health, "healthy\n", "health");
    podman.call(&["exec", "web", "rm", "/www/index.html"])?.output()?;
    podman.call(&["healthcheck", "run", "web"])?.expect_status(1)?;
    podman.call(&["restart", "-t", "0", "web"])?.output()?;
    ensure_eq!(curl("http://127.0.0.1:8080/")?, "web page\n", "published port after a restart");
    let format = "{{.PIDs}} {{.MemUsageBytes}} {{.NetIO}}";
    let stats = podman.call(&["stats", "--no-stream", "--format", format, "web"])?.output()?;
    let mut fields = stats.split_whitespace();
    ensure!(fields.next().is_some_and(|pids| pids.parse::<u32>().is_ok_and(|pids| pids > 0)), "stats {stats:?}");
    ensure!(fields.next().is_some_and(|memory| memory != "0B") && stats.contains("64MiB"), "stats {stats:?}");
    for name in ["web", "plain", "client"] {
        podman.call(&["rm", "-f", "-t", "0", name])?.output()?;
    }
    let words = ["events", "--stream=false", "--filter", "container=web", "--format", "{{.Status}}"];
    let events = podman.call(&words)?.output()?;
    for status in ["create", "init", "start", "health_status", "died", "remove"] {
        ensure!(events.lines().any(|line| line == status), "no {status} in {events:?}");
    }
    for network in ["lan", "other"] {
        podman.call(&["network", "rm", network])?.output()?;
    }
    check(&before)
}

const PLAYED: &str = "
apiVersion: v1
kind: Pod
metadata:
  name: shop
spec:
  containers:
    - name: web
      image: docker.io/library/busybox:latest
      imagePullPolicy: Never
      command: [sh, -c, \"mkdir -p /www && echo $WORD >/www/index.html && exec httpd -f -p 80 -h /www\"]
      env: [{name: WORD, value: played}]
      ports: [{containerPort: 80, hostPort: 8090}]
      resources: {limits: {memory: 64Mi}}
      volumeMounts: [{name: data, mountPath: /data}]
    - name: side
      image: docker.io/library/busybox:latest
      imagePullPolicy: Never
      command: [sh, -c, \"until wget -q -O /data/copy http://127.0.0.1/; do sleep 0.2; done; exec sleep 1000\"]
      volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, emptyDir: {}}]
";

fn play_kube(scene: &Scene) -> Outcome {
    let host = Netns::new(scene, "host")?;
    let podman = Podman::with_network(scene, &host)?;
    let before = Leaks::watch();
    let file = scene.directory.join("pod.yaml");
    std::fs::write(&file, PLAYED)?;
    let file = file.to_string_lossy();
    podman.call(&["play", "kube", &file])?.output()?;
    let words = ["curl", "-s", "--max-time", "60", "--retry", "20", "--retry-connrefused", "--retry-delay", "1"];
    let page = host.run(&[&words[..], &["http://127.0.0.1:8090/"]].concat())?.output()?;
    ensure_eq!(page, "played\n", "published port of the pod");
    let script = "until test -s /data/copy; do sleep 0.1; done; cat /data/copy /sys/fs/cgroup/memory.max";
    let copied = podman.call(&["exec", "shop-web", "sh", "-c", script])?.output()?;
    ensure_eq!(copied, "played\n67108864\n", "what the other container got, and the limit");
    podman.call(&["play", "kube", "--down", &file])?.output()?;
    ensure_eq!(podman.call(&["pod", "list", "-q"])?.output()?, "", "pods");
    podman.call(&["volume", "prune", "-f"])?.output()?;
    check(&before)
}
