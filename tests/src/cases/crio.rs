//! The shim as CRI-O drives it with `runtime_type = "vm"` (cri-o, `internal/oci/runtime_vm.go`, `server/sandbox_run_linux.go`): which
//! calls, in which order, with what; a pod of two containers. CRI-O itself is not packaged.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread;

use containerd_shim_protos::api::{
    CloseIORequest, CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest,
    KillRequest, PauseRequest, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse,
    StateRequest, StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::ttrpc::Code;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde_json::{Value, json};

use super::podhull;
use crate::bundle::Bundle;
use crate::containerd::check;
use crate::leaks::Leaks;
use crate::netns::Netns;
use crate::shim::{Later, Pipes, Refused, Shim, TASK, refused};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[podhull("crio::as_it_drives_a_shim", as_it_drives_a_shim)];

/// The control group of the pod.
const GROUP: &str = "/crio-test";

/// What comes before the names of messages that are no protobuf.
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1";

/// Says who it is, and more when it is told to.
const PROGRAM: &str = "
trap 'exit 3' TERM
trap 'echo again' USR1
hostname; echo wrong >&2; touch /ready
while :; do sleep 0.1; done";

/// A namespace or a file system that is kept by a file, or directory.
struct Pinned(PathBuf);

impl Pinned {
    /// As CRI-O's `pinns` makes them.
    fn namespace(directory: &Path, kind: &str, flag: UnshareFlags) -> Outcome<Self> {
        let path = directory.join(kind);
        File::create(&path)?;
        let (place, from) = (path.clone(), format!("/proc/thread-self/ns/{kind}"));
        let made = thread::spawn(move || {
            // SAFETY: a namespace of this thread alone, which ends here.
            unsafe { unshare_unsafe(flag) }?;
            mount_bind(from, &place)
        });
        made.join().map_err(|_| "the thread panicked")??;
        Ok(Self(path))
    }

    /// Shared memory of a pod.
    fn memory(directory: &Path) -> Outcome<Self> {
        let path = directory.join("shm");
        fs::create_dir(&path)?;
        let flags = MountFlags::NOEXEC | MountFlags::NOSUID | MountFlags::NODEV;
        mount("shm", &path, "tmpfs", flags, Some(c"mode=1777,size=67108864"))?;
        Ok(Self(path))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// A container as CRI-O knows it.
struct Made {
    id: String,
    bundle: Bundle,
    shim: Shim,
    pipes: Pipes,
    pid: u32,
    /// CRI-O waits from the start on.
    wait: Later<Result<WaitResponse, Refused>>,
}

impl Made {
    /// `CreateContainer` and `StartContainer`.
    fn new(bundle: Bundle, id: &str, class: &Path, fifos: &Path) -> Outcome<Self> {
        bundle.write()?;
        let shim = Shim::start(&bundle.directory, id)?;
        let pipes = Pipes::new(fifos.join(id), id, false, false)?;
        let options = [b"\x12", &[u8::try_from(class.as_os_str().len())?][..], class.as_os_str().as_encoded_bytes()];
        let create = CreateTaskRequest {
            id: id.into(),
            bundle: bundle.directory.display().to_string(),
            stdout: pipes.stdout.clone(),
            stderr: pipes.stderr.clone(),
            options: Some(any("runtimeoptions.v1.Options", options.concat())).into(),
            ..Default::default()
        };
        let created: CreateTaskResponse = shim.call(TASK, "Create", &create)?;
        // It reads when that began.
        fs::read_to_string(format!("/proc/{}/stat", created.pid))?;
        let start = StartRequest { id: id.into(), ..Default::default() };
        shim.call::<StartResponse>(TASK, "Start", &start)?;
        let wait = shim.call_beside(TASK, "Wait", WaitRequest { id: id.into(), ..Default::default() });
        Ok(Self { id: id.into(), bundle, shim, pipes, pid: created.pid, wait })
    }

    /// `UpdateContainerStatus`.
    fn state(&self) -> Outcome<StateResponse> {
        Ok(self.shim.call(TASK, "State", &StateRequest { id: self.id.clone(), ..Default::default() })?)
    }

    fn kill(&self, exec: &str, signal: u32) -> Result<Empty, Refused> {
        let (id, exec_id) = (self.id.clone(), exec.into());
        self.shim.call(TASK, "Kill", &KillRequest { id, exec_id, signal, ..Default::default() })
    }

    fn stats(&self) -> Outcome<Metrics> {
        let request = StatsRequest { id: self.id.clone(), ..Default::default() };
        let stats = self.shim.call::<StatsResponse>(TASK, "Stats", &request)?.stats.unwrap_or_default();
        ensure_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics", "type of statistics");
        Ok(Metrics::parse_from_bytes(&stats.value)?)
    }

    /// `UpdateContainer`.
    fn update(&self, resources: &Value) -> Outcome {
        let resources = any(&format!("{SPEC}/LinuxResources"), resources.to_string().into_bytes());
        let request =
            UpdateTaskRequest { id: self.id.clone(), resources: Some(resources).into(), ..Default::default() };
        self.shim.call::<Empty>(TASK, "Update", &request)?;
        Ok(())
    }

    /// The first half of `ExecContainer` and `ExecSyncContainer`, to its start.
    fn execute(&self, exec: &str, words: &[&str], stdin: bool, terminal: bool, fifos: &Path) -> Outcome<Pipes> {
        let pipes = Pipes::new(fifos.join(exec), exec, stdin, terminal)?;
        let mut process = self.bundle.config["process"].clone();
        process["args"] = json!(words);
        let request = ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            stdin: pipes.stdin.clone(),
            stdout: pipes.stdout.clone(),
            stderr: pipes.stderr.clone(),
            terminal,
            spec: Some(any(&format!("{SPEC}/Process"), process.to_string().into_bytes())).into(),
            ..Default::default()
        };
        self.shim.call::<Empty>(TASK, "Exec", &request)?;
        let (id, exec_id) = (self.id.clone(), exec.into());
        self.shim.call::<StartResponse>(TASK, "Start", &StartRequest { id, exec_id, ..Default::default() })?;
        Ok(pipes)
    }

    fn wait_for(&self, exec: &str) -> Later<Result<WaitResponse, Refused>> {
        let (id, exec_id) = (self.id.clone(), exec.into());
        self.shim.call_beside(TASK, "Wait", WaitRequest { id, exec_id, ..Default::default() })
    }

    fn remove(&self, exec: &str) -> Result<DeleteResponse, Refused> {
        let (id, exec_id) = (self.id.clone(), exec.into());
        self.shim.call(TASK, "Delete", &DeleteRequest { id, exec_id, ..Default::default() })
    }

    /// The second half: its status, and what it has written.
    fn finish(&self, exec: &str, pipes: Pipes) -> Outcome<(u32, [String; 2])> {
        let status = self.wait_for(exec).get()??.exit_status;
        self.remove(exec)?;
        Ok((status, pipes.finish()?))
    }

    /// `ExecSyncContainer` of a shell.
    fn shell(&self, script: &str, fifos: &Path) -> Outcome<String> {
        let pipes = self.execute("shell", &["sh", "-c", script], false, false, fifos)?;
        let (status, [stdout, stderr]) = self.finish("shell", pipes)?;
        ensure_eq!(status, 0, "{script}: {stdout:?} {stderr:?}");
        Ok(stdout)
    }

    /// `StopContainer`: returns its exit status.
    fn stop(&self, signal: u32) -> Outcome<u32> {
        ensure_eq!(self.state()?.status.enum_value_or_default(), Status::RUNNING, "state of what is to stop");
        let wait = self.wait_for("");
        self.kill("", signal)?;
        let status = wait.get()??.exit_status;
        ensure_eq!(self.wait.get()??.exit_status, status, "what both who wait are told");
        let state = self.state()?;
        let found = (state.status.enum_value_or_default(), state.exit_status, state.exited_at.is_some());
        ensure_eq!(found, (Status::STOPPED, status, true), "state of what has stopped");
        // `IsContainerAlive`.
        refused(Code::NOT_FOUND, self.kill("", 0))?;
        Ok(status)
    }

    /// `DeleteContainer`: returns what it has written.
    fn delete(self) -> Outcome<[String; 2]> {
        self.remove("")?;
        match self.shim.call::<Empty>(TASK, "Shutdown", &ShutdownRequest { id: self.id.clone(), ..Default::default() })
        {
            // The last one takes the connection with it.
            Ok(_) | Err(Refused::LocalClosed | Refused::RemoteClosed | Refused::Socket(_)) => {}
            Err(error) => return Err(error.into()),
        }
        self.pipes.finish()
    }
}

fn any(kind: &str, value: Vec<u8>) -> Any {
    Any { type_url: kind.into(), value, ..Default::default() }
}

/// The specification of a container of the pod.
fn specified(scene: &Scene, id: &str, opens: bool, namespaces: &Value, shm: &Path) -> Outcome<Bundle> {
    let shared = json!({ "destination": "/dev/shm", "type": "bind", "source": shm, "options": ["rw", "bind"] });
    let kind = if opens { "sandbox" } else { "container" };
    let mut bundle = scene.busybox()?.writable().set("/linux/namespaces", namespaces.clone());
    for mount in bundle.config["mounts"].as_array_mut().into_iter().flatten() {
        if mount["destination"] == "/dev/shm" {
            *mount = shared.clone();
        }
    }
    Ok(bundle.set("/hostname", json!("crio-pod")).set("/linux/cgroupsPath", json!(format!("{GROUP}/crio-{id}"))).set(
        "/annotations",
        json!({ "io.kubernetes.cri-o.ContainerType": kind, "io.kubernetes.cri-o.SandboxID": "pod" }),
    ))
}

fn as_it_drives_a_shim(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let group = Path::new("/sys/fs/cgroup").join(GROUP.trim_start_matches('/'));
    fs::create_dir(&group)?;
    let directory = scene.make_directory("crio")?;
    let (fifos, class) = (directory.join("fifo"), directory.join("class.toml"));
    fs::write(&class, "[machine]\nmemory = 320\n")?;
    {
        let netns = Netns::new(scene, "net")?;
        let ipc = Pinned::namespace(&directory, "ipc", UnshareFlags::NEWIPC)?;
        let uts = Pinned::namespace(&directory, "uts", UnshareFlags::NEWUTS)?;
        let shm = Pinned::memory(&directory)?;
        let namespaces = json!([
            { "type": "pid" }, { "type": "mount" }, { "type": "cgroup" }, { "type": "network", "path": netns.path },
            { "type": "ipc", "path": ipc.0 }, { "type": "uts", "path": uts.0 },
        ]);
        for _ in 0..scene.repeat.min(10) {
            let open = specified(scene, "pod", true, &namespaces, &shm.0)?.sh("exec sleep 2147483647");
            let pod = Made::new(open, "pod", &class, &fifos)?;
            let bundle = specified(scene, "main", false, &namespaces, &shm.0)?.sh(PROGRAM);
            let main = Made::new(bundle, "main", &class, &fifos)?;
            ensure_eq!(main.shim.address, pod.shim.address, "where the shim of both listens");
            let written = drive(main, &pod, &fifos)?;
            ensure_eq!(written, ["crio-pod\nagain\n".to_owned(), "wrong\n".to_owned()], "what it has written");
            starved(scene, &namespaces, &shm.0, &class, &fifos)?;
            ensure_eq!(pod.stop(9)?, 137, "exit status of what was killed");
            let shim = pod.shim.clone();
            pod.delete()?;
            shim.gone()?;
            fs::remove_dir(&fifos)?;
        }
    }
    fs::remove_dir(&group)?;
    check(&before)
}

/// All that is done to a container that runs, to its end; returns what it has written.
fn drive(mut main: Made, pod: &Made, fifos: &Path) -> Outcome<[String; 2]> {
    ensure_eq!(main.pipes.line()?, "crio-pod", "its first line");
    ensure_eq!(main.pipes.error_line()?, "wrong", "its first error");
    main.shell("until [ -e /ready ]; do sleep 0.1; done", fifos)?;
    // The class of both says how large their machine is; what is in shared memory, the other one has.
    let memory =
        main.shell("sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; echo here >/dev/shm/file", fifos)?;
    let memory: u64 = memory.trim().parse()?;
    ensure!((200 << 10..=320 << 10).contains(&memory), "{memory} KiB of memory, with 320 MiB");
    ensure_eq!(
        pod.shell("cat /dev/shm/file; hostname", fifos)?,
        "here\ncrio-pod\n",
        "what the pod's own container sees"
    );

    let pipes = main.execute("e", &["sh", "-c", "echo out; echo err >&2; exit 5"], false, false, fifos)?;
    let ended = main.finish("e", pipes)?;
    ensure_eq!(ended, (5, ["out\n".to_owned(), "err\n".to_owned()]), "how a program ends");
    let pipes = main.execute("in", &["cat"], true, false, fifos)?;
    File::options().write(true).open(&pipes.stdin)?.write_all(b"said\n")?;
    let close = CloseIORequest { id: main.id.clone(), exec_id: "in".into(), stdin: true, ..Default::default() };
    main.shim.call::<Empty>(TASK, "CloseIO", &close)?;
    ensure_eq!(main.finish("in", pipes)?, (0, ["said\n".to_owned(), String::new()]), "what it is told");
    let size = "until [ \"$(stty size 2>/dev/null)\" = '30 100' ]; do sleep 0.1; done; echo right";
    let pipes = main.execute("tty", &["sh", "-c", size], true, true, fifos)?;
    let (id, exec_id) = (main.id.clone(), "tty".to_owned());
    let resize = ResizePtyRequest { id, exec_id, width: 100, height: 30, ..Default::default() };
    main.shim.call::<Empty>(TASK, "ResizePty", &resize)?;
    ensure_eq!(main.finish("tty", pipes)?, (0, ["right\r\n".to_owned(), String::new()]), "what has a terminal");
    // One that takes too long is killed, and never deleted.
    let pipes = main.execute("late", &["sleep", "4321"], false, false, fifos)?;
    let wait = main.wait_for("late");
    main.kill("late", 9)?;
    ensure_eq!(wait.get()??.exit_status, 137, "status of what took too long");
    pipes.finish()?;

    let stats = main.stats()?;
    let (cpu, memory, pids) =
        (stats.cpu.unwrap_or_default(), stats.memory.unwrap_or_default(), stats.pids.unwrap_or_default());
    ensure!(cpu.usage_usec > 0 && memory.usage > 0 && pids.current > 0, "statistics {cpu:?} {memory:?} {pids:?}");
    main.update(&json!({ "memory": { "limit": 67108864 }, "cpu": { "quota": 50000, "period": 100000 } }))?;
    ensure_eq!(main.stats()?.memory.unwrap_or_default().usage_limit, 64 << 20, "the limit that it was given");
    main.shim.call::<Empty>(TASK, "Pause", &PauseRequest { id: main.id.clone(), ..Default::default() })?;
    ensure_eq!(main.state()?.status.enum_value_or_default(), Status::PAUSED, "state of what is paused");
    main.shim.call::<Empty>(TASK, "Resume", &ResumeRequest { id: main.id.clone(), ..Default::default() })?;
    main.kill("", 0)?;

    // CRI-O is restarted: it finds the shim by its file, and the pipes by what that says.
    main.shim = main.shim.again(Shim::find(&main.bundle.directory)?);
    main.pipes.restart()?;
    let state = main.state()?;
    let found = (state.status.enum_value_or_default(), state.pid, &state.stdout, &state.stderr);
    ensure_eq!(found, (Status::RUNNING, main.pid, &main.pipes.stdout, &main.pipes.stderr), "what is found again");
    main.kill("", 10)?;
    ensure_eq!(main.pipes.line()?, "again", "what it writes then");
    ensure_eq!(main.stop(15)?, 3, "exit status of what was asked to end");
    main.delete()
}

/// Where CRI-O, which is sent no events, learns that there was no memory left.
fn starved(scene: &Scene, namespaces: &Value, shm: &Path, class: &Path, fifos: &Path) -> Outcome {
    let bundle = specified(scene, "starved", false, namespaces, shm)?.sh("exec tail -c 200000000 /dev/zero");
    let bundle = bundle.set("/linux/resources/memory", json!({ "limit": 32 << 20 }));
    let starved = Made::new(bundle, "starved", class, fifos)?;
    ensure_eq!(starved.wait.get()??.exit_status, 137, "exit status of what used too much memory");
    ensure!(starved.bundle.directory.join("oom").exists(), "no file says why");
    starved.delete().map(drop)
}
