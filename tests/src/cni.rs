//! Networks of pods, as the plugins of CNI make them.

use std::path::Path;

use serde_json::{Value, json};

/// Of which a pod has an interface: what plugins are given, one after the other.
pub struct Network(Vec<Value>);

impl Network {
    /// An interface on a bridge, with a route to everywhere, and ports of the host.
    pub fn usual(addresses: &Path) -> Self {
        let bridge = json!({
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "ipMasq": true,
            "hairpinMode": true,
            "ipam": ipam(addresses, 7, &["0.0.0.0/0", "::/0"]),
        });
        Self(vec![bridge, json!({ "type": "portmap", "capabilities": { "portMappings": true } })])
    }

    /// A line between pod and host, with a route to everywhere.
    pub fn point_to_point(addresses: &Path) -> Self {
        Self(vec![json!({
            "type": "ptp",
            "ipMasq": true,
            "mtu": 1400,
            "ipam": ipam(addresses, 8, &["0.0.0.0/0", "::/0"]),
        })])
    }

    /// An interface on another bridge, which lets so many bits pass in a second, either way.
    pub fn limited(addresses: &Path, rate: u64) -> Self {
        let bridge = json!({ "type": "bridge", "bridge": "cni1", "isGateway": true, "ipam": ipam(addresses, 9, &[]) });
        let burst = rate / 10;
        let limit = json!({
            "type": "bandwidth",
            "ingressRate": rate,
            "ingressBurst": burst,
            "egressRate": rate,
            "egressBurst": burst,
        });
        Self(vec![bridge, limit])
    }

    /// What containerd reads.
    pub fn file(self, name: &str) -> String {
        json!({ "cniVersion": "1.0.0", "name": name, "plugins": self.0 }).to_string()
    }
}

/// Addresses of both kinds, and where they lead.
fn ipam(addresses: &Path, number: u8, routes: &[&str]) -> Value {
    let routes: Vec<_> = routes.iter().map(|route| json!({ "dst": route })).collect();
    json!({
        "type": "host-local",
        "dataDir": addresses,
        "ranges": [
            [{ "subnet": format!("10.88.{number}.0/24") }],
            [{ "subnet": format!("fd00:88:{number}::/64") }],
        ],
        "routes": routes,
    })
}
