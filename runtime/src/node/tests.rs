//! Nodes made of a directory: what containerd would find there, and what is left of it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tempfile::TempDir;
use toml::de::DeTable;

use super::containerd::{plugin, tables};
use super::*;

const V2: &str =
    "version = 2\n# the administrator's\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"pause\"";
const V3: &str = "version = 3\n\n[plugins.'io.containerd.cri.v1.runtime'.containerd]\ndefault_runtime_name = 'runc'\n";
const RUNC: &str = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\nruntime_type = \"x\"\n";

struct Made {
    directory: TempDir,
    said: Vec<String>,
}

impl Made {
    fn of(files: &[(&str, &str)]) -> Self {
        let made = Self { directory: TempDir::new().unwrap(), said: Vec::new() };
        fs::create_dir_all(made.path("/proc")).unwrap();
        for (path, text) in files {
            made.write(path, text);
        }
        made
    }

    fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join("node").join(path.trim_start_matches('/'))
    }

    fn write(&self, path: &str, text: &str) {
        fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
        fs::write(self.path(path), text).unwrap();
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn node(&self) -> Node {
        Node { tree: Tree::new(self.path("/")), config: None, offline: true }
    }

    /// Files of a podhull that differs from others in its guest image.
    fn files(&self, image: &str) -> Files {
        let file = |name: &str, text: &str| {
            let path = self.directory.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        Files::of(file("podhull", "program"), file("vmlinux", "kernel"), file(image, image)).unwrap()
    }

    fn install(&mut self, image: &str) -> Result<(), NodeError> {
        let handlers = ["kata", "podhull"].map(str::to_owned);
        let files = self.files(image);
        self.said.clear();
        let node = self.node();
        node.install(&files, &handlers, &mut |text| self.said.push(text.into()))
    }

    fn uninstall(&mut self) -> Result<(), NodeError> {
        self.said.clear();
        let node = self.node();
        node.uninstall(&mut |text| self.said.push(text.into()))
    }

    /// A process of the current version, or its end.
    fn process(&self, pid: u32, runs: bool) {
        let directory = self.path(&format!("/proc/{pid}"));
        if runs {
            fs::create_dir(&directory).unwrap();
            let program = self.path("/opt/podhull/current/bin/podhull").canonicalize().unwrap();
            symlink(program, directory.join("exe")).unwrap();
        } else {
            fs::remove_dir_all(directory).unwrap();
        }
    }

    /// Each file, what is in it, and who may do what with it.
    fn files_of(&self, path: &str) -> BTreeMap<PathBuf, (Vec<u8>, u32)> {
        fn gather(directory: &Path, found: &mut BTreeMap<PathBuf, (Vec<u8>, u32)>) {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                let metadata = path.symlink_metadata().unwrap();
                if metadata.is_dir() {
                    gather(&path, found);
                } else {
                    let text = fs::read_link(&path).map(|to| to.into_os_string().into_encoded_bytes());
                    let text = text.unwrap_or_else(|_| fs::read(&path).unwrap());
                    found.insert(path, (text, metadata.permissions().mode()));
                }
            }
        }
        let mut found = BTreeMap::new();
        gather(&self.path(path), &mut found);
        found
    }

    fn versions(&self) -> usize {
        fs::read_dir(self.path("/opt/podhull/versions")).unwrap().count()
    }
}

/// The path of the shim that a file names for a handler.
fn shim_of(text: &str, plugin: &str, handler: &str) -> Option<String> {
    let document = DeTable::parse(text).unwrap_or_else(|error| panic!("{error} in {text}")).into_inner();
    let mut table = &document;
    for key in ["plugins", plugin, "containerd", "runtimes", handler] {
        table = table.get(key)?.get_ref().as_table()?;
    }
    table.get("runtime_path")?.get_ref().as_str().map(str::to_owned)
}

/// Installs, looks where the tables went, installs again, and removes.
fn whole_life(files: &[(&str, &str)], changed: &str, plugin: &str) -> Made {
    let mut made = Made::of(files);
    for (path, _) in files {
        fs::set_permissions(made.path(path), fs::Permissions::from_mode(0o640)).unwrap();
    }
    let before = made.files_of("/");
    made.install("one").unwrap();
    let text = made.read(changed);
    if !changed.ends_with(".tmpl") {
        for handler in ["kata", "podhull"] {
            assert_eq!(shim_of(&text, plugin, handler).as_deref(), Some(containerd::SHIM), "{text}");
        }
    }
    assert!(made.said.contains(&format!("{changed} is changed")), "{:?}", made.said);
    for (path, original) in files {
        assert!(made.read(path).starts_with(original.trim_end_matches('\n')), "{path}");
        assert_eq!(made.path(path).metadata().unwrap().permissions().mode() & 0o7777, 0o640, "{path}");
        assert!(*path == changed || made.read(path) == *original, "{path} is changed too");
    }

    let once = made.files_of("/");
    made.install("one").unwrap();
    assert_eq!(made.files_of("/"), once);
    assert_eq!(made.said.len(), 1, "{:?}", made.said);

    made.uninstall().unwrap();
    assert_eq!(made.files_of("/"), before);
    assert!(!made.path("/opt/podhull").exists());
    made.uninstall().unwrap();
    assert_eq!(made.said, ["podhull is not installed"]);
    made
}

