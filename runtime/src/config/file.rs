//! The files of the configuration: which they are, and whether they can be trusted. podhull runs as root and does what they say,
//! so nobody else may have written them.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::parse::{Found, parse};
use super::{Config, ConfigError, Key, Source};

/// Longest file in bytes.
pub const MAX_FILE: u64 = 1 << 20;

/// The file that comes first.
const FIRST: &str = "config.toml";

/// The directory of those that come after it, by name.
const MORE: &str = "config.d";

/// What they are called there.
const EXTENSION: &[u8] = b".toml";

/// Reads all files of a directory; what is later wins. `owner` is who may have written them.
pub fn read(directory: &Path, owner: u32) -> Result<Config, ConfigError> {
    let mut config = Config::default();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let Some(opened) = open(rustix::fs::CWD, directory, directory, flags, owner)? else { return Ok(config) };
    add(&mut config, &opened, Path::new(FIRST), directory.join(FIRST), owner)?;
    let path = directory.join(MORE);
    if let Some(more) = open(&opened, Path::new(MORE), &path, flags, owner)? {
        for name in names(&more, &path)? {
            add(&mut config, &more, &name, path.join(&name), owner)?;
        }
    }
    Ok(config)
}

/// Adds what the file of a runtime class says. It has to be there, in a directory that can be trusted as the host's own is.
pub fn read_class(config: &mut Config, path: &Path, owner: u32) -> Result<(), ConfigError> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(ConfigError::NotAFile(path.to_owned()));
    };
    // Of a name alone, on the command line.
    let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    let missing = |path: &Path| ConfigError::Read(path.to_owned(), Errno::NOENT);
    let opened = open(rustix::fs::CWD, directory, directory, OFlags::RDONLY | OFlags::DIRECTORY, owner)?;
    let opened = opened.ok_or_else(|| missing(directory))?;
    let found = find(&opened, Path::new(name), path, owner)?.ok_or_else(|| missing(path))?;
    for Found { key, value, line } in found {
        // Who looks there later does not know of which class a pod was.
        if matches!(key, Key::GuestConsole | Key::DebugShell) {
            let (path, key) = (path.to_owned(), key.name().to_owned());
            let problem = "is one for all pods of a host: set it in /etc/podhull/config.toml".into();
            return Err(ConfigError::Key { path, line, key, problem });
        }
        config.set(key, value, Source::File { path: path.to_owned(), line });
    }
    Ok(())
}

/// The names of the files, in order.
fn names(directory: &OwnedFd, path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let fail = |errno| ConfigError::Read(path.to_owned(), errno);
    let mut names = Vec::new();
    for entry in Dir::read_from(directory).map_err(fail)? {
        let name = entry.map_err(fail)?.file_name().to_bytes().to_owned();
        if name.ends_with(EXTENSION) && !name.starts_with(b".") {
            names.push(PathBuf::from(std::ffi::OsStr::from_bytes(&name)));
        }
    }
    names.sort();
    Ok(names)
}

/// Adds what a file says, if there is one.
fn add(config: &mut Config, directory: &OwnedFd, name: &Path, path: PathBuf, owner: u32) -> Result<(), ConfigError> {
    for Found { key, value, line } in find(directory, name, &path, owner)?.into_iter().flatten() {
        config.set(key, value, Source::File { path: path.clone(), line });
    }
    Ok(())
}

