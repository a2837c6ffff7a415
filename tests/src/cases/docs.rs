//! What the documentation tells people to type does what it says.

use std::fs;
use std::path::Path;

use super::config::Configuration;
use super::containerd::stopped;
use super::podhull;
use crate::bundle::make_busybox_root;
use crate::container::Container;
use crate::containerd::{self, Containerd, Shim};
use crate::docker::{self, Docker};
use crate::leaks::Leaks;
use crate::netns::Netns;
use crate::podman::{self, Podman};
use crate::run::Running;
use crate::suite::{Case, Scene};
use crate::terminal::Tmux;
use crate::{Outcome, ensure, ensure_eq, image, shim};

pub const CASES: &[Case] = &[
    podhull("docs::readme", readme),
    podhull("docs::podman", podman_page),
    podhull("docs::docker", docker_page),
    podhull("docs::containerd", containerd_page),
    podhull("docs::cri_o", cri_o_page),
    podhull("docs::from_kata", from_kata_page),
    podhull("docs::operations", operations_page),
    podhull("docs::configuration", configuration_page),
];

/// The blocks of a page in one language.
fn blocks<'a>(page: &'a str, language: &str) -> Vec<&'a str> {
    let begin = format!("```{language}\n");
    page.split(&*begin).skip(1).filter_map(|rest| rest.split_once("```").map(|(block, _)| block)).collect()
}

/// Types what follows each `# ` of the page's consoles, with `rewrite` in between, and compares what comes.
fn type_all(page: &str, rewrite: impl Fn(&str) -> String) -> Outcome {
    let typed = type_each(page, rewrite, |line, said, expected| {
        if !line.starts_with("podhull check") {
            ensure_eq!(said.trim_end(), expected.trim_end(), "output of {line}");
        }
        Ok(())
    })?;
    ensure!(typed >= 4, "{typed} commands on the page");
    Ok(())
}

/// Types them, and has what each says looked at: the line, what it said, and what the page says. What installs podhull was done
/// already: it is how it came to this host. What pulls an image has no registry to pull it from. Returns how many were typed.
fn type_each(
    page: &str,
    rewrite: impl Fn(&str) -> String,
    look: impl Fn(&str, &str, &str) -> Outcome,
) -> Outcome<usize> {
    let mut typed = 0;
    for block in blocks(page, "console") {
        for (line, expected) in block.split("\n# ").map(|part| part.split_once('\n').unwrap_or((part, ""))) {
            let line = line.trim_start_matches("# ").trim_end();
            if line.starts_with("make ") || line.contains(" pull ") {
                continue;
            }
            let ended = Running::start(&["sh", "-c", &rewrite(line)].map(Into::into), &[])?.wait()?;
            ensure_eq!(ended.status, 0, "{line}: {:?}", ended.stderr);
            look(line, &ended.stdout, expected)?;
            typed += 1;
        }
    }
    Ok(typed)
}

/// What the pages load from a registry: there is none here, and of a Debian they need no more than busybox has.
const IMAGE: &str = "docker.io/library/debian:latest";

/// What README says of use, in a terminal, as who types it has one, and a container with the specification it begins with wants.
fn readme(scene: &Scene) -> Outcome {
    let page = include_str!("../../../README.md");
    let block =
        page.split("## Use\n").nth(1).and_then(|rest| rest.split("```\n").nth(1)).ok_or("no commands on the page")?;
    let commands = block.lines().filter_map(|line| line.strip_prefix("podhull ")?.split('#').next());
    let program = scene.runtime.program().display().to_string();
    let typed: Vec<_> = commands.map(|words| format!("{program} {}", words.trim())).collect();
    let [check, spec, run] = &typed[..] else { return Err(format!("commands on the page: {typed:?}").into()) };
    let before = Leaks::watch();
    let directory = scene.make_directory("mybundle")?;
    make_busybox_root(&directory.join("rootfs"))?;
    let tmux = Tmux::start(&scene.directory, 100, 30)?;
    tmux.type_line(&format!("cd {}; {check} >/dev/null; {spec}; clear; {run}; echo status $?", directory.display()))?;
    // The home of its user is the root.
    tmux.expect("~ # ")?;
    tmux.type_line("uname -r | grep -o podhull; exit 3")?;
    tmux.expect("podhull\nstatus 3\n")?;
    drop(tmux);
    before.check()
}

fn podman_page(scene: &Scene) -> Outcome {
    let page = include_str!("../../../docs/podman.md");
    let podman = Podman::new(scene)?;
    let before = Leaks::watch();
    let archive = image::busybox_as(scene, IMAGE)?;
    podman.call(&["load", "-i", &archive.to_string_lossy()])?.output()?;
    // The same Podman, with the storage of this test.
    let own = podman.shell_words();
    type_all(page, |line| line.replace("podman --runtime /usr/bin/podhull", &own))?;
    by_default(scene, page, &podman)?;
    podman::check(&before)
}

