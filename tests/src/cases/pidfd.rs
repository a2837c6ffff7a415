//! `--pidfd-socket`: a caller gets what tells the process that stands for a container from all others (runc 1.2 and later).

use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, WaitOptions, pidfd_send_signal, waitpid};

use super::podhull;
use crate::container::Container;
use crate::leaks::Leaks;
use crate::suite::{Case, Scene};
use crate::terminal::receive;
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[podhull("pidfd::of_each_process_is_sent_and_its_signals_arrive", of_each_process_is_sent)];

fn of_each_process_is_sent(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let (path, pid_file) = (scene.directory.join("pidfd.sock"), scene.directory.join("exec.pid"));
    let (socket, pid_path) = (path.to_string_lossy().into_owned(), pid_file.to_string_lossy().into_owned());
    let listener = UnixListener::bind(&path)?;
    let trap = "trap 'exit 7' USR1; echo ready; while :; do sleep 0.1; done";
    let bundle = scene.debian()?.sh(trap);
    let container = Container::make(scene, &bundle, &["create", "--pidfd-socket", &socket])?;
    let (pidfd, name) = receive(&listener)?;
    ensure_eq!(name, "standard", "what runc calls it");
    container.start()?;
    container.expect_output("ready")?;

    let executed = ["exec", "-d", "--pid-file", &pid_path, "--pidfd-socket", &socket, &container.id, "sleep", "1000"];
    // The program has what this has: no pipe that somebody waits for.
    let mut command = Command::new(scene.runtime.program());
    let status = command.args(executed).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    ensure!(status.success(), "exec: {status}");
    let (of_executed, name) = receive(&listener)?;
    ensure_eq!(name, "setns", "what runc calls it");
    pidfd_send_signal(&of_executed, Signal::TERM)?;
    let pid = std::fs::read_to_string(&pid_file)?.trim().parse().ok().and_then(Pid::from_raw);
    let status = waitpid(pid, WaitOptions::empty())?.ok_or("no status")?.1;
    ensure_eq!(status.exit_status(), Some(143), "status of the executed program");

    pidfd_send_signal(&pidfd, Signal::USR1)?;
    ensure_eq!(container.wait()?, 7, "status of the container");
    container.delete()?;

    // Nobody listens: there is no container then, and no pid file.
    drop(listener);
    std::fs::remove_file(&pid_file)?;
    let directory = bundle.directory.to_string_lossy();
    let id = scene.id();
    let words = ["run", "-d", "--pid-file", &pid_path, "--pidfd-socket", &socket, "-b", &directory, &id];
    let refused = scene.call(&words)?.expect_status(1)?;
    ensure!(refused.stderr.contains("pidfd") && refused.stderr.contains(&socket), "stderr {:?}", refused.stderr);
    ensure!(!pid_file.exists(), "a pid file");
    ensure!(scene.call(&["state", &id])?.expect_status(1)?.stderr.contains("does not exist"), "a container");
    before.check()
}
