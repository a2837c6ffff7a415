//! Standard streams, signals and the pid file of a run in the foreground.

use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::thread;

use rustix::process::Signal;

use super::oci;
use crate::run::DEADLINE;
use crate::suite::{Case, Scene};
use crate::{Failure, Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("stdio::end_of_input_arrives", end_of_input_arrives),
    oci("stdio::outputs_are_apart_and_in_order", outputs_are_apart_and_in_order),
    oci("stdio::a_run_ends_though_its_input_stays_open", a_run_ends_though_its_input_stays_open),
    oci("stdio::a_reader_that_leaves_ends_the_writer", a_reader_that_leaves_ends_the_writer),
    oci("stdio::closed_streams_are_no_obstacle", closed_streams_are_no_obstacle),
    oci("stdio::signals_are_forwarded", signals_are_forwarded),
    oci("stdio::the_pid_file_names_a_living_process", the_pid_file_names_a_living_process),
    oci("stdio::much_passes_whole", much_passes_whole),
];

fn end_of_input_arrives(scene: &Scene) -> Outcome {
    let mut run = scene.start(&scene.debian()?.sh("cat; echo end"))?;
    run.send(b"x\n")?;
    run.expect_line("x")?;
    run.close_stdin();
    run.expect_line("end")?;
    run.wait()?.expect_status(0)?;
    Ok(())
}

fn outputs_are_apart_and_in_order(scene: &Scene) -> Outcome {
    // More than any buffer on the way holds, ended by an exit at once.
    let script = "import os
for number in range(20000): os.write(1, b'%099d\\n' % number); os.write(2, b'%049d\\n' % number)
os._exit(7)";
    let ended = scene.run(&scene.debian()?.python(script))?.expect_status(7)?;
    let expected = |width: usize| (0..20_000).map(|number| format!("{number:0width$}\n")).collect::<String>();
    ensure!(ended.stdout == expected(99), "stdout differs; {} of 2000000 bytes", ended.stdout.len());
    ensure!(ended.stderr == expected(49), "stderr differs; {} of 1000000 bytes", ended.stderr.len());
    Ok(())
}

fn a_run_ends_though_its_input_stays_open(scene: &Scene) -> Outcome {
    let mut run = scene.start(&scene.debian()?.sh("echo bye"))?;
    let ended = run.wait_open(DEADLINE)?.expect_status(0)?;
    ensure_eq!(ended.stdout, "bye\n", "stdout");
    Ok(())
}

fn a_reader_that_leaves_ends_the_writer(scene: &Scene) -> Outcome {
    let bundle = scene.debian()?.sh("yes; echo $? >&2");
    bundle.write()?;
    let words = scene.runtime.run_words(&bundle.directory, &scene.id());
    let mut child = Command::new(&words[0]);
    child.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = child.spawn()?;
    let mut output = child.stdout.take().ok_or("no pipe")?;
    let mut some = [0; 4096];
    output.read_exact(&mut some)?;
    drop(output);
    let ended = wait(child)?;
    ensure!(some.starts_with(b"y\ny\n"), "output {:?}", &some[..8]);
    // Whether the writer gets SIGPIPE or EPIPE depends on how its shell was started; that it ends counts.
    ensure!(matches!(ended.lines().last(), Some("141" | "1")), "stderr {ended:?}");
    Ok(())
}

fn closed_streams_are_no_obstacle(scene: &Scene) -> Outcome {
    let bundle = scene.debian()?.sh("echo lost; echo lost >&2; exit 5");
    bundle.write()?;
    let words = scene.runtime.run_words(&bundle.directory, &scene.id());
    let mut child =
        Command::new("sh").args(["-c", "exec \"$@\" <&- >/dev/null 2>/dev/null", "sh"]).args(&words).spawn()?;
    let status = child.wait()?;
    ensure_eq!(status.code(), Some(5), "status with a closed standard input");
    Ok(())
}

/// A child's end and its standard error, with a deadline.
fn wait(mut child: std::process::Child) -> Outcome<String> {
    let mut errors = child.stderr.take().ok_or("no pipe")?;
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let mut text = String::new();
        let _ = errors.read_to_string(&mut text);
        let _ = sender.send(text);
    });
    let text = receiver.recv_timeout(DEADLINE);
    if text.is_err() {
        child.kill()?;
    }
    child.wait()?;
    text.map_err(|_| Failure::from("it did not end"))
}

