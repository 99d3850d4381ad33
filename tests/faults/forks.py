"""Programs in forked children of the test, which has torch loaded already; some of them die there.

And how a folder is compared with that of an undisturbed run.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy.ma  # noqa: F401 (quantiles load it)
import torch._dynamo  # noqa: F401 (the first optimiser loads it)
from runs import FREE, Ended, contents, program, write_stub
from shim import Disk, Walk

import minmacpo
from minmacpo.evaluation import report
from minmacpo.pipeline import code_digest
from minmacpo.pipeline import run as pipeline_run
from minmacpo.pipeline.run_dir import IN_PROGRESS_DIR
from minmacpo.runtime.files import write_atomic
from minmacpo.runtime.progress import run_main

WORKERS = 3  # on two cores: one may wait for its files
for module in pkgutil.walk_packages(minmacpo.__path__, "minmacpo."):
    importlib.import_module(module.name)  # here once, and not in every child
for file in code_digest.PACKAGE.rglob("*.py"):  # so are the digests of the code
    source = file.relative_to(code_digest.PACKAGE).as_posix()
    code_digest.imported_modules(source)
    code_digest.module_digest(source)
PROGRAMS = {name: program(name) for name in ("train", "sample", "eval")}
# what is there does not change: no collection in a child touches it, and it stays shared
gc.freeze()


def child(work: Callable[[], int | None]) -> int:
    """Fork, do `work` there; the child's process id.

    It ends with what `work` returns, without any cleaning up.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = work() or 0
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """The exit code of a child; minus the signal that killed it."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def redirect(number: int, file: Path) -> TextIO:
    """Let a file descriptor lead to a new file; a stream on it."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, number)
    return os.fdopen(number, "w", closefd=False)


def start(name: str, words, output: Path, disk: Disk | None = None, reports: bool = False) -> int:
    """A program begun in a child; its process id.

    Args:
        output: what it prints goes to this path with .out and .err, the operations of a disk that
            it outlives to that with .json.
        disk: what is put under the program, or another fault with `install` and `done`.
        reports: else reports say nothing: they would take most of the time.
    """

    def work() -> int:
        sys.stdout = redirect(1, output.with_suffix(".out"))
        sys.stderr = redirect(2, output.with_suffix(".err"))
        sys.argv = [f"{name}.py", *map(str, words)]
        gc.disable()  # too short to need it
        pipeline_run.REPORT_EVERY = 0  # the same operations whatever the time that they take
        if not reports:
            report.write_report = lambda path: write_atomic(path / "report.html", "x")
        # Opened before the disk counts
        operations = output.with_suffix(".json").open("w")
        if disk:
            disk.install()
        else:
            os.fsync = lambda handle: None
        code = run_main(PROGRAMS[name])
        json.dump(disk.done if disk else [], operations)
        operations.close()
        return code

    return child(work)


def fork(
    name: str, words, disk: Disk | None = None, reports: bool = False
) -> tuple[Ended, list[str]]:
    """(how a program ended in a child, the operations on its disk if it came to its end)."""
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "output"
        code = ended(start(name, words, output, disk, reports))
        operations = []
        if code >= 0:
            operations = json.loads(output.with_suffix(".json").read_text() or "[]")
        out = output.with_suffix(".out").read_text()
        err = output.with_suffix(".err").read_text()
    return Ended(code, out, err), operations


def deaths(words, place: Path, moments: Iterable[int]) -> Iterator[tuple[int, Path]]:
    """train.py on the root `place`/runs.

    Each of the `moments` (of a Walk), with a copy of `place` as a kill -9 leaves it there.
    """
    left = place.with_name(f"{place.name}-left")
    output = place.with_name(f"{place.name}-said")
    pid = start("train", [*words, f"--run.root={place / 'runs'}"], output, Walk(moments))
    try:
        for moment in sorted(moments):
            _, status = os.waitpid(pid, os.WUNTRACED)
            err = output.with_suffix(".err").read_text()
            assert os.WIFSTOPPED(status), f"moment {moment} never came: {err}"
            subprocess.run(["cp", "-a", place, left], check=True)  # what is linked stays linked
            yield moment, left
            shutil.rmtree(left)
            os.kill(pid, signal.SIGCONT)
        assert ended(pid) == 0, output.with_suffix(".err").read_text()
    except BaseException:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            ended(pid)
        raise


