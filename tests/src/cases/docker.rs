//! Docker calls the runtime by its path, through containerd's shim for runc.

use std::fs;

use super::oci;
use crate::docker::{Docker, check};
use crate::leaks::Leaks;
use crate::run::Running;
use crate::suite::{Case, Scene};
use crate::terminal::{Tmux, shell_line};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[oci("docker::containers_without_a_network", containers_without_a_network)];

fn containers_without_a_network(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let docker = Docker::start(scene, &["--bridge", "none", "--iptables=false", "--ip6tables=false"])?;
    let run = |options: &[&str], command: &[&str]| {
        docker.call(&[&["run", "--network", "none"], options, &["busybox"], command].concat())
    };
    ensure_eq!(run(&["--rm"], &["echo", "hello"])?.output()?, "hello\n", "output");
    let ended = run(&["--rm"], &["sh", "-c", "echo out; echo err >&2; exit 7"])?.expect_status(7)?;
    ensure_eq!((&*ended.stdout, &*ended.stderr), ("out\n", "err\n"), "outputs");
    run(&["--rm"], &["no-such-program"])?.expect_status(127)?;

    let script = "trap 'echo bye; exit 3' TERM; echo hello; echo data > /file; while :; do sleep 0.1; done";
    run(&["-d", "--name", "first", "--memory", "64m", "--pids-limit", "50"], &["sh", "-c", script])?.output()?;
    ensure_eq!(docker.call(&["exec", "first", "cat", "/file"])?.output()?, "data\n", "output of what was executed");
    docker.call(&["exec", "first", "sh", "-c", "exit 4"])?.expect_status(4)?;
    let limit = docker.call(&["exec", "first", "cat", "/sys/fs/cgroup/memory.max"])?.output()?;
    ensure_eq!(limit, "67108864\n", "limit of memory");
    let copy = scene.directory.join("copy");
    docker.call(&["cp", "first:/file", &copy.to_string_lossy()])?.output()?;
    ensure_eq!(fs::read_to_string(&copy)?, "data\n", "copied out");
    docker.call(&["cp", &copy.to_string_lossy(), "first:/copy"])?.output()?;
    ensure_eq!(docker.call(&["exec", "first", "cat", "/copy"])?.output()?, "data\n", "copied in");
    let top = docker.call(&["top", "first"])?.output()?;
    ensure!(top.lines().count() >= 2, "top {top:?}");
    {
        let tmux = Tmux::start(&scene.directory, 100, 30)?;
        let exec = docker.words(&["exec", "-it", "-e", "PS1=inside> ", "first", "sh"]);
        tmux.type_line(&format!("clear; {}; echo status $?", shell_line(&exec)))?;
        tmux.expect("inside> ")?;
        tmux.type_line("stty size; exit 5")?;
        tmux.expect("\n30 100\n")?;
        tmux.expect("\nstatus 5\n")?;
    }
    docker.call(&["stop", "-t", "60", "first"])?.output()?;
    ensure_eq!(docker.call(&["logs", "first"])?.output()?, "hello\nbye\n", "logs");
    ensure_eq!(docker.call(&["wait", "first"])?.output()?, "3\n", "exit status");
    docker.call(&["restart", "first"])?.output()?;
    docker.call(&["kill", "first"])?.output()?;
    ensure_eq!(docker.call(&["wait", "first"])?.output()?, "137\n", "exit status of the second run");
    docker.call(&["rm", "first"])?.output()?;

    let mut cat = Running::start(&docker.words(&["run", "--rm", "-i", "--network", "none", "busybox", "cat"]), &[])?;
    cat.send(b"through\n")?;
    cat.expect_line("through")?;
    cat.wait()?.expect_status(0)?;
    run(&["-d", "--name", "second", "-v", "kept:/data"], &["sh", "-c", "echo kept > /data/file; exec sleep 1000"])?
        .output()?;
    docker.call(&["rm", "-f", "second"])?.output()?;
    ensure_eq!(run(&["--rm", "-v", "kept:/data"], &["cat", "/data/file"])?.output()?, "kept\n", "named volume");
    docker.end()?;
    check(&before)
}
