//! The pod's network, with pairs of virtual interfaces in place of a machine's devices. Needs iproute2 and nsenter.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::process::{Child, Command, Stdio as Pipe};
use std::time::Duration;

use podhull_protocol::{Address, ConfigureNetworkRequest, Empty, Interface, Neighbour, Route, Stdio};
use serde_json::{Value, json};

use crate::harness::{Agent, deadline, privileged, refused, set, shell, shell_process, with};

/// MAC address of device `number`.
fn mac(number: u8) -> Vec<u8> {
    vec![2, 0, 0, 0, 0, number]
}

fn bytes(ip: &str) -> Vec<u8> {
    match ip.parse().unwrap() {
        IpAddr::V4(ip) => ip.octets().into(),
        IpAddr::V6(ip) => ip.octets().into(),
    }
}

/// `10.0.0.1/24`.
fn address(text: &str) -> Address {
    let (ip, prefix) = text.split_once('/').unwrap();
    Address { ip: bytes(ip), prefix_length: prefix.parse().unwrap(), ..Address::default() }
}

fn interface(name: &str, number: u8, addresses: &[&str]) -> Interface {
    Interface {
        name: name.into(),
        mac: mac(number),
        mtu: 1400,
        up: true,
        addresses: addresses.iter().map(|text| address(text)).collect(),
        ..Interface::default()
    }
}

/// `default` or `10.0.0.0/24`, by way of a gateway or none.
fn route(destination: &str, gateway: &str, interface: &str) -> Route {
    let mut route = Route { family: 2, interface: interface.into(), ..Route::default() };
    if gateway.is_empty() {
        route.scope = 253;
    } else {
        route.gateway = bytes(gateway);
    }
    if let Some((ip, prefix)) = destination.split_once('/') {
        (route.destination, route.prefix_length) = (bytes(ip), prefix.parse().unwrap());
    }
    if route.destination.len() == 16 || route.gateway.len() == 16 {
        route.family = 10;
    }
    route
}

/// As the kernel makes it for an address.
fn connected(network: &str, interface: &str, source: &str) -> Route {
    let mut connected = Route { protocol: 2, ..route(network, "", interface) };
    if connected.family == 2 {
        connected.preferred_source = bytes(source);
    } else {
        connected.metric = 256;
    }
    connected
}

/// What Docker and Podman make: one interface, two families, a way out.
fn ordinary() -> ConfigureNetworkRequest {
    ConfigureNetworkRequest {
        interfaces: vec![interface("eth0", 1, &["10.88.0.5/16", "fd00:88::5/64"])],
        routes: vec![
            route("default", "10.88.0.1", "eth0"),
            route("default", "fd00:88::1", "eth0"),
            connected("10.88.0.0/16", "eth0", "10.88.0.5"),
            connected("fd00:88::/64", "eth0", ""),
        ],
        ..ConfigureNetworkRequest::default()
    }
}

/// An agent with a network of its own, in which are so many devices, and the other ends of their cables.
struct Pod {
    agent: Agent,
}

impl Pod {
    async fn new(devices: u8) -> Self {
        let pod = Self { agent: Agent::listen(true).await };
        for number in 1..=devices {
            pod.add_device(number);
        }
        pod
    }

    fn add_device(&self, number: u8) {
        let (name, peer) = (format!("dev{number}"), format!("peer{number}"));
        let address = format!("02:00:00:00:00:{number:02x}");
        self.ip(&format!("link add name {name} address {address} type veth peer name {peer}"));
        // Without addresses of its own, which would come and go.
        self.ip(&format!("link set {peer} addrgenmode none up"));
    }

    async fn with_pod(devices: u8, network: ConfigureNetworkRequest) -> Self {
        let pod = Self::new(devices).await;
        pod.agent.create_pod(|request| request.network = Some(network).into()).await.unwrap();
        pod
    }

