//! The agent on an ordinary machine: the same calls, on Unix sockets, without a machine to set up.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use crate::{cgroup, serve};

/// `native --dir DIR [--cgroup2 MOUNT_POINT] [--cgroup NAME]`: serves `DIR/agent.sock` and `DIR/stdio.sock`, with `DIR/share` as
/// the pod's share. Returns the exit status.
pub fn main(mut arguments: impl Iterator<Item = OsString>) -> i32 {
    let (mut dir, mut mount_point, mut name) =
        (None, PathBuf::from("/sys/fs/cgroup"), String::from("podhull-agent-native"));
    while let Some(argument) = arguments.next() {
        let Some(value) = arguments.next() else {
            eprintln!("podhull-agent: {} needs a value", argument.to_string_lossy());
            return 2;
        };
        match argument.to_str() {
            Some("--dir") => dir = Some(PathBuf::from(value)),
            Some("--cgroup2") => mount_point = PathBuf::from(value),
            Some("--cgroup") => name = value.to_string_lossy().into_owned(),
            _ => {
                eprintln!("podhull-agent: unknown option {}", argument.to_string_lossy());
                return 2;
            }
        }
    }
    let Some(dir) = dir else {
        eprintln!("podhull-agent: native needs --dir DIR");
        return 2;
    };
    let error = match serve_in(&dir, &mount_point, &name) {
        Ok(error) => error.to_string(),
        Err(error) => error,
    };
    eprintln!("podhull-agent: {error}");
    1
}

fn serve_in(dir: &std::path::Path, mount_point: &std::path::Path, name: &str) -> Result<serve::ServeError, String> {
    let bind = |name: &str| -> Result<OwnedFd, String> {
        let path = dir.join(name);
        let listener = UnixListener::bind(&path).map_err(|error| format!("listen on {}: {error}", path.display()))?;
        listener.set_nonblocking(true).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(listener.into())
    };
    let cgroups = cgroup::Hierarchy::new(mount_point, name).map_err(|error| error.to_string())?;
    let (agent, stdio) = (bind("agent.sock")?, bind("stdio.sock")?);
    Ok(serve::serve(
        serve::Listeners::Unix { agent, stdio, share: dir.join("share"), memory: dir.join("memory") },
        cgroups,
    ))
}
