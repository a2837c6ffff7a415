//! Many small files through the shared file system, and the same by the host alone: a tree unpacked, walked, and bytes read here and
//! there in a large file.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::Bench;
use super::report::{Figure, Panel};
use crate::bundle::{Bundle, DEBIAN};
use crate::run::Running;
use crate::{Outcome, ensure};

/// How long all of it may take.
const DEADLINE: Duration = Duration::from_secs(600);

/// Reads of 4 KiB.
const READS: usize = 2000;

/// Prints how long each of the three took, in seconds. The pod has seen none of it when it begins.
const SCRIPT: &str = "
import os, random, subprocess, sys, time
os.chdir(sys.argv[1])
times = []
def timed(what):
    began = time.monotonic()
    what()
    times.append(time.monotonic() - began)
def unpack():
    os.mkdir('tree')
    subprocess.run(['tar', 'xf', 'tree.tar', '-C', 'tree'], check=True)
def walk():
    subprocess.run(['find', 'tree', '-type', 'f', '-size', '+0'], check=True, stdout=subprocess.DEVNULL)
def reads():
    file = os.open('large', os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    chosen = random.Random(1)
    for _ in range(COUNT):
        assert len(os.pread(file, 4096, chosen.randrange(65536 >> 1) * 4096)) == 4096
for what in unpack, walk, reads:
    timed(what)
print(*times)
";

/// Pod and host in turns, each on the same files.
pub fn measure(bench: &Bench) -> Outcome<Vec<Panel>> {
    let data = bench.directory.join("tree");
    fs::create_dir_all(&data)?;
    // Sources as they are in a tree of sources, some hundred files of some KiB.
    let prepare =
        "set -e; cd \"$1\"; tar cf \"$0/tree.tar\" usr/lib/python3*/[e-i]*; cd \"$0\"; head -c 128M /dev/zero >large
        tar tf tree.tar | wc -l";
    let made = Command::new("sh").args(["-c", prepare]).arg(&data).arg(DEBIAN).output()?;
    ensure!(made.status.success(), "tar: {}", String::from_utf8_lossy(&made.stderr));
    let files: f64 = String::from_utf8(made.stdout)?.trim().parse()?;
    let script = SCRIPT.replace("COUNT", &READS.to_string());
    let bundle = Bundle::new(bench.directory.join("tree-bundle"), &bench.podhull.spec, Path::new(DEBIAN))?
        .args(&["python3", "-c", &script, "/data"])
        .bind(&data, "/data", &["bind", "rw"]);
    bundle.write()?;
    let inside = bench.podhull.run_words(&bundle.directory, "bench-tree");
    // By the same programs, and not those that the host happens to have.
    let outside = ["chroot", DEBIAN, "python3", "-c", &script].map(OsString::from);
    let place = Path::new(DEBIAN).join("mnt");
    let outside: Vec<OsString> = outside.into_iter().chain(["/mnt".into()]).collect();

    let (mut pod, mut host): ([Vec<f64>; 3], [Vec<f64>; 3]) = Default::default();
    bench.rounds("tree", bench.few(), |round| {
        for (words, samples, is_host) in [(&inside[..], &mut pod, false), (&outside[..], &mut host, true)] {
            if is_host {
                rustix::mount::mount_bind(&data, &place)?;
            }
            let ended = Running::start(words, &[])?.wait_within(DEADLINE);
            if is_host {
                rustix::mount::unmount(&place, rustix::mount::UnmountFlags::empty())?;
            }
            let said = ended?.output()?;
            fs::remove_dir_all(data.join("tree"))?;
            let seconds: Vec<f64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
            let [unpack, walk, reads] = seconds[..] else { return Err(format!("the script said {said:?}").into()) };
            if round.is_some() {
                let rates = [files / unpack, files / walk, READS as f64 / reads];
                samples.iter_mut().zip(rates).for_each(|(samples, rate)| samples.push(rate));
            }
        }
        Ok(())
    })?;
    fs::remove_dir_all(&data)?;

    let mut figures = Vec::new();
    let names = ["files by tar x", "files by find", "random reads of 4 KiB"];
    for ((name, pod), host) in names.iter().zip(pod).zip(host) {
        let pod = Figure::new(format!("pod: {name}"), "a second", pod);
        let host = Figure::new(format!("host: {name}"), "a second", host);
        let ratio = Figure::ratio(format!("{name}, pod / host"), &pod, &host);
        figures.extend([pod, host, ratio]);
    }
    Ok(vec![Panel {
        title: "Many small files, in the host's page cache and new to the guest (more is better)",
        unit: "a second",
        successive: false,
        figures,
    }])
}
