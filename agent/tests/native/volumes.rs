//! Volumes that are written anew while containers have them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use podhull_protocol::{Stdio, UpdateVolumeRequest, Volume};
use ttrpc::Code;

use crate::harness::{Agent, deadline, mount, process, refused, shell};

/// A version with these files becomes the present one.
fn write(volume: &Path, version: &str, files: &[(&str, &[u8])]) {
    fs::create_dir_all(volume.join(version)).unwrap();
    for (name, bytes) in files {
        fs::write(volume.join(version).join(name), bytes).unwrap();
        if !volume.join(name).is_symlink() {
            symlink(Path::new("..data").join(name), volume.join(name)).unwrap();
        }
    }
    symlink(version, volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
}

/// A container that has a volume at `/volume`; returns the host's directory.
async fn with_volume(agent: &Agent, id: &str, files: &[(&str, &[u8])]) -> PathBuf {
    let source = agent.dir.path().join("share").join(id);
    write(&source, "..1", files);
    let rootfs = agent.rootfs();
    fs::create_dir(agent.root_path(&rootfs).join("volume")).unwrap();
    let mut spec = shell("sleep 1000");
    let copy = agent.dir.path().join("volumes").join(id).join("v");
    mount(&mut spec, "/volume", "bind", copy.to_str().unwrap(), &["bind", "ro"]);
    let mut request = Agent::container(id, &rootfs, &spec, Stdio::default());
    request.volumes = vec![Volume { name: "v".into(), source: id.into(), ..Default::default() }];
    agent.client.create_container(deadline(), &request).await.unwrap();
    agent.start_container(id).await.unwrap();
    source
}

async fn update(agent: &Agent, id: &str, name: &str) -> ttrpc::Result<()> {
    let request = UpdateVolumeRequest { container_id: id.into(), name: name.into(), ..Default::default() };
    agent.client.update_volume(deadline(), &request).await.map(drop)
}

async fn read(agent: &Agent, id: &str) -> String {
    agent.exec_run(id, &process(&["/bin/busybox", "cat", "/volume/key"])).await.ok()
}

/// The mounts below the directory of copies, as lines of `/proc/self/mounts`.
fn mounted(agent: &Agent) -> Vec<String> {
    let directory = agent.dir.path().join("volumes");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().filter(|line| line.contains(directory.to_str().unwrap())).map(Into::into).collect()
}

#[tokio::test(flavor = "current_thread")]
async fn a_volume_is_a_copy_that_changes_when_the_host_says_so() {
    let agent = Agent::start().await;
    let volume = with_volume(&agent, "a", &[("key", b"one")]).await;
    assert!(mounted(&agent)[0].starts_with("none ") && mounted(&agent)[0].contains(" tmpfs "), "{:?}", mounted(&agent));
    assert_eq!(read(&agent, "a").await, "one");
    write(&volume, "..2", &[("key", b"two")]);
    assert_eq!(read(&agent, "a").await, "one");
    update(&agent, "a", "v").await.unwrap();
    assert_eq!(read(&agent, "a").await, "two");
    // What it cannot become leaves what it is.
    write(&volume, "..3", &[("key", &vec![0; 9 << 20])]);
    let (code, message) = refused(update(&agent, "a", "v").await);
    assert_eq!((code, &*message), (Code::INTERNAL, r#"volume "v": it is larger than 8 MiB"#));
    assert_eq!(read(&agent, "a").await, "two");
    write(&volume, "..4", &[("key", b"four")]);
    update(&agent, "a", "v").await.unwrap();
    assert_eq!(read(&agent, "a").await, "four");
    assert_eq!(refused(update(&agent, "a", "another").await).0, Code::NOT_FOUND);
    agent.delete("a").await;
    assert_eq!(refused(update(&agent, "a", "v").await).0, Code::NOT_FOUND);
    assert!(mounted(&agent).is_empty() && !agent.dir.path().join("volumes/a").exists());
}

#[tokio::test(flavor = "current_thread")]
async fn what_is_too_large_or_something_else_is_the_hosts_own() {
    let agent = Agent::start().await;
    let large = with_volume(&agent, "large", &[("key", b"one"), ("large", &vec![0; 9 << 20])]).await;
    assert_eq!(read(&agent, "large").await, "one");
    write(&large, "..2", &[("key", b"two")]);
    assert_eq!(read(&agent, "large").await, "two");
    update(&agent, "large", "v").await.unwrap();
    agent.delete("large").await;
    fs::create_dir(agent.dir.path().join("share/other")).unwrap();
    fs::write(agent.dir.path().join("share/other/file"), "").unwrap();
    with_volume(&agent, "other", &[("key", b"one")]).await;
    agent.exec_run("other", &process(&["/bin/busybox", "ls", "/volume/file"])).await.ok();
    agent.delete("other").await;
    assert!(mounted(&agent).is_empty());
}

#[tokio::test(flavor = "current_thread")]
async fn volumes_are_below_the_share_and_few() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    let refusal = async |volumes: Vec<(&str, &str)>| {
        let mut request = Agent::container("a", &rootfs, &shell("true"), Stdio::default());
        let volume =
            |(name, source): (&str, &str)| Volume { name: name.into(), source: source.into(), ..Default::default() };
        request.volumes = volumes.into_iter().map(volume).collect();
        refused(agent.client.create_container(deadline(), &request).await)
    };
    for (name, source) in [("v", "../etc"), ("v", "/etc"), ("v", ""), ("..", "v"), ("a/b", "v"), ("", "v")] {
        assert_eq!(refusal(vec![(name, source)]).await.0, Code::INVALID_ARGUMENT, "{name:?} {source:?}");
    }
    assert_eq!(refusal(vec![("v", "v"); 181]).await.1, "volumes: 181 are more than 180");
    assert_eq!(refusal(vec![("v", "missing")]).await.0, Code::INTERNAL);
    assert!(mounted(&agent).is_empty() && !agent.dir.path().join("volumes/a").exists());
}
