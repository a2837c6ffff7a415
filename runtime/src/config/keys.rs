//! The table of all keys of the configuration: what each is for, what it may be, and whether a pod may set it for itself.

use crate::pod::{MAX_CPUS, MAX_MEMORY};

/// A key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// CPUs of a pod without a limit.
    Vcpus,
    /// Memory of a pod without a limit.
    Memory,
    /// Most CPUs of any pod.
    MaxVcpus,
    /// Most memory of any pod.
    MaxMemory,
    /// The guest kernel.
    Kernel,
    /// The guest image.
    Image,
    /// More for the guest kernel's command line.
    KernelParams,
    /// Where to keep what the guest kernel prints.
    GuestConsole,
    /// A shell for the administrator in guests.
    DebugShell,
    /// What annotations may set.
    Allow,
}

/// What a value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A whole number of CPUs.
    Cpus {
        /// At most.
        most: u64,
    },
    /// A whole number of MiB.
    Mebibytes {
        /// At least.
        least: u64,
        /// At most.
        most: u64,
    },
    /// An absolute path.
    Path,
    /// Parameters of the kernel.
    Params,
    /// A list of names of keys.
    Keys,
}

/// Whether an annotation may set a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByAnnotation {
    /// Unless `annotations.allow` leaves it out.
    Yes,
    /// If `annotations.allow` names it.
    IfAllowed,
    /// Not at all.
    Never,
}

/// A line of the table.
#[derive(Debug)]
pub struct Line {
    /// The key.
    pub key: Key,
    /// Its name: the table and the key in that.
    pub name: &'static str,
    /// What it may be.
    pub kind: Kind,
    /// What there is without it.
    pub unset: &'static str,
    /// Whether a pod may set it for itself.
    pub annotation: ByAnnotation,
    /// What it is for.
    #[cfg_attr(not(test), expect(dead_code, reason = "a test makes the documentation of it"))]
    pub what: &'static str,
}

/// Least memory of a machine that runs anything, in MiB.
const LEAST_MEMORY: u64 = 128;

const MEMORY: Kind = Kind::Mebibytes { least: LEAST_MEMORY, most: MAX_MEMORY >> 20 };
const CPUS: Kind = Kind::Cpus { most: MAX_CPUS as u64 };

/// All of them.
pub const KEYS: &[Line] = &[
    Line {
        key: Key::Vcpus,
        name: "machine.vcpus",
        kind: CPUS,
        unset: "all of the host",
        annotation: ByAnnotation::Yes,
        what: "CPUs for containers without a quota, beside what the others of the pod ask for. Of a file, as many as the \
               host has at most; of an annotation, what the pod has at least, also with quotas",
    },
    Line {
        key: Key::Memory,
        name: "machine.memory",
        kind: MEMORY,
        unset: "2048 MiB",
        annotation: ByAnnotation::Yes,
        what: "Memory for containers without a limit, beside what the others of the pod ask for. Of a file, as much as the \
               host has at most; of an annotation, what the pod has at least, also with limits",
    },
    Line {
        key: Key::MaxVcpus,
        name: "machine.max_vcpus",
        kind: CPUS,
        unset: "all of the host",
        annotation: ByAnnotation::Yes,
        what: "Most CPUs of a pod, and what its machine can grow to: each CPU it could have costs it some memory of its \
               kernel. Without it a machine can grow to 8, or to what it begins with. An annotation may lower it",
    },
    Line {
        key: Key::MaxMemory,
        name: "machine.max_memory",
        kind: MEMORY,
        unset: "all of the host",
        annotation: ByAnnotation::Yes,
        what: "Most memory of a pod: a container with a limit above it is refused, limits that come to more together share \
               it. An annotation may lower it",
    },
    Line {
        key: Key::Kernel,
        name: "machine.kernel",
        kind: Kind::Path,
        unset: "`vmlinux` as installed",
        annotation: ByAnnotation::IfAllowed,
        what: "The guest kernel: an ELF file with podhull's configuration. If `$PODHULL_LIBDIR` is set, the one in that directory is \
               taken instead of what files say",
    },
    Line {
        key: Key::Image,
        name: "machine.image",
        kind: Kind::Path,
        unset: "`guest.img` as installed",
        annotation: ByAnnotation::IfAllowed,
        what: "The guest image: an EROFS file with podhull's agent. `$PODHULL_LIBDIR`: likewise",
    },
    Line {
        key: Key::KernelParams,
        name: "machine.kernel_params",
        kind: Kind::Params,
        unset: "none",
        annotation: ByAnnotation::Yes,
        what: "Appended to the command line of the guest kernel; what an annotation says comes last. A word without `=` \
               that the kernel does not know keeps the guest from booting",
    },
    Line {
        key: Key::GuestConsole,
        name: "machine.guest_console",
        kind: Kind::Path,
        unset: "none",
        annotation: ByAnnotation::Never,
        what: "Directory in which what each pod's guest kernel prints is kept, as ID.log. It slows starts down, nothing \
               removes the files, and a guest may print as much as it likes: for a host that is being looked at",
    },
    Line {
        key: Key::DebugShell,
        name: "debug.shell",
        kind: Kind::Path,
        unset: "none: there is no `podhull debug`",
        annotation: ByAnnotation::Never,
        what: "A static program of the host, as `/bin/busybox`, that `podhull debug` executes as root in the guest of a pod. Pods \
               that were started without it refuse that",
    },
    Line {
        key: Key::Allow,
        name: "annotations.allow",
        kind: Kind::Keys,
        unset: "those with *yes*",
        annotation: ByAnnotation::Never,
        what: "Keys that a pod may set for itself, by annotations. It stands for the whole list; an empty one allows none",
    },
];

impl Key {
    /// By its name.
    pub fn find(name: &str) -> Option<Self> {
        KEYS.iter().find(|line| line.name == name).map(|line| line.key)
    }

    /// Its line of the table.
    pub fn line(self) -> &'static Line {
        // The table is in the order of the enumeration, as a test sees to.
        &KEYS[self as usize]
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.line().name
    }
}

/// What annotations may set where nobody says.
pub fn allowed_by_default() -> impl Iterator<Item = Key> {
    KEYS.iter().filter(|line| line.annotation == ByAnnotation::Yes).map(|line| line.key)
}

/// All names that annotations could have, for a message.
pub fn names() -> String {
    KEYS.iter().map(|line| line.name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_keys_and_names_each_once() {
        for (index, line) in KEYS.iter().enumerate() {
            assert_eq!(line.key as usize, index, "{}", line.name);
            assert_eq!(Key::find(line.name), Some(line.key));
            assert_eq!(line.key.name(), line.name);
        }
    }
}
