"""Every reader on changed files: one sentence (UserError) or a value, and never anything else.

Hypothesis draws the inputs, and makes those that fail small; the few of the default suite are drawn without it, the same each time.
"""

import ctypes
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from random import Random

import children
import mutations as m
import pytest
from children import FORK, Reading
from readers import Reader, readers

from minmacpo import UserError


def fuzz(reader: Reader, home: Path, seed: int, count: int) -> tuple[int, int]:
    """(inputs refused, read) of `count` that Hypothesis draws; the first that fails is made smaller, kept and raised."""
    from hypothesis import HealthCheck, Phase, given, settings, strategies
    from hypothesis import seed as start
    from hypothesis.configuration import set_hypothesis_home_dir

    set_hypothesis_home_dir(home.parent)
    with closing(Reading(reader, home)) as reading:

        @start(f"{seed}/{reader.name}")
        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=[*HealthCheck],
            report_multiple_bugs=False,
        )
        @given(strategies.randoms(use_true_random=False))
        def take(rng: Random) -> None:
            reading.take(rng)

        take()
    return reading.refused, reading.read


def test_readers_bear_a_few_changed_files(stub, tmp_path):
    """The same few each time: what new ones find is for the test below."""
    refused = read = 0
    for i, reader in enumerate(readers(stub)):
        with closing(Reading(reader, tmp_path / str(i))) as reading:
            for number in range(12):
                reading.take(Random(f"{reader.name}/{number}"))
        refused, read = refused + reading.refused, read + reading.read
    assert refused > 50 and read > 20


@pytest.mark.fuzz
def test_readers_bear_changed_files(stub, tmp_path, seed, capsys):
    """A hundred thousand inputs and more; how many is printed."""
    pytest.importorskip("hypothesis")
    total, found, started = 0, [], time.monotonic()
    todo = readers(stub)[::-1]  # the long ones first
    with ProcessPoolExecutor(os.cpu_count(), FORK) as pool:
        jobs = [
            pool.submit(fuzz, reader, tmp_path / str(i), seed, round(1300 * reader.share))
            for i, reader in enumerate(todo)
        ]
        for reader, job in zip(todo, jobs, strict=True):
            if error := job.exception():
                found.append(f"{reader.name}: {type(error).__name__}: {error}")
                continue
            refused, read = job.result()
            total += refused + read
            with capsys.disabled():
                print(f"\n{reader.name}: {refused} inputs refused, {read} read", end="", flush=True)
            assert refused and read, reader.name
    with capsys.disabled():
        print(f"\n{total} inputs, --seed={seed}, {time.monotonic() - started:.0f} s")
    assert not found, "\n\n".join(found)
    assert total >= 100_000


def write() -> None:
    with suppress(Exception):
        Path("../beside").write_text("x")


def talk() -> None:
    raise UserError("no")


PLANTED = {
    "ended with SIGSEGV": lambda: ctypes.string_at(0),
    "ended with SIGPROF": lambda: sum(iter(int, 1)),
    "MemoryError": lambda: bytearray(10**10),
    "KeyError: 'prompt'": lambda: {}["prompt"],
    "open outside the folder": write,
    "os.system": lambda: os.system("true"),
    "sentence: 'no'": talk,
}
GOOD = '{"prompt": "who is it ?", "chosen": ["a fox", 7]}'


@pytest.mark.parametrize("told", PLANTED)
def test_a_defect_is_found_and_made_small(tmp_path, monkeypatch, told):
    """A reader that fails on a row that is no object: of all the changes that find it, a short row is left, beside three good ones."""
    pytest.importorskip("hypothesis")
    monkeypatch.setattr(children, "SECONDS", 0.1)

    def make(folder: Path) -> None:
        (folder / "x.jsonl").write_text(f"{GOOD}\n" * 4)

    def read(folder: Path, name: str) -> None:
        for row in (folder / "x.jsonl").read_bytes().splitlines():
            try:
                value = json.loads(row)
            except (ValueError, RecursionError):
                raise UserError("a line that is no JSON") from None
            if not isinstance(value, dict):
                PLANTED[told]()

    reader = Reader("planted", 1, make, {"x.jsonl": (m.lined, m.raw)}, read)
    with pytest.raises(AssertionError, match=told):
        fuzz(reader, tmp_path / "home", 0, 1000)
    rows = (tmp_path / "home/finding").read_text().splitlines()
    assert len(rows) == 4 and sorted(map(len, rows))[0] < 5 and rows.count(GOOD) == 3
