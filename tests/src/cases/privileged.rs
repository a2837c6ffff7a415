//! What containers do that are allowed to: mount, unshare, and use the kernel's less common doors.

use super::oci;
use crate::suite::{Case, Scene};
use crate::{Outcome, ensure, ensure_eq};

pub const CASES: &[Case] = &[
    oci("privileged::overlayfs_inside", overlayfs_inside),
    oci("privileged::nested_namespaces", nested_namespaces),
    oci("privileged::io_uring", io_uring),
    oci("privileged::inotify_and_unix_sockets", inotify_and_unix_sockets),
    oci("privileged::a_32_bit_program", a_32_bit_program),
];

fn overlayfs_inside(scene: &Scene) -> Outcome {
    let script = "
set -e
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/merged
# The container's own root is the lower layer.
mount -t overlay overlay -o lowerdir=/usr,upperdir=/mnt/upper,workdir=/mnt/work /mnt/merged
echo changed >/mnt/merged/bin/hello
rm /mnt/merged/bin/python3
cat /mnt/upper/bin/hello
stat -c %F /mnt/upper/bin/python3
test ! -e /mnt/merged/bin/python3
test -e /usr/bin/python3
umount /mnt/merged
";
    let found = scene.run(&scene.debian()?.privileged().sh(script))?.output()?;
    ensure_eq!(found, "changed\ncharacter special file\n", "through an overlay");
    Ok(())
}

fn nested_namespaces(scene: &Scene) -> Outcome {
    let script = "unshare --user --map-root-user --pid --fork --mount-proc --net --uts --ipc --mount --cgroup sh -c '
hostname nested; hostname; echo $$; id -u; ls /sys/class/net >/dev/null; ps -e -o pid= | wc -l'; hostname";
    let found = scene.run(&scene.debian()?.privileged().sh(script))?.output()?;
    let words: Vec<&str> = found.split_whitespace().collect();
    ensure_eq!(words[..3.min(words.len())], ["nested", "1", "0"], "in the nested namespaces");
    ensure!(words.last() != Some(&"nested"), "the nested host name came out");
    Ok(())
}

/// Two entries through the rings: a write to a pipe, then a read from it, both by the kernel.
fn io_uring(scene: &Scene) -> Outcome {
    let script = "
import ctypes, mmap, os, struct
libc = ctypes.CDLL(None, use_errno=True)
params = ctypes.create_string_buffer(120)
ring = libc.syscall(425, 8, params)
if ring < 0: raise OSError(ctypes.get_errno(), 'io_uring_setup')
sq_entries, cq_entries = struct.unpack_from('II', params, 0)
sq_head, sq_tail, sq_mask, _, _, _, sq_array = struct.unpack_from('7I', params, 40)
cq_head, cq_tail, cq_mask, _, _, cqes = struct.unpack_from('6I', params, 80)
size = max(sq_array + 4 * sq_entries, cqes + 16 * cq_entries)
rings = mmap.mmap(ring, size, mmap.MAP_SHARED, offset=0)
entries = mmap.mmap(ring, 64 * sq_entries, mmap.MAP_SHARED, offset=0x10000000)
reader, writer = os.pipe()
out = ctypes.create_string_buffer(b'through the ring')
into = ctypes.create_string_buffer(16)
IORING_OP_READ, IORING_OP_WRITE = 22, 23
def submit(opcode, descriptor, buffer):
    tail, = struct.unpack_from('I', rings, sq_tail)
    index = tail & struct.unpack_from('I', rings, sq_mask)[0]
    entry = struct.pack('BBHiQQI', opcode, 0, 0, descriptor, 0, ctypes.addressof(buffer), 16).ljust(64, bytes(1))
    entries[index * 64:index * 64 + 64] = entry
    struct.pack_into('I', rings, sq_array + 4 * index, index)
    struct.pack_into('I', rings, sq_tail, tail + 1)
    if libc.syscall(426, ring, 1, 1, 1, None, 0) != 1: raise OSError(ctypes.get_errno(), 'io_uring_enter')
    head, = struct.unpack_from('I', rings, cq_head)
    _, result = struct.unpack_from('Qi', rings, cqes + 16 * (head & struct.unpack_from('I', rings, cq_mask)[0]))
    struct.pack_into('I', rings, cq_head, head + 1)
    return result
print(submit(IORING_OP_WRITE, writer, out), submit(IORING_OP_READ, reader, into), into.raw.decode())
";
    let found = scene.run(&scene.debian()?.privileged().python(script))?.output()?;
    ensure_eq!(found, "16 16 through the ring\n", "io_uring");
    Ok(())
}

fn inotify_and_unix_sockets(scene: &Scene) -> Outcome {
    let script = "
import ctypes, os, socket, struct
directory = '/var/tmp/e2e-inotify'
os.mkdir(directory)
try:
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    if libc.inotify_add_watch(watch, directory.encode(), 0xfff) < 0: raise OSError(ctypes.get_errno(), 'inotify')
    open(directory + '/file', 'w').write('x')
    os.rename(directory + '/file', directory + '/other')
    os.unlink(directory + '/other')
    events, data = [], os.read(watch, 4096)
    while data:
        _, mask, _, length = struct.unpack_from('iIII', data)
        events.append(mask)
        data = data[16 + length:]
    for name, bit in (('modify', 2), ('moved from', 0x40), ('moved to', 0x80), ('create', 0x100), ('delete', 0x200)):
        print(name, any(mask & bit for mask in events))
    # A socket in the root file system, with a file descriptor sent over it.
    server = socket.socket(socket.AF_UNIX)
    server.bind(directory + '/socket')
    server.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect(directory + '/socket')
    accepted, _ = server.accept()
    reader, writer = os.pipe()
    socket.send_fds(client, [b'here'], [writer])
    _, (received,), _, _ = socket.recv_fds(accepted, 16, 1)
    os.write(received, b'sent')
    print('socket', os.read(reader, 16).decode())
    os.unlink(directory + '/socket')
finally:
    os.rmdir(directory)
";
    let bundle = scene.debian()?.writable().python(script);
    let found = scene.run(&bundle)?.output()?;
    let expected = "modify True\nmoved from True\nmoved to True\ncreate True\ndelete True\nsocket sent\n";
    ensure_eq!(found, expected, "inotify and sockets");
    Ok(())
}

fn a_32_bit_program(scene: &Scene) -> Outcome {
    let script = "f=/usr/lib32/libc.so.6; od -An -t x1 -j 4 -N 1 $f; $f | cut -d ' ' -f 1-3 | head -n 1";
    let found = scene.run(&scene.debian()?.sh(script))?.output()?;
    // The fifth byte of an ELF file is its class: 1 is 32-bit.
    ensure_eq!(found, " 01\nGNU C Library\n", "a 32-bit program");
    Ok(())
}
