//! From creation to deletion, and what is left.

use std::time::{Duration, Instant};

use podhull_protocol::{AdjustClockRequest, CreatePodRequest, EventsRequest, Stdio, VERSION};
use serde_json::json;
use ttrpc::Code;

use crate::harness::{
    Agent, DEADLINE, deadline, new_token, process, read_all, refused, shell, shell_process, spec, with,
    without_namespace,
};

#[tokio::test(flavor = "current_thread")]
async fn the_pod_is_made_once_and_with_the_right_version() {
    let agent = Agent::start().await;
    for (version, word) in [(VERSION, "exists already"), (VERSION + 1, "version")] {
        let request = CreatePodRequest { protocol_version: version, ..CreatePodRequest::default() };
        let error = agent.client.create_pod(deadline(), &request).await.unwrap_err().to_string();
        assert!(error.contains("FAILED_PRECONDITION") && error.contains(word), "{error}");
    }
}

/// Who has no machine tells its time, and sets nobody's clock. That it would set is less than the clock can be set by.
#[tokio::test(flavor = "current_thread")]
async fn the_clock_is_told_and_corrected_in_a_machine_alone() {
    let agent = Agent::start().await;
    let ask = async |behind_ns, step| {
        let request = AdjustClockRequest { behind_ns, step, ..AdjustClockRequest::default() };
        agent.client.adjust_clock(deadline(), &request).await
    };
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
    let before = now();
    let told = u128::from(ask(0, true).await.unwrap().realtime_ns);
    assert!((before..=now()).contains(&told), "{told}");
    for step in [false, true] {
        assert_eq!(refused(ask(999, step).await).0, Code::FAILED_PRECONDITION);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_waits_for_its_start() {
    let agent = Agent::start().await;
    let (rootfs, token) = (agent.rootfs(), new_token());
    let stdout = agent.stream(token).await;
    let stdio = Stdio { stdout: token, ..Stdio::default() };
    let pid = agent.create("a", &rootfs, &shell("echo started"), stdio).await.unwrap();
    let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    // None beyond the standard streams.
    assert_eq!(line.split('\0').collect::<Vec<_>>(), ["podhull-agent", "init", "0", ""]);
    agent.start_container("a").await.unwrap();
    assert_eq!(read_all(stdout).await, "started\n");
    assert_eq!(agent.exit_of("a").await.code, 0);
    assert!(agent.start_container("a").await.is_err(), "it was started before");
    assert!(agent.signal("a", 15, false).await.unwrap_err().to_string().contains("container not running"));
    agent.delete("a").await;
    assert!(agent.start_container("a").await.unwrap_err().to_string().contains("does not exist"));
}

#[tokio::test(flavor = "current_thread")]
async fn a_name_is_taken_until_it_is_deleted() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    agent.create("a", &rootfs, &shell("true"), Stdio::default()).await.unwrap();
    let error = agent.create("a", &rootfs, &shell("true"), Stdio::default()).await.unwrap_err().to_string();
    assert!(error.contains("ALREADY_EXISTS"), "{error}");
    agent.delete("a").await;
    agent.create("a", &rootfs, &shell("true"), Stdio::default()).await.unwrap();
    agent.delete("a").await;
    for id in ["", "..", "a/b"] {
        let error = agent.create(id, &rootfs, &shell("true"), Stdio::default()).await.unwrap_err().to_string();
        assert!(error.contains("invalid container id"), "{error}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn signals_reach_the_init_or_all_processes() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    let line = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.01; done";
    let token = new_token();
    let mut stdout = agent.stream(token).await;
    let stdio = Stdio { stdout: token, ..Stdio::default() };
    agent.create("a", &rootfs, &shell(line), stdio).await.unwrap();
    agent.start_container("a").await.unwrap();
    let mut ready = [0; 6];
    tokio::io::AsyncReadExt::read_exact(&mut stdout, &mut ready).await.unwrap();
    agent.signal("a", 15, false).await.unwrap();
    assert_eq!(agent.exit_of("a").await.code, 7);
    agent.delete("a").await;

    agent.create("b", &rootfs, &shell("sleep 1000 & sleep 1000"), Stdio::default()).await.unwrap();
    agent.start_container("b").await.unwrap();
    agent.signal("b", 9, true).await.unwrap();
    assert_eq!(agent.exit_of("b").await.signal, 9);
    agent.delete("b").await;
    let error = agent.signal("b", 9, true).await.unwrap_err().to_string();
    assert!(error.contains("NOT_FOUND"), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn deletion_kills_what_runs_and_what_was_left_behind() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    agent.create("a", &rootfs, &spec(&["sleep", "1000"]), Stdio::default()).await.unwrap();
    agent.start_container("a").await.unwrap();
    agent.delete("a").await;
    assert_eq!(agent.exit_of("a").await.signal, 9);

    // In a shared process namespace the init's children outlive it.
    let mut orphans = shell("sleep 1000 & exit 3");
    without_namespace(&mut orphans, "pid");
    agent.create("b", &rootfs, &orphans, Stdio::default()).await.unwrap();
    agent.start_container("b").await.unwrap();
    assert_eq!(agent.exit_of("b").await.code, 3);
    assert!(!std::fs::read_to_string(agent.cgroup.join("b/cgroup.procs")).unwrap().is_empty());
    agent.delete("b").await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_that_was_never_started_is_deleted() {
    let agent = Agent::start().await;
    agent.create("a", &agent.rootfs(), &shell("true"), Stdio::default()).await.unwrap();
    agent.delete("a").await;
    assert_eq!(agent.exit_of("a").await.signal, 9);
}

#[tokio::test(flavor = "current_thread")]
async fn two_hundred_containers_leave_nothing_in_the_agent() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", agent.pid())).unwrap().count();
    let mounts = || std::fs::read_to_string("/proc/self/mounts").unwrap().lines().count();
    agent.run_in(&rootfs, &shell("true"), b"").await;
    let before = (descriptors(), mounts());
    for round in 0..200 {
        let bad = with(shell("true"), [("/process/args", json!(["missing"]))]);
        if round % 4 == 0 {
            agent.refusal(&bad).await;
        } else {
            assert_eq!(agent.run_in(&rootfs, &shell("true"), b"").await.exit.code, 0);
        }
    }
    // The last streams are closed in their own time.
    let begin = std::time::Instant::now();
    while (descriptors(), mounts()) != before && begin.elapsed() < Duration::from_secs(5) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!((descriptors(), mounts()), before);
    assert!(std::fs::read_dir(&agent.cgroup).unwrap().flatten().all(|entry| !entry.path().is_dir()));
}

#[tokio::test(flavor = "current_thread")]
async fn events_from_before_the_call_are_sent_first() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    for (id, code) in [("a", 5), ("b", 6)] {
        let token = new_token();
        let stdout = agent.stream(token).await;
        let stdio = Stdio { stdout: token, ..Stdio::default() };
        agent.create(id, &rootfs, &shell(&format!("exit {code}")), stdio).await.unwrap();
        agent.start_container(id).await.unwrap();
        // To be deleted before it exits would be to be killed.
        read_all(stdout).await;
        agent.delete(id).await;
    }
    let mut events = agent.client.events(deadline(), &EventsRequest::default()).await.unwrap();
    let mut codes = Vec::new();
    for _ in 0..2 {
        codes.push(events.recv().await.unwrap().unwrap().exit().code);
    }
    codes.sort_unstable();
    assert_eq!(codes, [5, 6]);
}

/// Of what has the same name later the stream tells, and not of what nobody has asked about.
#[tokio::test(flavor = "current_thread")]
async fn what_ends_with_its_lease_leaves_no_events() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    let leased = async || {
        let token = new_token();
        (agent.stream(token).await, Stdio { lease: token, ..Stdio::default() })
    };
    let first = async |id: &str, exec: &str| {
        let request = EventsRequest { container_id: id.into(), exec_id: exec.into(), ..EventsRequest::default() };
        let mut events = agent.client.events(deadline(), &request).await.unwrap();
        tokio::time::timeout(DEADLINE, events.recv()).await.unwrap().unwrap().unwrap().exit().code
    };
    agent.idle("a", &rootfs, &spec(&["sleep", "1000"])).await;
    let (lease, stdio) = leased().await;
    let request = Agent::exec_request("a", "e", &process(&["sleep", "1000"]), stdio);
    agent.client.exec_process(deadline(), &request).await.unwrap();
    drop(lease);
    // The name is free when it is gone.
    let begin = Instant::now();
    while let Err(error) = agent.exec("a", "e", &shell_process("exit 7")).await {
        assert!(error.to_string().contains("ALREADY_EXISTS") && begin.elapsed() < DEADLINE, "{error}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(first("a", "e").await, 7);

    let (lease, stdio) = leased().await;
    agent.create("b", &rootfs, &spec(&["sleep", "1000"]), stdio).await.unwrap();
    agent.start_container("b").await.unwrap();
    drop(lease);
    let begin = Instant::now();
    while let Err(error) = agent.create("b", &rootfs, &shell("exit 5"), Stdio::default()).await {
        assert!(error.to_string().contains("ALREADY_EXISTS") && begin.elapsed() < DEADLINE, "{error}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    agent.start_container("b").await.unwrap();
    assert_eq!(first("b", "").await, 5);
}
