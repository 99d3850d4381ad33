"""A reader in a forked process with limits: whatever a changed file does to it can be told.

A crash of native code, a hang (CPU seconds of one input) and a blow-up of memory (address space)
end the process, and are told with the input. A change outside the process's folder, a socket and a
process of its own are findings too.
"""

import faulthandler
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import torch
from readers import Reader

from minmacpo import UserError

FORK = multiprocessing.get_context("fork")

CPU_SECONDS = 5  # of one input
WALL_SECONDS = 300
MEGABYTES = 700  # of address space above what the parent has

# What a process must not do at all
FORBIDDEN = {
    "socket.connect",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
}
# What it may do within its folder only: {event: which of its arguments are paths}
WRITES = {
    "open": slice(0, 1),
    "os.mkdir": slice(0, 1),
    "os.rename": slice(0, 2),
    "os.remove": slice(0, 1),
    "os.rmdir": slice(0, 1),
    "os.symlink": slice(1, 2),
    "os.link": slice(0, 2),
    "os.truncate": slice(0, 1),
    "os.chmod": slice(0, 1),
    "shutil.rmtree": slice(0, 1),
}
READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NONBLOCK | os.O_NOFOLLOW


class Outside(BaseException):
    """A process has done what it must not; no reader that passes over every Exception hides it."""


def make_guard(folder: Path) -> Callable[[str, tuple], None]:
    """An audit hook that raises where a path outside the folder is written, or worse is done."""

    def guard(event: str, args: tuple) -> None:
        if event in FORBIDDEN:
            raise Outside(f"{event} {args}")
        if event not in WRITES:
            return
        if event == "open" and args[2] & ~READ_FLAGS == 0:
            return
        for path in args[WRITES[event]]:
            if not isinstance(path, str | bytes | os.PathLike):
                continue  # an open file
            real_path = Path(os.path.realpath(os.fsdecode(path)))
            if not real_path.is_relative_to(folder):
                raise Outside(f"{event} outside the folder: {path!r}")

    return guard


def limit_process(folder: Path, megabytes: int = MEGABYTES) -> None:
    """Give a child its limits and its folder, and silence it."""
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    most_bytes = num_pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    # what pytest and the programs have set up does not hold here
    for number in (signal.SIGPROF, signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    faulthandler.disable()
    sys.setrecursionlimit(1000)  # as a program has it: Hypothesis raises it

    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.addaudithook(make_guard(folder))


def try_reading(reader: Reader, folder: Path, name: str) -> str | None:
    """What is wrong with how a changed file is read.

    "" if it is refused as it should be, None if it is read.
    """
    try:
        reader.read(folder, name)
    except UserError as error:
        text = str(error)
        if not 15 < len(text) < 1200 or len(text.strip().splitlines()) > 5:
            return f"sentence: {text[:300]!r} ({len(text)} characters)"
        return ""
    except BaseException as error:
        return "".join(traceback.format_exception(error))[-1500:]
    return None


def serve(
    reader: Reader, folder: Path, pipe: Connection, parents_end: Connection, cpu_seconds: float
) -> None:
    """The life of a child: hear which file is changed, read the folder, tell what is wrong."""
    parents_end.close()  # or the end of the parent would not be seen
    limit_process(folder)
    with suppress(EOFError):
        while True:
            name = pipe.recv()
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
            signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
            problem = try_reading(reader, folder, name)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(problem)


def common_length(a: bytes, b: bytes) -> int:
    """How many of the first bytes are the same."""
    length = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        length += 1
    return length


def line_for_found(reader: str, file: str, good: bytes, bad_file: Path) -> str:
    """An entry of test_found.FOUND that makes the bad file of the good one."""
    bad = bad_file.read_bytes()
    start = common_length(good, bad)
    end = common_length(good[start:][::-1], bad[start:][::-1])
    inner = bad[start : len(bad) - end]
    change = f"good[:{start}] + {inner!r} + good[{len(good) - end}:]"
    if len(change) >= 1000:
        change = f"Path({str(bad_file)!r}).read_bytes()"
    return f'("{reader}", "{file}", lambda good: {change})'


class Reading:
    """A reader at work on files in `home`, in a child that another one follows when it dies.

    Attributes:
        refused, read: how many changed files were refused, and read.
    """

    def __init__(self, reader: Reader, home: Path, cpu_seconds: float = CPU_SECONDS):
        self.reader = reader
        self.home = home
        self.folder = home / "folder"
        self.cpu_seconds = cpu_seconds
        self.refused = 0
        self.read = 0
        (home / "made").mkdir(parents=True)
        reader.make(home / "made")
        self.start_child()

        self.files: dict[str, list[str]] = {}  # by pattern
        self.good: dict[str, bytes] = {}  # by name
        for pattern in reader.files:
            paths = sorted(self.folder.glob(pattern))
            self.files[pattern] = [str(path.relative_to(self.folder)) for path in paths]
            for name in self.files[pattern]:
                self.good[name] = (self.folder / name).read_bytes()
        for name, *_ in self.files.values():
            problem = self.find_problem(name, self.good[name])
            assert problem is None, f"the good file {name} is not read: {problem}"

    def start_child(self) -> None:
        """A child on a fresh copy of the good files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.home / "made", self.folder, symlinks=True)
        self.pipe, childs_end = FORK.Pipe()
        self.child = FORK.Process(
            target=serve,
            args=(self.reader, self.folder, childs_end, self.pipe, self.cpu_seconds),
            daemon=True,
        )
        self.child.start()
        childs_end.close()

    def find_problem(self, name: str, content: bytes) -> str | None:
        """What is wrong with how the folder is read with this content in that file.

        As `try_reading`; a child that dies is a problem too.
        """
        self.write(name, content)
        self.pipe.send(name)
        try:
            problem = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.child.join()
            code = self.child.exitcode
            cause = signal.Signals(-code).name if code < 0 else code
            problem = f"the process has ended with {cause}"
            self.start_child()
        self.write(name, self.good[name])
        return problem

    def write(self, name: str, content: bytes) -> None:
        """Write a file anew: for one that is there, the disk would be waited for."""
        (self.folder / name).unlink(missing_ok=True)
        (self.folder / name).write_bytes(content)

    def read_changed(self, rng: Random) -> None:
        """Change a file and have it read.

        Raises:
            AssertionError: it is neither read nor refused; it is kept, and the error says how to
                repeat it.
        """
        pattern = rng.choice(list(self.files))
        name = rng.choice(self.files[pattern])
        mutate = rng.choice(self.reader.files[pattern])
        content = mutate(self.good[name], rng)
        problem = self.find_problem(name, content)
        if problem is None:
            self.read += 1
        elif problem == "":
            self.refused += 1
        else:
            kept_file = self.home / "finding"
            kept_file.write_bytes(content)
            line = line_for_found(self.reader.name, name, self.good[name], kept_file)
            raise AssertionError(
                f"{self.reader.name}: {name}, kept as {kept_file}, is neither read nor refused.\n"
                f"To repeat, in test_found.py: {line}\n{problem}"
            )

    def close(self) -> None:
        """End the child; nothing is left beside its folder."""
        self.pipe.close()
        self.child.join()
        names = {path.name for path in self.home.iterdir()}
        assert names <= {"made", "folder", "finding"}
