//! Mounts, devices, the root, and paths that are hidden or kept.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use serde_json::json;
use ttrpc::Code;

use crate::harness::{Agent, mount, privileged, set, shell, with};

#[tokio::test(flavor = "current_thread")]
async fn mounts_are_those_of_the_specification_with_their_options() {
    let agent = Agent::start().await;
    let output = agent.run(&shell("cut -d' ' -f2-4 /proc/self/mounts | cut -d, -f1-5")).await.ok();
    for line in [
        "/proc proc rw,relatime",
        "/dev tmpfs rw,nosuid,size=65536k,mode=755",
        "/dev/shm tmpfs rw,nosuid,nodev,noexec,relatime",
        "/dev/mqueue mqueue rw,nosuid,nodev,noexec,relatime",
        "/sys sysfs ro,nosuid,nodev,noexec,relatime",
        "/sys/fs/cgroup cgroup2 ro,nosuid,nodev,noexec,relatime",
        "/proc/sys proc ro,relatime",
    ] {
        assert!(output.lines().any(|there| there.starts_with(line)), "{line} is not in\n{output}");
    }
    assert!(output.lines().next().unwrap().starts_with("/ "), "{output}");
    assert!(output.lines().next().unwrap().contains(" ro"), "{output}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_root_is_read_only_if_asked_for() {
    let agent = Agent::start().await;
    let outcome = agent.run(&shell("echo x > /etc/x")).await;
    assert!(outcome.stderr.contains("Read-only file system"), "{outcome:?}");
    let spec = with(shell("echo x > /etc/x && cat /etc/x"), [("/root/readonly", json!(false))]);
    assert_eq!(agent.run(&spec).await.ok(), "x\n");
}

#[tokio::test(flavor = "current_thread")]
async fn a_read_only_tmpfs_has_what_the_container_has_in_it() {
    let agent = Agent::start().await;
    let mut spec =
        shell("touch /dev/x /late/x; ls -d /dev/pts/ptmx /dev/null /late/inner; touch /late/inner/x && echo inner");
    let mounts = spec["mounts"].as_array_mut().unwrap();
    let dev = mounts.iter_mut().find(|mount| mount["destination"] == "/dev").unwrap();
    dev["options"].as_array_mut().unwrap().push(json!("ro"));
    mount(&mut spec, "/late", "tmpfs", "tmpfs", &["ro"]);
    mount(&mut spec, "/late/inner", "tmpfs", "tmpfs", &[]);
    let rootfs = agent.rootfs();
    std::fs::create_dir(agent.root_path(&rootfs).join("late")).unwrap();
    let outcome = agent.run_in(&rootfs, &spec, b"").await;
    assert_eq!(outcome.stdout, "/dev/null\n/dev/pts/ptmx\n/late/inner\ninner\n", "{outcome:?}");
    assert_eq!(outcome.stderr.matches("Read-only file system").count(), 2, "{outcome:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn masked_paths_are_empty_and_readonly_paths_are_kept() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    let root = agent.root_path(&rootfs);
    for dir in ["secrets", "secrets2", "kept"] {
        std::fs::create_dir(root.join(dir)).unwrap();
        std::fs::write(root.join(dir).join("a"), "a").unwrap();
    }
    std::fs::write(root.join("secret"), "a").unwrap();
    symlink("/secret", root.join("link")).unwrap();
    let spec = with(
        privileged(
            "ls /secrets /secrets2; cat /secret /link; touch /secrets/x; touch /kept/x; cat /kept/a; echo > /secret",
        ),
        [
            ("/linux/maskedPaths", json!(["/secrets", "/secrets2", "/secret", "/not/there"])),
            ("/linux/readonlyPaths", json!(["/kept", "/nor/there"])),
        ],
    );
    let outcome = agent.run_in(&rootfs, &spec, b"").await;
    assert_eq!(outcome.stdout, "/secrets:\n\n/secrets2:\na");
    assert_eq!(outcome.stderr.matches("Read-only file system").count(), 2, "{outcome:?}");
    assert_eq!(std::fs::read_to_string(root.join("secret")).unwrap(), "a");
}

#[tokio::test(flavor = "current_thread")]
async fn files_and_directories_are_bound() {
    let agent = Agent::start().await;
    let source = agent.dir.path().join("source");
    std::fs::create_dir_all(source.join("below")).unwrap();
    std::fs::write(source.join("file"), "content\n").unwrap();
    let path = |name: &str| source.join(name).to_str().unwrap().to_owned();
    let mut spec = privileged(
        "cat /made/dir/file /etc/resolv.conf; echo new > /made/dir/new; echo x > /ro/x; cd /made/dir/below && pwd; \
         grep ' /ro ' /proc/self/mounts | cut -d' ' -f4 | cut -d, -f1-3",
    );
    mount(&mut spec, "/made/dir", "bind", &path(""), &["rbind"]);
    mount(&mut spec, "/etc/resolv.conf", "", &path("file"), &["bind", "ro"]);
    mount(&mut spec, "/ro", "bind", &path(""), &["rbind", "ro", "nosuid", "nodev"]);
    let outcome = agent.run(&spec).await;
    assert_eq!(outcome.stdout, "content\ncontent\n/made/dir/below\nro,nosuid,nodev\n");
    assert!(outcome.stderr.contains("Read-only file system"), "{outcome:?}");
    assert_eq!(std::fs::read_to_string(source.join("new")).unwrap(), "new\n");
    assert!(!source.join("x").exists());
}

#[tokio::test(flavor = "current_thread")]
async fn a_tree_is_read_only_to_its_depth_only_if_asked_for() {
    let agent = Agent::start().await;
    let source = agent.dir.path().join("tree");
    std::fs::create_dir_all(source.join("below")).unwrap();
    let below = source.join("below");
    rustix::mount::mount("none", &below, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    for (option, writes) in [("ro", "0\n"), ("rro", "1\n")] {
        let mut spec = privileged("touch /t/below/x 2> /dev/null; echo $?");
        mount(&mut spec, "/t", "bind", source.to_str().unwrap(), &["rbind", option]);
        assert_eq!(agent.run(&spec).await.ok(), writes, "{option}");
    }
    rustix::mount::unmount(&below, rustix::mount::UnmountFlags::DETACH).unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn no_link_in_the_root_leads_a_mount_out_of_it() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    let root = agent.root_path(&rootfs);
    let outside = agent.dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    symlink(&outside, root.join("absolute")).unwrap();
    symlink("../../outside", root.join("relative")).unwrap();
    symlink("/nowhere/else", root.join("dangling")).unwrap();
    let mut spec = privileged("cut -d' ' -f2 /proc/self/mounts | grep -E 'mine|where|outside'; ls /nowhere");
    mount(&mut spec, "/absolute/mine", "tmpfs", "tmpfs", &[]);
    mount(&mut spec, "/relative", "tmpfs", "tmpfs", &[]);
    mount(&mut spec, "/dangling", "tmpfs", "tmpfs", &[]);
    let output = agent.run_in(&rootfs, &spec, b"").await.ok();
    assert_eq!(output, format!("{0}/mine\n/outside\n/nowhere/else\nelse\n", outside.display()));
    assert!(std::fs::read_dir(&outside).unwrap().next().is_none());
}

#[tokio::test(flavor = "current_thread")]
async fn nothing_covers_proc_but_what_may() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    symlink("/proc/self/attr", agent.root_path(&rootfs).join("sneaky")).unwrap();
    let file = agent.dir.path().join("uptime");
    std::fs::write(&file, "12345\n").unwrap();
    let mut allowed = privileged("cat /proc/uptime");
    mount(&mut allowed, "/proc/uptime", "bind", file.to_str().unwrap(), &["bind"]);
    assert_eq!(agent.run(&allowed).await.ok(), "12345\n");
    for destination in ["/proc/self/attr", "/proc/sys", "/sneaky", "/proc"] {
        let mut spec = privileged("true");
        mount(&mut spec, destination, "tmpfs", "tmpfs", &[]);
        let error =
            agent.create("x", &rootfs, &spec, podhull_protocol::Stdio::default()).await.unwrap_err().to_string();
        assert!(error.contains("cannot be mounted because it is inside /proc"), "{destination}: {error}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn proc_and_sys_are_mounted_on_directories_and_not_on_links() {
    let agent = Agent::start().await;
    for name in ["proc", "sys"] {
        let rootfs = agent.rootfs();
        let root = agent.root_path(&rootfs);
        std::fs::remove_dir(root.join(name)).unwrap();
        symlink("/tmp", root.join(name)).unwrap();
        let spec = shell("true");
        let error =
            agent.create("x", &rootfs, &spec, podhull_protocol::Stdio::default()).await.unwrap_err().to_string();
        assert!(error.contains("must be mounted on ordinary directory"), "{error}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_tmpfs_has_the_mode_of_what_it_covers_and_its_content_if_asked_for() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    let root = agent.root_path(&rootfs);
    let covered = root.join("covered");
    std::fs::create_dir_all(covered.join("dir")).unwrap();
    std::fs::set_permissions(&covered, std::fs::Permissions::from_mode(0o711)).unwrap();
    std::fs::write(covered.join("dir/file"), "content\n").unwrap();
    std::fs::set_permissions(covered.join("dir/file"), std::fs::Permissions::from_mode(0o4751)).unwrap();
    std::os::unix::fs::lchown(covered.join("dir/file"), Some(7), Some(8)).unwrap();
    std::fs::set_permissions(covered.join("dir/file"), std::fs::Permissions::from_mode(0o4751)).unwrap();
    symlink("dir/file", covered.join("link")).unwrap();
    let mut copied = privileged(
        "stat -c '%a %u' /covered; cat /covered/link; stat -c '%a %u %g' /covered/dir/file; echo x > /covered/new",
    );
    mount(&mut copied, "/covered", "tmpfs", "tmpfs", &["tmpcopyup"]);
    assert_eq!(agent.run_in(&rootfs, &copied, b"").await.ok(), "711 0\ncontent\n4751 7 8\n");
    assert!(!covered.join("new").exists());
    let mut plain = privileged("stat -c %a /covered /new /moded; ls /covered");
    mount(&mut plain, "/covered", "tmpfs", "tmpfs", &[]);
    mount(&mut plain, "/new", "tmpfs", "tmpfs", &[]);
    mount(&mut plain, "/moded", "tmpfs", "tmpfs", &["mode=750", "ro"]);
    assert_eq!(agent.run_in(&rootfs, &plain, b"").await.ok(), "711\n1777\n750\n");
}

#[tokio::test(flavor = "current_thread")]
async fn unknown_options_and_file_systems_are_refused_by_name() {
    let agent = Agent::start().await;
    for (kind, option, word) in [
        ("tmpfs", "shiny", "\"shiny\""),
        ("tmpfs", "mode=banana", "mode=banana"),
        ("bind", "mode=755", "mode=755"),
        ("bind", "idmap", "idmap"),
        ("nosuchfs", "ro", "\"nosuchfs\""),
        ("proc", "tmpcopyup", "tmpcopyup"),
    ] {
        let mut spec = shell("true");
        mount(&mut spec, "/tmp", kind, "/tmp", &[option]);
        let (code, message) = agent.refusal(&spec).await;
        assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
        assert!(message.contains(word), "{message}");
    }
    let mut missing = shell("true");
    mount(&mut missing, "/tmp", "bind", "/no/such/source", &["bind"]);
    let (_, message) = agent.refusal(&missing).await;
    assert!(message.contains("/no/such/source"), "{message}");
}

#[tokio::test(flavor = "current_thread")]
async fn default_devices_and_links_are_there() {
    let agent = Agent::start().await;
    let line = "cd /dev; for d in null zero full random urandom tty; do stat -c '%n %t:%T %a' $d; done; \
                for l in fd stdin stdout stderr ptmx; do readlink $l; done; echo x > /dev/null; head -c 2 /dev/zero | wc -c";
    let expected = "null 1:3 666\nzero 1:5 666\nfull 1:7 666\nrandom 1:8 666\nurandom 1:9 666\ntty 5:0 666\n\
                    /proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx\n2\n";
    assert_eq!(agent.run(&shell(line)).await.ok(), expected);
}

#[tokio::test(flavor = "current_thread")]
async fn devices_of_the_specification_are_made_and_allowed_by_rule() {
    let agent = Agent::start().await;
    // 1:11 is /dev/kmsg, which the default rules deny.
    let line = "stat -c '%F %t:%T %a %u %g' /dev/log/kmsg /dev/pipe; head -c 0 /dev/log/kmsg; (: < /dev/log/kmsg) && echo opened";
    let devices = json!([
        {"type": "c", "path": "/dev/log/kmsg", "major": 1, "minor": 11, "fileMode": 0o640, "uid": 5, "gid": 6},
        {"type": "p", "path": "/dev/pipe"}
    ]);
    let mut spec = with(privileged(line), [("/linux/devices", devices)]);
    let outcome = agent.run(&spec).await;
    assert_eq!(outcome.stdout, "character special file 1:b 640 5 6\nfifo 0:0 666 0 0\n");
    assert!(outcome.stderr.contains("Operation not permitted"), "{outcome:?}");
    let rule = json!({"allow": true, "type": "c", "major": 1, "minor": 11, "access": "rw"});
    set(&mut spec, "/linux/resources/devices/-", rule);
    assert!(agent.run(&spec).await.stdout.ends_with("opened\n"));
    let bad = json!([{"type": "x", "path": "/dev/x"}]);
    let (_, message) = agent.refusal(&with(shell("true"), [("/linux/devices", bad)])).await;
    assert!(message.contains("/dev/x: expected type"), "{message}");
}

#[tokio::test(flavor = "current_thread")]
async fn mounts_of_the_container_are_not_seen_outside() {
    let agent = Agent::start().await;
    let before = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let output = agent.run(&privileged("mount -t tmpfs mine /tmp && grep -c '^mine' /proc/self/mounts")).await.ok();
    assert_eq!(output, "1\n");
    assert_eq!(std::fs::read_to_string("/proc/self/mounts").unwrap(), before);
    let rootfs = agent.rootfs();
    assert_eq!(std::fs::metadata(agent.root_path(&rootfs)).unwrap().uid(), 0);
}

#[tokio::test(flavor = "current_thread")]
async fn mounts_below_mounts_are_where_their_paths_lead() {
    let agent = Agent::start().await;
    let rootfs = agent.rootfs();
    let root = agent.root_path(&rootfs);
    std::fs::create_dir(root.join("m")).unwrap();
    symlink("/tmp", root.join("m/absolute")).unwrap();
    symlink("../tmp", root.join("m/relative")).unwrap();
    let mut spec =
        privileged("grep -E '^(absolute|relative|covered|last|up) ' /proc/self/mounts | cut -d' ' -f1-2; ls /m");
    mount(&mut spec, "/m", "tmpfs", "copied", &["tmpcopyup"]);
    mount(&mut spec, "/m/absolute/a", "tmpfs", "absolute", &[]);
    mount(&mut spec, "/m/relative/b", "tmpfs", "relative", &[]);
    mount(&mut spec, "/m/../tmp/c", "tmpfs", "up", &[]);
    mount(&mut spec, "/m/n", "tmpfs", "covered", &[]);
    mount(&mut spec, "/m", "tmpfs", "new", &[]);
    mount(&mut spec, "/m/n/k", "tmpfs", "last", &[]);
    // /proc/self/mounts shows what is covered as well.
    let expected = "absolute /tmp/a\nrelative /tmp/b\nup /tmp/c\ncovered /m/n\nlast /m/n/k\nn\n";
    assert_eq!(agent.run_in(&rootfs, &spec, b"").await.ok(), expected);
}
