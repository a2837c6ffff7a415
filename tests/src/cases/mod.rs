//! All tests, one module for each topic; the quick ones first.

mod bad_input;
mod broken;
mod buildah;
mod cgroups;
mod clock;
mod command_line;
mod commands;
mod compose;
mod config;
mod containerd;
mod crashes;
mod cri;
mod cri_disks;
mod cri_host_paths;
mod cri_limits;
mod cri_many;
mod cri_network;
mod cri_outages;
mod cri_security;
mod cri_statistics;
mod cri_streams;
mod cri_volumes;
mod cri_workload;
mod crio;
mod deploy;
mod descriptors;
mod disks;
mod docker;
mod docs;
mod documents;
mod exit_codes;
mod files;
mod forwards;
mod growth;
mod hooks;
mod isolation;
mod labels;
mod lifecycle;
mod load;
mod namespaces;
mod network;
mod notify;
mod operations;
mod pidfd;
mod podman;
mod podman_networks;
mod pods;
mod privileged;
mod process;
mod programs;
mod races;
mod resources;
mod rogue;
mod rogue_silent;
mod sandbox;
mod shim;
mod sockets;
mod stdio;
mod systemd;
mod terminal;
mod units;
mod users;

use crate::Outcome;
use crate::suite::{Case, Scene, Subject};

/// The tests in the order they run in.
pub const ALL: &[&[Case]] = &[
    command_line::CASES,
    exit_codes::CASES,
    pidfd::CASES,
    isolation::CASES,
    lifecycle::CASES,
    commands::CASES,
    documents::CASES,
    cgroups::CASES,
    hooks::CASES,
    namespaces::CASES,
    process::CASES,
    labels::CASES,
    privileged::CASES,
    terminal::CASES,
    stdio::CASES,
    descriptors::CASES,
    files::CASES,
    sockets::CASES,
    disks::CASES,
    bad_input::CASES,
    broken::CASES,
    races::CASES,
    crashes::CASES,
    rogue::CASES,
    rogue_silent::CASES,
    resources::CASES,
    growth::CASES,
    config::CASES,
    operations::CASES,
    load::CASES,
    pods::CASES,
    users::CASES,
    network::CASES,
    notify::CASES,
    forwards::CASES,
    programs::CASES,
    containerd::CASES,
    deploy::CASES,
    shim::CASES,
    crio::CASES,
    sandbox::CASES,
    cri::CASES,
    cri_disks::CASES,
    cri_limits::CASES,
    cri_outages::CASES,
    cri_many::CASES,
    cri_workload::CASES,
    cri_network::CASES,
    cri_security::CASES,
    cri_statistics::CASES,
    cri_streams::CASES,
    cri_host_paths::CASES,
    cri_volumes::CASES,
    clock::CASES,
    podman::CASES,
    podman_networks::CASES,
    docker::CASES,
    compose::CASES,
    buildah::CASES,
    docs::CASES,
    systemd::CASES,
    units::CASES,
];

/// A test that holds for any OCI runtime.
const fn oci(name: &'static str, run: fn(&Scene) -> Outcome) -> Case {
    Case { name, subject: Subject::Oci, long: false, run }
}

/// A test of virtual machines, or of what only podhull promises.
const fn podhull(name: &'static str, run: fn(&Scene) -> Outcome) -> Case {
    Case { name, subject: Subject::Podhull, long: false, run }
}

/// A test that takes minutes: only soaks run it, and who names it in full.
const fn long(case: Case) -> Case {
    Case { long: true, ..case }
}
