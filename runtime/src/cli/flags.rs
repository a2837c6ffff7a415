//! The words of a command line in the one form that the parser reads, made from all those that callers of runc use.
//!
//! runc reads its flags as Go's `flag` package does: a name has one dash or two before it (containerd's shim writes
//! `-no-subreaper`), a flag that is on or off may say which (`--rootless=false`, `--debug=true`), and of a flag that is there
//! twice the last counts. Everything else stays as it is, for the parser to take or refuse.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::Arg;

use crate::log::Format;

/// A command line.
pub struct Line {
    words: Vec<Option<OsString>>,
    /// `--log`, as far as the line can be understood.
    pub log: Option<PathBuf>,
    /// `--log-format`, likewise.
    pub log_format: Format,
}

impl Line {
    /// Reads a line for a command and its subcommands; the first word is the program.
    pub fn read(command: &mut clap::Command, words: impl IntoIterator<Item = OsString>) -> Self {
        // Makes the flags that every command has.
        command.build();
        let mut line = Self { words: Vec::new(), log: None, log_format: Format::Text };
        let mut words = words.into_iter();
        line.words.extend(words.next().map(Some));
        if let Some(subcommand) = line.read_global(command, &mut words) {
            line.read_own(subcommand, &mut words);
        }
        line.words.extend(words.map(Some));
        line
    }

    /// What the parser is to read.
    pub fn words(&self) -> impl Iterator<Item = OsString> {
        self.words.iter().flatten().cloned()
    }

    /// Up to the subcommand, which is returned; `None` where there is none, or something that only the parser can judge.
    fn read_global<'a>(
        &mut self,
        command: &'a clap::Command,
        words: &mut impl Iterator<Item = OsString>,
    ) -> Option<&'a clap::Command> {
        let mut switches = Switches::default();
        while let Some(word) = words.next() {
            let Some(given) = Given::read(command, &word) else {
                let subcommand = command.find_subcommand(&word);
                self.words.push(Some(word));
                return subcommand;
            };
            let value = self.push(given, words, &mut switches);
            match (given.flag.get_id().as_str(), value) {
                ("log", Some(value)) => self.log = Some(value.into()),
                ("log_format", Some(value)) => {
                    self.log_format = if value == "json" { Format::Json } else { Format::Text };
                }
                _ => {}
            }
        }
        None
    }

    /// From the subcommand on; the command of a container that follows is nobody's to read.
    fn read_own(&mut self, command: &clap::Command, words: &mut impl Iterator<Item = OsString>) {
        let mut switches = Switches::default();
        let takes_rest = command.get_positionals().any(Arg::is_trailing_var_arg_set);
        while let Some(word) = words.next() {
            match Given::read(command, &word) {
                Some(given) => drop(self.push(given, words, &mut switches)),
                None => {
                    let ends = word == "--" || takes_rest && !is_flag(&word);
                    let subcommand = command.find_subcommand(&word);
                    self.words.push(Some(word));
                    if let Some(subcommand) = subcommand {
                        return self.read_own(subcommand, words);
                    }
                    if ends {
                        return;
                    }
                }
            }
        }
    }

    /// Writes a flag down, with its value, which is returned.
    fn push(
        &mut self,
        given: Given<'_, '_>,
        words: &mut impl Iterator<Item = OsString>,
        switches: &mut Switches,
    ) -> Option<OsString> {
        let Given { flag, value } = given;
        let name = match (flag.get_long(), flag.get_short()) {
            (Some(long), _) => format!("--{long}"),
            (None, short) => format!("-{}", short.unwrap_or_default()),
        };
        let name = OsString::from(name);
        let with = |value: &OsStr| {
            let mut word = name.clone();
            word.push("=");
            word.push(value);
            Some(word)
        };
        if flag.get_action().takes_values() {
            let value = match value {
                Some(value) => {
                    self.words.push(with(value));
                    Some(value.to_owned())
                }
                None => {
                    self.words.push(Some(name));
                    let next = words.next();
                    self.words.extend(next.clone().map(Some));
                    next
                }
            };
            return value;
        }
        match value.map(|value| (value, truth(value))) {
            None | Some((_, Some(true))) => {
                switches.0.push((flag.get_id().clone(), self.words.len()));
                self.words.push(Some(name));
            }
            Some((_, Some(false))) => {
                for (_, index) in switches.0.iter().filter(|(id, _)| id == flag.get_id()) {
                    self.words[*index] = None;
                }
            }
            Some((value, None)) => self.words.push(with(value)),
        }
        None
    }
}

