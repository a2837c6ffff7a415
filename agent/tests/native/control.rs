//! What is done to a container that runs: pause, update, statistics, signals to all.

use std::time::Duration;

use podhull_protocol::{
    ContainerStatsRequest, ContainerStatsResponse, PauseContainerRequest, ResumeContainerRequest, Stdio,
    UpdateContainerRequest,
};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use ttrpc::Code;

use crate::harness::{
    Agent, deadline, lacks_controller, new_token, process, refused, shell, spec, with, without_namespace,
};

async fn pause(agent: &Agent, id: &str) -> ttrpc::Result<()> {
    let request = PauseContainerRequest { id: id.into(), ..PauseContainerRequest::default() };
    agent.client.pause_container(deadline(), &request).await.map(drop)
}

async fn resume(agent: &Agent, id: &str) -> ttrpc::Result<()> {
    let request = ResumeContainerRequest { id: id.into(), ..ResumeContainerRequest::default() };
    agent.client.resume_container(deadline(), &request).await.map(drop)
}

async fn update(agent: &Agent, id: &str, resources: Value) -> ttrpc::Result<()> {
    let resources = serde_json::to_vec(&resources).unwrap();
    let request = UpdateContainerRequest { id: id.into(), resources, ..UpdateContainerRequest::default() };
    agent.client.update_container(deadline(), &request).await.map(drop)
}

async fn stats(agent: &Agent, id: &str) -> ContainerStatsResponse {
    let request = ContainerStatsRequest { id: id.into(), ..ContainerStatsRequest::default() };
    agent.client.container_stats(deadline(), &request).await.unwrap()
}

