//! What a pod asks for itself, by annotations: `io.podhull.` before the name of a key, or the name that Kata Containers has for it.
//! Every annotation under these two names is honoured or refused by name, but for those of Kata's that are about nothing here.

use std::collections::BTreeMap;

use super::kata::{self, Fate};
use super::keys::{ByAnnotation, Key, names};
use super::value::Value;
use super::{Annotations, Config, ConfigError, Host, MIB, Source};

/// What annotations of ours begin with; the name of a key follows.
pub const PREFIX: &str = "io.podhull.";

/// Lays what a pod asks for over what is in force.
pub fn apply(mut config: Config, annotations: &Annotations, host: Host) -> Result<Config, ConfigError> {
    let mut asked: BTreeMap<Key, (&str, Value)> = BTreeMap::new();
    for (name, text) in sorted(annotations) {
        let wrong = |problem| ConfigError::Annotation { name: name.into(), problem };
        let Some((key, value)) = ask(name, text).map_err(wrong)? else { continue };
        config.allows(key).map_err(wrong)?;
        config.bounds(key, &value, host).map_err(wrong)?;
        match asked.get(&key) {
            Some((other, before)) if *before != value => {
                return Err(wrong(format!("annotation {other} asks for another {}", key.name())));
            }
            _ => drop(asked.insert(key, (name, value))),
        }
    }
    for (key, (name, value)) in asked {
        let value = match (key, config.0.get(&key)) {
            // The kernel goes by what comes last.
            (Key::KernelParams, Some(before)) => Value::Text(format!("{} {value}", before.value)),
            _ => value,
        };
        config.set(key, value, Source::Annotation(name.into()));
    }
    config.check()?;
    Ok(config)
}

/// Refuses what cannot be had in a pod whose machine runs: `first` are the annotations of the container that it was made for.
pub fn check_member(annotations: &Annotations, first: &Annotations, pod: &str) -> Result<(), ConfigError> {
    for (name, text) in sorted(annotations) {
        if first.get(name).is_some_and(|given| given == text) {
            continue;
        }
        let wrong = |problem| ConfigError::Annotation { name: name.into(), problem };
        if ask(name, text).map_err(wrong)?.is_some() {
            return Err(wrong(format!(
                "the virtual machine of pod {pod:?} runs already, and was not made with it: give it to the pod's first container"
            )));
        }
    }
    Ok(())
}

/// In the order of their names, so that of several mistakes always the same is told.
fn sorted(annotations: &Annotations) -> impl Iterator<Item = (&str, &str)> {
    let sorted: BTreeMap<&str, &str> = annotations.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    sorted.into_iter()
}

/// What an annotation asks for; none if that is nothing of ours, or nothing at all.
fn ask(name: &str, text: &str) -> Result<Option<(Key, Value)>, String> {
    let (key, text) = match (name.strip_prefix(PREFIX), name.strip_prefix(kata::PREFIX)) {
        (Some(key), _) => match Key::find(key) {
            Some(key) => (key, text.into()),
            None => return Err(format!("unknown; behind {PREFIX} may be {}", names())),
        },
        (None, Some(rest)) => match kata::fate(rest) {
            Some(Fate::Sets(key)) => match kata::value(key, text) {
                Some(text) => (key, text),
                None => return Ok(None),
            },
            Some(Fate::Ignored(_)) => return Ok(None),
            // As with fields of a specification, these ask for nothing.
            Some(Fate::Only(..) | Fate::Refused(_)) if matches!(text, "" | "0" | "false") => return Ok(None),
            Some(Fate::Only(values, _)) if values.contains(&text) => return Ok(None),
            Some(Fate::Only(_, reason) | Fate::Refused(reason)) => {
                return Err(format!("{text:?}: not supported: {reason}"));
            }
            None => return Err("podhull knows no annotation of Kata Containers with this name; leave it out".into()),
        },
        (None, None) => return Ok(None),
    };
    let value = Value::of_text(key.line().kind, &text)?;
    Ok(if value == Value::Text(String::new()) { None } else { Some((key, value)) })
}

impl Config {
    /// Whether pods may set a key for themselves.
    fn allows(&self, key: Key) -> Result<(), String> {
        let source = self.0.get(&Key::Allow).map_or(Source::Default, |entry| entry.source.clone());
        match self.get(Key::Allow) {
            _ if key.line().annotation == ByAnnotation::Never => {
                Err(format!("{} can only be set in the configuration of the host", key.name()))
            }
            Some(Value::Keys(allowed)) if allowed.contains(&key) => Ok(()),
            _ => Err(format!("{} is not among annotations.allow ({source}): a pod may not set it", key.name())),
        }
    }

