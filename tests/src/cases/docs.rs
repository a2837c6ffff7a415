//! What the documentation tells people to type does what it says.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::podhull;
use crate::bundle::make_busybox_root;
use crate::docker::{self, Docker};
use crate::leaks::Leaks;
use crate::podman::{self, Podman};
use crate::run::Running;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[podhull("docs::podman", podman_page), podhull("docs::docker", docker_page)];

/// The blocks of a page in one language.
fn blocks<'a>(page: &'a str, language: &str) -> Vec<&'a str> {
    let begin = format!("```{language}\n");
    page.split(&*begin).skip(1).filter_map(|rest| rest.split_once("```").map(|(block, _)| block)).collect()
}

/// Types what follows each `# ` of the page's consoles, with `rewrite` in between, and compares what comes. What installs podhull
/// was done already: it is how it came to this host.
fn type_all(page: &str, rewrite: impl Fn(&str) -> String) -> Outcome {
    let mut typed = 0;
    for block in blocks(page, "console") {
        for (line, expected) in block.split("\n# ").map(|part| part.split_once('\n').unwrap_or((part, ""))) {
            let line = line.trim_start_matches("# ");
            if line.starts_with("make ") {
                continue;
            }
            let words = ["sh", "-c", &rewrite(line)].map(Into::into);
            let ended = Running::start(&words, &[])?.wait()?;
            ensure_eq!(ended.status, 0, "{line}: {:?}", ended.stderr);
            if !line.starts_with("podhull check") {
                ensure_eq!(ended.stdout.trim_end(), expected.trim_end(), "output of {line}");
            }
            typed += 1;
        }
    }
    ensure!(typed >= 4, "{typed} commands on the page");
    Ok(())
}

/// An archive of what commands of the pages need, which is far less than the image they name has.
fn archive(directory: &Path) -> Outcome<String> {
    let (root, archive) = (directory.join("image"), directory.join("image.tar"));
    make_busybox_root(&root)?;
    let status = Command::new("tar").arg("-C").arg(root).arg("-cf").arg(&archive).arg(".").status()?;
    ensure!(status.success(), "tar: {status}");
    Ok(archive.to_string_lossy().into_owned())
}

fn podman_page(scene: &Scene) -> Outcome {
    let page = include_str!("../../../docs/podman.md");
    let podman = Podman::new(scene)?;
    let before = Leaks::watch();
    let archive = archive(&scene.directory)?;
    podman.call(&["import", &archive, "docker.io/library/debian"])?.output()?;
    fs::remove_file(&archive)?;
    // The same Podman, with the storage of this test.
    let own = podman.shell_words();
    type_all(page, |line| line.replace("podman --runtime /usr/bin/podhull", &own))?;
    podman::check(&before)
}

fn docker_page(scene: &Scene) -> Outcome {
    let page = include_str!("../../../docs/docker.md");
    let before = Leaks::watch();
    let config = blocks(page, "json").into_iter().next().ok_or("no configuration on the page")?;
    let docker = Docker::with_config(scene, config, &[])?;
    let archive = archive(&scene.directory)?;
    docker.call(&["import", &archive, "debian"])?.output()?;
    fs::remove_file(&archive)?;
    let own = docker.shell_words();
    type_all(page, |line| if line.starts_with("docker ") { line.replacen("docker", &own, 1) } else { line.into() })?;
    docker.end()?;
    docker::check(&before)
}
