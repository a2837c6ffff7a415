//! `podhull ps`: the processes that stand for a container on the host.

use std::io::Write;
use std::process::Command;

use super::{Context, Failure, Listing};
use crate::state::{Known, Status};

/// Show the processes that stand for a container on the host
///
/// What runs in the container is in its virtual machine, and no process of the host.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull ps hello                           as ps -ef shows them
  podhull ps hello -o pid,cmd                other options of ps(1)
  podhull ps --format json hello             [123]")]
pub struct Arguments {
    /// A table, or JSON
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t = Listing::Table)]
    format: Listing,

    /// Name of the container
    id: String,

    /// Options of ps(1) for the table
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTION")]
    options: Vec<String>,
}

impl Arguments {
    /// Prints them.
    pub fn execute(self, context: &Context) -> Result<u8, Failure> {
        let known = Known::load(&context.root, &self.id)?;
        let pids = match &known.state.cgroup {
            _ if known.status() == Status::Stopped => Vec::new(),
            // With those that stand for programs executed in it.
            Some(group) => group.processes()?,
            None => vec![known.state.process.pid],
        };
        let text = match self.format {
            Listing::Json => serde_json::to_string(&pids).map_err(std::io::Error::from)? + "\n",
            Listing::Table => table(&self.options, &pids)?,
        };
        std::io::stdout().write_all(text.as_bytes())?;
        Ok(0)
    }
}

/// The lines of `ps` that are about these processes, below its header.
fn table(options: &[String], pids: &[i32]) -> Result<String, Failure> {
    let default = ["-ef".to_owned()];
    let options = if options.is_empty() { &default[..] } else { options };
    let output = Command::new("ps").args(options).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        return Err(Failure::Ps(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    filter(&text, pids).ok_or_else(|| Failure::Ps("its table has no column PID".into()))
}

fn filter(table: &str, pids: &[i32]) -> Option<String> {
    let header = table.lines().next()?;
    let column = header.split_whitespace().position(|name| name == "PID")?;
    let about = |line: &&str| {
        let pid = line.split_whitespace().nth(column).and_then(|pid| pid.parse().ok());
        pid.is_some_and(|pid: i32| pids.contains(&pid))
    };
    let lines = std::iter::once(header).chain(table.lines().skip(1).filter(about));
    Some(lines.map(|line| format!("{line}\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_table_are_those_of_the_processes() {
        let table = "UID  PID PPID CMD\nroot   1    0 init 77\nroot  77    1 podhull\n";
        assert_eq!(filter(table, &[77]).unwrap(), "UID  PID PPID CMD\nroot  77    1 podhull\n");
        assert_eq!(filter(table, &[]).unwrap(), "UID  PID PPID CMD\n");
        assert_eq!(filter("CMD\nx\n", &[1]), None);
    }
}
