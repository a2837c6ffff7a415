//! What kubectl exec, attach and port-forward come to: streams by containerd's server for them.

use k8s_cri::v1 as api;

use super::oci;
use crate::cri::{Cri, PATIENT, container};
use crate::cri_streams::{RESIZE, STATUS, STDERR, STDIN, STDOUT, Streams};
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("cri_streams::of_what_is_executed", of_what_is_executed),
    oci("cri_streams::of_the_container", of_the_container),
    oci("cri_streams::of_ports", of_ports),
];

fn exec(cri: &Cri, request: api::ExecRequest) -> Outcome<Streams> {
    let url = cri.call(async |mut client| client.exec(request).await)?.url;
    Streams::open(&cri.netns, &url, "")
}

fn of_what_is_executed(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("exec")?)?;
    let id = cri.launch(&pod, container("main", PATIENT))?;
    let request = |words: &[&str], tty| api::ExecRequest {
        container_id: id.clone(),
        cmd: words.iter().map(|word| (*word).to_owned()).collect(),
        tty,
        stdin: true,
        stdout: true,
        stderr: !tty,
    };
    let mut streams = exec(&cri, request(&["sh", "-c", "read line; echo \"got $line\"; echo err >&2; exit 3"], false))?;
    streams.send(STDIN, b"a word\n")?;
    let status = streams.rest(STATUS)?;
    ensure!(status.contains("\"ExitCode\"") && status.contains("\"3\""), "status {status}");
    ensure_eq!((&*streams.rest(STDOUT)?, &*streams.rest(STDERR)?), ("got a word\n", "err\n"), "outputs");

    let mut terminal = exec(&cri, request(&["sh"], true))?;
    terminal.send(RESIZE, br#"{"Width":91,"Height":33}"#)?;
    terminal.send(STDIN, b"until [ \"$(stty size)\" = '33 91' ]; do sleep 0.1; done; echo si''ze; exit 4\n")?;
    terminal.expect(STDOUT, "size")?;
    let status = terminal.rest(STATUS)?;
    ensure!(status.contains("\"4\""), "status {status}");
    cri.remove_pod(&pod)?;
    cri.end()
}

fn of_the_container(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("attach")?)?;
    let mut config = container("main", &["sh", "-c", "while read line; do echo \"got $line\"; done; exit 5"]);
    (config.stdin, config.stdin_once) = (true, true);
    let id = cri.launch(&pod, config)?;
    let request = api::AttachRequest { container_id: id.clone(), stdin: true, tty: false, stdout: true, stderr: true };
    let url = cri.call(async |mut client| client.attach(request).await)?.url;
    let mut streams = Streams::open(&cri.netns, &url, "")?;
    streams.send(STDIN, b"one\n")?;
    streams.expect(STDOUT, "got one\n")?;
    streams.send(STDIN, b"two\n")?;
    streams.expect(STDOUT, "got two\n")?;
    // It was to be there for one client alone: that is its end.
    streams.close();
    ensure_eq!(cri.ended(&id)?.exit_code, 5, "exit status");

    let script =
        "until [ \"$(stty size)\" = '33 91' ]; do sleep 0.1; done; echo resized; read line; echo \"got $line\"; exit 6";
    let mut config = container("terminal", &["sh", "-c", script]);
    (config.tty, config.stdin, config.stdin_once) = (true, true, true);
    let id = cri.launch(&pod, config)?;
    let request = api::AttachRequest { container_id: id.clone(), stdin: true, tty: true, stdout: true, stderr: false };
    let url = cri.call(async |mut client| client.attach(request).await)?.url;
    let mut terminal = Streams::open(&cri.netns, &url, "")?;
    terminal.send(RESIZE, br#"{"Width":91,"Height":33}"#)?;
    terminal.expect(STDOUT, "resized\r\n")?;
    terminal.send(STDIN, b"a word\r")?;
    terminal.expect(STDOUT, "a word\r\ngot a word\r\n")?;
    ensure_eq!(cri.ended(&id)?.exit_code, 6, "exit status of who has a terminal");
    cri.remove_pod(&pod)?;
    cri.end()
}

fn of_ports(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    let pod = cri.run(cri.pod_config("ports")?)?;
    let id = cri.launch(&pod, container("main", PATIENT))?;
    // At localhost alone, where a pod on runc is reached.
    let servers =
        "mkdir /www && echo spoken >/www/said && httpd -p 127.0.0.1:8080 -h /www && httpd -p [::1]:8081 -h /www";
    cri.shell(&id, servers)?;
    let forward = |port: u16| -> Outcome<_> {
        let request = api::PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: vec![port.into()] };
        let url = cri.call(async |mut client| client.port_forward(request).await)?.url;
        Streams::open(&cri.netns, &url, &format!("?port={port}"))
    };
    for port in [8080, 8081] {
        let mut streams = forward(port)?;
        // For each port a channel of data and one of errors, which first say its number.
        streams.send(0, b"GET /said HTTP/1.0\r\n\r\n")?;
        let received = streams.receive(0, |bytes| bytes.ends_with(b"spoken\n"))?;
        ensure_eq!(received.get(..2), Some(&port.to_le_bytes()[..]), "the port");
        let page = String::from_utf8_lossy(&received[2..]).into_owned();
        let failed = if page.ends_with("spoken\n") { String::new() } else { streams.rest(1)? };
        ensure!(page.starts_with("HTTP/1") && failed.is_empty(), "received {page:?} of {port}, error {failed:?}");
        streams.close();
    }
    let nobody = forward(8082)?.receive(0, |_| false)?;
    ensure_eq!(nobody, 8082_u16.to_le_bytes(), "what comes of a port where nobody listens, to its end");
    cri.remove_pod(&pod)?;
    cri.end()
}
