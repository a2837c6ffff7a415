//! Docker calls the runtime by its path, through containerd's shim for runc, or has the runtime's own shim. Its daemon is in a network
//! namespace that stands for the host's.

use std::fs;
use std::time::{Duration, Instant};

use super::{long, oci};
use crate::docker::{Docker, check};
use crate::image;
use crate::leaks::Leaks;
use crate::netns::Netns;
use crate::run::{DEADLINE, Running};
use crate::suite::{Case, Scene};
use crate::terminal::{Tmux, shell_line};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] =
    &[oci("docker::containers", by_path), long(oci("docker::containers_by_the_shim", by_the_shim))];

/// Serves files of the container, and ends when it is asked to.
const SERVE: &str = "trap 'echo bye; exit 3' TERM; echo hello; echo data > /file; httpd -p 80 -h /; \
                     while :; do sleep 1000 & wait; done";

fn by_path(scene: &Scene) -> Outcome {
    containers(scene, Docker::start, None)
}

fn by_the_shim(scene: &Scene) -> Outcome {
    containers(scene, Docker::start_by_shim, Some(Docker::shim(scene)))
}

/// The containers of a Docker that was so started; with the name of a shim, one by that name of which its configuration says nothing.
fn containers(scene: &Scene, start: fn(&Scene, &Netns) -> Outcome<Docker>, shim: Option<&str>) -> Outcome {
    let host = Netns::new(scene, "host")?;
    let before = Leaks::watch();
    let docker = start(scene, &host)?;
    in_the_foreground(&docker)?;
    in_the_background(scene, &host, &docker, shim)?;
    in_a_terminal(scene, &docker)?;
    by_their_names(&docker)?;
    built(scene, &docker)?;
    if let Some(shim) = shim {
        let release = docker.call(&["run", "--rm", "--runtime", shim, image::NAME, "uname", "-r"])?.output()?;
        ensure_eq!(release.contains("podhull"), scene.runtime.is_virtual(), "whether {release:?} is of a guest kernel");
    }
    docker.end()?;
    check(&before)
}

fn in_the_foreground(docker: &Docker) -> Outcome {
    let script = "echo out; echo err >&2; cat; exit 7";
    let words = docker.words(&["run", "--rm", "-i", "--network", "none", image::NAME, "sh", "-c", script]);
    let mut running = Running::start(&words, &[])?;
    running.expect_line("out")?;
    running.send(b"through\n")?;
    running.expect_line("through")?;
    let ended = running.wait()?.expect_status(7)?;
    ensure_eq!(ended.stderr, "err\n", "standard error");
    docker.call(&["run", "--rm", image::NAME, "no-such-program"])?.expect_status(127)?;
    Ok(())
}

