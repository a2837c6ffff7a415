//! What is in `deploy/`, rendered as `kubectl` and Helm do, and held against the types of Kubernetes' interface.
//!
//! The manifests stand once, as templates of the chart. They are rendered by a crate that implements Go's templates, with the one
//! function of Helm's that they use; the Kustomize base is what comes out with the chart's own values. After a change:
//! `PODHULL_WRITE_DOCS=1 cargo test -p podhull-tests --test deploy`.

#![expect(clippy::unwrap_used, reason = "all of it is a test")]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use gtmpl::{Context, FuncError, Template, Value as Go};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Namespace, Pod, ServiceAccount};
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

fn deploy(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(deploy(path)).unwrap_or_else(|error| panic!("deploy/{path}: {error}"))
}

/// Documents of a YAML file.
fn documents(text: &str) -> Vec<Value> {
    let documents = serde_yaml_ng::Deserializer::from_str(text)
        .map(|document| serde::Deserialize::deserialize(document).unwrap_or_else(|error| panic!("{error} in {text}")));
    documents.filter(|document: &Value| !document.is_null()).collect()
}

/// The chart's values, with others in their place.
fn values(others: &[(&str, Value)]) -> Value {
    let mut values: Value = documents(&read("chart/values.yaml")).remove(0);
    for (key, value) in others {
        assert!(values.get(key).is_some(), "the chart has no value {key}");
        values[key] = value.clone();
    }
    values
}

fn go(value: &Value) -> Go {
    match value {
        Value::Null => Go::Nil,
        Value::Bool(value) => Go::Bool(*value),
        Value::Number(number) => number.as_i64().map_or_else(|| Go::from(number.as_f64()), Go::from),
        Value::String(text) => Go::String(text.clone()),
        Value::Array(values) => Go::Array(values.iter().map(go).collect()),
        Value::Object(fields) => Go::Object(fields.iter().map(|(key, value)| (key.clone(), go(value))).collect()),
    }
}

fn to_json(arguments: &[Go]) -> Result<Go, FuncError> {
    fn json_of(value: &Go) -> Value {
        match value {
            Go::Bool(value) => json!(value),
            Go::String(text) => json!(text),
            Go::Array(values) => values.iter().map(json_of).collect(),
            // In an order, as Go has it.
            Go::Object(fields) | Go::Map(fields) => {
                fields.iter().map(|(key, value)| (key.clone(), json_of(value))).collect()
            }
            other => other.to_string().parse().unwrap_or(Value::Null),
        }
    }
    let [value] = arguments else { return Err(FuncError::ExactlyXArgs("toJson".into(), 1)) };
    Ok(Go::String(json_of(value).to_string()))
}

