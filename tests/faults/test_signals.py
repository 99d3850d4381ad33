"""Signals, two processes on one folder, a clock that is set back, and the same run twice."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import tqdm.std
from forks import Good, check_sentence, ended, fork, spread, stages, start
from runs import Ended, differences, spawn, write_stub
from shim import Disk

from minmacpo.runtime.progress import RESUMES

pytestmark = pytest.mark.faults
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def check_stopped(stopped: Ended, number: signal.Signals, told: Path) -> None:
    """It said so, or died before the run began to listen, or had no more work to stop.

    Which of them is added to `told`.
    """
    codes = {128 + number: f"\nstopped; {RESUMES}\n", -number: "", 0: ""}
    assert stopped.code in codes and stopped.err == codes[stopped.code], (stopped.code, stopped.err)
    with told.open("a") as stream:
        stream.write("stopped\n" if stopped.code > 128 else "other\n")


def check_most_stopped(told: Path) -> None:
    """Most of the points that were told came while a run was at work, and ended it."""
    said = told.read_text().split()
    assert said.count("stopped") > len(said) / 2 > 10, said


def test_a_signal_at_many_operations(small, scratch, seed):
    """Each signal before 20 operations drawn at random.

    The run stops at the next good moment, and goes on later.
    """
    words, whole = small
    good, rng, told = Good(whole), random.Random(seed), scratch / "told"
    _, done = fork("train", [*words, f"--run.root={scratch / 'counted'}"], Disk())
    points = [(number, at) for number in SIGNALS for at in rng.sample(range(len(done)), 20)]

    def check(point: tuple[signal.Signals, int]) -> None:
        root = scratch / f"{point[0].name}{point[1]}"
        stopped, _ = fork("train", [*words, f"--run.root={root}"], Disk(*point))
        check_stopped(stopped, point[0], told)
        there = stages(root / "small")
        again, _ = fork("train", [*words, f"--run.root={root}"])
        assert again.code == 0, again.err
        good.check(root / "small", there)

    failed = spread(check, points)
    assert not failed, f"{len(failed)} of {len(points)}: " + "\n".join(failed[:3])
    check_most_stopped(told)


def test_a_second_signal_acts_at_once(small, scratch, seed):
    """At any moment, also within the writing of a file."""
    words, whole = small
    good, told = Good(whole), scratch / "told"

    def check(point: int) -> None:
        rng, root, said = (
            random.Random(f"{seed}/{point}"),
            scratch / str(point),
            scratch / f"said{point}",
        )
        pid, number = start("train", [*words, f"--run.root={root}"], said), rng.choice(SIGNALS)
        time.sleep(0.1 + rng.random() * 0.5)
        for _ in range(2):
            os.kill(pid, number)
            time.sleep(rng.random() * 0.01)
        check_stopped(Ended(ended(pid), "", said.with_suffix(".err").read_text()), number, told)
        there = stages(root / "small") if (root / "small").exists() else {}
        again, _ = fork("train", [*words, f"--run.root={root}"])
        assert again.code == 0, again.err
        good.check(root / "small", there)

    failed = spread(check, range(40))
    assert not failed, f"{len(failed)}: " + "\n".join(failed[:3])
    check_most_stopped(told)


def test_three_processes_that_start_on_one_folder(small, scratch, seed):
    """One works, the others say so and touch nothing; or they come after it, and find all done."""
    words, whole = small
    good, rng, shut_out = Good(whole), random.Random(seed), 0
    for attempt in range(10):
        root, said = scratch / str(attempt), [scratch / f"said{attempt}-{i}" for i in range(3)]
        pids = []
        for name in said:
            pids.append(start("train", [*words, f"--run.root={root}"], name))
            time.sleep(rng.random() * 0.03)
        found = [
            Ended(ended(pid), "", name.with_suffix(".err").read_text())
            for pid, name in zip(pids, said, strict=True)
        ]
        assert any(one.code == 0 for one in found)
        for one in (one for one in found if one.code):
            check_sentence(one, "another process works on this run")
            shut_out += 1
        good.check(root / "small", {})
    assert shut_out > 5


class Clock:
    """A time of day that goes back by up to an hour at every look, to before 1970 in the end."""

    done = ()

    def install(self) -> None:
        now = iter(range(200_000, -(10**9), -3571))
        time.time = tqdm.std.time = lambda: float(next(now))


def test_a_clock_that_is_set_back(small, scratch):
    """Nothing depends on it but what it is for; how long a stage took is not below zero."""
    words, whole = small
    ran, _ = fork("train", [*words, f"--run.root={scratch}"], Clock(), reports=True)
    assert ran.code == 0 and "Traceback" not in ran.err, ran.err
    Good(whole).check(scratch / "small", {})
    notes = [json.loads(file.read_text()) for file in scratch.glob("small/*/*/stage.json")]
    assert (
        all(note["seconds"] >= 0 for note in notes) and min(note["started"] for note in notes) < 0
    )
    assert fork("eval", [str(scratch / "small")])[0].out == fork("eval", [str(whole)])[0].out
    there = stages(scratch / "small")
    assert fork("train", [*words, f"--run.root={scratch}"], reports=True)[0].code == 0
    Good(whole).check(scratch / "small", there)


def test_two_runs_are_the_same_bytes_and_env_json_says_what_may_differ(scratch):
    """Two processes with other hash seeds, places, languages and time zones."""
    surroundings = [
        {"PYTHONHASHSEED": "1", "TZ": "UTC", "LC_ALL": "C"},
        {"PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo", "LC_ALL": "C.UTF-8"},
    ]
    processes = []
    for number, around in enumerate(surroundings):
        place = scratch / f"place{number}"
        write_stub(place)
        processes.append(
            spawn("train", "@stub.toml", "--run.root=runs", cwd=place, env=os.environ | around)
        )
    for process in processes:
        _, err = process.communicate()
        assert process.returncode == 0, err
    one, two = (scratch / f"place{number}/runs/stub" for number in (0, 1))
    assert differences(one, two) == []
    environments = [json.loads((run / "env.json").read_text()) for run in (one, two)]
    assert environments[0] == environments[1]
    assert environments[0].keys() >= {
        "minmacpo",
        "commit",
        "python",
        "torch",
        "numpy",
        "safetensors",
        "sentencepiece",
        "system",
        "machine",
        "processor",
        "instructions",
        "device",
        "dtype",
        "threads",
        "matmul_precision",
        "deterministic",
        "command",
    }
