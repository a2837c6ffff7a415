//! `delete`: removes what is left of a container whose shim is gone. Nobody inside is asked.

use std::time::SystemTime;

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};

use super::arguments::Arguments;
use super::events::timestamp;
use super::rootfs::RootfsError;
use super::{rootfs, start, state_root};
use crate::log::Log;
use crate::pod::{self, CommandError};
use crate::state::Known;

/// What containerd is told of a container that was killed.
const KILLED: u32 = 137;

/// What stays.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// The container.
    #[error(transparent)]
    Container(#[from] CommandError),
    /// Its root file system.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
}

/// Returns what to print.
pub fn delete(arguments: &Arguments) -> Result<Vec<u8>, DeleteError> {
    let root = state_root(&arguments.namespace);
    let pid = Known::load(&root, &arguments.id).map_or(0, |known| known.state.process.pid.cast_unsigned());
    pod::destroy(&root, &arguments.id, true, &Log::stderr())?;
    // The working directory is the bundle, where the option is not given.
    let bundle = arguments.bundle.clone().or_else(|| std::env::current_dir().ok()).unwrap_or_default();
    rootfs::unmount_all(&bundle)?;
    start::remove_socket(&bundle);
    let exited_at = MessageField::some(timestamp(SystemTime::now()));
    let answer = DeleteResponse { pid, exit_status: KILLED, exited_at, ..Default::default() };
    Ok(answer.write_to_bytes().unwrap_or_default())
}
