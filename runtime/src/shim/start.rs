//! `start`: makes the process that serves a pod, or finds it, and says where it listens.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use rustix::fs::FlockOperation;
use sha2::{Digest, Sha256};

use super::arguments::Arguments;

/// Where shims have their sockets, as containerd's own do.
const SOCKETS: &str = "/run/containerd/s";

/// File of the bundle with the address of its shim.
const ADDRESS: &str = "address";

/// Most of what containerd says on standard input, in bytes.
const MAX_INPUT: u64 = 4 << 20;

/// Longest `config.json` that is looked at for its annotations.
const MAX_CONFIG: u64 = 3 << 20;

/// Descriptor at which the process finds its listener.
pub const LISTENER_FD: i32 = 3;

/// Variable with the address that events are sent to.
pub const EVENTS: &str = "TTRPC_ADDRESS";

/// Annotations that name the pod of a container: those of Kubernetes' container runtimes, and of containerd's shim for runc.
const GROUPS: [&str; 3] =
    ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID", "io.containerd.runc.v2.group"];

/// Why there is no process.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Standard input.
    #[error("cannot read what containerd says: {0}")]
    Input(#[source] io::Error),
    /// The bundle is the working directory.
    #[error("config.json: {0}")]
    Config(#[source] io::Error),
    /// The socket.
    #[error("cannot listen at {0}: {1}")]
    Listen(PathBuf, #[source] io::Error),
    /// The process.
    #[error("cannot start the shim's process: {0}")]
    Spawn(#[source] io::Error),
    /// A file for containerd.
    #[error("cannot write the file address of the bundle: {0}")]
    Address(#[source] io::Error),
}

/// What containerd says beyond the command line.
#[derive(Debug, Default, PartialEq, Eq)]
struct Said {
    /// Where to send events, if it says so here.
    events: Option<String>,
    /// Directory of the socket.
    sockets: Option<PathBuf>,
    /// Whether it takes a [`BootstrapResult`].
    bootstrap: bool,
}

/// Returns what to print.
pub fn start(arguments: &Arguments) -> Result<Vec<u8>, StartError> {
    let mut input = Vec::new();
    io::stdin().take(MAX_INPUT).read_to_end(&mut input).map_err(StartError::Input)?;
    let said = Said::read(&input, arguments);
    let group = group(arguments)?;
    let sockets = said.sockets.as_deref().unwrap_or(Path::new(SOCKETS));
    let socket = sockets.join(name(&arguments.address, &arguments.namespace, &group));
    let listen = |error| StartError::Listen(socket.clone(), error);
    DirBuilder::new().recursive(true).mode(0o711).create(sockets).map_err(listen)?;
    // One at a time: what nobody answers at is removed, and must not be another's that is about to answer.
    let turn = fs::File::open(sockets).map_err(listen)?;
    rustix::fs::flock(&turn, FlockOperation::LockExclusive).map_err(|errno| listen(errno.into()))?;
    if UnixStream::connect(&socket).is_err() {
        serve(arguments, &said, &socket)?;
    }
    drop(turn);
    let address = format!("unix://{}", socket.display());
    // containerd 1.6 and CRI-O look for it there when they have been restarted.
    fs::write(ADDRESS, &address).map_err(StartError::Address)?;
    if said.bootstrap {
        let (version, protocol) = (3, "ttrpc".to_owned());
        let result = BootstrapResult { version, address, protocol, ..Default::default() };
        return Ok(result.write_to_bytes().unwrap_or_default());
    }
    // Plain, which every version takes, and with it the second version of the service.
    Ok(address.into_bytes())
}

impl Said {
    /// containerd 2.3 says parameters; earlier ones say options, which may look like some. Then their names are no names of ours.
    fn read(input: &[u8], arguments: &Arguments) -> Self {
        match BootstrapParams::parse_from_bytes(input) {
            Ok(params) if params.instance_id == arguments.id && params.namespace == arguments.namespace => Self {
                events: Some(params.containerd_ttrpc_address).filter(|address| !address.is_empty()),
                sockets: params.socket_dir.filter(|directory| !directory.is_empty()).map(PathBuf::from),
                bootstrap: true,
            },
            _ => Self::default(),
        }
    }
}

/// The pod that the container of the bundle belongs to.
fn group(arguments: &Arguments) -> Result<String, StartError> {
    #[derive(serde::Deserialize)]
    struct Annotated {
        #[serde(default)]
        annotations: Option<HashMap<String, String>>,
    }
    let read = || -> io::Result<Annotated> {
        let file = fs::File::open("config.json")?;
        Ok(serde_json::from_reader(io::BufReader::new(file.take(MAX_CONFIG)))?)
    };
    let annotations = match read() {
        Ok(config) => config.annotations.unwrap_or_default(),
        // A sandbox without a container.
        Err(error) if error.kind() == io::ErrorKind::NotFound => HashMap::new(),
        Err(error) => return Err(StartError::Config(error)),
    };
    let named = GROUPS.iter().find_map(|name| annotations.get(*name)).filter(|name| !name.is_empty());
    Ok(named.unwrap_or(&arguments.id).clone())
}

/// Name of the socket: paths of sockets are short.
fn name(address: &str, namespace: &str, group: &str) -> String {
    let hash = Sha256::digest(format!("{address}/{namespace}/{group}"));
    hash.iter().fold(String::new(), |mut name, byte| {
        let _ = write!(name, "{byte:02x}");
        name
    })
}

/// Removes the socket of a bundle's shim, if nobody answers there any more.
pub fn remove_socket(bundle: &Path) {
    let Ok(address) = fs::read_to_string(bundle.join(ADDRESS)) else { return };
    let Some(socket) = address.trim().strip_prefix("unix://").map(Path::new) else { return };
    if UnixStream::connect(socket).is_err() {
        let _ = fs::remove_file(socket);
    }
}

/// Starts the process.
fn serve(arguments: &Arguments, said: &Said, socket: &Path) -> Result<(), StartError> {
    let listen = |error| StartError::Listen(socket.to_owned(), error);
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(listen(error)),
        _ => {}
    }
    // Nobody else may use it, not even between its making and its mode.
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(socket);
    rustix::process::umask(mask);
    let listener = listener.map_err(listen)?;
    fs::set_permissions(socket, Permissions::from_mode(0o600)).map_err(listen)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(std::env::args_os().next().unwrap_or_default());
    command.args(["-namespace", &arguments.namespace, "-id", &arguments.id, "-address", &arguments.address]);
    if arguments.debug {
        command.arg("-debug");
    }
    if let Some(events) = &said.events {
        command.env(EVENTS, events);
    }
    // What systemd says to containerd is not said to containers.
    for variable in ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"] {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let fd = listener.as_raw_fd();
    // SAFETY: between fork and exec the closure only makes system calls, and allocates nothing.
    unsafe {
        command.pre_exec(move || inherit_only(fd));
    }
    let spawned = command.spawn();
    if spawned.is_err() {
        let _ = fs::remove_file(socket);
    }
    spawned.map(drop).map_err(StartError::Spawn)
}

/// A session of its own, the listener at its place, and nothing else of the caller's beyond the standard streams.
fn inherit_only(listener: i32) -> io::Result<()> {
    let check = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: plain system calls on integers.
    unsafe {
        check(libc::setsid())?;
        if listener == LISTENER_FD {
            check(libc::fcntl(listener, libc::F_SETFD, 0))?;
        } else {
            check(libc::dup2(listener, LISTENER_FD))?;
        }
        // Not closed now: the standard library reports a failed exec through a descriptor of its own.
        let first = LISTENER_FD as libc::c_uint + 1;
        check(libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) as libc::c_int)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    fn arguments() -> Arguments {
        Arguments::read("s -namespace n -id i start".split(' ').map(OsString::from)).unwrap()
    }

    #[test]
    fn parameters_are_those_of_this_container_and_options_are_none() {
        let mut params = BootstrapParams {
            instance_id: "i".into(),
            namespace: "n".into(),
            containerd_ttrpc_address: "unix:///e".into(),
            socket_dir: Some("/s".into()),
            ..Default::default()
        };
        let said = Said::read(&params.write_to_bytes().unwrap(), &arguments());
        assert_eq!(said, Said { events: Some("unix:///e".into()), sockets: Some("/s".into()), bootstrap: true });
        params.namespace = "another".into();
        assert_eq!(Said::read(&params.write_to_bytes().unwrap(), &arguments()), Said::default());
        // An Any: its first two fields have the numbers of those two.
        let mut any = containerd_shim_protos::protobuf::well_known_types::any::Any::new();
        any.type_url = "containerd.runc.v1.Options".into();
        assert_eq!(Said::read(&any.write_to_bytes().unwrap(), &arguments()), Said::default());
        assert_eq!(Said::read(b"", &arguments()), Said::default());
        assert_eq!(Said::read(&[0xff; 64], &arguments()), Said::default());
    }

    #[test]
    fn each_pod_of_each_daemon_has_a_name_of_its_own() {
        assert_eq!(name("a", "n", "g").len(), 64);
        assert_ne!(name("a", "n", "g"), name("a", "n", "h"));
        assert_ne!(name("a", "n", "g"), name("b", "n", "g"));
    }
}