#[tokio::test(flavor = "current_thread")]
async fn a_paused_container_stands_still_until_it_is_resumed() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    let token = new_token();
    let mut stdout = agent.stream(token).await;
    let stdio = Stdio { stdout: token, ..Stdio::default() };
    agent.create("a", &rootfs, &shell("while :; do echo x; done"), stdio).await.unwrap();
    assert_eq!(refused(resume(&agent, "a").await), (Code::FAILED_PRECONDITION, "container not paused".into()));
    agent.start_container("a").await.unwrap();
    stdout.read_exact(&mut [0; 100]).await.unwrap();
    pause(&agent, "a").await.unwrap();
    let file = |name: &str| std::fs::read_to_string(agent.cgroup.join("a").join(name)).unwrap();
    assert!(file("cgroup.events").contains("frozen 1"));
    // What was on its way comes, then nothing.
    let mut buffer = vec![0; 1 << 20];
    while tokio::time::timeout(Duration::from_millis(300), stdout.read(&mut buffer)).await.is_ok() {}
    assert_eq!(refused(pause(&agent, "a").await), (Code::FAILED_PRECONDITION, "container not running".into()));
    let (code, message) = refused(agent.exec("a", "e", &process(&["true"])).await);
    assert_eq!((code, message.as_str()), (Code::FAILED_PRECONDITION, "cannot exec in a paused container"));
    resume(&agent, "a").await.unwrap();
    stdout.read_exact(&mut [0; 100]).await.unwrap();
    assert!(file("cgroup.events").contains("frozen 0"));

    // On request a process waits in there for its time to come.
    pause(&agent, "a").await.unwrap();
    let mut request = Agent::exec_request("a", "e", &process(&["true"]), Stdio::default());
    request.ignore_paused = true;
    let waiting = agent.client.exec_process(deadline(), &request);
    let meanwhile = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        resume(&agent, "a").await.unwrap();
    };
    tokio::join!(waiting, meanwhile).0.unwrap();
    assert_eq!(agent.exit_of_process("a", "e").await.code, 0);

    pause(&agent, "a").await.unwrap();
    // Output that nobody takes would hold up the exit.
    drop(stdout);
    agent.delete("a").await;
    assert_eq!(agent.exit_of("a").await.signal, 9);
    assert_eq!(refused(pause(&agent, "a").await).0, Code::NOT_FOUND);
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_that_has_ended_is_neither_paused_nor_updated() {
    let agent = Agent::start().await;
    agent.idle("a", &agent.rootfs(), &shell("true")).await;
    agent.exit_of("a").await;
    let not_running = (Code::FAILED_PRECONDITION, "container not running".to_owned());
    assert_eq!(refused(pause(&agent, "a").await), not_running);
    assert_eq!(refused(update(&agent, "a", json!({})).await), not_running);
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn statistics_are_those_of_the_group() {
    let agent = Agent::start().await;
    agent.idle("a", &agent.rootfs(), &shell("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 1000")).await;
    let begin = std::time::Instant::now();
    let mut cpu = 0;
    while cpu < 10_000 && begin.elapsed() < crate::harness::DEADLINE {
        tokio::time::sleep(Duration::from_millis(50)).await;
        cpu = stats(&agent, "a").await.cpu.usage_usec;
    }
    let now = stats(&agent, "a").await;
    assert!(cpu >= 10_000 && now.cpu.user_usec + now.cpu.system_usec <= now.cpu.usage_usec + 2, "{now:?}");
    let file = |name: &str| agent.cgroup.join("a").join(name).exists();
    assert_eq!(now.cpu.pressure.is_some(), file("cpu.pressure"));
    for (there, name) in
        [(now.memory.is_some(), "memory.current"), (now.pids.is_some(), "pids.current"), (now.io.is_some(), "io.stat")]
    {
        assert_eq!(there, file(name), "{name}");
    }
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn statistics_have_the_limits_and_what_met_them() {
    if ["cpu", "memory", "pids"].iter().any(|name| lacks_controller(name)) {
        return;
    }
    let agent = Agent::start().await;
    let resources =
        json!({"cpu": {"quota": 25_000, "period": 50_000}, "memory": {"limit": 64 << 20}, "pids": {"limit": 20}});
    let line = "head -c 8000000 /dev/zero > /dev/shm/x; (exec tail /dev/zero); while :; do :; done";
    agent.idle("a", &agent.rootfs(), &with(shell(line), [("/linux/resources", resources)])).await;
    let begin = std::time::Instant::now();
    let now = loop {
        let now = stats(&agent, "a").await;
        if now.memory.events.oom_kill > 0 && now.cpu.throttled_periods > 2 {
            break now;
        }
        assert!(begin.elapsed() < crate::harness::DEADLINE, "{now:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let memory = &now.memory;
    assert_eq!((memory.limit, now.pids.limit), (64 << 20, 20));
    assert!(memory.usage >= 8_000_000 && memory.peak >= memory.usage && memory.events.max > 0, "{memory:?}");
    assert!(memory.stat["shmem"] >= 8_000_000 && memory.stat.contains_key("pgfault"), "{memory:?}");
    assert!(now.pids.current >= 1 && now.cpu.throttled_usec > 0 && now.cpu.periods >= now.cpu.throttled_periods);
    update(&agent, "a", json!({"pids": {"limit": -1}, "memory": {"limit": -1}})).await.unwrap();
    let now = stats(&agent, "a").await;
    assert_eq!((now.memory.limit, now.pids.limit), (u64::MAX, u64::MAX));
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn an_update_names_what_it_cannot_do() {
    let agent = Agent::start().await;
    agent.idle("a", &agent.rootfs(), &spec(&["sleep", "1000"])).await;
    // Device rules as they are change nothing.
    update(&agent, "a", json!({"devices": [{"allow": false, "access": "rwm"}]})).await.unwrap();
    for (resources, word) in [
        (json!({"memory": {"swappiness": 5}}), "memory.swappiness"),
        (json!({"wishes": 5}), "unknown field `wishes`"),
        (json!({"devices": [{"allow": true, "access": "rwm"}]}), "linux.resources.devices"),
        (json!({"unified": {"no.such": "5"}}), "no.such"),
    ] {
        let (code, message) = refused(update(&agent, "a", resources).await);
        assert_eq!((code, message.contains(word)), (Code::INVALID_ARGUMENT, true), "{message}");
    }
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn an_update_changes_what_it_says_and_all_or_nothing() {
    if ["cpu", "cpuset", "memory", "pids"].iter().any(|name| lacks_controller(name)) {
        return;
    }
    let agent = Agent::start().await;
    let resources = json!({"cpu": {"shares": 1024, "quota": 10_000, "period": 100_000, "burst": 8000},
                           "memory": {"limit": 64 << 20}, "pids": {"limit": 20}});
    agent.idle("a", &agent.rootfs(), &with(spec(&["sleep", "1000"]), [("/linux/resources", resources)])).await;
    let files = ["cpu.weight", "cpu.max", "cpu.max.burst", "memory.max", "memory.low", "pids.max", "cpuset.cpus"];
    let state = || {
        files
            .map(|name| std::fs::read_to_string(agent.cgroup.join("a").join(name)).unwrap().trim().to_owned())
            .join(", ")
    };
    assert_eq!(state(), "100, 10000 100000, 8000, 67108864, 0, 20, ");
    for (resources, expected) in [
        (json!({}), "100, 10000 100000, 8000, 67108864, 0, 20, "),
        (json!({"cpu": {"period": 50_000}}), "100, 10000 50000, 8000, 67108864, 0, 20, "),
        (json!({"cpu": {"quota": 6000, "burst": 5000}}), "100, 6000 50000, 5000, 67108864, 0, 20, "),
        (json!({"cpu": {"quota": 20_000, "burst": 15_000}}), "100, 20000 50000, 15000, 67108864, 0, 20, "),
        (json!({"cpu": {"burst": 0, "shares": 2}, "pids": {"limit": 7}}), "1, 20000 50000, 0, 67108864, 0, 7, "),
        (json!({"cpu": {"quota": -1, "cpus": "0"}}), "1, max 50000, 0, 67108864, 0, 7, 0"),
        (json!({"memory": {"limit": 32 << 20, "reservation": 16 << 20}}), "1, max 50000, 0, 33554432, 16777216, 7, 0"),
        (json!({"memory": {"limit": -1}, "pids": {"limit": -1}}), "1, max 50000, 0, max, 16777216, max, 0"),
    ] {
        update(&agent, "a", resources.clone()).await.unwrap();
        assert_eq!(state(), expected, "{resources}");
    }
    let before = state();
    for (resources, word) in [
        (json!({"cpu": {"shares": 512}, "memory": {"limit": 8 << 20, "swap": 5}}), "memory.swap"),
        // The kernel is who refuses these, when others are set already.
        (json!({"cpu": {"shares": 512, "quota": 7000, "cpus": "0", "mems": "99"}}), "cpuset.mems"),
        (json!({"memory": {"limit": 8 << 20}, "unified": {"memory.high": "nonsense"}}), "memory.high"),
    ] {
        let (code, message) = refused(update(&agent, "a", resources).await);
        assert!(message.contains(word), "{code:?} {message}");
        assert_eq!(state(), before, "{message}");
    }
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn signals_to_all_reach_what_a_container_left_behind() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    for signal in [15, 9] {
        let mut orphans = shell("sleep 1000 & sleep 1000 & exit 3");
        without_namespace(&mut orphans, "pid");
        agent.idle("a", &rootfs, &orphans).await;
        assert_eq!(agent.exit_of("a").await.code, 3);
        let left = || std::fs::read_to_string(agent.cgroup.join("a/cgroup.procs")).unwrap().lines().count();
        assert_eq!(left(), 2);
        assert!(refused(agent.signal("a", signal, false).await).1.contains("container not running"));
        agent.signal("a", signal, true).await.unwrap();
        let begin = std::time::Instant::now();
        while left() > 0 {
            assert!(begin.elapsed() < crate::harness::DEADLINE, "{signal}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        agent.delete("a").await;
    }
}
