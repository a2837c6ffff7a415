//! The command line: global flags, one file per subcommand, and the one place where errors become exit codes.

mod check;
mod create;
mod delete;
mod events;
mod exec;
mod features;
mod kill;
mod list;
mod pause;
mod ps;
mod resume;
mod run;
mod shadow;
mod spec;
mod start;
mod state;
mod stats;
mod update;
mod vmm;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::cgroup::Manager;
use crate::log::{Format, Log};

/// Version of the OCI runtime specification that `spec` writes and `run` reads.
pub const OCI_VERSION: &str = "1.2.0";

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
    #[arg(long, value_name = "DIR", default_value = "/run/podhull")]
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
    Spec(spec::Arguments),
    Check(check::Arguments),
    Features(features::Arguments),
    #[command(hide = true)]
    Vmm(vmm::Arguments),
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
    #[error(transparent)]
    Spec(#[from] spec::SpecError),
    #[error(transparent)]
    Output(#[from] std::io::Error),
}

impl Failure {
    /// The status to exit with: callers take 255 for "the program was not executed", since its own may be 1.
    fn status(&self) -> u8 {
        match self {
            Self::Exec(_) => 255,
            _ => FAILURE,
        }
    }
}

/// Parses the command line, carries it out, and returns the status to exit with.
pub fn main() -> ExitCode {
    let arguments = match parse(std::env::args_os()) {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error),
    };
    if arguments.version {
        return status(version().map(|()| 0).map_err(Failure::from), &Log::stderr());
    }
    let log = match Log::open(arguments.log.as_deref(), arguments.log_format, arguments.debug) {
        Ok(log) => log,
        Err(error) => {
            Log::stderr().error(&error.to_string());
            return ExitCode::from(FAILURE);
        }
    };
    let cgroups = if arguments.systemd_cgroup { Manager::Systemd } else { Manager::Files };
    let context = Context { root: arguments.root, cgroups, log };
    if arguments.shadow {
        return shadow::stand(arguments.command, context);
    }
    let result = match arguments.command {
        Some(Command::Create(create)) => create.execute(&context).map_err(Failure::from),
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
        Some(Command::Spec(spec)) => spec.execute().map(|()| 0).map_err(Failure::from),
        Some(Command::Check(check)) => check.execute().map_err(Failure::from),
        Some(Command::Features(features)) => features.execute().map_err(Failure::from),
        Some(Command::Exec(exec)) => exec.execute(&context).map_err(Failure::from),
        Some(Command::Vmm(vmm)) => return vmm.execute(),
        None => Arguments::command().print_help().map(|()| 0).map_err(Failure::from),
    };
    status(result, &context.log)
}

fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Arguments, clap::Error> {
    Arguments::from_arg_matches(&Arguments::command().try_get_matches_from(arguments)?)
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

/// Help goes out as it is; what is wrong with the arguments is said in one line.
fn usage(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return match error.print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::from(FAILURE),
        };
    }
    let text = error.render().to_string();
    let first = text.split("\n\n").next().unwrap_or_default();
    let line = first.split_whitespace().collect::<Vec<_>>().join(" ");
    Log::stderr().error(&format!("{}; see podhull --help", line.strip_prefix("error: ").unwrap_or(&line)));
    ExitCode::from(FAILURE)
}

/// The lines callers of runc parse, by position. Some look for its name too: where podhull stands in for it, as a file of that
/// name, it answers to it.
fn version() -> std::io::Result<()> {
    use std::io::Write;
    let called = std::env::args_os().next().unwrap_or_default();
    let name = if Path::new(&called).file_name() == Some("runc".as_ref()) { "runc" } else { "podhull" };
    let version = env!("CARGO_PKG_VERSION");
    let commit = option_env!("PODHULL_COMMIT").unwrap_or(version);
    let text = format!("{name} version {version}\ncommit: {commit}\nspec: {OCI_VERSION}\n");
    std::io::stdout().write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn global_flags_come_before_the_subcommand_as_runc_has_them() {
        let line =
            ["podhull", "--root", "/r", "--log", "/l", "--log-format", "json", "--debug", "run", "-b", "/b", "id"];
        let arguments = parse(line.iter().map(OsString::from)).unwrap();
        assert_eq!(arguments.root, PathBuf::from("/r"));
        assert_eq!(arguments.log, Some(PathBuf::from("/l")));
        assert!(arguments.debug);
        assert!(matches!(arguments.command, Some(Command::Run(_))));
    }

    #[test]
    fn every_subcommand_shows_an_example() {
        for command in Arguments::command().get_subcommands().filter(|c| !c.is_hide_set()) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("podhull"), "{} has no example", command.get_name());
        }
    }
}