    fn enter(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.agent.pid()));
        command
    }

    /// What `ip` says in the agent's network.
    #[track_caller]
    fn ip(&self, arguments: &str) -> String {
        let output = self.enter().arg("ip").args(arguments.split(' ')).output().expect("nsenter and ip are there");
        assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &str) -> Vec<Value> {
        serde_json::from_str(&self.ip(&format!("-j {arguments}"))).unwrap()
    }

    async fn configure(&self, network: &ConfigureNetworkRequest) -> ttrpc::Result<Empty> {
        self.agent.client.configure_network(deadline(), network).await
    }

    /// The addresses of an interface but those that it has of itself.
    fn addresses(&self, interface: &str) -> BTreeSet<String> {
        let link = self.json(&format!("addr show dev {interface}")).remove(0);
        let text = |address: &Value| {
            format!("{}/{}", address["local"].as_str().unwrap(), address["prefixlen"].as_u64().unwrap())
        };
        link["addr_info"].as_array().unwrap().iter().map(text).filter(|text| !text.starts_with("fe80:")).collect()
    }

    /// The routes of both families but those that an interface has of itself.
    fn routes(&self) -> BTreeSet<String> {
        let (four, six) = (self.ip("-4 route show"), self.ip("-6 route show"));
        let lines =
            four.lines().chain(six.lines()).filter(|line| !line.starts_with("fe80:") && !line.contains(" dev peer"));
        lines.map(|line| line.trim().replace(" pref medium", "")).collect()
    }

    fn names(&self) -> BTreeSet<String> {
        let names = self.json("link show").into_iter().map(|link| link["ifname"].as_str().unwrap().to_owned());
        names.filter(|name| !name.starts_with("peer")).collect()
    }
}

/// A process that ends with its test, whatever becomes of that.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn set_of<const N: usize>(items: [&str; N]) -> BTreeSet<String> {
    items.into_iter().map(str::to_owned).collect()
}

#[tokio::test(flavor = "current_thread")]
async fn the_network_is_made_with_the_pod() {
    let mut network = ordinary();
    network.routes.push(route("10.99.0.0/16", "10.88.0.9", "eth0"));
    // A second one, which is used when the first is gone.
    network.routes.push(route("10.99.0.0/16", "10.88.0.10", "eth0"));
    network.routes.push(Route { kind: 7, ..route("10.66.0.0/16", "", "") });
    network.routes.push(Route { on_link: true, ..route("10.77.0.0/16", "192.0.2.1", "eth0") });
    network.routes.push(Route {
        metrics: [(2, 1300), (8, 1200)].into(),
        metric: 50,
        ..route("10.55.0.0/16", "10.88.0.8", "eth0")
    });
    network.neighbours.push(Neighbour {
        interface: "eth0".into(),
        ip: bytes("10.88.0.1"),
        link_address: vec![2, 9, 9, 9, 9, 9],
        state: 0x80,
        ..Neighbour::default()
    });
    network.sysctl.insert("net/ipv4/conf/eth0/rp_filter".into(), "2".into());
    let pod = Pod::with_pod(1, network).await;
    assert_eq!(pod.names(), set_of(["lo", "eth0"]));
    assert_eq!(pod.addresses("eth0"), set_of(["10.88.0.5/16", "fd00:88::5/64"]));
    assert_eq!(pod.addresses("lo"), set_of(["127.0.0.1/8", "::1/128"]));
    let link = pod.json("link show dev eth0").remove(0);
    assert_eq!((link["mtu"].as_u64(), link["address"].as_str()), (Some(1400), Some("02:00:00:00:00:01")));
    assert!(link["flags"].as_array().unwrap().contains(&json!("UP")));
    assert_eq!(
        pod.routes(),
        set_of([
            "10.55.0.0/16 via 10.88.0.8 dev eth0 proto static metric 50 mtu 1300 advmss 1200",
            "10.77.0.0/16 via 192.0.2.1 dev eth0 proto static onlink",
            "10.88.0.0/16 dev eth0 proto kernel scope link src 10.88.0.5",
            "10.99.0.0/16 via 10.88.0.10 dev eth0 proto static",
            "10.99.0.0/16 via 10.88.0.9 dev eth0 proto static",
            "default via 10.88.0.1 dev eth0 proto static",
            "default via fd00:88::1 dev eth0 proto static metric 1024",
            "fd00:88::/64 dev eth0 proto kernel metric 256",
            "unreachable 10.66.0.0/16 proto static scope link",
        ])
    );
    assert!(pod.ip("route get 10.99.0.1").starts_with("10.99.0.1 via 10.88.0.9 "));
    assert_eq!(pod.ip("neigh show dev eth0 nud permanent").trim(), "10.88.0.1 lladdr 02:09:09:09:09:09 PERMANENT");
    let filter = pod.enter().args(["cat", "/proc/sys/net/ipv4/conf/eth0/rp_filter"]).output().unwrap();
    assert_eq!(filter.stdout, b"2\n");
    // A server may bind to any of them at once.
    assert_eq!(pod.ip("-6 addr show dev eth0 tentative"), "");
}

