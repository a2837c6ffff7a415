//! Containers made by the agent on this machine, without a virtual one around them. Needs root, cgroup v2 and busybox-static.
//!
//! What needs a controller that this machine's cgroup v2 lacks says so, and is tested in the software host, where
//! `PODHULL_TEST_EVERYTHING` makes that an error. `PODHULL_AGENT` and `PODHULL_BUSYBOX` name other binaries than those of the
//! build and of `/bin`.
#![allow(clippy::unwrap_used)]

mod cgroups;
mod control;
mod exec;
mod forwards;
mod harness;
mod life;
mod mounts;
mod names;
mod namespaces;
mod network;
mod process;
mod seccomp;
mod streams;
mod terminal;
mod volumes;