    /// Whether a pod may ask for so much: what it would not get it is not promised.
    fn bounds(&self, key: Key, value: &Value, host: Host) -> Result<(), String> {
        let (most, of_host) = match key {
            Key::Vcpus => (None, host.vcpus),
            Key::Memory => (None, host.memory / MIB),
            // Whether it is less than is asked for is seen when both are known.
            Key::MaxVcpus | Key::MaxMemory => (self.0.get(&key), u64::MAX),
            _ => return Ok(()),
        };
        let Some(number) = value.number() else { return Ok(()) };
        match most {
            Some(most) if Some(number) > most.value.number() => {
                Err(format!("{value} is more than {}, {}", key.name(), most.describe()))
            }
            _ if number > of_host => Err(match value {
                Value::Mebibytes(_) => format!("{value} is more than the {of_host} MiB of memory this host has"),
                _ => format!("{value} is more than the {of_host} CPUs this host has"),
            }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Host = Host { memory: 8 << 30, vcpus: 16 };

    fn annotations(given: &[(&str, &str)]) -> Annotations {
        given.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn file(given: &[(Key, Value)]) -> Config {
        let mut config = Config::default();
        for (line, (key, value)) in given.iter().enumerate() {
            config.set(*key, value.clone(), Source::File { path: "/c.toml".into(), line: line + 1 });
        }
        config
    }

    fn with(config: Config, given: &[(&str, &str)]) -> Result<Config, String> {
        apply(config, &annotations(given), HOST).map_err(|error| error.to_string())
    }

    fn shown(config: &Config, key: Key) -> (String, String) {
        let shown = config.show().swap_remove(key as usize);
        (shown.text, shown.from.to_string())
    }

    #[test]
    fn annotations_win_over_files_and_say_so() {
        let base = file(&[(Key::Memory, Value::Mebibytes(1024)), (Key::Vcpus, Value::Number(1))]);
        let config = with(base, &[("io.podhull.machine.memory", "512"), ("org.other", "x")]).unwrap();
        assert_eq!(shown(&config, Key::Memory), ("512 MiB".into(), "annotation io.podhull.machine.memory".into()));
        assert_eq!(shown(&config, Key::Vcpus), ("1".into(), "/c.toml:2".into()));
    }

    #[test]
    fn what_kata_has_another_name_for_is_the_same_key() {
        for (name, text, key, expected) in [
            ("default_vcpus", "4", Key::Vcpus, "4"),
            ("default_vcpus", "1.5", Key::Vcpus, "2"),
            ("default_memory", "512", Key::Memory, "512 MiB"),
            ("default_max_vcpus", "8", Key::MaxVcpus, "8"),
            ("default_maxvcpus", "8", Key::MaxVcpus, "8"),
            ("default_maxmemory", "4096", Key::MaxMemory, "4096 MiB"),
            ("default_max_memory", "4096", Key::MaxMemory, "4096 MiB"),
            ("kernel_params", "a=b", Key::KernelParams, "a=b"),
        ] {
            let name = format!("io.katacontainers.config.hypervisor.{name}");
            let config = with(Config::default(), &[(&name, text)]).unwrap();
            assert_eq!(shown(&config, key), (expected.into(), format!("annotation {name}")));
        }
        // As many as there are.
        let all = [("io.katacontainers.config.hypervisor.default_max_vcpus", "0")];
        assert_eq!(with(Config::default(), &all), Ok(Config::default()));
    }

    #[test]
    fn parameters_of_the_kernel_are_added() {
        let base = file(&[(Key::KernelParams, Value::Text("a=b".into()))]);
        let config = with(base, &[("io.podhull.machine.kernel_params", "c d=e")]).unwrap();
        assert_eq!(shown(&config, Key::KernelParams).0, "a=b c d=e");
    }

    #[test]
    fn only_what_is_allowed_may_be_set() {
        let kernel = [("io.katacontainers.config.hypervisor.kernel", "/boot/vmlinux")];
        let expected = "annotation io.katacontainers.config.hypervisor.kernel: machine.kernel is not among \
                        annotations.allow (default): a pod may not set it";
        assert_eq!(with(Config::default(), &kernel).unwrap_err(), expected);
        let allowed = file(&[(Key::Allow, Value::Keys(vec![Key::Kernel]))]);
        assert_eq!(shown(&with(allowed.clone(), &kernel).unwrap(), Key::Kernel).0, "/boot/vmlinux");
        let memory = [("io.podhull.machine.memory", "512")];
        let expected = "annotation io.podhull.machine.memory: machine.memory is not among annotations.allow (/c.toml:1): a \
                        pod may not set it";
        assert_eq!(with(allowed, &memory).unwrap_err(), expected);
        let console = with(Config::default(), &[("io.podhull.machine.guest_console", "/etc")]).unwrap_err();
        assert!(
            console.ends_with("machine.guest_console can only be set in the configuration of the host"),
            "{console}"
        );
    }

    #[test]
    fn what_is_unknown_is_refused_by_name() {
        let error = with(Config::default(), &[("io.podhull.machine.memroy", "512")]).unwrap_err();
        assert!(
            error.starts_with("annotation io.podhull.machine.memroy: unknown; behind io.podhull. may be "),
            "{error}"
        );
        let error = with(Config::default(), &[("io.katacontainers.config.hypervisor.warp", "9")]).unwrap_err();
        let expected = "annotation io.katacontainers.config.hypervisor.warp: podhull knows no annotation of Kata Containers \
                        with this name; leave it out";
        assert_eq!(error, expected);
    }

    #[test]
    fn what_kata_does_and_podhull_does_not_is_refused_unless_it_asks_for_nothing() {
        let name = "io.katacontainers.config.hypervisor.enable_iommu";
        let error = with(Config::default(), &[(name, "true")]).unwrap_err();
        assert!(error.starts_with(&format!("annotation {name}: \"true\": not supported: ")), "{error}");
        assert_eq!(with(Config::default(), &[(name, "false")]), Ok(Config::default()));
        let name = "io.katacontainers.config.hypervisor.shared_fs";
        assert_eq!(with(Config::default(), &[(name, "virtio-fs")]), Ok(Config::default()));
        assert!(with(Config::default(), &[(name, "none")]).is_err());
        let name = "io.katacontainers.config.hypervisor.machine_type";
        assert_eq!(with(Config::default(), &[(name, "q35")]), Ok(Config::default()));
    }

    #[test]
    fn no_pod_gets_more_than_the_host_or_its_configuration_has() {
        let memory = |mebibytes: &'static str| [("io.podhull.machine.memory", mebibytes)];
        let error = with(Config::default(), &memory("9000")).unwrap_err();
        assert!(error.ends_with("9000 MiB is more than the 8192 MiB of memory this host has"), "{error}");
        let error = with(Config::default(), &[("io.podhull.machine.vcpus", "17")]).unwrap_err();
        assert!(error.ends_with("17 is more than the 16 CPUs this host has"), "{error}");
        let bounded = file(&[(Key::MaxMemory, Value::Mebibytes(1024))]);
        let expected =
            "annotation io.podhull.machine.memory: 2048 MiB is more than machine.max_memory, 1024 MiB (/c.toml:1)";
        assert_eq!(with(bounded.clone(), &memory("2048")).unwrap_err(), expected);
        let error = with(bounded.clone(), &[("io.podhull.machine.max_memory", "4096")]).unwrap_err();
        assert!(error.ends_with("4096 MiB is more than machine.max_memory, 1024 MiB (/c.toml:1)"), "{error}");
        assert!(with(bounded, &[("io.podhull.machine.max_memory", "512")]).is_ok());
    }

    #[test]
    fn two_annotations_that_ask_for_different_sizes_are_refused() {
        let kata = "io.katacontainers.config.hypervisor.default_memory";
        let ours = "io.podhull.machine.memory";
        assert!(with(Config::default(), &[(kata, "512"), (ours, "512")]).is_ok());
        let error = with(Config::default(), &[(kata, "512"), (ours, "1024")]).unwrap_err();
        assert_eq!(error, format!("annotation {ours}: annotation {kata} asks for another machine.memory"));
    }

    #[test]
    fn who_joins_a_pod_may_say_what_it_was_made_with_and_nothing_else() {
        let first = annotations(&[("io.podhull.machine.memory", "512")]);
        let check = |given: &[(&str, &str)]| check_member(&annotations(given), &first, "p").map_err(|e| e.to_string());
        assert_eq!(check(&[("io.podhull.machine.memory", "512"), ("a", "b")]), Ok(()));
        let error = check(&[("io.podhull.machine.memory", "1024")]).unwrap_err();
        assert!(
            error.starts_with("annotation io.podhull.machine.memory: the virtual machine of pod \"p\" runs"),
            "{error}"
        );
        assert!(check(&[("io.podhull.machine.vcpus", "1")]).is_err());
        assert!(check(&[("io.podhull.x", "1")]).is_err());
        assert_eq!(check(&[("io.katacontainers.config.hypervisor.machine_type", "q35")]), Ok(()));
    }
}
