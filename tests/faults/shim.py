"""A disk on which a test makes things go wrong.

Every operation that changes it is counted, and at one of them comes a fault.

It is put under a program in a child process, in place of Python's own functions. What only reads is
not counted, nor is what changes nothing (a folder that exists already, a file that is gone
already), nor /proc and devices. Nothing is flushed.
"""

import builtins
import errno
import io
import os
import re
import signal
from collections.abc import Iterable

# ---- operations: the name, and whether it needs room on the disk
CALLS = {
    "fsync": True,
    "replace": True,
    "rename": True,
    "mkdir": True,
    "link": True,
    "symlink": True,
    "sendfile": True,
    "unlink": False,
    "remove": False,
    "rmdir": False,
    "truncate": False,
    "ftruncate": False,
}
ROOM = {name for name, room in CALLS.items() if room} | {"open", "write"}
NAMING = ("mkdir", "link", "replace", "rename")  # their errors name their first path


class Disk:
    """Counts operations in `done`.

    At number `at` (from 0) comes the `fault`: a signal before it; or "tear": half of what is
    written gets there, then kill -9; or "full": half of it gets there, and from then on there is no
    room.
    """

    def __init__(self, fault: str | signal.Signals = "", at: int = -1):
        self.fault = fault
        self.at = at
        self.done: list[str] = []

    def before(self, name: str, *path) -> None:
        """What happens before an operation of this name."""
        number = len(self.done)
        self.done.append(name)
        if isinstance(self.fault, signal.Signals) and number == self.at:
            os.kill(os.getpid(), self.fault)
        if self.fault == "full" and name in ROOM:
            # Half of the first write that has no room gets through
            is_first_write = name == "write" and number == self.at
            if number >= self.at and not is_first_write:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *path)

    def write(self, put, data) -> int:
        """A write of `data` by `put`, which may get through in part."""
        self.before("write")
        if self.fault not in ("tear", "full") or len(self.done) - 1 != self.at:
            return put(data)
        written = put(memoryview(data)[: len(data) // 2])
        if self.fault == "tear":
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    def install(self) -> None:
        """Stand between this process and its files, for good."""
        for name in CALLS:
            setattr(os, name, self.watched(name, getattr(os, name)))
        builtins.open = io.open = self.opener(io.open)

    def watched(self, name: str, real):
        """The function `real` of os, counted."""

        def call(*args, **options):
            changes_nothing = False
            if name in ("unlink", "remove"):
                changes_nothing = is_gone(*args, **options)
            elif name == "mkdir":
                changes_nothing = os.path.lexists(args[0])
            if not changes_nothing:
                named_in_errors = args[:1] if name in NAMING else ()
                self.before(name, *named_in_errors)
            if name == "fsync":
                return None
            return real(*args, **options)

        return call

    def opener(self, real):
        """`open`, counted where it is for writing, with a file that counts what is written."""

        def opened(
            file,
            mode="r",
            buffering=-1,
            encoding=None,
            errors=None,
            newline=None,
            closefd=True,
            opener=None,
        ):
            is_uncounted = isinstance(file, int) or re.match("/proc/|/dev/(?!shm/)", str(file))
            if is_uncounted or not set(mode) & set("wax+"):
                return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
            assert buffering == -1, "the shim knows no such file"
            known_mode = mode.replace("a+", "a").replace("w+", "w")
            assert known_mode.isalpha(), "the shim knows no such file"
            self.before("open", file)
            raw = File(self, file, mode.replace("b", "").replace("t", ""), opener)
            buffer = io.BufferedRandom(raw) if "w+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return buffer
            return io.TextIOWrapper(buffer, encoding, errors, newline)

        return opened


class Walk(Disk):
    """A disk on which a program dies many times and lives on.

    At each of the `moments` a twin, with the same memory and open files, is killed with kill -9,
    and the program stands still (SIGSTOP) until what is there then has been copied. It need not
    begin anew for each of them. Moment 2i is before operation i, 2i + 1 is within it, if it is a
    write: half of that is there.
    """

    def __init__(self, moments: Iterable[int]):
        super().__init__()
        self.moments = frozenset(moments)

    def before(self, name: str, *path) -> None:
        self.die(2 * len(self.done))
        super().before(name, *path)

    def write(self, put, data) -> int:
        self.before("write")
        half = put(memoryview(data)[: len(data) // 2])
        self.die(2 * len(self.done) - 1)
        return half + put(memoryview(data)[half:])

    def die(self, moment: int) -> None:
        """A twin's death, if one is due."""
        if moment not in self.moments:
            return
        twin = os.fork()
        if twin == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(twin, 0)
        os.kill(os.getpid(), signal.SIGSTOP)


class File(io.FileIO):
    """An open file whose writes and cuts go over a Disk."""

    def __init__(self, disk: Disk, path, mode: str, opener=None):
        self.disk = disk
        super().__init__(path, mode, opener=opener)

    def write(self, data) -> int:
        return self.disk.write(super().write, data)

    def truncate(self, size=None) -> int:
        self.disk.before("truncate")
        return super().truncate(size)


def is_gone(path, *, dir_fd=None) -> bool:
    """Whether there is nothing under this name."""
    try:
        os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
    except OSError:
        return True
    return False