/// What a file says, if there is one.
fn find(directory: &OwnedFd, name: &Path, path: &Path, owner: u32) -> Result<Option<Vec<Found>>, ConfigError> {
    // Not blocking: a pipe in this place would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let Some(file) = open(directory, name, path, flags, owner)? else { return Ok(None) };
    let mut text = Vec::new();
    let read = File::from(file).take(MAX_FILE + 1).read_to_end(&mut text);
    read.map_err(|error| ConfigError::Read(path.to_owned(), Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
    if text.len() as u64 > MAX_FILE {
        return Err(ConfigError::TooLong(path.to_owned()));
    }
    let text = String::from_utf8(text).map_err(|error| ConfigError::Syntax {
        path: path.to_owned(),
        line: 1 + error.as_bytes()[..error.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count(),
        problem: "not UTF-8 text".into(),
    })?;
    parse(path, &text).map(Some)
}

/// Opens what is there, if it is what it should be and nobody but its owner may write it.
fn open(
    directory: impl std::os::fd::AsFd,
    name: &Path,
    path: &Path,
    flags: OFlags,
    owner: u32,
) -> Result<Option<OwnedFd>, ConfigError> {
    let fail = |errno| ConfigError::Read(path.to_owned(), errno);
    let opened = match rustix::fs::openat(&directory, name, flags | OFlags::CLOEXEC, Mode::empty()) {
        Ok(opened) => opened,
        // A link that leads nowhere was meant to be something.
        Err(Errno::NOENT) if rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW).is_err() => {
            return Ok(None);
        }
        Err(errno) => return Err(fail(errno)),
    };
    let stat = rustix::fs::fstat(&opened).map_err(fail)?;
    let expected = if flags.contains(OFlags::DIRECTORY) { FileType::Directory } else { FileType::RegularFile };
    if FileType::from_raw_mode(stat.st_mode) != expected {
        return Err(ConfigError::NotAFile(path.to_owned()));
    }
    if stat.st_uid != owner {
        return Err(ConfigError::Owner(path.to_owned(), stat.st_uid));
    }
    match stat.st_mode & 0o7777 {
        mode if mode & 0o022 != 0 => Err(ConfigError::Writable(path.to_owned(), mode)),
        _ => Ok(Some(opened)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Value;
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    /// A directory of the caller's own.
    fn place() -> tempfile::TempDir {
        let place = tempfile::tempdir().unwrap();
        fs::set_permissions(place.path(), Permissions::from_mode(0o755)).unwrap();
        place
    }

    fn write(path: &Path, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::set_permissions(path.parent().unwrap(), Permissions::from_mode(0o755)).unwrap();
        fs::write(path, text).unwrap();
        fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
    }

    fn read(place: &Path) -> Result<Config, String> {
        super::read(place, rustix::process::geteuid().as_raw()).map_err(|error| error.to_string())
    }

    #[test]
    fn without_files_nothing_is_set() {
        let place = place();
        assert_eq!(read(place.path()), Ok(Config::default()));
        assert_eq!(read(&place.path().join("none")), Ok(Config::default()));
        fs::create_dir(place.path().join(MORE)).unwrap();
        assert_eq!(read(place.path()), Ok(Config::default()));
    }

    #[test]
    fn later_files_win_key_by_key_in_the_order_of_their_names() {
        let place = place();
        let path = |name: &str| place.path().join(name);
        write(&path("config.toml"), "[machine]\nmemory = 256\nvcpus = 1\nmax_vcpus = 8\n");
        write(&path("config.d/20-b.toml"), "[machine]\nmemory = 512\n");
        write(&path("config.d/10-a.toml"), "[machine]\n\nmemory = 1024\nvcpus = 2\n");
        for ignored in ["config.d/30.toml.bak", "config.d/.40.toml", "config.d/README"] {
            write(&path(ignored), "not read");
        }
        let config = read(place.path()).unwrap();
        let get = |key| config.0.get(&key).map(|entry| (entry.value.clone(), entry.source.to_string()));
        let from = |name: &str, line: u32| format!("{}:{line}", path(name).display());
        assert_eq!(get(Key::Memory), Some((Value::Mebibytes(512), from("config.d/20-b.toml", 2))));
        assert_eq!(get(Key::Vcpus), Some((Value::Number(2), from("config.d/10-a.toml", 4))));
        assert_eq!(get(Key::MaxVcpus), Some((Value::Number(8), from("config.toml", 4))));
        write(&path("config.d/99.toml"), "[machine]\nmemroy = 1\n");
        assert!(read(place.path()).unwrap_err().starts_with(&path("config.d/99.toml").display().to_string()));
    }

    #[test]
    fn the_file_of_a_class_comes_last_and_has_to_be_there() {
        let place = place();
        let class = place.path().join("classes/large.toml");
        let owner = rustix::process::geteuid().as_raw();
        write(&place.path().join("config.toml"), "[machine]\nmemory = 256\nvcpus = 1\n");
        let read = || {
            let mut config = super::read(place.path(), owner).unwrap();
            read_class(&mut config, &class, owner).map(|()| config).map_err(|error| error.to_string())
        };
        let missing =
            |path: &Path| format!("{}: cannot be read: No such file or directory (os error 2)", path.display());
        assert_eq!(read(), Err(missing(class.parent().unwrap())));
        write(&class, "[machine]\nmemory = 512\n");
        let config = read().unwrap();
        let get = |key| config.0.get(&key).map(|entry| (entry.value.clone(), entry.source.to_string()));
        assert_eq!(get(Key::Memory), Some((Value::Mebibytes(512), format!("{}:2", class.display()))));
        assert_eq!(get(Key::Vcpus).unwrap().0, Value::Number(1));
        for (text, words) in [
            ("[machine]\nguest_console = \"/x\"\n", "line 2: machine.guest_console: is one for all pods"),
            ("debug.shell = \"/x\"\n", "line 1: debug.shell: is one for all pods"),
            ("[hypervisor.qemu]\ndefault_memory = 2048\n", "is a key of Kata Containers; here it is machine.memory"),
        ] {
            write(&class, text);
            let error = read().unwrap_err();
            assert!(error.starts_with(&*class.to_string_lossy()) && error.contains(words), "{error}");
        }
        fs::set_permissions(&class, Permissions::from_mode(0o666)).unwrap();
        assert!(read().unwrap_err().contains("others than root may write it"));
        fs::remove_file(&class).unwrap();
        assert_eq!(read(), Err(missing(&class)));
        fs::set_permissions(class.parent().unwrap(), Permissions::from_mode(0o777)).unwrap();
        assert!(read().unwrap_err().contains("classes: others than root may write it"));
    }

    #[test]
    fn what_others_may_have_written_is_refused_by_name() {
        let place = place();
        let path = place.path().join("config.toml");
        write(&path, "[machine]\nmemory = 256\n");
        for mode in [0o664, 0o646, 0o666] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let expected = format!("{}: others than root may write it (mode {mode:04o}): chmod go-w", path.display());
            assert_eq!(read(place.path()).unwrap_err(), expected);
        }
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        assert!(read(place.path()).is_ok());
        let other = super::read(place.path(), 12345).unwrap_err().to_string();
        assert!(other.starts_with(&format!("{}: belongs to user ", place.path().display())), "{other}");
        fs::set_permissions(place.path(), Permissions::from_mode(0o777)).unwrap();
        assert!(read(place.path()).unwrap_err().starts_with(&format!("{}: others", place.path().display())));
    }

    #[test]
    fn what_is_no_file_no_text_or_too_long_is_said_so() {
        let place = place();
        let path = place.path().join("config.toml");
        fs::create_dir(&path).unwrap();
        assert!(read(place.path()).unwrap_err().ends_with("config.toml: is not a regular file"));
        fs::remove_dir(&path).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::from_raw_mode(0o600)).unwrap();
        assert!(read(place.path()).unwrap_err().ends_with("config.toml: is not a regular file"));
        fs::remove_file(&path).unwrap();
        fs::write(&path, b"[machine]\n# \xff\n").unwrap();
        assert!(read(place.path()).unwrap_err().ends_with("config.toml: line 2: not UTF-8 text"));
        fs::write(&path, vec![b'\n'; 1 << 21]).unwrap();
        assert!(read(place.path()).unwrap_err().ends_with("is longer than 1048576 bytes"));
    }

    #[test]
    fn what_is_there_and_cannot_be_read_is_an_error() {
        let place = place();
        std::os::unix::fs::symlink("config.toml", place.path().join("config.toml")).unwrap();
        let error = read(place.path()).unwrap_err();
        assert!(error.contains("config.toml: cannot be read: "), "{error}");
        fs::remove_file(place.path().join("config.toml")).unwrap();
        fs::create_dir(place.path().join(MORE)).unwrap();
        std::os::unix::fs::symlink("nowhere", place.path().join("config.d/a.toml")).unwrap();
        let error = read(place.path()).unwrap_err();
        assert!(error.contains("config.d/a.toml: cannot be read: No such file"), "{error}");
    }
}