#[tokio::test(flavor = "current_thread")]
async fn what_is_there_already_is_not_touched() {
    let mut network = ordinary();
    network.interfaces.push(interface("eth1", 2, &["192.0.2.2/24", "192.0.2.3/24"]));
    network.interfaces.push(Interface {
        name: "lo".into(),
        mtu: 65_536,
        addresses: vec![address("10.1.1.1/32")],
        ..Interface::default()
    });
    network.routes.push(connected("192.0.2.0/24", "eth1", "192.0.2.2"));
    network.routes.push(route("203.0.113.0/24", "192.0.2.1", "eth1"));
    network.routes.push(Route { kind: 6, ..route("2001:db8::/32", "", "") });
    let pod = Pod::with_pod(2, network.clone()).await;
    let state = (pod.ip("addr show"), pod.routes());
    let monitor = pod.enter().args(["ip", "monitor", "link", "address", "route"]).stdout(Pipe::piped()).spawn();
    let mut monitor = Killed(monitor.unwrap());
    let lines = BufReader::new(monitor.0.stdout.take().unwrap()).lines();
    let (sender, heard) = std::sync::mpsc::channel();
    std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
    // Neither before it listens nor after the last line is silence a proof: a change of our own is on either side. One that
    // comes too early is made again.
    let seen = |mark: &str| {
        for _ in 0..100 {
            pod.ip(&format!("route add {mark} dev lo"));
            pod.ip(&format!("route del {mark} dev lo"));
            while let Ok(line) = heard.recv_timeout(Duration::from_millis(300)) {
                assert!(line.contains("198.51.100."), "it was changed: {line}");
                if line.contains(mark) {
                    return;
                }
            }
        }
        panic!("nothing is heard of {mark}");
    };
    seen("198.51.100.1");
    pod.configure(&network).await.unwrap();
    pod.configure(&network).await.unwrap();
    seen("198.51.100.2");
    assert_eq!((pod.ip("addr show"), pod.routes()), state);
}

#[tokio::test(flavor = "current_thread")]
async fn the_difference_is_made_and_the_rest_is_removed() {
    let mut network = ordinary();
    network.interfaces[0].addresses.extend([address("10.88.0.6/16"), address("10.88.0.7/16")]);
    network.routes.push(route("10.99.0.0/16", "10.88.0.9", "eth0"));
    network.neighbours.push(Neighbour {
        interface: "eth0".into(),
        ip: bytes("10.88.0.1"),
        link_address: vec![2, 9, 9, 9, 9, 9],
        state: 0x80,
        ..Neighbour::default()
    });
    let pod = Pod::with_pod(2, network).await;
    assert_eq!(pod.addresses("eth0").len(), 4);
    let mut changed = ordinary();
    changed.interfaces[0].mtu = 1350;
    // The first of a subnet takes the others with it.
    changed.interfaces[0].addresses = vec![
        address("10.88.0.7/16"),
        Address { broadcast: bytes("10.20.255.255"), ..address("10.20.0.1/16") },
        address("fd00:99::5/64"),
    ];
    changed.interfaces.push(interface("eth1", 2, &["10.89.0.5/24"]));
    changed.routes = vec![
        connected("10.88.0.0/16", "eth0", "10.88.0.7"),
        connected("10.89.0.0/24", "eth1", "10.89.0.5"),
        connected("fd00:99::/64", "eth0", ""),
        route("default", "10.20.0.254", "eth0"),
        // One that the kernel made for an address may be gone, and another be there for the same network.
        route("10.20.0.254/32", "", "eth0"),
        route("10.20.0.0/16", "10.20.0.254", "eth0"),
    ];
    pod.configure(&changed).await.unwrap();
    assert_eq!(pod.addresses("eth0"), set_of(["10.88.0.7/16", "10.20.0.1/16", "fd00:99::5/64"]));
    assert_eq!(pod.addresses("eth1"), set_of(["10.89.0.5/24"]));
    assert_eq!(
        pod.routes(),
        set_of([
            "10.20.0.0/16 via 10.20.0.254 dev eth0 proto static",
            "10.20.0.254 dev eth0 proto static scope link",
            "10.88.0.0/16 dev eth0 proto kernel scope link src 10.88.0.7",
            "10.89.0.0/24 dev eth1 proto kernel scope link src 10.89.0.5",
            "default via 10.20.0.254 dev eth0 proto static",
            "fd00:99::/64 dev eth0 proto kernel metric 256",
        ])
    );
    assert_eq!(pod.ip("neigh show nud permanent"), "");
    assert!(pod.ip("-4 addr show dev eth0").contains("10.20.0.1/16 brd 10.20.255.255"));
    assert_eq!(pod.json("link show dev eth0")[0]["mtu"], 1350);

    changed.interfaces[0].up = false;
    changed.interfaces[0].addresses.clear();
    changed.routes = vec![connected("10.89.0.0/24", "eth1", "10.89.0.5")];
    pod.configure(&changed).await.unwrap();
    assert!(!pod.json("link show dev eth0")[0]["flags"].as_array().unwrap().contains(&json!("UP")));
    assert_eq!(pod.addresses("eth0"), set_of([]));
}

