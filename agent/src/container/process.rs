//! The container's process: user, environment, program.

use std::ffi::{CString, NulError, OsStr};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::rootfs::last_errno;
use crate::spec::{Process, User};

/// A process that cannot be made as given. The texts of the program's errors are those of runc, which callers match.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("process.args: expected at least the name of a program")]
    NoArgs,
    #[error("process.cwd: expected an absolute path, not {0}")]
    RelativeCwd(PathBuf),
    #[error("process.{field}: {value:?} contains a zero byte")]
    Nul { field: &'static str, value: String },
    #[error("process.env: expected NAME=value, not {0:?}")]
    Env(String),
    #[error("process.user.umask: expected at most 0777, not {0:#o}")]
    Umask(u32),
    #[error("exec: {0:?}: executable file not found in $PATH")]
    NotInPath(String),
    #[error("exec: {0:?}: cannot run executable found relative to current directory")]
    RelativeInPath(String),
    #[error("exec: {program:?}: stat {program}: {}", words(*source))]
    Stat { program: String, source: Errno },
    #[error("exec: {program:?}: {}", words(*source))]
    NotExecutable { program: String, source: Errno },
    #[error("exec {program}: {}", words(*source))]
    Exec { program: String, source: Errno },
    #[error("set supplementary groups: {0}")]
    Groups(Errno),
    #[error("set group {gid}: {source}")]
    Gid { gid: u32, source: Errno },
    #[error("set user {uid}: {source}")]
    Uid { uid: u32, source: Errno },
    #[error("keep capabilities: {0}")]
    KeepCapabilities(Errno),
    #[error("chdir to cwd ({path:?}) set in config.json failed: {}", words(*source))]
    Cwd { path: PathBuf, source: Errno },
    #[error("working directory {0:?} is outside of the container's root")]
    Outside(PathBuf),
    #[error("make the working directory {path}: {source}")]
    MakeCwd { path: PathBuf, source: io::Error },
}

/// The kernel's errors as C and Go programs put them, without the number Rust adds.
pub fn words(errno: Errno) -> String {
    let text = io::Error::from(errno).to_string();
    let text = text.split_once(" (os error").map_or(text.as_str(), |(text, _)| text);
    text.chars().take(1).flat_map(char::to_lowercase).chain(text.chars().skip(1)).collect()
}

/// What `execve` will get.
pub struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    /// Finds the program as the container's user sees it; to be called inside the root, as that user, in the working directory.
    pub fn find(process: &Process, env: Vec<CString>) -> Result<Self, ProcessError> {
        let name = process.args.first().ok_or(ProcessError::NoArgs)?;
        let search_path = env.iter().find_map(|entry| entry.to_bytes().strip_prefix(b"PATH="));
        let path = look_up(name, search_path.unwrap_or_default())?;
        let args = process.args.iter().map(|arg| c_string("args", arg)).collect::<Result<_, _>>()?;
        let path = CString::new(path.into_os_string().into_vec())
            .map_err(|_| ProcessError::Nul { field: "args", value: name.clone() })?;
        Ok(Self { path, args, env })
    }

    /// Becomes the program; returns only if that fails.
    pub fn exec(&self) -> ProcessError {
        let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
            strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
        };
        let (args, env) = (pointers(&self.args), pointers(&self.env));
        // SAFETY: path, arguments and environment are zero-terminated strings in zero-terminated lists that outlive the call.
        unsafe { libc::execve(self.path.as_ptr(), args.as_ptr(), env.as_ptr()) };
        ProcessError::Exec { program: self.path.to_string_lossy().into_owned(), source: last_errno() }
    }
}

fn c_string(field: &'static str, value: &str) -> Result<CString, ProcessError> {
    CString::new(value).map_err(|_: NulError| ProcessError::Nul { field, value: value.into() })
}

/// Checks what can be checked before anything is made.
pub fn check(process: &Process) -> Result<(), ProcessError> {
    if process.args.is_empty() {
        return Err(ProcessError::NoArgs);
    }
    if !process.cwd.is_absolute() {
        return Err(ProcessError::RelativeCwd(process.cwd.clone()));
    }
    for arg in &process.args {
        c_string("args", arg)?;
    }
    for entry in &process.env {
        c_string("env", entry)?;
        if entry.find('=').is_none_or(|at| at == 0) {
            return Err(ProcessError::Env(entry.clone()));
        }
    }
    match process.user.umask {
        Some(umask) if umask > 0o777 => Err(ProcessError::Umask(umask)),
        _ => Ok(()),
    }
}

