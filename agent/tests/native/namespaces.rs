//! Namespaces, names, users, clocks, sysctls.

use serde_json::json;

use crate::harness::{Agent, privileged, set, shell, with, without_namespace};

fn link(kind: &str) -> String {
    std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().display().to_string()
}

#[tokio::test(flavor = "current_thread")]
async fn each_namespace_asked_for_is_private_and_each_omitted_one_is_shared() {
    let agent = Agent::start().await;
    for (kind, file) in
        [("pid", "pid"), ("network", "net"), ("ipc", "ipc"), ("uts", "uts"), ("cgroup", "cgroup"), ("mount", "mnt")]
    {
        let line = format!("readlink /proc/self/ns/{file}");
        assert_ne!(agent.run(&shell(&line)).await.ok().trim(), link(file), "{kind} is private");
        if kind == "mount" {
            continue;
        }
        let mut shared = shell(&line);
        without_namespace(&mut shared, kind);
        if kind == "uts" {
            set(&mut shared, "/hostname", "");
        }
        assert_eq!(agent.run(&shared).await.ok().trim(), link(file), "{kind} is shared");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_without_a_mount_namespace_has_its_own_root_in_the_shared_one() {
    let agent = Agent::start().await;
    let mut spec = shell("ls /; pwd");
    without_namespace(&mut spec, "mount");
    for field in ["/mounts", "/linux/maskedPaths", "/linux/readonlyPaths"] {
        set(&mut spec, field, json!([]));
    }
    set(&mut spec, "/root/readonly", false);
    assert_eq!(agent.run(&spec).await.ok(), "bin\ndev\netc\nproc\nroot\nsys\ntmp\n/\n");
}

#[tokio::test(flavor = "current_thread")]
async fn host_and_domain_name_are_set() {
    let agent = Agent::start().await;
    let spec = with(
        shell("hostname; cat /proc/sys/kernel/domainname; echo $$"),
        [("/hostname", json!("inner")), ("/domainname", json!("example"))],
    );
    assert_eq!(agent.run(&spec).await.ok(), "inner\nexample\n1\n");
    assert_ne!(std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim(), "inner");
}

#[tokio::test(flavor = "current_thread")]
async fn the_loopback_interface_of_a_network_namespace_is_up() {
    let agent = Agent::start().await;
    let output = agent.run(&shell("cat /sys/class/net/lo/flags; ls /sys/class/net")).await.ok();
    assert_eq!(output.lines().next(), Some("0x9"), "{output}");
    assert!(!output.contains("eth0"), "{output}");
}

#[tokio::test(flavor = "current_thread")]
async fn users_are_mapped_in_a_user_namespace() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    let own = |path: &std::path::Path| std::os::unix::fs::lchown(path, Some(100_000), Some(100_000)).unwrap();
    own(&agent.root_path(&rootfs));
    own(&agent.root_path(&rootfs).join("root"));
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    let mut spec = privileged(
        "id -u; cat /proc/self/uid_map | tr -s ' '; touch /root/mine; stat -c %u /root/mine; cat /proc/self/setgroups; \
         echo x > /dev/null; mount -t tmpfs none /root && echo mounted; hostname renamed && hostname",
    );
    set(&mut spec, "/linux/namespaces/-", json!({"type": "user"}));
    set(&mut spec, "/linux/uidMappings", mapping.clone());
    set(&mut spec, "/linux/gidMappings", mapping);
    let output = agent.run_in(&rootfs, &spec, b"").await.ok();
    assert_eq!(output, "0\n 0 100000 65536\n0\nallow\nmounted\nrenamed\n");
    let made = std::fs::metadata(agent.root_path(&rootfs).join("root/mine")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), 100_000);
}

#[tokio::test(flavor = "current_thread")]
async fn clocks_are_shifted_in_a_time_namespace() {
    let agent = Agent::start().await;
    let mut spec = shell("cut -d. -f1 /proc/uptime; cat /proc/self/timens_offsets | tr -s ' '");
    set(&mut spec, "/linux/namespaces/-", json!({"type": "time"}));
    set(
        &mut spec,
        "/linux/timeOffsets",
        json!({"boottime": {"secs": 10_000_000}, "monotonic": {"secs": 7, "nanosecs": 5}}),
    );
    let output = agent.run(&spec).await.ok();
    let uptime: u64 = output.lines().next().unwrap().parse().unwrap();
    assert!(uptime > 10_000_000, "{output}");
    assert!(output.ends_with("monotonic 7 5\nboottime 10000000 0\n"), "{output}");
}

#[tokio::test(flavor = "current_thread")]
async fn sysctls_are_set_in_the_namespaces_of_the_container_alone() {
    let agent = Agent::start().await;
    let outside = std::fs::read_to_string("/proc/sys/kernel/msgmax").unwrap();
    let spec = with(
        shell("cat /proc/sys/net/ipv4/ping_group_range /proc/sys/kernel/msgmax; echo 1 > /proc/sys/kernel/msgmax"),
        [("/linux/sysctl", json!({"net.ipv4.ping_group_range": "0 5", "kernel.msgmax": "65530"}))],
    );
    let outcome = agent.run(&spec).await;
    assert_eq!(outcome.stdout, "0\t5\n65530\n");
    assert!(outcome.stderr.contains("Read-only file system"), "{outcome:?}");
    assert_eq!(std::fs::read_to_string("/proc/sys/kernel/msgmax").unwrap(), outside);
}
