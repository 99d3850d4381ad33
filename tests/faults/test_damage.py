"""Files of a run that were cut, flipped, deleted, or replaced by a folder or a link.

Mended to the same bits, or one sentence.
"""

import os
import random
import shutil
from pathlib import Path

import pytest
from forks import Good, check_sentence, deaths, fork, spread, stages, tree
from runs import stages_of
from shim import Disk

from minmacpo.pipeline.run_dir import IN_PROGRESS_DIR

pytestmark = pytest.mark.faults
REMADE = ("env.json", "report.html", "eval/table.json", "metrics.jsonl")  # from what is finished
GIVEN = ("log.txt", "config.toml")  # what stands there is in no other place


def flip(file: Path, rng: random.Random) -> None:
    """One bit of a file."""
    text, bit = bytearray(file.read_bytes()), rng.randrange(8 * file.stat().st_size)
    text[bit // 8] ^= 1 << bit % 8
    file.write_bytes(text)


def replaced(file: Path, put) -> None:
    """The file gives way to what `put` makes of its path."""
    file.unlink()
    put(file)


DAMAGES = {
    "cut": lambda file, rng: os.truncate(file, rng.choice([0, rng.randrange(file.stat().st_size)])),
    "flipped": flip,
    "deleted": lambda file, rng: file.unlink(),
    "a folder": lambda file, rng: replaced(file, Path.mkdir),
    "a dangling link": lambda file, rng: replaced(file, lambda path: path.symlink_to("nowhere")),
    "a link out": lambda file, rng: (
        shutil.copy(file, outside(file)),
        replaced(file, lambda path: path.symlink_to(outside(file))),
    ),
}


def outside(file: Path) -> Path:
    """A file beside the root of runs."""
    return next(path for path in file.parents if path.name == "runs").parent / "outside"


def kinds(run: Path, rng: random.Random) -> list[str]:
    """One file of each kind.

    By its name and the kind of its stage, or by its name beside the stages.
    """
    found: dict[tuple, list[str]] = {}
    for name, notes in stages_of(run).items():
        for file in [*notes["files"], "stage.json"]:
            found.setdefault((notes["kind"], file), []).append(f"{name}/{file}")
    return [rng.choice(files) for files in found.values()] + [*REMADE, *GIVEN]


def test_every_kind_of_file_damaged_in_every_way(small, scratch, seed, capsys):
    """Then what the sentence asks for is done, and the run is made whole.

    A run beside it does not mind.
    """
    words, whole = small
    good = Good(whole)
    points = [(file, damage) for file in kinds(whole, random.Random(seed)) for damage in DAMAGES]

    def check(point: tuple[str, str]) -> None:
        (file, damage), rng = point, random.Random(f"{seed}/{point}")
        home = scratch / f"{file.replace('/', '-')}-{damage}"
        root, run, asked = (
            home / "runs",
            home / "runs/small",
            [*words, f"--run.root={home / 'runs'}"],
        )
        shutil.copytree(whole, run)
        DAMAGES[damage](run / file, rng)
        there, before = stages(run), tree(home)
        if file not in GIVEN and rng.random() < 0.25:  # to save time
            beside, _ = fork("train", [*asked, "--run.name=beside"])
            assert beside.code == 0, beside.err
            good.check(root / "beside", {})
            shutil.rmtree(root / "beside")
        seen, _ = fork("eval", [str(run)])
        assert seen.code == 0 or check_sentence(seen, "error: ") is None
        ended, _ = fork("train", asked)
        if ended.code:
            check_sentence(ended, str(run))
            now = tree(home)
            assert [
                path for path in before if path.count("/") == 4 and before[path] != now.get(path)
            ] == [], "no stage is touched"
            mend(run, file, whole)
            ended, _ = fork("train", asked)
        assert ended.code == 0, ended.err
        good.check(
            run,
            {
                name: about
                for name, about in there.items()
                if Path(name).parent != Path(file).parent
            },
        )
        shutil.rmtree(home)

    failed = spread(check, points)
    with capsys.disabled():
        print(f"\n{len(points)} damages to {len(points) // len(DAMAGES)} kinds of files")
    assert not failed, f"{len(failed)} of {len(points)}: " + "\n".join(failed[:3])


def mend(run: Path, file: str, whole: Path) -> None:
    """What the sentences ask for.

    The damaged stage, or the file beside the stages, goes; settings are put back.
    """
    place = run / file if file in REMADE + GIVEN else (run / file).parent
    shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink(
        missing_ok=True
    )
    if file == "config.toml":
        shutil.copy(whole / file, place)


def test_every_kind_of_unfinished_file_damaged_in_every_way(small, scratch, seed, capsys):
    """Shards of samples and states of training have no stage.json yet that tells of damage."""
    words, whole = small
    good, rng = Good(whole), random.Random(seed)
    _, done = fork("train", [*words, f"--run.root={scratch / 'counted'}"], Disk())
    found: dict[str, Path] = {}
    (scratch / "walk").mkdir()
    moments = rng.sample(range(0, 2 * len(done), 2), 60)
    for at, left in deaths(words, scratch / "walk", moments):
        source = (
            shutil.copytree(left / "runs", scratch / f"cut{at}", symlinks=True)
            if (left / "runs").exists()
            else left
        )
        for file in (source / "small" / IN_PROGRESS_DIR).rglob("*.*"):
            found.update({file.name.split("-")[0]: file} if file.stat().st_size else {})
    points = [(name, damage) for name in found for damage in DAMAGES]

    def check(point: tuple[str, str]) -> None:
        name, damage = point
        source = next(path for path in found[name].parents if path.name.startswith("cut"))
        home = scratch / f"{name}-{damage}"
        root, asked = home / "runs", [*words, f"--run.root={home / 'runs'}"]
        shutil.copytree(source, root)
        damaged = root / found[name].relative_to(source)
        DAMAGES[damage](damaged, random.Random(f"{seed}/{point}"))
        there = stages(root / "small")
        ended, _ = fork("train", asked)
        if ended.code:
            check_sentence(ended, str(damaged))
            shutil.rmtree(
                damaged
            ) if damaged.is_dir() and not damaged.is_symlink() else damaged.unlink()
            ended, _ = fork("train", asked)
        assert ended.code == 0, ended.err
        good.check(root / "small", there)

    failed = spread(check, points)
    with capsys.disabled():
        print(f"\n{len(points)} damages to unfinished files: {', '.join(sorted(found))}")
    assert not failed, f"{len(failed)} of {len(points)}: " + "\n".join(failed[:3])
    assert {"state.safetensors", "block0"} <= found.keys()