/// The environment, where of two entries of a name the last one counts, with a HOME from the container's `/etc/passwd` if it
/// names none.
pub fn environment(process: &Process) -> Result<Vec<CString>, ProcessError> {
    let name = |entry: &'_ str| entry.split('=').next().unwrap_or_default().to_owned();
    let mut env: Vec<CString> = Vec::with_capacity(process.env.len() + 1);
    for (at, entry) in process.env.iter().enumerate() {
        if !process.env[at + 1..].iter().any(|later| name(later) == name(entry)) {
            env.push(c_string("env", entry)?);
        }
    }
    if !env.iter().any(|entry| entry.to_bytes().starts_with(b"HOME=") && entry.to_bytes().len() > 5) {
        env.retain(|entry| !entry.to_bytes().starts_with(b"HOME="));
        let passwd = read_passwd().unwrap_or_default();
        let mut entry = b"HOME=".to_vec();
        entry.extend(home_of(&passwd, process.user.uid).unwrap_or(b"/"));
        env.push(CString::new(entry).map_err(|_| ProcessError::Nul { field: "env", value: "HOME".into() })?);
    }
    Ok(env)
}

/// `/etc/passwd`, as far as it is a file: in a container that runs it may be anything.
fn read_passwd() -> io::Result<Vec<u8>> {
    const LONGEST: u64 = 16 << 20;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = std::fs::File::from(rustix::fs::openat(CWD, "/etc/passwd", flags, Mode::empty())?);
    let mut passwd = Vec::new();
    if file.metadata()?.is_file() {
        file.take(LONGEST).read_to_end(&mut passwd)?;
    }
    Ok(passwd)
}

/// The home directory of a user, from the first entry with its number (`passwd(5)`).
fn home_of(passwd: &[u8], uid: u32) -> Option<&[u8]> {
    passwd.split(|byte| *byte == b'\n').find_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let number = std::str::from_utf8(fields.nth(2)?).ok()?;
        (number.parse() == Ok(uid)).then(|| fields.nth(2))?.filter(|home| !home.is_empty())
    })
}

/// Becomes the container's user, keeping what capabilities there are until they are set.
pub fn become_user(user: &User) -> Result<(), ProcessError> {
    super::capabilities::prctl(libc::PR_SET_KEEPCAPS, 1, 0).map_err(ProcessError::KeepCapabilities)?;
    // SAFETY: the list has as many entries as are said, and outlives the call.
    let groups = unsafe { libc::setgroups(user.additional_gids.len(), user.additional_gids.as_ptr()) };
    if groups < 0 {
        return Err(ProcessError::Groups(last_errno()));
    }
    let (uid, gid) = (user.uid, user.gid);
    // SAFETY: the call takes no pointers.
    if unsafe { libc::setresgid(gid, gid, gid) } < 0 {
        return Err(ProcessError::Gid { gid, source: last_errno() });
    }
    // SAFETY: the call takes no pointers.
    if unsafe { libc::setresuid(uid, uid, uid) } < 0 {
        return Err(ProcessError::Uid { uid, source: last_errno() });
    }
    super::capabilities::prctl(libc::PR_SET_KEEPCAPS, 0, 0).map_err(ProcessError::KeepCapabilities)?;
    rustix::process::umask(Mode::from_raw_mode(user.umask.unwrap_or(0o022)));
    Ok(())
}

/// Makes the working directory if it is not there; as root, inside the container.
pub fn make_cwd(cwd: &Path) -> Result<(), ProcessError> {
    if cwd == Path::new("/") || cwd.exists() {
        return Ok(());
    }
    match std::fs::create_dir_all(cwd) {
        // A root that is read-only says the same, better, when the directory is entered.
        Err(source) if source.kind() != io::ErrorKind::ReadOnlyFilesystem => {
            Err(ProcessError::MakeCwd { path: cwd.into(), source })
        }
        _ => Ok(()),
    }
}

/// Enters the working directory.
pub fn enter_cwd(cwd: &Path) -> Result<(), ProcessError> {
    rustix::process::chdir(cwd).map_err(|source| ProcessError::Cwd { path: cwd.into(), source })?;
    // A container that runs may have pointed it at something it cannot reach (as in CVE-2024-21626); the kernel then says
    // a path that is not absolute.
    match rustix::process::getcwd(Vec::new()) {
        Ok(path) if path.as_bytes().starts_with(b"/") => Ok(()),
        Ok(_) => Err(ProcessError::Outside(cwd.into())),
        Err(source) => Err(ProcessError::Cwd { path: cwd.into(), source }),
    }
}

