//! The part of containerd's configuration that is ours, and where it goes.
//!
//! containerd 1.x takes the whole table of a plugin from the last file that has one: a file of ours beside the others would take
//! the administrator's settings away. So what is ours is a block at the end of the file that has the last word. containerd 2.x
//! merges tables; where its configuration (`version = 3` and later) imports all files of a directory, there is a file of ours in
//! that, and nobody else's is touched.
//!
//! k3s and RKE2 make the configuration anew each time they start, of a template: there the block is in that.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::NodeError;
use super::tree::Tree;

/// containerd's configuration, where nobody says otherwise.
const CONFIG: &str = "/etc/containerd/config.toml";

/// Where k3s and RKE2 have the configuration that they make.
const MADE: [&str; 2] =
    ["/var/lib/rancher/k3s/agent/etc/containerd/config.toml", "/var/lib/rancher/rke2/agent/etc/containerd/config.toml"];

/// What our file is called in a directory of files.
const OWN_FILE: &str = "podhull.toml";

/// The shim on a node.
pub const SHIM: &str = "/opt/podhull/current/bin/containerd-shim-podhull-v2";

/// The first line of what is ours in a file, with the end of the line before it, whatever that was.
const BEGIN: &str = "\n# podhull: what follows belongs to `podhull node`, which also takes it out\n";
const END: &str = "# podhull: end\n";

/// What a file has before our block if there was none.
const NEW: &str = "# Made by `podhull node`.\nversion = 2\n";
const NEW_TEMPLATE: &str = "{{ template \"base\" . }}\n";

/// Files that one configuration may come from.
const MAX_FILES: usize = 1024;

/// Our tables: what containerd is told of each handler. `plugin` is that which serves Kubernetes.
pub fn tables(plugin: &str, handlers: &[String], shim: Option<&str>) -> String {
    let mut text = String::new();
    for (index, handler) in handlers.iter().enumerate() {
        // containerd labels processes of machines by the name of Kata's runtime (SELinux).
        let runtime = if handler == "kata" { "kata" } else { "podhull" };
        let _ = write!(
            text,
            "{}[plugins.\"{plugin}\".containerd.runtimes.{handler}]\nruntime_type = \"io.containerd.{runtime}.v2\"\n",
            if index > 0 { "\n" } else { "" },
        );
        if let Some(shim) = shim {
            let _ = writeln!(text, "runtime_path = \"{shim}\"");
        }
        text += "privileged_without_host_devices = true\n";
        text += "pod_annotations = [\"io.podhull.*\", \"io.katacontainers.*\"]\n";
    }
    text
}

/// The plugin that serves Kubernetes, in configurations of a version.
pub fn plugin(version: u64) -> &'static str {
    if version == 2 { "io.containerd.grpc.v1.cri" } else { "io.containerd.cri.v1.runtime" }
}

/// Where containerd's configuration is, and what it says, without what is ours.
struct Found {
    /// What containerd reads.
    config: PathBuf,
    /// What that is made from.
    template: Option<PathBuf>,
    version: u64,
    /// The directory of which all files are read, if our file can be in it.
    directory: Option<PathBuf>,
    /// The file that has the last word.
    last: PathBuf,
    /// Handlers that are there.
    handlers: Vec<String>,
}

/// What is to be done to a node's files.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    /// The file is to say this.
    Write(PathBuf, String),
    /// The file is to go.
    Remove(PathBuf),
}

impl Change {
    /// The file.
    pub fn path(&self) -> &Path {
        match self {
            Self::Write(path, _) | Self::Remove(path) => path,
        }
    }
}

