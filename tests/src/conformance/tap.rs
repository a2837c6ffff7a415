//! What programs print in the Test Anything Protocol, as bats and runtime-tools write it.

use std::str::FromStr;

/// How a case ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// As it should.
    Pass,
    /// Not so.
    Fail,
    /// It was not tried: something that it needs is not here.
    Skip,
}

impl Verdict {
    /// The word that stands for it in the data.
    pub fn word(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "fail",
            Self::Skip => "skip",
        }
    }
}

impl FromStr for Verdict {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        [Self::Pass, Self::Fail, Self::Skip]
            .into_iter()
            .find(|verdict| verdict.word() == word)
            .ok_or_else(|| format!("{word:?} is neither pass, fail nor skip"))
    }
}

/// One result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapResult {
    /// How it ended.
    pub verdict: Verdict,
    /// What was tried.
    pub name: String,
    /// What follows: why it was skipped, and what was said about it.
    pub said: String,
}

/// All results of one program.
#[derive(Debug, Default)]
pub struct Tap {
    /// In the program's order.
    pub results: Vec<TapResult>,
    /// How many there were to be, if the program came to say so.
    pub planned: Option<usize>,
    /// What was said before the first result.
    pub preamble: String,
}

impl Tap {
    /// Reads what a program printed.
    pub fn parse(text: &str) -> Self {
        let mut tap = Self::default();
        for line in text.lines() {
            if let Some(result) = parse_result(line) {
                tap.results.push(result);
            } else if let Some(count) = line.strip_prefix("1..").and_then(|count| count.trim().parse().ok()) {
                tap.planned = Some(count);
            } else if !line.starts_with("TAP version") {
                let said = tap.results.last_mut().map_or(&mut tap.preamble, |result| &mut result.said);
                said.push_str(line);
                said.push('\n');
            }
        }
        tap
    }

    /// The results that are bad.
    pub fn failures(&self) -> impl Iterator<Item = &TapResult> {
        self.results.iter().filter(|result| result.verdict == Verdict::Fail)
    }
}

/// `ok 1 NAME # skip REASON`, `not ok 2 - NAME`, `ok 3 # SKIP REASON`; a result that is marked as known to be bad counts as skipped.
fn parse_result(line: &str) -> Option<TapResult> {
    let (mut verdict, rest) = match line.strip_prefix("not ok ") {
        Some(rest) => (Verdict::Fail, rest),
        None => (Verdict::Pass, line.strip_prefix("ok ")?),
    };
    let (number, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    number.parse::<usize>().ok()?;
    let rest = rest.strip_prefix("- ").unwrap_or(rest);
    let (mut name, mut said) = (rest, String::new());
    if let Some((before, directive)) =
        rest.strip_prefix("# ").map(|text| ("", text)).or_else(|| rest.rsplit_once(" # "))
    {
        let (word, reason) = directive.split_once(' ').unwrap_or((directive, ""));
        match word.to_ascii_lowercase().as_str() {
            "skip" | "todo" => verdict = Verdict::Skip,
            "timeout" => {}
            _ => return Some(TapResult { verdict, name: rest.to_owned(), said }),
        }
        name = before;
        said = format!("{reason}\n");
    }
    Some(TapResult { verdict, name: name.trim().to_owned(), said })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(verdict: Verdict, name: &str, said: &str) -> TapResult {
        TapResult { verdict, name: name.to_owned(), said: said.to_owned() }
    }

    #[test]
    fn results_of_bats_are_read() {
        let tap = Tap::parse(
            "1..4\nok 1 runc run [tmpcopyup]\nok 2 update rt # skip test requires cgroups_rt\n\
             not ok 3 exec # user\n# (in test file x.bats, line 3)\n#   `false' failed\nnot ok 4 slow # timeout after 9s\n",
        );
        assert_eq!(tap.planned, Some(4));
        assert_eq!(
            tap.results,
            [
                result(Verdict::Pass, "runc run [tmpcopyup]", ""),
                result(Verdict::Skip, "update rt", "test requires cgroups_rt\n"),
                result(Verdict::Fail, "exec # user", "# (in test file x.bats, line 3)\n#   `false' failed\n"),
                result(Verdict::Fail, "slow", "after 9s\n"),
            ]
        );
    }

    #[test]
    fn results_of_runtime_tools_are_read() {
        let tap = Tap::parse(
            "TAP version 13\nok 1 - has expected hostname\n  ---\n  {}\n  ...\nok 2 # SKIP root not set\n\
             not ok 3 - later # TODO\n1..3\n",
        );
        assert_eq!(tap.planned, Some(3));
        assert_eq!(
            tap.results,
            [
                result(Verdict::Pass, "has expected hostname", "  ---\n  {}\n  ...\n"),
                result(Verdict::Skip, "", "root not set\n"),
                result(Verdict::Skip, "later", "\n"),
            ]
        );
    }

    #[test]
    fn what_is_said_before_any_result_is_kept() {
        let tap = Tap::parse("TAP version 13\n  ---\n  {}\n  ...\n1..0\n");
        assert!(tap.results.is_empty() && tap.planned == Some(0));
        assert_eq!(tap.preamble, "  ---\n  {}\n  ...\n");
    }
}
