//! Descriptors of the caller that a program has beyond its standard streams: `--preserve-fds` and `LISTEN_FDS`.

use std::ffi::OsString;
use std::fs;

use super::{oci, podhull};
use crate::container::Container;
use crate::leaks::Leaks;
use crate::run::{Ended, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("descriptors::of_an_executed_program", of_an_executed_program),
    oci("descriptors::of_a_container", of_a_container),
    oci("descriptors::a_connected_socket", a_connected_socket),
    oci("descriptors::one_that_is_not_open", one_that_is_not_open),
    podhull("descriptors::what_has_no_like_in_the_guest", what_has_no_like_in_the_guest),
];

/// Becomes the program in its arguments, with the descriptors that the script has placed.
const CALLER: &str = "
import os, socket, sys
directory = sys.argv[1]
def place(number, fd):
    os.dup2(fd, number)
    os.set_inheritable(number, True)
def path(name):
    return os.path.join(directory, name)
SCRIPT
os.execvp(sys.argv[2], sys.argv[2:])
";

/// The program under test as a caller runs it who has opened something before.
fn call(scene: &Scene, script: &str, words: &[&str]) -> Outcome<Running> {
    let directory = scene.directory.join("caller");
    fs::create_dir_all(&directory)?;
    let program = CALLER.replace("SCRIPT", script);
    let mut all: Vec<OsString> = ["python3", "-c", &program].map(Into::into).into();
    all.extend([directory.into(), scene.runtime.program().into()]);
    all.extend(words.iter().map(Into::into));
    Running::start(&all, &[])
}

fn call_to_end(scene: &Scene, script: &str, words: &[&str]) -> Outcome<Ended> {
    call(scene, script, words)?.wait()
}

/// Of each kind one; beside them there is a descriptor that was not to be handed on.
const KINDS: &str = "
open(path('file'), 'w').write('0123456789')
open(path('log'), 'w').write('first\\n')
os.makedirs(path('tree/inner'), exist_ok=True)
file = os.open(path('file'), os.O_RDONLY)
os.lseek(file, 4, os.SEEK_SET)
log = os.open(path('log'), os.O_RDWR | os.O_APPEND)
reader, writer = os.pipe()
os.write(writer, b'through a pipe')
os.close(writer)
tree = os.open(path('tree'), os.O_RDONLY | os.O_DIRECTORY)
null = os.open('/dev/null', os.O_WRONLY)
import fcntl
fds = [fcntl.fcntl(fd, fcntl.F_DUPFD, 50) for fd in (file, reader, log, 1, tree, null)]
for number, fd in enumerate(fds):
    place(3 + number, fd)
";

/// What a program finds of them.
const FINDS: &str = "
import fcntl, os, stat
print(os.read(3, 100).decode(), os.pread(3, 3, 0).decode(), os.read(3, 1))
print(open('/proc/self/fd/3').read())
print(os.read(4, 100).decode(), os.read(4, 1))
os.write(5, b'second\\n')
print(os.pread(5, 100, 0))
os.write(6, b'to the caller\\n')
print(os.listdir(7), stat.S_ISDIR(os.fstat(7).st_mode))
inner = os.open('inner/new', os.O_CREAT | os.O_WRONLY, dir_fd=7)
os.write(inner, b'made inside')
os.close(inner)
print(stat.S_ISCHR(os.fstat(8).st_mode), os.write(8, b'x'))
print([fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND) for fd in range(3, 9)])
def is_open(fd):
    try: os.fstat(fd)
    except OSError: return False
    return True
print([fd for fd in range(3, 200) if is_open(fd)])
";

fn expect_found(scene: &Scene, stdout: &str) -> Outcome {
    let (write, read_write_append) = (1, 2 | 0o2000);
    let expected = format!(
        "456789 012 b''\n0123456789\nthrough a pipe b''\nb'first\\nsecond\\n'\n['inner'] True\nTrue 1\n\
         [0, 0, {read_write_append}, {write}, 0, {write}]\n[3, 4, 5, 6, 7, 8]\n"
    );
    // What the program wrote beside its standard output came a way of its own.
    let own: String = stdout.lines().filter(|line| *line != "to the caller").map(|line| format!("{line}\n")).collect();
    ensure_eq!(own, expected, "what the program found");
    ensure!(stdout.contains("to the caller\n"), "nothing came from descriptor 6: {stdout:?}");
    let caller = scene.directory.join("caller");
    ensure_eq!(fs::read_to_string(caller.join("log"))?, "first\nsecond\n", "the file that was appended to");
    ensure_eq!(fs::read_to_string(caller.join("tree/inner/new"))?, "made inside", "the file made in the directory");
    Ok(())
}

fn of_an_executed_program(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let container = Container::make(scene, &scene.debian()?.sh("exec sleep 1000"), &["run", "-d"])?;
    let exec = ["exec", "--preserve-fds", "6", &container.id, "python3", "-c", FINDS];
    expect_found(scene, &call_to_end(scene, KINDS, &exec)?.output()?)?;
    container.end()?;
    before.check()
}

