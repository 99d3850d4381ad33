"""Every reader on changed files: one sentence (UserError) or a value, and never anything else.

Hypothesis draws the inputs, and makes those that fail small; the few of the default suite are drawn without it, the same each time.
"""

import ctypes
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
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

    with closing(Reading(reader, home)) as reading:

        @start(seed)
        @settings(max_examples=count, database=None, deadline=None, phases=(Phase.generate, Phase.shrink),
                  suppress_health_check=[*HealthCheck], report_multiple_bugs=False)  # fmt: skip
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
    total, started = 0, time.monotonic()
    todo = sorted(readers(stub), key=lambda reader: -reader.share)
    with ProcessPoolExecutor(os.cpu_count(), FORK) as pool:
        jobs = [pool.submit(fuzz, reader, tmp_path / str(i), seed, round(1300 * reader.share)) for i, reader in enumerate(todo)]
        for reader, job in zip(todo, jobs, strict=True):
            refused, read = job.result()
            assert refused and read, reader.name
            total += refused + read
            with capsys.disabled():
                print(f"\n{reader.name}: {refused} inputs refused, {read} read", end="", flush=True)
    with capsys.disabled():
        print(f"\n{total} inputs, --seed={seed}, {time.monotonic() - started:.0f} s")
    assert total >= 100_000
