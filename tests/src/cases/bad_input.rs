//! What must not start: each ends with status 1, one line that names what and where, and nothing left behind.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{long, podhull};
use crate::bundle::Bundle;
use crate::leaks::Leaks;
use crate::run::{DEADLINE, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure};

pub const CASES: &[Case] = &[
    podhull("bad_input::bundles_that_are_none", bundles_that_are_none),
    podhull("bad_input::wrong_types", wrong_types),
    podhull("bad_input::unknown_words", unknown_words),
    podhull("bad_input::roots_that_are_not_there", roots_that_are_not_there),
    podhull("bad_input::ids", ids),
    podhull("bad_input::files_of_the_caller", files_of_the_caller),
    podhull("bad_input::a_kvm_that_does_not_serve", a_kvm_that_does_not_serve),
    podhull("bad_input::a_full_disk", a_full_disk),
    podhull("bad_input::more_memory_than_the_host_has", more_memory_than_the_host_has),
    podhull("bad_input::a_corrupt_kernel", a_corrupt_kernel),
    podhull("bad_input::a_corrupt_image", a_corrupt_image),
    long(podhull("bad_input::a_guest_that_stands_still", a_guest_that_stands_still)),
];

/// Collects what is wrong with a whole table, so that one run shows all of it.
struct Table<'a> {
    scene: &'a Scene,
    wrong: Vec<String>,
}

impl<'a> Table<'a> {
    fn new(scene: &'a Scene) -> Self {
        Self { scene, wrong: Vec::new() }
    }

    /// Runs a command line that must be refused with one line that holds all of `names`.
    fn refuses(&mut self, what: &str, names: &[&str], words: &[OsString], environment: &[(&str, OsString)]) -> Outcome {
        let before = Leaks::watch();
        let ended = Running::start(words, environment)?.wait_within(2 * DEADLINE);
        let mut wrong = Vec::new();
        match ended {
            Ok(ended) => {
                if ended.status != 1 {
                    wrong.push(format!("exit status {}", ended.status));
                }
                if ended.stderr.lines().count() != 1 {
                    wrong.push(format!("{} lines", ended.stderr.lines().count()));
                }
                wrong.extend(
                    names.iter().filter(|name| !ended.stderr.contains(**name)).map(|name| format!("no {name:?}")),
                );
                if !ended.stdout.is_empty() {
                    wrong.push(format!("stdout {:?}", ended.stdout));
                }
                if !wrong.is_empty() {
                    let said: String = ended.stderr.chars().take(1500).collect();
                    wrong.push(format!("it said {said:?}"));
                }
            }
            Err(error) => {
                wrong.push(error.to_string());
                crate::leaks::kill_leftovers();
            }
        }
        if let Err(error) = before.check() {
            wrong.push(error.to_string());
        }
        if !wrong.is_empty() {
            self.wrong.push(format!("{what}: {}", wrong.join(", ")));
        }
        Ok(())
    }

    /// A run of what lies in `directory`.
    fn refuses_directory(&mut self, what: &str, names: &[&str], directory: &Path) -> Outcome {
        let words = self.scene.runtime.run_words(directory, &self.scene.id());
        self.refuses(what, names, &words, &[])
    }

    /// A run of a bundle.
    fn refuses_bundle(&mut self, what: &str, names: &[&str], bundle: &Bundle) -> Outcome {
        bundle.write()?;
        self.refuses_directory(what, names, &bundle.directory)
    }

    /// A run of a good bundle in a mount namespace of its own that a shell script has changed before.
    fn refuses_after(&mut self, what: &str, names: &[&str], script: &str) -> Outcome {
        let bundle = self.scene.debian()?.sh("echo started");
        bundle.write()?;
        let script = format!("set -e\n{script}\nset +e\n\"$@\"");
        let mut words: Vec<OsString> =
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", &script, "sh"].map(Into::into).into();
        words.extend(self.scene.runtime.run_words(&bundle.directory, &self.scene.id()));
        self.refuses(what, names, &words, &[("DIRECTORY", self.scene.make_directory("place")?.into())])
    }

    fn outcome(self) -> Outcome {
        ensure!(self.wrong.is_empty(), "{} rows:\n  {}", self.wrong.len(), self.wrong.join("\n  "));
        Ok(())
    }
}

