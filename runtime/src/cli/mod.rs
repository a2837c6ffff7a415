//! The command line: global flags, one file per subcommand, and the one place where errors become exit codes.

mod check;
mod checkpoint;
mod config;
mod create;
mod debug;
mod delete;
mod events;
mod exec;
mod features;
mod flags;
mod kill;
mod list;
mod logs;
mod metrics;
mod node;
mod pause;
mod pods;
mod ps;
mod restore;
mod resume;
mod run;
mod shadow;
mod spec;
mod start;
mod state;
mod stats;
mod trace;
mod update;
mod vmm;

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use flags::Line;

use crate::cgroup::Manager;
use crate::log::{Format, Log};
use crate::pod::{Asked, DescriptorError, Inherited};
pub use features::json as features;

/// Version of the OCI runtime specification that `spec` writes and `run` reads.
pub const OCI_VERSION: &str = "1.2.0";

/// Directory of state, unless the command line names another.
pub const ROOT: &str = "/run/podhull";

/// Version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What it was built from.
pub const COMMIT: &str = match option_env!("PODHULL_COMMIT") {
    Some(commit) => commit,
    None => VERSION,
};

/// The exit status of every failure of ours. A container's own status is passed on as it is.
const FAILURE: u8 = 1;

#[derive(Parser)]
#[command(
    name = "podhull",
    about = "Runs OCI containers, each pod in a KVM virtual machine of its own",
    disable_version_flag = true
)]
#[command(after_help = "Examples:
  podhull check                              can this host run pods?
  podhull spec -b DIR                        write a config.json to begin with
  podhull run -b DIR hello                   run the bundle in DIR as container \"hello\"")]
struct Arguments {
    /// Directory that holds the state of containers
    #[arg(long, value_name = "DIR", default_value = ROOT)]
    root: PathBuf,

    /// File that errors (and with --debug, what is done) are appended to; the default is standard error
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,

    /// How lines of the log are written
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Format::Text)]
    log_format: Format,

    /// Have systemd make control groups; linux.cgroupsPath is slice:prefix:name then
    #[arg(long)]
    systemd_cgroup: bool,

    /// For callers of runc: `false` and `auto`; podhull makes virtual machines and control groups as root
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = rootless)]
    rootless: AsRoot,

    /// For callers of runc, which names a program with it that podhull has no use for
    #[arg(long, value_name = "FILE", hide = true)]
    criu: Option<PathBuf>,

    /// Log what is done, not only what fails
    #[arg(long)]
    debug: bool,

    /// Be the process that stands for what the command makes (podhull itself sets it)
    #[arg(long, hide = true)]
    shadow: bool,

    /// Print the version
    #[arg(long, short = 'v')]
    version: bool,

    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    Create(create::Arguments),
    Start(start::Arguments),
    Run(run::Arguments),
    Exec(exec::Arguments),
    State(state::Arguments),
    List(list::Arguments),
    Ps(ps::Arguments),
    Kill(kill::Arguments),
    Pause(pause::Arguments),
    Resume(resume::Arguments),
    Update(Box<update::Arguments>),
    Events(events::Arguments),
    Delete(delete::Arguments),
    Checkpoint(Box<checkpoint::Arguments>),
    Restore(Box<restore::Arguments>),
    Spec(spec::Arguments),
    Check(check::Arguments),
    Config(config::Arguments),
    Node(node::Arguments),
    Pods(pods::Arguments),
    Logs(logs::Arguments),
    Debug(debug::Arguments),
    Metrics(metrics::Arguments),
    Trace(trace::Arguments),
    Features(features::Arguments),
    #[command(hide = true)]
    Vmm(vmm::Arguments),
}

impl Command {
    /// The container that it makes, or does something with that it logs.
    fn container(&self) -> Option<&str> {
        match self {
            Self::Create(create) => Some(&create.container.id),
            Self::Run(run) => Some(&run.container.id),
            Self::Start(start) => Some(&start.id),
            Self::Exec(exec) => Some(&exec.id),
            Self::Delete(delete) => Some(&delete.id),
            Self::Update(update) => Some(&update.id),
            _ => None,
        }
    }
}

/// How `list` and `ps` print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Listing {
    Table,
    Json,
}

/// What a subcommand may need from the global flags.
pub struct Context {
    /// `--root`.
    pub root: PathBuf,
    /// `--systemd-cgroup`.
    pub cgroups: Manager,
    /// Where errors and debug lines go.
    pub log: Log,
    /// What the command is to hand on; taken once.
    inherited: Cell<Option<Result<Inherited, DescriptorError>>>,
}

impl Context {
    /// What the command is to hand on of what this process was started with.
    pub fn take_inherited(&self) -> Result<Inherited, DescriptorError> {
        self.inherited.take().unwrap_or_else(|| Ok(Inherited::default()))
    }
}

