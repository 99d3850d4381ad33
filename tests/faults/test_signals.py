"""Signals, two processes on one folder, a clock that is set back, and the same run twice."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import tqdm.std
from forks import Good, check_none_failed, check_sentence, ended, fork, spread, stages, start
from runs import Ended, differences, spawn, stages_of, write_stub
from shim import Disk

from minmacpo.runtime.progress import RESUMES

pytestmark = pytest.mark.faults
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def check_stopped(stopped: Ended, number: signal.Signals, log: Path) -> None:
    """It said so, or died before the run began to listen, or had no more work to stop.

    Which of them is added to `log`.
    """
    messages = {128 + number: f"\nstopped; {RESUMES}\n", -number: "", 0: ""}
    assert stopped.code in messages, stopped.err
    assert stopped.err == messages[stopped.code]
    with log.open("a") as stream:
        stream.write("stopped\n" if stopped.code > 128 else "other\n")


def check_most_stopped(log: Path) -> None:
    """Most of the points that were told came while a run was at work, and ended it."""
    endings = log.read_text().split()
    assert len(endings) > 20, endings
    assert endings.count("stopped") > len(endings) / 2, endings


def check_goes_on(words: list[str], root: Path, good: Good) -> None:
    """The same words end with the same bits, and what was finished already is not made again."""
    finished = stages(root / "small")
    again, _ = fork("train", [*words, f"--run.root={root}"])
    assert again.code == 0, again.err
    good.check(root / "small", finished)


def test_a_signal_at_many_operations(small, scratch, seed):
    """Each signal before 20 operations drawn at random.

    The run stops at the next good moment, and goes on later.
    """
    words, whole = small
    good = Good(whole)
    rng = random.Random(seed)
    log = scratch / "told"
    _, operations = fork("train", [*words, f"--run.root={scratch / 'counted'}"], Disk())
    points = []
    for number in SIGNALS:
        for at in rng.sample(range(len(operations)), 20):
            points.append((number, at))

    def check(point: tuple[signal.Signals, int]) -> None:
        number, at = point
        root = scratch / f"{number.name}{at}"
        stopped, _ = fork("train", [*words, f"--run.root={root}"], Disk(number, at))
        check_stopped(stopped, number, log)
        check_goes_on(words, root, good)

    failures = spread(check, points)
    check_none_failed(failures, points)
    check_most_stopped(log)


def test_a_second_signal_acts_at_once(small, scratch, seed):
    """At any moment, also within the writing of a file."""
    words, whole = small
    good = Good(whole)
    log = scratch / "told"

    def check(point: int) -> None:
        rng = random.Random(f"{seed}/{point}")
        root = scratch / str(point)
        output = scratch / f"said{point}"
        pid = start("train", [*words, f"--run.root={root}"], output)
        number = rng.choice(SIGNALS)
        time.sleep(0.1 + rng.random() * 0.5)
        for _ in range(2):
            os.kill(pid, number)
            time.sleep(rng.random() * 0.01)
        code = ended(pid)
        err = output.with_suffix(".err").read_text()
        check_stopped(Ended(code, "", err), number, log)
        check_goes_on(words, root, good)

    failures = spread(check, range(40))
    check_none_failed(failures, range(40))
    check_most_stopped(log)


def test_three_processes_that_start_on_one_folder(small, scratch, seed):
    """One works, the others say so and touch nothing; or they come after it, and find all done."""
    words, whole = small
    good = Good(whole)
    rng = random.Random(seed)
    shut_out = 0
    for attempt in range(10):
        root = scratch / str(attempt)
        outputs = [scratch / f"said{attempt}-{number}" for number in range(3)]
        pids = []
        for output in outputs:
            pids.append(start("train", [*words, f"--run.root={root}"], output))
            time.sleep(rng.random() * 0.03)

        codes = [ended(pid) for pid in pids]
        for code, output in zip(codes, outputs, strict=True):
            if code != 0:
                err = output.with_suffix(".err").read_text()
                check_sentence(Ended(code, "", err), "another process works on this run")
                shut_out += 1
        assert 0 in codes
        good.check(root / "small", {})
    assert shut_out > 5


class Clock:
    """A time of day that goes back by up to an hour at every look, to before 1970 in the end."""

    done = ()

    def install(self) -> None:
        now = iter(range(200_000, -(10**9), -3571))
        time.time = lambda: float(next(now))
        tqdm.std.time = time.time


def test_a_clock_that_is_set_back(small, scratch):
    """Nothing depends on it but what it is for; how long a stage took is not below zero."""
    words, whole = small
    good = Good(whole)
    run = scratch / "small"
    ran, _ = fork("train", [*words, f"--run.root={scratch}"], Clock(), reports=True)
    assert ran.code == 0, ran.err
    assert "Traceback" not in ran.err
    good.check(run, {})

    notes = stages_of(run).values()
    assert min(note["seconds"] for note in notes) >= 0
    assert min(note["started"] for note in notes) < 0

    # Programs that see the right time again
    table, _ = fork("eval", [str(run)])
    good_table, _ = fork("eval", [str(whole)])
    assert table.out == good_table.out
    finished = stages(run)
    again, _ = fork("train", [*words, f"--run.root={scratch}"], reports=True)
    assert again.code == 0, again.err
    good.check(run, finished)


def test_two_runs_are_the_same_bytes_and_env_json_says_what_may_differ(scratch):
    """Two processes with other hash seeds, places, languages and time zones."""
    surroundings = [
        {"PYTHONHASHSEED": "1", "TZ": "UTC", "LC_ALL": "C"},
        {"PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo", "LC_ALL": "C.UTF-8"},
    ]
    processes = []
    runs = []
    for number, variables in enumerate(surroundings):
        place = scratch / f"place{number}"
        write_stub(place)
        environment = os.environ | variables
        process = spawn("train", "@stub.toml", "--run.root=runs", cwd=place, env=environment)
        processes.append(process)
        runs.append(place / "runs/stub")
    for process in processes:
        _, err = process.communicate()
        assert process.returncode == 0, err
    assert differences(*runs) == []
    first, second = (json.loads((run / "env.json").read_text()) for run in runs)
    assert first == second
    assert first.keys() >= {
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
