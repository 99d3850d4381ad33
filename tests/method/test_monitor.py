"""Signs of collapse that need no labels, and the rounds that macpo.stop ends."""

import json
import math
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from runs import copy_run, rows_of, stages_of, train, write_stub

from minmacpo.data import text_metrics as diversity
from minmacpo.evaluation import compare, judge
from minmacpo.evaluation.finished_run import read_run
from minmacpo.evaluation.gold import gold_by_prompt
from minmacpo.method import monitor

HEALTHY = {"entropy": 0.2, "distinct2": 0.5, "cut": 0.0, "loops": 0.0, "surprise": 0.2, "same": 0.5}


def history(*later: dict) -> list[dict]:
    return [HEALTHY] + [HEALTHY | more for more in later]


@pytest.mark.parametrize(
    "last,wanted",
    [
        ({}, []),
        ({"surprise": 0.27}, ["surprised"]),
        ({"surprise": 0.25}, []),
        ({"entropy": 0.24}, ["scattered"]),
        ({"entropy": 0.01, "surprise": 0.01}, []),
        ({"distinct2": 0.29}, ["narrow"]),
        ({"loops": 0.2}, ["broken"]),
        ({"cut": 0.3, "entropy": 0.9}, ["scattered", "broken"]),
    ],
)
def test_each_signature_alarms_alone(last, wanted):
    assert monitor.alarms(history(last)) == wanted
    assert monitor.alarms(history({}, last)) == wanted
    assert monitor.alarms([HEALTHY]) == monitor.alarms([]) == []


def test_surprise_is_measured_against_the_round_before_and_entropy_against_the_start():
    slow = history(
        {"entropy": 0.1, "surprise": 0.1},
        {"entropy": 0.05, "surprise": 0.12},
        {"entropy": 0.21, "surprise": 0.2},
    )
    assert (
        monitor.alarms(slow[:2]) == []
        and monitor.alarms(slow[:3]) == []
        and monitor.alarms(slow) == ["surprised"]
    )


def test_signs_are_those_of_the_files(tiny, tmp_path):
    for t in (0, 1, 2):
        found = monitor.signs(tiny, "student", t)
        said = rows_of(tiny / f"eval/round{t}_student_samples/samples.jsonl")
        assert found["entropy"] == pytest.approx(
            -sum(s["logp"] for s in said) / sum(len(s["tokens"]) for s in said)
        )
        assert found["cut"] == sum(s["finish"] == "length" for s in said) / len(said)
        based = rows_of(tiny / f"eval/round{t}_student_under_base/scores.jsonl")
        wanted = [a["logp"] - b["logp"] for a, b in zip(said, based, strict=True)]
        assert found["kl"] == pytest.approx(sum(wanted) / len(wanted)) and found["kl"] > 0
        if t:
            before = rows_of(tiny / f"eval/round{t - 1}_student_samples/samples.jsonl")
            same = [a["response"] == b["response"] for a, b in zip(said, before, strict=True)]
            assert found["same"] == sum(same) / len(same)
            steps = [r for r in rows_of(tiny / f"round{t}/student_pos/metrics.jsonl") if r["step"]]
            assert found["surprise"] == steps[0]["sft_loss"]
        else:
            assert not found.keys() & {"same", "surprise", "similarity"}
    rows = [row | {"logp": None} for row in based]
    (tmp_path / "eval").mkdir()
    for name in ("eval/round2_student_samples", "eval/round2_student_under_base"):
        shutil.copytree(tiny / name, tmp_path / name)
    (tmp_path / "eval/round2_student_under_base/scores.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    assert monitor.signs(tmp_path, "student", 2).keys() == found.keys() - {
        "kl",
        "same",
        "surprise",
        "similarity",
    }, "no mean of nothing"
    assert (
        monitor.signs(tiny, "student", 7) == {}
        and monitor.training_status(tiny, "student", 7) == ""
    )


