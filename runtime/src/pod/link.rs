//! What a shadow and the command that makes it say to each other: a `SOCK_SEQPACKET` socket pair with messages in JSON, as
//! on the channel to a machine. The command writes [`Order`]s, the shadow [`News`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use oci_spec::runtime::LinuxNamespaceType;
use podhull_vmm::control::{self, ChannelError, Resource};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use super::network::Wiring;
use super::users::Users;
use crate::config::Settings;
use crate::state::Membership;

/// Descriptor at which the shadow finds its end.
pub const LINK_FD: i32 = 3;

/// Longest error or warning that is passed on, in bytes.
const MAX_TEXT: usize = 32 * 1024;

/// What the command wants.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// The first. Attached are, in this order and as far as there is one, the channel to its machine, the terminal, the
    /// process whose namespaces it is to join (a pidfd), the `process` to execute in a file, the mount namespace of the machine
    /// of its pod, the namespaces that it is to be in, and the program's descriptors.
    Begin(Box<Begin>),
    /// The pod's network, before the first [`Order::GoOn`] and only if there is one. Attached are what the agent is told of
    /// it, in a file, and what the resources are.
    Network(Vec<Resource>),
    /// The file of the limit of memory of the container's control group, before the first [`Order::GoOn`]; attached. See
    /// [`super::starve`].
    MemoryLimit,
    /// What the shadow waits for was done.
    GoOn,
}

/// What a shadow has to know and cannot find out.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub struct Begin {
    /// Its process id as the command, and the host, count.
    pub pid: i32,
    /// When the command began, by the host's monotonic clock.
    pub began: u64,
    /// The process of the machine.
    pub machine: Option<i32>,
    /// What the machine is made with.
    pub settings: Settings,
    /// Whether a terminal is attached, which is to be the container's.
    pub terminal: bool,
    /// Whether a process is attached, which stands for the container.
    pub container: bool,
    /// Whether a file with the `process` to execute is attached.
    pub process: bool,
    /// Whether the command stays, and the container, or the program, ends with it.
    pub foreground: bool,
    /// Whether the container stays when it has ended, until `delete`.
    pub kept: bool,
    /// The pod it joins, if the container is to have no machine of its own.
    pub pod: Option<Membership>,
    /// Namespaces that are other containers' of that pod.
    pub shared: Vec<Shared>,
    /// Its users, if its user namespace is another container's or the caller's.
    pub users: Option<Users>,
    /// Types of the namespaces that are attached.
    pub namespaces: Vec<LinuxNamespaceType>,
    /// How many descriptors are attached that the program is to have beyond its standard streams, and how many of them are
    /// listening sockets that it is to be told of.
    pub descriptors: usize,
    pub listening: usize,
    /// Whether the container has no program, and holds its pod open for others.
    pub holds_pod: bool,
    /// Whether a service manager waits for the program to say that it is ready.
    pub notify: bool,
}

/// A namespace that a container has from another one of its pod.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Shared {
    /// Its type.
    pub kind: LinuxNamespaceType,
    /// Id of the other.
    pub container: String,
}

/// How far a shadow is.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum News {
    /// It is in its namespaces. It waits for [`Order::GoOn`] before the container is made.
    Entered,
    /// The container is made, or the program executed. In the foreground the container's program waits for
    /// [`Order::GoOn`], else for somebody to ask the agent.
    Made,
    /// The program runs; in the foreground only.
    Started,
    /// Something the user should know.
    Warning(String),
    /// The last: why there is no container, or no more; one line.
    Failed(String),
    /// The last: the machine's process has closed its channel, and did not say why.
    MachineGone,
}

