"""Runs for tests: programs called in this process, small presets, and folders compared file by file.

A plain module that test files import; conftest.py makes the fixtures `stub` and `tiny` of it.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from minmacpo.evaluation import report
from minmacpo.evaluation.report import write_report
from minmacpo.runtime.progress import run_main

METHODS = [
    "sft",
    "sft-continued",
    "confident",
    "spin",
    "self-rewarding",
    "rlaif",
    "rlcd",
    "dpo-truth",
    "ceiling",
]
REPOSITORY = Path(__file__).parent.parent

# A whole run of about 90 stages in a second: K = 2, R = 2, models that can do nothing. Micro-batches
# are so small that every step accumulates over several of them.
STUB = """
[run]
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
    return __import__(name).main


def last_report(path: Path) -> None:
    """The report of a run that has its table; those before it are left out, to save time."""
    if (Path(path) / "eval/table.json").exists():
        write_report(path)


def invoke(name: str, *words, whole: bool = False) -> Ended:
    """A program called in this process, as from the command line; signal handlers are put back.

    To save time no file is flushed to the disk, and reports before the last are left out, unless
    `whole`: then all is done as in a user's run.
    """
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        if not whole:
            patch.setattr(report, "write_report", last_report)
            patch.setattr(os, "fsync", lambda handle: None)
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


def new_run(root: Path, name: str) -> Path:
    """A finished run of the stub preset, or of a packaged one, with all its stages."""
    train(write_stub(root) if name == "stub" else f"@{name}", f"--run.root={root / 'runs'}")
    return root / "runs" / name


def copy_run(source: Path, root: Path, parts: tuple[str, ...] = ()) -> Path:
    """A copy of a run under another root, to be changed at will; `parts`: only these of its folders."""
    target = root / source.name
    if not parts:
        shutil.copytree(source, target)
    for part in parts:
        shutil.copytree(source / part, target / part)
    return target


# ---- comparing ------------------------------------------------------------------------------

# What may differ between an interrupted and an uninterrupted run on one machine:
TIMES = (
    "started",
    "seconds",
    "cpu_seconds",
    "peak_mb",
    "commit",
    "checksum",
)  # in every stage.json
RATES = ("time", "tokens_per_s", "peak_mem_gb")  # in every line of the run's metrics.jsonl
FREE = ("log.txt", "env.json", "report.html")  # and these whole; in eval/table.json the key "cost"


def contents(run: Path, ignore: tuple[str, ...] = ()) -> dict[str, object]:
    """{path: content without times} of every file of a run; `ignore`: more keys of stage.json."""
    found = {}
    for file in sorted(p for p in run.rglob("*") if p.is_file() and "profile" not in p.parts):
        name = str(file.relative_to(run))
        if file.name == "stage.json":
            found[name] = {
                k: v for k, v in json.loads(file.read_bytes()).items() if k not in TIMES + ignore
            }
        elif name == "metrics.jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if k not in RATES} for row in rows]
        elif name == "eval/table.json":
            found[name] = {
                k: v for k, v in json.loads(file.read_bytes()).items() if k not in ("cost", "run")
            }
        elif name == "config.toml":
            lines = file.read_text().splitlines()
            found[name] = [line for line in lines if not line.startswith(("root =", "name ="))]
        else:
            found[name] = None if name in FREE else file.read_bytes()
    return found


def differences(a: Path, b: Path, ignore: tuple[str, ...] = ()) -> list[str]:
    """Paths of the files that differ between two runs in more than times, or exist in one only."""
    left, right = contents(a, ignore), contents(b, ignore)
    return sorted(
        name for name in left.keys() | right.keys() if left.get(name, 0) != right.get(name, 0)
    )


def stages_of(run: Path) -> dict[str, dict]:
    """{name: stage.json} of all finished stages."""
    return {
        str(f.parent.relative_to(run)): json.loads(f.read_bytes())
        for f in sorted(run.glob("*/*/stage.json"))
    }


def rows_of(file: Path) -> list[dict]:
    """The lines of a .jsonl file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def inodes(run: Path) -> dict[str, tuple[int, int]]:
    """{path: (inode, time of last change)} of all files in stage folders."""
    files = [f for f in run.glob("*/*/*") if f.is_file()]
    return {str(f.relative_to(run)): (os.stat(f).st_ino, os.stat(f).st_mtime_ns) for f in files}
