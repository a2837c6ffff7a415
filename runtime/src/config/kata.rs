//! Every annotation of Kata Containers (4.1) and what becomes of it, so that manifests written for it can stay as they are, or
//! are told what podhull does not do for them. Keys of its configuration file are known by the same names.

use std::borrow::Cow;

use super::keys::Key;

/// What becomes of an annotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It sets a key of ours.
    Sets(Key),
    /// It is about what Kata is made of, and nothing follows for a pod.
    Ignored(&'static str),
    /// These values are what podhull does; others are refused, and why.
    Only(&'static [&'static str], &'static str),
    /// Refused, and why. Values that ask for nothing (empty, `0`, `false`) are let through.
    Refused(&'static str),
}

use Fate::{Ignored, Only, Refused, Sets};

/// What all of them begin with.
pub const PREFIX: &str = "io.katacontainers.";

const OWN_PROGRAMS: &str = "machines, their jail and their file server are podhull's own program";
const HASH: &str = "podhull checks no hashes of the files of a machine";
const NO_FIRMWARE: &str = "machines boot their kernel directly, without firmware";
const NO_VFIO: &str = "devices of the host are not passed through";
const NO_IOMMU: &str = "machines have no IOMMU";
const NO_HUGE_PAGES: &str = "memory of machines is not taken from the host's pool of huge pages";
const NO_SWAP: &str = "guests have no swap";
const NO_VHOST_USER: &str = "there are no vhost-user devices";
const NO_RATES: &str =
    "interfaces of machines have no rates of their own; the CNI plugin bandwidth limits those of the pod";
const REMOTE: &str = "there are no machines on other hosts";
const TUNES_KATA: &str = "tunes a part that podhull has not";
const QEMU: &str = "an attribute of QEMU's machines; podhull's are of one kind";
const ALWAYS: &str = "always so";
const CONFIDENTIAL: &str = "there are no confidential guests";

/// All annotations, without what all begin with.
pub const ANNOTATIONS: &[(&str, Fate)] = &[
    ("config_path", Refused("a runtime class may name a file with its configuration, by ConfigPath; a pod may not")),
    ("pkg.oci.bundle_path", Ignored("what Kata notes for itself")),
    ("pkg.oci.container_type", Ignored("what Kata notes for itself; podhull goes by what CRI's runtimes say")),
    ("container.resource.swappiness", Refused(NO_SWAP)),
    ("container.resource.swap_in_bytes", Refused(NO_SWAP)),
    // The agent.
    ("config.agent.enable_tracing", Refused("the agent does not trace")),
    ("config.agent.container_pipe_size", Ignored("streams are no pipes in the guest")),
    ("config.agent.kernel_modules", Refused("the guest kernel loads no modules")),
    ("config.agent.policy", Refused("the agent knows no policies")),
    ("config.agent.cdh_api_timeout", Ignored(TUNES_KATA)),
    ("config.agent.cdh_api_timeout_ms", Ignored(TUNES_KATA)),
    // The machine.
    ("config.hypervisor.default_vcpus", Sets(Key::Vcpus)),
    ("config.hypervisor.default_memory", Sets(Key::Memory)),
    ("config.hypervisor.default_max_vcpus", Sets(Key::MaxVcpus)),
    ("config.hypervisor.default_maxvcpus", Sets(Key::MaxVcpus)),
    ("config.hypervisor.default_max_memory", Sets(Key::MaxMemory)),
    ("config.hypervisor.default_maxmemory", Sets(Key::MaxMemory)),
    ("config.hypervisor.kernel", Sets(Key::Kernel)),
    ("config.hypervisor.image", Sets(Key::Image)),
    ("config.hypervisor.kernel_params", Sets(Key::KernelParams)),
    ("config.hypervisor.path", Refused(OWN_PROGRAMS)),
    ("config.hypervisor.ctlpath", Refused(OWN_PROGRAMS)),
    ("config.hypervisor.jailer_path", Refused(OWN_PROGRAMS)),
    ("config.hypervisor.path_hash", Refused(HASH)),
    ("config.hypervisor.hypervisor_hash", Refused(HASH)),
    ("config.hypervisor.hypervisorctl_hash", Refused(HASH)),
    ("config.hypervisor.jailer_hash", Refused(HASH)),
    ("config.hypervisor.kernel_hash", Refused(HASH)),
    ("config.hypervisor.image_hash", Refused(HASH)),
    ("config.hypervisor.initrd_hash", Refused(HASH)),
    ("config.hypervisor.firmware_hash", Refused(HASH)),
    ("config.hypervisor.firmware_volume_hash", Refused(HASH)),
    ("config.hypervisor.asset_hash_type", Ignored("says of what kind hashes are, and those are refused")),
    ("config.hypervisor.kernel_verity_params", Refused("the guest image is not checked by dm-verity")),
    ("config.hypervisor.initrd", Refused("the guest image is no initrd: io.podhull.machine.image names one")),
    ("config.hypervisor.firmware", Refused(NO_FIRMWARE)),
    ("config.hypervisor.firmware_volume", Refused(NO_FIRMWARE)),
    (
        "config.hypervisor.rootless",
        Refused(
            "the process of a machine is root's, in a jail, and only the threads that serve files have capabilities",
        ),
    ),
    ("config.hypervisor.cpu_features", Refused("guests have the CPU features that KVM offers for this host")),
    ("config.hypervisor.machine_type", Ignored(QEMU)),
    ("config.hypervisor.machine_accelerators", Ignored(QEMU)),
    ("config.hypervisor.use_legacy_serial", Ignored(QEMU)),
    ("config.hypervisor.use_vsock", Only(&["true"], "host and guest speak by vsock alone")),
    ("config.hypervisor.enable_virtio_mem", Ignored(ALWAYS)),
    ("config.hypervisor.memory_slots", Ignored("memory is plugged in blocks of one region")),
    ("config.hypervisor.memory_offset", Ignored("room for a device that podhull has not")),
    ("config.hypervisor.enable_mem_prealloc", Refused("memory of machines is taken as it is used")),
    ("config.hypervisor.enable_hugepages", Refused(NO_HUGE_PAGES)),
    ("config.hypervisor.hugepage_type", Refused(NO_HUGE_PAGES)),
    ("config.hypervisor.file_mem_backend", Refused("memory of machines is in no file")),
    ("config.hypervisor.enable_swap", Ignored("memory of machines may be swapped by the host")),
    ("config.hypervisor.enable_guest_swap", Refused(NO_SWAP)),
    ("config.hypervisor.disable_image_nvdimm", Ignored("how the guest image is attached is podhull's own affair")),
    ("config.hypervisor.disable_block_device_use", Ignored("roots of containers are shared directories already")),
    ("config.hypervisor.block_device_driver", Ignored("disks are found at the paths they are asked for")),
    ("config.hypervisor.block_device_cache_set", Ignored("says whether the next two count")),
    ("config.hypervisor.block_device_cache_direct", Refused("disks go through the host's page cache")),
    ("config.hypervisor.block_device_cache_noflush", Refused("what a guest flushes is flushed")),
    ("config.hypervisor.block_device_num_queues", Ignored(TUNES_KATA)),
    ("config.hypervisor.block_device_queue_size", Ignored(TUNES_KATA)),
    ("config.hypervisor.blk_logical_sector_size", Refused("disks have sectors of 512 bytes")),
    ("config.hypervisor.blk_physical_sector_size", Refused("disks have sectors of 512 bytes")),
    ("config.hypervisor.enable_iothreads", Ignored("each device has a thread of its own")),
    ("config.hypervisor.indep_iothreads", Ignored("each device has a thread of its own")),
    ("config.hypervisor.shared_fs", Only(&["virtio-fs", "inline-virtio-fs"], "files are shared by virtio-fs alone")),
    ("config.hypervisor.virtio_fs_daemon", Refused(OWN_PROGRAMS)),
    ("config.hypervisor.virtio_fs_extra_args", Refused(OWN_PROGRAMS)),
    (
        "config.hypervisor.virtio_fs_cache",
        Ignored("changes of files on the host are seen, which is the strictest of Kata's modes"),
    ),
    ("config.hypervisor.virtio_fs_cache_size", Ignored("tunes DAX, which podhull does without")),
    ("config.hypervisor.msize_9p", Ignored(TUNES_KATA)),
    ("config.hypervisor.enable_vhost_user_store", Refused(NO_VHOST_USER)),
    ("config.hypervisor.vhost_user_store_path", Refused(NO_VHOST_USER)),
    ("config.hypervisor.vhost_user_reconnect_timeout_sec", Ignored(TUNES_KATA)),
    ("config.hypervisor.prefetch_files.list", Ignored(TUNES_KATA)),
    ("config.hypervisor.enable_iommu", Refused(NO_IOMMU)),
    ("config.hypervisor.enable_iommu_platform", Refused(NO_IOMMU)),
    ("config.hypervisor.hotplug_vfio_on_root_bus", Ignored(NO_VFIO)),
    ("config.hypervisor.cold_plug_vfio", Only(&["no-port"], NO_VFIO)),
    ("config.hypervisor.hot_plug_vfio", Only(&["no-port"], NO_VFIO)),
    ("config.hypervisor.pcie_root_port", Refused(NO_VFIO)),
    ("config.hypervisor.pcie_switch_port", Refused(NO_VFIO)),
    ("config.hypervisor.disable_vhost_net", Ignored("machines do without vhost-net already")),
    ("config.hypervisor.network_queues", Ignored(TUNES_KATA)),
    ("config.hypervisor.rx_rate_limiter_max_rate", Refused(NO_RATES)),
    ("config.hypervisor.tx_rate_limiter_max_rate", Refused(NO_RATES)),
    ("config.hypervisor.entropy_source", Only(&["/dev/random", "/dev/urandom"], "entropy is the host kernel's")),
    ("config.hypervisor.guest_hook_path", Refused("hooks are those of the specification")),
    ("config.hypervisor.cc_init_data", Refused(CONFIDENTIAL)),
    ("config.hypervisor.default_gpus", Refused(REMOTE)),
    ("config.hypervisor.default_gpu_model", Refused(REMOTE)),
    // The runtime.
    ("config.runtime.name", Ignored("names a part of Kata")),
    ("config.runtime.hypervisor_name", Ignored("names a part of Kata")),
    ("config.runtime.agent_name", Ignored("names a part of Kata")),
    ("config.runtime.disable_guest_seccomp", Refused("profiles of seccomp are always enforced")),
    (
        "config.runtime.internetworking_model",
        Only(&["tcfilter", "macvtap"], "frames pass between an interface of the pod and its machine as they are"),
    ),
    (
        "config.runtime.sandbox_cgroup_only",
        Ignored("the process of a machine is beside its container, in the pod's group"),
    ),
    ("config.runtime.disable_new_netns", Refused("the process of a machine has an empty network namespace, always")),
    ("config.runtime.vfio_mode", Ignored(NO_VFIO)),
    ("config.runtime.shared_mounts", Refused("containers share files by volumes")),
    ("config.runtime.sandbox_bind_mounts", Refused("files of the host are in containers, by their mounts alone")),
    ("config.runtime.create_container_timeout", Ignored("podhull has deadlines of its own, and guests pull no images")),
    ("config.runtime.experimental_force_guest_pull", Refused("guests pull no images")),
    (
        "config.runtime.enable_vcpus_pinning",
        Refused("CPUs of machines are not pinned one by one; a CPU set holds for all"),
    ),
    ("config.runtime.enable_pprof", Refused("there is no Go program to profile")),
    ("config.runtime.experimental", Refused("they are Kata's experiments")),
];

/// Tables of Kata's configuration files.
const TABLES: &[&str] = &["hypervisor", "agent", "runtime", "factory", "proxy", "shim", "netmon", "image"];

/// What becomes of an annotation; its name without what all begin with.
pub fn fate(name: &str) -> Option<Fate> {
    ANNOTATIONS.iter().find(|(known, _)| *known == name).map(|(_, fate)| *fate)
}

/// The text of an annotation as that of ours; none where it asks for nothing.
pub fn value(key: Key, text: &str) -> Option<Cow<'_, str>> {
    match key {
        // As many as there are.
        Key::MaxVcpus | Key::MaxMemory if text.trim() == "0" => None,
        // Parts of a CPU are a whole one.
        Key::Vcpus => match text.trim().parse::<f64>() {
            Ok(cpus) if cpus > 0.0 && cpus < 1e6 && text.contains('.') => Some(format!("{}", cpus.ceil()).into()),
            _ => Some(text.into()),
        },
        Key::Kernel | Key::Image | Key::KernelParams if text.is_empty() => None,
        _ => Some(text.into()),
    }
}

