//! Metrics as Prometheus reads them: every line of the text is checked, and each sample found by its name and labels.

use std::collections::BTreeMap;

use crate::{Outcome, ensure, ensure_eq};

/// What all samples of a pod begin with.
pub fn labels_of(id: &str, root: &str) -> String {
    format!("pod=\"{id}\",root=\"{root}\"")
}

/// Samples of the text format, by name and labels; every line is checked.
pub struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    /// Of a whole text.
    pub fn read(text: &str) -> Outcome<Self> {
        let (mut family, mut done) = (("", ""), Vec::new());
        let mut samples = BTreeMap::new();
        ensure!(text.ends_with('\n'), "the text does not end with a line: {text:?}");
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# ") {
                let mut words = rest.splitn(3, ' ');
                match (words.next(), words.next(), words.next()) {
                    (Some("HELP"), Some(name), Some(help)) if !help.is_empty() => {
                        ensure!(!done.contains(&name), "{name} comes twice");
                        done.push(name);
                    }
                    (Some("TYPE"), Some(name), Some(kind)) => {
                        ensure!(["counter", "gauge", "histogram"].contains(&kind), "type of {line}");
                        ensure_eq!(done.last(), Some(&name), "name before {line}");
                        family = (name, kind);
                    }
                    _ => return Err(format!("comment {line}").into()),
                }
                continue;
            }
            let (sample, value) = line.rsplit_once(' ').ok_or_else(|| format!("line {line}"))?;
            let (name, labels) = sample.strip_suffix('}').and_then(|text| text.split_once('{')).unwrap_or((sample, ""));
            let own = match family.1 {
                "histogram" => ["_bucket", "_sum", "_count"].iter().any(|end| name.strip_suffix(end) == Some(family.0)),
                _ => name == family.0,
            };
            ensure!(own, "{line} in {}", family.0);
            ensure!(labels.is_empty() || labels.ends_with('"') && labels.contains("=\""), "labels of {line}");
            let value: f64 = value.parse().map_err(|error| format!("{line}: {error}"))?;
            ensure!(value.is_finite() && value >= 0.0, "value of {line}");
            ensure!(samples.insert(sample.to_owned(), value).is_none(), "{sample} comes twice");
        }
        let metrics = Self(samples);
        metrics.check_histograms()?;
        Ok(metrics)
    }

    /// Buckets do not decrease, and the last is the count.
    fn check_histograms(&self) -> Outcome {
        for (sample, count) in &self.0 {
            let Some((name, labels)) = sample.strip_suffix('}').and_then(|sample| sample.split_once("_count{")) else {
                continue;
            };
            let prefix = format!("{name}_bucket{{{labels},le=\"");
            let mut buckets: Vec<(f64, f64)> = Vec::new();
            for (bucket, value) in self.0.iter().filter(|(sample, _)| sample.starts_with(&prefix)) {
                let bound = bucket[prefix.len()..].trim_end_matches("\"}");
                buckets.push((if bound == "+Inf" { f64::INFINITY } else { bound.parse()? }, *value));
            }
            buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
            ensure!(buckets.is_sorted_by(|a, b| a.1 <= b.1), "buckets of {sample}: {buckets:?}");
            ensure_eq!(buckets.last(), Some(&(f64::INFINITY, *count)), "last bucket of {sample}");
        }
        Ok(())
    }

    /// One of the pod.
    pub fn of(&self, name: &str, labels: &str) -> Outcome<f64> {
        let sample = if labels.is_empty() { name.to_owned() } else { format!("{name}{{{labels}}}") };
        self.0.get(&sample).copied().ok_or_else(|| format!("no {sample} among {:?}", self.0.keys()).into())
    }

    /// The sum of those that have one more label.
    pub fn of_all(&self, name: &str, labels: &str) -> f64 {
        let prefix = format!("{name}{{{labels},");
        self.0.iter().filter(|(sample, _)| sample.starts_with(&prefix)).map(|(_, value)| value).sum()
    }
}
