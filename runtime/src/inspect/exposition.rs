//! Prometheus' text format, version 0.0.4: all samples of a family behind its two lines, one line each.

use std::collections::BTreeMap;
use std::fmt::{Display, Write};

/// What a family's values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// It only grows.
    Counter,
    /// It goes up and down.
    Gauge,
    /// Counts in buckets, a sum and a count.
    Histogram,
}

/// A family.
#[derive(Debug)]
pub struct Family {
    pub name: &'static str,
    pub kind: Type,
    pub help: &'static str,
}

/// Labels of a sample; values may have any characters.
pub type Labels<'a> = &'a [(&'static str, &'a str)];

/// Families in the order of a table, and their samples in the order they came in.
pub struct Exposition {
    families: &'static [Family],
    samples: BTreeMap<usize, String>,
}

impl Exposition {
    /// None yet.
    pub fn new(families: &'static [Family]) -> Self {
        Self { families, samples: BTreeMap::new() }
    }

    /// Adds a sample of a family of the table.
    pub fn add(&mut self, name: &'static str, labels: Labels<'_>, value: impl Display) {
        self.sample(name, "", labels, value);
    }

    /// Adds a histogram: how many there were up to each bound and in no bucket before, those above all bounds last, and their sum.
    pub fn histogram(&mut self, name: &'static str, labels: Labels<'_>, bounds: &[f64], counts: &[u64], sum: f64) {
        let mut so_far = 0;
        for (index, count) in counts.iter().enumerate() {
            so_far += count;
            let bound = bounds.get(index).map_or("+Inf".to_owned(), ToString::to_string);
            self.sample(name, "_bucket", &[labels, &[("le", &bound)]].concat(), so_far);
        }
        self.sample(name, "_sum", labels, sum);
        self.sample(name, "_count", labels, so_far);
    }

    fn sample(&mut self, name: &'static str, suffix: &str, labels: Labels<'_>, value: impl Display) {
        // A name that is not in the table is found by a test.
        let Some(index) = self.families.iter().position(|family| family.name == name) else { return };
        let text = self.samples.entry(index).or_default();
        let _ = write!(text, "{name}{suffix}");
        for (index, (label, value)) in labels.iter().enumerate() {
            let _ = write!(text, "{}{label}=\"{}\"", if index == 0 { '{' } else { ',' }, escape(value));
        }
        let _ = writeln!(text, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    /// All of it.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (index, samples) in &self.samples {
            let Family { name, kind, help } = &self.families[*index];
            let kind = match kind {
                Type::Counter => "counter",
                Type::Gauge => "gauge",
                Type::Histogram => "histogram",
            };
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{samples}");
        }
        text
    }
}

fn escape(value: &str) -> String {
    let mut escaped = String::new();
    for c in value.chars() {
        match c {
            '\\' => escaped.push_str("\\\\"),
            '"' => escaped.push_str("\\\""),
            '\n' => escaped.push_str("\\n"),
            c if c.is_control() => escaped.push('?'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[Family] = &[
        Family { name: "a_seconds", kind: Type::Histogram, help: "How long." },
        Family { name: "b_total", kind: Type::Counter, help: "How many." },
    ];

    #[test]
    fn families_are_together_and_labels_stay_within_their_quotes() {
        let mut exposition = Exposition::new(TABLE);
        exposition.add("b_total", &[("x", "a\"b\\c\nd\x1b")], 7);
        exposition.histogram("a_seconds", &[("x", "1")], &[0.5, 1.0], &[2, 0, 1], 3.25);
        exposition.add("b_total", &[], 8);
        let expected = "# HELP a_seconds How long.\n# TYPE a_seconds histogram\n\
            a_seconds_bucket{x=\"1\",le=\"0.5\"} 2\na_seconds_bucket{x=\"1\",le=\"1\"} 2\n\
            a_seconds_bucket{x=\"1\",le=\"+Inf\"} 3\na_seconds_sum{x=\"1\"} 3.25\na_seconds_count{x=\"1\"} 3\n\
            # HELP b_total How many.\n# TYPE b_total counter\nb_total{x=\"a\\\"b\\\\c\\nd?\"} 7\nb_total 8\n";
        assert_eq!(exposition.text(), expected);
    }
}
