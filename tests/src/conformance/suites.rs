//! The suites: what is in them, how a file of each is run, and what its cases are.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::Path;
use std::time::Duration;

use super::program::{Printed, run};
use super::ratchet::Expectations;
use super::tap::{Tap, Verdict};
use crate::{Outcome, ensure};

/// The longest a single case may take: an emulated host is some fifty times slower than hardware, and there is one that updates a
/// container thirty times.
const CASE_DEADLINE: Duration = Duration::from_secs(400);

/// A suite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suite {
    /// runc's integration tests: a file has many cases, each named.
    RuncBats,
    /// Validation programs of runtime-tools. A program has results of its own, and is one case by its own name; what fails in one
    /// that does not pass are cases too.
    RuntimeTools,
}

/// What became of a file's cases: the verdict, and what was said about one that failed.
pub type Cases = BTreeMap<String, (Verdict, String)>;

impl Suite {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::RuncBats, Self::RuntimeTools];

    /// Its name, which its data's file has too.
    pub fn name(self) -> &'static str {
        match self {
            Self::RuncBats => "runc-bats",
            Self::RuntimeTools => "runtime-tools",
        }
    }

    /// What is expected of it.
    pub fn expectations(self) -> Outcome<Expectations> {
        let text = match self {
            Self::RuncBats => include_str!("../../conformance/runc-bats.tsv"),
            Self::RuntimeTools => include_str!("../../conformance/runtime-tools.tsv"),
        };
        Expectations::parse(text).map_err(|error| format!("{}.tsv: {error}", self.name()).into())
    }

    /// Its files, in `suites`.
    pub fn files(self, suites: &Path) -> Outcome<BTreeSet<String>> {
        let directory = match self {
            Self::RuncBats => suites.join("runc/tests/integration"),
            Self::RuntimeTools => suites.join("runtime-tools/validation"),
        };
        let entries = fs::read_dir(&directory).map_err(|error| format!("{}: {error}", directory.display()))?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let names = names.collect::<Outcome<Vec<String>>>()?;
        let files: BTreeSet<String> = match self {
            Self::RuncBats => names.into_iter().filter(|name| name.ends_with(".bats")).collect(),
            Self::RuntimeTools => names.into_iter().collect(),
        };
        ensure!(!files.is_empty(), "{} has no tests", directory.display());
        Ok(files)
    }

    /// Runs a file with the runtime at `runtime`; of bats, only the cases whose name contains `filter`. `directory` is for what
    /// belongs to this run.
    pub fn run(
        self,
        suites: &Path,
        file: &str,
        filter: Option<&str>,
        runtime: &Path,
        directory: &Path,
    ) -> Outcome<Cases> {
        match self {
            Self::RuncBats => bats(suites, file, filter, runtime, directory),
            Self::RuntimeTools => validation(suites, file, runtime, directory),
        }
    }
}

fn bats(suites: &Path, file: &str, filter: Option<&str>, runtime: &Path, directory: &Path) -> Outcome<Cases> {
    let tests = suites.join("runc/tests/integration");
    let path = tests.join(file);
    let text = fs::read_to_string(&path)?;
    let count = text.lines().filter(|line| line.starts_with("@test ")).count();
    let filter = filter.map(escape);
    let mut words: Vec<&OsStr> = vec!["bats".as_ref(), "--tap".as_ref()];
    if let Some(filter) = &filter {
        words.extend([OsStr::new("--filter"), filter.as_ref()]);
    }
    words.push(path.as_ref());
    // The tests ask Go for the name of the architecture.
    let mut search = suites.join("bin").into_os_string();
    search.push(":");
    search.push(std::env::var_os("PATH").unwrap_or_default());
    let seconds = OsString::from(CASE_DEADLINE.as_secs().to_string());
    let mut environment = vec![("RUNC", runtime.as_os_str()), ("PATH", &search), ("TMPDIR", directory.as_os_str())];
    // What looks at the time is a child of the test's shell: one that waits for all of its children would wait for that.
    if !text.lines().any(|line| line.split('#').next().unwrap_or_default().trim() == "wait") {
        environment.push(("BATS_TEST_TIMEOUT", &seconds));
    }
    let deadline = CASE_DEADLINE * u32::try_from(count)? + CASE_DEADLINE;
    let printed = run(&words, &environment, &tests, directory, deadline)?;
    let tap = Tap::parse(&printed.stdout);
    ensure!(
        tap.planned == Some(tap.results.len()) && (filter.is_some() || count == tap.results.len()),
        "{file} has {count} cases, and {} came: {}{}",
        tap.results.len(),
        printed.stdout,
        printed.stderr
    );
    let mut cases = Cases::new();
    for result in tap.results {
        let earlier = cases.insert(result.name.clone(), (result.verdict, result.said));
        ensure!(earlier.is_none(), "{file} has two cases {:?}", result.name);
    }
    Ok(cases)
}

