//! containerd as kubelet uses it: through the Container Runtime Interface, with pods on a network of CNI's plugins.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use k8s_cri::v1 as api;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use rustix::process::Pid;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::cni::Network;
use crate::containerd::{self, Containerd, Shim};
use crate::leaks::Leaks;
use crate::netns::Netns;
use crate::run::{DEADLINE, Running};
use crate::suite::Scene;
use crate::{Outcome, ensure, ensure_eq, image};

/// How long a call may take: that of a pod with a machine and its network.
const CALL: Duration = Duration::from_secs(180);

/// What pods' own container runs.
const PAUSE: &str = "podhull.test/pause:latest";

/// Group of all pods, as kubelet has one.
const PODS: &str = "/sys/fs/cgroup/kubepods";

/// Where podhull knows its containers.
pub const STATE: &str = "/run/containerd/podhull/k8s.io";

/// Waits until it is told to end, and then exits with 3. When it listens to signals there is `/ready`, where it may write that.
/// It does nothing meanwhile: to start a program ten times in a second, in thirty pods, leaves an emulated processor nothing.
pub const PATIENT: &[&str] =
    &["sh", "-c", "trap 'exit 3' TERM; touch /ready 2>/dev/null; while :; do sleep 1000 & wait; done"];

/// What answers when pods are made.
pub struct Cri {
    containerd: Containerd,
    tokio: tokio::runtime::Runtime,
    channel: Channel,
    directory: PathBuf,
    /// Name of the class of pods.
    handler: &'static str,
    /// The network of the host that the pods are on.
    pub netns: Netns,
    before: Leaks,
}

/// A pod that runs.
pub struct Pod {
    /// Its id.
    pub id: String,
    /// What was asked for.
    pub config: api::PodSandboxConfig,
}

/// How a program ended that was executed.
#[derive(Debug, PartialEq, Eq)]
pub struct Executed {
    /// Its exit status.
    pub status: i32,
    /// What it wrote on standard output.
    pub stdout: String,
    /// What it wrote on standard error.
    pub stderr: String,
}

impl Cri {
    /// Starts containerd, with the shim of podhull for pods of the class `kata`; the program under test may be runc instead.
    pub fn start(scene: &Scene) -> Outcome<Self> {
        Self::begin(scene, None, |addresses| vec![Network::usual(addresses)])
    }

    /// The same with a configuration for podhull's class.
    pub fn with_class(scene: &Scene, class: &Path) -> Outcome<Self> {
        Self::begin(scene, Some(class), |addresses| vec![Network::usual(addresses)])
    }

    /// The same with other networks, of which each pod has one interface each. What is given to them is a directory for their own.
    pub fn with_networks(scene: &Scene, networks: impl FnOnce(&Path) -> Vec<Network>) -> Outcome<Self> {
        Self::begin(scene, None, networks)
    }

