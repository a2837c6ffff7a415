//! A service manager that waits for a container to be ready (`sd_notify(3)`).

use std::ffi::OsString;
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Instant;

use rustix::process::Pid;
use serde_json::json;

use super::{oci, podhull};
use crate::bundle::Bundle;
use crate::container::Container;
use crate::leaks::Leaks;
use crate::run::{DEADLINE, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("notify::who_waits_is_told_when_the_program_is_ready", who_waits_is_told),
    // runc waits until it was reaped.
    podhull("notify::a_program_that_ends_is_not_waited_for", a_program_that_ends_is_not_waited_for),
];

const READY: &str = "
import os, socket, time
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.sendto(b'STATUS=in a moment', os.environ['NOTIFY_SOCKET'])
manager.sendto(b'READY=1', os.environ['NOTIFY_SOCKET'])
for number in range(100):
    try: manager.sendto(b'STATUS=%d' % number, os.environ['NOTIFY_SOCKET'])
    except OSError: pass
open('/dev/shm/over', 'x')
time.sleep(1000)
";

/// Its root stays as it is: the socket is in a directory of the container's own.
fn bundle(scene: &Scene, script: &str) -> Outcome<Bundle> {
    let run = json!({ "destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"] });
    // Any user may say it.
    let bundle = scene.debian()?.push("/mounts", run).set("/process/user", json!({ "uid": 1000, "gid": 1000 }));
    let bundle = bundle.python(script);
    bundle.write()?;
    Ok(bundle)
}

fn manager(path: &Path) -> Outcome<UnixDatagram> {
    let manager = UnixDatagram::bind(path)?;
    manager.set_read_timeout(Some(DEADLINE))?;
    Ok(manager)
}

/// Takes messages until one has this in it; all of them.
fn messages(manager: &UnixDatagram, until: &str) -> Outcome<String> {
    let mut all = String::new();
    while !all.contains(until) {
        let mut message = [0; 4096];
        let length = manager.recv(&mut message).map_err(|error| format!("no {until:?} after {all:?}: {error}"))?;
        all.push_str(&String::from_utf8_lossy(&message[..length]));
        all.push('\n');
    }
    Ok(all)
}

/// A command of the runtime that a service manager waits for; its outputs, which would be the container's, are nobody's.
fn command(scene: &Scene, words: &[&str], manager: &Path) -> Outcome<Running> {
    let program = scene.runtime.program().to_string_lossy().into_owned();
    let shell = ["sh", "-c", "exec \"$@\" </dev/null >/dev/null 2>&1", "sh", &program];
    let words: Vec<OsString> = shell.iter().chain(words).map(Into::into).collect();
    Running::start(&words, &[("NOTIFY_SOCKET", manager.into())])
}

fn who_waits_is_told(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let path = scene.directory.join("manager.sock");
    let manager = manager(&path)?;
    let bundle = bundle(scene, READY)?;
    let directory = bundle.directory.to_string_lossy();

    // In two steps: the second comes back when the program is ready, and says which process to watch from then on.
    let id = scene.id();
    let pid_file = scene.directory.join("pid");
    command(scene, &["create", "-b", &directory, "--pid-file", &pid_file.to_string_lossy(), &id], &path)?
        .wait()?
        .expect_status(0)?;
    let pid = fs::read_to_string(&pid_file)?;
    let started = command(scene, &["start", &id], &path)?;
    let said = messages(&manager, "MAINPID=")?;
    ensure!(said.contains("READY=1\n") && said.contains(&format!("MAINPID={pid}\n")), "{said:?} of process {pid}");
    ensure!(!said.contains("STATUS"), "{said:?}: only that it is ready is passed on");
    // Which waits until the other has looked at what it was sent.
    manager.set_nonblocking(true)?;
    while manager.recv(&mut [0; 4096]).is_ok() {}
    manager.set_nonblocking(false)?;
    started.wait()?.expect_status(0)?;
    let pid = pid.parse().ok().and_then(Pid::from_raw).ok_or("no pid")?;
    let container = Container { scene, runtime: &scene.runtime, id, output: scene.directory.join("none"), pid };
    ensure_eq!(container.status()?, "running", "status");
    // Nobody takes what else it says, and it does not wait for that.
    let began = Instant::now();
    while container.call(&["exec", &container.id, "test", "-e", "/dev/shm/over"])?.status != 0 {
        ensure!(began.elapsed() < DEADLINE, "the program still says something");
    }
    container.call(&["kill", &container.id, "KILL"])?.output()?;
    ensure_eq!(container.wait()?, 137, "exit status");
    container.delete()?;

    // In the foreground the command is the process to watch.
    let id = scene.id();
    let run = command(scene, &["run", "-b", &directory, &id], &path)?;
    let said = messages(&manager, "READY=1")?;
    ensure!(!said.contains("MAINPID"), "{said:?}");
    scene.call(&["kill", &id, "KILL"])?.output()?;
    run.wait()?.expect_status(137)?;
    before.check()
}

fn a_program_that_ends_is_not_waited_for(scene: &Scene) -> Outcome {
    let path = scene.directory.join("manager.sock");
    let manager = manager(&path)?;
    let bundle = bundle(scene, "print('over')")?;
    let id = scene.id();
    let run = ["run", "-d", "-b", &*bundle.directory.to_string_lossy(), &id];
    command(scene, &run, &path)?.wait()?.expect_status(0)?;
    manager.set_nonblocking(true)?;
    ensure!(manager.recv(&mut [0; 4096]).is_err(), "it was never ready");
    let pid = scene.call(&["state", &id])?.output()?;
    ensure!(pid.contains("stopped"), "{pid}");
    scene.call(&["delete", &id])?.output().map(drop)
}
