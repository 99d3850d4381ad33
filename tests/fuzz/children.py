"""A reader in a forked process with limits: what is wrong with how it reads a file is seen even if the process does not survive it.

A crash of native code, a hang (CPU seconds of one input) and a blow-up of memory (address space) end the process, and are told
with the input; a change outside the process's folder, a socket and a process of its own are findings too.
"""

import faulthandler
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import torch
from readers import Reader

from minmacpo import UserError

FORK = multiprocessing.get_context("fork")
SECONDS, ASLEEP, MEGABYTES = (
    5,
    300,
    700,
)  # for an input: CPU time, and any time; memory above what the parent has
EVENTS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
}


class Outside(BaseException):
    """What a process must not do; a reader that passes over every Exception does not hide it."""


def guard(folder: Path):
    """An audit hook that raises where a path outside `folder` is written, or the child reaches out of itself."""
    reads = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NONBLOCK | os.O_NOFOLLOW

    def hook(event: str, args: tuple) -> None:
        if event in (
            "socket.connect",
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.fork",
            "os.posix_spawn",
        ):
            raise Outside(f"{event} {args}")
        if event not in EVENTS or (
            event == "open"
            and (not isinstance(args[0], str | bytes | os.PathLike) or args[2] & ~reads == 0)
        ):
            return
        for path in (
            args[:2]
            if event in ("os.rename", "os.link")
            else args[1:2]
            if event == "os.symlink"
            else args[:1]
        ):
            if isinstance(path, str | bytes | os.PathLike) and not Path(
                os.path.realpath(os.fsdecode(path))
            ).is_relative_to(folder):
                raise Outside(f"{event} outside the folder: {path!r}")

    return hook


def prepare(folder: Path) -> None:
    """The limits of a child, and its silence."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (MEGABYTES << 20),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGPROF, signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    faulthandler.disable()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sys.setrecursionlimit(1000)  # as a program has it: Hypothesis raises it
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.addaudithook(guard(folder))


def attempt(reader: Reader, folder: Path, name: str) -> str | None:
    """What is wrong with how a changed file is read; "" if it is refused as it should be, None if it is read."""
    try:
        reader.read(folder, name)
    except UserError as error:
        text = str(error)
        if not 15 < len(text) < 1200 or len(text.strip().splitlines()) > 5:
            return f"sentence: {text[:300]!r} ({len(text)} characters)"
        return ""
    except BaseException as error:
        lines = traceback.format_exception(error)
        return "".join(lines)[-1500:]
    return None


def serve(reader: Reader, folder: Path, pipe: Connection, other: Connection) -> None:
    """The life of a child: be told which file is changed, read the folder, tell what is wrong."""
    other.close()  # or the end of the parent would not be seen
    prepare(folder)
    with suppress(EOFError):
        while True:
            name = pipe.recv()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.setitimer(signal.ITIMER_REAL, ASLEEP)
            said = attempt(reader, folder, name)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(said)


def same(a: bytes, b: bytes) -> int:
    """How many of the first bytes are the same."""
    return next(
        (i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other),
        min(len(a), len(b)),
    )


def change(name: str, file: str, good: bytes, kept: Path) -> str:
    """A line of test_found.FOUND that puts what is kept in the place of this good file."""
    bad = kept.read_bytes()
    start = same(good, bad)
    end = same(good[start:][::-1], bad[start:][::-1])
    put = f"good[:{start}] + {bad[start : len(bad) - end]!r} + good[{len(good) - end}:]"
    return f'("{name}", "{file}", lambda good: {put if len(put) < 1000 else f"Path({str(kept)!r}).read_bytes()"})'


class Reading:
    """A reader at work on files in `home`: its child, which is followed by another when it dies, and the count of inputs."""

    def __init__(self, reader: Reader, home: Path):
        self.reader, self.home, self.folder = reader, home, home / "folder"
        (home / "made").mkdir(parents=True)
        reader.make(home / "made")
        self.start()
        self.files = {
            pattern: [
                str(path.relative_to(self.folder)) for path in sorted(self.folder.glob(pattern))
            ]
            for pattern in reader.files
        }
        self.good = {
            name: (self.folder / name).read_bytes()
            for names in self.files.values()
            for name in names
        }
        self.refused = self.read = 0
        for name, *_ in self.files.values():
            assert (problem := self.problem(name, self.good[name])) is None, (
                f"the good file {name} is not read: {problem}"
            )

    def start(self) -> None:
        """A child on a fresh copy of the good files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.home / "made", self.folder, symlinks=True)
        self.pipe, theirs = FORK.Pipe()
        self.child = FORK.Process(
            target=serve, args=(self.reader, self.folder, theirs, self.pipe), daemon=True
        )
        self.child.start()
        theirs.close()

    def problem(self, name: str, data: bytes) -> str | None:
        """As `attempt`, of the folder with this in that file; a child that dies is a problem too."""
        self.put(name, data)
        self.pipe.send(name)
        try:
            said = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.child.join()
            code = self.child.exitcode
            said = f"the process has ended with {signal.Signals(-code).name if code < 0 else code}"
            self.start()
        self.put(name, self.good[name])
        return said

    def put(self, name: str, data: bytes) -> None:
        """Write a file anew: into one that is there, the disk is waited for."""
        (self.folder / name).unlink(missing_ok=True)
        (self.folder / name).write_bytes(data)

    def take(self, rng: Random) -> None:
        """Change a file and have it read. One that is neither read nor refused is kept; AssertionError says what repeats it."""
        pattern = rng.choice([*self.files])
        name = rng.choice(self.files[pattern])
        data = rng.choice(self.reader.files[pattern])(self.good[name], rng)
        problem = self.problem(name, data)
        self.read, self.refused = self.read + (problem is None), self.refused + (problem == "")
        if problem:
            kept = self.home / "finding"
            kept.write_bytes(data)
            again = change(self.reader.name, name, self.good[name], kept)
            raise AssertionError(
                f"{self.reader.name}: {name}, kept as {kept}, is neither read nor refused.\nTo repeat, in test_found.py: {again}\n{problem}"
            )

    def close(self) -> None:
        """End the child; nothing is left beside its folder."""
        self.pipe.close()
        self.child.join()
        assert {path.name for path in self.home.iterdir()} <= {"made", "folder", "finding"}
