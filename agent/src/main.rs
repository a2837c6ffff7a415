//! podhull-agent

fn main() {}
