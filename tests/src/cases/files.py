# Does to a directory what programs do to local file systems, and prints each thing that is not as it should be.
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import sys

os.chdir(sys.argv[1])
os.umask(0o022)
failures = 0


def check(what, condition, seen=""):
    global failures
    if not condition:
        failures += 1
        print("wrong:", what, seen)


def refused(action):
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def read(path):
    with open(path) as file:
        return file.read()


# Hard links
write("file", "text")
os.link("file", "link")
check("both names are one file", os.stat("file").st_ino == os.stat("link").st_ino)
check("the file has two names", os.stat("link").st_nlink == 2, os.stat("link").st_nlink)
write("link", "changed")
check("a change is seen through the other name", read("file") == "changed")
os.unlink("file")
check("one name is left", os.stat("link").st_nlink == 1 and read("link") == "changed")

# Symbolic links, dangling ones and loops included
os.symlink("link", "symlink")
os.symlink("/no/such/file", "dangling")
os.symlink("loop", "loop")
check("a symbolic link is followed", read("symlink") == "changed")
check("its target is kept", os.readlink("dangling") == "/no/such/file")
check("a dangling one is not found", refused(lambda: open("dangling")) == "ENOENT")
check("a loop is found out", refused(lambda: open("loop")) == "ELOOP")
check("its size is the target's length", os.lstat("dangling").st_size == len("/no/such/file"))

# Extended attributes
os.setxattr("link", "user.colour", b"green\0blue")
os.setxattr("link", "trusted.secret", b"1")
check("an attribute is kept", os.getxattr("link", "user.colour") == b"green\0blue")
check("attributes are listed", {"user.colour", "trusted.secret"} <= set(os.listxattr("link")), os.listxattr("link"))
check("replacing one that is not there", refused(lambda: os.setxattr("link", "user.no", b"", os.XATTR_REPLACE)) == "ENODATA")
check("creating one that is there", refused(lambda: os.setxattr("link", "user.colour", b"", os.XATTR_CREATE)) == "EEXIST")
os.removexattr("link", "trusted.secret")
check("a removed one is gone", refused(lambda: os.getxattr("link", "trusted.secret")) == "ENODATA")
# A capability of a file: version 2, effective, CAP_NET_RAW (linux/capability.h)
capability = bytes.fromhex("0100000200200000000000000000000000000000")
write("capable", "")
os.setxattr("capable", "security.capability", capability)
check("a file capability is kept", os.getxattr("capable", "security.capability") == capability)

# Owners and modes
write("owned", "")
os.chown("owned", 1234, 5678)
os.chmod("owned", 0o4751)
about = os.stat("owned")
check("owner and group", (about.st_uid, about.st_gid) == (1234, 5678), (about.st_uid, about.st_gid))
check("mode with set-user-id", stat.S_IMODE(about.st_mode) == 0o4751, oct(about.st_mode))
with open("owned", "a") as file:
    file.write("x")
write("plain", "")
os.chmod("plain", 0o6755)
os.chown("plain", 5, 5)
check("a change of owner drops set-user-id", stat.S_IMODE(os.stat("plain").st_mode) == 0o755, oct(os.stat("plain").st_mode))
os.lchown("dangling", 77, 78)
check("owner of a symbolic link", os.lstat("dangling").st_uid == 77)
os.mkdir("sticky", 0o700)
os.chmod("sticky", 0o2777 | stat.S_ISVTX)
os.chown("sticky", 0, 999)
os.chmod("sticky", 0o3777)
os.mkdir("sticky/below")
check("a directory below takes the group", os.stat("sticky/below").st_gid == 999 and os.stat("sticky/below").st_mode & stat.S_ISGID)
os.mkfifo("pipe", 0o640)
check("a pipe is a pipe", stat.S_ISFIFO(os.stat("pipe").st_mode))
os.utime("owned", ns=(1_000_000_001, 2_000_000_002))
check("times to the nanosecond", (os.stat("owned").st_atime_ns, os.stat("owned").st_mtime_ns) == (1_000_000_001, 2_000_000_002))


def as_user():
    # Another user than root: its rights are those of the modes.
    os.setgroups([])
    os.setgid(4000)
    os.setuid(4000)
    own = [
        refused(lambda: open("secret")) == "EACCES",
        refused(lambda: open("fresh", "w")) == "EACCES",
        refused(lambda: open("sticky/mine", "w")) == "done",
        os.stat("sticky/mine").st_uid == 4000,
        refused(lambda: os.unlink("sticky/theirs")) in ("EPERM", "EACCES"),
        refused(lambda: os.chown("sticky/mine", 1, 1)) == "EPERM",
    ]
    os._exit(own.index(False) + 1 if False in own else 0)


write("secret", "")
os.chmod("secret", 0o600)
write("sticky/theirs", "")
child = os.fork()
if child == 0:
    as_user()
status = os.waitpid(child, 0)[1]
check("another user's rights, number", status == 0, status >> 8)

