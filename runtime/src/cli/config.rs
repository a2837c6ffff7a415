//! `podhull config`: what is in force, and who has said so.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use super::{Failure, Listing};
use crate::bundle::Bundle;
use crate::config::{Config, Shown};

/// Show the configuration
#[derive(clap::Args)]
#[command(arg_required_else_help = false)]
#[command(after_help = "Examples:
  podhull config show                        every key, its value, and where that comes from
  podhull config show -b DIR                 for a pod of the bundle in DIR, with its annotations
  podhull config show --class FILE           for pods of the runtime class that names FILE
  podhull config show --format json          for programs")]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Show(Show),
}

/// Print what is in force, and where each value comes from: the default, a file and its line, or an annotation
#[derive(clap::Args)]
#[command(after_help = "Example:
  podhull config show -b DIR")]
struct Show {
    /// Directory of a bundle, whose annotations count too
    #[arg(short, long, value_name = "DIR")]
    bundle: Option<PathBuf>,

    /// File with the configuration of a runtime class, which comes after those of the host
    #[arg(short, long, value_name = "FILE")]
    class: Option<PathBuf>,

    /// A table, or JSON
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t = Listing::Table)]
    format: Listing,
}

impl Arguments {
    /// Does what is asked for.
    pub fn execute(self) -> Result<u8, Failure> {
        let Command::Show(show) = self.command;
        let mut config = Config::read_with(show.class.as_deref())?;
        if let Some(bundle) = show.bundle {
            let bundle = Bundle::open(&bundle).map_err(crate::pod::CreateError::from)?;
            config = config.with(&bundle.config.spec().annotations().clone().unwrap_or_default())?;
        }
        let shown = config.show();
        let text = match show.format {
            Listing::Table => table(&shown),
            Listing::Json => serde_json::to_string(&shown).map_err(std::io::Error::from)? + "\n",
        };
        std::io::stdout().write_all(text.as_bytes())?;
        Ok(0)
    }
}

/// Columns with at least 2 spaces between them.
fn table(shown: &[Shown]) -> String {
    let rows = shown.iter().map(|line| (line.key, line.text.as_str(), line.from.to_string()));
    let rows: Vec<_> = std::iter::once(("KEY", "VALUE", "FROM".to_owned())).chain(rows).collect();
    let key = rows.iter().map(|row| row.0.chars().count()).max().unwrap_or_default() + 2;
    let value = rows.iter().map(|row| row.1.chars().count()).max().unwrap_or_default() + 2;
    let mut text = String::new();
    for (name, of, from) in rows {
        let _ = writeln!(text, "{name:<key$}{of:<value$}{from}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_aligned_and_has_every_key() {
        let shown = Config::default().show();
        let text = table(&shown);
        assert_eq!(text.lines().count(), shown.len() + 1);
        let column = text.lines().next().unwrap().find("FROM").unwrap();
        for line in text.lines().skip(1) {
            assert!(line[column..].starts_with("default"), "{text}");
        }
        let json = serde_json::to_value(&shown).unwrap();
        assert_eq!(json[1], serde_json::json!({"key": "machine.memory", "value": 2048, "from": "default"}));
        assert_eq!(json[3], serde_json::json!({"key": "machine.max_memory", "value": null, "from": "default"}));
    }
}