impl Arguments {
    /// What the command is to hand on. What a shadow has comes from who made it.
    fn asks_for_descriptors(&self) -> Asked {
        match &self.command {
            _ if self.shadow => Asked::default(),
            Some(Command::Create(create)) => Asked { preserve: create.container.preserve_fds, listen: true },
            Some(Command::Run(run)) => Asked { preserve: run.container.preserve_fds, listen: true },
            Some(Command::Exec(exec)) => Asked { preserve: exec.preserve_fds, listen: false },
            _ => Asked::default(),
        }
    }
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Run(#[from] crate::pod::RunError),
    #[error(transparent)]
    Create(#[from] crate::pod::CreateError),
    #[error(transparent)]
    Command(#[from] crate::pod::CommandError),
    #[error(transparent)]
    Exec(#[from] crate::pod::ExecError),
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    #[error("this command has no shadow")]
    NoShadow,
    #[error(transparent)]
    State(#[from] crate::state::StateError),
    #[error(transparent)]
    Cgroup(#[from] crate::cgroup::CgroupError),
    #[error("ps: {0}")]
    Ps(String),
    #[error("{0}")]
    Update(String),
    #[error("unknown signal {0:?}: see signal(7) for names and numbers")]
    UnknownSignal(String),
    #[error("{0}: not supported: podhull does not save and restore running containers, which are in virtual machines")]
    Unsupported(&'static str),
    #[error(transparent)]
    Spec(#[from] spec::SpecError),
    #[error(transparent)]
    Inspect(#[from] crate::inspect::InspectError),
    #[error("debug: {0}")]
    Debug(String),
    #[error("cannot write the trace {0}: {1}")]
    Trace(PathBuf, #[source] std::io::Error),
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    #[error(transparent)]
    Node(#[from] crate::node::NodeError),
    #[error(transparent)]
    Output(#[from] std::io::Error),
}

impl Failure {
    /// The status to exit with: callers take 255 for "the program was not executed", since its own may be 1.
    fn status(&self) -> u8 {
        match self {
            Self::Exec(_) | Self::Debug(_) => 255,
            _ => FAILURE,
        }
    }
}

/// Parses the command line, carries it out, and returns the status to exit with.
pub fn main() -> ExitCode {
    let mut command = Arguments::command().args_override_self(true);
    let line = Line::read(&mut command, std::env::args_os());
    let arguments = match parse(command, &line) {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error, &line),
    };
    if arguments.version {
        return status(version().map(|()| 0).map_err(Failure::from), &Log::stderr());
    }
    // First: what is opened by this process could have their numbers.
    let inherited = Cell::new(Some(Inherited::take(arguments.asks_for_descriptors())));
    let log = match Log::open(arguments.log.as_deref(), arguments.log_format, arguments.debug) {
        Ok(log) => log,
        Err(error) => {
            Log::stderr().error(&error.to_string());
            return ExitCode::from(FAILURE);
        }
    };
    let log = match arguments.command.as_ref().and_then(Command::container) {
        Some(id) => log.of_container(id),
        None => log,
    };
    let cgroups = if arguments.systemd_cgroup { Manager::Systemd } else { Manager::Files };
    let context = Context { root: arguments.root, cgroups, log, inherited };
    if arguments.shadow {
        return shadow::stand(arguments.command, context);
    }
    let result = match arguments.command {
        Some(Command::Create(create)) => create.execute(&context),
        Some(Command::Start(start)) => start.execute(&context).map_err(Failure::from),
        Some(Command::Run(run)) => run.execute(&context),
        Some(Command::State(state)) => state.execute(&context),
        Some(Command::List(list)) => list.execute(&context),
        Some(Command::Ps(ps)) => ps.execute(&context),
        Some(Command::Kill(kill)) => kill.execute(&context),
        Some(Command::Pause(pause)) => pause.execute(&context).map_err(Failure::from),
        Some(Command::Resume(resume)) => resume.execute(&context).map_err(Failure::from),
        Some(Command::Update(update)) => update.execute(&context),
        Some(Command::Events(events)) => events.execute(&context),
        Some(Command::Delete(delete)) => delete.execute(&context).map_err(Failure::from),
        Some(Command::Checkpoint(checkpoint)) => checkpoint.execute(&context),
        Some(Command::Restore(restore)) => restore.execute(&context),
        Some(Command::Spec(spec)) => spec.execute().map(|()| 0).map_err(Failure::from),
        Some(Command::Check(check)) => check.execute().map_err(Failure::from),
        Some(Command::Config(config)) => config.execute(),
        Some(Command::Node(node)) => node.execute(),
        Some(Command::Pods(pods)) => pods.execute(&context),
        Some(Command::Debug(debug)) => debug.execute(&context),
        Some(Command::Logs(logs)) => logs.execute(&context),
        Some(Command::Metrics(metrics)) => metrics.execute(&context),
        Some(Command::Trace(trace)) => trace.execute(&context),
        Some(Command::Features(features)) => features.execute().map_err(Failure::from),
        Some(Command::Exec(exec)) => exec.execute(&context).map_err(Failure::from),
        Some(Command::Vmm(vmm)) => return vmm.execute(),
        None => Arguments::command().print_help().map(|()| 0).map_err(Failure::from),
    };
    status(result, &context.log)
}

fn parse(command: clap::Command, line: &Line) -> Result<Arguments, clap::Error> {
    Arguments::from_arg_matches(&command.try_get_matches_from(line.words())?)
}

/// That nothing is forgiven which only root may do.
#[derive(Clone)]
struct AsRoot;

fn rootless(text: &str) -> Result<AsRoot, &'static str> {
    match text {
        "" | "auto" | "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(AsRoot),
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Err("podhull has to be root: leave the flag out"),
        _ => Err("expected true, false or auto"),
    }
}

fn status(result: Result<u8, Failure>, log: &Log) -> ExitCode {
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            log.error(&failure.to_string());
            ExitCode::from(failure.status())
        }
    }
}

/// Help goes out as it is; what is wrong with the arguments is said in one line, in the log too: containerd's shim looks for
/// errors nowhere else.
fn usage(error: &clap::Error, line: &Line) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return match error.print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::from(FAILURE),
        };
    }
    let text = error.render().to_string();
    let first = text.split("\n\n").next().unwrap_or_default();
    let problem = first.split_whitespace().collect::<Vec<_>>().join(" ");
    // The mistake is the one to tell, also where there can be no log.
    let log = Log::open(line.log.as_deref(), line.log_format, false).unwrap_or_else(|_| Log::stderr());
    log.error(&format!("{}; see podhull --help", problem.strip_prefix("error: ").unwrap_or(&problem)));
    ExitCode::from(FAILURE)
}

/// The lines callers of runc parse, by position. Some look for its name too: where podhull stands in for it, as a file of that
/// name, it answers to it.
fn version() -> std::io::Result<()> {
    use std::io::Write;
    let called = std::env::args_os().next().unwrap_or_default();
    let name = if Path::new(&called).file_name() == Some("runc".as_ref()) { "runc" } else { "podhull" };
    let text = format!("{name} version {VERSION}\ncommit: {COMMIT}\nspec: {OCI_VERSION}\n");
    std::io::stdout().write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    fn parse_words(words: &[&str]) -> Result<Arguments, clap::Error> {
        let mut command = Arguments::command().args_override_self(true);
        let line = Line::read(&mut command, words.iter().map(OsString::from));
        parse(command, &line)
    }

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn global_flags_come_before_the_subcommand_as_runc_has_them() {
        let words =
            ["podhull", "--root", "/r", "--log", "/l", "--log-format", "json", "--debug", "run", "-b", "/b", "id"];
        let arguments = parse_words(&words).unwrap();
        assert_eq!(arguments.root, PathBuf::from("/r"));
        assert_eq!(arguments.log, Some(PathBuf::from("/l")));
        assert!(arguments.debug);
        assert!(matches!(arguments.command, Some(Command::Run(_))));
    }

    #[test]
    fn flags_are_read_as_go_reads_them_and_no_others() {
        let words = |line: &'static str| line.split(' ').collect::<Vec<_>>();
        for line in [
            "podhull -debug --debug --debug=true --systemd-cgroup=false --root /a -root=/r --rootless=false --criu x list",
            "podhull --root /r create -bundle=/a -bundle /b --no-pivot=true --no-pivot --pid-file /p --pid-file /q x",
            "podhull --root /r restore --image-path d --detach --pid-file f --no-pivot -no-subreaper --bundle b x",
            "podhull --root /r update -memory-swap -1 -cpu-quota=-1 --pids-limit -1 x",
            "podhull --root /r exec -cap CAP_KILL -c CAP_CHOWN -env A=b -e=C=d x sh -c true",
            "podhull --root /r ps -format json x",
        ] {
            let parsed = parse_words(&words(line)).map_err(|error| format!("{line}: {error}")).unwrap();
            assert_eq!(parsed.root, PathBuf::from("/r"), "{line}");
        }
        let Some(Command::Create(create)) =
            parse_words(&words("podhull create -bundle /a -bundle /b x")).unwrap().command
        else {
            panic!("another command")
        };
        assert_eq!(create.container.bundle, PathBuf::from("/b"));
        for line in [
            "podhull --debug=perhaps list",
            "podhull --rootless=true list",
            "podhull --rootless true list",
            "podhull --rootless=maybe list",
            "podhull -frob list",
            "podhull run -frob x",
            "podhull run x y",
            "podhull run -no-pivots x",
            "podhull checkpoint",
            "podhull restore --lsm-mount-context",
        ] {
            assert!(parse_words(&words(line)).is_err(), "{line}");
        }
    }

    #[test]
    fn every_subcommand_shows_an_example() {
        for command in Arguments::command().get_subcommands().filter(|c| !c.is_hide_set()) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("podhull"), "{} has no example", command.get_name());
        }
    }
}
