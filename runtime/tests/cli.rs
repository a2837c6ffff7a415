//! The built program, as far as it goes without a machine: what it says, how it exits, and what it leaves behind.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};

const PODHULL: &str = env!("CARGO_BIN_EXE_podhull");

/// A directory with a bundle and a state root, removed in the end.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("podhull-cli-{}-{name}", std::process::id()));
        fs::create_dir_all(path.join("bundle/rootfs")).unwrap();
        let place = Self(path.canonicalize().unwrap());
        assert!(place.podhull(&["spec", "-b", "bundle"]).status.success());
        place
    }

    fn podhull(&self, arguments: &[&str]) -> Output {
        Command::new(PODHULL)
            .arg("--root")
            .arg(self.0.join("root"))
            .args(arguments)
            .current_dir(&self.0)
            .output()
            .unwrap()
    }

    fn config(&self) -> PathBuf {
        self.0.join("bundle/config.json")
    }

    /// Changes one value of config.json, adding what is missing on the way.
    fn set(&self, pointer: &str, value: Value) {
        let mut config: Value = serde_json::from_slice(&fs::read(self.config()).unwrap()).unwrap();
        let mut at = &mut config;
        for key in pointer.split('.') {
            at = match key.parse::<usize>() {
                Ok(index) => &mut at[index],
                Err(_) => &mut at[key],
            };
        }
        *at = value;
        fs::write(self.config(), config.to_string()).unwrap();
    }

    /// Everything below the state root, but the empty directory of pods.
    fn left(&self) -> Vec<PathBuf> {
        fn walk(path: &Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(path).into_iter().flatten().flatten() {
                found.push(entry.path());
                walk(&entry.path(), found);
            }
        }
        let mut found = Vec::new();
        walk(&self.0.join("root"), &mut found);
        found.retain(|path| *path != self.0.join("root/pods"));
        found
    }

    /// Runs, and expects one line that contains all of this, status 1, and nothing left behind.
    fn refuses(&self, arguments: &[&str], expected: &[&str]) {
        let output = self.podhull(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(text.lines().count(), 1, "{arguments:?}: {text}");
        for part in expected {
            assert!(text.contains(part), "{arguments:?}: {text:?} lacks {part:?}");
        }
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(output.stdout.is_empty());
        assert_eq!(self.left(), Vec::<PathBuf>::new(), "{arguments:?}");
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const RUN: &[&str] = &["run", "-b", "bundle", "x"];

#[test]
fn spec_writes_the_document_of_runc_and_never_overwrites() {
    let place = Place::new("spec");
    let ours: Value = serde_json::from_slice(&fs::read(place.config()).unwrap()).unwrap();
    let theirs: Value = serde_json::from_str(include_str!("golden/runc-1.1.15-spec.json")).unwrap();
    assert_eq!(ours, theirs);
    let rootless = place.0.join("rootless");
    fs::create_dir(&rootless).unwrap();
    assert!(place.podhull(&["spec", "--rootless", "--bundle", "rootless"]).status.success());
    let theirs: Value = serde_json::from_slice(&fs::read(rootless.join("config.json")).unwrap()).unwrap();
    let user = rustix::process::geteuid().as_raw();
    assert_eq!(theirs["linux"]["uidMappings"], json!([{"containerID": 0, "hostID": user, "size": 1}]));
    place.refuses(&["spec", "-b", "bundle"], &["bundle/config.json exists already"]);
    place.refuses(&["spec", "-b", "nowhere"], &["nowhere/config.json", "No such file"]);
}

#[test]
fn version_has_the_lines_callers_parse() {
    let place = Place::new("version");
    let runc = place.0.join("runc");
    std::os::unix::fs::symlink(PODHULL, &runc).unwrap();
    for (program, name) in [(Path::new(PODHULL), "podhull"), (&runc, "runc")] {
        let output = Command::new(program).arg("--version").output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let [version, commit, spec] = text.lines().collect::<Vec<_>>()[..] else { panic!("{text}") };
        assert!(version.starts_with(&format!("{name} version ")), "{text}");
        assert!(commit.starts_with("commit: "), "{text}");
        assert_eq!(spec, "spec: 1.2.0");
    }
}

#[test]
fn help_has_examples_and_wrong_arguments_are_one_line() {
    let place = Place::new("help");
    for command in ["run", "spec", "check"] {
        let output = place.podhull(&[command, "--help"]);
        assert!(output.status.success());
        assert!(String::from_utf8(output.stdout).unwrap().contains("Examples:\n  podhull"), "{command}");
    }
    place.refuses(&["run"], &["<ID>", "see podhull --help"]);
    place.refuses(&["run", "--frob", "x"], &["--frob"]);
    place.refuses(&["fly"], &["fly"]);
}

#[test]
fn a_bundle_that_is_not_one_is_refused() {
    let place = Place::new("bundle");
    place.refuses(&["run", "-b", "nowhere", "x"], &["bundle nowhere", "No such file"]);
    let config = fs::read_to_string(place.config()).unwrap();
    fs::remove_file(place.config()).unwrap();
    place.refuses(RUN, &["config.json", "No such file", "podhull spec"]);
    fs::create_dir(place.config()).unwrap();
    place.refuses(RUN, &["config.json is not a regular file"]);
    fs::remove_dir(place.config()).unwrap();
    assert!(Command::new("mkfifo").arg(place.config()).status().unwrap().success());
    place.refuses(RUN, &["config.json is not a regular file"]);
    fs::remove_file(place.config()).unwrap();
    fs::write(place.config(), b"{\n\"\xff\"").unwrap();
    place.refuses(RUN, &["config.json: line 2: not UTF-8"]);
    fs::write(place.config(), &config[..config.len() / 2]).unwrap();
    place.refuses(RUN, &["config.json: line ", "EOF while parsing"]);
    fs::write(place.config(), "[".repeat(100_000)).unwrap();
    place.refuses(RUN, &["config.json: line 1, column 128: recursion limit exceeded"]);
    fs::write(place.config(), " ".repeat(4 << 20)).unwrap();
    place.refuses(RUN, &["4194304 bytes"]);
}

#[test]
fn a_root_that_is_missing_or_reached_by_a_link_is_refused() {
    let place = Place::new("root");
    let root = place.0.join("bundle/rootfs");
    fs::remove_dir(&root).unwrap();
    place.refuses(RUN, &["root.path: ", "/bundle/rootfs: No such file"]);
    std::os::unix::fs::symlink("/", &root).unwrap();
    place.refuses(RUN, &["/bundle/rootfs is a symbolic link"]);
    fs::remove_file(&root).unwrap();
    fs::write(&root, "").unwrap();
    place.refuses(RUN, &["/bundle/rootfs: Not a directory"]);
    place.set("root.path", json!(""));
    place.refuses(RUN, &["root.path: is empty"]);
}

#[test]
fn each_unknown_word_and_each_refused_field_is_named() {
    for (pointer, value, expected) in [
        (
            "process.terminal",
            json!("yes"),
            &["config.json: line 1, column ", "process.terminal: invalid type: string"][..],
        ),
        ("process.capabilities.bounding.1", json!("CAP_FLY"), &["process.capabilities.bounding[1]: ", "CAP_FLY"]),
        ("process.rlimits.0.type", json!("RLIMIT_LUCK"), &["process.rlimits[0].type: unknown variant `RLIMIT_LUCK`"]),
        ("linux.namespaces.0.type", json!("astral"), &["linux.namespaces[0].type: unknown variant `astral`"]),
        (
            "linux.namespaces.0.path",
            json!("/dev/zero"),
            &["linux.namespaces[0].path: \"/dev/zero\" is no pid namespace"],
        ),
        ("mounts.1.options.0", json!("nosuidd"), &["mounts[1].options[0]: unknown mount option \"nosuidd\""]),
        ("mounts.1.type", json!("ext4"), &["mounts[1].type: ", "ext4"]),
        (
            "linux.seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["opne"], "action": "SCMP_ACT_ERRNO"}]}),
            &["linux.seccomp.syscalls[0].names[0]: unknown system call \"opne\""],
        ),
        (
            "linux.seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_PDP11"]}),
            &["linux.seccomp.architectures[0]: unknown variant `SCMP_ARCH_PDP11`"],
        ),
        ("linux.seccomp", json!({"defaultAction": "SCMP_ACT_NOTIFY"}), &["linux.seccomp.defaultAction: not supported"]),
        (
            "linux.resources.memory.limit",
            json!(1_u64 << 60),
            &["linux.resources.memory.limit: 1152921504606846976 bytes"],
        ),
        ("linux.intelRdt", json!({"closID": "a"}), &["linux.intelRdt: not supported"]),
        (
            "hooks.prestart",
            json!([{"path": "bin/true"}]),
            &["hooks.prestart[0].path: \"bin/true\" is not an absolute path"],
        ),
    ] {
        let place = Place::new(&format!("word-{pointer}"));
        place.set(pointer, value);
        place.refuses(RUN, expected);
    }
}