    fn begin(scene: &Scene, class: Option<&Path>, networks: impl FnOnce(&Path) -> Vec<Network>) -> Outcome<Self> {
        let before = Leaks::watch();
        let directory = scene.make_directory("cri")?;
        let netns = Netns::new(scene, "node")?;
        let configurations = directory.join("cni");
        fs::create_dir(&configurations)?;
        let networks = networks(&directory.join("addresses"));
        let count = networks.len();
        for (number, network) in networks.into_iter().enumerate() {
            fs::write(configurations.join(format!("{number}.conflist")), network.file(&format!("test-{number}")))?;
        }
        let (handler, shim) = if scene.runtime.is_virtual() { ("kata", Shim::Podhull) } else { ("runc", Shim::Runc) };
        let (service, runtime, image, programs) = match containerd::major()? {
            1 => {
                let service = "plugins.\"io.containerd.grpc.v1.cri\"";
                (service, service, format!("sandbox_image = {PAUSE:?}"), "bin_dir = \"/usr/lib/cni\"")
            }
            _ => {
                let (service, plugins) = ("plugins.\"io.containerd.grpc.v1.cri\"", "plugins.\"io.containerd.cri.v1");
                let image = format!("[{plugins}.images\".pinned_images]\nsandbox = {PAUSE:?}");
                (service, "plugins.\"io.containerd.cri.v1.runtime\"", image, "bin_dirs = [\"/usr/lib/cni\"]")
            }
        };
        let more = format!(
            "[{service}]\nstream_server_address = \"127.0.0.1\"\nstream_server_port = \"0\"\n{image}\n\
             [{runtime}.containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\
             [{runtime}.containerd.runtimes.runc.options]\nSystemdCgroup = {}\n\
             [{runtime}.cni]\n{programs}\nmax_conf_num = {count}\nconf_dir = {:?}\n{}\n{}",
            // Other runtimes see by the form of a group whose it is.
            Path::new("/run/systemd/system").is_dir(),
            configurations.display().to_string(),
            documented()?,
            class.map_or_else(String::new, |class| {
                format!("[{runtime}.containerd.runtimes.kata.options]\nConfigPath = {class:?}")
            }),
        );
        fs::create_dir_all(PODS)?;
        let containerd = Containerd::with_config(scene, shim, &[], &more, Some(&netns))?;
        let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let channel = connect(&tokio, &containerd)?;
        let cri = Self { containerd, tokio, channel, directory, handler, netns, before };
        for archive in [image::busybox(scene)?, image::pause(scene, PAUSE)?] {
            cri.import(&archive)?;
        }
        cri.ready()?;
        Ok(cri)
    }

    /// Ends containerd, asked to or killed; does something without it, and starts it again.
    pub fn without_containerd(&mut self, killed: bool, meanwhile: impl FnOnce() -> Outcome) -> Outcome {
        if killed {
            self.containerd.kill_daemon()?
        } else {
            self.containerd.stop_daemon()?
        }
        meanwhile()?;
        self.containerd.start_daemon()?;
        self.channel = connect(&self.tokio, &self.containerd)?;
        self.ready()
    }

    /// containerd's own client on what is made here, running.
    pub fn client(&self, words: &[&str]) -> Outcome<Running> {
        Running::start(&self.containerd.words(&[&["--namespace", "k8s.io"], words].concat()), &[])
    }

    /// What containerd tells of what is made here, from now on.
    pub fn events(&self) -> Outcome<Running> {
        self.containerd.events("k8s.io")
    }

    /// The process of the host that stands for a container.
    pub fn process(&self, id: &str) -> Outcome<i32> {
        let request = api::ContainerStatusRequest { container_id: id.into(), verbose: true };
        let answer = self.call(async |mut client| client.container_status(request).await)?;
        let info: serde_json::Value = serde_json::from_str(answer.info.get("info").ok_or("no information")?)?;
        let pid = info["pid"].as_i64().and_then(|pid| pid.try_into().ok());
        Ok(pid.filter(|pid| *pid > 0).ok_or_else(|| format!("no process of {id}: {info}"))?)
    }

    /// Gives it a further image.
    pub fn import(&self, archive: &Path) -> Outcome {
        let words = ["--namespace", "k8s.io", "image", "import", &archive.to_string_lossy()];
        self.containerd.call(&words)?.output().map(drop)
    }

