"""Runs for tests: programs called in this process, a small preset, folders compared by file.

A plain module that test files import; conftest.py makes the fixtures `stub` and `tiny` of it.
"""

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from minmacpo.evaluation import report
from minmacpo.runtime.progress import run_main

METHODS = [
    "sft", "sft-continued", "confident", "spin", "self-rewarding", "rlaif", "rlcd", "dpo-truth",
    "ceiling",
]  # fmt: skip
REPOSITORY = Path(__file__).parent.parent

# A whole run of about 90 stages in two seconds: K = 2, R = 2, models that can do nothing.
# Micro-batches are so small that every step accumulates over several of them.
STUB = """
[run]
workers = 1
save_every = 2
log_every = 2
max_tokens_per_batch = 170
[world]
names = 6
held_names = 2
verbs = 2
d1 = 10
d2 = 12
test = 8
[data]
template = "turns"
max_prompt_length = 64
max_length = 96
[model]
context = 128
vocab = 400
strong = "16x1x2x32"
weak = ["8x1x2x16"]
[pretrain]
strong_steps = 6
weak_steps = 5
batch = 40
[lora]
targets = ["q_proj", "v_proj", "down_proj"]
[sft]
batch = 8
teacher_lr = 1e-2
teacher_epochs = 1
teacher_negative_lr = 1e-2
teacher_negative_epochs = 1
student_lr = 1e-2
student_epochs = 1
student_negative_lr = 1e-2
student_negative_epochs = 1
[dpo]
beta = 0.1
sft_weight = 0.2
batch = 4
student_lr = 1e-2
teacher_lr = 1e-2
[generate]
temperature = 0.7
top_k = 0
top_p = 1.0
max_new_tokens = 12
batch = 2
[macpo]
teachers = 2
rounds = 2
[feedback]
rubric = "{prompt} {response} is that good ?"
verdicts = ["o", "a"]
compare = "{prompt} first : {first} second : {second} which is good ?"
options = ["first .", "second ."]
good_tags = ["an expert speaks"]
bad_tags = ["a gossip speaks"]
[eval]
samples = 1
bootstrap = 20
"""


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int
    out: str
    err: str


def write_stub(folder: Path, name: str = "stub", extra: str = "") -> str:
    """The word that names the stub preset on a command line; the file is written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.toml").write_text(STUB + extra)
    return f"@{folder / name}.toml"


def program(name: str):
    """The `main` of train.py, sample.py or eval.py."""
    return importlib.import_module(name).main


def last_report(path: Path, write=report.write_report) -> None:
    """The report of a run that has its table; those before it are left out, to save time."""
    if (Path(path) / "eval/table.json").exists():
        write(path)


def do_not_flush(handle: int) -> None:
    """Stands for os.fsync: what a test writes need not survive a power cut."""


def invoke(name: str, *words, whole: bool = False) -> Ended:
    """A program called in this process, as from the command line; signal handlers are put back.

    To save time no file is flushed to the disk, and reports before the last are left out, unless
    `whole`: then all is done as in a user's run.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out = io.StringIO()
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        if not whole:
            patch.setattr(report, "write_report", last_report)
            patch.setattr(os, "fsync", do_not_flush)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = run_main(program(name))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Ended(code, out.getvalue(), err.getvalue())


def train(*words, whole: bool = False) -> Ended:
    """train.py, which must succeed."""
    ended = invoke("train", *words, whole=whole)
    assert ended.code == 0, ended.err
    return ended


def spawn(name: str, *words, **options) -> subprocess.Popen:
    """A program as a process of its own; its stdout and stderr are pipes."""
    command = [sys.executable, str(REPOSITORY / f"{name}.py"), *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes | options)