/// What the chart comes to.
fn render(values: &Value) -> String {
    let mut names: Vec<_> =
        fs::read_dir(deploy("chart/templates")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    // Those with definitions, which have a `_`, come first, and print nothing.
    names.sort_by_key(|name| (!name.to_string_lossy().starts_with('_'), name.clone()));
    let text: String = names.iter().map(|name| read(&format!("chart/templates/{}", name.to_string_lossy()))).collect();
    let mut template = Template::default();
    template.add_func("toJson", to_json);
    template.parse(text).unwrap_or_else(|error| panic!("the chart: {error}"));
    let release = Go::Object(HashMap::from([("Namespace".to_owned(), Go::from("podhull"))]));
    let context = Go::Object(HashMap::from([("Values".to_owned(), go(values)), ("Release".to_owned(), release)]));
    template.render(&Context::from(context)).unwrap_or_else(|error| panic!("the chart: {error}"))
}

/// That nothing of a document is unknown to the interface, missing, or of another type: it comes back as it was.
fn check_as<T: DeserializeOwned + Serialize>(document: &Value) {
    let typed: T = serde_json::from_value(document.clone()).unwrap_or_else(|error| panic!("{error} in {document:#}"));
    let mut back = serde_json::to_value(typed).unwrap();
    // Fields that need not be there and are written all the same.
    if document.get("metadata").is_none() {
        back.as_object_mut().unwrap().remove("metadata");
    }
    assert_eq!(back, *document, "left: what Kubernetes' interface knows of it");
}

/// Checks documents one by one, and returns their kinds.
fn check(documents: &[Value]) -> Vec<&str> {
    let mut kinds = Vec::new();
    for document in documents {
        let kind = document["kind"].as_str().unwrap_or_else(|| panic!("no kind in {document:#}"));
        match kind {
            "Namespace" => check_as::<Namespace>(document),
            "ServiceAccount" => check_as::<ServiceAccount>(document),
            "ClusterRole" => check_as::<ClusterRole>(document),
            "ClusterRoleBinding" => check_as::<ClusterRoleBinding>(document),
            "DaemonSet" => check_as::<DaemonSet>(document),
            "RuntimeClass" => check_as::<RuntimeClass>(document),
            "Pod" => check_as::<Pod>(document),
            other => panic!("{other}: the test does not know this kind"),
        }
        kinds.push(kind);
    }
    kinds
}

fn of_kind<'a>(documents: &'a [Value], kind: &str) -> Vec<&'a Value> {
    documents.iter().filter(|document| document["kind"] == kind).collect()
}

/// What each step of the installer does.
fn steps(documents: &[Value]) -> Vec<(&str, String)> {
    let daemon_set = of_kind(documents, "DaemonSet")[0];
    let containers = daemon_set["spec"]["template"]["spec"]["initContainers"].as_array().unwrap();
    let words = |step: &Value| {
        let words: Vec<_> =
            step["args"].as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect();
        words.join(" ")
    };
    containers.iter().map(|step| (step["name"].as_str().unwrap(), words(step))).collect()
}

const KINDS: [&str; 6] =
    ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "DaemonSet", "RuntimeClass", "RuntimeClass"];

#[test]
fn the_chart_is_what_kubernetes_understands() {
    let installed = documents(&render(&values(&[])));
    assert_eq!(check(&installed), KINDS);
    assert_eq!(
        steps(&installed),
        [
            ("install", "node install --at /host --handler kata --handler podhull".to_owned()),
            ("label", "label node $(NODE) podhull.io/ready=true --overwrite".to_owned()),
        ]
    );
    let others = [
        ("classes", json!(["sandbox"])),
        ("image", json!("registry.example.com/podhull-node:1")),
        ("overhead", json!({"memory": "1Gi", "cpu": "1"})),
        ("nodeSelector", json!({"example.com/kvm": "true"})),
        ("tolerations", json!([{"key": "kvm", "operator": "Exists", "effect": "NoSchedule"}])),
    ];
    let other = documents(&render(&values(&others)));
    check(&other);
    assert_eq!(steps(&other)[0].1, "node install --at /host --handler sandbox");
    let class = of_kind(&other, "RuntimeClass");
    assert_eq!((class.len(), &class[0]["handler"]), (1, &json!("sandbox")));
    assert_eq!(class[0]["overhead"]["podFixed"], json!({"memory": "1Gi", "cpu": "1"}));
    let pod = &of_kind(&other, "DaemonSet")[0]["spec"]["template"]["spec"];
    assert_eq!(pod["nodeSelector"], json!({"example.com/kvm": "true"}));
    assert_eq!(pod["tolerations"][0]["key"], "kvm");
    assert_eq!(pod["initContainers"][0]["image"], "registry.example.com/podhull-node:1");
}