def spread(check: Callable[[object], None], points: Iterable) -> list[str]:
    """Check every point, in WORKERS children side by side; what failed, with the point."""
    points = list(points)
    failures = []
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / str(worker) for worker in range(WORKERS)]

        def check_share(worker: int) -> None:
            for point in points[worker::WORKERS]:
                try:
                    check(point)
                except BaseException:
                    failure = f"{point}: {traceback.format_exc(limit=-3)}"
                    with files[worker].open("a") as stream:
                        print(json.dumps(failure), file=stream)

        pids = [child(partial(check_share, worker)) for worker in range(WORKERS)]
        codes = [ended(pid) for pid in pids]
        for file in files:
            if file.exists():
                failures += [json.loads(line) for line in file.read_text().splitlines()]
    assert codes == [0] * WORKERS
    return failures


def check_none_failed(failures: list[str], points: Sequence) -> None:
    """No point of `spread` failed; else the first three that did are shown."""
    assert not failures, f"{len(failures)} of {len(points)}: " + "\n".join(failures[:3])


# ---- comparing --------------------------------------------------------------------------------


def folders(run: Path) -> set[str]:
    """The folders of a run."""
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_dir()}


def stages(run: Path) -> dict[str, tuple[int, int]]:
    """{path: (inode, time of last change)} of the files of all finished stages."""
    identities = {}
    for notes in run.glob("[!.]*/*/stage.json"):
        for file in notes.parent.iterdir():
            status = file.lstat()
            identities[str(file.relative_to(run))] = (status.st_ino, status.st_mtime_ns)
    return identities


ORIGIN = ("linked_from",)  # which of several equal stages a stage was taken from


class Good:
    """An undisturbed run, and what another must have in common with it."""

    def __init__(self, run: Path):
        self.contents = contents(run, ORIGIN)
        self.folders = folders(run)
        assert IN_PROGRESS_DIR not in self.folders

    def check(self, run: Path, before: dict) -> None:
        """The run is bit-identical but for times, and has nothing besides.

        Every stage that was finished `before` is untouched.
        """
        now = contents(run, ORIGIN)
        names = now.keys() | self.contents.keys()
        assert [name for name in names if now.get(name, 0) != self.contents.get(name, 0)] == []
        assert now.keys() >= set(FREE)
        assert folders(run) == self.folders
        after = stages(run)
        assert [name for name in before if before[name] != after.get(name)] == []


def tree(place: Path) -> dict[str, bytes | None]:
    """{path: content, None of a folder} of everything below `place`."""
    content = {}
    for path in sorted(place.rglob("*")):
        content[str(path.relative_to(place))] = path.read_bytes() if path.is_file() else None
    return content


def check_sentence(ended: Ended, *expected: str) -> None:
    """The program ended with one sentence, which has the `expected` words."""
    assert ended.code == 2, ended.err
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1, ended.err
    for words in expected:
        assert words in ended.err


# The stub made smaller: one teacher, one round, a few prompts, one optimiser step a stage, its
# state saved after it.
SMALL = """--macpo.teachers=1 --macpo.rounds=1 --macpo.controls=false
--pretrain.strong_steps=1 --pretrain.weak_steps=1 --pretrain.batch=4
--world.d1=2 --world.d2=2 --world.test=2 --sft.batch=8 --dpo.batch=8
--generate.max_new_tokens=2 --generate.batch=1 --eval.bootstrap=2
--run.save_every=1 --run.log_every=1 --run.max_tokens_per_batch=100000 --run.threads=1""".split()


def small_run(root: Path) -> tuple[list[str], Path]:
    """The words of the smallest whole run, without its root; and such a run, not to be changed."""
    words = [write_stub(root), "--run.name=small", *SMALL]
    ended, _ = fork("train", [*words, f"--run.root={root}"], reports=True)
    assert ended.code == 0, ended.err
    return words, root / "small"
