//! A pod as people have it: a web server, an application and a database with a volume, whose containers are killed under load and made
//! anew, as kubelet does.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use k8s_cri::v1 as api;
use rustix::process::{Pid, Signal, kill_process};

use super::oci;
use crate::cri::{Cri, Pod, container, security, volume};
use crate::netns::Netns;
use crate::run::DEADLINE;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq, image};

pub const CASES: &[Case] = &[oci("cri_workload::what_is_confirmed_stays", what_is_confirmed_stays)];

const IMAGE: &str = "docker.io/library/services:latest";

const WEB: &str = "daemon off; worker_processes 1; error_log stderr; pid /run/nginx.pid; events {}\n\
    http { access_log off; server { listen 80; location / { proxy_pass http://127.0.0.1:8000; } } }";

/// Keeps the number that a request names, and confirms it when it is committed.
const APP: &str = r#"
import socket, subprocess
server = socket.create_server(("127.0.0.1", 8000))
psql = ["/usr/lib/postgresql/17/bin/psql", "-h", "127.0.0.1", "-U", "postgres", "-Atqc"]
while True:
    stream, _ = server.accept()
    with stream:
        number = int(stream.recv(65536).split()[1][1:])
        done = subprocess.run(psql + [f"INSERT INTO kept VALUES ({number})"], capture_output=True)
        status = "200 OK" if done.returncode == 0 else "503 Not Yet"
        stream.sendall(f"HTTP/1.0 {status}\r\n\r\n{number}\n".encode())
"#;

/// A request of the application that does not come from the web server.
const ASK_APP: &str = r#"
import socket, sys
stream = socket.create_connection(("127.0.0.1", 8000))
stream.sendall(b"GET /0 HTTP/1.0\r\n\r\n")
sys.exit(b" 200 OK" not in stream.recv(65536))
"#;

const POSTGRES: &str = "listen_addresses = '127.0.0.1'\nshared_buffers = 16MB\nunix_socket_directories = '/tmp'\n\
    autovacuum = off\njit = off\n";

/// The containers, and what they run as whom.
const PARTS: [(&str, &str, &[&str]); 3] = [
    ("db", "postgres", &["/usr/lib/postgresql/17/bin/postgres", "-D", "/data"]),
    ("app", "www-data", &["python3", "/etc/app.py"]),
    ("web", "", &["nginx", "-c", "/etc/web.conf"]),
];

/// A request, and whether it was confirmed.
struct Asked {
    number: u32,
    from: Instant,
    to: Instant,
    confirmed: bool,
}

/// What there is of a pod.
struct Shop<'a> {
    cri: &'a Cri,
    pod: Pod,
    volume: PathBuf,
    ids: Vec<String>,
}

impl Shop<'_> {
    fn launch(&self, part: usize, attempt: u32) -> Outcome<String> {
        let (name, user, command) = PARTS[part];
        let mut config = container(name, command);
        let metadata = config.metadata.get_or_insert_default();
        metadata.attempt = attempt;
        config.image = Some(api::ImageSpec { image: IMAGE.into(), ..Default::default() });
        config.log_path = format!("{name}.{attempt}");
        config.mounts.push(volume("/bundles/services/rootfs/usr".as_ref(), "/usr", true));
        if name == "db" {
            config.mounts.push(volume(&self.volume, "/data", false));
        }
        security(&mut config).run_as_username = user.into();
        self.cri.launch(&self.pod, config)
    }

    /// Waits until a part answers that was asked by itself. It is asked seldom: a database that recovers has work to do.
    fn answers(&self, part: usize, server: SocketAddr) -> Outcome {
        let until = Instant::now() + 2 * DEADLINE;
        loop {
            let answer = match part {
                0 => self.ask_database("SELECT 1").map(|answer| answer == "1"),
                1 => self.cri.exec(&self.ids[1], &["python3", "-c", ASK_APP], 0).map(|ended| ended.status == 0),
                _ => Netns::at(&self.cri.netns.path).within(move || ask(server, 0)),
            };
            if answer.as_ref().is_ok_and(|answer| *answer) {
                return Ok(());
            }
            ensure!(Instant::now() < until, "{} does not answer: {answer:?}", PARTS[part].0);
            thread::sleep(Duration::from_secs(1));
        }
    }

    fn ask_database(&self, query: &str) -> Outcome<String> {
        let psql = "/usr/lib/postgresql/17/bin/psql -h 127.0.0.1 -U postgres -Atqc";
        Ok(self.cri.shell(&self.ids[0], &format!("{psql} '{query}'"))?.trim().to_owned())
    }
}