/// What a key of its configuration file is here; with the names of its tables before it.
pub fn key_of_file(name: &str) -> Option<Key> {
    match name.rsplit('.').next().unwrap_or(name) {
        "enable_annotations" => Some(Key::Allow),
        // Of any table, these would be no keys of Kata's.
        "kernel" | "image" | "kernel_params" if !is_table_of_file(name) => None,
        leaf => match fate(&format!("config.hypervisor.{leaf}")) {
            Some(Sets(key)) => Some(key),
            _ => None,
        },
    }
}

/// Whether a key is in a table of its configuration files.
pub fn is_table_of_file(name: &str) -> bool {
    name.split_once('.').is_some_and(|(table, _)| TABLES.contains(&table))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_each_annotation_once() {
        for (index, (name, _)) in ANNOTATIONS.iter().enumerate() {
            assert!(ANNOTATIONS[..index].iter().all(|(other, _)| other != name), "{name} is there twice");
        }
    }

    #[test]
    fn parts_of_a_cpu_are_a_whole_one() {
        for (text, expected) in [("0.2", "1"), ("1.0", "1"), ("2.01", "3"), ("4", "4"), ("-1", "-1"), ("nan.", "nan.")]
        {
            assert_eq!(value(Key::Vcpus, text).as_deref(), Some(expected));
        }
    }

    #[test]
    fn keys_of_the_file_are_known_in_their_tables() {
        assert_eq!(key_of_file("hypervisor.qemu.default_maxvcpus"), Some(Key::MaxVcpus));
        assert_eq!(key_of_file("hypervisor.qemu.kernel"), Some(Key::Kernel));
        assert_eq!(key_of_file("kernel"), None);
        assert_eq!(key_of_file("default_memory"), Some(Key::Memory));
    }

    /// Those that have are said there once.
    #[test]
    fn the_page_for_its_users_lists_keys_without_an_annotation() {
        let page = include_str!("../../../docs/from-kata.md");
        let mut keys = Vec::new();
        for row in page.lines().filter(|line| line.starts_with("| `[")) {
            let cell = row.split('|').nth(1).unwrap();
            let (table, names) = cell.split_once("] ").unwrap();
            let table = table.trim_start_matches(" `[").trim_end_matches(".*");
            for name in names.split(", ").map(|name| name.trim_matches(['`', ' '])) {
                assert_eq!(fate(&format!("config.{table}.{name}")), None, "{table}.{name}");
                assert!(is_table_of_file(&format!("{table}.{name}")), "{row}");
                keys.push(format!("{table}.{name}"));
            }
        }
        let count = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!((keys.len(), count > 40), (count, true), "{keys:?}");
    }
}
