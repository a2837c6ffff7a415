//! `podhull node`: podhull on a node of Kubernetes.

use std::io::Write as _;
use std::path::PathBuf;

use super::Failure;
use crate::node::{Files, Node, Tree};

/// Put podhull on a node of Kubernetes, or take it away
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull node install                       on this machine: files in /opt/podhull, containerd told and restarted
  podhull node install --at /host            from a container that has the node's files at /host
  podhull node uninstall                     everything as it was before")]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Install(Install),
    Uninstall(Of),
}

/// Put this podhull on the node beside others that pods still have, and tell containerd of it
#[derive(clap::Args)]
#[command(after_help = "Example:
  podhull node install --handler podhull")]
struct Install {
    #[command(flatten)]
    of: Of,

    /// What containerd is to call the runtime, which a RuntimeClass names; may be repeated
    #[arg(long = "handler", value_name = "NAME", default_values = ["kata", "podhull"], value_parser = handler)]
    handlers: Vec<String>,
}

/// Take podhull away from the node, unless pods have it
#[derive(clap::Args)]
#[command(after_help = "Example:
  podhull node uninstall --at /host")]
struct Of {
    /// Directory that has the node's files
    #[arg(long, value_name = "DIR", default_value = "/")]
    at: PathBuf,

    /// containerd's configuration on the node, where that is neither in /etc/containerd nor k3s' or RKE2's
    #[arg(long, value_name = "FILE", value_parser = absolute)]
    config: Option<PathBuf>,

    /// Change files alone: neither check whether pods can run nor restart containerd
    #[arg(long)]
    offline: bool,
}

/// A name as Kubernetes has them (RFC 1123), which needs no quotes anywhere.
fn handler(text: &str) -> Result<String, &'static str> {
    let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let ends = text.starts_with('-') || text.ends_with('-');
    if text.is_empty() || text.len() > 63 || ends || !text.chars().all(valid) {
        return Err("expected 1 to 63 lower case letters, digits and \"-\"");
    }
    Ok(text.into())
}

fn absolute(text: &str) -> Result<PathBuf, &'static str> {
    let path = PathBuf::from(text);
    let plain = path.components().all(|part| !matches!(part, std::path::Component::ParentDir));
    if path.is_absolute() && plain && path.file_name().is_some() { Ok(path) } else { Err("expected an absolute path") }
}

impl Of {
    fn node(self) -> Node {
        Node { tree: Tree::new(self.at), config: self.config, offline: self.offline }
    }
}

impl Arguments {
    /// Does what is asked for.
    pub fn execute(self) -> Result<u8, Failure> {
        let mut say = |text: &str| {
            // It is done, whoever hears of it.
            let _ = writeln!(std::io::stdout(), "{text}");
        };
        match self.command {
            Command::Install(install) => install.of.node().install(&Files::own()?, &install.handlers, &mut say)?,
            Command::Uninstall(of) => of.node().uninstall(&mut say)?,
        }
        Ok(0)
    }
}