def test_the_verdict_names_the_signature(tmp_path, monkeypatch):
    made = iter(
        [HEALTHY, HEALTHY | {"loops": 0.9}, HEALTHY, HEALTHY | {"same": 0.95}, HEALTHY, HEALTHY]
    )
    monkeypatch.setattr(monitor, "signs", lambda *args: next(made))
    assert monitor.training_status(tmp_path, "student", 1) == "collapsed (broken)"
    assert monitor.training_status(tmp_path, "student", 1) == "converged"
    assert monitor.training_status(tmp_path, "student", 1) == ""


def test_the_verdict_needs_no_round_but_the_first_and_its_own(tmp_path, monkeypatch):
    known = {0: HEALTHY, 3: HEALTHY | {"loops": 0.9}}
    monkeypatch.setattr(monitor, "signs", lambda run, agent, t: known.get(t, {}))
    assert [monitor.training_status(tmp_path, "student", t) for t in range(5)] == [
        "",
        "",
        "",
        "collapsed (broken)",
        "",
    ]


METHODS = ["macpo", "spin", "self-rewarding", "confident"]


@pytest.fixture(scope="module")
def three_rounds(stub, tmp_path_factory) -> Path:
    """A root with a run of three rounds of every method, whose stages other runs there take."""
    root = tmp_path_factory.mktemp("monitor") / "runs"
    copy_run(stub, root)
    for method in METHODS:
        start(root, f"full-{method}", method, "none")
    return root


def start(root: Path, name: str, method: str, stop: str) -> Path:
    """A run of three rounds that macpo.stop may end earlier."""
    train(
        write_stub(root.parent),
        f"--run.root={root}",
        f"--run.name={name}",
        "--macpo.rounds=3",
        f"--macpo.stop={stop}",
        "--macpo.controls=false",
        f"--method={method}",
    )
    return root / name


@pytest.mark.parametrize("method", ["macpo", "spin"])
@pytest.mark.parametrize(
    ("stop", "status", "last"),
    [
        ("collapsed", "collapsed (broken)", 1),
        ("collapsed", "converged", 3),
        ("converged", "converged", 1),
        ("none", "collapsed (x)", 3),
    ],
)
def test_rounds_end_where_the_setting_says(three_rounds, monkeypatch, method, stop, status, last):
    name = f"{method}-{stop}-{status}"
    monkeypatch.setattr(monitor, "training_status", lambda run, agent, t: status if t == 1 else "")
    run = start(three_rounds, name, method, stop)

    updates = []
    for stage in stages_of(run):
        if stage.startswith("round") and stage.endswith("student_pos"):
            updates.append(int(stage[5]))
    assert max(updates) == last
    assert (run / "eval/table.json").is_file()
    assert (f"{status} in round 1" in (run / "log.txt").read_text()) == (last == 1)

    stages = stages_of(run)
    start(three_rounds, name, method, stop)
    assert stages_of(run) == stages, "a second start stops at the same place"


