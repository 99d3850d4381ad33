"""Kills and full disks under the other programs that write.

Answers, exports, verdicts, sheets, pages; and experiments.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from forks import SMALL, check_sentence, ended, fork, spread, start, tree
from runs import spawn, write_stub
from shim import Disk
from test_judge import Server

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def cases(small, tmp_path_factory) -> dict[str, tuple[str, list[str]]]:
    """{name: (program, its words, in which {} stands for the folder it writes to)}."""
    words, run = small
    place, agent = tmp_path_factory.mktemp("cases"), run / "round1/student_pos"
    assert fork("train", [*words, "--run.seed=1", f"--run.root={place}"])[0].code == 0
    (place / "prompts.txt").write_text(
        "".join(f"where is {'it ' * (i % 3)}{i} ?\n" for i in range(10))
    )
    sides = [str(run / f"eval/round{t}_student_samples") for t in (0, 1)]
    return {
        "answers": (
            "sample",
            [
                agent,
                f"--prompts={place / 'prompts.txt'}",
                "--out={}/out.jsonl",
                "--generate.batch=4",
                "--n=2",
            ],
        ),
        "merged": ("sample", [agent, "--export={}/new/merged"]),
        "judge": (
            "eval",
            ["judge", *sides, "--out={}/judged", f"--url={Server().url}", "--workers=1"],
        ),
        "sheet": ("eval", ["judge", *sides, "--out={}/judged", "--human"]),
        "released": ("eval", ["export", run, "round1/pairs_student", "{}/pairs.json"]),
        "page": ("eval", ["compare", run, place / "small", "--page={}/page.html"]),
    }


def outcome(place: Path) -> dict:
    """What a program has left, but for the lines of verdicts that a kill tore, which were asked for
    again, and for the empty place of an export that was killed when it was whole.
    """
    found = tree(place)
    if "new/merged" in found:
        found = {
            path: text
            for path, text in found.items()
            if path not in ("new/.merged.partial", "new/.merged.partial/lock")
        }
    if text := found.get("judged/verdicts.jsonl"):
        found["judged/verdicts.jsonl"] = [line for line in text.splitlines() if line.endswith(b"}")]
    return found


@pytest.mark.parametrize("case", ["answers", "merged", "judge", "sheet", "released", "page"])
def test_every_operation_of_the_other_programs(cases, scratch, case, capsys):
    """kill -9 before each and within each write.

    No room at each; then the same words make the same files, and no others.
    """
    name, words = cases[case]

    def call(place: Path, *disk):
        """The program on a folder, which is there."""
        place.mkdir(exist_ok=True)
        return fork(name, [str(word).replace("{}", str(place)) for word in words], Disk(*disk))

    whole, done = call(scratch / "good")
    assert whole.code == 0, whole.err
    good = outcome(scratch / "good")
    points = [
        (fault, i)
        for i, what in enumerate(done)
        for fault in (signal.SIGKILL, "tear", "full")
        if fault == signal.SIGKILL
        or what == "write"
        or (fault == "full" and what in ("open", "mkdir"))
    ]

    def check(point: tuple) -> None:
        place = scratch / "-".join(map(str, point))
        first, _ = call(place, *point)
        if point[0] == "full":
            check_sentence(first, f"error: {place}", "No space left")
        else:
            assert first.code == -signal.SIGKILL
        kept = outcome(place)
        again, _ = call(place)
        assert again.code == 0 or (again.code == 2 and kept == good), (
            again.err
        )  # it is there already
        assert outcome(place) == good

    failed = spread(check, points)
    with capsys.disabled():
        print(f"\n{case}: {len(done)} operations, {len(points)} faults")
    assert not failed, f"{len(failed)} of {len(points)}: " + "\n".join(failed[:3])


def test_kills_at_random_moments_of_the_other_programs(cases, scratch, seed, capsys):
    """Twice each, the second time in what the first kill left."""
    good, lasted = {}, {}
    for case, (name, words) in cases.items():
        place, begun = scratch / "whole" / case, time.monotonic()
        place.mkdir(parents=True)
        assert fork(name, [str(word).replace("{}", str(place)) for word in words])[0].code == 0
        good[case], lasted[case] = outcome(place), time.monotonic() - begun

    def check(point: tuple[str, int]) -> None:
        case, number = point
        (name, words), place, rng = (
            cases[case],
            scratch / f"{case}{number}",
            random.Random(f"{seed}/{point}"),
        )
        place.mkdir()
        asked = [str(word).replace("{}", str(place)) for word in words]
        for _ in range(2):
            pid = start(name, asked, scratch / f"said-{case}{number}")
            time.sleep(rng.random() * lasted[case])
            os.kill(pid, signal.SIGKILL)
            if ended(pid) == -signal.SIGKILL:
                (scratch / "kills").open("a").write("x")
        kept, (again, _) = outcome(place), fork(name, asked)
        assert outcome(place) == good[case] and (
            again.code == 0 or (again.code == 2 and kept == good[case])
        ), again.err

    failed = spread(check, [(case, number) for number in range(5) for case in sorted(cases)])
    assert not failed, f"{len(failed)}: " + "\n".join(failed[:3])
    kills = (scratch / "kills").stat().st_size
    with capsys.disabled():
        print(f"\n{kills} kills at random moments of the other programs")
    assert kills >= 20


@pytest.mark.parametrize("case", ["answers", "merged", "judge"])
def test_two_processes_on_one_target(cases, scratch, case):
    """One of two processes writes.

    The other one says so, or that all is there; together they leave what one would have left.
    """
    name, words = cases[case]
    asked = {
        place: [str(word).replace("{}", str(scratch / place)) for word in words]
        for place in ("good", "both")
    }
    for place in asked:
        (scratch / place).mkdir()
    assert fork(name, asked["good"])[0].code == 0
    for _ in range(5):
        codes = [
            ended(pid)
            for pid in [start(name, asked["both"], scratch / f"said{i}") for i in range(2)]
        ]
        assert codes.count(0) >= 1
        for i in (i for i, code in enumerate(codes) if code):
            err = (scratch / f"said{i}.err").read_text()
            assert (
                "another process" in err or "exists already" in err or "not empty" in err
            ) and err.count("\n") == 1, err
        assert outcome(scratch / "both") == outcome(scratch / "good")
        shutil.rmtree(scratch / "both")
        (scratch / "both").mkdir()


def interrupted(words: list[str], place: Path, rng: random.Random) -> None:
    """train.py with these words, killed three times while runs are at work on the root `place`,
    then brought to its end.
    """
    for number in range(3):
        process = spawn("train", *words)
        while process.poll() is None and not [*place.glob("*/env.json")]:
            time.sleep(0.02)
        time.sleep(rng.random() * (8 if number else 2))
        process.kill()
        _, err = process.communicate()
        if (
            process.returncode != -signal.SIGKILL
        ):  # it was faster, or has met a run that outlived the one before
            assert number and (
                process.returncode == 0 or "another process works on this run" in err
            ), err
    while True:
        process = spawn("train", *words)
        _, err = process.communicate()
        if process.returncode == 0:
            return
        assert (
            process.returncode == 2
            and "another process works on this run" in err
            and err.count("\n") == 1
        ), err
        time.sleep(0.2)


def test_kills_of_an_experiment(scratch, seed):
    """Real processes.

    A run that outlives its experiment goes on; until it has ended, the same words say that it is
    there.
    """
    words = ["@experiment-self", "--seeds=0", write_stub(scratch), *SMALL]
    roots = [scratch / name for name in ("whole", "killed")]
    with spawn("train", *words, f"--run.root={roots[0]}") as undisturbed:
        interrupted([*words, f"--run.root={roots[1]}"], roots[1], random.Random(seed))
        _, err = undisturbed.communicate()
        assert undisturbed.returncode == 0, err
    assert not [*roots[1].rglob("*.tmp"), *roots[1].rglob(".partial")]
    whole, killed = (
        json.loads((root / "experiment-self/results.json").read_text()) for root in roots
    )
    for row in whole["variants"] + killed["variants"]:
        del row["cpu_seconds"], row["spent"]
    assert whole == killed
