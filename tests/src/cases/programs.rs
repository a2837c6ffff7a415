//! Programs that people run in containers: servers that keep data, that serve files, and those that ask much of their kernel.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{long, oci};
use crate::bundle::{ALL_CAPABILITIES, Bundle};
use crate::container::Container;
use crate::leaks::Leaks;
use crate::netns::Netns;
use crate::run::{DEADLINE, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    long(oci("programs::postgresql_loses_nothing_when_it_is_killed", postgresql_loses_nothing_when_it_is_killed)),
    oci("programs::nginx_serves_a_large_file", nginx_serves_a_large_file),
    oci("programs::redis_under_its_benchmark", redis_under_its_benchmark),
    long(oci("programs::java_finds_its_limits", java_finds_its_limits)),
    long(oci("programs::systemd_boots", systemd_boots)),
    oci("programs::sandboxes_and_runtimes_inside", sandboxes_and_runtimes_inside),
];

/// nginx, PostgreSQL, redis: see tests/host/image/services-packages.
const SERVICES: &str = "/bundles/services/rootfs";

/// systemd, Java, bubblewrap, crun: see tests/host/image/system-packages.
const SYSTEM: &str = "/bundles/system/rootfs";

fn tmpfs(bundle: Bundle, destination: &str) -> Bundle {
    let mount =
        json!({ "destination": destination, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] });
    bundle.push("/mounts", mount)
}

/// What servers need that begin as root and go on as somebody else.
const SERVER: [&str; 7] =
    ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_NET_BIND_SERVICE"];

/// Waits until a program in a container succeeds.
fn wait_for(container: &Container, words: &[&str]) -> Outcome {
    let until = Instant::now() + DEADLINE;
    loop {
        let ended = container.call(&[&["exec", &container.id], words].concat())?;
        if ended.status == 0 {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{words:?}: {:?}; {:?}", ended.stderr, container.output()?);
        thread::sleep(Duration::from_millis(200));
    }
}

/// A cluster on a volume of the host. Its clients connect by a socket.
fn postgresql<'a>(scene: &'a Scene, volume: &Path) -> Outcome<Container<'a>> {
    let script = "
exec setpriv --reuid postgres --regid postgres --init-groups /usr/lib/postgresql/*/bin/postgres -D /data \
    -c config_file=/dev/null -c hba_file=/data/hba -c unix_socket_directories=/tmp -c listen_addresses= -c shared_buffers=32MB";
    let bundle = scene.bundle_on(Path::new(SERVICES))?.bind(volume, "/data", &["bind"]);
    let bundle = bundle.capabilities(&SERVER).set("/linux/resources/memory", json!({ "limit": 256 << 20 }));
    let bundle = bundle.push(
        "/mounts",
        json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"] }),
    );
    let container = Container::make(scene, &bundle.sh(script), &["run", "-d"])?;
    container.expect_output("ready to accept connections")?;
    Ok(container)
}

/// The cluster that the Debian package has made.
fn make_cluster(volume: &Path) -> Outcome {
    let script =
        "cp -a $1/var/lib/postgresql/*/main/. $2 && chown --reference=$1/var/lib/postgresql $2 && chmod 700 $2 &&
        echo local all all trust >$2/hba";
    let words = ["sh", "-c", script, "sh", SERVICES, &volume.to_string_lossy()].map(Into::into);
    Running::start(&words, &[])?.wait()?.output().map(drop)
}

