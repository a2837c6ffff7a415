//! Ports of a container, as those reach them that forward `localhost`: from inside its network namespace on the host, where for
//! runc's containers the servers are.

use serde_json::{Value, json};

use super::{oci, podhull};
use crate::bundle::Bundle;
use crate::container::Container;
use crate::netns::Netns;
use crate::run::Running;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure_eq};

pub const CASES: &[Case] = &[
    oci("forwards::localhost_is_the_container_s", localhost_is_the_container_s),
    oci("forwards::many_at_once_in_a_namespace_that_was_there", many_at_once_in_a_namespace_that_was_there),
    podhull("forwards::not_before_there_is_a_server_and_not_after", not_before_there_is_a_server_and_not_after),
];

/// Listens at the addresses of its arguments; tells who has said all there is to say how much that was, and says it again.
const SERVE: &str = "
import socket, sys, threading
def answer(stream):
    with stream:
        said = b''
        while more := stream.recv(65536):
            said += more
        stream.sendall(b'%d ' % len(said) + said)
def listen(server):
    while True:
        threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()
for address in sys.argv[1:]:
    host, port = address.rsplit('/')
    server = socket.create_server((host, int(port)), family=socket.AF_INET6 if ':' in host else socket.AF_INET, backlog=128)
    thread = threading.Thread(target=listen, args=(server,))
    thread.start()
print('ready', flush=True)
thread.join()
";

/// Says something to each address of its arguments, at once, and prints what came back, in order. The first is how many bytes it
/// says; one of itself listens at port 7000.
const ASK: &str = "
import socket, sys
own = socket.create_server(('127.0.0.1', 7000))
said = bytes(i % 251 for i in range(int(sys.argv[1])))
def begin(address):
    host, port = address.rsplit('/')
    try:
        stream = socket.create_connection((host, int(port)), timeout=60)
        stream.settimeout(60)
        return stream
    except ConnectionError: return None
import threading
found = {}
def ask(number, address):
    stream = begin(address)
    try:
        if not stream: raise ConnectionRefusedError()
        if address.endswith('/7000'):
            own.accept()[0].close()
            stream.shutdown(socket.SHUT_WR)
        else:
            stream.sendall(said)
            stream.shutdown(socket.SHUT_WR)
        heard = b''
        while more := stream.recv(65536): heard += more
        found[number] = 'own' if not heard else 'whole' if heard == b'%d ' % len(said) + said else repr(heard[:50])
    except ConnectionError: found[number] = 'refused'
    except BaseException as error: found[number] = repr(error)
threads = [threading.Thread(target=ask, args=each) for each in enumerate(sys.argv[2:])]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(*(found[number] for number in sorted(found)))
";

fn server(scene: &Scene, addresses: &[&str]) -> Outcome<Bundle> {
    Ok(scene.debian()?.args(&[&["python3", "-c", SERVE], addresses].concat()))
}

fn ask(netns: &Netns, length: usize, addresses: &[&str]) -> Outcome<String> {
    netns.run(&[&["python3", "-c", ASK, &length.to_string()], addresses].concat())?.output()
}

fn localhost_is_the_container_s(scene: &Scene) -> Outcome {
    let listening = ["127.0.0.1/8080", "::1/8081", "0.0.0.0/8082", "::/8083"];
    let container = Container::make(scene, &server(scene, &listening)?, &["run", "-d"])?;
    container.expect_output("ready")?;
    let netns = Netns::of(container.pid.as_raw_nonzero().get());
    let reached = [
        "127.0.0.1/8080",
        "::1/8081",
        "127.0.0.1/8082",
        "127.8.8.8/8082",
        "::1/8083",
        "localhost/8080",
        "localhost/8081",
    ];
    ensure_eq!(ask(&netns, 5, &reached)?, "whole whole whole whole whole whole whole\n", "answers of servers");
    ensure_eq!(ask(&netns, 3_000_000, &["127.0.0.1/8080"])?, "whole\n", "a long answer");
    // Where nobody listens, or another address is meant; and what is the namespace's own stays that.
    let others = ["127.0.0.1/9", "::1/9", "127.3.3.3/8080", "127.0.0.1/7000"];
    ensure_eq!(ask(&netns, 5, &others)?, "refused refused refused own\n", "where nobody listens, and own");
    container.end()
}

fn many_at_once_in_a_namespace_that_was_there(scene: &Scene) -> Outcome {
    let netns = Netns::new(scene, "pod")?;
    let lan = Netns::new(scene, "lan")?;
    netns.connect("eth0", &["10.88.0.2/24"], &lan, "lan0", &["10.88.0.1/24"])?;
    let list = ["mount", "pid", "network", "ipc", "uts"].map(|kind| match kind {
        "network" => json!({ "type": kind, "path": netns.path }),
        kind => json!({ "type": kind }),
    });
    let bundle = server(scene, &["0.0.0.0/8080"])?.set("/linux/namespaces", Value::from(list.to_vec()));
    let container = Container::make(scene, &bundle, &["run", "-d"])?;
    container.expect_output("ready")?;
    let many = [&["127.0.0.1/8080"; 40][..], &["10.88.0.2/8080"; 8]].concat();
    let all = format!("whole{}\n", " whole".repeat(many.len() - 1));
    ensure_eq!(ask(&netns, 20_000, &many)?, all, "answers");
    container.end()?;
    ensure_eq!(netns.leftovers()?, "", "left behind");
    // As before there was a container.
    ensure_eq!(ask(&netns, 5, &["127.0.0.1/8080"])?, "refused\n", "when it has ended");
    Ok(())
}

fn not_before_there_is_a_server_and_not_after(scene: &Scene) -> Outcome {
    let container = Container::create(scene, &server(scene, &["127.0.0.1/8080"])?)?;
    let netns = Netns::of(container.pid.as_raw_nonzero().get());
    ensure_eq!(ask(&netns, 5, &["127.0.0.1/8080"])?, "refused\n", "before it is started");
    container.start()?;
    container.expect_output("ready")?;
    // One that is in the middle of something when the container is killed, and is not left waiting.
    let wait = "import socket; stream = socket.create_connection(('127.0.0.1', 8080)); stream.sendall(b'x')\n\
        print('said', flush=True)\ntry: print('end', stream.recv(10))\nexcept ConnectionError: print('reset')";
    let mut waiting: Running = netns.start(&["python3", "-c", wait])?;
    waiting.expect_line("said")?;
    container.end()?;
    let ended = waiting.wait()?.expect_status(0)?;
    crate::ensure!(ended.stdout.ends_with("reset\n") || ended.stdout.ends_with("end b''\n"), "{:?}", ended.stdout);
    Ok(())
}
