//! The shim's service for pods as such (containerd, `docs/sandbox-api.md`), asked by its own protocol: what containerd 2 asks for with
//! `sandboxer = "shim"`, and what it does not.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, StartRequest, StartResponse, WaitRequest,
    WaitResponse,
};
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, SandboxMetricsRequest,
    SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest,
    ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
    WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::ttrpc::Code;
use serde_json::{Value, json};

use super::podhull;
use crate::containerd::check;
use crate::leaks::Leaks;
use crate::netns::Netns;
use crate::run::DEADLINE;
use crate::shim::{Refused, SANDBOX, Shim, TASK, refused};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[podhull("sandbox::from_its_making_to_its_end", from_its_making_to_its_end)];

const ID: &str = "made-for-itself";

fn start(shim: &Shim) -> Result<StartSandboxResponse, Refused> {
    shim.call(SANDBOX, "StartSandbox", &StartSandboxRequest { sandbox_id: ID.into(), ..Default::default() })
}

fn ping(shim: &Shim) -> Result<PingResponse, Refused> {
    shim.call(SANDBOX, "PingSandbox", &PingRequest { sandbox_id: ID.into(), ..Default::default() })
}

fn metrics(shim: &Shim) -> Result<SandboxMetricsResponse, Refused> {
    shim.call(SANDBOX, "SandboxMetrics", &SandboxMetricsRequest { sandbox_id: ID.into(), ..Default::default() })
}

fn status(shim: &Shim) -> Outcome<SandboxStatusResponse> {
    let request = SandboxStatusRequest { sandbox_id: ID.into(), verbose: true, ..Default::default() };
    Ok(shim.call(SANDBOX, "SandboxStatus", &request)?)
}

/// Makes a container in the pod whose process is `pid`.
fn create(scene: &Scene, shim: &Shim, pid: u32, script: &str) -> Outcome<(Result<CreateTaskResponse, Refused>, bool)> {
    let path = |kind: &str| format!("/proc/{pid}/ns/{kind}");
    let bundle = scene.busybox()?.writable().sh(script).set(
        "/linux/namespaces",
        json!([
            { "type": "mount" }, { "type": "pid" }, { "type": "network", "path": path("net") },
            { "type": "ipc", "path": path("ipc") }, { "type": "uts", "path": path("uts") },
        ]),
    );
    bundle.write()?;
    let (id, directory) = ("main".to_owned(), bundle.directory.display().to_string());
    let create = CreateTaskRequest { id: id.clone(), bundle: directory, ..Default::default() };
    let created = shim.call(TASK, "Create", &create);
    if created.is_err() {
        return Ok((created, false));
    }
    shim.call::<StartResponse>(TASK, "Start", &StartRequest { id, ..Default::default() })?;
    wait_for(&bundle.directory.join("rootfs/ready"))?;
    says_whom_it_is_about(&bundle.directory, "main")?;
    Ok((created, true))
}

/// Each line of the log in a container's bundle has its id, and its pod's from where that is known.
fn says_whom_it_is_about(bundle: &Path, id: &str) -> Outcome {
    let text = fs::read_to_string(bundle.join("log.json"))?;
    let lines = text.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
    ensure!(lines.iter().all(|line| line["container"] == id), "a line about another than {id}: {text}");
    let made = |line: &&Value| line["msg"].as_str().is_some_and(|text| text.contains("container created"));
    let made = lines.iter().find(made).ok_or_else(|| format!("no line about {id} that is made: {text}"))?;
    ensure_eq!(made["pod"], ID, "pod of {made}");
    Ok(())
}

