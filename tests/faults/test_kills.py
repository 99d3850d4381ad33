"""kill -9 at every operation on the disk, and at random moments, of every program that writes; then the same words again."""

import random
import shutil
import time
from pathlib import Path

import pytest
from forks import Good, fork, spread, stages
from runs import write_stub
from shim import Disk

pytestmark = pytest.mark.faults

# The stub made smaller: one teacher, one round, a few prompts, one optimiser step a stage, its state saved after it.
SMALL = """--macpo.teachers=1 --macpo.rounds=1 --pretrain.strong_steps=1 --pretrain.weak_steps=1 --pretrain.batch=100 --world.d1=4
--world.d2=6 --world.test=4 --sft.batch=8 --dpo.batch=8 --generate.max_new=4 --generate.batch=4 --eval.bootstrap=2
--run.save_every=1 --run.log_every=1 --run.micro_tokens=100000 --run.threads=1""".split()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[list[str], Path]:
    """(the words of a small run, but for its root, a finished one)."""
    root = tmp_path_factory.mktemp("small")
    words = [write_stub(root), "--run.name=small", *SMALL]
    ended, _ = fork("train", [*words, f"--run.root={root}"])
    assert ended.code == 0, ended.err
    return words, root / "small"


def disturbed(words, good: Good, start: Path | None, root: Path, name: str, disk: Disk) -> None:
    """Check a run `name` that dies on this disk and is begun again; `start`: where the root as it was before is copied from."""
    if start:
        shutil.copytree(start, root)
    ended, _ = fork("train", words, disk)
    assert ended.code == -9
    before = stages(root / name)
    ended, _ = fork("train", words)
    assert ended.code == 0, ended.err
    good.check(root / name, before)
    shutil.rmtree(root)


def points(done: list[str]) -> list[tuple[str, int]]:
    """Every way to be killed by a Disk on which these operations are done."""
    return [("kill", i) for i in range(len(done))] + [("tear", i) for i, name in enumerate(done) if name == "write"]


@pytest.mark.parametrize("case", ["fresh", "again", "linked"])
def test_a_kill_at_every_operation_of_a_run(small, tmp_path, case, capsys):
    """Of a run that begins, of one that was finished already, and of one that takes all its stages from another."""
    words, whole = small
    start, name = None if case == "fresh" else whole.parent, "other" if case == "linked" else "small"
    words = [*words, f"--run.name={name}"]
    if start:
        shutil.copytree(start, tmp_path / "good")
    ended, done = fork("train", [*words, f"--run.root={tmp_path / 'good'}"], Disk())
    assert ended.code == 0, ended.err
    good, every, begun = Good(tmp_path / "good" / name), points(done), time.monotonic()

    def check(point: tuple[str, int]) -> None:
        root = tmp_path / "_".join(map(str, point))
        disturbed([*words, f"--run.root={root}"], good, start, root, name, Disk(*point))

    failed = spread(check, every)
    with capsys.disabled():
        print(f"\n{case}: {len(done)} operations, killed at {len(every)} points, {time.monotonic() - begun:.0f} s")
    assert not failed, f"{len(failed)} of {len(every)}: " + "\n".join(failed[:3])