fn signals_are_forwarded(scene: &Scene) -> Outcome {
    let script = "for s in HUP INT TERM USR1 USR2 WINCH; do trap \"echo $s\" $s; done; echo ready; trap 'exit 33' QUIT
while :; do sleep 0.05; done";
    let mut run = scene.start(&scene.debian()?.sh(script))?;
    run.expect_line("ready")?;
    let signals = [
        ("USR1", Signal::USR1),
        ("HUP", Signal::HUP),
        ("INT", Signal::INT),
        ("TERM", Signal::TERM),
        ("USR2", Signal::USR2),
    ];
    for (name, signal) in signals {
        run.signal(signal)?;
        run.expect_line(name)?;
    }
    run.signal(Signal::QUIT)?;
    run.wait()?.expect_status(33)?;
    Ok(())
}

fn the_pid_file_names_a_living_process(scene: &Scene) -> Outcome {
    let file = scene.directory.join("pid");
    let bundle = scene.debian()?.sh("echo ready; read line");
    bundle.write()?;
    let mut words = scene.runtime.run_words(&bundle.directory, &scene.id());
    words.splice(2..2, ["--pid-file".into(), file.clone().into()]);
    let mut run = crate::run::Running::start(&words, &[])?;
    run.expect_line("ready")?;
    let text = fs::read_to_string(&file)?;
    let pid: i32 = text.parse().map_err(|_| format!("the pid file holds {text:?}"))?;
    let family = crate::processes::descendants(std::process::id().cast_signed());
    ensure!(family.iter().any(|process| process.pid == pid), "pid {pid} is not of this run: {family:?}");
    run.send(b"\n")?;
    run.wait()?.expect_status(0)?;
    Ok(())
}

/// Puts the number of a block into each of its pages, so that a lost, doubled or moved one shows.
fn stamp(number: u64, bytes: &mut [u8]) {
    for page in bytes.chunks_exact_mut(4096) {
        page[..8].copy_from_slice(&number.to_le_bytes());
    }
}

/// A block that differs in all its words.
fn block(size: usize) -> Vec<u8> {
    (0..size as u64 / 8).flat_map(|word| (word + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect()
}

/// A gibibyte in a soak, through standard input to standard output, every byte compared, which is stricter than a hash.
fn much_passes_whole(scene: &Scene) -> Outcome {
    const BLOCK: usize = 1 << 20;
    let count: u64 = if scene.is_soak() { 1 << 10 } else { 1 << 6 };
    let bundle = scene.debian()?.args(&["cat"]);
    bundle.write()?;
    let words = scene.runtime.run_words(&bundle.directory, &scene.id());
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let mut input = child.stdin.take().ok_or("no pipe")?;
    let mut output = child.stdout.take().ok_or("no pipe")?;
    let writer = thread::spawn(move || -> std::io::Result<()> {
        let mut bytes = block(BLOCK);
        for number in 0..count {
            stamp(number, &mut bytes);
            input.write_all(&bytes)?;
        }
        Ok(())
    });
    let (sender, receiver) = std::sync::mpsc::channel();
    let reader = thread::spawn(move || -> Result<u64, String> {
        let (mut bytes, mut expected) = (vec![0; BLOCK], block(BLOCK));
        for number in 0..count {
            output.read_exact(&mut bytes).map_err(|error| format!("block {number}: {error}"))?;
            stamp(number, &mut expected);
            if bytes != expected {
                let place = bytes.iter().zip(&expected).position(|(left, right)| left != right).unwrap_or(0);
                return Err(format!("block {number} differs at byte {place}"));
            }
            let _ = sender.send(());
        }
        let more = output.read(&mut bytes).map_err(|error| error.to_string())?;
        if more == 0 { Ok(count) } else { Err(format!("{more} bytes more than were sent")) }
    });
    // It may take as long as it needs, but must not stand still.
    loop {
        match receiver.recv_timeout(DEADLINE) {
            Ok(()) => {}
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                let doing = crate::processes::describe(std::process::id().cast_signed());
                child.kill()?;
                child.wait()?;
                return Err(format!("no further MiB in {DEADLINE:?}; processes:{doing}").into());
            }
        }
    }
    let errors = wait(child)?;
    let read = reader.join().map_err(|_| "the reader panicked")?;
    ensure!(read.is_ok(), "{read:?}; stderr {errors:?}");
    writer.join().map_err(|_| "the writer panicked")??;
    Ok(())
}
