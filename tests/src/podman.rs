//! Podman on the program under test.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::Outcome;
use crate::bundle::DEBIAN;
use crate::leaks::Leaks;
use crate::run::{Ended, Running};
use crate::suite::Scene;
use crate::terminal::shell_line;

/// Nothing is left but what Podman makes once for itself; if that is not empty it stays, and is an error.
pub fn check(before: &Leaks) -> Outcome {
    for own in ["podman_probe", "libpod_parent/conmon", "libpod_parent"] {
        let _ = std::fs::remove_dir(std::path::Path::new("/sys/fs/cgroup").join(own));
    }
    before.check()
}

/// Podman with a storage of its own.
pub struct Podman<'a> {
    scene: &'a Scene,
    storage: PathBuf,
}

impl<'a> Podman<'a> {
    /// Podman as it is on a fresh host.
    pub fn new(scene: &'a Scene) -> Outcome<Self> {
        let podman = Self { scene, storage: scene.make_directory("podman")? };
        // What it makes once for itself.
        podman.call(&["info"])?.output()?;
        Ok(podman)
    }

    /// The whole command line.
    pub fn words(&self, words: &[&str]) -> Vec<OsString> {
        let mut all: Vec<OsString> = vec!["podman".into()];
        for (option, value) in [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
            all.extend([option.into(), self.storage.join(value).into()]);
        }
        all.extend(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--runtime"].map(Into::into));
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
