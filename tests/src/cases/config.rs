//! The host's configuration, and what a pod asks for by annotations.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::podhull;
use crate::bundle::Bundle;
use crate::container::Container;
use crate::leaks::Leaks;
use crate::run::DEADLINE;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    podhull("config::annotations_say_how_large_a_pod_is", annotations_say_how_large_a_pod_is),
    podhull("config::files_say_how_large_pods_are", files_say_how_large_pods_are),
    podhull("config::a_pod_keeps_what_it_was_made_with", a_pod_keeps_what_it_was_made_with),
    podhull("config::mistakes_are_named_with_their_file", mistakes_are_named_with_their_file),
    podhull("config::show_says_where_values_come_from", show_says_where_values_come_from),
    podhull("config::a_pod_begins_with_the_size_it_will_get", a_pod_begins_with_the_size_it_will_get),
    podhull("config::the_guest_console_is_kept", the_guest_console_is_kept),
];

const DIRECTORY: &str = "/etc/podhull";

/// The host's configuration, for as long as it is there.
pub struct Configuration;

impl Configuration {
    /// There must be none yet.
    pub fn new() -> Outcome<Self> {
        ensure!(!Path::new(DIRECTORY).exists(), "{DIRECTORY} is there already: this test would remove it");
        fs::create_dir_all(Path::new(DIRECTORY).join("config.d"))?;
        Ok(Self)
    }

    /// A file of it.
    pub fn write(&self, name: &str, text: &str) -> Outcome<PathBuf> {
        let path = Path::new(DIRECTORY).join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, Permissions::from_mode(0o644))?;
        Ok(path)
    }
}

impl Drop for Configuration {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(DIRECTORY);
    }
}

/// Prints MiB of memory and the number of processors.
const LOOK: &str = "read name kib rest </proc/meminfo; echo $((kib / 1024)) $(nproc)";

/// What it has printed.
fn found(text: &str) -> Outcome<(u64, u64)> {
    let (memory, cpus) = text.trim().split_once(' ').ok_or_else(|| format!("no two words but {text:?}"))?;
    Ok((memory.parse()?, cpus.parse()?))
}

/// What a container's machine has.
fn of(container: &Container) -> Outcome<(u64, u64)> {
    found(&container.call(&["exec", &container.id, "sh", "-c", LOOK])?.output()?)
}

/// A guest's kernel keeps some of its memory for itself.
fn is_nearly(found: u64, mebibytes: u64) -> bool {
    (mebibytes - mebibytes / 8 - 40..=mebibytes).contains(&found)
}

fn annotated(bundle: Bundle, annotations: Value) -> Bundle {
    bundle.set("/annotations", annotations)
}

fn limit(mebibytes: u64) -> Value {
    json!({ "memory": { "limit": mebibytes << 20 }, "cpu": { "quota": 100_000, "period": 100_000 } })
}

fn annotations_say_how_large_a_pod_is(scene: &Scene) -> Outcome {
    let kata = |name: &str| format!("io.katacontainers.config.hypervisor.{name}");
    for annotations in [
        json!({ kata("default_memory"): "384", kata("default_vcpus"): "0.5", kata("machine_type"): "q35" }),
        json!({ "io.podhull.machine.memory": "384", "io.podhull.machine.vcpus": "1" }),
    ] {
        let bundle = annotated(scene.debian()?, annotations.clone()).sh(LOOK);
        for bundle in [bundle.clone(), bundle.set("/linux/resources", limit(64))] {
            let (memory, cpus) = found(&scene.run(&bundle)?.output()?)?;
            ensure!(is_nearly(memory, 384), "{memory} MiB of memory with {annotations}");
            ensure_eq!(cpus, 1, "processors with {annotations}");
        }
    }
    // What the kernel is told.
    let annotations = json!({ kata("kernel_params"): "podhull_test=1  audit=0" });
    let bundle = annotated(scene.debian()?, annotations).sh("cat /proc/cmdline");
    let line = scene.run(&bundle)?.output()?;
    ensure!(line.trim_end().ends_with(" podhull_test=1 audit=0"), "command line {line:?}");
    Ok(())
}