#[tokio::test(flavor = "current_thread")]
async fn interfaces_change_their_names_in_a_circle() {
    let three = |names: [&str; 3]| ConfigureNetworkRequest {
        interfaces: names.iter().zip(1..).map(|(name, number)| interface(name, number, &[])).collect(),
        ..ConfigureNetworkRequest::default()
    };
    let pod = Pod::with_pod(3, three(["eth0", "eth1", "eth2"])).await;
    for names in [["eth1", "eth2", "eth0"], ["eth0", "eth2", "eth1"], ["dev2", "eth0", "dev1"]] {
        pod.configure(&three(names)).await.unwrap();
        for (name, number) in names.iter().zip(1..) {
            let mac = format!("02:00:00:00:00:{number:02x}");
            assert_eq!(pod.json(&format!("link show dev {name}"))[0]["address"], json!(mac));
        }
    }
    assert_eq!(pod.names(), set_of(["dev1", "dev2", "eth0", "lo"]));
    // Another has the name: it is not ours to take.
    let (code, message) = refused(pod.configure(&three(["peer1", "eth1", "eth2"])).await);
    assert_eq!(code, ttrpc::Code::INTERNAL);
    assert!(message.starts_with("network: interface peer1: rename it: "), "{message}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_device_that_comes_late_is_waited_for_and_one_that_does_not_is_named() {
    let pod = Pod::with_pod(1, ConfigureNetworkRequest::default()).await;
    let mut network = ordinary();
    network.interfaces.push(interface("eth1", 2, &["10.89.0.5/24"]));
    network.routes.push(connected("10.89.0.0/24", "eth1", "10.89.0.5"));
    let late = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        pod.add_device(2);
    };
    let (configured, ()) = tokio::join!(pod.configure(&network), late);
    configured.unwrap();
    assert_eq!(pod.addresses("eth1"), set_of(["10.89.0.5/24"]));

    network.interfaces.push(interface("eth2", 3, &[]));
    let (code, message) = refused(pod.configure(&network).await);
    assert_eq!(code, ttrpc::Code::NOT_FOUND);
    assert_eq!(
        message,
        "network: interface eth2: no device with the MAC address 02:00:00:00:00:03 appeared within 20 s"
    );
}

#[tokio::test(flavor = "current_thread")]
async fn what_cannot_be_is_refused_by_name() {
    let pod = Pod::with_pod(1, ordinary()).await;
    let before = (pod.addresses("eth0"), pod.routes());
    let mut bad = ordinary();
    bad.interfaces[0].addresses.push(address("224.0.0.1/32"));
    let (code, message) = refused(pod.configure(&bad).await);
    assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
    assert_eq!(message, "network: interface eth0: address 2: expected the address of one station");

    let mut bad = ordinary();
    bad.sysctl.insert("net/ipv4/no_such_thing".into(), "1".into());
    let (code, message) = refused(pod.configure(&bad).await);
    assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
    assert!(message.starts_with("network: sysctl net/ipv4/no_such_thing: write \"1\": No such file"), "{message}");
    assert_eq!((pod.addresses("eth0"), pod.routes()), before);

    let mut bad = ordinary();
    bad.routes.push(route("10.99.0.0/16", "172.16.0.1", "eth0"));
    let (code, message) = refused(pod.configure(&bad).await);
    assert_eq!(code, ttrpc::Code::INTERNAL);
    assert!(message.starts_with("network: route to 10.99.0.0/16: add it: "), "{message}");
    // With the reason that the kernel gave.
    assert!(message.contains("ateway"), "{message}");

    // All is as it was when the next is good.
    pod.configure(&ordinary()).await.unwrap();
    assert_eq!((pod.addresses("eth0"), pod.routes()), before);

    let other = Agent::listen(true).await;
    let call = other.client.configure_network(deadline(), &ordinary()).await;
    assert_eq!(refused(call).0, ttrpc::Code::FAILED_PRECONDITION);
    let mut bad = ordinary();
    bad.interfaces[0].mtu = 1;
    let call = other.create_pod(|request| request.network = Some(bad).into()).await;
    assert_eq!(refused(call).0, ttrpc::Code::INVALID_ARGUMENT);
}

