//! `podhull events`: what happens to a container, and what it uses, a line of JSON each.

use std::io::Write;
use std::time::Duration;

use serde::Serialize;

use super::stats::Stats;
use super::{Context, Failure};
use crate::pod::{self, Seen};

/// Print what happens to a container and what it uses, as JSON
///
/// A line of statistics at each interval, and a line when a process of the container was killed for lack of memory. Ends with
/// the container.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull events --stats hello | jq .data.memory.usage
  podhull events --interval 1m30s hello")]
pub struct Arguments {
    /// Time between statistics: a number with ns, us, ms, s, m or h, or several such
    #[arg(long, value_name = "TIME", default_value = "5s", allow_hyphen_values = true, value_parser = duration)]
    interval: Duration,

    /// Print the statistics once and return
    #[arg(long)]
    stats: bool,

    /// Name of the container
    id: String,
}

/// A line, key for key as runc has it (its `types/events.go`).
#[derive(Serialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Stats>,
}

impl Arguments {
    /// Prints until the container ends.
    pub fn execute(self, context: &Context) -> Result<u8, Failure> {
        let id = self.id.as_str();
        let print = |seen| {
            let line = match seen {
                Seen::OutOfMemory => Line { kind: "oom", id, data: None },
                Seen::Stats(stats) => Line { kind: "stats", id, data: Some((*stats).into()) },
            };
            let mut text = serde_json::to_vec(&line)?;
            text.push(b'\n');
            let mut stdout = std::io::stdout();
            stdout.write_all(&text)?;
            stdout.flush()
        };
        if self.stats {
            print(Seen::Stats(Box::new(pod::stats(&context.root, id)?)))?;
        } else {
            pod::watch(&context.root, id, self.interval, print)?;
        }
        Ok(0)
    }
}

/// A time as Go writes it: `1h30m`, `1.5s`, `300ms`.
fn duration(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, f64); 7] =
        [("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    let malformed = || "expected a time such as 5s, 1m30s or 300ms".to_owned();
    let (mut rest, mut seconds) = (text.strip_prefix('+').unwrap_or(text), 0.0);
    if rest.is_empty() {
        return Err(malformed());
    }
    if rest.starts_with('-') || rest == "0" {
        return Err("duration interval must be greater than 0".into());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, behind) = rest.split_at(digits);
        let letters = behind.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(behind.len());
        let (unit, behind) = behind.split_at(letters);
        let (_, unit) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(malformed)?;
        seconds += number.parse::<f64>().map_err(|_| malformed())? * unit;
        rest = behind;
    }
    // Above a century it is not meant.
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if duration.is_zero() => Err("duration interval must be greater than 0".into()),
        Ok(duration) if duration < Duration::from_secs(100 * 365 * 24 * 3600) => Ok(duration),
        _ => Err("is too long".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_go() {
        for (text, expected) in [
            ("5s", Some(5_000)),
            ("100ms", Some(100)),
            ("1m30s", Some(90_000)),
            ("1.5h", Some(5_400_000)),
            (".5s", Some(500)),
            ("2000us", Some(2)),
            ("0", None),
            ("0s", None),
            ("-5s", None),
            ("5", None),
            ("s", None),
            ("", None),
            ("5 s", None),
            ("1..5s", None),
            ("99999999h", None),
        ] {
            let found = duration(text).ok().map(|duration| duration.as_millis());
            assert_eq!(found, expected, "{text}");
        }
        assert!(duration("-5s").unwrap_err().contains("must be greater than 0"));
    }

    #[test]
    fn an_event_without_data_has_no_key_for_it() {
        let line = serde_json::to_string(&Line { kind: "oom", id: "a", data: None }).unwrap();
        assert_eq!(line, r#"{"type":"oom","id":"a"}"#);
    }
}
