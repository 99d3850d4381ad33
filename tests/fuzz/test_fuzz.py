"""Every reader on changed files: one sentence (UserError) or a value, and never anything else.

Hypothesis draws the inputs, and makes those that fail small. The few of the default suite are drawn
without it, the same each time.
"""

import ctypes
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from random import Random

import mutations
import pytest
from children import CPU_SECONDS, FORK, Reading
from readers import Reader, readers

from minmacpo import UserError


def fuzz(
    reader: Reader, home: Path, seed: int, count: int, cpu_seconds: float = CPU_SECONDS
) -> tuple[int, int]:
    """(inputs refused, read) of so many that Hypothesis draws.

    The first that fails is made smaller, kept and raised.
    """
    import hypothesis
    from hypothesis import HealthCheck, Phase, given, strategies
    from hypothesis.configuration import set_hypothesis_home_dir

    set_hypothesis_home_dir(home.parent)
    settings = hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    with closing(Reading(reader, home, cpu_seconds)) as reading:

        @hypothesis.seed(f"{seed}/{reader.name}")
        @settings
        @given(strategies.randoms(use_true_random=False))
        def read_one(rng: Random) -> None:
            reading.read_changed(rng)

        read_one()
    return reading.refused, reading.read


def test_readers_bear_a_few_changed_files(stub, tmp_path):
    """The same few each time: what new ones find is for the test below."""
    refused = 0
    read = 0
    for index, reader in enumerate(readers(stub)):
        with closing(Reading(reader, tmp_path / str(index))) as reading:
            for number in range(6):
                reading.read_changed(Random(f"{reader.name}/{number}"))
        refused += reading.refused
        read += reading.read
    assert refused > 25
    assert read > 10


@pytest.mark.fuzz
def test_readers_bear_changed_files(stub, tmp_path, seed, capsys):
    """A hundred thousand inputs and more; how many is printed."""
    pytest.importorskip("hypothesis")
    started = time.monotonic()
    total = 0
    problems = []
    long_ones_first = readers(stub)[::-1]
    with ProcessPoolExecutor(os.cpu_count(), FORK) as pool:
        jobs = []
        for index, reader in enumerate(long_ones_first):
            count = round(1300 * reader.share)
            jobs.append(pool.submit(fuzz, reader, tmp_path / str(index), seed, count))
        for reader, job in zip(long_ones_first, jobs, strict=True):
            error = job.exception()
            if error:
                problems.append(f"{reader.name}: {type(error).__name__}: {error}")
                continue
            refused, read = job.result()
            total += refused + read
            with capsys.disabled():
                print(f"\n{reader.name}: {refused} inputs refused, {read} read", end="", flush=True)
            assert refused, reader.name
            assert read, reader.name
    seconds = time.monotonic() - started
    with capsys.disabled():
        print(f"\n{total} inputs, --seed={seed}, {seconds:.0f} s")
    assert not problems, "\n\n".join(problems)
    assert total >= 100_000


# ---- planted defects ------------------------------------------------------------------------


def write_outside() -> None:
    with suppress(Exception):
        Path("../beside").write_text("x")


def refuse_in_one_word() -> None:
    raise UserError("no")


def loop_forever() -> None:
    while True:
        pass


# What is told, and the defect
PLANTED = {
    "ended with SIGSEGV": lambda: ctypes.string_at(0),
    "ended with SIGPROF": loop_forever,
    "MemoryError": lambda: bytearray(10**10),
    "KeyError: 'prompt'": lambda: {}["prompt"],
    "open outside the folder": write_outside,
    "os.system": lambda: os.system("true"),
    "sentence: 'no'": refuse_in_one_word,
}
GOOD_ROW = '{"prompt": "who is it ?", "chosen": ["a fox", 7]}'


@pytest.mark.parametrize("problem", PLANTED)
def test_a_defect_is_found_and_made_small(tmp_path, problem):
    """A reader that fails on a row that is no object.

    Of all the changes that find it, a short row is left, beside three good ones.
    """
    pytest.importorskip("hypothesis")

    def make(folder: Path) -> None:
        (folder / "x.jsonl").write_text(f"{GOOD_ROW}\n" * 4)

    def read(folder: Path, name: str) -> None:
        for row in (folder / "x.jsonl").read_bytes().splitlines():
            try:
                value = json.loads(row)
            except (ValueError, RecursionError):
                raise UserError("a line that is no JSON") from None
            if not isinstance(value, dict):
                PLANTED[problem]()

    files = {"x.jsonl": (mutations.lined, mutations.raw)}
    reader = Reader("planted", 1, make, files, read)
    with pytest.raises(AssertionError, match=problem):
        fuzz(reader, tmp_path / "home", seed=0, count=1000, cpu_seconds=0.1)
    rows = (tmp_path / "home/finding").read_text().splitlines()
    assert len(rows) == 4
    assert rows.count(GOOD_ROW) == 3
    assert min(len(row) for row in rows) < 5
