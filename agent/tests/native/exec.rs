//! Processes executed in a container that runs.

use podhull_protocol::{ResizeTerminalRequest, Stdio};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::Code;

use crate::harness::{
    Agent, SYS_RESOURCE, deadline, lacks_capability, lacks_controller, mount, new_token, privileged, process, read_all,
    refused, set, shell, shell_process, spec, with, without_namespace,
};

#[tokio::test(flavor = "current_thread")]
async fn it_is_in_every_namespace_the_root_and_the_cgroup_of_the_container() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    for missing in ["", "pid", "network", "ipc", "uts", "cgroup", "mount"] {
        let mut spec = spec(&["sleep", "1000"]);
        without_namespace(&mut spec, missing);
        if missing == "uts" {
            set(&mut spec, "/hostname", "");
        }
        if missing == "mount" {
            for field in ["/mounts", "/linux/maskedPaths", "/linux/readonlyPaths"] {
                set(&mut spec, field, json!([]));
            }
            set(&mut spec, "/root/readonly", false);
        }
        let pid = agent.create("a", &rootfs, &spec, Stdio::default()).await.unwrap();
        agent.start_container("a").await.unwrap();
        agent.exec("a", "e", &process(&["sleep", "1000"])).await.unwrap();
        let executed: Vec<i32> = std::fs::read_to_string(agent.cgroup.join("a/cgroup.procs"))
            .unwrap()
            .lines()
            .map(|line| line.parse().unwrap())
            .filter(|process| *process != pid)
            .collect();
        let [executed] = executed[..] else { panic!("{executed:?}") };
        for kind in ["pid", "net", "ipc", "uts", "cgroup", "mnt", "user", "time"] {
            let link = |pid| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
            assert_eq!(link(executed), link(pid), "{kind}, without {missing:?}");
        }
        let root =
            |pid| std::fs::metadata(format!("/proc/{pid}/root")).map(|m| std::os::unix::fs::MetadataExt::ino(&m));
        assert_eq!(root(executed).unwrap(), root(pid).unwrap(), "root, without {missing:?}");
        agent.delete("a").await;
        assert_eq!(agent.exit_of_process("a", "e").await.signal, 9);
        assert_eq!(agent.exit_of("a").await.signal, 9);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn output_and_exit_codes_come_back_as_they_are() {
    let agent = Agent::start().await;
    agent.idle("a", &agent.rootfs(), &spec(&["sleep", "1000"])).await;
    for code in [0, 7, 255] {
        let outcome = agent.exec_run("a", &shell_process(&format!("echo out; echo err >&2; exit {code}"))).await;
        assert_eq!((outcome.exit.code, outcome.stdout.as_str(), outcome.stderr.as_str()), (code, "out\n", "err\n"));
    }
    assert_eq!(agent.exec_run("a", &shell_process("kill -15 $$; sleep 60")).await.exit.signal, 15);
    let token = [new_token(), new_token()];
    let (mut stdin, stdout) = (agent.stream(token[0]).await, agent.stream(token[1]).await);
    let stdio = Stdio { stdin: token[0], stdout: token[1], ..Stdio::default() };
    let request = Agent::exec_request("a", "cat", &process(&["cat"]), stdio);
    agent.client.exec_process(deadline(), &request).await.unwrap();
    stdin.write_all(b"through").await.unwrap();
    stdin.shutdown().await.unwrap();
    assert_eq!(read_all(stdout).await, "through");
    assert_eq!(agent.exit_of_process("a", "cat").await.code, 0);
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_program_that_cannot_be_executed_is_told_in_the_words_of_runc_and_leaves_nothing() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    let noise = agent.root_path(&rootfs).join("bin/noise");
    std::fs::write(&noise, "noise").unwrap();
    std::fs::set_permissions(&noise, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    agent.idle("a", &rootfs, &spec(&["sleep", "1000"])).await;
    for (args, code, message) in [
        (&["foo"][..], Code::NOT_FOUND, r#"exec: "foo": executable file not found in $PATH"#),
        (&["/foo"], Code::NOT_FOUND, r#"exec: "/foo": stat /foo: no such file or directory"#),
        (&["/etc/passwd"], Code::PERMISSION_DENIED, r#"exec: "/etc/passwd": permission denied"#),
        (&["noise"], Code::PERMISSION_DENIED, "exec /bin/noise: exec format error"),
        (&[], Code::INVALID_ARGUMENT, "process.args: expected at least the name of a program"),
    ] {
        // The name is free again each time.
        assert_eq!(refused(agent.exec("a", "e", &process(args)).await), (code, message.to_owned()));
    }
    let nowhere = with(json!({"process": process(&["true"])}), [("/process/cwd", json!("/no/where"))]);
    let (_, message) = refused(agent.exec("a", "e", &nowhere["process"]).await);
    assert_eq!(message, r#"chdir to cwd ("/no/where") set in config.json failed: no such file or directory"#);
    assert_eq!(agent.exec_run("a", &process(&["true"])).await.exit.code, 0);
    let procs = std::fs::read_to_string(agent.cgroup.join("a/cgroup.procs")).unwrap();
    assert_eq!(procs.lines().count(), 1, "{procs}");
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_that_does_not_run_executes_nothing() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    let (code, message) = refused(agent.exec("a", "e", &process(&["true"])).await);
    assert_eq!((code, message.contains("does not exist")), (Code::NOT_FOUND, true), "{message}");

    // One that is created does, as with runc, and in its time namespace, which the init itself is not in yet.
    let mut created = shell("exit 3");
    set(&mut created, "/linux/namespaces/-", json!({"type": "time"}));
    set(&mut created, "/linux/timeOffsets", json!({"boottime": {"secs": 10_000_000}}));
    agent.create("a", &rootfs, &created, Stdio::default()).await.unwrap();
    let uptime = process(&["cut", "-d.", "-f1", "/proc/uptime"]);
    assert!(agent.exec_run("a", &uptime).await.ok().trim().parse::<u64>().unwrap() > 10_000_000);
    agent.start_container("a").await.unwrap();
    assert_eq!(agent.exit_of("a").await.code, 3);
    let (code, message) = refused(agent.exec("a", "e", &process(&["true"])).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert_eq!(message, "cannot exec in a stopped container: container not running");
    agent.delete("a").await;

    let mut running = with(created, [("/process/args", json!(["sleep", "1000"]))]);
    set(&mut running, "/linux/timeOffsets", json!({"boottime": {"secs": 20_000_000}}));
    agent.idle("a", &rootfs, &running).await;
    assert!(agent.exec_run("a", &uptime).await.ok().trim().parse::<u64>().unwrap() > 20_000_000);
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn the_process_is_as_it_says_and_as_the_container_where_it_does_not() {
    if lacks_capability(SYS_RESOURCE) {
        return;
    }
    let agent = Agent::start().await;
    let container = with(
        spec(&["sleep", "1000"]),
        [
            ("/process/oomScoreAdj", json!(77)),
            ("/process/scheduler", json!({"policy": "SCHED_BATCH", "nice": 4})),
            ("/process/ioPriority", json!({"class": "IOPRIO_CLASS_BE", "priority": 6})),
            ("/process/user/umask", json!(0o077)),
            ("/linux/personality", json!({"domain": "LINUX32"})),
        ],
    );
    agent.idle("a", &agent.rootfs(), &container).await;
    let line = "id -u; id -g; grep Groups /proc/self/status; umask; echo $HOME; pwd; uname -m; cut -d' ' -f19,41 /proc/$$/stat; \
                ionice -p $$; cat /proc/self/oom_score_adj; grep -E 'NoNewPrivs|CapBnd|CapEff' /proc/self/status; \
                grep 'open files' /proc/self/limits | tr -s ' '";
    let bare = json!({"cwd": "/", "args": ["/bin/sh", "-c", line], "env": ["PATH=/bin"]});
    let capabilities = 1u64 << 29 | 1 << 5 | 1 << 10;
    assert_eq!(
        agent.exec_run("a", &bare).await.ok(),
        format!(
            "0\n0\nGroups:\t \n0077\n/root\n/\ni686\n4 3\nbest-effort: prio 6\n77\nCapEff:\t{capabilities:016x}\n\
             CapBnd:\t{capabilities:016x}\nNoNewPrivs:\t0\nMax open files 1024 1024 files \n"
        )
    );
    let full = json!({
        "cwd": "/tmp", "args": ["/bin/sh", "-c", line], "env": ["PATH=/bin"],
        "user": {"uid": 1000, "gid": 1001, "additionalGids": [5, 7], "umask": 0o027},
        "capabilities": {"bounding": ["CAP_KILL"], "inheritable": ["CAP_KILL"], "permitted": ["CAP_KILL"],
                         "effective": ["CAP_KILL"], "ambient": ["CAP_KILL"]},
        "noNewPrivileges": true, "oomScoreAdj": 100,
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 70, "hard": 80}],
        "scheduler": {"policy": "SCHED_OTHER", "nice": 9},
        "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 2},
    });
    assert_eq!(
        agent.exec_run("a", &full).await.ok(),
        format!(
            "1000\n1001\nGroups:\t5 7 \n0027\n/home/user\n/tmp\ni686\n9 0\nbest-effort: prio 2\n100\nCapEff:\t{kill:016x}\n\
             CapBnd:\t{kill:016x}\nNoNewPrivs:\t1\nMax open files 70 80 files \n",
            kill = 1 << 5
        )
    );
    for (field, value, word) in [
        ("wish", json!(1), "unknown field `wish`"),
        ("execCPUAffinity", json!({"final": "x"}), "execCPUAffinity.final"),
        ("execCPUAffinity", json!({"initial": "1023"}), "execCPUAffinity.initial"),
        ("cwd", json!("x"), "process.cwd"),
        ("capabilities", json!({"bounding": ["CAP_FLY"]}), "CAP_FLY"),
    ] {
        let mut wrong = bare.clone();
        wrong[field] = value;
        let (code, message) = refused(agent.exec("a", "e", &wrong).await);
        assert_eq!((code, message.contains(word)), (Code::INVALID_ARGUMENT, true), "{message}");
    }
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn it_runs_on_the_cpus_it_says_which_are_not_those_of_the_init() {
    let agent = Agent::start().await;
    let allowed = |text: &str| text.split_once("list:\t").unwrap().1.trim().to_owned();
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let own = allowed(own.lines().find(|line| line.starts_with("Cpus_allowed_list:")).unwrap());
    let last = own.rsplit(['-', ',']).next().unwrap();
    let container = with(
        shell("grep Cpus_allowed_list /proc/self/status; sleep 1000"),
        [("/process/execCPUAffinity", json!({"initial": own, "final": last}))],
    );
    let token = new_token();
    let mut stdout = tokio::io::BufReader::new(agent.stream(token).await);
    let stdio = Stdio { stdout: token, ..Stdio::default() };
    agent.create("a", &agent.rootfs(), &container, stdio).await.unwrap();
    agent.start_container("a").await.unwrap();
    let mut line = String::new();
    tokio::io::AsyncBufReadExt::read_line(&mut stdout, &mut line).await.unwrap();
    assert_eq!(allowed(&line), own);
    let mut process = process(&["grep", "Cpus_allowed_list", "/proc/self/status"]);
    assert_eq!(allowed(&agent.exec_run("a", &process).await.ok()), last);
    process["execCPUAffinity"] = json!({"initial": own});
    assert_eq!(allowed(&agent.exec_run("a", &process).await.ok()), own);
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn the_system_call_filter_is_the_containers() {
    let agent = Agent::start().await;
    let filter = json!({"defaultAction": "SCMP_ACT_ALLOW",
                        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]});
    for privileges in [true, false] {
        let mut container = with(spec(&["sleep", "1000"]), [("/root/readonly", json!(false))]);
        set(&mut container, "/linux/seccomp", filter.clone());
        agent.idle("a", &agent.rootfs(), &container).await;
        let mut mkdir = process(&["mkdir", "/tmp/x"]);
        mkdir["noNewPrivileges"] = json!(privileges);
        let outcome = agent.exec_run("a", &mkdir).await;
        assert!(outcome.exit.code == 1 && outcome.stderr.contains("not implemented"), "{outcome:?}");
        agent.delete("a").await;
    }
}

#[tokio::test(flavor = "current_thread")]
async fn users_are_those_of_the_user_namespace() {
    if lacks_capability(SYS_RESOURCE) {
        return;
    }
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    let own = |path: &std::path::Path| std::os::unix::fs::lchown(path, Some(100_000), Some(100_000)).unwrap();
    own(&agent.root_path(&rootfs));
    own(&agent.root_path(&rootfs).join("root"));
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    let mut spec = privileged("sleep 1000");
    set(&mut spec, "/linux/namespaces/-", json!({"type": "user"}));
    set(&mut spec, "/linux/uidMappings", mapping.clone());
    set(&mut spec, "/linux/gidMappings", mapping);
    agent.idle("a", &rootfs, &spec).await;
    let mut inside = spec["process"].clone();
    inside["args"] = json!([
        "/bin/sh",
        "-c",
        "id -u; touch /root/mine; stat -c %u /root/mine; readlink /proc/self/fd/1 >&2; \
                             echo again > /dev/stdout; mount -t tmpfs none /root && echo mounted"
    ]);
    assert_eq!(agent.exec_run("a", &inside).await.ok(), "0\n0\nagain\nmounted\n");
    inside["user"] = json!({"uid": 1000, "gid": 1000});
    inside["args"] = json!(["/bin/sh", "-c", "id -u; echo again > /dev/stdout"]);
    assert_eq!(agent.exec_run("a", &inside).await.ok(), "1000\nagain\n");
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_terminal_is_one_more_of_the_container() {
    let agent = Agent::start().await;
    agent.idle("a", &agent.rootfs(), &spec(&["sleep", "1000"])).await;
    let token = new_token();
    let mut stream = agent.stream(token).await;
    let mut process = shell_process(
        "trap 'stty size; exit 4' WINCH; tty; stty size; echo > /dev/tty; echo ready; while :; do sleep 0.01; done",
    );
    let stdio = Stdio { terminal: true, stdout: token, rows: 30, columns: 110, ..Stdio::default() };
    let request = Agent::exec_request("a", "e", &process, stdio.clone());
    let (_, message) = refused(agent.client.exec_process(deadline(), &request).await);
    assert!(message.contains("process.terminal is false, but the call says true"), "{message}");
    process["terminal"] = json!(true);
    let stdio = Stdio { stdout: new_token(), ..stdio };
    let token = stdio.stdout;
    let mut stream2 = agent.stream(token).await;
    std::mem::swap(&mut stream, &mut stream2);
    let request = Agent::exec_request("a", "e", &process, stdio);
    agent.client.exec_process(deadline(), &request).await.unwrap();
    let mut seen = String::new();
    let mut buffer = [0; 256];
    while !seen.contains("ready") {
        let count = stream.read(&mut buffer).await.unwrap();
        assert!(count > 0, "{seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    assert!(seen.starts_with("/dev/pts/0\r\n30 110\r\n"), "{seen}");
    let (rows, columns) = (50, 132);
    let resize = ResizeTerminalRequest {
        id: "a".into(),
        exec_id: "e".into(),
        rows,
        columns,
        ..ResizeTerminalRequest::default()
    };
    agent.client.resize_terminal(deadline(), &resize).await.unwrap();
    assert!(read_all(stream).await.contains("50 132"));
    assert_eq!(agent.exit_of_process("a", "e").await.code, 4);
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_terminal_is_taken_from_devpts_and_from_nothing_else() {
    let agent = Agent::start().await;
    let mut container =
        privileged("mkfifo /dev/pts/ptmx; mkfifo /etc/passwd.f; mv /etc/passwd.f /etc/passwd; echo ok; sleep 1000");
    mount(&mut container, "/dev/pts", "tmpfs", "tmpfs", &[]);
    let token = new_token();
    let mut stdout = agent.stream(token).await;
    let stdio = Stdio { stdout: token, ..Stdio::default() };
    agent.create("a", &agent.rootfs(), &container, stdio).await.unwrap();
    agent.start_container("a").await.unwrap();
    stdout.read_exact(&mut [0; 3]).await.unwrap();
    let mut process = process(&["true"]);
    // A fifo for /etc/passwd is not waited for either.
    assert_eq!(agent.exec_run("a", &process).await.exit.code, 0);
    process["terminal"] = json!(true);
    let stdio = Stdio { terminal: true, stdout: new_token(), ..Stdio::default() };
    let request = Agent::exec_request("a", "e", &process, stdio);
    let (_, message) = refused(agent.client.exec_process(deadline(), &request).await);
    assert!(message.contains("not that of a devpts mount"), "{message}");
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn signals_and_deletion_are_for_one_process() {
    let agent = Agent::start().await;
    agent.idle("a", &agent.rootfs(), &spec(&["sleep", "1000"])).await;
    for id in ["x", "y"] {
        agent.exec("a", id, &process(&["sleep", "1000"])).await.unwrap();
    }
    let (code, message) = refused(agent.exec("a", "x", &process(&["true"])).await);
    assert_eq!((code, message.contains(r#"process "x" exists already"#)), (Code::ALREADY_EXISTS, true), "{message}");
    agent.signal_process("a", "x", 15).await.unwrap();
    assert_eq!(agent.exit_of_process("a", "x").await.signal, 15);
    let (code, message) = refused(agent.signal_process("a", "x", 15).await);
    assert_eq!((code, message.as_str()), (Code::FAILED_PRECONDITION, "process not running"));
    agent.delete_process("a", "x").await.unwrap();
    assert_eq!(refused(agent.delete_process("a", "x").await).0, Code::NOT_FOUND);
    assert_eq!(refused(agent.signal_process("a", "x", 15).await).0, Code::NOT_FOUND);
    agent.exec("a", "x", &process(&["sleep", "1000"])).await.unwrap();
    agent.delete_process("a", "y").await.unwrap();
    assert_eq!(agent.exit_of_process("a", "y").await.signal, 9);
    assert_eq!(refused(agent.exec("a", "../y", &process(&["true"])).await).0, Code::INVALID_ARGUMENT);

    // The end of the init is the end of its pid namespace.
    agent.signal("a", 9, false).await.unwrap();
    assert_eq!(agent.exit_of_process("a", "x").await.signal, 9);
    assert_eq!(agent.exit_of("a").await.signal, 9);
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_process_can_be_in_a_group_below_the_containers() {
    let agent = Agent::start().await;
    agent.idle("a", &agent.rootfs(), &spec(&["sleep", "1000"])).await;
    std::fs::create_dir_all(agent.cgroup.join("a/b/c")).unwrap();
    let line = shell_process("grep ^0:: /proc/self/cgroup");
    for (cgroup, expected) in [("", "0::/\n"), ("b", "0::/b\n"), ("/b/c", "0::/b/c\n")] {
        let output = agent.exec_run_as("a", &line, |request| request.cgroup = cgroup.into()).await.ok();
        assert_eq!(output, expected);
    }
    for (cgroup, word) in [("..", "bad sub cgroup path"), ("b/../../x", "bad sub cgroup path"), ("d", "No such file")] {
        let mut request = Agent::exec_request("a", "e", &line, Stdio::default());
        request.cgroup = cgroup.into();
        let (code, message) = refused(agent.client.exec_process(deadline(), &request).await);
        assert_eq!((code, message.contains(word)), (Code::INVALID_ARGUMENT, true), "{message}");
    }
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_that_moved_to_groups_of_its_own_is_followed_there() {
    if lacks_controller("memory") {
        return;
    }
    let agent = Agent::start().await;
    let mut container = privileged(
        "mkdir /sys/fs/cgroup/in && echo 1 > /sys/fs/cgroup/in/cgroup.procs && \
         echo +memory > /sys/fs/cgroup/cgroup.subtree_control && echo ok; exec sleep 1000",
    );
    for mount in container["mounts"].as_array_mut().unwrap() {
        if mount["type"] == "cgroup" {
            mount["options"] = json!(["nosuid", "noexec", "nodev", "rw"]);
        }
    }
    let token = new_token();
    let mut stdout = agent.stream(token).await;
    let stdio = Stdio { stdout: token, ..Stdio::default() };
    agent.create("a", &agent.rootfs(), &container, stdio).await.unwrap();
    agent.start_container("a").await.unwrap();
    stdout.read_exact(&mut [0; 3]).await.unwrap();
    let output = agent.exec_run("a", &shell_process("grep ^0:: /proc/self/cgroup")).await.ok();
    assert_eq!(output, "0::/in\n");
    agent.delete("a").await;
}

#[tokio::test(flavor = "current_thread")]
async fn two_hundred_processes_leave_nothing_in_the_agent() {
    let agent = Agent::start().await;
    agent.idle("a", &agent.rootfs(), &spec(&["sleep", "1000"])).await;
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", agent.pid())).unwrap().count();
    agent.exec_run("a", &process(&["true"])).await.ok();
    let before = descriptors();
    for round in 0..200 {
        if round % 4 == 0 {
            agent.exec("a", "e", &process(&["missing"])).await.unwrap_err();
        } else {
            agent.exec_run("a", &process(&["true"])).await.ok();
        }
    }
    // The last streams are closed in their own time.
    let begin = std::time::Instant::now();
    while descriptors() != before && begin.elapsed() < std::time::Duration::from_secs(5) {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(descriptors(), before);
    agent.delete("a").await;
}
