//! Figures, and how they are told: as a table for people and as JSON for programs.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// One measured quantity.
#[derive(Debug, Clone)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// Unit of the samples and of the target.
    pub unit: &'static str,
    /// One for each round, sorted; never empty.
    samples: Vec<f64>,
    /// The most it should be.
    pub target: Option<f64>,
}

impl Figure {
    /// A figure of at least one sample.
    pub fn new(name: impl Into<String>, unit: &'static str, mut samples: Vec<f64>) -> Self {
        assert!(!samples.is_empty(), "a figure without a sample measured nothing");
        samples.sort_by(f64::total_cmp);
        Self { name: name.into(), unit, samples, target: None }
    }

    /// How one median relates to another.
    pub fn ratio(name: impl Into<String>, dividend: &Self, divisor: &Self) -> Self {
        Self::new(name, "times", vec![dividend.median() / divisor.median()])
    }

    /// Sets what it should be at most.
    pub fn at_most(mut self, target: f64) -> Self {
        self.target = Some(target);
        self
    }

    /// The sample of which `part` (0 to 1) of the others are smaller; between two samples, in proportion.
    pub fn quantile(&self, part: f64) -> f64 {
        let place = part * (self.samples.len() - 1) as f64;
        let (below, above) = (self.samples[place.floor() as usize], self.samples[place.ceil() as usize]);
        below + (above - below) * place.fract()
    }

    /// The figure itself.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// Whether the target is met, if there is one.
    pub fn met(&self) -> Option<bool> {
        self.target.map(|target| self.median() <= target)
    }
}

/// Figures that belong together.
#[derive(Debug, Clone)]
pub struct Panel {
    /// What they are about, with what a reader must know to understand them.
    pub title: &'static str,
    /// Unit of the figures that are drawn; the others, such as ratios, are only told.
    pub unit: &'static str,
    /// Each figure begins where the one before it ends.
    pub successive: bool,
    /// The figures, in the order they are told.
    pub figures: Vec<Figure>,
}

/// A number with about three significant digits, and all of its integer part.
pub fn number(value: f64) -> String {
    let digits = if value == 0.0 || value.abs() >= 100.0 {
        0
    } else if value.abs() >= 10.0 {
        1
    } else if value.abs() >= 0.1 {
        2
    } else {
        4
    };
    format!("{value:.digits$}")
}

/// The figures as a table: median, quartiles, unit, target, and whether it was met.
pub fn table(panels: &[Panel]) -> String {
    let mut text = String::new();
    let (mut met, mut missed) = (0, Vec::new());
    for panel in panels {
        let _ = writeln!(text, "\n{}", panel.title);
        for figure in &panel.figures {
            let spread = match figure.samples.len() {
                1 => String::new(),
                _ => format!("{}..{}", number(figure.quantile(0.25)), number(figure.quantile(0.75))),
            };
            let verdict = match (figure.target, figure.met()) {
                (Some(target), Some(true)) => {
                    met += 1;
                    format!("at most {}: met", number(target))
                }
                (Some(target), _) => {
                    missed.push(figure.name.as_str());
                    format!("at most {}: MISSED", number(target))
                }
                (None, _) => String::new(),
            };
            let line = format!(
                "  {:<52} {:>8} {:<6} {:>15}  {verdict}",
                figure.name,
                number(figure.median()),
                figure.unit,
                spread
            );
            let _ = writeln!(text, "{}", line.trim_end());
        }
    }
    let _ = writeln!(text, "\nTargets: {met} met, {} missed{}", missed.len(), if missed.is_empty() { "" } else { ":" });
    for name in missed {
        let _ = writeln!(text, "  {name}");
    }
    text
}

/// The figures with all their samples.
pub fn json(panels: &[Panel]) -> Value {
    let panels = panels.iter().map(|panel| {
        let figures = panel.figures.iter().map(|figure| {
            json!({
                "name": figure.name, "unit": figure.unit, "median": figure.median(), "p25": figure.quantile(0.25),
                "p75": figure.quantile(0.75), "samples": figure.samples, "at_most": figure.target, "met": figure.met(),
            })
        });
        json!({ "title": panel.title, "figures": figures.collect::<Vec<_>>() })
    });
    panels.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_of_samples_lies_between_the_middle_two() {
        let figure = Figure::new("x", "ms", vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!((figure.median(), figure.quantile(0.0), figure.quantile(1.0)), (2.5, 1.0, 4.0));
    }

    #[test]
    fn a_missed_target_is_said() {
        let figures =
            vec![Figure::new("slow", "ms", vec![3.0]).at_most(2.0), Figure::new("fast", "ms", vec![1.0]).at_most(2.0)];
        let text = table(&[Panel { title: "Times", unit: "ms", successive: false, figures }]);
        assert!(text.contains("at most 2.00: MISSED") && text.contains("1 met, 1 missed:\n  slow"), "{text}");
    }

    #[test]
    fn numbers_are_as_precise_as_they_are_read() {
        assert_eq!([0.0, 0.00723, 0.123, 12.34, 1234.5].map(number), ["0", "0.0072", "0.12", "12.3", "1234"]);
    }
}
