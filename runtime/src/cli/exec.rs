//! `podhull exec`: a further program in a running container.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::Context;
use crate::bundle;
use crate::pod::{self, ExecError};
use crate::spec::Config;

/// Run a further program in a running container
///
/// It gets what the container's own process has, in the same namespaces and control group, as far as nothing else is said.
/// Exits with the status of the program: its own, or 128 and the number of the signal that ended it; with 255 if there is none.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull exec hello ps                      a program in container hello
  podhull exec -t hello sh                   with the terminal of the caller
  podhull exec -d --process process.json --pid-file /run/x.pid hello")]
pub struct Arguments {
    /// Unix socket that is sent the terminal
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,

    /// Working directory in the container
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,

    /// NAME=VALUE for the environment; more than once for more
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,

    /// With a terminal
    #[arg(short, long)]
    tty: bool,

    /// User, and optionally group: UID[:GID]
    #[arg(short, long, value_name = "UID[:GID]")]
    user: Option<String>,

    /// Supplementary group; more than once for more
    #[arg(short = 'g', long, value_name = "GID")]
    additional_gids: Vec<u32>,

    /// File with the `process` object of a config.json; `-` is standard input
    #[arg(short, long, value_name = "FILE")]
    process: Option<PathBuf>,

    /// Return when the program runs
    #[arg(short, long)]
    detach: bool,

    /// File to write the pid that stands for the program to
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,

    /// Unix socket that is sent a pidfd of the process that stands for the program
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,

    /// SELinux label; a default one is taken for callers of runc, and left out: the virtual machine confines the program
    #[arg(long, value_name = "LABEL")]
    process_label: Option<String>,

    /// AppArmor profile; a default one is taken for callers of runc, and left out: the virtual machine confines the program
    #[arg(long, value_name = "PROFILE")]
    apparmor: Option<String>,

    /// Let it gain no privileges
    #[arg(long)]
    no_new_privs: bool,

    /// Capability to add; more than once for more
    #[arg(short, long, value_name = "NAME")]
    cap: Vec<String>,

    /// Control group below the container's. Callers of runc may name controllers before a colon; all of them share a path
    #[arg(long, value_name = "[CONTROLLER:]PATH")]
    cgroup: Vec<String>,

    /// Execute in a paused container too
    #[arg(long)]
    ignore_paused: bool,

    /// Pass so many descriptors from number 3 on to the program
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: usize,

    /// Name of the container
    pub id: String,

    /// The program and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Arguments {
    /// Executes the program; returns its exit status.
    pub fn execute(self, context: &Context) -> Result<u8, ExecError> {
        let inherited = context.take_inherited()?;
        let known = pod::running(&context.root, &self.id, self.ignore_paused)?;
        let config = self.config(&known.state.bundle)?;
        for remark in config.remarks() {
            context.log.debug(|| format!("{}: {remark}", self.id));
        }
        let console_socket = self.console_socket.is_some();
        let execution = pod::Execution { known, config, announce: self.announce(), console_socket, inherited };
        match self.detach {
            true => pod::exec_in_background(execution, pod::Launch::as_this_process(), None).map(|_| 0),
            false => pod::exec_in_foreground(execution),
        }
    }

    /// The same as its shadow, for `creator`.
    pub fn run(&self, context: &Context, creator: &pod::Creator) -> Result<u8, ExecError> {
        pod::exec(&pod::Exec {
            known: pod::running(&context.root, &self.id, self.ignore_paused)?,
            debug: None,
            cgroup: sub_cgroup(&self.cgroup)?,
            ignore_paused: self.ignore_paused,
            console_socket: self.console_socket.as_deref(),
            creator,
            log: &context.log,
        })
    }

