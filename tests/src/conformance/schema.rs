//! The runtime specification's JSON schema against `docs/oci-support.md`: there must be a line for each property that a configuration
//! can have.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::{Outcome, ensure};

/// What this is called among the suites' files.
pub const NAME: &str = "runtime-spec/config-schema.json";

const ROOT: &str = "config-schema.json";

/// Deeper than any configuration: the schema refers to itself.
const MAX_DEPTH: usize = 40;

/// How many properties the schema in `suites` has, and those of which the documentation says nothing.
pub fn missing(suites: &Path) -> Outcome<(usize, Vec<String>)> {
    let mut schema = Schema { files: BTreeMap::new(), paths: BTreeSet::new() };
    for entry in fs::read_dir(suites.join("schema"))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let value = serde_json::from_str(&fs::read_to_string(&path)?).map_err(|error| format!("{name}: {error}"))?;
        schema.files.insert(name, value);
    }
    let Schema { files, paths } = &mut schema;
    let root = files.get(ROOT).ok_or("there is no schema of a configuration")?;
    collect(files, paths, root, ROOT, "", 0)?;
    let table = Table::parse(include_str!("../../../docs/oci-support.md"))?;
    let missing = paths.iter().filter(|path| !table.knows(path)).cloned().collect();
    Ok((paths.len(), missing))
}

struct Schema {
    files: BTreeMap<String, Value>,
    /// With `[]` for each element of a list and `*` for each key of a map, as in the documentation.
    paths: BTreeSet<String>,
}

/// Adds what is below a node of the schema's, which is in `file` and stands for the configuration's `path`.
fn collect(
    files: &BTreeMap<String, Value>,
    paths: &mut BTreeSet<String>,
    node: &Value,
    file: &str,
    path: &str,
    depth: usize,
) -> Outcome {
    ensure!(depth < MAX_DEPTH, "{path}: the schema does not end");
    if let Some(reference) = node.get("$ref").and_then(Value::as_str) {
        let (named, pointer) = reference.split_once('#').unwrap_or((reference, ""));
        let named = if named.is_empty() { file } else { named };
        let target = files.get(named).and_then(|value| value.pointer(pointer));
        let target = target.ok_or_else(|| format!("{path}: the schema refers to {reference}, which is not there"))?;
        collect(files, paths, target, named, path, depth + 1)?;
    }
    for together in ["allOf", "anyOf", "oneOf"] {
        for node in node.get(together).and_then(Value::as_array).into_iter().flatten() {
            collect(files, paths, node, file, path, depth + 1)?;
        }
    }
    let mut below: Vec<(String, &Value)> = Vec::new();
    for (name, node) in node.get("properties").and_then(Value::as_object).into_iter().flatten() {
        below.push((if path.is_empty() { name.clone() } else { format!("{path}.{name}") }, node));
    }
    for (_, node) in node.get("patternProperties").and_then(Value::as_object).into_iter().flatten() {
        below.push((format!("{path}.*"), node));
    }
    if let Some(node) = node.get("additionalProperties").filter(|node| node.is_object()) {
        below.push((format!("{path}.*"), node));
    }
    if let Some(node) = node.get("items").filter(|node| node.is_object()) {
        below.push((format!("{path}[]"), node));
    }
    for (path, node) in below {
        paths.insert(path.clone());
        collect(files, paths, node, file, &path, depth + 1)?;
    }
    Ok(())
}

/// What the documentation says: fields, and whether each is refused with all below it.
struct Table<'a>(BTreeMap<&'a str, bool>);

impl<'a> Table<'a> {
    fn parse(page: &'a str) -> Outcome<Self> {
        let lines = page.lines().filter_map(|line| line.strip_prefix("| `")?.strip_suffix(" |")?.split_once("` | "));
        let fields: BTreeMap<&str, bool> = lines.map(|(field, fate)| (field, fate.starts_with("refused: "))).collect();
        ensure!(!fields.is_empty(), "the documentation has no fields");
        Ok(Self(fields))
    }

    fn knows(&self, path: &str) -> bool {
        let refused = |end: usize| self.0.get(&path[..end]) == Some(&true);
        self.0.contains_key(path) || path.match_indices(['.', '[']).any(|(end, _)| refused(end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_property_has_a_path() -> Outcome {
        let files = BTreeMap::from([
            (
                ROOT.to_owned(),
                serde_json::json!({"properties": {
                    "a": {"$ref": "defs.json#/definitions/List"},
                    "b": {"patternProperties": {".*": {"type": "string"}}},
                    "c": {"properties": {"d": {"anyOf": [{"additionalProperties": {"properties": {"e": {}}}}]}}},
                }}),
            ),
            (
                "defs.json".to_owned(),
                serde_json::json!({"definitions": {
                    "List": {"items": {"$ref": "#/definitions/Element"}},
                    "Element": {"allOf": [{"properties": {"x": {}}}, {"properties": {"y": {}}}]},
                }}),
            ),
        ]);
        let mut paths = BTreeSet::new();
        collect(&files, &mut paths, &files[ROOT], ROOT, "", 0)?;
        let expected = ["a", "a[]", "a[].x", "a[].y", "b", "b.*", "c", "c.d", "c.d.*", "c.d.*.e"];
        assert_eq!(paths.iter().map(String::as_str).collect::<Vec<_>>(), expected);
        Ok(())
    }

    #[test]
    fn what_is_below_a_refused_field_is_known() -> Outcome {
        let table = Table::parse(
            "| `a` | enforced in the guest |\n| `a.b` | refused: why |\n| `a.*` | enforced in the guest |\n",
        )?;
        for known in ["a", "a.b", "a.b.c", "a.b[].c", "a.*"] {
            assert!(table.knows(known), "{known}");
        }
        for unknown in ["b", "a.c", "a[]", "a.bc"] {
            assert!(!table.knows(unknown), "{unknown}");
        }
        Ok(())
    }
}