#[test]
fn uninstalling_takes_the_label_first() {
    let documents = documents(&render(&values(&[("mode", json!("uninstall"))])));
    assert_eq!(check(&documents), KINDS);
    assert_eq!(
        steps(&documents),
        [
            ("label", "label node $(NODE) podhull.io/ready-".to_owned()),
            ("uninstall", "node uninstall --at /host".to_owned()),
        ]
    );
    let strategy = |mode: &str| {
        let documents = self::documents(&render(&values(&[("mode", json!(mode))])));
        of_kind(&documents, "DaemonSet")[0]["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"].clone()
    };
    assert_eq!((strategy("install"), strategy("uninstall")), (json!(1), json!("100%")));
}

#[test]
fn what_schedules_pods_is_what_labels_nodes() {
    let documents = documents(&render(&values(&[])));
    for class in of_kind(&documents, "RuntimeClass") {
        assert_eq!(class["scheduling"]["nodeSelector"], json!({"podhull.io/ready": "true"}));
        assert_eq!(class["handler"], class["metadata"]["name"]);
    }
    // The token is for who labels alone, and that one has nothing else.
    let pod = &of_kind(&documents, "DaemonSet")[0]["spec"]["template"]["spec"];
    for step in pod["initContainers"].as_array().unwrap() {
        let is_label = step["name"] == "label";
        let mounts: Vec<_> = step["volumeMounts"].as_array().unwrap().iter().map(|mount| &mount["name"]).collect();
        assert_eq!(mounts, [if is_label { "token" } else { "node" }]);
        assert_eq!(step["securityContext"]["privileged"] == true, !is_label);
    }
}

#[test]
fn the_chart_has_the_program_s_version_and_its_words() {
    let chart = &documents(&read("chart/Chart.yaml"))[0];
    assert_eq!((&chart["apiVersion"], &chart["name"]), (&json!("v2"), &json!("podhull")));
    for key in ["version", "appVersion"] {
        assert_eq!(chart[key], env!("CARGO_PKG_VERSION"), "{key} of the chart");
    }
    let image = values(&[])["image"].as_str().unwrap().to_owned();
    assert!(image.ends_with(&format!(":{}", env!("CARGO_PKG_VERSION"))), "{image}");
    assert!(read("Containerfile").contains(&format!("podhull-node:{}", env!("CARGO_PKG_VERSION"))));
    // A value that nobody reads would be without effect.
    let templates: String = fs::read_dir(deploy("chart/templates"))
        .unwrap()
        .map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap())
        .collect();
    for key in values(&[]).as_object().unwrap().keys() {
        assert!(templates.contains(&format!(".Values.{key}")), "no template reads {key}");
    }
}

/// What is generated says so, and is what the chart comes to.
#[test]
fn the_kustomize_base_is_the_chart_as_kubectl_renders_it() {
    let kubectl = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/kubectl")).output().unwrap();
    assert!(kubectl.status.success(), "{}", String::from_utf8_lossy(&kubectl.stderr));
    let kubectl = String::from_utf8(kubectl.stdout).unwrap();
    for (directory, mode, namespaces) in [("base", "install", 1), ("uninstall", "uninstall", 0)] {
        let values = values(&[("mode", json!(mode))]);
        let generated = format!("# Made of deploy/chart: see tests/tests/deploy.rs.\n{}", render(&values));
        let path = format!("kustomize/{directory}/podhull.yaml");
        if std::env::var_os("PODHULL_WRITE_DOCS").is_some() {
            fs::write(deploy(&path), &generated).unwrap();
        }
        assert!(fs::read_to_string(deploy(&path)).unwrap_or_default() == generated, "deploy/{path} is stale");

        let directory = deploy(&format!("kustomize/{directory}"));
        let rendered = Command::new(kubectl.trim()).arg("kustomize").arg(&directory).output().unwrap();
        let said = String::from_utf8_lossy(&rendered.stderr);
        assert!(rendered.status.success() && said.is_empty(), "{}: {said}", directory.display());
        let rendered = documents(&String::from_utf8(rendered.stdout).unwrap());
        let kinds = check(&rendered);
        assert_eq!(kinds.len(), KINDS.len() + namespaces, "{kinds:?}");
        for document in &rendered {
            let is_of_the_cluster = !["ServiceAccount", "DaemonSet"].contains(&document["kind"].as_str().unwrap());
            let namespace = document["metadata"].get("namespace");
            assert_eq!(namespace.is_none(), is_of_the_cluster, "{document:#}");
        }
        assert_eq!(steps(&rendered), steps(&documents(&generated)));
        assert_eq!(of_kind(&rendered, "ClusterRoleBinding")[0]["subjects"][0]["namespace"], "podhull");
    }
}