fn bundles_that_are_none(scene: &Scene) -> Outcome {
    let mut table = Table::new(scene);
    let missing = scene.directory.join("no-such-bundle");
    table.refuses_directory("no bundle", &[&missing.to_string_lossy()], &missing)?;
    let empty = scene.make_directory("empty")?;
    table.refuses_directory("no config.json", &["config.json", &empty.to_string_lossy()], &empty)?;
    let texts = [
        ("cut off", "{\n  \"ociVersion\": \"1.2.0\",\n", "line 3, column 0"),
        ("a member without a value", "{\n  \"ociVersion\": \"1.2.0\",\n  \"process\": }\n", "line 3, column 14"),
        ("empty", "", "line 1, column 0"),
        ("binary", "\u{1}\u{2}", "line 1, column 1"),
        ("a list", "[]", "object"),
    ];
    for (what, text, place) in texts {
        let directory = scene.make_directory("broken")?;
        fs::write(directory.join("config.json"), text)?;
        table.refuses_directory(
            &format!("broken JSON, {what}"),
            &[&directory.to_string_lossy(), "config.json", place],
            &directory,
        )?;
    }
    let directory = scene.make_directory("directory")?;
    fs::create_dir(directory.join("config.json"))?;
    table.refuses_directory("config.json is a directory", &["config.json"], &directory)?;
    table.outcome()
}

fn wrong_types(scene: &Scene) -> Outcome {
    let mut table = Table::new(scene);
    let rows: [(&str, Value, &str); 12] = [
        ("/process/args", json!("sh"), "process.args"),
        ("/process/user/uid", json!("root"), "process.user.uid"),
        ("/process/user/uid", json!(-1), "process.user.uid"),
        ("/process/env", json!({ "A": "b" }), "process.env"),
        ("/process/noNewPrivileges", json!(1), "process.noNewPrivileges"),
        ("/root/readonly", json!("yes"), "root.readonly"),
        ("/root", json!([]), "root"),
        ("/hostname", json!(5), "hostname"),
        ("/mounts", json!({}), "mounts"),
        ("/mounts/0/destination", json!(null), "mounts"),
        ("/linux/resources/memory/limit", json!("64M"), "linux.resources.memory.limit"),
        ("/linux/namespaces", json!("all"), "linux.namespaces"),
    ];
    for (pointer, value, name) in rows {
        let mut bundle = scene.debian()?.sh("true");
        // `set` makes objects; an item of a list is there already.
        match bundle.config.pointer_mut(pointer) {
            Some(place) => *place = value.clone(),
            None => bundle = bundle.set(pointer, value.clone()),
        }
        table.refuses_bundle(&format!("{pointer} is {value}"), &["config.json", name], &bundle)?;
    }
    let rows: [(&str, Value, &[&str]); 6] = [
        ("/ociVersion", json!("9.0.0"), &["ociVersion", "9.0.0"]),
        ("/process/args", json!([]), &["process.args"]),
        ("/process/cwd", json!("relative"), &["process.cwd", "relative"]),
        ("/process", Value::Null, &["process"]),
        ("/linux/cgroupsPath", json!("/../../escape"), &["cgroupsPath", "/../../escape"]),
        (
            "/linux/resources/unified",
            json!({ "../cgroup.procs": "1" }),
            &["linux.resources.unified", "../cgroup.procs"],
        ),
    ];
    for (pointer, value, names) in rows {
        let bundle = scene.debian()?.sh("true").set(pointer, value.clone());
        table.refuses_bundle(&format!("{pointer} is {value}"), names, &bundle)?;
    }
    table.outcome()
}

