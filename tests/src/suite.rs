//! Which tests run, in what order, and what is said about them.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{getpid, set_child_subreaper};

use crate::bundle::{Bundle, DEBIAN, make_busybox_root};
use crate::leaks::Leaks;
use crate::run::{DEADLINE, Ended, Running};
use crate::runtime::Runtime;
use crate::{Outcome, cases, ensure, processes};

/// More repetitions than this are a soak.
const MOST_QUICK: usize = 10;

/// What a test is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// OCI as such: it holds for any runtime.
    Oci,
    /// Virtual machines, or what only podhull promises.
    Podhull,
}

/// One test.
pub struct Case {
    /// `module::function`.
    pub name: &'static str,
    /// What it is about.
    pub subject: Subject,
    /// It takes minutes, and is left to soaks unless it is asked for by its name.
    pub long: bool,
    /// The test itself.
    pub run: fn(&Scene) -> Outcome,
}

/// What a test gets to work with.
pub struct Scene {
    /// The program under test.
    pub runtime: Runtime,
    /// `$PODHULL_TEST_REPEAT`: how often what must never fail is tried. Each test says what it makes of it.
    pub repeat: usize,
    /// A directory of its own on the host's disk, removed after the test.
    pub directory: PathBuf,
    counter: AtomicU32,
}

impl Scene {
    /// For a program under test, with a directory that is there or will be.
    pub fn new(runtime: Runtime, repeat: usize, directory: PathBuf) -> Self {
        Self { runtime, repeat, directory, counter: AtomicU32::new(0) }
    }

    /// Whether this takes the time it needs, and not what there is after each change.
    pub fn is_soak(&self) -> bool {
        self.repeat > MOST_QUICK
    }

    /// A number that no other call has got.
    fn next(&self) -> u32 {
        self.counter.fetch_add(1, Ordering::Relaxed)
    }

    /// A container id that was never used.
    pub fn id(&self) -> String {
        format!("e2e-{}-{}", std::process::id(), self.next())
    }

    /// A bundle with the Debian root, read-only as `spec` has it.
    pub fn debian(&self) -> Outcome<Bundle> {
        self.bundle_on(Path::new(DEBIAN))
    }

    /// A bundle with the root file system `rootfs`.
    pub fn bundle_on(&self, rootfs: &Path) -> Outcome<Bundle> {
        ensure!(rootfs.is_dir(), "no directory {}: this host lacks a container's root", rootfs.display());
        Bundle::new(self.directory.join(format!("bundle-{}", self.next())), &self.runtime.spec, rootfs)
    }

    /// A bundle with a root of busybox in its own directory, as `rootfs`.
    pub fn busybox(&self) -> Outcome<Bundle> {
        let directory = self.directory.join(format!("bundle-{}", self.next()));
        make_busybox_root(&directory.join("rootfs"))?;
        Bundle::new(directory, &self.runtime.spec, Path::new("rootfs"))
    }

    /// A new directory in the test's own.
    pub fn make_directory(&self, name: &str) -> Outcome<PathBuf> {
        let path = self.directory.join(format!("{name}-{}", self.next()));
        fs::create_dir(&path)?;
        Ok(path)
    }

    /// Starts the program under test on a bundle, under a new id.
    pub fn start(&self, bundle: &Bundle) -> Outcome<Running> {
        self.start_with(&self.runtime, bundle)
    }

    /// Starts another runtime on a bundle.
    pub fn start_with(&self, runtime: &Runtime, bundle: &Bundle) -> Outcome<Running> {
        bundle.write()?;
        Running::start(&runtime.run_words(&bundle.directory, &self.id()), &[])
    }

    /// Runs the program under test on a bundle, with nothing on its standard input, to its end.
    pub fn run(&self, bundle: &Bundle) -> Outcome<Ended> {
        self.start(bundle)?.wait()
    }

    /// Runs the program under test with other arguments.
    pub fn call(&self, arguments: &[&str]) -> Outcome<Ended> {
        self.call_with(&self.runtime, arguments)
    }

    /// Who removes the control groups of a container, which takes rights that no process of it has, was killed. Whoever makes
    /// or deletes a container next does it, whichever that is; the processes of this one end by themselves.
    pub fn sweep(&self) -> Outcome {
        let until = Instant::now() + DEADLINE;
        while let [first, ..] = &processes::descendants(std::process::id().cast_signed())[..] {
            ensure!(Instant::now() < until, "{} {} still runs", first.pid, first.command);
            thread::sleep(Duration::from_millis(5));
        }
        self.call(&["delete", "--force", "none"])?.output().map(drop)
    }

    /// Runs another runtime.
    pub fn call_with(&self, runtime: &Runtime, arguments: &[&str]) -> Outcome<Ended> {
        let mut words: Vec<OsString> = vec![runtime.program().into()];
        words.extend(arguments.iter().map(Into::into));
        Running::start(&words, &[])?.wait()
    }
}