class Fork:
    """Some work in a forked child of this process, where torch is loaded already.

    It is a process of its own like that of `spawn`, with the same methods, but begins at once. As
    in `invoke` no file is flushed to the disk, and reports before the last are left out.
    """

    def __init__(self, work: Callable[[], int]):
        self.files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self.end_with(work)

    def end_with(self, work: Callable[[], int]) -> None:
        """Do the work and end with its exit code: what the child does."""
        code = 70
        try:
            for number, file in enumerate(self.files, 1):
                os.dup2(file.fileno(), number)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            report.write_report = last_report
            os.fsync = do_not_flush
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        """The exit code, minus the signal that killed it; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """(stdout, stderr) of the program, which must end within so many seconds."""
        limit = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > limit:
                self.kill()
                raise TimeoutError(f"a program did not end within {timeout} s")
            time.sleep(0.005)
        return self.printed(0), self.printed(1)

    def printed(self, index: int) -> str:
        """What has been printed so far: on stdout (0) or stderr (1)."""
        handle = self.files[index].fileno()
        return os.pread(handle, os.fstat(handle).st_size, 0).decode()


def fork(name: str, *words) -> Fork:
    """A program in a forked child."""

    def work() -> int:
        sys.argv = [f"{name}.py", *map(str, words)]
        return run_main(program(name))

    return Fork(work)


def new_run(root: Path, name: str) -> Path:
    """A finished run of the stub preset, or of a packaged one, with all its stages."""
    preset = write_stub(root) if name == "stub" else f"@{name}"
    train(preset, f"--run.root={root / 'runs'}", "--run.workers=1")
    return root / "runs" / name


def new_variant(source: Path, root: Path, *words: str, parts: tuple[str, ...] = ()) -> Path:
    """A finished run `root`/variant of the stub preset with other settings.

    Stages that the settings leave as they are in the finished run `source` are taken from a copy
    of it, which lies beside the new run: that takes a tenth of the time.

    Args:
        parts: take only stages of these folders of `source`; for a test that changes how the
            others are computed.
    """
    if not (root / source.name).exists():
        copy_run(source, root, parts)
    train(write_stub(root.parent, "x"), f"--run.root={root}", "--run.name=variant", *words)
    return root / "variant"


def copy_run(source: Path, root: Path, parts: tuple[str, ...] = ()) -> Path:
    """A copy of a run under another root, to be changed at will; `parts`: only these folders."""
    target = root / source.name
    if not parts:
        shutil.copytree(source, target)
    for part in parts:
        shutil.copytree(source / part, target / part)
    return target


def begin_run(source: Path, root: Path) -> Path:
    """A copy of a finished run that has its texts and bases only, as if it had stopped there."""
    parts = ("data", "bases")
    run = copy_run(source, root, parts)
    shutil.copy(source / "config.toml", run)
    with open(run / "metrics.jsonl", "w", encoding="utf-8") as metrics:
        for row in rows_of(source / "metrics.jsonl"):
            if row["stage"].startswith(parts):
                metrics.write(json.dumps(row) + "\n")
    return run


# ---- comparing ------------------------------------------------------------------------------

# What may differ between an interrupted and an uninterrupted run on one machine: of every
# stage.json, of every line of the run's metrics.jsonl, of eval/table.json, and whole files.
TIMES = ("started", "seconds", "cpu_seconds", "peak_mb", "commit", "checksum")
RATES = ("time", "tokens_per_s", "peak_mem_gb")
COSTS = ("cost", "run")
FREE = ("log.txt", "env.json", "report.html")


def without(row: dict, keys: tuple[str, ...]) -> dict:
    """A row without some of its keys."""
    return {key: value for key, value in row.items() if key not in keys}


def content(file: Path, name: str, ignore: tuple[str, ...] = ()) -> object:
    """What is compared of the file that a run calls `name`; `ignore`: more keys of stage.json."""
    if file.name == "stage.json":
        return without(json.loads(file.read_bytes()), TIMES + ignore)
    if name == "metrics.jsonl":
        return [without(row, RATES) for row in rows_of(file)]
    if name == "eval/table.json":
        return without(json.loads(file.read_bytes()), COSTS)
    if name == "config.toml":
        lines = file.read_text().splitlines()
        return [line for line in lines if not line.startswith(("root =", "name ="))]
    if name in FREE:
        return None
    return file.read_bytes()


def contents(run: Path, ignore: tuple[str, ...] = ()) -> dict[str, object]:
    """{path: content without times} of every file of a run; `ignore`: more keys of stage.json."""
    compared = {}
    for file in sorted(run.rglob("*")):
        if file.is_file() and "profile" not in file.parts:
            name = str(file.relative_to(run))
            compared[name] = content(file, name, ignore)
    return compared


def differences(a: Path, b: Path, ignore: tuple[str, ...] = ()) -> list[str]:
    """Paths of the files that differ between two runs in more than times, or exist in one only."""
    left = contents(a, ignore)
    right = contents(b, ignore)
    names = left.keys() | right.keys()
    return sorted(name for name in names if left.get(name, 0) != right.get(name, 0))


def stages_of(run: Path) -> dict[str, dict]:
    """{name: stage.json} of all finished stages."""
    return {
        str(file.parent.relative_to(run)): json.loads(file.read_bytes())
        for file in sorted(run.glob("*/*/stage.json"))
    }


def change_json(file: Path, **changes) -> None:
    """Give keys of a JSON object other values."""
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


def flip_bits(file: Path, index: int, mask: int) -> None:
    """Flip the bits of the mask in one byte of a file."""
    content = bytearray(file.read_bytes())
    content[index] ^= mask
    file.write_bytes(content)


def rows_of(file: Path) -> list[dict]:
    """The lines of a .jsonl file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def inodes(run: Path) -> dict[str, tuple[int, int]]:
    """{path: (inode, time of last change)} of all files in stage folders."""
    identities = {}
    for file in run.glob("*/*/*"):
        if file.is_file():
            status = file.stat()
            identities[str(file.relative_to(run))] = (status.st_ino, status.st_mtime_ns)
    return identities