/// pgbench runs, and a client notes what was confirmed, when the container is killed with SIGKILL. What comes up on the same
/// volume has every transaction that was confirmed, and no half of one.
fn postgresql_loses_nothing_when_it_is_killed(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let volume = scene.make_directory("volume")?;
    let seconds = if scene.is_soak() { 60 } else { 5 };
    make_cluster(&volume)?;
    let container = postgresql(scene, &volume)?;
    let psql = ["exec", &container.id, "psql", "-h", "/tmp", "-U", "postgres", "-qAt"];
    let ask = |container: &Container, query: &str| -> Outcome<String> {
        let words = ["exec", &container.id, "psql", "-h", "/tmp", "-U", "postgres", "-qAt", "-c", query];
        Ok(container.call(&words)?.output()?.trim().to_owned())
    };
    let pgbench = ["exec", "-e", "PGDATABASE=postgres", &container.id, "pgbench", "-h", "/tmp", "-U", "postgres"];
    container.call(&[&pgbench[..], &["-i", "-q", "-s", "1"]].concat())?.output()?;
    ask(&container, "create table confirmed (number int)")?;
    let start = |words: &[&str]| -> Outcome<Running> {
        let program = scene.runtime.program().into();
        Running::start(&[program].into_iter().chain(words.iter().map(Into::into)).collect::<Vec<_>>(), &[])
    };
    let full = start(&[&pgbench[..], &["-c", "4", "-T", &seconds.to_string()]].concat())?;
    let report = full.wait_within(DEADLINE + Duration::from_secs(seconds))?.output()?;
    ensure!(report.contains("number of failed transactions: 0 "), "pgbench: {report}");
    let _bench = start(&[&pgbench[..], &["-n", "-c", "4", "-T", "1000"]].concat())?;
    let mut client = start(&psql)?;
    let mut confirmed = 0;
    for number in 1..=30 {
        client.send(format!("insert into confirmed values ({number});\n\\echo {number}\n").as_bytes())?;
        client.expect_line(&number.to_string())?;
        confirmed = number;
    }
    // One that is not waited for.
    client.send(b"insert into confirmed values (31);\n")?;
    container.call(&["kill", &container.id, "KILL"])?.output()?;
    ensure_eq!(container.wait()?, 137, "exit status");
    drop((client, _bench));
    container.delete()?;
    let container = postgresql(scene, &volume)?;
    ensure!(container.output()?.contains("automatic recovery in progress"), "{}", container.output()?);
    let found: u32 = ask(&container, "select count(*) from confirmed where number <= 30")?.parse()?;
    ensure_eq!(found, confirmed, "confirmed transactions that are there");
    let sums = "select (select sum(abalance) from pgbench_accounts) = sum(delta),
        (select sum(tbalance) from pgbench_tellers) = sum(delta),
        (select sum(bbalance) from pgbench_branches) = sum(delta), count(*) > 10 from pgbench_history";
    ensure_eq!(ask(&container, sums)?, "t|t|t|t", "sums of the benchmark's tables");
    // It ends cleanly when it is asked to (smart shutdown), and says so.
    container.call(&["kill", &container.id, "TERM"])?.output()?;
    ensure_eq!(container.wait()?, 0, "exit status after SIGTERM");
    container.delete()?;
    before.check()
}

fn nginx_serves_a_large_file(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let mib = if scene.is_soak() { 1024 } else { 64 };
    let volume = scene.make_directory("volume")?;
    let file = volume.join("file");
    // Nothing that a hole or a page of zeros could be taken for.
    let script = "import sys; f = open(sys.argv[1], 'wb'); \
        [f.write(i.to_bytes(8, 'big') * 131072) for i in range(1, int(sys.argv[2]) + 1)]";
    let words = ["python3", "-c", script, &file.to_string_lossy(), &mib.to_string()].map(Into::into);
    Running::start(&words, &[])?.wait_within(DEADLINE)?.output()?;
    fs::write(
        volume.join("nginx.conf"),
        "user www-data; daemon off; pid /run/nginx.pid; error_log stderr; events {}
         http { access_log off; sendfile on; client_body_temp_path /run/a; proxy_temp_path /run/b; fastcgi_temp_path /run/c;
                uwsgi_temp_path /run/d; scgi_temp_path /run/e; server { listen 80; root /srv; } }",
    )?;
    let (pod, lan) = (Netns::new(scene, "pod")?, Netns::new(scene, "lan")?);
    pod.connect("eth0", &["10.88.0.2/24"], &lan, "lan0", &["10.88.0.1/24"])?;
    let namespaces = ["mount", "pid", "ipc", "uts", "cgroup"].map(|kind| json!({ "type": kind }));
    let bundle = scene.bundle_on(Path::new(SERVICES))?.bind(&volume, "/srv", &["bind", "ro"]).capabilities(&SERVER);
    let bundle = tmpfs(bundle, "/run").set("/linux/namespaces", json!(namespaces));
    let bundle = bundle.push("/linux/namespaces", json!({ "type": "network", "path": pod.path }));
    let container = Container::make(scene, &bundle.args(&["nginx", "-c", "/srv/nginx.conf"]), &["run", "-d"])?;
    wait_for(&container, &["curl", "-sf", "-r", "0-0", "-o", "/dev/null", "http://127.0.0.1/file"])?;
    let fetch = format!("curl -sSf http://10.88.0.2/file | cmp - {} && echo same", file.display());
    let same = lan.start(&["sh", "-c", &fetch])?.wait_within(DEADLINE * 6)?.output()?;
    ensure_eq!(same, "same\n", "what came");
    // A part of it, and nothing.
    let part = lan.run(&["curl", "-sSf", "-r", "1048576-1048583", "http://10.88.0.2/file"])?.output()?;
    ensure_eq!(part.as_bytes(), 2u64.to_be_bytes(), "eight bytes from the middle");
    lan.run(&["curl", "-sf", "http://10.88.0.2/none"])?.expect_status(22)?;
    container.call(&["kill", &container.id, "QUIT"])?.output()?;
    ensure_eq!(container.wait()?, 0, "exit status after SIGQUIT");
    container.delete()?;
    drop((pod, lan));
    before.check()
}

