//! Sockets of the host that are bound into a container, as that of a container engine or of a CSI driver.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::oci;
use crate::container::Container;
use crate::leaks::Leaks;
use crate::run::{DEADLINE, Running};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("sockets::a_server_of_the_host_is_reached", a_server_of_the_host_is_reached),
    oci("sockets::the_server_sees_who_connects", the_server_sees_who_connects),
    oci("sockets::datagrams_come_from_who_sent_them", datagrams_come_from_who_sent_them),
    oci("sockets::one_whose_server_is_gone", one_whose_server_is_gone),
    oci("sockets::those_in_a_directory", those_in_a_directory),
];

/// Serves each client until its end of file, then says who it was, how much it sent, and sends that back.
const SERVER: &str = "
import os, socket, struct, sys, threading
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
os.chmod(sys.argv[1], int(sys.argv[2], 8))
os.chown(sys.argv[1], 0, int(sys.argv[3]))
server.listen(64)
print('ready', flush=True)
def serve(client):
    with client:
        _, uid, gid = struct.unpack('3i', client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        data = bytearray()
        while part := client.recv(65536): data += part
        client.sendall(f'{uid} {gid} {len(data)}\\n'.encode() + data)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
";

/// Sends so many bytes, then nothing more, and compares what comes back; prints its first line.
const CLIENT: &str = "
import socket, sys, threading
def ask(length):
    data = bytes(i % 251 for i in range(length))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect('/run/host.sock')
        def send():
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        threading.Thread(target=send).start()
        answer = bytearray()
        while part := client.recv(65536): answer += part
    line, _, back = bytes(answer).partition(b'\\n')
    assert back == data, (length, len(back))
    return line.decode()
if sys.argv[1] == 'many':
    answers = [None] * 20
    def one(i): answers[i] = ask(1000 + i)
    threads = [threading.Thread(target=one, args=(i,)) for i in range(20)]
    [t.start() for t in threads]; [t.join() for t in threads]
    print(answers == [f'0 0 {1000 + i}' for i in range(20)])
else:
    print(ask(int(sys.argv[1])))
";

fn serve(path: &Path, mode: &str, group: &str) -> Outcome<Running> {
    let words = ["python3", "-c", SERVER, &path.to_string_lossy(), mode, group].map(Into::into);
    let mut server = Running::start(&words, &[])?;
    server.expect_line("ready")?;
    Ok(server)
}

fn stop(server: Running) -> Outcome {
    server.signal(rustix::process::Signal::KILL)?;
    server.wait().map(drop)
}

fn place(scene: &Scene) -> Outcome<PathBuf> {
    Ok(scene.make_directory("sockets")?.join("host.sock"))
}

fn a_server_of_the_host_is_reached(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let path = place(scene)?;
    let server = serve(&path, "600", "0")?;
    let bundle =
        scene.debian()?.bind(&path, "/run/host.sock", &["rbind"]).sh("stat -c %F:%a /run/host.sock; exec sleep 1000");
    let container = Container::make(scene, &bundle, &["run", "-d"])?;
    container.expect_output("socket:600")?;
    let ask = |length: &str| container.call(&["exec", &container.id, "python3", "-c", CLIENT, length])?.output();
    for length in ["0", "5", "1000000"] {
        ensure_eq!(ask(length)?, format!("0 0 {length}\n"), "answer");
    }
    for _ in 0..scene.repeat.div_ceil(10).min(5) {
        ensure_eq!(ask("many")?, "True\n", "answers to twenty at once");
    }
    container.end()?;
    stop(server)?;
    before.check()
}

/// Says when it is ready, reads a line, then that many datagrams; says of each who sent it, and what.
const LOG: &str = "
import os, socket, struct, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
server.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
server.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o666)
print('ready', flush=True)
for _ in range(int(input())):
    data, ancillary, _, _ = server.recvmsg(300000, 100)
    _, uid, gid = struct.unpack('3i', ancillary[0][2][:12])
    print(uid, gid, len(data), data[:20].decode())
";

/// As those to the log of the host. More of them than a socket holds wait until they are read.
fn datagrams_come_from_who_sent_them(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let path = place(scene)?;
    let words = ["python3", "-c", LOG, &path.to_string_lossy()].map(Into::into);
    let mut server = Running::start(&words, &[])?;
    server.expect_line("ready")?;
    let script = "
import os, socket
log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
log.connect('/run/host.sock')
for number in range(200):
    log.send(b'message %d' % number)
log.send(b'')
log.send(b'x' * 100000)
os.setgid(1001)
os.setuid(1000)
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'of another', '/run/host.sock')
print('sent')";
    let bundle = scene
        .debian()?
        .bind(&path, "/run/host.sock", &["rbind"])
        .capabilities(&["CAP_SETUID", "CAP_SETGID"])
        .python(script);
    let mut run = scene.start(&bundle)?;
    // A sender may be held up: what nobody reads fills the way.
    server.send(b"203\n")?;
    run.expect_line("sent")?;
    run.wait()?.expect_status(0)?;
    let mut expected = String::from("ready\n");
    expected.extend((0..200).map(|n| format!("0 0 {} message {n}\n", format!("message {n}").len())));
    expected += &format!("0 0 0 \n0 0 100000 {}\n1000 1001 10 of another\n", "x".repeat(20));
    ensure_eq!(server.wait()?.output()?, expected, "what came");
    std::fs::remove_file(path)?;
    before.check()
}