/// The command at the other end is gone, or speaks in tongues.
#[derive(Debug, thiserror::Error)]
#[error("who asked for it is gone: {0}")]
pub struct LinkError(#[from] ChannelError);

/// What a shadow begins with.
pub struct Given {
    /// What it is told.
    pub begin: Begin,
    /// The channel to its machine.
    pub channel: Option<OwnedFd>,
    /// The terminal of its container.
    pub terminal: Option<OwnedFd>,
    /// The process that stands for its container. Its number would mean another here, in its pid namespace.
    pub container: Option<OwnedFd>,
    /// The `process` to execute, as JSON: what the command line names may be readable once.
    pub process: Option<File>,
    /// The mount namespace of its pod's machine, if that is another's.
    pub mounts: Option<OwnedFd>,
    /// Namespaces to be in.
    pub namespaces: Vec<(LinuxNamespaceType, OwnedFd)>,
    /// What the program is to have beyond its standard streams.
    pub descriptors: Vec<OwnedFd>,
}

/// What a shadow is handed when it is in its namespaces.
#[derive(Default)]
pub struct Handed {
    /// The pod's network.
    pub network: Option<Wiring>,
    /// The file of the limit of memory of its control group.
    pub memory_limit: Option<OwnedFd>,
}

/// The shadow's end.
pub struct Creator(OwnedFd);

impl Creator {
    /// Takes the descriptor that this process was started with; `None` if it was not. To be called once, and first.
    pub fn inherited() -> Option<Self> {
        // SAFETY: who makes shadows put the socket there, and nothing else has opened anything yet; fcntl tells if it is
        // not open.
        let fd = unsafe {
            if libc::fcntl(LINK_FD, libc::F_SETFD, libc::FD_CLOEXEC) != 0 {
                return None;
            }
            OwnedFd::from_raw_fd(LINK_FD)
        };
        rustix::net::sockopt::socket_type(&fd).ok().filter(|kind| *kind == rustix::net::SocketType::SEQPACKET)?;
        Some(Self(fd))
    }

    /// Waits for the first order and what comes with it.
    pub fn begin(&self) -> Result<Given, LinkError> {
        match control::receive(&self.0)? {
            (Order::Begin(begin), fds) => {
                let mut fds = fds.into_iter();
                let mut next = |given: bool| if given { fds.next() } else { None };
                let channel = next(begin.machine.is_some());
                let terminal = next(begin.terminal);
                let container = next(begin.container);
                let process = next(begin.process).map(File::from);
                let mounts = next(begin.pod.is_some());
                let namespaces = begin.namespaces.iter().copied().zip(fds.by_ref()).collect();
                let descriptors = fds.take(begin.descriptors).collect();
                Ok(Given { begin: *begin, channel, terminal, container, process, mounts, namespaces, descriptors })
            }
            (order, _) => Err(ChannelError::Malformed(format!("{order:?} is not how one begins")).into()),
        }
    }

    /// Tells how far this is.
    pub fn tell(&self, news: &News) -> Result<(), LinkError> {
        Ok(control::send(&self.0, news, &[])?)
    }

    /// Tells something that may be long.
    pub fn tell_text(&self, news: fn(String) -> News, text: &str) -> Result<(), LinkError> {
        let end = (0..=MAX_TEXT.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        self.tell(&news(text[..end].to_owned()))
    }

    /// To wait for orders; needs a runtime.
    pub fn orders(&self) -> io::Result<Orders> {
        let socket = self.0.try_clone()?;
        rustix::io::ioctl_fionbio(&socket, true)?;
        // SAFETY: the descriptor is owned by the AsyncFd from here on, and never replaced.
        Ok(Orders(unsafe { AsyncFd::register(socket) }?))
    }
}

/// The orders that come after the first.
pub struct Orders(AsyncFd<OwnedFd>);

impl Orders {
    /// Waits for [`Order::GoOn`]; an error if the command is gone.
    pub async fn go_on(&self) -> Result<(), LinkError> {
        match self.next().await? {
            (Order::GoOn, _) => Ok(()),
            (order, _) => Err(ChannelError::Malformed(format!("{order:?} in the middle")).into()),
        }
    }

    /// Waits for the first [`Order::GoOn`], and takes what comes before it.
    pub async fn entered(&self) -> Result<Handed, LinkError> {
        let mut handed = Handed::default();
        loop {
            match self.next().await? {
                (Order::GoOn, _) => return Ok(handed),
                (Order::Network(resources), fds) => {
                    let wiring = Wiring::receive(resources, fds);
                    let wiring = wiring.ok_or_else(|| ChannelError::Malformed("no description of the network".into()));
                    handed.network = Some(wiring?);
                }
                (Order::MemoryLimit, fds) => handed.memory_limit = fds.into_iter().next(),
                (order, _) => return Err(ChannelError::Malformed(format!("{order:?} in the middle")).into()),
            }
        }
    }

    async fn next(&self) -> Result<(Order, Vec<OwnedFd>), LinkError> {
        loop {
            match control::receive(self.0.get_ref().as_fd()) {
                Err(ChannelError::Io(Errno::WOULDBLOCK)) => match self.0.readable().await {
                    Ok(mut guard) => guard.clear_ready(),
                    Err(_) => return Err(ChannelError::Closed.into()),
                },
                received => return Ok(received?),
            }
        }
    }
}
