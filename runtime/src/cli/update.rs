//! `podhull update`: other limits for a container that is there.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{Context, Failure};
use crate::pod;
use crate::spec::Resources;

/// Longest document of limits, in bytes.
const MAX_DOCUMENT: u64 = 1 << 20;

/// Change limits of a container
///
/// Only what is given changes. Sizes are bytes, or a number with k, m, g, t or p; -1 is no limit.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull update --memory 512m --pids-limit 100 hello
  podhull update --cpu-quota 50000 --cpu-period 100000 hello
  echo '{\"pids\": {\"limit\": 20}}' | podhull update -r - hello")]
pub struct Arguments {
    /// File with a `linux.resources` object of a config.json, `-` is standard input; all other options are ignored then
    #[arg(short, long, value_name = "FILE")]
    resources: Option<PathBuf>,

    /// Weight of its input and output beside other containers: 10 to 1000
    #[arg(long, value_name = "WEIGHT", allow_hyphen_values = true)]
    blkio_weight: Option<String>,

    /// Period for the quota, in microseconds
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    cpu_period: Option<String>,

    /// Processor time in each period, in microseconds; -1 is no limit
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    cpu_quota: Option<String>,

    /// Unused processor time that may be used later, in microseconds
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    cpu_burst: Option<String>,

    /// Weight of its processor time beside other containers: 2 to 262144
    #[arg(long, value_name = "SHARES", allow_hyphen_values = true)]
    cpu_share: Option<String>,

    /// For callers of runc; cgroup v2 has no such limit
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    cpu_rt_period: Option<String>,

    /// For callers of runc; cgroup v2 has no such limit
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    cpu_rt_runtime: Option<String>,

    /// Processors it may use, such as 0-2,7
    #[arg(long, value_name = "LIST", allow_hyphen_values = true)]
    cpuset_cpus: Option<String>,

    /// Memory nodes it may use
    #[arg(long, value_name = "LIST", allow_hyphen_values = true)]
    cpuset_mems: Option<String>,

    /// 1: run only when nothing else does; 0: like everything else
    #[arg(long, value_name = "0|1", allow_hyphen_values = true)]
    cpu_idle: Option<String>,

    /// Memory
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    memory: Option<String>,

    /// Memory that is not taken from it while others have more to give
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    memory_reservation: Option<String>,

    /// Memory and swap together
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    memory_swap: Option<String>,

    /// For callers of runc; ignored, as it does
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, hide = true)]
    kernel_memory: Option<String>,

    /// For callers of runc; ignored, as it does
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, hide = true)]
    kernel_memory_tcp: Option<String>,

    /// Processes and threads; -1 is no limit
    #[arg(long, value_name = "COUNT", allow_hyphen_values = true)]
    pids_limit: Option<String>,

    /// For callers of runc; not supported
    #[arg(long, value_name = "SCHEMA", hide = true)]
    l3_cache_schema: Option<String>,

    /// For callers of runc; not supported
    #[arg(long, value_name = "SCHEMA", hide = true)]
    mem_bw_schema: Option<String>,

    /// Name of the container
    pub id: String,
}

/// How the value of a flag is read.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// Not below 0.
    Unsigned,
    Signed,
    /// Bytes, with a unit.
    Size,
    /// As it is.
    Text,
}

/// A flag, its field below `linux.resources`, and its value.
type Flag<'a> = (&'static str, &'static str, Kind, Option<&'a String>);

impl Arguments {
    /// Returns when the limits hold.
    pub fn execute(self, context: &Context) -> Result<u8, Failure> {
        for (flag, value) in [("kernel-memory", &self.kernel_memory), ("kernel-memory-tcp", &self.kernel_memory_tcp)] {
            if value.as_ref().is_some_and(|value| !value.is_empty()) && self.resources.is_none() {
                context.log.warning(&format!("Setting --{flag} is ignored and will be removed"));
            }
        }
        for (flag, value) in [("l3-cache-schema", &self.l3_cache_schema), ("mem-bw-schema", &self.mem_bw_schema)] {
            if value.as_ref().is_some_and(|value| !value.is_empty()) {
                return Err(Failure::Update(format!(
                    "--{flag}: not supported: cache and bandwidth of the host's CPUs are not divided among pods"
                )));
            }
        }
        let flags = self.flags();
        let in_words = |text: &str| {
            Failure::Update(match &self.resources {
                Some(path) => in_words_of_file(path, text),
                None => in_words_of_flags(&flags, text),
            })
        };
        let document = match &self.resources {
            Some(path) => read(path),
            None => from_flags(&flags),
        };
        let resources = Resources::read(document.map_err(Failure::Update)?).map_err(|e| in_words(&e.to_string()))?;
        pod::update(&context.root, &self.id, &resources, &context.log).map_err(|e| in_words(&e.to_string()))?;
        Ok(0)
    }

    fn flags(&self) -> [Flag<'_>; 14] {
        use Kind::{Signed, Size, Text, Unsigned};
        [
            ("blkio-weight", "blockIO.weight", Unsigned, self.blkio_weight.as_ref()),
            ("cpu-period", "cpu.period", Unsigned, self.cpu_period.as_ref()),
            ("cpu-quota", "cpu.quota", Signed, self.cpu_quota.as_ref()),
            ("cpu-burst", "cpu.burst", Unsigned, self.cpu_burst.as_ref()),
            ("cpu-share", "cpu.shares", Unsigned, self.cpu_share.as_ref()),
            ("cpu-rt-period", "cpu.realtimePeriod", Unsigned, self.cpu_rt_period.as_ref()),
            ("cpu-rt-runtime", "cpu.realtimeRuntime", Signed, self.cpu_rt_runtime.as_ref()),
            ("cpuset-cpus", "cpu.cpus", Text, self.cpuset_cpus.as_ref()),
            ("cpuset-mems", "cpu.mems", Text, self.cpuset_mems.as_ref()),
            ("cpu-idle", "cpu.idle", Signed, self.cpu_idle.as_ref()),
            ("memory-reservation", "memory.reservation", Size, self.memory_reservation.as_ref()),
            ("memory-swap", "memory.swap", Size, self.memory_swap.as_ref()),
            ("memory", "memory.limit", Size, self.memory.as_ref()),
            ("pids-limit", "pids.limit", Signed, self.pids_limit.as_ref()),
        ]
    }
}

