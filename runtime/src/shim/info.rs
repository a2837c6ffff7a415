//! `-info`: what this runtime can do, for containerd, which passes it on to the kubelet.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::path::Path;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{self, Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};

use super::NAME;
use super::options::{Options, OptionsError};
use super::start::MAX_INPUT;
use crate::cli;

/// The type of what `podhull features` prints, as containerd calls it.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum InfoError {
    /// Standard input.
    #[error("cannot read what containerd says: {0}")]
    Input(#[source] io::Error),
    /// It is no message with options.
    #[error("options: {0}")]
    Malformed(#[source] protobuf::Error),
    /// What they say.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The answer.
    #[error("cannot write features: {0}")]
    Features(#[source] serde_json::Error),
}

/// Returns what to print.
pub fn info() -> Result<Vec<u8>, InfoError> {
    let mut input = Vec::new();
    io::stdin().take(MAX_INPUT).read_to_end(&mut input).map_err(InfoError::Input)?;
    let info = about(&std::env::args_os().next().unwrap_or_default(), &input)?;
    Ok(info.write_to_bytes().unwrap_or_default())
}

fn about(program: &OsStr, input: &[u8]) -> Result<RuntimeInfo, InfoError> {
    let options = Any::parse_from_bytes(input).map_err(InfoError::Malformed)?;
    Options::read(&options)?;
    let features = cli::features().map_err(InfoError::Features)?;
    let version = RuntimeVersion { version: cli::VERSION.into(), revision: cli::COMMIT.into(), ..Default::default() };
    Ok(RuntimeInfo {
        name: runtime(program),
        version: MessageField::some(version),
        options: if options.type_url.is_empty() { MessageField::none() } else { MessageField::some(options) },
        features: MessageField::some(Any { type_url: FEATURES.into(), value: features, ..Default::default() }),
        ..Default::default()
    })
}

/// The runtime that containerd finds a program of this name for.
fn runtime(program: &OsStr) -> String {
    let file = Path::new(program).file_name().unwrap_or_default().to_string_lossy();
    let name = file.strip_prefix(NAME).unwrap_or(&file);
    let (name, version) = name.rsplit_once('-').unwrap_or((name, "v2"));
    format!("io.containerd.{name}.{version}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_features_prints() {
        let info = about(OsStr::new("/usr/bin/containerd-shim-kata-v2"), b"").unwrap();
        assert_eq!((&*info.name, &*info.version.version), ("io.containerd.kata.v2", env!("CARGO_PKG_VERSION")));
        assert!(info.options.is_none());
        assert_eq!(info.features.type_url, FEATURES);
        let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
        assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], true);
        assert!(features["mountOptions"].as_array().unwrap().iter().any(|option| option == "rro"));
    }

    #[test]
    fn options_are_given_back_or_refused() {
        let mut options = Any { type_url: "containerd.runc.v1.Options".into(), ..Default::default() };
        let asked = options.write_to_bytes().unwrap();
        assert_eq!(about(OsStr::new("x"), &asked).unwrap().options.as_ref(), Some(&options));
        options.type_url = "frob".into();
        assert!(about(OsStr::new("x"), &options.write_to_bytes().unwrap()).is_err());
        assert!(about(OsStr::new("x"), b"\xff\xff").is_err());
    }
}
