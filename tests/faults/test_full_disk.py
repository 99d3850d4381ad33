"""A disk that fills up.

One sentence, an exit code, nothing half-written; with room again, the same words end with the same
bits.
"""

import contextlib
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from forks import Good, check_sentence, fork, spread, stages
from runs import Ended, spawn
from shim import Disk

pytestmark = pytest.mark.faults
FULL = "No space left on device"


def test_no_room_from_a_write_of_a_run_on(small, scratch, seed, capsys):
    """From a quarter of them on, drawn anew each time.

    Half of the first write that has no room gets through; new files and folders have none, either.
    """
    words, whole = small
    good, begun = Good(whole), time.monotonic()
    _, done = fork("train", [*words, f"--run.root={scratch / 'counted'}"], Disk())
    points = [i for i, name in enumerate(done) if name in ("write", "mkdir", "link")][seed % 4 :: 4]

    def check(point: int) -> None:
        root = scratch / str(point)
        full, _ = fork("train", [*words, f"--run.root={root}"], Disk("full", point))
        check_sentence(full, f"error: {root}", FULL)
        assert not [*root.rglob("*.tmp")]
        there = stages(root / "small")
        again, _ = fork("train", [*words, f"--run.root={root}"])
        assert again.code == 0, again.err
        good.check(root / "small", there)
        shutil.rmtree(root)

    failed = spread(check, points)
    seconds = time.monotonic() - begun
    with capsys.disabled():
        print(f"\nno room at {len(points)} of {len(done)} operations, {seconds:.0f} s")
    assert not failed, f"{len(failed)} of {len(points)}: " + "\n".join(failed[:3])


@pytest.fixture
def island(scratch):
    """A disk of its own of 40 MB; skips where none may be mounted."""
    place = scratch / "island"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(place)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> Path:
    """A file that takes all room that is left on its disk."""
    with (place / "filler").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(bytes(1 << 12)):
            pass
    return place / "filler"


def test_a_small_disk_that_others_fill_up(small, island, seed):
    """Real processes on a real disk.

    Filled beforehand, at random moments, and with what they print on it as well.
    """
    words, whole = small
    good, rng, full = Good(whole), random.Random(seed), 0
    filler = fill(island)
    check_sentence(
        fork("train", [*words, f"--run.root={island}"])[0], f"error: {island}", "MB free"
    )
    for attempt in range(4):
        filler.unlink()
        there, printed = (island / "out.txt").open("w"), attempt % 2
        process = spawn(
            "train",
            *words,
            f"--run.root={island}",
            **({"stdout": there, "stderr": there} if printed else {}),
        )
        while not (island / "small/env.json").exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.4)
        filler = fill(island)
        _, err = process.communicate(timeout=120)
        full += process.returncode != 0
        if process.returncode and not printed:
            check_sentence(Ended(process.returncode, "", err), f"error: {island}", FULL)
        before = stages(island / "small")
        filler.unlink()
        again, _ = fork("train", [*words, f"--run.root={island}"])
        assert again.code == 0, again.err
        good.check(island / "small", before)
        shutil.rmtree(island / "small")
        filler = fill(island)
    assert full >= 2, "the disk was never full in time"
