//! A machine that another process holds, through its control socket.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use podhull_vmm::control::{ChannelError, Measured, Notice, Request, Resource};
use tokio::io::unix::AsyncFd;

use super::{MachineError, receive, send};

/// Name of the socket in the pod's directory.
pub const CONTROL_SOCKET: &str = "control.sock";

/// How long a machine may take to answer: what it is asked for here takes milliseconds, on a host that is not very busy.
const DEADLINE: Duration = Duration::from_secs(30);

/// How long a guest may take for the memory it was given. A host so slow is one that has none.
const MEMORY_DEADLINE: Duration = Duration::from_secs(30);

/// A connection to a machine's control socket. The machine does not end with it.
pub struct Control {
    socket: AsyncFd<OwnedFd>,
    /// An answer did not come in time, and would be taken for that of the next request.
    lost: bool,
}

impl Control {
    /// Connects to the machine whose socket is in a pod's directory; needs an event loop.
    pub fn dial(pod: BorrowedFd<'_>) -> Result<Self, MachineError> {
        let socket = crate::stdio::connect_packets(pod, CONTROL_SOCKET, DEADLINE).map_err(MachineError::Dial)?;
        rustix::io::ioctl_fionbio(&socket, true).map_err(|e| MachineError::Dial(e.into()))?;
        Self::speak(socket)
    }

    /// The same without holding up the event loop, in a process that sees the host's files: a machine that takes no more connections is
    /// not waited for.
    pub fn dial_in_loop(pod: BorrowedFd<'_>) -> Result<Self, MachineError> {
        Self::speak(crate::stdio::connect_packets_in_loop(pod, CONTROL_SOCKET).map_err(MachineError::Dial)?)
    }

    fn speak(socket: OwnedFd) -> Result<Self, MachineError> {
        // SAFETY: the descriptor is owned by the AsyncFd from here on, and never replaced.
        let socket = unsafe { AsyncFd::register(socket) }.map_err(|e| MachineError::Watch(e.into()))?;
        Ok(Self { socket, lost: false })
    }

    /// Puts what the descriptors are into the machine: all of it or nothing.
    pub async fn add(&mut self, resources: Vec<Resource>, fds: &[OwnedFd]) -> Result<(), MachineError> {
        self.request(&Request::Add { resources, devices: Vec::new() }, fds).await
    }

    /// Creates vCPUs.
    pub async fn set_cpus(&mut self, cpus: u32) -> Result<(), MachineError> {
        self.request(&Request::SetCpus(cpus), &[]).await
    }

    /// Sets how much memory the guest should have.
    pub async fn set_memory(&mut self, bytes: u64) -> Result<(), MachineError> {
        self.request(&Request::SetMemory(bytes), &[]).await
    }

    /// Waits until the guest's kernel has the memory that it should have, which it sees only if it has seen the device.
    pub async fn await_memory(&mut self) -> Result<(), MachineError> {
        done(self.exchange(&Request::AwaitMemory, &[], MEMORY_DEADLINE, MachineError::MemoryNotTaken).await?)
    }

    /// What the machine is in numbers.
    pub async fn measure(&mut self) -> Result<Measured, MachineError> {
        match self.exchange(&Request::Measure, &[], DEADLINE, MachineError::Silent).await? {
            Notice::Measured(measured) => Ok(measured),
            other => done(other).and(Err(not_for_us())),
        }
    }

    async fn request(&mut self, request: &Request, fds: &[OwnedFd]) -> Result<(), MachineError> {
        done(self.exchange(request, fds, DEADLINE, MachineError::Silent).await?)
    }

    async fn exchange(
        &mut self,
        request: &Request,
        fds: &[OwnedFd],
        deadline: Duration,
        late: fn(Duration) -> MachineError,
    ) -> Result<Notice, MachineError> {
        if self.lost {
            return Err(ChannelError::Closed.into());
        }
        let exchange = async {
            send(&self.socket, request, fds).await?;
            receive(&self.socket).await
        };
        self.lost = true;
        let notice = tokio::time::timeout(deadline, exchange).await.map_err(|_| late(deadline))??;
        self.lost = false;
        Ok(notice)
    }
}

/// What is asked for was done.
fn done(notice: Notice) -> Result<(), MachineError> {
    match notice {
        Notice::Done => Ok(()),
        Notice::Failed(message) => Err(MachineError::Failed(message)),
        Notice::AgentReady { .. } | Notice::Measured(_) | Notice::Ended(_) => Err(not_for_us()),
    }
}

