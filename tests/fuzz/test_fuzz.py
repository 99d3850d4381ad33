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
from readers import Reader, readers

from minmacpo import UserError

SECONDS, MEGABYTES = 5, 700  # of CPU time for an input; of memory above what the parent has
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
    """What is wrong with how a changed file is read; "" if it is refused as it should be, None if it is read."""
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


def child(reader: Reader, folder: Path, seed: int, numbers: range, told: memoryview, out: Path) -> None:
    """Read the inputs of these numbers, before the first of all the good files; each finding is a line of `out`."""
    files = [(path, pattern) for pattern in reader.files for path in sorted(folder.glob(pattern))]
    with out.open("a") as stream:
        prepare(folder)
        for file in [next(file for file, key in files if key == pattern) for pattern in reader.files if not numbers.start]:
            (folder / "changed").write_text(str(file.relative_to(folder)))
            if attempt(reader, folder, random.Random(0)) is not None:
                print(json.dumps([-1, str(file.relative_to(folder)), "", "the good file is not read"]), file=stream, flush=True)
        for number in numbers:
            told[0], rng = number, random.Random(f"{seed}/{reader.name}/{number}")
            file, good = change(reader, files, folder, rng)
            bad = file.read_bytes()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.setitimer(signal.ITIMER_REAL, 60 * SECONDS)  # asleep
            problem = attempt(reader, folder, rng)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            told[1 + (problem is None)] += 1
            if problem:
                print(json.dumps([number, str(file.relative_to(folder)), bad.hex(), problem]), file=stream, flush=True)
            file.write_bytes(good)


def start(reader: Reader, home: Path, seed: int, numbers: range, told: memoryview) -> tuple[int, Path]:
    """(process, folder) of a new child."""
    folder = home / f"from{numbers.start}"
    shutil.copytree(home / "made", folder, symlinks=True)
    if not (pid := os.fork()):
        code = 1
        try:
            child(reader, folder, seed, numbers, told, home / f"found{numbers.start}")
            code = 0
        except BaseException:
            (folder / "defect").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    return pid, folder


def fuzz(reader: Reader, home: Path, seed: int, count: int, workers: int = 1) -> tuple[list[tuple], int, int]:
    """(findings, inputs refused, inputs read) of `count` inputs. A child that dies is followed by one that goes on behind."""
    (home / "made").mkdir(parents=True)
    reader.make(home / "made")
    jobs, findings, refused, read = {}, [], 0, 0
    left = [range(worker, count, workers) for worker in range(workers)]
    while left or jobs:
        for numbers in left:
            told = memoryview(mmap.mmap(-1, 24)).cast("q")  # number of the input, inputs refused, inputs read
            pid, folder = start(reader, home, seed, numbers, told)
            jobs[pid] = (numbers, told, folder)
        pid, status = os.wait()
        numbers, told, folder = jobs.pop(pid)
        refused, read, left = refused + told[1], read + told[2], []
        if status:
            name, defect = (folder / "changed").read_text(), folder / "defect"
            said = defect.read_text() if defect.exists() else f"the process has ended with {os.waitstatus_to_exitcode(status)}"
            findings.append((told[0], name, (folder / name).read_bytes().hex(), said))
            left = [range(told[0] + workers, count, workers)]
        shutil.rmtree(folder)
    for file in home.glob("found*"):
        findings += [tuple(json.loads(line)) for line in file.read_text().splitlines()]
    return findings, refused, read


def check(reader: Reader, home: Path, seed: int, count: int, workers: int = 1) -> tuple[int, int]:
    """(inputs refused, read); fails with the first finding, of which the input is kept as a file."""
    before = {path for path in home.parent.iterdir() if path != home}
    findings, refused, read = fuzz(reader, home, seed, count, workers)
    assert {path for path in home.parent.iterdir() if path != home} == before
    for number, name, held, problem in sorted(findings)[:1]:
        (home / "finding").write_bytes(bytes.fromhex(held))
        pytest.fail(f"{reader.name}, input {number} of --seed={seed}, {name} (kept as {home / 'finding'}), one of {len(findings)} findings:\n{problem}")
    assert refused + read == count
    return refused, read


def test_readers_bear_a_few_changed_files(stub, tmp_path):
    """The same few each time: what new ones find is for the test below."""
    told = [check(reader, tmp_path / str(i), 1, 12) for i, reader in enumerate(readers(stub))]
    refused, read = map(sum, zip(*told, strict=True))
    assert refused > 50 and read > 20


@pytest.mark.fuzz
def test_readers_bear_changed_files(stub, tmp_path, seed, capsys):
    """A hundred thousand inputs and more; how many is printed."""
    total, started = 0, time.monotonic()
    for i, reader in enumerate(readers(stub)):
        refused, read = check(reader, tmp_path / str(i), seed, round(1300 * reader.share), 2)
        assert refused and read, reader.name
        total += refused + read
        with capsys.disabled():
            print(f"\n{reader.name}: {refused} inputs refused, {read} read", end="", flush=True)
        shutil.rmtree(tmp_path / str(i))
    with capsys.disabled():
        print(f"\n{total} inputs, --seed={seed}, {time.monotonic() - started:.0f} s")
    assert total >= 100_000
