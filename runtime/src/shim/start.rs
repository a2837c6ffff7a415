//! `start`: makes the process that serves a pod, or finds it, and says where it listens.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, Read, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use containerd_shim_protos::api::ConnectRequest;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::TaskClient;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use sha2::{Digest, Sha256};
use ttrpc::r#async::transport::Socket;
use ttrpc::context::Context;

use super::arguments::Arguments;
use super::options::{Options, OptionsError};
use crate::descriptors::inherit_only;
use crate::oom;
use crate::state::lock_in_time;

/// Where shims have their sockets, as containerd's own do.
const SOCKETS: &str = "/run/containerd/s";

/// File of the bundle with the address of its shim.
const ADDRESS: &str = "address";

/// Most of what containerd says on standard input, in bytes.
pub const MAX_INPUT: u64 = 4 << 20;

/// Longest `config.json` that is looked at for its annotations.
const MAX_CONFIG: u64 = 3 << 20;

/// Descriptor at which the process finds its listener.
pub const LISTENER_FD: i32 = 3;

/// Variable with the address that events are sent to.
pub const EVENTS: &str = "TTRPC_ADDRESS";

/// Annotations that name the pod of a container: those of Kubernetes' container runtimes, and of containerd's shim for runc. A pod may have
/// some of its own under the names of another runtime than its own, which then come later.
const GROUPS: [&str; 3] =
    ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID", "io.containerd.runc.v2.group"];
const GROUPS_OF_CRI_O: [&str; 3] = [GROUPS[1], GROUPS[0], GROUPS[2]];

/// How long the shim of a pod may take to answer, and how long others may take to start theirs.
const ANSWER: Duration = Duration::from_secs(10);

/// The version of the service that containerd is to use, as if nothing were said. To one that says 3, containerd from 2.3 on connects by
/// itself for all containers of a pod but the first: nobody is called for them when this process dies, no end is told, and kubelet takes
/// them for running. It takes such a shim for one that streams what programs write, too.
const VERSION: i32 = 2;

