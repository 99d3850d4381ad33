"""kill -9 at every operation on the disk, and at random moments, of every program that writes.

Then the same words again.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from forks import WORKERS, Good, deaths, ended, fork, spread, stages, start
from runs import write_stub
from shim import Disk

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("case", ["fresh", "again", "linked"])
def test_a_kill_at_every_operation_of_a_run(small, scratch, case, seed, capsys):
    """Of a run that begins and of one that was finished already, there also within a sixth of the
    writes; and of one that takes all its stages from another run, at a sixth of them. A flush does
    nothing that a kill could undo: to be killed before it is to be killed before what comes next.
    """
    words, whole = small
    name = "other" if case == "linked" else "small"
    words, places = [*words, f"--run.name={name}"], [scratch / str(i) for i in range(WORKERS)]
    for place in [scratch / "good", *places]:
        place.mkdir()
        if case != "fresh":
            shutil.copytree(whole.parent, place / "runs")
    first, done = fork("train", [*words, f"--run.root={scratch / 'good/runs'}"], Disk())
    assert first.code == 0, first.err
    good, begun = Good(scratch / "good/runs" / name), time.monotonic()
    operations = [2 * i for i, what in enumerate(done) if what != "fsync"]
    within = [2 * i + 1 for i, what in enumerate(done) if what == "write"]
    moments = operations[seed % 6 :: 6] if case == "linked" else operations + within[seed % 6 :: 6]

    def check(worker: int) -> None:
        for moment, left in deaths(words, places[worker], moments[worker::WORKERS]):
            try:
                there = stages(left / "runs" / name)
                again, _ = fork("train", [*words, f"--run.root={left / 'runs'}"])
                assert again.code == 0, again.err
                good.check(left / "runs" / name, there)
            except BaseException as error:
                error.add_note(f"killed at moment {moment}, {done[moment // 2]}")
                raise

    failed = spread(check, range(WORKERS))
    operations = f"{len(done)} operations with flushes"
    seconds = time.monotonic() - begun
    with capsys.disabled():
        print(f"\n{case}: {operations}, {len(moments)} kills, {seconds:.0f} s")
    assert not failed, "\n".join(failed)


# ---- random moments -----------------------------------------------------------------------------

METHODS = ["macpo", "spin", "self-rewarding", "rlaif", "rlcd"]


def killed(name: str, words, said: Path, seconds: float) -> bool:
    """Whether a program was killed so many seconds after its beginning; False: it had ended."""
    pid = start(name, words, said, reports=True)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    code = ended(pid)
    assert code in (0, -signal.SIGKILL), said.with_suffix(".err").read_text()
    return code != 0


def test_kills_at_random_moments_of_all_methods(scratch, seed, capsys):
    """Several kills one after the other, the later ones in runs that were killed before.

    Two teachers, two rounds, reports.
    """
    words, good, lasted = (
        [
            write_stub(scratch),
            "--run.name=x",
            "--generate.max_new_tokens=4",
            "--eval.bootstrap=2",
            "--pretrain.batch=4",
        ],
        {},
        {},
    )
    for method in METHODS:
        begun = time.monotonic()
        whole, _ = fork(
            "train", [*words, f"--method={method}", f"--run.root={scratch / method}"], reports=True
        )
        assert whole.code == 0, whole.err
        good[method], lasted[method] = Good(scratch / method / "x"), time.monotonic() - begun

    def check(point: int) -> None:
        rng, root, method = (
            random.Random(f"{seed}/{point}"),
            scratch / str(point),
            METHODS[point % len(METHODS)],
        )
        asked, there = [*words, f"--method={method}", f"--run.root={root}"], {}
        for _ in range(4):
            if killed("train", asked, scratch / f"said{point}", rng.random() * lasted[method] / 2):
                (scratch / f"killed{point}").open("a").write("x")
            now = stages(root / "x")
            assert there.items() <= now.items()
            there = now
        again, _ = fork("train", asked, reports=True)
        assert again.code == 0, again.err
        good[method].check(root / "x", there)
        shutil.rmtree(root)

    failed = spread(check, range(5 * len(METHODS)))
    kills = sum(file.stat().st_size for file in scratch.glob("killed*"))
    with capsys.disabled():
        print(f"\n{kills} kills at random moments of {len(METHODS)} methods")
    assert not failed, "\n".join(failed[:3])
    assert kills >= 80
