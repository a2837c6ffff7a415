//! `podhull pods`: the virtual machines that run, and what they use.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Context, Failure, Listing};
use crate::inspect::{self, Look, Pod};

/// Goes to the first line of a terminal, and clears it from there.
const CLEAR: &str = "\x1b[H\x1b[J";

/// List pods: their sizes, and what they use
///
/// Those of the command line and those of shims; with another --root than the default, those below it. CPU is what all
/// processes of a pod on the host have used in percent of one CPU: since the last look, or at the first since the pod began.
/// USED is the memory that programs have inside, as the guest says; PSS what the pod costs the host.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull pods                               a table
  podhull pods --watch                       again each 2 seconds, until Ctrl-C
  podhull pods --format json | jq '.[].pss'  for programs")]
pub struct Arguments {
    /// A table, or JSON
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t = Listing::Table)]
    format: Listing,

    /// Look again and again, until Ctrl-C
    #[arg(short, long)]
    watch: bool,

    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=86400))]
    interval: u64,

    /// Ids of pods, or their names in Kubernetes as NAMESPACE/NAME; without any, all
    #[arg(value_name = "POD")]
    pods: Vec<String>,
}

/// A pod, as JSON has it: bytes and seconds; what a guest that does not answer would have said is null.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    id: String,
    /// Namespace and name in Kubernetes.
    namespace: Option<String>,
    name: Option<String>,
    root: String,
    containers: usize,
    cpus: Option<u32>,
    memory: Option<u64>,
    uptime: u64,
    cpu_percent: f64,
    memory_used: Option<u64>,
    pss: u64,
}

impl Arguments {
    /// Prints them.
    pub fn execute(self, context: &Context) -> Result<u8, Failure> {
        inspect::expect_many();
        let mut before = HashMap::new();
        let mut rows = || -> Result<Vec<Row>, Failure> {
            let pods = inspect::chosen(&context.root, &self.pods)?;
            let (looks, now) = (inspect::look_at_all(&pods)?, Instant::now());
            let rows = pods.iter().zip(&looks).map(|(pod, look)| {
                let key = (pod.root.clone(), pod.id().to_owned());
                row(pod, look, before.insert(key, (look.host().cpu, now)), now)
            });
            Ok(rows.collect())
        };
        if !self.watch {
            print(&self.text(&rows()?)?)?;
            return Ok(0);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        // The first tick is now.
        let mut ticks = runtime.block_on(async { tokio::time::interval(Duration::from_secs(self.interval)) });
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            runtime.block_on(ticks.tick());
            let text = self.text(&rows()?)?;
            print(&if std::io::stdout().is_terminal() { CLEAR.to_owned() + &text } else { text })?;
        }
    }

    fn text(&self, rows: &[Row]) -> std::io::Result<String> {
        match self.format {
            Listing::Table => Ok(table(rows)),
            Listing::Json => Ok(serde_json::to_string(rows)? + "\n"),
        }
    }
}

fn print(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

fn row(pod: &Pod, look: &Look, before: Option<(Duration, Instant)>, now: Instant) -> Row {
    let (host, uptime) = (look.host(), pod.uptime());
    let (used, time) = match before {
        Some((used, then)) => (host.cpu.saturating_sub(used), now.duration_since(then)),
        None => (host.cpu, uptime),
    };
    let (namespace, name) = pod.name().unzip();
    let memory = look.guest.as_ref().and_then(|guest| guest.memory.as_ref());
    Row {
        id: pod.id().to_owned(),
        namespace: namespace.map(str::to_owned),
        name: name.map(str::to_owned),
        root: pod.root.display().to_string(),
        containers: pod.count(),
        cpus: look.machine.as_ref().map(|machine| machine.cpus),
        memory: look.machine.as_ref().map(|machine| machine.memory_bytes),
        uptime: uptime.as_secs(),
        cpu_percent: if time.is_zero() { 0.0 } else { used.as_secs_f64() / time.as_secs_f64() * 100.0 },
        memory_used: memory.map(|memory| memory.total.saturating_sub(memory.available)),
        pss: host.proportional,
    }
}

/// Columns with at least 2 spaces between them.
fn table(rows: &[Row]) -> String {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let header = ["POD", "NAME", "CONTAINERS", "CPUS", "MEMORY", "UPTIME", "CPU", "USED", "PSS"].map(str::to_owned);
    let lines = rows.iter().map(|row| {
        [
            row.id.clone(),
            or_dash(
                row.namespace
                    .as_ref()
                    .zip(row.name.as_ref())
                    .map(|(space, name)| printable(&format!("{space}/{name}"))),
            ),
            row.containers.to_string(),
            or_dash(row.cpus.map(|cpus| cpus.to_string())),
            or_dash(row.memory.map(size)),
            time(row.uptime),
            format!("{:.1}%", row.cpu_percent),
            or_dash(row.memory_used.map(size)),
            size(row.pss),
        ]
    });
    let lines: Vec<_> = std::iter::once(header).chain(lines).collect();
    let widths: [usize; 9] =
        std::array::from_fn(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default());
    let mut text = String::new();
    for line in &lines {
        let mut whole = String::new();
        for (cell, width) in line.iter().zip(widths) {
            let _ = write!(whole, "{cell:<width$}  ");
        }
        let _ = writeln!(text, "{}", whole.trim_end());
    }
    text
}

/// Names are the caller's, and a terminal's business are they not.
fn printable(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

fn size(bytes: u64) -> String {
    let mebibytes = bytes as f64 / f64::from(1 << 20);
    if mebibytes < 10.0 { format!("{mebibytes:.1} MiB") } else { format!("{mebibytes:.0} MiB") }
}

/// The two largest units that there are.
fn time(seconds: u64) -> String {
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, seconds) => format!("{seconds}s"),
        (0, 0, minutes, seconds) => format!("{minutes}m{seconds}s"),
        (0, hours, minutes, _) => format!("{hours}h{minutes}m"),
        (days, hours, ..) => format!("{days}d{hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_aligned_and_shows_what_is_there() {
        let row = |id: &str, name: Option<&str>, memory: Option<u64>| Row {
            id: id.into(),
            namespace: name.map(|_| "default".into()),
            name: name.map(str::to_owned),
            root: "/r".into(),
            containers: 2,
            cpus: memory.map(|_| 4),
            memory,
            uptime: 3725,
            cpu_percent: 12.34,
            memory_used: memory,
            pss: 9 << 20,
        };
        let text = table(&[row("long-name", Some("we\x1bb"), Some(256 << 20)), row("x", None, None)]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "POD        NAME          CONTAINERS  CPUS  MEMORY   UPTIME  CPU    USED     PSS");
        assert_eq!(lines[1], "long-name  default/we?b  2           4     256 MiB  1h2m    12.3%  256 MiB  9.0 MiB");
        assert_eq!(lines[2], "x          -             2           -     -        1h2m    12.3%  -        9.0 MiB");
    }

    #[test]
    fn times_have_two_units() {
        assert_eq!([5, 65, 3700, 90_000].map(time), ["5s", "1m5s", "1h1m", "1d1h"]);
    }
}