fn of_a_container(scene: &Scene) -> Outcome {
    let bundle = scene.debian()?.python(&format!("import os\nprint(os.environ.get('LISTEN_FDS'))\n{FINDS}"));
    bundle.write()?;
    let directory = bundle.directory.to_string_lossy();
    let words = ["run", "--preserve-fds", "6", "-b", &directory, &scene.id()].map(ToOwned::to_owned);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let found = call_to_end(scene, KINDS, &words)?.output()?;
    ensure!(found.contains("None\n"), "LISTEN_FDS is set: {found:?}");
    expect_found(scene, &found.replacen("None\n", "", 1))?;

    // The first of them are those that systemd, or who does as it, hands over.
    let bundle = scene.debian()?.python(
        "import os
print(os.environ['LISTEN_FDS'], os.environ['LISTEN_PID'], os.getpid(), os.read(3, 9), os.read(4, 9))",
    );
    bundle.write()?;
    let script = "
for number, text in ((3, 'first'), (4, 'second')):
    open(path(text), 'w').write(text)
    place(number + 50, os.open(path(text), os.O_RDONLY))
place(3, 53); place(4, 54); os.close(53); os.close(54)
os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))
";
    let directory = bundle.directory.to_string_lossy();
    let id = scene.id();
    let words = ["run", "--preserve-fds", "1", "-b", &directory, &id];
    let found = call_to_end(scene, script, &words)?.output()?;
    ensure_eq!(found, "1 1 1 b'first' b'second'\n", "with LISTEN_FDS");
    Ok(())
}

/// Both ways can end alone, and what a program wrote arrives though it has ended.
fn a_connected_socket(scene: &Scene) -> Outcome {
    let script = "
import threading
ours, theirs = socket.socketpair()
if os.fork() == 0:
    theirs.close()
    data = bytes(i % 251 for i in range(300000))
    def send():
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
    threading.Thread(target=send).start()
    answer = b''
    while part := ours.recv(65536): answer += part
    os.write(1, b'%d %r\\n' % (len(answer), answer == data[::-1]))
    os._exit(0)
ours.close()
place(3, theirs.fileno())
";
    let program = "
import socket
host = socket.socket(fileno=3)
data = b''
while part := host.recv(65536): data += part
host.sendall(data[::-1])";
    let bundle = scene.debian()?.python(program);
    bundle.write()?;
    let directory = bundle.directory.to_string_lossy();
    for _ in 0..scene.repeat.div_ceil(10).min(5) {
        let words = ["run", "--preserve-fds", "1", "-b", &directory, &scene.id()].map(ToOwned::to_owned);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        ensure_eq!(call_to_end(scene, script, &words)?.output()?, "300000 True\n", "what came back");
    }
    Ok(())
}

fn one_that_is_not_open(scene: &Scene) -> Outcome {
    let bundle = scene.debian()?.sh("true");
    bundle.write()?;
    let directory = bundle.directory.to_string_lossy();
    let script = "os.closerange(3, 100)\nplace(3, 0)";
    let words = ["run", "--preserve-fds", "40", "-b", &directory, &scene.id()].map(ToOwned::to_owned);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let ended = call_to_end(scene, script, &words)?.expect_status(1)?;
    let (start, end) = ("unable to stat preserved-fd ", ": no such file or directory");
    ensure!(
        ended.stderr.contains(start) && ended.stderr.trim_end().trim_end_matches('"').ends_with(end),
        "{:?}",
        ended.stderr
    );
    Ok(())
}

fn what_has_no_like_in_the_guest(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let bundle = scene.debian()?.sh("cat <&3");
    bundle.write()?;
    let directory = bundle.directory.to_string_lossy();
    let run = |script: &str| call_to_end(scene, script, &["run", "--preserve-fds", "1", "-b", &directory, &scene.id()]);
    let kinds = [
        ("import select; epoll = select.epoll(); place(3, epoll.fileno())", "descriptor 3 (anon_inode:[eventpoll])"),
        (
            "place(3, os.open('/dev/kvm', os.O_RDWR))",
            "descriptor 3 (/dev/kvm) cannot be handed to a virtual machine: it is a device",
        ),
        ("place(3, os.memfd_create('m'))", "descriptor 3 (/memfd:m (deleted)) cannot be handed"),
        ("s = socket.socket(type=socket.SOCK_DGRAM); place(3, s.fileno())", "descriptor 3 (socket:["),
    ];
    for (script, expected) in kinds {
        let ended = run(script)?.expect_status(1)?;
        ensure!(ended.stderr.contains(expected), "{script}: {:?}", ended.stderr);
        ensure_eq!(ended.stderr.lines().count(), 1, "lines");
    }
    // Of what can only be read the bytes can be handed over.
    let script = "
fd = os.memfd_create('m')
os.write(fd, b'in memory\\n')
place(3, os.open('/proc/self/fd/%d' % fd, os.O_RDONLY))";
    ensure_eq!(run(script)?.output()?, "in memory\n", "what lies in memory");
    ensure_eq!(
        run("place(3, os.open('/proc/version', os.O_RDONLY))")?.output()?,
        fs::read_to_string("/proc/version")?,
        "a file of the kernel"
    );
    before.check()
}