fn in_the_background(scene: &Scene, host: &Netns, docker: &Docker, shim: Option<&str>) -> Outcome {
    let options = ["--memory", "64m", "--pids-limit", "50", "-p", "8080:80", "-v", "kept:/data"];
    let command = [image::NAME, "sh", "-c", SERVE];
    docker.call(&[&["run", "-d", "--name", "first"], &options[..], &command].concat())?.output()?;
    ensure_eq!(get(host, "http://127.0.0.1:8080/file")?, "data\n", "published port");
    let script = "cat /sys/fs/cgroup/memory.max; echo kept > /data/file; exit 4";
    let ended = docker.call(&["exec", "first", "sh", "-c", script])?.expect_status(4)?;
    ensure_eq!(ended.stdout, "67108864\n", "limit of memory");
    let copy = scene.directory.join("copy");
    docker.call(&["cp", "first:/file", &copy.to_string_lossy()])?.output()?;
    ensure_eq!(fs::read_to_string(&copy)?, "data\n", "copied out");
    docker.call(&["cp", &copy.to_string_lossy(), "first:/copy"])?.output()?;
    ensure_eq!(get(host, "http://127.0.0.1:8080/copy")?, "data\n", "copied in");
    let top = docker.call(&["top", "first"])?.output()?;
    ensure!(top.lines().count() >= 2, "top {top:?}");
    let stats = docker.call(&["stats", "--no-stream", "--format", "{{.PIDs}} {{.MemUsage}}", "first"])?.output()?;
    let mut fields = stats.split_whitespace();
    ensure!(fields.next().is_some_and(|pids| pids.parse::<u32>().is_ok_and(|pids| pids > 0)), "stats {stats:?}");
    ensure!(fields.next().is_some_and(|memory| memory != "0B") && stats.ends_with(" / 64MiB\n"), "stats {stats:?}");

    // By a path Docker looks for itself, at the group of what stands for the container; the machine is in another (docs/docker.md).
    if shim.is_some() || !scene.runtime.is_virtual() {
        what_is_used(docker)?;
    }
    docker.call(&["stop", "-t", "60", "first"])?.output()?;
    ensure_eq!(docker.call(&["logs", "first"])?.output()?, "hello\nbye\n", "logs");
    ensure_eq!(docker.call(&["wait", "first"])?.output()?, "3\n", "exit status");
    docker.call(&["restart", "first"])?.output()?;
    ensure_eq!(get(host, "http://127.0.0.1:8080/data/file")?, "kept\n", "file of the volume after a restart");
    docker.call(&["kill", "first"])?.output()?;
    ensure_eq!(docker.call(&["wait", "first"])?.output()?, "137\n", "exit status of the last run");
    docker.call(&["rm", "first"])?.output()?;
    let limits = ["run", "--name", "greedy", "--memory", "64m", "--memory-swap", "64m"];
    docker.call(&[&limits[..], &[image::NAME, "tail", "/dev/zero"]].concat())?.expect_status(137)?;
    ensure_eq!(docker.call(&["inspect", "-f", "{{.State.OOMKilled}}", "greedy"])?.output()?, "true\n", "why it ended");
    docker.call(&["rm", "greedy"])?.output()?;
    Ok(())
}

/// `docker stats` tells of what a container holds and does: of memory, of a processor, and of its processes.
fn what_is_used(docker: &Docker) -> Outcome {
    let look = || -> Outcome<(f64, f64, u32)> {
        let format = ["--format", "{{.MemUsage}} {{.CPUPerc}} {{.PIDs}}"];
        let said = docker.call(&[&["stats", "--no-stream"], &format[..], &["first"]].concat())?.output()?;
        let words: Vec<_> = said.split_whitespace().collect();
        let [memory, "/", "64MiB", cpu, pids] = words[..] else { return Err(format!("stats {said:?}").into()) };
        let kib = memory.strip_suffix("KiB").map(|kib| kib.parse::<f64>().map(|kib| kib / 1024.0));
        let mib = memory.strip_suffix("MiB").map(str::parse::<f64>);
        let memory = mib.or(kib).ok_or_else(|| format!("stats {said:?}"))??;
        let cpu = cpu.strip_suffix('%').ok_or_else(|| format!("stats {said:?}"))?.parse()?;
        Ok((memory, cpu, pids.parse()?))
    };
    let before = look()?;
    // As many processes that there are more of them in any case: of those from before some come and go.
    let busy = "for n in 1 2 3; do sleep 1000 & all=\"$all $!\"; done; dd if=/dev/zero of=/dev/shm/held bs=1M count=30 2>/dev/null; \
                touch /busy; while [ -e /busy ]; do :; done; kill $all";
    docker.call(&["exec", "-d", "first", "sh", "-c", busy])?.output()?;
    docker.call(&["exec", "first", "sh", "-c", "until [ -e /busy ]; do sleep 0.1; done"])?.output()?;
    let until = Instant::now() + DEADLINE;
    let after = loop {
        let after = look()?;
        // Of one processor most, which is not alone for it where there is but one; and of a second that was not always one.
        if (25.0..125.0).contains(&after.1) && after.1 > before.1 {
            break after;
        }
        ensure!(Instant::now() < until, "use of a processor: {before:?}, {after:?}");
    };
    docker.call(&["exec", "first", "sh", "-c", "rm /busy /dev/shm/held"])?.output()?;
    let memory = after.0 - before.0;
    ensure!((28.0..33.0).contains(&memory), "30 MiB are held, and {memory} told of: {before:?}, {after:?}");
    ensure!((1..=4).contains(&before.2) && after.2 > before.2, "processes: {before:?}, {after:?}");
    Ok(())
}