/// Makes the pod with a container that waits.
async fn pod_of(pod: &Pod, spec: &Value, network: Option<ConfigureNetworkRequest>) -> String {
    let rootfs = pod.agent.rootfs();
    if spec["linux"]["uidMappings"].is_array() {
        std::os::unix::fs::lchown(pod.agent.root_path(&rootfs), Some(100_000), Some(100_000)).unwrap();
    }
    let container = Agent::container("first", &rootfs, spec, Stdio::default());
    pod.agent
        .create_pod(|request| {
            request.container = Some(container).into();
            request.network = network.into();
        })
        .await
        .unwrap();
    pod.agent.start_container("first").await.unwrap();
    rootfs
}

#[tokio::test(flavor = "current_thread")]
async fn the_first_container_has_the_pod_s_network_and_others_have_their_own() {
    let pod = Pod::new(1).await;
    let spec = with(shell("sleep 1000"), [("/linux/sysctl", json!({"net.ipv4.conf.eth0.forwarding": "1"}))]);
    pod_of(&pod, &spec, Some(ordinary())).await;
    let seen = pod.agent.exec_run("first", &shell_process("ls /sys/class/net; cat /proc/net/route | wc -l")).await.ok();
    assert_eq!(seen, "eth0\nlo\npeer1\n3\n");
    let forwarding = pod.enter().args(["cat", "/proc/sys/net/ipv4/conf/eth0/forwarding"]).output().unwrap();
    assert_eq!(forwarding.stdout, b"1\n");

    let other = pod.agent.run(&shell("ls /sys/class/net; cat /sys/class/net/lo/flags")).await.ok();
    assert_eq!(other, "lo\n0x9\n");

    // What is known only when it starts is there without a new process.
    let mut more = ordinary();
    more.interfaces.push(interface("eth1", 2, &["10.89.0.5/24"]));
    more.routes.push(connected("10.89.0.0/24", "eth1", "10.89.0.5"));
    pod.add_device(2);
    pod.configure(&more).await.unwrap();
    let seen = pod.agent.exec_run("first", &shell_process("ls /sys/class/net")).await.ok();
    assert_eq!(seen, "eth0\neth1\nlo\npeer1\npeer2\n");
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_with_users_of_its_own_has_a_network_that_is_theirs() {
    let pod = Pod::new(2).await;
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    let mut spec = privileged("sleep 1000");
    set(&mut spec, "/linux/namespaces/-", json!({"type": "user"}));
    set(&mut spec, "/linux/uidMappings", mapping.clone());
    set(&mut spec, "/linux/gidMappings", mapping);
    set(&mut spec, "/linux/sysctl", json!({"net.ipv4.conf.eth0.forwarding": "1"}));
    pod_of(&pod, &spec, Some(ordinary())).await;
    assert_eq!(pod.names(), set_of(["dev2", "lo"]));
    let process = with(privileged(""), [])["process"].clone();
    let run = async |line: &str| {
        let mut process = process.clone();
        process["args"] = json!(["/bin/sh", "-c", line]);
        pod.agent.exec_run("first", &process).await.ok()
    };
    let look = "ls /sys/class/net; ip -4 addr show dev eth0 | grep -o 'inet [^ ]*'; ip route | head -1; \
                cat /proc/sys/net/ipv4/conf/eth0/forwarding; ip link set lo mtu 60000 && echo ours";
    assert_eq!(run(look).await, "eth0\nlo\ninet 10.88.0.5/16\ndefault via 10.88.0.1 dev eth0 \n1\nours\n");

    let mut more = ordinary();
    more.interfaces[0].addresses = vec![address("10.88.0.6/16")];
    more.interfaces.push(interface("eth1", 2, &["10.89.0.5/24"]));
    more.routes = vec![route("default", "10.88.0.1", "eth0"), connected("10.88.0.0/16", "eth0", "10.88.0.6")];
    more.routes.push(connected("10.89.0.0/24", "eth1", "10.89.0.5"));
    pod.configure(&more).await.unwrap();
    let look = "ls /sys/class/net; ip -4 -o addr | grep -o 'inet [^ ]*'";
    assert_eq!(run(look).await, "eth0\neth1\nlo\ninet 127.0.0.1/8\ninet 10.88.0.6/16\ninet 10.89.0.5/24\n");
    assert_eq!(pod.names(), set_of(["lo"]));
}
