"""Kills and full disks under the other programs that write.

Answers, exports, verdicts, sheets, pages; and experiments.
"""

import json
import os
import random
import re
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from forks import (
    SMALL,
    check_none_failed,
    check_sentence,
    ended,
    fork,
    spread,
    start,
    tree,
)
from runs import spawn, write_stub
from shim import Disk
from test_judge import Server

pytestmark = pytest.mark.faults


@dataclass(frozen=True)
class Case:
    """A program that writes, and its words, in which {} stands for the folder it writes to."""

    program: str
    words: list

    def words_for(self, place: Path) -> list[str]:
        return [str(word).replace("{}", str(place)) for word in self.words]


@pytest.fixture(scope="module")
def cases(small, tmp_path_factory) -> dict[str, Case]:
    words, run = small
    place = tmp_path_factory.mktemp("cases")
    other, _ = fork("train", [*words, "--run.seed=1", f"--run.root={place}"])
    assert other.code == 0, other.err

    agent = run / "round1/student_pos"
    prompts = place / "prompts.txt"
    with prompts.open("w") as stream:
        for number in range(10):
            stream.write(f"where is {'it ' * (number % 3)}{number} ?\n")
    answers = [f"--prompts={prompts}", "--out={}/out.jsonl", "--generate.batch=4", "--n=2"]
    sides = [run / "eval/round0_student_samples", run / "eval/round1_student_samples"]
    judge = ["judge", *sides, "--out={}/judged"]
    return {
        "answers": Case("sample", [agent, *answers]),
        "merged": Case("sample", [agent, "--export={}/new/merged"]),
        "judge": Case("eval", [*judge, f"--url={Server().url}", "--workers=1"]),
        "sheet": Case("eval", [*judge, "--human"]),
        "released": Case("eval", ["export", run, "round1/pairs_student", "{}/pairs.json"]),
        "page": Case("eval", ["compare", run, place / "small", "--page={}/page.html"]),
    }


def outcome(place: Path) -> dict:
    """What a program has left, but for what a kill may leave that is no harm.

    That are the lines of verdicts that it tore, which were asked for again, and the empty place of
    an export that was killed when it was whole.
    """
    files = tree(place)
    if "new/merged" in files:
        files.pop("new/.merged.partial", None)
        files.pop("new/.merged.partial/lock", None)
    verdicts = files.get("judged/verdicts.jsonl")
    if verdicts:
        whole_lines = [line for line in verdicts.splitlines() if line.endswith(b"}")]
        files["judged/verdicts.jsonl"] = whole_lines
    return files


def check_goes_on(case: Case, place: Path, good: dict) -> None:
    """The same words make the same files; they may say that all is there already, where it is."""
    before = outcome(place)
    again, _ = fork(case.program, case.words_for(place))
    if again.code != 0:
        assert again.code == 2, again.err
        assert before == good, again.err
    assert outcome(place) == good


def faults_of(operations: list[str]) -> list[tuple]:
    """(fault, number of an operation): every fault that can come at each operation."""
    points = []
    for number, operation in enumerate(operations):
        points.append((signal.SIGKILL, number))
        if operation == "write":
            points.append(("tear", number))
        if operation in ("write", "open", "mkdir"):
            points.append(("full", number))
    return points


@pytest.mark.parametrize("name", ["answers", "merged", "judge", "sheet", "released", "page"])
def test_every_operation_of_the_other_programs(cases, scratch, name, capsys):
    """kill -9 before each and within each write.

    No room at each; then the same words make the same files, and no others.
    """
    case = cases[name]
    good_place = scratch / "good"
    good_place.mkdir()
    whole, operations = fork(case.program, case.words_for(good_place), Disk())
    assert whole.code == 0, whole.err
    good = outcome(good_place)
    points = faults_of(operations)

    def check(point: tuple) -> None:
        fault, number = point
        place = scratch / f"{fault}-{number}"
        place.mkdir()
        first, _ = fork(case.program, case.words_for(place), Disk(fault, number))
        if fault == "full":
            check_sentence(first, f"error: {place}", "No space left")
        else:
            assert first.code == -signal.SIGKILL
        check_goes_on(case, place, good)

    failures = spread(check, points)
    with capsys.disabled():
        print(f"\n{name}: {len(operations)} operations, {len(points)} faults")
    check_none_failed(failures, points)


