//! Starting the program under test, talking to it, and waiting for it, never without a deadline.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::{Failure, Outcome, ensure, processes};

/// How long a step may take before the test is given up. The software host is some fifty times slower than hardware.
pub const DEADLINE: Duration = Duration::from_secs(90);

/// A program that has ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status; 128 and the signal's number if a signal ended the program itself.
    pub status: i32,
    /// The number of that signal.
    pub signal: Option<i32>,
    /// What it wrote on standard output.
    pub stdout: String,
    /// What it wrote on standard error.
    pub stderr: String,
    /// From its start to its end.
    pub took: Duration,
}

impl Ended {
    /// Fails unless the status was `status`, with what the program said as the reason.
    pub fn expect_status(self, status: i32) -> Outcome<Self> {
        ensure!(
            self.status == status,
            "exit status {} instead of {status}; stdout {:?}, stderr {:?}",
            self.status,
            tail(&self.stdout),
            tail(&self.stderr)
        );
        Ok(self)
    }

    /// The standard output of a run that succeeded.
    pub fn output(self) -> Outcome<String> {
        Ok(self.expect_status(0)?.stdout)
    }
}

/// The last of a long text.
fn tail(text: &str) -> &str {
    let mut start = text.len().saturating_sub(2000);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

/// What arrives on one of the program's outputs, gathered by a thread.
#[derive(Clone, Default)]
struct Gathered(Arc<(Mutex<Received>, Condvar)>);

#[derive(Default)]
struct Received {
    bytes: Vec<u8>,
    ended: bool,
}

impl Gathered {
    fn from(mut source: impl Read + Send + 'static) -> Self {
        let gathered = Self::default();
        let shared = gathered.clone();
        thread::spawn(move || {
            let mut buffer = [0; 65536];
            loop {
                let count = source.read(&mut buffer).unwrap_or(0);
                let (received, changed) = &*shared.0;
                let mut received = received.lock().unwrap_or_else(PoisonError::into_inner);
                received.bytes.extend_from_slice(&buffer[..count]);
                received.ended = count == 0;
                changed.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        gathered
    }

    /// Waits until `found` finds something, the stream ends, or the deadline passes.
    fn wait<T>(&self, deadline: Duration, mut found: impl FnMut(&Received) -> Option<T>) -> Option<T> {
        let until = Instant::now() + deadline;
        let (received, changed) = &*self.0;
        let mut received = received.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(value) = found(&received) {
                return Some(value);
            }
            let left = until.saturating_duration_since(Instant::now());
            if received.ended || left.is_zero() {
                return None;
            }
            received = changed.wait_timeout(received, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn text(&self) -> String {
        let received = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&received.bytes).into_owned()
    }
}

/// A program that runs, its outputs gathered.
pub struct Running {
    child: Child,
    /// Its command line, for the trace.
    words: String,
    stdin: Option<ChildStdin>,
    stdout: Gathered,
    stderr: Gathered,
    read: usize,
    started: Instant,
}

impl Running {
    /// Starts `words`; its standard input is a pipe.
    pub fn start(words: &[OsString], environment: &[(&str, OsString)]) -> Outcome<Self> {
        let (program, arguments) = words.split_first().ok_or("no program to start")?;
        let mut command = Command::new(program);
        command.args(arguments).envs(environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A group of its own, so that what a test does to groups does not reach the suite.
        command.process_group(0);
        let started = Instant::now();
        let mut child = command.spawn().map_err(|error| format!("cannot start {}: {error}", program.display()))?;
        let pipes = (child.stdout.take(), child.stderr.take());
        let (Some(stdout), Some(stderr)) = pipes else { return Err("no pipes".into()) };
        let stdin = child.stdin.take();
        let words = words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
        Ok(Self {
            child,
            words,
            stdin,
            stdout: Gathered::from(stdout),
            stderr: Gathered::from(stderr),
            read: 0,
            started,
        })
    }

    /// Process id of the program.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Whether it has not ended yet.
    pub fn runs(&self) -> bool {
        let pid = self.pid();
        processes::all().iter().any(|process| process.pid == pid && !matches!(process.state, 'Z' | 'X'))
    }

    /// Writes to its standard input.
    pub fn send(&mut self, bytes: &[u8]) -> Outcome {
        let stdin = self.stdin.as_mut().ok_or("standard input is closed")?;
        stdin.write_all(bytes)?;
        Ok(stdin.flush()?)
    }

    /// Ends its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// The next line of its standard output, without the end of line.
    pub fn line(&mut self) -> Outcome<String> {
        self.line_within(DEADLINE)
    }

    /// As [`Self::line`], with another deadline.
    pub fn line_within(&mut self, deadline: Duration) -> Outcome<String> {
        let start = self.read;
        let line = self.stdout.wait(deadline, |received| {
            let rest = &received.bytes[start..];
            let length = rest.iter().position(|byte| *byte == b'\n')?;
            Some(String::from_utf8_lossy(&rest[..length]).into_owned())
        });
        match line {
            Some(line) => {
                self.read += line.len() + 1;
                Ok(line)
            }
            None => Err(self.stuck("no further line on stdout")),
        }
    }

    /// Reads a line that must be `expected`.
    pub fn expect_line(&mut self, expected: &str) -> Outcome {
        let line = self.line()?;
        ensure!(line == expected, "line {line:?} instead of {expected:?}; stderr {:?}", tail(&self.stderr.text()));
        Ok(())
    }

    /// What it wrote on standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Sends a signal to the program.
    pub fn signal(&self, signal: Signal) -> Outcome {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    /// Waits for its end, having closed its standard input.
    pub fn wait(self) -> Outcome<Ended> {
        self.wait_within(DEADLINE)
    }

    /// As [`Self::wait`], with another deadline.
    pub fn wait_within(mut self, deadline: Duration) -> Outcome<Ended> {
        self.close_stdin();
        self.wait_open(deadline)
    }

    /// Waits for its end while its standard input stays open.
    pub fn wait_open(&mut self, deadline: Duration) -> Outcome<Ended> {
        let pidfd = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())?;
        let until = self.started.max(Instant::now()) + deadline;
        let ready = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&Timespec::try_from(deadline)?))?;
        if ready == 0 {
            return Err(self.stuck("it did not end"));
        }
        let status = self.child.wait()?;
        let took = self.started.elapsed();
        if std::env::var_os("PODHULL_TEST_TRACE").is_some() {
            println!("     {:6.2} s  {}", took.as_secs_f64(), self.words);
        }
        for (name, gathered) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_secs(5));
            let ended = gathered.wait(left, |received| received.ended.then_some(()));
            if ended.is_none() {
                return Err(self.stuck(&format!("it ended, and something still holds its {name} open")));
            }
        }
        Ok(Ended {
            status: status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(-1),
            signal: status.signal(),
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
            took,
        })
    }

    /// The reason of a failure by deadline: all there is to see.
    fn stuck(&self, what: &str) -> Failure {
        format!(
            "{what} after {:.1} s; stdout {:?}, stderr {:?}, processes:{}",
            self.started.elapsed().as_secs_f64(),
            tail(&self.stdout.text()),
            tail(&self.stderr.text()),
            processes::describe(std::process::id().cast_signed())
        )
        .into()
    }
}

impl Drop for Running {
    /// A test that failed leaves nothing running; for one that waited this does nothing.
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            for process in processes::descendants(self.pid()) {
                if let Some(pid) = Pid::from_raw(process.pid) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