/// Makes containerd know the handlers; none if it does already.
pub fn add(tree: &Tree, config: Option<&Path>, handlers: &[String]) -> Result<Option<Change>, NodeError> {
    let found = find(tree, config)?;
    if let Some(handler) = handlers.iter().find(|handler| found.handlers.contains(handler)) {
        return Err(NodeError::Taken { handler: handler.clone(), path: tree.at(&found.config) });
    }
    let tables = tables(plugin(found.version), handlers, Some(SHIM));
    let (path, text) = match (&found.directory, &found.template) {
        (Some(directory), _) => {
            (directory.join(OWN_FILE), format!("version = {}\n{BEGIN}{tables}{END}", found.version))
        }
        (None, template) => {
            let path = template.as_ref().unwrap_or(&found.last);
            let new = if template.is_some() { NEW_TEMPLATE } else { NEW };
            let before = tree.read(path)?.map_or_else(|| new.to_owned(), |text| without_ours(&text).0);
            (path.clone(), format!("{before}{BEGIN}{tables}{END}"))
        }
    };
    if tree.read(&path)?.as_ref() == Some(&text) {
        return Ok(None);
    }
    // Nothing is written that containerd would not read, or would read otherwise.
    if found.template.is_none() || found.directory.is_some() {
        let document = parse(tree, &path, &text)?;
        let missing = handlers.iter().find(|handler| !runtimes(&document, plugin(found.version)).contains(handler));
        if let Some(handler) = missing {
            return Err(NodeError::Unchangeable {
                path: tree.at(&path),
                problem: format!("no runtime {handler} in it"),
            });
        }
    }
    Ok(Some(Change::Write(path, text)))
}

/// Makes containerd forget them: what [`add`] has done anywhere.
pub fn remove(tree: &Tree, config: Option<&Path>) -> Result<Vec<Change>, NodeError> {
    let mut changes = Vec::new();
    for path in candidates(tree, config)? {
        let Some(text) = tree.read(&path)? else { continue };
        let (before, ours) = without_ours(&text);
        if !ours {
            continue;
        }
        let all_ours = path.file_name() == Some(OWN_FILE.as_ref()) || before == NEW || before == NEW_TEMPLATE;
        changes.push(if all_ours { Change::Remove(path) } else { Change::Write(path, before) });
    }
    Ok(changes)
}

/// All files in which something may be ours.
fn candidates(tree: &Tree, config: Option<&Path>) -> Result<Vec<PathBuf>, NodeError> {
    let mut paths = Vec::new();
    let read = config.map_or_else(|| vec![CONFIG.into()], |config| vec![config.to_owned()]);
    for config in read.into_iter().chain(MADE.map(PathBuf::from)) {
        paths.extend(["config.toml.tmpl", "config-v3.toml.tmpl"].map(|name| config.with_file_name(name)));
        if tree.read(&config)?.is_some() {
            let is_made = MADE.iter().any(|made| Path::new(made) == config);
            for file in files(tree, &config)? {
                // What is made is made anew.
                paths.extend((!is_made || file.path != config).then_some(file.path));
            }
        }
    }
    Ok(paths)
}

fn find(tree: &Tree, config: Option<&Path>) -> Result<Found, NodeError> {
    let mut made = None;
    for path in MADE.iter().map(Path::new).filter(|_| config.is_none()) {
        made = made.or(tree.read(path)?.map(|_| path));
    }
    let config = config.or(made).unwrap_or(Path::new(CONFIG));
    let files = files(tree, config)?;
    let Some(first) = files.first() else {
        return Ok(Found {
            config: config.into(),
            template: None,
            version: 2,
            directory: None,
            last: config.into(),
            handlers: Vec::new(),
        });
    };
    let version = first.version;
    if !(2..=4).contains(&version) {
        return Err(NodeError::Version { path: tree.at(config), version });
    }
    let directory = (version > 2).then(|| first.directory.clone()).flatten();
    let template = made
        .is_some()
        .then(|| config.with_file_name(if version == 2 { "config.toml.tmpl" } else { "config-v3.toml.tmpl" }));
    let last = files.iter().rfind(|file| file.has_plugin).map_or(config, |file| &file.path).to_owned();
    let handlers = files.into_iter().flat_map(|file| file.handlers).collect();
    Ok(Found { config: config.into(), template, version, directory, last, handlers })
}

/// One of the files that containerd reads.
struct Part {
    path: PathBuf,
    version: u64,
    /// The first directory of which it imports everything.
    directory: Option<PathBuf>,
    has_plugin: bool,
    /// Without ours.
    handlers: Vec<String>,
}