#[test]
fn ids_that_are_invalid_or_in_use_are_refused() {
    let place = Place::new("id");
    for id in ["", ".", "..", "../x", "a/b", "a b", &"x".repeat(2000)] {
        place.refuses(&["run", "-b", "bundle", id], &["invalid container id"]);
    }
    let held = place.0.join("root/held");
    fs::create_dir_all(&held).unwrap();
    let directory = fs::File::open(&held).unwrap();
    flock(directory.as_fd(), FlockOperation::LockExclusive).unwrap();
    let output = place.podhull(&["run", "-b", "bundle", "held"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        "podhull: container id \"held\" is in use: choose another, or end that container first\n"
    );
    assert!(held.exists());
}

#[test]
fn an_error_is_the_last_line_of_a_json_log() {
    let place = Place::new("log");
    let log = place.0.join("log.json");
    let output = place.podhull(&["--log", log.to_str().unwrap(), "--log-format", "json", "run", "-b", "nowhere", "x"]);
    assert_eq!(output.status.code(), Some(1));
    let text = fs::read_to_string(&log).unwrap();
    let line: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(line["level"], "error");
    assert!(line["msg"].as_str().unwrap().starts_with("bundle nowhere"));
    assert!(line["time"].as_str().unwrap().ends_with('Z'));
    assert_eq!(String::from_utf8(output.stderr).unwrap(), format!("podhull: {}\n", line["msg"].as_str().unwrap()));
}

#[test]
fn wrong_arguments_are_in_the_log_too() {
    let place = Place::new("usage-log");
    for (index, arguments) in
        [&["run"][..], &["run", "--frob", "x"], &["--frob"], &["--rootless", "true", "list"]].iter().enumerate()
    {
        let log = place.0.join(format!("log-{index}.json"));
        let given = [&["--log", log.to_str().unwrap(), "--log-format=json"], *arguments].concat();
        let output = place.podhull(&given);
        assert_eq!(output.status.code(), Some(1));
        let line: Value = serde_json::from_str(&fs::read_to_string(&log).unwrap()).unwrap();
        assert_eq!(line["level"], "error");
        let message = line["msg"].as_str().unwrap();
        assert!(message.ends_with("; see podhull --help"), "{message}");
        assert_eq!(String::from_utf8(output.stderr).unwrap(), format!("podhull: {message}\n"));
    }
    // Where there can be none, the mistake is still told.
    let output = place.podhull(&["--log", "no/such/log", "run", "--frob", "x"]);
    assert!(String::from_utf8(output.stderr).unwrap().contains("--frob"));
}

#[test]
fn checkpoints_are_refused_so_that_callers_know_before() {
    let place = Place::new("checkpoint");
    place.refuses(&["checkpoint", "--leave-running", "--image-path", "d", "x"], &["\"x\"", "does not exist"]);
    for arguments in [
        &["checkpoint", "--help"][..],
        &["checkpoint", "-h"],
        &["restore", "--help"],
        &["restore", "--image-path", "d", "--work-path", "d", "-d", "-no-subreaper", "-b", "bundle", "x"],
    ] {
        place.refuses(arguments, &[arguments[0], "not supported"]);
    }
    // How Podman asks whether pods can be restored; it looks for how Go and GNU complain.
    let output = place.podhull(&["restore", "--lsm-mount-context"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!text.contains("flag needs an argument") && !text.contains("requires an argument"), "{text}");
}

#[test]
fn check_says_what_is_missing_and_run_says_why_it_cannot() {
    let place = Place::new("check");
    let output = place.podhull(&["check"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let able = !text.lines().any(|line| line.starts_with("missing"));
    assert_eq!(output.status.code(), Some(if able { 0 } else { 1 }), "{text}");
    assert!(text.contains("/dev/kvm"), "{text}");
    let software = Path::new("/sys/module/kvm_pvm").exists()
        && !Path::new("/sys/module/kvm_intel").exists()
        && !Path::new("/sys/module/kvm_amd").exists();
    if software && Path::new("/dev/kvm").exists() {
        assert!(text.contains("missing  hardware virtualization  kvm_pvm"), "{text}");
        place.set("process.terminal", json!(false));
        place.refuses(RUN, &["/dev/kvm cannot boot a kernel: it is kvm_pvm"]);
    }
}

/// Runs in a mount namespace of its own, after these commands of a shell.
fn after(place: &Place, commands: &str) -> Output {
    then(place, commands, &format!("run -b {}/bundle x", place.0.display()))
}

/// The same with other arguments.
fn then(place: &Place, commands: &str, arguments: &str) -> Output {
    let script = format!("{commands}\nexec {PODHULL} --root {}/root {arguments}", place.0.display());
    Command::new("unshare").args(["-m", "sh", "-ec", &script]).output().unwrap()
}

/// Commands that give the host a configuration; each file's lines are on their own.
fn configuration(files: &[(&str, &str)]) -> String {
    let mut commands = "mount -t tmpfs -o mode=755 none /etc; mkdir -p /etc/podhull/config.d".to_owned();
    for (name, text) in files {
        commands += &format!("\ncat >/etc/podhull/{name} <<'END'\n{text}\nEND");
    }
    commands
}

#[test]
fn the_configuration_in_force_is_shown_with_where_it_comes_from() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let place = Place::new("config");
    let show = "config show --format json";
    let shown = |commands: &str, arguments: &str| -> Value {
        let output = then(&place, &format!("unset PODHULL_LIBDIR; {commands}"), arguments);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let of =
        |shown: &Value, key: &str| shown.as_array().unwrap().iter().find(|line| line["key"] == key).unwrap().clone();
    let none = shown("mount -t tmpfs none /etc", show);
    assert!(none.as_array().unwrap().iter().all(|line| line["from"] == "default"), "{none}");
    assert_eq!(of(&none, "machine.memory")["value"], 2048);

    let files =
        [("config.toml", "[machine]\nmemory = 256\nvcpus = 1"), ("config.d/10.toml", "[machine]\n\nmemory = 512")];
    let commands = configuration(&files);
    let some = shown(&commands, show);
    let file = |name: &str, line: u32| json!({ "file": { "path": format!("/etc/podhull/{name}"), "line": line } });
    let expected = json!({ "key": "machine.memory", "value": 512, "from": file("config.d/10.toml", 3) });
    assert_eq!(of(&some, "machine.memory"), expected);
    assert_eq!(of(&some, "machine.vcpus")["from"], file("config.toml", 3));

    let annotation = "io.katacontainers.config.hypervisor.default_memory";
    place.set("annotations", json!({ annotation: "384" }));
    let bundle = shown(&commands, &format!("{show} --bundle {}/bundle", place.0.display()));
    let expected = json!({ "key": "machine.memory", "value": 384, "from": { "annotation": annotation } });
    assert_eq!(of(&bundle, "machine.memory"), expected);

    let table = then(&place, &commands, "config show");
    let text = String::from_utf8(table.stdout).unwrap();
    let line = text.lines().find(|line| line.starts_with("machine.memory ")).unwrap();
    assert!(line.contains(" 512 MiB ") && line.ends_with(" /etc/podhull/config.d/10.toml:3"), "{text}");

    let library = shown(&format!("{commands}\nexport PODHULL_LIBDIR=/lib/x"), show);
    let expected =
        json!({ "key": "machine.kernel", "value": "/lib/x/vmlinux", "from": { "variable": "PODHULL_LIBDIR" } });
    assert_eq!(of(&library, "machine.kernel"), expected);
}

#[test]
fn a_configuration_that_is_wrong_keeps_pods_from_being_made_and_names_its_file() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let place = Place::new("wrong-config");
    let file = "/etc/podhull/config.toml";
    for (text, more, expected) in [
        ("[machine]\nmemroy = 1", "", "line 2: machine.memroy: unknown key; "),
        (
            "[hypervisor.qemu]\ndefault_memory = 1",
            "",
            "line 2: hypervisor.qemu.default_memory: is a key of Kata Containers; ",
        ),
        ("", "chown 1 /etc/podhull/config.toml", "belongs to user 1: "),
        ("", "chmod 666 /etc/podhull/config.toml", "others than root may write it (mode 0666): chmod go-w"),
    ] {
        let commands = format!("{}\n{more}", configuration(&[("config.toml", text)]));
        for arguments in [&format!("run -b {}/bundle x", place.0.display()), "config show"] {
            let output = then(&place, &commands, arguments);
            let error = String::from_utf8(output.stderr).unwrap();
            assert!(error.starts_with(&format!("podhull: {file}: {expected}")), "{error}");
            assert_eq!((output.status.code(), error.lines().count()), (Some(1), 1), "{error}");
        }
        let check = String::from_utf8(then(&place, &commands, "check").stdout).unwrap();
        assert!(check.contains(&format!("missing  {:<24} {file}: {expected}", "configuration")), "{check}");
        // What is there already is none of its business.
        assert!(then(&place, &commands, "list").status.success());
    }
    // The file of a user who may not read it.
    let commands = format!("{}\nchmod 600 {file}", configuration(&[("config.toml", "")]));
    let script = format!("{commands}\nexec setpriv --reuid 65534 --clear-groups {PODHULL} config show");
    let output = Command::new("unshare").args(["-m", "sh", "-ec", &script]).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    // Where the program itself cannot be reached by that user there is nothing to see.
    if output.status.code() == Some(1) {
        assert!(error.starts_with(&format!("podhull: {file}: cannot be read: Permission denied")), "{error}");
    }
}

#[test]
fn annotations_of_ours_and_of_kata_s_are_honoured_or_refused_by_name() {
    for (annotation, value, expected) in [
        ("io.podhull.machine.memroy", "1", "unknown; behind io.podhull. may be machine.vcpus, "),
        ("io.podhull.machine.memory", "2Gi", "\"2Gi\" is not a whole number of MiB"),
        ("io.podhull.machine.kernel", "/boot/vmlinux", "machine.kernel is not among annotations.allow (default)"),
        ("io.katacontainers.config.hypervisor.default_vcpus", "65", "65 is not between 1 and 64"),
        ("io.katacontainers.config.hypervisor.image", "/x.img", "machine.image is not among annotations.allow"),
        ("io.katacontainers.config.hypervisor.enable_iommu", "true", "\"true\": not supported: machines have no IOMMU"),
        (
            "io.katacontainers.config.hypervisor.warp",
            "9",
            "podhull knows no annotation of Kata Containers with this name",
        ),
        ("io.kubernetes.cri.sandbox-memory", "much", "\"much\" is not a whole number"),
    ] {
        let place = Place::new(&format!("annotation-{annotation}"));
        place.set("annotations", json!({ annotation: value }));
        place.refuses(RUN, &[&format!("podhull: annotation {annotation}: {expected}")]);
    }
}

#[test]
fn a_host_without_kvm_and_a_full_disk_are_named() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let place = Place::new("host");
    place.set("process.terminal", json!(false));
    let output = after(&place, "mount -t tmpfs none /dev; mknod /dev/null c 1 3");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.starts_with("podhull: /dev/kvm is not there: load kvm_intel"), "{text}");
    assert_eq!(place.left(), Vec::<PathBuf>::new());

    let full = format!("mkdir -p {0}/root; mount -t tmpfs -o size=8k,nr_inodes=2 none {0}/root", place.0.display());
    let output = after(&place, &full);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("cannot write") && text.contains("No space left on device"), "{text}");
}

