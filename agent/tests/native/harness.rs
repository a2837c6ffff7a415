//! An agent on this machine, and what to do with it.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use podhull_protocol::{
    AgentClient, CreateContainerRequest, CreatePodRequest, CreatePodResponse, DeleteContainerRequest,
    DeleteProcessRequest, Empty, Event, EventsRequest, ExecProcessRequest, Exit, ResizeTerminalRequest,
    SignalContainerRequest, SignalProcessRequest, StartContainerRequest, Stdio, VERSION,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use ttrpc::r#async::{Client, ClientStreamReceiver};
use ttrpc::context;

/// Longer than anything here takes, emulated or not.
pub const DEADLINE: Duration = Duration::from_secs(30);

static NUMBER: AtomicU64 = AtomicU64::new(1);

/// Where cgroup v2 is mounted: alone, or beside version 1.
pub fn cgroup2() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    PathBuf::from(line.expect("these tests need cgroup2 mounted").split(' ').nth(1).unwrap())
}

/// To the real standard error: what is printed by a test that passes is not shown.
#[expect(clippy::explicit_write, reason = "the harness of tests would swallow it")]
fn say(what: &str) {
    let test = std::thread::current();
    let name = test.name().unwrap_or_default();
    writeln!(std::io::stderr(), "NOT TESTED: {name}: {what}; run it in the software host").unwrap();
}

/// Says loudly that a test cannot be run here, and why; then the caller returns.
pub fn lacks_controller(name: &str) -> bool {
    let controllers = std::fs::read_to_string(cgroup2().join("cgroup.controllers")).unwrap();
    let lacks = !controllers.split_ascii_whitespace().any(|controller| controller == name);
    if lacks {
        assert!(
            std::env::var_os("PODHULL_TEST_EVERYTHING").is_none(),
            "the controller {name} of cgroup v2 is missing, and PODHULL_TEST_EVERYTHING is set"
        );
        say(&format!("the controller {name} of cgroup v2 is not available"));
    }
    lacks
}

/// Number of the capability that raises limits, and sets those of other users' processes.
pub const SYS_RESOURCE: u32 = 24;

/// Says loudly that a test cannot be run here, because the tests themselves may not do what the guest's PID 1 may.
pub fn lacks_capability(number: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).unwrap();
    let lacks = u64::from_str_radix(effective, 16).unwrap() & 1 << number == 0;
    if lacks {
        assert!(
            std::env::var_os("PODHULL_TEST_EVERYTHING").is_none(),
            "capability {number} is missing, and PODHULL_TEST_EVERYTHING is set"
        );
        say(&format!("capability {number} is not available"));
    }
    lacks
}

fn agent_binary() -> std::ffi::OsString {
    std::env::var_os("PODHULL_AGENT").unwrap_or(env!("CARGO_BIN_EXE_podhull-agent").into())
}

/// A running agent, and the directory it serves.
pub struct Agent {
    pub dir: tempfile::TempDir,
    pub client: AgentClient,
    pub cgroup: PathBuf,
    child: Child,
    /// The one reader of events, and those it read that nobody has asked for yet.
    events: tokio::sync::Mutex<(Option<ClientStreamReceiver<Event>>, Vec<Event>)>,
}

/// How a container ended.
#[derive(Debug)]
pub struct Outcome {
    pub stdout: String,
    pub stderr: String,
    pub exit: Exit,
    /// Processes of the container killed for lack of memory, as events before its end have told; 0 of one executed later.
    pub kills: u64,
}

impl Outcome {
    /// The output of a program that succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.exit.code == 0 && self.exit.signal == 0, "{self:?}");
        self.stdout
    }
}

impl Agent {
    /// An agent with an empty pod, in the network namespace of the tests.
    pub async fn start() -> Self {
        let agent = Self::listen(false).await;
        agent.create_pod(|_| {}).await.unwrap();
        agent
    }

    /// Makes the pod.
    pub async fn create_pod(&self, change: impl FnOnce(&mut CreatePodRequest)) -> ttrpc::Result<CreatePodResponse> {
        let mut request = CreatePodRequest { protocol_version: VERSION, ..CreatePodRequest::default() };
        change(&mut request);
        self.client.create_pod(deadline(), &request).await
    }