# A file without a name, which gets one afterwards
nameless = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o640)
os.write(nameless, b"from nowhere")
check("a nameless file has no names", os.fstat(nameless).st_nlink == 0)
libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, AT_SYMLINK_FOLLOW = -100, 0x400
check("naming it", libc.linkat(AT_FDCWD, b"/proc/self/fd/%d" % nameless, AT_FDCWD, b"named", AT_SYMLINK_FOLLOW) == 0)
check("it gets one", read("named") == "from nowhere" and os.fstat(nameless).st_nlink == 1)
os.close(nameless)

# Renaming over, and removing, what is open
write("old", "old")
write("new", "new")
file = open("old")
os.rename("new", "old")
check("an open file survives its replacement", file.read() == "old" and os.fstat(file.fileno()).st_nlink == 0)
check("the name is of the new one", read("old") == "new")
file.close()
file = open("old", "r+")
os.unlink("old")
check("an unlinked file is not found", refused(lambda: os.stat("old")) == "ENOENT")
file.seek(0, 2)
file.write(" and more")
file.flush()
file.seek(0)
check("an open file survives its removal", file.read() == "new and more")
file.truncate(0)
check("and can be truncated", os.fstat(file.fileno()).st_size == 0)
file.close()
os.mkdir("empty")
os.mkdir("full")
write("full/file", "")
check("a directory over a full one", refused(lambda: os.rename("empty", "full")) in ("ENOTEMPTY", "EEXIST"))
check("removing a full one", refused(lambda: os.rmdir("full")) == "ENOTEMPTY")
check("an exchange of two names", libc.renameat2(AT_FDCWD, b"link", AT_FDCWD, b"named", 2) == 0 and read("link") == "from nowhere")
check("a rename that must not replace", libc.renameat2(AT_FDCWD, b"link", AT_FDCWD, b"named", 1) == -1 and ctypes.get_errno() == errno.EEXIST)

# Shared mappings, between two processes and with read and write
with open("mapped", "wb") as file:
    file.truncate(3 * 4096 + 100)
with open("mapped", "r+b") as file:
    first = mmap.mmap(file.fileno(), 0)
    first[4096:4101] = b"first"
    child = os.fork()
    if child == 0:
        with open("mapped", "r+b") as again:
            second = mmap.mmap(again.fileno(), 0)
            good = second[4096:4101] == b"first"
            second[8192:8198] = b"second"
            second.flush()
        os._exit(0 if good else 1)
    check("another process sees a shared mapping", os.waitpid(child, 0)[1] == 0)
    check("and its own is seen", first[8192:8198] == b"second")
    check("read sees the mapping", os.pread(file.fileno(), 5, 4096) == b"first")
    os.pwrite(file.fileno(), b"third", 12288)
    check("the mapping sees write", first[12288:12293] == b"third")
    first.flush()
    first.close()

# Sparse files, holes, allocation
descriptor = os.open("sparse", os.O_RDWR | os.O_CREAT, 0o644)
os.pwrite(descriptor, b"end", 1 << 30)
check("a sparse file is small", os.fstat(descriptor).st_blocks * 512 < 1 << 20, os.fstat(descriptor).st_blocks)
check("data is found behind the hole", os.lseek(descriptor, 0, os.SEEK_DATA) == 1 << 30, os.lseek(descriptor, 0, os.SEEK_DATA))
os.posix_fallocate(descriptor, 0, 65536)
check("allocation takes blocks", os.fstat(descriptor).st_blocks * 512 >= 65536)
os.close(descriptor)
os.unlink("sparse")

# Locks
descriptor, other = os.open("lock", os.O_RDWR | os.O_CREAT), os.open("lock", os.O_RDWR)
fcntl.flock(descriptor, fcntl.LOCK_EX)
check("flock excludes", refused(lambda: fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)) == "EAGAIN")
fcntl.lockf(descriptor, fcntl.LOCK_EX, 10, 0)
child = os.fork()
if child == 0:
    os._exit(0 if refused(lambda: fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)) in ("EAGAIN", "EACCES") else 1)
check("a record lock excludes another process", os.waitpid(child, 0)[1] == 0)
os.close(descriptor)
os.close(other)

# A directory of many files, listed whole while some are removed
os.mkdir("many")
for number in range(1000):
    os.close(os.open(f"many/{number}", os.O_CREAT | os.O_WRONLY))
check("a long directory is listed whole", len(set(os.listdir("many"))) == 1000)
with os.scandir("many") as entries:
    for entry in entries:
        os.unlink(entry.path)
check("and removed while listed", os.listdir("many") == [])
os.rmdir("many")
name = "n" * 255
write(name, "")
check("a name of 255 bytes", os.path.exists(name))
check("one of 256", refused(lambda: open("n" * 256, "w")) == "ENAMETOOLONG")

# Appends of two processes interleave without loss
def append(letter):
    descriptor = os.open("appended", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for _ in range(200):
        os.write(descriptor, letter * 10)
    os._exit(0)


children = []
for letter in (b"a", b"b"):
    child = os.fork()
    if child == 0:
        append(letter)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
text = read("appended")
check("no append is lost", len(text) == 4000 and text.count("a") == 2000, len(text))
print(failures, "wrong")
