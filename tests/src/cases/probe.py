# Prints what a process can see of how it was set up, one JSON object: two runtimes are compared by it.
import json
import os
import stat
import sys

status = dict(line.rstrip("\n").split(":\t", 1) for line in open("/proc/self/status") if ":\t" in line)
wanted = ("Uid", "Gid", "Groups", "Umask", "NoNewPrivs", "Seccomp", "SigBlk", "SigIgn",
          "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
found = {name: " ".join(status[name].split()) for name in wanted}
# Signals 32 and 33 are the C library's own: whoever started the runtime may have left them ignored.
found["SigIgn"] = f"{int(found['SigIgn'], 16) & ~(3 << 31):016x}"

for name in ("oom_score_adj", "uid_map", "gid_map", "setgroups", "personality"):
    try:
        found[name] = " ".join(open("/proc/self/" + name).read().split())
    except OSError as error:
        found[name] = error.strerror

found["limits"] = {line[:25].strip(): line[26:].split()[:2] for line in open("/proc/self/limits").readlines()[1:]}
found["session"] = [os.getpid(), os.getsid(0), os.getpgid(0)]
found["cgroup"] = open("/proc/self/cgroup").read().strip()
found["cwd"] = os.getcwd()
found["argv"] = sys.argv
found["environment"] = dict(os.environ)
found["descriptors"] = sorted(int(name) for name in os.listdir("/proc/self/fd"))[:-1]
found["nice"] = os.nice(0)
found["hostname"] = os.uname().nodename

# Mounts: where, which file system, with which flags of the mount itself, and how events propagate. The root and bind
# mounts are of whatever file system the files come on.
found["mounts"] = []
for line in open("/proc/self/mountinfo"):
    fields = line.split()
    separator = fields.index("-")
    kind = fields[separator + 1]
    # Whether times of access are kept is inherited from where the files lie.
    options = set(fields[5].split(",")) - {"relatime", "noatime"}
    # A tmpfs has the size of its options; the rest of its line differs between kernels.
    sizes = sorted(word for word in fields[separator + 3].split(",") if word.startswith(("size=", "mode=", "ptmxmode=", "gid=")))
    if kind == "devtmpfs":
        # In a user namespace device nodes are bind mounts of the system's own.
        kind, sizes, options = "device", [], set()
    elif kind not in ("proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup2"):
        kind, sizes = "files", []
    if fields[4].startswith(("/proc/", "/sys/firmware")):
        # A masked path: what hides it is the runtime's choice. What can be read of it is compared below.
        continue
    propagation = [field.split(":")[0] for field in fields[6:separator]]
    found["mounts"].append([fields[4], kind, sorted(options), propagation, sizes])
found["mounts"].sort()


def attempt(action):
    try:
        return action()
    except OSError as error:
        return error.strerror


def read(path):
    if os.path.isdir(path):
        return sorted(os.listdir(path))
    with open(path, "rb") as file:
        return len(file.read(1))


def make(path):
    os.mkdir(path)
    os.rmdir(path)
    return "made"


def write(path):
    os.close(os.open(path, os.O_WRONLY))
    return "opened"


# Paths the kernel itself lacks are absent whatever a runtime does, and two kernels differ in that.
masked = ("/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware", "/proc/scsi")
found["masked"] = {path: attempt(lambda: read(path)) for path in masked if os.path.exists(path)}
readonly = ("/proc/sys/kernel/hostname", "/proc/sys/net/ipv4/ip_forward", "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity")
found["readonly"] = {path: attempt(lambda: write(path)) for path in readonly}
found["write to root"] = attempt(lambda: make("/made"))

found["devices"] = {}
for directory, _, names in os.walk("/dev"):
    for name in names:
        path = os.path.join(directory, name)
        if path == "/dev/core":
            # A link that a runtime makes where the kernel has a /proc/kcore.
            continue
        about = os.lstat(path)
        if stat.S_ISLNK(about.st_mode):
            found["devices"][path] = os.readlink(path)
        else:
            number = [os.major(about.st_rdev), os.minor(about.st_rdev)]
            found["devices"][path] = [stat.filemode(about.st_mode), about.st_uid, about.st_gid, number]
print(json.dumps(found, sort_keys=True))