/// Flags that are on, and where that was said.
#[derive(Default)]
struct Switches(Vec<(clap::Id, usize)>);

/// A flag as it was given.
#[derive(Clone, Copy)]
struct Given<'c, 'w> {
    flag: &'c Arg,
    /// After `=`.
    value: Option<&'w OsStr>,
}

impl<'c, 'w> Given<'c, 'w> {
    /// `None` for what is no flag of this command.
    fn read(command: &'c clap::Command, word: &'w OsStr) -> Option<Self> {
        let text = word.as_bytes().strip_prefix(b"-")?;
        let text = text.strip_prefix(b"-").unwrap_or(text);
        let (name, value) = match text.iter().position(|byte| *byte == b'=') {
            Some(equals) => (&text[..equals], Some(OsStr::from_bytes(&text[equals + 1..]))),
            None => (text, None),
        };
        let name = std::str::from_utf8(name).ok()?;
        let mut letters = name.chars();
        let letter = letters.next().filter(|_| letters.as_str().is_empty());
        let is_named = |flag: &&Arg| {
            let long = flag.get_long() == Some(name) || flag.get_all_aliases().is_some_and(|all| all.contains(&name));
            long || letter.is_some() && flag.get_short() == letter
        };
        let flag = command.get_arguments().filter(|flag| !flag.is_positional()).find(is_named)?;
        Some(Self { flag, value })
    }
}

fn is_flag(word: &OsStr) -> bool {
    word.as_bytes().starts_with(b"-") && word != "-"
}

/// What a word says of a flag that is on or off.
fn truth(word: &OsStr) -> Option<bool> {
    match word.to_str()? {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{ArgAction, Command};

    fn command() -> Command {
        let on = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);
        let value = |name: &'static str| Arg::new(name).long(name).action(ArgAction::Set);
        let id = Arg::new("id");
        let rest = Arg::new("rest").num_args(0..).trailing_var_arg(true).allow_hyphen_values(true);
        Command::new("podhull")
            .args([on("debug"), value("root"), value("log"), value("log_format").long("log-format")])
            .subcommand(Command::new("run").args([
                on("detach").short('d'),
                value("bundle").short('b'),
                on("no-pivot"),
                id.clone(),
            ]))
            .subcommand(Command::new("exec").args([on("tty").short('t'), value("env").short('e'), id, rest]))
    }

    fn read(line: &str) -> Line {
        Line::read(&mut command(), line.split(' ').map(OsString::from))
    }

    fn normal(line: &str) -> String {
        read(line).words().map(|word| word.into_string().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn one_dash_is_as_good_as_two() {
        assert_eq!(normal("podhull -debug -root /r run -no-pivot -bundle=/b -d x"), {
            "podhull --debug --root /r run --no-pivot --bundle=/b --detach x"
        });
        assert_eq!(normal("podhull run --b /b x -detach"), "podhull run --bundle /b x --detach");
        assert_eq!(normal("podhull -help"), "podhull --help");
    }

    #[test]
    fn a_switch_may_say_whether_it_is_on_and_the_last_counts() {
        assert_eq!(normal("podhull --debug=true --debug run -d=1 x"), "podhull --debug --debug run --detach x");
        assert_eq!(normal("podhull --debug --debug=false run -d -detach=F x"), "podhull run x");
        assert_eq!(normal("podhull --debug=false --debug=T run x"), "podhull --debug run x");
        assert_eq!(normal("podhull --debug=perhaps run x"), "podhull --debug=perhaps run x");
    }

    #[test]
    fn values_and_what_is_no_flag_stay_as_they_are() {
        for line in [
            "podhull --root -debug run x",
            "podhull run --bundle --detach=false x",
            "podhull run x -- -bundle --detach=false",
            "podhull run -dx -",
            "podhull --frob -debug run -no-pivot x",
            "podhull exec x sh -tty -env=a --tty=false",
            "podhull fly -bundle x",
            "podhull",
        ] {
            assert_eq!(normal(line), line);
        }
        assert_eq!(normal("podhull exec -e A=-tty -tty x -tty"), "podhull exec --env A=-tty --tty x -tty");
    }

    #[test]
    fn the_log_is_known_whatever_comes_after_it() {
        let line = read("podhull -log /l --log-format=json --frob run");
        assert_eq!((line.log, line.log_format), (Some("/l".into()), Format::Json));
        let line = read("podhull --log=/l run --log /other");
        assert_eq!((line.log, line.log_format), (Some("/l".into()), Format::Text));
        assert_eq!(read("podhull --root --log run").log, None);
        assert_eq!(read("podhull --frob --log /l").log, None);
    }
}