/// Finds a program as runc does: a name with a slash is a path, any other is searched for.
fn look_up(name: &str, search_path: &[u8]) -> Result<PathBuf, ProcessError> {
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err(Lookup::Stat(source)) => Err(ProcessError::Stat { program: name.into(), source }),
            Err(Lookup::Mode(source)) => Err(ProcessError::NotExecutable { program: name.into(), source }),
        };
    }
    if !name.is_empty() {
        for directory in search_path.split(|byte| *byte == b':') {
            let directory = if directory.is_empty() { b"." } else { directory };
            let path = Path::new(OsStr::from_bytes(directory)).join(name);
            if executable(&path).is_ok() {
                let absolute = path.is_absolute();
                return if absolute { Ok(path) } else { Err(ProcessError::RelativeInPath(name.into())) };
            }
        }
    }
    Err(ProcessError::NotInPath(name.into()))
}

enum Lookup {
    Stat(Errno),
    Mode(Errno),
}

fn executable(path: &Path) -> Result<(), Lookup> {
    // Walked to once: on the share every step is a question to the host.
    let file = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(Lookup::Stat)?;
    let stat = rustix::fs::fstat(&file).map_err(Lookup::Stat)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Err(Lookup::Mode(Errno::ISDIR));
    }
    // By the effective user, and so by the capabilities it was given.
    let flags = libc::AT_EACCESS | libc::AT_EMPTY_PATH;
    // SAFETY: the path is empty, and the descriptor is open.
    let access = unsafe { libc::syscall(libc::SYS_faccessat2, file.as_raw_fd(), c"".as_ptr(), libc::X_OK, flags) };
    if access < 0 {
        match last_errno() {
            // A seccomp filter holds by now, and many an older profile does not know this call: `execve` will say.
            Errno::NOSYS | Errno::PERM => {}
            source => return Err(Lookup::Mode(source)),
        }
    }
    if stat.st_mode & 0o111 == 0 { Err(Lookup::Mode(Errno::ACCESS)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(json: &str) -> Process {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn errors_of_the_program_are_in_the_words_of_runc() {
        let text = |name: &str, path: &[u8]| look_up(name, path).unwrap_err().to_string();
        assert_eq!(
            text("nosuchprogram", b"/bin:/usr/bin"),
            r#"exec: "nosuchprogram": executable file not found in $PATH"#
        );
        assert_eq!(text("nosuchprogram", b""), r#"exec: "nosuchprogram": executable file not found in $PATH"#);
        assert_eq!(text("/no/such", b"/bin"), r#"exec: "/no/such": stat /no/such: no such file or directory"#);
        assert_eq!(text("/etc/passwd", b"/bin"), r#"exec: "/etc/passwd": permission denied"#);
        assert_eq!(text("/etc", b"/bin"), r#"exec: "/etc": is a directory"#);
    }

    #[test]
    fn a_name_is_searched_for_in_order_and_never_in_the_working_directory() {
        assert_eq!(look_up("sh", b"/nonexistent:/bin:/usr/bin").unwrap(), Path::new("/bin/sh"));
        assert!(matches!(look_up("", b"/bin"), Err(ProcessError::NotInPath(_))));
    }

    #[test]
    fn home_is_that_of_the_user_number() {
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nbroken:x\na:x:1000:1000:A,,,:/home/a:/bin/sh\nb:x:7:7:::\n";
        assert_eq!(home_of(passwd, 0), Some(&b"/root"[..]));
        assert_eq!(home_of(passwd, 1000), Some(&b"/home/a"[..]));
        assert_eq!(home_of(passwd, 7), None);
        assert_eq!(home_of(passwd, 8), None);
    }

    #[test]
    fn of_two_entries_of_a_name_the_last_one_counts() {
        let env = environment(&process(r#"{"cwd":"/","env":["A=1","HOME=/x","A=2"]}"#)).unwrap();
        assert_eq!(env, [c"HOME=/x".to_owned(), c"A=2".to_owned()]);
    }

    #[test]
    fn what_no_program_can_take_is_refused() {
        for json in [
            r#"{"cwd":"/","args":[]}"#,
            r#"{"cwd":"x","args":["a"]}"#,
            r#"{"cwd":"/","args":["a\u0000b"]}"#,
            r#"{"cwd":"/","args":["a"],"env":["=x"]}"#,
            r#"{"cwd":"/","args":["a"],"user":{"uid":0,"gid":0,"umask":4096}}"#,
        ] {
            assert!(check(&process(json)).is_err(), "{json}");
        }
    }
}
