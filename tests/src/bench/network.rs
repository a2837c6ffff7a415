//! TCP between a container and its neighbour on the same wire: podhull's tap beside runc's veth.

use std::ffi::OsStr;
use std::path::Path;

use serde_json::{Value, json};

use super::Bench;
use super::report::{Figure, Panel};
use crate::bundle::{Bundle, DEBIAN};
use crate::container::Container;
use crate::netns::Netns;
use crate::run::DEADLINE;
use crate::runtime::Runtime;
use crate::suite::Scene;
use crate::{Outcome, ensure_eq};

/// MiB in each direction, and bytes that go to and fro one at a time.
const MIB: usize = 32;
const TRIPS: usize = 200;

/// Takes all bytes, says how many came, sends as many, and returns the single ones.
const SERVER: &str = "
import socket
server = socket.create_server(('0.0.0.0', 7))
print('ready', flush=True)
stream = server.accept()[0]
stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
total, buffer = 0, bytearray(1 << 20)
while total < BYTES and (count := stream.recv_into(buffer)):
    total += count
stream.sendall(total.to_bytes(8))
block = bytes(1 << 20)
for _ in range(BYTES >> 20):
    stream.sendall(block)
while byte := stream.recv(1):
    stream.sendall(byte)
";

/// Prints how long each of the three took, in seconds.
const CLIENT: &str = "
import socket, time
stream = socket.create_connection(('10.88.0.2', 7), timeout=80)
stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
times, block, buffer = [time.monotonic()], bytes(1 << 20), bytearray(1 << 20)
for _ in range(BYTES >> 20):
    stream.sendall(block)
assert int.from_bytes(stream.recv(8)) == BYTES
times.append(time.monotonic())
total = 0
while total < BYTES and (count := stream.recv_into(buffer)):
    total += count
assert total == BYTES
times.append(time.monotonic())
for _ in range(TRIPS):
    stream.sendall(b'x')
    assert stream.recv(1) == b'x'
times.append(time.monotonic())
print(*(after - before for before, after in zip(times, times[1:])))
";

/// Into the container, out of it (MiB/s), and there and back (us).
type Samples = [Vec<f64>; 3];

/// Podhull and runc in turns.
pub fn measure(bench: &Bench) -> Outcome<Vec<Panel>> {
    let runtimes = [bench.podhull.clone(), Runtime::find(OsStr::new("runc"))?];
    let scenes = runtimes.iter().map(|runtime| bench.scene("network", runtime)).collect::<Outcome<Vec<_>>>()?;
    let mut samples: [Samples; 2] = Default::default();
    bench.rounds("network", bench.few(), |round| {
        for (scene, samples) in scenes.iter().zip(&mut samples) {
            let taken = take(bench, scene)?;
            if round.is_some() {
                samples.iter_mut().zip(taken).for_each(|(samples, taken)| samples.push(taken));
            }
        }
        Ok(())
    })?;
    let [ours, theirs] = samples;
    let (mut rates, mut trips) = (Vec::new(), Vec::new());
    for (index, (name, (ours, theirs))) in
        ["TCP in", "TCP out", "there and back"].iter().zip(ours.into_iter().zip(theirs)).enumerate()
    {
        let (unit, list) = if index < 2 { ("MiB/s", &mut rates) } else { ("us", &mut trips) };
        let ours = Figure::new(format!("podhull: {name}"), unit, ours);
        let theirs = Figure::new(format!("runc: {name}"), unit, theirs);
        let ratio = if index < 2 {
            Figure::ratio(format!("{name}: runc / podhull"), &theirs, &ours)
        } else {
            Figure::ratio(format!("{name}: podhull / runc"), &ours, &theirs)
        };
        list.extend([ours, theirs, ratio]);
    }
    let panel = |title, unit, figures| Panel { title, unit, successive: false, figures };
    Ok(vec![
        panel("32 MiB by TCP between a container and its neighbour (more is better)", "MiB/s", rates),
        panel("One byte by TCP to a container and back", "us", trips),
    ])
}

fn take(bench: &Bench, scene: &Scene) -> Outcome<[f64; 3]> {
    let (pod, lan) = (Netns::new(scene, "pod")?, Netns::new(scene, "lan")?);
    pod.connect("eth0", &["10.88.0.2/24"], &lan, "lan0", &["10.88.0.1/24"])?;
    let namespaces = ["mount", "pid", "network", "ipc", "uts", "cgroup"].map(|kind| match kind {
        "network" => json!({ "type": kind, "path": pod.path }),
        kind => json!({ "type": kind }),
    });
    let program = |text: &str| text.replace("BYTES", &(MIB << 20).to_string()).replace("TRIPS", &TRIPS.to_string());
    let bundle = Bundle::new(scene.make_directory("bundle")?, &bench.podhull.spec, Path::new(DEBIAN))?
        .set("/linux/namespaces", Value::from(namespaces.to_vec()))
        .python(&program(SERVER));
    let container = Container::make(scene, &bundle, &["run", "-d"])?;
    container.expect_output("ready")?;
    let client = lan.start(&["python3", "-c", &program(CLIENT)])?;
    let said = client.wait_within(2 * DEADLINE)?.output()?;
    ensure_eq!(container.wait()?, 0, "exit status of the server");
    container.delete()?;
    let seconds: Vec<f64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [into, out, trips] = seconds[..] else { return Err(format!("the client said {said:?}").into()) };
    Ok([MIB as f64 / into, MIB as f64 / out, trips / TRIPS as f64 * 1e6])
}