/// The object in a file.
fn read(path: &Path) -> Result<Value, String> {
    let wrong = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let mut text = String::new();
    let result = match path.as_os_str() == "-" {
        true => std::io::stdin().take(MAX_DOCUMENT).read_to_string(&mut text),
        false => File::open(path).and_then(|file| file.take(MAX_DOCUMENT).read_to_string(&mut text)),
    };
    result.map_err(|e| wrong(&e))?;
    serde_json::from_str(&text).map_err(|e| wrong(&e))
}

/// The same object from flags; an empty value is none.
fn from_flags(flags: &[Flag<'_>]) -> Result<Value, String> {
    let mut document = json!({});
    for (flag, field, kind, value) in flags {
        let Some(value) = value.filter(|value| !value.is_empty()) else { continue };
        let read = match kind {
            Kind::Unsigned => value.parse::<u64>().map(Value::from).map_err(|_| "a number that is not below 0"),
            Kind::Signed => value.parse::<i64>().map(Value::from).map_err(|_| "a number"),
            Kind::Size => size(value).map(Value::from).ok_or("a number of bytes such as 64m, or -1"),
            Kind::Text => Ok(json!(value)),
        };
        let read = read.map_err(|expected| format!("invalid value for --{flag}: {value:?}: expected {expected}"))?;
        let (group, name) = field.split_once('.').unwrap_or((field, ""));
        document[group][name] = read;
    }
    Ok(document)
}

/// A size as Docker has them: a number, which may have a fraction, and a unit of 1024, as `64m`, `1.5GiB`, `100 kb`.
fn size(text: &str) -> Option<i64> {
    if text == "-1" {
        return Some(-1);
    }
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.strip_prefix(' ').unwrap_or(unit).to_ascii_lowercase();
    let unit = unit.strip_suffix('b').unwrap_or(&unit);
    let exponent = match unit.strip_suffix('i').unwrap_or(unit) {
        "" => 0,
        letter => 1 + "kmgtp".find(letter).filter(|_| letter.len() == 1)?,
    };
    let factor = 1_i64 << (10 * exponent);
    match number.parse::<i64>() {
        Ok(whole) => whole.checked_mul(factor),
        Err(_) => {
            let bytes = number.parse::<f64>().ok()? * factor as f64;
            (bytes < i64::MAX as f64).then_some(bytes as i64)
        }
    }
}

/// What is wrong, by the place in the file.
fn in_words_of_file(path: &Path, text: &str) -> String {
    match text.trim_start_matches(": ").strip_prefix("linux.resources") {
        Some(rest) => format!("{}: {}", path.display(), rest.trim_start_matches(['.', ':', ' '])),
        None => text.replace("linux.resources.", ""),
    }
}

/// What is wrong, by the flags that the caller used.
fn in_words_of_flags(flags: &[Flag<'_>], text: &str) -> String {
    let text = flags.iter().fold(text.trim_start_matches(": ").to_owned(), |text, (flag, field, ..)| {
        text.replace(&format!("linux.resources.{field}"), &format!("--{flag}"))
    });
    text.replace("linux.resources.", "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_docker() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("67108864", Some(64 << 20)),
            ("64m", Some(64 << 20)),
            ("64MB", Some(64 << 20)),
            ("64MiB", Some(64 << 20)),
            ("1.5g", Some(3 << 29)),
            ("100 kb", Some(102_400)),
            ("1p", Some(1 << 50)),
            ("-1", Some(-1)),
            ("-2", None),
            ("", None),
            ("m", None),
            ("1x", None),
            ("1kk", None),
            ("1.2.3", None),
            ("9999999p", None),
            ("99999.9p", None),
            ("1é", None),
        ] {
            assert_eq!(size(text), bytes, "{text}");
        }
    }

    #[test]
    fn a_wrong_value_is_said_with_its_flag() {
        let (memory, quota, none) = ("a lot".to_owned(), "5".to_owned(), String::new());
        let flag = |name, field, kind, value| -> Flag<'_> { (name, field, kind, value) };
        let error = from_flags(&[flag("memory", "memory.limit", Kind::Size, Some(&memory))]).unwrap_err();
        assert!(error.starts_with("invalid value for --memory: \"a lot\": expected a number of bytes"), "{error}");
        let flags = [
            flag("cpu-quota", "cpu.quota", Kind::Signed, Some(&quota)),
            flag("cpu-share", "cpu.shares", Kind::Unsigned, Some(&none)),
            flag("cpuset-cpus", "cpu.cpus", Kind::Text, None),
        ];
        let document = from_flags(&flags).unwrap();
        assert_eq!(document, json!({"cpu": {"quota": 5}}));
        let error = Resources::read(document).unwrap_err().to_string();
        assert_eq!(in_words_of_flags(&flags, &error), "--cpu-quota: is below 1000 microseconds");
        assert_eq!(in_words_of_file(Path::new("f.json"), &error), "f.json: cpu.quota: is below 1000 microseconds");
    }
}