fn redis_under_its_benchmark(scene: &Scene) -> Outcome {
    let script = "
set -e
cd /run
redis-server --port 0 --unixsocket /run/redis.sock --save '' --daemonize yes --logfile /run/log
until redis-cli -s /run/redis.sock ping >/dev/null 2>&1; do sleep 0.1; done
redis-benchmark -s /run/redis.sock -q -n $REQUESTS -c 20 -P 8 -t set,get,incr,lpush >/run/report
tr '\\r' '\\n' </run/report | grep -c 'requests per second'
redis-cli -s /run/redis.sock get key:__rand_int__ | wc -c
redis-cli -s /run/redis.sock shutdown nosave";
    let requests = if scene.is_soak() { 100_000 } else { 5_000 };
    let script = script.replace("$REQUESTS", &requests.to_string());
    let bundle = tmpfs(scene.bundle_on(Path::new(SERVICES))?, "/run").capabilities(&SERVER).sh(&script);
    let found = scene.start(&bundle)?.wait_within(DEADLINE * 4)?.output()?;
    ensure_eq!(found, "4\n4\n", "benchmarks that ended, and bytes of a value");
    Ok(())
}

/// The virtual machine of Java sizes itself by its control group, and by the processors there are.
fn java_finds_its_limits(scene: &Scene) -> Outcome {
    let program = "
import java.util.concurrent.*;
public class Main {
    public static void main(String[] args) throws Exception {
        var runtime = Runtime.getRuntime();
        System.out.println(runtime.maxMemory() / 1048576 + \" \" + runtime.availableProcessors());
        try (var pool = Executors.newFixedThreadPool(8)) {
            var sums = new java.util.ArrayList<Future<Long>>();
            for (int i = 0; i < 8; i++) {
                final long seed = i;
                sums.add(pool.submit(() -> {
                    long sum = 0;
                    for (int j = 0; j < 64; j++) { byte[] data = new byte[1 << 20]; data[j] = (byte) seed; sum += data[j]; }
                    return sum;
                }));
            }
            long total = 0;
            for (var sum : sums) total += sum.get();
            System.out.println(total);
        }
    }
}";
    let directory = scene.make_directory("java")?;
    fs::write(directory.join("Main.java"), program)?;
    let bundle = scene.bundle_on(Path::new(SYSTEM))?.bind(&directory, "/srv", &["bind", "ro"]);
    let limits = json!({ "memory": { "limit": 400 << 20 }, "cpu": { "quota": 100_000, "period": 100_000 } });
    let bundle = tmpfs(bundle, "/tmp").set("/linux/resources", limits);
    let words = ["java", "-XX:MaxRAMPercentage=50", "-XX:TieredStopAtLevel=1", "/srv/Main.java"];
    let found = scene.start(&bundle.args(&words))?.wait_within(DEADLINE * 4)?.output()?;
    let (first, rest) = found.split_once('\n').ok_or("no line")?;
    let (heap, processors) = first.split_once(' ').ok_or("one word")?;
    let heap: u64 = heap.parse()?;
    ensure!((150..=200).contains(&heap), "{heap} MiB of heap with 400 MiB of memory");
    ensure_eq!((processors, rest), ("1", "1792\n"), "processors, and the sum");
    Ok(())
}

/// As a system container: systemd is the first process, and comes up without one failed unit.
fn systemd_boots(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    // As others have them for such containers: the kernel's modules are not theirs to load.
    let names: Vec<_> = ALL_CAPABILITIES.into_iter().filter(|name| *name != "CAP_SYS_MODULE").collect();
    let mut bundle = scene.bundle_on(Path::new(SYSTEM))?.privileged().capabilities(&names);
    for place in ["/run", "/tmp", "/var/log", "/var/lib/systemd"] {
        bundle = tmpfs(bundle, place);
    }
    let bundle = bundle.set("/process/env", json!(["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "container=podhull"]));
    // It says itself when it is up: who executes a program in it before keeps it from handing control groups on.
    let (units, said) = (scene.make_directory("units")?, scene.make_directory("said")?);
    let unit = "[Service]\nExecStart=sh -c 'systemctl is-system-running --wait >/srv/new; \
                systemctl --failed --no-legend --plain >>/srv/new; mv /srv/new /srv/state'\n";
    fs::write(units.join("say.service"), unit)?;
    fs::create_dir(units.join("multi-user.target.wants"))?;
    symlink("../say.service", units.join("multi-user.target.wants/say.service"))?;
    let bundle = bundle.bind(&units, "/etc/systemd/system", &["bind", "ro"]).bind(&said, "/srv", &["bind"]);
    let container = Container::make(scene, &bundle.args(&["/lib/systemd/systemd"]), &["run", "-d"])?;
    let until = Instant::now() + DEADLINE * 2;
    let state = said.join("state");
    while !state.exists() {
        ensure!(Instant::now() < until, "it did not come up; it says {:?}", container.output()?);
        thread::sleep(Duration::from_millis(200));
    }
    ensure_eq!(fs::read_to_string(state)?, "running\n", "state of the system, and failed units");
    let words = ["exec", &container.id, "systemd-run", "--wait", "--pipe", "-p", "MemoryMax=64M", "sh", "-c"];
    let script = "cat /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/memory.max";
    let unit = container.call(&[&words[..], &[script]].concat())?.output()?;
    ensure_eq!(unit, "67108864\n", "limit of a unit inside");
    // SIGRTMIN+3 is what stops it.
    container.call(&["kill", &container.id, "SIGRTMIN+3"])?.output()?;
    container.wait()?;
    container.delete()?;
    before.check()
}

fn sandboxes_and_runtimes_inside(scene: &Scene) -> Outcome {
    let script = "
set -e
unshare --user --map-root-user --pid --fork --mount-proc sh -c 'echo unshare $$ $(id -u)'
bwrap --ro-bind / / --dev /dev --proc /proc --unshare-all --die-with-parent sh -c 'echo bwrap $(id -u) $(hostname | wc -l)'
mkdir -p /tmp/bundle/rootfs
mount --rbind / /tmp/bundle/rootfs
cd /tmp/bundle
crun spec
sed -i 's|\"terminal\": true|\"terminal\": false|; s|\"sh\"|\"sh\", \"-c\", \"echo crun $$ $(hostname)\"|' config.json
crun --cgroup-manager=cgroupfs run nested
";
    let bundle = scene.bundle_on(Path::new(SYSTEM))?.privileged();
    let bundle = tmpfs(tmpfs(bundle, "/tmp"), "/run");
    let found = scene.run(&bundle.sh(script))?.output()?;
    ensure_eq!(found, "unshare 1 0\nbwrap 0 1\ncrun 1 crun\n", "what was said inside");
    Ok(())
}