    /// An agent without a pod; if it is said, in a network namespace of its own.
    pub async fn listen(own_network: bool) -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests make namespaces and mounts: run them as root");
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::create_dir(dir.path().join("share")).unwrap();
        let name = format!("podhull-test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let mut command = Command::new(agent_binary());
        command.arg("native").arg("--dir").arg(dir.path()).arg("--cgroup2").arg(cgroup2()).args(["--cgroup", &name]);
        if own_network {
            // SAFETY: between fork and exec there is this one system call.
            unsafe {
                command.pre_exec(|| match libc::unshare(libc::CLONE_NEWNET) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                });
            }
        }
        let child = command.spawn().unwrap();
        let socket = dir.path().join("agent.sock");
        let begin = std::time::Instant::now();
        while !socket.exists() || !dir.path().join("stdio.sock").exists() {
            assert!(begin.elapsed() < DEADLINE, "the agent does not listen");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let client = Client::connect(&format!("unix://{}", socket.display())).await.unwrap();
        Self {
            dir,
            client: AgentClient::new(client),
            cgroup: cgroup2().join(name),
            child,
            events: tokio::sync::Mutex::default(),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A root filesystem of busybox below the share, and its name there.
    pub fn rootfs(&self) -> String {
        let name = format!("root{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let root = self.dir.path().join("share").join(&name);
        for dir in ["bin", "etc", "dev", "proc", "sys", "tmp", "root"] {
            std::fs::create_dir_all(root.join(dir)).unwrap();
        }
        let busybox = std::env::var_os("PODHULL_BUSYBOX").unwrap_or("/bin/busybox".into());
        // By a process of its own: a descriptor open for writing here would be inherited by agents that other tests start in
        // this moment, and a program that is open for writing is not executed.
        let copied = Command::new(&busybox).arg("cp").arg(&busybox).arg(root.join("bin/busybox")).status();
        assert!(copied.expect("these tests need the package busybox-static").success());
        let applets = Command::new(&busybox).arg("--list").output().unwrap().stdout;
        for applet in String::from_utf8(applets).unwrap().lines().filter(|applet| *applet != "busybox") {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        std::fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n")
            .unwrap();
        name
    }

    pub fn root_path(&self, rootfs: &str) -> PathBuf {
        self.dir.path().join("share").join(rootfs)
    }

    /// Makes, starts and removes a container; its three streams are connected.
    pub async fn run(&self, spec: &Value) -> Outcome {
        self.run_in(&self.rootfs(), spec, b"").await
    }

    pub async fn run_in(&self, rootfs: &str, spec: &Value, input: &[u8]) -> Outcome {
        let id = new_id();
        let tokens = [new_token(), new_token(), new_token()];
        let stdio = Stdio { stdin: tokens[0], stdout: tokens[1], stderr: tokens[2], ..Stdio::default() };
        let (mut stdin, stdout, stderr) =
            (self.stream(tokens[0]).await, self.stream(tokens[1]).await, self.stream(tokens[2]).await);
        self.create(&id, rootfs, spec, stdio).await.unwrap();
        self.start_container(&id).await.unwrap();
        let feed = async {
            // A container that does not read its input to the end is no error.
            let _ = stdin.write_all(input).await;
            let _ = stdin.shutdown().await;
        };
        let ((), stdout, stderr) = tokio::join!(feed, read_all(stdout), read_all(stderr));
        let exit = self.exit_of(&id).await;
        let kills = self.kills_told_of(&id).await;
        self.delete(&id).await;
        Outcome { stdout, stderr, exit, kills }
    }

    pub async fn create(&self, id: &str, rootfs: &str, spec: &Value, stdio: Stdio) -> ttrpc::Result<i32> {
        let request = Self::container(id, rootfs, spec, stdio);
        self.client.create_container(deadline(), &request).await.map(|response| response.pid)
    }

    /// The call that makes a container.
    pub fn container(id: &str, rootfs: &str, spec: &Value, stdio: Stdio) -> CreateContainerRequest {
        CreateContainerRequest {
            id: id.into(),
            spec: serde_json::to_vec(spec).unwrap(),
            rootfs: rootfs.into(),
            stdio: Some(stdio).into(),
            ..CreateContainerRequest::default()
        }
    }

    /// The error of a container that cannot be made.
    pub async fn refusal(&self, spec: &Value) -> (ttrpc::Code, String) {
        let id = new_id();
        let error = match self.create(&id, &self.rootfs(), spec, Stdio::default()).await {
            Ok(_) => self.start_container(&id).await.expect_err("the container is refused"),
            Err(error) => {
                assert!(!self.cgroup.join(&id).exists(), "a failed creation leaves no cgroup");
                error
            }
        };
        match error {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
            other => panic!("{other}"),
        }
    }

    pub async fn start_container(&self, id: &str) -> ttrpc::Result<Empty> {
        let request = StartContainerRequest { id: id.into(), ..StartContainerRequest::default() };
        self.client.start_container(deadline(), &request).await
    }

    pub async fn signal(&self, id: &str, signal: i32, all: bool) -> ttrpc::Result<Empty> {
        let request = SignalContainerRequest { id: id.into(), signal, all, ..SignalContainerRequest::default() };
        self.client.signal_container(deadline(), &request).await
    }

    pub async fn resize(&self, id: &str, rows: u32, columns: u32) {
        let request = ResizeTerminalRequest { id: id.into(), rows, columns, ..ResizeTerminalRequest::default() };
        self.client.resize_terminal(deadline(), &request).await.unwrap();
    }

    pub async fn delete(&self, id: &str) {
        let request = DeleteContainerRequest { id: id.into(), ..DeleteContainerRequest::default() };
        self.client.delete_container(deadline(), &request).await.unwrap();
        assert!(!self.cgroup.join(id).exists(), "a removed container leaves no cgroup");
    }

    /// Connects a stream, as the host does.
    pub async fn stream(&self, token: u64) -> UnixStream {
        let mut stream = UnixStream::connect(self.dir.path().join("stdio.sock")).await.unwrap();
        stream.write_all(&token.to_le_bytes()).await.unwrap();
        stream
    }

    /// Waits for the exit of a container.
    pub async fn exit_of(&self, id: &str) -> Exit {
        self.exit_of_process(id, "").await
    }

    /// Waits for the exit of a process executed in a container.
    pub async fn exit_of_process(&self, id: &str, exec_id: &str) -> Exit {
        let mut guard = self.events.lock().await;
        let (events, waiting) = &mut *guard;
        let wanted = |event: &Event| event.has_exit() && event.container_id == id && event.exec_id == exec_id;
        if let Some(at) = waiting.iter().position(wanted) {
            return waiting.remove(at).exit().clone();
        }
        let events = match events {
            Some(events) => events,
            none => {
                // Open for as long as the test runs.
                let endless = context::Context::default();
                none.insert(self.client.events(endless, &EventsRequest::default()).await.unwrap())
            }
        };
        loop {
            let event: Event = tokio::time::timeout(DEADLINE, events.recv()).await.unwrap().unwrap().unwrap();
            if wanted(&event) {
                return event.exit().clone();
            }
            waiting.push(event);
        }
    }

    /// How many kills for lack of memory were told of a container before its end, which was waited for.
    async fn kills_told_of(&self, id: &str) -> u64 {
        let (_, waiting) = &*self.events.lock().await;
        let of = waiting.iter().filter(|event| event.has_out_of_memory() && event.container_id == id);
        of.map(|event| event.out_of_memory().kills).max().unwrap_or_default()
    }

    /// A container that does nothing until it is deleted.
    pub async fn idle(&self, id: &str, rootfs: &str, spec: &Value) {
        self.create(id, rootfs, spec, Stdio::default()).await.unwrap();
        self.start_container(id).await.unwrap();
    }

    /// The call that executes a process, to be changed further.
    pub fn exec_request(id: &str, exec_id: &str, process: &Value, stdio: Stdio) -> ExecProcessRequest {
        ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: serde_json::to_vec(process).unwrap(),
            stdio: Some(stdio).into(),
            ..ExecProcessRequest::default()
        }
    }

    /// Executes a process without streams.
    pub async fn exec(&self, id: &str, exec_id: &str, process: &Value) -> ttrpc::Result<i32> {
        let request = Self::exec_request(id, exec_id, process, Stdio::default());
        self.client.exec_process(deadline(), &request).await.map(|response| response.pid)
    }

    /// Executes a process to its end.
    pub async fn exec_run(&self, id: &str, process: &Value) -> Outcome {
        self.exec_run_as(id, process, |_| {}).await
    }

    pub async fn exec_run_as(
        &self,
        id: &str,
        process: &Value,
        change: impl FnOnce(&mut ExecProcessRequest),
    ) -> Outcome {
        let exec_id = new_id();
        let tokens = [new_token(), new_token()];
        let stdio = Stdio { stdout: tokens[0], stderr: tokens[1], ..Stdio::default() };
        let (stdout, stderr) = (self.stream(tokens[0]).await, self.stream(tokens[1]).await);
        let mut request = Self::exec_request(id, &exec_id, process, stdio);
        change(&mut request);
        self.client.exec_process(deadline(), &request).await.unwrap();
        let (stdout, stderr) = tokio::join!(read_all(stdout), read_all(stderr));
        let exit = self.exit_of_process(id, &exec_id).await;
        self.delete_process(id, &exec_id).await.unwrap();
        Outcome { stdout, stderr, exit, kills: 0 }
    }

    pub async fn signal_process(&self, id: &str, exec_id: &str, signal: i32) -> ttrpc::Result<Empty> {
        let (container_id, exec_id) = (id.into(), exec_id.into());
        let request = SignalProcessRequest { container_id, exec_id, signal, ..SignalProcessRequest::default() };
        self.client.signal_process(deadline(), &request).await
    }

    pub async fn delete_process(&self, id: &str, exec_id: &str) -> ttrpc::Result<Empty> {
        let (container_id, exec_id) = (id.into(), exec_id.into());
        let request = DeleteProcessRequest { container_id, exec_id, ..DeleteProcessRequest::default() };
        self.client.delete_process(deadline(), &request).await
    }
}

/// Code and message of a call that is refused.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("{other}"),
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = std::fs::write(self.cgroup.join("cgroup.kill"), "1");
        let _ = self.child.kill();
        let _ = self.child.wait();
        remove_cgroups(&self.cgroup);
    }
}

/// Killed processes take a moment to leave.
fn remove_cgroups(path: &Path) {
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    for _ in 0..500 {
        if std::fs::remove_dir(path).is_ok() || !path.exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub async fn read_all(mut stream: UnixStream) -> String {
    let mut bytes = Vec::new();
    tokio::time::timeout(DEADLINE, stream.read_to_end(&mut bytes)).await.expect("the stream is closed").unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

pub fn new_id() -> String {
    format!("c{}", NUMBER.fetch_add(1, Ordering::Relaxed))
}

pub fn new_token() -> u64 {
    NUMBER.fetch_add(1, Ordering::Relaxed) << 32 | 0xabcd
}

pub fn deadline() -> context::Context {
    context::with_duration(DEADLINE)
}

/// The specification that `runc spec` prints, for a program without terminal.
pub fn spec(args: &[&str]) -> Value {
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": args,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "runc",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                           {"type": "cgroup"}],
            "maskedPaths": ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                            "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}

/// The same for a line of shell.
pub fn shell(line: &str) -> Value {
    spec(&["/bin/sh", "-c", line])
}

/// The process of a specification, to be executed in another's container.
pub fn process(args: &[&str]) -> Value {
    spec(args)["process"].clone()
}

/// The same for a line of shell.
pub fn shell_process(line: &str) -> Value {
    process(&["/bin/sh", "-c", line])
}

/// Sets a value in a specification: `set(&mut spec, "/process/user/uid", 5)`.
pub fn set(spec: &mut Value, pointer: &str, value: impl Into<Value>) {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    let parent = spec.pointer_mut(parent).unwrap_or_else(|| panic!("no {parent} in the specification"));
    match parent {
        Value::Array(list) if key == "-" => list.push(value.into()),
        parent => parent[key] = value.into(),
    }
}

/// A specification with some values set.
pub fn with<const N: usize>(mut spec: Value, values: [(&str, Value); N]) -> Value {
    for (pointer, value) in values {
        set(&mut spec, pointer, value);
    }
    spec
}

/// A shell line that may write to its root and do everything.
pub fn privileged(line: &str) -> Value {
    let all = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_KILL",
        "CAP_MKNOD",
        "CAP_NET_ADMIN",
        "CAP_SETGID",
        "CAP_SETPCAP",
        "CAP_SETUID",
        "CAP_SYS_ADMIN",
        "CAP_SYS_CHROOT",
        "CAP_SYSLOG"
    ]);
    with(
        shell(line),
        [
            ("/process/capabilities", json!({"bounding": all, "effective": all, "permitted": all})),
            ("/root/readonly", json!(false)),
        ],
    )
}

/// Adds a mount.
pub fn mount(spec: &mut Value, destination: &str, kind: &str, source: &str, options: &[&str]) {
    let mount = json!({"destination": destination, "type": kind, "source": source, "options": options});
    set(spec, "/mounts/-", mount);
}

/// Removes a namespace.
pub fn without_namespace(spec: &mut Value, kind: &str) {
    let namespaces = spec.pointer_mut("/linux/namespaces").unwrap().as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != kind);
}
