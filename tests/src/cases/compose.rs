//! `docker compose` of a web server, an application and a database, which find each other by their names, and the volume of the
//! database, which outlives it.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::{long, oci};
use crate::docker::{Docker, check};
use crate::image;
use crate::leaks::Leaks;
use crate::netns::Netns;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    long(oci("compose::web_server_application_and_database", by_path)),
    long(oci("compose::by_the_shim", by_the_shim)),
];

/// The image has no programs: they are this host's, so that there is less to load.
const SERVICES: &str = r#"
x-all: &all
  image: services
  pull_policy: never
  networks: [shop]
services:
  db:
    <<: *all
    user: postgres
    stop_signal: SIGINT
    command: [/usr/lib/postgresql/17/bin/postgres, -D, /data]
    volumes: ["/bundles/services/rootfs/usr:/usr:ro", "cluster:/data"]
    shm_size: 64m
    mem_limit: 256m
  app:
    <<: *all
    user: www-data
    command: [python3, /etc/app.py]
    volumes: ["/bundles/services/rootfs/usr:/usr:ro"]
    depends_on: [db]
  web:
    <<: *all
    command: [nginx, -c, /etc/web.conf]
    volumes: ["/bundles/services/rootfs/usr:/usr:ro"]
    ports: ["8080:80"]
    depends_on: [app]
networks: {shop: {}}
volumes: {cluster: {external: true, name: cluster}}
"#;

const WEB: &str = "daemon off; worker_processes 1; error_log stderr; pid /run/nginx.pid; events {}\n\
    http { access_log off; server { listen 80; location / { proxy_pass http://app:8000; } } }";

/// Counts its visitors.
const APP: &str = r#"
import socket, subprocess
server = socket.create_server(("", 8000))
query = "CREATE TABLE IF NOT EXISTS visits (id serial); INSERT INTO visits DEFAULT VALUES; SELECT count(*) FROM visits"
psql = ["/usr/lib/postgresql/17/bin/psql", "-h", "db", "-U", "postgres", "-Atqc", query]
while True:
    stream, _ = server.accept()
    with stream:
        stream.recv(65536)
        done = subprocess.run(psql, capture_output=True)
        status = "200 OK" if done.returncode == 0 else "503 Not Yet"
        stream.sendall(f"HTTP/1.0 {status}\r\n\r\n".encode() + (done.stdout or done.stderr))
"#;

/// Small, and whoever reaches it may ask.
const POSTGRES: &str = "listen_addresses = '*'\nshared_buffers = 16MB\nunix_socket_directories = '/tmp'\n\
    autovacuum = off\njit = off\n";

/// Answers every question for an address with the same one.
const NAME_SERVER: &str = "
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(('10.92.0.53', 53))
print('ready', flush=True)
while True:
    question, asker = server.recvfrom(512)
    end = question.index(b'\\0', 12) + 5
    answers = question[end - 4:end - 2] == b'\\0\\x01'
    answer = b'\\xc0\\x0c\\0\\x01\\0\\x01\\0\\0\\0\\x3c\\0\\x04\\x01\\x02\\x03\\x04' if answers else b''
    server.sendto(question[:2] + b'\\x81\\x80\\0\\x01\\0' + bytes([answers]) + b'\\0\\0\\0\\0' + question[12:end] + answer, asker)
";

fn by_path(scene: &Scene) -> Outcome {
    web_server_application_and_database(scene, Docker::start_with)
}

fn by_the_shim(scene: &Scene) -> Outcome {
    web_server_application_and_database(scene, Docker::by_shim)
}

fn web_server_application_and_database(
    scene: &Scene,
    start: fn(&Scene, &Netns, &[&str]) -> Outcome<Docker>,
) -> Outcome {
    let host = Netns::new(scene, "host")?;
    host.ip("address add 10.92.0.53/32 dev lo")?;
    let mut names = host.start(&["python3", "-c", NAME_SERVER])?;
    names.expect_line("ready")?;
    let before = Leaks::watch();
    let docker = start(scene, &host, &["--dns", "10.92.0.53"])?;
    let archive = image::of_services(scene, &[("web.conf", WEB), ("app.py", APP)])?;
    docker.call(&["load", "-q", "-i", &archive.to_string_lossy()])?.output()?;
    fill_volume(&docker)?;
    let file = scene.directory.join("compose.yaml");
    fs::write(&file, SERVICES)?;
    let file = file.to_string_lossy();
    let compose =
        |words: &[&str]| docker.call_for_long(&[&["compose", "-f", &file, "-p", "shop"], words].concat())?.output();

    compose(&["up", "-d"])?;
    ensure_eq!(visit(&host)?, "1\n", "visitors");
    compose(&["restart", "db"])?;
    ensure_eq!(visit(&host)?, "2\n", "visitors after the database was restarted");
    let known = compose(&["exec", "-T", "app", "getent", "ahostsv4", "web"])?;
    ensure!(known.contains("STREAM web"), "another service: {known:?}");
    let outside = compose(&["exec", "-T", "app", "getent", "ahostsv4", "outside.example"])?;
    ensure!(outside.starts_with("1.2.3.4 "), "a name that Docker asks others for: {outside:?}");
    let listed = compose(&["ps", "--format", "{{.Service}} {{.State}}"])?;
    let mut listed: Vec<&str> = listed.lines().collect();
    listed.sort_unstable();
    ensure_eq!(listed, ["app running", "db running", "web running"], "services");
    compose(&["down", "-t", "20"])?;
    docker.end()?;
    check(&before)?;
    drop(names);
    Ok(())
}

/// A volume with the empty database that this host has.
fn fill_volume(docker: &Docker) -> Outcome {
    docker.call(&["volume", "create", "cluster"])?.output()?;
    let place = docker.call(&["volume", "inspect", "-f", "{{.Mountpoint}}", "cluster"])?.output()?;
    let place = Path::new(place.trim());
    fs::remove_dir(place)?;
    let cluster = "/bundles/services/rootfs/var/lib/postgresql/17/main";
    let status = Command::new("cp").args(["-a", cluster]).arg(place).status()?;
    ensure!(status.success(), "cp: {status}");
    for (name, text) in
        [("postgresql.conf", POSTGRES), ("pg_hba.conf", "host all all all trust\n"), ("pg_ident.conf", "")]
    {
        fs::write(place.join(name), text)?;
    }
    Ok(())
}

/// What the application answers by way of the web server, once all of it is there.
fn visit(host: &Netns) -> Outcome<String> {
    let words = ["curl", "-s", "-f", "--max-time", "60", "--retry", "60", "--retry-all-errors", "--retry-delay", "1"];
    host.run(&[&words[..], &["http://127.0.0.1:8080/"]].concat())?.output()
}
