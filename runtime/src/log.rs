//! The log in runc's two forms. Callers parse the last error line of a JSON log, so an error is written once, at the top.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

/// Form of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// `time="..." level=... msg="..."`
    Text,
    /// `{"level":"...","msg":"...","time":"..."}`
    Json,
}

/// The log cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the log {0}: {1}")]
pub struct LogError(PathBuf, #[source] std::io::Error);

/// Where errors and, if asked for, debug lines go.
#[derive(Clone)]
pub struct Log {
    file: Option<Arc<File>>,
    format: Format,
    debug: bool,
    /// Standard error is the container's.
    quiet: bool,
    /// Whom lines are about.
    pod: OnceLock<String>,
    container: Option<String>,
}

impl Log {
    /// A log that is standard error alone.
    pub fn stderr() -> Self {
        Self::new(None, Format::Text, false)
    }

    fn new(file: Option<File>, format: Format, debug: bool) -> Self {
        Self { file: file.map(Arc::new), format, debug, quiet: false, pod: OnceLock::new(), container: None }
    }

    /// Opens the file for appending, making it if it is not there.
    pub fn open(path: Option<&Path>, format: Format, debug: bool) -> Result<Self, LogError> {
        let open = |path: &Path| {
            OpenOptions::new().append(true).create(true).open(path).map_err(|e| LogError(path.to_owned(), e))
        };
        Ok(Self::new(path.map(open).transpose()?, format, debug))
    }

    /// A log that is an open file alone.
    pub fn to(file: File, format: Format, debug: bool) -> Self {
        Self::new(Some(file), format, debug).quiet()
    }

    /// The same without standard error.
    pub fn quiet(self) -> Self {
        Self { quiet: true, ..self }
    }

    /// The same, for lines about a container.
    pub fn of_container(self, id: &str) -> Self {
        Self { container: Some(id.to_owned()), ..self }
    }

    /// From here on lines are about what is in this pod, which may be known only now.
    pub fn of_pod(&self, id: &str) {
        let _ = self.pod.set(id.to_owned());
    }

    /// The error a command ends with: into the log, and as one line to standard error.
    pub fn error(&self, message: &str) {
        if self.file.is_some() {
            self.line("error", message);
        }
        self.to_stderr(&format!("podhull: {}\n", one_line(message)));
    }

    /// Something the user should know though the command goes on.
    pub fn warning(&self, message: &str) {
        if self.file.is_some() {
            self.line("warning", message);
        }
        self.to_stderr(&format!("podhull: {}\n", one_line(message)));
    }

    /// What is being done; the message is made only if somebody asked for it.
    pub fn debug(&self, message: impl FnOnce() -> String) {
        if self.debug {
            self.line("debug", &message());
        }
    }

    /// Unlike `eprint!`, does not panic when standard error is closed.
    fn to_stderr(&self, text: &str) {
        if !self.quiet {
            let _ = std::io::stderr().write_all(text.as_bytes());
        }
    }

    fn line(&self, level: &str, message: &str) {
        let time = rfc3339(SystemTime::now());
        let about = [("pod", self.pod.get()), ("container", self.container.as_ref())];
        let about = about.into_iter().filter_map(|(key, id)| Some((key, id?.as_str())));
        let line = match self.format {
            Format::Text => {
                // Ids have no characters that would need quotes.
                let about: String = about.map(|(key, id)| format!(" {key}={id}")).collect();
                format!("time=\"{time}\" level={level} msg={:?}{about}\n", one_line(message))
            }
            Format::Json => {
                let mut line = serde_json::json!({ "level": level, "msg": message, "time": time });
                about.for_each(|(key, id)| line[key] = id.into());
                format!("{line}\n")
            }
        };
        match self.file.as_deref() {
            // One write per line: other processes append to the same file. A log that cannot be written must not fail
            // the command.
            Some(mut file) => {
                let _ = file.write_all(line.as_bytes());
            }
            None => self.to_stderr(&line),
        }
    }
}

/// Messages may quote what a bundle or the guest said; neither gets to write a second line or an escape sequence.
fn one_line(message: &str) -> String {
    message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// `2026-01-31T12:00:00.123456789Z`
pub fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        since.subsec_nanos()
    )
}

/// Year, month and day of a number of days since 1970-01-01, in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    let (mut year, mut rest) = (1970, days);
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    loop {
        let length = if leap(year) { 366 } else { 365 };
        if rest < length {
            break;
        }
        rest -= length;
        year += 1;
    }
    let mut month = 1;
    for length in [31, if leap(year) { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if rest < length {
            break;
        }
        rest -= length;
        month += 1;
    }
    (year, month, rest + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_written_as_callers_parse_them() {
        let at = |s| rfc3339(UNIX_EPOCH + Duration::from_secs(s));
        assert_eq!(at(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000000000Z");
        assert_eq!(at(1_767_225_599), "2025-12-31T23:59:59.000000000Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00.000000000Z");
    }

    #[test]
    fn lines_say_whom_they_are_about() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        for format in [Format::Json, Format::Text] {
            let log = Log::open(Some(&path), format, true).unwrap().of_container("c").quiet();
            log.error("a\nb");
            log.of_pod("p");
            log.debug(|| "d".into());
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = text.lines().collect();
        let json: serde_json::Value = serde_json::from_str(lines[1]).unwrap();
        assert_eq!((&json["pod"], &json["container"], &json["msg"]), (&"p".into(), &"c".into(), &"d".into()));
        assert!(lines[0].contains(r#""container":"c""#) && !lines[0].contains("pod"), "{text}");
        assert!(lines[2].ends_with(r#"level=error msg="a b" container=c"#), "{text}");
        assert!(lines[3].ends_with(r#"level=debug msg="d" pod=p container=c"#), "{text}");
    }

    #[test]
    fn a_message_stays_on_its_line() {
        assert_eq!(one_line("a\nb\x1b[2Jc"), "a b [2Jc");
    }
}
