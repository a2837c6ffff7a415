//! A guest that says nothing: what waits for its answer is refused in time, what needs none goes on, and who ends the container or the
//! pod needs nothing of it.

use containerd_shim_protos::api::{
    ConnectRequest, ConnectResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status,
    WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::ttrpc::Code;
use k8s_cri::v1::{LinuxContainerResources, PodSandboxState};

use super::rogue::{LATEST, PARAMS, Peaks, configuration};
use super::{long, podhull};
use crate::containerd::{self, Containerd, check};
use crate::cri::{Cri, PATIENT, container, resources};
use crate::leaks::Leaks;
use crate::run::Running;
use crate::shim::{Refused, Shim, TASK, refused};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    long(podhull("rogue_silent::what_takes_longest", what_takes_longest)),
    long(podhull("rogue_silent::a_pod_takes_no_container", a_pod_takes_no_container)),
];

/// Its name for containerd.
const ID: &str = "silent";

/// A program that is never executed.
const EXECUTED: &str = "never";

/// Bytes that a container may have.
const LIMIT: i64 = 64 << 20;

/// That a call was refused by who was asked, and not given up by who asked; by whatever code. Returns what is said.
fn said<A: std::fmt::Debug>(what: &str, answer: Result<A, Refused>) -> Outcome<String> {
    match answer {
        Err(Refused::RpcStatus(status)) if status.code() != Code::OK && !status.message().contains("panicked") => {
            Ok(status.message().into())
        }
        other => Err(format!("{what}: no error of the shim's: {other:?}").into()),
    }
}

/// The shim of the container.
fn shim(containerd: &Containerd) -> Outcome<Shim> {
    let bundle = containerd.socket().with_file_name("state/io.containerd.runtime.v2.task/default").join(ID);
    Shim::find(&bundle)
}

/// Adds a program to execute, and says how to start it.
fn execute(shim: &Shim) -> Outcome<StartRequest> {
    let process = r#"{ "args": ["true"], "cwd": "/", "user": { "uid": 0, "gid": 0 } }"#;
    let spec = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
        value: process.into(),
        ..Default::default()
    };
    let (id, exec_id, spec) = (ID.to_owned(), EXECUTED.to_owned(), Some(spec).into());
    shim.call::<Empty>(TASK, "Exec", &ExecProcessRequest { id, exec_id, spec, ..Default::default() })?;
    Ok(StartRequest { id: ID.into(), exec_id: EXECUTED.into(), ..Default::default() })
}

/// Kills it, and waits for its end.
fn end(containerd: &Containerd, shim: &Shim) -> Outcome {
    containerd.call(&["task", "kill", "--signal", "SIGKILL", ID])?.output()?;
    // Its machine is given time to write back what the container has written.
    let ended: WaitResponse = shim.call(TASK, "Wait", &WaitRequest { id: ID.into(), ..Default::default() })?;
    ensure_eq!(ended.exit_status, 137, "exit status of a container that was killed");
    Ok(())
}

/// Deletes it, and waits for the end of its shim.
fn delete(containerd: &Containerd, shim: &Shim) -> Outcome {
    let deleted = containerd.call(&["task", "delete", ID])?;
    ensure!(deleted.stderr.contains("non-zero exit code 137"), "exit status: {:?}", deleted.stderr);
    containerd.call(&["container", "delete", ID])?.output()?;
    shim.gone()
}

/// Asks the shim of a container that runs for all that its guest would have to answer, at the same time, and ends it.
pub fn behind_containerd(containerd: &Containerd) -> Outcome {
    let shim = shim(containerd)?;
    let id = || ID.to_owned();
    let kill = KillRequest { id: id(), signal: 15, ..Default::default() };
    let stats = shim.call_beside::<StatsResponse>(TASK, "Stats", StatsRequest { id: id(), ..Default::default() });
    let pause = shim.call_beside::<Empty>(TASK, "Pause", PauseRequest { id: id(), ..Default::default() });
    let kill = shim.call_beside::<Empty>(TASK, "Kill", kill);
    let executed = shim.call_beside::<StartResponse>(TASK, "Start", execute(&shim)?);
    // What the guest is not asked for is answered meanwhile.
    let answers = || {
        let state: StateResponse = shim.call(TASK, "State", &StateRequest { id: id(), ..Default::default() })?;
        ensure_eq!(state.status.enum_value_or_default(), Status::RUNNING, "state of the container");
        let connected: ConnectResponse =
            shim.call(TASK, "Connect", &ConnectRequest { id: id(), ..Default::default() })?;
        ensure_eq!(connected.task_pid, state.pid, "process of the container");
        Outcome::Ok(connected.shim_pid)
    };
    let pid = answers()?;
    let early: Result<DeleteResponse, _> = shim.call(TASK, "Delete", &DeleteRequest { id: id(), ..Default::default() });
    refused(Code::FAILED_PRECONDITION, early)?;
    said("Stats", stats.get()?)?;
    said("Pause", pause.get()?)?;
    said("Kill", kill.get()?)?;
    ensure_eq!(answers()?, pid, "process of the shim");
    end(containerd, &shim)?;
    // It had more time than that, and nothing to wait for any more.
    said("Start", executed.get()?)?;
    delete(containerd, &shim)
}

/// A container that is never made, and a program that is never executed, each to the last moment that the guest has for it.
fn what_takes_longest(scene: &Scene) -> Outcome {
    let _host = configuration()?;
    let before = Leaks::watch();
    let peaks = Peaks::watch();
    let containerd = Containerd::start(scene, containerd::Shim::Podhull)?;
    let start = |fault: &str| {
        let (annotation, limit) = (format!("{PARAMS}=rogue={fault}"), LIMIT.to_string());
        let options = ["-d", "--null-io", "--memory-limit", &limit, "--annotation", &annotation];
        Running::start(&containerd.run_words(&options, fault, &["true"]), &[])
    };
    start(ID)?.wait()?.output()?;
    let never = start("mute")?;
    let shim = shim(&containerd)?;
    let refused = said("Start", shim.call::<StartResponse>(TASK, "Start", &execute(&shim)?))?;
    ensure!(refused.contains("did not answer ExecProcess in time"), "why nothing is executed: {refused:?}");
    let failed = never.wait_within(LATEST)?.expect_status(1)?;
    ensure!(failed.stderr.contains("did not answer CreatePod in time"), "why nothing is made: {:?}", failed.stderr);
    let _ = containerd.call(&["container", "delete", "mute"])?;
    end(&containerd, &shim)?;
    delete(&containerd, &shim)?;
    peaks.check()?;
    containerd.end()?;
    check(&before)
}

/// kubelet is told so, and the pod can be removed as any other.
fn a_pod_takes_no_container(scene: &Scene) -> Outcome {
    let _host = configuration()?;
    let peaks = Peaks::watch();
    let cri = Cri::start(scene)?;
    let limit = LinuxContainerResources { memory_limit_in_bytes: LIMIT, ..Default::default() };
    let mut config = cri.pod_config(ID)?;
    config.annotations.insert(PARAMS.to_owned(), format!("rogue={ID}"));
    config.linux.get_or_insert_default().resources = Some(limit.clone());
    let pod = cri.run(config)?;
    let mut main = container("main", PATIENT);
    *resources(&mut main) = limit;
    let refused = cri.create(&pod, main).err().ok_or("a container in a silent pod")?.to_string();
    ensure!(refused.contains("in time"), "why there is no container: {refused}");
    ensure_eq!(cri.pod_status(&pod)?.state(), PodSandboxState::SandboxReady, "state of the pod");
    cri.remove_pod(&pod)?;
    peaks.check()?;
    cri.end()
}
