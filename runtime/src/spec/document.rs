//! The specification `podhull spec` writes: the same document as `runc spec`, so that what builds on one builds on the
//! other.

/// `config.json` as a text.
pub const TEXT: &str = include_str!("document.json");
