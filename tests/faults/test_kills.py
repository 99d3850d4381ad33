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
from forks import WORKERS, Good, check_none_failed, deaths, ended, fork, spread, stages, start
from runs import write_stub
from shim import Disk

pytestmark = pytest.mark.faults


def moments_of(operations: list[str], case: str, seed: int) -> list[int]:
    """The moments (of a Walk) at which a run is killed: one in six of some of them."""
    before = []
    within = []
    for number, operation in enumerate(operations):
        if operation != "fsync":
            before.append(2 * number)
        if operation == "write":
            within.append(2 * number + 1)
    first = seed % 6
    if case == "linked":
        return before[first::6]
    return before + within[first::6]


@pytest.mark.parametrize("case", ["fresh", "again", "linked"])
def test_a_kill_at_every_operation_of_a_run(small, scratch, case, seed, capsys):
    """Of a run that begins, of one that was finished already, and of one that links all stages.

    The first two also die within a sixth of the writes; the one that takes all its stages from
    another run dies at a sixth of its operations. A flush does nothing that a kill could undo: to
    be killed before it is to be killed before what comes next.
    """
    words, whole = small
    name = "other" if case == "linked" else "small"
    words = [*words, f"--run.name={name}"]
    good_place = scratch / "good"
    places = [scratch / str(worker) for worker in range(WORKERS)]
    for place in [good_place, *places]:
        place.mkdir()
        if case != "fresh":
            shutil.copytree(whole.parent, place / "runs")

    # Undisturbed, with its operations counted
    first, operations = fork("train", [*words, f"--run.root={good_place / 'runs'}"], Disk())
    assert first.code == 0, first.err
    good = Good(good_place / "runs" / name)
    moments = moments_of(operations, case, seed)
    begun = time.monotonic()

    # Killed, then gone on with
    def check(worker: int) -> None:
        for moment, left in deaths(words, places[worker], moments[worker::WORKERS]):
            try:
                finished = stages(left / "runs" / name)
                again, _ = fork("train", [*words, f"--run.root={left / 'runs'}"])
                assert again.code == 0, again.err
                good.check(left / "runs" / name, finished)
            except BaseException as error:
                error.add_note(f"killed at moment {moment}, {operations[moment // 2]}")
                raise

    failures = spread(check, range(WORKERS))
    seconds = time.monotonic() - begun
    with capsys.disabled():
        counted = f"{len(operations)} operations with flushes, {len(moments)} kills"
        print(f"\n{case}: {counted}, {seconds:.0f} s")
    check_none_failed(failures, range(WORKERS))


# ---- random moments -----------------------------------------------------------------------------

METHODS = ["macpo", "spin", "self-rewarding", "rlaif", "rlcd"]


def is_killed(words, output: Path, seconds: float) -> bool:
    """Whether train.py was killed so many seconds after its beginning; False: it had ended."""
    pid = start("train", words, output, reports=True)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    code = ended(pid)
    assert code in (0, -signal.SIGKILL), output.with_suffix(".err").read_text()
    return code != 0


def test_kills_at_random_moments_of_all_methods(scratch, seed, capsys):
    """Several kills one after the other, the later ones in runs that were killed before.

    Two teachers, two rounds, reports.
    """
    words = [
        write_stub(scratch),
        "--run.name=x",
        "--generate.max_new_tokens=4",
        "--eval.bootstrap=2",
        "--pretrain.batch=4",
    ]

    # Undisturbed
    good = {}
    durations = {}
    for method in METHODS:
        begun = time.monotonic()
        method_words = [*words, f"--method={method}", f"--run.root={scratch / method}"]
        whole, _ = fork("train", method_words, reports=True)
        assert whole.code == 0, whole.err
        good[method] = Good(scratch / method / "x")
        durations[method] = time.monotonic() - begun

    # Killed four times, then gone on with
    def check(point: int) -> None:
        rng = random.Random(f"{seed}/{point}")
        root = scratch / str(point)
        method = METHODS[point % len(METHODS)]
        method_words = [*words, f"--method={method}", f"--run.root={root}"]
        finished = {}
        for _ in range(4):
            seconds = rng.random() * durations[method] / 2
            if is_killed(method_words, scratch / f"said{point}", seconds):
                with (scratch / f"killed{point}").open("a") as counter:
                    counter.write("x")
            now = stages(root / "x")
            assert finished.items() <= now.items()
            finished = now
        again, _ = fork("train", method_words, reports=True)
        assert again.code == 0, again.err
        good[method].check(root / "x", finished)
        shutil.rmtree(root)

    points = range(5 * len(METHODS))
    failures = spread(check, points)
    kills = sum(counter.stat().st_size for counter in scratch.glob("killed*"))
    with capsys.disabled():
        print(f"\n{kills} kills at random moments of {len(METHODS)} methods")
    check_none_failed(failures, points)
    assert kills >= 80