    /// Waits until it has a network and images.
    fn ready(&self) -> Outcome {
        let until = Instant::now() + DEADLINE;
        loop {
            // It listens before it answers.
            let status = self.call(async |mut client| client.status(api::StatusRequest::default()).await);
            let conditions = status.map(|answer| answer.status.unwrap_or_default().conditions).unwrap_or_default();
            let images = self.containerd.call(&["--namespace", "k8s.io", "image", "list"])?.output()?;
            let known = [PAUSE, image::WHOLE_NAME].iter().all(|name| {
                images.lines().any(|line| line.starts_with(name) && line.contains("io.cri-containerd.image=managed"))
            });
            if known && !conditions.is_empty() && conditions.iter().all(|condition| condition.status) {
                return Ok(());
            }
            ensure!(Instant::now() < until, "not ready: {conditions:?}, images {images}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// One call, to its answer.
    pub fn call<T>(
        &self,
        call: impl AsyncFnOnce(RuntimeServiceClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Outcome<T> {
        let client = self.service();
        match self.tokio.block_on(async { tokio::time::timeout(CALL, call(client)).await }) {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(format!("{:?}: {}", status.code(), status.message()).into()),
            Err(_) => Err(format!("no answer within {CALL:?}").into()),
        }
    }

    /// The first two numbers of containerd's version.
    pub fn version(&self) -> Outcome<(u32, u32)> {
        let request = api::VersionRequest { version: "v1".into() };
        let text = self.call(async |mut client| client.version(request).await)?.runtime_version;
        let mut numbers = text.trim_start_matches('v').split('.').map(|number| number.parse().ok());
        match (numbers.next().flatten(), numbers.next().flatten()) {
            (Some(major), Some(minor)) => Ok((major, minor)),
            _ => Err(format!("containerd's version: {text:?}").into()),
        }
    }

    /// What a pod of this name is asked for with, as kubelet does.
    pub fn pod_config(&self, name: &str) -> Outcome<api::PodSandboxConfig> {
        let logs = self.directory.join("logs").join(name);
        fs::create_dir_all(&logs)?;
        let group = Path::new(PODS).join(format!("pod-{name}"));
        fs::create_dir_all(&group)?;
        Ok(api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: name.into(),
                uid: format!("uid-{name}"),
                namespace: "default".into(),
                attempt: 0,
            }),
            hostname: name.into(),
            log_directory: logs.display().to_string(),
            linux: Some(api::LinuxPodSandboxConfig {
                cgroup_parent: format!("/kubepods/pod-{name}"),
                security_context: Some(api::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    /// Runs one.
    pub fn run(&self, config: api::PodSandboxConfig) -> Outcome<Pod> {
        let request =
            api::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: self.handler.to_owned() };
        let id = self.call(async |mut client| client.run_pod_sandbox(request).await)?.pod_sandbox_id;
        let containers = self.containerd.call(&["--namespace", "k8s.io", "container", "list", "-q"])?.output()?;
        let of_containerd = self.handler == "runc" || sandboxer()?.is_none();
        ensure_eq!(
            containers.lines().any(|line| line == id),
            of_containerd,
            "whether the pod has a container of its own"
        );
        Ok(Pod { id, config })
    }

    /// Runs some at the same time.
    pub fn run_all(&self, configs: Vec<api::PodSandboxConfig>) -> Outcome<Vec<Pod>> {
        let running = configs.into_iter().map(|config| run(self.service(), self.handler, config));
        self.together(running)
    }

    /// Makes and starts the same container in each of some pods at the same time.
    pub fn launch_all(&self, pods: &[Pod], config: &api::ContainerConfig) -> Outcome<Vec<String>> {
        let requests = pods.iter().map(|pod| creation(pod, config.clone()));
        self.together(requests.map(|request| launch(self.service(), request)))
    }

    /// Runs some pods with the same container in each, at the same time and each for itself, as kubelet does; and how long it took until
    /// the container of each ran.
    pub fn start_all(
        &self,
        configs: Vec<api::PodSandboxConfig>,
        container: &api::ContainerConfig,
    ) -> Outcome<Vec<(Pod, Duration)>> {
        let began = Instant::now();
        let starting = configs.into_iter().map(|config| {
            let (running, client, container) =
                (run(self.service(), self.handler, config), self.service(), container.clone());
            async move {
                let pod = running.await?;
                launch(client, creation(&pod, container)).await?;
                Ok((pod, began.elapsed()))
            }
        });
        self.together(starting)
    }

    fn service(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone())
    }

    /// Calls made at the same time, to the last answer.
    fn together<T: Send + 'static>(
        &self,
        calls: impl Iterator<Item = impl Future<Output = Result<T, Status>> + Send + 'static>,
    ) -> Outcome<Vec<T>> {
        let calls: Vec<_> = calls.map(|call| self.tokio.spawn(call)).collect();
        let all = async {
            let mut answers = Vec::new();
            for call in calls {
                answers.push(call.await?.map_err(|status| format!("{:?}: {}", status.code(), status.message()))?);
            }
            Outcome::Ok(answers)
        };
        let until = async { tokio::time::timeout(2 * CALL, all).await };
        self.tokio.block_on(until).unwrap_or_else(|_| Err(format!("no answers within {:?}", 2 * CALL).into()))
    }

    /// Its state, addresses among it.
    pub fn pod_status(&self, pod: &Pod) -> Outcome<api::PodSandboxStatus> {
        let request = api::PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
        let answer = self.call(async |mut client| client.pod_sandbox_status(request).await)?;
        Ok(answer.status.ok_or("no status")?)
    }

    /// The process that stands for it.
    pub fn pod_process(&self, pod: &Pod) -> Outcome<Pid> {
        let request = api::PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
        let answer = self.call(async |mut client| client.pod_sandbox_status(request).await)?;
        let info: serde_json::Value = serde_json::from_str(answer.info.get("info").ok_or("no information")?)?;
        let pid = info["pid"].as_i64().and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
        Ok(pid.ok_or_else(|| format!("no process in {info}"))?)
    }

    /// Kills containerd, and starts it again.
    pub fn restart_daemon(&mut self) -> Outcome {
        self.containerd.kill_daemon()?;
        self.containerd.start_daemon()?;
        self.channel = connect(&self.tokio, &self.containerd)?;
        self.ready()
    }

    /// Stops and removes it.
    pub fn take_down(&self, pod: &Pod) -> Outcome {
        let pod_sandbox_id = pod.id.clone();
        let stop = api::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
        self.call(async |mut client| client.stop_pod_sandbox(stop).await)?;
        let remove = api::RemovePodSandboxRequest { pod_sandbox_id };
        self.call(async |mut client| client.remove_pod_sandbox(remove).await).map(drop)
    }

    /// Stops and removes it, and looks that nothing is left of its containers.
    pub fn remove_pod(&self, pod: &Pod) -> Outcome {
        self.take_down(pod)?;
        let name = &pod.config.metadata.as_ref().ok_or("no name")?.name;
        // The group is kubelet's, and must be empty by now.
        let group = Path::new(PODS).join(format!("pod-{name}"));
        fs::remove_dir(&group).map_err(|error| {
            let entries = fs::read_dir(&group).into_iter().flatten().flatten();
            let left: Vec<_> = entries
                .map(|entry| entry.path())
                .filter(|path| path.is_dir())
                .map(|path| {
                    let read = |file| fs::read_to_string(path.join(file)).unwrap_or_default();
                    let known = path.file_name().is_some_and(|id| Path::new(STATE).join(id).exists());
                    format!(
                        "{} (processes {:?}, {:?}, known: {known})",
                        path.display(),
                        read("cgroup.procs"),
                        read("cgroup.events")
                    )
                })
                .collect();
            let complaints = self.containerd.complaints();
            format!("control group of pod {name}: {error}: {left:?}; containerd says {complaints}")
        })?;
        Ok(())
    }

    /// Makes a container in a pod.
    pub fn create(&self, pod: &Pod, config: api::ContainerConfig) -> Outcome<String> {
        let request = creation(pod, config);
        Ok(self.call(async |mut client| client.create_container(request).await)?.container_id)
    }

    /// Starts it.
    pub fn start_container(&self, id: &str) -> Outcome {
        let request = api::StartContainerRequest { container_id: id.into() };
        self.call(async |mut client| client.start_container(request).await).map(drop)
    }

    /// Makes and starts one.
    pub fn launch(&self, pod: &Pod, config: api::ContainerConfig) -> Outcome<String> {
        let id = self.create(pod, config)?;
        self.start_container(&id)?;
        Ok(id)
    }

    /// Stops it, killing it after so many seconds.
    pub fn stop(&self, id: &str, timeout: i64) -> Outcome {
        let request = api::StopContainerRequest { container_id: id.into(), timeout };
        self.call(async |mut client| client.stop_container(request).await).map(drop)
    }

    /// Removes it.
    pub fn remove(&self, id: &str) -> Outcome {
        let request = api::RemoveContainerRequest { container_id: id.into() };
        self.call(async |mut client| client.remove_container(request).await).map(drop)
    }

    /// Its state.
    pub fn status(&self, id: &str) -> Outcome<api::ContainerStatus> {
        let request = api::ContainerStatusRequest { container_id: id.into(), verbose: false };
        let answer = self.call(async |mut client| client.container_status(request).await)?;
        Ok(answer.status.ok_or("no status")?)
    }

    /// Waits for its end.
    pub fn ended(&self, id: &str) -> Outcome<api::ContainerStatus> {
        let until = Instant::now() + DEADLINE;
        loop {
            let status = self.status(id)?;
            if status.state() == api::ContainerState::ContainerExited {
                return Ok(status);
            }
            ensure!(Instant::now() < until, "{id} does not end: {status:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Executes a program in it, to its end; 0 seconds are no limit.
    pub fn exec(&self, id: &str, words: &[&str], timeout: i64) -> Outcome<Executed> {
        let cmd = words.iter().map(|word| (*word).to_owned()).collect();
        let request = api::ExecSyncRequest { container_id: id.into(), cmd, timeout };
        let answer = self.call(async |mut client| client.exec_sync(request).await)?;
        Ok(Executed {
            status: answer.exit_code,
            stdout: String::from_utf8(answer.stdout)?,
            stderr: String::from_utf8(answer.stderr)?,
        })
    }

    /// What a shell says that is executed in it, and succeeds.
    pub fn shell(&self, id: &str, script: &str) -> Outcome<String> {
        let ended = self.exec(id, &["sh", "-c", script], 0)?;
        ensure_eq!(ended.status, 0, "{script}: {ended:?}");
        Ok(ended.stdout)
    }

    /// The log of a container as kubelet reads it: time, stream, tag, text.
    pub fn log(&self, pod: &Pod, name: &str) -> Outcome<String> {
        Ok(fs::read_to_string(Path::new(&pod.config.log_directory).join(name))?)
    }

    /// Ends it, and looks that nothing is left.
    pub fn end(self) -> Outcome {
        self.check_network()?;
        self.containerd.end()?;
        drop(self.netns);
        let own = [
            "/run/netns",
            "/run/containerd/podhull/k8s.io/pods",
            "/run/containerd/podhull/k8s.io",
            PODS,
            "/run/containerd/runc/k8s.io/pods",
            "/run/containerd/runc/k8s.io",
        ];
        self.before.check_without(&[&own[..], &containerd::OWN].concat())
    }

    /// The node has bridges, nothing that is on them, and no address is given to anybody: with its namespace what is left would go
    /// unseen.
    fn check_network(&self) -> Outcome {
        let all = self.netns.ip("-o link")?;
        let own = self.netns.ip("-o link show type bridge")?;
        let name = |line: &str| line.split(": ").nth(1).unwrap_or_default().to_owned();
        let own: Vec<_> = own.lines().map(name).chain(["lo".to_owned()]).collect();
        let left: Vec<_> = all.lines().map(name).filter(|name| !own.contains(name)).collect();
        ensure!(left.is_empty(), "network devices that are left on the node: {left:?}");
        let addresses = self.directory.join("addresses");
        for network in names(&addresses) {
            let mut leases = names(&addresses.join(network));
            // What the plugin keeps for itself.
            leases.retain(|name| name != "lock" && !name.starts_with("last_reserved_ip."));
            ensure!(leases.is_empty(), "addresses that are still given away: {leases:?}");
        }
        Ok(())
    }
}

/// Removes the group that kubelet makes for the pod of this name, as soon as nothing is in it any more.
pub fn remove_group(name: &str, within: Duration) -> Outcome {
    let (group, until) = (Path::new(PODS).join(format!("pod-{name}")), Instant::now() + within);
    while let Err(error) = fs::remove_dir(&group) {
        ensure!(Instant::now() < until, "control group of pod {name}: {error}");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

async fn run(
    mut client: RuntimeServiceClient<Channel>,
    handler: &str,
    config: api::PodSandboxConfig,
) -> Result<Pod, Status> {
    let request = api::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_owned() };
    let id = client.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
    Ok(Pod { id, config })
}

async fn launch(
    mut client: RuntimeServiceClient<Channel>,
    request: api::CreateContainerRequest,
) -> Result<String, Status> {
    let id = client.create_container(request).await?.into_inner().container_id;
    client.start_container(api::StartContainerRequest { container_id: id.clone() }).await?;
    Ok(id)
}

/// What a container is asked for with.
fn creation(pod: &Pod, config: api::ContainerConfig) -> api::CreateContainerRequest {
    api::CreateContainerRequest {
        pod_sandbox_id: pod.id.clone(),
        config: Some(config),
        sandbox_config: Some(pod.config.clone()),
    }
}

/// Names of what is in a directory, if it is there.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn connect(tokio: &tokio::runtime::Runtime, containerd: &Containerd) -> Outcome<Channel> {
    let endpoint = Endpoint::try_from(format!("unix://{}", containerd.socket().display()))?;
    Ok(tokio.block_on(endpoint.connect())?)
}

/// As pods have them that ask for nothing: one network, one IPC, and processes apart.
pub fn namespaces() -> api::NamespaceOption {
    api::NamespaceOption {
        network: api::NamespaceMode::Pod.into(),
        pid: api::NamespaceMode::Container.into(),
        ipc: api::NamespaceMode::Pod.into(),
        ..Default::default()
    }
}

/// A container of the image, by this name, which logs to a file of the same.
pub fn container(name: &str, command: &[&str]) -> api::ContainerConfig {
    api::ContainerConfig {
        metadata: Some(api::ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(api::ImageSpec { image: image::WHOLE_NAME.into(), ..Default::default() }),
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        log_path: name.into(),
        linux: Some(api::LinuxContainerConfig {
            resources: Some(api::LinuxContainerResources::default()),
            security_context: Some(api::LinuxContainerSecurityContext {
                namespace_options: Some(namespaces()),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

/// One of [`image::of_debian`], in which Python is, beside volumes.
pub fn with_python(name: &str, command: &[&str], mut mounts: Vec<api::Mount>) -> api::ContainerConfig {
    let [host, inside, _] = [0, 1, 2].map(|n| image::DEBIAN_PROGRAMS.split(':').nth(n).unwrap_or_default());
    mounts.push(volume(Path::new(host), inside, true));
    let image = Some(api::ImageSpec { image: "localhost/debian:latest".into(), ..Default::default() });
    api::ContainerConfig { image, mounts, ..container(name, command) }
}

/// The security context of a container's configuration.
pub fn security(config: &mut api::ContainerConfig) -> &mut api::LinuxContainerSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

/// The limits of a container's configuration.
pub fn resources(config: &mut api::ContainerConfig) -> &mut api::LinuxContainerResources {
    config.linux.get_or_insert_default().resources.get_or_insert_default()
}

/// Who makes pods, by containerd's name of that: with `shim` in `$PODHULL_TEST_SANDBOXER` it is podhull's shim by itself, else
/// containerd with a container of its own in each.
pub fn sandboxer() -> Outcome<Option<String>> {
    match std::env::var("PODHULL_TEST_SANDBOXER") {
        Ok(name) if name == "shim" => Ok(Some(name)),
        Ok(name) => Err(format!("PODHULL_TEST_SANDBOXER={name}: only shim is known").into()),
        Err(_) => Ok(None),
    }
}

/// The runtime class, as the page for users says it is told to the containerd that is here.
fn documented() -> Outcome<String> {
    let page = include_str!("../../docs/kubernetes.md");
    let blocks = page.split("```toml\n").skip(1).filter_map(|rest| rest.split_once("```"));
    let [first, second, third] = blocks.map(|(block, _)| block).collect::<Vec<_>>()[..] else {
        return Err("not three configurations on the page".into());
    };
    match (containerd::major()?, sandboxer()?) {
        (1, None) => Ok(first.into()),
        (1, Some(_)) => Err("containerd 1 has no sandboxer".into()),
        (_, None) => Ok(second.into()),
        (_, Some(_)) => Ok(format!("{second}{third}")),
    }
}

/// A path of the host in a container, as kubelet gives volumes to it.
pub fn volume(host: &Path, container: &str, readonly: bool) -> api::Mount {
    api::Mount {
        host_path: host.display().to_string(),
        container_path: container.into(),
        readonly,
        ..Default::default()
    }
}
