//! Docker with the program under test as one of its runtimes.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use rustix::process::Signal;

use crate::leaks::Leaks;
use crate::netns::Netns;
use crate::run::{DEADLINE, Ended, Running};
use crate::suite::Scene;
use crate::terminal::shell_line;
use crate::{Outcome, ensure, image};

/// Nothing is left but what Docker makes once for itself; if that is not empty it stays, and is an error.
pub fn check(before: &Leaks) -> Outcome {
    before.check_without(&[
        "/run/docker/plugins",
        "/run/docker",
        "/run/containerd/runc/moby/pods",
        "/run/containerd/runc/moby",
        "/run/containerd/runc",
        "/run/containerd/podhull/moby/pods",
        "/run/containerd/podhull/moby",
        "/run/containerd/podhull",
        "/run/containerd/s",
        "/run/containerd",
        "/sys/fs/cgroup/docker",
    ])
}

/// A daemon of its own, with all its directories in the test's. Dropping it ends it.
pub struct Docker {
    daemon: Option<Running>,
    directory: PathBuf,
}

impl Docker {
    /// Starts the daemon with the program under test as its default runtime, on a host with this network, and gives it the
    /// image of [`image::NAME`].
    pub fn start(scene: &Scene, netns: &Netns) -> Outcome<Self> {
        let docker = Self::start_with(scene, netns, &[])?;
        let archive = image::busybox(scene)?;
        docker.call(&["load", "-q", "-i", &archive.to_string_lossy()])?.output()?;
        Ok(docker)
    }

    /// The same with the shim of the program under test in place of containerd's for runc.
    pub fn start_by_shim(scene: &Scene, netns: &Netns) -> Outcome<Self> {
        let docker = Self::by_shim(scene, netns, &[])?;
        let archive = image::busybox(scene)?;
        docker.call(&["load", "-q", "-i", &archive.to_string_lossy()])?.output()?;
        Ok(docker)
    }

    /// The name by which containerd finds the shim of the program under test.
    pub fn shim(scene: &Scene) -> &'static str {
        if scene.runtime.is_virtual() { "io.containerd.kata.v2" } else { "io.containerd.runc.v2" }
    }

    /// The same with further options, and without an image.
    pub fn by_shim(scene: &Scene, netns: &Netns, options: &[&str]) -> Outcome<Self> {
        let shim = Self::shim(scene);
        let config = serde_json::json!({ "default-runtime": "shim", "runtimes": { "shim": { "runtimeType": shim } } });
        Self::with_config(scene, netns, &config.to_string(), options)
    }

    /// As [`Self::start`], with further options, and without an image.
    pub fn start_with(scene: &Scene, netns: &Netns, options: &[&str]) -> Outcome<Self> {
        let runtime = scene.runtime.name();
        let added = format!("{runtime}={}", scene.runtime.program().display());
        let add = if runtime == "runc" { [].as_slice() } else { &["--add-runtime", &added] };
        Self::with_config(scene, netns, "{}", &[add, &["--default-runtime", runtime], options].concat())
    }

    /// Starts the daemon with this as its configuration file.
    pub fn with_config(scene: &Scene, netns: &Netns, config: &str, options: &[&str]) -> Outcome<Self> {
        let directory = scene.make_directory("docker")?;
        let path = |name: &str| directory.join(name);
        let mut net = OsString::from("--net=");
        net.push(&netns.path);
        let mut words: Vec<OsString> = vec!["nsenter".into(), net, "dockerd".into()];
        for (option, value) in [
            ("--data-root", path("data")),
            ("--exec-root", path("exec")),
            ("--pidfile", path("pid")),
            ("--config-file", path("daemon.json")),
        ] {
            words.extend([option.into(), value.into()]);
        }
        fs::write(path("daemon.json"), config)?;
        words.extend(
            ["--storage-driver", "overlay2", "--exec-opt", "native.cgroupdriver=cgroupfs", "--host"].map(Into::into),
        );
        words.push(format!("unix://{}", path("socket").display()).into());
        words.extend(options.iter().map(Into::into));
        let docker = Self { daemon: Some(Running::start(&words, &[])?), directory };
        let until = Instant::now() + DEADLINE;
        while docker.call(&["version"])?.status != 0 {
            let said = docker.daemon.as_ref().map(Running::stderr).unwrap_or_default();
            ensure!(Instant::now() < until, "dockerd does not answer: {said}");
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        Ok(docker)
    }

    /// The whole command line of its client.
    pub fn words(&self, words: &[&str]) -> Vec<OsString> {
        let socket = format!("unix://{}", self.directory.join("socket").display());
        let mut all: Vec<OsString> = vec!["docker".into(), "--host".into(), socket.into()];
        all.extend(words.iter().map(Into::into));
        all
    }

    /// Runs the client to its end.
    pub fn call(&self, words: &[&str]) -> Outcome<Ended> {
        self.call_with(&[], words)
    }

    /// The same for what starts several containers, one after the other.
    pub fn call_for_long(&self, words: &[&str]) -> Outcome<Ended> {
        Running::start(&self.words(words), &[])?.wait_within(3 * DEADLINE)
    }

    /// The same with an environment.
    pub fn call_with(&self, environment: &[(&str, OsString)], words: &[&str]) -> Outcome<Ended> {
        Running::start(&self.words(words), environment)?.wait()
    }

    /// The client's command line for a shell.
    pub fn shell_words(&self) -> String {
        shell_line(&self.words(&[]))
    }

    /// Ends the daemon, and waits for that.
    pub fn end(mut self) -> Outcome {
        let Some(daemon) = self.daemon.take() else { return Ok(()) };
        daemon.signal(Signal::TERM)?;
        daemon.wait()?.expect_status(0).map(drop)
    }
}
