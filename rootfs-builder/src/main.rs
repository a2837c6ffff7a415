//! podhull-rootfs-builder

fn main() {}
