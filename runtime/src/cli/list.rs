//! `podhull list`: all containers.

use std::fmt::Write as _;
use std::io::Write as _;

use super::state::Shown;
use super::{Context, Failure, Listing};
use crate::state::{self, Known};

/// List containers
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull list                               a table
  podhull list -q                            names only
  podhull list --format json                 for programs")]
pub struct Arguments {
    /// A table, or JSON
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t = Listing::Table)]
    format: Listing,

    /// Names only
    #[arg(short, long)]
    quiet: bool,
}

impl Arguments {
    /// Prints them.
    pub fn execute(self, context: &Context) -> Result<u8, Failure> {
        let shown = |known: Known| {
            let owner = match known.owner() {
                0 => "root".into(),
                uid => format!("#{uid}"),
            };
            let mut shown = Shown::from(known);
            shown.owner = owner;
            shown
        };
        let containers: Vec<Shown> = state::list(&context.root)?.into_iter().map(shown).collect();
        let text = match self.format {
            _ if self.quiet => containers.iter().map(|container| format!("{}\n", container.id)).collect(),
            Listing::Table => table(&containers),
            Listing::Json => json(&containers)?,
        };
        std::io::stdout().write_all(text.as_bytes())?;
        Ok(0)
    }
}

/// One line.
pub fn json(containers: &[Shown]) -> std::io::Result<String> {
    // As Go writes a list that was never made.
    let text = if containers.is_empty() { "null".into() } else { serde_json::to_string(containers)? };
    Ok(text + "\n")
}

/// Columns at least 12 wide, with at least 3 spaces between them.
fn table(containers: &[Shown]) -> String {
    let mut rows = vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned)];
    rows.extend(containers.iter().map(|container| {
        [
            container.id.clone(),
            container.pid.to_string(),
            container.status.to_string(),
            container.bundle.display().to_string(),
            container.created.clone(),
            container.owner.clone(),
        ]
    }));
    let widths = std::array::from_fn::<_, 6, _>(|column| {
        rows.iter().map(|row| row[column].chars().count() + 3).max().unwrap_or_default().max(12)
    });
    let mut text = String::new();
    for row in &rows {
        for (cell, width) in row[..5].iter().zip(widths) {
            let _ = write!(text, "{cell:<width$}");
        }
        let _ = writeln!(text, "{}", row[5]);
    }
    text
}
