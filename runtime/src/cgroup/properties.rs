//! Limits as properties of a systemd unit (`systemd.resource-control(5)`, `org.freedesktop.systemd1(5)`), and properties that
//! annotations name.

use podhull_limits::{Resources, Unenforceable, settings, weight_on_a_line};
use zbus::Variant;

use super::CgroupError;

/// What annotations that name properties begin with: the rest is the name, the value is one in GVariant's text form.
pub const PROPERTY_ANNOTATION: &str = "org.systemd.property.";

/// No limit.
pub const INFINITY: u64 = u64::MAX;

/// The period of a processor quota that names none, in microseconds.
const PERIOD: u64 = 100_000;

/// systemd counts quotas in hundredths of a processor: microseconds of processor time in a second, in steps of this many.
const QUOTA_STEP: u64 = 10_000;

/// A property and its value.
#[derive(Debug, Clone, PartialEq)]
pub struct Property {
    pub name: String,
    pub value: Value,
}

/// The types of values there are; zbus's own does not copy.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Bool(bool),
    Int(i32),
    Long(i64),
    Unsigned(u32),
    Size(u64),
    Text(String),
    Texts(Vec<String>),
    Bytes(Vec<u8>),
    Pids(Vec<u32>),
}

macro_rules! from {
    ($($type:ty => $variant:ident),*) => {
        $(impl From<$type> for Value {
            fn from(value: $type) -> Self {
                Self::$variant(value)
            }
        })*
    };
}
from!(bool => Bool, i32 => Int, u64 => Size, String => Text, Vec<String> => Texts, Vec<u8> => Bytes, Vec<u32> => Pids);

impl Property {
    pub fn new(name: &str, value: impl Into<Value>) -> Self {
        Self { name: name.into(), value: value.into() }
    }

    /// As it is sent.
    pub fn into_wire(self) -> (String, Variant<'static>) {
        let value = match self.value {
            Value::Bool(value) => value.into(),
            Value::Int(value) => value.into(),
            Value::Long(value) => value.into(),
            Value::Unsigned(value) => value.into(),
            Value::Size(value) => value.into(),
            Value::Text(value) => value.into(),
            Value::Texts(value) => value.into(),
            Value::Bytes(value) => value.into(),
            Value::Pids(value) => value.into(),
        };
        (self.name, value)
    }
}

/// The limits that systemd knows. `current` reads a file of the group.
pub fn of(limits: &Resources, current: impl Fn(&str) -> Option<String>) -> Result<Vec<Property>, CgroupError> {
    let mut properties = Vec::new();
    for setting in settings(limits, weight_on_a_line, current).map_err(podhull_limits::LimitError::from)? {
        if let Some(choice) = setting.choices.last() {
            properties.extend(of_file(&choice.file, &choice.value).ok_or_else(|| bad(&choice.file, &choice.value))?);
        }
    }
    Ok(properties)
}

fn bad(file: &str, value: &str) -> CgroupError {
    podhull_limits::LimitError::from(Unenforceable::Value { file: file.to_owned(), value: value.to_owned() }).into()
}

/// The properties that write a value to a file; none if systemd leaves the file alone. `None` for a value it cannot have.
fn of_file(file: &str, value: &str) -> Option<Vec<Property>> {
    let value = value.trim();
    let number = || if value == "max" { Some(INFINITY) } else { value.parse::<u64>().ok() };
    let one = |name, value: Value| Some(vec![Property::new(name, value)]);
    match file {
        "cpu.weight" => one("CPUWeight", value.parse::<u64>().ok()?.into()),
        "cpu.max" => {
            let (quota, period) = value.split_once(' ').map_or((value, None), |(quota, period)| (quota, Some(period)));
            let period = period.map(|period| period.trim().parse::<u64>().ok().filter(|p| *p > 0));
            let mut properties = Vec::new();
            if let Some(period) = period {
                properties.push(Property::new("CPUQuotaPeriodUSec", period?));
            }
            let quota = match quota {
                "max" => INFINITY,
                quota => {
                    let in_a_second =
                        quota.parse::<u64>().ok()?.checked_mul(1_000_000)? / period.flatten().unwrap_or(PERIOD);
                    // Rounded up, so that what is below it can have what it was promised.
                    in_a_second.next_multiple_of(QUOTA_STEP)
                }
            };
            properties.push(Property::new("CPUQuotaPerSecUSec", quota));
            Some(properties)
        }
        "cpuset.cpus" => one("AllowedCPUs", bits(value)?.into()),
        "cpuset.mems" => one("AllowedMemoryNodes", bits(value)?.into()),
        "memory.max" => one("MemoryMax", number()?.into()),
        "memory.high" => one("MemoryHigh", number()?.into()),
        "memory.low" => one("MemoryLow", number()?.into()),
        "memory.min" => one("MemoryMin", number()?.into()),
        "memory.swap.max" => one("MemorySwapMax", number()?.into()),
        "pids.max" => one("TasksMax", number()?.into()),
        _ => Some(Vec::new()),
    }
}

