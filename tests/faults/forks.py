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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy.ma  # noqa: F401 (quantiles load it)
import torch._dynamo  # noqa: F401 (the first optimiser loads it)
from runs import FREE, Ended, contents, program, write_stub
from shim import Disk, Walk

import minmacpo
from minmacpo.evaluation import report
from minmacpo.pipeline import code_digest
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
    if pid := os.fork():
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
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def start(name: str, words, said: Path, disk: Disk | None = None, reports: bool = False) -> int:
    """A program begun in a child on this `disk` (or on another fault with `install` and `done`);
    its process id. What it prints goes to `said`.out and .err, the operations of a disk that it
    outlives to `said`.json. Reports say nothing unless `reports`: they would take most of the time.
    """

    def work() -> int:
        for number, kind in ((1, ".out"), (2, ".err")):
            os.dup2(
                os.open(said.with_suffix(kind), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
                number,
            )
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.argv = [f"{name}.py", *map(str, words)]
        gc.disable()  # too short to need it
        if not reports:
            report.write_report = lambda path: write_atomic(path / "report.html", "x")
        main, file = PROGRAMS[name], said.with_suffix(".json").open("w")
        if disk:
            disk.install()
        else:
            os.fsync = lambda handle: None
        code = run_main(main)
        json.dump(disk.done if disk else [], file)
        file.close()
        return code

    return child(work)


def fork(
    name: str, words, disk: Disk | None = None, reports: bool = False
) -> tuple[Ended, list[str]]:
    """(how a program ended in a child, the operations on its disk if it came to its end)."""
    with tempfile.TemporaryDirectory() as place:
        said = Path(place) / "said"
        code = ended(start(name, words, said, disk, reports))
        done = json.loads(said.with_suffix(".json").read_text() or "[]") if code >= 0 else []
        return Ended(code, *(said.with_suffix(kind).read_text() for kind in (".out", ".err"))), done


def deaths(words, place: Path, moments: Iterable[int]) -> Iterator[tuple[int, Path]]:
    """train.py on the root `place`/runs.

    Each of the `moments` (of a Walk), with a copy of `place` as a kill -9 leaves it there.
    """
    left, said = (place.with_name(f"{place.name}-{what}") for what in ("left", "said"))
    pid = start("train", [*words, f"--run.root={place / 'runs'}"], said, Walk(moments))
    try:
        for moment in sorted(moments):
            stopped = os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
            assert stopped, f"moment {moment} never came: {said.with_suffix('.err').read_text()}"
            subprocess.run(["cp", "-a", place, left], check=True)  # what is linked stays linked
            yield moment, left
            shutil.rmtree(left)
            os.kill(pid, signal.SIGCONT)
        assert ended(pid) == 0, said.with_suffix(".err").read_text()
    except BaseException:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            ended(pid)
        raise


def spread(check: Callable[[object], None], points: Iterable) -> list[str]:
    """Check every point, in WORKERS children side by side; what failed, with the point."""
    points, failed = [*points], []
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / str(i) for i in range(WORKERS)]

        def share(i: int) -> None:
            for point in points[i::WORKERS]:
                try:
                    check(point)
                except BaseException:
                    with files[i].open("a") as stream:
                        print(json.dumps(f"{point}: {traceback.format_exc(limit=-3)}"), file=stream)

        codes = [ended(pid) for pid in [child(lambda i=i: share(i)) for i in range(WORKERS)]]
        for file in files:
            failed += (
                [json.loads(line) for line in file.read_text().splitlines()]
                if file.exists()
                else []
            )
    assert not any(codes), codes
    return failed


# ---- comparing --------------------------------------------------------------------------------


def folders(run: Path) -> set[str]:
    """The folders of a run."""
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_dir()}


def stages(run: Path) -> dict[str, tuple[int, int]]:
    """{path: (inode, time of last change)} of the files of all finished stages."""
    files = [file for note in run.glob("[!.]*/*/stage.json") for file in note.parent.iterdir()]
    return {
        str(file.relative_to(run)): (file.lstat().st_ino, file.lstat().st_mtime_ns)
        for file in files
    }


ORIGIN = ("linked_from",)  # which of several equal stages a stage was taken from


class Good:
    """An undisturbed run, and what another must have in common with it."""

    def __init__(self, run: Path):
        self.contents, self.folders = contents(run, ORIGIN), folders(run)

    def check(self, run: Path, before: dict) -> None:
        """The run is bit-identical but for times, has nothing besides, and every stage that was
        finished `before` is untouched.
        """
        now = contents(run, ORIGIN)
        assert [
            n for n in now.keys() | self.contents.keys() if now.get(n, 0) != self.contents.get(n, 0)
        ] == []
        assert (
            folders(run) == self.folders
            and IN_PROGRESS_DIR not in self.folders
            and {*FREE} <= now.keys()
        )
        kept = stages(run)
        assert [name for name in before if before[name] != kept.get(name)] == []


def tree(place: Path) -> dict[str, bytes | None]:
    """{path: content, None of a folder} of everything below `place`."""
    return {
        str(path.relative_to(place)): path.read_bytes() if path.is_file() else None
        for path in sorted(place.rglob("*"))
    }


def check_sentence(ended: Ended, *wanted: str) -> None:
    """The program ended with one sentence, which says what is `wanted`."""
    assert ended.code == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, (
        ended.code,
        ended.err,
    )
    assert all(word in ended.err for word in wanted), ended.err


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
