//! A cluster of one node: etcd, the server, what makes and places pods, containerd and kubelet, all on this host and where they are
//! by default. It takes the host for itself.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::image;
use crate::run::{Ended, Running};
use crate::suite::Scene;
use crate::{Outcome, ensure};

/// How long what starts may take to answer, and what is waited for in the cluster to come about.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Name of the node.
pub const NODE: &str = "node1";

/// Address of the node, which is on an interface of its own.
pub const ADDRESS: &str = "10.0.2.15";

/// Where pods expect the server.
const SERVICE: &str = "10.96.0.1";

/// What pods' own container runs.
const PAUSE: &str = "podhull.test/pause:latest";

/// The programs of the cluster, in the order they start; the last that starts is the first to end.
pub struct Cluster {
    programs: PathBuf,
    directory: PathBuf,
    running: Vec<(&'static str, Running)>,
}

impl Cluster {
    /// Starts it, with the programs in a directory.
    pub fn start(programs: &Path, scene: &Scene) -> Outcome<Self> {
        let directory = scene.make_directory("cluster")?;
        let mut cluster = Self { programs: programs.into(), directory, running: Vec::new() };
        cluster.network()?;
        cluster.containerd(scene)?;
        cluster.server()?;
        cluster.node()?;
        Ok(cluster)
    }

    /// A file of the cluster's own.
    fn path(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    /// Starts a program, and keeps it.
    fn spawn(&mut self, name: &'static str, arguments: &[String]) -> Outcome {
        let own = self.programs.join(name);
        let program = if own.exists() { own.into_os_string() } else { name.into() };
        let words: Vec<OsString> = [program].into_iter().chain(arguments.iter().map(Into::into)).collect();
        self.running.push((name, Running::start(&words, &[])?));
        Ok(())
    }

    /// What a program has said so far.
    pub fn said(&self, name: &str) -> String {
        self.running.iter().filter(|(other, _)| *other == name).map(|(_, running)| running.stderr()).collect()
    }

    /// Keeps what all programs said.
    pub fn keep_logs(&self, directory: &Path) -> Outcome {
        for (name, running) in &self.running {
            fs::write(directory.join(format!("{name}.log")), running.stderr())?;
        }
        Ok(())
    }

    /// Waits until a program of the host succeeds.
    fn until(&self, what: &'static str, words: &[&str]) -> Outcome {
        let until = Instant::now() + PATIENCE;
        loop {
            let ended = run(words)?;
            if ended.status == 0 {
                return Ok(());
            }
            let runs = self.running.iter().any(|(name, running)| *name == what && running.runs());
            let said = self.said(what);
            let start = said.len().saturating_sub(3000);
            ensure!(
                runs && Instant::now() < until,
                "{what} is not ready: {ended:?}; it says {}",
                said.get(start..).unwrap_or_default()
            );
            thread::sleep(Duration::from_secs(1));
        }
    }

    /// The node's address, the network of its pods, and the server where pods look for it: nothing here makes other services.
    fn network(&self) -> Outcome {
        let address = format!("{ADDRESS}/24");
        let to = format!("{ADDRESS}:6443");
        for words in [
            &["ip", "link", "add", "node0", "type", "dummy"][..],
            &["ip", "address", "add", &address, "dev", "node0"],
            &["ip", "link", "set", "node0", "up"],
            &["sysctl", "-qw", "net.ipv4.ip_forward=1"],
            &[
                "iptables",
                "-t",
                "nat",
                "-A",
                "PREROUTING",
                "-d",
                SERVICE,
                "-p",
                "tcp",
                "--dport",
                "443",
                "-j",
                "DNAT",
                "--to-destination",
                &to,
            ],
        ] {
            run(words)?.output()?;
        }
        fs::create_dir_all("/etc/cni/net.d")?;
        let plugins = json!({
            "cniVersion": "0.4.0",
            "name": "pods",
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": "cni0",
                    "isGateway": true,
                    "ipMasq": true,
                    "hairpinMode": true,
                    "ipam": {
                        "type": "host-local",
                        "ranges": [[{ "subnet": "10.88.9.0/24" }]],
                        "routes": [{ "dst": "0.0.0.0/0" }],
                    },
                },
                { "type": "portmap", "capabilities": { "portMappings": true } },
            ],
        });
        Ok(fs::write("/etc/cni/net.d/10-pods.conflist", plugins.to_string())?)
    }

    /// containerd as Debian's runs, told of podhull as the page for users says, with the images of pods.
    fn containerd(&mut self, scene: &Scene) -> Outcome {
        let page = include_str!("../../../docs/kubernetes.md");
        let documented = page.split("```toml\n").nth(1).and_then(|rest| rest.split_once("```"));
        let (documented, _) = documented.ok_or("no configuration on the page")?;
        let service = "plugins.\"io.containerd.grpc.v1.cri\"";
        let config = format!(
            "version = 2\n[{service}]\nsandbox_image = {PAUSE:?}\n[{service}.cni]\nbin_dir = \"/usr/lib/cni\"\n\
             [{service}.containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n{documented}",
        );
        fs::create_dir_all("/etc/containerd")?;
        fs::write("/etc/containerd/config.toml", config)?;
        self.spawn("containerd", &[])?;
        self.until("containerd", &["ctr", "version"])?;
        for archive in [image::busybox(scene)?, image::pause(scene, PAUSE)?] {
            self.import(&archive)?;
        }
        Ok(())
    }

