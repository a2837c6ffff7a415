//! A process executed in a container that is there: into its namespaces and its root, with nothing of the guest left to it.
//!
//! It is in the container's control group and pid namespace from the start ([`super::launch`]). From then on the container can
//! see it, and everything it meets inside is the container's: paths are opened without waiting and checked before use, and the
//! container's `/proc` is not looked at.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::capabilities::{self, Capabilities};
use super::gate::Gate;
use super::init::{Config, InitError, Places};
use super::namespaces::Namespaces;
use super::rootfs::{Rootfs, last_errno};
use super::seccomp::Filter;
use super::terminal::Terminal;
use super::{affinity, keyring, process};
use crate::spec::{Process, Spec};

/// Joins the container and becomes the program.
pub fn run(
    socket: &OwnedFd,
    places: Places,
    config: &Config<'_>,
    spec: &Spec,
    process: &Process,
) -> Result<std::convert::Infallible, InitError> {
    // Its memory is the agent's business until execve, which undoes this.
    capabilities::prctl(libc::PR_SET_DUMPABLE, 0, 0).map_err(InitError::Hide)?;
    let capabilities = Capabilities::of(process.capabilities.as_ref())?;
    let filter = spec.linux.seccomp.as_ref().map(Filter::compile).transpose()?;
    if let Some(affinity) = &process.exec_cpu_affinity {
        affinity::set("initial", &affinity.initial)?;
        affinity::set("final", &affinity.last)?;
    }

    let namespaces = Namespaces::of(spec)?;
    join_namespaces(namespaces, places)?;
    rustix::process::setsid().map_err(InitError::Session)?;
    keyring::join(&config.id)?;
    if !spec.has_namespace("mount") {
        Rootfs::open_shared(&config.rootfs)?.change_root()?;
    }
    let terminal = match process.terminal {
        true => Some(Terminal::open(&Rootfs::current()?, &config.window, process.user.uid)?),
        false => None,
    };
    let gate = Gate {
        socket,
        places,
        process,
        env: process::environment(process)?,
        capabilities,
        filter: filter.as_ref(),
        personality: spec.linux.personality.as_ref(),
        terminal,
        holds_pod: false,
    };
    gate.pass(|| Ok(()))
}

fn join_namespaces(namespaces: Namespaces, places: Places) -> Result<(), InitError> {
    // SAFETY: the agent starts us with this descriptor open, and nothing else uses it.
    let init = unsafe { OwnedFd::from_raw_fd(places.join()) };
    let mut flags = namespaces.clone_flags & !u64::from(libc::CLONE_NEWPID.unsigned_abs());
    if namespaces.cgroup {
        flags |= u64::from(libc::CLONE_NEWCGROUP.unsigned_abs());
    }
    if flags != 0 {
        setns(&init, flags as libc::c_int).map_err(InitError::Join)?;
    }
    if namespaces.time {
        // SAFETY: the agent starts us with this descriptor open, and nothing else uses it.
        let time = unsafe { OwnedFd::from_raw_fd(places.join() + 1) };
        setns(&time, libc::CLONE_NEWTIME).map_err(InitError::JoinTime)?;
    }
    if namespaces.user {
        // Nobody until now, in the words of the container.
        // SAFETY: the calls take no pointers.
        let root = unsafe {
            libc::syscall(libc::SYS_setresgid, 0, 0, 0) == 0 && libc::syscall(libc::SYS_setresuid, 0, 0, 0) == 0
        };
        if !root {
            return Err(InitError::Root(last_errno()));
        }
    }
    Ok(())
}

/// `setns(2)`; to the namespaces of a process where the descriptor is a pidfd.
pub fn setns(fd: &OwnedFd, flags: libc::c_int) -> Result<(), rustix::io::Errno> {
    // SAFETY: the call takes no pointers; namespaces have no say in memory or descriptors.
    if unsafe { libc::setns(fd.as_raw_fd(), flags) } < 0 { Err(last_errno()) } else { Ok(()) }
}
