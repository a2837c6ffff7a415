//! podhull's shim as those drive it that start it themselves: by its command line, and by ttrpc.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::ttrpc::{self, Client, Code};
use rustix::fs::{CWD, Mode, OFlags, mkfifoat};
use rustix::process::Signal;

use crate::run::{DEADLINE, Running};
use crate::{Outcome, ensure};

/// The Task service of CRI-O, and of containerd before 2.0.
pub const TASK: &str = "containerd.task.v2.Task";

/// That of pods.
pub const SANDBOX: &str = "containerd.runtime.sandbox.v1.Sandbox";

/// How long a call may take: that of a container with a machine.
const CALL: Duration = Duration::from_secs(180);

/// The Task service of containerd from 2.0 on: the same messages.
pub const TASK_OF_2: &str = "containerd.task.v3.Task";

/// The name that callers know it by who know Kata Containers.
pub const PROGRAM: &str = "containerd-shim-kata-v2";

/// A connection to a shim.
#[derive(Clone)]
pub struct Shim {
    client: Client,
    /// Where it listens.
    pub address: String,
    /// Its log, which CRI-O reads.
    log: Option<Arc<File>>,
}

/// What was said instead of an answer.
pub type Refused = ttrpc::Error;

impl Shim {
    /// Has the shim of a bundle's container started, or that of its pod found, as CRI-O does: without anybody who takes events, in the
    /// bundle, with a pipe for its log. Nothing is said on standard input.
    pub fn start(bundle: &Path, id: &str) -> Outcome<Self> {
        Self::start_with(bundle, id, &[])
    }

    /// The same with more words on its command line.
    pub fn start_with(bundle: &Path, id: &str, more: &[&str]) -> Outcome<Self> {
        let log = bundle.join("log");
        mkfifoat(CWD, &log, Mode::from_raw_mode(0o700))?;
        let mut log = OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(log)?;
        let words = ["env", "-C"].map(OsString::from).into_iter().chain([bundle.into(), PROGRAM.into()]).chain(
            ["-namespace", "default", "-address", "", "-publish-binary", "/usr/bin/crio", "-id", id]
                .into_iter()
                .chain(more.iter().copied())
                .chain(["start"])
                .map(OsString::from),
        );
        let environment = [
            ("GOMAXPROCS", "2"),
            ("MAX_SHIM_VERSION", "2"),
            ("TTRPC_ADDRESS", ""),
            ("GRPC_ADDRESS", ""),
            ("NAMESPACE", "default"),
        ]
        .map(|(name, value)| (name, value.into()));
        let ended = Running::start(&words.collect::<Vec<_>>(), &environment)?.wait()?;
        let mut said = String::new();
        let _ = log.read_to_string(&mut said);
        ensure!(ended.status == 0, "start: {ended:?}, its log {said:?}");
        Ok(Self { log: Some(Arc::new(log)), ..Self::connect(ended.stdout.trim())? })
    }

    /// What it has logged since this was asked for.
    pub fn logged(&self) -> Outcome<String> {
        let (mut log, mut said) = (&**self.log.as_ref().ok_or("its log is another's")?, Vec::new());
        match log.read_to_end(&mut said) {
            // It has the other end, and there is no more.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            read => drop(read?),
        }
        Ok(String::from_utf8(said)?)
    }

    /// Finds that of a bundle's container again, as CRI-O does that was restarted.
    pub fn find(bundle: &Path) -> Outcome<Self> {
        Self::connect(fs::read_to_string(bundle.join("address"))?.trim())
    }

    /// The same shim by another connection.
    pub fn again(&self, other: Self) -> Self {
        Self { log: self.log.clone(), ..other }
    }

    /// That which listens somewhere.
    pub fn connect(address: &str) -> Outcome<Self> {
        let client = Client::connect(address).map_err(|error| format!("{address:?}: {error}"))?;
        Ok(Self { client, address: address.into(), log: None })
    }

    /// One call, to its answer.
    pub fn call<A: Message>(&self, service: &str, method: &str, request: &impl Message) -> Result<A, Refused> {
        let request = ttrpc::Request {
            service: service.into(),
            method: method.into(),
            timeout_nano: i64::try_from(CALL.as_nanos()).unwrap_or(i64::MAX),
            payload: request.write_to_bytes().map_err(|error| Refused::Others(error.to_string()))?,
            ..Default::default()
        };
        let answer = self.client.request(request)?;
        A::parse_from_bytes(&answer.payload).map_err(|error| Refused::Others(error.to_string()))
    }