def test_kills_at_random_moments_of_the_other_programs(cases, scratch, seed, capsys):
    """Twice each, the second time in what the first kill left."""
    good = {}
    durations = {}
    for name, case in cases.items():
        place = scratch / "whole" / name
        place.mkdir(parents=True)
        begun = time.monotonic()
        whole, _ = fork(case.program, case.words_for(place))
        assert whole.code == 0, whole.err
        durations[name] = time.monotonic() - begun
        good[name] = outcome(place)

    def check(point: tuple[str, int]) -> None:
        name, number = point
        case = cases[name]
        place = scratch / f"{name}{number}"
        rng = random.Random(f"{seed}/{point}")
        place.mkdir()
        for _ in range(2):
            pid = start(case.program, case.words_for(place), scratch / f"said-{name}{number}")
            time.sleep(rng.random() * durations[name])
            os.kill(pid, signal.SIGKILL)
            if ended(pid) == -signal.SIGKILL:
                with (scratch / "kills").open("a") as counter:
                    counter.write("x")
        check_goes_on(case, place, good[name])

    points = []
    for number in range(5):
        for name in sorted(cases):
            points.append((name, number))
    failures = spread(check, points)
    check_none_failed(failures, points)
    kills = (scratch / "kills").stat().st_size
    with capsys.disabled():
        print(f"\n{kills} kills at random moments of the other programs")
    assert kills >= 20


@pytest.mark.parametrize("name", ["answers", "merged", "judge"])
def test_two_processes_on_one_target(cases, scratch, name):
    """One of two processes writes.

    The other one says so, or that all is there; together they leave what one would have left.
    """
    case = cases[name]
    good_place = scratch / "good"
    good_place.mkdir()
    whole, _ = fork(case.program, case.words_for(good_place))
    assert whole.code == 0, whole.err
    good = outcome(good_place)

    place = scratch / "both"
    outputs = [scratch / "said0", scratch / "said1"]
    for _ in range(5):
        place.mkdir()
        pids = [start(case.program, case.words_for(place), output) for output in outputs]
        codes = [ended(pid) for pid in pids]
        assert 0 in codes
        for code, output in zip(codes, outputs, strict=True):
            if code != 0:
                err = output.with_suffix(".err").read_text()
                assert re.search("another process|exists already|not empty", err), err
                assert err.count("\n") == 1, err
        assert outcome(place) == good
        shutil.rmtree(place)


# ---- experiments --------------------------------------------------------------------------------

BUSY = "another process works on this run"


def interrupt(words: list[str], root: Path, rng: random.Random) -> None:
    """train.py with these words, killed three times while runs are at work on the root `root`."""
    for number in range(3):
        process = spawn("train", *words)
        while process.poll() is None and not list(root.glob("*/env.json")):
            time.sleep(0.02)
        longest = 8 if number else 2
        time.sleep(rng.random() * longest)
        process.kill()
        _, err = process.communicate()
        if process.returncode == -signal.SIGKILL:
            continue
        # It was faster, or has met a run that outlived the one before
        assert number > 0, err
        assert process.returncode == 0 or BUSY in err, err


def finish(words: list[str]) -> None:
    """train.py with these words, again and again until no run is in its way."""
    while True:
        process = spawn("train", *words)
        _, err = process.communicate()
        if process.returncode == 0:
            return
        assert process.returncode == 2, err
        assert BUSY in err
        assert err.count("\n") == 1, err
        time.sleep(0.2)


def results_of(root: Path) -> dict:
    """The results of the experiment, without times."""
    results = json.loads((root / "experiment-self/results.json").read_text())
    for row in results["variants"]:
        del row["cpu_seconds"]
        del row["spent"]
    return results


def test_kills_of_an_experiment(scratch, seed):
    """Real processes.

    A run that outlives its experiment goes on; until it has ended, the same words say that it is
    there.
    """
    words = ["@experiment-self", "--seeds=0", write_stub(scratch), *SMALL]
    whole = scratch / "whole"
    killed = scratch / "killed"
    killed_words = [*words, f"--run.root={killed}"]
    with spawn("train", *words, f"--run.root={whole}") as undisturbed:
        interrupt(killed_words, killed, random.Random(seed))
        finish(killed_words)
        _, err = undisturbed.communicate()
        assert undisturbed.returncode == 0, err
    assert list(killed.rglob("*.tmp")) == []
    assert list(killed.rglob(".partial")) == []
    assert results_of(killed) == results_of(whole)
