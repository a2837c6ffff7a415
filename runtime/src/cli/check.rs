//! `podhull check`: can this host run pods, and if not, why not.

mod network;

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use podhull_vmm::host::{self, Finding, Missing};
use rustix::io::Errno;

use crate::config::{Config, ConfigError};
use crate::pod::{self, ResourceError};

/// Tell whether this host can run pods, point by point, and what to do about what is missing
#[derive(clap::Args)]
#[command(after_help = "Examples:
  podhull check                              one line per point; exits with 1 if pods cannot run
  podhull check && podhull run hello         run only where it can work")]
pub struct Arguments {}

impl Arguments {
    /// Prints the report; the exit status says whether pods can run.
    pub fn execute(self) -> Result<u8, io::Error> {
        let mut findings = kvm();
        let config = Config::read();
        let used = config.as_ref().map_or_else(|_| Config::default(), Clone::clone);
        findings.extend([
            configuration(config),
            installed("guest kernel", &used.kernel(), pod::kernel),
            installed("guest image", &used.image(), pod::image),
            cgroup(),
            system_calls(),
            seccomp(),
            landlock(),
        ]);
        findings.extend(network::findings());
        findings.extend([privilege(), memory()]);
        let able = findings.iter().all(|finding| finding.result.is_ok());
        let mut text = findings.iter().map(line).collect::<String>();
        text += if able { "pods can run on this host\n" } else { "pods cannot run on this host\n" };
        io::stdout().write_all(text.as_bytes())?;
        Ok(if able { 0 } else { 1 })
    }
}

fn line(finding: &Finding) -> String {
    match &finding.result {
        Ok(found) => format!("ok       {:<24} {found}\n", finding.subject),
        Err(Missing { found, remedy }) if remedy.is_empty() => format!("missing  {:<24} {found}\n", finding.subject),
        Err(Missing { found, remedy }) => format!("missing  {:<24} {found}: {remedy}\n", finding.subject),
    }
}

/// The error says what to do already.
fn configuration(config: Result<Config, ConfigError>) -> Finding {
    let result = match config.map(|config| config.files().len()) {
        Ok(0) => Ok("none: fine, everything is as it comes".to_owned()),
        Ok(1) => Ok("one file: `podhull config show` says what is in force".to_owned()),
        Ok(count) => Ok(format!("{count} files: `podhull config show` says what is in force")),
        Err(error) => Err(missing(error.to_string(), "")),
    };
    Finding { subject: "configuration", result }
}

/// The error says what to do already.
fn installed(subject: &'static str, path: &Path, open: fn(&Path) -> Result<File, ResourceError>) -> Finding {
    let result = open(path).map(|_| path.display().to_string());
    Finding { subject, result: result.map_err(|e| missing(e.to_string().trim_start_matches(subject).trim(), "")) }
}

fn missing(found: impl Into<String>, remedy: impl Into<String>) -> Missing {
    Missing { found: found.into(), remedy: remedy.into() }
}

fn kvm() -> Vec<Finding> {
    let subject = "/dev/kvm";
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(file) => {
            let mut findings = vec![Finding { subject, result: Ok("can be opened for reading and writing".into()) }];
            match host::probe(&file) {
                Ok(more) => findings.extend(more),
                Err(error) => {
                    let result = Err(missing(error.to_string(), "is /dev/kvm really KVM?"));
                    findings.push(Finding { subject: "KVM API", result });
                }
            }
            findings
        }
        Err(error) => {
            let remedy = match error.kind() {
                io::ErrorKind::NotFound => "load kvm_intel or kvm_amd, or enable virtualization in the firmware",
                io::ErrorKind::PermissionDenied => "run as root or as a member of the group it belongs to",
                _ => "load kvm_intel or kvm_amd",
            };
            vec![Finding { subject, result: Err(missing(error.to_string(), remedy)) }]
        }
    }
}