    /// The same beside everything else.
    pub fn call_beside<A: Message>(
        &self,
        service: &'static str,
        method: &'static str,
        request: impl Message,
    ) -> Later<Result<A, Refused>> {
        let (shim, (sender, receiver)) = (self.clone(), channel());
        thread::spawn(move || sender.send(shim.call(service, method, &request)));
        Later(receiver)
    }

    /// Waits until nobody listens there any more.
    pub fn gone(&self) -> Outcome {
        let socket = self.address.strip_prefix("unix://").unwrap_or(&self.address);
        let until = Instant::now() + DEADLINE;
        while Path::new(socket).exists() {
            ensure!(Instant::now() < until, "{socket} is still there");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// What the shim's program, by one of its names, prints in a directory, which may be no text.
pub fn say(program: &str, directory: &Path, words: &[&str], input: &[u8]) -> Outcome<Vec<u8>> {
    let mut command = Command::new("timeout");
    command.arg(DEADLINE.as_secs().to_string()).arg(program).args(words).current_dir(directory);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().ok_or("no standard input")?.write_all(input)?;
    let said = child.wait_with_output()?;
    let complaint = String::from_utf8_lossy(&said.stderr);
    ensure!(said.status.success(), "{program} {words:?}: {}, {complaint:?}", said.status);
    Ok(said.stdout)
}

/// That a call is refused with a code; returns what is said.
pub fn refused<A: std::fmt::Debug>(code: Code, answer: Result<A, Refused>) -> Outcome<String> {
    match answer {
        Err(Refused::RpcStatus(status)) if status.code() == code => Ok(status.message().into()),
        other => Err(format!("expected {code:?}, found {other:?}").into()),
    }
}

/// What a thread will have found.
pub struct Later<T>(Receiver<T>);

impl<T> Later<T> {
    /// Waits for it.
    pub fn get(&self) -> Outcome<T> {
        Ok(self.0.recv_timeout(DEADLINE).map_err(|error| format!("nothing within {DEADLINE:?}: {error}"))?)
    }
}

/// The named pipes of a process, which CRI-O makes, in a directory of their own, and reads.
pub struct Pipes {
    directory: PathBuf,
    /// Their paths; empty where there is none.
    pub stdin: String,
    /// Always there.
    pub stdout: String,
    /// Not with a terminal.
    pub stderr: String,
    readers: Vec<Running>,
    /// What those have read that were there before.
    before: [String; 2],
}

impl Pipes {
    /// Makes them.
    pub fn new(directory: PathBuf, id: &str, stdin: bool, terminal: bool) -> Outcome<Self> {
        fs::create_dir_all(&directory)?;
        let make = |wanted: bool, name: &str| -> Outcome<String> {
            let path = directory.join(format!("{id}-{name}"));
            if wanted {
                mkfifoat(CWD, &path, Mode::from_raw_mode(0o700))?;
            }
            Ok(if wanted { path.display().to_string() } else { String::new() })
        };
        let (stdin, stdout, stderr) = (make(stdin, "stdin")?, make(true, "stdout")?, make(!terminal, "stderr")?);
        let mut pipes = Self { directory, stdin, stdout, stderr, readers: Vec::new(), before: Default::default() };
        pipes.read()?;
        Ok(pipes)
    }

    fn read(&mut self) -> Outcome {
        for path in [&self.stdout, &self.stderr].into_iter().filter(|path| !path.is_empty()) {
            self.readers.push(Running::start(&["cat".into(), path.into()], &[])?);
        }
        Ok(())
    }

    /// The next line of standard output.
    pub fn line(&mut self) -> Outcome<String> {
        self.readers.first_mut().ok_or("nobody reads")?.line()
    }

    /// The next line of standard error.
    pub fn error_line(&mut self) -> Outcome<String> {
        self.readers.get_mut(1).ok_or("nobody reads")?.line()
    }

    /// Who reads goes away, and comes back. What it has taken and not passed on is lost, so all of it was to be seen before.
    pub fn restart(&mut self) -> Outcome {
        for (reader, before) in self.readers.drain(..).zip(&mut self.before) {
            reader.signal(Signal::KILL)?;
            before.push_str(&reader.wait()?.stdout);
        }
        self.read()
    }

    /// What was written on standard output and error, to their end; removes them.
    pub fn finish(mut self) -> Outcome<[String; 2]> {
        for (reader, text) in self.readers.drain(..).zip(&mut self.before) {
            text.push_str(&reader.wait()?.stdout);
        }
        fs::remove_dir_all(&self.directory)?;
        Ok(self.before)
    }
}