/// Containers that run, as who looks at them sees them: nobody answers for their machines.
fn containers_that_run(place: &Place, count: usize) -> Vec<fs::File> {
    let held = |number: usize| {
        let id = format!("c{number}");
        let directory = place.0.join("root").join(&id);
        fs::create_dir_all(&directory).unwrap();
        let process = json!({ "pid": i32::MAX, "startTime": 1 });
        let state = json!({
            "version": 1, "ociVersion": "1.2.0", "id": id, "pid": i32::MAX, "startTime": 1, "status": "running",
            "bundle": "/b", "rootfs": "/r", "created": "2026-01-01T00:00:00Z", "machine": process,
        });
        fs::write(directory.join("state.json"), state.to_string()).unwrap();
        let directory = fs::File::open(&directory).unwrap();
        flock(&directory, FlockOperation::LockExclusive).unwrap();
        directory
    };
    (0..count).map(held).collect()
}

#[test]
fn of_many_pods_none_is_left_out() {
    let place = Place::new("many");
    let _held = containers_that_run(&place, 60);
    let limited = |soft: u64, hard: u64, words: &[&str]| {
        let mut command = Command::new("prlimit");
        command.arg(format!("--nofile={soft}:{hard}")).arg(PODHULL).arg("--root").arg(place.0.join("root"));
        command.args(words).output().unwrap()
    };
    for words in [&["pods", "--format", "json"][..], &["metrics"]] {
        let output = limited(40, 1000, words);
        let text = String::from_utf8(output.stdout).unwrap();
        let found = match words[0] {
            "pods" => serde_json::from_str::<Vec<Value>>(&text).unwrap().len(),
            _ => text.matches("\npodhull_pod_info{").count(),
        };
        assert_eq!(found, 60, "{words:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    }
    // What cannot be had is named.
    for words in [&["pods"][..], &["metrics"], &["list"]] {
        let output = limited(40, 40, words);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && text.contains("Too many open files"), "{words:?}: {text}");
    }
}
