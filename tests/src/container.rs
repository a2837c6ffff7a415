//! A container in the background, as callers have them.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, WaitOptions, pidfd_open, waitpid};
use serde_json::Value;

use crate::bundle::Bundle;
use crate::run::{DEADLINE, Ended};
use crate::runtime::Runtime;
use crate::suite::Scene;
use crate::{Outcome, ensure};

/// A container in the background, its output in a file.
pub struct Container<'a> {
    /// The test's.
    pub scene: &'a Scene,
    /// What made it.
    pub runtime: &'a Runtime,
    /// Its id.
    pub id: String,
    /// Where its output goes.
    pub output: PathBuf,
    /// The process that stands for it.
    pub pid: Pid,
}

impl<'a> Container<'a> {
    /// `words` are `create`, or `run` and `--detach`.
    pub fn make(scene: &'a Scene, bundle: &Bundle, words: &[&str]) -> Outcome<Self> {
        Self::make_with(scene, &scene.runtime, bundle, words)
    }

    /// The same with another runtime than the one under test.
    pub fn make_with(scene: &'a Scene, runtime: &'a Runtime, bundle: &Bundle, words: &[&str]) -> Outcome<Self> {
        bundle.write()?;
        let id = scene.id();
        let (output, pid_file) = (scene.directory.join(format!("{id}.out")), scene.directory.join(format!("{id}.pid")));
        let file = File::create(&output)?;
        let mut command = Command::new(runtime.program());
        command.args(words).arg("-b").arg(&bundle.directory).arg("--pid-file").arg(&pid_file).arg(&id);
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0);
        let status = command.status()?;
        ensure!(status.success(), "{words:?}: {status}: {}", fs::read_to_string(&output)?);
        let pid = fs::read_to_string(&pid_file)?
            .trim()
            .parse()
            .ok()
            .and_then(Pid::from_raw)
            .ok_or("no pid in the pid file")?;
        Ok(Self { scene, runtime, id, output, pid })
    }

    /// Made, and not started.
    pub fn create(scene: &'a Scene, bundle: &Bundle) -> Outcome<Self> {
        Self::make(scene, bundle, &["create"])
    }

    /// The program under test with other arguments.
    pub fn call(&self, words: &[&str]) -> Outcome<Ended> {
        self.scene.call_with(self.runtime, words)
    }

    /// Starts it.
    pub fn start(&self) -> Outcome {
        self.call(&["start", &self.id])?.output().map(drop)
    }

    /// What `state` says.
    pub fn state(&self) -> Outcome<Value> {
        Ok(serde_json::from_str(&self.call(&["state", &self.id])?.output()?)?)
    }

    /// Its status.
    pub fn status(&self) -> Outcome<String> {
        Ok(self.state()?["status"].as_str().unwrap_or_default().to_owned())
    }

    /// The status the process that stands for the container exits with, or 128 and the signal that ended it, which callers
    /// take for the same: it is ours since its parent has gone.
    pub fn wait(&self) -> Outcome<i32> {
        let pidfd = pidfd_open(self.pid, PidfdFlags::empty())?;
        let deadline = rustix::event::Timespec::try_from(DEADLINE)?;
        let ready = rustix::event::poll(
            &mut [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)],
            Some(&deadline),
        )?;
        ensure!(ready == 1, "process {} did not end; output {:?}", self.pid.as_raw_nonzero(), self.output()?);
        let status = waitpid(Some(self.pid), WaitOptions::empty())?.ok_or("no status")?.1;
        Ok(status.exit_status().or(status.terminating_signal().map(|signal| 128 + signal)).unwrap_or(-1))
    }

    /// Ends it and deletes it.
    pub fn end(&self) -> Outcome {
        self.call(&["delete", "--force", &self.id])?.output()?;
        self.wait().map(drop)
    }

    /// What it has written.
    pub fn output(&self) -> Outcome<String> {
        Ok(fs::read_to_string(&self.output)?)
    }

    /// Waits until the container has written this.
    pub fn expect_output(&self, expected: &str) -> Outcome {
        let began = std::time::Instant::now();
        while !self.output()?.contains(expected) {
            ensure!(began.elapsed() < DEADLINE, "no {expected:?} in {:?}", self.output()?);
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Deletes it; nothing is known of it then.
    pub fn delete(&self) -> Outcome {
        self.call(&["delete", &self.id])?.output()?;
        let gone = self.call(&["state", &self.id])?.expect_status(1)?;
        ensure!(gone.stderr.contains("does not exist"), "after delete: {:?}", gone.stderr);
        Ok(())
    }
}
