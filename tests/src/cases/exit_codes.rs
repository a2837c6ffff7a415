//! The status a run ends with, and what is said when the program cannot even start.

use std::fs;

use super::oci;
use crate::runtime::Runtime;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("exit_codes::the_program_s_own", the_program_s_own),
    oci("exit_codes::death_by_signal_is_128_and_its_number", death_by_signal_is_128_and_its_number),
    oci(
        "exit_codes::a_fault_of_the_first_process_is_a_death_by_signal",
        a_fault_of_the_first_process_is_a_death_by_signal,
    ),
    oci("exit_codes::a_program_that_cannot_start_is_as_with_runc", a_program_that_cannot_start_is_as_with_runc),
];

fn the_program_s_own(scene: &Scene) -> Outcome {
    for status in [0, 1, 42, 255] {
        let ended = scene.run(&scene.debian()?.sh(&format!("echo out; echo err >&2; exit {status}")))?;
        let ended = ended.expect_status(status)?;
        ensure_eq!(ended.stdout, "out\n", "stdout with status {status}");
        ensure_eq!(ended.stderr, "err\n", "stderr with status {status}");
        ensure_eq!(ended.signal, None, "signal of the runtime itself");
    }
    Ok(())
}

fn death_by_signal_is_128_and_its_number(scene: &Scene) -> Outcome {
    for (name, number) in [("TERM", 15), ("KILL", 9), ("HUP", 1), ("SEGV", 11), ("RTMAX", 64)] {
        // The first process of a pid namespace is immune to signals from inside, so it has none of its own.
        let bundle = scene.busybox()?.namespaces(&["mount", "network", "ipc", "uts", "cgroup"]);
        let ended = scene.run(&bundle.sh(&format!("kill -{number} $$")))?;
        let ended = ended.expect_status(128 + number)?;
        ensure_eq!(ended.signal, None, "signal of the runtime itself after SIG{name} of the container");
    }
    Ok(())
}

fn a_fault_of_the_first_process_is_a_death_by_signal(scene: &Scene) -> Outcome {
    scene.run(&scene.debian()?.python("import ctypes; ctypes.string_at(0)"))?.expect_status(128 + 11)?;
    Ok(())
}

/// Statuses equal runc's, and the error ends with the same words; callers show or match them.
fn a_program_that_cannot_start_is_as_with_runc(scene: &Scene) -> Outcome {
    let runc = Runtime::runc()?;
    let own = scene.make_directory("programs")?;
    let program = |name: &str, text: &str, mode: u32| -> Outcome<()> {
        use std::os::unix::fs::PermissionsExt;
        fs::write(own.join(name), text)?;
        Ok(fs::set_permissions(own.join(name), fs::Permissions::from_mode(mode))?)
    };
    program("not-executable", "#!/bin/sh\n", 0o644)?;
    program("no-interpreter", "#!/no/such/interpreter\n", 0o755)?;
    program("no-format", "\u{1}\u{2}\u{3}\u{4}", 0o755)?;
    let programs =
        ["no-such-program", "/no/such/program", "/mnt", "/mnt/not-executable", "/mnt/no-interpreter", "/mnt/no-format"];
    for program in programs {
        let bundle = scene.debian()?.bind(&own, "/mnt", &["bind", "ro"]).args(&[program, "argument"]);
        let ours = scene.run(&bundle)?;
        let theirs = scene.start_with(&runc, &bundle)?.wait()?;
        ensure_eq!(
            ours.status,
            theirs.status,
            "status of {program} (stderr {:?}; runc: {:?})",
            ours.stderr,
            theirs.stderr
        );
        let (ours, theirs) = (reason(&ours.stderr), reason(&theirs.stderr));
        ensure!(theirs.contains("exec"), "runc said only {theirs:?} about {program}");
        ensure_eq!(ours, theirs, "error of {program}");
    }
    Ok(())
}

/// From `exec` on, without the quotes and escapes of a log line.
fn reason(stderr: &str) -> String {
    let line = stderr.lines().last().unwrap_or_default().replace('\\', "");
    let start = line.find("exec: \"").or_else(|| line.find("exec /")).unwrap_or(0);
    line[start..].trim_end_matches('"').to_owned()
}