fn files_say_how_large_pods_are(scene: &Scene) -> Outcome {
    let host = Configuration::new()?;
    let bundle = scene.debian()?.sh(LOOK);
    let run = || found(&scene.run(&bundle)?.output()?);
    host.write("config.toml", "[machine]\nmemory = 384\nvcpus = 1\n")?;
    let (memory, cpus) = run()?;
    ensure!(is_nearly(memory, 384), "{memory} MiB of memory with 384");
    ensure_eq!(cpus, 1, "processors");
    host.write("config.d/10-more.toml", "[machine]\nmemory = 512\n")?;
    let (memory, _) = run()?;
    ensure!(is_nearly(memory, 512), "{memory} MiB of memory with 512");
    host.write("config.d/20-most.toml", "[machine]\nmemory = 256\nmax_memory = 256\n")?;
    let (memory, _) = run()?;
    ensure!(is_nearly(memory, 256), "{memory} MiB of memory with 256");
    let more = bundle.clone().set("/linux/resources", limit(300));
    let said = scene.run(&more)?.expect_status(1)?.stderr;
    ensure!(said.contains("linux.resources.memory.limit: ") && said.contains("machine.max_memory"), "stderr {said:?}");
    let annotations = json!({ "io.podhull.machine.memory": "300" });
    let said = scene.run(&annotated(bundle.clone(), annotations))?.expect_status(1)?.stderr;
    let expected = format!("300 MiB is more than machine.max_memory, 256 MiB ({DIRECTORY}/config.d/20-most.toml:3)");
    ensure!(said.contains(&expected), "stderr {said:?}");

    // Only who may choose a kernel does.
    let kernel = json!({ "io.podhull.machine.kernel": "/bin/true" });
    let said = scene.run(&annotated(bundle.clone(), kernel.clone()))?.expect_status(1)?.stderr;
    ensure!(said.contains("machine.kernel is not among annotations.allow"), "stderr {said:?}");
    host.write("config.d/30.toml", "[annotations]\nallow = [\"machine.kernel\"]\n")?;
    let said = scene.run(&annotated(bundle.clone(), kernel))?.expect_status(1)?.stderr;
    ensure!(said.contains("/bin/true"), "stderr of a kernel that is none: {said:?}");
    let memory = json!({ "io.podhull.machine.memory": "200" });
    let said = scene.run(&annotated(bundle, memory))?.expect_status(1)?.stderr;
    ensure!(said.contains(&format!("annotations.allow ({DIRECTORY}/config.d/30.toml:2)")), "stderr {said:?}");
    Ok(())
}

fn a_pod_keeps_what_it_was_made_with(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let host = Configuration::new()?;
    host.write("config.toml", "[machine]\nmemory = 384\n")?;
    let bundle = scene.debian()?.sh("exec sleep 1000");
    let container = Container::make(scene, &bundle, &["run", "-d"])?;
    host.write("config.toml", "[machine]\nmemroy = 384\n")?;
    ensure!(is_nearly(of(&container)?.0, 384), "memory {:?}", of(&container)?);
    // No limit, and with it the size from before, comes back.
    scene.call(&["update", "--memory", "500m", &container.id])?.output()?;
    ensure!(of(&container)?.0 > 450, "memory {:?} with a limit of 500 MiB", of(&container)?);
    scene.call(&["update", "--memory", "-1", &container.id])?.output()?;
    wait_until_less(&container, 384)?;
    // Another container of the pod asks for nothing that is not there.
    let join = |annotations: Value| super::pods::in_the_pod_of(annotated(bundle.clone(), annotations), &container);
    let second = Container::make(scene, &join(json!({})), &["run", "-d"])?;
    second.end()?;
    let said = scene.run(&join(json!({ "io.podhull.machine.memory": "1024" })))?.expect_status(1)?.stderr;
    ensure!(said.contains("the virtual machine of pod") && said.contains("first container"), "stderr {said:?}");
    container.end()?;
    before.check()
}

