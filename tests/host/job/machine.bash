# What the two kinds of host have in common; sourced by `init` (an emulated machine) and `direct` (this machine itself).
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=${TERM:-linux} LANG=C.UTF-8

# File systems, cgroup controllers, names and limits as callers of OCI runtimes expect to find them.
prepare_machine() {
    local controller
    mount -a -T /job/fstab
    # A cgroup with processes in it can give controllers to no child, unless it is the root.
    if [[ -e /sys/fs/cgroup/cgroup.type ]]; then
        mkdir /sys/fs/cgroup/init
        echo 0 >/sys/fs/cgroup/init/cgroup.procs
    fi
    for controller in $(</sys/fs/cgroup/cgroup.controllers); do
        echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
    done
    ulimit -Hn 524288
    echo podhull-host >/proc/sys/kernel/hostname
    ip link set lo up
}

# Returns the status of the command that /job/command is.
run_command() {
    [[ ! -d /job/install ]] || cp -a --no-preserve=ownership /job/install/. / || return 125
    cd /root || return 125
    setsid --wait bash -c "$(</job/command)" </dev/null
}
