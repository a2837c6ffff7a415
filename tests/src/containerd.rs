//! containerd, with its shim for runc, which calls the program under test, or with podhull's own.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::leaks::Leaks;
use crate::netns::Netns;
use crate::run::{DEADLINE, Ended, Running};
use crate::suite::Scene;
use crate::terminal::shell_line;
use crate::{Outcome, ensure, image};

/// What it makes once for itself.
pub const OWN: [&str; 10] = [
    "/run/containerd/runc/default/pods",
    "/run/containerd/runc/default",
    "/run/containerd/runc",
    "/run/containerd/podhull/default/pods",
    "/run/containerd/podhull/default",
    "/run/containerd/podhull",
    "/run/containerd/fifo",
    "/run/containerd/s",
    "/run/containerd",
    "/sys/fs/cgroup/default",
];

/// Nothing is left but what containerd makes once for itself; if that is not empty it stays, and is an error.
pub fn check(before: &Leaks) -> Outcome {
    before.check_without(&OWN)
}

/// Who stands between containerd and the containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shim {
    /// containerd's shim for runc, which calls the program under test.
    Runc,
    /// That of podhull.
    Podhull,
    /// The same by the name that it has for who comes from Kata Containers.
    Kata,
}

/// The first number of the version of containerd on this host. From 2 on its plugins for pods have other names, and its configuration a
/// version of its own, which is 3.
pub fn major() -> Outcome<u32> {
    let said = Running::start(&["containerd", "--version"].map(OsString::from), &[])?.wait()?.output()?;
    let version = said.split(' ').find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    let major = version.and_then(|version| version.split('.').next()?.parse().ok());
    Ok(major.ok_or_else(|| format!("no version in {said:?}"))?)
}

/// A daemon of its own, with all its directories in the test's. Dropping it ends it.
pub struct Containerd {
    daemon: Option<Running>,
    directory: PathBuf,
    /// The words that name the runtime.
    runtime: Vec<String>,
    /// Where its network is.
    netns: Option<PathBuf>,
}

impl Containerd {
    /// Starts it, and gives it the image of [`image::WHOLE_NAME`].
    pub fn start(scene: &Scene, shim: Shim) -> Outcome<Self> {
        // What is for Kubernetes takes its time.
        let disabled = [
            "io.containerd.grpc.v1.cri",
            "io.containerd.cri.v1.images",
            "io.containerd.cri.v1.runtime",
            "io.containerd.internal.v1.opt",
        ];
        let containerd = Self::with_config(scene, shim, &disabled, "", None)?;
        let archive = image::busybox(scene)?;
        containerd.call(&["image", "import", &archive.to_string_lossy()])?.output()?;
        Ok(containerd)
    }

    /// Starts it without these plugins, with more in its configuration file, in this network namespace of the host.
    pub fn with_config(
        scene: &Scene,
        shim: Shim,
        disabled: &[&str],
        more: &str,
        netns: Option<&Netns>,
    ) -> Outcome<Self> {
        let directory = scene.make_directory("containerd")?;
        let path = |name: &str| directory.join(name).display().to_string();
        // Storage that this host does not have takes its time, too.
        let storage =
            ["btrfs", "zfs", "devmapper", "blockfile"].map(|name| format!("io.containerd.snapshotter.v1.{name}"));
        let disabled: Vec<&str> = disabled
            .iter()
            .copied()
            .chain(["io.containerd.nri.v1.nri"])
            .chain(storage.iter().map(String::as_str))
            .collect();
        let config = format!(
            "version = {}\nroot = {:?}\nstate = {:?}\ndisabled_plugins = {disabled:?}\n[grpc]\naddress = {:?}\n{more}",
            if major()? < 2 { 2 } else { 3 },
            path("root"),
            path("state"),
            path("socket"),
        );
        fs::write(path("config.toml"), config)?;
        let runtime = match shim {
            Shim::Runc => {
                let program = scene.runtime.program().display().to_string();
                ["--runtime", "io.containerd.runc.v2", "--runc-binary", &program].map(str::to_owned).into()
            }
            Shim::Podhull => ["--runtime", "io.containerd.podhull.v2"].map(str::to_owned).into(),
            Shim::Kata => ["--runtime", "io.containerd.kata.v2"].map(str::to_owned).into(),
        };
        let netns = netns.map(|netns| netns.path.clone());
        let mut containerd = Self { daemon: None, directory, runtime, netns };
        containerd.start_daemon()?;
        Ok(containerd)
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("socket")
    }