/// The guest gives memory back at its own pace.
fn wait_until_less(container: &Container, most: u64) -> Outcome {
    let until = Instant::now() + DEADLINE;
    loop {
        let (memory, _) = of(container)?;
        if memory <= most {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{memory} MiB of memory; at most {most} were expected");
        thread::sleep(Duration::from_millis(200));
    }
}

fn mistakes_are_named_with_their_file(scene: &Scene) -> Outcome {
    let host = Configuration::new()?;
    let bundle = scene.debian()?.sh("true");
    let refused = |expected: &str| -> Outcome {
        let said = scene.run(&bundle)?.expect_status(1)?.stderr;
        ensure!(said.starts_with(&format!("podhull: {expected}")), "stderr {said:?} instead of {expected:?}");
        ensure_eq!(said.lines().count(), 1, "lines of {said:?}");
        Ok(())
    };
    let first = host.write("config.toml", "[machine]\nmemory = 384\n")?;
    let more = host.write("config.d/a.toml", "[machine]\nmemroy = 384\n")?;
    let more_path = more.display().to_string();
    refused(&format!("{more_path}: line 2: machine.memroy: unknown key; "))?;
    host.write("config.d/a.toml", "[hypervisor.qemu]\ndefault_vcpus = 1\n")?;
    refused(&format!(
        "{more_path}: line 2: hypervisor.qemu.default_vcpus: is a key of Kata Containers; here it is machine.vcpus"
    ))?;
    host.write("config.d/a.toml", "machine.memory = \"2Gi\"\n")?;
    refused(&format!("{more_path}: line 1: machine.memory: expected a whole number of MiB, found a string"))?;
    fs::remove_file(&more)?;
    fs::set_permissions(&first, Permissions::from_mode(0o666))?;
    refused(&format!("{}: others than root may write it (mode 0666): chmod go-w", first.display()))?;
    fs::remove_file(&first)?;
    scene.run(&bundle)?.expect_status(0).map(drop)
}

fn show_says_where_values_come_from(scene: &Scene) -> Outcome {
    let host = Configuration::new()?;
    let file = host.write("config.toml", "# for this test\n[machine]\nmemory = 384\n")?;
    let bundle = annotated(scene.debian()?, json!({ "io.podhull.machine.vcpus": "1" }));
    bundle.write()?;
    let directory = bundle.directory.display().to_string();
    let text = scene.call(&["config", "show", "--bundle", &directory])?.output()?;
    let line = |key: &str| -> Outcome<Vec<String>> {
        let line =
            text.lines().find(|line| line.split(' ').next() == Some(key)).ok_or_else(|| format!("no {key}: {text}"))?;
        Ok(line.split("  ").map(str::trim).filter(|word| !word.is_empty()).map(str::to_owned).collect())
    };
    let from = format!("{}:3", file.display());
    ensure_eq!(line("machine.memory")?, ["machine.memory", "384 MiB", from.as_str()], "memory");
    let annotation = "annotation io.podhull.machine.vcpus";
    ensure_eq!(line("machine.vcpus")?, ["machine.vcpus", "1", annotation], "CPUs");
    ensure_eq!(line("machine.max_memory")?, ["machine.max_memory", "all of the host", "default"], "most memory");
    let json: Value = serde_json::from_str(&scene.call(&["config", "show", "--format", "json"])?.output()?)?;
    let memory = json.as_array().into_iter().flatten().find(|line| line["key"] == "machine.memory");
    let expected = json!({ "key": "machine.memory", "value": 384, "from": { "file": { "path": file, "line": 3 } } });
    ensure_eq!(memory, Some(&expected), "memory in JSON");
    let check = scene.call(&["check"])?.output()?;
    ensure!(check.contains("configuration"), "check says nothing of it: {check}");
    Ok(())
}

/// As CRI's runtimes have it: first the container that holds the pod open, without limits, then the others.
fn a_pod_begins_with_the_size_it_will_get(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let annotations = json!({
        "io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri.sandbox-cpu-period": "100000",
        "io.kubernetes.cri.sandbox-cpu-quota": "100000",
        "io.kubernetes.cri.sandbox-cpu-shares": "1024",
        "io.kubernetes.cri.sandbox-memory": (400 << 20).to_string(),
    });
    let bundle = scene.debian()?.sh("exec sleep 1000");
    let pause = Container::make(scene, &annotated(bundle.clone(), annotations), &["run", "-d"])?;
    let (begin, cpus) = of(&pause)?;
    ensure!((400..=510).contains(&begin), "{begin} MiB of memory for 400");
    ensure_eq!(cpus, 1, "processors");
    let join = |mebibytes| -> Outcome<Container> {
        let bundle = scene.debian()?.sh("exec sleep 1000").set("/linux/resources", limit(mebibytes));
        Container::make(scene, &super::pods::in_the_pod_of(bundle, &pause), &["run", "-d"])
    };
    let (first, second) = (join(150)?, join(250)?);
    ensure_eq!(of(&pause)?.0, begin, "MiB of memory when all are there");
    scene.call(&["update", "--memory", "350m", &second.id])?.output()?;
    ensure!(of(&pause)?.0 >= begin + 80, "{:?} after a container was given 100 MiB more than {begin}", of(&pause)?);
    scene.call(&["update", "--memory", "100m", &second.id])?.output()?;
    wait_until_less(&pause, begin - 100)?;
    for container in [second, first, pause] {
        container.end()?;
    }
    before.check()
}

fn the_guest_console_is_kept(scene: &Scene) -> Outcome {
    let host = Configuration::new()?;
    let directory = scene.make_directory("consoles")?;
    host.write("config.toml", &format!("[machine]\nguest_console = {directory:?}\n"))?;
    let bundle = scene.debian()?.sh("true");
    scene.run(&bundle)?.expect_status(0)?;
    let files: Vec<_> = fs::read_dir(&directory)?.flatten().map(|entry| entry.path()).collect();
    let [file] = &files[..] else { return Err(format!("files {files:?}").into()) };
    ensure!(fs::read_to_string(file)?.contains("Linux version"), "no kernel has printed to {}", file.display());
    ensure_eq!(fs::metadata(file)?.permissions().mode() & 0o777, 0o600, "mode of {}", file.display());
    Ok(())
}