/// A cluster in a new volume.
fn make_cluster(scene: &Scene) -> Outcome<PathBuf> {
    let volume = scene.make_directory("volume")?;
    fs::remove_dir(&volume)?;
    let cluster = "/bundles/services/rootfs/var/lib/postgresql/17/main";
    let status = Command::new("cp").args(["-a", cluster]).arg(&volume).status()?;
    ensure!(status.success(), "cp: {status}");
    for (name, text) in
        [("postgresql.conf", POSTGRES), ("pg_hba.conf", "host all all all trust\n"), ("pg_ident.conf", "")]
    {
        fs::write(volume.join(name), text)?;
    }
    Ok(volume)
}

/// One request.
fn ask(server: SocketAddr, number: u32) -> bool {
    let answer = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&server, DEADLINE)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        write!(stream, "GET /{number} HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    answer().is_ok_and(|answer| answer.contains(" 200 OK") && answer.ends_with(&format!("\n{number}\n")))
}

/// Requests, one after the other, until it is told to end.
fn drive(server: SocketAddr, over: &AtomicBool, asked: &Mutex<Vec<Asked>>) {
    for number in 1.. {
        if over.load(Ordering::Relaxed) {
            return;
        }
        let from = Instant::now();
        let confirmed = ask(server, number);
        let one = Asked { number, from, to: Instant::now(), confirmed };
        asked.lock().unwrap_or_else(PoisonError::into_inner).push(one);
        if !confirmed {
            thread::sleep(Duration::from_millis(100));
        }
    }
}

fn what_is_confirmed_stays(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    cri.import(&image::of_services(scene, &[("web.conf", WEB), ("app.py", APP)])?)?;
    let pod = cri.run(cri.pod_config("shop")?)?;
    let mut shop = Shop { cri: &cri, pod, volume: make_cluster(scene)?, ids: Vec::new() };
    for part in 0..PARTS.len() {
        shop.ids.push(shop.launch(part, 0)?);
    }
    let until = Instant::now() + DEADLINE;
    while shop.ask_database("CREATE TABLE IF NOT EXISTS kept (number int)").is_err() {
        ensure!(Instant::now() < until, "the database does not come up: {:?}", cri.log(&shop.pod, "db.0"));
        thread::sleep(Duration::from_millis(500));
    }
    let server: SocketAddr = (cri.pod_status(&shop.pod)?.network.unwrap_or_default().ip + ":80").parse()?;
    let (pause, rounds) = if scene.is_soak() { (Duration::from_secs(20), 15) } else { (Duration::from_secs(4), 3) };
    let (over, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
    let driver = {
        let (netns, over, asked) = (Netns::at(&cri.netns.path), over.clone(), asked.clone());
        thread::spawn(move || netns.within(move || drive(server, &over, &asked)))
    };
    let confirmed = || {
        let asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.iter().filter(|one| one.confirmed).count()
    };
    let await_more = |what: &str| -> Outcome {
        // One that is lost to an outage may be waited for first.
        let (before, until) = (confirmed(), Instant::now() + 2 * DEADLINE);
        while confirmed() < before + 2 {
            ensure!(Instant::now() < until, "no request is confirmed {what}, after {before}");
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    };
    let mut outages = Vec::new();
    let result = (|| -> Outcome {
        await_more("at first")?;
        for round in 0..rounds {
            thread::sleep(pause);
            let part = round % PARTS.len();
            let old = shop.ids[part].clone();
            let process = Pid::from_raw(cri.process(&old)?).ok_or("no process")?;
            let began = Instant::now();
            kill_process(process, Signal::KILL)?;
            ensure_eq!(cri.ended(&old)?.exit_code, 137, "status of {}", PARTS[part].0);
            shop.ids[part] = shop.launch(part, u32::try_from(round)? + 1)?;
            cri.remove(&old)?;
            shop.answers(part, server)?;
            // From now on nothing is missing, and no request may be lost any more.
            outages.push((began, Instant::now()));
            await_more(&format!("after {} was killed", PARTS[part].0))?;
        }
        Ok(())
    })();
    over.store(true, Ordering::Relaxed);
    driver.join().map_err(|_| "the driver panicked")??;
    result?;
    let asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
    for one in asked.iter().filter(|one| !one.confirmed) {
        let excused = outages.iter().any(|(began, ended)| one.from < *ended && one.to > *began);
        ensure!(excused, "request {} is lost, and nothing was killed then", one.number);
    }
    let kept = shop.ask_database("SELECT number FROM kept")?;
    let kept: Vec<&str> = kept.lines().collect();
    for one in asked.iter().filter(|one| one.confirmed) {
        ensure!(kept.contains(&&*one.number.to_string()), "request {} was confirmed, and is not kept", one.number);
    }
    ensure!(kept.len() > 2 * rounds, "{} requests in {rounds} rounds", kept.len());
    cri.remove_pod(&shop.pod)?;
    cri.end()
}
