//! What is expected of each case, as data: whatever ends otherwise than it stands there, for worse or for better, is a failure.
//!
//! A line of the data is FILE, CASE, how it ends with podhull, how with runc, and the reason, with tabs between them. Only a
//! case that passes with both needs no reason. A case that ends now so, now so, with a runtime `varies` there, which takes a reason
//! like any other word: it must name what the outcome hangs on.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::tap::Verdict;
use crate::{Outcome, ensure};

/// Names of the runtimes' programs.
pub const RUNTIMES: [&str; 2] = ["podhull", "runc"];

/// Stands for a reason that nobody has written yet.
const UNKNOWN: &str = "?";

/// Stands for a verdict that is not the same every time.
const VARIES: &str = "varies";

/// How a case is expected to end with a runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// So every time.
    Always(Verdict),
    /// Now so, now so: it depends on what neither the case nor the runtime decides.
    Varies,
}

impl Expected {
    /// The word that stands for it in the data.
    pub fn word(self) -> &'static str {
        match self {
            Self::Always(verdict) => verdict.word(),
            Self::Varies => VARIES,
        }
    }

    fn parse(word: &str) -> Result<Self, String> {
        if word == VARIES { Ok(Self::Varies) } else { word.parse().map(Self::Always) }
    }

    fn allows(self, verdict: Verdict) -> bool {
        self == Self::Varies || self == Self::Always(verdict)
    }
}

/// How a case is expected to end with each runtime, in the order of [`RUNTIMES`].
pub type Expects = [Expected; 2];

/// One line of the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expectation {
    /// How the case ends.
    pub expects: Expects,
    /// Why it does not pass; empty if it does.
    pub reason: String,
}

/// What is expected of a suite: by file and case.
#[derive(Debug, Default)]
pub struct Expectations(BTreeMap<(String, String), Expectation>);

impl Expectations {
    /// Reads the data of one suite.
    pub fn parse(text: &str) -> Outcome<Self> {
        let mut expectations = BTreeMap::new();
        for (number, line) in text.lines().enumerate().map(|(index, line)| (index + 1, line)) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let [file, case, podhull, runc, reason] = line.split('\t').collect::<Vec<_>>()[..] else {
                return Err(format!("line {number}: not five fields with tabs between them").into());
            };
            let expects = [Expected::parse(podhull)?, Expected::parse(runc)?];
            let passes = expects == [Expected::Always(Verdict::Pass); 2];
            ensure!(
                passes == reason.is_empty() && reason != UNKNOWN,
                "line {number}: a reason belongs to each case that does not pass with both, and to no other"
            );
            let expectation = Expectation { expects, reason: reason.to_owned() };
            let earlier = expectations.insert((file.to_owned(), case.to_owned()), expectation);
            ensure!(earlier.is_none(), "line {number}: {file}, {case} stands there twice");
        }
        Ok(Self(expectations))
    }

    /// What is expected of a case.
    pub fn get(&self, file: &str, case: &str) -> Option<&Expectation> {
        self.0.get(&(file.to_owned(), case.to_owned()))
    }

    /// The cases of a file.
    pub fn cases(&self, file: &str) -> impl Iterator<Item = &str> {
        self.0.keys().filter(move |(of, _)| of == file).map(|(_, case)| case.as_str())
    }

    /// The files there are.
    pub fn files(&self) -> BTreeSet<&str> {
        self.0.keys().map(|(file, _)| file.as_str()).collect()
    }
}

/// How the cases of a file ended: with one of the runtimes or with each.
pub type Measured = BTreeMap<String, [Option<Verdict>; 2]>;

/// Compares what came with what is expected; `complete` says that every case of the file was tried. The case and
/// one line for each difference.
pub fn compare(expectations: &Expectations, file: &str, measured: &Measured, complete: bool) -> Vec<(String, String)> {
    let mut differences = Vec::new();
    for (case, verdicts) in measured {
        for (index, verdict) in verdicts.iter().enumerate() {
            let Some(verdict) = verdict else { continue };
            let found = format!("{file}: {case}: {} with {}", verdict.word(), RUNTIMES[index]);
            match expectations.get(file, case).map(|expectation| expectation.expects[index]) {
                Some(expected) if expected.allows(*verdict) => {}
                Some(expected) => differences.push((case.clone(), format!("{found}, expected {}", expected.word()))),
                None => differences.push((case.clone(), format!("{found}, and the data knows no such case"))),
            }
        }
    }
    if complete {
        // What fails in a validation program is a case only when it fails: one that varies may not be there.
        let varies =
            |case: &str| expectations.get(file, case).is_some_and(|known| known.expects.contains(&Expected::Varies));
        let missing = expectations.cases(file).filter(|case| !measured.contains_key(*case) && !varies(case));
        differences.extend(
            missing.map(|case| (case.to_owned(), format!("{file}: {case}: is in the data, and was not there"))),
        );
    }
    differences
}