/// Where control groups are.
const GROUPS_MOUNTED: &str = "/sys/fs/cgroup";

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
    /// Somebody listens, and does not answer.
    #[error(
        "the shim of pod {0:?} at {1} does not answer within {secs} seconds: end its process, podhull-shim",
        secs = ANSWER.as_secs()
    )]
    Hangs(String, PathBuf),
    /// No event loop.
    #[error("cannot set up event handling: {0}")]
    Events(#[source] io::Error),
    /// The process.
    #[error("cannot start the shim's process: {0}")]
    Spawn(#[source] io::Error),
    /// When the host has no memory left, containerd is to live longer.
    #[error("cannot set oom_score_adj of the shim's process: {0}")]
    OomScore(#[source] io::Error),
    /// What the options say.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The group that they name.
    #[error("options: shim_cgroup: cannot move the shim's process to {0}: {1}")]
    Cgroup(PathBuf, #[source] io::Error),
    /// A file for containerd.
    #[error("cannot write the file address of the bundle: {0}")]
    Address(#[source] io::Error),
}

/// What containerd says beyond the command line.
#[derive(Debug, Default, PartialEq)]
struct Said {
    /// Where to send events, if it says so here.
    events: Option<String>,
    /// Directory of the socket.
    sockets: Option<PathBuf>,
    /// What its user says of the runtime.
    options: Any,
    /// Whether it takes a [`BootstrapResult`].
    bootstrap: bool,
}

/// Returns what to print.
pub fn start(arguments: &Arguments) -> Result<Vec<u8>, StartError> {
    let mut input = Vec::new();
    io::stdin().take(MAX_INPUT).read_to_end(&mut input).map_err(StartError::Input)?;
    let said = Said::read(&input, arguments);
    let options = Options::read(&said.options)?;
    let group = group(arguments)?;
    let sockets = said.sockets.as_deref().unwrap_or(Path::new(SOCKETS));
    let socket = sockets.join(name(&arguments.address, &arguments.namespace, &group));
    let listen = |error| StartError::Listen(socket.clone(), error);
    DirBuilder::new().recursive(true).mode(0o711).create(sockets).map_err(listen)?;
    if !answers(&socket, &group, ANSWER)? {
        // One at a time: what nobody answers at is removed, and must not be another's that is about to answer.
        let directory = fs::File::open(sockets).map_err(listen)?;
        let _turn = lock_in_time(directory.into(), ANSWER).map_err(|errno| listen(errno.into()))?;
        if UnixStream::connect(&socket).is_err() {
            serve(arguments, &said, &options, &socket)?;
        }
    }
    let address = format!("unix://{}", socket.display());
    // containerd 1.6 and CRI-O look for it there when they have been restarted.
    fs::write(ADDRESS, &address).map_err(StartError::Address)?;
    if said.bootstrap {
        let (version, protocol) = (VERSION, "ttrpc".to_owned());
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
                // There may be other extensions, which are not for runtimes.
                options: params
                    .extensions
                    .into_iter()
                    .filter_map(|extension| extension.value.into_option())
                    .find(Options::is_known)
                    .unwrap_or_default(),
                bootstrap: true,
            },
            _ => Self { options: Any::parse_from_bytes(input).unwrap_or_default(), ..Self::default() },
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
    Ok(named(&annotations, &arguments.address).unwrap_or(&arguments.id).to_owned())
}

/// The pod that annotations name to the shim that was started for who listens at this address: CRI-O listens nowhere.
fn named<'a>(annotations: &'a HashMap<String, String>, address: &str) -> Option<&'a str> {
    let names = if address.is_empty() { GROUPS_OF_CRI_O } else { GROUPS };
    names.iter().find_map(|name| annotations.get(*name)).map(String::as_str).filter(|name| !name.is_empty())
}

/// Name of the socket: paths of sockets are short.
fn name(address: &str, namespace: &str, group: &str) -> String {
    let hash = Sha256::digest(format!("{address}/{namespace}/{group}"));
    hash.iter().fold(String::new(), |mut name, byte| {
        let _ = write!(name, "{byte:02x}");
        name
    })
}

/// The socket of a bundle's shim, if somebody listens there; one at which nobody does is removed.
pub fn socket_of(bundle: &Path) -> Option<PathBuf> {
    let address = fs::read_to_string(bundle.join(ADDRESS)).ok()?;
    let socket = PathBuf::from(address.trim().strip_prefix("unix://")?);
    if listens(&socket) {
        return Some(socket);
    }
    let _ = fs::remove_file(socket);
    None
}

/// Whether somebody listens at a socket, be it that more wait there than there is room for.
fn listens(socket: &Path) -> bool {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let connected = SocketAddrUnix::new(socket)
        .and_then(|address| connect(socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?, &address));
    matches!(connected, Ok(()) | Err(Errno::AGAIN))
}

/// Whether somebody answers at a socket in time; false if nobody listens there.
fn answers(socket: &Path, group: &str, time: Duration) -> Result<bool, StartError> {
    let hangs = || StartError::Hangs(group.into(), socket.into());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    runtime.map_err(StartError::Events)?.block_on(async {
        let stream = match tokio::net::UnixStream::connect(socket).await {
            Ok(stream) => stream,
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => return Ok(false),
                // More wait for an answer than there is room for.
                io::ErrorKind::WouldBlock => return Err(hangs()),
                _ => return Err(StartError::Listen(socket.into(), error)),
            },
        };
        let client = TaskClient::new(ttrpc::r#async::Client::new(Socket::new(stream)));
        let request = ConnectRequest { id: group.into(), ..Default::default() };
        match tokio::time::timeout(time, client.connect(Context::default(), &request)).await {
            Ok(Ok(_) | Err(ttrpc::Error::RpcStatus(_))) => Ok(true),
            // It is just ending.
            Ok(Err(_)) => Ok(false),
            Err(_) => Err(hangs()),
        }
    })
}

/// Starts the process.
fn serve(arguments: &Arguments, said: &Said, options: &Options, socket: &Path) -> Result<(), StartError> {
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
    if let Some(class) = &options.config {
        command.arg("-class").arg(class);
    }
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
    inherit_only(&mut command, listener.as_raw_fd(), LISTENER_FD);
    let spawned = command.spawn().map_err(StartError::Spawn).and_then(|mut child| {
        settle(child.id(), options).inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })
    });
    spawned.inspect_err(|_| drop(fs::remove_file(socket)))
}