fn not_for_us() -> MachineError {
    ChannelError::Malformed("a notice that is not for this socket".into()).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use podhull_vmm::control;
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    use std::os::fd::AsFd;

    /// A directory with a control socket, and who serves it.
    fn served(serve: impl FnOnce(OwnedFd) + Send + 'static) -> (tempfile::TempDir, std::thread::JoinHandle<()>) {
        let directory = tempfile::tempdir().unwrap();
        let flags = SocketFlags::CLOEXEC;
        let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let path = directory.path().join(CONTROL_SOCKET);
        rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        (directory, std::thread::spawn(move || serve(rustix::net::accept(listener).unwrap())))
    }

    #[tokio::test]
    async fn what_is_asked_arrives_with_its_descriptors_and_the_answer_is_heard() {
        let (directory, server) = served(|client| {
            let (request, fds): (Request, _) = control::receive(&client).unwrap();
            let Request::Add { resources, devices } = request else { panic!("{request:?}") };
            assert_eq!(resources, [Resource::Tap { mac: [2, 0, 0, 0, 0, 1], mtu: 1500 }]);
            assert!(devices.is_empty() && fds.len() == 1);
            control::send(&client, &Notice::Done, &[]).unwrap();
            assert!(matches!(control::receive(&client).unwrap(), (Request::SetCpus(3), _)));
            control::send(&client, &Notice::Failed("no".into()), &[]).unwrap();
            assert!(matches!(control::receive(&client).unwrap(), (Request::SetMemory(7), _)));
            drop(client);
        });
        let pod = std::fs::File::open(directory.path()).unwrap();
        let mut control = Control::dial(pod.as_fd()).unwrap();
        let fds = [pod.try_clone().unwrap().into()];
        control.add(vec![Resource::Tap { mac: [2, 0, 0, 0, 0, 1], mtu: 1500 }], &fds).await.unwrap();
        assert!(matches!(control.set_cpus(3).await, Err(MachineError::Failed(why)) if why == "no"));
        // The machine went away; what comes now would be an answer to what was asked then.
        assert!(matches!(control.set_memory(7).await, Err(MachineError::Channel(ChannelError::Closed))));
        assert!(matches!(control.set_cpus(1).await, Err(MachineError::Channel(ChannelError::Closed))));
        server.join().unwrap();
    }

    #[tokio::test]
    async fn memory_that_is_not_taken_in_time_is_named_and_its_answer_is_for_no_other_request() {
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let (directory, server) = served(move |client| {
            for answered in [true, false] {
                assert!(matches!(control::receive(&client).unwrap(), (Request::AwaitMemory, _)));
                if answered {
                    control::send(&client, &Notice::Done, &[]).unwrap();
                }
            }
            let _ = wait.recv();
        });
        let pod = std::fs::File::open(directory.path()).unwrap();
        let mut control = Control::dial(pod.as_fd()).unwrap();
        control.await_memory().await.unwrap();
        let (deadline, late) = (Duration::from_millis(20), MachineError::MemoryNotTaken);
        let late = control.exchange(&Request::AwaitMemory, &[], deadline, late).await;
        assert!(matches!(late, Err(MachineError::MemoryNotTaken(waited)) if waited == deadline));
        assert!(matches!(control.set_cpus(1).await, Err(MachineError::Channel(ChannelError::Closed))));
        drop(end);
        server.join().unwrap();
    }

    #[tokio::test]
    async fn a_machine_that_is_gone_cannot_be_reached() {
        let directory = tempfile::tempdir().unwrap();
        let pod = std::fs::File::open(directory.path()).unwrap();
        assert!(matches!(Control::dial(pod.as_fd()), Err(MachineError::Dial(_))));
        let (directory, server) = served(drop);
        let pod = std::fs::File::open(directory.path()).unwrap();
        let mut control = Control::dial(pod.as_fd()).unwrap();
        server.join().unwrap();
        assert!(matches!(control.set_cpus(1).await, Err(MachineError::Channel(ChannelError::Closed))));
        assert!(matches!(Control::dial(pod.as_fd()), Err(MachineError::Dial(_))));
    }

    #[tokio::test]
    async fn a_machine_that_takes_no_connections_holds_up_no_loop() {
        let directory = tempfile::tempdir().unwrap();
        let flags = SocketFlags::CLOEXEC;
        let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let path = directory.path().join(CONTROL_SOCKET);
        rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let pod = std::fs::File::open(directory.path()).unwrap();
        let began = std::time::Instant::now();
        let mut waiting = Vec::new();
        let full = loop {
            match Control::dial_in_loop(pod.as_fd()) {
                Ok(control) if waiting.len() < 100 => waiting.push(control),
                refused => break refused.err().map(|error| error.to_string()),
            }
        };
        assert!(full.is_some_and(|error| error.contains("temporarily unavailable")), "{}", waiting.len());
        assert!(!waiting.is_empty() && began.elapsed() < DEADLINE / 2, "{:?}", began.elapsed());
        // Those that are in are answered when it goes on.
        let server = std::thread::spawn(move || {
            let client = rustix::net::accept(listener).unwrap();
            assert!(matches!(control::receive(&client).unwrap(), (Request::SetCpus(1), _)));
            control::send(&client, &Notice::Done, &[]).unwrap();
        });
        waiting[0].set_cpus(1).await.unwrap();
        server.join().unwrap();
    }
}