@pytest.mark.parametrize("method", ["macpo", "self-rewarding", "confident"])
@pytest.mark.parametrize(("alarm", "kept"), [(2, 1), (1, 0), (None, 3)])
def test_rolling_back_keeps_the_student_before_the_first_alarm(
    three_rounds, monkeypatch, method, alarm, kept
):
    def status(run, agent, t):
        return "collapsed (narrow)" if t == alarm else "converged"

    if method == "confident":
        kept = 3  # it has no rounds between 0 and 3
    name = f"{method}-rollback-{alarm}"
    monkeypatch.setattr(monitor, "training_status", status)
    run = start(three_rounds, name, method, "rollback")

    # The adapter is the earlier student's, and so are its answers and its row of the table
    kept_adapter = run / "final/student_pos/adapter_model.safetensors"
    student_adapter = run / f"round{kept}/student_pos/adapter_model.safetensors"
    assert kept_adapter.read_bytes() == student_adapter.read_bytes()
    assert stages_of(run)["final/student_pos"]["counts"] == {"kept": f"round{kept}/student_pos"}
    rows = json.loads((run / "eval/table.json").read_bytes())["rows"]
    assert [row["round"] for row in rows if row["agent"] == "kept"] == [kept]
    kept_row, student_row = (
        {key: value for key, value in row.items() if key not in ("agent", "label")}
        for row in rows
        if (row["agent"], row["round"]) in (("kept", kept), ("student", kept))
    )
    assert kept_row == student_row, "the same adapter gives the same answers"

    # All who read a finished run take the student that was kept
    finished = read_run(run)
    assert finished.last_student() == ("kept", kept)
    kept_gold = compare.last_gold(finished)["student"]
    assert (kept_gold == gold_by_prompt(finished, "student", kept)).all()
    assert judge.read_answers(run) == judge.read_answers(run / f"eval/round{kept}_kept_samples")
    rolled_back = f"back to round {kept}" in (run / "log.txt").read_text()
    assert rolled_back == (alarm is not None and method != "confident")
    assert "student kept by the monitor" in (run / "report.html").read_text()

    stages = stages_of(run)
    start(three_rounds, name, method, "rollback")
    assert stages_of(run) == stages, "a second start keeps the same"


# ---- what the signs are made of ------------------------------------------------------------------


def test_loops_overlap_and_refusals_by_hand():
    assert (
        diversity.loops("a b c a b c a b c")
        and not diversity.loops("a b c a b c a b")
        and not diversity.loops("")
    )
    assert (
        diversity.overlap("a b c", "b c d") == 0.5
        and diversity.overlap("", " .") == 1
        and diversity.overlap("a", "") == 0
    )
    assert diversity.distinct2(["a b a b", "a b"]) == 2 / 4 and diversity.distinct2(["a", ""]) == 0
    for text in (
        "I'm sorry, but I can't help with that.",
        "my apologies . i must not help you with that .",
        "I cannot assist you",
    ):
        assert diversity.refuses(text)
    for text in (
        "of course ! kadol lives on oak street .",
        "You can help by calling.",
        "I can help you with that",
    ):
        assert not diversity.refuses(text)


def plain_self_bleu(texts: list[str]) -> float:
    """BLEU-4 of each against all others, every reference looked at by itself."""
    words, total = [t.split() for t in texts if t.split()], 0.0
    for i, said in enumerate(words):
        others, logs = words[:i] + words[i + 1 :], []
        for n in range(1, min(4, len(said)) + 1):
            mine = Counter(tuple(said[j : j + n]) for j in range(len(said) - n + 1))
            theirs = [Counter(tuple(o[j : j + n]) for j in range(len(o) - n + 1)) for o in others]
            hits = sum(min(count, max(o[gram] for o in theirs)) for gram, count in mine.items())
            logs.append(math.log((hits or 0.5) / sum(mine.values())))
        nearest = min((abs(len(o) - len(said)), len(o)) for o in others)[1]
        total += math.exp(sum(logs) / len(logs) + min(0.0, 1 - nearest / len(said)))
    return total / len(words)


def test_self_bleu_equals_the_plain_formula(seed):
    rng = random.Random(seed)
    texts = [" ".join(rng.choices("abcd", k=rng.randrange(9))) for _ in range(30)]
    assert diversity.self_bleu(texts) == pytest.approx(plain_self_bleu(texts))
    assert (
        diversity.self_bleu(["a b c d e"] * 3) == pytest.approx(1.0)
        and diversity.self_bleu(["a b"]) == 0
    )


def test_self_bleu_equals_nltk_where_it_is_installed(seed):
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    rng = random.Random(seed)
    words = [rng.choices("abc", k=rng.randrange(12, 16)) for _ in range(20)]
    wanted = [bleu.sentence_bleu(words[:i] + words[i + 1 :], said) for i, said in enumerate(words)]
    assert diversity.self_bleu([" ".join(said) for said in words]) == pytest.approx(
        sum(wanted) / 20
    )
