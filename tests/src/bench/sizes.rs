//! What is installed.

use std::fs;

use super::Bench;
use super::report::{Figure, Panel};
use crate::Outcome;

/// Bytes of a MB.
const MB: f64 = 1e6;

/// Sizes of the three files.
pub fn measure(bench: &Bench) -> Outcome<Vec<Panel>> {
    let files = [
        ("guest kernel (vmlinux)", bench.library_file("vmlinux")?, 20.0),
        ("guest image (guest.img)", bench.library_file("guest.img")?, 6.0),
        ("podhull", bench.podhull.program().canonicalize()?, 12.0),
    ];
    let mut figures = Vec::new();
    for (name, file, target) in files {
        figures.push(Figure::new(name, "MB", vec![fs::metadata(file)?.len() as f64 / MB]).at_most(target));
    }
    Ok(vec![Panel { title: "Installed files (1 MB = 10^6 bytes)", unit: "MB", successive: false, figures }])
}
