"""Files of a run that were cut, flipped, deleted, or replaced by a folder or a link.

Mended to the same bits, or one sentence.
"""

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from forks import Good, check_none_failed, check_sentence, deaths, fork, spread, stages, tree
from runs import stages_of
from shim import Disk

from minmacpo.pipeline.run_dir import IN_PROGRESS_DIR

pytestmark = pytest.mark.faults
REMADE = ("env.json", "report.html", "eval/table.json", "metrics.jsonl")  # from what is finished
GIVEN = ("log.txt", "config.toml")  # what stands there is in no other place


# ---- kinds of damage ----------------------------------------------------------------------------


def cut(file: Path, rng: random.Random) -> None:
    size = rng.randrange(file.stat().st_size)
    os.truncate(file, rng.choice([0, size]))


def flip(file: Path, rng: random.Random) -> None:
    """One bit of a file."""
    content = bytearray(file.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def delete(file: Path, rng: random.Random) -> None:
    file.unlink()


def make_folder(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


def make_dangling_link(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def move_outside(file: Path, rng: random.Random) -> None:
    """The file lies beside the root of runs, where a link leads."""
    root = next(folder for folder in file.parents if folder.name == "runs")
    outside = root.parent / "outside"
    shutil.move(file, outside)
    file.symlink_to(outside)


DAMAGES = {
    "cut": cut,
    "flipped": flip,
    "deleted": delete,
    "a folder": make_folder,
    "a dangling link": make_dangling_link,
    "a link out": move_outside,
}


def remove(path: Path) -> None:
    """A file, link or folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- finished stages and what lies beside them --------------------------------------------------


def files_of_each_kind(run: Path, rng: random.Random) -> list[str]:
    """One file of each kind.

    By its name and the kind of its stage, or by its name beside the stages.
    """
    files_by_kind: dict[tuple, list[str]] = {}
    for stage, notes in stages_of(run).items():
        for file in [*notes["files"], "stage.json"]:
            kind = (notes["kind"], file)
            files_by_kind.setdefault(kind, []).append(f"{stage}/{file}")
    drawn = [rng.choice(files) for files in files_by_kind.values()]
    return [*drawn, *REMADE, *GIVEN]


def check_stages_untouched(before: dict, home: Path) -> None:
    """Every file within a stage is as it was `before`, by its path below the home of the runs."""
    now = tree(home)
    for path, content in before.items():
        if path.count("/") == 4:
            assert now.get(path) == content, f"{path} was touched"


def mend(run: Path, file: str, whole: Path) -> None:
    """What the sentences ask for.

    The damaged stage, or the file beside the stages, goes; settings are put back.
    """
    if file in REMADE or file in GIVEN:
        remove(run / file)
    else:
        remove((run / file).parent)
    if file == "config.toml":
        shutil.copy(whole / file, run / file)


def test_every_kind_of_file_damaged_in_every_way(small, scratch, seed, capsys):
    """Then what the sentence asks for is done, and the run is made whole.

    A run beside it does not mind.
    """
    words, whole = small
    good = Good(whole)
    points = []
    for file in files_of_each_kind(whole, random.Random(seed)):
        for damage in DAMAGES:
            points.append((file, damage))

    def check(point: tuple[str, str]) -> None:
        file, damage = point
        rng = random.Random(f"{seed}/{point}")
        home = scratch / f"{file.replace('/', '-')}-{damage}"
        root = home / "runs"
        run = root / "small"
        train_words = [*words, f"--run.root={root}"]
        shutil.copytree(whole, run)
        DAMAGES[damage](run / file, rng)
        finished = stages(run)
        before = tree(home)

        # Another run, which would take the damaged stage
        if file not in GIVEN and rng.random() < 0.25:  # to save time
            beside, _ = fork("train", [*train_words, "--run.name=beside"])
            assert beside.code == 0, beside.err
            good.check(root / "beside", {})
            shutil.rmtree(root / "beside")

        # A program that only reads
        read, _ = fork("eval", [str(run)])
        if read.code != 0:
            check_sentence(read, "error: ")

        # The run itself
        ended, _ = fork("train", train_words)
        if ended.code != 0:
            check_sentence(ended, str(run))
            check_stages_untouched(before, home)
            mend(run, file, whole)
            ended, _ = fork("train", train_words)
        assert ended.code == 0, ended.err
        undamaged = {}
        for path, identity in finished.items():
            if Path(path).parent != Path(file).parent:
                undamaged[path] = identity
        good.check(run, undamaged)
        shutil.rmtree(home)

    failures = spread(check, points)
    with capsys.disabled():
        print(f"\n{len(points)} damages to {len(points) // len(DAMAGES)} kinds of files")
    check_none_failed(failures, points)


# ---- unfinished stages --------------------------------------------------------------------------


@dataclass(frozen=True)
class Unfinished:
    """A file that a kill left within an unfinished stage, and the root of the run that has it."""

    root: Path
    file: Path


def killed_roots(words: list[str], scratch: Path, rng: random.Random) -> Iterator[Path]:
    """Copies of the root of a run that was killed before 60 operations drawn at random."""
    _, operations = fork("train", [*words, f"--run.root={scratch / 'counted'}"], Disk())
    walk = scratch / "walk"
    walk.mkdir()
    moments = rng.sample(range(0, 2 * len(operations), 2), 60)
    for moment, left in deaths(words, walk, moments):
        if (left / "runs").exists():
            yield shutil.copytree(left / "runs", scratch / f"cut{moment}", symlinks=True)


def test_every_kind_of_unfinished_file_damaged_in_every_way(small, scratch, seed, capsys):
    """Shards of samples and states of training have no stage.json yet that tells of damage."""
    words, whole = small
    good = Good(whole)
    unfinished: dict[str, Unfinished] = {}  # by the first word of their name
    for root in killed_roots(words, scratch, random.Random(seed)):
        for file in (root / "small" / IN_PROGRESS_DIR).rglob("*.*"):
            if file.stat().st_size:
                kind = file.name.split("-")[0]
                unfinished[kind] = Unfinished(root, file)
    points = []
    for kind in unfinished:
        for damage in DAMAGES:
            points.append((kind, damage))

    def check(point: tuple[str, str]) -> None:
        kind, damage = point
        source = unfinished[kind].root
        root = scratch / f"{kind}-{damage}/runs"
        train_words = [*words, f"--run.root={root}"]
        shutil.copytree(source, root)
        damaged = root / unfinished[kind].file.relative_to(source)
        DAMAGES[damage](damaged, random.Random(f"{seed}/{point}"))
        finished = stages(root / "small")
        ended, _ = fork("train", train_words)
        if ended.code != 0:
            check_sentence(ended, str(damaged))
            remove(damaged)
            ended, _ = fork("train", train_words)
        assert ended.code == 0, ended.err
        good.check(root / "small", finished)

    failures = spread(check, points)
    with capsys.disabled():
        print(f"\n{len(points)} damages to unfinished files: {', '.join(sorted(unfinished))}")
    check_none_failed(failures, points)
    assert unfinished.keys() >= {"state.safetensors", "block0"}
