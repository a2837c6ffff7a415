//! `podhull logs`: what a pod's guest has to say.

use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use serde_json::json;

use super::{Context, Failure};
use crate::agent::Agent;
use crate::config::Config;
use crate::inspect::{self, InspectError};
use crate::log::Format;
use crate::pod::ask;
use crate::state::check_id;

/// Most that is shown, in bytes.
const MOST: u32 = podhull_protocol::MAX_LOG as u32;

/// Print the log of a pod's guest
///
/// With --guest, the end of what the guest's kernel and the agent in it have logged. Of a pod that is gone, or whose guest does
/// not answer, what is kept of that if the key machine.guest_console of the configuration says where.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull logs --guest web
  podhull logs --guest --format json --bytes 4096 web")]
pub struct Arguments {
    /// The guest's. Those of containers are with who runs them
    #[arg(long, required = true)]
    guest: bool,

    /// How lines are written
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t = Format::Text)]
    format: Format,

    /// Show the last lines only, of about so many bytes
    #[arg(long, value_name = "BYTES", default_value_t = MOST, value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST)))]
    bytes: u32,

    /// Id of the pod, or its name in Kubernetes as NAMESPACE/NAME
    #[arg(value_name = "POD")]
    pod: String,
}

/// A line of a guest, which may have anything in it.
struct Line {
    /// Seconds since the guest's kernel began, and the line's level; not known of what comes from a file.
    head: Option<(f64, u32)>,
    text: String,
}

impl Arguments {
    /// Prints it.
    pub fn execute(self, context: &Context) -> Result<u8, Failure> {
        let lines = match self.of_agent(context) {
            Ok(lines) => lines,
            Err(Failure::Inspect(error @ InspectError::Several { .. })) => return Err(error.into()),
            Err(error) => self.of_console()?.ok_or(error)?,
        };
        let mut text = String::new();
        for line in &lines {
            text += &match self.format {
                Format::Text => line.text(),
                Format::Json => line.json(&self.pod),
            };
            text.push('\n');
        }
        io::stdout().write_all(text.as_bytes())?;
        Ok(0)
    }

    fn of_agent(&self, context: &Context) -> Result<Vec<Line>, Failure> {
        let pod = inspect::one(&context.root, &self.pod)?;
        let lines = ask(&pod.first, async |agent: Agent| agent.read_log(self.bytes).await)?;
        let line = |line: podhull_protocol::LogLine| Line {
            head: Some((line.time_us as f64 / 1e6, line.priority % 8)),
            text: line.text,
        };
        Ok(lines.into_iter().map(line).collect())
    }

    /// What is kept of the guest's console.
    fn of_console(&self) -> Result<Option<Vec<Line>>, Failure> {
        let Some(directory) = Config::read()?.guest_console() else { return Ok(None) };
        if check_id(&self.pod).is_err() {
            return Ok(None);
        }
        Ok(tail(&directory.join(format!("{}.log", self.pod)), self.bytes.into())?.map(|text| {
            let line = |line: &str| Line { head: None, text: line.trim_end_matches('\r').to_owned() };
            text.lines().map(line).collect()
        }))
    }
}

/// Whole lines at the end of a file that the guest writes; none if there is no file.
fn tail(path: &Path, bytes: u64) -> io::Result<Option<String>> {
    let mut file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let length = file.metadata()?.len();
    let skipped = length.saturating_sub(bytes);
    file.seek(SeekFrom::Start(skipped))?;
    let mut text = Vec::new();
    file.take(bytes).read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    let whole = if skipped > 0 { text.split_once('\n').map_or("", |(_, rest)| rest) } else { &text };
    Ok(Some(whole.to_owned()))
}

impl Line {
    fn text(&self) -> String {
        let text = escape(&self.text);
        self.head.map_or_else(|| text.clone(), |(time, _)| format!("[{time:12.6}] {text}"))
    }

    fn json(&self, pod: &str) -> String {
        // JSON itself escapes all control characters but these.
        let text = self.text.chars().map(|c| if ('\u{7f}'..='\u{9f}').contains(&c) { '\u{fffd}' } else { c });
        let mut line = json!({ "pod": pod, "msg": text.collect::<String>() });
        if let Some((time, level)) = self.head {
            (line["uptime"], line["level"]) = (json!(time), json!(LEVELS[level as usize % LEVELS.len()]));
        }
        // The agent's lines about a container begin so.
        let id = self.text.strip_prefix("podhull-agent: container ").and_then(|rest| rest.split_once(": "));
        if let Some((id, _)) = id.filter(|(id, _)| check_id(id).is_ok()) {
            line["container"] = json!(id);
        }
        line.to_string()
    }
}

/// Names of the levels of syslog(2).
const LEVELS: [&str; 8] = ["emerg", "alert", "crit", "err", "warning", "notice", "info", "debug"];

/// A terminal is shown nothing that it would act on.
fn escape(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_says_is_one_line_without_control_characters() {
        let line = Line { head: Some((1.5, 6)), text: "a\x1b[2J\nb\u{9b}".into() };
        assert_eq!(line.text(), "[    1.500000] a\\u{1b}[2J\\nb\\u{9b}");
        let json: serde_json::Value = serde_json::from_str(&line.json("p")).unwrap();
        assert_eq!(
            (&json["pod"], &json["level"], &json["msg"]),
            (&json!("p"), &json!("info"), &json!("a\x1b[2J\nb\u{fffd}"))
        );
        assert!(!line.json("p").contains(['\n', '\x1b']));
        let line = Line { head: None, text: "podhull-agent: container web: started".into() };
        let json: serde_json::Value = serde_json::from_str(&line.json("p")).unwrap();
        assert_eq!((&json["container"], &json["level"]), (&json!("web"), &json!(null)));
    }

    #[test]
    fn the_end_of_a_file_has_whole_lines() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.log");
        assert!(tail(&path, 5).unwrap().is_none());
        std::fs::write(&path, "one\ntwo\nthree\n").unwrap();
        assert_eq!(tail(&path, 100).unwrap().unwrap(), "one\ntwo\nthree\n");
        assert_eq!(tail(&path, 8).unwrap().unwrap(), "three\n");
    }
}
