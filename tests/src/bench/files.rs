//! 256 MiB through the shared file system, and the same by the host alone.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::Bench;
use super::report::{Figure, Panel};
use crate::bundle::{Bundle, DEBIAN};
use crate::run::Running;
use crate::{Outcome, ensure};

const MIB: f64 = 256.0;

/// How long the three transfers may take: in an emulated host that others keep busy it can be minutes.
const TRANSFERS: Duration = Duration::from_secs(600);

/// Reads `source` twice, then writes `written`. The host has `source` in its page cache; the guest has nothing of it the
/// first time, and the second time what it kept. What is written has reached the host's disk when `dd`, which times itself,
/// is done.
const SCRIPT: &str = "set -e; cd \"$0\"; export LC_ALL=C
dd if=source of=/dev/null bs=1M
dd if=source of=/dev/null bs=1M
dd if=/dev/zero of=written bs=1M count=256 conv=fsync";

const NAMES: [&str; 3] = ["first read", "second read", "write and fsync"];

/// Pod and host in turns, each on the same files.
pub fn measure(bench: &Bench) -> Outcome<Vec<Panel>> {
    let data = bench.directory.join("data");
    fs::create_dir_all(&data)?;
    let made = Command::new("dd").args(["if=/dev/urandom", "bs=1M", "count=256"]).arg(of(&data)).output()?;
    ensure!(made.status.success(), "dd: {}", String::from_utf8_lossy(&made.stderr));
    let bundle = Bundle::new(bench.directory.join("files"), &bench.podhull.spec, Path::new(DEBIAN))?
        .args(&["sh", "-c", SCRIPT, "/data"])
        .bind(&data, "/data", &["bind", "rw"]);
    bundle.write()?;
    let inside = bench.podhull.run_words(&bundle.directory, "bench-files");
    let outside = ["sh".into(), "-c".into(), SCRIPT.into(), data.clone().into()];

    let (mut pod, mut host): ([Vec<f64>; 3], [Vec<f64>; 3]) = Default::default();
    bench.rounds("files", bench.rounds, |round| {
        for (words, samples) in [(&inside[..], &mut pod), (&outside[..], &mut host)] {
            let said = Running::start(words, &[])?.wait_within(TRANSFERS)?.expect_status(0)?.stderr;
            ensure!(fs::metadata(data.join("written"))?.len() == (MIB as u64) << 20, "not all was written: {said}");
            fs::remove_file(data.join("written"))?;
            let rates = rates(&said)?;
            if round.is_some() {
                samples.iter_mut().zip(rates).for_each(|(samples, rate)| samples.push(rate));
            }
        }
        Ok(())
    })?;
    fs::remove_dir_all(&data)?;

    let mut figures = Vec::new();
    for ((name, pod), host) in NAMES.iter().zip(pod).zip(host) {
        let pod = Figure::new(format!("pod: {name}"), "MiB/s", pod);
        let host = Figure::new(format!("host: {name}"), "MiB/s", host);
        let ratio = Figure::ratio(format!("{name}, pod / host"), &pod, &host);
        figures.extend([pod, host, ratio]);
    }
    Ok(vec![Panel {
        title: "256 MiB by dd bs=1M, all of it in the host's page cache, none in the guest's at the first read (more is better)",
        unit: "MiB/s",
        successive: false,
        figures,
    }])
}

fn of(data: &Path) -> std::ffi::OsString {
    let mut word = std::ffi::OsString::from("of=");
    word.push(data.join("source"));
    word
}

/// MiB/s of the three transfers, from lines such as `268435456 bytes (268 MB, 256 MiB) copied, 0.125 s, 2.1 GB/s`.
fn rates(said: &str) -> Outcome<[f64; 3]> {
    let mut rates = Vec::new();
    for line in said.lines().filter(|line| line.contains(" copied, ")) {
        ensure!(line.starts_with("268435456 bytes "), "dd copied something else: {line:?}");
        let seconds = line.split(" copied, ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
        rates.push(MIB / seconds.ok_or_else(|| format!("no time in {line:?}"))?);
    }
    rates.try_into().map_err(|_| format!("dd said {said:?}").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dd_is_understood_and_a_short_copy_refused() {
        let line = "256+0 records in\n268435456 bytes (268 MB, 256 MiB) copied, 0.5 s, 537 MB/s\n";
        assert_eq!(rates(&line.repeat(3)).unwrap(), [512.0; 3]);
        assert!(rates(&line.repeat(2)).is_err());
        assert!(rates(&line.repeat(3).replace("268435456", "1")).is_err());
    }
}
