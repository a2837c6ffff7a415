//! Podman calls the runtime as it calls any: by `--runtime`. Without a network.

use super::oci;
use crate::bundle::{DEBIAN, make_busybox_root};
use crate::leaks::Leaks;
use crate::netns::Netns;
use crate::podman::{Podman, check};
use crate::run::{DEADLINE, Running};
use crate::suite::{Case, Scene};
use crate::terminal::{Tmux, shell_line};
use crate::{Outcome, ensure, ensure_eq, image, processes};

pub const CASES: &[Case] = &[
    oci("podman::run_in_the_foreground", run_in_the_foreground),
    oci("podman::run_in_the_background", run_in_the_background),
    oci("podman::what_a_container_may", what_a_container_may),
    oci("podman::removed_as_often_as_it_runs", removed_as_often_as_it_runs),
    oci("podman::looked_at_and_copied_to_and_from", looked_at_and_copied_to_and_from),
    oci("podman::exec_in_a_terminal_and_attach", exec_in_a_terminal_and_attach),
    oci("podman::volumes_and_secrets", volumes_and_secrets),
    oci("podman::pods_share_localhost_and_ipc", pods_share_localhost_and_ipc),
    oci("podman::users_of_its_own", users_of_its_own),
];

fn run_in_the_foreground(scene: &Scene) -> Outcome {
    let podman = Podman::new(scene)?;
    let before = Leaks::watch();
    let script = "echo out; echo err >&2; { sh -c 'kill -9 $$'; } 2>/dev/null; exit $?";
    let ended = podman.run(&["--rm"], &["sh", "-c", script])?.expect_status(137)?;
    ensure_eq!((&*ended.stdout, &*ended.stderr), ("out\n", "err\n"), "outputs");
    let missing = podman.run(&["--rm"], &["no-such-program"])?.expect_status(127)?;
    ensure!(
        missing.stderr.contains("executable file `no-such-program` not found in $PATH")
            || missing.stderr.contains("\"no-such-program\": executable file not found in $PATH"),
        "stderr {:?}",
        missing.stderr
    );
    let mut cat =
        Running::start(&podman.words(&["run", "--rm", "-i", "--network", "none", "--rootfs", DEBIAN, "cat"]), &[])?;
    cat.send(b"through\n")?;
    cat.expect_line("through")?;
    cat.wait()?.expect_status(0)?;
    check(&before)
}