    /// Starts the daemon, when there is none, and waits until it answers.
    pub fn start_daemon(&mut self) -> Outcome {
        let config = self.directory.join("config.toml").display().to_string();
        let mut words: Vec<OsString> = Vec::new();
        if let Some(netns) = &self.netns {
            words.extend(["nsenter".into(), format!("--net={}", netns.display()).into(), "--".into()]);
        }
        words.extend(["containerd", "--config", &config].map(OsString::from));
        self.daemon = Some(Running::start(&words, &[])?);
        let until = Instant::now() + DEADLINE;
        while self.call(&["version"])?.status != 0 {
            let said = self.daemon.as_ref().map(Running::stderr).unwrap_or_default();
            ensure!(Instant::now() < until, "containerd does not answer: {said}");
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    /// What the daemon has logged that is not as it should be.
    pub fn complaints(&self) -> String {
        let said = self.daemon.as_ref().map(Running::stderr).unwrap_or_default();
        let wrong = |line: &&str| line.contains("level=warning") || line.contains("level=error");
        said.lines().filter(wrong).collect::<Vec<_>>().join("\n")
    }

    /// Kills the daemon, and waits for its end.
    pub fn kill_daemon(&mut self) -> Outcome {
        let Some(daemon) = self.daemon.take() else { return Ok(()) };
        daemon.signal(Signal::KILL)?;
        daemon.wait().map(drop)
    }

    /// Ends the daemon as who restarts it does, and waits for that.
    pub fn stop_daemon(&mut self) -> Outcome {
        let Some(daemon) = self.daemon.take() else { return Ok(()) };
        daemon.signal(Signal::TERM)?;
        daemon.wait()?.expect_status(0).map(drop)
    }

    /// The whole command line of its client.
    pub fn words(&self, words: &[&str]) -> Vec<OsString> {
        let mut all: Vec<OsString> = vec!["ctr".into(), "--address".into(), self.socket().into()];
        all.extend(words.iter().map(Into::into));
        all
    }

    /// The words of its client for a shell.
    pub fn shell_words(&self) -> String {
        shell_line(&self.words(&[]))
    }

    /// The words that run a container of the image.
    pub fn run_words(&self, options: &[&str], id: &str, command: &[&str]) -> Vec<OsString> {
        let runtime: Vec<&str> = self.runtime.iter().map(String::as_str).collect();
        self.words(&[&["run"], &runtime[..], options, &[image::WHOLE_NAME, id], command].concat())
    }

    /// Runs a container of the image to its end.
    pub fn run(&self, options: &[&str], id: &str, command: &[&str]) -> Outcome<Ended> {
        Running::start(&self.run_words(options, id, command), &[])?.wait()
    }

    /// Runs the client to its end.
    pub fn call(&self, words: &[&str]) -> Outcome<Ended> {
        Running::start(&self.words(words), &[])?.wait()
    }

    /// Its client that tells of events, once it has told of one: it does not say when it begins to listen.
    pub fn events(&self, namespace: &str) -> Outcome<Running> {
        let mut events = Running::start(&self.words(&["--namespace", namespace, "events"]), &[])?;
        let until = Instant::now() + DEADLINE;
        for number in 0.. {
            self.call(&["namespace", "label", namespace, &format!("round={number}")])?.output()?;
            if events.line_within(Duration::from_millis(500)).is_ok() {
                break;
            }
            ensure!(Instant::now() < until, "no event");
        }
        Ok(events)
    }

    /// Ends the daemon, and waits for that.
    pub fn end(mut self) -> Outcome {
        self.stop_daemon()
    }
}