/// What the documentation names is there.
#[test]
fn the_pages_name_files_that_are_there() {
    let mut named = 0;
    for page in ["kubernetes.md", "cri-o.md", "containerd.md", "from-kata.md"] {
        let page = read(&format!("../docs/{page}"));
        for word in page.split(|c: char| c.is_whitespace() || "`),;".contains(c)) {
            let path = word.strip_prefix("deploy/").or_else(|| word.strip_prefix("/usr/share/podhull/"));
            if let Some(path) = path.filter(|path| !path.is_empty()) {
                assert!(deploy(path.trim_end_matches('.')).exists(), "deploy/{path}");
                named += 1;
            }
        }
    }
    assert!(named >= 7, "only {named} names");
}

/// What users are told to tell a cluster it understands, and what they are told to type is about what is there.
#[test]
fn the_page_for_kubernetes_is_about_what_is_there() {
    let page = read("../docs/kubernetes.md");
    let block = page.split("```yaml\n").nth(1).unwrap().split("```").next().unwrap();
    let told = documents(block);
    assert_eq!(check(&told), ["RuntimeClass", "Pod"]);
    assert_eq!(told[1]["spec"]["runtimeClassName"], told[0]["metadata"]["name"]);
    let classes = values(&[])["classes"].clone();
    assert!(classes.as_array().unwrap().contains(&told[0]["handler"]), "{classes}");

    // In blocks and in sentences, there over the ends of lines.
    let text = page.replace('\n', " ").replace('`', " ; ");
    let (mut customized, mut set) = (0, 0);
    let words: Vec<&str> = text.split(' ').filter(|word| !word.is_empty()).collect();
    for pair in words.windows(2) {
        match pair[0] {
            "-k" => {
                let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(pair[1]);
                assert!(directory.join("kustomization.yaml").exists(), "{}", pair[1]);
                customized += 1;
            }
            "--set" => {
                let (key, value) = pair[1].split_once('=').unwrap();
                render(&values(&[(key, json!(value))]));
                set += 1;
            }
            "status" => {
                let installed = documents(&render(&values(&[])));
                let name = &of_kind(&installed, "DaemonSet")[0]["metadata"]["name"];
                assert_eq!(pair[1], format!("daemonset/{}", name.as_str().unwrap()));
            }
            _ => {}
        }
    }
    assert_eq!((customized, set), (3, 2), "{text}");
}

#[test]
fn cri_o_is_told_of_a_virtual_machine() {
    let text = read("crio/50-podhull.conf");
    let table = toml::de::DeTable::parse(&text).unwrap_or_else(|error| panic!("{error} in {text}"));
    let mut class = table.get_ref().get("crio").unwrap();
    for key in ["runtime", "runtimes", "kata"] {
        class = class.get_ref().get(key).unwrap_or_else(|| panic!("no {key} in {text}"));
    }
    let of = |key: &str| class.get_ref().get(key).unwrap_or_else(|| panic!("no {key} in {text}")).get_ref();
    // Where `make install` puts it by default, and by a name that CRI-O takes for a shim's.
    assert_eq!(of("runtime_path").as_str(), Some("/usr/bin/containerd-shim-podhull-v2"));
    assert_eq!(of("runtime_type").as_str(), Some("vm"));
    // The devices of the host would have to be in the virtual machine.
    assert_eq!(of("privileged_without_host_devices").as_bool(), Some(true));
}