fn wait_for(path: &Path) -> Outcome {
    let until = Instant::now() + DEADLINE;
    while !path.exists() {
        ensure!(Instant::now() < until, "no {}", path.display());
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn from_its_making_to_its_end(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    // Asked to end, one does so in its own time; another does not care.
    for (script, seconds, expected) in [
        ("trap 'sleep 2; exit 3' TERM; touch /ready; while :; do sleep 0.1; done", 60, 3),
        ("trap '' TERM; touch /ready; while :; do sleep 0.1; done", 1, 137),
        ("trap 'exit 3' TERM; touch /ready; while :; do sleep 0.1; done", 0, 137),
    ] {
        let (directory, netns) = (scene.make_directory("sandbox")?, Netns::new(scene, "net")?);
        let shim = Shim::start_with(&directory, ID, &["-debug"])?;
        let make = CreateSandboxRequest {
            sandbox_id: ID.into(),
            bundle_path: directory.display().to_string(),
            netns_path: netns.path.display().to_string(),
            ..Default::default()
        };
        shim.call::<CreateSandboxResponse>(SANDBOX, "CreateSandbox", &make)?;
        refused(Code::ALREADY_EXISTS, shim.call::<CreateSandboxResponse>(SANDBOX, "CreateSandbox", &make))?;
        refused(Code::FAILED_PRECONDITION, ping(&shim))?;
        refused(Code::FAILED_PRECONDITION, metrics(&shim))?;
        let (early, _) = create(scene, &shim, std::process::id(), script)?;
        ensure!(refused(Code::FAILED_PRECONDITION, early)?.contains("was not started"), "why there is no container");

        let pid = start(&shim)?.pid;
        refused(Code::FAILED_PRECONDITION, start(&shim))?;
        ping(&shim)?;
        let found = status(&shim)?;
        ensure_eq!((&*found.state, found.pid), ("SANDBOX_READY", pid), "state of the pod");
        let info: Value = serde_json::from_str(found.info.get("info").ok_or("no information")?)?;
        ensure_eq!(info["runtimeSpec"]["annotations"]["io.kubernetes.cri.sandbox-id"], ID, "information {info}");
        let (created, runs) = create(scene, &shim, pid, script)?;
        ensure!(runs, "no container: {created:?}");
        says_whom_it_is_about(&directory, ID)?;
        let used = metrics(&shim)?.metrics.unwrap_or_default();
        ensure_eq!((&*used.id, &*used.data.type_url), (ID, "io.containerd.cgroups.v2.Metrics"), "whose statistics");

        let ended = shim.call_beside::<WaitSandboxResponse>(
            SANDBOX,
            "WaitSandbox",
            WaitSandboxRequest { sandbox_id: ID.into(), ..Default::default() },
        );
        let main =
            shim.call_beside::<WaitResponse>(TASK, "Wait", WaitRequest { id: "main".into(), ..Default::default() });
        let stop = StopSandboxRequest { sandbox_id: ID.into(), timeout_secs: seconds, ..Default::default() };
        shim.call::<StopSandboxResponse>(SANDBOX, "StopSandbox", &stop)?;
        ensure_eq!(main.get()??.exit_status, expected, "status of a container that had {seconds} seconds to end");
        ensure_eq!(ended.get()??.exit_status, 137, "status of the pod");
        shim.call::<StopSandboxResponse>(SANDBOX, "StopSandbox", &stop)?;
        let found = status(&shim)?;
        ensure!(found.state == "SANDBOX_NOTREADY" && found.exited_at.is_some(), "state of the pod {found:?}");
        refused(Code::FAILED_PRECONDITION, start(&shim))?;
        refused(Code::FAILED_PRECONDITION, ping(&shim))?;
        refused(Code::NOT_FOUND, metrics(&shim))?;
        shim.call::<DeleteResponse>(TASK, "Delete", &DeleteRequest { id: "main".into(), ..Default::default() })?;
        // Its own log says what it has done itself.
        let log = shim.logged()?;
        for id in [ID, "main"] {
            let started =
                |line: &str| line.contains("container started") && line.ends_with(&format!(" pod={ID} container={id}"));
            ensure!(log.lines().any(started), "no line about the start of {id}: {log:?}");
        }
        ensure!(log.lines().all(|line| line.contains(" container=")), "a line about nobody: {log:?}");
        let (late, _) = create(scene, &shim, std::process::id(), script)?;
        ensure!(refused(Code::FAILED_PRECONDITION, late)?.contains("has ended"), "why there is no container");
        let shutdown = ShutdownSandboxRequest { sandbox_id: ID.into(), ..Default::default() };
        shim.call::<ShutdownSandboxResponse>(SANDBOX, "ShutdownSandbox", &shutdown)?;
        shim.gone()?;
        ensure!(!fs::read_to_string("/proc/mounts")?.contains(&directory.display().to_string()), "mounts are left");
    }
    check(&before)
}
