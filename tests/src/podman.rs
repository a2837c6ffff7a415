//! Podman on the program under test.

use std::ffi::OsString;
use std::path::PathBuf;

use rustix::mount::{UnmountFlags, unmount};

use crate::bundle::DEBIAN;
use crate::leaks::Leaks;
use crate::netns::Netns;
use crate::run::{Ended, Running};
use crate::suite::Scene;
use crate::terminal::shell_line;
use crate::{Outcome, image};

/// Nothing is left but what Podman makes once for itself; if that is not empty it stays, and is an error.
pub fn check(before: &Leaks) -> Outcome {
    // Its network namespaces are in a mount that it shares with whoever makes others there.
    if before.since().iter().any(|thing| thing.starts_with("mount ") && thing.contains(" /run/netns ")) {
        // Not if one is left.
        let _ = unmount("/run/netns", UnmountFlags::empty());
    }
    before.check_without(&[
        "/sys/fs/cgroup/podman_probe",
        "/sys/fs/cgroup/libpod_parent/conmon",
        "/sys/fs/cgroup/libpod_parent",
        "/run/netns",
        "/run/containers/networks/aardvark-dns",
    ])
}

/// Podman with a storage of its own.
pub struct Podman<'a> {
    scene: &'a Scene,
    storage: PathBuf,
    /// Where its networks are.
    netns: Option<&'a Netns>,
    /// Who makes its control groups.
    cgroups: &'static str,
}

impl<'a> Podman<'a> {
    /// Podman as it is on a fresh host.
    pub fn new(scene: &'a Scene) -> Outcome<Self> {
        let podman = Self { scene, storage: scene.make_directory("podman")?, netns: None, cgroups: "cgroupfs" };
        // What it makes once for itself.
        podman.call(&["info"])?.output()?;
        Ok(podman)
    }

    /// The same with an image ([`image::NAME`]), on a host that has this network.
    pub fn with_network(scene: &'a Scene, netns: &'a Netns) -> Outcome<Self> {
        let podman = Self { scene, storage: scene.make_directory("podman")?, netns: Some(netns), cgroups: "cgroupfs" };
        podman.load()?;
        Ok(podman)
    }

    /// The same without a network, on a host that was booted with systemd.
    pub fn with_systemd(scene: &'a Scene) -> Outcome<Self> {
        let podman = Self { scene, storage: scene.make_directory("podman")?, netns: None, cgroups: "systemd" };
        podman.load()?;
        Ok(podman)
    }

    /// Gives it an image ([`image::NAME`]).
    pub fn load(&self) -> Outcome {
        let archive = image::busybox(self.scene)?;
        self.call(&["load", "-q", "-i", &archive.to_string_lossy()])?.output().map(drop)
    }

    /// The whole command line.
    pub fn words(&self, words: &[&str]) -> Vec<OsString> {
        let mut all: Vec<OsString> = match self.netns {
            Some(netns) => {
                let mut net = OsString::from("--net=");
                net.push(&netns.path);
                vec!["nsenter".into(), net, "podman".into()]
            }
            None => vec!["podman".into()],
        };
        for (option, value) in
            [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp"), ("--network-config-dir", "networks")]
        {
            all.extend([option.into(), self.storage.join(value).into()]);
        }
        all.extend(image::DRIVER.iter().map(Into::into));
        all.extend(["--cgroup-manager", self.cgroups, "--runtime"].map(Into::into));
        all.push(self.scene.runtime.program().into());
        all.extend(words.iter().map(Into::into));
        all
    }

    /// The same for a shell, without what it is to do.
    pub fn shell_words(&self) -> String {
        shell_line(&self.words(&[]))
    }

    /// Runs it to its end.
    pub fn call(&self, words: &[&str]) -> Outcome<Ended> {
        Running::start(&self.words(words), &[])?.wait()
    }

    /// `podman run` of the Debian, without a network.
    pub fn run(&self, options: &[&str], command: &[&str]) -> Outcome<Ended> {
        let words = [&["run", "--network", "none"], options, &["--rootfs", DEBIAN], command].concat();
        self.call(&words)
    }
}