/// The guest always has cgroup v2. On the host a container without a place for its group, and without limits, does with less; callers
/// other than people give all of theirs a place.
fn cgroup() -> Finding {
    let base = Path::new("/sys/fs/cgroup");
    let less = |what: &str| {
        format!(
            "{what}: enough for podhull run without limits; containerd, Docker, Podman and CRI-O need version 2: boot with \
             systemd.unified_cgroup_hierarchy=1"
        )
    };
    let result = if base.join("cgroup.controllers").exists() {
        "version 2".to_owned()
    } else {
        less(if base.exists() { "version 1" } else { "none" })
    };
    Finding { subject: "cgroups of the host", result: Ok(result) }
}

/// Whether the system calls that are not as old as the hills are there: called with a descriptor that is none, they say so.
fn system_calls() -> Finding {
    const NO_FD: libc::c_long = -1;
    let calls = [
        ("open_tree", libc::SYS_open_tree, "5.2"),
        ("pidfd_open", libc::SYS_pidfd_open, "5.3"),
        ("openat2", libc::SYS_openat2, "5.6"),
        ("close_range", libc::SYS_close_range, "5.9"),
        ("mount_setattr", libc::SYS_mount_setattr, "5.12"),
    ];
    let lacking = calls.iter().filter(|(_, number, _)| {
        // SAFETY: all arguments are invalid on purpose (a descriptor of -1, null pointers, a first above a last), so that
        // the calls change nothing.
        let result = unsafe { libc::syscall(*number, NO_FD, 0, 0, 0, 0) };
        result == -1 && Errno::from_io_error(&io::Error::last_os_error()) == Some(Errno::NOSYS)
    });
    let lacking: Vec<_> = lacking.map(|(name, _, since)| format!("{name} (Linux {since})")).collect();
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let result = match lacking.is_empty() {
        true => Ok(format!("Linux {release} has all that are needed")),
        false => Err(missing(format!("Linux {release} lacks {}", lacking.join(", ")), "use a newer kernel")),
    };
    Finding { subject: "system calls", result }
}

fn seccomp() -> Finding {
    let result = match Path::new("/proc/sys/kernel/seccomp/actions_avail").exists() {
        true => Ok("filters can be set".to_owned()),
        false => Err(missing("no seccomp filters", "use a kernel with CONFIG_SECCOMP_FILTER")),
    };
    Finding { subject: "seccomp", result }
}

/// One of several walls around a machine's process; the others stand without it.
fn landlock() -> Finding {
    let result = Ok(match podhull_vmm::jail::landlock() {
        Some(version) => format!("version {version}"),
        None => "none: fine, machines are confined by the other means".to_owned(),
    });
    Finding { subject: "Landlock", result }
}

fn privilege() -> Finding {
    let result = match rustix::process::geteuid().is_root() {
        true => Ok("root".to_owned()),
        false => Err(missing("not root", "run podhull as root: it clones mounts")),
    };
    Finding { subject: "privilege", result }
}

fn memory() -> Finding {
    const LEAST: u64 = 512 << 20;
    let bytes = pod::host_memory();
    let result = match bytes >= LEAST {
        true => Ok(format!("{} MiB", bytes >> 20)),
        false => Err(missing(format!("{} MiB", bytes >> 20), "a pod needs some 256 MiB, and the host its own")),
    };
    Finding { subject: "memory", result }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_aligned_and_names_the_remedy() {
        let ok = line(&Finding { subject: "a", result: Ok("b".into()) });
        let bad = line(&Finding { subject: "a", result: Err(missing("c", "d")) });
        assert_eq!(ok, format!("ok       {:<24} b\n", "a"));
        assert_eq!(bad, format!("missing  {:<24} c: d\n", "a"));
    }

    #[test]
    fn a_kernel_that_runs_this_test_suite_has_the_system_calls() {
        assert!(system_calls().result.is_ok());
    }
}
