"""kill -9 at every operation on the disk, and at random moments, of every program that writes; then the same words again."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from forks import Good, ended, fork, spread, stages, start
from runs import write_stub
from shim import Disk

pytestmark = pytest.mark.faults


def disturbed(words, good: Good, before: Path | None, root: Path, name: str, disk: Disk) -> None:
    """Check a run `name` that dies on this disk and is begun again; `before`: where the root as it was then is copied from."""
    if before:
        shutil.copytree(before, root)
    assert fork("train", words, disk)[0].code == -signal.SIGKILL
    there = stages(root / name)
    again, _ = fork("train", words)
    assert again.code == 0, again.err
    good.check(root / name, there)
    shutil.rmtree(root)


def points(done: list[str]) -> list[tuple]:
    """Every way to be killed by a Disk on which these operations are done: before each, and within each write. A flush does
    nothing that a kill could undo: to be killed before it is to be killed before what comes next."""
    before = [(signal.SIGKILL, i) for i, name in enumerate(done) if name != "fsync"]
    return before + [("tear", i) for i, name in enumerate(done) if name == "write"]


@pytest.mark.parametrize("case", ["fresh", "again", "linked"])
def test_a_kill_at_every_operation_of_a_run(small, tmp_path, case, seed, capsys):
    """Of a run that begins, of one that was finished already, and (a sixth of them) of one that takes all its stages from
    another run."""
    words, whole = small
    before, name = None if case == "fresh" else whole.parent, "other" if case == "linked" else "small"
    words = [*words, f"--run.name={name}"]
    if before:
        shutil.copytree(before, tmp_path / "good")
    first, done = fork("train", [*words, f"--run.root={tmp_path / 'good'}"], Disk())
    assert first.code == 0, first.err
    good, every, begun = Good(tmp_path / "good" / name), points(done), time.monotonic()
    picked = every[seed % 6 :: 6] if case == "linked" else every

    def check(point: tuple) -> None:
        root = tmp_path / "_".join(map(str, point))
        disturbed([*words, f"--run.root={root}"], good, before, root, name, Disk(*point))

    failed = spread(check, picked)
    with capsys.disabled():
        print(f"\n{case}: {len(done)} operations, killed at {len(picked)} of {len(every)} points, {time.monotonic() - begun:.0f} s")
    assert not failed, f"{len(failed)} of {len(picked)}: " + "\n".join(failed[:3])


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


def test_kills_at_random_moments_of_all_methods(tmp_path, seed, capsys):
    """Several kills one after the other, the later ones in runs that were killed before; two teachers, two rounds, reports."""
    words, good, lasted = [write_stub(tmp_path), "--run.name=x"], {}, {}
    for method in METHODS:
        begun = time.monotonic()
        whole, _ = fork("train", [*words, f"--method={method}", f"--run.root={tmp_path / method}"], reports=True)
        assert whole.code == 0, whole.err
        good[method], lasted[method] = Good(tmp_path / method / "x"), time.monotonic() - begun

    def check(point: int) -> None:
        rng, root, method = random.Random(f"{seed}/{point}"), tmp_path / str(point), METHODS[point % len(METHODS)]
        asked, there = [*words, f"--method={method}", f"--run.root={root}"], {}
        for _ in range(4):
            if killed("train", asked, tmp_path / f"said{point}", rng.random() * lasted[method] / 2):
                (tmp_path / f"killed{point}").open("a").write("x")
            now = stages(root / "x")
            assert there.items() <= now.items()
            there = now
        again, _ = fork("train", asked, reports=True)
        assert again.code == 0, again.err
        good[method].check(root / "x", there)
        shutil.rmtree(root)

    failed = spread(check, range(6 * len(METHODS)))
    kills = sum(file.stat().st_size for file in tmp_path.glob("killed*"))
    with capsys.disabled():
        print(f"\n{kills} kills at random moments of {len(METHODS)} methods")
    assert not failed, "\n".join(failed[:3])
    assert kills >= 80
