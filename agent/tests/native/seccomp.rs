//! Filters of system calls.

use serde_json::{Value, json};

use crate::harness::{Agent, set, shell, with};

fn filtered(line: &str, rules: Value, no_new_privileges: bool) -> Value {
    with(
        shell(line),
        [
            (
                "/linux/seccomp",
                json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"], "syscalls": rules}),
            ),
            ("/process/noNewPrivileges", json!(no_new_privileges)),
        ],
    )
}

#[tokio::test(flavor = "current_thread")]
async fn a_blocked_call_gets_its_error_and_a_killed_one_kills() {
    let agent = Agent::start().await;
    for no_new_privileges in [true, false] {
        let rules = json!([{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]);
        let outcome = agent.run(&filtered("mkdir /dev/x", rules, no_new_privileges)).await;
        assert!(outcome.stderr.contains("No space left on device"), "{outcome:?}");
        let rules = json!([{"names": ["sethostname"], "action": "SCMP_ACT_KILL_PROCESS"}]);
        let mut spec = filtered("hostname x; echo $?", rules, no_new_privileges);
        for set_of in ["bounding", "effective", "permitted"] {
            set(&mut spec, &format!("/process/capabilities/{set_of}/-"), "CAP_SYS_ADMIN");
        }
        assert_eq!(agent.run(&spec).await.stdout, "159\n");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_profile_that_denies_by_default_runs_what_it_names() {
    let agent = Agent::start().await;
    // Not in it, as in profiles that are some years old: close_range, faccessat2, openat2.
    let names = [
        "access",
        "arch_prctl",
        "brk",
        "capget",
        "capset",
        "chdir",
        "clock_gettime",
        "clone",
        "close",
        "dup2",
        "dup3",
        "execve",
        "exit",
        "exit_group",
        "fcntl",
        "fstat",
        "futex",
        "getcwd",
        "getegid",
        "geteuid",
        "getgid",
        "getpid",
        "getppid",
        "getrandom",
        "gettid",
        "getuid",
        "ioctl",
        "keyctl",
        "lseek",
        "lstat",
        "mmap",
        "mprotect",
        "munmap",
        "newfstatat",
        "open",
        "openat",
        "pipe2",
        "poll",
        "prctl",
        "prlimit64",
        "read",
        "readlink",
        "recvfrom",
        "recvmsg",
        "rseq",
        "rt_sigaction",
        "rt_sigprocmask",
        "rt_sigreturn",
        "seccomp",
        "sendmsg",
        "sendto",
        "set_robust_list",
        "set_tid_address",
        "setgroups",
        "setresgid",
        "setresuid",
        "setuid",
        "setgid",
        "sigaltstack",
        "stat",
        "statx",
        "umask",
        "uname",
        "vfork",
        "wait4",
        "write",
        "writev",
        "fork",
        "madvise",
        "mremap",
        "getpgrp",
        "setpgid",
        "sysinfo",
        "cachestat",
    ];
    for no_new_privileges in [true, false] {
        let mut spec = shell("echo works; mkdir /dev/x");
        set(
            &mut spec,
            "/linux/seccomp",
            json!({
                "defaultAction": "SCMP_ACT_ERRNO",
                "defaultErrnoRet": 1,
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [{"names": &names[..], "action": "SCMP_ACT_ALLOW"}]
            }),
        );
        set(&mut spec, "/process/noNewPrivileges", no_new_privileges);
        let outcome = agent.run(&spec).await;
        assert_eq!(outcome.stdout, "works\n", "{outcome:?}");
        assert!(outcome.stderr.contains("Operation not permitted"), "{outcome:?}");
    }
}
