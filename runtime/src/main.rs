//! podhull

fn main() {}