const CONFIG: &str = "/etc/containerd/config.toml";

#[test]
fn without_a_configuration_one_is_made_and_removed() {
    whole_life(&[], CONFIG, plugin(2));
}

#[test]
fn containerd_1_has_the_tables_at_the_end_of_its_file() {
    let made = whole_life(&[(CONFIG, V2)], CONFIG, plugin(2));
    assert_eq!(made.read(CONFIG), V2);
    let empty_lines = format!("{V2}\n\n{RUNC}\n\n\n");
    assert_eq!(whole_life(&[(CONFIG, &empty_lines)], CONFIG, plugin(2)).read(CONFIG), empty_lines);
}

#[test]
fn containerd_1_takes_the_table_of_the_last_file_that_has_one() {
    let config = format!("imports = [\"conf.d/*.toml\", \"/etc/other.toml\"]\n{V2}\n");
    let files = [
        (CONFIG, config.as_str()),
        ("/etc/containerd/conf.d/10-runtimes.toml", RUNC),
        ("/etc/containerd/conf.d/20-debug.toml", "version = 2\n[debug]\nlevel = \"info\"\n"),
        ("/etc/other.toml", "oom_score = -999\n"),
    ];
    whole_life(&files, "/etc/containerd/conf.d/10-runtimes.toml", plugin(2));
}

#[test]
fn containerd_2_has_a_file_of_ours_where_it_imports_a_directory() {
    let config = format!("imports = ['/etc/containerd/conf.d/*.toml']\n{V3}");
    let made = whole_life(&[(CONFIG, &config)], "/etc/containerd/conf.d/podhull.toml", plugin(3));
    assert_eq!(made.read(CONFIG), config);
    whole_life(&[(CONFIG, V3)], CONFIG, plugin(3));
    let one = format!("imports = ['/etc/containerd/conf.d/1*.toml']\n{V3}");
    whole_life(&[(CONFIG, &one)], CONFIG, plugin(3));
    let fourth = V3.replacen('3', "4", 1);
    whole_life(&[(CONFIG, &fourth)], CONFIG, plugin(4));
}

#[test]
fn k3s_and_rke2_have_them_in_the_template_of_their_file() {
    for distribution in ["k3s", "rke2"] {
        let directory = format!("/var/lib/rancher/{distribution}/agent/etc/containerd");
        let (config, template) = (format!("{directory}/config.toml"), format!("{directory}/config.toml.tmpl"));
        // containerd's own path is not what kubelet's containerd reads here.
        let made = whole_life(&[(&config, V2), (CONFIG, V3)], &template, plugin(2));
        assert!(!made.path(&template).exists());
        let templates = [(config.as_str(), V2), (template.as_str(), "{{ template \"base\" . }}\n[more]\n")];
        whole_life(&templates, &template, plugin(2));
        let template = format!("{directory}/config-v3.toml.tmpl");
        whole_life(&[(&config, V3)], &template, plugin(3));
        let imports = format!("imports = ['{directory}/config-v3.toml.d/*.toml']\n{V3}");
        whole_life(&[(&config, &imports)], &format!("{directory}/config-v3.toml.d/podhull.toml"), plugin(3));
    }
}

#[test]
fn what_k3s_has_made_of_its_template_is_no_reason_to_stop() {
    let config = "/var/lib/rancher/k3s/agent/etc/containerd/config.toml";
    let mut made = Made::of(&[(config, V2)]);
    made.install("one").unwrap();
    let template = made.read(&format!("{config}.tmpl"));
    let (_, ours) = template.split_once("}}\n").unwrap();
    made.write(config, &format!("{V2}{ours}"));
    made.install("one").unwrap();
    assert_eq!(made.said.len(), 1, "{:?}", made.said);
    made.uninstall().unwrap();
    assert!(!made.path(&format!("{config}.tmpl")).exists());
}

#[test]
fn what_the_administrator_adds_meanwhile_stays() {
    let mut made = Made::of(&[(CONFIG, V2)]);
    made.install("one").unwrap();
    let text = made.read(CONFIG);
    made.write(CONFIG, &format!("# before\n{text}# after\n"));
    made.install("one").unwrap();
    made.uninstall().unwrap();
    assert_eq!(made.read(CONFIG), format!("# before\n{V2}# after\n"));
}

