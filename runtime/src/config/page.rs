//! The page of the documentation that lists keys and annotations; made from the tables.

use super::annotations::PREFIX;
use super::kata::{self, Fate};
use super::keys::{ByAnnotation, KEYS, Kind, Line};

const BEGIN: &str = "\
# Configuration

Made from the tables in `runtime/src/config/` by their tests: after a change there, run
`PODHULL_WRITE_DOCS=1 cargo test -p podhull the_page`.

podhull works without any. What the administrator of a host wants otherwise is in `/etc/podhull/config.toml`, and in the files
`/etc/podhull/config.d/*.toml`, which are read after it in the order of their names: of each key the last value counts. Who makes
a pod may ask for some of it by annotations, which come last.

```toml
[machine]
memory = 1024          # MiB for a pod without a limit
max_memory = 16384     # and no pod has more
```

Files and directories have to be root's, and nobody else may be able to write them. A key that is not listed here is an error that
names it, its file and its line, as is a value of another type or out of range: no new pod is made then. Pods that are there go on
as they are, with what was in force when they were made.

A runtime class may have a configuration of its own, as with Kata: a file that the options of the runtime name as `ConfigPath`
([containerd.md](containerd.md)). It is read after those of the host, so that it holds what is different for pods of that class;
`podhull config show --class FILE` prints what is in force for them. `machine.guest_console` and `debug.shell` are for all pods of
the host, and an error there.

`podhull config show` prints what is in force and where each value comes from; with `--bundle DIR` for the pod of that bundle, with
its annotations, and with `--format json` for programs.

```
# podhull config show
KEY                    VALUE                                      FROM
machine.vcpus          all of the host                            default
machine.memory         1024 MiB                                   /etc/podhull/config.toml:2
machine.max_vcpus      all of the host                            default
machine.max_memory     16384 MiB                                  /etc/podhull/config.toml:3
...
```

## Keys
| key | value | without it | annotation | |
| --- | --- | --- | --- | --- |
";

fn kind(kind: Kind) -> String {
    match kind {
        Kind::Cpus { most } => format!("CPUs, 1 to {most}"),
        Kind::Mebibytes { least, most } => format!("MiB, {least} to {most}"),
        Kind::Path => "absolute path".into(),
        Kind::Params => "words".into(),
        Kind::Keys => "list of keys".into(),
    }
}

const ANNOTATIONS: &str = "
## Annotations
`io.podhull.` and the name of a key, as `io.podhull.machine.memory`, on the container that opens the pod (with Kubernetes: on the
pod). The third column says which keys a pod may set: `annotations.allow` lists them, and without that those with *yes*. A pod
cannot ask for more than the host has, nor for more than the configuration's maxima. A container that joins a pod may repeat what
the pod was made with, and nothing else. An unknown name is refused.

containerd hands annotations of pods on where its configuration says so: `pod_annotations = [\"io.podhull.*\",
\"io.katacontainers.*\"]` in the table of the runtime.

### Those of Kata Containers
They are taken under their own names. Each is honoured, refused by name, or about what Kata is made of, so that nothing follows
for a pod. Values that ask for nothing (empty, `0`, `false`) are not refused, an unknown name is.

| `io.katacontainers.` | |
| --- | --- |
";

const SIZE: &str = "
## How large a machine is
A pod has the memory of its containers' limits together, and what its kernel needs; and as many CPUs as their quotas come to. For
containers without limits there are `machine.memory` and `machine.vcpus` beside that. It grows and shrinks with its containers.

containerd and CRI-O say in advance how much the containers of a pod will ask for
(`io.kubernetes.cri.sandbox-memory`, `-cpu-quota` and `-cpu-period`; `pod-linux-resources.crio.io`): the machine begins with that, and
does not get smaller until one of the containers is given other limits. The sandbox's own container counts for nothing then.
`io.kubernetes.cri.sandbox-cpu-shares` is no limit, and does not count.
";

fn page() -> String {
    let mut page = String::from(BEGIN);
    for Line { name, kind: of, unset, annotation, what, .. } in KEYS {
        let annotation = match annotation {
            ByAnnotation::Yes => "yes",
            ByAnnotation::IfAllowed => "if allowed",
            ByAnnotation::Never => "no",
        };
        page += &format!("| `{name}` | {} | {unset} | {annotation} | {what} |\n", kind(*of));
    }
    page += ANNOTATIONS;
    for (name, fate) in kata::ANNOTATIONS {
        page += &match fate {
            Fate::Sets(key) => format!("| `{name}` | `{PREFIX}{}` |\n", key.name()),
            Fate::Ignored(reason) => format!("| `{name}` | without effect: {reason} |\n"),
            Fate::Only(values, reason) => {
                let values = values.iter().map(|value| format!("`{value}`")).collect::<Vec<_>>().join(", ");
                format!("| `{name}` | {values}; other values are refused: {reason} |\n")
            }
            Fate::Refused(reason) => format!("| `{name}` | refused: {reason} |\n"),
        };
    }
    page + SIZE
}

#[test]
fn the_page_says_what_the_tables_say() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
    if std::env::var_os("PODHULL_WRITE_DOCS").is_some() {
        std::fs::write(path, page()).unwrap();
    }
    assert!(std::fs::read_to_string(path).unwrap() == page(), "docs/configuration.md is stale: see its first lines");
}