/// The runtime that the page's configuration makes the default.
fn by_default(scene: &Scene, page: &str, podman: &Podman<'_>) -> Outcome {
    let file = scene.directory.join("containers.conf");
    fs::write(&file, blocks(page, "toml").concat())?;
    let mut words = podman.words(&["run", "--rm", IMAGE, "uname", "-r"]);
    let named = words.iter().position(|word| word == "--runtime").ok_or("no --runtime to leave out")?;
    words.drain(named..named + 2);
    let said = Running::start(&words, &[("CONTAINERS_CONF", file.into())])?.wait()?.output()?;
    ensure!(said.contains("podhull"), "kernel of a container by default: {said:?}");
    Ok(())
}

fn docker_page(scene: &Scene) -> Outcome {
    let page = include_str!("../../../docs/docker.md");
    let config = blocks(page, "json").into_iter().next().ok_or("no configuration on the page")?;
    let host = Netns::new(scene, "host")?;
    let before = Leaks::watch();
    let docker = Docker::with_config(scene, &host, config, &[])?;
    let archive = image::busybox_as(scene, IMAGE)?;
    docker.call(&["load", "-i", &archive.to_string_lossy()])?.output()?;
    let own = docker.shell_words();
    type_all(page, |line| if line.starts_with("docker ") { line.replacen("docker", &own, 1) } else { line.into() })?;
    docker.end()?;
    docker::check(&before)
}

fn containerd_page(scene: &Scene) -> Outcome {
    let page = include_str!("../../../docs/containerd.md");
    let before = Leaks::watch();
    let containerd = Containerd::start(scene, Shim::Podhull)?;
    let archive = image::busybox_as(scene, IMAGE)?;
    containerd.call(&["image", "import", &archive.to_string_lossy()])?.output()?;
    let own = containerd.shell_words();
    type_all(page, |line| if line.starts_with("ctr ") { line.replacen("ctr", &own, 1) } else { line.into() })?;
    stopped(&containerd, "web")?;
    // What its client is told to leave it leaves.
    containerd.call(&["task", "delete", "web"])?;
    containerd.call(&["container", "delete", "web"])?.output()?;
    containerd.end()?;
    containerd::check(&before)
}

/// What CRI-O is told of is a shim by a name that it takes. CRI-O itself is not there to be restarted.
fn cri_o_page(scene: &Scene) -> Outcome {
    let page = include_str!("../../../docs/cri-o.md");
    let block = page.split("```\n").nth(1).ok_or("no commands on the page")?;
    let [install, "systemctl restart crio"] = block.lines().collect::<Vec<_>>()[..] else {
        return Err(format!("commands on the page: {block}").into());
    };
    let directory = scene.directory.join("crio.conf.d");
    let typed = install.replace("/etc/crio/crio.conf.d", &directory.to_string_lossy());
    Running::start(&["sh", "-c", &typed].map(Into::into), &[])?.wait()?.output()?;
    let told = fs::read_to_string(directory.join("50-podhull.conf"))?;
    let value = |key: &str| {
        let value = told.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = \"")?.strip_suffix('"'));
        value.ok_or_else(|| format!("no {key} in {told}"))
    };
    ensure!(told.contains("\n[crio.runtime.runtimes.kata]\n"), "no runtime kata in {told}");
    ensure_eq!(value("runtime_type")?, "vm", "type of the runtime");
    let path = value("runtime_path")?;
    // `RuntimeTypeVMBinaryPattern` of CRI-O.
    let named = path.rsplit('/').next().and_then(|name| name.strip_prefix("containerd-shim-")?.strip_suffix("-v2"));
    ensure!(named.is_some_and(|name| !name.is_empty()), "CRI-O takes no {path}");
    let said = String::from_utf8(shim::say(path, &scene.directory, &["-v"], &[])?)?;
    ensure!(said.contains(env!("CARGO_PKG_VERSION")), "{path} -v: {said}");
    Ok(())
}

