//! Block devices of the host that a container is given: a specification names them by their numbers on the host, the guest's kernel
//! gives them others.

use podhull_protocol::Disk;
use serde_json::Value;

use crate::machine::{DiskNumber, Machine, MachineError};

/// A disk by both its numbers.
pub struct Given {
    host: DiskNumber,
    guest: DiskNumber,
}

/// Waits until the machine has them.
pub async fn wait(machine: Machine, disks: &[Disk]) -> Result<Vec<Given>, MachineError> {
    let mut given = Vec::with_capacity(disks.len());
    for disk in disks {
        let host = DiskNumber { major: disk.major, minor: disk.minor };
        given.push(Given { host, guest: machine.wait_for_disk(&disk.serial).await? });
    }
    Ok(given)
}

/// Writes the guest's numbers into a specification: into its devices, and into the rules about them. A rule about all minor
/// numbers of the host becomes one for each disk it speaks of.
pub fn renumber(spec: &mut Value, disks: &[Given]) {
    for device in list(spec, "/linux/devices") {
        if let Some(disk) = disks.iter().find(|disk| is_block(device) && names(device, disk.host)) {
            set(device, disk.guest);
        }
    }
    if let Some(rules) = spec.pointer_mut("/linux/resources/devices").and_then(Value::as_array_mut) {
        *rules = rules.drain(..).flat_map(|rule| renumbered(rule, disks)).collect();
    }
}

fn renumbered(rule: Value, disks: &[Given]) -> Vec<Value> {
    if !is_block(&rule) || number(&rule, "major").is_none() {
        return vec![rule];
    }
    let about: Vec<_> = disks.iter().filter(|disk| names(&rule, disk.host)).collect();
    if about.is_empty() {
        return vec![rule];
    }
    let of_one = |disk: &&Given| {
        let mut rule = rule.clone();
        set(&mut rule, disk.guest);
        rule
    };
    about.iter().map(of_one).collect()
}

fn list<'a>(spec: &'a mut Value, pointer: &str) -> impl Iterator<Item = &'a mut Value> {
    spec.pointer_mut(pointer).and_then(Value::as_array_mut).into_iter().flatten()
}

fn is_block(entry: &Value) -> bool {
    entry["type"] == "b"
}

/// A number that is there and says more than "all".
fn number(entry: &Value, name: &str) -> Option<u32> {
    u32::try_from(entry[name].as_i64()?).ok()
}

fn names(entry: &Value, disk: DiskNumber) -> bool {
    let of = |name, own| number(entry, name).is_none_or(|number| number == own);
    of("major", disk.major) && of("minor", disk.minor)
}

fn set(entry: &mut Value, disk: DiskNumber) {
    entry["major"] = disk.major.into();
    entry["minor"] = disk.minor.into();
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn devices_and_rules_about_disks_have_the_guest_s_numbers_and_others_their_own() {
        let disk = |host: (u32, u32), guest: (u32, u32)| Given {
            host: DiskNumber { major: host.0, minor: host.1 },
            guest: DiskNumber { major: guest.0, minor: guest.1 },
        };
        let mut spec = json!({ "linux": {
            "devices": [
                { "path": "/dev/sda", "type": "b", "major": 8, "minor": 0 },
                { "path": "/dev/full", "type": "c", "major": 8, "minor": 0 },
                { "path": "/dev/other", "type": "b", "major": 8, "minor": 32 },
            ],
            "resources": { "devices": [
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "b", "major": 8, "minor": 0, "access": "r" },
                { "allow": true, "type": "b", "major": 8, "minor": -1, "access": "w" },
                { "allow": true, "type": "b", "access": "m" },
                { "allow": true, "type": "c", "major": 8, "minor": 0, "access": "r" },
                { "allow": true, "type": "b", "major": 9, "minor": 0, "access": "r" },
            ] },
        } });
        renumber(&mut spec, &[disk((8, 0), (254, 16)), disk((8, 16), (254, 0))]);
        assert_eq!(
            spec["linux"],
            json!({
                "devices": [
                    { "path": "/dev/sda", "type": "b", "major": 254, "minor": 16 },
                    { "path": "/dev/full", "type": "c", "major": 8, "minor": 0 },
                    { "path": "/dev/other", "type": "b", "major": 8, "minor": 32 },
                ],
                "resources": { "devices": [
                    { "allow": false, "access": "rwm" },
                    { "allow": true, "type": "b", "major": 254, "minor": 16, "access": "r" },
                    { "allow": true, "type": "b", "major": 254, "minor": 16, "access": "w" },
                    { "allow": true, "type": "b", "major": 254, "minor": 0, "access": "w" },
                    { "allow": true, "type": "b", "access": "m" },
                    { "allow": true, "type": "c", "major": 8, "minor": 0, "access": "r" },
                    { "allow": true, "type": "b", "major": 9, "minor": 0, "access": "r" },
                ] },
            })
        );
    }
}
