//! What the agent says of what it does, in the guest kernel's log, which the host reads through it ([`read`]), or on the console
//! if there is one.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::OnceLock;

use podhull_protocol::{LogLine, MAX_LOG};

/// The kernel's log, to read and to write.
const KMSG: &str = "/dev/kmsg";

/// Whether the kernel takes what programs write as fast as they do: by default it drops most of it.
const NO_LIMIT: &str = "/proc/sys/kernel/printk_devkmsg";

/// Longest record that the kernel hands out (`PRINTKRB_RECORD_MAX` and its dictionary), with room to spare.
const MAX_RECORD: usize = 8192;

/// Most that is read for an answer: several times what the kernel keeps. A container that may write there could otherwise write as
/// fast as it is read, and there would be no end.
const MOST: usize = 4 << 20;

/// Open if this is a virtual machine: the log of another machine is not the agent's.
static LOG: OnceLock<File> = OnceLock::new();

/// From here on the agent says what it does.
pub fn begin() {
    // Without a log it says nothing, and works all the same.
    if let Ok(file) = File::options().write(true).open(KMSG) {
        let _ = std::fs::write(NO_LIMIT, "on");
        let _ = LOG.set(file);
    }
}

/// A line: `podhull-agent: container ID: what`. Ids are names, and what has no text of a container's.
pub fn container(id: &str, what: std::fmt::Arguments<'_>) {
    pod(format_args!("container {id}: {what}"));
}

/// A line about the pod as a whole.
pub fn pod(what: std::fmt::Arguments<'_>) {
    if let Some(mut log) = LOG.get() {
        // One write is one record; of informational level.
        let _ = log.write_all(format!("<6>podhull-agent: {what}\n").as_bytes());
    }
}

/// The last records, as many as come to so many bytes.
pub fn read(max_bytes: usize) -> io::Result<Vec<LogLine>> {
    let mut log = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(KMSG)?;
    let max_bytes = max_bytes.min(MAX_LOG);
    let mut lines = std::collections::VecDeque::new();
    let (mut bytes, mut all, mut record) = (0, 0, [0; MAX_RECORD]);
    while all < MOST {
        match log.read(&mut record) {
            Ok(0) => break,
            Ok(length) => {
                all += length;
                let Some(line) = parse(&record[..length]) else { continue };
                bytes += size(&line);
                lines.push_back(line);
                while bytes > max_bytes {
                    bytes -= lines.pop_front().as_ref().map_or(0, size);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            // Overwritten before it was read; the next read is of what is there.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => all += MAX_RECORD,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(lines.into())
}

/// Most that a line takes in a message.
fn size(line: &LogLine) -> usize {
    line.text.len() + 32
}

/// A record: `priority,sequence,microseconds,flags[,...];text`, a newline, and lines of a dictionary.
fn parse(record: &[u8]) -> Option<LogLine> {
    let record = String::from_utf8_lossy(record);
    let (head, text) = record.split_once(';')?;
    let mut head = head.split(',');
    let priority = head.next()?.parse().ok()?;
    let time_us = head.nth(1)?.parse().ok()?;
    let text = text.lines().next().unwrap_or_default().to_owned();
    Some(LogLine { priority, time_us, text, ..LogLine::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_its_first_line() {
        let line = parse(b"6,339,5140900,-,caller=T1;NET: a;b\n SUBSYSTEM=acpi\n DEVICE=+x\n").unwrap();
        assert_eq!((line.priority, line.time_us, &*line.text), (6, 5_140_900, "NET: a;b"));
        assert!(parse(b"nonsense").is_none());
    }
}
