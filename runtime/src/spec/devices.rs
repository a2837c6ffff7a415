//! `linux.devices`: which of them the guest has, which are disks of the host, and which are not meant.

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};
use serde_json::Value;

use super::words;

/// What becomes of a device.
#[derive(Debug, PartialEq, Eq)]
pub enum Fate {
    /// The guest's kernel has it.
    Guest,
    /// It becomes a disk of the machine.
    Disk {
        /// Its rules do not allow to write to it.
        read_only: bool,
    },
    /// It is one of all that the host has, which callers list for a privileged container. That the machine is the container's
    /// own is what such a container is given.
    LeftOut,
    /// There is no way for it into the machine.
    Refused,
}

/// What becomes of a device of a specification.
pub fn fate(spec: &Spec, device: &LinuxDevice) -> Fate {
    let rules =
        spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()).and_then(|all| all.devices().as_ref());
    let rules = rules.map(Vec::as_slice).unwrap_or_default();
    let of_guest = match device.typ() {
        LinuxDeviceType::P => true,
        LinuxDeviceType::C | LinuxDeviceType::U => words::is_guest_device(device.major(), device.minor()),
        LinuxDeviceType::B | LinuxDeviceType::A => false,
    };
    if of_guest {
        return Fate::Guest;
    }
    if all_allowed(rules) && !rules.iter().any(|rule| rule.allow() && is_about(rule, device) == About::This) {
        return Fate::LeftOut;
    }
    match device.typ() {
        LinuxDeviceType::B => Fate::Disk { read_only: !may_write(rules, device) },
        _ => Fate::Refused,
    }
}

/// The block devices of the host that become disks of the machine.
pub fn disks(spec: &Spec) -> impl Iterator<Item = (usize, &LinuxDevice, bool)> {
    let devices = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
    devices.into_iter().flatten().enumerate().filter_map(|(index, device)| match fate(spec, device) {
        Fate::Disk { read_only } => Some((index, device, read_only)),
        _ => None,
    })
}

/// Takes out of the document what is not meant; returns which devices that were.
pub fn leave_out(spec: &Spec, document: &mut Value) -> Vec<String> {
    let devices = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
    let out: Vec<bool> = devices.into_iter().flatten().map(|device| fate(spec, device) == Fate::LeftOut).collect();
    if let Some(list) = document.pointer_mut("/linux/devices").and_then(Value::as_array_mut) {
        let mut next = out.iter();
        list.retain(|_| next.next() != Some(&true));
    }
    let all = devices.into_iter().flatten().zip(&out);
    all.filter(|(_, out)| **out).map(|(device, _)| device.path().display().to_string()).collect()
}

/// What a rule speaks of.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum About {
    Others,
    /// All devices.
    All,
    /// Several, the one in question among them.
    Some,
    /// The one in question alone.
    This,
}

fn is_about(rule: &LinuxDeviceCgroup, device: &LinuxDevice) -> About {
    let number = |wanted: Option<i64>| wanted.filter(|number| *number != -1);
    let (major, minor) = (number(rule.major()), number(rule.minor()));
    let kind = rule.typ().filter(|kind| *kind != LinuxDeviceType::A);
    let same_kind = kind.is_none_or(|kind| kind == device.typ());
    if !same_kind || major.is_some_and(|own| own != device.major()) || minor.is_some_and(|own| own != device.minor()) {
        return About::Others;
    }
    match (kind, major, minor) {
        (None, None, None) => About::All,
        (Some(_), Some(_), Some(_)) => About::This,
        _ => About::Some,
    }
}

/// Whether the last rule about all devices allows them.
fn all_allowed(rules: &[LinuxDeviceCgroup]) -> bool {
    let is_all = |rule: &&LinuxDeviceCgroup| {
        let number = |wanted: Option<i64>| wanted.is_none_or(|number| number == -1);
        rule.typ().is_none_or(|kind| kind == LinuxDeviceType::A) && number(rule.major()) && number(rule.minor())
    };
    rules.iter().rev().find(is_all).is_some_and(LinuxDeviceCgroup::allow)
}

/// Whether the rules let a container write to a device: the last that speaks of it and of writing counts.
fn may_write(rules: &[LinuxDeviceCgroup], device: &LinuxDevice) -> bool {
    let of_writing = |rule: &&LinuxDeviceCgroup| {
        let access = rule.access().as_deref().unwrap_or_default();
        is_about(rule, device) != About::Others && (access.is_empty() || access.contains('w'))
    };
    rules.iter().rev().find(of_writing).is_some_and(LinuxDeviceCgroup::allow)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fates(devices: Value, rules: Value) -> (Vec<Fate>, Value) {
        let mut document =
            json!({ "ociVersion": "1.0.2", "linux": { "devices": devices, "resources": { "devices": rules } } });
        let spec: Spec = serde_json::from_value(document.clone()).unwrap();
        let list = spec.linux().as_ref().unwrap().devices().clone().unwrap();
        let fates = list.iter().map(|device| fate(&spec, device)).collect();
        leave_out(&spec, &mut document);
        (fates, document["linux"]["devices"].take())
    }

    #[test]
    fn a_privileged_container_gets_what_is_named_and_not_all_that_the_host_has() {
        let device = |path: &str, kind: &str, major: i64, minor: i64| json!({ "path": path, "type": kind, "major": major, "minor": minor });
        let [sda, sdb, zero, kvm] = [
            device("/dev/sda", "b", 8, 0),
            device("/dev/sdb", "b", 8, 16),
            device("/dev/zero", "c", 1, 5),
            device("/dev/kvm", "c", 10, 232),
        ];
        let devices = json!([sda, sdb, zero, kvm]);
        let all = json!({ "allow": true, "access": "rwm" });
        let named = json!({ "allow": true, "type": "b", "major": 8, "minor": 16, "access": "r" });
        let (fates_of_all, left) = fates(devices.clone(), json!([all]));
        assert_eq!(fates_of_all, [Fate::LeftOut, Fate::LeftOut, Fate::Guest, Fate::LeftOut]);
        assert_eq!(left, json!([zero]));
        let (fates_of_all, left) = fates(devices.clone(), json!([all, named]));
        let writable = Fate::Disk { read_only: false };
        assert_eq!(fates_of_all, [Fate::LeftOut, writable, Fate::Guest, Fate::LeftOut]);
        assert_eq!(left, json!([sdb, zero]));
        let (fates_of_all, left) = fates(devices.clone(), json!([{ "allow": false, "access": "rwm" }, named]));
        let read_only = || Fate::Disk { read_only: true };
        assert_eq!(fates_of_all, [read_only(), read_only(), Fate::Guest, Fate::Refused]);
        assert_eq!(left, devices);
    }
}
