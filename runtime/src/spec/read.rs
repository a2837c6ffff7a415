//! From the text of `config.json` to a [`Config`], with an error that says where.

use oci_spec::runtime::{LinuxResources, Spec};
use podhull_limits::Resources as Limits;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Config, LeftOut, devices, fields, labels, position, validate};

/// What is wrong with `config.json`. Shown directly after the file's name.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A byte that is not UTF-8.
    #[error(": line {line}: not UTF-8 text")]
    NotText {
        /// Counted from 1.
        line: usize,
    },
    /// Not JSON.
    #[error(": line {line}, column {column}: {problem}")]
    Syntax {
        /// Counted from 1.
        line: usize,
        /// Counted from 1.
        column: usize,
        /// What the parser says.
        problem: String,
    },
    /// A value of another type or from another vocabulary than the field has.
    #[error(": line {line}, column {column}: {field}: {problem}")]
    Type {
        /// Counted from 1.
        line: usize,
        /// Counted from 1.
        column: usize,
        /// Path of the field, `linux.namespaces[0].type`.
        field: String,
        /// What the parser says.
        problem: String,
    },
    /// A field that podhull does not enforce.
    #[error(": {field}: not supported: {reason}")]
    Refused {
        /// Path of the field.
        field: String,
        /// Why.
        reason: &'static str,
    },
    /// A value that means nothing.
    #[error(": {field}: {problem}")]
    Value {
        /// Path of the field.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// Limits of single block devices. Those of the host are no devices of the guest.
const OF_BLOCK_DEVICES: [&str; 5] = [
    "weightDevice",
    "throttleReadBpsDevice",
    "throttleWriteBpsDevice",
    "throttleReadIOPSDevice",
    "throttleWriteIOPSDevice",
];

/// Takes out of `linux.resources` what the host alone enforces.
pub fn leave_to_host(resources: &mut Value) {
    if let Some(block_io) = resources.get_mut("blockIO").and_then(Value::as_object_mut) {
        for name in OF_BLOCK_DEVICES {
            block_io.remove(name);
        }
    }
}

/// Parses and checks a specification.
pub fn read(text: &str) -> Result<Config, ConfigError> {
    // First as JSON and then by type, so that a broken file is never taken for a wrong field.
    let mut document: Value = serde_json::from_str(text).map_err(|e| ConfigError::Syntax {
        line: e.line(),
        column: e.column(),
        problem: problem(&e),
    })?;
    if !document.is_object() {
        return Err(ConfigError::Syntax { line: 1, column: 1, problem: "expected an object".into() });
    }
    let fields::Checked { unknown, lists, respelt } = fields::check(&mut document)?;
    validate::capability_names(&document)?;
    let completed = complete_user(&mut document);
    let spec: Spec = match respelt || completed {
        false => serde_json::from_str(text).map_err(|e| ConfigError::Type {
            line: e.line(),
            column: e.column(),
            field: position::field_at(text, e.line(), e.column()),
            problem: problem(&e),
        })?,
        true => {
            let text = document.to_string();
            serde_json::from_str(&text).map_err(|e| ConfigError::Value {
                field: position::field_at(&text, e.line(), e.column()),
                problem: problem(&e),
            })?
        }
    };
    // The typed view takes a list for an object, member by member.
    if let Some(field) = lists.into_iter().next() {
        return Err(ConfigError::Value { field, problem: "expected an object, found a list".into() });
    }
    validate::check(&spec)?;
    let process = spec.process().as_ref();
    labels::check(
        process.and_then(|process| process.apparmor_profile().as_deref()).unwrap_or_default(),
        process.and_then(|process| process.selinux_label().as_deref()).unwrap_or_default(),
    )?;
    let limits = limits(document.pointer("/linux/resources").unwrap_or(&Value::Null))?;
    if let Some(resources) = document.pointer_mut("/linux/resources") {
        leave_to_host(resources);
    }
    let left_out =
        LeftOut { devices: devices::leave_out(&spec, &mut document), labels: labels::leave_out(&mut document) };
    Ok(Config { spec, document, unknown, limits, left_out })
}

/// A process that says nothing of its user is root's, as with runc: callers give programs to execute without it.
fn complete_user(document: &mut Value) -> bool {
    let Some(process) = document.get_mut("process").and_then(Value::as_object_mut) else { return false };
    let user = process.entry("user").or_insert_with(|| json!({}));
    let Some(user) = user.as_object_mut() else { return false };
    let before = user.len();
    for number in ["uid", "gid"] {
        user.entry(number).or_insert_with(|| json!(0));
    }
    user.len() > before
}

/// `linux.resources` as limits, checked beyond their types as far as that goes without a control group.
pub fn limits(resources: &Value) -> Result<Limits, ConfigError> {
    let wrong = |problem: String| ConfigError::Value { field: "linux.resources".into(), problem };
    let limits = Option::<Limits>::deserialize(resources).map_err(|e| wrong(problem(&e)))?;
    Ok(limits.unwrap_or_default())
}

/// Checks a `linux.resources` object that is not part of a specification; refused fields that ask for nothing are taken out.
pub fn resources(object: Value) -> Result<(Value, LinuxResources), ConfigError> {
    let mut document = json!({ "linux": { "resources": object } });
    if !document["linux"]["resources"].is_object() {
        return Err(ConfigError::Value { field: RESOURCES.into(), problem: "expected an object".into() });
    }
    let fields::Checked { lists, .. } = fields::check(&mut document)?;
    if let Some(field) = lists.into_iter().next() {
        return Err(ConfigError::Value { field, problem: "expected an object, found a list".into() });
    }
    let object = document["linux"]["resources"].take();
    let text = object.to_string();
    let typed: LinuxResources = serde_json::from_str(&text).map_err(|e| ConfigError::Value {
        field: format!("{RESOURCES}.{}", position::field_at(&text, e.line(), e.column())),
        problem: problem(&e),
    })?;
    validate::check_resources(&typed)?;
    Ok((object, typed))
}

/// Path of the object in a specification.
const RESOURCES: &str = "linux.resources";

/// The parser's words without the position it appends, and without lists of all words it would have taken.
fn problem(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let text = text.split(" at line ").next().unwrap_or_default();
    text.split(", expected one of").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        format!("config.json{}", read(text).unwrap_err())
    }

    #[test]
    fn the_document_podhull_writes_is_one_it_reads() {
        let config = read(crate::spec::document::TEXT).unwrap();
        assert_eq!(config.mounts().len(), 7);
        assert!(config.remarks().next().is_none());
        assert_eq!(config.document, serde_json::from_str::<Value>(crate::spec::document::TEXT).unwrap());
    }

    #[test]
    fn a_process_that_names_no_user_is_root_s() {
        for (user, expected) in [(None, [0, 0]), (Some(json!({})), [0, 0]), (Some(json!({ "gid": 7 })), [0, 7])] {
            let mut document: Value = serde_json::from_str(crate::spec::document::TEXT).unwrap();
            let process = document["process"].as_object_mut().unwrap();
            process.remove("user");
            process.extend(user.map(|user| ("user".to_owned(), user)));
            let config = read(&document.to_string()).unwrap();
            assert_eq!(config.document["process"]["user"], json!({ "uid": expected[0], "gid": expected[1] }));
        }
        let mut document: Value = serde_json::from_str(crate::spec::document::TEXT).unwrap();
        document["process"]["user"] = "root".into();
        assert!(error(&document.to_string()).contains("process.user: "));
    }

    #[test]
    fn profiles_and_labels_are_taken_left_out_and_remarked() {
        let mut document: Value = serde_json::from_str(crate::spec::document::TEXT).unwrap();
        document["process"]["apparmorProfile"] = "docker-default".into();
        document["process"]["selinuxLabel"] = "system_u:system_r:container_t:s0:c1,c2".into();
        document["linux"]["mountLabel"] = "system_u:object_r:container_file_t:s0:c1,c2".into();
        document["mounts"][1]["options"][3] = "context=\"system_u:object_r:container_file_t:s0:c1,c2\"".into();
        let config = read(&document.to_string()).unwrap();
        let text = config.document.to_string();
        assert!(!text.contains("docker-default") && !text.contains("system_u"), "{text}");
        let remarks: Vec<_> = config.remarks().collect();
        let fields = ["process.apparmorProfile", "process.selinuxLabel", "linux.mountLabel", "mounts[1].options"];
        assert_eq!(remarks.len(), fields.len(), "{remarks:?}");
        for (remark, field) in remarks.iter().zip(fields) {
            assert!(remark.starts_with(field), "{remark}");
        }
        document["process"]["apparmorProfile"] = "k8s-nginx".into();
        assert!(error(&document.to_string()).contains("process.apparmorProfile: \"k8s-nginx\""));
        document["process"]["apparmorProfile"] = 7.into();
        assert!(error(&document.to_string()).contains("process.apparmorProfile: invalid type: integer `7`"));
    }

    #[test]
    fn limits_of_the_host_s_devices_are_not_for_the_guest() {
        let mut document: Value = serde_json::from_str(crate::spec::document::TEXT).unwrap();
        let device = serde_json::json!([{ "major": 8, "minor": 0, "rate": 1 }]);
        document["linux"]["resources"]["blockIO"] =
            serde_json::json!({ "weight": 10, "throttleReadBpsDevice": device, "throttleWriteIOPSDevice": device });
        let config = read(&document.to_string()).unwrap();
        assert_eq!(config.document["linux"]["resources"]["blockIO"], serde_json::json!({ "weight": 10 }));
        assert_eq!(config.limits().block_io.throttle_read_bps_device.len(), 1);
    }

    #[test]
    fn fields_in_other_letters_are_typed_too() {
        let text = crate::spec::document::TEXT.replace("\"cwd\"", "\"CWD\"").replace("\"resources\"", "\"Resources\"");
        let config = read(&text).unwrap();
        assert_eq!(config.spec.process().as_ref().unwrap().cwd(), std::path::Path::new("/"));
        assert!(config.spec.linux().as_ref().unwrap().resources().is_some());
        assert!(
            error(&text.replace("\"CWD\": \"/\"", "\"CWD\": 7")).starts_with("config.json: process.cwd: invalid type")
        );
    }

    #[test]
    fn broken_json_is_reported_with_line_and_column() {
        assert_eq!(error("{\n  \"ociVersion\": oops\n}"), "config.json: line 2, column 17: expected value");
        assert_eq!(error(""), "config.json: line 1, column 0: EOF while parsing a value");
        assert_eq!(error("{\"a\":1} x"), "config.json: line 1, column 9: trailing characters");
    }

    #[test]
    fn a_wrong_type_is_reported_with_its_field() {
        let text = "{\n\"ociVersion\": \"1.2.0\",\n\"process\":\n{\"user\": {\"uid\": 0, \"gid\": 0}, \"args\": [\"a\", 7]}\n}";
        assert_eq!(
            error(text),
            "config.json: line 4, column 46: process.args[1]: invalid type: integer `7`, expected a string"
        );
    }

    #[test]
    fn resources_by_themselves_are_checked_as_those_of_a_specification() {
        let error = |value: Value| resources(value).unwrap_err().to_string();
        let (kept, typed) =
            resources(json!({"memory": {"limit": 5, "swappiness": 0}, "more": 1, "pids": {"limit": 3}})).unwrap();
        assert_eq!(kept, json!({"memory": {"limit": 5}, "pids": {"limit": 3}}));
        assert_eq!(typed.memory().unwrap().limit(), Some(5));
        assert!(error(json!([])).starts_with(": linux.resources: expected an object"));
        assert!(error(json!({"memory": {"kernel": 5}})).starts_with(": linux.resources.memory.kernel: not supported"));
        assert!(error(json!({"memory": [1]})).starts_with(": linux.resources.memory: expected an object"));
        let wrong = error(json!({"cpu": {"quota": "much"}}));
        assert!(wrong.starts_with(": linux.resources.cpu.quota: invalid type: string"), "{wrong}");
        assert!(error(json!({"cpu": {"period": 5}})).contains("linux.resources.cpu.period: is not between"));
    }

    #[test]
    fn a_list_is_no_object() {
        assert_eq!(error("[]"), "config.json: line 1, column 1: expected an object");
        let text = "{\"ociVersion\":\"1.2.0\",\"root\":[\"rootfs\",true]}";
        assert_eq!(error(text), "config.json: root: expected an object, found a list");
    }

    #[test]
    fn a_word_from_no_vocabulary_is_reported_with_its_field() {
        let text = "{\"ociVersion\":\"1.2.0\",\"linux\":{\"namespaces\":[{\"type\":\"pid\"},{\"type\":\"astral\"}]}}";
        let message = error(text);
        assert!(message.ends_with("linux.namespaces[1].type: unknown variant `astral`"), "{message}");
    }
}
