//! Networks of pods, as the plugins of CNI make them: seen from inside, from the node, and from beyond it.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use k8s_cri::v1 as api;

use super::network::{ASK, ECHO, SHOW, configuration};
use super::oci;
use crate::cni::Network;
use crate::cri::{Cri, Pod, with_python};
use crate::netns::Netns;
use crate::run::DEADLINE;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq, image};

pub const CASES: &[Case] = &[
    oci("cri_network::pods_and_their_node", pods_and_their_node),
    oci("cri_network::ports_of_the_node", ports_of_the_node),
    oci("cri_network::several_interfaces", several_interfaces),
];

/// A pod with a server that answers with what it was sent: TCP and UDP, port 7, all addresses.
fn with_server(cri: &Cri, config: api::PodSandboxConfig) -> Outcome<(Pod, String)> {
    let pod = cri.run(config)?;
    let id = cri.launch(&pod, with_python("server", &["python3", "-c", ECHO], Vec::new()))?;
    let until = Instant::now() + DEADLINE;
    while !cri.log(&pod, "server")?.contains("ready") {
        ensure!(Instant::now() < until, "the server does not begin: {:?}", cri.log(&pod, "server"));
        thread::sleep(Duration::from_millis(100));
    }
    Ok((pod, id))
}

/// The addresses of its first interface: of the first kind, and of the other.
fn addresses(cri: &Cri, pod: &Pod) -> Outcome<[IpAddr; 2]> {
    let network = cri.pod_status(pod)?.network.unwrap_or_default();
    match &*network.additional_ips {
        [other] => Ok([network.ip.parse()?, other.ip.parse()?]),
        _ => Err(format!("not two addresses: {network:?}").into()),
    }
}

/// Bytes that come back, over TCP.
fn echo(address: SocketAddr, length: usize) -> std::io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, DEADLINE)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let sent: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
    let (mut sender, to_send) = (stream.try_clone()?, sent.clone());
    let sending = thread::spawn(move || sender.write_all(&to_send));
    let mut received = vec![0; length];
    stream.read_exact(&mut received)?;
    sending.join().map_err(|_| ErrorKind::Other)??;
    if received == sent { Ok(()) } else { Err(ErrorKind::InvalidData.into()) }
}

/// A datagram that comes back.
fn datagram(address: SocketAddr) -> std::io::Result<()> {
    let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(DEADLINE))?;
    let (sent, mut received) = ([b'x'; 1200], [0; 2000]);
    socket.send(&sent)?;
    let length = socket.recv(&mut received)?;
    if received[..length] == sent { Ok(()) } else { Err(ErrorKind::InvalidData.into()) }
}

/// Asks the server of a pod from a namespace of the host.
fn ask(from: &Netns, ip: IpAddr, port: u16) -> Outcome {
    let address = SocketAddr::from((ip, port));
    let asked = from.within(move || [echo(address, 1), echo(address, 1_000_000), datagram(address)])?;
    ensure!(asked.iter().all(Result::is_ok), "{address}: a byte, many, and a datagram come back: {asked:?}");
    Ok(())
}

/// Nobody listens there.
fn refused(from: &Netns, ip: IpAddr, port: u16) -> Outcome {
    let asked = from.within(move || echo((ip, port).into(), 1))?;
    let kind = asked.as_ref().err().map(std::io::Error::kind);
    ensure!(kind == Some(ErrorKind::ConnectionRefused), "{ip} port {port}: {asked:?}");
    Ok(())
}

/// Over both versions of IP, all ways; and what a pod has sent and received is known.
fn pods_and_their_node(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    cri.import(&image::of_debian(scene)?)?;
    let (one, in_one) = with_server(&cri, cri.pod_config("one")?)?;
    let (two, in_two) = with_server(&cri, cri.pod_config("two")?)?;
    let (of_one, of_two) = (addresses(&cri, &one)?, addresses(&cri, &two)?);
    for ips in [of_one, of_two] {
        let [first, second] = ips.map(|ip| ip.to_string());
        ensure!(first.starts_with("10.88.7.") && second.starts_with("fd00:88:7::"), "addresses {first}, {second}");
        for ip in ips {
            ask(&cri.netns, ip, 7)?;
        }
    }
    // Each asks the other, itself, and itself by the name that is for that.
    for (id, ips) in [(&in_one, of_two), (&in_two, of_one), (&in_one, of_one)] {
        let [first, second] = ips.map(|ip| ip.to_string());
        let asked = cri.exec(id, &["python3", "-c", ASK, &first, &second, "127.0.0.1", "::1"], 0)?;
        ensure!(asked.status == 0 && asked.stdout.lines().count() == 4, "what is asked inside: {asked:?}");
    }
    counted(&cri, &one, of_one)?;
    for pod in [one, two] {
        cri.remove_pod(&pod)?;
    }
    cri.end()
}