/// Runs the cases whose name contains one of the filters, or all.
pub fn main() -> ExitCode {
    match run(&std::env::args().skip(1).collect::<Vec<_>>()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("podhull-e2e: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(filters: &[String]) -> Outcome<bool> {
    if filters.iter().any(|filter| filter == "--help" || filter == "-h") {
        println!("podhull-e2e [FILTER...]: runs the end-to-end tests whose name contains a FILTER, or all; as root.");
        println!(
            "PODHULL_RUNTIME: the program under test (podhull). With another, tests of virtual machines are left out."
        );
        println!(
            "PODHULL_TEST_REPEAT: how often what must never fail is tried (10). With more than {MOST_QUICK}, long tests run \
             too, which otherwise have to be named in full."
        );
        println!("PODHULL_TEST_TRACE: if set, how long each program took that a test waited for.");
        println!(
            "PODHULL_TEST_SANDBOXER: shim: who makes pods in tests of Kubernetes' interface, instead of containerd 2 itself."
        );
        println!("PODHULL_TEST_SETS_CLOCK: if set, tests set the clock of this machine, as an emulated host's may be.");
        println!("PODHULL_TEST_PART: K/N, only every Nth test from the Kth on, to share them among hosts.");
        return Ok(true);
    }
    ensure!(rustix::process::geteuid().is_root(), "the tests need root");
    println!("containerd {}, Docker {}", version_of("containerd"), version_of("dockerd"));
    set_child_subreaper(Some(getpid()))?;
    let repeat = match std::env::var("PODHULL_TEST_REPEAT") {
        Ok(text) => {
            text.parse().ok().filter(|repeat| *repeat > 0).ok_or("PODHULL_TEST_REPEAT is not a positive number")?
        }
        Err(_) => 10,
    };
    let directory = PathBuf::from(format!("/var/tmp/podhull-e2e.{}", std::process::id()));
    let mut scene = Scene::new(Runtime::under_test()?, repeat, directory);

    // Most want to be alone with the control groups; the others ask systemd for theirs.
    let systemd = Path::new("/run/systemd/system").is_dir();
    let chosen = cases::ALL.iter().flat_map(|cases| cases.iter()).filter(|case| {
        if case.name.starts_with("systemd::") != systemd {
            return false;
        }
        let wanted = if case.long && !scene.is_soak() {
            filters.iter().any(|filter| case.name == filter)
        } else {
            filters.is_empty() || filters.iter().any(|filter| case.name.contains(filter.as_str()))
        };
        wanted && (scene.runtime.is_virtual() || case.subject == Subject::Oci)
    });
    let (mine, parts) = part()?;
    let chosen: Vec<&Case> =
        chosen.enumerate().filter(|(index, _)| index % parts + 1 == mine).map(|(_, case)| case).collect();
    let started = Instant::now();
    let (mut passed, mut failed) = (0, Vec::new());
    for case in chosen {
        let began = Instant::now();
        let result = one(case, &mut scene);
        let seconds = began.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                passed += 1;
                println!("ok   {} ({seconds:.1} s)", case.name);
            }
            Err(error) => {
                println!("FAIL {} ({seconds:.1} s): {error}", case.name);
                failed.push(format!("{}: {error}", case.name));
            }
        }
    }
    // Again: of a long log the end is what is read.
    for failed in &failed {
        println!("failed: {failed}");
    }
    println!("{passed} passed, {} failed ({:.0} s)", failed.len(), started.elapsed().as_secs_f64());
    Ok(passed > 0 && failed.is_empty())
}

/// The version that a caller of runtimes says it has, where there is one.
fn version_of(program: &str) -> String {
    let said = Command::new(program).arg("--version").output();
    let said = said.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let version = said.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    version.map_or_else(|| "none".into(), |version| version.trim_end_matches(',').into())
}

/// `$PODHULL_TEST_PART`: which part of how many, as in `1/2`.
pub fn part() -> Outcome<(usize, usize)> {
    let Ok(text) = std::env::var("PODHULL_TEST_PART") else { return Ok((1, 1)) };
    let part = text.split_once('/').and_then(|(mine, parts)| Some((mine.parse().ok()?, parts.parse().ok()?)));
    Ok(part.filter(|(mine, parts)| (1..=*parts).contains(mine)).ok_or("PODHULL_TEST_PART is not K/N")?)
}

/// Runs one case between two looks at the host.
fn one(case: &Case, scene: &mut Scene) -> Outcome {
    fs::create_dir_all(&scene.directory)?;
    let before = Leaks::watch();
    let mut result = (case.run)(scene);
    if result.is_ok() {
        result = before.check();
    }
    if result.is_err() {
        // What a failed test leaves tells nothing new, and must not make the next ones fail.
        before.take_down();
    }
    let removed = fs::remove_dir_all(&scene.directory);
    result?;
    Ok(removed?)
}