fn run_in_the_background(scene: &Scene) -> Outcome {
    let podman = Podman::new(scene)?;
    let before = Leaks::watch();
    let script = "trap 'echo bye; exit 3' TERM; echo hello; while :; do sleep 0.1; done";
    podman.run(&["-d", "--name", "c"], &["sh", "-c", script])?.output()?;
    let state = podman.call(&["inspect", "-f", "{{.State.Status}} {{.State.Running}}", "c"])?.output()?;
    ensure_eq!(state, "running true\n", "state");
    let pid = podman.call(&["inspect", "-f", "{{.State.Pid}}", "c"])?.output()?;
    ensure!(std::path::Path::new("/proc").join(pid.trim()).exists(), "no process {pid:?}");
    ensure_eq!(podman.call(&["exec", "c", "echo", "further"])?.output()?, "further\n", "output of what was executed");
    podman.call(&["exec", "c", "sh", "-c", "exit 4"])?.expect_status(4)?;
    podman.call(&["exec", "c", "no-such-program"])?.expect_status(127)?;
    podman.call(&["stop", "-t", "60", "c"])?.output()?;
    ensure_eq!(podman.call(&["logs", "c"])?.output()?, "hello\nbye\n", "logs");
    ensure_eq!(podman.call(&["wait", "c"])?.output()?, "3\n", "exit status");
    podman.call(&["start", "c"])?.output()?;
    podman.call(&["kill", "c"])?.output()?;
    ensure_eq!(podman.call(&["wait", "c"])?.output()?, "137\n", "exit status of the second run");
    podman.call(&["rm", "c"])?.output()?;
    let deaf = "trap 'echo no' TERM; echo deaf; while :; do sleep 0.1; done";
    podman.run(&["-d", "--name", "d"], &["sh", "-c", deaf])?.output()?;
    podman.call(&["pause", "d"])?.output()?;
    ensure_eq!(podman.call(&["inspect", "-f", "{{.State.Status}}", "d"])?.output()?, "paused\n", "state when paused");
    podman.call(&["unpause", "d"])?.output()?;
    // What does not end when it is asked to is killed.
    podman.call(&["stop", "-t", "2", "d"])?.output()?;
    ensure_eq!(podman.call(&["logs", "d"])?.output()?, "deaf\nno\n", "logs of one that does not stop");
    ensure_eq!(podman.call(&["wait", "d"])?.output()?, "137\n", "exit status of one that does not stop");
    podman.call(&["start", "d"])?.output()?;
    podman.call(&["rm", "-f", "-t", "0", "d"])?.output()?;
    let limits = ["-d", "--name", "e", "--memory", "64m", "--memory-swap", "64m"];
    podman.run(&limits, &["tail", "/dev/zero"])?.output()?;
    ensure_eq!(podman.call(&["wait", "e"])?.output()?, "137\n", "exit status of one that takes too much memory");
    ensure_eq!(podman.call(&["inspect", "-f", "{{.State.OOMKilled}}", "e"])?.output()?, "true\n", "why it ended");
    podman.call(&["rm", "e"])?.output()?;
    check(&before)
}