/// Bytes that the interface of a pod has received and sent, as who asks for one pod is told, and who asks for all.
fn traffic(cri: &Cri, pod: &Pod) -> Outcome<[[u64; 2]; 2]> {
    let request = api::PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let one = cri.call(async |mut client| client.pod_sandbox_stats(request).await)?.stats;
    let request = api::ListPodSandboxStatsRequest::default();
    let all = cri.call(async |mut client| client.list_pod_sandbox_stats(request).await)?.stats;
    let is_this = |stats: &api::PodSandboxStats| stats.attributes.as_ref().is_some_and(|of| of.id == pod.id);
    let of = |stats: Option<api::PodSandboxStats>| -> Outcome<[u64; 2]> {
        let network = stats.and_then(|stats| stats.linux).and_then(|linux| linux.network);
        let interface = network.and_then(|network| network.default_interface).ok_or("no interface")?;
        ensure_eq!(interface.name, "eth0", "interface that is counted");
        let value = |value: Option<api::UInt64Value>| value.map_or(0, |value| value.value);
        Ok([value(interface.rx_bytes), value(interface.tx_bytes)])
    };
    Ok([of(one)?, of(all.into_iter().find(is_this))?])
}

/// Within 5 % of what has gone over it.
fn counted(cri: &Cri, pod: &Pod, ips: [IpAddr; 2]) -> Outcome {
    const BYTES: usize = 4 << 20;
    for ip in ips {
        // What is sent again, where the host stands still for a while, is counted as well.
        for last in [false, false, true] {
            let before = traffic(cri, pod)?;
            cri.netns.within(move || echo((ip, 7).into(), BYTES))??;
            let after = traffic(cri, pod)?;
            let mut right = true;
            for (before, after) in before.iter().flatten().zip(after.iter().flatten()) {
                let (grown, bytes) = (after - before, BYTES as u64);
                let close = grown * 20 < bytes * 21;
                ensure!(grown >= bytes && (close || !last), "{grown} bytes are counted of {bytes}, {ip}");
                right &= close;
            }
            if right {
                break;
            }
        }
    }
    Ok(())
}

/// Those by which others reach a pod at the node's addresses, as long as there is the pod.
fn ports_of_the_node(scene: &Scene) -> Outcome {
    let cri = Cri::start(scene)?;
    cri.import(&image::of_debian(scene)?)?;
    let lan = Netns::new(scene, "lan")?;
    let (own, of_lan) = (["192.0.2.1/24", "2001:db8::1/64"], ["192.0.2.2/24", "2001:db8::2/64"]);
    cri.netns.connect("uplink", &own, &lan, "lan0", &of_lan)?;
    let mut config = cri.pod_config("ports")?;
    let (first, second): (IpAddr, IpAddr) = ("192.0.2.1".parse()?, "2001:db8::1".parse()?);
    let mapping = |protocol: api::Protocol, host_port, host_ip: &str| api::PortMapping {
        protocol: protocol.into(),
        container_port: 7,
        host_port,
        host_ip: host_ip.into(),
    };
    config.port_mappings = [(8007, ""), (8008, "192.0.2.1")]
        .into_iter()
        .flat_map(|(port, ip)| [api::Protocol::Tcp, api::Protocol::Udp].map(|protocol| mapping(protocol, port, ip)))
        .collect();
    let (pod, _) = with_server(&cri, config)?;
    let localhost: IpAddr = [127, 0, 0, 1].into();
    for (from, ip, port) in [
        (&cri.netns, localhost, 8007),
        (&cri.netns, first, 8007),
        (&cri.netns, second, 8007),
        (&lan, first, 8007),
        (&lan, second, 8007),
        (&lan, first, 8008),
    ] {
        ask(from, ip, port)?;
    }
    // One that is at one address is at no other.
    refused(&cri.netns, localhost, 8008)?;
    refused(&lan, second, 8008)?;
    cri.remove_pod(&pod)?;
    for (from, ip) in [(&cri.netns, localhost), (&lan, first), (&lan, second)] {
        refused(from, ip, 8007)?;
    }
    drop(lan);
    cri.end()
}

