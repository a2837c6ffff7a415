//! Network namespaces of the host, as callers make them, and what is between them.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::thread;

use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::Outcome;
use crate::run::{Ended, Running};
use crate::suite::Scene;

/// A network namespace that lives by a file, as those of `ip netns` and of CNI do.
pub struct Netns {
    /// The file.
    pub path: PathBuf,
    mounted: bool,
}

impl Netns {
    /// A new one, in which `lo` is up.
    pub fn new(scene: &Scene, name: &str) -> Outcome<Self> {
        let path = scene.make_directory(name)?.join("netns");
        File::create(&path)?;
        let place = path.clone();
        let made = thread::spawn(move || {
            // SAFETY: the network of this thread alone, which ends here.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
            mount_bind("/proc/thread-self/ns/net", &place)
        });
        made.join().map_err(|_| "the thread panicked")??;
        let netns = Self { path, mounted: true };
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// One that others keep, at a path.
    pub fn at(path: &Path) -> Self {
        Self { path: path.into(), mounted: false }
    }

    /// That of a process.
    pub fn of(pid: i32) -> Self {
        Self { path: format!("/proc/{pid}/ns/net").into(), mounted: false }
    }

    /// `ip` in it, with these words.
    pub fn ip(&self, words: &str) -> Outcome<String> {
        self.run(&["ip"].into_iter().chain(words.split(' ')).collect::<Vec<_>>())?.output()
    }

    /// Does something in it, on a thread of its own.
    pub fn within<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Outcome<T> {
        let netns = File::open(&self.path)?;
        let done = thread::spawn(move || {
            move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok::<_, rustix::io::Errno>(work())
        });
        Ok(done.join().map_err(|_| "the thread panicked")??)
    }

    /// A program in it, to its end.
    pub fn run(&self, words: &[&str]) -> Outcome<Ended> {
        self.start(words)?.wait()
    }

    /// A program in it.
    pub fn start(&self, words: &[&str]) -> Outcome<Running> {
        let mut net = OsString::from("--net=");
        net.push(&self.path);
        let all: Vec<OsString> =
            ["nsenter".into(), net, "--".into()].into_iter().chain(words.iter().map(OsString::from)).collect();
        Running::start(&all, &[])
    }

    /// Connects it to another with a pair of interfaces, both up; addresses are given with their prefixes.
    pub fn connect(&self, name: &str, addresses: &[&str], other: &Self, peer: &str, theirs: &[&str]) -> Outcome {
        // Made where it is not looked at yet, as network plugins do.
        other.ip(&format!("link add {peer} type veth peer name tmp-{name}"))?;
        other.ip(&format!("link set tmp-{name} netns {} name {name}", self.path.display()))?;
        for (netns, name, addresses) in [(self, name, addresses), (other, peer, theirs)] {
            for address in addresses {
                // The addresses are all ours: nobody else can have them.
                let nodad = if address.contains(':') { " nodad" } else { "" };
                netns.ip(&format!("address add {address} dev {name}{nodad}"))?;
            }
            netns.ip(&format!("link set {name} up"))?;
        }
        Ok(())
    }

    /// What others than its maker may have left in it: further interfaces, tables, rules.
    pub fn leftovers(&self) -> Outcome<String> {
        let mut left = String::new();
        for words in ["ip -o link", "tc qdisc show", "nft list ruleset"] {
            let found = self.run(&words.split(' ').collect::<Vec<_>>())?.output()?;
            left += found
                .lines()
                .filter(|line| line.contains("podhull") || line.contains("ingress") || line.contains("clsact"))
                .collect::<Vec<_>>()
                .join("\n")
                .as_str();
        }
        Ok(left)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if self.mounted {
            let _ = unmount(&self.path, UnmountFlags::DETACH);
            let _ = fs::remove_file(&self.path);
            let _ = self.path.parent().map(fs::remove_dir);
        }
    }
}

/// The path in a specification.
impl AsRef<Path> for Netns {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}