fn unknown_words(scene: &Scene) -> Outcome {
    let mut table = Table::new(scene);
    let seccomp = |architectures: Value, name: &str, action: &str| {
        json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": architectures,
            "syscalls": [{ "names": [name], "action": action }],
        })
    };
    let ours = json!(["SCMP_ARCH_X86_64"]);
    let set: [(&str, &str, Value, &[&str]); 9] = [
        (
            "capability",
            "/process/capabilities/bounding",
            json!(["CAP_KILL", "CAP_FLY"]),
            &["process.capabilities", "CAP_FLY"],
        ),
        ("capability", "/process/capabilities/ambient", json!(["kill"]), &["process.capabilities", "kill"]),
        (
            "resource",
            "/process/rlimits",
            json!([{ "type": "RLIMIT_WINGS", "soft": 1, "hard": 1 }]),
            &["process.rlimits", "RLIMIT_WINGS"],
        ),
        (
            "namespace",
            "/linux/namespaces",
            json!([{ "type": "mount" }, { "type": "astral" }]),
            &["linux.namespaces", "astral"],
        ),
        (
            "syscall",
            "/linux/seccomp",
            seccomp(ours.clone(), "open_the_door", "SCMP_ACT_ERRNO"),
            &["linux.seccomp", "open_the_door"],
        ),
        ("action", "/linux/seccomp", seccomp(ours, "mkdir", "SCMP_ACT_SHOUT"), &["linux.seccomp", "SCMP_ACT_SHOUT"]),
        (
            "architecture",
            "/linux/seccomp",
            seccomp(json!(["SCMP_ARCH_ABACUS"]), "mkdir", "SCMP_ACT_ERRNO"),
            &["linux.seccomp", "SCMP_ARCH_ABACUS"],
        ),
        (
            "architecture",
            "/linux/seccomp",
            seccomp(json!(["SCMP_ARCH_S390X"]), "mkdir", "SCMP_ACT_ERRNO"),
            &["linux.seccomp", "SCMP_ARCH_S390X"],
        ),
        ("propagation", "/linux/rootfsPropagation", json!("upwards"), &["linux.rootfsPropagation", "upwards"]),
    ];
    for (what, pointer, value, names) in set {
        table.refuses_bundle(&format!("unknown {what}"), names, &scene.debian()?.sh("true").set(pointer, value))?;
    }
    let mount = json!({ "destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "levitate"] });
    let bundle = scene.debian()?.sh("true").push("/mounts", mount);
    table.refuses_bundle("unknown mount option", &["mounts", "levitate"], &bundle)?;
    let mount = json!({ "destination": "/mnt", "type": "floatfs", "source": "none" });
    let bundle = scene.debian()?.sh("true").push("/mounts", mount);
    table.refuses_bundle("unknown file system", &["mounts", "floatfs"], &bundle)?;
    table.outcome()
}

fn roots_that_are_not_there(scene: &Scene) -> Outcome {
    let mut table = Table::new(scene);
    let bundle = scene.bundle_on(Path::new("/"))?.set("/root/path", json!("rootfs"));
    let root = bundle.directory.join("rootfs");
    table.refuses_bundle("missing root", &[&root.to_string_lossy(), "No such file"], &bundle)?;
    std::os::unix::fs::symlink("/", &root)?;
    table.refuses_bundle("root symlinked to the host's", &[&root.to_string_lossy()], &bundle)?;
    fs::remove_file(&root)?;
    std::os::unix::fs::symlink("../../../../usr", &root)?;
    table.refuses_bundle("root symlinked out of the bundle", &[&root.to_string_lossy()], &bundle)?;
    fs::remove_file(&root)?;
    fs::write(&root, "")?;
    table.refuses_bundle("root is a file", &[&root.to_string_lossy()], &bundle)?;
    let source = scene.directory.join("no-such-source");
    let bundle = scene.debian()?.sh("true").bind(&source, "/mnt", &["bind"]);
    table.refuses_bundle("missing source of a mount", &[&source.to_string_lossy()], &bundle)?;
    table.outcome()
}

fn ids(scene: &Scene) -> Outcome {
    let mut table = Table::new(scene);
    let bundle = scene.debian()?.sh("true");
    bundle.write()?;
    let long = "a".repeat(2000);
    for id in ["../x", "", "a/b", ".", "..", "a b", "caf\u{e9}", "new\nline", &long] {
        let shown: String = id.chars().take(20).collect();
        let named = if id.contains('\n') { "new" } else { &shown };
        let words = scene.runtime.run_words(&bundle.directory, id);
        table.refuses(&format!("id {shown:?}"), &["id", named], &words, &[])?;
    }
    let words = [scene.runtime.program().into(), "run".into(), "-b".into(), bundle.directory.clone().into()];
    table.refuses("no id", &["ID"], &words, &[])?;

    // An id in use: the second is refused, the first goes on.
    let id = scene.id();
    let bundle = scene.debian()?.sh("echo ready; read line; echo $line");
    bundle.write()?;
    let words = scene.runtime.run_words(&bundle.directory, &id);
    let mut first = Running::start(&words, &[])?;
    first.expect_line("ready")?;
    table.refuses("an id in use", &[&id, "in use"], &words, &[])?;
    first.send(b"still here\n")?;
    first.expect_line("still here")?;
    first.wait()?.expect_status(0)?;
    // And is free again afterwards.
    let mut again = Running::start(&words, &[])?;
    again.expect_line("ready")?;
    again.wait()?.expect_status(0)?;
    table.outcome()
}

fn files_of_the_caller(scene: &Scene) -> Outcome {
    let mut table = Table::new(scene);
    let bundle = scene.debian()?.sh("true");
    bundle.write()?;
    let nowhere = scene.directory.join("nowhere/file");
    for flag in ["--pid-file", "--console-socket"] {
        let terminal = bundle.clone().set("/process/terminal", json!(flag == "--console-socket"));
        terminal.write()?;
        let mut words = scene.runtime.run_words(&bundle.directory, &scene.id());
        words.splice(2..2, [flag.into(), nowhere.clone().into()]);
        table.refuses(flag, &[&nowhere.to_string_lossy()], &words, &[])?;
    }
    bundle.write()?;
    let file = scene.directory.join("file");
    fs::write(&file, "")?;
    let mut words = scene.runtime.run_words(&bundle.directory, &scene.id());
    words.splice(1..1, ["--root".into(), file.join("below").into()]);
    table.refuses("--root below a file", &[&file.to_string_lossy()], &words, &[])?;
    table.outcome()
}

fn a_kvm_that_does_not_serve(scene: &Scene) -> Outcome {
    let mut table = Table::new(scene);
    // -n: mount(8) keeps no record under /run.
    let absent = "
mount -n -t tmpfs none $DIRECTORY
cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty /dev/ptmx /dev/net $DIRECTORY
mkdir $DIRECTORY/pts $DIRECTORY/shm
mount -n --rbind /dev/pts $DIRECTORY/pts
mount -n --move $DIRECTORY /dev";
    table.refuses_after("no /dev/kvm", &["/dev/kvm"], absent)?;
    // Not even root may open a device on a mount without devices.
    let denied = "mount -n --bind /dev/kvm /dev/kvm\nmount -n -o remount,bind,nodev /dev/kvm";
    table.refuses_after("no permission on /dev/kvm", &["/dev/kvm", "ermission"], denied)?;
    table.refuses_after("a /dev/kvm that is something else", &["/dev/kvm"], "mount -n --bind /dev/null /dev/kvm")?;
    table.outcome()
}

fn a_full_disk(scene: &Scene) -> Outcome {
    let mut table = Table::new(scene);
    // What stays in the small file system after the refusal goes to stderr, where it is a line too many.
    let fill = "mkdir -p /run/podhull\nmount -n -t tmpfs -o size=8k,nr_inodes=64 none /run/podhull
! head -c 100000 /dev/zero >/run/podhull/.full 2>/dev/null
run() { \"$@\"; status=$?; find /run/podhull -mindepth 1 ! -name .full ! -name pods >&2; return $status; }
set -- run \"$@\"";
    table.refuses_after("no block left under /run", &["/run/podhull", "No space"], fill)?;
    let fill = "mkdir -p /run/podhull\nmount -n -t tmpfs -o nr_inodes=1 none /run/podhull";
    table.refuses_after("no inode left under /run", &["/run/podhull", "No space"], fill)?;
    table.outcome()
}

fn more_memory_than_the_host_has(scene: &Scene) -> Outcome {
    let mut table = Table::new(scene);
    let text = fs::read_to_string("/proc/meminfo")?;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).ok_or("no MemTotal")?;
    let total: u64 = total.trim().trim_end_matches(" kB").parse()?;
    for factor in [4, 4096] {
        let limit = total * 1024 * factor;
        let bundle = scene.debian()?.sh("true").set("/linux/resources/memory", json!({ "limit": limit }));
        table.refuses_bundle(&format!("{factor} times the host's memory"), &["memory"], &bundle)?;
    }
    table.outcome()
}

fn a_corrupt_kernel(scene: &Scene) -> Outcome {
    corrupt(scene, "vmlinux", true)
}

fn a_corrupt_image(scene: &Scene) -> Outcome {
    corrupt(scene, "guest.img", false)
}

/// A kernel that does nothing is waited for, and where it is is said.
fn a_guest_that_stands_still(scene: &Scene) -> Outcome {
    let mut table = Table::new(scene);
    let mut kernel = fs::read(installed().join("vmlinux"))?;
    let number = |at: usize, bytes: usize| -> Outcome<usize> {
        let field = kernel.get(at..at + bytes).ok_or("the kernel is no ELF file")?;
        Ok(field
            .iter()
            .rev()
            .try_fold(0_usize, |sum, byte| sum.checked_mul(256)?.checked_add((*byte).into()))
            .ok_or("too much")?)
    };
    // The first program header, and the entry in what it loads: `struct elf64_hdr` and `struct elf64_phdr`.
    let (entry, header) = (number(24, 8)?, number(32, 8)?);
    let (offset, address) = (number(header + 8, 8)?, number(header + 24, 8)?);
    let at = offset + entry.checked_sub(address).ok_or("the first segment is not the entry's")?;
    // cli; jmp to itself
    kernel.get_mut(at..at + 3).ok_or("the entry is not in the file")?.copy_from_slice(&[0xfa, 0xeb, 0xfe]);
    let directory = scene.make_directory("lib")?;
    fs::write(directory.join("vmlinux"), kernel)?;
    fs::copy(installed().join("guest.img"), directory.join("guest.img"))?;
    let bundle = scene.debian()?.sh("echo started");
    bundle.write()?;
    let words = scene.runtime.run_words(&bundle.directory, &scene.id());
    let where_it_is = format!("CPU 0 runs at {:#x}, interrupts off", entry + 1);
    let said = ["did not come up within 120 seconds", "no timer", &where_it_is];
    table.refuses("a kernel that stands still", &said, &words, &[("PODHULL_LIBDIR", directory.into())])?;
    table.outcome()
}

/// Where the guest's files are.
fn installed() -> PathBuf {
    std::env::var_os("PODHULL_LIBDIR").map_or_else(|| PathBuf::from("/usr/lib/podhull"), PathBuf::from)
}

/// Runs with each kind of damage to one of the installed files.
fn corrupt(scene: &Scene, name: &str, elf: bool) -> Outcome {
    let mut table = Table::new(scene);
    let installed = installed();
    let good =
        fs::read(installed.join(name)).map_err(|error| format!("{}: {error}", installed.join(name).display()))?;
    let mut state = 1_u64;
    let mut random = |bytes: &mut [u8]| {
        for byte in bytes {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = (state >> 56) as u8;
        }
    };
    let mut noise = good.clone();
    random(&mut noise);
    let mut kinds: Vec<(&str, Option<Vec<u8>>)> = vec![
        ("missing", None),
        ("empty", Some(Vec::new())),
        ("half", Some(good[..good.len() / 2].to_vec())),
        ("zeroed", Some(vec![0; good.len()])),
        ("random", Some(noise.clone())),
    ];
    if elf {
        // The headers are whole, so the damage shows only when the machine executes it.
        let headers = 4096;
        kinds.push(("its code random", Some([&good[..headers], &noise[headers..]].concat())));
        kinds.push(("its code zeroed", Some([&good[..headers], &vec![0; good.len() - headers][..]].concat())));
    }
    for (kind, content) in kinds {
        let directory = scene.make_directory("lib")?;
        for other in ["vmlinux", "guest.img"].iter().filter(|other| **other != name) {
            fs::copy(installed.join(other), directory.join(other))?;
        }
        if let Some(content) = content {
            fs::write(directory.join(name), content)?;
        }
        let bundle = scene.debian()?.sh("echo started");
        bundle.write()?;
        let words = scene.runtime.run_words(&bundle.directory, &scene.id());
        table.refuses(&format!("{name} {kind}"), &[name], &words, &[("PODHULL_LIBDIR", directory.clone().into())])?;
        fs::remove_dir_all(directory)?;
    }
    table.outcome()
}