/// As who it is in the container, which is what a server decides by what a client may; and not everybody may connect.
fn the_server_sees_who_connects(scene: &Scene) -> Outcome {
    let path = place(scene)?;
    let server = serve(&path, "660", "2000")?;
    let container = Container::make(
        scene,
        &scene.debian()?.bind(&path, "/run/host.sock", &["rbind"]).sh("exec sleep 1000"),
        &["run", "-d"],
    )?;
    let ask = |options: &[&str]| {
        container.call(&[&["exec"], options, &[&container.id, "python3", "-c", CLIENT, "7"]].concat())
    };
    ensure_eq!(ask(&[])?.output()?, "0 0 7\n", "as root");
    ensure_eq!(ask(&["--user", "1000:2000"])?.output()?, "1000 2000 7\n", "by its group");
    ensure_eq!(ask(&["--user", "1000:1000", "-g", "2000"])?.output()?, "1000 1000 7\n", "by a further group");
    let refused = ask(&["--user", "1000:1000"])?;
    ensure!(refused.status != 0 && refused.stderr.contains("Permission denied"), "as another: {:?}", refused.stderr);
    container.end()?;
    // In a user namespace root is somebody else on the host.
    let maps = json!([{ "containerID": 0, "hostID": 100_000, "size": 65536 }]);
    std::os::unix::fs::chown(&path, Some(101_000), Some(100_000))?;
    let bundle = scene
        .debian()?
        .set("/linux/uidMappings", maps.clone())
        .set("/linux/gidMappings", maps)
        .push("/linux/namespaces", json!({ "type": "user" }))
        .set("/process/user", json!({ "uid": 1000, "gid": 0 }))
        .bind(&path, "/run/host.sock", &["rbind"])
        .args(&["python3", "-c", CLIENT, "9"]);
    ensure_eq!(scene.run(&bundle)?.output()?, "101000 100000 9\n", "in a user namespace");
    stop(server)
}

fn one_whose_server_is_gone(scene: &Scene) -> Outcome {
    let path = place(scene)?;
    stop(serve(&path, "666", "0")?)?;
    let script = "
import socket
with socket.socket(socket.AF_UNIX) as client:
    try:
        client.connect('/run/host.sock')
        client.settimeout(60)
        print('ended' if client.recv(1) == b'' else 'answered')
    except (ConnectionRefusedError, ConnectionResetError):
        print('ended')";
    let bundle = scene.debian()?.bind(&path, "/run/host.sock", &["rbind"]).python(script);
    let found = scene.start(&bundle)?.wait_within(DEADLINE)?.output()?;
    ensure_eq!(found, "ended\n", "a connection to nobody");
    Ok(())
}

/// What was left in a directory by one who is gone, another takes the place of; one that was made anew on the host is not reached
/// from a machine before the container is.
fn those_in_a_directory(scene: &Scene) -> Outcome {
    let before = Leaks::watch();
    let directory = scene.make_directory("sockets")?;
    fs::create_dir(directory.join("below"))?;
    let path = directory.join("host.sock");
    let server = serve(&path, "600", "0")?;
    let words = ["python3", "-c", LOG, &directory.join("below/log").to_string_lossy()].map(Into::into);
    let mut log = Running::start(&words, &[])?;
    log.expect_line("ready")?;
    stop(serve(&directory.join("left"), "600", "0")?)?;
    let other = scene.make_directory("other")?;
    let bundle = scene
        .debian()?
        .bind(&directory, "/run", &["rbind", "ro"])
        .bind(&directory, "/mnt", &["rbind"])
        // What is covered is not reached, and what covers it stays as it is.
        .bind(&other, "/mnt/below", &["rbind"])
        .args(&["sleep", "1000"]);
    let container = Container::make(scene, &bundle, &["run", "-d"])?;
    let inside = |words: &[&str]| container.call(&[&["exec", &container.id], words].concat())?.output();
    ensure_eq!(inside(&["stat", "-c", "%F:%a", "/run/host.sock"])?, "socket:600\n", "what it is");
    for length in ["0", "1000000"] {
        ensure_eq!(inside(&["python3", "-c", CLIENT, length])?, format!("0 0 {length}\n"), "answer");
    }
    let rest = "
import os, socket
log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
log.connect('/run/below/log')
log.send(b'a message')
assert os.listdir('/mnt/below') == [], os.listdir('/mnt/below')
os.unlink('/mnt/left')
own = socket.socket(socket.AF_UNIX)
own.bind('/mnt/left')
own.listen()
client = socket.socket(socket.AF_UNIX)
client.connect('/run/left')
own.accept()[0].send(b'here')
print(client.recv(10))";
    ensure_eq!(inside(&["python3", "-c", rest])?, "b'here'\n", "what a socket of its own says");
    log.send(b"1\n")?;
    let logged = log.wait_within(DEADLINE)?.output()?;
    ensure!(logged.ends_with("0 0 9 a message\n"), "logged: {logged:?}");
    ensure_eq!(fs::read_dir(&other)?.count(), 0, "files where others were covered");

    stop(server)?;
    fs::remove_file(&path)?;
    let server = serve(&path, "600", "0")?;
    let asked = container.call(&["exec", &container.id, "python3", "-c", CLIENT, "5"])?;
    match scene.runtime.is_virtual() {
        true => ensure!(asked.stderr.contains("ConnectionRefusedError"), "one that was made anew: {asked:?}"),
        false => ensure_eq!(asked.stdout, "0 0 5\n", "answer of one that was made anew"),
    }
    container.end()?;
    let again = Container::make(scene, &bundle, &["run", "-d"])?;
    let asked = again.call(&["exec", &again.id, "python3", "-c", CLIENT, "5"])?;
    ensure_eq!(asked.output()?, "0 0 5\n", "answer to a container that was made anew");
    again.end()?;
    stop(server)?;
    before.check()
}
