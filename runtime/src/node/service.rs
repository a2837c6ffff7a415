//! What is carried out on a node: its own programs, where they are.

use std::fs::File;
use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::thread::LinkNameSpaceType;
use tokio::process::Command;

use super::NodeError;
use super::tree::Tree;
use super::versions::{DIRECTORY, VERSIONS};

/// Where a node's programs are.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Services of which one has the containerd that kubelet asks. Those of k3s and RKE2 have their own.
const SERVICES: [&str; 5] = ["k3s", "k3s-agent", "rke2-server", "rke2-agent", "containerd"];

/// How long a program of the node may take. To restart k3s is to start all that it is made of, which takes a minute or two.
const DEADLINE: Duration = Duration::from_secs(300);

/// Whether pods of a version can run on the node, as that itself finds there.
pub fn check(tree: &Tree, version: &str) -> Result<(), NodeError> {
    run(tree, &[&format!("{DIRECTORY}/{VERSIONS}/{version}/bin/podhull"), "check"])
}

/// The service with the node's containerd, while that runs.
pub fn active(tree: &Tree) -> Result<&'static str, NodeError> {
    for service in SERVICES {
        match carry_out(tree, &["systemctl", "is-active", "--quiet", service]) {
            Ok((status, _)) if status.success() => return Ok(service),
            // Not every node has systemd.
            Err(NodeError::Start(_, error)) if error.kind() == io::ErrorKind::NotFound => break,
            other => drop(other?),
        }
    }
    Err(NodeError::NoService(SERVICES.join(", ")))
}

/// Starts containerd anew; pods go on meanwhile.
pub fn restart(tree: &Tree, service: &str) -> Result<(), NodeError> {
    run(tree, &["systemctl", "restart", service])
}

fn run(tree: &Tree, words: &[&str]) -> Result<(), NodeError> {
    match carry_out(tree, words)? {
        (status, _) if status.success() => Ok(()),
        (_, said) => {
            let said: Vec<_> = said.lines().map(str::trim).collect();
            Err(NodeError::Failed(words.join(" "), said.join("; ")))
        }
    }
}

/// Carries a program out; returns what it has said, too. One that does not come to an end is killed.
fn carry_out(tree: &Tree, words: &[&str]) -> Result<(ExitStatus, String), NodeError> {
    let start = |error| NodeError::Start(words.join(" "), error);
    let mut command = command(tree, words)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().map_err(start)?;
    let ended = runtime.block_on(async { tokio::time::timeout(DEADLINE, command.output()).await });
    let output = ended.map_err(|_| NodeError::Late(words.join(" "), DEADLINE))?.map_err(start)?;
    Ok((output.status, String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()))
}

/// A program of the node's, in its mount namespace: from a container, where its files are at another place, it could neither be
/// loaded nor find its way.
fn command(tree: &Tree, words: &[&str]) -> Result<Command, NodeError> {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).env_clear().env("PATH", PATH).stdin(Stdio::null()).kill_on_drop(true);
    if !tree.is_own() {
        let path = tree.at("/proc/1/ns/mnt");
        let namespace = File::open(&path).map_err(|error| NodeError::file("open", path, error))?;
        let enter = move || {
            rustix::thread::move_into_link_name_space(
                std::os::fd::AsFd::as_fd(&namespace),
                Some(LinkNameSpaceType::Mount),
            )
            .map_err(io::Error::from)
        };
        // SAFETY: in the child of a fork nothing but a system call is made.
        unsafe { command.pre_exec(enter) };
    }
    Ok(command)
}
