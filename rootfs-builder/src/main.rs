//! Makes the guest image of podhull: the file system that a pod's kernel starts from.
//!
//! The image is EROFS and holds one file, the agent, beside the empty directories it mounts on ([`image`]). The VMM
//! maps it into the guest as read-only persistent memory, where the kernel runs the agent in place: nothing is copied,
//! and all pods of a host share its pages. Equal agents give equal images, byte for byte, whoever builds them.

mod agent;
mod image;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Makes the guest image (EROFS) that a pod boots from, out of the agent.
///
/// Example: podhull-rootfs-builder --agent target/podhull-agent --output guest.img
#[derive(Parser)]
#[command(name = "podhull-rootfs-builder", version, verbatim_doc_comment)]
struct Options {
    /// The agent: a static x86-64 executable
    #[arg(long, value_name = "FILE")]
    agent: PathBuf,

    /// The image to write; it is replaced only once the new one is whole
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match image::build(&options.agent, &options.output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("podhull-rootfs-builder: {error}");
            ExitCode::FAILURE
        }
    }
}