/// A regular expression that matches the text alone.
fn escape(text: &str) -> String {
    let plain = |letter: char| letter.is_alphanumeric() || letter.is_whitespace() || "/-_,:'=<>\"".contains(letter);
    text.chars().flat_map(|letter| (!plain(letter)).then_some('\\').into_iter().chain([letter])).collect()
}

fn validation(suites: &Path, file: &str, runtime: &Path, directory: &Path) -> Outcome<Cases> {
    let working = suites.join("runtime-tools");
    let program = working.join("validation").join(file).join(format!("{file}.t"));
    let environment = [("RUNTIME", runtime.as_os_str()), ("TMPDIR", directory.as_os_str())];
    let printed = run(&[program.as_ref()], &environment, &working, directory, CASE_DEADLINE)?;
    Ok(validated(file, &printed))
}

/// The cases of a validation program: itself, and what failed.
fn validated(file: &str, printed: &Printed) -> Cases {
    let tap = Tap::parse(&printed.stdout);
    let mut cases = Cases::new();
    for result in tap.failures() {
        cases.insert(format!("{file}: {}", result.name), (Verdict::Fail, result.said.clone()));
    }
    let skipped = !tap.results.is_empty() && tap.results.iter().all(|result| result.verdict == Verdict::Skip);
    // Some programs have no results, and speak only of what went wrong; some of these do not even say that there are none.
    let wrong = tap.results.is_empty() && !tap.preamble.is_empty();
    let early = tap.planned.is_none() && !printed.stdout.is_empty();
    let verdict = if printed.status != 0 || !cases.is_empty() || wrong || early {
        Verdict::Fail
    } else if skipped {
        Verdict::Skip
    } else {
        Verdict::Pass
    };
    let said = match verdict {
        Verdict::Pass => String::new(),
        Verdict::Skip => tap.results.first().map(|result| result.said.clone()).unwrap_or_default(),
        Verdict::Fail => format!("exit status {}\n{}{}", printed.status, tap.preamble, printed.stderr),
    };
    cases.insert(file.to_owned(), (verdict, said));
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdicts(status: i32, stdout: &str) -> Vec<(String, Verdict)> {
        let printed = Printed { status, stdout: stdout.to_owned(), stderr: String::new() };
        validated("kill", &printed).into_iter().map(|(case, (verdict, _))| (case, verdict)).collect()
    }

    #[test]
    fn a_program_passes_if_nothing_in_it_fails() {
        assert_eq!(verdicts(0, "ok 1 - a\nok 2 # SKIP b\n1..2\n"), [("kill".to_owned(), Verdict::Pass)]);
        for stdout in ["1..0\n", ""] {
            assert_eq!(verdicts(0, stdout), [("kill".to_owned(), Verdict::Pass)], "{stdout:?}");
        }
        assert_eq!(verdicts(0, "1..1\nok 1 # SKIP b\n"), [("kill".to_owned(), Verdict::Skip)]);
    }

    #[test]
    fn what_fails_in_a_program_is_named() {
        assert_eq!(
            verdicts(0, "not ok 1 - a\nok 2 - b\n1..2\n"),
            [("kill".to_owned(), Verdict::Fail), ("kill: a".to_owned(), Verdict::Fail)]
        );
    }

    #[test]
    fn a_program_that_ends_early_fails() {
        for (status, stdout) in [(1, "1..0\n"), (1, ""), (0, "ok 1 - a\n"), (0, "  ---\n  {}\n  ...\n1..0\n")] {
            assert_eq!(verdicts(status, stdout), [("kill".to_owned(), Verdict::Fail)], "{stdout:?}");
        }
    }

    #[test]
    fn the_data_can_be_read() -> Outcome {
        for suite in Suite::ALL {
            let expectations = suite.expectations()?;
            assert!(!expectations.files().is_empty(), "{}", suite.name());
        }
        Ok(())
    }
}