/// What a web server of a published port answers, as soon as it does.
fn get(host: &Netns, url: &str) -> Outcome<String> {
    let words =
        ["curl", "-s", "-f", "--max-time", "60", "--retry", "20", "--retry-all-errors", "--retry-delay", "1", url];
    host.run(&words)?.output()
}

fn in_a_terminal(scene: &Scene, docker: &Docker) -> Outcome {
    let tmux = Tmux::start(&scene.directory, 100, 30)?;
    let run = ["run", "--rm", "-it", "--name", "terminal", "-e", "PS1=inside> ", image::NAME, "sh"];
    tmux.type_line(&format!("clear; {}; echo status $?", shell_line(&docker.words(&run))))?;
    tmux.expect("inside> ")?;
    tmux.type_line("clear; stty size")?;
    tmux.expect("30 100\n")?;
    let exec = ["exec", "-t", "terminal", "sh", "-c", "tty; exit 6"];
    let ended = docker.call(&exec)?.expect_status(6)?;
    ensure_eq!(ended.stdout, "/dev/pts/1\r\n", "terminal of what was executed");
    tmux.type_line("exit 5")?;
    tmux.expect("\nstatus 5\n")
}

/// In a network of their own containers find each other by their names; and one is asked how it is.
fn by_their_names(docker: &Docker) -> Outcome {
    docker.call(&["network", "create", "friends"])?.output()?;
    let health = ["--health-cmd", "wget -q -O /dev/null http://127.0.0.1/file", "--health-interval", "1s"];
    let serve = [&["run", "-d", "--name", "server", "--network", "friends"], &health[..]].concat();
    docker.call(&[&serve[..], &[image::NAME, "sh", "-c", SERVE]].concat())?.output()?;
    let until = Instant::now() + DEADLINE;
    loop {
        let health = docker.call(&["inspect", "-f", "{{.State.Health.Status}}", "server"])?.output()?;
        if health == "healthy\n" {
            break;
        }
        ensure!(health == "starting\n" && Instant::now() < until, "health {health:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
    let fetch = ["run", "--rm", "--network", "friends", image::NAME, "wget", "-q", "-O", "-", "http://server/file"];
    ensure_eq!(docker.call(&fetch)?.output()?, "data\n", "what a neighbour serves");
    docker.call(&["rm", "-f", "server"])?.output()?;
    docker.call(&["network", "rm", "friends"])?.output().map(drop)
}

/// With the builder that runs each step as a container.
fn built(scene: &Scene, docker: &Docker) -> Outcome {
    let context = scene.make_directory("context")?;
    fs::write(context.join("word"), "copied\n")?;
    let steps =
        "RUN echo $(id -un) > /who\nCOPY word /word\nUSER other\nRUN cat /who /word > /tmp/all\nCMD cat /tmp/all";
    fs::write(context.join("Dockerfile"), format!("FROM {}\n{steps}\n", image::NAME))?;
    let words = ["build", "--network", "none", "-q", "-t", "built", &context.to_string_lossy()];
    docker.call_with(&[("DOCKER_BUILDKIT", "0".into())], &words)?.output()?;
    ensure_eq!(docker.call(&["run", "--rm", "built"])?.output()?, "root\ncopied\n", "output of what was built");
    Ok(())
}