fn what_a_container_may(scene: &Scene) -> Outcome {
    let podman = Podman::new(scene)?;
    let before = Leaks::watch();
    let profile = scene.directory.join("profile.json");
    let denied = r#"[{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]"#;
    std::fs::write(&profile, format!(r#"{{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": {denied}}}"#))?;
    let profile = format!("seccomp={}", profile.display());
    // Several at once: each container takes Podman seconds.
    for asked in [
        &[
            (&["--user", "1000:2000"][..], "echo $(id -u) $(id -g)", "1000 2000"),
            (
                &["--security-opt", &profile],
                "mkdir /tmp/x 2>&1 | grep -o 'Operation not supported'",
                "Operation not supported",
            ),
            (&["--read-only"], "touch /x 2>&1", "touch: cannot touch '/x': Read-only file system"),
            (
                &["--cap-drop", "all", "--cap-add", "chown"],
                "grep CapBnd /proc/self/status",
                "CapBnd:\t0000000000000001",
            ),
            (&["--security-opt", "no-new-privileges"], "grep NoNewPrivs /proc/self/status", "NoNewPrivs:\t1"),
            (&["--memory", "64m"], "cat /sys/fs/cgroup/memory.max", "67108864"),
            (&["--pids-limit", "33"], "cat /sys/fs/cgroup/pids.max", "33"),
            (&["--cpus", "0.5"], "cat /sys/fs/cgroup/cpu.max", "50000 100000"),
            (&["--ulimit", "nofile=123:456"], "echo $(ulimit -n) $(ulimit -Hn)", "123 456"),
            (&["--hostname", "h"], "hostname", "h"),
            (&["--env", "A=b c"], "echo $A", "b c"),
            (&["--workdir", "/usr"], "pwd", "/usr"),
            (&["--tmpfs", "/t:size=1m"], "df --output=size /t | tail -n 1 | tr -d ' '", "1024"),
            (
                &["--mount", "type=tmpfs,destination=/m,tmpfs-size=2m"],
                "df --output=size /m | tail -n 1 | tr -d ' '",
                "2048",
            ),
            (&["--shm-size", "2m"], "df --output=size /dev/shm | tail -n 1 | tr -d ' '", "2048"),
            (&["--add-host", "other:1.2.3.4"], "grep -o '1.2.3.4.*other' /etc/hosts", "1.2.3.4\tother"),
        ][..],
        &[
            (&["--init"], "grep -cE 'catatonit|podman-init' /proc/1/comm", "1"),
            (
                &["--cap-drop", "all", "--cap-add", "chown"],
                "grep CapEff /proc/self/status",
                "CapEff:\t0000000000000001",
            ),
            (&["--security-opt", "seccomp=unconfined"], "grep -w Seccomp /proc/self/status", "Seccomp:\t0"),
        ],
    ] {
        let options: Vec<&str> =
            ["--rm"].into_iter().chain(asked.iter().flat_map(|(options, ..)| *options).copied()).collect();
        let script: Vec<&str> = asked.iter().map(|(_, script, _)| *script).collect();
        let ended = podman.run(&options, &["sh", "-c", &script.join("; ")])?;
        let expected: Vec<&str> = asked.iter().map(|(.., expected)| *expected).collect();
        ensure_eq!(ended.stdout.lines().collect::<Vec<_>>(), expected, "{script:?}: {:?}", ended.stderr);
    }
    check(&before)
}

/// None of them hangs, and nothing gathers.
fn removed_as_often_as_it_runs(scene: &Scene) -> Outcome {
    let podman = Podman::new(scene)?;
    let before = Leaks::watch();
    for number in 0..scene.repeat.min(100) {
        let number = number.to_string();
        let found = podman.run(&["--rm"], &["echo", &number])?.output()?;
        ensure_eq!(found, format!("{number}\n"), "output");
    }
    check(&before)
}

fn looked_at_and_copied_to_and_from(scene: &Scene) -> Outcome {
    let podman = Podman::new(scene)?;
    let before = Leaks::watch();
    let script = "echo from the container > /tmp/there; sleep 1000 & echo ready; wait";
    // On a root of its own, to be written to.
    let root = scene.directory.join("root");
    make_busybox_root(&root)?;
    let root = root.to_string_lossy();
    podman.call(&["run", "-d", "--name", "c", "--network", "none", "--rootfs", &root, "sh", "-c", script])?.output()?;
    let until = std::time::Instant::now() + DEADLINE;
    while podman.call(&["logs", "c"])?.output()? != "ready\n" {
        ensure!(std::time::Instant::now() < until, "not ready");
    }
    let file = scene.directory.join("file");
    std::fs::write(&file, "from the host\n")?;
    podman.call(&["cp", &file.to_string_lossy(), "c:/tmp/here"])?.output()?;
    ensure_eq!(podman.call(&["exec", "c", "cat", "/tmp/here"])?.output()?, "from the host\n", "copied in");
    let back = scene.directory.join("back");
    podman.call(&["cp", "c:/tmp/there", &back.to_string_lossy()])?.output()?;
    ensure_eq!(std::fs::read_to_string(&back)?, "from the container\n", "copied out");
    podman.call(&["cp", "c:/etc", &scene.directory.join("etc").to_string_lossy()])?.output()?;

    let top = podman.call(&["top", "c", "pid", "comm"])?.output()?;
    ensure!(top.lines().count() >= 2, "top {top:?}");
    let stats = podman.call(&["stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}}", "c"])?.output()?;
    ensure!(stats.starts_with("c "), "stats {stats:?}");
    let events = podman.call(&["events", "--stream=false", "--filter", "container=c", "--format", "{{.Status}}"])?;
    for status in ["create", "init", "start"] {
        ensure!(events.stdout.lines().any(|line| line == status), "no {status} in {:?}", events.stdout);
    }
    podman.call(&["restart", "-t", "0", "c"])?.output()?;
    ensure_eq!(podman.call(&["inspect", "-f", "{{.State.Running}}", "c"])?.output()?, "true\n", "after restart");
    podman.call(&["rm", "-f", "-t", "0", "c"])?.output()?;
    check(&before)
}

fn exec_in_a_terminal_and_attach(scene: &Scene) -> Outcome {
    let podman = Podman::new(scene)?;
    let before = Leaks::watch();
    podman.run(&["-d", "--name", "c"], &["sleep", "1000"])?.output()?;
    {
        let tmux = Tmux::start(&scene.directory, 100, 30)?;
        let exec = podman.words(&["exec", "-it", "--env", "PS1=inside> ", "c", "bash", "--norc", "-i"]);
        tmux.type_line(&format!("clear; {}; echo status $?", shell_line(&exec)))?;
        tmux.expect("inside> ")?;
        tmux.type_line("stty size; tty")?;
        tmux.expect("\n30 100\n")?;
        tmux.resize(120, 40)?;
        tmux.type_line("until test \"$(stty size)\" = '40 120'; do sleep 0.1; done; echo re''sized")?;
        tmux.expect("\nresized\n")?;
        tmux.type_line("exit 5")?;
        tmux.expect("\nstatus 5\n")?;
    }
    podman.call(&["rm", "-f", "-t", "0", "c"])?.output()?;
    let script = "read word; echo \"got $word\"; exit 6";
    podman.run(&["-d", "-i", "--name", "d"], &["sh", "-c", script])?.output()?;
    let mut attached = Running::start(&podman.words(&["attach", "d"]), &[])?;
    attached.send(b"something\n")?;
    attached.expect_line("got something")?;
    // Podman may be too late to see the status, whatever the runtime.
    attached.wait()?;
    ensure_eq!(podman.call(&["wait", "d"])?.output()?, "6\n", "exit status");
    podman.call(&["rm", "d"])?.output()?;
    check(&before)
}

fn volumes_and_secrets(scene: &Scene) -> Outcome {
    let podman = Podman::new(scene)?;
    let before = Leaks::watch();
    let directory = scene.make_directory("volume")?;
    std::fs::write(directory.join("from-host"), "host\n")?;
    let mount = format!("{}:/v", directory.display());
    let script = "echo kept > /data/file; cat /v/from-host; echo guest > /v/from-guest";
    let found = podman.run(&["--rm", "-v", "kept:/data", "-v", &mount], &["sh", "-c", script])?.output()?;
    ensure_eq!(found, "host\n", "file of the host");
    ensure_eq!(std::fs::read_to_string(directory.join("from-guest"))?, "guest\n", "file of the container");

    let secret = scene.directory.join("secret");
    std::fs::write(&secret, "hush\n")?;
    podman.call(&["secret", "create", "word", &secret.to_string_lossy()])?.output()?;
    let script = "cat /data/file; touch /data/x || echo ro; cat /run/secrets/word";
    let read = podman.run(&["--rm", "-v", "kept:/data:ro", "--secret", "word"], &["sh", "-c", script])?;
    ensure_eq!(read.output()?, "kept\nro\nhush\n", "the named volume, and the secret");
    podman.call(&["secret", "rm", "word"])?.output()?;
    podman.call(&["volume", "rm", "kept"])?.output()?;
    check(&before)
}

fn pods_share_localhost_and_ipc(scene: &Scene) -> Outcome {
    let podman = Podman::new(scene)?;
    let before = Leaks::watch();
    podman.call(&["pod", "create", "--name", "p", "--network", "none", "--hostname", "in-the-pod"])?.output()?;
    // What starts fast: each file that a program looks for is a round trip of the emulated machine's.
    let serve = "use IO::Socket::INET; my $at = IO::Socket::INET->new(LocalAddr => '127.0.0.1:8080', Listen => 5, ReuseAddr => 1) or die; \
        while (my $one = $at->accept) { while (<$one>) { last if /^\\r\\n/ } print $one \"HTTP/1.0 200 OK\\r\\n\\r\\nserved\\n\"; close $one }";
    let run = |options: &[&str], command: &[&str]| {
        podman.call(&[&["run", "--pod", "p"], options, &["--rootfs", DEBIAN], command].concat())
    };
    run(&["-d", "--name", "server"], &["perl", "-e", serve])?.output()?;
    run(&["-d", "--name", "maker"], &["sh", "-c", "ipcmk -M 4096 && exec sleep 1000"])?.output()?;
    let look = "until exec 3<>/dev/tcp/127.0.0.1/8080; do sleep 0.1; done 2>/dev/null\n\
        printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; tail -n 1 <&3; hostname; ipcs -m | grep -c 0x";
    let seen = run(&["--rm"], &["bash", "-c", look])?.output()?;
    ensure_eq!(seen, "served\nin-the-pod\n1\n", "what the third container sees");
    if scene.runtime.is_virtual() {
        let machines = processes::all().iter().filter(|process| process.command.starts_with("podhull vmm")).count();
        ensure_eq!(machines, 1, "machines");
    }
    // From the host's side of the pod's network, as those do that forward ports.
    let pid = podman.call(&["inspect", "-f", "{{.State.Pid}}", "server"])?.output()?;
    let forwarded = Netns::of(pid.trim().parse()?)
        .run(&["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://localhost:8080/"])?
        .output()?;
    ensure_eq!(forwarded, "200", "status of the server by a forwarded port");
    // Memory that is mapped by two of them is the same memory.
    let write = "import mmap, os; f = open('/dev/shm/page', 'w+b'); f.truncate(4096); m = mmap.mmap(f.fileno(), 4096); m[0] = 65; \
        print('mapped', flush=True); import time\nwhile m[0] == 65: time.sleep(0.05)\nprint('seen', flush=True)";
    run(&["-d", "--name", "writer"], &["python3", "-c", write])?.output()?;
    let answer = "import mmap, time, os\nwhile not os.path.exists('/dev/shm/page') or os.path.getsize('/dev/shm/page') < 4096: time.sleep(0.05)\n\
        f = open('/dev/shm/page', 'r+b'); m = mmap.mmap(f.fileno(), 4096)\nwhile m[0] != 65: time.sleep(0.05)\nm[0] = 66";
    run(&["--rm"], &["python3", "-c", answer])?.output()?;
    ensure_eq!(podman.call(&["wait", "writer"])?.output()?, "0\n", "exit status of the writer");
    ensure_eq!(podman.call(&["logs", "writer"])?.output()?, "mapped\nseen\n", "what the writer saw");
    let listed = podman.call(&["pod", "inspect", "-f", "{{.State}} {{.NumContainers}}", "p"])?.output()?;
    ensure_eq!(listed, "Degraded 4\n", "the pod");
    podman.call(&["pod", "stop", "-t", "0", "p"])?.output()?;
    podman.call(&["pod", "start", "p"])?.output()?;
    let again = podman.call(&["exec", "server", "hostname"])?.output()?;
    ensure_eq!(again, "in-the-pod\n", "host name after a restart of the pod");
    podman.call(&["pod", "rm", "-f", "-t", "0", "p"])?.output()?;
    check(&before)
}

fn users_of_its_own(scene: &Scene) -> Outcome {
    let podman = Podman::new(scene)?;
    podman.load()?;
    let before = Leaks::watch();
    let files = ["/etc/subuid", "/etc/subgid"];
    let were = files.map(|file| std::fs::read_to_string(file).unwrap_or_default());
    for file in files {
        std::fs::write(file, "containers:200000:65536\n")?;
    }
    let script = "echo $(cat /proc/self/uid_map) $(stat -c %u:%g /bin/sh /etc/passwd); id -u; touch /made; stat -c %u:%g:%a /made";
    let words = ["run", "--rm", "--userns=auto:size=2000", "--network", "none", image::NAME, "sh", "-c", script];
    let ended = podman.call(&words);
    for (file, was) in files.iter().zip(were) {
        std::fs::write(file, was)?;
    }
    ensure_eq!(ended?.output()?, "0 200000 2000 0:0 0:0\n0\n0:0:644\n", "users");
    check(&before)
}
