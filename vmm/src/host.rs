//! Whether a host's KVM can run machines, and if not, what is missing.

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};

/// The only version of the API there has ever been since it became stable (Linux, `virt/kvm/api.rst`, 4.1).
const API_VERSION: i32 = 12;

/// What a machine cannot do without, and what it is for.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "guest memory"),
    (Cap::SplitIrqchip, "local APICs in the kernel alone (split irqchip)"),
    (Cap::SignalMsi, "message-signalled interrupts"),
    (Cap::Ioeventfd, "notifications by eventfd (ioeventfd)"),
    (Cap::TscDeadlineTimer, "the TSC-deadline timer"),
    (Cap::ImmediateExit, "leaving a vCPU at once (immediate_exit)"),
    (Cap::ExtCpuid, "CPUID of the guest"),
    (Cap::Clocksource, "the paravirtual clock"),
];

/// One point of a host that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at, a few words.
    pub subject: &'static str,
    /// What is there, or what is not.
    pub result: Result<String, Missing>,
}

/// Something a machine needs and the host does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// What was found in its place.
    pub found: String,
    /// What to do about it.
    pub remedy: String,
}

/// Why this host's KVM boots no kernel, if it is known not to.
///
/// `kvm_pvm` offers the API of KVM without hardware virtualization. It runs guest user code at full speed, but a guest
/// kernel by emulation of too few instructions for any stock kernel.
pub fn cannot_boot() -> Option<String> {
    let module = |name: &str| Path::new("/sys/module").join(name).exists();
    (module("kvm_pvm") && !module("kvm_intel") && !module("kvm_amd")).then(|| {
        "it is kvm_pvm, on a CPU without hardware virtualization; use a host with VMX or SVM, or the software host"
            .to_owned()
    })
}

/// Whether an open file is KVM, of the version that every machine needs.
pub fn is_kvm(file: &File) -> bool {
    file.try_clone().is_ok_and(|file| {
        // SAFETY: the descriptor is a fresh duplicate that nothing else owns.
        unsafe { Kvm::from_raw_fd(file.into_raw_fd()) }.get_api_version() == API_VERSION
    })
}

/// Looks at an open `/dev/kvm` and the CPU behind it, point by point.
pub fn probe(kvm: &File) -> std::io::Result<Vec<Finding>> {
    // SAFETY: the descriptor is a fresh duplicate that nothing else owns.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.try_clone()?.into_raw_fd()) };
    Ok(vec![version(&kvm), virtualization(), nesting(), capabilities(&kvm), vcpus(&kvm)])
}

fn version(kvm: &Kvm) -> Finding {
    let result = match kvm.get_api_version() {
        API_VERSION => Ok(format!("version {API_VERSION}")),
        version => Err(Missing {
            found: format!("version {version}"),
            remedy: format!("podhull needs version {API_VERSION}: is /dev/kvm really KVM?"),
        }),
    };
    Finding { subject: "KVM API", result }
}

/// Whether `/proc/cpuinfo` has a flag.
fn cpu_flag(flag: &str) -> bool {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    flags.split_ascii_whitespace().any(|word| word == flag)
}

fn virtualization() -> Finding {
    let result = match (cannot_boot(), cpu_flag("vmx"), cpu_flag("svm")) {
        (Some(_), ..) => Err(Missing {
            found: "kvm_pvm: KVM in software, which cannot boot a kernel".into(),
            remedy:
                "use a CPU with VMX or SVM (enable it in the firmware, or nesting in the hypervisor below), or the \
                     software host: make host"
                    .into(),
        }),
        (None, true, _) => Ok("Intel VMX".into()),
        (None, _, true) => Ok("AMD SVM".into()),
        (None, false, false) => Err(Missing {
            found: "the CPU has neither VMX nor SVM".into(),
            remedy: "enable virtualization in the firmware, or nesting in the hypervisor below".into(),
        }),
    };
    Finding { subject: "hardware virtualization", result }
}

fn nesting() -> Finding {
    let text = if cpu_flag("hypervisor") {
        "this host is a virtual machine itself: pods run nested, and slower"
    } else {
        "this host is a physical machine"
    };
    Finding { subject: "nesting", result: Ok(text.into()) }
}

fn capabilities(kvm: &Kvm) -> Finding {
    let missing: Vec<_> = NEEDED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, what)| *what).collect();
    let result = if missing.is_empty() {
        Ok(format!("all {} that are needed", NEEDED.len()))
    } else {
        Err(Missing {
            found: format!("lacks {}", missing.join(", ")),
            remedy: "use a newer kernel (5.12 or later)".into(),
        })
    };
    Finding { subject: "KVM capabilities", result }
}

fn vcpus(kvm: &Kvm) -> Finding {
    Finding { subject: "vCPUs of a pod", result: Ok(format!("up to {}", kvm.get_max_vcpus().min(64))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kvm_that_opens_is_described_point_by_point() {
        let Ok(kvm) = File::options().read(true).write(true).open("/dev/kvm") else {
            eprintln!("skipped: no /dev/kvm here");
            return;
        };
        let findings = probe(&kvm).unwrap();
        assert_eq!(findings[0], Finding { subject: "KVM API", result: Ok("version 12".into()) });
        let hardware = findings.iter().find(|f| f.subject == "hardware virtualization").unwrap();
        assert_eq!(hardware.result.is_err(), cannot_boot().is_some() || !(cpu_flag("vmx") || cpu_flag("svm")));
    }
}