#[test]
fn an_upgrade_leaves_pods_the_version_they_have() {
    let mut made = Made::of(&[(CONFIG, V2)]);
    made.install("one").unwrap();
    let (config, first) = (made.read(CONFIG), fs::read_link(made.path("/opt/podhull/current")).unwrap());
    made.process(4242, true);
    made.install("two").unwrap();
    assert_eq!(made.read(CONFIG), config, "containerd need not be told");
    assert_ne!(fs::read_link(made.path("/opt/podhull/current")).unwrap(), first);
    assert_eq!(made.read("/opt/podhull/current/lib/podhull/guest.img"), "two");
    assert_eq!(
        fs::read_to_string(made.path("/opt/podhull").join(&first).join("lib/podhull/guest.img")).unwrap(),
        "one"
    );

    let refused = made.uninstall().unwrap_err().to_string();
    assert!(refused.contains("the first is 4242"), "{refused}");
    assert_eq!((made.versions(), made.read(CONFIG)), (2, config));

    made.process(4242, false);
    made.install("two").unwrap();
    assert_eq!(made.versions(), 1);
    made.uninstall().unwrap();
    assert_eq!(made.read(CONFIG), V2);
}

#[test]
fn a_process_that_cannot_be_looked_at_is_no_reason_to_take_it_for_nobody_s() {
    let mut made = Made::of(&[(CONFIG, V2)]);
    made.install("one").unwrap();
    // One that is gone, and the kernel's own, have no program; that this one cannot be looked at says nothing.
    fs::create_dir(made.path("/proc/1")).unwrap();
    symlink("nothing", made.path("/proc/1/exe")).unwrap();
    fs::create_dir(made.path("/proc/2")).unwrap();
    symlink("exe", made.path("/proc/2/exe")).unwrap();
    let config = made.read(CONFIG);
    let refused = made.uninstall().unwrap_err().to_string();
    assert!(refused.contains("/proc/2/exe"), "{refused}");
    assert_eq!(made.read(CONFIG), config);
    fs::remove_dir_all(made.path("/proc/2")).unwrap();
    made.uninstall().unwrap();
}

#[test]
fn a_node_whose_processes_are_not_to_be_seen_has_some() {
    let mut made = Made::of(&[(CONFIG, V2)]);
    made.install("one").unwrap();
    let config = made.read(CONFIG);
    let node = Node { offline: false, ..made.node() };
    let refused = node.uninstall(&mut |_| {}).unwrap_err().to_string();
    assert!(refused.contains("the node's processes are not in"), "{refused}");
    assert_eq!(made.read(CONFIG), config);
}

#[test]
fn what_containerd_cannot_be_restarted_for_is_not_begun() {
    for files in [&[(CONFIG, V2)][..], &[]] {
        let mut made = Made::of(files);
        made.install("one").unwrap();
        let config = made.read(CONFIG);
        // There is nobody to be asked to.
        fs::create_dir(made.path("/proc/1")).unwrap();
        let node = Node { offline: false, ..made.node() };
        let mut said = Vec::new();
        let refused = node.uninstall(&mut |text| said.push(text.to_owned())).unwrap_err().to_string();
        assert!(refused.contains("/proc/1/ns/mnt"), "{refused}");
        assert_eq!((made.read(CONFIG), said.len()), (config, 0), "{said:?}");
        // With the next attempt it goes on.
        made.uninstall().unwrap();
        assert!(!made.path("/opt/podhull").exists());
    }
}

#[test]
fn what_is_left_in_a_configuration_is_taken_out_without_the_files() {
    let mut made = Made::of(&[(CONFIG, V2)]);
    made.install("one").unwrap();
    fs::remove_dir_all(made.path("/opt/podhull")).unwrap();
    made.uninstall().unwrap();
    assert_eq!(made.read(CONFIG), V2);
    assert!(!made.path("/opt/podhull").exists());
    made.uninstall().unwrap();
    assert_eq!(made.said, ["podhull is not installed"]);
    // Where there is nothing of ours, what cannot be understood is nobody's business.
    let mut made = Made::of(&[(CONFIG, "version = \n")]);
    made.uninstall().unwrap();
    assert!(made.said[0].starts_with("podhull is not installed; "), "{:?}", made.said);
}