    fn announce(&self) -> pod::Announce<'_> {
        pod::Announce { pid_file: self.pid_file.as_deref(), pidfd_socket: self.pidfd_socket.as_deref() }
    }

    /// The container's configuration with the process that is asked for.
    fn config(&self, bundle: &Path) -> Result<Config, ExecError> {
        let given = match &self.process {
            Some(path) => {
                let wrong = |what: String| ExecError::Process(path.clone(), what);
                let path = if path.as_os_str() == "-" { Path::new("/dev/stdin") } else { path };
                let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
                Some(serde_json::from_str::<Value>(&text).map_err(|e| wrong(e.to_string()))?)
            }
            None => None,
        };
        Ok(bundle::with_process(bundle, |process| match given {
            Some(given) => *process = given,
            None => self.change(process),
        })?)
    }

    fn change(&self, process: &mut Value) {
        process["args"] = json!(self.command);
        process["terminal"] = json!(self.tty);
        if let Some(process) = process.as_object_mut() {
            process.remove("consoleSize");
        }
        if let Some(cwd) = &self.cwd {
            process["cwd"] = json!(cwd);
        }
        append(process, &["env"], &self.env);
        if let Some(user) = &self.user {
            let (uid, gid) = user.split_once(':').map_or((user.as_str(), None), |(uid, gid)| (uid, Some(gid)));
            // What is no number the check of the whole refuses by name.
            let number = |text: &str| text.parse::<u32>().map_or_else(|_| json!(text), |number| json!(number));
            process["user"]["uid"] = number(uid);
            if let Some(gid) = gid {
                process["user"]["gid"] = number(gid);
            }
        }
        append(process, &["user", "additionalGids"], &self.additional_gids);
        for (field, given) in [("selinuxLabel", &self.process_label), ("apparmorProfile", &self.apparmor)] {
            if let Some(given) = given {
                process[field] = json!(given);
            }
        }
        if self.no_new_privs {
            process["noNewPrivileges"] = json!(true);
        }
        for set in ["bounding", "effective", "permitted"] {
            append(process, &["capabilities", set], &self.cap);
        }
    }
}

/// The path that the `--cgroup` arguments give: one. With control groups of version 1, runc takes one for each controller;
/// those of a container here are of version 2, where it takes a plain one, too.
fn sub_cgroup(given: &[String]) -> Result<&str, ExecError> {
    let wrong = |argument: &str, why| Err(ExecError::SubCgroup(argument.into(), why));
    match given {
        [] => Ok(""),
        [path] if !path.contains(':') => Ok(path),
        several => match several.iter().find(|argument| argument.matches(':').count() != 1) {
            Some(plain) if !plain.contains(':') => wrong(plain, "missing <controller>: prefix"),
            Some(argument) => wrong(argument, "expected [<controller>:]<path>"),
            None => wrong(
                &several[0],
                "the control groups of a container are of version 2, where all controllers have the same path: give that alone",
            ),
        },
    }
}

/// Appends to a list in the process, making it if there is something to append.
fn append<T: serde::Serialize>(process: &mut Value, path: &[&str], items: &[T]) {
    if items.is_empty() {
        return;
    }
    let value = path.iter().fold(process, |value, name| &mut value[*name]);
    if value.is_null() {
        *value = json!([]);
    }
    if let Some(list) = value.as_array_mut() {
        list.extend(items.iter().map(|item| json!(item)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_group_is_one_path_for_all_controllers() {
        let of = |given: &[&str]| {
            let given: Vec<_> = given.iter().map(|argument| (*argument).to_owned()).collect();
            sub_cgroup(&given).map(str::to_owned).map_err(|error| error.to_string())
        };
        assert_eq!(of(&[]), Ok(String::new()));
        assert_eq!(of(&["/a/b"]), Ok("/a/b".into()));
        for (given, expected) in [
            (&["cpu:/a"][..], "cpu:/a: the control groups of a container are of version 2"),
            (&["cpu,memory:/a", "pids:/b"], "cpu,memory:/a: the control groups"),
            (&["/a", "/b"], "/a: missing <controller>: prefix"),
            (&["cpu:/a", "/b"], "/b: missing <controller>: prefix"),
            (&["a:b:c"], "a:b:c: expected [<controller>:]<path>"),
        ] {
            let error = of(given).unwrap_err();
            assert!(error.starts_with(&format!("invalid --cgroup argument: {expected}")), "{error}");
        }
    }
}