    /// Gives the node an image.
    pub fn import(&self, archive: &Path) -> Outcome {
        run(&["ctr", "--namespace", "k8s.io", "image", "import", &archive.to_string_lossy()])?.output().map(drop)
    }

    /// etcd and the server, whose keys are made now.
    fn server(&mut self) -> Outcome {
        let (key, tokens, certificates) = (self.path("accounts.key"), self.path("tokens"), self.path("certificates"));
        // In the older of its two forms, which alone the server takes for checking tokens too.
        run(&["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", &key])?.output()?;
        let token = fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned();
        fs::write(&tokens, format!("{token},admin,admin,system:masters\n"))?;
        let data = self.path("etcd");
        self.spawn("etcd", &["--data-dir".into(), data, "--unsafe-no-fsync".into()])?;
        let options = format!(
            "--etcd-servers http://127.0.0.1:2379 --service-cluster-ip-range 10.96.0.0/24 --secure-port 6443 \
             --advertise-address {ADDRESS} --cert-dir {certificates} --token-auth-file {tokens} --authorization-mode RBAC \
             --service-account-issuer https://podhull.test --service-account-signing-key-file {key} \
             --service-account-key-file {key} --allow-privileged --feature-gates EphemeralContainers=true \
             --kubelet-preferred-address-types InternalIP"
        );
        self.spawn("kube-apiserver", &words(&options))?;
        self.until("kube-apiserver", &["curl", "-skf", "-m", "20", &format!("https://{ADDRESS}:6443/readyz")])?;
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{
                "name": "test",
                "cluster": {
                    "server": format!("https://{ADDRESS}:6443"),
                    "certificate-authority": format!("{certificates}/apiserver.crt"),
                },
            }],
            "users": [{ "name": "admin", "user": { "token": token } }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "admin" } }],
            "current-context": "test",
        });
        fs::write(self.path("kubeconfig"), config.to_string())?;
        let kubeconfig = self.path("kubeconfig");
        let options = format!(
            "--kubeconfig {kubeconfig} --leader-elect=false --secure-port 0 --port 0 \
             --service-account-private-key-file {key} --root-ca-file {certificates}/apiserver.crt"
        );
        self.spawn("kube-controller-manager", &words(&options))?;
        let options = format!("--kubeconfig {kubeconfig} --leader-elect=false --secure-port 0 --port 0");
        self.spawn("kube-scheduler", &words(&options))
    }

    /// kubelet, until the server has a node that is ready.
    fn node(&mut self) -> Outcome {
        let config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "cgroupDriver": "cgroupfs",
            "failSwapOn": false,
            // Who asks it has no certificate of its own here; nobody else is on this network.
            "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
            "authorization": { "mode": "AlwaysAllow" },
            "clusterDNS": ["10.96.0.10"],
            "clusterDomain": "cluster.local",
            "evictionHard": { "memory.available": "10Mi" },
            "featureGates": { "EphemeralContainers": true, "SizeMemoryBackedVolumes": true },
            "syncFrequency": "10s",
        });
        fs::write(self.path("kubelet.json"), config.to_string())?;
        // One more than it keeps otherwise: it counts what is created and does not run yet among the dead, so in the seconds that a
        // container of either class needs here to start it may remove the one before, whose logs are wanted.
        let options = format!(
            "--config {} --kubeconfig {} --container-runtime remote --node-ip {ADDRESS} --hostname-override {NODE} --v 2 \
             --container-runtime-endpoint unix:///run/containerd/containerd.sock --maximum-dead-containers-per-container 2",
            self.path("kubelet.json"),
            self.path("kubeconfig"),
        );
        self.spawn("kubelet", &words(&options))?;
        let node = format!("node/{NODE}");
        self.until("kubelet", &["curl", "-sf", "-m", "20", "http://127.0.0.1:10248/healthz"])?;
        self.kubectl(&["wait", "--for=create", &node, "--timeout=200s"])?.output()?;
        self.kubectl(&["wait", "--for=condition=Ready", &node, "--timeout=200s"])?.output().map(drop)
    }

    /// kubectl, started.
    pub fn start_kubectl(&self, words: &[&str]) -> Outcome<Running> {
        let program = self.programs.join("kubectl");
        let words: Vec<OsString> = [program.into_os_string()].into_iter().chain(words.iter().map(Into::into)).collect();
        Running::start(&words, &[("KUBECONFIG", self.path("kubeconfig").into())])
    }

    /// kubectl, to its end.
    pub fn kubectl(&self, words: &[&str]) -> Outcome<Ended> {
        self.start_kubectl(words)?.wait_within(PATIENCE)
    }

    /// kubectl with something on its standard input, to its end.
    pub fn kubectl_with(&self, words: &[&str], input: &str) -> Outcome<Ended> {
        let mut running = self.start_kubectl(words)?;
        running.send(input.as_bytes())?;
        running.wait_within(PATIENCE)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        while self.running.pop().is_some() {}
    }
}

/// A program of the host, to its end.
pub fn run(words: &[&str]) -> Outcome<Ended> {
    Running::start(&words.iter().map(Into::into).collect::<Vec<_>>(), &[])?.wait()
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}
