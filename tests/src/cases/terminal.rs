//! Containers with a terminal, as a person in tmux has them and as a caller with a console socket has them.

use std::io::Write;
use std::os::unix::net::UnixListener;

use rustix::process::{Pid, WaitOptions, waitpid};
use serde_json::json;

use super::{oci, podhull};
use crate::bundle::Bundle;
use crate::run::Running;
use crate::suite::{Case, Scene};
use crate::terminal::{Tmux, read_until, receive_terminal, shell_line};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("terminal::size_resize_interrupt_and_stop", size_resize_interrupt_and_stop),
    oci("terminal::the_outer_terminal_is_as_before_afterwards", the_outer_terminal_is_as_before_afterwards),
    podhull("terminal::a_console_socket_gets_the_master", a_console_socket_gets_the_master),
    podhull("terminal::nothing_of_the_caller_s_stays_open_beside_a_terminal", nothing_of_the_caller_s_stays_open),
    podhull("terminal::without_a_terminal_there_is_one_line", without_a_terminal_there_is_one_line),
];

/// An interactive shell with a prompt of its own.
fn shell(scene: &Scene) -> Outcome<Bundle> {
    let bundle = scene.debian()?.set("/process/terminal", json!(true)).args(&["bash", "--norc", "-i"]);
    let bundle = bundle.push("/process/env", json!("PS1=inside> ")).push("/process/env", json!("HISTFILE="));
    bundle.write()?;
    Ok(bundle)
}

fn size_resize_interrupt_and_stop(scene: &Scene) -> Outcome {
    let bundle = shell(scene)?;
    let tmux = Tmux::start(&scene.directory, 100, 30)?;
    tmux.type_line(&format!(
        "clear; {}; echo status $?",
        shell_line(&scene.runtime.run_words(&bundle.directory, &scene.id()))
    ))?;
    tmux.expect("inside> ")?;
    tmux.type_line("stty size; tty")?;
    tmux.expect("\n30 100\n")?;
    tmux.expect("\n/dev/pts/0\n")?;

    tmux.resize(120, 40)?;
    tmux.type_line("until test \"$(stty size)\" = '40 120'; do sleep 0.1; done; echo re''sized")?;
    tmux.expect("\nresized\n")?;

    // Jobs say themselves when they have the terminal: a key before makes bash forget them, or to prompt.
    tmux.type_line("clear; sh -c 'echo started; exec sleep 1000'; echo interrupted with $?")?;
    tmux.expect("\nstarted\n")?;
    tmux.key("C-c")?;
    tmux.expect("inside> ")?;
    tmux.type_line("echo status of in''terrupted: $?")?;
    tmux.expect("\nstatus of interrupted: 130\n")?;

    let job = "sh -c 'trap \"echo going\" CONT; echo again; while :; do sleep 0.1; done'";
    tmux.type_line(&format!("clear; {job}"))?;
    tmux.expect("\nagain\n")?;
    tmux.key("C-z")?;
    tmux.expect("inside> ")?;
    tmux.type_line("clear; jobs")?;
    tmux.expect(&format!("[1]+  Stopped                 {job}\n"))?;
    tmux.type_line("clear; fg")?;
    tmux.expect(&format!("\n{job}\n"))?;
    tmux.expect("\ngoing\n")?;
    tmux.key("C-c")?;
    tmux.expect("inside> ")?;
    tmux.type_line("exit 9")?;
    tmux.expect("\nstatus 9\n")?;
    Ok(())
}

fn the_outer_terminal_is_as_before_afterwards(scene: &Scene) -> Outcome {
    let bundle = shell(scene)?.sh("tty; stty -a | grep -o .onlcr");
    bundle.write()?;
    let tmux = Tmux::start(&scene.directory, 100, 30)?;
    let run = shell_line(&scene.runtime.run_words(&bundle.directory, &scene.id()));
    tmux.type_line(&format!(
        "clear; stty -g >{0}/before; {run} >{0}/output; stty -g >{0}/after; echo do''ne",
        scene.directory.display()
    ))?;
    tmux.expect("\ndone\n")?;
    let read = |name| std::fs::read_to_string(scene.directory.join(name));
    // It is the outer terminal that puts a carriage return before each newline, and this output does not come to it.
    ensure_eq!(read("output")?, "/dev/pts/0\n-onlcr\n", "output in a file");
    ensure_eq!(read("after")?, read("before")?, "settings of the terminal");
    Ok(())
}

fn a_console_socket_gets_the_master(scene: &Scene) -> Outcome {
    let bundle =
        shell(scene)?.sh("test -t 0 && test -t 1 && test -t 2 && echo terminal; read line; echo got $line; exit 4");
    bundle.write()?;
    let path = scene.directory.join("console.sock");
    let listener = UnixListener::bind(&path)?;
    let mut words = scene.runtime.run_words(&bundle.directory, &scene.id());
    words.splice(2..2, ["--console-socket".into(), path.into()]);
    let run = Running::start(&words, &[])?;
    let mut terminal = receive_terminal(&listener).map_err(|error| format!("{error}; stderr {:?}", run.stderr()))?;
    read_until(&mut terminal, "terminal\r\n")?;
    terminal.write_all(b"over the socket\n")?;
    read_until(&mut terminal, "got over the socket\r\n")?;
    let ended = run.wait()?.expect_status(4)?;
    ensure!(ended.stdout.is_empty() && ended.stderr.is_empty(), "also written elsewhere: {ended:?}");
    Ok(())
}

/// containerd's shim reads what the command says to its end before it looks at the terminal.
fn nothing_of_the_caller_s_stays_open(scene: &Scene) -> Outcome {
    let path = scene.directory.join("console.sock");
    let socket = path.to_string_lossy();
    let listener = UnixListener::bind(&path)?;
    let bundle = shell(scene)?.sh("read line; echo got $line");
    bundle.write()?;
    let id = scene.id();
    // Both pipes have to end for this to return.
    let directory = bundle.directory.to_string_lossy();
    scene.call(&["create", "--console-socket", &socket, "-b", &directory, &id])?.output()?;
    let mut terminal = receive_terminal(&listener)?;
    let process = scene.directory.join("process.json");
    let mut document = bundle.config["process"].clone();
    document["args"] = json!(["sh", "-c", "read line; echo also got $line"]);
    std::fs::write(&process, document.to_string())?;
    let process = process.to_string_lossy();
    scene.call(&["start", &id])?.output()?;
    let pid_file = scene.directory.join("exec.pid");
    let pid = pid_file.to_string_lossy();
    let words = ["exec", "--detach", "--pid-file", &pid, "--console-socket", &socket, "--process", &process, &id];
    scene.call(&words)?.output()?;
    let mut executed = receive_terminal(&listener)?;
    executed.write_all(b"one\n")?;
    read_until(&mut executed, "also got one\r\n")?;
    // As its caller would: the container does not end before that.
    waitpid(std::fs::read_to_string(&pid_file)?.trim().parse().ok().and_then(Pid::from_raw), WaitOptions::empty())?;
    terminal.write_all(b"two\n")?;
    read_until(&mut terminal, "got two\r\n")?;
    scene.call(&["delete", "--force", &id])?.output().map(drop)
}

fn without_a_terminal_there_is_one_line(scene: &Scene) -> Outcome {
    let ended = scene.run(&shell(scene)?)?.expect_status(1)?;
    ensure!(ended.stderr.contains("terminal"), "stderr {:?}", ended.stderr);
    ensure_eq!(ended.stderr.lines().count(), 1, "lines of {:?}", ended.stderr);
    Ok(())
}
