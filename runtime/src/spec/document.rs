//! The specification `podhull spec` writes: the same document as `runc spec` on a host with cgroup v2, which every guest
//! has, so that what builds on one builds on the other.

/// `config.json` as a text.
pub const TEXT: &str = include_str!("document.json");

/// The same for a container of a user who is not root: with the host's network and the user alone, and without limits. The
/// user is 0.
const ROOTLESS: &str = include_str!("rootless.json");

/// `config.json` for a container of this user and group, as a text.
pub fn rootless(uid: u32, gid: u32) -> String {
    let mut text = String::new();
    let mut rest = ROOTLESS;
    for id in [uid, gid] {
        let Some((before, after)) = rest.split_once(HOST_ID) else { break };
        text += &format!("{before}{}{id}", HOST_ID.trim_end_matches('0'));
        rest = after;
    }
    text + rest
}

/// In the mapping of users, and then in that of groups.
const HOST_ID: &str = "\"hostID\": 0";

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn the_document_for_a_user_is_the_other_without_what_takes_root() {
        let mut expected: Value = serde_json::from_str(TEXT).unwrap();
        expected["linux"].as_object_mut().unwrap().remove("resources");
        expected["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 1000, "size": 1}]);
        expected["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 100, "size": 1}]);
        let namespaces = expected["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "network");
        namespaces.push(json!({"type": "user"}));
        for mount in expected["mounts"].as_array_mut().unwrap() {
            if mount["destination"] == "/sys" {
                (mount["type"], mount["source"]) = (json!("none"), json!("/sys"));
                mount["options"] = json!(["rbind", "nosuid", "noexec", "nodev", "ro"]);
            } else if let Some(options) = mount.get_mut("options").and_then(Value::as_array_mut) {
                options.retain(|option| option != "gid=5");
            }
        }
        assert_eq!(serde_json::from_str::<Value>(&rootless(1000, 100)).unwrap(), expected);
    }
}
