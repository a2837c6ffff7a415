//! What is carried out on a node: its own programs, where they are.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::thread::LinkNameSpaceType;

use super::NodeError;
use super::tree::Tree;
use super::versions::{CURRENT, DIRECTORY};

/// Where a node's programs are.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Services of which one has the containerd that kubelet asks. Those of k3s and RKE2 have their own.
const SERVICES: [&str; 5] = ["k3s", "k3s-agent", "rke2-server", "rke2-agent", "containerd"];

/// Whether pods can run on the node, as podhull itself finds there.
pub fn check(tree: &Tree) -> Result<(), NodeError> {
    run(tree, &[&format!("{DIRECTORY}/{CURRENT}/bin/podhull"), "check"])
}

/// Starts containerd anew; pods go on meanwhile.
pub fn restart(tree: &Tree) -> Result<&'static str, NodeError> {
    for service in SERVICES {
        if command(tree, &["systemctl", "is-active", "--quiet", service])?.status().is_ok_and(|status| status.success())
        {
            run(tree, &["systemctl", "restart", service])?;
            return Ok(service);
        }
    }
    Err(NodeError::NoService(SERVICES.join(", ")))
}

fn run(tree: &Tree, words: &[&str]) -> Result<(), NodeError> {
    let line = words.join(" ");
    let output = command(tree, words)?.output().map_err(|error| NodeError::Start(line.clone(), error))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    let said: Vec<_> = String::from_utf8_lossy(&said).lines().map(str::trim).map(str::to_owned).collect();
    Err(NodeError::Failed(line, said.join("; ")))
}

/// A program of the node's, in its mount namespace: from a container, where its files are at another place, it could neither be
/// loaded nor find its way.
fn command(tree: &Tree, words: &[&str]) -> Result<Command, NodeError> {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).env_clear().env("PATH", PATH).stdin(Stdio::null());
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
