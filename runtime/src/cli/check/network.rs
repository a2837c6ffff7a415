//! What the networks of pods need of the host's kernel: modules, which are not loaded to find that out.

use std::fs;
use std::path::{Path, PathBuf};

use podhull_vmm::host::{Finding, Missing};

/// Without these a pod has no network: taps, and the rule that joins one to an interface.
const NEEDED: [&str; 2] = ["tun", "nft_fwd_netdev"];

/// What is not to be had without others.
const FOR_SOME: [(&[&str], &str); 2] = [
    (&["nft_dup_netdev"], "names in networks of Docker's"),
    (&["nft_socket", "nft_tproxy"], "connections to the localhost of a pod (kubectl port-forward)"),
];

/// Looks at the kernel that runs.
pub fn findings() -> [Finding; 2] {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    Modules { there: "/sys/module".into(), lists: Path::new("/lib/modules").join(release) }.findings()
}

/// Where it is said which modules there are.
struct Modules {
    /// Has a directory for each that is loaded, and for some of what is built in.
    there: PathBuf,
    /// Where `depmod`(8) lists what is built in and what can be loaded.
    lists: PathBuf,
}

impl Modules {
    /// An error is only what is known to be missing: where nobody says, the first pod does.
    fn findings(&self) -> [Finding; 2] {
        let those =
            |state: Option<bool>| -> Vec<_> { NEEDED.into_iter().filter(|name| self.has(name) == state).collect() };
        let result = match (&those(Some(false))[..], &those(None)[..]) {
            ([], []) => Ok(format!("the kernel has {}", NEEDED.join(" and "))),
            ([], unknown) => Ok(format!("nothing says whether the kernel has {}", unknown.join(" and "))),
            (lacking, _) => Err(Missing {
                found: format!("the kernel lacks {}", lacking.join(" and ")),
                remedy: "install all of its modules, or use a kernel that has them".into(),
            }),
        };
        let lacking: Vec<_> = FOR_SOME
            .iter()
            .filter(|(names, _)| names.iter().any(|name| self.has(name) == Some(false)))
            .map(|(names, what)| format!("no {what}, for lack of {}", names.join(" and ")))
            .collect();
        let more = if lacking.is_empty() { "nothing is known to be missing".to_owned() } else { lacking.join("; ") };
        [
            Finding { subject: "networks of pods", result },
            Finding { subject: "names, forwarded ports", result: Ok(more) },
        ]
    }

    /// Whether the kernel has a module, or has it built in. `None` if nobody says, as in a container, or where modules are kept
    /// elsewhere.
    fn has(&self, name: &str) -> Option<bool> {
        if self.there.join(name).exists() {
            return Some(true);
        }
        let is_in = |list: &str| {
            let list = fs::read_to_string(self.lists.join(list)).ok()?;
            Some(list.lines().any(|line| name_of(line).is_some_and(|module| module == name)))
        };
        match (is_in("modules.builtin"), is_in("modules.dep")) {
            (Some(true), _) | (_, Some(true)) => Some(true),
            (Some(false), Some(false)) => Some(false),
            _ => None,
        }
    }
}

/// The module of a line as `kernel/net/netfilter/nft_fwd_netdev.ko.xz: kernel/net/netfilter/nf_tables.ko.xz`. The kernel knows it
/// with underscores, whatever its file has.
fn name_of(line: &str) -> Option<String> {
    let path = line.split(':').next()?;
    let (name, _) = path.rsplit('/').next()?.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_loaded_or_built_in_or_can_be_loaded_or_is_missing_or_nobody_says() {
        let directory = tempfile::tempdir().unwrap();
        let modules = Modules { there: directory.path().join("module"), lists: directory.path().join("lists") };
        let write = |list: &str, text: &str| fs::write(modules.lists.join(list), text).unwrap();
        let texts = || modules.findings().map(|finding| finding.result);
        let nothing = || Ok("nothing is known to be missing".to_owned());

        fs::create_dir_all(modules.there.join("tun")).unwrap();
        assert_eq!(texts(), [Ok("nothing says whether the kernel has nft_fwd_netdev".into()), nothing()]);

        // What is built in is known then, and not what else there is.
        fs::create_dir(&modules.lists).unwrap();
        write("modules.builtin", "kernel/net/netfilter/nft_tproxy.ko\n");
        assert_eq!(["nft_tproxy", "nft_socket"].map(|name| modules.has(name)), [Some(true), None]);

        let other = "kernel/net/netfilter/nft_fwd.ko.xz: kernel/net/netfilter/nft_fwd_netdev.ko.xz\n";
        write("modules.dep", other);
        let [needed, more] = texts();
        assert!(needed.unwrap_err().found.ends_with("lacks nft_fwd_netdev"));
        let no_names = "no names in networks of Docker's, for lack of nft_dup_netdev; ";
        assert!(more.unwrap().starts_with(&format!("{no_names}no connections to the localhost of a pod")));

        let all = "kernel/net/netfilter/nft_fwd_netdev.ko.xz: kernel/net/netfilter/nf_tables.ko.xz\n\
                   extra/nft-dup-netdev.ko:\nextra/nft_socket.ko.zst:\n";
        write("modules.dep", &format!("{other}{all}"));
        assert_eq!(texts(), [Ok("the kernel has tun and nft_fwd_netdev".into()), nothing()]);
    }
}
