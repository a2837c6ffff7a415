//! `podhull debug`: a shell in a pod's guest, for the administrator of the host.

use std::io::{IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};

use podhull_protocol::{CAPABILITIES, DEBUG_DIR, MAX_DEBUG_PROGRAM};
use serde_json::{Value, json};

use super::{Context, Failure};
use crate::bundle;
use crate::config::Config;
use crate::inspect;
use crate::pod::{self, ExecError, Inherited};
use crate::state::Known;

/// Execute the shell that the configuration names in a pod's guest, as root, outside of its containers
///
/// For pods that were started with the key debug.shell in the configuration: /bin/busybox, or another static program of the
/// host, which is sent to the guest. It has a terminal if this command has one. Exits with the status of the shell, or with 255
/// if there is none.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull debug web
  podhull debug web -c 'ps; dmesg | tail'")]
pub struct Arguments {
    /// Id of the pod, or its name in Kubernetes as NAMESPACE/NAME
    #[arg(value_name = "POD")]
    pod: String,

    /// Arguments of the shell
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
    arguments: Vec<String>,
}

impl Arguments {
    /// Executes it; returns its exit status.
    pub fn execute(self, context: &Context) -> Result<u8, Failure> {
        let shell = shell()?;
        let known = self.known(context)?;
        let process = process(&name(&shell)?, &self.arguments);
        let config = bundle::with_process(&known.state.bundle, |value| *value = process).map_err(ExecError::from)?;
        let (announce, inherited) = (pod::Announce::default(), Inherited::default());
        let execution = pod::Execution { known, config, announce, console_socket: false, inherited };
        Ok(pod::exec_in_foreground(execution)?)
    }

    /// The same as its shadow, for `creator`.
    pub fn run(&self, context: &Context, creator: &pod::Creator) -> Result<u8, Failure> {
        let shell = shell()?;
        let debug = Some((name(&shell)?, read(&shell)?));
        let known = self.known(context)?;
        let exec = pod::Exec {
            known,
            debug,
            cgroup: "",
            ignore_paused: true,
            console_socket: None,
            creator,
            log: &context.log,
        };
        Ok(pod::exec(&exec)?)
    }

    /// The container that the pod's machine was made for.
    fn known(&self, context: &Context) -> Result<Known, Failure> {
        Ok(inspect::one(&context.root, &self.pod)?.first)
    }
}

fn shell() -> Result<PathBuf, Failure> {
    let missing = "it is off: name a static program as debug.shell in the configuration, before the pod is started";
    Config::read()?.debug_shell().ok_or_else(|| Failure::Debug(missing.into()))
}

/// What it is called in the guest.
fn name(shell: &Path) -> Result<String, Failure> {
    let name = shell.file_name().and_then(|name| name.to_str());
    name.map(str::to_owned).ok_or_else(|| Failure::Debug(format!("{}: not the name of a program", shell.display())))
}

fn read(shell: &Path) -> Result<Vec<u8>, Failure> {
    let wrong = |what: String| Failure::Debug(format!("{}: {what}", shell.display()));
    let mut content = Vec::new();
    let file = std::fs::File::open(shell).map_err(|error| wrong(error.to_string()))?;
    let most = MAX_DEBUG_PROGRAM as u64;
    file.take(most + 1).read_to_end(&mut content).map_err(|error| wrong(error.to_string()))?;
    match content.len() > MAX_DEBUG_PROGRAM {
        true => Err(wrong(format!("longer than {} MiB, which is the most that can be sent", most >> 20))),
        false => Ok(content),
    }
}

/// The shell in the guest: with all that root may do.
fn process(name: &str, arguments: &[String]) -> Value {
    let path = format!("{DEBUG_DIR}/{name}");
    // Busybox is many programs, and goes by the first argument.
    let applet = (name == "busybox").then_some("sh");
    let words = [path.as_str()].into_iter().chain(applet).chain(arguments.iter().map(String::as_str));
    let (terminal, all) = (std::io::stdin().is_terminal(), &CAPABILITIES[..]);
    let term = std::env::var("TERM").unwrap_or_else(|_| "linux".into());
    json!({
        "terminal": terminal,
        "user": { "uid": 0, "gid": 0 },
        "args": words.collect::<Vec<_>>(),
        "env": [format!("PATH={DEBUG_DIR}:/bin:/sbin:/usr/bin:/usr/sbin"), "HOME=/".to_owned(), format!("TERM={term}"), "PS1=guest# ".to_owned()],
        "cwd": "/",
        "capabilities": {
            "bounding": all, "effective": all, "permitted": all,
        },
    })
}
