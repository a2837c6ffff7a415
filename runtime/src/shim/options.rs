//! What users of containerd say of a runtime: the options of containerd's shim for runc (containerd, `api/types/runc/options`), or those
//! of any other (`api/types/runtimeoptions/v1`). Each field is done, means nothing in a virtual machine, or is refused by its name.

use std::path::{Component, Path, PathBuf};

use containerd_shim_protos::protobuf::rt::skip_field_for_tag;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{self, CodedInputStream, Message};
use containerd_shim_protos::shim::oci;

use crate::cgroup::Manager;

/// Message with options of containerd's shim for runc.
const RUNC: &str = "containerd.runc.v1.Options";

/// Message with options of any other shim; it was in a package of its own once, below `cri`.
const ANY: &str = "runtimeoptions.v1.Options";

/// What is wrong with them.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// Some other shim's.
    #[error("options of type {0:?}: not supported: podhull takes {RUNC} and {ANY}")]
    Kind(String),
    /// Not the message that it says it is.
    #[error("options: {0}: {1}")]
    Malformed(&'static str, #[source] protobuf::Error),
    /// It would be without effect.
    #[error("options: {0}: not supported: {1}")]
    Field(&'static str, &'static str),
    /// Not the path of a file.
    #[error("options: config_path: {0:?} is not an absolute path")]
    Config(PathBuf),
    /// Not the path of a group.
    #[error("options: shim_cgroup: {0:?} is not an absolute path of a control group")]
    Cgroup(String),
}

/// What they come to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Who makes control groups, if they say so.
    pub cgroups: Option<Manager>,
    /// The control group of the shim, as a path below the root of the hierarchy.
    pub shim_cgroup: Option<PathBuf>,
    /// The file with the configuration of the runtime class.
    pub config: Option<PathBuf>,
}

impl Options {
    /// Reads them; an empty message says nothing.
    pub fn read(any: &Any) -> Result<Self, OptionsError> {
        let read = match kind(any) {
            "" if any.value.is_empty() => Self::default(),
            RUNC => Self::of_runc(&any.value)?,
            ANY => Self::of_any(&any.value)?,
            _ => return Err(OptionsError::Kind(any.type_url.chars().take(200).collect())),
        };
        match read.config {
            Some(path) if !path.is_absolute() => Err(OptionsError::Config(path)),
            _ => Ok(read),
        }
    }

    /// Whether a message is of a type that is known here.
    pub fn is_known(any: &Any) -> bool {
        matches!(kind(any), RUNC | ANY)
    }

    fn of_runc(value: &[u8]) -> Result<Self, OptionsError> {
        let options = oci::Options::parse_from_bytes(value).map_err(|error| OptionsError::Malformed(RUNC, error))?;
        // Of the others: a container's root and keyring are its own in any case, its streams are its user's, and what CRIU is to do
        // is refused when it is to do it.
        for (field, value, why) in [
            (
                "binary_name",
                &options.binary_name,
                "podhull calls no other runtime: leave it out, or use io.containerd.runc.v2",
            ),
            ("root", &options.root, "the state of containers is in /run/containerd/podhull: leave it out"),
        ] {
            if !value.is_empty() {
                return Err(OptionsError::Field(field, why));
            }
        }
        let shim_cgroup = match &*options.shim_cgroup {
            "" => None,
            group => Some(below_root(group).ok_or_else(|| OptionsError::Cgroup(group.into()))?),
        };
        Ok(Self { cgroups: options.systemd_cgroup.then_some(Manager::Systemd), shim_cgroup, config: None })
    }

    fn of_any(value: &[u8]) -> Result<Self, OptionsError> {
        let read = || -> protobuf::Result<(String, Vec<u8>)> {
            let (mut path, mut body) = Default::default();
            let mut input = CodedInputStream::from_bytes(value);
            while let Some(tag) = input.read_raw_tag_or_eof()? {
                match tag >> 3 {
                    // What kind of configuration it is: podhull has one.
                    2 if tag & 7 == 2 => path = input.read_string()?,
                    3 if tag & 7 == 2 => body = input.read_bytes()?,
                    _ => skip_field_for_tag(tag, &mut input)?,
                }
            }
            Ok((path, body))
        };
        let (path, body) = read().map_err(|error| OptionsError::Malformed(ANY, error))?;
        match (path.is_empty(), body.is_empty()) {
            // A file alone counts, should there be both.
            (false, _) => Ok(Self { config: Some(path.into()), ..Self::default() }),
            (true, true) => Ok(Self::default()),
            (true, false) => Err(OptionsError::Field(
                "config_body",
                "write the configuration to a file, and name that in ConfigPath",
            )),
        }
    }
}

/// The name of a message without what some put before it.
fn kind(any: &Any) -> &str {
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    name.strip_prefix("cri.").unwrap_or(name)
}

fn below_root(group: &str) -> Option<PathBuf> {
    let below = Path::new(group).strip_prefix("/").ok()?;
    below.components().all(|component| matches!(component, Component::Normal(_))).then(|| below.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(kind: &str, value: Vec<u8>) -> Any {
        Any { type_url: kind.into(), value, ..Default::default() }
    }

    fn of_runc(options: &oci::Options) -> Result<Options, OptionsError> {
        Options::read(&any(RUNC, options.write_to_bytes().unwrap()))
    }

    #[test]
    fn what_means_something_is_done() {
        assert_eq!(Options::read(&Any::new()).unwrap(), Options::default());
        let asked = oci::Options {
            systemd_cgroup: true,
            shim_cgroup: "/a/b.slice".into(),
            no_pivot_root: true,
            no_new_keyring: true,
            io_uid: 7,
            io_gid: 8,
            criu_work_path: "/w".into(),
            ..Default::default()
        };
        let expected = Options { cgroups: Some(Manager::Systemd), shim_cgroup: Some("a/b.slice".into()), config: None };
        assert_eq!(of_runc(&asked).unwrap(), expected);
        for kind in [ANY, "cri.runtimeoptions.v1.Options", "type.googleapis.com/runtimeoptions.v1.Options"] {
            let read = Options::read(&any(kind, b"\x0a\x03any\x12\x02/c".into())).unwrap();
            assert_eq!(read.config.as_deref(), Some(Path::new("/c")));
        }
    }

    #[test]
    fn what_would_be_without_effect_is_refused_by_name() {
        let error = |options: Result<Options, OptionsError>| options.unwrap_err().to_string();
        let options = || oci::Options::new();
        for (asked, word) in [
            (oci::Options { binary_name: "crun".into(), ..options() }, "binary_name"),
            (oci::Options { root: "/r".into(), ..options() }, "root"),
            (oci::Options { shim_cgroup: "a".into(), ..options() }, "shim_cgroup"),
            (oci::Options { shim_cgroup: "/a/../b".into(), ..options() }, "shim_cgroup"),
        ] {
            assert!(error(of_runc(&asked)).contains(word), "{word}");
        }
        for (kind, value, word) in [
            ("frob.Options", &b""[..], "frob.Options"),
            (RUNC, b"\xff", RUNC),
            (ANY, b"\x12\x7f", ANY),
            (ANY, b"\x12\x06no/way", "config_path: \"no/way\" is not an absolute path"),
            (ANY, b"\x1a\x03a=1", "config_body"),
        ] {
            let error = error(Options::read(&any(kind, value.into())));
            assert!(error.contains(word), "{error}");
        }
    }
}
