//! Program, user, environment, limits, capabilities, scheduling.

use serde_json::json;
use ttrpc::Code;

use crate::harness::{Agent, SYS_RESOURCE, lacks_capability, mount, shell, spec, with};

#[tokio::test(flavor = "current_thread")]
async fn exit_codes_and_signals_come_back_as_they_are() {
    let agent = Agent::start().await;
    for code in [0, 1, 42, 255] {
        let exit = agent.run(&shell(&format!("exit {code}"))).await.exit;
        assert_eq!((exit.code, exit.signal), (code, 0));
    }
    // A shell that is PID 1 of its namespace can be killed by nothing from inside; one beside it can.
    for signal in [9, 15, 6] {
        let mut spec = shell(&format!("kill -{signal} $$; sleep 60"));
        crate::harness::without_namespace(&mut spec, "pid");
        let exit = agent.run(&spec).await.exit;
        assert_eq!(exit.signal, signal);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_program_that_cannot_be_executed_is_told_in_the_words_of_runc() {
    let agent = Agent::start().await;
    for (args, code, message) in [
        (&["foo"][..], Code::NOT_FOUND, r#"exec: "foo": executable file not found in $PATH"#),
        (&["/foo"], Code::NOT_FOUND, r#"exec: "/foo": stat /foo: no such file or directory"#),
        (&["/etc/passwd"], Code::PERMISSION_DENIED, r#"exec: "/etc/passwd": permission denied"#),
        (&["/etc"], Code::PERMISSION_DENIED, r#"exec: "/etc": is a directory"#),
        (&[], Code::INVALID_ARGUMENT, "process.args: expected at least the name of a program"),
    ] {
        assert_eq!(agent.refusal(&spec(args)).await, (code, message.to_owned()));
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_file_that_is_no_program_is_found_out_at_the_start() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    let path = agent.root_path(&rootfs).join("bin/noise");
    std::fs::write(&path, "noise").unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    agent.create("noise", &rootfs, &spec(&["noise"]), podhull_protocol::Stdio::default()).await.unwrap();
    let error = agent.start_container("noise").await.unwrap_err().to_string();
    assert!(error.contains("exec /bin/noise: exec format error"), "{error}");
    agent.delete("noise").await;
}

#[tokio::test(flavor = "current_thread")]
async fn the_user_is_the_one_of_the_specification() {
    if lacks_capability(SYS_RESOURCE) {
        return;
    }
    let agent = Agent::start().await;
    let user = json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 7], "umask": 0o027});
    let spec = with(shell("id -u; id -g; grep Groups /proc/self/status; umask; echo $HOME"), [("/process/user", user)]);
    assert_eq!(agent.run(&spec).await.ok(), "1000\n1000\nGroups:\t5 7 \n0027\n/home/user\n");
}

#[tokio::test(flavor = "current_thread")]
async fn environment_and_directory_are_those_of_the_specification_and_no_more() {
    let agent = Agent::start().await;
    let spec = with(
        spec(&["env"]),
        [("/process/env", json!(["PATH=/bin", "A=1=2", "HOME=/x"])), ("/process/cwd", json!("/etc"))],
    );
    assert_eq!(agent.run(&spec).await.ok(), "PATH=/bin\nA=1=2\nHOME=/x\n");
    let spec = with(shell("pwd; echo $HOME; ls /proc/self/fd"), [("/process/cwd", json!("/tmp"))]);
    // ls has opened one to read the directory.
    assert_eq!(agent.run(&spec).await.ok(), "/tmp\n/root\n0\n1\n2\n3\n");
    let spec = with(shell("pwd"), [("/process/cwd", json!("/made/for/it")), ("/root/readonly", json!(false))]);
    assert_eq!(agent.run(&spec).await.ok(), "/made/for/it\n");
}

/// Of another user, and closed to everybody else: as root it can be entered.
#[tokio::test(flavor = "current_thread")]
async fn a_directory_closed_to_its_user_is_entered() {
    if lacks_capability(SYS_RESOURCE) {
        return;
    }
    let agent = Agent::start().await;
    for user in [42, 0, 7] {
        let mut spec = with(shell("pwd"), [("/process/cwd", json!("/tmp")), ("/process/user/uid", json!(user))]);
        mount(&mut spec, "/tmp", "tmpfs", "tmpfs", &["mode=0700", "uid=42"]);
        assert_eq!(agent.run(&spec).await.ok(), "/tmp\n", "user {user}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn capabilities_are_exactly_those_of_each_set() {
    if lacks_capability(SYS_RESOURCE) {
        return;
    }
    let agent = Agent::start().await;
    let capabilities = json!({
        "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_NET_RAW"],
        "effective": ["CAP_KILL"],
        "inheritable": ["CAP_NET_RAW", "CAP_SETUID"],
        "permitted": ["CAP_KILL", "CAP_CHOWN", "CAP_NET_RAW"],
        "ambient": ["CAP_NET_RAW"],
    });
    // An ordinary user keeps through execve what is ambient. A root user would gain all of the bounding set, if it could gain
    // anything: no_new_privs leaves what is permitted.
    let as_user = with(
        shell("grep Cap /proc/self/status"),
        [("/process/capabilities", capabilities.clone()), ("/process/user", json!({"uid": 1000, "gid": 1000}))],
    );
    let [chown, kill, setuid, raw] = [1u64 << 0, 1 << 5, 1 << 7, 1 << 13];
    let text = |inheritable, permitted, effective, bounding, ambient: u64| {
        format!(
            "CapInh:\t{inheritable:016x}\nCapPrm:\t{permitted:016x}\nCapEff:\t{effective:016x}\nCapBnd:\t{bounding:016x}\n\
             CapAmb:\t{ambient:016x}\n"
        )
    };
    let bounding = chown | kill | setuid | raw;
    assert_eq!(agent.run(&as_user).await.ok(), text(raw | setuid, raw, raw, bounding, raw));
    let as_root = with(shell("grep Cap /proc/self/status"), [("/process/capabilities", capabilities)]);
    let permitted = kill | chown | raw;
    assert_eq!(agent.run(&as_root).await.ok(), text(raw | setuid, permitted, permitted, bounding, raw));
    let none = with(shell("grep Cap /proc/self/status"), [("/process/capabilities", json!(null))]);
    assert_eq!(agent.run(&none).await.ok(), text(0, 0, 0, 0, 0));
}

#[tokio::test(flavor = "current_thread")]
async fn limits_are_those_of_the_specification() {
    if lacks_capability(SYS_RESOURCE) {
        return;
    }
    let agent = Agent::start().await;
    let limits = json!([
        {"type": "RLIMIT_NOFILE", "soft": 70, "hard": 80},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": u64::MAX},
        {"type": "RLIMIT_NPROC", "soft": 1000, "hard": 2000}
    ]);
    let spec = with(
        shell("grep -E 'open files|core file|processes' /proc/self/limits | tr -s ' '; cat /proc/self/oom_score_adj"),
        [("/process/rlimits", limits), ("/process/oomScoreAdj", json!(-500))],
    );
    let expected = "Max core file size 0 unlimited bytes \nMax processes 1000 2000 processes \nMax open files 70 80 files \n-500\n";
    assert_eq!(agent.run(&spec).await.ok(), expected);
}

#[tokio::test(flavor = "current_thread")]
async fn no_new_privileges_is_set_only_if_asked_for() {
    let agent = Agent::start().await;
    for (asked, line) in [(true, "NoNewPrivs:\t1\n"), (false, "NoNewPrivs:\t0\n")] {
        let spec = with(shell("grep NoNewPrivs /proc/self/status"), [("/process/noNewPrivileges", json!(asked))]);
        assert_eq!(agent.run(&spec).await.ok(), line);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn scheduling_is_that_of_the_specification() {
    let agent = Agent::start().await;
    let spec = with(
        shell("cut -d' ' -f19,41 /proc/$$/stat; ionice -p $$; uname -m"),
        [
            ("/process/scheduler", json!({"policy": "SCHED_BATCH", "nice": 19})),
            ("/process/ioPriority", json!({"class": "IOPRIO_CLASS_BE", "priority": 6})),
            ("/linux/personality", json!({"domain": "LINUX32"})),
        ],
    );
    let output = agent.run(&spec).await.ok();
    // Nice 19, SCHED_BATCH.
    assert_eq!(output, "19 3\nbest-effort: prio 6\ni686\n");
}

#[tokio::test(flavor = "current_thread")]
async fn ignored_signals_are_not_passed_on() {
    let agent = Agent::start().await;
    let output = agent.run(&spec(&["grep", "Sig[BI]", "/proc/self/status"])).await.ok();
    let bits = |name: &str| {
        let text = output.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(text.trim(), 16).unwrap()
    };
    // posix_spawn, by which the test started the agent, has the C library's own two signals ignored.
    assert_eq!((bits("SigBlk:"), bits("SigIgn:") & !0x1_8000_0000), (0, 0));
}

#[tokio::test(flavor = "current_thread")]
async fn what_the_agent_does_not_know_is_refused_by_name() {
    let agent = Agent::start().await;
    for (pointer, value, word) in [
        (
            "/process/capabilities/bounding",
            json!(["CAP_FLY"]),
            r#"process.capabilities.bounding: unknown capability "CAP_FLY""#,
        ),
        ("/process/rlimits", json!([{"type": "RLIMIT_FUN", "soft": 1, "hard": 1}]), "RLIMIT_FUN"),
        ("/process/wish", json!(1), "unknown field `wish`"),
        ("/linux/namespaces", json!([{"type": "dream"}]), "dream"),
        ("/linux/intelRdt", json!({}), "unknown field `intelRdt`"),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["fly"], "action": "SCMP_ACT_ERRNO"}]}),
            r#"unknown system call "fly""#,
        ),
        ("/linux/sysctl", json!({"kernel.panic": "1"}), "kernel.panic"),
        ("/linux/rootfsPropagation", json!("sideways"), "sideways"),
        ("/process/scheduler", json!({"policy": "SCHED_LUCKY"}), "SCHED_LUCKY"),
    ] {
        let (code, message) = agent.refusal(&with(shell("true"), [(pointer, value)])).await;
        assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
        assert!(message.contains(word) && !message.contains('\n'), "{message}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn start_container_hooks_run_inside_before_the_program() {
    let agent = Agent::start().await;
    let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", "cat > /tmp/state; echo $A > /tmp/env"], "env": ["A=b", "PATH=/bin"]});
    let spec = with(
        shell("grep -o '\"status\":\"created\"' /tmp/state; cat /tmp/env"),
        [
            ("/hooks", json!({"startContainer": [hook], "prestart": [{"path": "/host"}]})),
            ("/root/readonly", json!(false)),
        ],
    );
    assert_eq!(agent.run(&spec).await.ok(), "\"status\":\"created\"\nb\n");
    let failing = json!({"startContainer": [{"path": "/bin/true"}, {"path": "/bin/false"}]});
    let (_, message) = agent.refusal(&with(shell("true"), [("/hooks", failing)])).await;
    assert_eq!(message, "error running startContainer hook #1: exit status 1");
    let filter =
        json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_KILL"}]});
    for privileges in [true, false] {
        let filtered = json!({"startContainer": [{"path": "/bin/mkdir", "args": ["mkdir", "/tmp/made"]}]});
        let fields =
            [("/hooks", filtered), ("/linux/seccomp", filter.clone()), ("/process/noNewPrivileges", json!(privileges))];
        let (_, message) = agent.refusal(&with(shell("true"), fields)).await;
        assert_eq!(message, "error running startContainer hook #0: signal: bad system call");
    }
    let slow = json!({"startContainer": [{"path": "/bin/sleep", "args": ["sleep", "60"], "timeout": 1}]});
    let (_, message) = agent.refusal(&with(shell("true"), [("/hooks", slow)])).await;
    assert!(message.contains("timeout of 1s"), "{message}");
    let patient = json!({"path": "/bin/true", "timeout": i64::MAX});
    let patient = json!({"startContainer": [patient, patient, patient]});
    assert_eq!(agent.run(&with(shell("echo ran"), [("/hooks", patient)])).await.ok(), "ran\n");
}