/// What containerd's shim for runc does with its process: when the host has no memory left it goes after containerd has, which is
/// the parent of this process; and it is in the group that the options name.
fn settle(pid: u32, options: &Options) -> Result<(), StartError> {
    let parent = rustix::process::getppid().map_or(1, |parent| parent.as_raw_nonzero().get());
    let score = oom::score(parent).map_err(StartError::OomScore)?;
    oom::set_score(pid.cast_signed(), score.saturating_add(1)).map_err(StartError::OomScore)?;
    if let Some(group) = &options.shim_cgroup {
        let group = Path::new(GROUPS_MOUNTED).join(group);
        let moved = OpenOptions::new().write(true).open(group.join("cgroup.procs"));
        let moved = moved.and_then(|mut file| file.write_all(pid.to_string().as_bytes()));
        moved.map_err(|error| StartError::Cgroup(group, error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::bootstrap_api::Extension;
    use std::ffi::OsString;

    fn arguments() -> Arguments {
        Arguments::read("s -namespace n -id i start".split(' ').map(OsString::from)).unwrap()
    }

    #[test]
    fn a_pod_is_named_by_its_own_runtime() {
        let of = |names: &[&str], address: &str| {
            let annotations = names.iter().map(|name| ((*name).to_owned(), (*name).to_owned())).collect();
            named(&annotations, address).map(str::to_owned)
        };
        let all = GROUPS;
        assert_eq!(of(&all, "/run/containerd.sock").as_deref(), Some("io.kubernetes.cri.sandbox-id"));
        assert_eq!(of(&all, "").as_deref(), Some("io.kubernetes.cri-o.SandboxID"));
        for name in all {
            assert_eq!((of(&[name], "").as_deref(), of(&[name], "/a").as_deref()), (Some(name), Some(name)));
        }
        assert_eq!(of(&[], ""), None);
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
        let expected =
            Said { events: Some("unix:///e".into()), sockets: Some("/s".into()), options: Any::new(), bootstrap: true };
        assert_eq!(said, expected);
        params.namespace = "another".into();
        let said = Said::read(&params.write_to_bytes().unwrap(), &arguments());
        assert_eq!((said.events, said.bootstrap, &*said.options.type_url), (None, false, "i"));
        // An Any: its first two fields have the numbers of those two.
        let mut any = Any::new();
        any.type_url = "containerd.runc.v1.Options".into();
        let said = Said::read(&any.write_to_bytes().unwrap(), &arguments());
        assert_eq!(said, Said { options: any.clone(), ..Said::default() });
        (params.namespace, params.extensions) = ("n".into(), Vec::new());
        for options in [Any { type_url: "io.x.Nri".into(), ..Default::default() }, any.clone()] {
            let value = containerd_shim_protos::protobuf::MessageField::some(options);
            params.extensions.push(Extension { value, ..Default::default() });
        }
        assert_eq!(Said::read(&params.write_to_bytes().unwrap(), &arguments()).options, any);
        assert_eq!(Said::read(b"", &arguments()), Said::default());
        assert_eq!(Said::read(&[0xff; 64], &arguments()), Said::default());
    }

    #[test]
    fn who_listens_and_does_not_answer_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let answers = |socket| answers(socket, "g", Duration::from_millis(100));
        assert!(!answers(&socket).unwrap());
        let listener = UnixListener::bind(&socket).unwrap();
        let (closing, hung) = (listener.try_clone().unwrap(), listener);
        let close = std::thread::spawn(move || drop(closing.accept().unwrap()));
        assert!(!answers(&socket).unwrap());
        close.join().unwrap();
        let error = answers(&socket).unwrap_err().to_string();
        assert!(error.contains("pod \"g\"") && error.contains("does not answer"), "{error}");
        drop(hung);
        assert!(!answers(&socket).unwrap());
    }

    #[test]
    fn each_pod_of_each_daemon_has_a_name_of_its_own() {
        assert_eq!(name("a", "n", "g").len(), 64);
        assert_ne!(name("a", "n", "g"), name("a", "n", "h"));
        assert_ne!(name("a", "n", "g"), name("b", "n", "g"));
    }
}
