"""Every reader on changed files: one sentence (UserError) or a value, and never anything else.

Inputs are read in forked children, so that a crash of native code, a hang (CPU seconds of one input) or a blow-up of memory
(address space of the child) is seen, and with which input; a change outside the child's folder, a socket and a process are findings too.
"""

import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from readers import READERS, RUN, Reader, copied, read_run_folder

from minmacpo import UserError

SECONDS, MEGABYTES = 5, 700  # of CPU time, above what the parent has
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod", "shutil.rmtree"}


def guard(folder: Path):
    """An audit hook that raises where a path outside `folder` is written, or the child reaches out of itself."""
    reads = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NONBLOCK | os.O_NOFOLLOW

    def hook(event: str, args: tuple) -> None:
        if event in ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn"):
            raise AssertionError(f"{event} {args}")
        if event not in EVENTS or (event == "open" and (not isinstance(args[0], str | bytes | os.PathLike) or args[2] & ~reads == 0)):
            return
        for path in args[:2] if event in ("os.rename", "os.link") else args[1:2] if event == "os.symlink" else args[:1]:
            if isinstance(path, str | bytes | os.PathLike) and not Path(os.path.realpath(os.fsdecode(path))).is_relative_to(folder):
                raise AssertionError(f"{event} outside the folder: {path!r}")

    return hook


def prepare(folder: Path) -> None:
    """The limits of a child, and its silence."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (MEGABYTES << 20),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGPROF, signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.addaudithook(guard(folder))


def change(reader: Reader, files: list[tuple[Path, str]], folder: Path, rng: random.Random) -> tuple[Path, bytes]:
    """Change one file; (its path, what it held)."""
    pattern = rng.choice([*reader.files])
    file = rng.choice([path for path, key in files if key == pattern])
    good = file.read_bytes()
    file.write_bytes(rng.choice(reader.files[pattern])(good, rng))
    (folder / "changed").write_text(str(file.relative_to(folder)))
    return file, good


def attempt(reader: Reader, folder: Path, rng: random.Random) -> str | None:
    """What is wrong with how the changed file is read, if anything is."""
    try:
        reader.read(folder, rng)
    except UserError as error:
        text = str(error)
        if not 15 < len(text) < 1200 or len(text.strip().splitlines()) > 5:
            return f"sentence: {text[:300]!r} ({len(text)} characters)"
        return ""
    except BaseException as error:
        lines = traceback.format_exception(error)
        return "".join(lines)[-1500:]
    return None


def child(reader: Reader, made: Path, folder: Path, seed: int, numbers: range, ended: memoryview, out: Path) -> None:
    """Read the inputs of these numbers; each finding is a line of `out`."""
    shutil.copytree(made, folder, symlinks=True)
    files = [(path, pattern) for pattern in reader.files for path in sorted(folder.glob(pattern))]
    with out.open("a") as stream:
        prepare(folder)
        for number in numbers:
            ended[0] = number
            rng = random.Random(f"{seed}/{reader.name}/{number}")
            file, good = change(reader, files, folder, rng)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.setitimer(signal.ITIMER_REAL, 30 * SECONDS)  # asleep
            problem = attempt(reader, folder, rng)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            ended[1 + (problem is None)] += 1
            if problem:
                print(json.dumps([number, str(file.relative_to(folder)), file.read_bytes().hex(), problem]), file=stream, flush=True)
            file.write_bytes(good)


def fuzz(reader: Reader, made: Path, home: Path, seed: int, count: int, workers: int = 1) -> tuple[list, int, int]:
    """(findings, inputs refused, inputs read) of `count` inputs."""
    jobs, findings, told = {}, [], [0, 0]
    left = [range(worker, count, workers) for worker in range(workers)]
    while left or jobs:
        for numbers in left:
            ended, folder = memoryview(mmap.mmap(-1, 24)).cast("q"), home / f"work{time.monotonic_ns()}"
            if not (pid := os.fork()):
                code = 1
                try:
                    child(reader, made, folder, seed, numbers, ended, home / f"found{numbers.start % workers}.jsonl")
                    code = 0
                except BaseException:
                    (folder / "defect").write_text(traceback.format_exc())
                finally:
                    os._exit(code)
            jobs[pid] = (numbers, ended, folder)
        left = []
        pid, status = os.wait()
        numbers, ended, folder = jobs.pop(pid)
        told = [told[0] + ended[1], told[1] + ended[2]]
        if status:
            name = (folder / "changed").read_text()
            findings.append([ended[0], name, (folder / name).read_bytes().hex(), f"the process ended with {os.waitstatus_to_exitcode(status)}" + ((folder / "defect").read_text() if status == 256 else "")])
            left = [range(ended[0] + workers, count, workers)]
        shutil.rmtree(folder)
    for file in home.glob("found*.jsonl"):
        findings += [json.loads(line) for line in file.read_text().splitlines()]
    return findings, *told
