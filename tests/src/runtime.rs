//! The program under test.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::{Outcome, ensure};

/// An OCI runtime, called by its command line as runc is.
#[derive(Clone)]
pub struct Runtime {
    program: PathBuf,
    name: String,
    /// The document of `spec`, from which all bundles are made.
    pub spec: Value,
}

impl Runtime {
    /// `$PODHULL_RUNTIME`, or `podhull` in the path.
    pub fn under_test() -> Outcome<Self> {
        Self::find(&std::env::var_os("PODHULL_RUNTIME").unwrap_or_else(|| "podhull".into()))
    }

    /// What podhull is compared with where the answer is "as runc does".
    pub fn runc() -> Outcome<Self> {
        Self::find(OsStr::new("runc"))
    }

    /// A runtime by the name or the path of its program.
    pub fn find(name: &OsStr) -> Outcome<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let program = std::env::split_paths(&path)
            .map(|directory| directory.join(name))
            .find(|candidate| candidate.is_file())
            .ok_or_else(|| format!("no program {} in PATH", name.display()))?;
        let directory = std::env::temp_dir().join(format!("podhull-e2e-spec.{}", std::process::id()));
        std::fs::create_dir_all(&directory)?;
        let output = Command::new(&program).arg("spec").current_dir(&directory).output()?;
        let document = std::fs::read(directory.join("config.json"));
        std::fs::remove_dir_all(&directory)?;
        ensure!(
            output.status.success(),
            "{} spec: {}",
            program.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let spec = serde_json::from_slice(&document?)?;
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { program, name, spec })
    }

    /// Whether containers are in virtual machines: what is not podhull is here to try the tests on.
    pub fn is_virtual(&self) -> bool {
        self.name == "podhull"
    }

    /// Name of the program's file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Path of the program.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The words that run container `id` from the bundle in `bundle`.
    pub fn run_words(&self, bundle: &Path, id: &str) -> Vec<OsString> {
        vec![self.program.clone().into(), "run".into(), "-b".into(), bundle.into(), id.into()]
    }
}