#[test]
fn one_installer_works_at_a_time() {
    let mut made = Made::of(&[]);
    made.install("one").unwrap();
    let tree = made.node().tree;
    let locked = |operation| flock(fs::File::open(made.path("/opt/podhull")).unwrap(), operation);
    for take in [|tree: &Tree| Versions::find(tree).unwrap().unwrap(), |tree: &Tree| Versions::make(tree).unwrap()] {
        let versions = take(&tree);
        assert_eq!(locked(FlockOperation::NonBlockingLockExclusive), Err(Errno::WOULDBLOCK));
        drop(versions);
        assert_eq!(locked(FlockOperation::NonBlockingLockExclusive), Ok(()));
    }
    // What another has taken away meanwhile is made again.
    let other = fs::File::open(made.path("/opt/podhull")).unwrap();
    flock(&other, FlockOperation::LockExclusive).unwrap();
    let waiting = std::thread::spawn(move || Versions::make(&tree).map(drop));
    fs::remove_dir_all(made.path("/opt/podhull")).unwrap();
    drop(other);
    waiting.join().unwrap().unwrap();
    assert!(made.path("/opt/podhull").exists());
}

#[test]
fn files_that_were_cut_short_are_put_there_again() {
    let mut made = Made::of(&[]);
    made.install("one").unwrap();
    made.write("/opt/podhull/current/lib/podhull/vmlinux", "ker");
    fs::create_dir(made.path("/opt/podhull/versions/.unfinished")).unwrap();
    made.install("one").unwrap();
    assert_eq!(made.read("/opt/podhull/current/lib/podhull/vmlinux"), "kernel");
    assert_eq!(made.versions(), 1);
}

#[test]
fn what_cannot_be_understood_is_refused_and_left_alone() {
    let inline = "version = 2\nplugins = { \"io.containerd.grpc.v1.cri\" = { sandbox_image = \"pause\" } }\n";
    let taken = format!("{V2}\n{}", RUNC.replace("runc", "kata"));
    let pattern = "version = 3\nimports = [\"/etc/*/conf.toml\"]\n";
    for (text, expected) in [
        ("disabled_plugins = [\"cri\"]\n", "version 1"),
        ("version = 5\n", "version 5"),
        ("version = \n", "cannot be added to"),
        (inline, "cannot be added to"),
        (taken.as_str(), "runtime \"kata\""),
        (pattern, "only patterns of names"),
    ] {
        let mut made = Made::of(&[(CONFIG, text)]);
        let refused = made.install("one").unwrap_err().to_string();
        assert!(refused.contains(expected) && refused.contains("config.toml"), "{text}: {refused}");
        assert_eq!(made.read(CONFIG), text);
        assert!(!made.path("/opt").exists(), "{text}");
    }
    let mut made = Made::of(&[("/etc/containerd/real.toml", V2)]);
    symlink("real.toml", made.path(CONFIG)).unwrap();
    assert!(made.install("one").unwrap_err().to_string().contains("symbolic link"));
}

#[test]
fn links_of_the_node_do_not_lead_out_of_it() {
    let mut made = Made::of(&[("/var/opt/x", ""), ("/etc/x", "")]);
    let outside = made.directory.path().join("outside");
    fs::create_dir(&outside).unwrap();
    // As on systems whose /usr cannot be written; seen from the installer the target is another directory.
    symlink("/var/opt", made.path("/opt")).unwrap();
    symlink(&outside, made.path("/etc/containerd")).unwrap();
    let refused = made.install("one").unwrap_err().to_string();
    assert!(refused.contains("containerd"), "{refused}");
    fs::remove_file(made.path("/etc/containerd")).unwrap();
    made.install("one").unwrap();
    assert!(made.path("/var/opt/podhull/current/bin/containerd-shim-kata-v2").exists());
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn the_files_for_administrators_say_the_same() {
    for version in [2, 3] {
        let path = format!("{}/../deploy/containerd/version-{version}.toml", env!("CARGO_MANIFEST_DIR"));
        let what = match version {
            2 => "the tables are for the end of /etc/containerd/config.toml",
            _ => {
                "a file for /etc/containerd/conf.d where that is imported; else the tables are for the end of config.toml"
            }
        };
        let what = format!(
            "# What containerd is told of podhull where its configuration has `version = {version}`: {what}.\n\
             # Made of runtime/src/node/containerd.rs: PODHULL_WRITE_DOCS=1 cargo test -p podhull the_files\n"
        );
        let handlers = ["kata", "podhull"].map(str::to_owned);
        let text = format!("{what}version = {version}\n\n{}", tables(plugin(version), &handlers, None));
        if std::env::var_os("PODHULL_WRITE_DOCS").is_some() {
            fs::create_dir_all(Path::new(&path).parent().unwrap()).unwrap();
            fs::write(&path, &text).unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap_or_default(), text, "{path} is stale: see its first lines");
        let page = include_str!("../../../docs/kubernetes.md");
        let kata = tables(plugin(version), &handlers[..1], None);
        assert!(page.contains(&format!("```toml\n{kata}```\n")), "docs/kubernetes.md: {kata}");
    }
}