/// The data's lines for a file as it was measured, with the reasons that the data has. Where one is missing, what
/// stands there is not accepted as data.
pub fn render(expectations: &Expectations, file: &str, measured: &Measured) -> String {
    let mut text = String::new();
    for (case, verdicts) in measured {
        let known = expectations.get(file, case);
        let expected = known.map(|expectation| expectation.expects);
        let expects: Vec<Expected> = verdicts
            .iter()
            .enumerate()
            .map(|(index, verdict)| match (expected.map(|expected| expected[index]), *verdict) {
                (Some(Expected::Varies), _) => Expected::Varies,
                (_, Some(verdict)) => Expected::Always(verdict),
                (Some(expected), None) => expected,
                (None, None) => Expected::Always(Verdict::Skip),
            })
            .collect();
        let passes = expects.iter().all(|expected| *expected == Expected::Always(Verdict::Pass));
        let reason = match known.map(|expectation| expectation.reason.as_str()) {
            _ if passes => "",
            Some("") | None => UNKNOWN,
            Some(reason) => reason,
        };
        let words: Vec<&str> = expects.into_iter().map(Expected::word).collect();
        let _ = writeln!(text, "{file}\t{case}\t{}\t{reason}", words.join("\t"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: &str = "# comment\n\na.bats\tone\tpass\tpass\t\na.bats\ttwo\tfail\tpass\tno such device\n";

    fn lines(data: &Expectations, measured: &Measured, complete: bool) -> Vec<String> {
        compare(data, "a.bats", measured, complete).into_iter().map(|(_, line)| line).collect()
    }

    fn measured(cases: &[(&str, Option<Verdict>, Option<Verdict>)]) -> Measured {
        cases.iter().map(|(case, podhull, runc)| ((*case).to_owned(), [*podhull, *runc])).collect()
    }

    #[test]
    fn what_is_as_expected_is_no_difference() -> Outcome {
        use Verdict::{Fail, Pass};
        let data = Expectations::parse(DATA)?;
        let results = measured(&[("one", Some(Pass), Some(Pass)), ("two", Some(Fail), Some(Pass))]);
        assert!(lines(&data, &results, true).is_empty());
        assert_eq!(render(&data, "a.bats", &results), DATA.split_once("\n\n").ok_or("no lines")?.1);
        Ok(())
    }

    #[test]
    fn a_case_that_passes_unexpectedly_is_a_difference_as_one_that_fails() -> Outcome {
        use Verdict::{Fail, Pass};
        let data = Expectations::parse(DATA)?;
        let results = measured(&[("one", Some(Fail), Some(Pass)), ("two", Some(Pass), Some(Pass))]);
        assert_eq!(
            lines(&data, &results, true),
            ["a.bats: one: fail with podhull, expected pass", "a.bats: two: pass with podhull, expected fail"]
        );
        Ok(())
    }

    #[test]
    fn cases_that_come_or_go_are_differences() -> Outcome {
        let data = Expectations::parse(DATA)?;
        let results = measured(&[("one", Some(Verdict::Pass), None), ("new", None, Some(Verdict::Pass))]);
        assert_eq!(
            lines(&data, &results, true),
            [
                "a.bats: new: pass with runc, and the data knows no such case",
                "a.bats: two: is in the data, and was not there"
            ]
        );
        assert_eq!(lines(&data, &results, false).len(), 1);
        Ok(())
    }

    #[test]
    fn a_measured_failure_without_a_reason_is_no_data_yet() -> Outcome {
        let results = measured(&[("one", Some(Verdict::Fail), Some(Verdict::Pass))]);
        let text = render(&Expectations::parse(DATA)?, "a.bats", &results);
        assert_eq!(text, "a.bats\tone\tfail\tpass\t?\n");
        assert!(Expectations::parse(&text).is_err());
        Ok(())
    }

    #[test]
    fn a_case_that_varies_may_end_in_any_way_or_not_be_there_and_has_a_reason() -> Outcome {
        use Verdict::{Fail, Pass};
        const DATA: &str = "a.bats\tone\tvaries\tpass\ta race\n";
        let data = Expectations::parse(DATA)?;
        for verdict in [Fail, Pass] {
            let results = measured(&[("one", Some(verdict), Some(Pass))]);
            assert!(lines(&data, &results, true).is_empty());
            assert_eq!(render(&data, "a.bats", &results), DATA);
        }
        assert!(lines(&data, &Measured::new(), true).is_empty());
        let results = measured(&[("one", Some(Pass), Some(Fail))]);
        assert_eq!(lines(&data, &results, true), ["a.bats: one: fail with runc, expected pass"]);
        assert!(Expectations::parse("a.bats\tone\tvaries\tpass\t\n").is_err());
        Ok(())
    }

    #[test]
    fn each_reason_stands_where_one_is_due() {
        for line in ["a\tb\tfail\tpass\t", "a\tb\tpass\tpass\twhy", "a\tb\tpass\tpass", "a\tb\tok\tpass\t"] {
            assert!(Expectations::parse(line).is_err(), "{line:?}");
        }
        assert!(Expectations::parse("a\tb\tpass\tpass\t\na\tb\tpass\tpass\t").is_err());
    }
}