/// The files that containerd reads, in its order (`LoadConfig` in its `server/config`); those that are not there it would fail on.
fn files(tree: &Tree, config: &Path) -> Result<Vec<Part>, NodeError> {
    let mut pending = std::collections::VecDeque::from([config.to_owned()]);
    let (mut seen, mut parts): (Vec<PathBuf>, Vec<Part>) = (Vec::new(), Vec::new());
    while let Some(path) = pending.pop_front() {
        if seen.contains(&path) {
            continue;
        }
        if seen.len() == MAX_FILES {
            return Err(NodeError::TooMany(tree.at(config)));
        }
        seen.push(path.clone());
        let Some(text) = tree.read(&path)? else { continue };
        let (text, _) = without_ours(&text);
        let document = parse(tree, &path, &text)?;
        // What the first file says of the version holds for those it imports, if they say nothing.
        let said = document.get("version").and_then(|value| value.get_ref().as_integer());
        let said = said.and_then(|version| u64::from_str_radix(version.as_str(), version.radix()).ok());
        let version = said.unwrap_or_else(|| parts.first().map_or(1, |first| first.version));
        let mut part = Part {
            has_plugin: plugin_table(&document, plugin(version)).is_some(),
            handlers: runtimes(&document, plugin(version)),
            directory: None,
            version,
            path: path.clone(),
        };
        for import in strings(&document, "imports") {
            let import = path.parent().unwrap_or(Path::new("/")).join(import);
            let name = import.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let parent = import.parent().unwrap_or(Path::new("/"));
            let is_pattern = |text: &str| text.contains(['*', '?', '[']);
            if parent.to_str().is_none_or(is_pattern) || name.contains(['?', '[', '\\']) {
                return Err(NodeError::Pattern { path: tree.at(&path), pattern: import });
            }
            if !name.contains('*') {
                pending.push_back(import);
                continue;
            }
            if matches(&name, OWN_FILE) {
                part.directory.get_or_insert_with(|| parent.to_owned());
            }
            pending.extend(matching(tree, parent, &name)?);
        }
        parts.push(part);
    }
    Ok(parts)
}

/// Files of a directory whose names are of a pattern, by name.
fn matching(tree: &Tree, directory: &Path, pattern: &str) -> Result<Vec<PathBuf>, NodeError> {
    let Some(place) = tree.find(directory)? else { return Ok(Vec::new()) };
    let fail = |error| NodeError::file("list", place.clone(), error);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&place).map_err(fail)? {
        let name = entry.map_err(fail)?.file_name();
        found.extend(name.to_str().filter(|name| matches(pattern, name)).map(|name| directory.join(name)));
    }
    found.sort();
    Ok(found)
}

/// Whether a name is of a pattern in which `*` is anything.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((before, after)) = pattern.split_once('*') else { return pattern == name };
    let Some(rest) = name.strip_prefix(before) else { return false };
    (0..=rest.len()).any(|at| rest.get(at..).is_some_and(|rest| matches(after, rest)))
}

fn parse<'a>(tree: &Tree, path: &Path, text: &'a str) -> Result<DeTable<'a>, NodeError> {
    let parsed = DeTable::parse(text).map_err(|error| NodeError::Unchangeable {
        path: tree.at(path),
        problem: error.message().split_whitespace().collect::<Vec<_>>().join(" "),
    })?;
    Ok(parsed.into_inner())
}

fn plugin_table<'a>(document: &'a DeTable<'a>, plugin: &str) -> Option<&'a DeTable<'a>> {
    document.get("plugins")?.get_ref().as_table()?.get(plugin)?.get_ref().as_table()
}

/// The handlers of a file.
fn runtimes(document: &DeTable<'_>, plugin: &str) -> Vec<String> {
    let table = |table: Option<&DeValue<'_>>| {
        table.and_then(DeValue::as_table).map(|table| table.keys().map(|key| key.get_ref().to_string()).collect())
    };
    let containerd = plugin_table(document, plugin).and_then(|plugin| plugin.get("containerd"));
    let runtimes = containerd.and_then(|table| table.get_ref().as_table()).and_then(|table| table.get("runtimes"));
    table(runtimes.map(|runtimes| runtimes.get_ref())).unwrap_or_default()
}

fn strings(document: &DeTable<'_>, key: &str) -> Vec<String> {
    let values = document.get(key).and_then(|value| value.get_ref().as_array());
    values
        .into_iter()
        .flat_map(|array| array.iter())
        .filter_map(|value| value.get_ref().as_str().map(str::to_owned))
        .collect()
}

/// A file's text without what is ours, and whether something was.
fn without_ours(text: &str) -> (String, bool) {
    let Some((before, rest)) = text.split_once(BEGIN) else { return (text.to_owned(), false) };
    // What somebody has cut the end off from is not taken apart.
    let Some((_, after)) = rest.split_once(END) else { return (text.to_owned(), false) };
    (format!("{before}{after}"), true)
}
