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
from forks import Good, check_none_failed, check_sentence, fork, spread, stages
from runs import Ended, spawn
from shim import Disk

pytestmark = pytest.mark.faults
FULL = "No space left on device"


def test_no_room_from_a_write_of_a_run_on(small, scratch, seed, capsys):
    """From a quarter of them on, drawn anew each time.

    Half of the first write that has no room gets through; new files and folders have none, either.
    """
    words, whole = small
    good = Good(whole)
    begun = time.monotonic()
    _, operations = fork("train", [*words, f"--run.root={scratch / 'counted'}"], Disk())
    growing = []
    for number, name in enumerate(operations):
        if name in ("write", "mkdir", "link"):
            growing.append(number)
    points = growing[seed % 4 :: 4]

    def check(point: int) -> None:
        root = scratch / str(point)
        full, _ = fork("train", [*words, f"--run.root={root}"], Disk("full", point))
        check_sentence(full, f"error: {root}", FULL)
        assert list(root.rglob("*.tmp")) == []
        finished = stages(root / "small")
        again, _ = fork("train", [*words, f"--run.root={root}"])
        assert again.code == 0, again.err
        good.check(root / "small", finished)
        shutil.rmtree(root)

    failures = spread(check, points)
    seconds = time.monotonic() - begun
    with capsys.disabled():
        print(f"\nno room at {len(points)} of {len(operations)} operations, {seconds:.0f} s")
    check_none_failed(failures, points)


@pytest.fixture
def island(scratch):
    """A disk of its own of 40 MB; skips where none may be mounted."""
    place = scratch / "island"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> Path:
    """A file that takes all room that is left on its disk."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(bytes(1 << 12)):
            pass
    return filler


def test_a_small_disk_that_others_fill_up(small, island, seed):
    """Real processes on a real disk.

    Filled beforehand, at random moments, and with what they print on it as well.
    """
    words, whole = small
    good = Good(whole)
    rng = random.Random(seed)
    train_words = [*words, f"--run.root={island}"]
    run = island / "small"

    # Filled beforehand
    filler = fill(island)
    refused, _ = fork("train", train_words)
    check_sentence(refused, f"error: {island}", "MB free")

    # At a random moment; every other time with what the program prints on the same disk
    times_full = 0
    for attempt in range(4):
        filler.unlink()
        prints_there = attempt % 2 == 1
        printed = (island / "out.txt").open("w")
        if prints_there:
            process = spawn("train", *train_words, stdout=printed, stderr=printed)
        else:
            process = spawn("train", *train_words)
        while not (run / "env.json").exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.4)
        filler = fill(island)
        _, err = process.communicate(timeout=120)
        if process.returncode != 0:
            times_full += 1
            if not prints_there:
                check_sentence(Ended(process.returncode, "", err), f"error: {island}", FULL)

        # With room again
        finished = stages(run)
        filler.unlink()
        again, _ = fork("train", train_words)
        assert again.code == 0, again.err
        good.check(run, finished)
        shutil.rmtree(run)
        filler = fill(island)
    assert times_full >= 2, "the disk was never full in time"
