//! Control groups: paths, limits, what happens at the limit.

use podhull_protocol::Stdio;
use serde_json::json;
use ttrpc::Code;

use crate::harness::{Agent, lacks_controller, shell, with};

#[tokio::test(flavor = "current_thread")]
async fn a_container_is_in_the_group_of_its_path_which_nests() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    for (path, place) in
        [("", "x"), ("/a/b", "a/b"), ("a/c", "a/c"), ("m-n.slice:podhull:y", "m.slice/m-n.slice/podhull-y.scope")]
    {
        let spec = with(shell("sleep 1000"), [("/linux/cgroupsPath", json!(path))]);
        let pid = agent.create("x", &rootfs, &spec, Stdio::default()).await.unwrap();
        let procs = std::fs::read_to_string(agent.cgroup.join(place).join("cgroup.procs")).unwrap();
        assert_eq!(procs.trim(), pid.to_string(), "{path}");
        agent.delete("x").await;
        assert!(!agent.cgroup.join(place.split('/').next().unwrap()).exists(), "{path} leaves nothing");
    }
    let (code, message) = agent.refusal(&with(shell("true"), [("/linux/cgroupsPath", json!("/a/../../b"))])).await;
    assert_eq!((code, message.contains("/a/../../b")), (Code::INVALID_ARGUMENT, true));
}

#[tokio::test(flavor = "current_thread")]
async fn a_group_is_shared_by_no_two_containers() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    let spec = with(shell("sleep 1000"), [("/linux/cgroupsPath", json!("/a"))]);
    agent.create("x", &rootfs, &spec, Stdio::default()).await.unwrap();
    let (_, message) = agent.refusal(&spec).await;
    assert!(message.contains("has processes already"), "{message}");
    agent.delete("x").await;
    assert!(!agent.cgroup.join("a").exists());
}

#[tokio::test(flavor = "current_thread")]
async fn a_cgroup_namespace_shows_the_containers_group_as_the_root() {
    let agent = Agent::start().await;
    let spec = with(
        shell("grep ^0:: /proc/self/cgroup; cat /sys/fs/cgroup/cgroup.procs | head -1"),
        [("/linux/cgroupsPath", json!("/a/b"))],
    );
    assert_eq!(agent.run(&spec).await.ok(), "0::/\n1\n");
}

#[tokio::test(flavor = "current_thread")]
async fn a_limit_without_its_controller_or_meaning_is_refused() {
    let agent = Agent::start().await;
    let spec = with(shell("true"), [("/linux/resources/memory", json!({"swappiness": 5}))]);
    let (code, message) = agent.refusal(&spec).await;
    assert_eq!((code, message.contains("memory.swappiness")), (Code::INVALID_ARGUMENT, true));
    let spec = with(shell("true"), [("/linux/resources/unified", json!({"no.such": "5"}))]);
    let (code, message) = agent.refusal(&spec).await;
    assert_eq!((code, message.contains("no.such")), (Code::INVALID_ARGUMENT, true));
}

#[tokio::test(flavor = "current_thread")]
async fn limits_are_in_the_files_of_the_group() {
    if ["cpu", "cpuset", "memory", "pids"].iter().any(|name| lacks_controller(name)) {
        return;
    }
    let agent = Agent::start().await;
    let resources = json!({
        "cpu": {"shares": 1024, "quota": 10_000, "period": 100_000, "cpus": "0", "mems": "0"},
        "memory": {"limit": 64 << 20, "reservation": 32 << 20},
        "pids": {"limit": 20},
        "unified": {"memory.high": "60000000"}
    });
    let files = "cpu.weight cpu.max cpuset.cpus cpuset.mems memory.max memory.low pids.max memory.high";
    let line = format!("cd /sys/fs/cgroup; for f in {files}; do echo $(cat $f); done");
    let expected = "100\n10000 100000\n0\n0\n67108864\n33554432\n20\n59998208\n";
    let spec = with(shell(&line), [("/linux/resources", resources)]);
    assert_eq!(agent.run(&spec).await.ok(), expected);
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_that_takes_too_much_memory_is_killed_and_an_event_and_the_exit_say_so() {
    if lacks_controller("memory") {
        return;
    }
    let agent = Agent::start().await;
    let spec = with(shell("exec tail /dev/zero"), [("/linux/resources", json!({"memory": {"limit": 32 << 20}}))]);
    // Its end may come to the agent before the kernel says that it was killed.
    for _ in 0..10 {
        let outcome = agent.run(&spec).await;
        assert_eq!((outcome.exit.signal, outcome.exit.oom_killed, outcome.kills), (9, true, 1));
    }
    let modest = with(shell("true"), [("/linux/resources", json!({"memory": {"limit": 32 << 20}}))]);
    let outcome = agent.run(&modest).await;
    assert_eq!((outcome.exit.oom_killed, outcome.kills), (false, 0));
}

#[tokio::test(flavor = "current_thread")]
async fn a_fork_bomb_meets_its_limit() {
    if lacks_controller("pids") {
        return;
    }
    let agent = Agent::start().await;
    let line = "for i in $(seq 40); do sleep 1000 & done; echo unreachable";
    let spec = with(shell(line), [("/linux/resources", json!({"pids": {"limit": 20}}))]);
    let outcome = agent.run(&spec).await;
    assert!(outcome.stderr.contains("can't fork") && outcome.exit.code != 0, "{outcome:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_parents_limit_binds_the_sum_of_its_children() {
    if lacks_controller("cpu") {
        return;
    }
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    let parent = agent.cgroup.join("parent");
    std::fs::create_dir(&parent).unwrap();
    // Long periods: whoever's processor stands still over several of them, as an emulated one may, gets the quota of one.
    std::fs::write(parent.join("cpu.max"), "50000 500000").unwrap();
    for child in ["a", "b"] {
        let spec = with(
            shell("while :; do :; done"),
            [
                ("/linux/cgroupsPath", json!(format!("/parent/{child}"))),
                ("/linux/resources", json!({"cpu": {"quota": 30_000, "period": 500_000}})),
            ],
        );
        agent.create(child, &rootfs, &spec, Stdio::default()).await.unwrap();
        agent.start_container(child).await.unwrap();
    }
    let usage = || -> f64 {
        let stat = std::fs::read_to_string(parent.join("cpu.stat")).unwrap();
        stat.lines().find_map(|line| line.strip_prefix("usage_usec ")).unwrap().parse().unwrap()
    };
    let (before, begin) = (usage(), std::time::Instant::now());
    tokio::time::sleep(std::time::Duration::from_secs(10)).await;
    let share = (usage() - before) / begin.elapsed().as_micros() as f64;
    assert!((0.09..=0.11).contains(&share), "the two children together had {:.1} %", share * 100.0);
    for child in ["a", "b"] {
        agent.delete(child).await;
    }
}