/// A list such as `0-2,7` as bits, the lowest of the first byte first.
fn bits(list: &str) -> Option<Vec<u8>> {
    /// Far above what kernels are built for, and a bound of what is allocated here.
    const MOST: u32 = 1 << 16;
    let mut bytes = Vec::new();
    for range in list.split(',').map(str::trim).filter(|range| !range.is_empty()) {
        let (from, to) = range.split_once('-').unwrap_or((range, range));
        let (from, to) = (from.trim().parse::<u32>().ok()?, to.trim().parse::<u32>().ok()?);
        if from > to || to >= MOST {
            return None;
        }
        for number in from..=to {
            let index = number as usize / 8;
            if bytes.len() <= index {
                bytes.resize(index + 1, 0);
            }
            bytes[index] |= 1 << (number % 8);
        }
    }
    Some(bytes)
}

/// The property an annotation names; none if it names none.
pub fn of_annotation(key: &str, text: &str) -> Result<Option<Property>, CgroupError> {
    let Some(name) = key.strip_prefix(PROPERTY_ANNOTATION) else { return Ok(None) };
    let wrong = |what| CgroupError::Annotation(key.to_owned(), what);
    if name.len() < 3 || !name.bytes().all(|c| c.is_ascii_alphabetic()) {
        return Err(wrong("not the name of a systemd property: three or more letters"));
    }
    let value = parse(text).ok_or_else(|| {
        wrong("not a value such as true, 15, uint64 90000000, 'inactive-or-failed', or ['a.service', 'b.service']")
    })?;
    // As in unit files, seconds may be given where the bus has microseconds.
    match (name.strip_suffix("Sec"), value) {
        (Some(stem), value) if stem.ends_with(|c: char| c.is_ascii_lowercase()) => {
            let seconds = match value {
                Value::Int(seconds) => u64::try_from(seconds).ok(),
                Value::Long(seconds) => u64::try_from(seconds).ok(),
                Value::Unsigned(seconds) => Some(seconds.into()),
                Value::Size(seconds) => Some(seconds),
                _ => None,
            };
            let microseconds =
                seconds.and_then(|s| s.checked_mul(1_000_000)).ok_or_else(|| wrong("not a number of seconds"))?;
            Ok(Some(Property::new(&format!("{stem}USec"), microseconds)))
        }
        (_, value) => Ok(Some(Property { name: name.to_owned(), value })),
    }
}

/// GVariant's text form, as far as properties of scopes need it.
fn parse(text: &str) -> Option<Value> {
    let text = text.trim();
    if let Some((kind, number)) = text.split_once(' ')
        && matches!(kind, "int32" | "uint32" | "int64" | "uint64" | "boolean" | "string")
    {
        let number = number.trim();
        return match kind {
            "int32" => number.parse().ok().map(Value::Int),
            "uint32" => number.parse().ok().map(Value::Unsigned),
            "int64" => number.parse().ok().map(Value::Long),
            "uint64" => number.parse().ok().map(Value::Size),
            "boolean" => number.parse().ok().map(Value::Bool),
            _ => quoted(number).map(Value::Text),
        };
    }
    match text {
        "true" | "false" => Some(Value::Bool(text == "true")),
        _ if text.starts_with('[') => {
            let inside = text.strip_prefix('[')?.strip_suffix(']')?.trim();
            let items = inside.split(',').filter(|_| !inside.is_empty());
            items.map(|item| quoted(item.trim())).collect::<Option<Vec<_>>>().map(Value::Texts)
        }
        _ => quoted(text).map(Value::Text).or_else(|| text.parse().ok().map(Value::Int)),
    }
}