/// So many bits a second pass over the one that is limited.
const RATE: u64 = 8_000_000;

/// Takes what it is sent, or sends as much as it is asked for.
const TRANSFER: &str = "import socket
server = socket.create_server(('0.0.0.0', 8))
print('ready', flush=True)
while True:
    stream, block = server.accept()[0], bytes(65536)
    with stream:
        length = int(stream.recv(16))
        stream.sendall(b' ')
        if length:
            while length: length -= stream.send(block[:length])
        else:
            while stream.recv(65536): pass
            stream.sendall(b'.')
";

/// A line to the node, and a bridge that is limited: each is there as it was made, and carries its own.
fn several_interfaces(scene: &Scene) -> Outcome {
    let networks = |directory: &Path| vec![Network::point_to_point(directory), Network::limited(directory, RATE)];
    let cri = Cri::with_networks(scene, networks)?;
    cri.import(&image::of_debian(scene)?)?;
    let (pod, id) = with_server(&cri, cri.pod_config("several")?)?;
    let [line, line6] = addresses(&cri, &pod)?;
    ensure!(
        line.to_string().starts_with("10.88.8.") && line6.to_string().starts_with("fd00:88:8::"),
        "{line}, {line6}"
    );
    let namespace = Netns::of(cri.pod_process(&pod)?.as_raw_nonzero().get());
    let mut expected = configuration(&namespace.run(&["sh", "-c", SHOW])?.output()?)?;
    // By which they are joined to the machine.
    expected.retain(|line| !line.contains("\"podhull"));
    ensure!(expected.iter().any(|line| line.contains("eth1")), "no second interface: {expected:?}");
    ensure_eq!(configuration(&cri.shell(&id, SHOW)?)?, expected, "interfaces, routes and neighbours inside");
    let bridge = IpAddr::from([10, 88, 9, 2]);
    for ip in [line, line6, bridge, "fd00:88:9::2".parse()?] {
        ask(&cri.netns, ip, 7)?;
    }
    let transfer = cri.launch(&pod, with_python("transfer", &["python3", "-c", TRANSFER], Vec::new()))?;
    let until = Instant::now() + DEADLINE;
    while !cri.log(&pod, "transfer")?.contains("ready") {
        ensure!(Instant::now() < until, "it does not begin: {:?}", cri.status(&transfer));
    }
    const BYTES: usize = 4 << 20;
    for into in [true, false] {
        let seconds = |ip: IpAddr| cri.netns.within(move || transferred((ip, 8).into(), BYTES, into));
        let (mut free, limited) = (seconds(line)??, seconds(bridge)??);
        // The host may stand still in one that is not limited.
        for _ in 0..4 {
            if limited > 3.0 * free {
                break;
            }
            free = free.min(seconds(line)??);
        }
        let way = if into { "into" } else { "out of" };
        println!("     {BYTES} bytes {way} a pod take {free:.2} s, and {limited:.2} s over an interface with a limit");
        // No slowness of the host's makes it less than the last.
        let [slower, least] = [3.0 * free, BYTES as f64 * 8.0 / RATE as f64 * 0.8].map(|least| limited > least);
        ensure!(slower && least, "{BYTES} bytes {way} the pod take {limited:.2} s with a limit, and without {free:.2}");
    }
    cri.remove_pod(&pod)?;
    cri.end()
}

/// Seconds that so many bytes take.
fn transferred(address: SocketAddr, length: usize, into: bool) -> std::io::Result<f64> {
    let mut stream = TcpStream::connect_timeout(&address, DEADLINE)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let asked = if into { 0 } else { length };
    stream.write_all(asked.to_string().as_bytes())?;
    stream.read_exact(&mut [0])?;
    let began = Instant::now();
    let mut received = Vec::new();
    if into {
        stream.write_all(&vec![0; length])?;
        stream.shutdown(Shutdown::Write)?;
    }
    stream.read_to_end(&mut received)?;
    let expected = if into { 1 } else { length };
    if received.len() == expected { Ok(began.elapsed().as_secs_f64()) } else { Err(ErrorKind::UnexpectedEof.into()) }
}
