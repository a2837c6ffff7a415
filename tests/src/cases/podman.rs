//! Podman calls the runtime as it calls any: by `--runtime`. Without a network of its own for now.

use std::ffi::OsString;
use std::path::PathBuf;

use super::oci;
use crate::bundle::DEBIAN;
use crate::leaks::Leaks;
use crate::run::{Ended, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("podman::run_in_the_foreground", run_in_the_foreground),
    oci("podman::run_in_the_background", run_in_the_background),
    oci("podman::what_a_container_may", what_a_container_may),
    oci("podman::removed_as_often_as_it_runs", removed_as_often_as_it_runs),
];

/// Nothing is left but what Podman makes once for itself; if that is not empty it stays, and is an error.
fn check(before: &Leaks) -> Outcome {
    for own in ["podman_probe", "libpod_parent/conmon", "libpod_parent"] {
        let _ = std::fs::remove_dir(std::path::Path::new("/sys/fs/cgroup").join(own));
    }
    before.check()
}

/// Podman with a storage of its own.
struct Podman<'a> {
    scene: &'a Scene,
    storage: PathBuf,
}

impl<'a> Podman<'a> {
    fn new(scene: &'a Scene) -> Outcome<Self> {
        let podman = Self { scene, storage: scene.make_directory("podman")? };
        // What it makes once for itself.
        podman.call(&["info"])?.output()?;
        Ok(podman)
    }

    fn words(&self, words: &[&str]) -> Vec<OsString> {
        let mut all: Vec<OsString> = vec!["podman".into()];
        for (option, value) in [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
            all.extend([option.into(), self.storage.join(value).into()]);
        }
        all.extend(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--runtime"].map(Into::into));
        all.push(self.scene.runtime.program().into());
        all.extend(words.iter().map(Into::into));
        all
    }

    fn call(&self, words: &[&str]) -> Outcome<Ended> {
        Running::start(&self.words(words), &[])?.wait()
    }

    /// `podman run` of the Debian.
    fn run(&self, options: &[&str], command: &[&str]) -> Outcome<Ended> {
        let words = [&["run", "--network", "none"], options, &["--rootfs", DEBIAN], command].concat();
        self.call(&words)
    }
}

fn run_in_the_foreground(scene: &Scene) -> Outcome {
    let podman = Podman::new(scene)?;
    let before = Leaks::watch();
    ensure_eq!(podman.run(&["--rm"], &["echo", "hello"])?.output()?, "hello\n", "output");
    let ended = podman.run(&["--rm"], &["sh", "-c", "echo out; echo err >&2; exit 7"])?.expect_status(7)?;
    ensure_eq!((&*ended.stdout, &*ended.stderr), ("out\n", "err\n"), "outputs");
    podman.run(&["--rm"], &["sh", "-c", "sh -c 'kill -9 $$'; exit $?"])?.expect_status(137)?;
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
    podman.run(&["-d", "--name", "d"], &["sleep", "1000"])?.output()?;
    podman.call(&["rm", "-f", "-t", "0", "d"])?.output()?;
    check(&before)
}

fn what_a_container_may(scene: &Scene) -> Outcome {
    let podman = Podman::new(scene)?;
    let before = Leaks::watch();
    for (options, script, expected) in [
        (&["--user", "1000:2000"][..], "echo $(id -u) $(id -g)", "1000 2000"),
        (&["--read-only"], "touch /x 2>&1", "touch: cannot touch '/x': Read-only file system"),
        (&["--cap-drop", "all", "--cap-add", "chown"], "grep CapEff /proc/self/status", "CapEff:\t0000000000000001"),
        (
            &["--memory", "64m", "--pids-limit", "33"],
            "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max",
            "67108864\n33",
        ),
        (&["--cpus", "0.5"], "cat /sys/fs/cgroup/cpu.max", "50000 100000"),
        (&["--ulimit", "nofile=123:456"], "ulimit -n; ulimit -Hn", "123\n456"),
        (&["--hostname", "h"], "hostname", "h"),
        (&["--env", "A=b c"], "echo $A", "b c"),
        (&["--workdir", "/usr"], "pwd", "/usr"),
        (&["--tmpfs", "/t:size=1m"], "df --output=size /t | tail -n 1 | tr -d ' '", "1024"),
    ] {
        let options = [&["--rm"], options].concat();
        let ended = podman.run(&options, &["sh", "-c", script])?;
        ensure_eq!(ended.stdout.trim(), expected, "{options:?}: {:?}", ended.stderr);
    }
    let volume = scene.make_directory("volume")?;
    std::fs::write(volume.join("from-host"), "host\n")?;
    let mount = format!("{}:/v", volume.display());
    let found =
        podman.run(&["--rm", "-v", &mount], &["sh", "-c", "cat /v/from-host; echo guest >/v/from-guest"])?.output()?;
    ensure_eq!(found, "host\n", "file of the host");
    ensure_eq!(std::fs::read_to_string(volume.join("from-guest"))?, "guest\n", "file of the container");
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