/// A string between quotation marks of either kind; one with marks or escapes inside is none we know.
fn quoted(text: &str) -> Option<String> {
    let inside = ['\'', '"'].iter().find_map(|mark| text.strip_prefix(*mark)?.strip_suffix(*mark))?;
    (!inside.contains(['\'', '"', '\\'])).then(|| inside.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn properties(json: &str) -> Vec<Property> {
        let limits: Resources = serde_json::from_str(json).unwrap();
        of(&limits, |file| (file == "cpu.max").then(|| "30000 100000\n".to_owned())).unwrap()
    }

    #[test]
    fn limits_become_properties() {
        let size = |name: &str, value: u64| Property::new(name, value);
        for (json, expected) in [
            (r#"{"cpu":{"shares":2048}}"#, vec![size("CPUWeight", 79)]),
            (
                r#"{"cpu":{"quota":25000,"period":50000}}"#,
                vec![size("CPUQuotaPeriodUSec", 50_000), size("CPUQuotaPerSecUSec", 500_000)],
            ),
            (r#"{"cpu":{"quota":12345}}"#, vec![size("CPUQuotaPerSecUSec", 130_000)]),
            (
                r#"{"cpu":{"period":50000}}"#,
                vec![size("CPUQuotaPeriodUSec", 50_000), size("CPUQuotaPerSecUSec", 600_000)],
            ),
            (r#"{"cpu":{"quota":-1}}"#, vec![size("CPUQuotaPerSecUSec", INFINITY)]),
            (r#"{"memory":{"limit":1000,"swap":1500}}"#, vec![size("MemorySwapMax", 500), size("MemoryMax", 1000)]),
            (r#"{"memory":{"reservation":7}}"#, vec![size("MemoryLow", 7)]),
            (r#"{"pids":{"limit":-1}}"#, vec![size("TasksMax", INFINITY)]),
            (r#"{"unified":{"memory.high":" max","io.weight":"default 5"}}"#, vec![size("MemoryHigh", INFINITY)]),
            (
                r#"{"cpu":{"cpus":"0-2,9","mems":"0"}}"#,
                vec![Property::new("AllowedCPUs", vec![7u8, 2]), Property::new("AllowedMemoryNodes", vec![1u8])],
            ),
        ] {
            assert_eq!(properties(json), expected, "{json}");
        }
    }

    #[test]
    fn a_value_that_a_file_cannot_have_is_named() {
        for (file, value) in
            [("memory.high", "much"), ("cpu.max", "5 0"), ("cpuset.cpus", "2-1"), ("cpuset.mems", "0-99999999")]
        {
            let limits = serde_json::from_value(serde_json::json!({"unified": {file: value}})).unwrap();
            let error = of(&limits, |_| None).unwrap_err().to_string();
            assert!(error.contains(file) && error.contains(value), "{error}");
        }
    }

    #[test]
    fn annotations_name_properties() {
        let of = |name: &str, text: &str| of_annotation(&format!("org.systemd.property.{name}"), text);
        for (name, text, expected) in [
            ("TimeoutStopUSec", "uint64 10000000", Property::new("TimeoutStopUSec", 10_000_000u64)),
            ("TimeoutStopSec", "uint64 10", Property::new("TimeoutStopUSec", 10_000_000u64)),
            ("KillSignal", "15", Property::new("KillSignal", 15)),
            ("CollectMode", "'inactive-or-failed'", Property::new("CollectMode", "inactive-or-failed".to_owned())),
            ("SendSIGKILL", "false", Property::new("SendSIGKILL", false)),
            ("After", "['a', \"b\"]", Property::new("After", vec!["a".to_owned(), "b".into()])),
            ("Before", "[]", Property::new("Before", Vec::<String>::new())),
        ] {
            assert_eq!(of(name, text).unwrap(), Some(expected));
        }
        assert_eq!(of_annotation("org.other", "x").unwrap(), None);
        for (name, text) in
            [("ab", "1"), ("A-b", "1"), ("", "1"), ("KillSignal", "now"), ("AnyName", "'a"), ("WaitSec", "'a'")]
        {
            assert!(
                of(name, text).unwrap_err().to_string().contains(&format!("org.systemd.property.{name}:")),
                "{name}"
            );
        }
    }
}