/// On a node whose containerd has Kata's runtimes by the names that podhull's are to have.
fn from_kata_page(scene: &Scene) -> Outcome {
    let page = include_str!("../../../docs/from-kata.md");
    let spans: Vec<_> = page.split('`').skip(1).step_by(2).collect();
    let span = |begins: &str| {
        let found = spans.iter().find(|span| span.starts_with(begins)).copied();
        found.ok_or_else(|| format!("no {begins:?} on the page"))
    };
    let shim = span("/usr/bin/containerd-shim-")?;
    let said = String::from_utf8(shim::say(shim, &scene.directory, &["-v"], &[])?)?;
    ensure!(said.contains(env!("CARGO_PKG_VERSION")), "{shim} -v: {said}");

    let file = scene.directory.join("config.toml");
    let path = file.display().to_string();
    let program = scene.runtime.program().display().to_string();
    let call = |line: &str, more: &str| {
        let line = format!("{} {more}", line.replacen("podhull", &program, 1));
        Running::start(&["sh", "-c", &line].map(Into::into), &[])?.wait()
    };
    let node = |line: &str| call(line, &format!("--config {path} --offline"));
    let told =
        || Running::start(&["containerd", "--config", &path, "config", "dump"].map(Into::into), &[])?.wait()?.output();
    let (classes, path_of_kata) = (span("podhull node install --handler ")?, span("runtime_path = ")?);
    let usual = "podhull node install";
    ensure!(spans.contains(&usual), "no {usual} on the page");
    for (command, name) in [(classes, "kata-qemu"), (usual, "kata")] {
        let with_kata = format!(
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{name}]\n\
             runtime_type = \"io.containerd.{name}.v2\"\n{path_of_kata}\n"
        );
        fs::write(&file, &with_kata)?;
        let refused = node(command)?.expect_status(1)?.stderr;
        ensure!(refused.contains("that is not podhull's") && refused.contains(name), "{command}: {refused:?}");
        ensure_eq!(fs::read_to_string(&file)?, with_kata, "configuration with Kata's runtime");
        // Beside it by another name.
        node(&format!("podhull node install {}", span("--handler ")?))?.output()?;
        let both = told()?;
        for expected in [&format!("runtimes.{name}]"), "runtimes.podhull]", "/opt/kata/", "/opt/podhull/"] {
            ensure!(both.contains(expected), "no {expected} in {both}");
        }
        node("podhull node uninstall")?.output()?;
        ensure_eq!(fs::read_to_string(&file)?, with_kata, "configuration with Kata's runtime afterwards");
    }
    let without = "version = 2\n";
    fs::write(&file, without)?;
    node(classes)?.output()?;
    let ours = told()?;
    for expected in ["runtimes.kata-qemu]", "runtimes.kata-clh]", "/opt/podhull/"] {
        ensure!(ours.contains(expected), "no {expected} in {ours}");
    }
    for command in ["podhull check", "podhull config show"] {
        call(span(command)?, "")?.output()?;
    }
    node("podhull node uninstall")?.output()?;
    ensure_eq!(fs::read_to_string(&file)?, without, "configuration afterwards");
    ensure!(!Path::new("/opt/podhull").exists(), "/opt/podhull is still there");
    Ok(())
}

/// What is printed are numbers of this host, so that only the head of a table can be compared.
fn operations_page(scene: &Scene) -> Outcome {
    let page = include_str!("../../../docs/operations.md");
    let before = Leaks::watch();
    let host = Configuration::new()?;
    host.write("config.toml", &blocks(page, "toml").concat())?;
    let container = Container::make(scene, &scene.debian()?.sh("echo ready; exec sleep 1000"), &["run", "-d"])?;
    // One of a shim's, too.
    let containerd = Containerd::start(scene, Shim::Podhull)?;
    containerd.run(&["-d"], "web", &["sleep", "1000"])?.output()?;
    let file = scene.directory.join("hello.json").display().to_string();
    let own = |line: &str| {
        let own = line.replace("/tmp/hello.json", &file).replace("hello", &container.id);
        let own = own.replace("podhull/k8s.io", "podhull/default").replace("pods/ID ", "pods/web ");
        own.replace("trace ID", "trace web").replace(&format!("/{}.json", container.id), "/hello.json")
    };
    let typed = type_each(page, own, |line, said, expected| {
        ensure!(!said.is_empty() || line.contains(" -o "), "{line} prints nothing");
        if let Some(head) = expected.lines().next().filter(|head| head.starts_with("POD")) {
            let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
            ensure_eq!(words(said.lines().next().unwrap_or_default()), words(head), "head of {line}");
        }
        Ok(())
    })?;
    ensure!(typed >= 11 && Path::new(&file).exists(), "{typed} commands on the page");
    containerd.call(&["task", "delete", "--force", "web"])?.output()?;
    containerd.call(&["container", "delete", "web"])?.output()?;
    containerd.end()?;
    container.end()?;
    containerd::check(&before)
}

/// What the example of a configuration comes to is as the page shows it.
fn configuration_page(scene: &Scene) -> Outcome {
    let page = include_str!("../../../docs/configuration.md");
    let [config] = blocks(page, "toml")[..] else { return Err("not one configuration on the page".into()) };
    let shown = page.split("```\n# podhull config show\n").nth(1).and_then(|rest| rest.split_once("...\n"));
    let (shown, _) = shown.ok_or("nothing shown on the page")?;
    ensure!(shown.lines().count() >= 4, "shown on the page: {shown}");
    let host = Configuration::new()?;
    host.write("config.toml", config)?;
    let said = scene.call(&["config", "show"])?.output()?;
    let rows = |table: &str| -> Vec<Vec<String>> {
        table.lines().map(|row| row.split_whitespace().map(str::to_owned).collect()).collect()
    };
    // Columns are as wide as what is not shown there.
    ensure!(rows(&said).starts_with(&rows(shown)), "it is {said}, and not {shown}");
    Ok(())
}
