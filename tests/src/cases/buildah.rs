//! Buildah runs each step of a build as a container.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::{long, oci};
use crate::image;
use crate::leaks::Leaks;
use crate::run::Running;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[long(oci("buildah::a_package_is_installed", a_package_is_installed))];

/// apt has debconf look at each package, which is Perl: thousands of names are looked up, each a request to the file server.
const PATIENCE: Duration = Duration::from_secs(900);

const STEPS: &str = "FROM localhost/debian\n\
    COPY greet.deb /tmp/greet.deb\n\
    RUN apt-get install -y --no-install-recommends /tmp/greet.deb\n\
    RUN dpkg-query -W greet > /installed && /opt/greet >> /installed\n\
    CMD cat /installed\n";

fn a_package_is_installed(scene: &Scene) -> Outcome {
    let storage = scene.make_directory("buildah")?;
    let before = Leaks::watch();
    let path = |name: &str| storage.join(name).to_string_lossy().into_owned();
    let (root, run, driver) = (path("root"), path("run"), image::DRIVER);
    let call = |words: &[&str]| {
        let own = [&["buildah", "--root", &root, "--runroot", &run][..], driver].concat();
        Running::start(&[own, words.to_vec()].concat().into_iter().map(Into::into).collect::<Vec<_>>(), &[])?
            .wait_within(PATIENCE)
    };
    let archive = format!("docker-archive:{}", image::of_debian(scene)?.display());
    call(&["pull", "-q", &archive])?.output()?;
    let context = scene.make_directory("context")?;
    make_package(&context)?;
    fs::write(context.join("Dockerfile"), STEPS)?;

    let runtime = scene.runtime.program().to_string_lossy();
    let as_container = ["--isolation", "oci", "--runtime", &runtime, "--network", "none", "-v", image::DEBIAN_PROGRAMS];
    let context = context.to_string_lossy();
    let build = [&["build"], &as_container[..], &["--pull-never", "-t", "built", &*context]].concat();
    let built = call(&build)?;
    ensure!(built.status == 0, "status {}: {}{}", built.status, built.stdout, built.stderr);
    call(&["from", "--pull-never", "--name", "work", "localhost/built"])?.output()?;
    let words = [&["run"], &as_container[..], &["work", "cat", "/installed"]].concat();
    ensure_eq!(call(&words)?.output()?, "greet\t1.0\nhello from a package\n", "what the last step has written");
    let words = [&["run"], &as_container[..], &["work", "sh", "-c", "exit 7"]].concat();
    call(&words)?.expect_status(7)?;
    call(&["rm", "work"])?.output()?;
    before.check()
}

/// A package with one program.
fn make_package(directory: &Path) -> Outcome {
    let tree = directory.join("tree");
    for name in ["DEBIAN", "opt"] {
        fs::create_dir_all(tree.join(name))?;
    }
    let control = "Package: greet\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: greets\n";
    fs::write(tree.join("DEBIAN/control"), control)?;
    fs::write(tree.join("opt/greet"), "#!/bin/sh\necho hello from a package\n")?;
    let status = Command::new("chmod").arg("755").arg(tree.join("opt/greet")).status()?;
    ensure!(status.success(), "chmod: {status}");
    let built = Command::new("dpkg-deb").arg("--build").arg(&tree).arg(directory.join("greet.deb")).output()?;
    ensure!(built.status.success(), "dpkg-deb: {}", String::from_utf8_lossy(&built.stderr));
    fs::remove_dir_all(&tree)?;
    Ok(())
}
