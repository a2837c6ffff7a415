//! The specification `podhull spec` writes: the same document as `runc spec` on a host with cgroup v2, which every guest
//! has, so that what builds on one builds on the other.

/// `config.json` as a text.
pub const TEXT: &str = include_str!("document.json");
